"""`videofm checkpoint ...` from outside: exit codes, what is printed, and that looking needs no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.checkpoint.written import edit_config, tiny_dit, write_step
from videofm import models
from videofm.checkpoint import listing
from videofm.cli import VERBS, main

STEPS = (10, 20, 30, 40)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in STEPS:
        write_step(tmp_path / "run", step, {"dit": tiny_dit(step)}, healthy=step < 40, metrics={"loss": 1.0 / step})
    return tmp_path / "run"


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def told(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    """What is printed, to stdout and then to stderr; the exit code is looked at."""
    found = main(["checkpoint", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert found == code, out + err
    assert "Traceback" not in out + err
    return out + err


def test_list_has_a_row_for_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "list", run).splitlines()
    assert [line.split()[0] for line in lines] == ["step", *map(str, STEPS)]
    rows = json.loads(told(capsys, "list", run, "--json"))
    assert [row["step"] for row in rows] == list(STEPS) and [row["healthy"] for row in rows] == [True, True, True, False]
    assert all(row["damage"] is None and row["bytes"] > 0 for row in rows)


@pytest.mark.parametrize("arguments", [["list", "RUN"], ["verify", "RUN"], ["prune", "RUN", "--keep", "1"]])
def test_looking_after_checkpoints_imports_no_torch(run: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from videofm.cli import main; code = main(sys.argv[1:]); sys.exit(9 if 'torch' in sys.modules else code)"
    )
    given = [argument.replace("RUN", str(run)) for argument in arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code, "checkpoint", *given], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_verify_names_each_damaged_file_and_what_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "verify", run)
    assert text.count(": whole") == len(STEPS)
    (step(run, 40) / "state.json").write_text("{}")
    (step(run, 40) / "models/dit/model.json").unlink()
    text = told(capsys, "verify", run, code=1)
    assert text.count(": whole") == len(STEPS) - 1
    assert "state.json has 2 bytes" in text and "models/dit/model.json is missing" in text
    assert "what to do: bring the files back" in text and "step_00000030 is whole" in text
    assert "state.json" in told(capsys, "verify", step(run, 40), code=1)
    assert told(capsys, "verify", step(run, 30)).strip().endswith("step_00000030: whole")
    (item,) = json.loads(told(capsys, "verify", run, "--json", code=1))["damaged"]
    assert item["instead"] == str(step(run, 30)) and len(item["problems"]) == 2


def test_diff_says_what_differs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    assert "0 differ" in told(capsys, "diff", run, copy)
    text = told(capsys, "diff", step(run, 10), run, code=1)  # of a run the newest
    assert str(step(run, 40)) in text and "state.json  step: 10 | 40" in text
    assert "optimizer/train  exp_avg" in text and "--all shows them" in text, "the worst come first"
    assert re.search(r"models/dit/model: (\d+) of \1 differ, largest [\d.]+, least cosine -?[\d.]+", text)
    everything = told(capsys, "diff", step(run, 10), run, "--all", code=1)
    assert "models/dit/model  proj_in.weight: values, " in everything
    assert everything.count(", cosine") > text.count(", cosine") == 20
    found = json.loads(told(capsys, "diff", step(run, 10), run, "--json", code=1))
    assert found["differs"] and len(found["tensors"]) == everything.count(", cosine")
    for folder in (run, copy):
        models.save(models.load(step(folder, 10), role="dit"), folder / "model")
    assert "differ" in told(capsys, "diff", run / "model", copy / "model")


def test_diff_has_a_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_dit(1)
    models.save(model, tmp_path / "a")
    next(model.parameters()).data.view(-1)[0] += 0.25
    models.save(model, tmp_path / "b")
    told(capsys, "diff", tmp_path / "a", tmp_path / "b", code=1)
    assert "1 differ by more than 0.2" in told(capsys, "diff", tmp_path / "a", tmp_path / "b", "--tolerance", "0.2", code=1)
    assert "0 differ by more than 0.3" in told(capsys, "diff", tmp_path / "a", tmp_path / "b", "--tolerance", "0.3")


def test_average_of_the_last_of_steps_and_of_checkpoints(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three ways to name the same two: the same result, to the last bit."""
    told(capsys, "average", run, "--last", 2, "--out", tmp_path / "last")
    told(capsys, "average", run, "--steps", "30,40", "--weights", "2,2", "--out", tmp_path / "steps")
    text = told(capsys, "average", step(run, 30), step(run, 40), "--out", tmp_path / "named")
    assert "0.5000" in text and "the average of 2 checkpoints (dit)" in text
    for name in ("steps", "named"):
        assert main(["checkpoint", "diff", str(tmp_path / "last"), str(tmp_path / name)]) == 0
    told(capsys, "average", run, "--steps", "30,40", "--weights", "1,2", "--out", tmp_path / "other")
    assert main(["checkpoint", "diff", str(tmp_path / "last"), str(tmp_path / "other")]) == 1
    assert "0 differ" in told(capsys, "diff", tmp_path / "last", tmp_path / "steps")
    text = told(capsys, "average", run, "--last", 2, "--ema", "--out", tmp_path / "ema")
    assert "note: dit has no moving average" in text


