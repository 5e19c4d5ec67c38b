"""The diffusion transformer of LTX-Video, 2B and 13B."""

from videofm.models.dit.ltx.adapter import ADAPTER
from videofm.models.dit.ltx.config import SIZES, LTXDiTConfig
from videofm.models.dit.ltx.model import LTXVideoDiT
from videofm.models.dit.ltx.parallelize import parallelize
from videofm.types import ModelSpec

SPEC = ModelSpec("dit/ltx", LTXDiTConfig, SIZES, LTXVideoDiT, parallelize, ADAPTER)

__all__ = ["ADAPTER", "SIZES", "SPEC", "LTXDiTConfig", "LTXVideoDiT", "parallelize"]
