"""The metric `reward`, on pairs of rendered clips and a run of random models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from tests.unit.data.preferred import pair_of, write_candidates
from tests.unit.reward.test_model import roles
from videofm import models
from videofm.config import StageConfig, TrainConfig
from videofm.config.rank import ModelReward
from videofm.data import decode
from videofm.data.manifest import Manifest
from videofm.data.preferences import PreferencePair, write_preferences
from videofm.data.shards import read_clip
from videofm.errors import ConfigError, DataError, Interrupted
from videofm.reward import reward_of
from videofm.reward.model import ModelScores
from videofm.run_dir import RunDirectory
from videofm.stages import evaluate

ADAPTER: TypeAdapter[Any] = TypeAdapter(StageConfig)
SIZE = {"num_frames": 9, "height": 32, "width": 32}
THETA = 3.0
VOTES = [{"motion": "loser", "quality": "winner"}, {"motion": "tie"}, {}, {"motion": "winner"}, {"motion": "winner"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clips`, `preferences` over them (five pairs, the third a tie), and `run`, a training that reads them."""
    folder = tmp_path_factory.mktemp("evaluate_reward")
    write_candidates(folder / "clips", 5)
    write(folder, "preferences", pairs(folder))
    run_of(folder)
    return folder


def pairs(folder: Path) -> list[PreferencePair]:
    records = sorted(Manifest.load(str(folder / "clips")).records("train"), key=lambda record: record.key)
    couples = list(zip(records[::2], records[1::2], strict=True))
    return [pair_of(winner, loser, tie=number == 2, axes=VOTES[number]) for number, (winner, loser) in enumerate(couples)]


def write(folder: Path, name: str, some: list[PreferencePair]) -> Path:
    return write_preferences(folder / name, some, folder / "clips")


def run_of(folder: Path, kind: str = "reward", name: str = "run") -> Path:
    path, found = folder / name, roles()
    step = path / "checkpoints" / "step_00000002"
    models.save(found["reward"], step / "models" / "reward")
    (step / "COMMITTED.json").write_text("{}")
    for role in ("vae", "text_encoder"):
        models.save(found[role], path / "frozen" / role)
    values: dict[str, Any] = {
        "kind": "train",
        "models": {"reward": {"name": "reward/video"}, "vae": {"name": "vae/ltx"}, "text_encoder": {"name": "text/t5"}},
        "objective": {"kind": kind, "theta": THETA},
        "data": {
            "manifest": "elsewhere", "micro_batch_size": 2, "num_micro_batches": 2, "start": "first", **SIZE,
            "pairs": {"path": "elsewhere"},
        },
        "optimizer": {"lr": 1e-3},
        "trainer": {"max_steps": 2},
    }  # fmt: skip
    if kind == "reward":
        config = TrainConfig.model_validate(values).model_dump_json()
    else:
        config = json.dumps(values)
    (path / "config.yaml").write_text(config)
    (path / "lineage.json").write_text("{}")
    return path


def measure(root: Path, where: Path, **fields: Any) -> dict[str, Any]:
    where.mkdir(parents=True, exist_ok=True)
    metric = {"kind": "reward", "run": str(root / "run"), "pairs": str(root / "preferences"), "batch_size": 2} | fields
    found = evaluate.run(ADAPTER.validate_python({"kind": "evaluate", "metrics": [metric]}), RunDirectory(where))
    written = json.loads((where / "evaluation.json").read_text())
    assert written["metrics"] == found["metrics"]
    return found["metrics"][0]  # type: ignore[no-any-return]


def gaps(root: Path) -> list[tuple[float, float]]:
    """Winner minus loser on both axes, of the first nine frames of each clip, by the reward that ranks candidates."""
    reward = reward_of(ModelReward(kind="model", run=str(root / "run")))
    assert isinstance(reward, ModelScores)
    decoder, found = decode.choose("auto"), []
    records = {record.key: record for record in Manifest.load(str(root / "clips")).records("train")}
    for pair in pairs(root):
        clips = [np.asarray(decoder.read(read_clip(root / "clips", records[side.key]), range(9)))
                 for side in (pair.winner, pair.loser)]  # fmt: skip
        one, other = reward.score(clips, [pair.prompt] * 2)
        found.append((one["overall"] - other["overall"], one["motion"] - other["motion"]))
    return found


