"""What every video VAE has: checked inputs, encode and decode, whole or chunk by chunk, and the statistics of its latents.

A model says how a clip becomes a posterior and latents become a clip (`_encode`, `_decode`), and what it sees of the future.
Videos are `(B, 3, T, H, W)` in [-1, 1], latents `(B, C, T', H', W')`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from videofm.errors import ConfigError, DataError
from videofm.models.vae.tiling import TiledVAE, Tiles
from videofm.ops.causal_conv import ChunkCache
from videofm.types import Compression, Posterior

LOGVAR_RANGE = (-30.0, 20.0)
_PIXEL_TOLERANCE = 1e-2
"""How far a pixel may lie outside of [-1, 1]: bfloat16 rounds that much."""


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel over the training data, both `(C,)`."""

    mean: Tensor
    std: Tensor

    @property
    def hash(self) -> str:
        """Names these numbers: the SHA-256 of both vectors in float32."""
        values = torch.cat([self.mean, self.std]).detach().float().cpu().contiguous()
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class EncodedChunk:
    """The posterior of one chunk, and the cache for the next."""

    posterior: Posterior
    cache: ChunkCache


@dataclass(frozen=True)
class DecodedChunk:
    """The frames of one chunk of latents, and the cache for the next."""

    video: Tensor
    cache: ChunkCache


