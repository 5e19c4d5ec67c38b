"""Perceptual measures of reconstructions over many clips: LPIPS for each frame, and rFVD. The networks come as arguments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from videofm.errors import DataError
from videofm.evaluation.frechet import FeatureStatistics, frechet_distance


@torch.no_grad()
def lpips_per_frame(lpips: nn.Module, reconstruction: Tensor, original: Tensor, frames_at_once: int = 16) -> Tensor:
    """The LPIPS distance of each frame, computed a few frames at a time so that memory does not grow with the clip.

    Args:
        lpips: takes two videos `(B, 3, T, H, W)`, gives `(B, T)`.
        reconstruction, original: `(B, 3, T, H, W)` in [-1, 1].
        frames_at_once: frames of each clip in one pass.

    Returns:
        `(B, T)` float32.
    """
    pieces = zip(reconstruction.split(frames_at_once, dim=2), original.split(frames_at_once, dim=2), strict=True)
    return torch.cat([lpips(ours, theirs) for ours, theirs in pieces], dim=1)


class ReconstructionFVD:
    """The Fréchet video distance between originals and their reconstructions (rFVD), batch by batch.

    Args:
        network: takes videos `(B, 3, T, H, W)` in [-1, 1], gives features `(B, D)` (`perceptual/i3d`).

    Attributes:
        reconstructions, originals: statistics so far; None before the first batch.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.reconstructions: FeatureStatistics | None = None
        self.originals: FeatureStatistics | None = None

    @torch.no_grad()
    def update(self, reconstruction: Tensor, original: Tensor) -> None:
        """Add the clips of a batch, both `(B, 3, T, H, W)`."""
        ours, theirs = (FeatureStatistics.of(self.network(video)) for video in (reconstruction, original))
        self.reconstructions = ours if self.reconstructions is None else self.reconstructions.merged(ours)
        self.originals = theirs if self.originals is None else self.originals.merged(theirs)

    @property
    def num_clips(self) -> int:
        """Clips on each side so far; report it next to the distance, which is biased upwards for few clips."""
        return 0 if self.originals is None else self.originals.num_clips

    def distance(self) -> float:
        """The Fréchet distance over all clips so far.

        Raises:
            DataError: fewer than two clips.
        """
        if self.reconstructions is None or self.originals is None:
            raise DataError("rFVD needs at least 2 clips, not 0.")
        return frechet_distance(self.reconstructions, self.originals)
