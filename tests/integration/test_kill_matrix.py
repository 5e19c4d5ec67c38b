"""One process of a training of two ranks is killed with SIGKILL at some moment; gone on with, the run ends bitwise as if it had
not been. `python -m tools.kill_matrix` does the same at more moments (docs/reliability.md).

Compared are all metrics of all steps but clocks, those of steps that were done twice, and every tensor of the last checkpoint:
weights, moving averages, Adam's moments, codebooks.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.faults import MOMENTS, Fault
from tests.kill_matrix import NUM_STEPS, TRAININGS, Bench, differences, draw

SEED = 1
KINDS = {
    "dit": ("forward", "commit", "data_worker", "sampling"),
    "vae": ("backward", "committed", "collective", "write"),
    "tokenizer": ("fsync", "collected", "decode"),
    "ar": ("open", "vote", "rename"),
    "dpo": ("start", "remove", "mkdir"),
}
"""The moments of each training by kind; which rank and which one, is drawn. Together all kinds that there are."""
CASES = [(name, number, kind) for name, kinds in KINDS.items() for number, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The undisturbed runs, each made when it is first asked for."""
    return Bench(tmp_path_factory.mktemp("kill_matrix"))


@pytest.mark.parametrize(("name", "number", "kind"), CASES, ids=[f"{name}-{kind}" for name, _, kind in CASES])
def test_killed_and_gone_on_it_ends_as_if_it_had_not_been(bench: Bench, name: str, number: int, kind: str) -> None:
    """Every second time the supervisor starts the ranks again, else the same command is given again."""
    fault = draw(name, bench.counts(name), number + 1, SEED, KINDS[name])[number]
    assert fault.moment == kind
    supervised = number % 2 == 1
    found = bench.disturb(name, kind, [fault], restarts=1 if supervised else 0)
    assert [mark["moment"] for mark in found.marks] == [kind], f"{fault} did not happen\n{found.output}"
    assert found.differences == [], found.output
    survives = kind == "data_worker"  # a decoding process is replaced, and the ranks never know
    assert found.num_attempts == (1 if survives else 2), found.output
    assert found.num_commands == (1 if survives or supervised else 2), found.output


def test_killed_twice_under_the_supervisor(bench: Bench) -> None:
    """The main rank at its first commit, then the other one in a forward pass of the ranks that took over; two restarts are
    allowed, and used."""
    of_a_step = bench.counts("dit")[1]["forward"] // NUM_STEPS
    found = bench.disturb("dit", "twice", [Fault(0, "commit"), Fault(1, "forward", of_a_step)], restarts=2)
    assert [mark["moment"] for mark in found.marks] == ["commit", "forward"], found.output
    assert found.differences == [] and (found.num_commands, found.num_attempts) == (1, 3), found.output


def test_a_real_process_that_nobody_watches_gives_the_undisturbed_run(bench: Bench) -> None:
    """What the matrix compares with was forked, and counted its moments: neither changes a number."""
    run = bench.folder / "unwatched"
    code, output = bench.train("dit", run, {}, started=True)
    assert code == 0, output
    assert differences(run, bench.straight("dit")) == []


def test_real_processes_are_killed_and_go_on(bench: Bench) -> None:
    """As a user starts them, while a checkpoint is written."""
    fault = draw("dit", bench.counts("dit"), 1, SEED, ["fsync"])[0]
    found = bench.disturb("dit", "started", [fault], started=True)
    assert [mark["moment"] for mark in found.marks] == ["fsync"], found.output
    assert found.differences == [] and found.num_commands == found.num_attempts == 2, found.output


def test_differences_are_seen(bench: Bench, tmp_path: Path) -> None:
    """One bit of one tensor, one metric of one step, a step that is missing: each alone is named."""
    straight, run = bench.straight("dit"), tmp_path / "run"
    shutil.copytree(straight, run)
    assert differences(run, straight) == []
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:-1]))
    assert differences(run, straight) == [f"steps {list(range(1, NUM_STEPS))}"]
    (run / "metrics.jsonl").write_text("".join(rows).replace('"loss": 0.', '"loss": 1.').replace('"loss": 2.', '"loss": 3.'))
    assert "loss of step 1" in differences(run, straight)
    (run / "metrics.jsonl").write_text("".join(rows))
    path = next((run / f"checkpoints/step_{NUM_STEPS:08d}/optimizer").rglob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert [name.split(":")[0] for name in differences(run, straight)] == ["tensor optimizer/train"]


def test_every_training_and_every_kind_of_moment_is_here() -> None:
    assert KINDS.keys() == TRAININGS.keys()
    assert {kind for kinds in KINDS.values() for kind in kinds} == MOMENTS.keys()
