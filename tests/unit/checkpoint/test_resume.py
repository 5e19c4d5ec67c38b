"""Which checkpoint a run goes on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.nfs import remember_absence
from tests.unit.checkpoint.boundaries import save, whole_step
from tests.unit.checkpoint.written import together
from videofm.checkpoint import record, resume
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import Facts, step_folder
from videofm.checkpoint.resume import newest_whole
from videofm.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine dies here, and a busy disk takes long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_nothing_at_all_is_none_and_nothing_whole_is_an_error(tmp_path: Path) -> None:
    assert newest_whole([tmp_path / "run", tmp_path / "spare"]) is None
    save(tmp_path, 1)
    (step_folder(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"none of the 1 checkpoints in .* is whole \(.*state.json has 2 bytes.*start again"
    ):
        newest_whole([tmp_path])


def test_the_newest_of_both_places_is_taken(tmp_path: Path) -> None:
    """Of one step, that of the run itself; and where the newest is damaged, the one before, wherever it lies."""
    own, spare = tmp_path / "run", tmp_path / "spare"
    for place, step in ((own, 1), (own, 2), (spare, 2), (spare, 3)):
        save(place, step)
    assert newest_whole([own, spare]) == step_folder(spare, 3)
    (step_folder(spare, 3) / "state.json").unlink()
    assert newest_whole([own, spare]) == step_folder(own, 2)
    (step_folder(own, 2) / "state.json").unlink()
    assert newest_whole([own, spare]) == step_folder(spare, 2)
    (step_folder(spare, 2) / "state.json").unlink()
    assert newest_whole([own, spare]) == step_folder(own, 1) and whole_step(own) == 1


def test_a_checkpoint_that_was_absent_a_moment_ago_is_seen_on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main rank of another node names it."""
    folder = save(tmp_path, 2)
    assert folder is not None
    absent = remember_absence(monkeypatch)
    absent.update(map(str, (folder, folder / record.COMMITTED)))
    monkeypatch.setattr(resume, "_LOOK_EVERY", 0.0)
    assert newest_whole([tmp_path], OfAnotherNode(str(folder))) == folder and not absent


class OfAnotherNode(Peers):
    """Rank 1; what the main rank says is given."""

    def __init__(self, found: str) -> None:
        super().__init__(1, 2)
        object.__setattr__(self, "_said", iter([[[found], 0], None]))

    def share(self, value: Any) -> list[Any]:
        return [next(self._said), value]  # type: ignore[attr-defined]


def test_only_what_is_accepted_comes_into_question(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)

    def before_3(facts: Facts) -> bool:
        return facts.step < 3

    assert newest_whole([tmp_path], accept=before_3) == step_folder(tmp_path, 2)
    assert newest_whole([tmp_path], accept=lambda facts: False) is None


def test_ranks_share_the_hashing_and_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every file is hashed once by one of three ranks; what one of them finds, all pass over, and one says so."""
    together(3, lambda peers: save(tmp_path, 1, peers))
    together(3, lambda peers: save(tmp_path, 2, peers))
    hashed: list[Path] = []
    real = record.sha256_of

    def counts(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(record, "sha256_of", counts)
    new, old = step_folder(tmp_path, 2), step_folder(tmp_path, 1)
    assert together(3, lambda peers: newest_whole([tmp_path], peers)) == [new] * 3
    assert sorted(hashed) == sorted(new / name for name in record.read_record(new).files)
    index = new / "models/dit/model.safetensors.index.json"
    index.write_bytes(index.read_bytes().replace(b"0000", b"0001", 1))
    assert together(3, lambda peers: newest_whole([tmp_path], peers)) == [old] * 3
    assert caplog.text.count("model.safetensors.index.json is not the one recorded") == 1
    (old / "state.json").unlink()

    def fails(peers: object) -> str:
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as found:
            newest_whole([tmp_path], peers)  # type: ignore[arg-type]
        return str(found.value)

    assert len(set(together(3, fails))) == 1


def test_a_folder_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared file system shows the marker to the other ranks only after they have looked twice."""
    save(tmp_path, 1)
    folder = step_folder(tmp_path, 1)
    hidden, looks = tmp_path / "hidden", []
    (folder / record.COMMITTED).rename(hidden)

    def later(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            hidden.rename(folder / record.COMMITTED)

    monkeypatch.setattr(resume.time, "sleep", later)
    resume._await(folder / record.COMMITTED)
    assert len(looks) == 2 and whole_step(tmp_path) == 1
    monkeypatch.setattr(resume, "_PATIENCE", 0.0)
    resume._await(tmp_path / "never")
    assert len(looks) == 2
