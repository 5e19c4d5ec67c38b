"""Features that guide a diffusion transformer (ARLON, arXiv 2410.20502): what is injected, where, and the door in the model.

A transformer has the attribute `injection`, None until `inject_features` puts a module there. Its forward opens the door once
a call, and asks before each block:

    guide = guide_of(self.injection, x, args, features, features_kept)
    for number, block in enumerate(self.blocks):
        x = block(guide(number, x), *args)

The kinds of injection are in `videofm.models.arlon.injection`, reached through the registry: a transformer knows this file
only. Whatever the kind, training starts from the model as it was, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.registry import INJECTIONS, lookup

PREFIX = "injection."
"""How the names of its tensors begin."""
HALVES = ("first_half", "last_half", "all")
"""Words that stand for numbers of blocks; of an odd number either half has the middle block."""

Guide = Callable[[int, Tensor], Tensor]
"""Number of a block and its input `(B, L, D)` -> the input with what the features say."""


@dataclass(frozen=True)
class InjectionSpec:
    """What `inject_features` makes.

    Attributes:
        kind: `adaptive_norm`, `mlp` or `controlnet`.
        blocks: numbers of the blocks that are guided, or one of `HALVES`.
        feature_channels: C of the feature of a token; None takes that of the latents.
        hidden_width: features inside the injection; None takes the width of the model, which a ControlNet needs.
    """

    kind: str = "adaptive_norm"
    blocks: str | tuple[int, ...] = "first_half"
    feature_channels: int | None = None
    hidden_width: int | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any], source: str | Path) -> InjectionSpec:
        """What `dataclasses.asdict` gave, read back.

        Raises:
            CheckpointError: other fields than those of a spec, or values of another type.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping) or set(value) != set(fields):
            wanted = ", ".join(fields)
            raise CheckpointError(f"{source} must describe an injection by {wanted}, not by {value!r}.")
        blocks = value["blocks"]
        numbers = [value["feature_channels"], value["hidden_width"]]
        are_blocks = isinstance(blocks, str) or (_is_list(blocks) and all(map(_is_whole, blocks)))
        if not (isinstance(value["kind"], str) and are_blocks and all(each is None or _is_whole(each) for each in numbers)):
            raise CheckpointError(
                f"{source} describes an injection by {dict(value)!r}: kind is a word, blocks a word or a list of whole "
                "numbers, and feature_channels and hidden_width are whole numbers or null. Copy the file from the run again."
            )
        return cls(**{**value, "blocks": tuple(blocks) if isinstance(blocks, list) else blocks})

    def resolved(self, model: Any) -> InjectionSpec:
        """The same for `model`, in numbers only.

        Raises:
            ConfigError: blocks that the model does not have, or widths below 1.
        """
        config = model.config
        channels = config.in_channels if self.feature_channels is None else self.feature_channels
        width = config.width if self.hidden_width is None else self.hidden_width
        if channels < 1 or width < 1:
            raise ConfigError(
                f"injection.feature_channels {channels} and injection.hidden_width {width} must be at least 1, or null for the "
                "channels of the latents and the width of the model."
            )
        return InjectionSpec(self.kind, _numbers(self.blocks, len(model.blocks)), channels, width)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(blocks: str | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    half = (num_blocks + 1) // 2
    named = {"first_half": range(half), "last_half": range(num_blocks - half, num_blocks), "all": range(num_blocks)}
    if isinstance(blocks, str):
        if blocks not in named:
            raise ConfigError(f"injection.blocks is {blocks!r}: name {', '.join(HALVES)}, or list numbers of blocks.")
        return tuple(named[blocks])
    if not blocks or len(set(blocks)) < len(blocks) or not all(0 <= number < num_blocks for number in blocks):
        raise ConfigError(
            f"injection.blocks is {list(blocks)}: this model has {num_blocks} blocks, numbered 0 to {num_blocks - 1}; name at "
            "least one of them, and each once."
        )
    return tuple(sorted(blocks))


class Injection(nn.Module):
    """What all kinds share: the way in of features, and a layer for each guided block.

    A kind makes `layers`, in the order of `spec.blocks`: `layer(x, side)` is `x` `(B, L, D)` with what `side` says. `side` is
    `(B, L, E)`, the features once they are in; a kind whose `side` changes from block to block overrides `advance`. A module
    has no parameters of its own beside its children's: ZeRO-3 brings those together where a `forward` begins.
    """

    blocks: nn.ModuleList
    """Copies of blocks of the model, if the kind has any; they are bound, split and treated as those are."""
    layers: nn.ModuleList

    def __init__(self, spec: InjectionSpec) -> None:
        super().__init__()
        assert spec.feature_channels is not None and spec.hidden_width is not None, "resolved"
        self.spec, self.side_width = spec, spec.hidden_width
        self.way_in = WayIn(spec.feature_channels, spec.hidden_width)
        self.blocks = nn.ModuleList()
        self.layers = nn.ModuleList()

    def start(self, x: Tensor, side: Tensor) -> Tensor:
        """The first `side`, of what enters the blocks and the features."""
        return side

    def advance(self, place: int, side: Tensor, args: tuple[Any, ...]) -> Tensor:
        """The `side` of the guided block in `place`, of the one before it; `args` are those of a block."""
        return side

    def flops(self, config: Any, num_tokens: int, num_text_tokens: int) -> int:
        """FLOPs of one sample, forward and backward, that come to those of the transformer of `config`.

        Products of the layers, and the copies of blocks. The way in is left out, as the first layer of a transformer is; for
        what counts see `models.flops`.
        """
        linear = [module for module in self.layers.modules() if isinstance(module, nn.Linear)]
        products = sum(6 * num_tokens * module.in_features * module.out_features for module in linear)
        return products + config.flops(num_tokens, num_text_tokens) // config.num_layers * len(self.blocks)

    def guide(self, x: Tensor, args: tuple[Any, ...], features: Tensor | None, kept: Tensor | None) -> Guide:
        """One pass through the model; see `guide_of`, which has checked the arguments."""
        side = self.start(x, self.way_in(x, features, kept))
        places = {number: place for place, number in enumerate(self.spec.blocks)}

        def guided(number: int, x: Tensor) -> Tensor:
            nonlocal side
            if number not in places:
                return x
            place = places[number]
            side = self.advance(place, side, args)
            return self.layers[place](x, side)

        return guided


class WayIn(nn.Module):
    """Features of tokens, or where there are none the learned null feature, in the width of the injection."""

    def __init__(self, feature_channels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_channels, width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.null = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, x: Tensor, features: Tensor | None, kept: Tensor | None) -> Tensor:
        """`features` `(B, L, C)` -> `(B, L, E)`; the null feature where `kept` `(B, L)` is False, everywhere for None.

        `x` `(B, L, D)` gives the shape of the tokens and the dtype.
        """
        null = self.null.to(x.dtype).expand(*x.shape[:2], -1)
        if features is None:
            return null
        side = self.linear(features.to(x.dtype)).to(x.dtype)
        return side if kept is None else torch.where(kept[:, :, None], side, null)


def guide_of(
    injection: nn.Module | None,
    x: Tensor,
    args: tuple[Any, ...],
    features: Tensor | None,
    features_kept: Tensor | None,
) -> Guide:
    """What a transformer asks before each block, in their order, within one call of it; without an injection it does nothing.

    Args:
        injection: of the transformer.
        x: tokens that enter the first block, `(B, L, D)`.
        args: the further arguments of a block.
        features: `(B, L, C)` in the order of the tokens, or None for the null feature everywhere.
        features_kept: `(B, L)` bool, False where the null feature stands in; None keeps all.

    Raises:
        DataError: features for a model that takes none, or of another shape.
    """
    if injection is None:
        if features is not None or features_kept is not None:
            raise DataError(
                "features for a transformer that takes none: build it with models.ROLE.injection (models.inject_features), or "
                "leave features and features_kept out."
            )
        return lambda number, x: x
    assert isinstance(injection, Injection)
    _check(injection.spec, x, features, features_kept)
    return injection.guide(x, args, features, features_kept)


def _check(spec: InjectionSpec, x: Tensor, features: Tensor | None, kept: Tensor | None) -> None:
    shape = (*x.shape[:2], spec.feature_channels)
    if features is not None and tuple(features.shape) != shape:
        raise DataError(
            f"features have shape {tuple(features.shape)}; this injection expects {shape}: one feature a latent token, with "
            "the channels that it was built for (injection.feature_channels)."
        )
    if kept is None:
        return
    if features is None:
        raise DataError("features_kept without features: bring both, or neither for the null feature everywhere.")
    if tuple(kept.shape) != shape[:2] or kept.dtype != torch.bool:
        raise DataError(
            f"features_kept is {kept.dtype} of shape {tuple(kept.shape)}; this injection expects torch.bool of {shape[:2]}."
        )


def inject_features(model: nn.Module, spec: InjectionSpec) -> None:
    """Put an injection into a transformer, in place, beside its weights as they are; it is drawn from torch's generator.

    Args:
        model: a transformer, on any device, before it is laid out over ranks. Gets the attribute `injection`.
        spec: which.

    Raises:
        ConfigError: a model that takes no features or has adapters, no such kind, or blocks that the model does not have. Or
            the model has another injection; with the same one it stays as it is.
    """
    if not hasattr(model, "injection"):
        raise ConfigError(f"{_name(model)} takes no features: an injection is for dit/ltx and dit/step_video.")
    kind = lookup(INJECTIONS, spec.kind, "injection")
    wanted, found = spec.resolved(model), injection_spec(model)
    if found is not None:
        _check_same(wanted, found)
        return
    if getattr(model, "lora", None) is not None:
        raise ConfigError(
            f"{_name(model)} has low-rank adapters, beside which no injection is trained: leave lora out, and set freeze_base "
            "to train the injection alone."
        )
    weight = next(model.parameters())
    with weight.device:
        injection: nn.Module = kind(model, wanted)
    model.injection = injection.to(weight.dtype).train(model.training)


def _check_same(wanted: InjectionSpec, found: InjectionSpec) -> None:
    if wanted != found:
        names = [field.name for field in dataclasses.fields(found)]
        differing = [
            f"{name} {getattr(found, name)!r} there, {getattr(wanted, name)!r} asked for"
            for name in names
            if getattr(wanted, name) != getattr(found, name)
        ]
        raise ConfigError(
            f"the model has another injection already: {'; '.join(differing)}. Leave `injection` out to go on with it, or "
            "start from the model without."
        )


def injection_spec(model: nn.Module) -> InjectionSpec | None:
    """What the injection of `model` is, with its blocks as numbers, or None for a model without one."""
    injection = getattr(model, "injection", None)
    return injection.spec if isinstance(injection, Injection) else None


def freeze_base(model: nn.Module) -> None:
    """Let gradients reach the injection of `model` only.

    Raises:
        ConfigError: it has none.
    """
    if injection_spec(model) is None:
        raise ConfigError(
            f"freeze_base trains the injection alone, and {_name(model)} has none: give it models.ROLE.injection."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(PREFIX))


def block_copies(model: nn.Module) -> Iterable[nn.Module]:
    """Copies of blocks that the injection of `model` holds; none for most kinds, or without one."""
    injection = getattr(model, "injection", None)
    return injection.blocks if isinstance(injection, Injection) else ()


def injection_layers(model: nn.Module) -> Iterable[nn.Module]:
    """The layers by which the injection of `model` enters guided blocks, in the order of these; none without one."""
    injection = getattr(model, "injection", None)
    return injection.layers if isinstance(injection, Injection) else ()


def refuse_injection(model_or_described: nn.Module | Mapping[str, Any], where: str) -> None:
    """Refuse to write a guided model into a layout that has no place for the injection.

    Args:
        model_or_described: the model, or what its `model.json` holds.
        where: whose layout.

    Raises:
        ConfigError: it has an injection.
    """
    described = model_or_described if isinstance(model_or_described, Mapping) else {}
    has = "injection" in described if described else injection_spec(model_or_described) is not None  # type: ignore[arg-type]
    if has:
        raise ConfigError(
            f"this transformer is guided by features (it has an injection), for which {where} has no place, and its weights "
            "alone are another model: sample from the run itself, or export the run that it started from."
        )


def _name(model: nn.Module) -> str:
    return str(getattr(model, "spec_name", type(model).__name__))
