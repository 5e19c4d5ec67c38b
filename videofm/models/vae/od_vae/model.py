"""OD-VAE, the causal video VAE of Open-Sora-Plan (arXiv 2409.01199; spec D.1), for one device.

Stable Diffusion's image VAE with time in its kernels: convolutions look back only, and the first frame is compressed in space
alone. Where a level has 2D blocks, which is cheaper, frames do not meet. All tensors are `(B, C, T, H, W)`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from videofm.models.vae.base import LOGVAR_RANGE, VideoVAE
from videofm.models.vae.blocks import FrameAttention, ResBlock
from videofm.models.vae.od_vae.config import KERNEL_TIMES, ODVAEConfig
from videofm.ops.causal_conv import CausalConv3d, ChunkCache, Surrounded
from videofm.ops.norm import GroupNorm
from videofm.types import Posterior


def group_norm(config: ODVAEConfig, width: int, scope: str | None = None) -> GroupNorm:
    """The norm of `width` channels, of the config's scope unless told otherwise."""
    return GroupNorm(config.num_groups, width, scope=scope or config.norm_scope)


def res_block(config: ODVAEConfig, entering: int, leaving: int, kind: str) -> ResBlock:
    """A ResBlock of `kind`; a 2D one works frame by frame, norms included, whatever the config's scope."""
    first, second = ((time, 3, 3) for time in KERNEL_TIMES[kind])
    return ResBlock(
        CausalConv3d(entering, leaving, first),
        CausalConv3d(leaving, leaving, second),
        partial(group_norm, config, scope="frame" if kind == "2d" else None),
        None if entering == leaving else CausalConv3d(entering, leaving, 1),
    )


def edge_kernel(kind: str) -> tuple[int, int, int]:
    """Kernel of the convolution at the pixels, next to blocks of `kind`."""
    return (KERNEL_TIMES[kind][0], 3, 3)


class Upsample(nn.Module):
    """Doubles height and width, and frames where `time`, then a causal convolution. Frame 0 stays one frame."""

    def __init__(self, config: ODVAEConfig, width: int, time: bool) -> None:
        super().__init__()
        self.time = config.time_interpolation if time else None
        self.space = config.space_interpolation if time else "nearest"
        self.conv = CausalConv3d(width, width, (3 if time else 1, 3, 3))

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, T, H, W)` -> `(B, C, 2 T - 1 or T, 2 H, 2 W)`; of a later chunk 2 T frames."""
        if self.time is not None:
            x = self._double_time(x, cache)
        return self.conv(interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode=self.space), cache)

    def _double_time(self, x: Tensor, cache: ChunkCache | None) -> Tensor:
        num_kept = 1 if cache is None or cache.is_first else 0
        kept, doubled = x[:, :, :num_kept], x[:, :, num_kept:]
        if self.time == "nearest":
            return torch.cat([kept, doubled.repeat_interleave(2, dim=2)], dim=2)
        seen = Surrounded(doubled, 0) if cache is None else cache.around(self, doubled, 1, 1)
        if seen.frames.shape[2] == 0:
            return kept
        interpolated = interpolate(seen.frames, scale_factor=(2.0, 1.0, 1.0), mode="trilinear")
        return torch.cat([kept, interpolated[:, :, 2 * seen.num_before :][:, :, : 2 * doubled.shape[2]]], dim=2)


class Stage(nn.Module):
    """The ResBlocks of a level, then what leads to the next level if there is one."""

    def __init__(
        self, blocks: list[ResBlock], downsample: CausalConv3d | None = None, upsample: Upsample | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, T, H, W)` -> the same at the next level."""
        for block in self.blocks:
            x = block(x, cache)
        resample = self.downsample if self.upsample is None else self.upsample
        return x if resample is None else resample(x, cache)


class Middle(nn.Module):
    """ResBlock, attention inside each frame, ResBlock, at the coarsest level."""

    def __init__(self, config: ODVAEConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.blocks = nn.ModuleList(res_block(config, width, width, config.middle_block) for _ in range(2))
        self.attention = FrameAttention(width, partial(group_norm, config))

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`x` -> the same shape."""
        before, after = self.blocks
        return after(self.attention(before(x, cache), cache), cache)


