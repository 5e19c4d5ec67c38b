"""From the section of a sampler to the models that it names."""

from __future__ import annotations

import torch

from videofm.config.sample import SamplerConfig
from videofm.sampling.autoregressive import TokenSampling
from videofm.sampling.origin import check_origin
from videofm.sampling.pipeline import Pipeline
from videofm.sampling.settings import SamplingSettings
from videofm.sampling.token_guide import TokenGuide

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_pipeline(config: SamplerConfig, settings: SamplingSettings, device: str | None = None) -> Pipeline:
    """The models of `config`, its guide among them, on `device`; None takes CUDA where there is one.

    Raises:
        CheckpointError: a model is missing, or is not one that this sampler loads.
        ConfigError: a guide of another VAE, or whose tokenizer has changed.
    """
    guide, dtype = None, _DTYPES[config.dtype]
    if config.guide is not None:
        wanted = config.guide
        sampling = TokenSampling(wanted.temperature, wanted.top_k, wanted.top_p, wanted.guidance_scale)
        guide = TokenGuide.load(wanted.run, ema=config.ema, device=device, settings=sampling, dtype=dtype)
    schedule = settings.schedule
    pipeline = Pipeline.load(config.run, ema=config.ema, device=device, schedule=schedule, dtype=dtype, guide=guide)
    if guide is not None and config.guide is not None:
        check_origin(guide, config.guide.run, pipeline.vae, config.run)
    return pipeline
