"""Rotary positions over fractional coordinates (spec C.3, F-DiT-5) and over counted ones (spec step-video A3, F-A 7)."""

import math

import pytest
import torch

from videofm.errors import ConfigError
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


def test_scores_of_counted_positions_do_not_change_with_a_common_offset():
    """q . k of every pair of tokens, when all of them move by (3, 7, 11) cells; moving the queries alone is the control."""
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, 24, 2, 32, generator=generator) for _ in range(2))
    here = rope.cell_coordinates((3, 2, 4), 1)
    offset = here + torch.tensor([3.0, 7.0, 11.0])[:, None]

    def scores(at_q, at_k):
        rotated = [rope.rotate_halves(x, rope.cell_rotary_table(at, 32)) for x, at in ((q, at_q), (k, at_k))]
        return torch.einsum("blnk,bsnk->bnls", *rotated)

    torch.testing.assert_close(scores(offset, offset), scores(here, here), rtol=0, atol=2e-5)
    for axis in range(3):
        moved = here.clone()
        moved[:, axis] += 1
        assert (scores(moved, here) - scores(here, here)).abs().max() > 0.1


def test_counted_positions_turn_a_pair_of_channels_by_hand():
    """Of a head of 16, channels 2 and 6 are the third pair of 4 for time: at frame 5 by 5 * 10000 ** (-4 / 8) = 0.05."""
    x = torch.zeros(1, 1, 1, 16)
    x[..., 2] = 1.0
    turned = rope.rotate_halves(x, rope.cell_rotary_table(torch.tensor([[[5.0], [9.0], [9.0]]]), 16))
    expected = torch.zeros(16)
    expected[2], expected[6] = math.cos(0.05), math.sin(0.05)
    torch.testing.assert_close(turned.flatten(), expected)


def test_a_head_has_half_its_channels_for_time():
    assert [rope.head_split(width) for width in (128, 32, 8)] == [(64, 32, 32), (16, 8, 8), (4, 2, 2)]
    with pytest.raises(ConfigError, match=r"head_width 12: .* take a multiple of 8"):
        rope.head_split(12)
