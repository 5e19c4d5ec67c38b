"""What every model folder is made of, besides `ModelSpec` of `types`: key maps, parallel options, checks of a config."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from videofm.errors import CheckpointError

_FIELDS = {"p": "weight|bias"}
"""Placeholders of a template that do not stand for digits."""
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")
"""A part of a tensor's name that counts."""
STATISTICS = ("latents_mean", "latents_std")
_Rule = tuple[re.Pattern[str], str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class ParallelOptions:
    """How a model is laid out over devices, from the user's configuration.

    `attention` and `cross_attention` are backends for self-attention (never masked) and for attention to text (masked),
    `context_strategy` is how self-attention crosses context ranks (see `bind.choose_strategy`);
    `dtype` is the one that attention computes in (that of autocast), None for the dtype of the weights. The others are about
    transformer blocks: `models.recompute.treat_blocks` does what they say, and models without such blocks have no use for them.
    """

    attention: str = "auto"
    cross_attention: str = "auto"
    context_strategy: str = "auto"
    dtype: torch.dtype | None = None
    compile: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    checkpoint_every_blocks: int = 1
    offload_activations: bool = False


@dataclass(frozen=True)
class Layout:
    """How a tensor is stored in public where that is not how we hold it; two functions that undo each other."""

    to_public: Callable[[Tensor], Tensor]
    from_public: Callable[[Tensor], Tensor]


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


AS_IS = Layout(_as_is, _as_is)
CONV2D = Layout(lambda x: x.squeeze(2) if x.ndim == 5 else x, lambda x: x.unsqueeze(2) if x.ndim == 4 else x)
"""Ours `(O, I, 1, kh, kw)`, in public `(O, I, kh, kw)`; biases stay."""

ONE_NUMBER = Layout(lambda x: x.reshape(()), lambda x: x.reshape(1))
"""Of one dim here, because DeepSpeed cannot broadcast a tensor without; without dims in public."""


def pointwise(num_dims: int) -> Layout:
    """Ours is a linear layer `(O, I)`, in public a convolution of size one with `num_dims` dims; biases stay."""
    return Layout(lambda x: x[(...,) + (None,) * num_dims] if x.ndim == 2 else x, lambda x: x.flatten(1) if x.ndim > 1 else x)


Pair = tuple[str, str] | tuple[str, str, Layout]


class KeyMap:
    """A bijection between our tensor names and public ones, written as pairs of templates.

    `{i}` in a template stands for digits and `{p}` for `weight` or `bias`; both sides of a pair use the same placeholders. A
    key that no template matches is an error in both directions, so nothing is dropped or invented.

    Args:
        pairs: (ours, public), and where tensors are stored differently, the `Layout`.
        without_statistics: the public layout has no `latents_mean` and `latents_std`. They are left out on the way there, and
            on the way back are zeros and ones, as many as the tensor of ours with this name has input channels.
        also_read: pairs for the way back only: other names that a public tensor may have.
    """

    def __init__(self, pairs: Sequence[Pair], without_statistics: str | None = None, also_read: Sequence[Pair] = ()) -> None:
        full, read = _with_layouts(pairs), _with_layouts([*pairs, *also_read])
        self._to_public = [(_compile(ours), public, layout.to_public) for ours, public, layout in full]
        self._from_public = [(_compile(public), ours, layout.from_public) for ours, public, layout in read]
        self._without_statistics = without_statistics

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under public names.

        Raises:
            CheckpointError: a key that this model does not have.
        """
        hidden = STATISTICS if self._without_statistics else ()
        shown = {key: tensor for key, tensor in state_dict.items() if key not in hidden}
        return _rename(shown, self._to_public, "is not a tensor of this model")

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A public state dict under our names.

        Raises:
            CheckpointError: a key that the public layout of this model does not have.
        """
        renamed = _rename(state_dict, self._from_public, "is not in the public layout of this model")
        witness = renamed.get(self._without_statistics or "")
        if witness is not None:
            channels = witness.shape[1]
            renamed |= {"latents_mean": witness.new_zeros(channels), "latents_std": witness.new_ones(channels)}
        return renamed


def _with_layouts(pairs: Sequence[Pair]) -> list[tuple[str, str, Layout]]:
    return [(pair[0], pair[1], pair[2] if len(pair) == 3 else AS_IS) for pair in pairs]


def _compile(template: str) -> re.Pattern[str]:
    literal_or_field = re.split(r"\{(\w+)\}", template)
    parts = [
        re.escape(part) if n % 2 == 0 else f"(?P<{part}>{_FIELDS.get(part, '[0-9]+')})"
        for n, part in enumerate(literal_or_field)
    ]
    return re.compile("".join(parts))


def _rename(state_dict: Mapping[str, Tensor], rules: list[_Rule], complaint: str) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for key, tensor in state_dict.items():
        matches = [
            (target.format(**match.groupdict()), convert)
            for pattern, target, convert in rules
            if (match := pattern.fullmatch(key))
        ]
        if len(matches) != 1:
            unknown.append(key)
            continue
        name, convert = matches[0]
        renamed[name] = convert(tensor)
    if unknown:
        raise CheckpointError(f"{list_keys(unknown)} {complaint}.")
    return renamed


TensorShapes = frozenset[tuple[str, torch.Size]]
"""What a state dict looks like: the name and the shape of each of its tensors."""
_ALIKE = 0.9
"""Share of equal (name, shape) pairs, of all in either, from which tensors look like those of a size."""


def tensor_shapes(state_dict: Mapping[str, Tensor]) -> TensorShapes:
    """The names and shapes of the tensors of `state_dict`."""
    return frozenset((key, tensor.shape) for key, tensor in state_dict.items())


def most_alike(state_dict: Mapping[str, Tensor], sizes: Mapping[str, TensorShapes]) -> str | None:
    """The one of `sizes` that has tensors of the names and shapes of `state_dict`, a tenth of them apart; None if none has."""
    given = tensor_shapes(state_dict)
    shares = {size: len(given & shapes) / len(given | shapes) for size, shapes in sizes.items()}
    best = max(shares, key=lambda size: shares[size])
    return best if shares[best] > _ALIKE else None


def list_keys(keys: Sequence[str], limit: int = 5) -> str:
    """The first `limit` keys, and how many more there are."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def list_all_keys(keys: Iterable[str], remarks: Mapping[str, str] | None = None) -> str:
    """Every key, those that differ by numbers only (and have the same remark) in one: `blocks.{0-27}.norm.weight (28)`."""
    groups: dict[tuple[tuple[str, ...], str], list[list[int]]] = {}
    for key in keys:
        group = (tuple(_NUMBER.split(key)), (remarks or {}).get(key, ""))
        groups.setdefault(group, []).append([int(number) for number in _NUMBER.findall(key)])
    listed = []
    for (words, remark), numbers in groups.items():
        ranges = [(min(column), max(column)) for column in zip(*numbers, strict=True)]
        spans = [str(low) if low == high else f"{{{low}-{high}}}" for low, high in ranges]
        name = "".join(itertools.chain(*itertools.zip_longest(words, spans, fillvalue="")))
        listed.append(f"{name} ({len(numbers)}){remark}" if len(numbers) > 1 else name + remark)
    return ", ".join(listed)
