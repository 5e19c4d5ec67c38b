"""Checkpoints of several processes: whole or absent wherever one dies, one verdict for all, one content from all layouts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.test_engine import ToyObjective, toy_batches, toy_config, toy_model
from tests.helpers import ForkedPython, run_distributed
from tests.unit.checkpoint.boundaries import Boundaries, content_of, save, tensors_of, visible, watched, whole_step
from videofm.checkpoint.content import Content, StoredTensor, owners_of
from videofm.checkpoint.keep import KeepRules, sweep
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import Facts
from videofm.checkpoint.resume import newest_whole
from videofm.checkpoint.save import read_tensors, save_now
from videofm.checkpoint.saver import Saver
from videofm.data.draws import PlanState
from videofm.errors import CheckpointError, Interrupted
from videofm.parallel.collectives import CollectiveError

CPU = torch.device("cpu")
PATIENCE = 1800
"""Seconds for a process to come and for what it waits for; on a busy machine imports take most of it."""
SURVIVED = 3
"""Exit code of a rank whose save failed because another one died."""


# -- SIGKILL


def rank_that_may_die(root: Path, dies: int, number: int) -> None:
    """Save step 2; rank `dies` kills itself before the `number`-th moment (0: none does, and the count is written)."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        store = dist.FileStore(str(root / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE))
        dist.barrier()
    boundaries = Boundaries(number if rank == dies else 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    try:
        with watched(boundaries):
            save(root / "checkpoints", 2, Peers(rank, world_size), KeepRules(1 if world_size == 1 else 9))
    except CollectiveError as error:
        os._exit(SURVIVED if "all_gather over the world group" in str(error) else 1)
    (root / f"moments_{rank}.json").write_text(json.dumps(boundaries.seen))
    os._exit(0)


def start(root: Path, world_size: int, dies: int, number: int, template: Path) -> list[ForkedPython]:
    shutil.copytree(template, root / "checkpoints")
    own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
    return [
        ForkedPython([__file__, str(root), str(dies), str(number)], {**os.environ, **own, "RANK": str(rank)})
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sigkill_at_any_file_boundary_leaves_the_old_or_the_new(tmp_path: Path, world_size: int) -> None:
    """Of each rank in turn, before each of its moments: step 2 is there if and only if the main rank has come past its rename.
    The other rank does not hang, and the next attempt saves over what was left. Without a kill as many moments are counted as
    kills were made: one more would fail."""
    save(tmp_path / "template", 1)
    template = tmp_path / "template"
    first = start(tmp_path / "count", world_size, 0, 0, template)
    assert [rank.wait(PATIENCE) for rank in first] == [0] * world_size
    moments = [json.loads((tmp_path / f"count/moments_{rank}.json").read_text()) for rank in range(world_size)]
    commit = moments[0].index("rename .step_00000002.tmp")
    assert len(moments[0]) > 20 and all(len(own) >= 4 for own in moments)
    cases = [(dies, number) for dies in range(world_size) for number in range(1, len(moments[dies]) + 1)]
    while cases:
        batch, cases = cases[:6], cases[6:]
        started = {case: start(tmp_path / f"{case}", world_size, *case, template) for case in batch}
        for (dies, number), ranks in started.items():
            codes = [rank.wait(PATIENCE) for rank in ranks]
            what = f"rank {dies} before {moments[dies][number - 1]!r} ({number})"
            assert codes[dies] == -signal.SIGKILL, what
            assert {code for rank, code in enumerate(codes) if rank != dies} <= {0, SURVIVED}, what
            root = tmp_path / f"{(dies, number)}" / "checkpoints"
            assert visible(root) and whole_step(root) == (2 if dies == 0 and number - 1 > commit else 1), what
            sweep(root)
            save(root, 2, rules=KeepRules(1))
            save(root, 3, rules=KeepRules(1))
            assert whole_step(root) == 3 and [path.name for path in root.iterdir()] == ["step_00000003"], what
            shutil.rmtree(root.parent)


@dataclass(frozen=True)
class ToyModelConfig:
    """Of a model that is in no registry."""

    width: int = 33


# -- one verdict


def no_space() -> None:
    raise OSError(28, "No space left on device")


def saves_of_two(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Every moment of every rank at which its disk may fail; what each save gave, and what could be resumed from."""
    torch.set_num_threads(1)
    peers = Peers(rank, world_size, dist.new_group(group_desc="checkpoint"))
    os.fsync = lambda descriptor: None
    found: dict[str, Any] = {"steps": {}, "moments": 0}
    for dies in range(world_size):
        number, fired = 0, True
        while fired:
            number += 1
            root = Path(folder) / f"{dies}-{number}"
            save(root, 1, peers)
            with watched(Boundaries(number if rank == dies else 0, no_space)) as boundaries:
                saver = Saver(root, KeepRules(9), peers, any_rank=any_rank)
                saver.copy(Facts(2), content_of(2))
                saver.write()
                settled = 0
                while saver._save is not None:  # steps of a training that goes on, with collectives of its own
                    settled += 1
                    total = torch.tensor([float(rank + settled)])
                    dist.all_reduce(total)
                    assert total.item() == 2 * settled + 1
                    saver.check()
            fired = any_rank(boundaries.fired)
            verdict = [settled, saver.num_failed, saver.last_step]
            everywhere = peers.share(verdict)
            assert everywhere[0] == everywhere[1], everywhere
            step = whole_step(root, peers)
            leftovers = list(root.glob(".*"))
            assert not leftovers and saver.num_failed == fired, (dies, number, leftovers)
            assert step == 2 or fired, (dies, number)
            found["steps"][f"{dies}-{number}"] = step
            dist.barrier()
        found["moments"] += number - 1
    return found


def any_rank(flag: bool) -> bool:
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def spare_and_end(rank: int, world_size: int, folder: str) -> list[str]:
    """A disk that fails on rank 1: the spare folder takes the state; without one the second failure in a row ends the run."""
    from videofm.checkpoint import save as protocol

    peers = Peers(rank, world_size, dist.new_group(group_desc="checkpoint"))
    write, own, spare = protocol.write_tensors, Path(folder) / "own", Path(folder) / "spare"

    def full(path: Path, *more: Any) -> Any:
        if rank == 1 and path.is_relative_to(own):
            raise OSError(28, "No space left on device")
        return write(path, *more)

    protocol.write_tensors = full
    told = []
    for place in (None, spare):
        saver = Saver(own, KeepRules(9), peers, place, any_rank=any_rank)
        for step in (2, 3):
            saver.copy(Facts(step), content_of(step))
            saver.write()
            try:
                saver.wait()
                told.append("went on")
            except (CheckpointError, Interrupted) as error:
                told.append(f"{type(error).__name__}: {error}")
                break
    told.append(str(newest_whole([own, spare], peers)).removeprefix(folder))
    return told


def test_a_failing_disk_on_one_rank_aborts_the_save_on_all(tmp_path: Path) -> None:
    """At every moment of either rank, in the background of a training whose collectives go on: both hear of it in the same
    step, no partial file stays, and the old checkpoint does unless the new one is whole."""
    first, second = run_distributed(saves_of_two, 2, str(tmp_path / "moments"))
    assert first == second and first["moments"] > 25 and set(first["steps"].values()) == {1, 2}
    told, same = run_distributed(spare_and_end, 2, str(tmp_path / "ends"))
    assert told == same and told[0] == "went on" and told[3] == "/spare/step_00000002"
    assert told[1].startswith("CheckpointError") and "rank 1: OSError: [Errno 28] No space left on device" in told[1]
    assert told[2].startswith("Interrupted") and "step_00000002. Make room" in told[2]


def slow_disk_of_rank_1(rank: int, world_size: int, folder: str) -> int:
    """Save in the foreground; rank 1 writes on until rank 0, which is done, has beaten three times. The beats of this rank."""
    from videofm.checkpoint import save as protocol
    from videofm.checkpoint.writer import PROGRESS

    protocol._ROUND_SECONDS = 0.2
    write, heard, beats = protocol._write_share, Path(folder) / "heard", list[float]()

    def slow(*share: Any) -> Any:
        deadline = time.monotonic() + PATIENCE / 2
        while rank == 1 and not heard.exists() and time.monotonic() < deadline:
            PROGRESS.pieces += 1
            time.sleep(0.1)
        return write(*share)

    def beat() -> None:
        beats.append(time.monotonic())
        if rank == 0 and len(beats) == 3 + own:
            heard.touch()

    protocol._write_share = slow
    own = 1  # what rank 0 writes itself takes no longer than a look
    peers = Peers(rank, world_size, dist.new_group(group_desc="checkpoint"))
    saver = Saver(Path(folder) / "checkpoints", KeepRules(1), peers, asynchronous=False, any_rank=any_rank, beat=beat)
    saver.copy(Facts(2), content_of(2))
    saver.write()
    return whole_step(Path(folder) / "checkpoints", peers) if heard.exists() else -1


def test_a_rank_that_waits_for_a_slow_disk_of_another_is_alive(tmp_path: Path) -> None:
    """Its watchdog would end the attempt as hung otherwise."""
    assert run_distributed(slow_disk_of_rank_1, 2, str(tmp_path)) == [2, 2]


# -- the same tensors from all layouts


def shared_out(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Split tensors in files: `model` over the ranks of a tensor group and, as ZeRO 3 has it, over those that hold the same
    weights; of `world_size` ranks half are tensor ranks where there are four."""
    from videofm.config.train import ParallelConfig
    from videofm.parallel.mesh import split_mesh
    from videofm.parallel.shards import TensorShard, split_parameter
    from videofm.train.optim import bring_shard, whole_shape
    from videofm.train.state import peers_of

    torch.set_num_threads(1)
    tensor_degree = 2 if world_size == 4 else 1
    mesh = split_mesh(ParallelConfig(data_degree=world_size // tensor_degree, tensor_degree=tensor_degree), CPU)
    stored: list[StoredTensor] = []
    held: list[int] = []
    for file, tensors in tensors_of(5).items():
        for name, whole in tensors.items():
            # A tensor rank's share of 6 x 3 has 9 elements, which two ranks hold 10 of.
            big = torch.cat([whole.reshape(-1).float() + 0.5 * n for n in range(18)])[:18].reshape(6, 3)
            parameter = nn.Parameter(big.clone())
            if tensor_degree > 1 and "weight" in name:
                parameter = split_parameter(parameter, TensorShard(0, tensor_degree), mesh)
            if "bias" not in name:  # what ZeRO 3 leaves on a parameter: its shape, and this rank's padded part
                ranks = mesh.gradient_degree
                size = -(-parameter.numel() // ranks)
                padded = torch.zeros(size * ranks)
                padded[: parameter.numel()] = parameter.data.flatten()
                own = padded[mesh.gradient_rank(rank) * size :][:size].clone()
                parameter.ds_tensor, parameter.ds_numel, parameter.ds_shape = own, parameter.numel(), parameter.shape  # type: ignore[attr-defined]
                shard = own
            else:
                shard = parameter.data
            held.append(shard.nbytes)

            def bring(to: int | None, parameter: nn.Parameter = parameter, shard: Tensor = shard) -> Tensor | None:
                found = bring_shard(parameter, shard, mesh, to)
                assert (found is None) == (to not in (None, rank)), "only the owner gets it"
                return found

            assert whole_shape(parameter) == big.shape
            everywhere = bring(None)
            assert everywhere is not None and torch.equal(everywhere, big)
            stored.append(StoredTensor(file, name, tuple(big.shape), torch.float32, bring))
    owners = owners_of(stored, world_size)
    save_now(Path(folder) / str(world_size), Facts(5), Content(stored, {"state": {"step": 5}}), peers_of(mesh))
    return {"written": sum(t.num_bytes for t, owner in zip(stored, owners, strict=True) if owner == rank)}


def engine_ranks(rank: int, world_size: int, folder: str) -> None:
    """At each ZeRO stage: two steps of the toy, and a checkpoint of its weights, average and moments."""
    from videofm.parallel.mesh import destroy_mesh, split_mesh
    from videofm.train.engine import PhaseEngine
    from videofm.train.optim import MovingAverage, gather_shard, local_shard
    from videofm.train.state import content, load_state, peers_of

    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None
    mesh = split_mesh(toy_config(0, world_size).parallel, CPU)
    for stage in range(4):
        model, config = toy_model(), toy_config(stage, world_size)
        model.spec_name = "toy"  # type: ignore[assignment]
        model.config = ToyModelConfig()  # type: ignore[assignment]
        engine = PhaseEngine({"model": model}, ToyObjective(), "generator", config, mesh)
        average = MovingAverage(model.named_parameters(), 0.9)
        for step in range(2):
            engine.step(toy_batches(step, rank, world_size), lr=0.01)
            average.update(step)
        job: Any = SimpleNamespace(
            config=config, mesh=mesh, models={"model": model}, engines={"generator": engine}, averages={"model": average},
            trained_roles=("model",), num_samples=16, divergence=SimpleNamespace(skipped=[]),
            loader=SimpleNamespace(plan=SimpleNamespace(identity={}, check=lambda identity: None)),
        )  # fmt: skip
        made = content(job, PlanState(step=2))
        target = save_now(Path(folder) / f"{world_size}-{stage}", Facts(2), made, peers_of(mesh))
        expected = {
            "models/model/model": {
                n: gather_shard(p, local_shard(p), mesh.gradient_group) for n, p in model.named_parameters()
            },
            "ema/model/model": average.whole(mesh.gradient_group),
            "optimizer/generator": engine.optimizer_state(),
        }
        for file, tensors in expected.items():
            found = read_tensors(target, file)
            assert found.keys() == tensors.keys(), (stage, file)
            assert all(same_bits(found[name], value) for name, value in tensors.items()), (stage, file)
        # Back into a fresh engine: it has the same state, to the bit.
        again = PhaseEngine({"model": toy_model()}, ToyObjective(), "generator", config, mesh)
        fresh = MovingAverage(again.module.roles["model"].named_parameters(), 0.9)
        job.engines, job.averages, job.num_samples = {"generator": again}, {"model": fresh}, 0
        assert load_state(job, target) == PlanState(step=2) and job.num_samples == 16
        state = again.optimizer_state()
        assert all(same_bits(state[name], value) for name, value in expected["optimizer/generator"].items()), stage
        whole = fresh.whole(mesh.gradient_group)
        assert all(same_bits(whole[name], value) for name, value in expected["ema/model/model"].items()), stage
        dist.barrier()
    destroy_mesh()


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Also of minus zero."""
    return ours.dtype == theirs.dtype and torch.equal(
        ours.contiguous().reshape(-1).view(torch.uint8), theirs.detach().contiguous().reshape(-1).view(torch.uint8)
    )


def test_one_two_and_four_ranks_write_the_same_tensors(tmp_path: Path) -> None:
    """Tensor by tensor, bit for bit, whatever is split over whom; each rank writes its share, to the largest tensor."""
    found = {world_size: run_distributed(shared_out, world_size, str(tmp_path)) for world_size in (1, 2, 4)}
    folders = {world_size: newest_whole([tmp_path / str(world_size)]) for world_size in found}
    for file in tensors_of(5):
        one = read_tensors(folders[1], file)  # type: ignore[arg-type]
        for world_size in (2, 4):
            other = read_tensors(folders[world_size], file)  # type: ignore[arg-type]
            assert other.keys() == one.keys() and all(same_bits(other[name], value) for name, value in one.items())
    for world_size, ranks in found.items():
        written = [rank["written"] for rank in ranks]
        assert sum(written) == found[1][0]["written"] and max(written) - min(written) <= 18 * 4, world_size


def test_every_zero_stage_writes_what_it_holds_and_takes_it_back(tmp_path: Path) -> None:
    run_distributed(engine_ranks, 1, str(tmp_path))
    run_distributed(engine_ranks, 2, str(tmp_path))
    shards = list((tmp_path / "2-3/step_00000002/optimizer").glob("generator-*-of-00002.safetensors"))
    assert len(shards) == 2 and (tmp_path / "1-3/step_00000002/optimizer/generator.safetensors").exists()


if __name__ == "__main__":
    rank_that_may_die(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
