"""The whole chain of configs/debug/chain.yaml as a user runs it: once, again, with a change, interrupted, and what it left.

The tests share one run directory and stand in the order in which they must run: the last one changes it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import hold
from videofm.run_dir import RunDirectory, read_json

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["demo", "curate", "vae", "dit", "sample", "evaluate", "export", "sample_exported", "report"]
LONGER = "stages.dit.trainer.max_steps=7"

PLAIN_DIFFUSERS = """
import sys
sys.modules["videofm"] = None  # importing it would raise
import numpy
from diffusers import LTXPipeline
pipeline = LTXPipeline.from_pretrained(sys.argv[1], local_files_only=True)
settings = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
frames = pipeline(prompt=["a red circle moving left"], **settings).frames
assert numpy.isfinite(frames).all()
print(frames.shape)
"""


def start(run: Path, *arguments: str, held: Path | None = None) -> subprocess.Popen[str]:
    """Start `videofm run` for the debug chain in the run directory `run`; ranks make as many steps as the file `held` says, and
    then wait until they are asked to stop."""
    command = [sys.executable, "-m", "videofm", "run", "configs/debug/chain.yaml", f"run={run}", *arguments]
    environment = None if held is None else os.environ | hold.environment(held)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment)


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    """What `process` said, once it ended with `code` and without a traceback."""
    try:
        output, _ = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == code, output
    assert "Traceback" not in output, output
    return output


def attempts(run: Path) -> dict[str, int]:
    """How many attempts each stage took."""
    return {name: len(list((run / "stages" / name / "attempts").iterdir())) for name in STAGES}


def states(run: Path, *arguments: str) -> dict[str, str]:
    """Stage -> state, as `--list` tells them."""
    lines = end(start(run, "--list", *arguments)).splitlines()[1:]
    return {line.split()[0]: line.split()[2] for line in lines}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a chain that was run to its end."""
    run = tmp_path_factory.mktemp("chain") / "run"
    end(start(run))
    return run


def test_every_stage_finished(chain: Path) -> None:
    finished = {name: RunDirectory(chain / "stages" / name).finished for name in STAGES}
    assert finished == dict.fromkeys(STAGES, True)
    assert attempts(chain) == dict.fromkeys(STAGES, 1)
    assert read_json(chain / "recipe.json")["order"] == STAGES
    for name in ("sample", "sample_exported"):
        rows = [json.loads(line) for line in (chain / "stages" / name / "samples.jsonl").read_text().splitlines()]
        assert [(chain / "stages" / name / row["file"]).stat().st_size > 0 for row in rows] == [True, True]


def test_a_second_run_skips_everything(chain: Path) -> None:
    output = end(start(chain))
    assert output.count("done already, skipped") == len(STAGES)
    assert attempts(chain) == dict.fromkeys(STAGES, 1)


def test_the_export_needs_no_videofm(chain: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-c", PLAIN_DIFFUSERS, str(chain / "export")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "(1, 9, 32, 32, 3)"


def test_the_report_is_one_page_about_every_stage(chain: Path) -> None:
    page = (chain / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", re.sub(r"data:[^\"')]*", "", page), re.IGNORECASE)
    assert [name for name in STAGES if name not in page] == []


def test_a_change_runs_again_what_follows_from_it_and_an_interrupt_loses_nothing(chain: Path, tmp_path: Path) -> None:
    """More steps for the DiT: SIGINT before its second step ends with 75 and a checkpoint; the same command goes on from there,
    up to `--until`, and what stands behind it stays outdated. The old DiT is kept."""
    expected = dict.fromkeys(STAGES[:3], "done") | dict.fromkeys(STAGES[3:], "stale")
    assert states(chain, LONGER) == expected
    (tmp_path / "hold").write_text("1")
    process, log = start(chain, LONGER, held=tmp_path / "hold"), chain / "stages" / "dit" / "log.txt"
    deadline = time.monotonic() + 600
    try:
        while not ((chain / "stale").exists() and log.exists() and "a new run" in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, "the DiT's training did not start"
            time.sleep(0.02)
    except BaseException:
        process.kill()
        raise
    process.send_signal(signal.SIGINT)
    output = end(process, code=75)
    assert "SIGINT: saving, then stopping" in output and "The same command resumes it." in output
    dit = RunDirectory(chain / "stages" / "dit")
    assert dit.outcome is not None and dit.outcome["state"] == "interrupted"
    stopped_at = dit.metrics()[-1]["step"]
    assert (dit.path / f"checkpoints/step_{stopped_at:08d}/COMMITTED.json").exists() and stopped_at < 7

    output = end(start(chain, LONGER, "--until", "sample"))
    assert f"resuming from step_{stopped_at:08d}" in output
    assert [row["step"] for row in dit.metrics()] == list(range(1, 8))
    assert attempts(chain) == dict.fromkeys(STAGES, 1) | {"dit": 2}
    assert RunDirectory(chain / "stale" / "dit-0001").metrics()[-1]["step"] == 6
    assert (chain / "stale" / "sample-0001" / "samples.jsonl").exists()
    assert states(chain, LONGER) == dict.fromkeys(STAGES[:5], "done") | dict.fromkeys(STAGES[5:], "stale")
