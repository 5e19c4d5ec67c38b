"""The LTX VAE against diffusers' with the same weights; aims: 1.2 times as fast at encode, decode and training, no more memory.

python -m tools.bench.vae [--quick] [--repeats 9]   speed and peak memory on CPU, at a quarter of the widths
python -m tools.bench.vae --stream                  peak memory of 17, 65 and 257 frames by streaming; aim: within 10 %
python -m tools.bench.vae --device cuda             the release 0.9.1 in bfloat16 at 121x512x768: times and ratios

Speed: both models in one process, in turns, each first in every other turn; the ratio is taken turn by turn (theirs / ours), so
what else runs on the machine hits both. Threads wait without spinning (OMP_WAIT_POLICY), or a second process on the same cores
slows either model tenfold. Memory: a process for each model and shape (vae_memory.py). Exit code 1 when an aim is missed. The
last shape has no aim: with two clips aten takes oneDNN for diffusers too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import torch

from tools.bench.vae_memory import STREAM_CHUNK, STREAM_PIXELS, run_child
from tools.bench.vae_models import QUARTER, Shape, build_ours, build_theirs, inputs, operations_of

SPEED_AIM, STREAM_AIM = 1.2, 1.1
SHAPES = (Shape(1, 17, 128, 128), Shape(1, 33, 128, 128), Shape(1, 17, 256, 256))
WITHOUT_AIM = Shape(2, 17, 128, 128)
STREAM_FRAMES = (17, 65, 257)
CUDA_SHAPE = Shape(1, 121, 512, 768)


def turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, wait: Callable[[], None]
) -> list[tuple[float, float]]:
    """Seconds of ours and of theirs, for each turn; a first turn does not count."""
    found = []
    for turn in range(repeats + 1):
        seconds = {}
        for run in (ours, theirs) if turn % 2 else (theirs, ours):
            wait()
            started = time.perf_counter()
            run()
            wait()
            seconds[run] = time.perf_counter() - started
        found.append((seconds[ours], seconds[theirs]))
    return found[1:]


def row(name: str, found: list[tuple[float, float]], peaks: tuple[int, int] | None, aimed: bool) -> bool:
    """Print one line of the table; whether the aims are met."""
    low, middle, high = statistics.quantiles([theirs / ours for ours, theirs in found], n=4)
    ours, theirs = (statistics.median(side) * 1000 for side in zip(*found, strict=True))
    line = f"{name:44} {ours:9.1f} {theirs:9.1f} {middle:8.2f} {low:6.2f} {high:6.2f}"
    met = middle >= SPEED_AIM
    if peaks is not None:
        line += f" {peaks[0] / 2**20:9.1f} {peaks[1] / 2**20:9.1f}"
        met = met and peaks[0] <= peaks[1]
    print(line + ("" if met or not aimed else "   aim missed"), flush=True)
    return met or not aimed


def header(title: str) -> None:
    """The head of the table."""
    columns = ("ours, ms", "theirs", "ratio", "lower", "upper", "ours, MiB", "theirs")
    print(f"\n{title}\n{'':44}", *(f"{name:>{width}}" for name, width in zip(columns, (9, 9, 8, 6, 6, 9, 9), strict=True)))


def compare(releases: list[str], shapes: tuple[Shape, ...], repeats: int) -> bool:
    """The table on CPU; whether all aims are met."""
    met = []
    threads = torch.get_num_threads()
    for release in releases:
        ours = build_ours(release)
        theirs = build_theirs(ours)
        count = sum(parameter.numel() for parameter in ours.parameters())
        header(f"LTX VAE {release} at a quarter of its widths, {count / 1e6:.1f} M parameters, float32, {threads} threads")
        for shape in shapes:
            runs = operations_of(ours, theirs, inputs(ours, shape))
            request = {"release": release, "shape": shape, "threads": threads}
            peaks = {side: run_child(request | {"what": side}) for side in runs}
            for name in runs["ours"]:
                found = turns(runs["ours"][name], runs["theirs"][name], repeats, lambda: None)
                both = (peaks["ours"][name], peaks["theirs"][name])
                met.append(row(f"{name}, {shape}", found, both, shape != WITHOUT_AIM))
    return all(met)


def stream(releases: list[str]) -> bool:
    """Peak memory of streams by length; whether it stays flat."""
    met = []
    for release in releases:
        title = f"LTX VAE {release} at a quarter of its widths, causal decoder, {STREAM_PIXELS}x{STREAM_PIXELS}"
        print(f"\n{title}, chunks of {STREAM_CHUNK - 1} frames: peak MiB beside input and output")
        request = {"what": "stream", "release": release, "threads": torch.get_num_threads()}
        found = {count: run_child(request | {"num_frames": count}) for count in STREAM_FRAMES}
        for name in ("encode", "decode"):
            peaks = [found[count][name] / 2**20 for count in STREAM_FRAMES]
            growth = max(peaks) / min(peaks)
            values = "   ".join(f"{count} frames {value:6.1f}" for count, value in zip(STREAM_FRAMES, peaks, strict=True))
            print(f"{name:8} {values}   largest / smallest {growth:.3f}, aim <= {STREAM_AIM}", flush=True)
            met.append(growth <= STREAM_AIM)
    return all(met)


def compare_cuda(repeats: int) -> bool:
    """The release 0.9.1 at its full width on one GPU."""
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device, and --device cuda measures nothing else.")
        return True
    ours = build_ours("0.9.1", full_width=True)
    theirs = build_theirs(ours).to("cuda", torch.bfloat16)
    ours = ours.to("cuda", torch.bfloat16)
    runs = operations_of(ours, theirs, inputs(ours, CUDA_SHAPE, "cuda", torch.bfloat16))
    header(f"LTX VAE 0.9.1, bfloat16, {torch.cuda.get_device_name()}")
    for name in ("encode", "decode"):
        peaks = []
        for side in ("ours", "theirs"):
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            runs[side][name]()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        found = turns(runs["ours"][name], runs["theirs"][name], repeats, torch.cuda.synchronize)
        row(f"{name}, {CUDA_SHAPE}", found, (peaks[0], peaks[1]), aimed=False)
    return True


def main() -> int:
    """Print the tables; 1 when an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default cpu)")
    parser.add_argument("--stream", action="store_true", help="the memory of streams instead of the comparison")
    parser.add_argument("--quick", action="store_true", help="the first shape of the first release, 3 turns")
    parser.add_argument("--releases", nargs="+", choices=list(QUARTER), default=list(QUARTER), help="which to compare")
    parser.add_argument("--repeats", type=int, default=9, help="turns that count, for each row (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="threads on CPU (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    releases, repeats = args.releases, args.repeats
    shapes: tuple[Shape, ...] = (*SHAPES, WITHOUT_AIM)
    if args.quick:
        releases, shapes, repeats = releases[:1], SHAPES[:1], 3
    if args.device == "cuda":
        met = compare_cuda(repeats)
    elif args.stream:
        met = stream(releases)
    else:
        met = compare(releases, shapes, repeats)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
