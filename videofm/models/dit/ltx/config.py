"""The shape of an LTX video transformer (spec C.1)."""

from __future__ import annotations

from dataclasses import dataclass

from videofm.errors import ConfigError
from videofm.models.flops import cross_attention_transformer_flops


@dataclass(frozen=True)
class LTXDiTConfig:
    """Sizes of the transformer.

    Attributes:
        in_channels: C of the latents, before and after.
        num_layers: transformer blocks.
        num_heads, head_width: N and K; the width of the model D is their product.
        caption_channels: width of the text embeddings.
        norm_eps: epsilon of the RMS norms without weights.
        theta: the ratio of the highest to the lowest rotary frequency.
    """

    in_channels: int = 128
    num_layers: int = 28
    num_heads: int = 32
    head_width: int = 64
    caption_channels: int = 4096
    norm_eps: float = 1e-6
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.width % 2 or self.width < 6:
            raise ConfigError(
                f"num_heads {self.num_heads} x head_width {self.head_width} = {self.width} channels: rotary positions "
                "need an even number, at least 6."
            )

    @property
    def width(self) -> int:
        """D."""
        return self.num_heads * self.head_width

    def flops(self, num_tokens: int, num_text_tokens: int) -> int:
        """FLOPs of one sample, forward and backward; see `models.flops` for what is counted."""
        return cross_attention_transformer_flops(self.num_layers, self.width, num_tokens, num_text_tokens)


SIZES = {
    "tiny": LTXDiTConfig(in_channels=16, num_layers=4, num_heads=4, head_width=32, caption_channels=64),
    "2b": LTXDiTConfig(),
    "13b": LTXDiTConfig(num_layers=48, head_width=128),
}
