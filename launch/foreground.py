"""`videofm launch --on local`: the verb ran in the foreground of a shell, so that there is no job to ask; the run directory
knows all."""

from __future__ import annotations

import fcntl

from launch.config import LocalConfig
from launch.submission import Job, JobState, Launch, Work, mark_cancelled, stage_folders
from videofm.errors import ConfigError
from videofm.run_dir import RunDirectory


class Local:
    """This machine; see `launch.submission.Launcher`. The command line runs the verb itself: nothing is handed over."""

    def __init__(self, config: LocalConfig) -> None:
        self.config = config

    def render(self, work: Work) -> str:
        """Raises ConfigError: nothing is handed over."""
        raise ConfigError(f"`videofm launch --on local` runs `videofm {work.verb[0]}` here; there is nothing to render")

    def submit(self, work: Work) -> Launch:
        """Raises ConfigError: nothing is handed over."""
        raise ConfigError(f"`videofm launch --on local` runs `videofm {work.verb[0]}` here; there is nothing to submit")

    def states(self, launch: Launch) -> list[JobState]:
        """One line for the verb: whether a process holds the run directory, else how its newest attempt ended."""
        if working(launch):
            return [JobState(Job("here", None), "running", "a process holds the run directory")]
        ended = [outcome for folder in stage_folders(launch.run) if (outcome := RunDirectory(folder).outcome) is not None]
        last = max(
            ended, key=lambda outcome: outcome["time"], default={"state": "failed", "message": "it ended without a word"}
        )
        return [JobState(Job("here", None), str(last["state"]), str(last["message"]))]

    def cancel(self, launch: Launch, now: bool) -> str:
        """Have it save and stop.

        Raises:
            ConfigError: it is to end `now`, which its own terminal does.
        """
        if now:
            raise ConfigError("a launch on this machine runs in a terminal: press Ctrl-C there twice to end it at once")
        mark_cancelled(launch)
        folders = working(launch)
        for folder in folders:
            folder.request_stop()
        return f"{launch.run} saves and stops" if folders else "nothing works there; nothing to cancel"


def working(launch: Launch) -> list[RunDirectory]:
    """Run directories of the launch that a process works in."""
    return [RunDirectory(folder) for folder in stage_folders(launch.run) if _held(RunDirectory(folder))]


def _held(run: RunDirectory) -> bool:
    path = run.path / ".lock"
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # of a file system without locks: nothing works there, since it cannot take this one
            return False
    return False
