"""Between our LTX transformer and `LTXVideoTransformer3DModel` of diffusers (spec C.1, C.6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from videofm.errors import ConfigError
from videofm.models.dit.ltx.config import LTXDiTConfig
from videofm.models.spec import KeyMap

PUBLIC_CLASS = "LTXVideoTransformer3DModel"


def _attention(ours: str, public: str) -> list[tuple[str, str]]:
    ours, public = f"blocks.{{i}}.{ours}", f"transformer_blocks.{{i}}.{public}"
    return [
        *((f"{ours}.{x}.{{p}}", f"{public}.to_{x}.{{p}}") for x in "qkv"),
        *((f"{ours}.{x}_norm.weight", f"{public}.norm_{x}.weight") for x in "qk"),
        (f"{ours}.out.{{p}}", f"{public}.to_out.0.{{p}}"),
    ]


_PAIRS = [
    ("proj_in.{p}", "proj_in.{p}"),
    ("time_embed.linear{k}.{p}", "time_embed.emb.timestep_embedder.linear_{k}.{p}"),
    ("time_modulation.{p}", "time_embed.linear.{p}"),
    ("caption_projection.linear{k}.{p}", "caption_projection.linear_{k}.{p}"),
    ("blocks.{i}.scale_shift_table", "transformer_blocks.{i}.scale_shift_table"),
    *_attention("self_attention", "attn1"),
    *_attention("cross_attention", "attn2"),
    ("blocks.{i}.feed_forward.linear1.{p}", "transformer_blocks.{i}.ff.net.0.proj.{p}"),
    ("blocks.{i}.feed_forward.linear2.{p}", "transformer_blocks.{i}.ff.net.2.{p}"),
    ("scale_shift_table", "scale_shift_table"),
    ("proj_out.{p}", "proj_out.{p}"),
]

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
    """Tensor names and config of the transformer, both ways."""

    public_class = PUBLIC_CLASS

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


ADAPTER = LTXDiTAdapter(_PAIRS)
