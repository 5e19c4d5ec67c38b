"""Between our Step-Video VAE and the authors' `AutoencoderKL` (spec step-video A2).

Their version 1 is the plain 8x8x4 VAE, with norms over the clip, and their version 2 the 16x16x8 one, with norms per frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from videofm.errors import ConfigError
from videofm.models.spec import CONV2D, KeyMap, Pair, pointwise
from videofm.models.vae.step_video.config import STRIDES, StepVideoVAEConfig

PUBLIC_CLASS = "StepVideoAutoencoderKL"
"""In `config.json`. The authors call their class `AutoencoderKL`, as diffusers calls its image VAE: a folder must say which."""
_NUM_STAGES = len(STRIDES) + 1
_PROVENANCE = ("_class_name", "_diffusers_version", "_name_or_path")
_BUILT_IN = ("stem_width", "widths", "num_groups", "norm_scope", "blend_seams", "scaling_factor")
"""Fields that their constructor does not take: it has one value for each, by version."""
_ARGUMENTS = {"in_channels": 3, "out_channels": 3, "z_channels": 16, "num_res_blocks": 2, "version": 1}
"""Arguments of their constructor, with its defaults."""
_IN_FILE, _IN_MODULE = "decoder.conv_out.", "decoder.conv_out.conv."
"""One layer has another name in their files than in their module; their loader turns the first into the second."""


def _res_block(ours: str, public: str) -> list[Pair]:
    return [
        (f"{ours}.norm{{k}}.{{p}}", f"{public}.norm{{k}}.{{p}}"),
        (f"{ours}.conv{{k}}.{{p}}", f"{public}.conv{{k}}.conv.{{p}}"),
        (f"{ours}.shortcut.{{p}}", f"{public}.nin_shortcut.conv.{{p}}"),
    ]


def _middle(coder: str) -> list[Pair]:
    ours, public = f"{coder}.middle.attention", f"{coder}.mid.attn_1"
    linear = (("q", "q"), ("k", "k"), ("v", "v"), ("out", "proj_out"))
    return [
        *_res_block(f"{coder}.middle.block{{b}}", f"{coder}.mid.block_{{b}}"),
        (f"{ours}.norm.{{p}}", f"{public}.norm.{{p}}"),
        *[(f"{ours}.{name}.{{p}}", f"{public}.{theirs}.conv.{{p}}", pointwise(3)) for name, theirs in linear],
    ]


def _encoder() -> list[Pair]:
    pairs: list[Pair] = [
        ("encoder.conv_in.{p}", "encoder.conv_in.conv.{p}"),
        *_res_block("encoder.stages.{i}.blocks.{j}", "encoder.down.{i}.block.{j}"),
        *_middle("encoder"),
        ("encoder.norm_out.{p}", "encoder.norm_out.{p}"),
    ]
    for level, stride in enumerate(STRIDES):
        ours, public = f"encoder.stages.{level}.downsample.{{p}}", f"encoder.down.{level}.downsample.conv"
        pairs.append((ours, f"{public}.{{p}}", CONV2D) if stride[0] == 1 else (ours, f"{public}.conv.{{p}}"))
    return pairs


def _decoder() -> list[Pair]:
    """They number decoder stages from fine to coarse, we in the order of computation."""
    pairs: list[Pair] = [
        *_middle("decoder"),
        ("decoder.norm_out.{p}", "decoder.norm_out.{p}"),
        ("decoder.conv_out.{p}", f"{_IN_MODULE}{{p}}"),
    ]
    for level in range(_NUM_STAGES):
        ours, public = f"decoder.stages.{_NUM_STAGES - 1 - level}", f"decoder.up.{level}"
        pairs += _res_block(f"{ours}.blocks.{{j}}", f"{public}.block.{{j}}")
        if level and STRIDES[level - 1][0] == 1:
            pairs.append((f"{ours}.upsample.conv.{{p}}", f"{public}.upsample.conv.{{p}}", CONV2D))
        elif level:
            pairs.append((f"{ours}.upsample.conv{{k}}.{{p}}", f"{public}.upsample.conv3d.conv{{k}}.conv.{{p}}"))
            pairs.append((f"{ours}.upsample.norm{{k}}.{{p}}", f"{public}.upsample.conv3d.norm{{k}}.{{p}}"))
    return pairs


_SHARED = [*_encoder(), *_decoder()]
_VERSION_1: list[Pair] = [
    *_SHARED,
    ("encoder.conv_out.{p}", "encoder.conv_out.conv.{p}"),
    ("decoder.conv_in.{p}", "decoder.conv_in.conv.{p}"),
]
_VERSION_2: list[Pair] = [
    *_SHARED,
    ("encoder.dual_path.0.conv.{p}", "encoder.conv_patchify.conv.conv.{p}"),
    ("encoder.dual_path.1.conv.{p}", "encoder.conv_out.conv.{p}"),
    ("decoder.dual_path.0.conv.{p}", "decoder.conv_in.conv.{p}"),
    ("decoder.dual_path.1.conv.{p}", "decoder.conv_unpatchify.conv.conv.{p}"),
]


class StepVideoVAEAdapter:
    """Tensor names and config of the VAE, both ways. The version is read from the names."""

    public_class = PUBLIC_CLASS

    def __init__(self) -> None:
        self._version_1 = KeyMap(_VERSION_1, without_statistics="decoder.conv_in.weight")
        self._version_2 = KeyMap(_VERSION_2, without_statistics="decoder.dual_path.0.conv.weight")

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under the names of the authors' module. It has no latent statistics: those are left out.

        Raises:
            CheckpointError: a key that this model does not have.
        """
        dual_path = any(".dual_path." in key for key in state_dict)
        return (self._version_2 if dual_path else self._version_1).to_public(state_dict)

    def to_file(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under the names of the authors' files, which their constructor reads (`model_path`).

        Raises:
            CheckpointError: a key that this model does not have.
        """
        return {key.replace(_IN_MODULE, _IN_FILE): tensor for key, tensor in self.to_public(state_dict).items()}

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the authors' module, or one of their files, under our names.

        Raises:
            CheckpointError: a key that their layout does not have.
        """
        of_file = not any(key.startswith(_IN_MODULE) for key in state_dict)
        named = {key.replace(_IN_FILE, _IN_MODULE) if of_file else key: tensor for key, tensor in state_dict.items()}
        dual_path = any(key.startswith(("encoder.conv_patchify.", "decoder.conv_unpatchify.")) for key in named)
        return (self._version_2 if dual_path else self._version_1).from_public(named)

    def public_config(self, config: StepVideoVAEConfig) -> dict[str, Any]:
        """The arguments of the authors' constructor.

        What it cannot express has our name and is there only where it differs from what the constructor builds, which
        refuses such a key.
        """
        public = {
            "_class_name": PUBLIC_CLASS,
            "in_channels": config.in_channels,
            "out_channels": config.in_channels,
            "z_channels": config.latent_channels,
            "num_res_blocks": config.num_res_blocks,
            "version": 2 if config.dual_path else 1,
        }
        built = _built(config.dual_path)
        own = {name: getattr(config, name) for name in _BUILT_IN if getattr(config, name) != built[name]}
        return public | {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}

    def config_from_public(self, config: Mapping[str, Any]) -> StepVideoVAEConfig:
        """Our config for the arguments of the authors' constructor; those left out have its defaults (version 1).

        Raises:
            ConfigError: a key or value that this model does not have.
        """
        full = {key: value for key, value in config.items() if key not in _PROVENANCE}
        values = _ARGUMENTS | full
        unknown = [key for key in full if key not in (*_ARGUMENTS, *_BUILT_IN)]
        fits = values["version"] in (1, 2) and values["in_channels"] == values["out_channels"]
        if unknown or not fits or config.get("_class_name", PUBLIC_CLASS) != PUBLIC_CLASS:
            raise ConfigError(
                f"not a config of Step-Video's {PUBLIC_CLASS} that vae/step_video can hold: class {config.get('_class_name')}, "
                f"version {values['version']} (must be 1 or 2), in_channels {values['in_channels']} and out_channels "
                f"{values['out_channels']} (must be equal), unknown keys {unknown}."
            )
        dual_path = values["version"] == 2
        own = _built(dual_path) | {name: values[name] for name in _BUILT_IN if name in values}
        return StepVideoVAEConfig(
            latent_channels=values["z_channels"],
            in_channels=values["in_channels"],
            num_res_blocks=values["num_res_blocks"],
            dual_path=dual_path,
            **own | {"widths": tuple(own["widths"])},
        )


def _built(dual_path: bool) -> dict[str, Any]:
    """The fields of `_BUILT_IN` as the authors' constructor sets them."""
    default = StepVideoVAEConfig(norm_scope="frame" if dual_path else "clip")
    return {name: getattr(default, name) for name in _BUILT_IN}


ADAPTER = StepVideoVAEAdapter()
