"""How the Step-Video transformer is laid out over devices: what tensor ranks split, and the attention of every block."""

from __future__ import annotations

from typing import Any

from videofm.models.bind import bind_blocks, table_with_copies
from videofm.models.dit.step_video.model import StepVideoDiT
from videofm.models.spec import ParallelOptions
from videofm.parallel import tensor
from videofm.parallel.sequence_plan import SequencePlan
from videofm.parallel.tensor import Split, TensorMesh, TensorTable

TENSOR_TABLE: TensorTable = (
    Split("blocks.*.self_attention.qkv", "column", parts=3),
    Split("blocks.*.cross_attention.q", "column"),
    Split("blocks.*.cross_attention.kv", "column", parts=2),
    Split("blocks.*_attention.[qk]_norm", "shared"),
    Split("blocks.*_attention.out", "row"),
    Split("blocks.*.feed_forward.linear1", "column"),
    Split("blocks.*.feed_forward.linear2", "row"),
    Split("caption_projection.linear1", "column"),
    Split("caption_projection.linear2", "row"),
)
"""What tensor ranks split. Replicated are the ways in and out, the noise level, norms of tokens with their modulation, and all
of an injection but the copies of blocks that it may have."""

SEQUENCE_PLAN = SequencePlan(
    split={"latent_tokens": 1, "sigma": 1, "coordinates": 2, "features": 1, "features_kept": 1}, gather=1
)
"""What context ranks split, by its dim of tokens. The text goes whole to each."""


def parallelize(model: StepVideoDiT, mesh: Any = None, options: ParallelOptions | None = None) -> StepVideoDiT:
    """`model` split over the tensor ranks of `mesh`, with `attend` of every block bound, and its tokens over the context ranks.

    Arguments and errors are those of `split_tensors`, `bind_blocks` and `SequencePlan.apply`; `mesh` None is one process.
    """
    if getattr(mesh, "tensor_degree", 1) > 1:
        split_tensors(model, mesh)
        model.to(mesh.device)  # not before: the whole of a large model might not fit there
    place = bind_blocks(model, mesh, options)
    if place is not None:
        SEQUENCE_PLAN.apply(model, place)
    return model


def split_tensors(model: StepVideoDiT, mesh: TensorMesh) -> None:
    """Split `model`, in place; see `parallel.tensor.apply`. All heads are turned alike."""
    tensor.apply(model, table_with_copies(TENSOR_TABLE, model), mesh)
