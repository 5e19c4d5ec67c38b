"""What the `parallelize` of a model that runs whole on each device does: refuse a mesh that splits it, bind attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from videofm.attention import AttentionSpec, choose
from videofm.attention.strategies import none
from videofm.errors import ParallelError
from videofm.models.spec import ParallelOptions, split_degrees


def refuse_split(name: str, mesh: Any) -> None:
    """Refuse a mesh for a model called `name` that no degree splits; None is one process.

    Raises:
        ParallelError: the mesh splits a sample or a model.
    """
    if degrees := split_degrees(mesh):
        raise ParallelError(f"{name} runs whole on each device, but the mesh has {degrees}: set those degrees to 1.")


def bind_blocks(model: Any, mesh: Any, options: ParallelOptions | None) -> None:
    """Bind `self_attention` (not masked) and `cross_attention` (masked) of every block of a transformer.

    Args:
        model: a transformer on its device, with `blocks`, `proj_in` and a config with `num_heads` and `head_width`.
        mesh: None for one process.
        options: backends and the dtype that they see; None chooses the best that works here.

    Raises:
        ConfigError: a backend cannot serve this model; the message has the reason.
        ParallelError: `mesh` splits a sample or the model.
    """
    options = options or ParallelOptions()
    refuse_split(model.spec_name, mesh)
    weight = model.proj_in.weight
    heads, dtype = (model.config.num_heads, model.config.head_width), options.dtype or weight.dtype
    attend = choose(options.attention, AttentionSpec(*heads, dtype, weight.device.type))
    attend_text = choose(options.cross_attention, AttentionSpec(*heads, dtype, weight.device.type, has_mask=True))
    for block in model.blocks:
        block.self_attention.attend = none.wrap(attend)
        block.cross_attention.attend = none.wrap(attend_text)


def bind_single_head(
    model: Any, attentions: Iterable[nn.Module], mesh: Any, options: ParallelOptions | None, has_mask: bool = False
) -> None:
    """Bind the attention layers of a VAE, which have one head of the width of its coarsest level.

    Args:
        model: a VAE on its device.
        attentions: modules with `attend`.
        mesh: None for one process.
        options: the backend and the dtype that it sees; None chooses the best that works here.
        has_mask: whether they mask.

    Raises:
        ConfigError: the backend cannot serve this model; the message has the reason.
        ParallelError: `mesh` splits a sample or the model.
    """
    options = options or ParallelOptions()
    refuse_split(model.spec_name, mesh)
    weight: Tensor = model.last_layer
    spec = AttentionSpec(1, model.config.widths[-1], options.dtype or weight.dtype, weight.device.type, has_mask=has_mask)
    attend = none.wrap(choose(options.attention, spec))
    for attention in attentions:
        attention.attend = attend  # type: ignore[assignment]
