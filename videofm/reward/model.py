"""A reward that was learned from preferences: a run of objective `reward`, with the VAE and the text encoder that it had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from videofm import models
from videofm.config.rank import ModelReward
from videofm.errors import CheckpointError, DataError
from videofm.media import Frames
from videofm.objectives.latents import encoded_latents
from videofm.objectives.reward import check_reward
from videofm.objectives.texts import encode_captions
from videofm.pixels import scaled
from videofm.sampling.source import training_config, training_size

ROLES = ("reward", "vae", "text_encoder")
"""Roles of a training of a reward model; those that it did not train lie in `frozen/` of its run."""


class ModelScores:
    """Scores of a reward model, an axis for each that it has; see `Reward`.

    Latents are the most likely ones, weights the moving average where the run keeps one. Videos have to be of the size and the
    span of the clips of its training: whether a cut or resized one is as good as the whole, nobody has asked it. Where it read
    every s-th frame of a clip, it is shown every s-th one of a video that is s times as long.
    """

    def __init__(self, config: ModelReward) -> None:
        """Load the models, onto CUDA where there is one.

        Raises:
            CheckpointError: `config.run` is missing or lacks a role.
            ConfigError: its models do not fit each other.
        """
        path = Path(config.run)
        if not path.exists():
            raise CheckpointError(
                f"reward.run = {config.run!r} does not exist: give the run of a reward model (objective reward)."
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.models: dict[str, nn.Module] = {role: models.load(path, role=role, device=device) for role in ROLES}
        check_reward(self.models)
        size = training_size(path, {"num_frames": None, "height": None, "width": None})
        self.size = size["num_frames"], size["height"], size["width"]
        strides = training_config(path).get("data", {}).get("frame_strides", [1]) if size["num_frames"] > 1 else [1]
        self.strides = {(size["num_frames"] - 1) * stride + 1: stride for stride in sorted(strides)}
        """Frames of a video that is judged -> the step from one frame that is looked at to the next."""

    def score(self, videos: Sequence[Frames], captions: Sequence[str]) -> list[dict[str, float]]:
        """See `Reward.score`; all videos are computed together.

        Raises:
            DataError: a video of another size than the clips of the training.
        """
        for number, frames in enumerate(videos):
            if len(frames) not in self.strides or frames.shape[1:] != (*self.size[1:], 3) or frames.dtype != np.uint8:
                raise DataError(
                    f"video {number} ({captions[number]!r}) is {frames.dtype} {tuple(frames.shape)}, and the reward model was "
                    f"trained on clips of {self._told_size()}, uint8 (T, H, W, 3): make candidates of that size, or train it "
                    "on clips of theirs."
                )
        if not videos:
            return []
        videos = [frames[:: self.strides[len(frames)]] for frames in videos]
        device = next(self.models["reward"].parameters()).device
        pixels = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3)  # (B, T, H, W, 3) -> (B, 3, T, H, W)
        scores = score_clips(self.models, scaled(pixels.to(device)), captions)
        axes: tuple[str, ...] = self._reward.config.axes
        return [dict(zip(axes, row, strict=True)) for row in scores.double().cpu().tolist()]

    @property
    def _reward(self) -> Any:
        return self.models["reward"]

    def _told_size(self) -> str:
        return f"{' or '.join(map(str, self.strides))} frames of {self.size[1]}x{self.size[2]}"


@torch.no_grad()
def score_clips(roles: dict[str, nn.Module], video: Tensor, captions: Sequence[str]) -> Tensor:
    """Scores `(B, A)` of clips.

    Args:
        roles: `reward`, `vae` and `text_encoder`, on one device and in eval mode.
        video: `(B, 3, T, H, W)` in [-1, 1], on that device.
        captions: one for each clip.
    """
    reward: Any = roles["reward"]
    latents = encoded_latents(roles["vae"], reward.seen(video))
    found: Tensor = reward(latents, encode_captions(roles["text_encoder"], list(captions), trained=False))
    return found
