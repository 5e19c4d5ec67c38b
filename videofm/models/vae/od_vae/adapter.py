"""Between our OD-VAE and `CausalVAEModel` of Open-Sora-Plan (spec D.1).

The authors' code names a convolution `X.conv.weight` where it is causal and `X.weight`, without a time dim, where it is 2D. The
config of release 1.2 is what the defaults below hold. Releases before it blend pooling into their resamplers, and their
attention mixes frames with channels; they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from videofm.errors import CheckpointError, ConfigError
from videofm.models.spec import AS_IS, CONV2D, KeyMap, Layout, Pair, pointwise
from videofm.models.vae.od_vae.config import ODVAEConfig

PUBLIC_CLASS = "CausalVAEModel"
_BLOCKS = {"2d": "ResnetBlock2D", "3d": "ResnetBlock3D", "half": "ResnetBlockHalf3D"}
"""The authors published no class for the blocks of variant 2: under this name their code refuses the config."""
_KINDS = {public: kind for kind, public in _BLOCKS.items()}
_BOTH = "Spatial2xTime2x3D"
"""Prefix of the resamplers of space and time."""
_SAME = {"SpatialDownsample2x": "Downsample", "SpatialUpsample2x": "Upsample"}
"""Resamplers that compute the same: a causal convolution of one frame, and the 2D one."""
_RELEASED: dict[str, Any] = {
    "in_channels": 3,
    "num_groups": 32,
    "norm_scope": "clip",
    "t_interpolation": "trilinear",
    "s_interpolation": "trilinear",
    "scaling_factor": 0.18215,
}
"""What the authors' code has fixed. A public config names them where a model of ours differs."""
_IGNORED = ("_diffusers_version", "_name_or_path", "resolution", "loss_type", "loss_params", "lr")
_OPTIONAL = {"use_quant_layer": True, "norm_type": "groupnorm"}
"""Keys of later versions of their code, and the only values that fit."""
_LEVEL = re.compile(r"((?:encoder\.down|decoder\.up)\.[0-9]+)\.")


def _pairs(names: Mapping[str, str], suffix: str, layout: Layout = AS_IS) -> list[Pair]:
    return [(f"{ours}.{{p}}", f"{public}{suffix}.{{p}}", layout) for ours, public in names.items()]


_HALVES = ("encoder", "decoder")
_RES_BLOCKS = {f"{half}.middle.blocks.{j}": f"{half}.mid.block_{j + 1}" for half in _HALVES for j in range(2)} | {
    "encoder.stages.{i}.blocks.{j}": "encoder.down.{i}.block.{j}",
    "decoder.stages.{i}.blocks.{j}": "decoder.up.{i}.block.{j}",
}
_CONVOLUTIONS = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "encoder.stages.{i}.downsample": "encoder.down.{i}.downsample.conv",
    "decoder.stages.{i}.upsample.conv": "decoder.up.{i}.upsample.conv",
    **{f"{half}.{name}": f"{half}.{name}" for half in _HALVES for name in ("conv_in", "conv_out")},
    **{f"{ours}.conv{{k}}": f"{public}.conv{{k}}" for ours, public in _RES_BLOCKS.items()},
    **{f"{ours}.shortcut": f"{public}.nin_shortcut" for ours, public in _RES_BLOCKS.items()},
}
_NORMS = {
    **{f"{ours}.norm{{k}}": f"{public}.norm{{k}}" for ours, public in _RES_BLOCKS.items()},
    **{f"{half}.middle.attention.norm": f"{half}.mid.attn_1.norm" for half in _HALVES},
    **{f"{half}.norm_out": f"{half}.norm_out" for half in _HALVES},
}
_ATTENTION = {
    f"{half}.middle.attention.{ours}": f"{half}.mid.attn_1.{public}"
    for half in _HALVES
    for ours, public in {"q": "q", "k": "k", "v": "v", "out": "proj_out"}.items()
}


