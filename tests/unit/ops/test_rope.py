"""Rotary positions over fractional coordinates (spec C.3, F-DiT-5)."""

import math

import pytest
import torch

from videofm.ops import rope
from videofm.types import Compression

COMPRESSION = Compression(8, 32, 32)


def coordinates(shape=(3, 4, 5), fps=(25.0, 8.0), **kwargs):
    return rope.video_coordinates(shape, torch.tensor(fps), COMPRESSION, **kwargs)


def test_coordinates_are_seconds_and_pixels_of_the_top_left_corner():
    got = coordinates()
    assert got.shape == (2, 3, 60)
    assert got[0, :, 0].tolist() == [0, 0, 0]
    assert got[0, :, -1].tolist() == pytest.approx([16 / 25, 96, 128])
    assert got[1, 0, -1] == pytest.approx(2.0)
    assert got[0, 2, :5].tolist() == [0, 32, 64, 96, 128]  # width is fastest


def test_causal_fix_gives_a_latent_frame_the_time_of_its_first_pixel_frame():
    """Latent frame f >= 1 holds pixel frames 8f-7 .. 8f: times 0, 1/25, 9/25."""
    assert coordinates(causal_fix=True)[0, 0, ::20].tolist() == pytest.approx([0, 1 / 25, 9 / 25])


def test_frequencies_rise_from_half_pi():
    values = rope.frequencies(2048)
    assert len(values) == 341
    assert (values.diff() > 0).all()
    assert values[0].item() == pytest.approx(math.pi / 2)
    assert values[-1].item() == pytest.approx(1e4 * math.pi / 2)


def test_layout_is_frequency_major_axis_minor_and_paired():
    """Width 14: two channels alone, then (f0 t, f0 h, f0 w, f1 t, f1 h, f1 w), each angle twice."""
    point = torch.tensor([[[5.0], [512.0], [1024.0]]])  # -0.5, -0.5, 0 over the span
    table = rope.rotary_table(point, 14)
    fractions = [2 * p / s - 1 for p, s in zip((5, 512, 1024), rope.SPAN, strict=True)]
    angles = [fraction * frequency for frequency in (math.pi / 2, 1e4 * math.pi / 2) for fraction in fractions]
    expected = [1.0, 1.0] + [math.cos(a) for a in angles for _ in range(2)]
    assert table.cos[0, 0].tolist() == pytest.approx(expected, abs=1e-3)  # 1e-3: float32 of angles up to 1.6e4
    assert table.sin[0, 0, :2].tolist() == [0, 0]


def test_rotation_keeps_norms_and_leaves_the_first_channels():
    x = torch.randn(2, 60, 32)
    turned = rope.rotate(x, rope.rotary_table(coordinates(), 32))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., :2], x[..., :2])
    assert not torch.allclose(turned, x)


def test_products_depend_on_differences_of_time_only():
    """Low frequencies only (theta 10), so that float32 holds the angles."""
    q, k = torch.randn(2, 60, 24), torch.randn(2, 60, 24)
    shift = torch.tensor([1.0, 64.0, 96.0])[None, :, None]

    def logits(points):
        table = rope.rotary_table(points, 24, theta=10.0)
        return rope.rotate(q, table) @ rope.rotate(k, table).mT

    base = logits(coordinates())
    torch.testing.assert_close(logits(coordinates() + shift), base, rtol=0, atol=1e-4)
    assert not torch.allclose(logits(coordinates() * 1.5), base, atol=1e-2)  # the test can fail


def test_table_is_float32_and_the_same_under_autocast():
    base = rope.rotary_table(coordinates(), 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rope.rotary_table(coordinates(), 32)
    assert inside.cos.dtype == inside.sin.dtype == torch.float32
    assert torch.equal(inside.cos, base.cos)
    assert torch.equal(inside.sin, base.sin)
