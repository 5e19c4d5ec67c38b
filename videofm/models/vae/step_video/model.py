"""The Video-VAE of Step-Video-T2V (arXiv 2502.10248, section 4.1; spec step-video A2), for one device.

A clip is cut into chunks of 17 frames. Each is encoded and decoded by itself, as if it were the first; one frame alone is an
image. So memory follows the chunk, not the clip, and chunks could be coded on different devices.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from videofm.errors import ConfigError, DataError
from videofm.models.vae.base import LOGVAR_RANGE, VideoVAE
from videofm.models.vae.blocks import Norm, ResBlock
from videofm.models.vae.step_video.blocks import (
    Conv,
    DualPathDown,
    DualPathUp,
    Middle,
    ResidualUpsample,
    SpatialUpsample,
    res_block,
)
from videofm.models.vae.step_video.config import CHUNK_FRAMES, DUAL_PATH_FACTOR, STRIDES, StepVideoVAEConfig
from videofm.ops.causal_conv import ChunkCache
from videofm.ops.norm import GroupNorm
from videofm.types import Posterior

INITIAL_LOGVAR = -6.0
NORM_EPS = 1e-5
SEAM_WEIGHT = 0.6
"""What a frame beside a seam keeps of itself."""


class EncoderStage(nn.Module):
    """ResBlocks at one resolution, then a strided convolution, except in the last stage."""

    def __init__(self, config: StepVideoVAEConfig, index: int, norm: Norm) -> None:
        super().__init__()
        width = config.widths[index]
        entering = (config.stem_width, *config.widths)[index]
        widths = [entering] + [width] * config.num_res_blocks
        self.blocks = nn.ModuleList(res_block(*pair, norm) for pair in pairwise(widths))
        self.downsample: nn.Module | None = None
        if index < len(STRIDES):
            stride = STRIDES[index]
            spatial = stride[0] == 1
            self.downsample = Conv(
                width, width, (1, 3, 3) if spatial else 3, stride=stride, space_padding="end" if spatial else "same"
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> a smaller one, of another width perhaps."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Encoder(nn.Module):
    """One chunk of video to the mean and log-variance of its latents."""

    def __init__(self, config: StepVideoVAEConfig, norm: Norm) -> None:
        super().__init__()
        width, num_moments = config.widths[-1], 2 * config.latent_channels
        self.conv_in = Conv(config.in_channels, config.stem_width)
        self.stages = nn.ModuleList(EncoderStage(config, index, norm) for index in range(len(config.widths)))
        self.middle = Middle(width, norm)
        self.norm_out = norm(width)
        self.has_dual_path = config.dual_path
        if config.dual_path:
            inner = config.dual_path_width
            first = DualPathDown(width, inner, DUAL_PATH_FACTOR)
            self.dual_path = nn.Sequential(first, DualPathDown(inner, num_moments, factor=1))
        else:
            self.conv_out = Conv(width, num_moments)

    def forward(self, video: Tensor) -> Tensor:
        """`(B, 3, T, H, W)` -> mean and log-variance `(B, 2 C, T', H', W')`."""
        x = self.conv_in(video)
        for stage in self.stages:
            x = stage(x)
        x = silu(self.norm_out(self.middle(x)))
        return self.dual_path(x) if self.has_dual_path else self.conv_out(x)

    @property
    def last_conv(self) -> nn.Module:
        """The convolution that makes the moments."""
        return self.dual_path[-1].conv if self.has_dual_path else self.conv_out


class DecoderStage(nn.Module):
    """ResBlocks at one resolution, then an upsampler, except in the last stage."""

    def __init__(self, config: StepVideoVAEConfig, level: int, norm: Norm) -> None:
        super().__init__()
        width, entering = config.widths[level], config.widths[min(level + 1, len(STRIDES))]
        widths = [entering] + [width] * (config.num_res_blocks + 1)
        self.blocks = nn.ModuleList(res_block(*pair, norm) for pair in pairwise(widths))
        self.upsample: nn.Module | None = None
        if level > 0:
            spatial = STRIDES[level - 1][0] == 1
            self.upsample = SpatialUpsample(width) if spatial else ResidualUpsample(width, norm)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> a larger one, of another width perhaps."""
        for block in self.blocks:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class Decoder(nn.Module):
    """The latents of one chunk to its frames."""

    def __init__(self, config: StepVideoVAEConfig, norm: Norm) -> None:
        super().__init__()
        width, latent_channels = config.widths[-1], config.latent_channels
        self.num_dropped = 2 ** sum(stride[0] == 2 for stride in STRIDES) - 1
        self.has_dual_path = config.dual_path
        if config.dual_path:
            inner = config.dual_path_width
            first = DualPathUp(latent_channels, inner, factor=1)
            self.dual_path = nn.Sequential(first, DualPathUp(inner, width, DUAL_PATH_FACTOR))
        else:
            self.conv_in = Conv(latent_channels, width)
        self.middle = Middle(width, norm)
        levels = reversed(range(len(config.widths)))
        self.stages = nn.ModuleList(DecoderStage(config, level, norm) for level in levels)
        self.norm_out = norm(config.widths[0])
        self.conv_out = Conv(config.widths[0], config.in_channels)

    def forward(self, latents: Tensor) -> Tensor:
        """`(B, C, T', H', W')` -> `(B, 3, T, H, W)`. The upsampled first latent begins with frames of no video: dropped."""
        x = self.dual_path(latents) if self.has_dual_path else self.conv_in(latents)
        x = self.middle(x)
        for stage in self.stages:
            x = stage(x)
        return self.conv_out(silu(self.norm_out(x)))[:, :, self.num_dropped :]


