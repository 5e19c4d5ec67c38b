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
    return _hashed(f"video:{seed}:{index}")


def candidate_seed(seed: int, prompt_number: int, candidate: int) -> int:
    """The generator seed of candidate number `candidate` of prompt `prompt_number`, 63 bits: another for each of the three."""
    return _hashed(f"candidate:{seed}:{prompt_number}:{candidate}")


def noise_level(seed: int, name: str, low: float, high: float) -> float:
    """A level in [low, high), uniform over names and seeds, for what is called `name`."""
    return low + (high - low) * _hashed(f"level:{seed}:{name}") / 2**63


def derived_seed(seed: int, name: str) -> int:
    """Another generator seed of the video with generator seed `seed`, for the draw called `name`."""
    return _hashed(f"{name}:{seed}")


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int, int], draw: int = 0) -> Tensor:
    """Unit Gaussian `(B, C, T, H, W)` float32 on the CPU, row i from `seeds[i]`; `shape` is (C, T, H, W) in latent cells.

    `draw` counts draws of that shape from the same generator: 0 is the noise that a video starts from, 1 what
    `LTXPipeline` adds before it decodes.
    """
    return torch.stack([_draws(seed, shape, draw) for seed in seeds])


def named_noise(seeds: Sequence[int], name: str, shape: Sequence[int]) -> Tensor:
    """Unit Gaussian `(B, *shape)` float32 on the CPU, row i from `seeds[i]` for the draw called `name`."""
    generators = [torch.Generator().manual_seed(derived_seed(seed, name)) for seed in seeds]
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def _draws(seed: int, shape: tuple[int, int, int, int], draw: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draw):
        torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator)


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
