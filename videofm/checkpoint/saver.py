"""Checkpoints while training goes on: it waits for a copy to host memory, and a thread of each rank writes that copy.

The order of a save is `copy`, in the training's own thread, then `write`, which starts the thread. One save is under way at a
time. How it ended is settled in the training's thread, by `check` at each step or by `wait`, on all ranks in the same step.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from videofm.checkpoint.content import Content, HostBuffers, Staged
from videofm.checkpoint.keep import KeepRules, prune
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import Facts, step_folder
from videofm.checkpoint.save import SaveFailed, write_checkpoint
from videofm.checkpoint.writer import PROGRESS
from videofm.errors import CheckpointError, Interrupted
from videofm.parallel.collectives import CollectiveError
from videofm.progress import LOG

_LOOK_EVERY = 1.0
"""Seconds between two looks at a thread that is waited for."""
_MOST_FAILED = 2
"""Saves that fail one after the other until the run does."""


@dataclass
class _Save:
    """A save under way: what it writes, and how it ended once `done` is set."""

    facts: Facts
    staged: Staged
    begun: float
    stall: float
    done: threading.Event
    thread: threading.Thread | None = None
    folder: Path | None = None
    failure: BaseException | None = None
    spare: Path | None = None


class Saver:
    """Writes the checkpoints of a run, and deletes those that no rule keeps.

    Attributes:
        num_failed: saves that could not be written to the run's own folder.
        last_step: the step of the newest state that was copied, and has not failed since; None before the first.
    """

    def __init__(
        self,
        checkpoints: Path,
        rules: KeepRules,
        peers: Peers | None = None,
        spare: Path | None = None,
        asynchronous: bool = True,
        any_rank: Callable[[bool], bool] = lambda flag: flag,
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            checkpoints: folder of the run's checkpoints.
            rules: which of them stay.
            peers: the ranks that save together.
            spare: where a state goes that cannot be written to `checkpoints`; None: it is lost.
            asynchronous: return from `write` at once and keep the host buffers, or wait and give them back.
            any_rank: tells whether a flag is set on any rank, through a group that the training's thread uses.
            beat: is called while training waits for a thread that goes on writing: a slow disk is no hang, a dead one is.
        """
        self.checkpoints, self.rules, self.spare = checkpoints, rules, spare
        self.peers, self.asynchronous = peers or Peers(), asynchronous
        self.num_failed = 0
        self.last_step: int | None = None
        self._any_rank = any_rank
        self._failed_in_a_row = 0
        self._beat = beat
        self._buffers = HostBuffers(pinned=asynchronous)
        self._save: _Save | None = None
        self._stall = 0.0

    def take_stall(self) -> float:
        """Seconds that training waited for checkpoints since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def copy(self, facts: Facts, content: Content) -> None:
        """Copy the content to host memory; waits for the save before, which needs the same buffers. All ranks call it.

        Raises:
            CheckpointError, Interrupted: the save before failed; see `wait`.
        """
        begun = time.perf_counter()
        if self._save is not None and self.peers.is_main and not self._save.done.is_set():
            LOG.warning(
                "training waits at step %d for the checkpoint of step %d, which is still being written: raise "
                "trainer.checkpoint_every, or write to a faster disk",
                facts.step,
                self._save.facts.step,
            )
        self._settle()
        staged = self._buffers.stage(content, self.peers.rank, self.peers.world_size)
        stall = time.perf_counter() - begun
        self._stall += stall
        self.last_step = facts.step
        self._save = _Save(facts, staged, begun, stall, threading.Event())

    def write(self) -> None:
        """Write what was copied. All ranks call it.

        Raises:
            CheckpointError, Interrupted: it is not asynchronous, and failed; see `wait`.
        """
        save = self._save
        assert save is not None and save.thread is None, "copy comes first"
        save.thread = threading.Thread(target=self._write, args=(save,), name="videofm-checkpoint", daemon=True)
        save.thread.start()
        if not self.asynchronous:
            self.wait()

    def check(self) -> None:
        """Settle the save under way if all ranks are done with it; all ranks call it, each step.

        Raises:
            CheckpointError, Interrupted: it failed; see `wait`.
        """
        if self._save is not None and not self._any_rank(not self._save.done.is_set()):
            self._settle()

    def wait(self) -> Path | None:
        """Wait for the save under way; returns its folder, or None where there is none or where it failed and training may go
        on. All ranks call it.

        Raises:
            Interrupted: the state could only be written to the spare folder.
            CheckpointError: the second save in a row failed, or one not for the sake of a disk.
            CollectiveError: another rank has ended meanwhile.
        """
        begun = time.perf_counter()
        try:
            return self._settle()
        finally:
            self._stall += time.perf_counter() - begun

    def _settle(self) -> Path | None:
        save = self._save
        if save is None:
            return None
        assert save.thread is not None, "what was copied is to be written before anything else"
        self._join(save.thread)
        self._save = None
        if save.failure is not None:
            traceback.clear_frames(
                save.failure.__traceback__
            )  # they hold what was to be written, as long as anyone has the error
        if not self.asynchronous:
            self._buffers.release()
        if save.failure is None:
            self._failed_in_a_row = 0
            return save.folder
        self.num_failed += 1
        self._failed_in_a_row += 1
        self.last_step = None
        self._judge(save, save.failure)
        return None

    def _join(self, thread: threading.Thread) -> None:
        """Wait for the end of a thread; beats each time that something was written since the last look, here or by a rank that
        is waited for."""
        seen = replace(PROGRESS)
        while thread.is_alive():
            thread.join(_LOOK_EVERY)
            if seen != PROGRESS:
                seen = replace(PROGRESS)
                self._beat()

    def _judge(self, save: _Save, failure: BaseException) -> None:
        """Raise what a failed save means for the run, or let it go on."""
        step, place = save.facts.step, self.checkpoints
        told = f"the checkpoint of step {step} could not be written to {place}: {failure}"
        if self.peers.is_main:
            LOG.error("%s", told)
        if save.spare is not None:
            raise Interrupted(
                f"{told}. Its state is in {save.spare}. Make room, and run the same command again to go on from there."
            ) from failure
        if isinstance(failure, CollectiveError):  # a rank has ended: another attempt may not meet that
            raise CollectiveError(told) from failure
        if not isinstance(failure, SaveFailed):  # a mistake of ours
            raise CheckpointError(told) from failure
        if not failure.by_disk:
            raise CheckpointError(
                f"{told}. No disk is to blame, so that the next save would fail too: look for the cause at the rank that is "
                "named. The last good checkpoint stays, and the same command goes on from it."
            ) from failure
        if self._failed_in_a_row >= _MOST_FAILED:
            raise CheckpointError(
                f"{told}. {self._failed_in_a_row} in a row failed; the last good one stays. Make room, or set "
                "trainer.spare_checkpoints to a folder on another disk, shared by all nodes; the same command then goes on."
            ) from failure

    # -- in the thread

    def _write(self, save: _Save) -> None:
        try:
            save.folder = write_checkpoint(self.checkpoints, save.facts, save.staged, self.peers)
            self._tell(save)
        except SaveFailed as error:
            save.failure = error
            self._write_to_spare(save, error)
        except BaseException as error:  # told by `check`, whatever it is
            save.failure = error
        finally:
            save.done.set()

    def _write_to_spare(self, save: _Save, error: SaveFailed) -> None:
        if self.spare is None or not error.by_disk:
            return
        try:
            save.spare = write_checkpoint(self.spare, save.facts, save.staged, self.peers)
        except SaveFailed as other:
            save.failure = SaveFailed(f"{error}; nor to {step_folder(self.spare, save.facts.step)}: {other}", other.by_disk)
        except BaseException as other:
            save.failure = other
        else:
            self._prune(save.spare, KeepRules(1))

    def _tell(self, save: _Save) -> None:
        """Log the checkpoint, and delete what is not kept; what goes wrong here does not undo the save."""
        if not self.peers.is_main or save.folder is None:
            return
        LOG.info(
            "checkpoint %s: %.3f GB a rank in %.2f s, of which training waited %.2f s",
            save.folder.name,
            save.staged.num_bytes / 1e9,
            time.perf_counter() - save.begun,
            save.stall if self.asynchronous else time.perf_counter() - save.begun,
        )
        best = self.rules.best
        if best is not None and best.metric not in save.facts.metrics:
            LOG.warning(
                "trainer.keep_best: the metrics of step %d have no %r, so this checkpoint cannot be the best; there are: %s",
                save.facts.step,
                best.metric,
                ", ".join(sorted(save.facts.metrics)) or "none",
            )
        self._prune(save.folder, self.rules)

    def _prune(self, newest: Path, rules: KeepRules) -> None:
        if self.peers.is_main:
            try:
                prune(newest.parent, rules, newest=newest)
            except OSError as error:
                LOG.warning("old checkpoints could not be deleted: %s", error)
