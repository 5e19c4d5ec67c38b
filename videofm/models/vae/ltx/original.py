"""The VAE in Lightricks' own single file (spec B.3, B.7): flat lists of blocks, and a config that writes them out.

The original numbers its blocks through: `encoder.down_blocks` from fine to coarse and `decoder.up_blocks` from coarse to fine,
where residual blocks, resamplers and the blocks between two widths are entries of their own. Its config lists both halves from
fine to coarse. In a file that also holds the transformer, the VAE's tensors begin with `vae.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from videofm.errors import CheckpointError, ConfigError
from videofm.models.spec import ONE_NUMBER, KeyMap, Pair
from videofm.models.vae.ltx.config import LTXVAEConfig

ORIGINAL_CLASS, PREFIX = "CausalVideoAutoencoder", "vae."
_RES, _RESAMPLE, _WIDEN = "b", "r", "w"
_HALF = re.compile(f"({_RES}{_RESAMPLE}?{_WIDEN}?)*{_RES}")
"""A half from fine to coarse: stages of residual blocks, a resampler, a block to another width; at the end the middle."""
_ENTRY = re.compile(r"(encoder\.down_blocks|decoder\.up_blocks)\.([0-9]+)\.(res_blocks\.|conv1\.|conv\.)?.*")
_LETTERS = {"res_blocks.": _RES, "conv1.": _WIDEN, "conv.": _RESAMPLE}
_LISTS = {"encoder": "encoder.down_blocks", "decoder": "decoder.up_blocks"}

_STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
_UNREAD = tuple(f"per_channel_statistics.{name}" for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means"))
"""Tensors of the original that nothing computes with."""

_DOWNSAMPLERS = {
    "conv": "compress_all",
    "spatial": "compress_space_res",
    "temporal": "compress_time_res",
    "spatiotemporal": "compress_all_res",
}
_FIXED: dict[str, Any] = {
    "_class_name": ORIGINAL_CLASS,
    "dims": 3,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "normalize_latent_channels": False,
    "spatial_padding_mode": "zeros",
}
"""What the config of every release says, and the only values that this model has."""
_DEFAULTS: dict[str, Any] = {
    "_class_name": None,
    "dims": None,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": None,
    "encoder_blocks": None,
    "decoder_blocks": None,
    "encoder_base_channels": 128,
    "decoder_base_channels": 128,
    "norm_layer": "group_norm",
    "patch_size": 1,
    "latent_log_var": "per_channel",
    "use_quant_conv": True,
    "normalize_latent_channels": False,
    "spatial_padding_mode": "zeros",
    "causal_decoder": False,
    "timestep_conditioning": False,
    "scaling_factor": 1.0,
}
"""What the original takes where its config is silent."""
_PROVENANCE = ("_diffusers_version", "_name_or_path", "double_z")
_EPS = 1e-6


def original_keys(keys: Iterable[str]) -> list[str]:
    """Those of `keys` that are a VAE's in the original layout: the ones behind `vae.` if there are any; or none."""
    everything = list(keys)
    own = [key for key in everything if key.startswith(PREFIX)] or everything
    # `res_blocks` is the original's word; `mid_block` and `resnets` are those of diffusers.
    marked = any(key.removeprefix(PREFIX).startswith("decoder.up_blocks.0.res_blocks.") for key in own)
    return own if marked else []


