"""The Haar transform: energy, orthonormality, known answers, and the loss in its bands (spec F-LTX-7)."""

import pytest
import torch

from videofm.errors import DataError
from videofm.ops.dwt import haar2d, haar3d, video_bands, wavelet_l1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_frames", [1, 2, 9, 17])
def test_energy_is_preserved(num_frames, dtype, tolerance):
    """Parseval: the squares of all coefficients add up to those of all pixels, frame 0 of odd lengths included."""
    torch.manual_seed(0)
    video = torch.randn(2, 3, num_frames, 6, 8, dtype=dtype)
    energy, bands = video.square().sum(), video_bands(video).flatten()
    assert bands.numel() == video.numel()
    assert abs(bands.square().sum() / energy - 1) < tolerance


@pytest.mark.parametrize("num_frames", [2, 3])
def test_the_transform_is_orthonormal(num_frames):
    """Its matrix, column by column from unit impulses, times its transpose is the identity; hence it can be inverted."""
    size = num_frames * 4 * 2
    impulses = torch.eye(size, dtype=torch.float64).view(size, 1, num_frames, 4, 2)
    matrix = video_bands(impulses).flatten()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


def test_known_bands():
    """One 2x2x2 cube with t, h, w in {0, 1} and value 4t + 2h + w: the mean is 3.5, and along each axis alone the value drops
    by 4, 2, 1. The low band is 8 * 3.5 / sqrt(8); a high band along one axis is minus 4 * drop / sqrt(8); mixed bands are 0.
    """
    cube = torch.arange(8.0).view(1, 1, 2, 2, 2)
    bands = haar3d(cube).flatten()
    expected = torch.tensor([28.0, -4.0, -8.0, 0.0, -16.0, 0.0, 0.0, 0.0]) / 8**0.5  # index 4t + 2h + w
    torch.testing.assert_close(bands, expected)
    plane = haar2d(cube[:, :, :1]).flatten()  # 0 1 / 2 3: sum 6, drop 1 along w and 2 along h
    torch.testing.assert_close(plane, torch.tensor([6.0, -2.0, -4.0, 0.0]) / 2)


def test_shapes_and_frame_0_by_itself():
    video = torch.randn(2, 3, 9, 6, 8)
    bands = video_bands(video)
    assert bands.first.shape == (2, 4, 3, 1, 3, 4)
    assert bands.pairs.shape == (2, 8, 3, 4, 3, 4)
    assert torch.equal(bands.first, haar2d(video[:, :, :1]))
    assert torch.equal(bands.pairs, haar3d(video[:, :, 1:]))
    assert video_bands(video[:, :, :1]).pairs is None
    assert video_bands(video[:, :, :2]).first is None


@pytest.mark.parametrize("num_frames", [1, 4, 5])
def test_the_loss_of_a_constant_offset(num_frames):
    """An offset d fills only the low bands: d * sqrt(8) in one coefficient of eight for pairs of frames, 2 d in one of four for
    frame 0. With n pairs the mean is d * (2n / sqrt(8) + 1 / 2) / (2n + 1), without the single frame d / sqrt(8).
    """
    video = torch.rand(2, 3, num_frames, 4, 4)
    offset = torch.tensor([0.5, 0.1]).view(2, 1, 1, 1, 1)
    num_alone = num_frames % 2
    share = ((num_frames - num_alone) / 8**0.5 + num_alone / 2) / num_frames
    torch.testing.assert_close(wavelet_l1(video + offset, video), offset.flatten() * share, rtol=1e-4, atol=1e-6)


def test_the_loss_is_zero_if_and_only_if_equal():
    video = torch.rand(1, 3, 5, 4, 4, dtype=torch.float64)
    assert wavelet_l1(video, video).item() == 0
    for index in range(0, video.numel(), 7):
        changed = video.clone()
        changed.view(-1)[index] += 1e-9
        assert wavelet_l1(changed, video).item() > 0


def test_the_loss_knows_its_samples():
    a, b = torch.rand(3, 3, 5, 4, 4), torch.rand(3, 3, 5, 4, 4)
    apart = torch.cat([wavelet_l1(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(wavelet_l1(a, b), apart)
    assert wavelet_l1(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_gradients():
    torch.manual_seed(0)
    a, b = (torch.rand(1, 1, 3, 2, 4, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(wavelet_l1, (a.requires_grad_(), b.requires_grad_()))


def test_refusals():
    with pytest.raises(DataError, match="along time, which has 3 entries: it must be even .*video_bands treats frame 0"):
        haar3d(torch.zeros(1, 3, 3, 4, 4))
    with pytest.raises(DataError, match="along width, which has 5 entries: it must be even"):
        wavelet_l1(torch.zeros(1, 3, 3, 4, 5), torch.zeros(1, 3, 3, 4, 5))
    with pytest.raises(DataError, match="must have one shape"):
        wavelet_l1(torch.zeros(1, 3, 3, 4, 4), torch.zeros(1, 3, 1, 4, 4))
    with pytest.raises(DataError, match=r"takes \(B, C, T, H, W\), not \(3, 4, 4\)"):
        haar2d(torch.zeros(3, 4, 4))
