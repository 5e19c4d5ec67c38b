"""The causal video VAE of LTX-Video, releases 0.9.0, 0.9.1 and 0.9.5."""

from videofm.models.vae.ltx.adapter import ADAPTER
from videofm.models.vae.ltx.config import SIZES, LTXVAEConfig
from videofm.models.vae.ltx.model import LTXVideoVAE
from videofm.models.vae.ltx.parallelize import parallelize
from videofm.types import ModelSpec

SPEC = ModelSpec("vae/ltx", LTXVAEConfig, SIZES, LTXVideoVAE, parallelize, ADAPTER)

__all__ = ["ADAPTER", "SIZES", "SPEC", "LTXVAEConfig", "LTXVideoVAE", "parallelize"]
