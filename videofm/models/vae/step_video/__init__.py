"""The Video-VAE of Step-Video-T2V: 16x16x8 with dual paths, and the plain 8x8x4 that its training starts from."""

from videofm.models.vae.step_video.adapter import ADAPTER
from videofm.models.vae.step_video.config import SIZES, StepVideoVAEConfig
from videofm.models.vae.step_video.model import StepVideoVAE
from videofm.models.vae.step_video.parallelize import parallelize
from videofm.models.vae.step_video.stage_one import grow, load_stage_one
from videofm.types import ModelSpec

SPEC = ModelSpec("vae/step_video", StepVideoVAEConfig, SIZES, StepVideoVAE, parallelize, ADAPTER, grow)

__all__ = ["ADAPTER", "SIZES", "SPEC", "StepVideoVAE", "StepVideoVAEConfig", "grow", "load_stage_one", "parallelize"]
