"""When training saves, what it tells, and what it does where it cannot. The job is only as real as that takes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from videofm.checkpoint import listing
from videofm.checkpoint import save as protocol
from videofm.checkpoint import saver as module
from videofm.checkpoint.content import replicated
from videofm.checkpoint.record import committed, read_record, verify
from videofm.checkpoint.save import read_tensors
from videofm.config.train import TrainerConfig
from videofm.data.draws import PlanState
from videofm.errors import CheckpointError, Interrupted
from videofm.run_dir import RunDirectory, read_json, write_json
from videofm.train import state
from videofm.train.callbacks import Checkpoints, Metrics
from videofm.train.watchdog import Heartbeat


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine dies here, and a busy disk takes long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Engine:
    """Moments that a step moves."""

    def __init__(self) -> None:
        self.moment = torch.zeros(4)

    def stored_state(self, file: str) -> list[Any]:
        return [replicated(file, "exp_avg", self.moment)]


def a_job(run: Path, **trainer: Any) -> Any:
    settings = {"max_steps": 9, "checkpoint_every": 2, "keep_checkpoints": 9, **trainer}
    config = SimpleNamespace(
        trainer=TrainerConfig.model_validate(settings), parallel=SimpleNamespace(zero_stage=2), model_dump=lambda mode: {"a": 1}
    )
    mesh = SimpleNamespace(
        rank=0, world_size=1, checkpoint_group=None, data_degree=1, context_degree=1, tensor_degree=1, is_main=True,
        any_rank=lambda flag: flag,
    )  # fmt: skip
    return SimpleNamespace(
        config=config, mesh=mesh, run=RunDirectory(run), models={}, trained_roles=(), averages={}, num_samples=0,
        engines={"train": Engine()}, divergence=SimpleNamespace(skipped=[], spent=False),
        heartbeat=Heartbeat(),
        loader=SimpleNamespace(plan=SimpleNamespace(identity={"seed": 3})),
    )  # fmt: skip


def train(job: Any, steps: int, checkpoints: Checkpoints, each: Callable[[int], None] = lambda step: None) -> list[dict]:
    """Steps as the loop takes them, with the callbacks in the worker's order; returns the rows as they are on disk."""
    job.run.path.mkdir(exist_ok=True, parents=True)
    metrics = Metrics(job.run, 0, job.config.trainer.max_steps, 1, 1)
    callbacks = [checkpoints.copying, metrics, checkpoints]
    for step in range(1, steps + 1):
        each(step)
        job.engines["train"].moment += 1
        job.num_samples += 4
        row = {"loss": 1.0 / step, "grad_norm": float("inf")}
        for callback in callbacks:
            callback.after_step(job, PlanState(step=step), row)
    for callback in callbacks:
        callback.after_training(job, PlanState(step=steps))
    return job.run.metrics()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_each_checkpoint_is_of_its_step_whatever_training_did_meanwhile(tmp_path: Path, asynchronous: bool) -> None:
    job = a_job(tmp_path, asynchronous_checkpoints=asynchronous)
    rows = train(job, 9, Checkpoints(lambda: job.num_samples != 16))
    folders = committed(tmp_path / "checkpoints")
    assert [int(folder.name[5:]) for folder in folders] == [2, 4, 6, 8, 9]
    for folder in folders:
        facts = verify(folder).facts
        assert read_tensors(folder, "optimizer/train")["exp_avg"].eq(facts.step).all()
        assert (facts.healthy, facts.num_samples) == (facts.step != 4, 4 * facts.step)
        assert facts.layout == {"data": 1, "context": 1, "tensor": 1, "zero_stage": 2} and facts.code
        assert facts.metrics["loss"] == 1.0 / facts.step and facts.metrics["grad_norm"] is None
        told = read_json(folder / "state.json")
        assert (told["step"], told["num_samples"], told["data"]) == (facts.step, 4 * facts.step, {"seed": 3})
    stalled = [row["step"] for row in rows if row.get("checkpoint_stall", 0) > 0]
    assert set(stalled) >= {2, 4, 6, 8}, "the row of the step says how long training waited"
    assert all("num_failed_saves" not in row for row in rows)


