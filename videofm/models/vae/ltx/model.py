"""The causal video VAE of LTX-Video (arXiv 2501.00103, section 2.1; spec B), for one device.

A patch of pixels becomes channels at the input, so that the encoder works on small maps from its first layer. Norms look at one
position only, hence a causal encoder is exactly causal. The encoder predicts one log-variance for all channels of a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from videofm.models.vae.base import LOGVAR_RANGE, VideoVAE
from videofm.models.vae.ltx.blocks import DecoderContext, Downsample, NoiseMaps, ResBlock, Upsample, modulation
from videofm.models.vae.ltx.config import DOWNSAMPLE_STRIDES, LTXVAEConfig
from videofm.ops.causal_conv import CausalConv3d, ChunkCache
from videofm.ops.embedding import ScalarEmbedding
from videofm.ops.norm import pixel_norm_silu
from videofm.ops.patchify import patchify, unpatchify
from videofm.types import Posterior

INITIAL_LOGVAR = -6.0


class EncoderStage(nn.Module):
    """ResBlocks at one resolution, then a downsampler, then (0.9.0, 0.9.1) a ResBlock to the next width."""

    def __init__(self, config: LTXVAEConfig, index: int) -> None:
        super().__init__()
        widths, kind, causal = config.encoder_widths, config.encoder_downsample[index], config.encoder_causal
        width, leaving = widths[index], widths[min(index + 1, len(widths) - 1)]
        self.blocks = nn.ModuleList(ResBlock(width, width, causal) for _ in range(config.encoder_depths[index]))
        self.downsample: nn.Module | None = None
        self.widen: nn.Module | None = None
        if kind == "conv":
            self.downsample = CausalConv3d(width, width, stride=DOWNSAMPLE_STRIDES[kind], causal=causal)
        elif kind != "none":
            self.downsample = Downsample(width, leaving, DOWNSAMPLE_STRIDES[kind], causal)
        if not config.residual_downsample and width != leaving:
            self.widen = ResBlock(width, leaving, causal, norm_eps=config.norm_eps)

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, T, H, W)` -> a smaller, wider one."""
        for block in self.blocks:
            x = block(x, cache=cache)
        if self.downsample is not None:
            x = self.downsample(x, cache)
        return x if self.widen is None else self.widen(x, cache=cache)


class Encoder(nn.Module):
    """Video to the mean and log-variance of its latents."""

    def __init__(self, config: LTXVAEConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        causal, width = config.encoder_causal, config.encoder_widths[-1]
        self.conv_in = CausalConv3d(config.in_channels * config.patch_size**2, config.encoder_widths[0], causal=causal)
        self.stages = nn.ModuleList(EncoderStage(config, index) for index in range(len(config.encoder_downsample)))
        self.middle = nn.ModuleList(ResBlock(width, width, causal) for _ in range(config.encoder_depths[-1]))
        self.conv_out = CausalConv3d(width, config.latent_channels + 1, causal=causal)

    def forward(self, video: Tensor, cache: ChunkCache | None = None) -> Posterior:
        """`(B, 3, T, H, W)` -> posterior over `(B, C, T', H', W')`."""
        x = self.conv_in(patchify(video, self.patch_size), cache)
        for stage in self.stages:
            x = stage(x, cache)
        for block in self.middle:
            x = block(x, cache=cache)
        x = self.conv_out(pixel_norm_silu(x), cache)
        mean, logvar = x[:, :-1], x[:, -1:]  # one log-variance for all channels, lest some collapse to pay for the KL
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE).expand_as(mean))


