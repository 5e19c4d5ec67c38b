"""PSNR and SSIM against closed forms and against a reference written out with loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from videofm.errors import DataError
from videofm.evaluation.reconstruction import psnr, psnr_per_frame, ssim, ssim_per_frame


def random_clip(seed: int, shape: tuple[int, ...] = (2, 3, 2, 14, 13)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_constant_offset_is_per_clip() -> None:
    """Offsets 0.2 and 0.02 have mse 0.04 and 0.0004: 10 log10(4 / 0.04) = 20 dB and 40 dB."""
    clip = random_clip(0) * 0.5
    offset = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(psnr(clip + offset, clip), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)


def test_psnr_of_equal_clips_is_cut_off() -> None:
    clip = random_clip(0)
    torch.testing.assert_close(psnr(clip, clip), torch.full((2,), 106.0206))


def test_ssim_of_constant_clips() -> None:
    """Without variance SSIM is (2ab + c1) / (a^2 + b^2 + c1), c1 = 0.0004: for 0.5 and 0.1 that is 0.1004 / 0.2604."""
    a, b = torch.full((1, 3, 2, 12, 12), 0.5), torch.full((1, 3, 2, 12, 12), 0.1)
    assert ssim(a, b).item() == pytest.approx(0.1004 / 0.2604, abs=1e-5)


def test_ssim_of_equal_and_of_negated_clips() -> None:
    """Negation about zero mean: luminance is about 1, the structure term (-2v + c2) / (2v + c2), here with v = 1."""
    clip = random_clip(1)
    torch.testing.assert_close(ssim(clip, clip), torch.ones(2))
    board = (torch.arange(16)[:, None] + torch.arange(16)[None]).remainder(2).float() * 2 - 1
    board = board.expand(1, 3, 2, 16, 16)
    assert ssim(-board, board).item() == pytest.approx(-(2 - 0.0036) / (2 + 0.0036), abs=2e-3)


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 for one channel of one frame (H, W), one window at a time."""
    positions = np.arange(11) - 5
    gauss = np.exp(-(positions[:, None] ** 2 + positions[None] ** 2) / (2 * 1.5**2))
    gauss /= gauss.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (gauss * a).sum(), (gauss * b).sum()
            var_a, var_b = (gauss * (a - mean_a) ** 2).sum(), (gauss * (b - mean_b) ** 2).sum()
            cov = (gauss * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 0.02**2, 0.06**2
            values.append((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


def test_ssim_equals_the_reference() -> None:
    x, y = random_clip(2), random_clip(2) * 0.7 + random_clip(3) * 0.3
    expected = []
    for clip in range(2):
        planes = [(x[clip, c, t].double().numpy(), y[clip, c, t].double().numpy()) for c in range(3) for t in range(2)]
        expected.append(np.mean([reference_ssim(a, b) for a, b in planes]))
    torch.testing.assert_close(ssim(x, y), torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


def test_psnr_per_frame() -> None:
    """Offsets 0.2 and 0.02 in the two frames: 20 and 40 dB. The clip has the mean error (0.04 + 0.0004) / 2 = 0.0202, so
    10 log10(4 / 0.0202) = 22.967 dB, not the 30 dB of the mean.
    """
    clip = random_clip(0) * 0.5
    offset = torch.tensor([0.2, 0.02]).view(1, 1, 2, 1, 1)
    torch.testing.assert_close(psnr_per_frame(clip + offset, clip), torch.tensor([[20.0, 40.0]] * 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(psnr(clip + offset, clip), torch.full((2,), 22.967), atol=2e-3, rtol=0)
    torch.testing.assert_close(psnr_per_frame(clip, clip), torch.full((2, 2), 106.0206))


def test_ssim_per_frame() -> None:
    """Each frame against the reference; frames are those of the clip alone, and their mean is the clip's value."""
    x, y = random_clip(2), random_clip(2) * 0.7 + random_clip(3) * 0.3
    y[0, :, 1] = x[0, :, 1]
    frames = ssim_per_frame(x, y)
    planes = [[zip(x[n, :, t].double().numpy(), y[n, :, t].double().numpy(), strict=True) for t in range(2)] for n in range(2)]
    expected = [[np.mean([reference_ssim(a, b) for a, b in frame]) for frame in clip] for clip in planes]
    torch.testing.assert_close(frames, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)
    assert frames[0, 1] == 1 and frames[0, 0] < 0.99
    torch.testing.assert_close(frames.mean(dim=1), ssim(x, y))
    torch.testing.assert_close(frames[:, 1:], ssim_per_frame(x[:, :, 1:], y[:, :, 1:]))


def test_refusals() -> None:
    with pytest.raises(DataError, match="SSIM needs frames of at least 11x11 pixels, not 8x16"):
        ssim(torch.zeros(1, 3, 2, 8, 16), torch.zeros(1, 3, 2, 8, 16))
    with pytest.raises(DataError, match=r"must both be \(B, C, T, H, W\)"):
        psnr(torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 3, 3, 8, 8))
