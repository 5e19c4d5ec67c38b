"""ARLON as a user runs it: the chain of configs/debug/arlon_chain.yaml once, and what must hold of it whatever it makes.

The tests share one run directory, whose trainings are the undisturbed ones that kills and layouts are compared with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import hold
from tests.integration.test_train import workers_of
from videofm import media
from videofm.run_dir import RunDirectory, read_json, read_jsonl
from videofm.train.speed import TIMINGS

ROOT = Path(__file__).resolve().parents[2]
STAGES = [
    *("demo", "curate", "vae", "tokenizer_fine", "tokenizer_coarse", "tokens", "ar", "rollouts", "dit", "guided", "long"),
    *("evaluate", "report"),
]
WINDOW, OVERLAP, NUM_WINDOWS = 9, 1, 3
LAST = "checkpoints/step_00000006"
LIGHT = ["trainer.num_threads=1"]


def start(*arguments: str, held: Path | None = None) -> subprocess.Popen[str]:
    """Start a verb; its ranks make as many steps as the file `held` says, and then wait until somebody kills them."""
    command = [sys.executable, "-m", "videofm", *arguments]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # models this small only wait for a second thread
    if held is not None:
        alone |= hold.environment(held)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=alone)


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    """What `process` said, once it ended with `code` and without a traceback."""
    try:
        output, _ = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == code and "Traceback" not in output, output
    return output


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of a chain that was run to its end."""
    run = tmp_path_factory.mktemp("arlon") / "run"
    end(start("run", "configs/debug/arlon_chain.yaml", f"run={run}"))
    return run / "stages"


def rows(run: Path) -> list[dict[str, Any]]:
    """Metrics of each step, without what a clock says."""
    timings = {*TIMINGS, "slowest_rank", "slowest_rank_id", "attempt", "checkpoint_stall"}
    return [{name: value for name, value in row.items() if name not in timings} for row in RunDirectory(run).metrics()]


def same_config(stage: Path, folder: Path) -> str:
    """The config of a stage that was run, in a file of its own."""
    path = folder / f"{stage.name}.yaml"
    path.write_text(json.dumps(RunDirectory(stage).config))
    return str(path)


def test_every_stage_finished_and_the_long_video_has_its_windows(chain: Path) -> None:
    """Three windows of 9 frames that share one: 3 * (9 - 1) + 1 frames, each window with the prompt of the storyboard."""
    assert {name: RunDirectory(chain / name).finished for name in STAGES} == dict.fromkeys(STAGES, True)
    listed = list(read_jsonl(chain / "long" / "samples.jsonl"))
    assert [row["caption"] for row in listed] == ["a red circle moving left", "a blue square moving up"]
    for row, turned in zip(listed, ("a red circle moving right", "a blue square moving down"), strict=True):
        assert len(media.read_video(chain / "long" / row["file"])) == NUM_WINDOWS * (WINDOW - OVERLAP) + OVERLAP
        assert [(span["start"], span["stop"]) for span in row["windows"]] == [(0, 9), (9, 17), (17, 25)]
        assert [span["prompt"] for span in row["windows"]] == [row["caption"], row["caption"], turned]
        assert row["ar_seconds"] > 0 and row["dit_seconds"] > 0


def test_trainings_did_what_the_config_says(chain: Path) -> None:
    """The book of the fine tokenizer started from k-means, after which codes are counted; the guided DiT saw features of each
    kind of disturbance."""
    book = [("codebook/start" in row, "codebook/perplexity" in row) for row in rows(chain / "tokenizer_fine")]
    assert book[0] == (True, False) and book[-1] == (False, True)
    guided = rows(chain / "guided")
    for name in ("features_rolled_out", "features_corrupted", "features_dropped", "features_spread"):
        assert sum(row[name] for row in guided) > 0, name
    assert all("features_mse" not in row for row in rows(chain / "dit"))


def test_the_lineage_of_the_guided_model_names_all_that_it_is_made_of(chain: Path) -> None:
    inputs = read_json(chain / "guided" / "lineage.json")["inputs"]
    names = {"curate", "vae", "tokenizer_coarse", "tokenizer_fine", "rollouts", "dit"}
    assert inputs == {name: read_json(chain / name / "lineage.json")["fingerprint"] for name in names}


def test_another_tokenizer_makes_stale_what_it_is_in(chain: Path) -> None:
    changed = "stages.tokenizer_fine.trainer.max_steps=7"
    lines = end(start("run", "configs/debug/arlon_chain.yaml", f"run={chain.parent}", "--list", changed)).splitlines()[1:]
    states = {line.split()[0]: line.split()[2] for line in lines}
    kept = ("demo", "curate", "vae", "tokenizer_coarse", "dit")
    assert states == {name: "done" if name in kept else "stale" for name in STAGES}


