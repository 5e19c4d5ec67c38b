"""A run that leaves its course: steps are skipped and counted, then it goes back and reads on past the data, then it stops.

A step whose loss or gradient is not finite, or whose gradient is a spike, moves nothing (`engine`). More of these than
`faults.divergence.skip` among the last `window` data steps end the attempt as `diverged`. The next one goes back to the newest
checkpoint that is healthy and older than the first of them (where none is healthy, to the newest older one), and never reads
the steps of the order from `window` before the first of the skipped ones up to the last: the data behind them take their place,
as if they had never been in the order. What is left out is in the run directory:

```
skipped_windows.json: [{"first": 900, "end": 1012, "skipped": [1003, ...], "step": 1012, "resume_step": 800, "time": "..."}]
```
`first`, `end` (exclusive) and `skipped` are numbers in the order of the data, from 0; `step` and `resume_step` count optimizer
steps. Checkpoints behind the one to go back to are removed at once, and those that were made on what is left out now when the
next attempt starts, so that the newest one is always of the course that the run is on. (The cure is that of PaLM, arXiv
2204.02311, section 5.1: from a checkpoint before a spike on, with the data of the spike and of the steps before it left out.)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from videofm.checkpoint.keep import trash
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import committed, read_record
from videofm.config.faults import DivergenceConfig
from videofm.data.draws import PlanState
from videofm.data.plan import DataPlan
from videofm.errors import CheckpointError, DataError, VideofmError
from videofm.parallel.mesh import Mesh
from videofm.progress import LOG
from videofm.run_dir import RunDirectory, now, read_json, write_json

FILE = "skipped_windows.json"


class Diverged(VideofmError):
    """Too many steps were skipped: the ranks agreed to go back to a healthy checkpoint and to pass over the data between."""


class Divergence:
    """Counts skipped steps. Every rank has one, and all of them count alike.

    Attributes:
        skipped: the data steps among the last `window` that were skipped.
    """

    def __init__(self, config: DivergenceConfig) -> None:
        self.config = config
        self.skipped: list[int] = []

    def count(self, position: PlanState, skipped: bool) -> None:
        """The step before `position` is done, and was `skipped` or not."""
        done = position.data_step - 1
        kept = [step for step in self.skipped if step > done - self.config.window]
        self.skipped = [*kept, done] if skipped else kept

    @property
    def healthy(self) -> bool:
        """Whether none of the last `window` data steps was skipped: whether to trust a checkpoint that is made now."""
        return not self.skipped

    @property
    def spent(self) -> bool:
        """Whether more steps were skipped than are borne."""
        return len(self.skipped) > self.config.skip


def identity(windows: Sequence[range]) -> dict[str, list[list[int]]]:
    """`windows` as a part of what all ranks must agree on about the order; empty without any."""
    return {"passed_over": [[window.start, window.stop] for window in windows]} if windows else {}


def keep_to_course(plan: DataPlan, windows: Sequence[range], mesh: Mesh, places: Sequence[Path]) -> None:
    """Let `plan` pass over `windows`, and remove checkpoints that were made on them. All ranks call it, before one of the
    checkpoints is chosen.

    Args:
        plan: of the run.
        windows: as `read_windows` gives them.
        mesh: all of its ranks call.
        places: the folders in which checkpoints of the run may lie.
    """
    if not windows:
        return
    plan.pass_over(windows)
    if mesh.is_main:
        left_out = ", ".join(f"{window.start} to {window.stop - 1}" for window in windows)
        LOG.warning("data of the order that are left out, as training left its course on them: steps %s", left_out)
        remove_others(places, windows)
    mesh.barrier()


def read_windows(run: RunDirectory, peers: Peers | None = None) -> list[range]:
    """The steps of the order that `run` leaves out, in the order in which they were given up; they may overlap.

    All ranks call it, and the main rank reads: NFS may still tell another node that a file of a moment ago is absent, and the
    ranks must leave out the same.

    Args:
        run: the run.
        peers: the ranks; None is this process by itself.
    """
    peers = peers or Peers()
    windows: list[dict[str, Any]] = peers.share(_read(run) if peers.is_main else None)[0]
    return [range(window["first"], window["end"]) for window in windows]


def _read(run: RunDirectory) -> list[dict[str, Any]]:
    path = run.path / FILE
    found: list[dict[str, Any]] = read_json(path) if path.exists() else []
    return found


def roll_back(run: RunDirectory, divergence: Divergence, position: PlanState, peers: Peers, places: Sequence[Path]) -> NoReturn:
    """Give up the steps up to `position`: write down which data the next attempt leaves out, and remove the checkpoints behind
    the one that it goes back to. All ranks call it, while no save is under way; the main rank alone looks, writes and removes.

    Args:
        run: its file of windows is written, by the main rank.
        divergence: spent.
        position: after the last step.
        peers: the ranks.
        places: the folders in which checkpoints of the run may lie.

    Raises:
        Diverged: another attempt may go on.
        VideofmError: the run has gone back as often as it may.
    """
    config, windows = divergence.config, read_windows(run, peers)
    told = (
        f"training left its course at step {position.step}: {len(divergence.skipped)} of the last {config.window} steps were "
        f"skipped, and faults.divergence.skip bears {config.skip}"
    )
    if len(windows) >= config.rollbacks:
        raise VideofmError(
            f"{told}; the run went back {len(windows)} times, and faults.divergence.rollbacks allows {config.rollbacks}. Other "
            "data did not help, so look for the cause: a smaller optimizer.lr or longer warmup_steps, trainer.precision fp32, "
            "clips that are broken (the log names the steps, their samples are those of the order), or an "
            "optimizer.spike_factor too small for norms of this size. Then start a new run from the newest healthy checkpoint "
            "(models.ROLE.init_from), or raise faults.divergence.rollbacks to go on from it"
        )
    given_up = _give_up(run, divergence, position, places) if peers.is_main else None
    (first, end, resume_step) = peers.share(given_up)[0]
    raise Diverged(
        f"{told}; going back to {f'the checkpoint of step {resume_step}' if resume_step else 'the start'}, and leaving out the "
        f"data of steps {first} to {end - 1} of the order (rollback {len(windows) + 1} of at most {config.rollbacks})"
    )


def _give_up(run: RunDirectory, divergence: Divergence, position: PlanState, places: Sequence[Path]) -> tuple[int, int, int]:
    """Write the window, remove the checkpoints behind; the first step that is left out, the one after the last, and the step of
    the checkpoint to go back to (0: the start)."""
    before = chain.from_iterable(_before(place, divergence.skipped[0]) for place in places)
    _, resume_step, from_step = max([(False, 0, 0), *before])
    first, end = max(from_step, divergence.skipped[0] - divergence.config.window), position.data_step
    entry = {
        "first": first,
        "end": end,
        "skipped": divergence.skipped,
        "step": position.step,
        "resume_step": resume_step,
        "time": now(),
    }
    write_json(run.path / FILE, [*_read(run), entry])
    _remove_behind(places, from_step)  # written down first: without the window there is nothing to remove them for
    return first, end, resume_step


def remove_others(places: Sequence[Path], windows: Sequence[range]) -> None:
    """Remove the checkpoints in these folders that are not on the course: they were made on data which is left out now. One
    process calls it."""
    for folder in chain.from_iterable(map(committed, places)):
        position = _position(folder)
        if position is not None and not is_on_course(position, windows):
            LOG.warning("%s was made on data that is left out now: it is removed", folder.name)
            shutil.rmtree(trash(folder))


def is_on_course(position: PlanState, windows: Sequence[range]) -> bool:
    """Whether a run that leaves out `windows` comes through `position`: it passed over all of their steps that lie before it,
    and no others."""
    return position.passed_over == sum(step < position.data_step for step in set(chain(*windows)))


def _remove_behind(places: Sequence[Path], data_step: int) -> None:
    """Remove the checkpoints in these folders that have read more than `data_step` steps of the order."""
    for folder in chain.from_iterable(map(committed, places)):
        position = _position(folder)
        if position is not None and position.data_step > data_step:
            LOG.warning("%s lies behind the checkpoint that the run goes back to: it is removed", folder.name)
            shutil.rmtree(trash(folder))


def _before(place: Path, first_skipped: int) -> list[tuple[bool, int, int]]:
    """Of each checkpoint in a folder that no skipped step is in: whether it is healthy, optimizer step and data step."""
    found = []
    for folder in committed(place):
        position = _position(folder)
        try:
            healthy = read_record(folder).facts.healthy
        except CheckpointError:
            continue  # resuming tells of it
        if position is not None and position.data_step <= first_skipped:
            found.append((healthy, position.step, position.data_step))
    return found


def _position(folder: Path) -> PlanState | None:
    """Where in the data a checkpoint stands; None for one that is damaged, which resuming tells of."""
    try:
        return PlanState.from_json(read_json(folder / "state.json")["position"])
    except (CheckpointError, DataError, KeyError, TypeError):
        return None
