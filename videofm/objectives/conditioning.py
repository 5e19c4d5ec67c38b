"""What a sample is given clean besides its text: first frames, first and last, all but a box. Drawn for each sample.

Given tokens stay in the sequence with a noise level of their own, 0 or small, and bear no loss (LTX-Video, arXiv 2501.00103;
spec C.4). Nothing is added to the model, so one model learns text to video, image to video and the rest together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

from videofm.config.flow_matching import ConditioningConfig, InpaintingConfig
from videofm.objectives.host import from_host
from videofm.types import SampleRng

MODES = ("first_frame", "first_and_last", "continuation", "inpainting")


@dataclass(frozen=True)
class Given:
    """What is given: `mask` `(B, L)` bool, True for given tokens, and their noise level `sigma` `(B,)`.

    `mode` `(B,)` is the index into `MODES`, or `len(MODES)` for samples that see text only. Each has a token that is not given.
    """

    mask: Tensor
    sigma: Tensor
    mode: Tensor

    def levels(self, sigma: Tensor) -> Tensor:
        """The noise level of each token, `(B, L)`, where `sigma` `(B,)` or `(B, L)` is that of tokens which are not given."""
        own = rearrange(self.sigma, "b -> b 1")
        return torch.where(self.mask, own, sigma if sigma.ndim == 2 else rearrange(sigma, "b -> b 1"))


def probabilities(config: ConditioningConfig) -> dict[str, float]:
    """The share of samples of each mode, in the order of `MODES`."""
    shares = (config.first_frame, config.first_and_last, config.continuation.probability, config.inpainting.probability)
    return dict(zip(MODES, shares, strict=True))


def draw_given(config: ConditioningConfig, shape: tuple[int, int, int], rng: SampleRng) -> Given | None:
    """What the samples of a micro-batch are given.

    Args:
        config: shares of the modes and their settings.
        shape: (T, H, W) in latent cells.
        rng: draws `conditioning_mode`, `continuation`, `inpainting` and `condition_sigma`.

    Returns:
        None where no sample of this shape can be given anything.
    """
    num_frames = shape[0]
    counts = [count for count in config.continuation.num_frames if count < num_frames]
    fits = {"first_frame": num_frames > 1, "first_and_last": num_frames > 2, "continuation": bool(counts), "inpainting": True}
    # A mode that does not fit keeps its place in [0, 1): its samples see text only, and the others do not change.
    shares = probabilities(config)
    if not any(share for mode, share in shares.items() if fits[mode]):
        return None
    draw = rng.uniform("conditioning_mode")
    ends = from_host(list(accumulate(shares.values())), draw.device, torch.float64)
    mode = torch.bucketize(draw.double(), ends, right=True)
    for unfit in (index for index, name in enumerate(MODES) if not fits[name]):
        mode = torch.where(mode == unfit, len(MODES), mode)

    first, last, continuation, inpainting = (mode == index for index in range(len(MODES)))
    num_first = (first | last).long()
    if counts:
        choice = _below(rng.uniform("continuation"), len(counts))
        num_first = torch.where(continuation, from_host(counts, draw.device)[choice], num_first)
    frame = torch.arange(num_frames, device=draw.device)
    frames = (frame < num_first[:, None]) | ((frame == num_frames - 1) & last[:, None])  # (B, T)
    mask = rearrange(frames, "b t -> b t 1 1") | (
        rearrange(inpainting, "b -> b 1 1 1") & ~_boxes(config.inpainting, shape, rng)
    )
    return Given(rearrange(mask, "b t h w -> b (t h w)"), config.condition_sigma * rng.uniform("condition_sigma"), mode)


def _boxes(config: InpaintingConfig, shape: tuple[int, int, int], rng: SampleRng) -> Tensor:
    """`(B, T, H, W)` bool, True inside of a sample's box; sizes and places are uniform, an axis apart from the others."""
    draw = rng.uniform("inpainting", (3, 2))  # (B, axis, size and place)
    inside = []
    for axis, length in enumerate(shape):
        smallest = max(1, round(config.min_size * length))
        largest = max(smallest, round(config.max_size * length))
        size = smallest + _below(draw[:, axis, 0], largest - smallest + 1)
        start = _below(draw[:, axis, 1], length - size + 1)
        cell = torch.arange(length, device=draw.device)
        inside.append((cell >= start[:, None]) & (cell < (start + size)[:, None]))  # (B, length)
    time, height, width = inside
    return rearrange(time, "b t -> b t 1 1") & rearrange(height, "b h -> b 1 h 1") & rearrange(width, "b w -> b 1 1 w")


def _below(uniform: Tensor, count: Tensor | int) -> Tensor:
    """Integers in [0, count) from draws in [0, 1)."""
    return (uniform.double() * count).long()
