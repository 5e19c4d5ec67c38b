"""The image VAE of Stable Diffusion 2.1 and 3, frame by frame: diffusers' `AutoencoderKL` as a video VAE."""

from videofm.models.vae.image_kl.adapter import ADAPTER
from videofm.models.vae.image_kl.config import SIZES, ImageKLConfig
from videofm.models.vae.image_kl.model import ImageKL
from videofm.models.vae.image_kl.parallelize import parallelize
from videofm.types import ModelSpec

SPEC = ModelSpec("vae/image_kl", ImageKLConfig, SIZES, ImageKL, parallelize, ADAPTER)

__all__ = ["ADAPTER", "SIZES", "SPEC", "ImageKL", "ImageKLConfig", "parallelize"]
