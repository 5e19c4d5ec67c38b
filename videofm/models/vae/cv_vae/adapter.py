"""Between our CV-VAE and the authors' `CVVAEModel` (spec A.1, A.10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from videofm.errors import ConfigError
from videofm.models.spec import CONV2D, KeyMap, Pair, pointwise
from videofm.models.vae.cv_vae.config import SIZES, CVVAEConfig

PUBLIC_CLASS = "CVVAEModel"
PROVENANCE = ("_diffusers_version", "_name_or_path")
_SPATIAL, _TEMPORAL = ("vanilla-xformers", "vanilla"), "spatial-temporal-xformer"

_RELEASED = {"num_groups": 32, "norm_scope": "clip", "norm_eps": 1e-5, "padding": "sd", "shift_factor": 0.0}
"""What the released class cannot choose, and has."""

TILING = {
    "en_de_n_frames_a_time": 16,
    "tile_spatial_size": 576,
    "tile_overlap_ratio": 0.2222,
    "num_video_frames": None,
    "reshape_z_dim_to_4": False,
    "reshape_x_dim_to_4": False,
    "force_upcast": True,
}
"""How the released class is called, which changes no tensor: written with its defaults, not read."""

_FIXED = {"double_z": True, "attn_resolutions": [], "dropout": 0.0, "use_3d_conv": True}


def _res_block(ours: str, public: str) -> list[Pair]:
    return [
        (f"{ours}.norm{{k}}.{{p}}", f"{public}.norm{{k}}.{{p}}"),
        (f"{ours}.conv{{k}}.{{p}}", f"{public}.conv{{k}}.{{p}}", CONV2D),
        (f"{ours}.shortcut.{{p}}", f"{public}.nin_shortcut.{{p}}"),
    ]


def _coder(name: str, direction: str) -> list[Pair]:
    same = [(f"{name}.{part}.{{p}}",) * 2 for part in ("conv_in", "norm_out", "conv_out")]
    projections = {"q": "q", "k": "k", "v": "v", "out": "proj_out"}
    return [
        *same,
        *_res_block(f"{name}.stages.{{i}}.blocks.{{j}}", f"{name}.{direction}.{{i}}.block.{{j}}"),
        *_res_block(f"{name}.middle.blocks.0", f"{name}.mid.block_1"),
        *_res_block(f"{name}.middle.blocks.1", f"{name}.mid.block_2"),
        (f"{name}.middle.attention.norm.{{p}}", f"{name}.mid.attn_1.norm.{{p}}"),
        *(
            (f"{name}.middle.attention.{ours}.{{p}}", f"{name}.mid.attn_1.{public}.{{p}}", pointwise(2))
            for ours, public in projections.items()
        ),
    ]


_PAIRS: list[Pair] = [
    *_coder("encoder", "down"),
    ("encoder.stages.{i}.downsample.{p}", "encoder.down.{i}.downsample.conv.{p}"),
    *_coder("decoder", "up"),
    ("decoder.stages.{i}.upsample.conv.{p}", "decoder.up.{i}.upsample.conv.{p}"),
    *(
        (f"decoder.middle.temporal.{ours}.{{p}}", f"decoder.mid.attn_1.{public}_t.{{p}}")
        for ours, public in {"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"}.items()
    ),
]


class CVVAEAdapter(KeyMap):
    """Tensor names and config of the VAE, both ways."""

    public_class = PUBLIC_CLASS

    def looks_like(self, state_dict: Mapping[str, Tensor]) -> str | None:
        """The size that has these widths, latent channels and kind of second convolutions; None if there is none.

        Args:
            state_dict: in our layout.
        """
        conv_in, conv2 = (state_dict.get(key) for key in ("decoder.conv_in.weight", "encoder.middle.blocks.0.conv2.weight"))
        if conv_in is None or conv2 is None:
            return None
        found = (*conv_in.shape[:2], conv2.shape[2] == 1)
        sizes = {(config.widths[-1], config.latent_channels, config.half_3d): size for size, config in SIZES.items()}
        return sizes.get(found)

    def public_config(self, config: CVVAEConfig) -> dict[str, Any]:
        """The authors' `config.json`.

        Options that the authors' class does not have (`_RELEASED`, and temporal attention with its own residual) follow as
        keys of their own where they differ from what it does. It would pass over them and compute something else: such a folder
        is for `videofm.models.load`.

        Raises:
            ConfigError: widths that are no multiples of the first.
        """
        if any(width % config.widths[0] for width in config.widths):
            raise ConfigError(f"{PUBLIC_CLASS} holds widths that are multiples of the first, not {config.widths}.")
        public = {
            "_class_name": PUBLIC_CLASS,
            "z_channels": config.latent_channels,
            "in_channels": config.in_channels,
            "out_ch": config.in_channels,
            "ch": config.widths[0],
            "ch_mult": [width // config.widths[0] for width in config.widths],
            "num_res_blocks": config.num_res_blocks,
            "half_3d": config.half_3d,
            "causal_encoder": config.causal_encoder,
            "causal_decoder": config.causal_decoder,
            "encoder_attn_type": _SPATIAL[0],
            "decoder_attn_type": _SPATIAL[0] if config.temporal_attention == "none" else _TEMPORAL,
            "scaling_factor": config.scaling_factor,
            "time_n_compress": config.compression.time,
            "spatial_n_compress": config.compression.height,
            **_FIXED,
            **TILING,
        }
        own = {key: getattr(config, key) for key, released in _RELEASED.items() if getattr(config, key) != released}
        if config.temporal_attention == "own_residual":
            own["temporal_attention"] = config.temporal_attention
        return public | own

    def config_from_public(self, config: Mapping[str, Any]) -> CVVAEConfig:
        """Our config for the authors' `config.json`; keys that it lacks have the authors' defaults. Keys about tiling are not
        read: tiles are chosen where a clip is encoded.

        Raises:
            ConfigError: a value that this model does not have.
        """
        default = self.public_config(CVVAEConfig(temporal_attention="released", **_RELEASED))  # type: ignore[arg-type]
        full = default | _RELEASED | dict(config)
        decoder_attention = full["decoder_attn_type"]
        wrong = {key: full[key] for key, value in _FIXED.items() if full[key] != value}
        if full["_class_name"] != PUBLIC_CLASS:
            wrong["_class_name"] = full["_class_name"]
        if full["encoder_attn_type"] not in _SPATIAL or decoder_attention not in (*_SPATIAL, _TEMPORAL):
            wrong |= {key: full[key] for key in ("encoder_attn_type", "decoder_attn_type")}
        if full["out_ch"] != full["in_channels"] or full["ch_mult"][0] != 1:
            wrong |= {key: full[key] for key in ("in_channels", "out_ch", "ch_mult")}
        known = {*default, *_RELEASED, *PROVENANCE, "temporal_attention"}
        unknown = [key for key in config if key not in known]
        if wrong or unknown:
            raise ConfigError(f"not a config of {PUBLIC_CLASS} that vae/cv_vae can hold: {wrong}, unknown keys {unknown}.")
        kind = full.get("temporal_attention", "released") if decoder_attention == _TEMPORAL else "none"
        return CVVAEConfig(
            in_channels=full["in_channels"],
            latent_channels=full["z_channels"],
            widths=tuple(full["ch"] * multiple for multiple in full["ch_mult"]),
            num_res_blocks=full["num_res_blocks"],
            half_3d=full["half_3d"],
            causal_encoder=full["causal_encoder"],
            causal_decoder=full["causal_decoder"],
            temporal_attention=kind,
            scaling_factor=full["scaling_factor"],
            **{key: full[key] for key in _RELEASED},
        )


ADAPTER = CVVAEAdapter(_PAIRS, without_statistics="decoder.conv_in.weight")
