"""Attention over several ranks: time and bytes sent of each strategy beside DeepSpeed's and yunchang's Ulysses; call overhead.

python -m tools.bench.attention [--quick]        2 and 4 gloo ranks of one thread each, then strategy none on one process
python -m tools.bench.attention --device cuda    the backends against each other, head widths 64 and 128, TFLOP/s

A turn is a forward and a backward pass between two barriers, so a rank that is late counts for all. All strategies and peers
run in the same processes with the same inputs, in turns, each first in another turn; a ratio is one of medians (theirs over our
Ulysses). The peers compute attention by the same `scaled_dot_product_attention`, and their results are compared with ours
before any of them is timed. Bytes are what rank 0 hands to `torch.distributed` for other ranks, counted by a wrapper around the
collectives; the formulas are those of sequence parallelism (arXiv 2309.14509, 2310.01889, 2405.07719) for the forward pass and
for both. Exit code 1 when more is sent, or when the call of a backend costs over 2 % of a bare `scaled_dot_product_attention`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.helpers import run_distributed
from videofm.attention.api import AttentionSpec, choose
from videofm.attention.layout import SequenceLayout
from videofm.attention.strategies import SequencePlace, none
from videofm.errors import ConfigError
from videofm.registry import ATTENTION_STRATEGIES, lookup

NUM_HEADS, HEAD_WIDTH = 8, 64
STRATEGIES = ("ulysses", "allgather_kv", "ring", "unified")
PEERS = ("deepspeed", "yunchang")
OVERHEAD_AIM = 1.02
CUDA_WIDTH = 2048
CUDA_BACKENDS = ("sdpa", "flash_attn", "xformers", "flex")
"""All but `math`, which holds the whole matrix."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Sent = dict[str, int]


