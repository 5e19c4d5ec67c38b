"""Quantising with a large codebook, against vector-quantize-pytorch: seconds, and bytes at the peak.

python -m tools.bench.quantizers [--codes 65536] [--dims 8 16] [--tokens 20000] [--repeats 3] [--quick]

Each case runs in a process of its own, on the same latents and the same book, with running means (EMA) on both sides: `eval`
finds the codes, `train` also takes their statistics in. The peak is what the process holds at most beyond what it held before
the first call: module, latents and libraries are not counted. Aims, at 65,536 codes: at least as fast, and a tenth of the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import torch
import vector_quantize_pytorch
from torch import Tensor

from videofm.models.quantizers import build_quantizer, quantizer_config
from videofm.types import ALONE

AIM_TIME, AIM_PEAK = 1.0, 0.1


@dataclass(frozen=True)
class Case:
    """One measurement: `who` is "ours" or "library", `mode` "eval" or "train"."""

    who: str
    mode: str
    codes: int
    dim: int
    tokens: int
    repeats: int


def ours(case: Case, book: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Our quantizer; training includes the update, which the library does inside of its call."""
    config = {"kind": "vq_ema", "codebook_size": case.codes, "dim": case.dim, "start_vectors": 0, "revive_every": 0}
    quantizer = build_quantizer(quantizer_config(config)).train(case.mode == "train")
    quantizer.books[0] = book  # type: ignore[index, operator]
    z = x.T.reshape(1, case.dim, 1, 1, len(x)).contiguous()

    def call() -> Tensor:
        indices = quantizer(z).indices
        if quantizer.training:
            quantizer.update(ALONE)
        return indices.flatten()

    return call


def library(case: Case, book: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """Theirs, with the rotation of gradients off, which ours does not do."""
    module = vector_quantize_pytorch.VectorQuantize(
        case.dim, codebook_size=case.codes, decay=0.99, rotation_trick=False, threshold_ema_dead_code=0
    ).train(case.mode == "train")
    module.codebook = book
    return lambda: module(x.unsqueeze(0))[1].flatten()


def peak() -> int:
    """Bytes of memory that this process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: Case) -> dict[str, float]:
    """Seconds of a call, bytes at its peak, and the sum of the first indices, to see that both sides find the same."""
    torch.manual_seed(0)
    book, x = torch.randn(case.codes, case.dim), torch.randn(case.tokens, case.dim)
    call = (ours if case.who == "ours" else library)(case, book, x)
    before = peak()
    with torch.no_grad():
        first = call()
        most = peak()
        times = []
        for _ in range(case.repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "peak": most - before, "sum": int(first.sum())}


def in_child(case: Case) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "tools.bench.quantizers", "--case", json.dumps(asdict(case))]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def compare(mode: str, codes: int, dim: int, tokens: int, repeats: int) -> bool:
    """Both sides of one case, in a line; whether the aims are met."""
    own, other = (in_child(Case(who, mode, codes, dim, tokens, repeats)) for who in ("ours", "library"))
    speed, memory = own["seconds"] / other["seconds"], own["peak"] / other["peak"]
    met = speed <= AIM_TIME and memory <= AIM_PEAK
    same = "the same indices" if own["sum"] == other["sum"] else f"sums of indices {own['sum']}, {other['sum']}"
    print(
        f"{mode:5} V {codes} D {dim} L {tokens}: {own['seconds']:.3f} s against {other['seconds']:.3f} s, ratio {speed:.2f}; "
        f"peak {own['peak'] / 2**20:.0f} MiB against {other['peak'] / 2**20:.0f} MiB, ratio {memory:.3f}; {same}; "
        f"aims {'met' if met else 'missed'}",
        flush=True,
    )
    return met


def main() -> int:
    """Print the table; 1 where an aim is missed (with --quick none is set: small books leave little to save)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=65536)
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=3, help="calls that count, after a first (default 3)")
    parser.add_argument("--quick", action="store_true", help="8192 codes, 8 channels, 4096 tokens, one call")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; every case in a process of its own")
    if args.quick:
        args.codes, args.dims, args.tokens, args.repeats = 8192, [8], 4096, 1
    met = [compare(mode, args.codes, dim, args.tokens, args.repeats) for dim in args.dims for mode in ("eval", "train")]
    print(f"{sum(met)} of {len(met)} meet the aims: time ratio at most {AIM_TIME}, peak ratio at most {AIM_PEAK}")
    return 0 if all(met) or args.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())
