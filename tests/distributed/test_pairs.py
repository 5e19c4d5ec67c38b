"""Pairs on two ranks: context ranks hold what one rank reads, data ranks read its micro-batches between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers import run_distributed
from tests.unit.data.preferred import data_config, neighbours, write_candidates
from videofm.config.train import ParallelConfig
from videofm.data.loader import StepLoader
from videofm.data.manifest import Manifest
from videofm.data.plan import PlanState
from videofm.data.preferences import PreferencePair, write_preferences
from videofm.types import Batch

STEPS = 4
CPU = torch.device("cpu")


def same(ours: Batch, theirs: Batch) -> bool:
    """Whether two batches have equal fields, tensors bit by bit and of one type."""
    for field in fields(Batch):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(mine, Tensor) != isinstance(other, Tensor):
            return False
        equal = torch.equal(mine, other) and mine.dtype == other.dtype if isinstance(mine, Tensor) else mine == other
        if not equal:
            return False
    return True


def read(folder: str, mesh: Any, start: int) -> list[Any]:
    """Steps from number `start` on, as a rank of a mesh gets them."""
    from videofm.train.share import compare_holdings, compare_orders, shared_steps

    loader = StepLoader(data_config(Path(folder) / "preferences", **values(folder)), 0, mesh.data_rank, mesh.data_degree)
    compare_orders(loader.plan.identity, mesh)
    found = list(islice(shared_steps(loader, PlanState(step=start), mesh), STEPS))
    for step in found:
        compare_holdings(step.after.step, 0, step.batches, {}, mesh)
    return found


def values(folder: str) -> dict[str, Any]:
    return {"manifest": f"{folder}/clips", "start": "random", "crop": "none"}


def work(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """For a mesh of context ranks and one of data ranks: whether what this rank holds is its part of what one rank reads."""
    from videofm.parallel.mesh import parallel_state, split_mesh

    loader = StepLoader(data_config(Path(folder) / "preferences", **values(folder)), 0)
    straight = list(islice(loader.steps(PlanState(step=1)), STEPS))
    results: dict[str, Any] = {}
    for name, degrees in (("context", (1, 2)), ("data", (2, 1))):
        mesh = split_mesh(ParallelConfig(data_degree=degrees[0], context_degree=degrees[1]), CPU)
        steps = read(folder, mesh, 1)
        right = []
        for step, whole in zip(steps, straight, strict=True):
            mine = whole.batches[mesh.data_rank :: mesh.data_degree]
            right.append((step.num_samples, step.after) == (whole.num_samples, whole.after))
            right += [same(ours, theirs) for ours, theirs in zip(step.batches, mine, strict=True)]
        results[name] = right
        parallel_state.destroy_model_parallel()
    names = ("frame_labels", "rewards", "pair_weights", "pair_ties", "pair_axes")
    results["fields"] = [getattr(straight[0].batches[0], name) is not None for name in names]
    return results


def with_everything(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs with segments, scores and a tie, so that a batch has every field about pairs."""
    found = []
    for number, pair in enumerate(pairs):
        plain = {**pair.to_json(), "segments": {"seconds": 0.25, "labels": [1, -1]}, "tie": number == 1}
        plain["axes"] = {"motion": "tie"} if number == 2 else {}
        for name, score in (("winner", 0.5), ("loser", 0.25)):
            plain[name] = {**plain[name], "scores": {"overall": score + number}}
        found.append(PreferencePair.from_json(plain))
    return found


def test_pairs_on_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    """Four steps from the second on, of two micro-batches of two pairs, over five pairs: every field, bit by bit."""
    clips = write_candidates(tmp_path / "clips", 5)
    pairs = with_everything(neighbours(Manifest.load(clips).records()))
    write_preferences(tmp_path / "preferences", pairs, clips)
    for found in run_distributed(work, 2, str(tmp_path)):
        assert found == {"context": [True] * 3 * STEPS, "data": [True] * 2 * STEPS, "fields": [True] * 5}