def turns(runs: Mapping[str, Callable[[], Any]], repeats: int, wait: Callable[[], Any]) -> dict[str, float]:
    """The median seconds of each of `runs`, from one `wait` to the next; a first turn does not count."""
    names = list(runs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            wait()
            started = time.perf_counter()
            runs[name]()
            wait()
            found[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


# --- what is sent -------------------------------------------------------------------------------------------------------------


@contextmanager
def recording() -> Iterator[list[int]]:
    """The bytes that each message of this rank carries to other ranks, in the order of the calls."""
    sent: list[int] = []
    exchange, gather, batch = dist.all_to_all_single, dist.all_gather_into_tensor, dist.batch_isend_irecv

    def all_to_all_single(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        **rest: Any,
    ) -> Any:
        own = 1 / dist.get_world_size(group)
        if input_split_sizes:
            own = input_split_sizes[dist.get_rank(group)] / sum(input_split_sizes)
        sent.append(round(input.nbytes * (1 - own)))
        return exchange(output, input, output_split_sizes, input_split_sizes, group, **rest)

    def all_gather_into_tensor(output: Tensor, input: Tensor, group: Any = None, **rest: Any) -> Any:
        sent.append(input.nbytes * (dist.get_world_size(group) - 1))
        return gather(output, input, group, **rest)

    def batch_isend_irecv(operations: Any) -> Any:
        sent.extend(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)
        return batch(operations)

    with mock.patch.multiple(
        dist,
        all_to_all_single=all_to_all_single,
        all_gather_into_tensor=all_gather_into_tensor,
        batch_isend_irecv=batch_isend_irecv,
    ):
        yield sent


def formula(name: str, num_tokens: int, num_ranks: int, itemsize: int) -> Sent:
    """Bytes that a rank sends for one sample, forward and in both passes; gradients that go round a ring are float32.

    The way back of allgather_kv gathers again, since it keeps a rank's own keys and values only, and then scatters gradients.

    Unified runs on the grid 2 x (ranks / 2): Ulysses over 2, the ring over the rest.
    """
    whole = num_tokens * NUM_HEADS * HEAD_WIDTH  # elements of one of q, k, v, out

    def ulysses(elements: int, degree: int) -> int:
        return 4 * itemsize * elements * (degree - 1) // degree**2

    def ring(elements: int, degree: int) -> Sent:
        forward = 2 * itemsize * elements * (degree - 1) // degree
        return {"forward": forward, "both": 2 * forward + 2 * 4 * elements}

    if name == "ring":
        return ring(whole, num_ranks)
    if name == "allgather_kv":
        forward = ring(whole, num_ranks)["forward"]
        return {"forward": forward, "both": 3 * forward}
    if name == "unified":
        outer, traded = ring(whole // 2, num_ranks // 2), ulysses(whole // (num_ranks // 2), 2)
        return {"forward": outer["forward"] + traded, "both": outer["both"] + 2 * traded}
    forward = ulysses(whole, num_ranks)
    return {"forward": forward, "both": 2 * forward}


# --- ours and the peers' ------------------------------------------------------------------------------------------------------


def local(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """What the peers compute between their messages: q, k, v `(B, L, N, K)` -> like q; what else they pass is left at rest."""
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def forward_backward(attend: Attend, leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    """The result of `attend` for the `leaves` q, k and v, and their gradients for that of the result, `dout`."""
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def our_strategies(num_ranks: int, num_tokens: int) -> dict[str, Attend]:
    """Each strategy over all ranks, with the tokens in equal parts; `unified` where the ranks form a grid of 2 x 2."""
    spec = AttentionSpec(NUM_HEADS, HEAD_WIDTH, needs_lse=True)
    found: dict[str, Attend] = {}
    for name in STRATEGIES:
        if name == "unified" and num_ranks < 4:
            continue
        place = grid(num_ranks) if name == "unified" else SequencePlace(dist.group.WORLD)
        place.layout = SequenceLayout.contiguous(num_tokens, num_ranks // place.ulysses_degree, place.ulysses_degree)
        found[name] = lookup(ATTENTION_STRATEGIES, name, "strategy").wrap(choose("sdpa", spec), place, spec)
    return found


def grid(num_ranks: int) -> SequencePlace:
    """Ulysses over two neighbours, the ring over every other rank."""
    rank = dist.get_rank()
    rows = [dist.new_group([start, start + 1]) for start in range(0, num_ranks, 2)]
    columns = [dist.new_group(list(range(start, num_ranks, 2))) for start in range(2)]
    return SequencePlace(dist.group.WORLD, rows[rank // 2], columns[rank % 2])


def peers() -> dict[str, Attend]:
    """The Ulysses of DeepSpeed and that of yunchang, of those that are installed."""
    found: dict[str, Attend] = {}
    if importlib.util.find_spec("deepspeed"):
        import deepspeed.comm
        from deepspeed.sequence.layer import DistributedAttention

        deepspeed.comm.init_distributed("gloo", verbose=False)
        theirs = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)
        found["deepspeed"] = lambda q, k, v: theirs(q, k, v, 0)
    if importlib.util.find_spec("yunchang"):
        from yunchang import UlyssesAttention
        from yunchang.kernels import AttnType

        module = UlyssesAttention(dist.group.WORLD, attn_type=AttnType.TORCH_FLASH)
        module.attn_fn = local  # its own has no backward pass on a CPU
        found["yunchang"] = module
    return found


def on_rank(rank: int, num_ranks: int, lengths: list[int], precision: str, repeats: int) -> list[dict[str, Any]]:
    """In a process of its own: for each length and name the seconds, and the bytes sent forward and in both passes."""
    found = []
    theirs = peers()
    for num_tokens in lengths:
        generator = torch.Generator().manual_seed(num_tokens)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        whole = torch.randn(4, 1, num_tokens, NUM_HEADS, HEAD_WIDTH, generator=generator).to(dtype)
        q, k, v, dout = whole.chunk(num_ranks, dim=2)[rank].clone().unbind()
        leaves = [x.requires_grad_() for x in (q, k, v)]
        attends = our_strategies(num_ranks, num_tokens) | theirs
        expected = forward_backward(attends["ulysses"], leaves, dout)
        sent = {}
        for name, attend in attends.items():
            with recording() as messages:
                attend(*leaves)
                forward = sum(messages)
                messages.clear()
                got = forward_backward(attend, leaves, dout)
            sent[name] = {"forward": forward, "both": sum(messages)}
            for ours, other in zip(expected, got, strict=True):
                torch.testing.assert_close(other, ours, rtol=2e-2, atol=1e-2 if precision == "bf16" else 1e-4)
        runs = {name: partial(forward_backward, attend, leaves, dout) for name, attend in attends.items()}
        found.append({"seconds": turns(runs, repeats, dist.barrier), "sent": sent})
    return found


def over_ranks(num_ranks: int, args: argparse.Namespace) -> bool:
    """The table of one number of ranks; whether ours sent no more than the formulas say."""
    by_rank = run_distributed(on_rank, num_ranks, args.tokens, args.precision, args.repeats, timeout=args.timeout)
    met = True
    for num_tokens, found in zip(args.tokens, by_rank[0], strict=True):
        print(f"\n{num_ranks} ranks, {num_tokens} tokens, {NUM_HEADS} heads x {HEAD_WIDTH}, {args.precision}, load {load()}")
        print(f"{'':14} {'ms':>9} {'to ulysses':>11} {'KiB forward':>12} {'formula':>9} {'KiB both':>9} {'formula':>9}")
        for name, seconds in found["seconds"].items():
            sent, due = found["sent"][name], formula(name, num_tokens, num_ranks, 2 if args.precision == "bf16" else 4)
            ratio = seconds / found["seconds"]["ulysses"]
            cells = " ".join(
                f"{value / 1024:>{w}.0f}" for key, w in (("forward", 12), ("both", 9)) for value in (sent[key], due[key])
            )
            exceeds = name in STRATEGIES and any(sent[key] > due[key] for key in due)
            print(f"{name:14} {seconds * 1000:9.1f} {ratio:11.2f} {cells}" + ("   more than the formula" if exceeds else ""))
            met &= not exceeds
        for name in PEERS:
            if name not in found["seconds"]:
                print(f"{name:14} not installed")
    return met


def load() -> str:
    """What else runs on this machine."""
    return f"{os.getloadavg()[0]:.0f}"


# --- one process --------------------------------------------------------------------------------------------------------------


def overhead(num_tokens: int, repeats: int) -> bool:
    """Strategy none with sdpa against the function below it; whether the aim is met."""
    spec = AttentionSpec(NUM_HEADS, HEAD_WIDTH)
    attend = none.wrap(choose("sdpa", spec))
    q, k, v = torch.randn(3, 1, num_tokens, NUM_HEADS, HEAD_WIDTH, generator=torch.Generator().manual_seed(0))
    bare = [x.transpose(1, 2) for x in (q, k, v)]
    runs = {"ours": lambda: attend(q, k, v, None), "bare": lambda: scaled_dot_product_attention(*bare)}
    with torch.no_grad():
        found = turns(runs, repeats, lambda: None)
    ratio = found["ours"] / found["bare"]
    print(f"\nstrategy none, {num_tokens} tokens, forward, {torch.get_num_threads()} threads, load {load()}:", end=" ")
    print(f"{found['ours'] * 1000:.1f} ms, bare {found['bare'] * 1000:.1f} ms, ratio {ratio:.3f}, aim {OVERHEAD_AIM}")
    return ratio <= OVERHEAD_AIM


def on_cuda(lengths: list[int], repeats: int) -> None:
    """Each backend that serves bfloat16 here: milliseconds and TFLOP/s, forward and in both passes."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, batch 1, {CUDA_WIDTH} channels")
    for width in (64, 128):
        spec = AttentionSpec(CUDA_WIDTH // width, width, torch.bfloat16, "cuda")
        for num_tokens in lengths:
            shape = (4, 1, num_tokens, spec.num_heads, width)
            q, k, v, dout = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            for name in CUDA_BACKENDS:
                try:
                    backend = choose(name, spec)
                except ConfigError as error:
                    print(f"{name:11} {error}")
                    continue
                runs = {"forward": partial(backend, *leaves), "both": partial(forward_backward, backend, leaves, dout)}
                found = turns(runs, repeats, torch.cuda.synchronize)
                flops = 4 * num_tokens**2 * CUDA_WIDTH  # of a forward pass; the way back has 2.5 times as many
                rates = {"forward": flops / found["forward"], "both": 3.5 * flops / found["both"]}
                cells = ", ".join(f"{key} {found[key] * 1000:8.2f} ms {rates[key] / 1e12:6.1f} TFLOP/s" for key in runs)
                print(f"{name:11} head width {width:3}, {num_tokens:6} tokens: {cells}", flush=True)


def main() -> int:
    """Print the tables; 1 when an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default cpu)")
    parser.add_argument("--ranks", nargs="+", type=int, choices=[2, 4, 8], default=[2, 4], help="how many share a sequence")
    parser.add_argument("--tokens", nargs="+", type=int, help="lengths (2048 4096; on cuda 6144 30720); multiples of the ranks")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the tensors that ranks exchange")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count (default 5)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for all turns of one number of ranks")
    parser.add_argument("--quick", action="store_true", help="two ranks, 256 tokens, one turn, no aim of time")
    args = parser.parse_args()
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device here, and --device cuda measures nothing else.")
        on_cuda(args.tokens or [6144, 30720], args.repeats)
        return 0
    args.tokens = args.tokens or [2048, 4096]
    if args.quick:
        args.ranks, args.tokens, args.repeats = [2], [256], 1
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    met = [over_ranks(num_ranks, args) for num_ranks in args.ranks]
    is_light = overhead(256 if args.quick else 4096, args.repeats)
    return 0 if all(met) and (is_light or args.quick) else 1


if __name__ == "__main__":
    raise SystemExit(main())
