"""What the models beside the generators share (discriminators, perceptual networks): they run whole on each device, their
weights may lie in one local file, and no public `config.json` describes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError
from videofm.models.bind import count_once
from videofm.models.io import load_weights, read_weights
from videofm.models.spec import KeyMap, Pair, ParallelOptions


class PlainAdapter(KeyMap):
    """A `KeyMap` whose public config is our own config, with the name of the public class.

    Args:
        pairs: (ours, public) templates.
        public_class: the class of the public implementation.
        config: our config dataclass.
        dropped: endings of public keys that carry nothing; left out on the way in.
    """

    def __init__(self, pairs: Sequence[Pair], public_class: str, config: type, dropped: tuple[str, ...] = ()) -> None:
        super().__init__(pairs)
        self.public_class, self._config, self._dropped = public_class, config, dropped

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A public state dict under our names.

        Raises:
            CheckpointError: a key that the public layout of this model does not have.
        """
        return super().from_public({key: tensor for key, tensor in state_dict.items() if not key.endswith(self._dropped)})

    def public_config(self, config: Any) -> dict[str, Any]:
        """Our fields, and the public class under `_class_name`."""
        return {"_class_name": self.public_class, **dataclasses.asdict(config)}

    def config_from_public(self, config: Mapping[str, Any]) -> Any:
        """The inverse of `public_config`.

        Raises:
            ConfigError: another class, or fields that our config does not have.
        """
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        name = values.pop("_class_name", None)
        known = {field.name for field in dataclasses.fields(self._config)}
        if name != self.public_class or not set(values) <= known:
            raise ConfigError(
                f"not a config of {self.public_class}: class {name!r}, unknown keys {sorted(set(values) - known)}. "
                f"There are: {', '.join(sorted(known))}."
            )
        return self._config(**values)


def whole(model: nn.Module, mesh: Any = None, options: ParallelOptions | None = None) -> nn.Module:
    """The `parallelize` of a model that sees whole clips on each rank: `model`, with gradients that context ranks share."""
    count_once(model, mesh)
    return model


def frozen(model: nn.Module, weights: str | None, rule: str) -> nn.Module:
    """`model` without gradients and in eval mode, with the weights of a local file unless it is on the meta device. In float32.

    Args:
        model: a fresh model.
        weights: a safetensors file in our layout; None keeps the fresh weights.
        rule: what such a file must hold and how to get one; ends every message.

    Raises:
        CheckpointError: the file is absent, damaged, or of another model.
    """
    device = next(model.parameters()).device
    if weights is not None and device.type != "meta":
        try:
            tensors = {key: tensor.float() for key, tensor in read_weights(Path(weights), device).items()}
            load_weights(model, tensors, weights)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {rule}") from error
    return model.requires_grad_(False).eval()
