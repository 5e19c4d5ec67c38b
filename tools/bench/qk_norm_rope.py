"""Norm and rotation of queries and keys: the Triton kernel against the two operations, eager and compiled.

python -m tools.bench.qk_norm_rope [--tokens 5120 30720] [--repeats 20]

On a GPU, in bfloat16, at the widths of the released models: milliseconds of the forward pass and of both passes, and GB/s of
the bytes that must move at least once (queries, keys and the table in, queries and keys out; backwards the same with gradients,
and the two gradients out). Without one it times what runs there, the two operations, against the same written by hand.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import torch
from torch import Tensor

from tools.bench.vae import turns
from videofm.ops.norm import RMSNorm
from videofm.ops.qk_norm_rope import Pairs, QueriesAndKeys, qk_norm_rope
from videofm.ops.rope import RotaryTable, cell_rotary_table, rotary_table, rotate, rotate_halves

Call = Callable[[Tensor, Tensor], QueriesAndKeys]


@dataclass(frozen=True)
class Shape:
    """What a model makes of a token: `(D,)`, or `(N, K)`."""

    name: str
    rest: tuple[int, ...]

    @property
    def pairs(self) -> Pairs:
        """Which channels are turned together."""
        return "adjacent" if len(self.rest) == 1 else "halves"


SHAPES = (Shape("LTX 2B, 2048 channels", (2048,)), Shape("LTX 13B, 4096", (4096,)), Shape("Step-Video, 48 x 128", (48, 128)))
SMALL = (Shape("LTX, 512 channels", (512,)), Shape("Step-Video, 4 x 128", (4, 128)))


def calls(shape: Shape, num_tokens: int, device: str) -> tuple[Call, Call, RotaryTable]:
    """Ours, and the two operations by hand, with one table and the same norms."""
    width = shape.rest[-1]
    coordinates = torch.rand(1, 3, num_tokens, device=device) * 20
    table = (rotary_table if shape.pairs == "adjacent" else cell_rotary_table)(coordinates, width)
    q_norm, k_norm = (RMSNorm(width, eps=1e-5).to(device) for _ in range(2))
    turn = rotate if shape.pairs == "adjacent" else rotate_halves

    def ours(q: Tensor, k: Tensor) -> QueriesAndKeys:
        return qk_norm_rope(q, k, q_norm, k_norm, table, shape.pairs)

    def by_hand(q: Tensor, k: Tensor) -> QueriesAndKeys:
        return QueriesAndKeys(turn(q_norm(q), table), turn(k_norm(k), table))

    return ours, by_hand, table


def passes(call: Call, shape: Shape, num_tokens: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """The forward pass alone, and both."""
    q, k, dq, dk = torch.randn(4, 1, num_tokens, *shape.rest, device=device, dtype=dtype)
    q, k = q.requires_grad_(), k.requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            call(q, k)

    def both() -> None:
        found = call(q, k)
        torch.autograd.backward((found.q, found.k), (dq, dk))
        q.grad = k.grad = None

    return {"forward": forward, "both": both}


def least_bytes(shape: Shape, num_tokens: int, table: RotaryTable) -> dict[str, int]:
    """What must move through memory, in bfloat16: 4 tensors and the table forward, 6 and the table backward."""
    tensor = 2 * num_tokens * torch.Size(shape.rest).numel()
    angles = 2 * 4 * table.cos.numel()
    return {"forward": 4 * tensor + angles, "both": 10 * tensor + 2 * angles}


def seconds(run: Callable[[], None], repeats: int) -> float:
    """The median time of `run` on the GPU, with caches as a training step leaves them: holding other things."""
    other = torch.empty(2**28, dtype=torch.int8, device="cuda")
    found = []
    for turn in range(repeats + 3):
        other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            found.append(start.elapsed_time(end) / 1000)
    return statistics.median(found)


def on_cuda(lengths: list[int], repeats: int) -> None:
    """The table of one GPU."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, batch 1; milliseconds (GB/s)")
    print(f"{'':40} {'kernel':>18} {'eager':>18} {'compiled':>18} {'to eager':>9} {'to compiled':>12}")
    for shape in SHAPES:
        for num_tokens in lengths:
            ours, by_hand, table = calls(shape, num_tokens, "cuda")
            least = least_bytes(shape, num_tokens, table)
            runs = [passes(call, shape, num_tokens, "cuda", torch.bfloat16) for call in (ours, by_hand, torch.compile(by_hand))]
            for name, size in least.items():
                times = [seconds(run[name], repeats) for run in runs]
                cells = "".join(f" {time * 1000:9.3f} ({size / time / 1e9:6.0f})" for time in times)
                ratios = f"{times[1] / times[0]:9.2f} {times[2] / times[0]:12.2f}"
                print(f"{f'{shape.name}, {num_tokens} tokens, {name}':40}{cells} {ratios}", flush=True)


def on_cpu(num_tokens: int, repeats: int) -> None:
    """What the call costs over the two operations that it is on a CPU."""
    print(f"The kernel needs CUDA, which torch does not see here. On this CPU, {torch.get_num_threads()} threads, float32:")
    for shape in SMALL:
        ours, by_hand, _ = calls(shape, num_tokens, "cpu")
        runs = [passes(call, shape, num_tokens, "cpu", torch.float32) for call in (ours, by_hand)]
        for name in runs[0]:
            found = turns(runs[0][name], runs[1][name], repeats, lambda: None)
            own, other = (statistics.median(side) * 1000 for side in zip(*found, strict=True))
            ratio = statistics.median(theirs / mine for mine, theirs in found)
            title = f"{shape.name}, {num_tokens} tokens, {name}"
            print(f"{title:44} qk_norm_rope {own:7.2f} ms, by hand {other:7.2f} ms, ratio {ratio:.2f}", flush=True)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[5120, 30720], help="tokens of a clip, on a GPU")
    parser.add_argument("--repeats", type=int, default=20, help="runs that count (default 20)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if torch.cuda.is_available():
        on_cuda(args.tokens, args.repeats)
    else:
        on_cpu(1024, args.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
