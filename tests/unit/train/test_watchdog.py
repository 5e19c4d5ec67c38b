"""When a rank counts as hung, what it leaves, and whom it names."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.nfs import remember_absence
from videofm.config.faults import FaultsConfig
from videofm.train import watchdog
from videofm.train.watchdog import Heartbeat, Watchdog, verdict, where

ROOT = Path(__file__).parents[3]
WAITS = {"place": "wait (c10d.py:1)", "doing": "backward pass", "waits": "all_reduce over the data group (ranks 0, 1)"}
BUSY = {"place": "forward (model.py:7)", "doing": "forward pass", "waits": None}


@pytest.mark.parametrize(
    ("answers", "world_size", "told"),
    [
        ({0: WAITS}, 2, "hung after step 7: rank 1 did not answer: stopped, gone, or stuck outside of Python (late)"),
        ({1: BUSY}, 4, "hung after step 7: ranks 0, 2, 3 did not answer: stopped, gone, or stuck outside of Python (late)"),
        ({0: WAITS, 1: BUSY}, 2, "rank 1 is in forward (model.py:7), in the forward pass, and the others wait (late)"),
        ({0: BUSY}, 1, "hung after step 7: rank 0 is in forward (model.py:7), in the forward pass (late)"),
        ({0: WAITS, 1: WAITS}, 2, "rank 0 waits in all_reduce over the data group .*; rank 1 waits in all_reduce"),
        ({0: BUSY, 1: BUSY}, 2, "rank 0 is in forward .*; rank 1 is in forward"),
    ],
)
def test_who_is_named(answers: dict[int, Any], world_size: int, told: str) -> None:
    """Who says nothing; else who waits for nobody while others do; else everyone."""
    found = verdict(answers, world_size, 7, "late")
    if ".*" in told:
        assert re.search(told, found)
    else:
        assert told in found


def test_where_a_thread_stands() -> None:
    """Its innermost Python function, as seen from another thread, which then lets it go on."""
    inside, leave = threading.Event(), threading.Event()

    def deep_in_the_model() -> None:
        inside.set()
        leave.wait(10)

    thread = threading.Thread(target=deep_in_the_model)
    thread.start()
    inside.wait(10)
    assert thread.ident is not None
    found = where(thread.ident)
    while ".wait (" not in (found["place"] or "") and thread.is_alive():  # on its way from `inside.set`
        time.sleep(0.01)
        found = where(thread.ident)
    leave.set()
    thread.join()
    assert found["waits"] is None and found["doing"] is None
    assert found["place"] is not None and ".wait (" in found["place"] and "threading.py" in found["place"]
    assert where(thread.ident)["place"] is None, "it has ended"


def test_a_heartbeat_counts_and_says_what_began() -> None:
    heart = Heartbeat()
    assert list(heart.over("ab", "reading")) == ["a", "b"] and (heart.beats, heart.doing) == (2, "reading")
    heart.beat()
    assert (heart.beats, heart.doing) == (3, "reading")


# -- whole processes, of which the watchdog ends some: rank 0 of two, each with a body of its own


def stuck_in_the_model() -> None:
    time.sleep(60)


def hangs(heart: Heartbeat) -> None:
    heart.step, heart.sample_ids = 4, [["a@0", "b@0"], ["c@0"]]
    heart.beat("step 5")
    stuck_in_the_model()


def never_steps(heart: Heartbeat) -> None:
    stuck_in_the_model()


def goes_on(heart: Heartbeat) -> None:
    """Three times as long as it may be quiet, with a beat now and then."""
    heart.step = 1
    for _ in range(90):
        heart.beat()
        time.sleep(0.05)


def is_told(heart: Heartbeat) -> None:
    heart.step = 2
    stuck_in_the_model()


def keeps_the_lock(heart: Heartbeat) -> None:
    """PyDLL calls with Python's lock held: no Python runs for 5 s, longer than the limit and what is added to it. Before that,
    the watchdog has looked once since the first step."""
    arm, armed = faulthandler.dump_traceback_later, threading.Event()

    def arms(seconds: float, **rest: Any) -> None:
        arm(seconds, **rest)
        if seconds < 2:  # the limit of a step, not that of the start
            armed.set()

    watchdog.faulthandler.dump_traceback_later = arms  # of this process, which ends with this function
    heart.step = 1
    while not armed.wait(0.05):
        heart.beat()
    ctypes.PyDLL(None).sleep(5)


BODIES: dict[str, tuple[Callable[[Heartbeat], None], dict[str, float]]] = {
    "hangs": (hangs, {"hang_timeout": 0.5}),
    "never_steps": (never_steps, {"hang_timeout": 30.0, "startup_timeout": 0.5}),
    "goes_on": (goes_on, {"hang_timeout": 1.5}),
    "is_told": (is_told, {"hang_timeout": 20.0}),
    "keeps_the_lock": (keeps_the_lock, {"hang_timeout": 0.5}),
}


def run_all(folder: Path) -> dict[str, int]:
    """Fork a process for each of `BODIES`; their exit codes."""
    watchdog.ANSWER_SECONDS = 0.2
    children = {}
    for name, (body, faults) in BODIES.items():
        children[name] = os.fork()
        if children[name] == 0:
            with Watchdog(FaultsConfig(**faults), folder / name, 0, 2) as dog:  # type: ignore[arg-type]
                body(dog.heartbeat)
            os._exit(0)
    return {name: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for name, child in children.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What they left, and `codes.json`. A fresh process forks them: pytest has armed a faulthandler in this one."""
    found = tmp_path_factory.mktemp("watched")
    (found / "is_told" / "hung").mkdir(parents=True)
    (found / "is_told" / "hung" / "rank_1.json").write_text(json.dumps(WAITS))
    subprocess.run([sys.executable, "-m", "tests.unit.train.test_watchdog", found], cwd=ROOT, check=True, timeout=300)
    return found


