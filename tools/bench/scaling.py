"""A training step of a small LTX transformer as tokens grow and as more ranks share them: seconds, and memory a rank keeps.

python -m tools.bench.scaling [--quick] [--tokens 1024 2048 4096 8192 16384] [--degrees 1 2 4] [--strategy auto]

4 layers of 256 channels, float32, 64 text tokens, batch 1; a step is forward, a squared error, backward and the sum of
gradients over the context ranks (gloo, one thread a rank). Seconds are those of the slowest rank. Memory is what rank 0's
forward pass leaves for its backward pass, counted by torch's allocator, so it does not depend on what else runs. Ranks beyond
the cores share them: memory then still says what a rank needs, seconds do not say what a cluster does. A column ends where the
next step, at four times the last, would take longer than `--limit`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import run_distributed
from tools.bench.attention import load, turns
from tools.bench.memory import kept_bytes
from videofm import models
from videofm.config.train import ParallelConfig
from videofm.models import ParallelOptions
from videofm.parallel.mesh import Mesh, split_mesh
from videofm.types import Compression, Conditioning

SHAPE: dict[str, Any] = {"num_layers": 4, "num_heads": 4, "head_width": 64, "in_channels": 16, "caption_channels": 64}
TEXT_TOKENS, GRID = 64, 16
"""Latent cells of a frame are `GRID` x `GRID`; numbers of tokens are multiples of that."""
GROWTH = 4
"""Of a step's time, at most, when tokens double."""


def build(degree: int, strategy: str) -> tuple[nn.Module, Mesh]:
    """The model over `degree` context ranks, with the same weights on each."""
    torch.manual_seed(0)
    model: Any = models.build("dit/ltx", "tiny", **SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    chosen: Any = "ulysses" if strategy == "unified" and degree < 4 else strategy
    mesh = split_mesh(ParallelConfig(context_degree=degree, context_strategy=chosen), torch.device("cpu"), [SHAPE["num_heads"]])
    options = ParallelOptions(attention="sdpa", cross_attention="sdpa", context_strategy=chosen)
    return models.model_spec("dit/ltx").parallelize(model, mesh, options), mesh


class Training:
    """A model with the inputs of one length."""

    def __init__(self, model: Any, mesh: Mesh, num_tokens: int) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        self.model, self.mesh = model, mesh
        self.tokens, self.target = torch.randn(2, 1, num_tokens, SHAPE["in_channels"], generator=generator)
        states = torch.randn(1, TEXT_TOKENS, SHAPE["caption_channels"], generator=generator)
        self.text = Conditioning(states, torch.ones(1, TEXT_TOKENS, dtype=torch.bool))
        grid = (num_tokens // GRID**2, GRID, GRID)
        self.coordinates = model.coordinates(grid, torch.tensor([25.0]), Compression(8, 32, 32))

    def forward(self) -> Tensor:
        """The loss."""
        velocity: Tensor = self.model(self.tokens, torch.tensor([0.7]), self.text, self.coordinates)
        return (velocity - self.target).square().mean()

    def step(self) -> None:
        """Forward, backward, and the gradients of all ranks."""
        self.model.zero_grad(set_to_none=True)
        self.forward().backward()
        for parameter in self.model.parameters():
            self.mesh.sum_gradients(parameter.grad)


def on_rank(rank: int, degree: int, lengths: list[int], strategy: str, repeats: int, limit: float) -> list[dict[str, float]]:
    """In a process of its own: seconds and kept bytes of each length that fits into `limit`; all ranks stop at the same one."""
    model, mesh = build(degree, strategy)
    found: list[dict[str, float]] = []
    for num_tokens in lengths:
        training = Training(model, mesh, num_tokens)
        kept = kept_bytes(training.forward)
        seconds = turns({"step": training.step}, repeats, dist.barrier)["step"]
        found.append({"seconds": seconds, "bytes": kept})
        if mesh.any_rank(seconds * GROWTH > limit):
            break
    return found


def show(args: argparse.Namespace) -> None:
    """One table for seconds and memory, a row a length."""
    found = {}
    for degree in args.degrees:
        ranks = run_distributed(on_rank, degree, args.tokens, args.strategy, args.repeats, args.limit, timeout=args.timeout)
        found[degree] = ranks[0]
        print(f"context degree {degree} done, load {load()}", flush=True)
    heads = [f"{f'degree {degree}: s':>15} {'MiB a rank':>11}" for degree in args.degrees]
    print(f"\n{'tokens':>7} {' '.join(heads)}")
    for row, num_tokens in enumerate(args.tokens):
        cells = []
        for degree in args.degrees:
            is_there = row < len(found[degree])
            values = found[degree][row] if is_there else {}
            cells.append(f"{values['seconds']:15.2f} {values['bytes'] / 2**20:11.1f}" if is_there else f"{'-':>15} {'-':>11}")
        print(f"{num_tokens:7} {' '.join(cells)}")


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = f"multiples of {GRID**2}, rising"
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384], help=lengths)
    parser.add_argument("--degrees", nargs="+", type=int, default=[1, 2, 4], help="ranks that share a sequence")
    strategies = ["auto", "ulysses", "allgather_kv", "ring", "unified"]
    parser.add_argument(
        "--strategy", choices=strategies, default="auto", help="of attention; unified needs 4 ranks, else ulysses"
    )
    parser.add_argument("--repeats", type=int, default=2, help="steps that count (default 2)")
    parser.add_argument("--limit", type=float, default=60.0, help="longest step to start, in seconds")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for all lengths of one degree")
    parser.add_argument("--quick", action="store_true", help="256 and 512 tokens, degrees 1 and 2, one step")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.degrees, args.repeats = [256, 512], [1, 2], 1
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    show(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
