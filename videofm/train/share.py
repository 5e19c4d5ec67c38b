"""Ranks that share samples: one of them reads and the others are told, and now and then all compare what they hold.

The ranks of a `sample_group` (`context x tensor`) work on the same clips. The leader decodes them and broadcasts each
micro-batch as tensors and one JSON text; the others know from the plan how many there are, and where in the data they stand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videofm.data.identity import DEFAULTS, flat
from videofm.data.loader import Step, StepLoader
from videofm.data.plan import PlanState
from videofm.errors import DataError, ParallelError
from videofm.parallel.collectives import naming
from videofm.parallel.mesh import Mesh
from videofm.types import Batch

_SAMPLED = 1 << 16
"""Elements of a tensor that its digest reads, evenly spaced."""

_WEIGHTS_A_TIME = 8
"""Parameters that one comparison looks at; the next one takes the next ones."""


def shared_steps(loader: StepLoader, state: PlanState, mesh: Mesh) -> Iterator[Step]:
    """The steps of `loader` from `state` on, decoded by one rank of each sample group, whose ranks go through them together.

    Raises:
        DataError: the leader could not read a clip; every rank of the group raises it.
    """
    if mesh.sample_degree == 1:
        yield from loader.steps(state)
    elif mesh.is_leader:
        yield from _tell(loader.steps(state), mesh)
    else:
        for step in loader.plan.steps(state):
            count = len(step.share(mesh.data_rank, mesh.data_degree))
            yield Step([share_batch(None, mesh) for _ in range(count)], step.num_samples, step.after, fill=step.fill)


def _tell(steps: Iterator[Step], mesh: Mesh) -> Iterator[Step]:
    while True:
        try:
            step = next(steps)
        except DataError as error:
            _share_text(json.dumps({"error": str(error)}), mesh)
            raise
        yield replace(step, batches=[share_batch(batch, mesh) for batch in step.batches])


def share_batch(batch: Batch | None, mesh: Mesh) -> Batch:
    """The micro-batch that the leader of the sample group brings, on the device of each of its ranks; others bring None.

    Raises:
        DataError: the leader could not read it.
    """
    described = "" if batch is None else json.dumps(_describe(batch))
    found = json.loads(_share_text(described, mesh))
    if "error" in found:
        raise DataError(f"{found['error']} (read by rank {mesh.leader})")
    return _share_tensors(batch, found, mesh)


def _share_tensors(batch: Batch | None, found: Mapping[str, Any], mesh: Mesh) -> Batch:
    """The batch that `found` describes, and its parts."""
    values: dict[str, Any] = dict(found["values"])
    for name, (dtype, shape, order) in found["tensors"].items():
        if batch is not None:
            tensor = getattr(batch, name).to(mesh.device).permute(order).contiguous()
        else:
            tensor = torch.empty([shape[dim] for dim in order], dtype=getattr(torch, dtype), device=mesh.device)
        _broadcast(tensor, mesh)
        values[name] = tensor.permute([order.index(dim) for dim in range(len(order))])
    parts = batch.parts if batch is not None else [None] * len(found["parts"])
    values["parts"] = tuple(_share_tensors(part, told, mesh) for part, told in zip(parts, found["parts"], strict=True))
    return Batch(**values)


def _describe(batch: Batch) -> dict[str, Any]:
    """What is told before the tensors: their types, shapes and orders in memory, and all that is no tensor."""
    held = _held(batch)
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    return {
        "tensors": {
            name: (str(value.dtype).removeprefix("torch."), list(value.shape), _memory_order(value))
            for name, value in tensors.items()
        },
        "values": {name: value for name, value in held.items() if name not in tensors},
        "parts": [_describe(part) for part in batch.parts],
    }


def _memory_order(tensor: Tensor) -> list[int]:
    """The dims of a tensor from the farthest apart in memory to the nearest: frames as they were decoded go without a copy."""
    return sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))


def _held(batch: Batch) -> dict[str, Any]:
    """The fields of a batch but its parts."""
    return {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "parts"}


def _share_text(text: str, mesh: Mesh) -> str:
    """The leader's `text` on every rank of the sample group."""
    data = text.encode()
    length = torch.tensor([len(data)], device=mesh.device)
    _broadcast(length, mesh)
    content = torch.empty(int(length), dtype=torch.uint8, device=mesh.device)
    if mesh.is_leader:
        content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    _broadcast(content, mesh)
    return bytes(content.cpu().numpy()).decode()


def _broadcast(tensor: Tensor, mesh: Mesh) -> None:
    with naming("broadcast of a batch", mesh.sample_group):
        dist.broadcast(tensor, mesh.leader, group=mesh.sample_group)


