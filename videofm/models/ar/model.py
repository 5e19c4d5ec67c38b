"""An autoregressive transformer over video tokens (ARLON, arXiv 2410.20502; spec step-video-arlon-dpo B4), for one device.

A decoder-only network in the manner of LLaMA: RMSNorm before each sub-layer, SwiGLU, rotary positions over the raster number of
a token in its window, queries and keys normalised head by head (as Qwen3 has them). A token knows its row and column by learned
embeddings. The text comes in by attention in every block, or as a prefix of the sequence. The sequence is shifted by the caller
(`inputs.inputs_of`): at place i the model sees the token before it, and predicts the one that stands there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

from videofm.attention import AttentionSpec, choose
from videofm.attention.kv_cache import KVCache
from videofm.errors import DataError
from videofm.models.ar import inputs as grids
from videofm.models.ar.config import ARConfig
from videofm.models.ar.layers import CAUSAL, Block, TextKeys
from videofm.ops.norm import RMSNorm
from videofm.ops.rope import RotaryTable, line_rotary_table
from videofm.types import Conditioning

INIT_STD = 0.02
LOGIT_STD = 0.5
"""Largest standard deviation of the logits of a fresh model, whose loss is then log V + 0.125 at most."""


@dataclass(frozen=True)
class ARCache:
    """What the model keeps of a text and of the tokens that it has seen; a value, from which a rollout can branch.

    `layers` holds keys and values of each block, `text` those of the text where blocks attend to it (with `prefix` the text
    stands first in `layers`). `text_mask` is `(B, S)`, True where a token of the text is real. `num_tokens` have passed.
    """

    layers: tuple[KVCache, ...]
    text: tuple[TextKeys, ...]
    text_mask: Tensor
    num_tokens: int = 0


@dataclass(frozen=True)
class CachedLogits:
    """`logits` `(B, L, V)` of the tokens that were given, and the cache that holds these too."""

    logits: Tensor
    cache: ARCache


class ARTransformer(nn.Module):
    """The tokens before each place, where the places lie, and a text -> logits of the token at each place."""

    spec_name = "ar/transformer"

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, (config.num_heads, config.head_width)
        attend, attend_masked = choose("sdpa", AttentionSpec(*heads)), choose("sdpa", AttentionSpec(*heads, has_mask=True))
        self.token_embed = nn.Embedding(config.vocab_size + 2, width)
        self.row_embed, self.column_embed = nn.Embedding(config.max_rows, width), nn.Embedding(config.max_columns, width)
        self.caption_norm = RMSNorm(config.caption_channels, eps=config.norm_eps)
        self.caption_projection = nn.Linear(config.caption_channels, width, bias=False)
        self.blocks = nn.ModuleList(Block(config, attend, attend_masked) for _ in range(config.num_layers))
        self.out_norm = RMSNorm(width, eps=config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(width, config.vocab_size, bias=False)
        self.init_weights()

    @property
    def start_token(self) -> int:
        """The token before the first one of a window that begins a video: V."""
        return self.config.vocab_size

    @property
    def continue_token(self) -> int:
        """The token before the first one of a window that begins inside of a video: V + 1."""
        return self.config.vocab_size + 1

    @torch.no_grad()
    def init_weights(self) -> None:
        """Where training from scratch starts, as LLaMA and GPT-2: a normal distribution of std 0.02, in the last layer of each
        sub-layer divided by the root of their number. What makes logits has less where the model is wide, so that all tokens
        are nearly as likely."""
        num_sublayers = self.config.num_layers * (3 if self.config.text == "cross_attention" else 2)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                ends_sublayer = name.endswith(("attention.out", "feed_forward.down"))
                nn.init.normal_(module.weight, std=INIT_STD / num_sublayers**0.5 if ends_sublayer else INIT_STD)
        logits = self.token_embed if self.head is None else self.head
        nn.init.normal_(logits.weight, std=min(INIT_STD, LOGIT_STD / self.config.width**0.5))

    def forward(self, tokens: Tensor, positions: Tensor, cells: Tensor, conditioning: Conditioning) -> Tensor:
        """The logits of the token at each place, given those before it.

        Args:
            tokens: `(B, L)` int64, the token before each place; `start_token` or `continue_token` for the first.
            positions: `(B, L)` int64, the raster number of each place in the window.
            cells: `(B, 2, L)` int64, its row and column.
            conditioning: text embeddings `(B, S, caption_channels)` and their mask `(B, S)`; padding changes nothing. A text
                without any real token counts, where blocks attend to it, as one whose tokens are all real.

        Returns:
            `(B, L, V)`.

        Raises:
            DataError: shapes that do not belong together; ids, rows or columns (seen on the CPU) that have no embedding.
        """
        self._check(tokens, positions, cells, conditioning)
        x, text, real = self._embed(tokens, cells), self._text(conditioning), conditioning.mask.bool()
        if self.config.text == "cross_attention":
            table, mask, text_mask = self._table(positions), None, _cross_mask(real)
        else:
            table = self._table(torch.cat([_text_positions(real), positions], dim=1))
            x = torch.cat([text, x], dim=1)
            mask, text_mask = _prefix_mask(real, x.shape[1], x.shape[1]), None
        for block in self.blocks:
            x = block(x, table, mask, None if text_mask is None else text, text_mask)
        return self._logits(x[:, -tokens.shape[1] :])

    def empty_cache(self, conditioning: Conditioning) -> ARCache:
        """A cache that holds the text, and no token yet.

        Raises:
            DataError: a text of another encoder.
        """
        self._check_text(conditioning, conditioning.mask.shape[0])
        text, real = self._text(conditioning), conditioning.mask.bool()
        if self.config.text == "cross_attention":
            keys = tuple(block.cross_attention.keys(text) for block in self.blocks)  # type: ignore[union-attr, operator]
            return ARCache(tuple(KVCache.empty(key.k) for key in keys), keys, real)
        x, mask, table = text, _prefix_mask(real, text.shape[1], text.shape[1]), self._table(_text_positions(real))
        layers = []
        for block in self.blocks:
            extended = block.extend(x, table, mask, None, None, None)  # type: ignore[operator]
            x = extended.x
            layers.append(extended.cache)
        return ARCache(tuple(layers), (), real)

    def forward_cached(
        self, tokens: Tensor, positions: Tensor, cells: Tensor, conditioning: Conditioning | None, cache: ARCache | None = None
    ) -> CachedLogits:
        """`forward` for tokens that follow those of `cache`: the same logits as one pass over all of them.

        Args:
            tokens: `(B, L)`, the tokens before L further places.
            positions: `(B, L)` as in `forward`, of the whole window.
            cells: `(B, 2, L)`.
            conditioning: the text, where `cache` is None. A cache holds its text: then this is None.
            cache: of `empty_cache`, or of the call before; None starts with `conditioning`. It stays valid.

        Raises:
            DataError: as in `forward`, or neither or both of a text and a cache.
        """
        if cache is None:
            if conditioning is None:
                raise DataError("forward_cached needs a text (`conditioning`) to begin with, or the `cache` of a call before.")
            cache = self.empty_cache(conditioning)
        elif conditioning is not None:
            raise DataError(
                f"a text of shape {tuple(conditioning.mask.shape)} with a cache of one of {tuple(cache.text_mask.shape)}: a "
                "cache holds its text; pass None with it, or begin a new cache for another text."
            )
        self._check(tokens, positions, cells, None, cache.text_mask.shape[0])
        x, table, mask = self._embed(tokens, cells), self._table(positions), self._extending_mask(cache, tokens.shape[1])
        text_mask = _cross_mask(cache.text_mask) if cache.text else None
        layers = []
        for index, block in enumerate(self.blocks):
            keys = cache.text[index] if cache.text else None
            extended = block.extend(x, table, mask, cache.layers[index], keys, text_mask)  # type: ignore[operator]
            x = extended.x
            layers.append(extended.cache)
        grown = ARCache(tuple(layers), cache.text, cache.text_mask, cache.num_tokens + tokens.shape[1])
        return CachedLogits(self._logits(x), grown)

    def inputs_of(self, indices: Tensor, start: str | Sequence[str] = "start") -> grids.ARInputs:
        """What predicts the indices `(B, T', H', W')` of a window, and the targets; see `inputs.inputs_of`.

        Raises:
            DataError: more rows or columns than the model knows, or ids (seen on the CPU) that it does not have.
        """
        if indices.ndim == 4:
            self.check_grid(indices.shape[2], indices.shape[3])
        return grids.inputs_of(self, indices, start)

    def places(self, shape: tuple[int, int, int], batch_size: int, device: torch.device | str | None = None) -> grids.Places:
        """Where the tokens of a window of `shape` (T', H', W') lie; see `inputs.places`.

        Raises:
            DataError: more rows or columns than the model knows.
        """
        self.check_grid(shape[1], shape[2])
        return grids.places(shape, batch_size, device)

    def check_grid(self, rows: int, columns: int) -> None:
        """Refuse a grid of tokens with rows or columns that have no embedding.

        Raises:
            DataError: there are more than `max_rows` or `max_columns`.
        """
        config = self.config
        if rows > config.max_rows or columns > config.max_columns:
            raise DataError(
                f"a grid of {rows} rows x {columns} columns of tokens; this ar/transformer has embeddings for "
                f"{config.max_rows} x {config.max_columns}. Build it with larger max_rows and max_columns, or take smaller "
                "clips."
            )

    def _embed(self, tokens: Tensor, cells: Tensor) -> Tensor:
        rows, columns = cells.unbind(dim=1)  # (B, L) each
        return self.token_embed(tokens) + self.row_embed(rows) + self.column_embed(columns)

    def _text(self, conditioning: Conditioning) -> Tensor:
        """The text in the width of the model, `(B, S, D)`."""
        return self.caption_projection(self.caption_norm(conditioning.embeddings)).to(self.token_embed.weight.dtype)

    def _table(self, positions: Tensor) -> RotaryTable:
        return line_rotary_table(positions, self.config.head_width, self.config.theta)

    def _logits(self, x: Tensor) -> Tensor:
        x = self.out_norm(x)
        return linear(x, self.token_embed.weight[: self.config.vocab_size]) if self.head is None else self.head(x)

    def _extending_mask(self, cache: ARCache, num_new: int) -> Tensor | None:
        """What `num_new` tokens after those of `cache` see of it and of themselves, `(B or 1, 1, L, Lk)`; None is all."""
        num_keys = cache.num_tokens + num_new
        if cache.text:
            return None if num_new == 1 else _causal_rows(num_new, num_keys, cache.text_mask.device)[None, None]
        return _prefix_mask(cache.text_mask, num_new, cache.text_mask.shape[1] + num_keys)

    def _check(
        self,
        tokens: Tensor,
        positions: Tensor,
        cells: Tensor,
        conditioning: Conditioning | None,
        num_texts: int | None = None,
    ) -> None:
        """See that shapes belong together. `num_texts` is B where `conditioning` has been looked at before."""
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise DataError(f"tokens have shape {tuple(tokens.shape)} and type {tokens.dtype}; (B, L) of int64 is expected.")
        batch, length = tokens.shape
        for name, tensor, expected in (("positions", positions, (batch, length)), ("cells", cells, (batch, 2, length))):
            if tuple(tensor.shape) != expected:
                raise DataError(f"{name} has shape {tuple(tensor.shape)}; {expected} goes with tokens {tuple(tokens.shape)}.")
        if conditioning is not None:
            self._check_text(conditioning, batch)
        elif num_texts != batch:
            raise DataError(f"tokens of {batch} samples with a cache of {num_texts}: a cache goes on with its own samples.")
        self._check_ranges(tokens, cells)

    def _check_ranges(self, tokens: Tensor, cells: Tensor) -> None:
        """Refuse what has no embedding; embeddings themselves would raise an IndexError that names nothing."""
        size, last = self.config.vocab_size, self.continue_token
        rule = (
            f"this ar/transformer has embeddings for 0 to {last}: a vocabulary of {size}, then start_token and continue_token. "
            "Take the tokens of the tokenizer that it was built for, or build it with a larger vocab_size."
        )
        grids.check_range("tokens", tokens, last + 1, rule)
        for row, (name, end) in enumerate((("rows", self.config.max_rows), ("columns", self.config.max_columns))):
            known = f"this ar/transformer has embeddings for 0 to {end - 1}"
            grids.check_range(
                f"{name} in cells", cells[:, row], end, f"{known}: build it with larger max_{name}, or take smaller clips."
            )

    def _check_text(self, conditioning: Conditioning, batch: int) -> None:
        expected = (batch, conditioning.mask.shape[-1], self.config.caption_channels)
        if tuple(conditioning.embeddings.shape) != expected:
            raise DataError(f"embeddings has shape {tuple(conditioning.embeddings.shape)}; {expected} is expected.")
        if conditioning.clip_embeddings is not None:
            raise DataError(
                "conditioning with clip_embeddings: ar/transformer takes the text of one encoder. Give it one that has no "
                "second one, such as text/t5."
            )


def _cross_mask(real: Tensor) -> Tensor:
    """Which tokens of a text are attended to: the real ones of `real` `(B, S)`, all where there are none; `(B, 1, 1, S)`."""
    return rearrange(real | ~real.any(dim=1, keepdim=True), "b s -> b 1 1 s")


def _text_positions(real: Tensor) -> Tensor:
    """Positions of a text before the tokens, `(B, S)` int64: its last real token is at -1, however much padding follows."""
    count = real.long().cumsum(dim=1)
    return count - 1 - count[:, -1:]


def _causal_rows(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """What the last `num_queries` of `num_keys` tokens see, bool `(Lq, Lk)`."""
    keys = torch.arange(num_keys, device=device)
    return CAUSAL.dense(keys[num_keys - num_queries :], keys)


def _prefix_mask(real: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """What the last queries of a sequence see that begins with a text, `(B, 1, Lq, Lk)`: what is before them, but no padding.

    Padding sees itself too, or it would see nothing; `real` is `(B, S)`.
    """
    causal = _causal_rows(num_queries, num_keys, real.device)
    itself = torch.ones_like(causal).triu(num_keys - num_queries) & causal
    keys = torch.cat([real, real.new_ones(real.shape[0], num_keys - real.shape[1])], dim=1)  # (B, Lk)
    return causal & (keys[:, None, None] | itself)
