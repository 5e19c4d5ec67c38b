"""How the LTX transformer is laid out over devices: what tensor ranks split, and the attention of every block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from videofm.models.bind import bind_blocks, table_with_copies
from videofm.models.dit.ltx.model import LTXVideoDiT
from videofm.models.injection import block_copies
from videofm.models.spec import ParallelOptions
from videofm.ops.rope import RotaryTable
from videofm.parallel import tensor
from videofm.parallel.sequence_plan import SequencePlan
from videofm.parallel.tensor import Split, TensorMesh, TensorTable

TENSOR_TABLE: TensorTable = (
    Split("blocks.*_attention", "heads"),
    Split("blocks.*_attention.[qkv]", "column"),
    Split("blocks.*_attention.[qk]_norm", "norm"),
    Split("blocks.*_attention.out", "row"),
    Split("blocks.*.feed_forward.linear1", "column"),
    Split("blocks.*.feed_forward.linear2", "row"),
    Split("caption_projection.linear1", "column"),
    Split("caption_projection.linear2", "row"),
)
"""What tensor ranks split. Replicated are the ways in and out, the noise level, the tables that it modulates with, and all of
an injection but the copies of blocks that it may have."""

SEQUENCE_PLAN = SequencePlan(
    split={"latent_tokens": 1, "sigma": 1, "coordinates": 2, "features": 1, "features_kept": 1}, gather=1
)
"""What context ranks split, by its dim of tokens. The text goes whole to each."""


def parallelize(model: LTXVideoDiT, mesh: Any = None, options: ParallelOptions | None = None) -> LTXVideoDiT:
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


def split_tensors(model: LTXVideoDiT, mesh: TensorMesh) -> None:
    """Split `model`, in place; see `parallel.tensor.apply`. A rank turns its heads by their own angles."""
    tensor.apply(model, table_with_copies(TENSOR_TABLE, model), mesh)
    own_angles = _own_angles(mesh)  # one for all blocks, which get the same table
    for block in (*model.blocks, *block_copies(model)):
        block.self_attention.register_forward_pre_hook(own_angles)  # type: ignore[union-attr]


def _own_angles(mesh: TensorMesh) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that gives a module, for a table of all channels `(B, L, D)`, that of this rank's channels."""
    rank, degree = mesh.tensor_rank, mesh.tensor_degree
    last: list[RotaryTable] = []  # a table and this rank's of it: what a table derives from itself is made once a step

    def own(table: RotaryTable) -> RotaryTable:
        compiles = torch.compiler.is_compiling()  # which would compile anew for each table that it has to recognise
        if not compiles and last and last[0] is table:
            return last[1]
        mine = RotaryTable(table.cos.chunk(degree, dim=-1)[rank], table.sin.chunk(degree, dim=-1)[rank])
        if not compiles:
            last[:] = [table, mine]
        return mine

    return lambda module, args: tuple(own(value) if isinstance(value, RotaryTable) else value for value in args)
