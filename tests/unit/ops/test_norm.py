"""Norms that see one position, reduced in float32."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from videofm.ops.norm import ChannelLayerNorm, RMSNorm, pixel_norm, pixel_norm_silu, rms_norm


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


@pytest.mark.parametrize("modulated", [False, True])
def test_pixel_norm_silu_is_its_parts_with_their_gradients(modulated):
    """Against the formula of `pixel_norm`, modulation and SiLU in single steps; then numerically in float64."""
    torch.manual_seed(0)
    x, shift, scale = torch.randn(2, 5, 3, 2, 2), torch.randn(2, 5, 1, 1, 1), torch.randn(2, 5, 1, 1, 1)
    inputs = [t.requires_grad_() for t in ((x, shift, scale) if modulated else (x,))]

    def parts(x, shift=0.0, scale=0.0):
        return silu(pixel_norm(x) * (1 + scale) + shift)

    ours, theirs = pixel_norm_silu(*inputs), parts(*inputs)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, weight), torch.autograd.grad(theirs, inputs, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.autograd.gradcheck(pixel_norm_silu, [t.detach().double().requires_grad_() for t in inputs])


def test_pixel_norm_silu_keeps_half_precision_and_its_input():
    x = torch.randn(1, 4, 2, 3, 3)
    before = x.clone()
    pixel_norm_silu(x)
    assert torch.equal(x, before)
    half = pixel_norm_silu(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, silu(pixel_norm(x.bfloat16())))


def test_group_norm_of_channels_last_input_with_trained_weights_only():
    """In a fresh process, because torch's own kernel ends it with a segmentation fault."""
    script = """
import torch
from videofm.ops.norm import GroupNorm
for scope in ("frame", "clip"):
    x = torch.randn(1, 3, 4, 4, 8).permute(0, 4, 1, 2, 3)  # (B, T, H, W, C) in memory
    norm = GroupNorm(4, 8, scope=scope)
    norm(x).square().sum().backward()
    contiguous = GroupNorm(4, 8, scope=scope)
    contiguous(x.contiguous()).square().sum().backward()
    torch.testing.assert_close(norm.weight.grad, contiguous.weight.grad)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, (result.returncode, result.stderr)


@pytest.mark.parametrize("shape", [(16,), (2, 1, 16), (2, 7, 16)])
def test_modulated_rms_norm_has_the_gradients_of_its_formula(shape):
    """Weights of a layer, of a sample's noise level and of each token's; numerically in float64, then in bfloat16."""
    torch.manual_seed(0)
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 7, 16), shape, shape)]
    x, weight, shift = inputs
    expected = nn.functional.rms_norm(x, (16,), eps=1e-6) * weight + shift
    torch.testing.assert_close(rms_norm(x, 1e-6, weight, shift), expected)
    assert torch.autograd.gradcheck(lambda x, weight, shift: rms_norm(x, 1e-2, weight, shift), inputs)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, 1e-2, weight), inputs[:2])
    half = rms_norm(x.bfloat16(), 1e-6, weight.float(), shift.float())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=2**-7, atol=2**-7)


def test_rms_norm_of_half_precision_warns_of_nothing(recwarn):
    """As torch's does where input and weights differ in dtype, and takes a slow path."""
    layer = RMSNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert [str(warning.message) for warning in recwarn] == []
