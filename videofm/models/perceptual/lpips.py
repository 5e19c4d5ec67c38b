"""LPIPS v0.1 on VGG16 (Zhang et al. 2018): a learned distance between two frames.

Sources: richzhang/PerceptualSimilarity, `lpips/lpips.py`; the convolutions are those of torchvision's `vgg16().features`, under
their indices there. Weights come from one local safetensors file that holds `features.{i}.weight` and `features.{i}.bias` for
i = 0 2 5 7 10 12 14 17 19 21 24 26 28, and `heads.{k}.weight` `(1, C, 1, 1)`, none negative, for k = 0 to 4.
`tools/convert_perceptual.py` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models.auxiliary import PlainAdapter, frozen, whole
from videofm.types import ModelSpec

STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Convolutions of each stage by their index in torchvision's list. The last of a stage is tapped after its ReLU (relu1_2,
relu2_2, relu3_3, relu4_3, relu5_3); a 2x2 maximum stands between stages."""
MIN_SIZE = 16
"""Fewest pixels along height and width: four times halved, one position is left."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10
_RULE = (
    "LPIPS reads one safetensors file with features.{i}.weight and .bias (VGG16) and heads.{k}.weight, none negative; make it "
    "with tools/convert_perceptual.py from torchvision's vgg16 and the vgg.pth of lpips v0.1."
)


@dataclass(frozen=True)
class LPIPSConfig:
    """The network and its file.

    Attributes:
        widths: channels of the five stages.
        weights: local safetensors file; None for fresh random weights, which measure nothing that was learned.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    weights: str | None = None

    def __post_init__(self) -> None:
        if len(self.widths) != len(STAGES):
            raise ConfigError(f"widths has {len(self.widths)} entries {self.widths}; VGG16 has {len(STAGES)} stages.")


SIZES = {"tiny": LPIPSConfig(widths=(4, 8, 8, 16, 16)), "vgg16": LPIPSConfig()}


class LPIPS(nn.Module):
    """Frozen: gradients flow to the videos only."""

    spec_name = "perceptual/lpips"

    def __init__(self, config: LPIPSConfig) -> None:
        super().__init__()
        self.config = config
        self.features = nn.ModuleDict()
        entering = 3
        for width, indices in zip(config.widths, STAGES, strict=True):
            for index in indices:
                self.features[str(index)] = nn.Conv2d(entering, width, 3, padding=1)
                entering = width
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in config.widths)
        for head in self.heads:
            nn.init.ones_(head.weight)  # all channels count the same

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of each frame of `a` from the same frame of `b`.

        Args:
            a, b: `(B, 3, T, H, W)` in [-1, 1], frames of at least 16x16 pixels.

        Returns:
            `(B, T)` float32, at least 0.

        Raises:
            DataError: shapes differ, are not of videos, or frames are too small.
        """
        _check(a, b)
        num_clips = a.shape[0]
        shift, scale = (a.new_tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        x, y = ((rearrange(video, "b c t h w -> (b t) c h w") - shift) / scale for video in (a, b))
        total = x.new_zeros(x.shape[0], dtype=torch.float32)
        for stage, head in enumerate(self.heads):
            x, y = self._stage(x, stage), self._stage(y, stage)
            difference = (_unit(x) - _unit(y)).square()  # (B T, C, H, W)
            total = total + (difference * head.weight.float()).sum(dim=1).mean(dim=(1, 2))
        return total.view(num_clips, -1)  # (B T,) -> (B, T)

    def _stage(self, x: Tensor, stage: int) -> Tensor:
        # (N, C, H, W) -> the tap of this stage.
        if stage > 0:
            x = max_pool2d(x, 2)
        for index in STAGES[stage]:
            x = relu(self.features[str(index)](x))
        return x


def _unit(features: Tensor) -> Tensor:
    """Length one over channels, in float32; where all channels are zero they stay zero."""
    wide = features.float()
    return wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + _EPS)


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 5 or a.shape[1] != 3:
        raise DataError(f"LPIPS compares videos (B, 3, T, H, W): got {tuple(a.shape)} and {tuple(b.shape)}.")
    if min(a.shape[3:]) < MIN_SIZE:
        raise DataError(f"LPIPS needs frames of at least {MIN_SIZE}x{MIN_SIZE} pixels, not {a.shape[3]}x{a.shape[4]}.")


def build(config: LPIPSConfig) -> LPIPS:
    """The network on the default device, frozen, with the weights of `config.weights` (unless that device is meta).

    Raises:
        CheckpointError: the file is absent, damaged, of another network, or has negative heads.
    """
    model = LPIPS(config)
    frozen(model, config.weights, _RULE)
    if config.weights is not None and any(
        head.weight.device.type != "meta" and bool((head.weight < 0).any()) for head in model.heads
    ):
        raise CheckpointError(f"{config.weights} has negative heads. {_RULE}")
    return model


ADAPTER = PlainAdapter(
    [("features.{i}.{p}", "features.{i}.{p}"), ("heads.{k}.weight", "lin{k}.model.1.weight")], "LPIPS", LPIPSConfig
)
"""Public: `features.*` of torchvision's vgg16 and `lin*` of the vgg.pth of lpips v0.1, in one dict."""
SPEC = ModelSpec(LPIPS.spec_name, LPIPSConfig, SIZES, build, whole, ADAPTER)
