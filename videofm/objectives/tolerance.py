"""Making a guided DiT tolerate features that an autoregressive model got wrong (ARLON, arXiv 2410.20502; spec B6).

In training, features come from the truth; in sampling, from predicted tokens. Each function here moves the former towards the
latter. Draws are arguments, so that they can be keyed by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

_SMALLEST_STD = 1e-6
"""A channel that varies less over a sample is taken as constant: the change of its spread stays finite."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel over a sample's frames and positions, both `(B, C)` float32."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Spreads:
    """How much `ChannelStatistics` differ between samples: standard deviations of the mean and of the std, both `(C,)`."""

    mean: Tensor
    std: Tensor


def channel_statistics(features: Tensor) -> ChannelStatistics:
    """Statistics of features `(B, C, T, H, W)`; of the population, so that a constant channel has std 0."""
    values = features.float().flatten(2)
    return ChannelStatistics(values.mean(dim=2), values.std(dim=2, correction=0))


def spreads(statistics: Sequence[ChannelStatistics]) -> Spreads:
    """The spreads over all samples of a micro-batch, whose clips of one size are an entry each.

    They are those of the micro-batch and not of the whole step: micro-batches follow from the plan of the data, so the same
    samples meet at any number of ranks, and a run does not change with it. A micro-batch of one sample has spreads of 0.
    """
    means = torch.cat([of.mean for of in statistics])  # (B, C)
    stds = torch.cat([of.std for of in statistics])
    return Spreads(means.double().std(dim=0, correction=0).float(), stds.double().std(dim=0, correction=0).float())


def sample_uncertainty(features: Tensor, statistics: ChannelStatistics, over: Spreads, draws: Tensor) -> Tensor:
    """Features whose statistics are moved by as much as they differ between samples: uncertainty sampling.

    `F' = (std + e2 * S_std) * (F - mean) / std + (mean + e1 * S_mean)`, written as a change of F: spreads of 0 change no bit,
    and a constant channel (std 0, where `(F - mean) / std` is taken as 0) only moves its mean. The mean of F' over draws is F.
    No public code of ARLON exists: the form is that of Li et al. 2022 (arXiv 2202.03958), "uncertainty modeling".

    Args:
        features: `(B, C, T, H, W)`.
        statistics: theirs.
        over: spreads over the micro-batch.
        draws: `(B, 2, C)` unit Gaussian: e1 moves the mean, e2 the spread; 0 changes nothing.
    """
    mean_draw, std_draw = draws.unbind(dim=1)  # (B, C)
    centred = features.float() - _per_channel(statistics.mean)
    growth = std_draw * over.std / statistics.std.clamp_min(_SMALLEST_STD)
    growth = torch.where(statistics.std < _SMALLEST_STD, 0.0, growth)
    return features.float() + centred * _per_channel(growth) + _per_channel(mean_draw * over.mean)


def corrupt(indices: Tensor, vocab_size: int, replaced: Tensor, draws: Tensor) -> Tensor:
    """Indices `(B, T, H, W)` where each of `replaced` (bool, of that shape) is another id, uniform over the others.

    Args:
        indices: token ids.
        vocab_size: ids are 0 to this, exclusive.
        replaced: which change; all of them do, so their share is the share of errors.
        draws: uniform in [0, 1), of the shape of `indices`.
    """
    # float32 draws times the size reach it by rounding where the codebook has millions of codes.
    step = 1 + (draws.double() * (vocab_size - 1)).long().clamp_max(vocab_size - 2)
    return torch.where(replaced, (indices + step) % vocab_size, indices)


def _per_channel(values: Tensor) -> Tensor:
    return rearrange(values, "b c -> b c 1 1 1")
