"""Keys and values of the tokens that a rollout has passed, as a value: it goes in and a new one comes out.

A model that makes a video chunk by chunk keeps a `KVCache` for each attention layer. Extending it by a chunk and attending from
the chunk to all it holds is the same as one masked pass over the whole sequence: `MaskSpec.block_causal` with the same window
and sinks, `MaskSpec.causal` where chunks are single tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from videofm.errors import ConfigError


@dataclass(frozen=True)
class KVCache:
    """What the next chunk of one attention layer sees besides itself.

    `k` and `v` are `(B, Lk, G, K)`, in the order of the sequence; keys carry their rotary positions already. `num_seen` tokens
    have passed: with a window, `Lk` is smaller. With `window`, a chunk sees the last `window` tokens, its own among them; the
    first `num_sink` tokens of the sequence stay besides (attention sinks, Xiao et al. 2023), at their own positions.

    Nothing is written in place, so an older cache stays valid: a rollout can branch, or repeat a chunk (the denoising steps of
    one chunk all extend the same cache; only the clean chunk's result is kept).

    Raises:
        ConfigError: a window without tokens, or sinks without a window.
    """

    k: Tensor
    v: Tensor
    num_seen: int = 0
    window: int | None = None
    num_sink: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ConfigError(f"a window of {self.window} tokens: it holds at least the chunk that is made, so 1 or more.")
        if self.num_sink < 0 or (self.num_sink and self.window is None):
            raise ConfigError(
                f"num_sink={self.num_sink} with window={self.window}: sinks are 0 or more first tokens that stay when a window "
                "moves on; without a window give 0."
            )

    @classmethod
    def empty(cls, like: Tensor, window: int | None = None, num_sink: int = 0) -> KVCache:
        """A cache of no tokens, with the batch, heads, type and device of keys `like` `(B, L, G, K)`.

        Raises:
            ConfigError: a window without tokens, or sinks without a window.
        """
        return cls(like[:, :0], like[:, :0], 0, window, num_sink)

    def extend(self, k: Tensor, v: Tensor) -> KVCache:
        """The cache after one more chunk, with keys and values `(B, L, G, K)`: what queries of this chunk attend to, all of it.

        Raises:
            ConfigError: the chunk does not fit the window, or differs from what is held in batch, heads or width.
        """
        num_new = k.shape[1]
        if self.window is not None and num_new > self.window:
            raise ConfigError(
                f"a chunk of {num_new} tokens does not fit a window of {self.window}: a chunk sees itself whole, so make the "
                "window at least as long."
            )
        if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (self.k.shape[0], *self.k.shape[2:]):
            raise ConfigError(
                f"keys {tuple(k.shape)} and values {tuple(v.shape)} do not continue a cache of {tuple(self.k.shape)}: "
                "all but the number of tokens is the same throughout a rollout."
            )
        k, v = (torch.cat([self._kept(old, num_new), new], dim=1) for old, new in ((self.k, k), (self.v, v)))
        return replace(self, k=k, v=v, num_seen=self.num_seen + num_new)

    def rows(self, index: Tensor) -> KVCache:
        """The samples with the numbers `index` `(B',)`, for a batch that shrinks or branches."""
        return replace(self, k=self.k[index], v=self.v[index])

    @property
    def positions(self) -> Tensor:
        """Positions in the sequence of the tokens held, int64 `(Lk,)`."""
        num_recent = min(self.k.shape[1], self.num_seen if self.window is None else self.window)
        sinks = torch.arange(self.k.shape[1] - num_recent, device=self.k.device)
        return torch.cat([sinks, torch.arange(self.num_seen - num_recent, self.num_seen, device=self.k.device)])

    def _kept(self, held: Tensor, num_new: int) -> Tensor:
        """What stays of `held` when `num_new` tokens come: sinks, then the last of the window."""
        if self.window is None:
            return held
        num_recent = min(self.window - num_new, self.num_seen)
        num_sink = min(self.num_sink, self.num_seen - num_recent)
        recent = held[:, held.shape[1] - num_recent :]
        return torch.cat([held[:, :num_sink], recent], dim=1) if num_sink else recent
