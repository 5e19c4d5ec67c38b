"""What blocks of a transformer do about time and memory: recompute, compile, keep activations on the host.

All three wrap the `forward` of a block on the instance, from the inside out: recomputation, compilation, offload. Modules,
parameters and state dicts keep their names. The policy of `selective` is that of torchtitan and NeMo-Automodel.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from videofm.errors import ConfigError
from videofm.models.spec import ParallelOptions

ATTENTION_OPS = frozenset(
    {
        "videofm::attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "flash_attn::_flash_attn_forward",
        "flash_attn_3::fwd",
    }
)
"""Operators whose results `selective` keeps: the largest products, and where ranks share a sequence, the communication."""

PRODUCT_OPS = frozenset({"aten::mm", "aten::addmm"})
"""Operators of which `selective` keeps every second call."""

MIN_OFFLOADED_BYTES = 2**20
"""Smaller tensors stay where they are: a copy of them costs more than it frees."""

MAX_GRAPHS = 64
"""Variants of a block that are compiled before torch runs further ones uncompiled, with a warning."""

Forward = Callable[..., Tensor]
Wrapper = Callable[[Forward], Forward]
Packed = tuple[Tensor, torch.device | None]
"""A tensor, and the device that it comes from if it was moved."""


def treat_blocks(blocks: Iterable[nn.Module], options: ParallelOptions) -> None:
    """Make each of `blocks` recompute, compile and offload as `options` say, in place; what was set before is undone.

    Args:
        blocks: transformer blocks on their device, with attention bound.
        options: `compile`, `activation_checkpointing`, `checkpoint_every_blocks` and `offload_activations` are read.

    Raises:
        ConfigError: there is no C++ compiler for `compile`, or no GPU to offload from.
    """
    for index, block in enumerate(blocks):
        device = next(block.parameters()).device
        vars(block).pop("forward", None)
        wrappers: list[Wrapper] = []
        if options.activation_checkpointing != "none" and index % options.checkpoint_every_blocks == 0:
            wrappers.append(partial(recomputed, selective=options.activation_checkpointing == "selective"))
        if options.compile:
            check_compiler(device)
            wrappers.append(compiled)
        if options.offload_activations:
            check_offload(device)
            wrappers.append(partial(offloaded, block=block))
        if wrappers:
            block.forward = Wrapped(block.forward, wrappers)  # type: ignore[method-assign]


class Wrapped:
    """A block's `forward` inside `wrappers`, the first innermost.

    They are put on anew when the block is copied: closures would go on to call the original's `forward`.
    """

    def __init__(self, forward: Forward, wrappers: list[Wrapper]) -> None:
        self._forward, self._wrappers = forward, wrappers
        for wrap in wrappers:
            forward = wrap(forward)
        self._call = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """What `forward` gives."""
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:
        return Wrapped(deepcopy(self._forward, memo), deepcopy(self._wrappers, memo))


def recomputed(forward: Forward, selective: bool) -> Forward:
    """`forward`, whose intermediate results the backward pass computes again, from its arguments and what `selective` keeps.

    Gradients are those of `forward` bit for bit where its kernels are deterministic. It draws no random numbers (modules are
    deterministic, see `train.build`), so no state of a generator is saved and restored.
    """
    contexts: dict[str, Any] = {"context_fn": selective_contexts} if selective else {}

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts, **kwargs)

    return run


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a block's forward pass and of its recomputation: they keep, then reuse, what `EverySecondProduct` says."""
    return create_selective_checkpoint_contexts(EverySecondProduct())


class EverySecondProduct:
    """Keeps results of attention and of every second matrix product; norms, modulation, activations and RoPE are recomputed.

    The second of each two is kept: in a feed-forward that is the narrow one. One object counts the products of one pass through
    a block, and of its recomputation.
    """

    def __init__(self) -> None:
        self._num_products = {False: 0, True: 0}

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """What happens to the result of `op`; `ctx.is_recompute` tells in which pass."""
        name = op.name().partition(".")[0]
        if name in PRODUCT_OPS:
            self._num_products[ctx.is_recompute] += 1
            kept = self._num_products[ctx.is_recompute] % 2 == 0
        else:
            kept = name in ATTENTION_OPS
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def offloaded(forward: Forward, block: nn.Module) -> Forward:
    """`forward` of `block`, with what autograd keeps of it for the backward pass in pinned host memory.

    Parameters stay, and so do all arguments but the first: blocks share them. Copies run in the order of the stream that
    computes: nothing waits on the host, and nothing overlaps with them. What `selective` keeps is not autograd's and stays on
    the device; of such a block its input moves. Under autocast, weights in its dtype are results as others are, and move.
    """

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared = _storages([*block.parameters(), *args, *kwargs.values()])

        def pack(tensor: Tensor) -> Packed:
            if tensor.nbytes < MIN_OFFLOADED_BYTES or tensor.untyped_storage().data_ptr() in shared:
                return tensor, None
            return _to_host(tensor), tensor.device

        with saved_tensors_hooks(pack, _to_device):
            return forward(x, *args, **kwargs)

    return run


def _storages(values: Iterable[Any]) -> set[int]:
    """Addresses of the memory of tensors, and of those in dataclasses such as a rotary table."""
    found: set[int] = set()
    for value in values:
        if isinstance(value, Tensor):
            found.add(value.untyped_storage().data_ptr())
        elif is_dataclass(value):
            found |= _storages(vars(value).values())
    return found


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _to_device(packed: Packed) -> Tensor:
    tensor, device = packed
    return tensor if device is None else tensor.to(device, non_blocking=True)


def compiled(forward: Forward) -> Forward:
    """`forward` as a graph that all blocks of a model share. The second shape of a run makes a graph for all further ones.

    Some sizes still ask for their own (a batch of one, a noise level a token); torch gives up silently after eight graphs of a
    function, which is raised to `MAX_GRAPHS`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)  # type: ignore[attr-defined]
    return torch.compile(forward)


def check_offload(device: torch.device) -> None:
    """Refuse to offload where tensors are on the host already.

    Raises:
        ConfigError: `device` is no GPU.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"parallel.offload_activations is true, but the model is on {device.type}: its activations are in host memory "
            "already. Set it to false."
        )


def check_compiler(device: torch.device) -> None:
    """Refuse to compile for the CPU where no C++ compiler is, which torch would find out in the first step.

    Raises:
        ConfigError: the one that torch would call is not there.
    """
    name = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        raise ConfigError(
            f"trainer.compile is true, but there is no C++ compiler {name!r} here: install g++, set the environment variable "
            "CXX to one that is there, or set trainer.compile to false."
        )
