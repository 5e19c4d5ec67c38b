"""CV-VAE, a causal video VAE whose latents an image VAE can read: its releases for Stable Diffusion 2.1 and 3, and ours."""

from videofm.models.vae.cv_vae.adapter import ADAPTER
from videofm.models.vae.cv_vae.config import SD3_SIZES, SIZES, CVVAEConfig, CVVAESD3Config
from videofm.models.vae.cv_vae.inflate import inflate
from videofm.models.vae.cv_vae.model import CVVAE
from videofm.models.vae.cv_vae.parallelize import parallelize
from videofm.models.vae.cv_vae.sd3 import CVVAESD3, SD3_ADAPTER
from videofm.types import ModelSpec

SPEC = ModelSpec("vae/cv_vae", CVVAEConfig, SIZES, CVVAE, parallelize, ADAPTER, inflate)
SPEC_SD3 = ModelSpec("vae/cv_vae_sd3", CVVAESD3Config, SD3_SIZES, CVVAESD3, parallelize, SD3_ADAPTER, inflate)

__all__ = [
    "ADAPTER",
    "CVVAE",
    "CVVAESD3",
    "SD3_ADAPTER",
    "SD3_SIZES",
    "SIZES",
    "SPEC",
    "SPEC_SD3",
    "CVVAEConfig",
    "CVVAESD3Config",
    "inflate",
    "parallelize",
]
