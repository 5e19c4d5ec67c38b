"""What of a video is given: a first frame, a last one, others between, or a clip to go on from (LTX-Video; spec C.5).

A token has its own noise level. Given tokens start at `1 - strength` and wait there until the schedule has come down to it; at
strength 1 they are data from the start and never move. What stands where the VAE begins anew (at frame 0; for Step-Video's at
each chunk) is written into the latents of the video. What stands elsewhere does not begin a latent frame of its own there: its
first latent frame holds a single image, so its first two latent frames become additional tokens with the coordinates of that
time, which are removed in the end, and the others are written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from videofm.errors import ConfigError
from videofm.ops.patchify import tokens_from_latents
from videofm.sampling.noise import named_noise
from videofm.sampling.solvers import Draw, Prepare
from videofm.types import Compression

_NUM_PREFIX = 2
"""Latent frames of a clip behind frame 0 that become additional tokens."""


@dataclass(frozen=True)
class Condition:
    """Given latents. `latents` is `(B, C, T', H', W')`, normalised, B the number of prompts or 1 for all of them.

    `frame` is the number of the first pixel frame, negative counted from the end of the video; `strength` in (0, 1], 1 keeps
    the latents as they are.
    """

    latents: Tensor
    frame: int = 0
    strength: float = 1.0


@dataclass(frozen=True)
class PixelCondition:
    """Given frames: as `Condition`, with `video` `(B, 3, T, H, W)` in [-1, 1]; an image has T = 1."""

    video: Tensor
    frame: int = 0
    strength: float = 1.0


AnyCondition = Condition | PixelCondition


@dataclass(frozen=True)
class FrameGrid:
    """How pixel frames lie on latent frames.

    `time` is the number of pixel frames of a latent frame, other than the first, which holds one. `chunk` is the number of
    pixel frames after which the VAE begins anew, with a latent frame for one pixel frame again (Step-Video: 17); None where it
    never does.
    """

    time: int
    chunk: int | None = None

    def position(self, frame: int) -> float:
        """Where pixel frame `frame` lies, in latent frames from the first on; what begins there may lie between two."""
        if self.chunk is None:
            return frame / self.time
        chunk, offset = divmod(frame, self.chunk)
        return chunk * (1 + (self.chunk - 1) // self.time) + offset / self.time

    def begins(self, frame: int) -> bool:
        """Whether what begins at `frame` has the latents that the same frames have in the video."""
        return frame == 0 or (self.chunk is not None and frame % self.chunk == 0)


@dataclass(frozen=True)
class Start:
    """Where sampling starts: `tokens` `(B, L + E, C)` and `coordinates` `(B, 3, L + E)` of L tokens of the video and E more
    behind them; `ceilings` `(B, L + E)` is the noise level that each has, None where all is noise.
    """

    tokens: Tensor
    coordinates: Tensor
    ceilings: Tensor | None = None


def content(condition: AnyCondition) -> Tensor:
    """The latents or the video of `condition`."""
    return condition.latents if isinstance(condition, Condition) else condition.video


def rows(condition: AnyCondition, part: slice) -> AnyCondition:
    """`condition` for the prompts of `part`."""
    if len(content(condition)) == 1:
        return condition
    if isinstance(condition, Condition):
        return replace(condition, latents=condition.latents[part])
    return replace(condition, video=condition.video[part])


def located(condition: AnyCondition, num_given: int, num_frames: int, num_prompts: int) -> AnyCondition:
    """`condition` with a frame counted from 0, in a video of `num_frames`, of which it gives `num_given`.

    Raises:
        ConfigError: it lies outside of the video, its strength outside of (0, 1], or it is of another number of videos.
    """
    frame = condition.frame + (num_frames if condition.frame < 0 else 0)
    if not 0 <= frame <= num_frames - num_given:
        raise ConfigError(
            f"a condition gives {num_given} frame{'s' * (num_given > 1)} from frame {condition.frame} on, but the video has "
            f"frames 0 to {num_frames - 1}."
        )
    if not 0 < condition.strength <= 1:
        raise ConfigError(f"a condition has the strength {condition.strength}: it lies in (0, 1], 1 keeps what is given.")
    if len(content(condition)) not in (1, num_prompts):
        raise ConfigError(
            f"a condition is given for {len(content(condition))} videos, but there are {num_prompts} prompts: "
            "give one for each, or one for all."
        )
    return replace(condition, frame=frame)


def place(
    noise: Tensor,
    conditions: Sequence[Condition],
    coordinates_of: Callable[[int, int], Tensor],
    grid: FrameGrid,
    seeds: Sequence[int],
) -> Start:
    """Mix what is given with noise and say at which noise level each token starts.

    Args:
        noise: `(B, C, T, H, W)`.
        conditions: what is given, frames counted from 0.
        coordinates_of: (latent frames, pixel frame of the first) -> `(B, 3, L)` of a clip of the size of the video.
        grid: of the VAE.
        seeds: B generator seeds, for the noise of additional tokens.

    Raises:
        ConfigError: two conditions give the same latent frame, or one cannot be written where it stands.
    """
    coordinates = coordinates_of(noise.shape[2], 0)
    if not conditions:
        return Start(tokens_from_latents(noise), coordinates)
    latents, ceilings = noise.clone(), noise.new_ones(len(noise), 1, *noise.shape[2:])
    more: list[Start] = []
    for number, condition in enumerate(conditions):
        given = condition.latents.to(noise).expand(len(noise), -1, -1, -1, -1)
        _check_shape(given, noise)
        num_prefix = 0 if grid.begins(condition.frame) else min(_NUM_PREFIX, given.shape[2])
        if num_prefix:
            shape = (given.shape[1], num_prefix, given.shape[3], given.shape[4])
            own = named_noise(seeds, f"condition:{number}", shape).to(noise)
            mixed = torch.lerp(own, given[:, :, :num_prefix], condition.strength)
            level = mixed.new_full((len(noise), mixed[0, 0].numel()), 1 - condition.strength)
            more.append(Start(tokens_from_latents(mixed), coordinates_of(num_prefix, condition.frame), level))
        _write(latents, ceilings, condition, given, num_prefix, grid)
    return Start(
        torch.cat([tokens_from_latents(latents), *(start.tokens for start in more)], dim=1),
        torch.cat([coordinates, *(start.coordinates for start in more)], dim=2),
        torch.cat([tokens_from_latents(ceilings).squeeze(2), *(start.ceilings for start in more)], dim=1),  # type: ignore[list-item]
    )


def noise_on_given(start: Start, sigmas: Tensor, scale: float, draw: Draw) -> Prepare | None:
    """Before each step, new noise on the tokens that are given at strength 1: `scale * sigma ** 2` of it, as
    `image_cond_noise_scale` of `LTXConditionPipeline`; for more motion. The model is not told, and, as there, that of the last
    step stays in the video. None where no noise is wanted or nothing is given.

    Args:
        start: what is given.
        sigmas: `(num_steps + 1,)` of the schedule.
        scale: 0 is off; the default of diffusers is 0.15.
        draw: noise of the steps, of the shape of `start.tokens`.
    """
    if start.ceilings is None or scale == 0:
        return None
    given = (start.ceilings == 0)[:, :, None]
    scales = (scale * sigmas.square()).tolist()

    def prepare(number: int, state: Tensor) -> Tensor:
        return torch.where(given, start.tokens + scales[number] * draw(number), state)

    return prepare


def coordinates_at(
    dit: nn.Module, shape: tuple[int, int, int], fps: Tensor, compression: Compression, causal_fix: bool, position: float
) -> Tensor:
    """`dit.coordinates` of a clip of `shape` (T, H, W) latent cells that begins at latent frame `position`; `(B, 3, L)`."""
    coordinates = dit.coordinates(shape, fps, compression, causal_fix)
    if position == 0:
        return coordinates
    times = dit.coordinates((2, 1, 1), fps, compression)[:, 0]  # (B, 2): what one latent frame is along the axis of time
    shift = (times[:, 1] - times[:, 0]) * position
    return torch.cat([coordinates[:, :1] + shift[:, None, None], coordinates[:, 1:]], dim=1)


def _check_shape(given: Tensor, noise: Tensor) -> None:
    if (given.shape[1], *given.shape[3:]) != (noise.shape[1], *noise.shape[3:]):
        raise ConfigError(
            f"a condition has latents of {given.shape[1]} channels and {given.shape[3]}x{given.shape[4]} cells; the video has "
            f"{noise.shape[1]} and {noise.shape[3]}x{noise.shape[4]}."
        )


def _write(latents: Tensor, ceilings: Tensor, condition: Condition, given: Tensor, num_prefix: int, grid: FrameGrid) -> None:
    """Write the latent frames from `num_prefix` on into `latents`, and their noise level into `ceilings`."""
    if given.shape[2] == num_prefix:
        return
    period = grid.chunk or grid.time
    if condition.frame % period:
        below = condition.frame // period * period
        raise ConfigError(
            f"a clip of {given.shape[2]} latent frames is given from frame {condition.frame} on; it has to begin at a multiple "
            f"of {period}: {below} or {below + period}."
        )
    first = int(grid.position(condition.frame)) + num_prefix
    part = slice(first, first + given.shape[2] - num_prefix)
    if bool((ceilings[:, :, part] < 1).any()):
        raise ConfigError(f"two conditions give the frames from {condition.frame} on: give each frame once.")
    latents[:, :, part] = torch.lerp(latents[:, :, part], given[:, :, num_prefix:], condition.strength)
    ceilings[:, :, part] = 1 - condition.strength