def test_rows_are_on_disk_before_their_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the thread begins to write, metrics.jsonl has been flushed with the rows up to that step."""
    flushed: list[int] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: flushed.append(len((tmp_path / "metrics.jsonl").read_text().splitlines()))
    )
    found: list[tuple[int, int]] = []
    write = module.write_checkpoint

    def looks(checkpoints: Path, facts: Any, *more: Any) -> Path:
        found.append((facts.step, max(flushed, default=0)))
        return write(checkpoints, facts, *more)

    monkeypatch.setattr(module, "write_checkpoint", looks)
    train(a_job(tmp_path), 5, Checkpoints())
    assert [step for step, _ in found] == [2, 4, 5] and all(rows >= step for step, rows in found)


def test_a_stop_at_a_saved_step_saves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    write = module.write_checkpoint
    monkeypatch.setattr(
        module, "write_checkpoint", lambda where, facts, *more: steps.append(facts.step) or write(where, facts, *more)
    )
    train(a_job(tmp_path), 4, Checkpoints())
    assert steps == [2, 4] and len(committed(tmp_path / "checkpoints")) == 2


def breaks(monkeypatch: pytest.MonkeyPatch, run: Path, broken: Callable[[], bool]) -> None:
    write = protocol.write_durably

    def fails(path: Path, pieces: Any) -> Any:
        if broken() and path.is_relative_to(run):
            raise OSError(28, "No space left on device")
        return write(path, pieces)

    monkeypatch.setattr(protocol, "write_durably", fails)


def test_a_failed_save_is_a_metric_and_the_next_one_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save of step 2 fails, and training hears of it: from the row of step 4 on at the latest."""
    now = [0]
    breaks(monkeypatch, tmp_path, lambda: now[0] == 2)
    job = a_job(tmp_path, asynchronous_checkpoints=False)
    rows = train(job, 6, Checkpoints(), lambda step: now.__setitem__(0, step))
    assert [row.get("num_failed_saves") for row in rows] == [None, None, 1, 1, 1, 1]
    assert [int(folder.name[5:]) for folder in committed(tmp_path / "checkpoints")] == [4, 6]


def test_the_last_save_is_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []
    breaks(monkeypatch, tmp_path, lambda: tries.append(1) is None and len(tries) == 1)
    train(a_job(tmp_path, checkpoint_every=100), 3, Checkpoints())
    assert [folder.name for folder in committed(tmp_path / "checkpoints")] == ["step_00000003"]
    other = tmp_path / "other"
    breaks(monkeypatch, other, lambda: True)
    with pytest.raises(CheckpointError, match="step 3 could not be written .* 2 in a row failed"):
        train(a_job(other, checkpoint_every=100), 3, Checkpoints())


def test_with_a_spare_folder_the_run_is_interrupted_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, spare = tmp_path / "run", tmp_path / "spare"
    job = a_job(run, spare_checkpoints=str(spare), asynchronous_checkpoints=False)
    now = [0]
    breaks(monkeypatch, run, lambda: now[0] >= 4)
    with pytest.raises(Interrupted, match=r"step 4 could not be written.*Its state is in .*spare.*run-new.*step_00000004"):
        train(job, 9, Checkpoints(), lambda step: now.__setitem__(0, step))
    assert [folder.name for folder in committed(run / "checkpoints")] == ["step_00000002"]
    folder = state.resume_folder(job.run, None, job.config.trainer)
    assert folder == spare / "run-new" / "step_00000004" and read_record(folder).facts.step == 4
    assert state.resume_folder(job.run) == run / "checkpoints" / "step_00000002", "which knows of no spare folder"


