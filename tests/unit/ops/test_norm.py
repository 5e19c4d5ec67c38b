"""Norms that see one position, reduced in float32."""

import torch
from torch import nn

from videofm.ops.norm import ChannelLayerNorm, RMSNorm, pixel_norm, rms_norm


def test_pixel_norm_has_unit_mean_square_over_channels():
    x = torch.randn(2, 5, 3, 4, 4) * 100
    torch.testing.assert_close(pixel_norm(x).square().mean(dim=1), torch.ones(2, 3, 4, 4))


def test_norms_look_at_one_position_only():
    x = torch.randn(2, 5, 3, 4, 4)
    changed = x.clone()
    changed[:, :, 1] = 7
    for norm in (pixel_norm, ChannelLayerNorm(5)):
        assert torch.equal(norm(x)[:, :, 0], norm(changed)[:, :, 0])


def test_half_precision_is_reduced_in_float32():
    """300^2 overflows float16, so a reduction in the dtype of the input would give zeros."""
    x = torch.full((1, 8, 1, 1, 1), 300.0, dtype=torch.float16)
    assert torch.equal(pixel_norm(x), torch.ones_like(x))
    assert torch.equal(rms_norm(x.flatten(1)), torch.ones(1, 8, dtype=torch.float16))
    assert torch.equal(RMSNorm(8)(x.flatten(1)), torch.ones(1, 8, dtype=torch.float16))


def test_against_torch():
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(rms_norm(x, eps=1e-6), nn.functional.rms_norm(x, (16,), eps=1e-6))
    layer = ChannelLayerNorm(16)
    torch.testing.assert_close(layer(x.mT[..., None, None])[..., 0, 0].mT, nn.functional.layer_norm(x, (16,)))
