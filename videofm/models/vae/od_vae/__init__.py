"""OD-VAE, the causal video VAE of Open-Sora-Plan, in the four variants of its paper."""

from videofm.models.vae.od_vae.adapter import ADAPTER
from videofm.models.vae.od_vae.config import SIZES, ODVAEConfig
from videofm.models.vae.od_vae.inflate import inflate
from videofm.models.vae.od_vae.model import ODVideoVAE
from videofm.models.vae.od_vae.parallelize import parallelize
from videofm.types import ModelSpec

SPEC = ModelSpec("vae/od_vae", ODVAEConfig, SIZES, ODVideoVAE, parallelize, ADAPTER, inflate)

__all__ = ["ADAPTER", "SIZES", "SPEC", "ODVAEConfig", "ODVideoVAE", "inflate", "parallelize"]
