"""The causal video VAE of LTX-Video (arXiv 2501.00103, section 2.1; spec B), for one device.

A patch of pixels becomes channels at the input, so that the encoder works on small maps from its first layer. Norms look at one
position only, hence a causal encoder is exactly causal. The encoder predicts one log-variance for all channels of a cell.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from videofm.errors import ConfigError, DataError
from videofm.models.vae.ltx.blocks import Downsample, ResBlock, Upsample, modulate, modulation
from videofm.models.vae.ltx.config import DOWNSAMPLE_STRIDES, LTXVAEConfig
from videofm.ops.causal_conv import CausalConv3d
from videofm.ops.embedding import ScalarEmbedding
from videofm.ops.norm import pixel_norm
from videofm.ops.patchify import patchify, unpatchify
from videofm.types import Compression, Posterior

LOGVAR_RANGE = (-30.0, 20.0)
INITIAL_LOGVAR = -6.0


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel over the training data, both `(C,)`."""

    mean: Tensor
    std: Tensor


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

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> a smaller, wider one."""
        for block in self.blocks:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.widen is None else self.widen(x)


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

    def forward(self, video: Tensor) -> Posterior:
        """`(B, 3, T, H, W)` -> posterior over `(B, C, T', H', W')`."""
        x = self.conv_in(patchify(video, self.patch_size))
        for stage in self.stages:
            x = stage(x)
        for block in self.middle:
            x = block(x)
        x = self.conv_out(silu(pixel_norm(x)))
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

    def forward(self, x: Tensor, time: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """`(B, C, T, H, W)` -> a larger, narrower one; `time` `(B,)` is the noise level on a scale of 0 to 1000."""
        if self.widen is not None:
            x = self.widen(x)
        if self.upsample is not None:
            x = self.upsample(x)
        embedding = None if self.time_embed is None else self.time_embed(time)
        for block in self.blocks:
            x = block(x, embedding, generator)
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
        self.time_scale = nn.Parameter(torch.tensor(1000.0)) if modulated else None
        self.out_time_embed = ScalarEmbedding(2 * width) if modulated else None
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5) if modulated else None
        self.conv_out = CausalConv3d(width, config.in_channels * config.patch_size**2, causal=causal)

    def forward(self, latents: Tensor, sigma: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """`(B, C, T', H', W')`, noise level `(B,)` -> `(B, 3, T, H, W)`."""
        time = None if self.time_scale is None else sigma * self.time_scale
        x = self.conv_in(latents)
        embedding = None if self.middle_time_embed is None else self.middle_time_embed(time)
        for block in self.middle:
            x = block(x, embedding, generator)
        for stage in self.stages:
            x = stage(x, time, generator)
        x = pixel_norm(x)
        if self.out_time_embed is not None and self.scale_shift_table is not None:
            shift, scale = modulation(self.scale_shift_table, self.out_time_embed(time))
            x = modulate(x, shift, scale)
        return unpatchify(self.conv_out(silu(x)), self.patch_size)


class LTXVideoVAE(nn.Module):
    """The VAE. A clip of `1 + time * n` frames has `1 + n` latent frames; the first latent frame is the first frame alone."""

    spec_name = "vae/ltx"

    def __init__(self, config: LTXVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.latents_mean: Tensor
        self.latents_std: Tensor
        self.register_buffer("latents_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latents_std", torch.ones(config.latent_channels))
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
    def compression(self) -> Compression:
        """Pixels for one latent cell."""
        return self.config.compression

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.config.latent_channels

    @property
    def encoder_causal(self) -> bool:
        """Whether latents of a prefix are the prefix of the latents."""
        return self.config.encoder_causal

    @property
    def decoder_causal(self) -> bool:
        """Whether a decoded prefix is the prefix of the decoded clip; False for every released version."""
        return self.config.decoder_causal

    @property
    def strictly_causal(self) -> bool:
        """Whether neither direction sees a later frame. See `encoder_causal` (which caching latents needs) and
        `decoder_causal`.
        """
        return self.encoder_causal and self.decoder_causal

    def encode(self, video: Tensor) -> Posterior:
        """The posterior of `video` `(B, 3, T, H, W)` in [-1, 1], in raw latent space `(B, C, T', H', W')`.

        Raises:
            DataError: frames, height or width do not fit the compression.
        """
        self._check_video(video)
        return self.encoder(video)

    def decode(self, latents: Tensor, sigma: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Video `(B, 3, T, H, W)`, roughly in [-1, 1], of raw latents `(B, C, T', H', W')`.

        Args:
            latents: raw (see `denormalize`).
            sigma: `(B,)` noise level of `latents` in [0, 1], needed when and only when `config.timestep_conditioning`.
            generator: the source of injected noise, needed when `config.inject_noise` has a True.

        Raises:
            ConfigError: sigma or generator missing, or a sigma that nothing reads.
        """
        if self.config.timestep_conditioning and sigma is None:
            raise ConfigError(
                "this decoder is conditioned on the noise level: pass decode(latents, sigma), (B,), 0 for clean latents."
            )
        if not self.config.timestep_conditioning and sigma is not None:
            raise ConfigError(
                "this decoder is not conditioned on the noise level (timestep_conditioning is false): pass no sigma."
            )
        return self.decoder(latents, sigma, generator)

    def forward(self, video: Tensor, noise: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        """Reconstruction of `video`: through a sample of the posterior with unit `noise` of the latents' shape, else through
        its mode.
        """
        posterior = self.encode(video)
        return self.decode(posterior.mode() if noise is None else posterior.sample(noise), sigma)

    @property
    def latent_statistics(self) -> LatentStatistics:
        """Mean and standard deviation of each channel of raw latents; zeros and ones until they are measured."""
        return LatentStatistics(self.latents_mean, self.latents_std)

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store measured statistics, both `(C,)`."""
        assert mean.shape == std.shape == (self.latent_channels,)
        self.latents_mean.copy_(mean)
        self.latents_std.copy_(std)

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw latents to the space that a diffusion model lives in: `(z - mean) / std * scaling_factor`."""
        return (
            (latents - _per_channel(self.latents_mean, latents))
            / _per_channel(self.latents_std, latents)
            * self.config.scaling_factor
        )

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return latents / self.config.scaling_factor * _per_channel(self.latents_std, latents) + _per_channel(
            self.latents_mean, latents
        )

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != self.config.in_channels:
            raise DataError(f"video has shape {tuple(video.shape)}; expected (B, {self.config.in_channels}, T, H, W).")
        compression = dataclasses.asdict(self.compression)
        num_frames, height, width = video.shape[2:]
        rule = compression["time"]
        if num_frames % rule != 1 % rule:
            below = max(1, (num_frames - 1) // rule * rule + 1)
            raise DataError(
                f"video has {num_frames} frames; this VAE takes 1 + {rule} * n, the nearest are {below} and {below + rule}."
            )
        for name, value in (("height", height), ("width", width)):
            rule = compression[name]
            if value % rule or value == 0:
                below = value // rule * rule
                near = f"{below} and {below + rule}" if below else f"{rule}"
                raise DataError(
                    f"video has a {name} of {value} pixels; this VAE takes multiples of {rule}, the nearest: {near}."
                )


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, 1, 1, 1)  # (C,) -> (1, C, 1, 1, 1)
