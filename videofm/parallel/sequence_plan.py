"""Where the tokens of a model's forward split over the context ranks, and where they meet again: data about a model.

Every context rank calls the model with the same whole arguments and gets the same whole result, so objectives and samplers do
not know that the inside is shared. Between entry and exit a rank has its tokens only; attention alone crosses ranks.

The gradient. Each rank computes the whole loss from the whole result, and the way back through the exit takes the rank's own
tokens: a parameter's gradient is then this rank's part of a sum over the context group, which the engine makes. Adding what the
ranks send back at the exit would count every token as often as there are ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from videofm.attention.documents import Documents
from videofm.attention.layout import SequenceLayout
from videofm.attention.strategies.place import SequencePlace
from videofm.errors import ParallelError


@dataclass(frozen=True)
class SequencePlan:
    """`split` names the arguments of `forward` that hold something a token, and the dim that runs over tokens; `gather` is that
    dim of the result, a tensor.

    The first argument of `split` says how many tokens there are. An argument without that dim, such as one noise level a
    sample, is the same for all tokens and goes whole to every rank; an optional one may be None or left out. Arguments that are
    `Documents` follow the tokens by themselves.
    """

    split: Mapping[str, int]
    gather: int

    def apply(self, model: nn.Module, place: SequencePlace) -> None:
        """Make `model` split at entry and gather at exit; attention that was wrapped with `place` knows the layout.

        Args:
            model: its attention is bound already.
            place: this rank's place in the context group, of which it keeps the layout of the current call.

        Raises:
            ParallelError: when the model is called with arguments that have different numbers of tokens.
        """
        signature = inspect.signature(model.forward)
        assert self.split.keys() <= signature.parameters.keys(), f"{type(model).__name__} has not all of {list(self.split)}"

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            call = signature.bind(*args, **kwargs)
            place.layout = layout = self._layout(call.arguments, place)
            for name, value in self._present(call.arguments).items():
                dim = self.split[name]
                if value.ndim > dim:
                    call.arguments[name] = layout.split(value, dim, place.context_rank)
            for name, value in call.arguments.items():
                if isinstance(value, Documents):
                    call.arguments[name] = value.split(layout, place.context_rank)
            return call.args, call.kwargs

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor) -> Tensor:
            assert place.layout is not None, "entry has set it"
            return gather_tokens(tokens, place.layout, self.gather, place.context_rank, place.context)

        model.register_forward_pre_hook(enter, with_kwargs=True)
        model.register_forward_hook(leave, with_kwargs=True)

    def _layout(self, arguments: Mapping[str, Any], place: SequencePlace) -> SequenceLayout:
        present = self._present(arguments)
        sizes = {name: value.shape[self.split[name]] for name, value in present.items() if value.ndim > self.split[name]}
        if len(set(sizes.values())) != 1:
            found = ", ".join(f"{name} {size} along dim {self.split[name]}" for name, size in sizes.items())
            raise ParallelError(f"arguments with different numbers of tokens cannot be split over context ranks: {found}.")
        length, num_inner = next(iter(sizes.values())), place.ulysses_degree
        return SequenceLayout.contiguous(length, place.context_degree // num_inner, num_inner)

    def _present(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """The arguments of `split` that the call has."""
        return {name: arguments[name] for name in self.split if arguments.get(name) is not None}


def gather_tokens(tokens: Tensor, layout: SequenceLayout, dim: int, rank: int, group: dist.ProcessGroup) -> Tensor:
    """The whole of which each rank of `group` holds `tokens`; the way back is the rank's own slice (see the head of this file).

    Args:
        tokens: this rank's part, `layout.lengths[rank]` long along `dim`.
        layout: of the whole.
        dim: runs over tokens.
        rank: of this process in `group`.
        group: the context group. All its ranks call this.
    """
    gathered: Tensor = _GatherTokens.apply(tokens, layout, dim, rank, group)
    return gathered


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: SequenceLayout, dim: int, rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.layout, ctx.dim, ctx.rank = layout, dim, rank
        longest, lengths = max(layout.lengths), layout.lengths
        shape = list(tokens.shape)
        shape[dim] = longest
        padded = tokens.new_zeros(shape)  # gloo gathers equal sizes only
        padded.narrow(dim, 0, lengths[rank]).copy_(tokens)
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=group)
        return layout.join([part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)], dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.layout.split(grads[0], ctx.dim, ctx.rank).contiguous(), None, None, None, None
