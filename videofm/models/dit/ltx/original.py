"""The transformer in Lightricks' own single file (spec C.6): the names of its tensors and the config in the file's metadata.

In a file that also holds the VAE, the transformer's tensors begin with `model.diffusion_model.`; the VAE's with `vae.`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from videofm.errors import CheckpointError, ConfigError
from videofm.models.dit.ltx.config import LTXDiTConfig
from videofm.models.spec import KeyMap
from videofm.ops.rope import SPAN

ORIGINAL_CLASS, PREFIX, _VAE_PREFIX = "Transformer3DModel", "model.diffusion_model.", "vae."
_SIGMA_SCALE = 1000
_MARKS = ("patchify_proj.weight", "adaln_single.linear.weight")
"""Tensors that only this layout has under these names."""


def attention(ours: str, public: str, norm: str) -> list[tuple[str, str]]:
    """Pairs of templates of one attention of a block; `norm` is the public name of the norm of `{x}`, q or k."""
    ours, public = f"blocks.{{i}}.{ours}", f"transformer_blocks.{{i}}.{public}"
    return [
        *((f"{ours}.{x}.{{p}}", f"{public}.to_{x}.{{p}}") for x in "qkv"),
        *((f"{ours}.{x}_norm.weight", f"{public}.{norm.format(x=x)}.weight") for x in "qk"),
        (f"{ours}.out.{{p}}", f"{public}.to_out.0.{{p}}"),
    ]


def pairs(tokens: str, time: str, norm: str) -> list[tuple[str, str]]:
    """Our names against public ones; what differs between the original and diffusers are the arguments."""
    return [
        ("proj_in.{p}", f"{tokens}.{{p}}"),
        ("time_embed.linear{k}.{p}", f"{time}.emb.timestep_embedder.linear_{{k}}.{{p}}"),
        ("time_modulation.{p}", f"{time}.linear.{{p}}"),
        ("caption_projection.linear{k}.{p}", "caption_projection.linear_{k}.{p}"),
        ("blocks.{i}.scale_shift_table", "transformer_blocks.{i}.scale_shift_table"),
        *attention("self_attention", "attn1", norm),
        *attention("cross_attention", "attn2", norm),
        ("blocks.{i}.feed_forward.linear1.{p}", "transformer_blocks.{i}.ff.net.0.proj.{p}"),
        ("blocks.{i}.feed_forward.linear2.{p}", "transformer_blocks.{i}.ff.net.2.{p}"),
        ("scale_shift_table", "scale_shift_table"),
        ("proj_out.{p}", "proj_out.{p}"),
    ]


_KEYS = KeyMap(pairs("patchify_proj", "adaln_single", "{x}_norm"))

_FIXED: dict[str, Any] = {
    "_class_name": ORIGINAL_CLASS,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "positional_embedding_max_pos": [int(span) for span in SPAN],
    "timestep_scale_multiplier": _SIGMA_SCALE,
}
"""What the config of every release says, and the only values that this model has."""
_SILENT: dict[str, Any] = {
    "attention_type": "default",
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": False,
    "use_linear_projection": False,
    "adaptive_norm": "single_scale_shift",
    "positional_embedding_type": "rope",
}
"""The same, where the original means this too if its config is silent."""
_FREE = ("_diffusers_version", "_name_or_path", "project_to_2d_pos", "causal_temporal_positioning")
"""Keys that say nothing about the network. The last is about coordinates, which are an argument of it: see `causal_fix` of
`ops.rope.video_coordinates`.
"""


def original_keys(keys: Iterable[str]) -> list[str]:
    """Those of `keys` that are a transformer's in the original layout: the ones behind its prefix if there are any, or all
    that are not the VAE's; none if it is no such file.
    """
    everything = list(keys)
    own = [key for key in everything if key.startswith(PREFIX)]
    own = own or [key for key in everything if not key.startswith(_VAE_PREFIX)]
    return own if {key.removeprefix(PREFIX) for key in own}.issuperset(_MARKS) else []


def to_original(state: Mapping[str, Tensor], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Our state dict under the original's names, behind `prefix`.

    Raises:
        CheckpointError: a key that this model does not have.
    """
    return {prefix + key: tensor for key, tensor in _KEYS.to_public(state).items()}


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer of an original single file under our names; a VAE beside it is left out.

    Raises:
        CheckpointError: there is none, or it has tensors that this model does not.
    """
    keys = original_keys(state)
    if not keys:
        raise CheckpointError(
            f"there is no transformer in the original layout of LTX-Video here (no {' and no '.join(_MARKS)})."
        )
    return _KEYS.from_public({key.removeprefix(PREFIX): state[key] for key in keys})


def original_config(config: LTXDiTConfig) -> dict[str, Any]:
    """The `transformer` part of the `config` that the original keeps, as JSON, in the metadata of its file."""
    return {
        **_FIXED,
        **_SILENT,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_width,
        "cross_attention_dim": config.width,
        "caption_channels": config.caption_channels,
        "norm_eps": config.norm_eps,
        "positional_embedding_theta": config.theta,
    }


def config_from_original(config: Mapping[str, Any]) -> LTXDiTConfig:
    """Our config for the one in an original file: the whole, or its `transformer` part.

    Raises:
        ConfigError: a value that this model does not have.
    """
    given = {key: value for key, value in dict(config.get("transformer", config)).items() if value is not None}
    default = original_config(LTXDiTConfig())
    missing = [f"no {key}" for key in default if key not in (*_SILENT, "out_channels") and key not in given]
    full = default | {"out_channels": given.get("in_channels")} | given
    ours = LTXDiTConfig(
        in_channels=full["in_channels"],
        num_layers=full["num_layers"],
        num_heads=full["num_attention_heads"],
        head_width=full["attention_head_dim"],
        caption_channels=full["caption_channels"],
        norm_eps=full["norm_eps"],
        theta=full["positional_embedding_theta"],
    )
    written = original_config(ours) | {key: full[key] for key in _FREE if key in full}
    wrong = [f"{key} {value!r}" for key, value in full.items() if key not in written or written[key] != value]
    if missing or wrong:
        raise ConfigError(f"not a config of {ORIGINAL_CLASS} that dit/ltx can hold: {', '.join([*missing, *wrong])}.")
    return ours
