"""The checkpoint to go on from: the newest that is whole, found by all ranks together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from videofm.checkpoint.balance import balance
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import COMMITTED, Facts, file_problem, read_record
from videofm.errors import CheckpointError
from videofm.files import look_into
from videofm.progress import LOG

_PATIENCE = 30.0
"""Seconds until a folder that the main rank sees must be visible to the others: shared file systems cache names."""
_LOOK_EVERY = 0.2


def newest_whole(
    places: Sequence[Path], peers: Peers | None = None, accept: Callable[[Facts], bool] = lambda facts: True
) -> Path | None:
    """The newest checkpoint whose every file has its hash; all ranks call it, and each hashes a share of the files.

    A damaged one is named in the log and passed over. Of one step, that of an earlier place is taken first.

    Args:
        places: folders of checkpoints, which need not exist.
        peers: the ranks that look together.
        accept: which checkpoints come into question, by what their markers say.

    Returns:
        Its folder, or None where there is none, or none that is accepted.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    peers = peers or Peers()
    problems: list[str] = []
    candidates, num_refused = peers.share(_candidates(places, accept, problems) if peers.is_main else None)[0]
    for candidate in candidates:
        found = [problem for problem in peers.share(_look(Path(candidate), peers)) if problem is not None]
        if not found:
            return Path(candidate)
        problems += found[:1]
        _tell(peers, found[0])
    (num_damaged, first) = peers.share([len(problems), problems[:1]])[0]
    if num_damaged and not num_refused:
        raise CheckpointError(
            f"none of the {num_damaged} checkpoints in {', '.join(map(str, places))} is whole ({first[0]}); move the folder "
            "away to start again"
        )
    return None


def _candidates(places: Sequence[Path], accept: Callable[[Facts], bool], problems: list[str]) -> tuple[list[str], int]:
    """The folders that come into question, newest first, and the number of those that were not accepted."""
    found: list[tuple[int, int, str]] = []
    num_refused = 0
    for number, place in enumerate(places):
        # Also those without a marker: a save is renamed with it, so that one which lacks it was damaged later.
        for folder in sorted(folder for folder in place.glob("step_*") if folder.is_dir()):
            try:
                facts = read_record(folder).facts
            except CheckpointError as error:
                problems.append(str(error))
                LOG.warning("%s; it is passed over", error)
                continue
            if accept(facts):
                found.append((-facts.step, number, str(folder)))
            else:
                num_refused += 1
    return [folder for _, _, folder in sorted(found)], num_refused


def _look(folder: Path, peers: Peers) -> str | None:
    """What is wrong with this rank's share of the files, or None."""
    try:
        _await(folder / COMMITTED)
        record = read_record(folder)
    except CheckpointError as error:
        return str(error)
    names = sorted(record.files)
    owners = balance([record.files[name].bytes for name in names], peers.world_size)
    for name, owner in zip(names, owners, strict=True):
        if owner == peers.rank and (problem := file_problem(folder, name, record.files[name])):
            return problem
    return None


def _await(path: Path) -> None:
    """Give a file that another rank sees, in a folder that may be new too, time to appear here."""
    deadline = time.monotonic() + _PATIENCE
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY)
        look_into(path.parent.parent)
        look_into(path.parent)


def _tell(peers: Peers, problem: str) -> None:
    if peers.is_main:
        LOG.warning("%s; trying the checkpoint before it", problem)