class ODVAEAdapter(KeyMap):
    """Tensor names and config of the VAE, both ways. The public layout has no latent statistics."""

    public_class = PUBLIC_CLASS

    def __init__(self) -> None:
        super().__init__(
            [*_pairs(_NORMS, ""), *_pairs(_ATTENTION, ".conv", pointwise(3)), *_pairs(_CONVOLUTIONS, ".conv")],
            without_statistics="post_quant_conv.weight",
            also_read=_pairs(_CONVOLUTIONS, "", CONV2D),
        )

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under the authors' names; see `KeyMap`."""
        public = super().to_public(state_dict)
        for path in [key.removesuffix(".conv.weight") for key in public if _is_2d(key, public)]:
            public[f"{path}.weight"] = public.pop(f"{path}.conv.weight").squeeze(2)  # (O, I, 1, kh, kw) -> (O, I, kh, kw)
            public[f"{path}.bias"] = public.pop(f"{path}.conv.bias")
        return public

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under our names; see `KeyMap`.

        Raises:
            CheckpointError: a key that release 1.2 does not have.
        """
        if old := [key for key in state_dict if key.endswith("mix_factor")]:
            raise CheckpointError(
                f"{old[0]} is not in the public layout of this model: this looks like release 1.1, whose resamplers in time "
                "are other layers. Take the weights of release 1.2 (CausalVAEModel_4x8x8)."
            )
        return super().from_public(state_dict)

    def public_config(self, config: ODVAEConfig) -> dict[str, Any]:
        """The authors' `config.json`; what their code has fixed stands there only where a model of ours differs.

        Their code does not read those extra keys, so it computes what we compute only for a config without them.
        """
        ours = {
            "in_channels": config.in_channels,
            "num_groups": config.num_groups,
            "norm_scope": config.norm_scope,
            "t_interpolation": config.time_interpolation,
            "s_interpolation": config.space_interpolation,
            "scaling_factor": config.scaling_factor,
        }
        return {
            "_class_name": PUBLIC_CLASS,
            "hidden_size": config.widths[0],
            "hidden_size_mult": _multiples(config.widths),
            "z_channels": config.latent_channels,
            "embed_dim": config.latent_channels,
            "num_res_blocks": config.num_res_blocks,
            "double_z": True,
            "dropout": 0.0,
            "resolution": 256,
            "attn_resolutions": [],
            "q_conv": "CausalConv3d",
            "encoder_conv_in": _edge(config.encoder_blocks),
            "encoder_conv_out": "CausalConv3d",
            "encoder_attention": "AttnBlock3DFix",
            "encoder_resnet_blocks": [_BLOCKS[kind] for kind in config.encoder_blocks],
            "encoder_mid_resnet": _BLOCKS[config.middle_block],
            "encoder_spatial_downsample": [*_resamplers(config.encoder_blocks[:-1], config.doubles_time, "Down"), ""],
            "encoder_temporal_downsample": [""] * len(config.widths),
            "decoder_conv_in": "CausalConv3d",
            "decoder_conv_out": _edge(config.decoder_blocks),
            "decoder_attention": "AttnBlock3DFix",
            "decoder_resnet_blocks": [_BLOCKS[kind] for kind in config.decoder_blocks],
            "decoder_mid_resnet": _BLOCKS[config.middle_block],
            "decoder_spatial_upsample": ["", *_resamplers(config.decoder_blocks[1:], config.doubles_time, "Up")],
            "decoder_temporal_upsample": [""] * len(config.widths),
        } | {key: value for key, value in ours.items() if value != _RELEASED[key]}

    def config_from_public(self, config: Mapping[str, Any]) -> ODVAEConfig:
        """Our config for the authors' `config.json`.

        Raises:
            ConfigError: keys are missing, or describe a network that this model is not; the message lists them.
        """
        extras = _RELEASED | {key: config[key] for key in _RELEASED if key in config}
        given = dict(config)
        try:
            ours = ODVAEConfig(
                latent_channels=given["z_channels"],
                widths=tuple(round(given["hidden_size"] * multiple) for multiple in given["hidden_size_mult"]),
                num_res_blocks=given["num_res_blocks"],
                encoder_blocks=tuple(_KINDS.get(name, name) for name in given["encoder_resnet_blocks"]),
                decoder_blocks=tuple(_KINDS.get(name, name) for name in given["decoder_resnet_blocks"]),
                middle_block=_KINDS.get(given["encoder_mid_resnet"], given["encoder_mid_resnet"]),
                doubles_time=tuple(name == f"{_BOTH}Downsample" for name in given["encoder_spatial_downsample"][:-1]),
                in_channels=extras["in_channels"],
                num_groups=extras["num_groups"],
                norm_scope=extras["norm_scope"],
                time_interpolation=extras["t_interpolation"],
                space_interpolation=extras["s_interpolation"],
                scaling_factor=extras["scaling_factor"],
            )
        except KeyError as error:
            raise ConfigError(f"a config of {PUBLIC_CLASS} needs {error}, which this one lacks.") from None
        expected = self.public_config(ours) | _OPTIONAL
        wrong = [
            f"{key} is {given.get(key)!r}, expected {expected.get(key)!r}"
            for key in sorted((set(given) | set(expected)) - set(_IGNORED) - set(_RELEASED))
            if _canonical(given.get(key, _OPTIONAL.get(key))) != _canonical(expected.get(key))
        ]
        if wrong:
            old = " It looks like release 1.1 or older." if any(given.get("encoder_temporal_downsample", ())) else ""
            raise ConfigError(f"not a {PUBLIC_CLASS} that vae/od_vae can hold, as release 1.2 is.{old} {'; '.join(wrong)}.")
        return ours


def _is_2d(key: str, public: Mapping[str, Tensor]) -> bool:
    """Whether a weight, named as that of a causal convolution, is one that the authors' code has as a Conv2d.

    It spans one frame and stands in a level of 2D blocks or at the pixels; elsewhere their code has causal convolutions of one
    frame.
    """
    if not key.endswith(".conv.weight") or public[key].shape[2] != 1:
        return False
    level = _LEVEL.match(key)
    if level is None:
        return key in ("encoder.conv_in.conv.weight", "decoder.conv_out.conv.weight")
    first = public.get(f"{level[1]}.block.0.conv1.conv.weight")
    return first is not None and first.shape[2] == 1


def _edge(blocks: tuple[str, ...]) -> str:
    return "Conv2d" if blocks[0] == "2d" else "CausalConv3d"


def _multiples(widths: tuple[int, ...]) -> list[int | float]:
    exact = [width / widths[0] for width in widths]
    return [int(multiple) if multiple.is_integer() else multiple for multiple in exact]


def _resamplers(blocks: tuple[str, ...], doubles_time: tuple[bool, ...], direction: str) -> list[str]:
    only_space = {"2d": f"{direction}sample"}
    return [
        f"{_BOTH}{direction}sample" if time else only_space.get(kind, f"Spatial{direction}sample2x")
        for kind, time in zip(blocks, doubles_time, strict=True)
    ]


def _canonical(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_SAME.get(each, each) if isinstance(each, str) else each for each in value]
    return value


ADAPTER = ODVAEAdapter()