def test_the_report_has_the_tables(chain: Path) -> None:
    page = (chain.parent / "report.html").read_text(encoding="utf-8")
    assert [name for name in STAGES if name not in page] == []
    evaluation = {metric["kind"]: metric for metric in read_json(chain / "evaluate" / "evaluation.json")["metrics"]}
    found = [(row["variant"], row["num_steps"]) for row in evaluation["few_steps"]["rows"]]
    assert found == [("unguided", 2), ("unguided", 3), ("guided", 2), ("guided", 3)]
    assert evaluation["few_steps"]["num_videos"] == 48 and len(evaluation["long_video"]["rows"]) == NUM_WINDOWS
    for cell in (
        "<h3>few_steps: unguided, guided</h3>",
        "<h3>long_video: ",
        "first frame",
        "seam_ratio <b>",
    ):
        assert cell in page, cell


def test_the_debug_configs_train_and_encode(chain: Path, tmp_path: Path) -> None:
    """Each configs/debug/arlon_*.yaml besides the chain, and encode_tokens.yaml between them, for a few steps."""
    vae, data = f"vae.path={chain / 'vae'}", f"{chain / 'curate'}"
    short = ["trainer.max_steps=2", "trainer.checkpoint_every=2", "trainer.log_every=1", *LIGHT]
    tokenizer, tokens, ar = tmp_path / "tokenizer", tmp_path / "tokens", tmp_path / "ar"
    # Two steps start a codebook of 256 where one vector for each code is enough; one that has not started is refused.
    codes = "{kind: vq_ema, codebook_size: 256, dim: 8, start_vectors: 1, start_updates: 2}"
    end(start("train", "configs/debug/arlon_tokenizer.yaml", f"models.{vae}", f"data.manifest={data}", *short,
              f"models.tokenizer.overrides.quantizer={codes}",
              "--run-dir", str(tokenizer)))  # fmt: skip
    end(start("encode", "configs/debug/encode_tokens.yaml", f"manifest={data}", f"tokens.{vae}",
              f"tokens.tokenizer.path={tokenizer}", "--run-dir", str(tokens)))  # fmt: skip
    end(start("train", "configs/debug/arlon_ar.yaml", f"models.tokenizer.path={tokenizer}", f"data.manifest={data}",
              f"data.cache.path={tokens}", *short, "--run-dir", str(ar)))  # fmt: skip
    assert [row["step"] for row in rows(tokenizer)] == [row["step"] for row in rows(ar)] == [1, 2]
    there = {path.name for path in (ROOT / "configs/debug").glob("arlon_*.yaml")}
    assert there == {"arlon_tokenizer.yaml", "arlon_ar.yaml", "arlon_chain.yaml"}, "a new one has to be run here"


def kill_once_saved(run: Path, step: int, command: list[str], held: Path) -> None:
    """Start a training whose ranks wait after `step`, and kill it once that is saved, as it is while they wait."""
    held.write_text(str(step))
    process, deadline = start(*command, held=held), time.monotonic() + 600
    try:
        while not (run / f"checkpoints/step_{step:08d}/COMMITTED.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, "the step was not saved"
            time.sleep(0.01)
    finally:
        process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while workers_of(run):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.01)
    assert not (run / LAST).exists(), "the kill came too late"


@pytest.mark.parametrize(("stage", "step"), [("tokenizer_fine", 1), ("ar", 2)])
def test_killed_and_resumed_it_ends_as_if_it_had_not_been(chain: Path, tmp_path: Path, stage: str, step: int) -> None:
    """SIGKILL once `step` is saved, of the tokenizer in the middle of collecting vectors for k-means; the same command again.
    All rows, and all tensors of the last checkpoint, are those of the chain's own training, to the last bit."""
    run = tmp_path / "run"
    command = ["train", same_config(chain / stage, tmp_path), f"trainer.checkpoint_every={step}", "--run-dir", str(run)]
    kill_once_saved(run, step, command, tmp_path / "hold")
    assert "resuming from step_" in end(start(*command))
    assert rows(run) == rows(chain / stage)
    files = sorted((chain / stage / LAST).rglob("*.safetensors"))
    assert files
    for path in files:
        ours, theirs = load_file(run / path.relative_to(chain / stage)), load_file(path)
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs), path


@pytest.mark.parametrize("stage", ["ar", "guided"])
@pytest.mark.parametrize("degree", ["context_degree", "tensor_degree"])
def test_two_ranks_that_share_samples_give_the_losses_of_one(chain: Path, tmp_path: Path, stage: str, degree: str) -> None:
    run = tmp_path / "run"
    end(start("train", same_config(chain / stage, tmp_path), f"parallel.{degree}=2", *LIGHT, "--run-dir", str(run)))
    one, two = rows(chain / stage), rows(run)
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) < 1e-4
    assert max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(one, two, strict=True)) < 1e-3