class Encoder(nn.Module):
    """Video to the moments of its latents, before `quant_conv`."""

    def __init__(self, config: ODVAEConfig) -> None:
        super().__init__()
        widths, num_levels = config.widths, len(config.widths)
        self.conv_in = CausalConv3d(config.in_channels, widths[0], edge_kernel(config.encoder_blocks[0]))
        stages = []
        for level, (width, kind) in enumerate(zip(widths, config.encoder_blocks, strict=True)):
            entering = [widths[max(level - 1, 0)]] + [width] * (config.num_res_blocks - 1)
            downsample = None
            if level < num_levels - 1:
                time = config.doubles_time[level]
                kernel, stride = ((3, 3, 3), (2, 2, 2)) if time else ((1, 3, 3), (1, 2, 2))
                downsample = CausalConv3d(width, width, kernel, stride, space_padding="end")
            stages.append(Stage([res_block(config, each, width, kind) for each in entering], downsample))
        self.stages = nn.ModuleList(stages)
        self.middle = Middle(config)
        self.norm_out = group_norm(config, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, video: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, 3, T, H, W)` -> `(B, 2 C, T', H', W')`."""
        x = self.conv_in(video, cache)
        for stage in self.stages:
            x = stage(x, cache)
        x = self.middle(x, cache)
        return self.conv_out(silu(self.norm_out(x, cache)), cache)


class Decoder(nn.Module):
    """Latents, after `post_quant_conv`, to video. `stages[0]` is the finest level and comes last."""

    def __init__(self, config: ODVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv3d(config.latent_channels, widths[-1])
        self.middle = Middle(config)
        stages = []
        for level, (width, kind) in enumerate(zip(widths, config.decoder_blocks, strict=True)):
            entering = [widths[min(level + 1, len(widths) - 1)]] + [width] * config.num_res_blocks
            upsample = Upsample(config, width, config.doubles_time[level - 1]) if level > 0 else None
            stages.append(Stage([res_block(config, each, width, kind) for each in entering], upsample=upsample))
        self.stages = nn.ModuleList(stages)
        self.norm_out = group_norm(config, widths[0])
        self.conv_out = CausalConv3d(widths[0], config.in_channels, edge_kernel(config.decoder_blocks[0]))

    def forward(self, latents: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, T', H', W')` -> `(B, 3, T, H, W)`."""
        x = self.middle(self.conv_in(latents, cache), cache)
        for stage in reversed(self.stages):
            x = stage(x, cache)
        return self.conv_out(silu(self.norm_out(x, cache)), cache)


class ODVideoVAE(VideoVAE):
    """The VAE. A clip of `1 + time * n` frames has `1 + n` latent frames; the first latent frame is the first frame alone."""

    spec_name = "vae/od_vae"

    def __init__(self, config: ODVAEConfig) -> None:
        super().__init__(config)
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = CausalConv3d(channels, channels, 1)
        self.decoder = Decoder(config)

    @property
    def encoder_causal(self) -> bool:
        """Whether latents of a prefix are the prefix of the latents: with norms per frame."""
        return self.config.norm_scope == "frame"

    @property
    def decoder_causal(self) -> bool:
        """Whether a decoded prefix is the prefix of the decoded clip: with norms per frame, and frames that are held."""
        held = self.config.time_interpolation == "nearest" or not any(self.config.doubles_time)
        return held and self.config.norm_scope == "frame"

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's output convolution."""
        return self.decoder.conv_out.weight

    def _encode(self, video: Tensor, cache: ChunkCache | None = None) -> Posterior:
        mean, logvar = self.quant_conv(self.encoder(video, cache), cache).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def _decode(
        self, latents: Tensor, sigma: Tensor | None, generator: torch.Generator | None, cache: ChunkCache | None = None
    ) -> Tensor:
        return self.decoder(self.post_quant_conv(latents, cache), cache)
