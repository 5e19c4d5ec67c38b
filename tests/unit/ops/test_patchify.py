"""Orders of channels and tokens."""

import pytest
import torch

from videofm.errors import DataError
from videofm.ops import patchify as ops


@pytest.mark.parametrize(("colour", "y", "x"), [(0, 0, 0), (1, 5, 2), (2, 7, 11), (0, 3, 6)])
def test_a_single_pixel_lands_where_the_spec_says(colour, y, x):
    """Spec F-LTX-5: channel `colour * 16 + (x % 4) * 4 + y % 4`, the width index being slower, at cell (y // 4, x // 4)."""
    video = torch.zeros(1, 3, 1, 8, 12)
    video[0, colour, 0, y, x] = 1
    cells = ops.patchify(video, 4)
    assert cells.shape == (1, 48, 1, 2, 3)
    assert cells.nonzero().tolist() == [[0, colour * 16 + (x % 4) * 4 + y % 4, 0, y // 4, x // 4]]


def test_inverses():
    video = torch.randn(2, 3, 4, 8, 12)
    assert torch.equal(ops.unpatchify(ops.patchify(video, 4, 2), 4, 2), video)
    assert torch.equal(ops.depth_to_space(ops.space_to_depth(video, (2, 4, 3)), (2, 4, 3)), video)
    assert torch.equal(ops.latents_from_tokens(ops.tokens_from_latents(video), (4, 8, 12)), video)


def test_space_to_depth_has_the_width_index_fastest():
    x = torch.arange(8.0).view(1, 1, 2, 2, 2)  # t, h, w
    assert ops.space_to_depth(x, (2, 2, 2)).flatten().tolist() == list(range(8))


def test_width_is_the_fastest_token():
    latents = torch.arange(24.0).view(1, 1, 2, 3, 4)
    assert ops.tokens_from_latents(latents)[0, :, 0].tolist() == list(range(24))


def test_tokens_that_do_not_fill_the_latents():
    with pytest.raises(DataError, match="23 tokens do not fill latents of 2x3x4, which have 24 cells"):
        ops.latents_from_tokens(torch.zeros(1, 23, 5), (2, 3, 4))