def to_original(state: Mapping[str, Tensor], config: LTXVAEConfig, prefix: str = "") -> dict[str, Tensor]:
    """Our state dict under the original's names; `prefix="vae."` for a file that holds the transformer too.

    Raises:
        CheckpointError: a key that this model does not have.
        ConfigError: a shape that the original cannot express, see `original_config`.
    """
    described = original_config(config)
    halves = {
        half: "".join(_LETTER_OF_BLOCK[name] for name, _ in described[f"{half}_blocks"]) for half in ("encoder", "decoder")
    }
    return {prefix + key: tensor for key, tensor in _key_map(halves).to_public(state).items()}


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VAE of an original single file under our names; a transformer beside it is left out.

    Raises:
        CheckpointError: the keys are not those of such a VAE, or its latent statistics are missing.
    """
    keys = original_keys(state)
    if not keys:
        raise CheckpointError("there is no VAE in the original layout of LTX-Video here (decoder.up_blocks.0.res_blocks...).")
    own = {key.removeprefix(PREFIX): state[key] for key in keys}
    missing = [name for name in _STATISTICS.values() if name not in own]
    if missing:
        raise CheckpointError(
            f"the file has no {' and no '.join(missing)}: without its latent statistics nothing trained on these latents fits "
            "them. Take the complete file, or add the tensors (zeros for means, ones for stds, until you measure them)."
        )
    read = {key: tensor for key, tensor in own.items() if key not in _UNREAD}
    return _key_map({half: _letters(read, half) for half in _LISTS}).from_public(read)


def original_config(config: LTXVAEConfig) -> dict[str, Any]:
    """The `vae` part of the `config` that the original keeps, as JSON, in the metadata of its file.

    Raises:
        ConfigError: a width that is no multiple of the one before it, or another thing that the original does not have.
    """
    if config.norm_eps != _EPS or not config.encoder_causal:
        raise ConfigError(
            f"the original LTX VAE has a causal encoder and norm_eps {_EPS}; this one has encoder_causal "
            f"{config.encoder_causal} and norm_eps {config.norm_eps}: write the layout of diffusers instead."
        )
    return _FIXED | {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "encoder_blocks": _encoder_blocks(config),
        "decoder_blocks": _decoder_blocks(config),
        "encoder_base_channels": config.encoder_widths[0],
        "decoder_base_channels": config.decoder_widths[-1] // config.upsample_factor[-1],
        "patch_size": config.patch_size,
        "causal_decoder": config.decoder_causal,
        "timestep_conditioning": config.timestep_conditioning,
        "scaling_factor": config.scaling_factor,
    }


def config_from_original(config: Mapping[str, Any]) -> LTXVAEConfig:
    """Our config for the one in an original file: the whole, or its `vae` part.

    Raises:
        ConfigError: a block or a value that this model does not have.
    """
    given = dict(config.get("vae", config))
    both = given.pop("blocks", None)
    full = _DEFAULTS | {"encoder_blocks": both, "decoder_blocks": both} | given
    wrong = [f"{key} {full[key]!r} (must be {value!r})" for key, value in _FIXED.items() if full[key] != value]
    wrong += [f"unknown key {key!r}" for key in full if key not in _DEFAULTS and key not in _PROVENANCE]
    wrong += [f"no {key}" for key in ("latent_channels", "encoder_blocks", "decoder_blocks") if not full[key]]
    if full["in_channels"] != full["out_channels"]:
        wrong.append(f"in_channels {full['in_channels']} and out_channels {full['out_channels']} (must be equal)")
    if wrong:
        raise ConfigError(f"not a config of {ORIGINAL_CLASS} that vae/ltx can hold: {', '.join(wrong)}.")
    return LTXVAEConfig(
        latent_channels=full["latent_channels"],
        in_channels=full["in_channels"],
        patch_size=full["patch_size"],
        timestep_conditioning=full["timestep_conditioning"],
        decoder_causal=full["causal_decoder"],
        scaling_factor=full["scaling_factor"],
        norm_eps=_EPS,
        **_encoder_fields(_half(full["encoder_blocks"], "encoder_blocks"), full["encoder_base_channels"]),
        **_decoder_fields(_half(full["decoder_blocks"], "decoder_blocks"), full["decoder_base_channels"]),
    )


# -- names of tensors


def _letters(state: Mapping[str, Tensor], half: str) -> str:
    """What the entries of a half are, from fine to coarse, read off the names of their tensors."""
    found: dict[int, str] = {}
    for key in state:
        match = _ENTRY.fullmatch(key)
        if match and match[1] == _LISTS[half] and match[3]:
            found[int(match[2])] = _LETTERS[match[3]]
    entries = "".join(found.get(index, "?") for index in range(max(found, default=-1) + 1))
    fine_to_coarse = entries if half == "encoder" else entries[::-1]
    if not _HALF.fullmatch(fine_to_coarse):
        raise CheckpointError(
            f"{_LISTS[half]} of this file is no sequence of residual blocks and resamplers that vae/ltx knows: the file is "
            "incomplete, or of another model."
        )
    return fine_to_coarse


def _key_map(halves: Mapping[str, str]) -> KeyMap:
    """Our names against the original's, for the given letters of each half."""
    pairs: list[Pair] = [
        *_STATISTICS.items(),
        *((f"{half}.{end}.{{p}}", f"{half}.{end}.conv.{{p}}") for half in _LISTS for end in ("conv_in", "conv_out")),
        ("decoder.time_scale", "decoder.timestep_scale_multiplier", ONE_NUMBER),
        _embedder("decoder.out_time_embed", "decoder.last_time_embedder"),
        ("decoder.scale_shift_table", "decoder.last_scale_shift_table"),
    ]
    for half, letters in halves.items():
        num_stages = letters.count(_RES) - 1
        depth = -1  # stages passed on the way from fine to coarse
        for position, letter in enumerate(letters):
            depth += letter == _RES
            stage = depth if half == "encoder" else num_stages - 1 - depth
            index = position if half == "encoder" else len(letters) - 1 - position
            place = f"{half}.middle" if depth == num_stages else f"{half}.stages.{stage}"
            pairs += _entry(letter, place, f"{_LISTS[half]}.{index}")
    return KeyMap(pairs)


