"""A reward model from preferences to scores: it is trained and resumed on real files, ranks them, and is measured on them."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from tests.helpers import launch_ranks
from tests.unit.data.preferred import neighbours, write_candidates
from videofm.config import StageConfig
from videofm.config.rank import ModelReward
from videofm.config.train import TrainConfig
from videofm.data import decode
from videofm.data.manifest import Manifest
from videofm.data.preferences import PreferencePair, write_preferences
from videofm.data.shards import read_clip
from videofm.reward import reward_of
from videofm.run_dir import RunDirectory
from videofm.stages import evaluate

STEPS, HALF, PROMPTS = 24, 10, 5
FACTS = ("step", "loss", "nll", "accuracy", "tied", "score_gap", "nll/motion", "voted/motion", "grad_norm")


def pairs(clips: Path) -> list[PreferencePair]:
    """Winners move as they are told; one pair of five is a tie, and three have a vote on motion, one of which differs."""
    records = sorted(Manifest.load(clips).records(), key=lambda record: record.key)
    votes = [{"motion": "winner"}, {}, {"motion": "tie"}, {"motion": "loser", "look": "winner"}, {}]
    return [
        replace(pair, tie=number == 4, axes=axes)
        for number, (pair, axes) in enumerate(zip(neighbours(records), votes, strict=True))
    ]


def config(folder: Path, max_steps: int) -> TrainConfig:
    """Steps of two pairs, of five in all: epochs do not end with steps."""
    return TrainConfig.model_validate(
        {
            "kind": "train", "seed": 3,
            "models": {
                "reward": {"name": "reward/video", "overrides": {"axes": ["overall", "motion"]}},
                "vae": {"name": "vae/ltx"},
                "text_encoder": {"name": "text/t5"},
            },
            "objective": {"kind": "reward", "theta": 5.0},
            "data": {
                "manifest": str(folder / "candidates"), "pairs": {"path": str(folder / "pairs"), "ties": True},
                "start": "first", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 1, "num_micro_batches": 2,
            },
            "optimizer": {"lr": 3e-3, "schedule": "constant", "ema_decay": 0.0},
            "trainer": {"max_steps": max_steps, "precision": "fp32", "device": "cpu", "num_threads": 1},
            "wandb": {"mode": "disabled"},
        }
    )  # fmt: skip


def train_here(folder: Path, name: str, max_steps: int) -> None:
    """Train in this process, as a rank does."""
    from videofm.train.worker import train

    os.environ["VIDEOFM_RENDEZVOUS"] = str(folder / f"rendezvous-{name}-{max_steps}")
    run = RunDirectory(folder / name)
    run.path.mkdir(exist_ok=True)
    chosen = config(folder, max_steps)
    (run.path / "config.yaml").write_text(chosen.model_dump_json())
    (run.path / "lineage.json").write_text(json.dumps({"fingerprint": "of a test"}))
    train(chosen, run, 1)


def run_rank(folder: Path) -> None:
    train_here(folder, "straight", STEPS)
    train_here(folder, "halves", HALF)
    train_here(folder, "halves", STEPS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    clips = write_candidates(folder / "candidates", PROMPTS)
    write_preferences(folder / "pairs", pairs(clips), clips)
    launch_ranks(__file__, 1, folder)
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in FACTS} for row in lines]


def test_resuming_is_exact(runs: Path) -> None:
    straight, halves = rows(runs / "straight"), rows(runs / "halves")
    assert straight == halves and [row["step"] for row in straight] == list(range(1, STEPS + 1))
    file = f"checkpoints/step_{STEPS:08d}/models/reward/model.safetensors"
    one, other = load_file(runs / "straight" / file), load_file(runs / "halves" / file)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_ties_and_votes_of_the_files_arrive(runs: Path) -> None:
    """Five steps of two pairs are two epochs: of ten pairs two are ties and six have a vote on motion."""
    first = rows(runs / "straight")[:5]
    assert sum(row["tied"] for row in first) == pytest.approx(2 / 2)
    assert sum(row["voted/motion"] for row in first) == pytest.approx(6 / 2)


def test_the_run_scores_and_is_measured(runs: Path, tmp_path: Path) -> None:
    """The metric's numbers follow from the scores that `videofm dpo rank` would get of the same run, and by now the model knows
    these five pairs: less than log 3 of a guess, winners ahead."""
    reward = reward_of(ModelReward(kind="model", run=str(runs / "straight")))
    clips = runs / "candidates"
    records = {record.key: record for record in Manifest.load(clips).records()}
    decoder, gaps = decode.choose("auto"), []
    for pair in pairs(clips):
        videos = [np.asarray(decoder.read(read_clip(clips, records[side.key]), range(9))) for side in (pair.winner, pair.loser)]
        winner, loser = reward.score(videos, [pair.prompt] * 2)
        gaps.append(winner["overall"] - loser["overall"])
    metric = {"kind": "reward", "run": str(runs / "straight"), "pairs": str(runs / "pairs"), "batch_size": 2}
    stage = TypeAdapter(StageConfig).validate_python({"kind": "evaluate", "metrics": [metric]})  # type: ignore[var-annotated]
    found = evaluate.run(stage, RunDirectory(tmp_path))["metrics"][0]
    assert found["score_gap"] == pytest.approx(sum(gaps[:4]) / 4, rel=1e-3, abs=1e-3)
    assert found["tie_gap"] == pytest.approx(abs(gaps[4]), rel=1e-3, abs=1e-3)
    assert found["accuracy"] == sum(gap > 0 for gap in gaps[:4]) / 4
    assert (found["num_pairs"], found["num_ties"]) == (5, 1) and found["rows"][1]["num_decided"] == 2
    assert found["accuracy"] == 1 and found["nll"] < 1


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
