"""The latent tokenizer: a VQ-VAE nested in the latent space of a frozen video VAE (ARLON, arXiv 2410.20502; spec B3).

Latents z `(B, C, T, H, W)`, normalised, become indices `(B, T', H', W')`, and indices become features F of the shape of z. F
lives where z does, so tokenizers of other rates are interchangeable wherever F is taken.

All is causal in time, in both directions. A token stands for `rate` frames and sees these and what came before. T' is
ceil(T / rate); where `rate` does not divide T the first frame is repeated in FRONT of the clip, which the decoder drops again.
So the tokens of the first frames of a clip are the first tokens of the clip, for any two lengths that leave the same rest
(1 + 4 n frames at rate 4). The paper's own tokenizer is not public; widths and blocks are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from videofm.errors import ConfigError, DataError
from videofm.models.arlon.config import SIZES, TokenizerConfig
from videofm.models.auxiliary import whole
from videofm.models.own_layout import OwnLayout
from videofm.models.quantizers import QuantizerOutput, build_quantizer
from videofm.models.vae.blocks import ResBlock
from videofm.ops.causal_conv import CausalConv3d
from videofm.ops.norm import GroupNorm
from videofm.types import ModelSpec


@dataclass(frozen=True)
class TokenizerOutput:
    """`features` F of the shape of the latents, and what the quantizer says of them; its `indices` are the tokens."""

    features: Tensor
    quantized: QuantizerOutput


class StridedConv(CausalConv3d):
    """A causal convolution whose output, of `stride` frames, has seen the last of them.

    It is padded in front by `kernel - stride` frames and not by `kernel - 1`, which would leave the frames behind the last
    output unseen.
    """

    @property
    def reach(self) -> tuple[int, int]:
        """Frames before and after the one it stands at that an output sees."""
        return self.kernel_size[0] - self.stride[0], 0


class Upsample(nn.Module):
    """Nearest neighbour along (time, height, width), then a causal convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.scale = tuple(float(factor) for factor in stride)
        self.conv = CausalConv3d(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in, T, H, W)` -> `(B, out, T * time, H * height, W * width)`."""
        return self.conv(interpolate(x, scale_factor=self.scale, mode="nearest"))


class Encoder(nn.Module):
    """Latents to vectors of `dim` for the quantizer, one a token."""

    def __init__(self, config: TokenizerConfig, dim: int) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        layers: list[nn.Module] = list(_blocks(config, widths[0]))
        for before, after, stride in zip(widths, widths[1:], config.strides, strict=False):
            layers += [StridedConv(before, after, stride=stride), *_blocks(config, after)]
        self.layers = nn.Sequential(*layers)
        self.norm = _norm(config, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], dim, 1)

    def forward(self, z: Tensor) -> Tensor:
        """`(B, C, T, H, W)` whose sizes `rate` divides -> `(B, dim, T', H', W')`."""
        return self.conv_out(silu(self.norm(self.layers(self.conv_in(z)))))


class Decoder(nn.Module):
    """Quantized vectors of `dim` to features of the latents' shape; the encoder's mirror."""

    def __init__(self, config: TokenizerConfig, dim: int) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = CausalConv3d(dim, widths[0], 1)
        layers: list[nn.Module] = list(_blocks(config, widths[0]))
        for before, after, stride in zip(widths, widths[1:], config.strides[::-1], strict=False):
            layers += [Upsample(before, after, stride), *_blocks(config, after)]
        self.layers = nn.Sequential(*layers)
        self.norm = _norm(config, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.latent_channels)

    def forward(self, z_q: Tensor) -> Tensor:
        """`(B, dim, T', H', W')` -> `(B, C, T' * time, H' * height, W' * width)`."""
        return self.conv_out(silu(self.norm(self.layers(self.conv_in(z_q)))))


class LatentTokenizer(nn.Module):
    """Latents to tokens, and tokens to features of the latents' shape."""

    spec_name = "arlon/tokenizer"

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = Encoder(config, self.quantizer.dim)
        self.decoder = Decoder(config, self.quantizer.dim)

    def forward(self, z: Tensor) -> TokenizerOutput:
        """What comes back of latents, and the tokens between.

        Args:
            z: `(B, C, T, H, W)`, normalised; any number of frames, H and W multiples of the rate.

        Raises:
            DataError: other channels, or a height or width that the rate does not divide.
        """
        quantized = self.quantizer(self._vectors(z))
        return TokenizerOutput(self._features(quantized.z_q, z.shape[2]), quantized)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Tokens of normalised latents: int64 `(B, T', H', W')`, or `(B, T', H', W', Q)` with several codebooks.

        Also of a tokenizer in training, whose codebook takes no notice. Arguments and errors are those of `forward`.
        """
        vectors, training = self._vectors(z), self.quantizer.training
        self.quantizer.eval()
        try:
            return self.quantizer(vectors).indices
        finally:
            self.quantizer.train(training)

    def decode(self, indices: Tensor, num_frames: int) -> Tensor:
        """Features `(B, C, num_frames, H, W)` of tokens, in the space of normalised latents.

        Args:
            indices: as `encode` gives them.
            num_frames: latent frames that the tokens stand for; where the rate divides it not, some of the first token's are
                not of the clip.

        Raises:
            DataError: tokens of another number of frames or codebooks, or an index that is no code.
        """
        z_q, time = self.quantizer.codes(indices), self.config.rate[0]
        if num_frames < 1 or indices.shape[1] != -(-num_frames // time):
            last = indices.shape[1] * time
            raise DataError(
                f"{indices.shape[1]} token frames at rate {time} stand for {last - time + 1} to {last} latent frames, not "
                f"{num_frames}."
            )
        return self._features(z_q, num_frames)

    def token_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along time, height and width of latents of `shape` (T, H, W).

        Raises:
            DataError: no frame, or a height or width that the rate does not divide.
        """
        (num_frames, height, width), (time, down, right) = shape, self.config.rate
        if num_frames < 1 or height < 1 or width < 1 or height % down or width % right:
            raise DataError(
                f"latents of {num_frames} frames of {height}x{width} do not fit this tokenizer, whose rate is "
                f"{self.config.describe_rate()}: height must be a multiple of {down} and width of {right} latent cells. Take "
                "clips of such a size, or a tokenizer of a lower rate."
            )
        return -(-num_frames // time), height // down, width // right

    @property
    def num_books(self) -> int:
        """Codebooks of the quantizer; tokens have an index for each."""
        return self.quantizer.num_books

    @property
    def vocab_size(self) -> int:
        """Number of codes of a quantizer that has one codebook.

        Raises:
            ConfigError: it has several, so that a token is no single number.
        """
        if self.num_books != 1:
            raise ConfigError(
                f"this tokenizer has {self.num_books} codebooks, so a token is {self.num_books} numbers; what predicts tokens "
                "one by one takes a tokenizer with one codebook (quantizer kind vq, vq_ema, simvq or fsq)."
            )
        return self.quantizer.vocab_sizes[0]

    def _vectors(self, z: Tensor) -> Tensor:
        """`(B, dim, T', H', W')`, one for each token."""
        if z.ndim != 5 or z.shape[1] != self.config.latent_channels:
            raise DataError(
                f"latents have shape {tuple(z.shape)}; this tokenizer takes (B, {self.config.latent_channels}, T, H, W). "
                "Another number of channels is another VAE's."
            )
        num_frames, height, width = z.shape[2:]
        num_tokens, _, _ = self.token_shape((num_frames, height, width))
        missing = num_tokens * self.config.rate[0] - num_frames
        return self.encoder(torch.cat([z[:, :, :1].expand(-1, -1, missing, -1, -1), z], dim=2) if missing else z)

    def _features(self, z_q: Tensor, num_frames: int) -> Tensor:
        """`(B, C, num_frames, H, W)` without what stands for frames repeated in front."""
        features = self.decoder(z_q)
        return features[:, :, features.shape[2] - num_frames :]


def _norm(config: TokenizerConfig, width: int) -> GroupNorm:
    return GroupNorm(config.num_groups, width, scope="frame")


def _blocks(config: TokenizerConfig, width: int) -> list[ResBlock]:
    return [
        ResBlock(CausalConv3d(width, width), CausalConv3d(width, width), lambda channels: _norm(config, channels))
        for _ in range(config.num_blocks)
    ]


ADAPTER = OwnLayout("ArlonLatentTokenizer", TokenizerConfig, ("encoder", "quantizer", "decoder"))
SPEC = ModelSpec(LatentTokenizer.spec_name, TokenizerConfig, SIZES, LatentTokenizer, whole, ADAPTER)
