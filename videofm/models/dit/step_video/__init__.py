"""The diffusion transformer of Step-Video-T2V, 30B."""

from videofm.models.dit.step_video.adapter import ADAPTER
from videofm.models.dit.step_video.config import SIZES, StepVideoDiTConfig
from videofm.models.dit.step_video.model import StepVideoDiT
from videofm.models.dit.step_video.parallelize import parallelize
from videofm.types import ModelSpec

SPEC = ModelSpec("dit/step_video", StepVideoDiTConfig, SIZES, StepVideoDiT, parallelize, ADAPTER)

__all__ = ["ADAPTER", "SIZES", "SPEC", "StepVideoDiT", "StepVideoDiTConfig", "parallelize"]
