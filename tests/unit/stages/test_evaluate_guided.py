"""The held-out loss of a guided transformer: its clips' own features, through the tokenizer of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from data_pipelines.demo import render_shot
from tests.unit.sampling import tiny
from videofm import media, models
from videofm.config import StageConfig
from videofm.data.shards import ShardWriter
from videofm.errors import ConfigError
from videofm.run_dir import RunDirectory
from videofm.shapes import motifs
from videofm.stages import evaluate

ADAPTER: TypeAdapter[Any] = TypeAdapter(StageConfig)


def guided_run(folder: Path, seed: int) -> Path:
    """A run with a checkpoint of a random guided dit, always the same, and a frozen tokenizer that follows from `seed`."""
    built = tiny.pipeline(num_layers=1, text_length=128)
    torch.manual_seed(0)
    models.inject_features(built.dit, models.InjectionSpec("mlp"))
    torch.nn.init.normal_(built.dit.injection.layers[0].mlp.linear2.weight, std=0.1)
    checkpoint = folder / "checkpoints" / "step_00000002"
    models.save(built.dit, checkpoint / "models" / "dit")
    for role in ("vae", "text_encoder"):
        models.save(getattr(built, role), folder / "frozen" / role)
    torch.manual_seed(seed)
    models.save(models.build("arlon/tokenizer", "tiny"), folder / "frozen" / "tokenizer")
    (checkpoint / "COMMITTED.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    with ShardWriter(folder, "00000", "hash") as writer:
        for index, motif in enumerate(motifs()[:3]):
            media.write_video(folder / "clip.mp4", render_shot(motif.colour, motif.shape, motif.direction, 5, 32, rng), 25)
            facts: dict[str, Any] = {"num_frames": 5, "fps": 25.0, "height": 32, "width": 32, "source_id": str(index)}
            video = (folder / "clip.mp4").read_bytes()
            writer.add(f"clip-{index}", video, caption=motif.caption, split="held_out", **facts)
        writer.commit()
    return folder


def loss_of(run: Path, clips: Path, tmp_path: Path) -> float:
    where = {"run": str(run), "manifest": str(clips), "num_clips": 3, "num_frames": 5, "height": 32, "width": 32}
    config = ADAPTER.validate_python({"kind": "evaluate", "metrics": [{"kind": "held_out_loss", "sigmas": [0.5]} | where]})
    tmp_path.mkdir(parents=True, exist_ok=True)
    return float(evaluate.run(config, RunDirectory(tmp_path))["metrics"][0]["loss"])


def test_the_tokenizer_of_the_run_guides(clips: Path, tmp_path: Path) -> None:
    """The same dit beside another tokenizer has another loss; the same one again the same."""
    first, second = guided_run(tmp_path / "a", seed=1), guided_run(tmp_path / "b", seed=2)
    losses = [loss_of(run, clips, tmp_path / f"evaluate{index}") for index, run in enumerate((first, first, second))]
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-4


def test_a_run_without_its_tokenizer_is_refused(clips: Path, tmp_path: Path) -> None:
    run = guided_run(tmp_path / "a", seed=1)
    for file in (run / "frozen" / "tokenizer").iterdir():
        file.unlink()
    (run / "frozen" / "tokenizer").rmdir()
    with pytest.raises(ConfigError, match="tokenizer"):
        loss_of(run, clips, tmp_path / "evaluate")
