"""Quantising with a large codebook, against vector-quantize-pytorch: seconds, bytes at the peak, and the indices one by one.

python -m tools.bench.quantizers [--codes 65536] [--dims 8 16] [--tokens 20000] [--repeats 3] [--quick]

Each measurement runs in a process of its own, seconds and bytes apart, on the same latents and the same book, with running
means (EMA) on both sides: `eval` finds the codes, `train` also takes their statistics in. The peak is the most that a process
holds during a second call beyond what it held before (see `vae_memory.peak`): module, latents and libraries are not counted.
Aims, at 65,536 codes: at least as fast, a tenth of the peak, and the same code for all but 1 vector in 10,000 (one that lies
between two codes may fall to either, as their distances are rounded).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import numpy as np
import torch
import vector_quantize_pytorch
from torch import Tensor

from tools.bench.vae_memory import ENVIRONMENT, peak
from videofm.models.quantizers import build_quantizer, quantizer_config
from videofm.types import ALONE

AIM_TIME, AIM_PEAK, AIM_EQUAL = 1.0, 0.1, 0.9999


@dataclass(frozen=True)
class Case:
    """One measurement: `who` is "ours" or "library", `mode` "eval" or "train", `what` "seconds" or "peak"."""

    who: str
    mode: str
    codes: int
    dim: int
    tokens: int
    repeats: int
    what: str = "seconds"


@dataclass(frozen=True)
class Measured:
    """Of a side: median seconds of a call, bytes at the peak of one, and the indices of the first call `(L,)`."""

    seconds: float
    peak: int
    indices: np.ndarray


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


@torch.no_grad()
def measure(case: Case, indices: Path) -> dict[str, Any]:
    """What `case.what` names; with seconds, the indices of the first call go into the file `indices` (.npy)."""
    torch.manual_seed(0)
    book, x = torch.randn(case.codes, case.dim), torch.randn(case.tokens, case.dim)
    call = (ours if case.who == "ours" else library)(case, book, x)
    if case.what == "peak":
        return {"peak": peak(call, minus_output=False)}
    np.save(indices, call().numpy())
    times = []
    for _ in range(case.repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times)}


def in_children(case: Case) -> Measured:
    """`measure` in two fresh processes, one for the seconds and one for the bytes."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        indices = Path(folder) / "indices.npy"
        for what, environment in (("seconds", {}), ("peak", ENVIRONMENT)):
            described = json.dumps(asdict(replace(case, what=what)))
            command = [sys.executable, "-m", "tools.bench.quantizers", "--case", described, "--indices", str(indices)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
            found |= json.loads(answer.stdout.splitlines()[-1])
        return Measured(found["seconds"], found["peak"], np.load(indices))


def share_equal(one: np.ndarray, other: np.ndarray) -> float:
    """The share of places at which two lists of indices are the same; 0 for lists of other lengths."""
    return float((one == other).mean()) if one.shape == other.shape else 0.0


def verdict(own: Measured, other: Measured) -> tuple[str, bool]:
    """What the two sides of a case come to, in words, and whether every aim is met."""
    speed, memory, equal = own.seconds / other.seconds, own.peak / other.peak, share_equal(own.indices, other.indices)
    missed = [
        name
        for name, met in (("time", speed <= AIM_TIME), ("peak", memory <= AIM_PEAK), ("indices", equal >= AIM_EQUAL))
        if not met
    ]
    end = f"missed: {', '.join(missed)}" if missed else "aims met"
    told = (
        f"{own.seconds:.3f} s against {other.seconds:.3f} s, ratio {speed:.2f}; peak {own.peak / 2**20:.0f} MiB against "
        f"{other.peak / 2**20:.0f} MiB, ratio {memory:.3f}; {equal:.4%} of the indices equal; {end}"
    )
    return told, not missed


def main() -> int:
    """Print the table; 1 where an aim is missed (with --quick none is set: small books leave little to save)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=65536)
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=3, help="calls that count, after a first (default 3)")
    parser.add_argument("--quick", action="store_true", help="8192 codes, 8 channels, 4096 tokens, one call")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--indices", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)), args.indices)))
        return 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; every measurement in a process of its own")
    if args.quick:
        args.codes, args.dims, args.tokens, args.repeats = 8192, [8], 4096, 1
    num_met, cases = 0, [(mode, dim) for dim in args.dims for mode in ("eval", "train")]
    for mode, dim in cases:
        own, other = (in_children(Case(who, mode, args.codes, dim, args.tokens, args.repeats)) for who in ("ours", "library"))
        told, met = verdict(own, other)
        print(f"{mode:5} V {args.codes} D {dim} L {args.tokens}: {told}", flush=True)
        num_met += met
    print(
        f"{num_met} of {len(cases)} meet the aims: time ratio at most {AIM_TIME}, peak ratio at most {AIM_PEAK}, at least "
        f"{AIM_EQUAL:.2%} of the indices equal"
    )
    return 0 if num_met == len(cases) or args.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())
