"""One training step of the LTX transformer against diffusers' with the same weights: forward, squared error, all gradients.

python -m tools.bench.dit           28 M parameters on CPU, fp32 and bf16 (autocast), eager and compiled
python -m tools.bench.dit --quick   one short turn of two layers, to see that it runs
python -m tools.bench.dit --device cuda --size 2b --precision bf16 --tokens 6144 17408 --checkpointing selective

All variants in one process, in turns, each first in another turn; ratios are taken turn by turn (theirs / ours), so what else
runs on the machine hits all. Blocks are compiled one by one in both. Memory is what the forward pass leaves for the backward
pass (CPU), or the peak (CUDA, where tokens a second and the share of `--peak-tflops` are shown as well; recomputation does not
count). Aims: float32 never slower; bf16 compiled 1.25 times diffusers eager and 1.05 times diffusers compiled, on CUDA 1.5 and
1.15; no more memory. Exit code 1 when one is missed. 128 text tokens, batch 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import torch
from torch import nn

from tools.bench.dit_models import GRID, TEXT_TOKENS, Case, Variant, build, variants
from tools.bench.memory import kept_bytes
from videofm.models.flops import flops_per_sample

MIB = 2**20
FP32_AIM = 1.0
COMPILED_AIMS = {"cpu": (1.25, 1.05), "cuda": (1.5, 1.15)}
"""Of bf16 with compiled blocks: against diffusers eager, and compiled."""

Turns = list[dict[str, float]]


def turns(runs: dict[str, Callable[[], None]], repeats: int, wait: Callable[[], None]) -> Turns:
    """Seconds of each of `runs`, a dict a turn; a first turn, which compiles, does not count."""
    names, found = list(runs), []
    for turn in range(repeats + 1):
        start, seconds = turn % len(names), {}
        for name in names[start:] + names[:start]:
            wait()
            started = time.perf_counter()
            runs[name]()
            wait()
            seconds[name] = time.perf_counter() - started
        found.append(seconds)
    return found[1:]


def peak_bytes(step: Callable[[], None]) -> int:
    """The most memory that a step holds on the GPU, weights included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def compare(label: str, found: Turns, ours: str, theirs: str, aim: float | None) -> bool:
    """Print one line of the table; whether the aim is met."""
    ratios = [seconds[theirs] / seconds[ours] for seconds in found]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    own, other = (statistics.median(seconds[name] for seconds in found) * 1000 for name in (ours, theirs))
    met = aim is None or middle >= aim
    line = f"{label}  {ours:14} {own:9.1f} ms  {theirs:18} {other:9.1f} ms  ratio {middle:5.2f} ({low:.2f} to {high:.2f})"
    print(line + ("" if met else f"   aim {aim} missed"), flush=True)
    return met


def compare_memory(label: str, found: dict[str, Variant], case: Case) -> bool:
    """Print what each variant holds; whether ours hold no more than diffusers' in the same mode, to 1 %.

    Against `selective` there is no aim: diffusers keeps nothing but inputs of blocks, and computes everything again.
    """
    measured = {
        name: peak_bytes(variant.step) if case.device == "cuda" else kept_bytes(variant.forward)
        for name, variant in found.items()
    }
    print(f"{label}  MiB: " + ", ".join(f"{name} {size / MIB:.1f}" for name, size in measured.items()), flush=True)
    if case.checkpointing == "selective":
        return True
    pairs = [(size, measured[name.replace("ours", "diffusers")]) for name, size in measured.items() if "ours" in name]
    return all(own <= 1.01 * other for own, other in pairs)


def show_rates(found: Turns, model: nn.Module, case: Case, peak_tflops: float) -> None:
    """Print tokens a second, and the share of the device's peak that the model's own arithmetic takes."""
    flops = flops_per_sample(model, case.num_tokens, TEXT_TOKENS)
    for name in found[0]:
        seconds = statistics.median(turn[name] for turn in found)
        print(f"    {name:18} {case.num_tokens / seconds:10.0f} tokens/s, MFU {flops / seconds / peak_tflops / 1e12:.1%}")


def run_case(case: Case, pair: tuple[nn.Module, nn.Module], args: argparse.Namespace) -> bool:
    """All lines of one number of tokens and one precision; whether its aims are met."""
    wait = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    is_compiled = "compiled" in args.modes
    made = variants(*pair, case, is_compiled)
    found = turns({name: variant.step for name, variant in made.items()}, args.repeats, wait)
    label = f"{case.precision} {case.num_tokens:6} tokens"
    met = compare(label, found, "ours", "diffusers", FP32_AIM if case.precision == "fp32" else None)
    if is_compiled:
        eager_aim, compiled_aim = COMPILED_AIMS[case.device] if case.precision == "bf16" else (None, FP32_AIM)
        met &= compare(label, found, "ours compiled", "diffusers", eager_aim)
        met &= compare(label, found, "ours compiled", "diffusers compiled", compiled_aim)
    if case.device == "cuda":
        show_rates(found, pair[0], case, args.peak_tflops)
    return compare_memory(label, made, case) and met


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tokens = f"sequence lengths, multiples of {GRID**2}"
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 6144], help=tokens)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="which to compare")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"], help="of both")
    parser.add_argument("--size", default="scaled", help="scaled (28 M parameters) or a size of dit/ltx")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where")
    checkpointing = "of our blocks; diffusers checkpoints its own way unless this is none"
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], default="none", help=checkpointing)
    parser.add_argument("--repeats", type=int, default=5, help="turns that count (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads on CPU (default 2)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU in bf16 (default: H100, H200)")
    parser.add_argument("--quick", action="store_true", help="256 tokens, two layers, one turn, eager, no aims")
    return parser.parse_args()


def main() -> int:
    """Print the table; 1 when an aim is missed."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.tokens, args.modes, args.repeats = [GRID**2], ["eager"], 1
    pair = build(args.size, args.device, 2 if args.quick else None)
    count = sum(parameter.numel() for parameter in pair[0].parameters())
    print(f"LTX transformer, {count / 1e6:.1f} M parameters, {args.device}, {args.threads} threads", flush=True)
    met = [
        run_case(Case(args.size, args.device, num_tokens, precision, args.checkpointing), pair, args)
        for precision in args.precision
        for num_tokens in args.tokens
    ]
    return 0 if all(met) or args.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())
