"""What the `parallelize` of several models does: bind attention to a backend and a strategy, and say how a gradient counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from videofm.attention import AttentionSpec, choose
from videofm.attention.strategies import SequencePlace, none
from videofm.models.injection import PREFIX, block_copies, injection_layers
from videofm.models.recompute import treat_blocks
from videofm.models.spec import ParallelOptions
from videofm.registry import ATTENTION_STRATEGIES, lookup

_Line = TypeVar("_Line", bound=Any)
"""A line of a tensor table, which lies in `videofm.parallel`."""


def bind_blocks(model: Any, mesh: Any, options: ParallelOptions | None) -> SequencePlace | None:
    """Bind self-attention and attention to the text in every block of a transformer, then compile or recompute its blocks.

    Attention to the text stays on each rank: its keys are whole everywhere. Copies of blocks that an injection holds are blocks
    too, and its layers recompute and compile like them.

    Args:
        model: a transformer on its device, split over tensor ranks already, with `blocks`, `proj_in` and a config with
            `num_heads` and `head_width`.
        mesh: None for one process.
        options: backends, the dtype that they see, the strategy, and how blocks recompute; None chooses the best that works.

    Returns:
        Where this rank stands among those that share a sequence, for the model's `SequencePlan`; None where it is alone.

    Raises:
        ConfigError: a backend cannot serve this model, or its blocks cannot be compiled or offloaded; with the reason.
        ParallelError: the strategy cannot serve this model on this mesh.
    """
    options = options or ParallelOptions()
    weight, shares = model.proj_in.weight, getattr(mesh, "context_degree", 1) > 1
    heads = (model.config.num_heads // getattr(mesh, "tensor_degree", 1), model.config.head_width)
    kind = (options.dtype or weight.dtype, weight.device.type)
    spec = AttentionSpec(*heads, *kind, needs_lse=shares)
    backend = choose(options.attention, spec)
    attend_text = none.wrap(choose(options.cross_attention, AttentionSpec(*heads, *kind, has_mask=True)))
    place = SequencePlace(mesh.context_group, mesh.ulysses_group, mesh.ring_group) if shares else None
    strategy = lookup(ATTENTION_STRATEGIES, choose_strategy(options.context_strategy, mesh), "attention strategy")
    attend = strategy.wrap(backend, place, spec)
    copies = list(block_copies(model))
    for block in (*model.blocks, *copies):
        block.self_attention.attend, block.cross_attention.attend = attend, attend_text
    for treated in (model.blocks, copies, injection_layers(model)):
        treat_blocks(treated, options)
    return place


def table_with_copies(table: tuple[_Line, ...], model: nn.Module) -> tuple[_Line, ...]:
    """The tensor table of a transformer; what it says of blocks also of the copies of blocks that its injection may have."""
    if not list(block_copies(model)):
        return table
    about_blocks = [line for line in table if line.pattern.startswith("blocks.")]
    return table + tuple(replace(line, pattern=f"{PREFIX}{line.pattern}") for line in about_blocks)


def choose_strategy(name: str, mesh: Any) -> str:
    """What `auto` means on `mesh`: Ulysses where all context ranks exchange heads, keys and values gathered where none do, both
    ways joined in between. Any other name is itself; one process needs no strategy."""
    if getattr(mesh, "context_degree", 1) == 1:
        return "none"
    if name != "auto":
        return name
    if mesh.ring_degree == 1:
        return "ulysses"
    return "unified" if mesh.ulysses_degree > 1 else "allgather_kv"


def bind_single_head(
    model: Any, attentions: Iterable[nn.Module], options: ParallelOptions | None, has_mask: bool = False
) -> None:
    """Bind the attention layers of a VAE, which have one head of the width of its coarsest level, on each rank for itself.

    Args:
        model: a VAE on its device.
        attentions: modules with `attend`.
        options: the backend and the dtype that it sees; None chooses the best that works here.
        has_mask: whether they mask.

    Raises:
        ConfigError: the backend cannot serve this model; the message has the reason.
    """
    options = options or ParallelOptions()
    weight: Tensor = model.last_layer
    spec = AttentionSpec(1, model.config.widths[-1], options.dtype or weight.dtype, weight.device.type, has_mask=has_mask)
    attend = none.wrap(choose(options.attention, spec))
    for attention in attentions:
        attention.attend = attend  # type: ignore[assignment]


def count_once(model: nn.Module, mesh: Any) -> None:
    """Let the gradients of a model that each context rank runs whole count once, where the engine sums them over those ranks.

    This is for models at the end of the way, such as a discriminator: they see whole clips, so that each rank has the whole
    gradient. One whose results enter a split model, such as a text encoder, gets a part on each rank already.
    """
    degree = getattr(mesh, "context_degree", 1)
    if degree == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient / degree)