def _entry(letter: str, place: str, original: str) -> list[tuple[str, str]]:
    if letter == _WIDEN:
        return _res_block(f"{place}.widen", original)
    if letter == _RES:
        middle = place.endswith(".middle")
        embedder = f"{place}_time_embed" if middle else f"{place}.time_embed"
        blocks = f"{place}.{{j}}" if middle else f"{place}.blocks.{{j}}"
        return [*_res_block(blocks, f"{original}.res_blocks.{{j}}"), _embedder(embedder, f"{original}.time_embedder")]
    name = "downsample" if place.startswith("encoder.") else "upsample"
    return [(f"{place}.{name}.{{p}}", f"{original}.conv.{{p}}"), (f"{place}.{name}.conv.{{p}}", f"{original}.conv.conv.{{p}}")]


def _res_block(ours: str, original: str) -> list[tuple[str, str]]:
    return [
        (f"{ours}.conv{{k}}.{{p}}", f"{original}.conv{{k}}.conv.{{p}}"),
        (f"{ours}.shortcut_norm.{{p}}", f"{original}.norm3.norm.{{p}}"),
        (f"{ours}.shortcut.{{p}}", f"{original}.conv_shortcut.{{p}}"),
        (f"{ours}.scale_shift_table", f"{original}.scale_shift_table"),
        (f"{ours}.noise_scale{{k}}", f"{original}.per_channel_scale{{k}}"),
    ]


def _embedder(ours: str, original: str) -> tuple[str, str]:
    return f"{ours}.linear{{k}}.{{p}}", f"{original}.timestep_embedder.linear_{{k}}.{{p}}"


# -- lists of blocks, from fine to coarse

_Block = tuple[str, Mapping[str, Any]]
_LETTER_OF_BLOCK = {"res_x": _RES, "res_x_y": _WIDEN, **dict.fromkeys(_DOWNSAMPLERS.values(), _RESAMPLE)}
_OPTIONS = {
    "res_x": {"num_layers", "inject_noise"},
    "res_x_y": {"num_layers", "multiplier"},
    "compress_all": {"num_layers", "multiplier", "residual"},
}
_RESIDUAL_OPTIONS = {"num_layers", "multiplier"}


@dataclass(frozen=True)
class _Stage:
    """Residual blocks, then (towards coarse) a resampler and a block to another width, where there are any."""

    res: Mapping[str, Any]
    resample: _Block | None = None
    widen: Mapping[str, Any] | None = None


def _half(blocks: Sequence[Sequence[Any]], name: str) -> list[_Stage]:
    """The stages of a list of blocks; the last is the middle."""
    named = [(block, {"num_layers": value} if isinstance(value, int) else dict(value)) for block, value in blocks]
    unknown = [block for block, _ in named if block not in _LETTER_OF_BLOCK]
    unknown += [
        f"{block} with {key}"
        for block, options in named
        for key in options
        if key not in _OPTIONS.get(block, _RESIDUAL_OPTIONS)
    ]
    letters = "".join(_LETTER_OF_BLOCK.get(block, "?") for block, _ in named)
    if unknown or not _HALF.fullmatch(letters):
        raise ConfigError(
            f"{name} has blocks that vae/ltx does not ({', '.join(unknown) or ', '.join(block for block, _ in named)}): stages "
            f"are res_x, then a resampler ({', '.join(_DOWNSAMPLERS.values())}), then res_x_y, and the last block is res_x."
        )
    stages: list[_Stage] = []
    for (block, options), letter in zip(named, letters, strict=True):
        if letter == _RES:
            stages.append(_Stage(options))
        elif letter == _RESAMPLE:
            stages[-1] = _Stage(stages[-1].res, (block, options))
        else:
            stages[-1] = _Stage(stages[-1].res, stages[-1].resample, options)
    return stages


