"""The column and row parallel linear layers of megatron-core, made to stand where an `nn.Linear` stood.

megatron-core's return a pair, keep an extra state in the state dict, know autocast on CUDA only, and want an initialisation.
Here they take the weights of the layer they replace, return a tensor, and compute in the dtype of autocast on every device. It
takes seconds to import: what needs it only for a split model reaches it through `parallel.tensor`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from videofm.parallel.shards import TensorShard, split_parameter

with warnings.catch_warnings():
    # megatron-core tells at import which optional CUDA packages it does without.
    warnings.simplefilter("ignore")
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class _Plain(nn.Module):
    """What both layers share; stands before megatron-core's class in the order of resolution."""

    tp_group: Any
    # Of megatron-core's override they would leave a None in every state dict, for Transformer Engine.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    @torch.compiler.disable  # a compiled block calls it from outside of its graphs, which then hold no communication
    def forward(self, x: Tensor) -> Tensor:
        """`(B, L, D)` -> `(B, L, E)`; which of them is a share is said by the class."""
        y, bias = super().forward(x)  # type: ignore[misc]  # the bias comes back, for the caller to add it once
        return y if bias is None else y + bias.to(y.dtype)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        device, kwargs["tp_group"] = input.device.type, self.tp_group
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight.to(dtype)
        # The casts are done, and megatron-core's function would not see autocast again in its backward pass on the CPU.
        with torch.autocast(device, enabled=False):
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]


class ColumnLinear(_Plain, ColumnParallelLinear):
    """Whole input `(B, L, D)` -> this rank's share of the output features; the gradient of the input is all-reduced."""


class RowLinear(_Plain, RowParallelLinear):
    """This rank's share of the input features -> the whole output, all-reduced, with the bias added once behind that."""

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Any:
        # megatron-core reduces in place. Selective checkpointing may keep the product and would reduce it a second time.
        return super()._forward_impl(*args, **kwargs).clone()


def column(linear: nn.Linear, shards: Mapping[str, TensorShard], mesh: Any) -> nn.Module:
    """`linear` with its output features split over the tensor ranks of `mesh`, as `shards` says of each parameter."""
    return _in_place_of(linear, ColumnLinear, shards, mesh)


def row(linear: nn.Linear, shards: Mapping[str, TensorShard], mesh: Any) -> nn.Module:
    """`linear` with its input features split over the tensor ranks of `mesh`; every rank holds the bias."""
    return _in_place_of(linear, RowLinear, shards, mesh, input_is_parallel=True)


def _in_place_of(linear: nn.Linear, kind: Any, shards: Mapping[str, TensorShard], mesh: Any, **options: bool) -> nn.Module:
    config = ModelParallelConfig(
        use_cpu_initialization=True,  # else it asks for a CUDA device
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        params_dtype=linear.weight.dtype,
    )
    with torch.device("meta"):  # the parameters that it makes are replaced
        layer = kind(
            linear.in_features, linear.out_features, config=config, init_method=None, bias=linear.bias is not None,
            skip_bias_add=True, tp_group=mesh.tensor_group, **options,
        )  # fmt: skip
    for name, whole in linear.named_parameters():
        own = split_parameter(whole, shards[name], mesh) if name in shards else whole
        assert own.shape == getattr(layer, name).shape, f"{name}: {tuple(own.shape)}"
        setattr(layer, name, own)
    layer._load_state_dict_pre_hooks.clear()  # they would add the extra state to what is loaded
    return layer.train(linear.training)