def test_numbers_are_those_of_a_loop_over_pairs(root: Path, tmp_path: Path) -> None:
    """Batches of two over five pairs: each counts once. The formulas of spec C2, as they stand there, in Python's floats."""
    wanted = gaps(root)
    right, outcomes, nll = [], 0, 0.0
    for number, (gap, _) in enumerate(wanted):
        x = math.exp(gap)
        chances = {
            "winner": x / (x + THETA),
            "loser": 1 / (1 + THETA * x),
            "tie": (THETA**2 - 1) * x / ((x + THETA) * (THETA * x + 1)),
        }
        judged = "tie" if number == 2 else "winner"
        outcomes += max(chances, key=lambda name: chances[name]) == judged
        nll -= math.log(chances[judged])
        right += [float(gap > 0)] if judged == "winner" else []
    found = measure(root, tmp_path)
    assert found["accuracy"] == pytest.approx(sum(right) / 4) and found["outcome_accuracy"] == pytest.approx(outcomes / 5)
    assert found["nll"] == pytest.approx(nll / 5, rel=1e-3)
    assert found["score_gap"] == pytest.approx(sum(gap for n, (gap, _) in enumerate(wanted) if n != 2) / 4, abs=1e-3)
    assert found["tie_gap"] == pytest.approx(abs(wanted[2][0]), abs=1e-3)
    assert (found["num_pairs"], found["num_ties"], found["num_bad"], found["theta"]) == (5, 1, 0, THETA)
    motion = [float(wanted[0][1] < 0), float(wanted[3][1] > 0), float(wanted[4][1] > 0)]
    assert found["rows"] == [
        {"axis": "overall", "accuracy": found["accuracy"], "num_decided": 4},
        {"axis": "motion", "accuracy": pytest.approx(sum(motion) / 3), "num_decided": 3},
    ]


def test_the_size_of_batches_changes_nothing_and_fewer_pairs_are_some_of_them(root: Path, tmp_path: Path) -> None:
    two, five = measure(root, tmp_path / "two"), measure(root, tmp_path / "five", batch_size=5)
    assert five["nll"] == pytest.approx(two["nll"], rel=1e-4) and five["accuracy"] == two["accuracy"]
    assert measure(root, tmp_path / "few", num_pairs=3)["num_pairs"] == 3


def test_bad_records_stop_it_or_are_counted(root: Path, tmp_path: Path) -> None:
    good = pairs(root)
    bad = pair_of(*[next(r for r in Manifest.load(str(root / "clips")).records("train") if r.key == good[0].winner.key)] * 2)
    write(root, "bad", [*good, bad])
    with pytest.raises(DataError, match="winner and loser are the same clip"):
        measure(root, tmp_path / "fail", pairs=str(root / "bad"))
    assert measure(root, tmp_path / "skip", pairs=str(root / "bad"), on_bad="skip")["num_bad"] == 1


def test_what_cannot_be_measured_is_refused(root: Path, tmp_path: Path) -> None:
    write(root, "ties", pairs(root)[2:3])
    with pytest.raises(DataError, match="none of the 1 pairs has a winner"):
        measure(root, tmp_path / "ties", pairs=str(root / "ties"))
    other = run_of(root, "flow_matching", "other")
    with pytest.raises(ConfigError, match="is a training of objective flow_matching; give the run of a reward model"):
        measure(root, tmp_path / "other", run=str(other))
    (other / "config.yaml").write_text('{"kind": "evaluate"}')
    with pytest.raises(ConfigError, match="is no training run; give the run of a reward model"):
        measure(root, tmp_path / "none", run=str(other))


def test_it_stops_on_request(root: Path, tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "stop").touch()
    with pytest.raises(Interrupted, match="evaluation stopped on request"):
        measure(root, tmp_path)