def compare_orders(identity: Mapping[str, Any], mesh: Mesh) -> None:
    """See that all ranks read one order: each has loaded the manifests and the views by itself.

    Args:
        identity: `DataPlan.identity` of this rank.
        mesh: all ranks of it call.

    Raises:
        ParallelError: ranks differ; the message has the fields in which they do, and the ranks.
    """
    if mesh.world_size == 1:
        return
    fields = flat({**DEFAULTS, **identity})
    found: list[str] = []
    for held in ({"the list of fields": sorted(fields)}, {name: fields[name] for name in sorted(fields)}):
        differs = _differences(held.values(), dist.group.WORLD, mesh.device)
        for name, ranks in zip(held, differs.T, strict=True):
            if ranks.any():
                found.append(f"{name} (that of rank 0 is not that of {_ranks(ranks.nonzero().flatten().tolist())})")
        if found:
            raise ParallelError(
                f"ranks read other orders of samples: they differ in {'; '.join(found)}. Give every node the same datasets and "
                "views, let nothing change them while a run starts, and start again"
            )


def held_tensors(models: Mapping[str, nn.Module], roles: Iterable[str]) -> dict[str, Tensor]:
    """Name -> tensor of all that is stored of the models in `roles`: parameters, and buffers that no gradient moves, such as
    codebooks. Parameters are themselves, so that shards of ZeRO 3 are known."""
    return {f"{role}.{name}": value for role in roles for name, value in models[role].state_dict(keep_vars=True).items()}


def compare_holdings(step: int, turn: int, batches: Iterable[Batch], weights: Mapping[str, Tensor], mesh: Mesh) -> None:
    """See that ranks which share samples hold the same batches, and the context ranks among them the same weights and buffers.

    Digests are of evenly spaced elements, bit by bit; of the parameters a few at a time, in turn. Buffers, which no gradient
    keeps equal, are few, and all are looked at. Weights that ZeRO 3 shards are on no rank whole and have no double that could
    differ.

    Args:
        step: the number of the optimizer step, for the message.
        turn: how many comparisons there were before; says which parameters are looked at.
        batches: the micro-batches of the step.
        weights: name -> parameter or buffer, in one order on all ranks, as `held_tensors` gives them.
        mesh: all ranks of it call.

    Raises:
        ParallelError: ranks differ; the message has the first thing in which they do.
    """
    if mesh.sample_degree == 1:
        return
    read: dict[str, Any] = {}
    for index, batch in enumerate(batches):
        read |= {f"{name} of micro-batch {index}": value for name, value in _held(batch).items()}
        for number, part in enumerate(batch.parts):
            read |= {f"{name} of part {number} of micro-batch {index}": value for name, value in _held(part).items()}
    _compare(step, read, mesh.sample_group, mesh.device)
    parameters = {name: weight for name, weight in weights.items() if isinstance(weight, nn.Parameter)}
    whole = [name for name, weight in parameters.items() if weight.shape == getattr(weight, "ds_shape", weight.shape)]
    looked_at = {whole[(turn * _WEIGHTS_A_TIME + index) % len(whole)] for index in range(_WEIGHTS_A_TIME) if whole}
    held = {f"weight {name}": weights[name] for name in whole if name in looked_at}
    held |= {f"buffer {name}": value for name, value in weights.items() if name not in parameters}
    if mesh.context_degree > 1 and held:
        _compare(step, held, mesh.context_group, mesh.device)


def _compare(step: int, held: Mapping[str, Any], group: dist.ProcessGroup, device: torch.device) -> None:
    differs = _differences(held.values(), group, device)
    if not differs.any():
        return
    ranks = dist.get_process_group_ranks(group)
    thing = int(differs.any(dim=0).nonzero()[0])
    others = _ranks([ranks[index] for index in differs[:, thing].nonzero().flatten().tolist()])
    raise ParallelError(
        f"after step {step} {others} and rank {ranks[0]} differ in "
        f"{list(held)[thing]}, which ranks that share samples must hold alike: the run cannot be trusted from here. Resume "
        "from the last checkpoint; if it happens again, look for draws or kernels that depend on the rank, or for a faulty "
        "device."
    )


def _differences(values: Iterable[Any], group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Whether what a rank of the group holds is other than what its first one holds: bool `(ranks, values)`, on the CPU."""
    mine = torch.tensor([digest(value) for value in values], device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with naming("comparison of digests", group):
        dist.all_gather(found, mine, group=group)
    return (torch.stack(found) != found[0]).cpu()


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def digest(value: Any) -> int:
    """63 bits of a tensor (up to 65,536 of its elements, evenly spaced, with type and shape) or of what JSON can write."""
    if not isinstance(value, Tensor):
        return _hash(json.dumps(value).encode())
    flat = value.detach().flatten()
    sample = flat[:: max(1, -(-flat.numel() // _SAMPLED))].contiguous().cpu()
    return _hash(f"{value.dtype} {tuple(value.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
