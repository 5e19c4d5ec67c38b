"""The shape of an OD-VAE: the four variants of the paper (arXiv 2409.01199; spec D.1), of which the fourth was released.

The paper names which blocks lose their temporal kernels. Layer by layer only variant 4 is public (`CausalVAEModel_4x8x8`); the
others follow its rules: the convolution at the pixels goes with the blocks of its level, and a resampler that leaves time alone
has a 1x3x3 kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from videofm.errors import ConfigError
from videofm.types import Compression

KERNEL_TIMES = {"2d": (1, 1), "half": (3, 1), "3d": (3, 3)}
"""Kinds of ResBlock, and how many frames the kernels of its two convolutions span."""
NORM_SCOPES = ("frame", "clip")
INTERPOLATIONS = ("trilinear", "nearest")


@dataclass(frozen=True)
class ODVAEConfig:
    """Levels are listed from the finest to the coarsest, in the encoder and in the decoder. The defaults are variant 4.

    Attributes:
        latent_channels: C of the latents.
        widths: channels of each level.
        num_res_blocks: ResBlocks of a level of the encoder; a level of the decoder has one more.
        num_groups: of the GroupNorms.
        encoder_blocks, decoder_blocks: a key of `KERNEL_TIMES` for each level. With `2d` at the finest level the convolution at
            the pixels is 2D too.
        middle_block: the same for the blocks around the attention of the coarsest level.
        doubles_time: whether the step between a level and the next halves (in the decoder doubles) the frames too.
        norm_scope: `clip` takes the statistics of a GroupNorm over all frames, as released, so that each sees every other;
            `frame` over each by itself, so that the encoder is causal. Those of `2d` blocks are per frame anyway.
        time_interpolation: how the decoder doubles frames: `trilinear`, as released, looks one frame ahead; `nearest`
            holds each.
        space_interpolation: how it doubles height and width there; `nearest` is that of Stable Diffusion's VAE. A step that
            leaves time alone is `nearest` in any case, as released.
        scaling_factor: multiplies normalised latents.
    """

    latent_channels: int = 4
    in_channels: int = 3
    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    num_groups: int = 32
    encoder_blocks: tuple[str, ...] = ("2d", "2d", "3d", "3d")
    decoder_blocks: tuple[str, ...] = ("3d", "3d", "3d", "3d")
    middle_block: str = "3d"
    doubles_time: tuple[bool, ...] = (False, True, True)
    norm_scope: str = "frame"
    time_interpolation: str = "trilinear"
    space_interpolation: str = "trilinear"
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        lengths = {"encoder_blocks": 0, "decoder_blocks": 0, "doubles_time": 1}
        for name, fewer in lengths.items():
            value, needed = getattr(self, name), len(self.widths) - fewer
            if len(value) != needed:
                raise ConfigError(
                    f"{name} has {len(value)} entries {value}; with {len(self.widths)} levels (widths) it needs {needed}."
                )
        choices = {
            "encoder_blocks": (self.encoder_blocks, tuple(KERNEL_TIMES)),
            "decoder_blocks": (self.decoder_blocks, tuple(KERNEL_TIMES)),
            "middle_block": ((self.middle_block,), ("half", "3d")),
            "norm_scope": ((self.norm_scope,), NORM_SCOPES),
            "time_interpolation": ((self.time_interpolation,), INTERPOLATIONS),
            "space_interpolation": ((self.space_interpolation,), INTERPOLATIONS),
        }
        for name, (given, allowed) in choices.items():
            if unknown := sorted(set(given) - set(allowed)):
                raise ConfigError(f"{name} has {unknown}; there are: {', '.join(allowed)}.")
        if odd := [width for width in self.widths if width % self.num_groups]:
            raise ConfigError(f"widths {odd} are no multiples of num_groups {self.num_groups}: change one or the other.")

    @property
    def compression(self) -> Compression:
        """Pixels for one latent cell."""
        space = 2 ** (len(self.widths) - 1)
        return Compression(2 ** sum(self.doubles_time), space, space)


_ALL_3D = ("3d", "3d", "3d", "3d")
_ALL_HALF = ("half", "half", "half", "half")
_OUTER_2D = ("2d", "2d", "3d", "3d")

SIZES = {
    "tiny": ODVAEConfig(widths=(16, 32, 32, 32), num_res_blocks=1, num_groups=8),
    "variant1": ODVAEConfig(encoder_blocks=_ALL_3D, decoder_blocks=_ALL_3D),
    "variant2": ODVAEConfig(encoder_blocks=_ALL_HALF, decoder_blocks=_ALL_HALF, middle_block="half"),
    "variant3": ODVAEConfig(encoder_blocks=_OUTER_2D, decoder_blocks=_OUTER_2D),
    "variant4": ODVAEConfig(encoder_blocks=_OUTER_2D, decoder_blocks=_ALL_3D),
}
