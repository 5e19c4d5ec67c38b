"""CV-VAE (arXiv 2405.20279; spec A), for one device: a video VAE whose latents an image VAE can read.

It is Stable Diffusion's VAE with a time axis in some of its convolutions, so that it can start as that image VAE.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from videofm.attention import AttentionSpec, choose
from videofm.models.vae.base import LOGVAR_RANGE, VideoVAE
from videofm.models.vae.blocks import FrameAttention, Norm, ResBlock
from videofm.models.vae.cv_vae.config import CVVAEConfig
from videofm.ops.causal_conv import CausalConv3d, ChunkCache, SpacePadding
from videofm.ops.norm import GroupNorm
from videofm.types import Posterior

if TYPE_CHECKING:
    from videofm.types import AttentionFn


class Parts:
    """Makes the layers of one direction: convolutions and norms as the config has them."""

    def __init__(self, config: CVVAEConfig, causal: bool) -> None:
        self.config, self.causal = config, causal
        self.replicate = config.padding == "replicate"
        self.norm: Norm = partial(self._norm, scope=config.norm_scope)
        self.frame_norm: Norm = partial(self._norm, scope="frame")

    def _norm(self, width: int, scope: str) -> GroupNorm:
        return GroupNorm(self.config.num_groups, width, self.config.norm_eps, scope)

    def conv(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> CausalConv3d:
        """A 3D convolution. One that looks ahead has zeros on both sides of time, unless everything is replicated."""
        return CausalConv3d(
            in_channels,
            out_channels,
            kernel_size,
            causal=self.causal,
            time_padding="repeat" if self.causal or self.replicate else "zeros",
            space_padding="replicate" if self.replicate else "same",
        )

    def downsample(self, width: int, halves_time: bool) -> CausalConv3d:
        """A strided convolution; it looks back in every release, whatever the others do."""
        space_padding: SpacePadding = "replicate" if self.replicate else "end"
        causal = self.causal or not self.replicate
        return CausalConv3d(width, width, 3, (1 + halves_time, 2, 2), causal, space_padding=space_padding)

    def upsample_conv(self, width: int, num_frames: int) -> CausalConv3d:
        """The convolution of an upsampler, which repeats in time in every release."""
        space_padding: SpacePadding = "replicate" if self.replicate else "same"
        return CausalConv3d(width, width * num_frames, causal=self.causal, space_padding=space_padding)

    def res_block(self, in_channels: int, out_channels: int) -> ResBlock:
        """A ResBlock of one 3D and, with `half_3d`, one 2D convolution; 2D ones always pad with zeros."""
        second = CausalConv3d(out_channels, out_channels, (1, 3, 3)) if self.config.half_3d else None
        return ResBlock(
            self.conv(in_channels, out_channels),
            second or self.conv(out_channels, out_channels),
            self.norm,
            None if in_channels == out_channels else self.conv(in_channels, out_channels, 1),
        )


class Upsample(nn.Module):
    """Twice the height and width; where it also doubles time, 1 + n frames become 1 + 2n.

    Each pixel is repeated, then a convolution gives the channels of r frames, which are laid out in time; with r = 2 the first
    of a clip is dropped, because frame 0 stands alone.
    """

    def __init__(self, conv: CausalConv3d) -> None:
        super().__init__()
        self.conv = conv
        self.num_frames = conv.out_channels // conv.in_channels

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, 1 + n, H, W)` -> `(B, C, 1 + r * n, 2H, 2W)`; a later chunk of n frames gives r * n."""
        x = self.conv(interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"), cache)
        x = rearrange(x, "b (r c) t h w -> b c (t r) h w", r=self.num_frames)
        return x[:, :, self.num_frames - 1 :] if cache is None or cache.is_first else x


class TemporalAttention(nn.Module):
    """Single-head attention among the frames, each location by itself. No residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attend: AttentionFn = choose("auto", AttentionSpec(1, width))

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, T, H, W)` -> the same shape; the frames of a chunk attend to those of the clip."""
        height, width = x.shape[3:]
        tokens = seen = self.norm(rearrange(x, "b c t h w -> (b h w) t c"))
        if cache is not None:
            seen = self.norm(rearrange(cache.whole(self, x), "b c t h w -> (b h w) t c"))
        q, k, v = (layer(tokens).unsqueeze(2) for layer, tokens in ((self.q, tokens), (self.k, seen), (self.v, seen)))
        tokens = self.out(self.attend(q, k, v, None).squeeze(2))
        return rearrange(tokens, "(b h w) t c -> b c t h w", h=height, w=width)


class Middle(nn.Module):
    """The coarsest level: a ResBlock, attention inside each frame, perhaps attention among frames, a ResBlock."""

    def __init__(self, parts: Parts, temporal_attention: str = "none") -> None:
        super().__init__()
        width = parts.config.widths[-1]
        self.blocks = nn.ModuleList(parts.res_block(width, width) for _ in range(2))
        self.attention = FrameAttention(width, parts.frame_norm)
        self.temporal = None if temporal_attention == "none" else TemporalAttention(width)
        self.replaces = temporal_attention == "released"
        if self.temporal is not None and not self.replaces:
            nn.init.zeros_(self.temporal.out.weight)
            nn.init.zeros_(self.temporal.out.bias)

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, T, H, W)` -> the same shape."""
        x = self.blocks[0](x, cache)
        added = self.attention.attended(x, cache)
        if self.temporal is not None and self.replaces:
            x = x + self.temporal(added, cache)
        else:
            x = x + added
            x = x if self.temporal is None else x + self.temporal(x, cache)
        return self.blocks[1](x, cache)


class Level(nn.Module):
    """ResBlocks at one resolution, then a change of resolution, except where it ends: the coarsest down, the finest up."""

    def __init__(
        self, blocks: list[ResBlock], downsample: CausalConv3d | None = None, upsample: Upsample | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, T, H, W)` -> the same frames, or those of the next level."""
        for block in self.blocks:
            x = block(x, cache)
        change = self.downsample or self.upsample
        return x if change is None else change(x, cache)


class Encoder(nn.Module):
    """Video to the mean and log-variance of its latents."""

    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__()
        parts, widths = Parts(config, config.causal_encoder), config.widths
        self.conv_in = parts.conv(config.in_channels, widths[0])
        stages, entering = [], widths[0]
        for level, width in enumerate(widths):
            blocks = [parts.res_block(width if index else entering, width) for index in range(config.num_res_blocks)]
            last = level == len(widths) - 1
            stages.append(Level(blocks, downsample=None if last else parts.downsample(width, config.halves_time(level))))
            entering = width
        self.stages = nn.ModuleList(stages)
        self.middle = Middle(parts)
        self.norm_out = parts.norm(entering)
        self.conv_out = parts.conv(entering, 2 * config.latent_channels)

    def forward(self, video: Tensor, cache: ChunkCache | None = None) -> Posterior:
        """`(B, 3, T, H, W)` -> posterior over `(B, C, T', H', W')`."""
        x = self.conv_in(video, cache)
        for stage in self.stages:
            x = stage(x, cache)
        x = self.conv_out(silu(self.norm_out(self.middle(x, cache), cache)), cache)
        mean, logvar = x.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))


class Decoder(nn.Module):
    """Latents to video. Its stages are stored from fine to coarse, as the encoder's, and run the other way."""

    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__()
        parts, widths = Parts(config, config.causal_decoder), config.widths
        self.conv_in = parts.conv(config.latent_channels, widths[-1])
        self.middle = Middle(parts, config.temporal_attention)
        stages = []
        for level, width in enumerate(widths):
            entering = widths[min(level + 1, len(widths) - 1)]
            blocks = [parts.res_block(width if index else entering, width) for index in range(config.num_res_blocks + 1)]
            upsample = Upsample(parts.upsample_conv(width, 1 + config.halves_time(level - 1))) if level else None
            stages.append(Level(blocks, upsample=upsample))
        self.stages = nn.ModuleList(stages)
        self.norm_out = parts.norm(widths[0])
        self.conv_out = parts.conv(widths[0], config.in_channels)

    def forward(self, latents: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, T', H', W')` -> `(B, 3, T, H, W)`."""
        x = self.middle(self.conv_in(latents, cache), cache)
        for stage in reversed(self.stages):
            x = stage(x, cache)
        return self.conv_out(silu(self.norm_out(x, cache)), cache)


class CVVAE(VideoVAE):
    """The VAE. A clip of `1 + time * n` frames has `1 + n` latent frames; the first latent frame is the first frame alone."""

    spec_name = "vae/cv_vae"

    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__(config)
        self.latents_mean.fill_(config.shift_factor)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def encoder_causal(self) -> bool:
        """Whether latents of a prefix are the prefix of the latents; False for the releases, whose norms see the clip."""
        return self.config.causal_encoder and self.config.norm_scope == "frame"

    @property
    def decoder_causal(self) -> bool:
        """Whether a decoded prefix is the prefix of the decoded clip: it takes causal convolutions, norms of frames, and no
        attention among frames."""
        config = self.config
        return config.causal_decoder and config.norm_scope == "frame" and config.temporal_attention == "none"

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's output convolution."""
        return self.decoder.conv_out.weight

    def decode_images(self, latents: Tensor) -> Tensor:
        """Image mode: n latent frames `(B, C, n, H', W')` -> n images `(B, 3, n, H, W)`, each decoded as a clip of one frame.

        Raises:
            DataError: latents of another shape.
        """
        self._check_latents(latents)
        images = self.decoder(rearrange(latents, "b c n h w -> (b n) c 1 h w"))
        return rearrange(images, "(b n) c 1 h w -> b c n h w", b=latents.shape[0])

    def _encode(self, video: Tensor, cache: ChunkCache | None = None) -> Posterior:
        return self.encoder(video, cache)

    def _decode(
        self, latents: Tensor, sigma: Tensor | None, generator: torch.Generator | None, cache: ChunkCache | None = None
    ) -> Tensor:
        return self.decoder(latents, cache)
