"""The shape of an autoregressive transformer over video tokens (spec step-video-arlon-dpo B4; the sizes are our choice)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from videofm.errors import ConfigError
from videofm.ops.rope import head_split

HIDDEN_MULTIPLE = 64
"""The feed-forward's width, where it is not given, is a multiple of this."""


@dataclass(frozen=True)
class ARConfig:
    """Sizes of the transformer; the defaults are those of `300m`.

    Attributes:
        vocab_size: V, ids of the tokenizer; the model adds two of its own, which it never predicts.
        num_layers: transformer blocks.
        width: D.
        num_heads: N; the width of a head, K = D / N, is a multiple of 8.
        hidden_width: of the gated feed-forward; None takes 8 / 3 of D, rounded up to a multiple of 64 (LLaMA).
        caption_channels: width of the text embeddings.
        text: `cross_attention`: each block attends to the text; `prefix`: the text stands before the tokens in the sequence.
        max_rows, max_columns: largest H' and W' of a grid of tokens, each with a learned embedding.
        tied_head: logits are products with the embeddings of the tokens, in place of weights of their own.
        norm_eps: epsilon of the RMS norms.
        theta: the ratio of the highest to the lowest rotary frequency.
    """

    vocab_size: int = 2048
    num_layers: int = 24
    width: int = 1024
    num_heads: int = 16
    hidden_width: int | None = 2048
    caption_channels: int = 4096
    text: Literal["cross_attention", "prefix"] = "cross_attention"
    max_rows: int = 64
    max_columns: int = 64
    tied_head: bool = False
    norm_eps: float = 1e-6
    theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "width", "num_heads", "caption_channels", "max_rows", "max_columns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} of ar/transformer must be at least 1.")
        if self.hidden_width is not None and self.hidden_width < 1:
            raise ConfigError(f"hidden_width {self.hidden_width} must be at least 1, or null for 8 / 3 of the width.")
        if self.width % self.num_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} does not divide the width {self.width}: every head has as many channels."
            )
        if self.text not in ("cross_attention", "prefix"):
            raise ConfigError(f"text is {self.text!r}; ar/transformer takes it by cross_attention or as a prefix.")
        head_split(self.head_width)  # rotary positions need a multiple of 8

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.num_heads

    @property
    def feed_forward_width(self) -> int:
        """Hidden channels of the feed-forward."""
        if self.hidden_width is not None:
            return self.hidden_width
        return -(-self.width * 8 // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Numbers that are learned.

        With d the width, h that of the feed-forward, k that of a head and c that of the text: a block has q, k, v and out
        (4 d^2), three matrices of the feed-forward (3 d h), norms of its two sub-layers (2 d) and of queries and keys (2 k);
        attention to the text adds 4 d^2 + d + 2 k. Around the blocks are the embeddings of V + 2 tokens, of rows and of
        columns, the head (V d, none where tied), the last norm (d), and the text's norm and projection (c + c d).
        """
        d, c = self.width, self.caption_channels
        attention = 4 * d * d + d + 2 * self.head_width
        block = attention * (2 if self.text == "cross_attention" else 1) + 3 * d * self.feed_forward_width + d
        head = 0 if self.tied_head else self.vocab_size * d
        embeddings = (self.vocab_size + 2 + self.max_rows + self.max_columns) * d
        return self.num_layers * block + embeddings + head + d + c + c * d

    def flops(self, num_tokens: int, num_text_tokens: int) -> int:
        """FLOPs of one sample, forward and backward, `num_text_tokens` with their padding; see `models.flops`.

        With s tokens, T of text, d and h as in `num_parameters`: products with q, k, v, out and the feed-forward cost
        `2 s (4 d^2 + 3 d h)` a block. Causal attention has `s (s + 1) / 2` pairs of query and key, at `4 d` each. The text
        costs `2 s (2 d^2) + 2 T (2 d^2) + 4 s T d` by attention to it; as a prefix it makes the sequence s + T long. Once for
        all blocks come the head, `2 s d V`, which a large codebook makes dear, and the projection of the text, `2 T c d`.
        Forward and backward are 3 times forward.
        """
        d, text, s = self.width, num_text_tokens, num_tokens
        length = s + text if self.text == "prefix" else s
        block = 2 * length * (4 * d * d + 3 * d * self.feed_forward_width) + 2 * length * (length + 1) * d
        if self.text == "cross_attention":
            block += 4 * s * d * d + 4 * text * d * d + 4 * s * text * d
        return 3 * (self.num_layers * block + 2 * s * d * self.vocab_size + 2 * text * self.caption_channels * d)


SIZES = {
    "tiny": ARConfig(
        vocab_size=256, num_layers=3, width=64, num_heads=4, hidden_width=None, caption_channels=64, max_rows=16, max_columns=16
    ),
    "300m": ARConfig(),
    "1b": ARConfig(num_layers=18, width=2048, num_heads=16, hidden_width=4096),
}
