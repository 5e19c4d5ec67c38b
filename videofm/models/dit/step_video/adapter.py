"""Between our Step-Video transformer and the authors' `StepVideoModel` (spec step-video A3).

Two things differ besides names. They store queries, keys and values head by head, `(heads, 3 * head_width)`; we store all
queries, then all keys, then all values. And their time t runs from noise to data and their velocity points at the data:
`t = 1 - sigma`, `v = -velocity`. The sign goes into the last layer. Time goes into the first layer of its embedding: with w
a frequency and a = 1000 w, the waves that they feed to it are combinations of ours,

    cos(w * 1000 t) = cos(a) cos(w * 1000 sigma) + sin(a) sin(w * 1000 sigma)
    sin(w * 1000 t) = sin(a) cos(w * 1000 sigma) - cos(a) sin(w * 1000 sigma),

so that its weights are reflected in each plane (cos, sin) of a frequency, which is its own inverse. It is computed in float64
and rounded to the dtype of the weight. In float32, to and fro costs an ulp or two, and the two networks agree to 1e-5 for
velocities of the order of 1: phases near 1000 radian are rounded at opposite ends of time, and either network is as far from
exact arithmetic. In bfloat16 the rounding is 1e-3 of that one weight; convert such a file to float32 first where that matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from videofm.errors import CheckpointError, ConfigError
from videofm.models.dit.step_video.config import StepVideoDiTConfig
from videofm.models.dit.step_video.model import SIGMA_SCALE
from videofm.models.spec import KeyMap, Layout, Pair, pointwise
from videofm.ops.embedding import NUM_SINUSOID_CHANNELS, wave_frequencies

PUBLIC_CLASS = "StepVideoModel"

_FIXED = {
    "dropout": 0.0,
    "patch_size": 1,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "use_additional_conditions": False,
}
"""Public options that the release sets so, and that our model therefore does not have."""

_NOT_THE_MODEL = ("_diffusers_version", "_name_or_path", "attention_type")
"""Public keys that say where a file comes from, or how their code distributes attention."""

_FUSED = {"self_attention.qkv.weight": 3, "cross_attention.kv.weight": 2}
"""Ends of our names of tensors that hold several projections, and how many."""
_HEAD_WIDTH = "q_norm.weight"
"""End of our names of tensors that have as many entries as a head has channels."""


def _reversed_time(weight: Tensor) -> Tensor:
    """The first layer of the time embedding `(D, 256)` for the opposite direction of time."""
    if weight.shape[-1] != NUM_SINUSOID_CHANNELS:
        return weight  # of another shape, which the model says when this is put into it
    angles = wave_frequencies(device=weight.device).double() * SIGMA_SCALE
    cos, sin = weight.double().chunk(2, dim=-1)
    turned = [cos * angles.cos() + sin * angles.sin(), cos * angles.sin() - sin * angles.cos()]
    return torch.cat(turned, dim=-1).to(weight.dtype)


_REVERSED_TIME = Layout(_reversed_time, _reversed_time)
_OPPOSITE = Layout(torch.neg, torch.neg)

_BLOCK = [
    ("scale_shift_table", "scale_shift_table"),
    ("attention_norm.{p}", "norm1.{p}"),
    ("feed_forward_norm.{p}", "norm2.{p}"),
    ("self_attention.qkv.weight", "attn1.wqkv.weight"),
    ("self_attention.out.weight", "attn1.wo.weight"),
    ("cross_attention.q.weight", "attn2.wq.weight"),
    ("cross_attention.kv.weight", "attn2.wkv.weight"),
    ("cross_attention.out.weight", "attn2.wo.weight"),
    *(
        (f"{ours}.{x}_norm.weight", f"{public}.{x}_norm.weight")
        for x in "qk"
        for ours, public in (("self_attention", "attn1"), ("cross_attention", "attn2"))
    ),
    ("feed_forward.linear1.weight", "ff.net.0.proj.weight"),
    ("feed_forward.linear2.weight", "ff.net.2.weight"),
]

_PAIRS: list[Pair] = [
    ("proj_in.{p}", "pos_embed.proj.{p}", pointwise(2)),
    ("time_embed.linear1.weight", "adaln_single.emb.timestep_embedder.linear_1.weight", _REVERSED_TIME),
    ("time_embed.linear1.bias", "adaln_single.emb.timestep_embedder.linear_1.bias"),
    ("time_embed.linear2.{p}", "adaln_single.emb.timestep_embedder.linear_2.{p}"),
    ("time_modulation.{p}", "adaln_single.linear.{p}"),
    ("caption_projection.linear{k}.{p}", "caption_projection.linear_{k}.{p}"),
    ("clip_projection.{p}", "clip_projection.{p}"),
    *((f"blocks.{{i}}.{ours}", f"transformer_blocks.{{i}}.{public}") for ours, public in _BLOCK),
    ("scale_shift_table", "scale_shift_table"),
    ("proj_out.{p}", "proj_out.{p}", _OPPOSITE),
]


class StepVideoDiTAdapter(KeyMap):
    """Tensors and config of the transformer, both ways."""

    public_class = PUBLIC_CLASS

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict in the layout of the authors.

        Raises:
            CheckpointError: a key that this model does not have, or no norm of queries, which tells the width of a head.
        """
        return super().to_public(_regrouped(state_dict, "(p n k) d -> (n p k) d"))

    def from_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the authors in our layout.

        Raises:
            CheckpointError: a key that their layout does not have, or no norm of queries, which tells the width of a head.
        """
        return _regrouped(super().from_public(state_dict), "(n p k) d -> (p n k) d")

    def public_config(self, config: StepVideoDiTConfig) -> dict[str, Any]:
        """The `config.json` of the authors. Their code runs heads of 128 channels only, and fails at once with others."""
        channels = config.caption_channels
        return {
            "_class_name": PUBLIC_CLASS,
            "in_channels": config.in_channels,
            "out_channels": config.in_channels,
            "num_attention_heads": config.num_heads,
            "attention_head_dim": config.head_width,
            "num_layers": config.num_layers,
            "norm_eps": config.norm_eps,
            "caption_channels": [channels, config.clip_channels] if config.clip_channels else channels,
            "attention_type": "parallel",
            **_FIXED,
        }

    def config_from_public(self, config: Mapping[str, Any]) -> StepVideoDiTConfig:
        """Our config for a `config.json` of the authors; keys that it lacks have their defaults, those of the release.

        Raises:
            ConfigError: a value that this model does not have.
        """
        full = self.public_config(StepVideoDiTConfig()) | {key: value for key, value in config.items() if value is not None}
        if config.get("out_channels", 0) is None:
            full["out_channels"] = full["in_channels"]  # as their constructor reads it
        channels = full["caption_channels"]
        full["caption_channels"] = list(channels) if isinstance(channels, list | tuple) else channels
        caption, clip = channels if isinstance(channels, list | tuple) else (channels, 0)
        ours = StepVideoDiTConfig(
            in_channels=full["in_channels"],
            num_layers=full["num_layers"],
            num_heads=full["num_attention_heads"],
            head_width=full["attention_head_dim"],
            caption_channels=caption,
            clip_channels=clip,
            norm_eps=full["norm_eps"],
        )
        written = self.public_config(ours) | {key: full[key] for key in _NOT_THE_MODEL if key in full}
        wrong = [f"{key} {value!r}" for key, value in full.items() if key not in written or written[key] != value]
        if wrong:
            raise ConfigError(f"not a config of {PUBLIC_CLASS} that dit/step_video can hold: {', '.join(wrong)}.")
        return ours


def _regrouped(state_dict: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """`state_dict`, ours by name, with the rows of projections that share a tensor moved: p of them, n heads, k channels."""
    widths = {tensor.shape[0] for key, tensor in state_dict.items() if key.endswith(_HEAD_WIDTH)}
    fused = {key: parts for key in state_dict for end, parts in _FUSED.items() if key.endswith(end)}
    if fused and len(widths) != 1:
        raise CheckpointError(
            f"the tensors of queries, keys and values are laid out by head, but those named {_HEAD_WIDTH} have "
            f"{sorted(widths)} entries: all must be there and have the width of a head."
        )
    moved = dict(state_dict)
    for key, parts in fused.items():
        (width,) = widths
        if moved[key].shape[0] % (parts * width) == 0:  # else of another shape, which the model says
            moved[key] = rearrange(moved[key], pattern, p=parts, k=width)
    return moved


ADAPTER = StepVideoDiTAdapter(_PAIRS)
