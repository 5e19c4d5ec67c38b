"""The shape of an image VAE of the Stable Diffusion family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from videofm.errors import ConfigError
from videofm.types import Compression


@dataclass(frozen=True)
class ImageKLConfig:
    """What `AutoencoderKL` of diffusers can vary, apart from tiling. Levels are listed from fine to coarse.

    Attributes:
        latent_channels: C of the latents.
        widths: channels of each level; each but the last halves height and width.
        num_res_blocks: ResBlocks of each encoder level; a decoder level has one more.
        num_groups: groups of the GroupNorms.
        quant_convs: whether a 1x1 convolution follows the encoder, and one precedes the decoder.
        middle_attention: whether the coarsest level has attention.
        scaling_factor, shift_factor: latents are normalised as `(z - shift) * scaling`, until statistics are measured.
        sample_size: pixels a side that the releaser trained on; a note for others.
    """

    in_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    num_groups: int = 32
    quant_convs: tuple[bool, bool] = (True, True)
    middle_attention: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    sample_size: int = 768

    def __post_init__(self) -> None:
        odd = [width for width in self.widths if width % self.num_groups]
        if not self.widths or odd:
            raise ConfigError(f"widths {self.widths} must be multiples of num_groups ({self.num_groups}); not so: {odd}.")

    @property
    def compression(self) -> Compression:
        """Pixels for one latent cell: every frame has its own."""
        side = 2 ** (len(self.widths) - 1)
        return Compression(1, side, side)

    @property
    def arguments(self) -> dict[str, Any]:
        """What `AutoencoderKL` is built with."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.in_channels,
            "down_block_types": ["DownEncoderBlock2D"] * len(self.widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(self.widths),
            "block_out_channels": list(self.widths),
            "layers_per_block": self.num_res_blocks,
            "act_fn": "silu",
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.num_groups,
            "sample_size": self.sample_size,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor or None,
            "latents_mean": None,
            "latents_std": None,
            "force_upcast": True,
            "use_quant_conv": self.quant_convs[0],
            "use_post_quant_conv": self.quant_convs[1],
            "mid_block_add_attention": self.middle_attention,
        }


SIZES = {
    "tiny": ImageKLConfig(widths=(16, 32, 32, 32), num_res_blocks=1, num_groups=8, quant_convs=(False, False), sample_size=32),
    "sd21": ImageKLConfig(),
    "sd3": ImageKLConfig(
        latent_channels=16, quant_convs=(False, False), scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024
    ),
}
