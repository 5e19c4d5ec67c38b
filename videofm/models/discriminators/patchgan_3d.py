"""The 3D patch discriminator of CV-VAE (spec A.5), also with six input channels for LTX's reconstruction GAN (spec B.5).

Source: AILab-CVC/CV-VAE, `models/discriminator.py`. Logits are of patches; norms look at one clip, never across samples. All
tensors are `(B, C, T, H, W)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, silu

from videofm.errors import ConfigError, DataError
from videofm.models.auxiliary import PlainAdapter, whole
from videofm.types import ModelSpec

SLOPE = 0.2
"""Of the LeakyReLU."""
INIT_STD = 0.02
"""Of the weights of all convolutions but the last."""
_TIME_EMBEDDING_WIDTH = 512


@dataclass(frozen=True)
class PatchGAN3dConfig:
    """The shape of the discriminator.

    Attributes:
        in_channels: 3 for a video; 6 for an original and a reconstruction on top of each other.
        widths: channels after the strided first convolution, then after each ResBlock that halves time, height and width.
        flat_widths: channels after each ResBlock that keeps the size.
        num_groups: of every GroupNorm.
        head_std: standard deviation of the fresh weights of the last convolution. The authors draw it like the others (0.02),
            which gives first logits of standard deviation 1.2, and the hinge loss starts at 1.1 to 1.2 in place of 1.
    """

    in_channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256)
    flat_widths: tuple[int, ...] = (512, 512)
    num_groups: int = 32
    head_std: float = 0.001

    def __post_init__(self) -> None:
        if not self.widths:
            raise ConfigError("widths is empty: give at least the width of the first convolution.")
        if wrong := [width for width in (*self.widths, *self.flat_widths) if width % self.num_groups or width <= 0]:
            raise ConfigError(f"widths {wrong} are not multiples of num_groups {self.num_groups}, as GroupNorm needs.")

    @property
    def min_size(self) -> int:
        """Fewest pixels along height and width that leave one patch."""
        return 2 ** len(self.widths) - 1


SIZES = {
    "tiny": PatchGAN3dConfig(widths=(16, 32), flat_widths=(64,), num_groups=8),
    "cv_vae": PatchGAN3dConfig(),
    "reconstruction": PatchGAN3dConfig(in_channels=6),
}


class ResBlock(nn.Module):
    """Twice norm, SiLU, convolution, around a skip; when it halves the size, both paths are averaged over 2x2x2.

    An odd number of frames is made even by one more copy of frame 0.
    """

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, halves: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(num_groups, in_channels), nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(num_groups, out_channels), nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.halves = halves

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in, T, H, W)` -> `(B, out, T, H, W)`, or half of each size (time rounded up, space down)."""
        h = self.conv1(silu(self.norm1(x)))
        if self.halves:
            h, x = _halve(h), _halve(x)
        h = self.conv2(silu(self.norm2(h)))
        return self.shortcut(x) + h


def _halve(x: Tensor) -> Tensor:
    if x.shape[2] % 2 == 1:
        x = torch.cat([x[:, :, :1], x], dim=2)
    return avg_pool3d(x, kernel_size=2)


class PatchGAN3d(nn.Module):
    """Video to the logits of its patches: above zero means original."""

    spec_name = "discriminator/patchgan_3d"

    def __init__(self, config: PatchGAN3dConfig) -> None:
        super().__init__()
        self.config = config
        widths, groups = (*config.widths, *config.flat_widths), config.num_groups
        layers: list[nn.Module] = [nn.Conv3d(config.in_channels, widths[0], 3, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for index in range(1, len(widths)):
            block = ResBlock(widths[index - 1], widths[index], groups, halves=index < len(config.widths))
            layers += [block, nn.GroupNorm(groups, widths[index]), nn.LeakyReLU(SLOPE)]
        head = nn.Conv3d(widths[-1], 1, 3, padding=1)
        self.main = nn.Sequential(*layers, head)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=config.head_std if module is head else INIT_STD)
        nn.init.zeros_(head.bias)

    def forward(self, video: Tensor) -> Tensor:
        """Logits of the patches of each clip.

        Args:
            video: `(B, C, T, H, W)`, T at least 1.

        Returns:
            `(B, 1, T', H', W')`: time is halved and rounded up, space first up and then down, once for each of `widths`.

        Raises:
            DataError: other channels than `in_channels`, or frames that are too small.
        """
        self._check(video)
        return self.main(video)

    def _check(self, video: Tensor) -> None:
        channels, smallest = self.config.in_channels, self.config.min_size
        if video.ndim != 5 or video.shape[1] != channels:
            raise DataError(f"{self.spec_name} takes (B, {channels}, T, H, W), not {tuple(video.shape)}.")
        if min(video.shape[3:]) < smallest or video.shape[2] < 1:
            raise DataError(
                f"{self.spec_name} needs at least one frame of {smallest}x{smallest} pixels, not "
                f"{video.shape[2]} of {video.shape[3]}x{video.shape[4]}."
            )


class PatchGAN3dAdapter(PlainAdapter):
    """The layout of CV-VAE's `NLayerDiscriminator3D`.

    Each ResBlock there also holds `temb_proj`, the projection of a time embedding that is never given: left out on the way
    in, zeros on the way out.
    """

    def to_public(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under the authors' names, which their class loads strictly."""
        public = super().to_public(state_dict)
        unused: dict[str, Tensor] = {}
        for key, bias in public.items():
            if key.endswith(".conv2.bias"):
                place = key.removesuffix("conv2.bias") + "temb_proj"
                unused |= {f"{place}.weight": bias.new_zeros(len(bias), _TIME_EMBEDDING_WIDTH), f"{place}.bias": 0 * bias}
        return public | unused


_PAIRS = [
    ("main.{i}.{p}", "main.{i}.{p}"),
    ("main.{i}.norm{k}.{p}", "main.{i}.norm{k}.{p}"),
    ("main.{i}.conv{k}.{p}", "main.{i}.conv{k}.{p}"),
    ("main.{i}.shortcut.{p}", "main.{i}.nin_shortcut.{p}"),
]
ADAPTER = PatchGAN3dAdapter(_PAIRS, "NLayerDiscriminator3D", PatchGAN3dConfig, dropped=("temb_proj.weight", "temb_proj.bias"))
SPEC = ModelSpec(PatchGAN3d.spec_name, PatchGAN3dConfig, SIZES, PatchGAN3d, whole, ADAPTER)