def test_average_takes_what_lies_in_the_run_itself(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The spare folder has step 40 a second time, and 50: the same step must not count twice, and what is frozen is not
    beside them."""
    (run / "lineage.json").write_text(json.dumps({"fingerprint": "0123456789abcdef"}))
    edit_config(run, spare_checkpoints=str(tmp_path / "spare"))
    spare = listing.spare_of(run)
    assert spare is not None
    for number in (40, 50):
        shutil.copytree(step(run, 40), spare / f"step_{number:08d}")
    text = told(capsys, "average", run, "--last", 2, "--out", tmp_path / "last")
    assert f"{step(run, 30)}\n" in text and f"{step(run, 40)}\n" in text and str(spare) not in text
    assert "has no checkpoint of step 50" in told(capsys, "average", run, "--steps", "40,50", "--out", tmp_path / "x", code=2)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    text = told(capsys, "average", run, "--last", 2, "--out", tmp_path / "none", code=1)
    assert f"{run / 'checkpoints'} has no checkpoint that was finished" in text and f"those in {spare} (trainer.spare" in text


def test_prune_says_what_it_would_do_and_does_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of four the newest stays, the newest healthy one (30), the best by loss (40), and with --every 10 all."""
    edit_config(run, keep_best={"metric": "loss", "mode": "max"})
    assert "0 to go, 4 stay" in told(capsys, "prune", run, "--keep", 1, "--every", 10, "--dry-run")
    text = told(capsys, "prune", run, "--keep", 1, "--dry-run")
    assert f"would delete {step(run, 20)}" in text and "1 to go, 3 stay" in text
    assert all(step(run, number).is_dir() for number in STEPS)
    text = told(capsys, "prune", run, "--keep", 1)
    assert f"deleted {step(run, 20)}" in text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_000000{number}" for number in (10, 30, 40)]


def test_prune_keeps_what_the_config_keeps_for_good(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(run, keep_every=20)
    assert f"would delete {step(run, 10)}" in (text := told(capsys, "prune", run, "--keep", 1, "--dry-run"))
    assert "1 to go" in text
    assert "2 to go" in told(capsys, "prune", run, "--keep", 1, "--every", 0, "--dry-run")


def test_prune_never_deletes_the_newest_that_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (30, 40):
        (step(run, number) / "state.json").unlink()
    told(capsys, "prune", run, "--keep", 1)
    assert step(run, 20).is_dir() and not step(run, 10).exists()


def test_prune_hashes_the_newest_that_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A changed byte, which sizes do not tell: the older ones are what the run would go on from."""
    weights = step(run, 40) / "models/dit/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    for dry in ([], ["--dry-run"]):
        text = told(capsys, "prune", run, "--keep", 1, *dry, code=1)
        assert "step_00000040 is damaged: the SHA-256 of models/dit/model.safetensors" in text and "nothing is deleted" in text
    assert all(step(run, number).is_dir() for number in STEPS)
    assert "0 gone, 4 stay" in told(capsys, "prune", run, "--keep", 4), "there is nothing to refuse"
    shutil.rmtree(step(run, 40))
    assert "2 gone, 1 stay" in told(capsys, "prune", run, "--keep", 1)


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        ([], 2, "`videofm checkpoint` needs a part: list, verify, diff, average, prune"),
        (["lisst", "RUN"], 2, "has no part 'lisst', did you mean 'list'"),
        (["list", "nowhere"], 1, "nowhere does not exist: give a run directory"),
        (["diff", "RUN", "nowhere"], 2, "nowhere does not exist: give a run, a checkpoint"),
        (["diff", "RUN", "RUN", "--tolerance", "-1"], 2, "--tolerance -1: the largest absolute difference to allow is 0 or"),
        (["average", "RUN", "--out", "OUT"], 2, "is a run: say which of its checkpoints, by --last K or --steps A,B"),
        (["average", "RUN", "--last", "1", "--out", "OUT"], 2, "--last 1: give 2 or more"),
        (["average", "RUN", "--last", "2", "--steps", "10,20", "--out", "OUT"], 2, "not together with --steps"),
        (["average", "RUN", "--last", "9", "--out", "OUT"], 2, "has 4 checkpoints, of the steps 10, 20, 30, 40"),
        (["average", "RUN", "--steps", "10,25", "--out", "OUT"], 2, "has no checkpoint of step 25. There are: 10, 20, 30, 40"),
        (["average", "RUN", "--steps", "10;20", "--out", "OUT"], 2, "--steps 10;20: give numbers with commas"),
        (["average", "RUN", "--last", "2", "--weights", "a,b", "--out", "OUT"], 2, "--weights a,b: give numbers with commas"),
        (["average", "RUN", "--last", "2", "--weights", "1", "--out", "OUT"], 2, "give 2 positive numbers"),
        (["prune", "RUN", "--keep", "0"], 2, "--keep is 1 or more"),
        (["prune", "nowhere", "--keep", "1"], 2, "nowhere is no run directory: it has no checkpoints/"),
    ],
)
def test_wrong_requests(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, match: str
) -> None:
    given = [argument.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for argument in arguments]
    assert match in told(capsys, *given, code=code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", list(VERBS["checkpoint"].parts))
def test_help_of_the_parts(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["checkpoint", part, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and f"usage: videofm checkpoint {part}" in text
    assert "examples:" in text and "exit codes:" in text
