"""Where a video starts: noise that depends on (seed, index of the prompt) and on nothing else, on every machine.

The draw is the one that `diffusers.LTXPipeline` makes for one video from a CPU generator with the same seed, so both samplers
start a video from the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def video_seed(seed: int, index: int) -> int:
    """The generator seed of video `index`, 63 bits. Hashed: torch's CPU generator looks at the low 32 bits only."""
    return int.from_bytes(hashlib.blake2b(f"video:{seed}:{index}".encode(), digest_size=8).digest(), "big") >> 1


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int, int]) -> Tensor:
    """Unit Gaussian `(B, C, T, H, W)` float32 on the CPU, row i from `seeds[i]`; `shape` is (C, T, H, W) in latent cells."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
