"""Checkpoints that are written while training goes on, and what becomes of those that cannot be."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.checkpoint.boundaries import content_of, save, whole_step
from tests.unit.checkpoint.written import together
from videofm.checkpoint import save as protocol
from videofm.checkpoint import saver as module
from videofm.checkpoint import writer
from videofm.checkpoint.content import Content, replicated
from videofm.checkpoint.keep import Best, KeepRules
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import Facts, committed, read_record
from videofm.checkpoint.save import read_tensors
from videofm.checkpoint.saver import Saver
from videofm.errors import CheckpointError, Interrupted

NO_SPACE = OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine dies here, and a busy disk takes long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing begins when it is set."""
    opened, write = threading.Event(), module.write_checkpoint

    def waits(*arguments: Any) -> Path:
        assert opened.wait(60)
        return write(*arguments)

    monkeypatch.setattr(module, "write_checkpoint", waits)
    yield opened
    opened.set()


def breaks(monkeypatch: pytest.MonkeyPatch, *broken: Path, error: BaseException = NO_SPACE) -> None:
    """Files below these folders cannot be written."""
    write = protocol.write_durably

    def fails(path: Path, pieces: Any) -> Any:
        if any(path.is_relative_to(folder) for folder in broken):
            raise error
        return write(path, pieces)

    monkeypatch.setattr(protocol, "write_durably", fails)


def test_what_is_saved_is_what_was_there_when_copy_returned(tmp_path: Path, gate: threading.Event) -> None:
    """Training changes the weights before a byte is written; the checkpoint is that of a synchronous save, to the bit."""
    weight = torch.randn(64, 64)
    content = Content([replicated("models/dit/model", "weight", weight)], {"state": {"step": 1}})
    before = weight.clone()
    saver = Saver(tmp_path / "thread", KeepRules(1))
    saver.copy(Facts(1), content)
    saver.write()
    weight.add_(1)
    assert committed(tmp_path / "thread") == [], "nothing is written yet"
    saver.check()  # nor does it wait
    gate.set()
    folder = saver.wait()
    weight.copy_(before)
    other = Saver(tmp_path / "waits", KeepRules(1), asynchronous=False)
    other.copy(Facts(1), content)
    other.write()
    (same,) = committed(tmp_path / "waits")
    assert folder is not None and read_record(folder).files == read_record(same).files
    assert torch.equal(read_tensors(folder, "models/dit/model")["weight"], before)


