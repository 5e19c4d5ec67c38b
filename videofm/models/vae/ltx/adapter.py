"""Between our LTX VAE, `AutoencoderKLLTXVideo` of diffusers, and the original single file (spec B.3, B.7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from videofm.errors import ConfigError
from videofm.models.spec import ONE_NUMBER, KeyMap, Pair, TensorShapes, most_alike, tensor_shapes
from videofm.models.vae.ltx import original
from videofm.models.vae.ltx.config import DOWNSAMPLE_STRIDES, SIZES, LTXVAEConfig
from videofm.models.vae.ltx.model import LTXVideoVAE

PUBLIC_CLASS = "AutoencoderKLLTXVideo"
_PROVENANCE = ("_diffusers_version", "_name_or_path")
_RESIDUAL_BLOCK, _CONV_BLOCK = "LTXVideo095DownBlock3D", "LTXVideoDownBlock3D"


def _res_block(ours: str, public: str) -> list[tuple[str, str]]:
    return [
        (f"{ours}.conv{{k}}.{{p}}", f"{public}.conv{{k}}.conv.{{p}}"),
        (f"{ours}.shortcut_norm.{{p}}", f"{public}.norm3.{{p}}"),
        (f"{ours}.shortcut.{{p}}", f"{public}.conv_shortcut.conv.{{p}}"),
        (f"{ours}.scale_shift_table", f"{public}.scale_shift_table"),
        (f"{ours}.noise_scale{{k}}", f"{public}.per_channel_scale{{k}}"),
    ]


def _embedder(ours: str, public: str) -> tuple[str, str]:
    return f"{ours}.linear{{k}}.{{p}}", f"{public}.time_embedder.timestep_embedder.linear_{{k}}.{{p}}"


_PAIRS: list[Pair] = [
    ("latents_mean", "latents_mean"),
    ("latents_std", "latents_std"),
    ("encoder.conv_in.{p}", "encoder.conv_in.conv.{p}"),
    *_res_block("encoder.stages.{i}.blocks.{j}", "encoder.down_blocks.{i}.resnets.{j}"),
    ("encoder.stages.{i}.downsample.{p}", "encoder.down_blocks.{i}.downsamplers.0.conv.{p}"),
    ("encoder.stages.{i}.downsample.conv.{p}", "encoder.down_blocks.{i}.downsamplers.0.conv.conv.{p}"),
    *_res_block("encoder.stages.{i}.widen", "encoder.down_blocks.{i}.conv_out"),
    *_res_block("encoder.middle.{j}", "encoder.mid_block.resnets.{j}"),
    ("encoder.conv_out.{p}", "encoder.conv_out.conv.{p}"),
    ("decoder.conv_in.{p}", "decoder.conv_in.conv.{p}"),
    _embedder("decoder.middle_time_embed", "decoder.mid_block"),
    *_res_block("decoder.middle.{j}", "decoder.mid_block.resnets.{j}"),
    _embedder("decoder.stages.{i}.time_embed", "decoder.up_blocks.{i}"),
    *_res_block("decoder.stages.{i}.widen", "decoder.up_blocks.{i}.conv_in"),
    ("decoder.stages.{i}.upsample.conv.{p}", "decoder.up_blocks.{i}.upsamplers.0.conv.conv.{p}"),
    *_res_block("decoder.stages.{i}.blocks.{j}", "decoder.up_blocks.{i}.resnets.{j}"),
    ("decoder.time_scale", "decoder.timestep_scale_multiplier", ONE_NUMBER),
    _embedder("decoder.out_time_embed", "decoder"),
    ("decoder.scale_shift_table", "decoder.scale_shift_table"),
    ("decoder.conv_out.{p}", "decoder.conv_out.conv.{p}"),
]


class LTXVAEAdapter(KeyMap):
    """Tensor names and config of the VAE, both ways: those of diffusers, and those of the original single file."""

    public_class = PUBLIC_CLASS
    original_component = "vae"

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

    def to_original(self, state_dict: Mapping[str, Tensor], config: LTXVAEConfig, prefix: str = "") -> dict[str, Tensor]:
        """Our state dict in the layout of the original single file; see `original.to_original`."""
        return original.to_original(state_dict, config, prefix)

    def from_original(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The VAE of an original single file in our layout; see `original.from_original`."""
        return original.from_original(state_dict)

    def original_config(self, config: LTXVAEConfig) -> dict[str, Any]:
        """The `vae` part of the config in the metadata of an original single file; see `original.original_config`."""
        return original.original_config(config)

    def config_from_original(self, config: Mapping[str, Any]) -> LTXVAEConfig:
        """Our config for that of an original single file; the inverse of `original_config`."""
        return original.config_from_original(config)

    def looks_like(self, state_dict: Mapping[str, Tensor]) -> str | None:
        """The size whose tensors have these names and shapes, a tenth of them apart; None if there is none.

        Args:
            state_dict: in our layout.
        """
        return most_alike(state_dict, _shapes_of_sizes())

    def public_config(self, config: LTXVAEConfig) -> dict[str, Any]:
        """The `config.json` of diffusers; its decoder lists run from fine to coarse."""
        num_stages = len(config.encoder_downsample)
        block = _RESIDUAL_BLOCK if config.residual_downsample else _CONV_BLOCK
        kinds = config.encoder_downsample if config.residual_downsample else ("conv",) * num_stages
        return {
            "_class_name": PUBLIC_CLASS,
            "in_channels": config.in_channels,
            "out_channels": config.in_channels,
            "latent_channels": config.latent_channels,
            "block_out_channels": list(config.encoder_widths),
            "down_block_types": [block] * num_stages,
            "layers_per_block": list(config.encoder_depths),
            "spatio_temporal_scaling": [kind != "none" for kind in config.encoder_downsample],
            "downsample_type": list(kinds),
            "decoder_block_out_channels": list(reversed(config.decoder_widths)),
            "decoder_layers_per_block": list(reversed(config.decoder_depths)),
            "decoder_spatio_temporal_scaling": list(reversed(config.decoder_upsample)),
            "decoder_inject_noise": list(reversed(config.inject_noise)),
            "upsample_residual": list(reversed(config.upsample_residual)),
            "upsample_factor": list(reversed(config.upsample_factor)),
            "timestep_conditioning": config.timestep_conditioning,
            "patch_size": config.patch_size,
            "patch_size_t": 1,
            "resnet_norm_eps": config.norm_eps,
            "scaling_factor": config.scaling_factor,
            "encoder_causal": config.encoder_causal,
            "decoder_causal": config.decoder_causal,
            "spatial_compression_ratio": config.compression.height,
            "temporal_compression_ratio": config.compression.time,
        }

    def config_from_public(self, config: Mapping[str, Any]) -> LTXVAEConfig:
        """Our config for a diffusers `config.json`; keys that it lacks have the defaults of diffusers (those of 0.9.0).

        Raises:
            ConfigError: a value that this model does not have.
        """
        default = self.public_config(LTXVAEConfig())
        full = default | {key: value for key, value in config.items() if value is not None}
        unknown = [key for key in config if key not in default and key not in _PROVENANCE]
        if (
            unknown
            or full["_class_name"] != PUBLIC_CLASS
            or full["patch_size_t"] != 1
            or full["in_channels"] != full["out_channels"]
        ):
            raise ConfigError(
                f"not a config of {PUBLIC_CLASS} that vae/ltx can hold: class {full['_class_name']}, patch_size_t "
                f"{full['patch_size_t']} (must be 1), in_channels {full['in_channels']} and out_channels "
                f"{full['out_channels']} (must be equal), unknown keys {unknown}."
            )
        scaled = zip(full["spatio_temporal_scaling"], _downsample_kinds(full), strict=False)
        return LTXVAEConfig(
            latent_channels=full["latent_channels"],
            in_channels=full["in_channels"],
            patch_size=full["patch_size"],
            encoder_widths=tuple(full["block_out_channels"]),
            encoder_depths=tuple(full["layers_per_block"]),
            encoder_downsample=tuple(kind if scale else "none" for scale, kind in scaled),
            decoder_widths=tuple(reversed(full["decoder_block_out_channels"])),
            decoder_depths=tuple(reversed(full["decoder_layers_per_block"])),
            decoder_upsample=tuple(reversed(full["decoder_spatio_temporal_scaling"])),
            upsample_factor=tuple(reversed(full["upsample_factor"])),
            upsample_residual=tuple(reversed(full["upsample_residual"])),
            inject_noise=tuple(reversed(full["decoder_inject_noise"])),
            timestep_conditioning=full["timestep_conditioning"],
            encoder_causal=full["encoder_causal"],
            decoder_causal=full["decoder_causal"],
            norm_eps=full["resnet_norm_eps"],
            scaling_factor=full["scaling_factor"],
        )


def _downsample_kinds(public: Mapping[str, Any]) -> list[str]:
    blocks = set(public["down_block_types"])
    if blocks == {_CONV_BLOCK}:
        return ["conv"] * len(public["down_block_types"])
    kinds = list(public["downsample_type"])
    if blocks != {_RESIDUAL_BLOCK} or not set(kinds) <= set(DOWNSAMPLE_STRIDES) - {"none", "conv"}:
        raise ConfigError(
            f"down_block_types {sorted(blocks)} with downsample_type {kinds} is no released family of the LTX VAE."
        )
    return kinds


@cache
def _shapes_of_sizes() -> dict[str, TensorShapes]:
    with torch.device("meta"):
        return {size: tensor_shapes(LTXVideoVAE(config).state_dict()) for size, config in SIZES.items()}


ADAPTER = LTXVAEAdapter(_PAIRS)
