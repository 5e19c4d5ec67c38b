"""How the autoregressive transformer is laid out over devices: what tensor ranks split, and the attention of every block."""

from __future__ import annotations

from typing import Any

from videofm.attention import AttentionSpec, choose
from videofm.attention.strategies import SequencePlace, none
from videofm.errors import ParallelError
from videofm.models.ar.model import ARTransformer
from videofm.models.bind import choose_strategy
from videofm.models.recompute import treat_blocks
from videofm.models.spec import ParallelOptions
from videofm.parallel import tensor
from videofm.parallel.sequence_plan import SequencePlan
from videofm.parallel.tensor import Split, TensorMesh, TensorTable
from videofm.registry import ATTENTION_STRATEGIES, lookup

TENSOR_TABLE: TensorTable = (
    Split("blocks.*.self_attention.qkv", "column", parts=3),
    Split("blocks.*.self_attention.[qk]_norm", "shared"),
    Split("blocks.*.self_attention.out", "row"),
    Split("blocks.*.feed_forward.gate", "column"),
    Split("blocks.*.feed_forward.up", "column"),
    Split("blocks.*.feed_forward.down", "row"),
)
"""What tensor ranks split. Replicated are the embeddings, the projection of the text, the head, and norms of the stream."""

TEXT_TENSOR_TABLE: TensorTable = (
    Split("blocks.*.cross_attention.q", "column"),
    Split("blocks.*.cross_attention.kv", "column", parts=2),
    Split("blocks.*.cross_attention.[qk]_norm", "shared"),
    Split("blocks.*.cross_attention.out", "row"),
)
"""The same for attention to the text, where blocks have it."""

SEQUENCE_PLAN = SequencePlan(split={"tokens": 1, "positions": 1, "cells": 2}, gather=1)
"""What context ranks split, by its dim of tokens. The text goes whole to each."""


def parallelize(model: ARTransformer, mesh: Any = None, options: ParallelOptions | None = None) -> ARTransformer:
    """`model` split over the tensor ranks of `mesh`, with the attention of every block bound, and its tokens over the context
    ranks; `mesh` None is one process.

    `forward` is what context ranks share. `forward_cached`, for sampling, runs whole on each of them.

    Raises:
        ConfigError: a backend cannot serve this model, or its blocks cannot be compiled or offloaded; with the reason.
        ParallelError: degrees that do not divide heads or features, a strategy that cannot serve this model on this mesh, or
            context ranks with the text as a prefix.
    """
    check_context(model, getattr(mesh, "context_degree", 1))
    if getattr(mesh, "tensor_degree", 1) > 1:
        split_tensors(model, mesh)
        model.to(mesh.device)  # not before: the whole of a large model might not fit there
    place = _bind(model, mesh, options or ParallelOptions())
    if place is not None:
        SEQUENCE_PLAN.apply(model, place)
    return model


def check_context(model: ARTransformer, context_degree: int) -> None:
    """Refuse a number of context ranks that cannot share the tokens of `model`.

    Raises:
        ParallelError: there are several, and the text is a prefix.
    """
    if context_degree > 1 and model.config.text == "prefix":
        raise ParallelError(
            f"parallel.context_degree is {context_degree}, but this ar/transformer takes the text as a prefix, whose mask "
            "differs from sample to sample and is not split over ranks. Set it to 1, or build the model with text: "
            "cross_attention."
        )


def split_tensors(model: ARTransformer, mesh: TensorMesh) -> None:
    """Split `model`, in place; see `parallel.tensor.apply`. All heads are turned alike."""
    tensor.apply(model, TENSOR_TABLE + (TEXT_TENSOR_TABLE if model.config.text == "cross_attention" else ()), mesh)


def _bind(model: ARTransformer, mesh: Any, options: ParallelOptions) -> SequencePlace | None:
    """Bind causal attention to the backend and strategy, masked attention to the backend of texts; treat the blocks.

    Returns:
        Where this rank stands among those that share a sequence; None where it is alone.
    """
    weight, shares = model.token_embed.weight, getattr(mesh, "context_degree", 1) > 1
    heads = (model.config.num_heads // getattr(mesh, "tensor_degree", 1), model.config.head_width)
    kind = (options.dtype or weight.dtype, weight.device.type)
    spec = AttentionSpec(*heads, *kind, needs_lse=shares)
    masked = none.wrap(choose(options.cross_attention, AttentionSpec(*heads, *kind, has_mask=True)))
    place = SequencePlace(mesh.context_group, mesh.ulysses_group, mesh.ring_group) if shares else None
    strategy = lookup(ATTENTION_STRATEGIES, choose_strategy(options.context_strategy, mesh), "attention strategy")
    attend = strategy.wrap(choose(options.attention, spec), place, spec)
    for block in model.blocks:
        block.self_attention.attend, block.self_attention.attend_masked = attend, masked  # type: ignore[union-attr]
        if block.cross_attention is not None:
            block.cross_attention.attend = masked  # type: ignore[union-attr]
    treat_blocks(model.blocks, options)
    return place
