"""A checkpoint is whole or absent, and damage is found before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.nfs import remember_absence
from tests.unit.checkpoint.boundaries import Boundaries, Killed, content_of, save, tensors_of, visible, watched, whole_step
from tests.unit.checkpoint.written import together
from videofm.checkpoint import save as protocol
from videofm.checkpoint import writer
from videofm.checkpoint.keep import KeepRules, sweep
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import COMMITTED, Facts, FileEntry, is_whole, read_record, step_folder, verify
from videofm.checkpoint.resume import newest_whole
from videofm.checkpoint.save import SaveFailed, read_tensors, save_now
from videofm.errors import CheckpointError

NAMES = (
    "models/dit/model.safetensors",
    "models/dit/model.json",
    "ema/dit/model.safetensors",
    "optimizer/train.safetensors",
    "state.json",
    COMMITTED,
)
NO_SPACE = OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushes are counted below; really flushing a thousand times takes minutes on a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    facts = Facts(7, False, "1.2", "abc", {"data": 1, "zero_stage": 3}, 99, {"loss": 0.5, "grad_norm": None})
    folder = save_now(tmp_path, facts, content_of(7))
    assert folder.name == "step_00000007" and whole_step(tmp_path) == 7
    record = verify(folder)
    assert record.facts == facts and sorted(record.files) == sorted(set(NAMES) - {COMMITTED})
    # What safetensors itself reads is the same, to the bit.
    assert all(torch.equal(load_file(folder / NAMES[0])[name], value) for name, value in tensors_of(7)[NAMES[0][:-12]].items())


def test_several_ranks_write_shards_as_the_hub_has_them(tmp_path: Path) -> None:
    """Tensor by tensor what one rank writes; the index says in which file each lies, and the total of their bytes."""
    for num_ranks in (1, 2, 4):
        root = tmp_path / str(num_ranks)
        folders = together(num_ranks, lambda peers, root=root: save_now(root, Facts(3), content_of(3), peers))
        assert set(folders) == {step_folder(root, 3)} and whole_step(root) == 3
    folder = step_folder(tmp_path / "4", 3)
    index = json.loads((folder / "models/dit/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (folder / "models/dit").glob("*.safetensors"))
    assert len(files) > 1 and files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert {name: name in load_file(folder / "models/dit" / file) for name, file in index["weight_map"].items()} == {
        "weight": True, "bias": True, "table": True
    }  # fmt: skip
    assert index["metadata"]["total_size"] == 15 * 4 + 5 * 4 + 15 * 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(b"metrics") + 12 if path.name == COMMITTED else len(content) - 2
    content[place] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncate": truncate,
    "flip": flip,
    "delete": Path.unlink,
    "empty": lambda path: path.write_bytes(b"") and None,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_is_found_and_the_one_before_is_used(
    tmp_path: Path, damage: str, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("videofm.checkpoint.resume._PATIENCE", 0.0)
    save(tmp_path, 1), save(tmp_path, 2)
    old, new = step_folder(tmp_path, 1), step_folder(tmp_path, 2)
    DAMAGES[damage](new / name)
    with pytest.raises(CheckpointError, match="never completed" if (name, damage) == (COMMITTED, "delete") else name):
        verify(new)
    assert newest_whole([tmp_path]) == old
    # A folder without its marker is no checkpoint: there is nothing to tell.
    assert ("step_00000002 is damaged" in caplog.text) == ((name, damage) != (COMMITTED, "delete"))
    save(tmp_path, 2)  # training comes to that step again, and what is damaged gives way
    assert whole_step(tmp_path) == 2


def test_a_whole_checkpoint_of_the_step_stays(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    assert folder is not None
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert save_now(tmp_path, Facts(2, healthy=False), content_of(2)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before and read_record(folder).facts.healthy


def test_format_1_is_read(tmp_path: Path) -> None:
    """What the first version wrote: no facts but the step, and no hash of the marker."""
    folder = save(tmp_path, 5)
    assert folder is not None
    marker = json.loads((folder / COMMITTED).read_text())
    old = {"format": 1, "step": 5, "time": marker["time"], "files": marker["files"]}
    (folder / COMMITTED).write_text(json.dumps(old))
    assert whole_step(tmp_path) == 5 and read_record(folder).facts == Facts(5)
    (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="state.json has 2 bytes"):
        verify(folder)


def test_markers_that_are_none(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    assert folder is not None
    for content, match in (
        ("{}", "has not the fields of a marker"),
        ("[]", "has not the fields of a marker"),
        ('{"format": 3}', "has the format 3, which a newer videofm wrote; this one reads up to 2"),
    ):
        (folder / COMMITTED).write_text(content)
        with pytest.raises(CheckpointError, match=match):
            read_record(folder)
        assert not is_whole(folder)


def test_a_kill_at_any_file_boundary_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Die before each open, flush, mkdir, rename and removal of a save that keeps one checkpoint. What a run would go on from
    is then step 1 or step 2, whole, and the next attempt saves over what was left.

    Moments of the save: 6 folders are made (`mkdir` is tried again where a parent was missing), 5 files and the marker are
    opened and flushed; 6 folders (aside, models, models/dit, ema, ema/dit, optimizer) are flushed, it is renamed and
    the parent flushed; then the old one is renamed and its 6 files and 6 folders are removed. One moment more never comes.
    """
    whole = Boundaries()
    save(tmp_path / "whole", 1)
    with watched(whole):
        save(tmp_path / "whole", 2, rules=KeepRules(1))
    opened = [moment for moment in whole.seen if moment.startswith("open")]
    assert len(opened) == 6 and opened[-1] == f"open {COMMITTED}"
    assert len([moment for moment in whole.seen if moment.startswith("fsync")]) == 6 + 6 + 1
    renames = [moment for moment in whole.seen if moment.startswith("rename")]
    assert renames == ["rename .step_00000002.tmp", "rename step_00000001"]
    assert len([moment for moment in whole.seen if moment.startswith(("remove", "rmdir"))]) == 6 + 6
    commit = whole.seen.index(renames[0])

    def die() -> None:
        raise Killed

    for number in range(1, len(whole.seen) + 2):
        root = tmp_path / str(number)
        save(root, 1)
        with watched(Boundaries(number, die)) as boundaries:
            try:
                save(root, 2, rules=KeepRules(1))
            except CheckpointError as error:
                died = isinstance(error.__cause__, Killed)
            else:
                died = False
        assert died == boundaries.fired == (number <= len(whole.seen))
        assert visible(root) and whole_step(root) == (1 if number - 1 <= commit else 2), whole.seen[number - 1]
        sweep(root)
        assert len(list(root.iterdir())) == len(visible(root))
        save(root, 2, rules=KeepRules(1))
        save(root, 3, rules=KeepRules(1))
        assert whole_step(root) == 3 and [path.name for path in root.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize("kind", ["boundary", "write"])
def test_a_full_disk_at_any_moment_leaves_the_old_and_no_rest(tmp_path: Path, kind: str) -> None:
    """The same with an error of the disk in the place of death: the partial files go. Behind the rename the checkpoint is there
    for all to see, although it is told that it failed. `write` fails the k-th call of a file's `write`."""
    fired = True
    number = 0
    while fired:
        number += 1
        root = tmp_path / str(number)
        save(root, 1)
        failed = None
        if kind == "boundary":

            def fail() -> None:
                raise NO_SPACE

            with watched(Boundaries(number, fail)) as boundaries:
                failed = failure_of(lambda root=root: save_now_in_thread(root))  # type: ignore[misc]
            fired = boundaries.fired
        else:
            counter = FailingWrites(number)
            with mock.patch.object(writer, "open", counter.open, create=True):
                failed = failure_of(lambda root=root: save_now_in_thread(root))  # type: ignore[misc]
            fired = counter.fired
        assert (failed is not None) == fired
        assert failed is None or ("No space left" in str(failed) and failed.by_disk)
        step = whole_step(root)
        assert not list(root.glob(".*")), "partial files are gone"
        if step == 1:
            assert failed is not None and visible(root) == ["step_00000001"]
        save(root, 2)
        assert whole_step(root) == 2
    assert number > (25 if kind == "boundary" else 12), "it must have failed at every moment"


@pytest.mark.parametrize("damage", ["elsewhere", "short"])
def test_a_folder_that_nodes_do_not_share_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """The files of rank 1 lie on the disk of its own node, or come to the main rank cut short: none may call that a
    checkpoint."""
    monkeypatch.setattr(protocol, "_SEE_SECONDS", 0.0)
    write, root = protocol._write_share, tmp_path / "run"
    together(2, lambda peers: save_now(root, Facts(1), content_of(1), peers))

    def writes(aside: Path, staged: Any, is_main: bool) -> Any:
        found = write(aside if is_main or damage == "short" else tmp_path / "node_1", staged, is_main)
        if not is_main and damage == "short":
            truncate(aside / min(found))
        return found

    monkeypatch.setattr(protocol, "_write_share", writes)
    told = r"rank 0: .*of 7 files that the ranks wrote are not in .* bytes and is {} here. .*run must be shared by all nodes"

    def failing(peers: Peers) -> bool:
        with pytest.raises(SaveFailed, match=told.format("absent" if damage == "elsewhere" else "of [0-9]+ bytes")) as error:
            save_now(root, Facts(2), content_of(2), peers)
        return error.value.by_disk

    assert together(2, failing) == [True, True]
    assert whole_step(root) == 1 and [path.name for path in root.iterdir()] == ["step_00000001"]


def test_files_of_other_nodes_are_seen_on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that it remembers as absent, at the first look; and what comes, or grows, between two looks."""
    monkeypatch.setattr(protocol, "_SEE_SECONDS", 0.0)
    files = {name: FileEntry(4, "") for name in ("models/dit/model.safetensors", "state.json")}
    for name in files:
        writer.write_durably(tmp_path / name, [b"four"])
    absent = remember_absence(monkeypatch)
    absent.update(str(tmp_path / name) for name in files)
    protocol._await_files(tmp_path, files)
    (tmp_path / "state.json").write_bytes(b"fo")
    with pytest.raises(FileNotFoundError, match="1 of 2 files .* state.json has 4 bytes and is of 2 bytes here"):
        protocol._await_files(tmp_path, files)
    monkeypatch.setattr(protocol, "_SEE_SECONDS", 60.0)
    monkeypatch.setattr(protocol.time, "sleep", lambda seconds: (tmp_path / "state.json").write_bytes(b"four"))
    protocol._await_files(tmp_path, files)


class Scripted(Peers):
    """Rank 0 of two; what the other one says is given."""

    def __init__(self, *others: Any) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "others", iter(others))
        object.__setattr__(self, "heard", [])

    def share(self, value: Any) -> list[Any]:
        self.heard.append((value, protocol.PROGRESS.others))  # type: ignore[attr-defined]
        return [value, next(self.others)]  # type: ignore[attr-defined]


def test_a_rank_that_is_done_hears_of_one_that_still_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one writes in the second and the third round; in two more its disk takes nothing, then it is done. What is
    heard of it is not told on as this rank's own progress: two disks that are dead must not keep each other alive."""
    monkeypatch.setattr(protocol, "PROGRESS", writer.Progress(pieces=9))
    rounds = [[False, 5], [False, 6], [False, 8], [False, 8], [False, 8], [True, 9]]
    peers = Scripted(*rounds, {"value": "theirs"})
    assert protocol._together_in_rounds(peers, lambda: "ours") == ["ours", "theirs"]
    assert peers.heard == [  # type: ignore[attr-defined]
        *(([True, 9], others) for others in (0, 0, 1, 2, 2, 2)), ({"value": "ours"}, 2)
    ]  # fmt: skip


class FailingWrites:
    """`open` whose files fail at the `number`-th write."""

    def __init__(self, number: int) -> None:
        self._number, self._count = number, 0

    @property
    def fired(self) -> bool:
        return self._count >= self._number

    def open(self, path: Path, mode: str) -> Any:
        file = open(path, mode)  # noqa: SIM115 (closed by what is returned)
        write = file.write
        outer = self

        class Failing:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, part: Any) -> None:
                outer._count += 1
                if outer._count == outer._number:
                    write(part[: len(part) // 2])
                    raise NO_SPACE
                write(part)

            flush, fileno = file.flush, file.fileno

        return Failing()


def save_now_in_thread(root: Path) -> None:
    """In a thread of the saver's name, where moments are counted."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            save_now(root, Facts(2), content_of(2))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="videofm-checkpoint")
    thread.start(), thread.join()
    if failures:
        raise failures[0]


def failure_of(action: Callable[[], None]) -> SaveFailed | None:
    try:
        action()
    except SaveFailed as error:
        return error
    return None


def test_no_pickle_is_loaded(tmp_path: Path) -> None:
    """A pickle in the place of the weights, with a marker that has its hash: it is refused and never run."""

    class Planted:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = save(tmp_path / "run", 2)
    assert folder is not None
    content = pickle.dumps(Planted())
    (folder / NAMES[0]).write_bytes(content)
    record = read_record(folder)
    entry = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    (folder / COMMITTED).write_text(json.dumps(replace(record, files={**record.files, NAMES[0]: entry}).to_json()))
    verify(folder)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged, or no safetensors file"):
        read_tensors(folder, NAMES[0][:-12])
    assert not (tmp_path / "ran").exists()