class StepVideoVAE(VideoVAE):
    """The VAE. One frame is an image and gives one latent frame; a clip is chunks of 17 frames, each gives 3 latent frames.

    Without dual path, which is training stage one, they give 5.

    Causality, with norms per frame: latent frame j of a chunk sees its frames up to 8 j, and no other chunk; frame n of a
    chunk is decoded from its latent frames up to n / 8, rounded up (with `dual_path` off, 4 instead of 8). Hence latents
    of a prefix of one frame or of whole chunks are the prefix of the latents, and, unless seams are blended, the same
    holds for decoding. A stream goes by whole chunks, which works for norms over a clip too, as a norm ends with its chunk.
    """

    spec_name = "vae/step_video"

    def __init__(self, config: StepVideoVAEConfig) -> None:
        super().__init__(config)
        norm = partial(GroupNorm, config.num_groups, eps=NORM_EPS, scope=config.norm_scope)
        self.encoder = Encoder(config, norm)
        self.decoder = Decoder(config, norm)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Where training from scratch starts: each ResBlock is its skip, and latents carry little noise.

        Ours, as the paper gives no initialisation.
        """
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
        self.encoder.last_conv.bias[self.latent_channels :] = INITIAL_LOGVAR

    @property
    def encoder_causal(self) -> bool:
        """Whether no latent sees a later frame, which norms over a clip undo."""
        return self.config.norm_scope == "frame"

    @property
    def decoder_causal(self) -> bool:
        """Whether no frame sees a later latent; blending lets the last frame of a chunk see the next chunk."""
        return self.config.norm_scope == "frame" and not self.config.blend_seams

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's output convolution."""
        return self.decoder.conv_out.weight

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of `num_frames` frames.

        Raises:
            DataError: the clip is neither one frame nor whole chunks.
        """
        self._check_frames(num_frames)
        return 1 if num_frames == 1 else num_frames // CHUNK_FRAMES * self.config.chunk_latents

    def pixel_frames(self, num_latent_frames: int) -> int:
        """Frames of a clip of `num_latent_frames` latent frames.

        Raises:
            DataError: they are neither one nor whole chunks.
        """
        self._check_latent_frames(num_latent_frames)
        return 1 if num_latent_frames == 1 else num_latent_frames // self.config.chunk_latents * CHUNK_FRAMES

    @property
    def chunk_frames(self) -> int:
        """Frames of the smallest chunk of a stream."""
        return CHUNK_FRAMES

    def _encode(self, video: Tensor, cache: ChunkCache | None = None) -> Posterior:
        _check_follows(cache, video.shape[2])
        moments = torch.cat([self.encoder(chunk) for chunk in video.split(CHUNK_FRAMES, dim=2)], dim=2)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def _decode(
        self, latents: Tensor, sigma: Tensor | None, generator: torch.Generator | None, cache: ChunkCache | None = None
    ) -> Tensor:
        _check_follows(cache, latents.shape[2])
        video = self.decode_chunks(latents)
        return blend_seams(video) if self.config.blend_seams else video

    def decode_chunks(self, latents: Tensor) -> Tensor:
        """As `decode`, of checked latents and with the seams as they are."""
        chunks = latents.split(self.config.chunk_latents, dim=2)
        video = self.decoder(chunks[0])
        if len(chunks) == 1:
            return video
        # Chunks are written in place: a concatenation would hold the clip twice.
        first, shape = video, (*video.shape[:2], len(chunks) * CHUNK_FRAMES, *video.shape[3:])
        video = first.new_empty(shape)
        for index, chunk in enumerate(chunks):
            start = index * CHUNK_FRAMES
            video[:, :, start : start + CHUNK_FRAMES] = self.decoder(chunk) if index else first
        return video

    def _check_frames(self, num_frames: int) -> None:
        if num_frames != 1 and (num_frames == 0 or num_frames % CHUNK_FRAMES):
            below = num_frames // CHUNK_FRAMES * CHUNK_FRAMES
            raise DataError(
                f"video has {num_frames} frames; this VAE takes 1 or {CHUNK_FRAMES} * n, the nearest are {max(1, below)} and "
                f"{below + CHUNK_FRAMES}."
            )

    def _check_chunk_frames(self, num_frames: int, is_first: bool) -> None:
        self._check_frames(num_frames)

    def _check_latents(self, latents: Tensor) -> None:
        super()._check_latents(latents)
        self._check_latent_frames(latents.shape[2])

    def _check_latent_frames(self, num_latent_frames: int) -> None:
        rule = self.config.chunk_latents
        if num_latent_frames != 1 and (num_latent_frames == 0 or num_latent_frames % rule):
            raise DataError(
                f"latents have {num_latent_frames} frames; this VAE decodes 1 (an image) or {rule} * n ({rule} for each "
                f"{CHUNK_FRAMES} frames of video)."
            )

    def _refuse_streaming(self, causal: bool, what: str) -> None:
        if what == "decoder" and self.config.blend_seams:
            raise ConfigError(
                f"the decoder of this {self.spec_name} blends the last frame of a chunk with the next chunk, so it cannot "
                "stream exactly: build it with blend_seams=False, or decode the clip as a whole."
            )


def blend_seams(video: Tensor) -> Tensor:
    """`video` `(B, 3, 17 n, H, W)`, changed in place: frames on both sides of a seam between chunks are mixed.

    The first frame of a chunk keeps 0.6 of itself and gets 0.4 of the last frame before it. That one then keeps 0.6 of itself
    and gets 0.4 of the new first frame: 0.76 and 0.24 of what was decoded.
    """
    if video.shape[2] <= CHUNK_FRAMES:
        return video
    before, after = slice(CHUNK_FRAMES - 1, video.shape[2] - 1, CHUNK_FRAMES), slice(CHUNK_FRAMES, None, CHUNK_FRAMES)
    last, first = video[:, :, before], video[:, :, after]
    blended = SEAM_WEIGHT * first + (1 - SEAM_WEIGHT) * last
    blended_last = SEAM_WEIGHT * last + (1 - SEAM_WEIGHT) * blended
    video[:, :, after], video[:, :, before] = blended, blended_last
    return video


def _check_follows(cache: ChunkCache | None, num_frames: int) -> None:
    """Refuse a stream in which an image has a neighbour."""
    if cache is None:
        return
    if not cache.is_first and (num_frames == 1 or cache.shared["is_image"]):
        raise DataError("one frame is an image, a clip of its own: a stream is that alone, or chunks of 17 frames.")
    cache.shared["is_image"] = num_frames == 1
