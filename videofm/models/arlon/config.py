"""Shapes of the latent tokenizer (ARLON, arXiv 2410.20502; spec B3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from videofm.errors import ConfigError
from videofm.models.quantizers import QuantizerConfig, quantizer_config
from videofm.models.quantizers.config import is_whole

_AXES = ("time", "height", "width")


def _default_quantizer() -> QuantizerConfig:
    return quantizer_config({"kind": "vq_ema", "codebook_size": 2048, "dim": 16})


@dataclass(frozen=True)
class TokenizerConfig:
    """The shape of a latent tokenizer.

    Attributes:
        latent_channels: C of the latents that it is nested in.
        rate: latent cells for one token along (time, height, width); powers of two.
        widths: channels at the resolution of the latents, then after each halving; one more than there are halvings of the
            axis that is halved most. An axis is halved first, and left alone once its rate is reached.
        num_blocks: residual blocks at each width, in the encoder and in the decoder.
        num_groups: of every GroupNorm, whose statistics are those of one frame.
        quantizer: a config of `videofm.models.quantizers`, or a mapping with its `kind` and fields. Where the paper is silent:
            2048 codes of dim 16, moved by averages (the spec's default).
    """

    latent_channels: int = 4
    rate: tuple[int, int, int] = (4, 8, 8)
    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_blocks: int = 2
    num_groups: int = 32
    quantizer: QuantizerConfig = field(default_factory=_default_quantizer)

    def __post_init__(self) -> None:
        if not isinstance(self.quantizer, QuantizerConfig):
            object.__setattr__(self, "quantizer", quantizer_config(self.quantizer))
        self._check_types()
        if len(self.rate) != 3 or any(rate < 1 or rate & (rate - 1) for rate in self.rate):
            raise ConfigError(
                f"rate {self.rate} must be three powers of two, latent cells for a token along time, height, width."
            )
        if len(self.widths) != self.num_halvings + 1:
            raise ConfigError(
                f"widths {self.widths} are {len(self.widths)}, but rate {self.rate} takes {self.num_halvings} halvings: give "
                f"{self.num_halvings + 1}, the first at the resolution of the latents."
            )
        counts = {"latent_channels": self.latent_channels, "num_blocks": self.num_blocks, "num_groups": self.num_groups}
        if small := [f"{name} {value}" for name, value in counts.items() if value < 1]:
            raise ConfigError(f"{', '.join(small)} must be at least 1.")
        if wrong := [width for width in self.widths if width % self.num_groups or width <= 0]:
            raise ConfigError(f"widths {wrong} are not multiples of num_groups {self.num_groups}, as GroupNorm needs.")

    def _check_types(self) -> None:
        """Refuse anything but whole numbers and lists of them; the lists become tuples."""
        for name in ("latent_channels", "num_blocks", "num_groups"):
            if not is_whole(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a whole number.")
        for name in ("rate", "widths"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(is_whole(part) for part in value):
                raise ConfigError(f"{name} is {value!r}; it must be a list of whole numbers.")
            object.__setattr__(self, name, tuple(value))

    @property
    def num_halvings(self) -> int:
        """How often the axis that is halved most is halved."""
        return max(rate.bit_length() - 1 for rate in self.rate)

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        """(time, height, width) of each halving of the encoder, in its order; their product is `rate`."""
        time, height, width = (rate.bit_length() - 1 for rate in self.rate)
        return tuple((1 + (level < time), 1 + (level < height), 1 + (level < width)) for level in range(self.num_halvings))

    def describe_rate(self) -> str:
        """`time 4, height 8, width 8`."""
        return ", ".join(f"{axis} {rate}" for axis, rate in zip(_AXES, self.rate, strict=True))


_TINY: dict[str, Any] = {"latent_channels": 16, "num_blocks": 1, "num_groups": 8}
_TINY_CODES = {"kind": "vq_ema", "codebook_size": 256, "dim": 8}

SIZES = {
    "tiny": TokenizerConfig(rate=(1, 2, 2), widths=(32, 64), quantizer=quantizer_config(_TINY_CODES), **_TINY),
    "tiny_coarse": TokenizerConfig(rate=(1, 4, 4), widths=(32, 64, 64), quantizer=quantizer_config(_TINY_CODES), **_TINY),
    "4x8x8": TokenizerConfig(),
    "4x16x16": TokenizerConfig(rate=(4, 16, 16), widths=(128, 256, 512, 512, 512)),
    "2x2x2": TokenizerConfig(latent_channels=128, rate=(2, 2, 2), widths=(256, 512)),
    "2x4x4": TokenizerConfig(latent_channels=128, rate=(2, 4, 4), widths=(256, 512, 512)),
}
"""`4x8x8` and `4x16x16` are the paper's rates, on latents of 4x8x8 pixels each (Open-Sora's VAE): tokens of 16x64x64 and of
16x128x128 pixels. `2x2x2` and `2x4x4` give tokens of the same pixels on latents of 8x32x32 (LTX). `tiny` and `tiny_coarse` are
for latents of demonstrations, 4 to 8 cells wide. Which is the fine one, for inference, and which the coarse one, for training,
the recipe says."""
