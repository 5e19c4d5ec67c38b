"""What tokens keep: errors against sums by hand, the baselines, and the use of codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import avg_pool3d

from videofm.errors import DataError
from videofm.evaluation.tokens import TokenScores, boxes_of


def test_errors_by_hand_and_over_batches() -> None:
    """Over the sum of squares around each channel's mean over all clips, however they come; a constant a channel gives 1."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 2, 3, 4, 4, generator=generator) * torch.tensor([1.0, 5.0]).view(1, 2, 1, 1, 1) + 3
    features = z + 0.5 * torch.randn(z.shape, generator=generator)
    indices = torch.zeros(6, 3, 2, 2, dtype=torch.int64)
    scores, constant = TokenScores((1, 2, 2), (8,)), TokenScores((1, 2, 2), (8,))
    mean = z.mean(dim=(0, 2, 3, 4), keepdim=True)
    for rows in (slice(0, 1), slice(1, 6)):
        scores.update(z[rows], features[rows], indices[rows])
        constant.update(z[rows], mean.expand_as(z)[rows], indices[rows])
    result, spread = scores.result(), float((z - mean).square().sum())
    assert result["num_clips"] == 6 and result["num_tokens"] == 6 * 12
    assert result["relative_mse"] == pytest.approx(float((features - z).square().sum()) / spread, rel=1e-5)
    pooled = avg_pool3d(z, (1, 2, 2)).repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    assert result["relative_mse_box_mean"] == pytest.approx(float((pooled - z).square().sum()) / spread, rel=1e-5)
    assert result["relative_mse_first_frame"] == pytest.approx(float((z[:, :, :1] - z).square().sum()) / spread, rel=1e-5)
    assert constant.result()["relative_mse"] == pytest.approx(1.0, rel=1e-6)


def test_boxes_end_with_the_last_frame() -> None:
    """Five frames at rate 4 are boxes of one frame and of four, as tokens are; the mean over a box is idempotent."""
    z = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(1, 2, 5, 4, 2)
    boxes = boxes_of(z, (4, 2, 1))
    assert boxes.spread()[0, 0, :, 0, 0].tolist() == [0.0, 2.5, 2.5, 2.5, 2.5]
    assert boxes.cells().tolist() == [2.0] * 4 + [8.0] * 4
    torch.testing.assert_close(boxes_of(boxes.spread(), (4, 2, 1)).spread(), boxes.spread())
    noise = torch.randn(2, 3, 6, 4, 4)
    assert torch.equal(boxes_of(noise, (1, 1, 1)).spread(), noise)


def test_error_of_codes_for_boxes() -> None:
    """Against the plain sum of squares, with a first box that has fewer frames; their own means give `box_mean`."""
    z = torch.randn(2, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    scores = TokenScores((4, 2, 2), (8,))
    scores.update(z, z, torch.zeros(2, 2, 2, 2, dtype=torch.int64))
    vectors = scores.box_vectors()
    assert vectors.shape == (16, 3)
    assert scores.error_of(vectors) == pytest.approx(scores.result()["relative_mse_box_mean"], rel=1e-6)
    codes = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    guess = codes.view(2, 2, 2, 2, 3).movedim(-1, 1)  # (B, C, T', H', W')
    guess = guess.repeat_interleave(4, dim=2).repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)[:, :, 3:]
    wanted = (guess - z).square().sum() / (z - z.mean(dim=(0, 2, 3, 4), keepdim=True)).square().sum()
    assert scores.error_of(codes) == pytest.approx(float(wanted), rel=1e-5)


def test_use_of_codes() -> None:
    """Codes 0 and 1 equally often: perplexity 2; code 0 alone: 1; of two books a list each."""
    z = torch.randn(1, 1, 1, 2, 2)
    one = TokenScores((1, 1, 1), (4,))
    one.update(z, z, torch.tensor([0, 1, 1, 0]).view(1, 1, 2, 2))
    result = one.result()
    assert (result["usage"], result["dead"], result["codebook_size"]) == (0.5, 2, 4)
    assert result["perplexity"] == pytest.approx(2.0) and result["relative_mse"] == 0
    two = TokenScores((1, 1, 1), (4, 3))
    two.update(z, z, torch.tensor([[0, 2], [1, 2], [2, 2], [0, 2]]).view(1, 1, 2, 2, 2))
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert two.result()["perplexity"] == pytest.approx([math.exp(entropy), 1.0])
    assert two.result()["usage"] == pytest.approx([0.75, 1 / 3]) and two.result()["dead"] == [1, 2]


def test_refusals() -> None:
    scores = TokenScores((1, 1, 1), (4,))
    with pytest.raises(DataError, match=r"features have shape \(1, 1, 2, 2, 2\) and the latents \(1, 1, 1, 2, 2\)"):
        scores.update(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="0 clips whose latents do not vary"):
        scores.result()
    flat = torch.full((2, 1, 1, 2, 2), 0.3)
    scores.update(flat, flat, torch.zeros(2, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="2 clips whose latents do not vary"):
        scores.result()
