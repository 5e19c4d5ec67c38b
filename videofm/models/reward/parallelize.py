"""How a reward model is laid out over devices: it runs whole on each rank, with its attention bound to a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from videofm.attention import AttentionSpec, choose
from videofm.attention.strategies import none
from videofm.models.reward.model import VideoReward
from videofm.models.spec import ParallelOptions


def parallelize(model: VideoReward, mesh: Any = None, options: ParallelOptions | None = None) -> VideoReward:
    """`model` with the attention of every block bound; `mesh` None is one process.

    Context ranks all compute the same scores. The gradient of a score is divided among them, so that those of the model, and of
    a text encoder that trains with it, count once where the engine sums over these ranks.

    Raises:
        ConfigError: a backend cannot serve this model; the message has the reason.
    """
    options = options or ParallelOptions()
    weight, config = model.proj_in.weight, model.config
    spec = AttentionSpec(config.num_heads, config.head_width, options.dtype or weight.dtype, weight.device.type)
    attend = none.wrap(choose(options.attention, spec))
    attend_text = none.wrap(choose(options.cross_attention, replace(spec, has_mask=True)))
    for block in model.blocks:
        block.self_attention.attend = attend  # type: ignore[union-attr, assignment]
        block.cross_attention.attend = attend_text  # type: ignore[union-attr, assignment]
    degree = getattr(mesh, "context_degree", 1)
    if degree > 1:

        def share(_: VideoReward, __: Any, scores: Tensor) -> None:
            if scores.requires_grad:
                scores.register_hook(lambda gradient: gradient / degree)

        model.register_forward_hook(share)
    return model
