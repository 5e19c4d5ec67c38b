"""Pixels become the same numbers whatever device, strides and way they come by."""

import numpy as np
import pytest
import torch

from videofm.pixels import scaled
from videofm.types import Batch

ALL = torch.arange(256, dtype=torch.uint8).reshape(1, 2, 8, 16, 1).repeat(2, 1, 1, 1, 3)
"""Frames `(2, 2, 8, 16, 3)` that have every value."""


def exact(frames: torch.Tensor) -> torch.Tensor:
    """Rounded after the division and after the subtraction, as IEEE 754 has it, in numpy: `(B, T, H, W, 3)` as a video."""
    return torch.from_numpy(frames.numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)).permute(0, 4, 1, 2, 3)


def batch(video: torch.Tensor) -> Batch:
    return Batch(video, ["", ""], torch.ones(2), ["a", "b"], 0, 2)


@pytest.mark.parametrize("dense", [False, True])
def test_every_value_to_the_last_bit(dense):
    video = ALL.permute(0, 4, 1, 2, 3)
    found = scaled(video.contiguous() if dense else video)
    assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(found, exact(ALL))
    assert (found.min(), found.max()) == (-1, 1)


def test_a_reciprocal_would_be_off():
    """The negative control of the comment in `scaled`: 111 values differ by a bit."""
    values = torch.arange(256).float()
    off = (values * (torch.ones(()) / 127.5) - 1) != (values / torch.full((), 127.5) - 1)
    assert int(off.sum()) == 111


def test_a_batch_is_scaled_once():
    frames = ALL.permute(0, 4, 1, 2, 3)
    moved = batch(frames).to("cpu")
    assert torch.equal(moved.video, exact(ALL)) and torch.equal(frames.permute(0, 2, 3, 4, 1), ALL)
    assert moved.to("cpu").video.data_ptr() == moved.video.data_ptr()
    half = batch(moved.video.half()).to("cpu").video
    assert half.dtype == torch.float16, "pixels that are no integers stay what they are"


def test_other_devices_give_one_float_layout():
    moved = batch(ALL.permute(0, 4, 1, 2, 3)).to("meta").video
    assert moved.is_meta and moved.dtype == torch.float32 and moved.is_contiguous()
