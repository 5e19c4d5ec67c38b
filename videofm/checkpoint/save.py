"""The commit protocol of checkpoints.

A checkpoint is `checkpoints/step_00000200/`. Every rank writes its files aside, in `.step_00000200.tmp/`, each flushed to disk
and hashed on the way, and says whether it could. Where one could not, all give up together and the main rank removes what there
is. Otherwise the main rank writes the marker `COMMITTED.json` last, and one rename makes the checkpoint visible. Nobody but the
main rank renames or deletes, and nothing is ever written into a folder that has its name. So there is a whole checkpoint or
none, wherever a process dies.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from videofm.checkpoint.content import Content, HostBuffers, Staged
from videofm.checkpoint.keep import trash
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import COMMITTED, Facts, FileEntry, Record, committed, step_folder, verify
from videofm.checkpoint.tensors import TensorFiles
from videofm.checkpoint.writer import PROGRESS, dtype_name, write_durably, write_tensors
from videofm.errors import CheckpointError
from videofm.files import look_into, sync
from videofm.progress import LOG
from videofm.run_dir import now

__all__ = ["COMMITTED", "SaveFailed", "committed", "read_tensors", "save_now", "step_folder", "verify", "write_checkpoint"]

_ROUND_SECONDS = 10.0
"""Time between two words of ranks of which some still write."""
_SEE_SECONDS = 30.0
"""Longest time until the main rank sees what another one has written: shared file systems cache names and sizes."""
_LOOK_EVERY = 0.5


class SaveFailed(CheckpointError):
    """A checkpoint that could not be written; on every rank the same.

    Attributes:
        by_disk: whether the disk is to blame on each rank that failed, so that a later try may succeed.
    """

    def __init__(self, message: str, by_disk: bool) -> None:
        super().__init__(message)
        self.by_disk = by_disk


def write_checkpoint(checkpoints: Path, facts: Facts, staged: Staged, peers: Peers) -> Path:
    """Write and commit a checkpoint; all ranks call it, each with its share. One of that step that is whole already stays.

    Raises:
        SaveFailed: a rank could not write its share, or the main rank not commit; nothing of it is left.
        CollectiveError: a rank ended.
    """
    target = step_folder(checkpoints, facts.step)
    aside = checkpoints / f".{target.name}.tmp"
    try:
        (exists, *_) = _together(peers, lambda: peers.is_main and _prepare(target, aside, staged.folders))
        if exists:
            return target
        listings = _together_in_rounds(peers, lambda: _write_share(aside, staged, peers.is_main))
        files = {name: FileEntry(*entry) for listing in listings for name, entry in sorted(listing.items())}
        _together(peers, lambda: _commit(aside, target, Record(facts, now(), files)) if peers.is_main else None)
    except SaveFailed:
        if peers.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def save_now(checkpoints: Path, facts: Facts, content: Content, peers: Peers | None = None) -> Path:
    """Write and commit a checkpoint of what the content is at this moment; all ranks call it. See `write_checkpoint`."""
    peers = peers or Peers()
    return write_checkpoint(checkpoints, facts, HostBuffers().stage(content, peers.rank, peers.world_size), peers)


def read_tensors(folder: Path, name: str) -> Mapping[str, Tensor]:
    """The tensors of `name` (a relative path without suffix) in a checkpoint; each is read when it is asked for."""
    return _LazyTensors(TensorFiles(folder, name))


class _LazyTensors(Mapping[str, Tensor]):
    def __init__(self, files: TensorFiles) -> None:
        self._files, self._names = files, dict.fromkeys(files.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:  # `get` and `in` ask for what may not be there
            raise KeyError(name)
        return self._files.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _together(peers: Peers, action: Callable[[], Any]) -> list[Any]:
    """What `action` gives on each rank; where it fails on one, all fail, and say which."""
    return _vote(peers, _try(action))


def _together_in_rounds(peers: Peers, action: Callable[[], Any]) -> list[Any]:
    """The same for what takes long on one rank and not on another: while any is at it, all tell each other how much they wrote.

    So whoever waits for a slow disk of another rank knows that it is one, and no wait for a rank is longer than a round. A rank
    that ended is noticed in the next round; one whose disk takes nothing more goes on talking, and moves no number.
    """
    if peers.world_size == 1:
        return _together(peers, action)
    said: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: said.append(_try(action)), name=threading.current_thread().name, daemon=True)
    thread.start()
    before: list[Any] | None = None
    while True:
        thread.join(_ROUND_SECONDS)
        assert said or thread.is_alive(), "it says something, or goes on"
        words = peers.share([bool(said), PROGRESS.pieces])
        if all(done for done, _ in words):
            return _vote(peers, said[0])
        PROGRESS.others += before is not None and words != before
        before = words


def _try(action: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": action()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "by_disk": isinstance(error, OSError)}


def _vote(peers: Peers, said: dict[str, Any]) -> list[Any]:
    answers = peers.share(said)
    failed = {rank: answer for rank, answer in enumerate(answers) if "error" in answer}
    if failed:
        causes = "; ".join(f"rank {rank}: {answer['error']}" for rank, answer in failed.items())
        raise SaveFailed(causes, all(answer["by_disk"] for answer in failed.values()))
    return [answer["value"] for answer in answers]


def _prepare(target: Path, aside: Path, folders: Sequence[str]) -> bool:
    """Make an empty folder aside, and those in it; true where the checkpoint is there and whole, and nothing is to be done."""
    if (target / COMMITTED).exists():
        try:
            verify(target)
            return True
        except CheckpointError as error:
            LOG.warning("%s; it is written anew", error)
    if target.exists():
        shutil.rmtree(trash(target))
    shutil.rmtree(aside, ignore_errors=True)
    for folder in folders:
        (aside / folder).mkdir(parents=True, exist_ok=True)
    return False


def _write_share(aside: Path, staged: Staged, is_main: bool) -> dict[str, tuple[int, str]]:
    """Write the files of this rank: relative path -> bytes and hash."""
    found = {name: _write_file(aside / name, tensors) for name, tensors in staged.tensors.items()}
    if is_main:
        found |= {name: _write_json(aside / name, value) for name, value in staged.values.items()}
    return {name: (entry.bytes, entry.sha256) for name, entry in found.items()}


def _commit(aside: Path, target: Path, record: Record) -> None:
    _await_files(aside, record.files)
    _write_json(aside / COMMITTED, record.to_json())
    for folder in sorted({path.parent for path in aside.rglob("*")}, reverse=True):  # names in folders, the inner first
        sync(folder)
    os.replace(aside, target)
    sync(target.parent)


def _await_files(aside: Path, files: Mapping[str, FileEntry]) -> None:
    """See that every file of a checkpoint is here, of its size: where the folder is one of each node, those of the other nodes
    are not.

    Raises:
        FileNotFoundError: one is not.
    """
    deadline, folders = time.monotonic() + _SEE_SECONDS, sorted({(aside / name).parent for name in files})
    missing = list(files)
    while True:
        for folder in folders:
            look_into(folder)
        missing = [name for name in missing if _size(aside / name) != files[name].bytes]
        if not missing:
            return
        if time.monotonic() > deadline:
            break
        PROGRESS.pieces += 1  # a wait with an end of its own is no hang
        time.sleep(_LOOK_EVERY)
    size = _size(aside / missing[0])
    raise FileNotFoundError(
        f"{len(missing)} of {len(files)} files that the ranks wrote are not in {aside} as the main rank sees it: {missing[0]} "
        f"has {files[missing[0]].bytes} bytes and is {'absent' if size is None else f'of {size} bytes'} here. "
        f"{aside.parent} must be shared by all nodes"
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    layout = {name: (dtype_name(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    return write_tensors(path, layout, tensors.__getitem__)


def _write_json(path: Path, value: Any) -> FileEntry:
    return write_durably(path, [json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"])
