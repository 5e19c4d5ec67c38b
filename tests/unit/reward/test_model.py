"""A trained reward model as a reward: what it computes, from which weights, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from videofm import models
from videofm.config.rank import ModelReward
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.reward import Reward, reward_of
from videofm.reward.model import ModelScores

SIZE = (9, 32, 32)
CAPTIONS = ["a red circle", "a blue square moving up", "a red circle"]


def roles(seed: int = 0, **overrides: Any) -> dict[str, nn.Module]:
    """Random models that react to all that they are given."""
    torch.manual_seed(seed)
    found = {
        "reward": models.build("reward/video", "tiny", axes=("overall", "motion"), **overrides),
        "vae": models.build("vae/ltx", "tiny"),
        "text_encoder": models.build("text/t5", "tiny", max_length=24),
    }
    found["vae"].set_latent_statistics(0.1 * torch.ones(16), 0.5 * torch.ones(16))  # type: ignore[operator]
    with torch.no_grad():
        found["reward"].head.mul_(50)  # type: ignore[operator]
    return {role: model.eval() for role, model in found.items()}


def run_of(path: Path, found: dict[str, nn.Module], **data: Any) -> Path:
    """The run directory of a training of the reward model among `found`, as a training leaves it; `data` is of its config."""
    step = path / "checkpoints" / "step_00000002"
    models.save(found["reward"], step / "models" / "reward")
    (step / "COMMITTED.json").write_text("{}")
    for role in ("vae", "text_encoder"):
        models.save(found[role], path / "frozen" / role)
    data = {**dict(zip(("num_frames", "height", "width"), SIZE, strict=True)), **data}
    (path / "config.yaml").write_text(json.dumps({"kind": "train", "objective": {"kind": "reward"}, "data": data}))
    (path / "lineage.json").write_text("{}")
    return path


def reward_at(run: Path) -> Reward:
    return reward_of(ModelReward(kind="model", run=str(run)))


def videos(seed: int = 0) -> list[np.ndarray]:
    """Three noisy videos, the third with the caption of the first."""
    return list(np.random.default_rng(seed).integers(0, 256, (3, *SIZE, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("reward"), roles())


def test_scores_are_what_the_models_make_of_each_video_alone(run: Path) -> None:
    """By hand: pixels to [-1, 1], the mode of the posterior, normalised, and the caption of the video."""
    reward, found = reward_at(run), roles()
    assert isinstance(reward, ModelScores)
    scores = reward.score(videos(), CAPTIONS)
    for frames, caption, score in zip(videos(), CAPTIONS, scores, strict=True):
        with torch.no_grad():
            pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            latents: Any = found["vae"].encode(pixels).mode()  # type: ignore[operator]
            latents = (latents - 0.1) / 0.5
            wanted = found["reward"](latents, found["text_encoder"].encode([caption]))[0].tolist()  # type: ignore[operator]
        assert list(score) == ["overall", "motion"] and all(type(value) is float for value in score.values())
        assert list(score.values()) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert abs(scores[0]["overall"] - scores[2]["overall"]) > 1e-3


def test_a_score_does_not_depend_on_company_and_depends_on_the_caption(run: Path) -> None:
    reward = reward_at(run)
    together, alone = reward.score(videos(), CAPTIONS), reward.score(videos()[1:2], CAPTIONS[1:2])
    assert together[1] == pytest.approx(alone[0], rel=1e-4, abs=1e-4)
    other = reward.score(videos()[1:2], ["a red circle"])[0]
    assert abs(other["overall"] - alone[0]["overall"]) > 1e-3
    assert reward.score([], []) == []


def test_a_greyscale_model_is_shown_grey(tmp_path: Path) -> None:
    """Frames and their luma score alike; for a model that sees colour they do not."""
    frames = videos()[0]
    luma = np.rint(frames @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    grey = np.repeat(luma[..., None], 3, axis=3)
    gaps = []
    for greyscale in (True, False):
        reward = reward_at(run_of(tmp_path / str(greyscale), roles(greyscale=greyscale)))
        one, other = reward.score([frames, grey], ["a red circle"] * 2)
        gaps.append(abs(one["overall"] - other["overall"]))
    assert 5 * gaps[0] < gaps[1] and gaps[1] > 0.1


def test_the_moving_average_is_what_scores(run: Path, tmp_path: Path) -> None:
    """As for samples: of a run that keeps one, its averaged weights."""
    averaged = roles(seed=5)
    path = run_of(tmp_path, roles())
    ema = path / "checkpoints/step_00000002/ema/reward"
    ema.mkdir(parents=True)
    stored = models.save(averaged["reward"], tmp_path / "averaged")
    (stored / "model.safetensors").rename(ema / "model.safetensors")
    scores = reward_at(path).score(videos(), CAPTIONS)
    assert scores[0] != pytest.approx(reward_at(run).score(videos(), CAPTIONS)[0])
    plain = reward_at(run_of(tmp_path / "plain", roles() | {"reward": averaged["reward"]}))
    assert scores == plain.score(videos(), CAPTIONS)


def test_videos_of_another_size_are_refused(run: Path) -> None:
    reward, frames = reward_at(run), videos()[0]
    told = r"video 1 \('b'\) is uint8 \(5, 32, 32, 3\), and the reward model was trained on clips of 9 frames of 32x32"
    with pytest.raises(DataError, match=told):
        reward.score([frames, frames[:5]], ["a", "b"])
    with pytest.raises(DataError, match="is float32"):
        reward.score([frames.astype(np.float32)], ["a"])


def test_it_sees_the_frames_that_its_training_saw(run: Path, tmp_path: Path) -> None:
    """Of clips that were read with strides, every second or third frame; a video between them is of neither."""
    reward, frames = reward_at(run_of(tmp_path, roles(), frame_strides=[3, 2])), videos()[0]
    long = np.repeat(frames, 3, axis=0)[:25]
    found = reward.score([np.repeat(frames, 2, axis=0)[:17], long], ["a", "a"])
    assert found == reward_at(run).score([frames, frames], ["a", "a"])
    with pytest.raises(DataError, match="trained on clips of 17 or 25 frames of 32x32"):
        reward.score([frames], ["a"])


def test_runs_that_hold_no_reward_model_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="reward.run = .*nowhere' does not exist: give the run of a reward model"):
        reward_at(tmp_path / "nowhere")
    other = tmp_path / "other"
    models.save(roles()["vae"], other / "checkpoints/step_00000001/models/vae")
    (other / "checkpoints/step_00000001/COMMITTED.json").write_text("{}")
    with pytest.raises(ConfigError, match="reward"):
        reward_at(other)
    with pytest.raises(ConfigError, match="latents of 8 channels, and the VAE gives 16"):
        reward_at(run_of(tmp_path / "unfit", roles(latent_channels=8)))


def test_a_run_that_does_not_say_its_size_is_refused(tmp_path: Path) -> None:
    path = run_of(tmp_path, roles())
    (path / "lineage.json").unlink()
    with pytest.raises(ConfigError, match="does not say how large its clips are"):
        reward_at(path)
