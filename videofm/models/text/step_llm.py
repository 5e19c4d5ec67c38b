"""Step-LLM, the causal text encoder of Step-Video (arXiv 2502.10248, section 4.2; spec step-video A3), for one device.

A decoder with grouped queries, gated feed-forwards and RMS norms. Positions are in the logits: each head dislikes distance in
its own degree, so that there is no table and no longest text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu

from videofm.attention import AttentionSpec, choose
from videofm.ops.norm import RMSNorm

if TYPE_CHECKING:
    from videofm.types import AttentionFn


@dataclass(frozen=True)
class StepLLMConfig:
    """Sizes, in the words of `StepVideoTextConfig`."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_groups: int
    hidden_width: int
    norm_eps: float


def alibi_slopes(num_heads: int) -> Tensor:
    """How much each head dislikes distance, `(N,)` float32 (ALiBi, arXiv 2108.12409).

    `2 ** (-8 k / n)` for the first n heads, n the largest power of two, and what lies between these for the others.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    exponents = [8 * k / power for k in range(1, power + 1)]
    exponents += [4 * k / power for k in range(1, 2 * (num_heads - power), 2)]
    return 2.0 ** -torch.tensor(exponents)


def causal_bias(length: int, num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """What is added to the logits, `(1, N, L, L)` float32: `-slope * sqrt(query - key)`, and minus infinity for later keys.

    The square root is what Step's models have in place of the distance itself (the authors' `build_alibi_cache`; vLLM calls it
    `use_alibi_sqrt`).
    """
    position = torch.arange(length, dtype=torch.float32, device=device)
    distance = position[:, None] - position
    bias = -alibi_slopes(num_heads).to(distance.device)[:, None, None] * distance.clamp(min=0).sqrt()
    return bias.masked_fill(distance < 0, -torch.inf)[None]


class GroupedAttention(nn.Module):
    """Causal attention in which several heads of queries share keys and values.

    The rows of `qkv` are all queries, then for each group its keys and its values, as the authors store them.
    """

    def __init__(self, config: StepLLMConfig, attend: AttentionFn) -> None:
        super().__init__()
        self.num_heads, self.num_groups = config.num_heads, config.num_groups
        self.head_width = config.width // config.num_heads
        self.qkv = nn.Linear(config.width, config.width + 2 * config.num_groups * self.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.attend = attend

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`x` `(B, L, D)` -> the same shape; `bias` is `causal_bias`."""
        q, kv = self.qkv(x).split([x.shape[-1], 2 * self.num_groups * self.head_width], dim=-1)
        q = rearrange(q, "b l (n k) -> b l n k", n=self.num_heads)
        k, v = rearrange(kv, "b l (g two k) -> two b l g k", two=2, g=self.num_groups)
        k, v = (y.repeat_interleave(self.num_heads // self.num_groups, dim=2) for y in (k, v))  # (B, L, G, K) -> (B, L, N, K)
        return self.out(rearrange(self.attend(q, k, v, bias), "b l n k -> b l (n k)"))


class CausalBlock(nn.Module):
    """Attention and a gated feed-forward, each behind an RMS norm."""

    def __init__(self, config: StepLLMConfig, attend: AttentionFn) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = (RMSNorm(config.width, eps=config.norm_eps) for _ in range(2))
        self.attention = GroupedAttention(config, attend)
        self.mlp_in = nn.Linear(config.width, 2 * config.hidden_width, bias=False)
        self.mlp_out = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`x` `(B, L, D)` -> the same shape."""
        x = x + self.attention(self.attention_norm(x), bias)
        gate, value = self.mlp_in(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.mlp_out(silu(gate) * value)


class StepLLM(nn.Module):
    """Token ids -> the states of the last block, without a norm behind it. A token sees itself and those before it."""

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        spec = AttentionSpec(config.num_heads, config.width // config.num_heads, has_mask=True)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(CausalBlock(config, choose("sdpa", spec)) for _ in range(config.num_layers))
        self.num_heads = config.num_heads

    def forward(self, token_ids: Tensor) -> Tensor:
        """`(B, L)` -> `(B, L, D)`."""
        x = self.embedding(token_ids)
        bias = causal_bias(token_ids.shape[1], self.num_heads, x.device)
        for block in self.blocks:
            x = block(x, bias)
        return x
