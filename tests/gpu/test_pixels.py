"""Pixels on a GPU are those on a CPU, to the last bit: no run and no cache of latents depends on where they were scaled."""

from __future__ import annotations

import torch

from videofm.pixels import scaled


def test_scaled_as_on_a_cpu():
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 2, 8, 16, 1).repeat(2, 1, 1, 1, 3)
    for video in (frames.permute(0, 4, 1, 2, 3), frames.permute(0, 4, 1, 2, 3).contiguous()):
        found = scaled(video.cuda())
        assert found.is_contiguous() and torch.equal(found.cpu(), scaled(video))