class DecoderStage(nn.Module):
    """A ResBlock to the width of the stage where it changes, an upsampler, then ResBlocks."""

    def __init__(self, config: LTXVAEConfig, index: int, entering: int) -> None:
        super().__init__()
        causal, width = config.decoder_causal, config.decoder_widths[index]
        self.width = width // config.upsample_factor[index]
        noise, modulated = config.inject_noise[index + 1], config.timestep_conditioning
        self.time_embed = ScalarEmbedding(4 * self.width) if modulated else None
        self.widen = ResBlock(entering, width, causal, norm_eps=config.norm_eps) if entering != width else None
        self.upsample: nn.Module | None = None
        if config.decoder_upsample[index]:
            self.upsample = Upsample(width, config.upsample_factor[index], config.upsample_residual[index], causal)
        depth = config.decoder_depths[index + 1]
        self.blocks = nn.ModuleList(ResBlock(self.width, self.width, causal, modulated, noise) for _ in range(depth))

    def forward(self, x: Tensor, time: Tensor | None, noise_maps: NoiseMaps | None, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, T, H, W)` -> a larger, narrower one; `time` `(B,)` is the noise level on a scale of 0 to 1000."""
        if self.widen is not None:
            x = self.widen(x, cache=cache)
        if self.upsample is not None:
            x = self.upsample(x, cache)
        context = DecoderContext(None if self.time_embed is None else self.time_embed(time), noise_maps)
        for block in self.blocks:
            x = block(x, context, cache)
        return x


class Decoder(nn.Module):
    """Latents to video; with `timestep_conditioning` it also removes the last noise."""

    def __init__(self, config: LTXVAEConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        causal, width, modulated = config.decoder_causal, config.decoder_widths[0], config.timestep_conditioning
        self.conv_in = CausalConv3d(config.latent_channels, width, causal=causal)
        self.middle_time_embed = ScalarEmbedding(4 * width) if modulated else None
        depth, noise = config.decoder_depths[0], config.inject_noise[0]
        self.middle = nn.ModuleList(ResBlock(width, width, causal, modulated, noise) for _ in range(depth))
        stages = []
        for index in range(len(config.decoder_widths)):
            stages.append(DecoderStage(config, index, width))
            width = stages[-1].width
        self.stages = nn.ModuleList(stages)
        self.time_scale = nn.Parameter(torch.tensor([1000.0])) if modulated else None
        self.out_time_embed = ScalarEmbedding(2 * width) if modulated else None
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5) if modulated else None
        self.conv_out = CausalConv3d(width, config.in_channels * config.patch_size**2, causal=causal)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor | None = None,
        noise_maps: NoiseMaps | None = None,
        cache: ChunkCache | None = None,
    ) -> Tensor:
        """`(B, C, T', H', W')`, noise level `(B,)` -> `(B, 3, T, H, W)`."""
        time = None if self.time_scale is None else sigma * self.time_scale
        x = self.conv_in(latents, cache)
        context = DecoderContext(None if self.middle_time_embed is None else self.middle_time_embed(time), noise_maps)
        for block in self.middle:
            x = block(x, context, cache)
        for stage in self.stages:
            x = stage(x, time, noise_maps, cache)
        shift = scale = None
        if self.out_time_embed is not None and self.scale_shift_table is not None:
            shift, scale = modulation(self.scale_shift_table, self.out_time_embed(time))
        x = pixel_norm_silu(x, shift, scale)  # a line of its own frees what it was made of before the convolution
        return unpatchify(self.conv_out(x, cache), self.patch_size)


class LTXVideoVAE(VideoVAE):
    """The VAE. A clip of `1 + time * n` frames has `1 + n` latent frames; the first latent frame is the first frame alone."""

    spec_name = "vae/ltx"

    def __init__(self, config: LTXVAEConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Where training from scratch starts: each ResBlock is its skip, and latents carry little noise.

        The paper gives no initialisation; these two are ours. On the quick start's clips, one seed each: the first gave 19.3
        instead of 17.1 dB after 240 steps of batch 8, the second 27.2 instead of 23.0 dB at step 750 (under cosine schedules
        of 1500 and 750 steps). With torch's own start the decoder first learns to ignore latents that are all noise.
        """
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
        self.encoder.conv_out.bias[-1] = INITIAL_LOGVAR

    @property
    def encoder_causal(self) -> bool:
        """Whether latents of a prefix are the prefix of the latents."""
        return self.config.encoder_causal

    @property
    def decoder_causal(self) -> bool:
        """Whether a decoded prefix is the prefix of the decoded clip; False for every released version."""
        return self.config.decoder_causal

    @property
    def timestep_conditioning(self) -> bool:
        """Whether `decode` takes the noise level of the latents (0.9.1 and later)."""
        return self.config.timestep_conditioning

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's output convolution."""
        return self.decoder.conv_out.weight

    def _encode(self, video: Tensor, cache: ChunkCache | None = None) -> Posterior:
        return self.encoder(video, cache)

    def _decode(
        self, latents: Tensor, sigma: Tensor | None, generator: torch.Generator | None, cache: ChunkCache | None = None
    ) -> Tensor:
        return self.decoder(latents, sigma, _noise_maps(generator, cache), cache)


def _noise_maps(generator: torch.Generator | None, cache: ChunkCache | None) -> NoiseMaps | None:
    """The maps of a call; those of the first chunk for all chunks of a stream."""
    if cache is not None and "noise_maps" in cache.shared:
        return cache.shared["noise_maps"]
    maps = None if generator is None else NoiseMaps(generator)
    if cache is not None:
        cache.shared["noise_maps"] = maps
    return maps