def test_spare_folders_of_runs_are_apart(tmp_path: Path) -> None:
    """Two runs of one name and one of the same config: none reads the state of another. The first ones are of an earlier
    version, which wrote no birth: what they saved is found where it was."""
    trainer = TrainerConfig(max_steps=1, spare_checkpoints=str(tmp_path / "spare"))
    found = []
    for place, fingerprint, birth in (
        ("a/run", "1", {}),
        ("b/run", "2", {}),
        ("a/other", "1", {}),
        ("c/run", "1", {"birth": "x"}),
    ):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "lineage.json").write_text(json.dumps({"fingerprint": fingerprint * 64, **birth}))
        found.append(state.places(RunDirectory(tmp_path / place), trainer)[1])
    assert len(set(found)) == 4 and found[0] == tmp_path / "spare" / f"run-{'1' * 12}"
    assert found[3] == tmp_path / "spare" / f"run-{'1' * 12}-x"
    assert state.places(RunDirectory(tmp_path), TrainerConfig(max_steps=1)) == [tmp_path / "checkpoints"]


def test_a_run_that_is_begun_anew_does_not_go_on_from_the_spare_of_the_one_before(tmp_path: Path) -> None:
    """The same config, the same place: the user has moved the first one away. The same run finds its own again."""
    config, trainer = TrainerConfig(max_steps=1), TrainerConfig(max_steps=1, spare_checkpoints=str(tmp_path / "spare"))
    first = state.places(RunDirectory.create(tmp_path / "run", config), trainer)
    assert (
        state.places(RunDirectory.create(tmp_path / "run", config), trainer)
        == first
        == listing.places_of(with_config(tmp_path / "run", trainer))
    )
    (tmp_path / "run").rename(tmp_path / "moved")
    anew = state.places(RunDirectory.create(tmp_path / "run", config), trainer)
    assert anew[0] == first[0] and anew[1] != first[1] and anew[1].parent == first[1].parent


def with_config(run: Path, trainer: TrainerConfig) -> Path:
    """The run, as its config.yaml would be with this section."""
    write_json(run / "config.yaml", {"trainer": trainer.model_dump(mode="json")})
    return run


def test_a_rollback_sees_a_settled_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save of step 2 is under way when step 4 is one skip too many: it is on disk before the row of that step is written,
    and no other begins, though one were due."""
    write, gate = module.write_checkpoint, threading.Event()

    def waits(*arguments: Any) -> Path:
        assert gate.wait(60)
        return write(*arguments)

    monkeypatch.setattr(module, "write_checkpoint", waits)
    job, checkpoints = a_job(tmp_path), Checkpoints()
    for step in (1, 2, 3, 4):
        if step == 4:
            job.divergence.spent = True
            saver = checkpoints._writer(job)
            monkeypatch.setattr(saver, "wait", lambda wait=saver.wait: (gate.set(), wait()))
        checkpoints.copying.after_step(job, PlanState(step=step), {})
        assert [folder.name for folder in committed(tmp_path / "checkpoints")] == ["step_00000002"] * (step == 4)
        checkpoints.after_step(job, PlanState(step=step), {})
    assert saver._save is None, "none is under way"


def test_waiting_for_a_save_moves_the_heart_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the job has when the save is waited for: the worker gives it the watchdog's after it was built."""
    job = a_job(tmp_path)
    writer = state.saver(job)
    job.heartbeat = Heartbeat()
    writer._beat()
    assert job.heartbeat.beats == 1


def test_leftovers_are_swept_when_a_run_begins(tmp_path: Path) -> None:
    for name in (".step_00000002.tmp", ".step_00000001.trash"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert state.resume_folder(RunDirectory(tmp_path)) is None
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_retention_follows_the_config(tmp_path: Path) -> None:
    """Of the steps 1 to 9 the last, each third, and the one with the largest loss: the first."""
    job = a_job(
        tmp_path,
        checkpoint_every=1,
        keep_checkpoints=1,
        keep_every=3,
        keep_best={"metric": "loss", "mode": "max"},
        max_steps=20,
    )
    train(job, 8, Checkpoints())
    assert [int(folder.name[5:]) for folder in committed(tmp_path / "checkpoints")] == [1, 3, 6, 8]