def test_one_save_at_a_time_and_the_next_waits(tmp_path: Path, gate: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    """The buffers of the first are the second's: it waits until they are written, and says so. Its stall counts."""
    saver = Saver(tmp_path, KeepRules(9))
    saver.copy(Facts(1), content_of(1)), saver.write()
    copied = threading.Event()

    def second() -> None:
        saver.copy(Facts(2), content_of(2))
        copied.set()
        saver.write()

    thread = threading.Thread(target=second)
    thread.start()
    while "still being written" not in caplog.text:
        thread.join(0.01)
    assert not copied.is_set()
    gate.set()
    thread.join(60)
    saver.wait()
    assert "training waits at step 2 for the checkpoint of step 1" in caplog.text and whole_step(tmp_path) == 2
    assert [int(folder.name[5:]) for folder in committed(tmp_path)] == [1, 2]
    assert saver.take_stall() > 0 == saver.take_stall()


def test_buffers_are_kept_only_where_they_are_used_again(tmp_path: Path) -> None:
    for asynchronous in (True, False):
        saver = Saver(tmp_path / str(asynchronous), KeepRules(9), asynchronous=asynchronous)
        saver.copy(Facts(1), content_of(1)), saver.write()
        saver.wait()
        assert bool(saver._buffers._buffers) == saver._buffers._pinned == asynchronous and saver.last_step == 1


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_that_are_not_kept_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """At once, also after a save that failed, whose error knows the frames that held them."""

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")  # a new one: an error keeps the frames that it came through

    if fails:
        monkeypatch.setattr(protocol, "write_durably", full)
    saver = Saver(tmp_path, KeepRules(9), asynchronous=False)
    gc.disable()
    try:
        saver.copy(Facts(1), content_of(1))
        held = [weakref.ref(buffer) for buffer in saver._buffers._buffers.values()]
        saver.write()
        assert held and [reference() for reference in held] == [None] * len(held)
    finally:
        gc.enable()
    assert saver.num_failed == fails


def test_a_thread_that_goes_on_moves_the_heart_and_one_that_is_stuck_does_not() -> None:
    """Of five looks at the thread that is waited for, the second and the fourth find that something was written, here or by a
    rank that is waited for."""
    beats: list[int] = []

    class Writing:
        looks = 0

        def is_alive(self) -> bool:
            return self.looks < 5

        def join(self, timeout: float) -> None:
            assert timeout <= 1.0
            self.looks += 1
            writer.PROGRESS.pieces += 3 * (self.looks == 2)
            writer.PROGRESS.others += self.looks == 4

    thread: Any = Writing()
    Saver(Path("nowhere"), KeepRules(1), beat=lambda: beats.append(thread.looks))._join(thread)
    assert beats == [2, 4]


def test_every_piece_of_a_save_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 40 bytes, 16 at a time: three pieces, and a flush."""
    monkeypatch.setattr(writer, "_PIECE", 16)
    before = writer.PROGRESS.pieces
    writer.write_durably(tmp_path / "file", [bytes(40)])
    assert writer.PROGRESS.pieces - before == 4


def test_a_checkpoint_that_was_refused_costs_no_good_one(tmp_path: Path) -> None:
    """Step 8 has a changed byte, so the run went on from 2. Its next save keeps the last two that are good, 2 and 4."""
    for step in (1, 2, 8):
        save(tmp_path, step)
    weights = tmp_path / "step_00000008/models/dit/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    save(tmp_path, 4, rules=KeepRules(2))
    assert [folder.name for folder in committed(tmp_path)] == ["step_00000002", "step_00000004", "step_00000008"]


def test_a_disk_may_fail_once_and_not_twice_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    saver = Saver(tmp_path, KeepRules(9))
    for step in (2, 3, 4, 5):
        with monkeypatch.context() as patch:
            if step != 3:
                breaks(patch, tmp_path)
            saver.copy(Facts(step), content_of(step))
            saver.write()
            if step == 5:
                with pytest.raises(CheckpointError, match=r"step 5 .*No space left.* 2 in a row failed.*spare_checkpoints"):
                    saver.wait()
                continue
            saver.wait()
        assert saver.num_failed == (1 if step < 4 else 2) and whole_step(tmp_path) == (1 if step == 2 else 3)
        assert saver.last_step == (3 if step == 3 else None)
        assert not list(tmp_path.glob(".*"))
    assert "the checkpoint of step 2 could not be written" in caplog.text and whole_step(tmp_path) == 3


def test_the_spare_folder_takes_the_state_and_the_run_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, spare = tmp_path / "run", tmp_path / "other_disk"
    save(own, 2), save(spare, 1)
    breaks(monkeypatch, own)
    saver = Saver(own, KeepRules(9), spare=spare)
    saver.copy(Facts(3), content_of(3)), saver.write()
    with pytest.raises(Interrupted, match=r"step 3 could not be written to .*run.*No space.*step_00000003. Make room"):
        saver.wait()
    assert whole_step(own) == 2 and whole_step(spare) == 3 and len(committed(spare)) == 1
    assert saver.num_failed == 1


def test_where_the_spare_folder_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a save has failed as any other: training may go on once."""
    breaks(monkeypatch, tmp_path)
    saver = Saver(tmp_path / "run", KeepRules(9), spare=tmp_path / "spare")
    saver.copy(Facts(2), content_of(2)), saver.write()
    assert saver.wait() is None
    saver.copy(Facts(3), content_of(3)), saver.write()
    with pytest.raises(CheckpointError, match=r"No space left on device; nor to .*spare.*step_00000003: rank 0"):
        saver.wait()


def test_a_spare_folder_that_is_not_shared_does_not_take_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 sees another folder under that name: nobody is told that the state is safe there."""
    own, spare = tmp_path / "run", tmp_path / "spare"
    monkeypatch.setattr(protocol, "_SEE_SECONDS", 0.0)
    breaks(monkeypatch, own)
    write = protocol._write_share

    def elsewhere(aside: Path, staged: Any, is_main: bool) -> Any:
        return write(aside if is_main else tmp_path / "node_1" / aside.relative_to(tmp_path), staged, is_main)

    monkeypatch.setattr(protocol, "_write_share", elsewhere)

    def one_rank(peers: Peers) -> None:
        saver = Saver(own, KeepRules(9), peers, spare)
        saver.copy(Facts(2), content_of(2)), saver.write()
        assert saver.wait() is None and saver.num_failed == 1
        saver.copy(Facts(3), content_of(3)), saver.write()
        with pytest.raises(CheckpointError, match=r"No space.*; nor to .*spare.*spare must be shared by all nodes\. 2 in a"):
            saver.wait()

    together(2, one_rank)
    assert committed(spare) == []


def test_a_mistake_of_ours_is_not_borne(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no fault of a disk fails again: the run ends at the next step, spare folder or not."""
    breaks(monkeypatch, tmp_path / "run", error=ValueError("a mistake"))
    saver = Saver(tmp_path / "run", KeepRules(9), spare=tmp_path / "spare")
    saver.copy(Facts(2), content_of(2)), saver.write()
    done = saver._save.done  # type: ignore[union-attr]
    assert done.wait(60)
    with pytest.raises(CheckpointError, match="step 2 could not be written.*ValueError: a mistake. No disk is to") as error:
        saver.check()
    assert "Make room" not in str(error.value) and "spare_checkpoints" not in str(error.value)
    assert not (tmp_path / "spare").exists()


def test_a_failure_on_one_rank_is_one_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four ranks the third cannot write: all give up the save, none is left waiting, and the files of the others go."""
    together(4, lambda peers: save(tmp_path, 1, peers))
    write = protocol._write_share
    broken = [2]

    def fails(aside: Path, staged: Any, is_main: bool) -> Any:
        if threading.current_thread().name == "videofm-checkpoint" and broken and staged is shares[2]:
            raise NO_SPACE
        return write(aside, staged, is_main)

    shares: dict[int, Any] = {}
    stage = module.HostBuffers.stage

    def staged_by(self: Any, content: Content, rank: int, num_ranks: int) -> Any:
        shares[rank] = stage(self, content, rank, num_ranks)
        return shares[rank]

    monkeypatch.setattr(module.HostBuffers, "stage", staged_by)
    monkeypatch.setattr(protocol, "_write_share", fails)

    def one_rank(peers: Peers) -> tuple[int, int | None, bool]:
        saver = Saver(tmp_path, KeepRules(1), peers)
        saver.copy(Facts(2), content_of(2)), saver.write()
        folder = saver.wait()
        return saver.num_failed, saver.last_step, folder is None

    assert together(4, one_rank) == [(1, None, True)] * 4
    assert whole_step(tmp_path) == 1 and not list(tmp_path.glob(".*"))
    broken.clear()
    assert together(4, one_rank) == [(0, 2, False)] * 4
    assert whole_step(tmp_path) == 2


def test_the_log_says_how_long_it_took_and_what_is_not_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "videofm")
    saver = Saver(tmp_path, KeepRules(1, best=Best("held_out_loss")))
    saver.copy(Facts(2, metrics={"loss": 1.0}), content_of(2)), saver.write()
    saver.wait()
    assert "checkpoint step_00000002: 0.000 GB a rank in " in caplog.text and ", of which training waited " in caplog.text
    assert (
        "the metrics of step 2 have no 'held_out_loss', so this checkpoint cannot be the best; there are: loss" in caplog.text
    )


def test_old_ones_that_cannot_be_deleted_do_not_undo_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)

    def fails(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "prune", fails)
    saver = Saver(tmp_path, KeepRules(1))
    saver.copy(Facts(2), content_of(2)), saver.write()
    assert saver.wait() is not None and saver.num_failed == 0
    assert "old checkpoints could not be deleted" in caplog.text
