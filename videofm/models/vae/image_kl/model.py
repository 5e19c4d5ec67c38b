"""The image VAE of Stable Diffusion as a video VAE, frame by frame: diffusers' `AutoencoderKL` (arXiv 2112.10752).

It is the frozen partner of CV-VAE, the start of inflated VAEs, and the baseline without compression in time.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from videofm.errors import ConfigError
from videofm.models.vae.base import LOGVAR_RANGE, VideoVAE
from videofm.models.vae.image_kl.config import ImageKLConfig
from videofm.ops.causal_conv import ChunkCache
from videofm.types import Posterior


class ImageKL(VideoVAE):
    """The VAE. A clip of n frames has n latent frames, and nothing crosses time."""

    spec_name = "vae/image_kl"

    def __init__(self, config: ImageKLConfig) -> None:
        super().__init__(config)
        self.latents_mean.fill_(config.shift_factor)
        self.image_vae = _autoencoder_kl(config)

    @property
    def encoder_causal(self) -> bool:
        """True: frames are encoded one by one."""
        return True

    @property
    def decoder_causal(self) -> bool:
        """True: frames are decoded one by one."""
        return True

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's output convolution."""
        return self.image_vae.decoder.conv_out.weight

    def _encode(self, video: Tensor, cache: ChunkCache | None = None) -> Posterior:
        moments = self.image_vae.encoder(rearrange(video, "b c t h w -> (b t) c h w"))
        if self.image_vae.quant_conv is not None:
            moments = self.image_vae.quant_conv(moments)
        mean, logvar = rearrange(moments, "(b t) c h w -> b c t h w", b=video.shape[0]).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def _decode(
        self, latents: Tensor, sigma: Tensor | None, generator: torch.Generator | None, cache: ChunkCache | None = None
    ) -> Tensor:
        images = rearrange(latents, "b c t h w -> (b t) c h w")
        if self.image_vae.post_quant_conv is not None:
            images = self.image_vae.post_quant_conv(images)
        return rearrange(self.image_vae.decoder(images), "(b t) c h w -> b c t h w", b=latents.shape[0])


def _autoencoder_kl(config: ImageKLConfig) -> nn.Module:
    # diffusers is an extra; it is imported only where an image VAE is built.
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError(
            "vae/image_kl needs diffusers, which is not installed (pip install -c constraints.txt -e '.[export]')."
        ) from error
    return AutoencoderKL(**config.arguments)