def _encoder_fields(stages: Sequence[_Stage], width: int) -> dict[str, Any]:
    kinds = {block: kind for kind, block in _DOWNSAMPLERS.items()}
    widths, downsample = [], []
    for stage in stages[:-1]:
        widths.append(width)
        block, options = stage.resample or (None, {})
        downsample.append("none" if block is None else kinds[block])
        if block not in (None, "compress_all"):
            width *= options.get("multiplier", 2)
        if stage.widen is not None:
            width *= stage.widen.get("multiplier", 2)
    residual = not set(downsample) <= {"none", "conv"}
    if residual:
        widths.append(width)
    wrong = any(stage.widen is not None for stage in stages) if residual else width != widths[-1]
    if wrong or any(stage.res.get("inject_noise") for stage in stages):
        raise ConfigError(
            "encoder_blocks: in vae/ltx res_x_y stands between stages of res_x and compress_all, not before the middle and not "
            "beside compress_*_res, and an encoder injects no noise."
        )
    return {
        "encoder_widths": tuple(widths),
        "encoder_depths": tuple(stage.res["num_layers"] for stage in stages),
        "encoder_downsample": tuple(downsample),
    }


def _decoder_fields(stages: Sequence[_Stage], width: int) -> dict[str, Any]:
    widths, factors, residuals = [], [], []
    for stage in stages[:-1]:
        block, options = stage.resample or ("compress_all", {})
        if block != "compress_all":
            raise ConfigError(f"decoder_blocks has {block}; the decoder of vae/ltx upsamples by compress_all only.")
        factors.append(options.get("multiplier", 1))
        residuals.append(options.get("residual", False))
        width *= factors[-1]
        widths.append(width)
        if stage.widen is not None:
            width *= stage.widen.get("multiplier", 2)
    coarse_to_fine = list(reversed(stages))
    return {
        "decoder_widths": tuple(reversed(widths)),
        "decoder_depths": tuple(stage.res["num_layers"] for stage in coarse_to_fine),
        "decoder_upsample": tuple(stage.resample is not None for stage in coarse_to_fine[1:]),
        "upsample_factor": tuple(reversed(factors)),
        "upsample_residual": tuple(reversed(residuals)),
        "inject_noise": tuple(stage.res.get("inject_noise", False) for stage in coarse_to_fine),
    }


def _encoder_blocks(config: LTXVAEConfig) -> list[list[Any]]:
    widths, blocks = config.encoder_widths, []
    for index, kind in enumerate(config.encoder_downsample):
        leaving = widths[min(index + 1, len(widths) - 1)]
        blocks.append(["res_x", {"num_layers": config.encoder_depths[index]}])
        if kind == "conv":
            blocks.append(["compress_all", {}])
        elif kind != "none":
            blocks.append([_DOWNSAMPLERS[kind], {"multiplier": _multiplier(widths[index], leaving)}])
        if not config.residual_downsample and leaving != widths[index]:
            blocks.append(["res_x_y", {"multiplier": _multiplier(widths[index], leaving)}])
    return [*blocks, ["res_x", {"num_layers": config.encoder_depths[-1]}]]


def _decoder_blocks(config: LTXVAEConfig) -> list[list[Any]]:
    blocks: list[list[Any]] = []
    depths, noise = config.decoder_depths, config.inject_noise
    entering = config.decoder_widths[0]
    for stage, width in enumerate(config.decoder_widths):
        factor, residual = config.upsample_factor[stage], config.upsample_residual[stage]
        blocks.append(["res_x", {"num_layers": depths[stage], "inject_noise": noise[stage]}])
        if width != entering:
            blocks.append(["res_x_y", {"multiplier": _multiplier(width, entering)}])
        if config.decoder_upsample[stage]:
            blocks.append(["compress_all", {"residual": residual, "multiplier": factor}])
        entering = width // factor
    return [["res_x", {"num_layers": depths[-1], "inject_noise": noise[-1]}], *reversed(blocks)]


def _multiplier(narrow: int, wide: int) -> int:
    if wide % narrow:
        raise ConfigError(
            f"the original LTX VAE multiplies widths by whole numbers, so it cannot go from {narrow} to {wide} channels: "
            "write the layout of diffusers instead."
        )
    return wide // narrow
