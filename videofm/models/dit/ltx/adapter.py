"""Between our LTX transformer, `LTXVideoTransformer3DModel` of diffusers, and the original single file (spec C.1, C.6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from videofm.errors import ConfigError
from videofm.models.dit.ltx import original
from videofm.models.dit.ltx.config import SIZES, LTXDiTConfig
from videofm.models.dit.ltx.model import LTXVideoDiT
from videofm.models.spec import KeyMap, TensorShapes, most_alike, tensor_shapes

PUBLIC_CLASS = "LTXVideoTransformer3DModel"


_PAIRS = original.pairs("proj_in", "time_embed", "norm_{x}")

_PROVENANCE = ("_diffusers_version", "_name_or_path")
"""Public keys that say where a file comes from and nothing about the model."""

_FIXED = {
    "patch_size": 1,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "attention_out_bias": True,
}
"""Public options that every release sets alike, and that our model therefore does not have."""


class LTXDiTAdapter(KeyMap):
    """Tensor names and config of the transformer, both ways: those of diffusers, and those of the original single file."""

    public_class = PUBLIC_CLASS
    original_component = "transformer"

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of diffusers, or of an original single file (known by its keys), under our names.

        Raises:
            CheckpointError: a key that neither layout has.
        """
        if original.original_keys(state_dict):
            return self.from_original(state_dict)
        return super().from_public(state_dict)

    def original_keys(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are this model's in an original single file; none if it is no such file."""
        return original.original_keys(keys)

    def to_original(
        self, state_dict: Mapping[str, Tensor], config: LTXDiTConfig, prefix: str = original.PREFIX
    ) -> dict[str, Tensor]:
        """Our state dict in the layout of the original single file; see `original.to_original`. Any `config` has one."""
        return original.to_original(state_dict, prefix)

    def from_original(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The transformer of an original single file in our layout; see `original.from_original`."""
        return original.from_original(state_dict)

    def original_config(self, config: LTXDiTConfig) -> dict[str, Any]:
        """The `transformer` part of the config in the metadata of an original file; see `original.original_config`."""
        return original.original_config(config)

    def config_from_original(self, config: Mapping[str, Any]) -> LTXDiTConfig:
        """Our config for that of an original single file; the inverse of `original_config`."""
        return original.config_from_original(config)

    def looks_like(self, state_dict: Mapping[str, Tensor]) -> str | None:
        """The size whose tensors have these names and shapes, a tenth of them apart; None if there is none.

        Args:
            state_dict: in our layout.
        """
        return most_alike(state_dict, _shapes_of_sizes())

    def public_config(self, config: LTXDiTConfig) -> dict[str, Any]:
        """The `config.json` of diffusers.

        Raises:
            ConfigError: `theta` differs from the constant of diffusers.
        """
        if config.theta != LTXDiTConfig.theta:
            raise ConfigError(f"theta {config.theta} cannot be exported: diffusers has {LTXDiTConfig.theta} built in.")
        return {
            "_class_name": PUBLIC_CLASS,
            "in_channels": config.in_channels,
            "out_channels": config.in_channels,
            "num_attention_heads": config.num_heads,
            "attention_head_dim": config.head_width,
            "cross_attention_dim": config.width,
            "num_layers": config.num_layers,
            "norm_eps": config.norm_eps,
            "caption_channels": config.caption_channels,
            **_FIXED,
        }

    def config_from_public(self, config: Mapping[str, Any]) -> LTXDiTConfig:
        """Our config for a diffusers `config.json`; keys that it lacks have the defaults of diffusers (those of 2B).

        Raises:
            ConfigError: a value that this model does not have.
        """
        full = self.public_config(LTXDiTConfig()) | {key: value for key, value in config.items() if value is not None}
        ours = LTXDiTConfig(
            in_channels=full["in_channels"],
            num_layers=full["num_layers"],
            num_heads=full["num_attention_heads"],
            head_width=full["attention_head_dim"],
            caption_channels=full["caption_channels"],
            norm_eps=full["norm_eps"],
        )
        written = self.public_config(ours) | {key: full[key] for key in _PROVENANCE if key in full}
        wrong = [f"{key} {value!r}" for key, value in full.items() if key not in written or written[key] != value]
        if wrong:
            raise ConfigError(f"not a config of {PUBLIC_CLASS} that dit/ltx can hold: {', '.join(wrong)}.")
        return ours


@cache
def _shapes_of_sizes() -> dict[str, TensorShapes]:
    with torch.device("meta"):
        return {size: tensor_shapes(LTXVideoDiT(config).state_dict()) for size, config in SIZES.items()}


ADAPTER = LTXDiTAdapter(_PAIRS)
