"""Random draws keyed by (seed, step, sample id, name), so that a run does not depend on which rank draws them.

Every draw is made for the whole sample on the CPU, where a seed means the same numbers on every machine, and is moved to
the device afterwards. Nothing here has state: to resume is to ask again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from videofm.types import lasting_id


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key of integers and strings; equal keys give equal seeds, on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key`."""
    return torch.Generator().manual_seed(derive_seed(*key))


class KeyedRng:
    """The draws of one micro-batch (see `types.SampleRng`): row i is a function of (seed, step, sample_ids[i], name)."""

    def __init__(self, seed: int, step: int | str, sample_ids: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.seed, self.step, self.sample_ids, self.device = seed, step, list(sample_ids), device

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Unit Gaussian `(B, *shape)`, float32."""
        return self._draw(name, lambda generator: torch.randn(shape, generator=generator))

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform in [0, 1), `(B, *shape)`, float32."""
        return self._draw(name, lambda generator: torch.rand(shape, generator=generator))

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator for draws that the samples of the micro-batch share. Micro-batches do not depend on the layout."""
        return keyed_generator(self.seed, self.step, self.sample_ids[0], name)

    def rows(self, first: int, end: int) -> KeyedRng:
        """The draws of the samples from number `first` to before `end` alone."""
        return KeyedRng(self.seed, self.step, self.sample_ids[first:end], self.device)

    def fixed(self, number: int) -> KeyedRng:
        """Draws number `number` of each sample, the same in every step and epoch."""
        return KeyedRng(self.seed, f"fixed {number}", [lasting_id(name) for name in self.sample_ids], self.device)

    def _draw(self, name: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        rows = [draw(keyed_generator(self.seed, self.step, sample_id, name)) for sample_id in self.sample_ids]
        return torch.stack(rows).to(self.device)