class ClipSplit(Protocol):
    """How clips are encoded and decoded by several processes, each with a part of the frames; see `parallelize`."""

    def encode(self, vae: VideoVAE, video: Tensor) -> Posterior:
        """The whole posterior, on each of them, of a checked video, which each of them has."""

    def decode(self, vae: VideoVAE, latents: Tensor, sigma: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """The whole video, on each of them, of checked latents, which each of them has."""


class VideoVAE(nn.Module):
    """Base of all video VAEs.

    `config` has `in_channels`, `latent_channels`, `compression` and `scaling_factor`. A subclass sets `spec_name`, calls
    `super().__init__(config)`, and writes `_encode`, `_decode`, `encoder_causal`, `decoder_causal` and `last_layer`.
    """

    spec_name = ""
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.split: ClipSplit | None = None
        """Set by `parallelize` where several processes share a clip."""
        self.register_buffer("latents_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latents_std", torch.ones(config.latent_channels))

    # -- what a model says of itself

    def _encode(self, video: Tensor, cache: ChunkCache | None = None) -> Posterior:
        """The posterior of a checked video; with a cache, of one chunk."""
        raise NotImplementedError

    def _decode(
        self, latents: Tensor, sigma: Tensor | None, generator: torch.Generator | None, cache: ChunkCache | None = None
    ) -> Tensor:
        """The video of checked latents; with a cache, of one chunk."""
        raise NotImplementedError

    @property
    def encoder_causal(self) -> bool:
        """Whether the latents of a prefix are the prefix of the latents (caching latents of long clips needs it)."""
        raise NotImplementedError

    @property
    def decoder_causal(self) -> bool:
        """Whether a decoded prefix is the prefix of the decoded clip."""
        raise NotImplementedError

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's output convolution, where losses are weighed against each other."""
        raise NotImplementedError

    @property
    def timestep_conditioning(self) -> bool:
        """Whether `decode` takes the noise level of the latents."""
        return False

    @property
    def compression(self) -> Compression:
        """Pixels for one latent cell."""
        return self.config.compression

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.config.latent_channels

    @property
    def strictly_causal(self) -> bool:
        """Whether neither direction sees a later frame."""
        return self.encoder_causal and self.decoder_causal

    # -- whole clips

    def encode(self, video: Tensor) -> Posterior:
        """The posterior of `video` `(B, 3, T, H, W)` in [-1, 1], in raw latent space `(B, C, T', H', W')`.

        Raises:
            DataError: frames, height or width do not fit the compression; pixels are not floats in [-1, 1].
        """
        self.check_video(video)
        self._check_frames(video.shape[2])
        return self._encode(video) if self.split is None else self.split.encode(self, video)

    def decode(self, latents: Tensor, sigma: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Video `(B, 3, T, H, W)`, roughly in [-1, 1], of raw latents `(B, C, T', H', W')`.

        Args:
            latents: raw (see `denormalize`).
            sigma: `(B,)` noise level of `latents` in [0, 1], needed when and only when the decoder is conditioned on it.
            generator: the source of injected noise, for decoders that inject some.

        Raises:
            ConfigError: sigma or generator missing, or a sigma that nothing reads.
            DataError: latents of another shape.
        """
        self._check_latents(latents)
        self._check_sigma(sigma)
        if self.split is not None:
            return self.split.decode(self, latents, sigma, generator)
        return self._decode(latents, sigma, generator)

    def forward(self, video: Tensor, noise: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        """Reconstruction of `video`: through a sample of the posterior with unit `noise` of the latents' shape, else through
        its mode.
        """
        posterior = self.encode(video)
        return self.decode(posterior.mode() if noise is None else posterior.sample(noise), sigma)

    def tiled(self, height: int, width: int, overlap: int) -> TiledVAE:
        """This VAE, encoding and decoding in tiles of `height` x `width` pixels that share `overlap` with their neighbours.

        Raises:
            ConfigError: sizes off the grid, or an overlap as large as a tile.
        """
        tiles = Tiles(height, width, overlap, overlap)
        tiles.check(self)
        return TiledVAE(self, tiles)

    # -- chunk by chunk

    def encode_stream(self, chunk: Tensor, cache: ChunkCache | None = None) -> EncodedChunk:
        """The latents of one chunk of a clip; those of all chunks, concatenated in time, are those of the clip.

        Args:
            chunk: the first of a clip has `1 + time * n` frames, every later one `time * n`.
            cache: None for the first chunk, then what the chunk before returned.

        Raises:
            ConfigError: the encoder looks ahead, so that a chunk cannot be encoded before the next is there.
            DataError: as `encode`.
        """
        self._refuse_streaming(self.encoder_causal, "encoder")
        cache = ChunkCache() if cache is None else cache.following()
        self.check_video(chunk)
        self._check_chunk_frames(chunk.shape[2], cache.is_first)
        return EncodedChunk(self._encode(chunk, cache), cache)

    def decode_stream(
        self,
        latents: Tensor,
        cache: ChunkCache | None = None,
        sigma: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DecodedChunk:
        """The frames of one chunk of latents (one frame or more); those of all chunks, concatenated, are the clip.

        Args:
            latents: raw, any number of latent frames.
            cache: None for the first chunk, then what the chunk before returned.
            sigma, generator: as in `decode`.

        Raises:
            ConfigError: the decoder looks ahead; or as `decode`.
            DataError: as `decode`.
        """
        self._refuse_streaming(self.decoder_causal, "decoder")
        cache = ChunkCache() if cache is None else cache.following()
        self._check_latents(latents)
        self._check_sigma(sigma)
        return DecodedChunk(self._decode(latents, sigma, generator, cache), cache)

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of `num_frames` frames."""
        return self.compression.latent_frames(num_frames)

    def pixel_frames(self, num_latent_frames: int) -> int:
        """Frames of a clip of `num_latent_frames` latent frames."""
        return 1 + self.compression.time * (num_latent_frames - 1)

    @property
    def chunk_frames(self) -> int:
        """Frames of the smallest chunk of a stream; the first may have what is left over (`num_frames % chunk_frames`)."""
        return self.compression.time

    # -- statistics

    @property
    def latent_statistics(self) -> LatentStatistics:
        """Mean and standard deviation of each channel of raw latents; zeros and ones until they are measured."""
        return LatentStatistics(self.latents_mean, self.latents_std)

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store measured statistics, both `(C,)`.

        Raises:
            DataError: they have another number of channels, or a std is not positive: they are of another VAE.
        """
        if not mean.shape == std.shape == (self.latent_channels,):
            raise DataError(
                f"latent statistics have {tuple(mean.shape)} means and {tuple(std.shape)} standard deviations, but this VAE "
                f"has {self.latent_channels} latent channels: they are another VAE's. Measure them on this one."
            )
        if not bool(torch.isfinite(mean).all() and (std > 0).all() and torch.isfinite(std).all()):
            raise DataError("latent statistics must be finite, with positive standard deviations.")
        self.latents_mean.copy_(mean)
        self.latents_std.copy_(std)

    def normalize(self, latents: Tensor) -> Tensor:
        """Raw latents to the space that a diffusion model lives in: `(z - mean) / std * scaling_factor`."""
        mean, std = _per_channel(self.latents_mean, latents), _per_channel(self.latents_std, latents)
        return (latents - mean) / std * self.config.scaling_factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = _per_channel(self.latents_mean, latents), _per_channel(self.latents_std, latents)
        return latents / self.config.scaling_factor * std + mean

    # -- checks

    def check_video(self, video: Tensor) -> None:
        """Refuse what is no batch of videos for this VAE, apart from the number of frames.

        Raises:
            DataError: shape, size, dtype, or values: NaN, or outside of [-1, 1].
        """
        if video.ndim != 5 or video.shape[1] != self.config.in_channels:
            raise DataError(f"video has shape {tuple(video.shape)}; expected (B, {self.config.in_channels}, T, H, W).")
        if not video.is_floating_point():
            raise DataError(f"video is {video.dtype}; expected floats in [-1, 1] (uint8 frames: video / 127.5 - 1).")
        compression = dataclasses.asdict(self.compression)
        for name, value in (("height", video.shape[3]), ("width", video.shape[4])):
            rule = compression[name]
            if value % rule or value == 0:
                below = value // rule * rule
                near = f"{below} and {below + rule}" if below else f"{rule}"
                raise DataError(
                    f"video has a {name} of {value} pixels; this VAE takes multiples of {rule}, the nearest: {near}."
                )
        if video.device.type != "meta" and video.numel():
            _check_pixels(video)

    def _check_frames(self, num_frames: int) -> None:
        rule = self.compression.time
        if num_frames % rule != 1 % rule:
            below = max(1, (num_frames - 1) // rule * rule + 1)
            raise DataError(
                f"video has {num_frames} frames; this VAE takes 1 + {rule} * n, the nearest are {below} and {below + rule}."
            )

    def _check_chunk_frames(self, num_frames: int, is_first: bool) -> None:
        if is_first:
            self._check_frames(num_frames)
        elif num_frames == 0 or num_frames % self.compression.time:
            rule = self.compression.time
            raise DataError(
                f"a chunk of {num_frames} frames follows the first; this VAE takes 1 + {rule} * n frames in the first chunk "
                f"and {rule} * n in every later one."
            )

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or latents.shape[2] == 0:
            raise DataError(
                f"latents have shape {tuple(latents.shape)}; this VAE decodes (B, {self.latent_channels}, T', H', W'). "
                "Another number of channels is another VAE's."
            )

    def _check_sigma(self, sigma: Tensor | None) -> None:
        if self.timestep_conditioning and sigma is None:
            raise ConfigError(
                "this decoder is conditioned on the noise level: pass decode(latents, sigma), (B,), 0 for clean latents."
            )
        if not self.timestep_conditioning and sigma is not None:
            raise ConfigError(
                "this decoder is not conditioned on the noise level (timestep_conditioning is false): pass no sigma."
            )

    def _refuse_streaming(self, causal: bool, what: str) -> None:
        if not causal:
            raise ConfigError(
                f"the {what} of this {self.spec_name} looks at later frames, so it cannot stream exactly. Take tiles "
                "(videofm.models.vae.tiling), or a config whose norms are per frame and whose convolutions are causal."
            )


def _check_pixels(video: Tensor) -> None:
    low, high = (float(value) for value in torch.aminmax(video.detach()))
    if not math.isfinite(low) or not math.isfinite(high):
        finite = torch.isfinite(video.detach()).flatten(3).all(dim=3).all(dim=1)  # (B, C, T, H, W) -> (B, T)
        sample, frame = (~finite).nonzero()[0].tolist()
        raise DataError(f"frame {frame} of sample {sample} has pixels that are NaN or infinite: the clip is damaged.")
    if low < -1 - _PIXEL_TOLERANCE or high > 1 + _PIXEL_TOLERANCE:
        raise DataError(f"pixels lie in [{low:g}, {high:g}]; expected [-1, 1] (uint8 frames: video / 127.5 - 1).")


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, 1, 1, 1)  # (C,) -> (1, C, 1, 1, 1)
