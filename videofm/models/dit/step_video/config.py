"""The shape of a Step-Video transformer (spec step-video A3)."""

from __future__ import annotations

from dataclasses import dataclass

from videofm.errors import ConfigError
from videofm.models.flops import cross_attention_transformer_flops
from videofm.ops.rope import head_split


@dataclass(frozen=True)
class StepVideoDiTConfig:
    """Sizes of the transformer; the defaults are those of the release.

    Attributes:
        in_channels: C of the latents, before and after.
        num_layers: transformer blocks.
        num_heads, head_width: N and K; the width of the model D is their product. K is a multiple of 8.
        caption_channels: width of the states of the language model.
        clip_channels: width of the states of the second text encoder; 0 for a model without one.
        norm_eps: epsilon of the layer norms without weights.
    """

    in_channels: int = 64
    num_layers: int = 48
    num_heads: int = 48
    head_width: int = 128
    caption_channels: int = 6144
    clip_channels: int = 1024
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        head_split(self.head_width)
        if self.clip_channels < 0:
            raise ConfigError(f"clip_channels {self.clip_channels} must be at least 1, or 0 for a model without that encoder.")

    @property
    def width(self) -> int:
        """D."""
        return self.num_heads * self.head_width

    def flops(self, num_tokens: int, num_text_tokens: int) -> int:
        """FLOPs of one sample, forward and backward; `num_text_tokens` are those of both encoders together.

        See `models.flops` for what is counted.
        """
        return cross_attention_transformer_flops(self.num_layers, self.width, num_tokens, num_text_tokens)


SIZES = {
    "tiny": StepVideoDiTConfig(in_channels=16, num_layers=4, num_heads=4, head_width=32, caption_channels=64, clip_channels=32),
    "30b": StepVideoDiTConfig(),
}
