"""The shape of Step-Video's Video-VAE (arXiv 2502.10248, section 4.1; spec step-video A2), both training stages."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from videofm.errors import ConfigError
from videofm.types import Compression

CHUNK_FRAMES = 17
"""Frames that are encoded together; every such chunk of a clip is coded by itself."""

STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
"""Stride (time, height, width) after each stage of the encoder but the last; the decoder runs them backwards."""

DUAL_PATH_FACTOR = 2
"""By how much the dual path shrinks time, height and width."""

NORM_SCOPES = ("frame", "clip")


@dataclass(frozen=True)
class StepVideoVAEConfig:
    """Encoder stages run from fine to coarse; the decoder mirrors them, with one ResBlock more in each.

    Names of parameters are stable, so that gradual unfreezing can select them (fnmatch patterns; each parameter matches one):

    - dual path: `*.dual_path.*`
    - middle blocks: `*.middle.*`
    - ResNet backbone: `*.stages.*`, `*.conv_*`, `*.norm_out.*` (`*.conv_*` are the first and last convolutions)

    Attributes:
        latent_channels: C of the latents.
        in_channels: C of the video.
        stem_width: channels after the first convolution of the encoder.
        widths: channels of the four stages.
        num_res_blocks: ResBlocks of an encoder stage.
        num_groups: groups of every GroupNorm.
        dual_path: whether convolutions beside averaged shortcuts shrink every axis by 2 once more (8x16x16, training stage
            two). Without it this is the plain 4x8x8 VAE of stage one.
        norm_scope: over what a GroupNorm takes its statistics: each `frame`, as the authors' version 2, or the `clip`, which
            is one chunk, as their version 1. With `clip` a latent sees later frames of its chunk.
        blend_seams: whether decoding mixes the frames on both sides of a seam between chunks (0.6 and 0.4), as released.
        scaling_factor: multiplies normalised latents.
    """

    latent_channels: int = 64
    in_channels: int = 3
    stem_width: int = 32
    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    num_groups: int = 32
    dual_path: bool = True
    norm_scope: str = "frame"
    blend_seams: bool = True
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.norm_scope not in NORM_SCOPES:
            raise ConfigError(f"norm_scope is {self.norm_scope!r}; there are: {', '.join(NORM_SCOPES)}.")
        if len(self.widths) != len(STRIDES) + 1:
            raise ConfigError(f"widths has {len(self.widths)} entries {self.widths}; it needs {len(STRIDES) + 1}.")
        for width in (self.stem_width, *self.widths):
            if width % self.num_groups:
                raise ConfigError(
                    f"stem_width {self.stem_width} and widths {self.widths} must be multiples of num_groups "
                    f"{self.num_groups}; {width} is not."
                )
        if self.dual_path and self.widths[-1] % (4 * self.latent_channels):
            raise ConfigError(
                f"the shortcuts of the dual path average and repeat whole groups of channels: the last of widths, "
                f"{self.widths[-1]}, must be a multiple of 4 * latent_channels = {4 * self.latent_channels}."
            )

    @property
    def dual_path_width(self) -> int:
        """Channels between the two dual-path blocks: a latent channel has 4 for each of the 8 pixels of a cell."""
        return 4 * self.latent_channels * DUAL_PATH_FACTOR**3

    @property
    def compression(self) -> Compression:
        """Pixels for one latent cell. Its frame rule holds inside a chunk, not for a clip of several."""
        last = DUAL_PATH_FACTOR if self.dual_path else 1
        time, height, width = (last * prod(stride[axis] for stride in STRIDES) for axis in range(3))
        return Compression(time, height, width)

    @property
    def chunk_latents(self) -> int:
        """Latent frames of a whole chunk."""
        return self.compression.latent_frames(CHUNK_FRAMES)


SIZES = {
    "tiny": StepVideoVAEConfig(latent_channels=8, stem_width=8, widths=(16, 16, 32, 32), num_res_blocks=1, num_groups=8),
    "8x8x4": StepVideoVAEConfig(latent_channels=16, dual_path=False),
    "16x16x8": StepVideoVAEConfig(),
}
"""The published size, and the one that its training starts from; `tiny` is for tests and quick runs."""
