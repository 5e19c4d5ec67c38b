"""Two ranks with halves of each micro-batch compute what one rank computes with all of it, for every kind of quantizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers import run_distributed
from videofm.errors import ParallelError
from videofm.models.quantizers import Quantizer, build_quantizer, ema, quantizer_config
from videofm.models.quantizers.kmeans import Clusters
from videofm.registry import QUANTIZERS
from videofm.types import ALONE, Ranks

KINDS = sorted(QUANTIZERS)
NUM_STEPS, BATCH, IDLE = 10, 4, 6
"""In step `IDLE` the second rank has no samples."""
SMALL = {
    "codebook_size": 40, "dim": 6, "levels": (4, 5, 3), "start_vectors": 20, "start_updates": 3, "revive_every": 4,
    "dead_share": 0.5, "decay": 0.8, "num_levels": 3, "level_dropout": 0.3, "usage_tokens": 4, "probe_size": 100,
}  # fmt: skip


@dataclass(frozen=True)
class Two:
    """`Ranks` of the default group."""

    data_degree: int = 2

    def sum(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(lengths, torch.tensor([len(value)]))
        longest = max(int(length) for length in lengths)
        padded = torch.cat([value, value.new_zeros((longest - len(value), *value.shape[1:]))])
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])


def small(kind: str) -> Quantizer:
    torch.manual_seed(0)
    default = quantizer_config({"kind": kind})
    names = [field.name for field in dataclasses.fields(default)]
    return build_quantizer(dataclasses.replace(default, **{name: value for name, value in SMALL.items() if name in names}))


def micro_batch(dim: int, step: int, part: int) -> Tensor:
    """Latents away from the origin, that drift, so that codes fall out of use."""
    generator = torch.Generator().manual_seed(100 * step + part)
    return torch.randn(BATCH, dim, 3, 4, 5, generator=generator) + 0.4 * step - 2.0


def train(kind: str, ranks: Ranks, rank: int, degree: int) -> dict[str, Any]:
    """Some steps of two micro-batches, with SGD on what has gradients; everything that came of it."""
    quantizer = small(kind)
    found: dict[str, Any] = {"indices": [], "losses": [], "metrics": []}
    for step in range(NUM_STEPS):
        share = slice(rank * BATCH // degree, (rank + 1) * BATCH // degree)
        if step == IDLE:
            share = slice(0, BATCH // 2) if rank == 0 else slice(0, 0)
        for part in range(2):
            z = micro_batch(quantizer.dim, step, part)[share]
            if not len(z):
                continue
            mask = torch.rand(BATCH, 3, 4, 5, generator=torch.Generator().manual_seed(step))[share] < 0.8
            out = quantizer(z, mask)
            found["indices"].append(out.indices)
            found["losses"].append(out.loss.detach())
            if out.loss.requires_grad:
                out.loss.sum().backward()
        with torch.no_grad():
            for parameter in quantizer.parameters():
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter -= 0.02 * ranks.sum(grad)
                parameter.grad = None
        quantizer.update(ranks)
        found["metrics"].append(quantizer.metrics(ranks))
    return {**found, "state": quantizer.state_dict(), "counters": vars(quantizer.read_counters())}


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    """All kinds on this rank, and what is said of a rank whose book was changed."""
    results: dict[str, Any] = {kind: train(kind, Two(), rank, world_size) for kind in KINDS}
    results["jolted"] = {kind: jolted_start(kind, rank, world_size) for kind in ("vq_ema", "rvq")}
    quantizer = small("vq_ema")
    assert quantizer.metrics(Two()) == {"start": 0.0}
    quantizer.books[0, 3, 2] += 1e-6 * rank  # type: ignore[index, operator]
    try:
        quantizer.metrics(Two())
    except ParallelError as error:
        results["error"] = str(error)
    return results


def jolted_start(kind: str, rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """States after each update where k-means of the second rank ends in other last bits, and its books before a revival too."""
    quantizer, whole = small(kind), ema.kmeans

    def jolted(*args: Any) -> Clusters:
        found = whole(*args)
        return Clusters(found.centres * (1 + 1e-6 * rank), found.counts)

    states = []
    ema.kmeans = jolted
    try:
        for step in range(4):
            share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
            if step == 3:
                assert isinstance(quantizer, ema.EMAQuantizer) and quantizer.is_ready
                quantizer.books.mul_(1 + 1e-6 * rank)
                quantizer.sums.mul_(1 + 1e-6 * rank)
            for part in range(2):
                quantizer(micro_batch(quantizer.dim, step, part)[share])
            quantizer.update(Two())
            states.append({name: tensor.clone() for name, tensor in quantizer.state_dict().items()})
    finally:
        ema.kmeans = whole
    return states


def compare_steps(kind: str, whole: dict[str, Any], both: list[dict[str, Any]]) -> None:
    """Indices of every micro-batch are equal, losses to rounding."""
    left = [iter(zip(found["indices"], found["losses"], strict=True)) for found in both]
    for number, (indices, loss) in enumerate(zip(whole["indices"], whole["losses"], strict=True)):
        step = number // 2
        got = [next(left[rank]) for rank in ([0] if step == IDLE else [0, 1])]
        assert torch.equal(torch.cat([pair[0] for pair in got]), indices), f"{kind}: indices of step {step}"
        torch.testing.assert_close(torch.cat([pair[1] for pair in got]), loss, rtol=1e-5, atol=1e-6)
    assert all(next(rest, None) is None for rest in left)


def test_two_ranks_with_halves_are_one_rank_with_all() -> None:
    """Indices, losses and books through k-means, running means, revival, level dropout and a step without samples.

    A rank holds half of each micro-batch, so that the samples of one rank are those of both, in another order.
    """
    ranks = run_distributed(on_rank, 2)
    for kind in KINDS:
        whole = train(kind, ALONE, 0, 1)
        both = [found[kind] for found in ranks]
        compare_steps(kind, whole, both)
        for name, tensor in whole["state"].items():
            torch.testing.assert_close(
                both[0]["state"][name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, k=kind, n=name: f"{k} {n}: {m}"
            )
            assert torch.equal(both[0]["state"][name], both[1]["state"][name]), f"{kind}: {name} differs between ranks"
        assert both[0]["counters"] == whole["counters"] and whole["counters"]["num_updates"] == NUM_STEPS
        assert both[0]["metrics"] == both[1]["metrics"]
        for ours, wanted in zip(both[0]["metrics"], whole["metrics"], strict=True):
            assert ours == pytest.approx(wanted, abs=1e-6)
        if kind in ("vq_ema", "rvq"):
            assert whole["counters"]["started"] and whole["counters"]["num_revived"] > 5, whole["counters"]
            assert "start" in whole["metrics"][1] and "usage" in whole["metrics"][-1]
    for kind, states in ranks[0]["jolted"].items():
        # The third update starts the book, the fourth revives.
        assert states[1]["counters"][4] == 0 and states[2]["counters"][4] == 1 and states[3]["counters"][5] > 0
        for number, (first, second) in enumerate(zip(states, ranks[1]["jolted"][kind], strict=True)):
            assert all(torch.equal(first[name], second[name]) for name in first), f"{kind}: update {number}"
    for found in ranks:
        assert "state of quantizer vq_ema differs between ranks after 0 updates" in found["error"]
