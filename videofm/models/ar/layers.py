"""The layers of the autoregressive transformer. Each has two ways through it: over a whole sequence, and on from a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu

from videofm.attention import MaskSpec
from videofm.attention.kv_cache import KVCache
from videofm.models.ar.config import ARConfig
from videofm.ops.norm import RMSNorm
from videofm.ops.qk_norm_rope import QueriesAndKeys, qk_norm_rope
from videofm.ops.rope import RotaryTable

if TYPE_CHECKING:
    from videofm.types import AttentionFn

CAUSAL = MaskSpec.causal()


@dataclass(frozen=True)
class TextKeys:
    """What a block attends to of the text: keys, normalised, and values, `(B, S, N, K)`."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Extended:
    """The stream `(B, L, D)` after a layer, and the layer's cache with the new tokens."""

    x: Tensor
    cache: KVCache


class SelfAttention(nn.Module):
    """A token attends to itself and to what is before it. `attend_masked` serves masks that are tensors."""

    def __init__(self, config: ARConfig, attend: AttentionFn, attend_masked: AttentionFn) -> None:
        super().__init__()
        width, self.head_width = config.width, config.head_width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.head_width, eps=config.norm_eps) for _ in range(2))
        self.attend, self.attend_masked = attend, attend_masked

    def forward(self, x: Tensor, table: RotaryTable, mask: Tensor | None = None) -> Tensor:
        """`(B, L, D)` -> `(B, L, D)`; a `mask` that broadcasts to `(B, N, L, L)` stands in place of the causal one."""
        q, k, v = self._projections(x)
        turned = self._turned(q, k, table)
        if mask is None:
            return self._join(self.attend(turned.q, turned.k, v, CAUSAL))
        return self._join(self.attend_masked(turned.q, turned.k, v, mask))

    def extend(self, x: Tensor, table: RotaryTable, cache: KVCache | None, mask: Tensor | None) -> Extended:
        """The same for tokens that follow those of `cache` (None: there are none); `mask` has a column for each of all these.

        Without a mask every token sees all of them, which is right for one token.
        """
        q, k, v = self._projections(x)
        turned = self._turned(q, k, table)
        extended = (KVCache.empty(v) if cache is None else cache).extend(turned.k, v)
        return Extended(self._join(self.attend_masked(turned.q, extended.k, extended.v, mask)), extended)

    def _projections(self, x: Tensor) -> Tensor:
        """Queries, keys and values, `(3, B, L, N, K)`."""
        return rearrange(self.qkv(x), "b l (three n k) -> three b l n k", three=3, k=self.head_width)

    def _turned(self, q: Tensor, k: Tensor, table: RotaryTable) -> QueriesAndKeys:
        return qk_norm_rope(q, k, self.q_norm, self.k_norm, table, "halves")

    def _join(self, attended: Tensor) -> Tensor:
        return self.out(rearrange(attended, "b l n k -> b l (n k)"))


class CrossAttention(nn.Module):
    """Every token attends to the text."""

    def __init__(self, config: ARConfig, attend: AttentionFn) -> None:
        super().__init__()
        width, self.head_width = config.width, config.head_width
        self.q, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(self.head_width, eps=config.norm_eps) for _ in range(2))
        self.attend = attend

    def keys(self, text: Tensor) -> TextKeys:
        """Keys and values of `text` `(B, S, D)`."""
        k, v = rearrange(self.kv(text), "b s (two n k) -> two b s n k", two=2, k=self.head_width)
        return TextKeys(self.k_norm(k), v)

    def forward(self, x: Tensor, keys: TextKeys, mask: Tensor) -> Tensor:
        """`x` `(B, L, D)` attends to `keys` where `mask` `(B, 1, 1, S)` -> `(B, L, D)`."""
        q = self.q_norm(rearrange(self.q(x), "b l (n k) -> b l n k", k=self.head_width))
        return self.out(rearrange(self.attend(q, keys.k, keys.v, mask), "b l n k -> b l (n k)"))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.feed_forward_width
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` -> `(..., D)`."""
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Self-attention, attention to the text (none where that is a prefix), feed-forward."""

    def __init__(self, config: ARConfig, attend: AttentionFn, attend_masked: AttentionFn) -> None:
        super().__init__()
        has_text = config.text == "cross_attention"
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.self_attention = SelfAttention(config, attend, attend_masked)
        self.text_norm = RMSNorm(config.width, eps=config.norm_eps) if has_text else None
        self.cross_attention = CrossAttention(config, attend_masked) if has_text else None
        self.feed_forward_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, table: RotaryTable, mask: Tensor | None, text: Tensor | None, text_mask: Tensor | None
    ) -> Tensor:
        """`x` `(B, L, D)` -> `(B, L, D)`; see `SelfAttention` for `mask`, `CrossAttention` for the text `(B, S, D)`."""
        x = x + self.self_attention(self.attention_norm(x), table, mask)
        return self._rest(x, None if self.cross_attention is None else self.cross_attention.keys(text), text_mask)

    def extend(
        self,
        x: Tensor,
        table: RotaryTable,
        mask: Tensor | None,
        cache: KVCache | None,
        keys: TextKeys | None,
        text_mask: Tensor | None,
    ) -> Extended:
        """The same for tokens that follow those of `cache`, with the keys of the text as they were made before."""
        attended = self.self_attention.extend(self.attention_norm(x), table, cache, mask)
        return Extended(self._rest(x + attended.x, keys, text_mask), attended.cache)

    def _rest(self, x: Tensor, keys: TextKeys | None, text_mask: Tensor | None) -> Tensor:
        if self.cross_attention is not None:
            assert self.text_norm is not None
            x = x + self.cross_attention(self.text_norm(x), keys, text_mask)
        return x + self.feed_forward(self.feed_forward_norm(x))
