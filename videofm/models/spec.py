"""What every model folder is made of, besides `ModelSpec` of `types`: key maps, parallel options, checks of a config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videofm.errors import CheckpointError

_FIELDS = {"p": "weight|bias"}
"""Placeholders of a template that do not stand for digits."""


@dataclass(frozen=True)
class ParallelOptions:
    """How a model is laid out over devices, from the user's configuration.

    `attention` and `cross_attention` are backends for self-attention (never masked) and for attention to text (masked);
    `dtype` is the one that attention computes in (that of autocast), None for the dtype of the weights.
    """

    attention: str = "auto"
    cross_attention: str = "auto"
    dtype: torch.dtype | None = None


class KeyMap:
    """A bijection between our tensor names and public ones, written as pairs of templates.

    `{i}` in a template stands for digits and `{p}` for `weight` or `bias`; both sides of a pair use the same placeholders. A
    key that no template matches is an error in both directions, so nothing is dropped or invented.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._to_public = [(_compile(ours), public) for ours, public in pairs]
        self._from_public = [(_compile(public), ours) for ours, public in pairs]

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under public names.

        Raises:
            CheckpointError: a key that this model does not have.
        """
        return _rename(state_dict, self._to_public, "is not a tensor of this model")

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A public state dict under our names.

        Raises:
            CheckpointError: a key that the public layout of this model does not have.
        """
        return _rename(state_dict, self._from_public, "is not in the public layout of this model")


def _compile(template: str) -> re.Pattern[str]:
    literal_or_field = re.split(r"\{(\w+)\}", template)
    parts = [
        re.escape(part) if n % 2 == 0 else f"(?P<{part}>{_FIELDS.get(part, '[0-9]+')})"
        for n, part in enumerate(literal_or_field)
    ]
    return re.compile("".join(parts))


def _rename(state_dict: Mapping[str, Tensor], rules: list[tuple[re.Pattern[str], str]], complaint: str) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for key, tensor in state_dict.items():
        matches = [target.format(**m.groupdict()) for pattern, target in rules if (m := pattern.fullmatch(key))]
        if len(matches) != 1:
            unknown.append(key)
            continue
        renamed[matches[0]] = tensor
    if unknown:
        raise CheckpointError(f"{list_keys(unknown)} {complaint}.")
    return renamed


def list_keys(keys: Sequence[str], limit: int = 5) -> str:
    """The first `limit` keys, and how many more there are."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def split_degrees(mesh: Any) -> str:
    """The degrees of `mesh` that split a sample or a model and are above 1, in words; empty when there is none or no mesh."""
    names = ("context_degree", "tensor_degree", "pipe_degree")
    degrees = {name: getattr(mesh, name, 1) for name in names}
    return ", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