def code(folder: Path, name: str) -> int:
    return int(json.loads((folder / "codes.json").read_text())[name])


def said(folder: Path, name: str) -> str:
    outcome = json.loads((folder / name / "rank_0.json").read_text())
    assert outcome["state"] == "hung"
    return str(outcome["message"])


def test_no_beat_for_too_long_ends_the_process_with_its_stacks(folder: Path) -> None:
    """The file names the function, the step, what was begun and the samples; the outcome names the rank that did not answer."""
    assert code(folder, "hangs") == 1
    stacks = (folder / "hangs" / "rank_0_stacks.txt").read_text()
    assert "no sign of life for" in stacks and "faults.hang_timeout is 0.5 s" in stacks
    assert "steps done: 4; last begun: step 5" in stacks and "samples of micro-batch 0: a@0, b@0" in stacks
    assert "in stuck_in_the_model" in stacks and "main thread: is in stuck_in_the_model (" in stacks
    assert said(folder, "hangs").startswith("hung after step 4: rank 1 did not answer: stopped, gone")


def test_the_first_step_has_a_time_of_its_own(folder: Path) -> None:
    assert code(folder, "never_steps") == 1
    assert "faults.startup_timeout is 0.5 s" in (folder / "never_steps" / "rank_0_stacks.txt").read_text()
    assert said(folder, "never_steps").startswith("hung before the first step")


def test_a_rank_that_goes_on_leaves_nothing(folder: Path) -> None:
    assert code(folder, "goes_on") == 0 and list((folder / "goes_on").iterdir()) == []


def test_another_rank_that_hangs_has_this_one_write_where_it_stands(folder: Path) -> None:
    """Long before its own time is over; and with both answers the one that waits for nobody is named."""
    assert code(folder, "is_told") == 1
    assert "another rank hangs" in (folder / "is_told" / "rank_0_stacks.txt").read_text()
    told = said(folder, "is_told")
    assert told.startswith("hung after step 2: rank 0 is in stuck_in_the_model (") and "and the others wait" in told


def test_of_a_process_that_keeps_pythons_lock_there_are_stacks_too(folder: Path) -> None:
    """It woke, and ended before or after its thread saw how late it is; without the lock nobody else would end it."""
    assert code(folder, "keeps_the_lock") in (0, 1)
    assert "in keeps_the_lock" in (folder / "keeps_the_lock" / "rank_0_stacks.txt").read_text()


def test_time_in_which_the_whole_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A scheduler suspends a job for an hour between two looks of the thread: that is one look more, not an hour."""
    dog = Watchdog(FaultsConfig(hang_timeout=30.0), tmp_path, 0, 1)
    dog.heartbeat.step = 1
    clock, ended = iter([0.0, 1.0, 3601.0, 3602.0, 3603.0]), list[str]()

    class Done:
        looks = 0

        def wait(self, seconds: float) -> bool:
            self.looks += 1
            return self.looks > 4

    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(dog, "_end", ended.append)
    monkeypatch.setattr(dog, "_done", Done())
    monkeypatch.setattr(dog, "_stacks", None, raising=False)
    dog._watch()
    assert ended == []


def test_the_words_of_other_nodes_are_seen_on_nfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This rank has looked for `hung/` before it was there, and looks for answers before they are written: NFS then says for a
    minute that they are absent, and who answered at once would be named as silent."""
    dog = Watchdog(FaultsConfig(), tmp_path, 0, 3)
    remember_absence(monkeypatch)
    assert not dog._another_hangs()
    watchdog.write_json(tmp_path / "hung" / "rank_0.json", WAITS)
    assert dog._another_hangs()
    sleep, ticks = time.sleep, iter(range(1, 100))

    def sleeps(seconds: float) -> None:
        tick = next(ticks)
        if tick < 3:
            watchdog.write_json(tmp_path / "hung" / f"rank_{tick}.json", BUSY)
        sleep(0.01)

    monkeypatch.setattr(watchdog.time, "sleep", sleeps)
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 30.0)
    assert dog._answers() == {0: WAITS, 1: BUSY, 2: BUSY} and next(ticks) < 10


if __name__ == "__main__":
    (Path(sys.argv[1]) / "codes.json").write_text(json.dumps(run_all(Path(sys.argv[1]))))
