"""The faults of tests/faults.py strike where they say, once, and only in the rank they name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import faults
from tests.faults import Fault, Watch, environment, fired

SAVE = """
import os, shutil, sys
from pathlib import Path
run = Path(sys.argv[2])
for step in (2, 4):
    aside = run / "checkpoints" / f".step_{step:08d}.tmp"
    os.makedirs(aside)
    with (aside / ".state.tmp").open("w") as file:
        file.write("x")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside / ".state.tmp", aside / "state")
    os.replace(aside, run / "checkpoints" / f"step_{step:08d}")
    (run / "other").write_text("not a part of any checkpoint")
shutil.rmtree(run / "checkpoints" / "step_00000002")
print("the end")
os._exit(0)
"""
"""What a save does to files, as a rank whose module and run directory are its arguments."""

LEAVES = {
    ("mkdir", 1): [],
    ("mkdir", 2): [""],
    ("mkdir", 3): ["", "step_00000002", "step_00000002/state"],
    ("open", 1): ["", ".step_00000002.tmp"],
    ("fsync", 1): ["", ".step_00000002.tmp", ".step_00000002.tmp/.state.tmp"],
    ("rename", 1): ["", ".step_00000002.tmp", ".step_00000002.tmp/.state.tmp"],
    ("commit", 1): ["", ".step_00000002.tmp", ".step_00000002.tmp/state"],
    ("committed", 2): ["", "step_00000002", "step_00000002/state", "step_00000004", "step_00000004/state"],
    ("remove", 1): ["", "step_00000002", "step_00000002/state", "step_00000004", "step_00000004/state"],
    ("remove", 2): ["", "step_00000002", "step_00000004", "step_00000004/state"],
}
"""Moment and number -> what lies in `checkpoints` when a process died there."""


def save(tmp_path: Path, planned: list[Fault], rank: int = 1, census: Path | None = None) -> subprocess.CompletedProcess[str]:
    marks = tmp_path / "marks"
    marks.mkdir(exist_ok=True)
    environ = {**os.environ, **environment(planned, marks, census), "RANK": str(rank)}
    command = [sys.executable, "-c", SAVE, "videofm.train.worker", str(tmp_path / "run")]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def left(tmp_path: Path) -> list[str]:
    top = tmp_path / "run" / "checkpoints"
    return sorted(str(path.relative_to(top)).replace(".", "", path == top) for path in [top, *top.rglob("*")] if path.exists())


@pytest.mark.parametrize(("moment", "number"), LEAVES)
def test_a_process_dies_between_two_operations_on_files(tmp_path: Path, moment: str, number: int) -> None:
    done = save(tmp_path, [Fault(1, moment, number)])
    assert done.returncode == -signal.SIGKILL and done.stdout == "", done.stderr
    assert left(tmp_path) == LEAVES[moment, number]
    (mark,) = fired(tmp_path / "marks")
    assert (mark["rank"], mark["moment"], mark["number"]) == (1, moment, number)
    assert mark["what"].startswith("checkpoints")


def test_faults_come_one_after_the_other_and_each_once(tmp_path: Path) -> None:
    planned = [Fault(1, "commit"), Fault(0, "open"), Fault(1, "fsync")]
    ends = []
    for rank in (0, 1, 1, 0, 1, 1):
        ends.append((rank, save(tmp_path, planned, rank).returncode))
        subprocess.run(["rm", "-r", str(tmp_path / "run")], check=True)
    kill = -signal.SIGKILL
    assert ends == [(0, 0), (1, kill), (1, 0), (0, kill), (1, kill), (1, 0)]
    assert [mark["moment"] for mark in fired(tmp_path / "marks")] == ["commit", "open", "fsync"]


def test_a_census_counts_what_can_be_chosen(tmp_path: Path) -> None:
    assert save(tmp_path, [], census=tmp_path / "census").stdout == "the end\n"
    counts = json.loads((tmp_path / "census" / "rank_1.json").read_text())
    assert counts == {"mkdir": 3, "open": 2, "fsync": 2, "rename": 2, "commit": 2, "committed": 2, "remove": 2}


def test_other_processes_are_left_alone(tmp_path: Path) -> None:
    environ = {**os.environ, **environment([Fault(0, "open")], tmp_path), "RANK": "0"}
    code = "import sys; print([name for name in sys.meta_path if 'AfterImport' in str(name)])"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("values", [{"moment": "teatime"}, {"number": 0}, {"signal": "SIGNOTHING"}])
def test_a_fault_that_cannot_be_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        Fault(**{"rank": 0, "moment": "open", **values})


class Dying(Watch):
    """Tells when it would die."""

    def __init__(self, moment: str, number: int) -> None:
        super().__init__(Fault(0, moment, number), Path("none"))
        self.seen: list[Any] = []
        self.look: Any = lambda: None

    def die(self, what: str = "") -> None:
        self.seen.append((what, self.look()))


def test_a_backward_pass_ends_in_its_middle() -> None:
    """Ten layers one behind the other: the last have their gradients, the first have none."""
    layers = [torch.nn.Linear(3, 3) for _ in range(10)]
    watch, module = Dying("backward", 2), SimpleNamespace(backward=torch.autograd.backward)
    watch.look = lambda: [layer.weight.grad is not None for layer in layers]
    faults._watch_backward(watch, module)
    loss = torch.nn.Sequential(*layers)(torch.ones(1, 3)).sum()
    module.backward(loss, retain_graph=True)
    assert watch.seen == [] and all(layer.weight.grad is not None for layer in layers)
    for layer in layers:
        layer.weight.grad = None
    module.backward(loss)
    done = watch.seen[0][1]
    assert done == sorted(done) and 2 <= sum(done) <= 8


def test_a_collective_is_left_before_or_with_its_result() -> None:
    class Work:
        waited = False

        def wait(self) -> None:
            self.waited = True

    class ProcessGroup:
        group_desc = "of the test"
        works: list[Work] = []

        def allreduce(self, tensors: list[int]) -> Work:
            self.works.append(Work())
            return self.works[-1]

    for moment, begun in (("collective", 1), ("collected", 2)):
        watch, group = Dying(moment, 2), type("Own", (ProcessGroup,), {"works": []})
        watch.look = lambda group=group: [work.waited for work in group.works]
        faults._watch_collectives(watch, SimpleNamespace(ProcessGroup=group))
        group().allreduce([1]), group().allreduce([2])
        assert watch.seen == [("allreduce of group of the test", [False] if begun == 1 else [False, True])]
        assert watch.counts == Counter(collective=2, collected=2)


def test_a_file_of_tensors_is_torn_between_two_pieces(tmp_path: Path) -> None:
    watch = Dying("write", 2)
    written: list[bytes] = []

    def write_durably(path: Path, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            written.append(piece)

    module = SimpleNamespace(write_durably=write_durably)
    watch.look = lambda: list(written)
    faults._watch_writes(watch, module)
    module.write_durably(tmp_path / "checkpoints" / "a", [b"1", b"2", b"3"])
    module.write_durably(tmp_path / "elsewhere", [b"4"])
    assert watch.seen == [("checkpoints/a", [b"1"])] and watch.counts == Counter(write=3)
    assert written == [b"1", b"2", b"3", b"4"]


def test_collectives_of_the_thread_that_saves_are_votes() -> None:
    group = type("ProcessGroup", (), {"group_desc": "x", "allgather": lambda self: None})
    watch = Dying("vote", 1)
    faults._watch_collectives(watch, SimpleNamespace(ProcessGroup=group))
    group().allgather()
    thread = threading.Thread(target=group().allgather)
    thread.start(), thread.join()
    assert watch.counts == Counter(collective=1, collected=1, vote=1) and len(watch.seen) == 1


def test_a_scope_counts_the_modules_inside_of_it_alone() -> None:
    watch, layer = Dying("forward", 2), torch.nn.Linear(2, 2)
    engine = SimpleNamespace(PhaseModule=type("PhaseModule", (), {"forward": lambda self: (layer(torch.ones(2)), layer)[0]}))
    hooks: list[Any] = []
    faults._mark_scope("forward", engine)
    faults._watch_modules(watch, SimpleNamespace(register_module_forward_pre_hook=hooks.append))
    handle = torch.nn.modules.module.register_module_forward_pre_hook(hooks[0])
    try:
        layer(torch.ones(2))
        engine.PhaseModule().forward()
        assert watch.seen == [] and watch.counts == Counter(forward=1)
        engine.PhaseModule().forward()
        assert watch.seen == [("Linear", None)]
    finally:
        handle.remove()
