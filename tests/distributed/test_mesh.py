"""Ranks of a mesh at work: sums over the right ranks, one reader for those that share samples, digests, a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import launch_ranks, run_distributed
from videofm.config.train import ParallelConfig
from videofm.data.loader import Step
from videofm.data.packing import pack
from videofm.data.plan import PlanState
from videofm.errors import DataError, ParallelError
from videofm.types import Batch

CPU = torch.device("cpu")
TIMEOUT = 60.0


def micro_batch(data_rank: int, step: int, index: int) -> Batch:
    """Of a size that depends on the step, with captions that need more than ASCII; the second of a step is a pack, whose last
    part has pixels as a loader gives them: uint8, on the strides of frames."""
    generator = torch.Generator().manual_seed(100 * data_rank + 10 * step + index)
    video = torch.randn(2, 3, 1 + 4 * step, 4, 4, generator=generator)
    name = f"{data_rank}-{step}-{index}"
    batch = Batch(video, [f"a größe {name}", ""], torch.tensor([24.0, 25.0]), [name, name + "b"], step, 8)
    if index == 0:
        return batch
    small = Batch(video[:1, :, :1, :2].clone(), ["ü"], torch.tensor([8.0]), [name + "c"], step, 8, latents=video[1:])
    frames = torch.randint(0, 256, (1, 2, 4, 6, 3), dtype=torch.uint8, generator=generator)
    decoded = Batch(frames.permute(0, 4, 1, 2, 3), ["d"], torch.tensor([8.0]), [name + "d"], step, 8)
    return pack([batch, small, decoded])


class Plan:
    """Endless steps of two micro-batches a rank."""

    def steps(self, state: PlanState) -> Any:
        for step in range(state.step, 10):
            yield type(
                "Planned", (), {"share": lambda *_: [0, 1], "num_samples": 8, "after": PlanState(step=step + 1), "fill": 0.75}
            )()


class Loader:
    """Gives `micro_batch`es and counts them; the third step cannot be read."""

    plan = Plan()

    def __init__(self, data_rank: int) -> None:
        self.data_rank, self.num_read = data_rank, 0

    def steps(self, state: PlanState) -> Any:
        for step in range(state.step, 10):
            if step == 2 and self.data_rank == 0:
                raise DataError("clip 7 of shard 3: not a video")
            self.num_read += 2
            yield Step([micro_batch(self.data_rank, step, index) for index in range(2)], 8, PlanState(step=step + 1), fill=0.75)


def same(ours: Batch, theirs: Batch) -> bool:
    if (ours.video.dtype, ours.video.stride()) != (theirs.video.dtype, theirs.video.stride()):
        return False
    tensors = torch.equal(ours.video, theirs.video) and torch.equal(ours.fps, theirs.fps)
    if (ours.latents is None) != (theirs.latents is None) or len(ours.parts) != len(theirs.parts):
        return False
    if ours.latents is not None and theirs.latents is not None:
        tensors = tensors and torch.equal(ours.latents, theirs.latents)
    tensors = tensors and all(map(same, ours.parts, theirs.parts))
    rest = [(batch.captions, batch.sample_ids, batch.step, batch.num_step_samples) for batch in (ours, theirs)]
    return tensors and rest[0] == rest[1]


def raised(kind: type[Exception], call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except kind as error:
        return str(error)
    return ""


def sharing(mesh: Any) -> dict[str, Any]:
    """Two steps through one reader, and what everybody hears of the third."""
    from videofm.train.share import shared_steps

    loader = Loader(mesh.data_rank)
    steps = shared_steps(loader, PlanState(), mesh)  # type: ignore[arg-type]
    got = [next(steps) for _ in range(2)]
    right = all(
        same(batch, micro_batch(mesh.data_rank, step, index))
        for step in range(2)
        for index, batch in enumerate(got[step].batches)
    )
    positions = [(step.num_samples, step.after.step, step.fill) for step in got]
    failure = raised(DataError, next, steps) if mesh.data_rank == 0 else ""
    return {"right": right, "positions": positions, "num_read": loader.num_read, "failure": failure}


def comparing(mesh: Any) -> dict[str, str]:
    """What the comparison says of equal things, of one pixel of the last rank, and of one weight and one buffer of it."""
    from videofm.train.share import compare_holdings

    last = mesh.rank == mesh.world_size - 1
    values = {f"model.{index}": torch.ones(3) * (1 + mesh.tensor_rank) for index in range(20)}
    values["model.13"] += 1e-6 * last
    weights: dict[str, torch.Tensor] = {name: torch.nn.Parameter(value) for name, value in values.items()}
    weights |= {"model.book": torch.ones(3), "model.counts": torch.ones(3)}
    batches = [micro_batch(mesh.data_rank, 0, index) for index in range(2)]

    def say(turn: int, changed: bool) -> str:
        if changed and last:
            batches[1].parts[1].video[0, 0, 0, 0, 0] += 1e-6
        return raised(ParallelError, compare_holdings, 7, turn, batches, weights, mesh)

    said = {"equal": say(0, False), "weight": say(1, False)}
    weights["model.counts"] += 1e-6 * last
    return said | {"buffer": say(0, False), "video": say(0, True)}


def ordering(mesh: Any) -> dict[str, str]:
    """What ranks say of one order, of two ranks that read another manifest, and of one that has a field more."""
    from videofm.train.share import compare_orders

    one: dict[str, Any] = {"seed": 0, "mix": {"web": {"manifest": "a", "view": None}}, "split": "train"}
    other = {**one, "mix": {"web": {"manifest": "b", "view": "v"}}}
    longer = {**one, "view": "v"}
    cases = {"equal": one, "manifest": other if mesh.rank in (1, 3) else one, "list": longer if mesh.rank == 2 else one}
    return {name: raised(ParallelError, compare_orders, identity, mesh) for name, identity in cases.items()}


def work(rank: int, world_size: int) -> dict[Any, dict[str, Any]]:
    from videofm.parallel.mesh import parallel_state, split_mesh
    from videofm.parallel.replicated import Replicated

    results = {}
    for degrees in ((2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (4, 1, 1)):
        data, context, tensor = degrees
        mesh = split_mesh(ParallelConfig(data_degree=data, context_degree=context, tensor_degree=tensor), CPU)
        found: dict[str, Any] = {"sum": mesh.sum(torch.tensor(10.0**mesh.data_rank)).item()}
        value, ranks = torch.tensor([10.0**mesh.data_rank + 1e-3 * (not mesh.is_leader)]), Replicated(mesh)
        found["replicated"] = [ranks.sum(value.clone()).tolist(), ranks.gather(value.clone()).tolist()]
        found["any"] = [mesh.any_rank(rank == 3), mesh.any_rank(False)]
        mesh.barrier()
        found |= {"leader": mesh.is_leader, "data": mesh.data_rank, "sharing": sharing(mesh), "comparing": comparing(mesh)}
        found["ordering"] = ordering(mesh)
        results[degrees] = found
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[Any, dict[str, Any]]]:
    return run_distributed(work, 4)


def every(results: list[dict[Any, dict[str, Any]]]) -> Any:
    for rank, found in enumerate(results):
        for degrees, result in found.items():
            yield f"rank {rank} of {degrees}", degrees, result


def test_sums_go_over_samples_and_questions_to_all(results: Any) -> None:
    """Powers of ten, one a data rank: 11 for two of them, however many ranks read the same."""
    for case, degrees, found in every(results):
        assert found["sum"] == {1: 1.0, 2: 11.0, 4: 1111.0}[degrees[0]], case
        assert found["any"] == [True, False], case


def test_ranks_that_share_samples_take_the_sums_of_their_leader(results: Any) -> None:
    """Others than leaders have a thousandth more, of which nothing is left; leaders have powers of ten, one a data rank."""
    for case, (data, _, _), found in every(results):
        powers = [10.0**rank for rank in range(data)]
        assert found["replicated"] == [[sum(powers)], powers], case


def test_one_rank_reads_for_all_that_share_samples(results: Any) -> None:
    for case, degrees, found in every(results):
        shared = found["sharing"]
        assert shared["right"] and shared["positions"] == [(8, 1, 0.75), (8, 2, 0.75)], case
        assert shared["num_read"] == (4 if found["leader"] else 0), case
        if found["data"] == 0:
            told = "clip 7 of shard 3: not a video" + ("" if found["leader"] else " (read by rank 0)")
            assert shared["failure"] == told, case
        assert degrees != (4, 1, 1) or found["leader"], case


def test_what_differs_is_named(results: Any) -> None:
    """Everybody in the group hears it. The weight is the 14th of 20, in the second turn of eight, the buffer the second of two,
    in every turn; both of context ranks only."""
    for case, degrees, found in every(results):
        said, rank = found["comparing"], int(case.split()[1])
        assert said["equal"] == "", case
        groups = {(2, 2, 1): [[0, 1], [2, 3]], (2, 1, 2): [[0, 1], [2, 3]], (4, 1, 1): [[0], [1], [2], [3]]}
        sample = next(group for group in groups.get(degrees, [[0, 1, 2, 3]]) if rank in group)
        if 3 in sample and len(sample) > 1:
            told = (
                f"after step 7 rank 3 and rank {sample[0]} differ in video of part 1 of micro-batch 1, which ranks that share"
            )
            assert said["video"].startswith(told), case
        else:
            assert said["video"] == "", case
        contexts = {(2, 2, 1): [2, 3], (1, 2, 2): [1, 3], (1, 4, 1): [0, 1, 2, 3]}.get(degrees, [])
        told = f"after step 7 rank 3 and rank {contexts[0]} differ in weight model.13," if rank in contexts else ""
        assert said["weight"].startswith(told) and bool(said["weight"]) == bool(told), case
        told = told.replace("weight model.13", "buffer model.counts")
        assert said["buffer"].startswith(told) and bool(said["buffer"]) == bool(told), case


def test_ranks_that_would_read_other_orders_are_told_so(results: Any) -> None:
    """Every rank hears which fields differ, and on which ranks."""
    for case, _, found in every(results):
        said = found["ordering"]
        assert said["equal"] == "", case
        fields = [f"mix.web.{name} (that of rank 0 is not that of ranks 1, 3)" for name in ("manifest", "view")]
        told = f"ranks read other orders of samples: they differ in {'; '.join(fields)}. Give every node"
        assert said["manifest"].startswith(told), case
        assert "the list of fields (that of rank 0 is not that of rank 2). Give every node the same" in said["list"], case


def die_inside(folder: Path) -> None:
    """Rank 3 is killed while it waits for the others in the all-reduce of its gradients."""
    from tests.distributed.test_engine import ToyObjective, toy_batches, toy_config, toy_model
    from videofm.parallel.collectives import naming
    from videofm.parallel.mesh import create_mesh
    from videofm.train.engine import PhaseEngine

    rank, stage = int(os.environ["RANK"]), int(folder.name)
    torch.set_num_threads(1)
    parallel = {"data_degree": 2, "context_degree": 2, "zero_stage": stage, "timeout": TIMEOUT}
    config = toy_config(stage, 2).model_copy(update={"parallel": ParallelConfig.model_validate(parallel)})
    mesh = create_mesh(config.parallel, CPU, folder / "rendezvous")
    engine = PhaseEngine({"model": toy_model()}, ToyObjective(), "generator", config, mesh)
    engine.step(toy_batches(0, mesh.data_rank, 2), lr=0.01)
    mesh.barrier()
    if rank == 3:
        threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    else:
        time.sleep(2)
    started = time.monotonic()
    try:
        with naming("run"):
            engine.step(toy_batches(1, mesh.data_rank, 2), lr=0.01)
        said = "nothing"
    except ParallelError as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps({"said": said, "seconds": time.monotonic() - started}))
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_that_dies_in_a_collective_is_told_of_by_all_others(tmp_path: Path, stage: int) -> None:
    """Within the timeout, with the operation and the group."""
    folder = tmp_path / str(stage)
    folder.mkdir()
    launch_ranks(__file__, 4, folder, codes=[0, 0, 0, -signal.SIGKILL])
    for rank in range(3):
        found = json.loads((folder / f"{rank}.json").read_text())
        assert found["said"].startswith("CollectiveError: "), (rank, found)
        operation, rest = found["said"].removeprefix("CollectiveError: ").split(" over ", 1)
        assert operation.startswith(("all_reduce", "all_gather", "reduce_scatter")), found
        assert rest.startswith(("the gradient group (ranks 0, 1, 2, 3) failed after", "the data group (ranks ")), found
        assert found["seconds"] < TIMEOUT, (rank, found)


if __name__ == "__main__":
    die_inside(Path(sys.argv[1]))
