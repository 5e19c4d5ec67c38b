"""Pixels as they are decoded, uint8 from 0 to 255, and as models take them, float32 in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(video: Tensor) -> Tensor:
    """uint8 `(B, 3, T, H, W)`, of any strides, as contiguous float32 `value / 127.5 - 1` on the same device."""
    # A tensor: by a number a GPU would multiply with its reciprocal, and 111 of the 256 values would be off by a bit.
    divisor = torch.full((), 127.5, device=video.device)
    if video.device.type != "cpu":
        return video.to(torch.float32, memory_format=torch.contiguous_format).div_(divisor).sub_(1.0)
    result = torch.empty(video.shape, dtype=torch.float32)
    # Contiguous: convolutions on a CPU are slower on the strides of frames as they were decoded. Frame by frame: it stays in
    # the cache from one operation to the next.
    for clip, images in zip(result, video, strict=True):  # (3, T, H, W)
        for frame in range(video.shape[2]):
            clip[:, frame].copy_(images[:, frame]).div_(divisor).sub_(1.0)
    return result
