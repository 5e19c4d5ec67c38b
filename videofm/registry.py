"""Names to code. Thin tables of `name -> "module:attribute"`, imported on use; a wrong name lists the right ones."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from videofm.errors import ConfigError

MODELS = {
    "vae/ltx": "videofm.models.vae.ltx:SPEC",
    "vae/cv_vae": "videofm.models.vae.cv_vae:SPEC",
    "vae/cv_vae_sd3": "videofm.models.vae.cv_vae:SPEC_SD3",
    "vae/image_kl": "videofm.models.vae.image_kl:SPEC",
    "vae/od_vae": "videofm.models.vae.od_vae:SPEC",
    "vae/step_video": "videofm.models.vae.step_video:SPEC",
    "dit/ltx": "videofm.models.dit.ltx:SPEC",
    "dit/step_video": "videofm.models.dit.step_video:SPEC",
    "ar/transformer": "videofm.models.ar:SPEC",
    "arlon/tokenizer": "videofm.models.arlon.tokenizer:SPEC",
    "reward/video": "videofm.models.reward:SPEC",
    "text/t5": "videofm.models.text.t5:SPEC",
    "text/step_video": "videofm.models.text.step_video:SPEC",
    "discriminator/patchgan_3d": "videofm.models.discriminators.patchgan_3d:SPEC",
    "perceptual/lpips": "videofm.models.perceptual.lpips:SPEC",
    "perceptual/i3d": "videofm.models.perceptual.i3d:SPEC",
}

OBJECTIVES = {
    "autoencoder": "videofm.objectives.autoencoder:AutoencoderObjective",
    "latent_tokens": "videofm.objectives.latent_tokens:LatentTokensObjective",
    "flow_matching": "videofm.objectives.flow_matching:FlowMatchingObjective",
    "dpo": "videofm.objectives.dpo:DPOObjective",
    "reward_weighted": "videofm.objectives.reward_weighted:RewardWeightedObjective",
    "next_token": "videofm.objectives.next_token:NextTokenObjective",
    "reward": "videofm.objectives.reward:RewardObjective",
}

INJECTIONS = {
    "adaptive_norm": "videofm.models.arlon.injection:AdaptiveNorm",
    "mlp": "videofm.models.arlon.injection:MLP",
    "controlnet": "videofm.models.arlon.injection:ControlNet",
}

QUANTIZERS = {
    "vq": "videofm.models.quantizers.vq:VectorQuantizer",
    "vq_ema": "videofm.models.quantizers.ema:EMAQuantizer",
    "simvq": "videofm.models.quantizers.simvq:SimVQ",
    "fsq": "videofm.models.quantizers.fsq:FSQ",
    "rvq": "videofm.models.quantizers.rvq:ResidualQuantizer",
}

ATTENTION_BACKENDS = {
    "math": "videofm.attention.backends.math:BACKEND",
    "sdpa": "videofm.attention.backends.sdpa:BACKEND",
    "flash_attn": "videofm.attention.backends.flash_attn:BACKEND",
    "xformers": "videofm.attention.backends.xformers:BACKEND",
    "flex": "videofm.attention.backends.flex:BACKEND",
}

ATTENTION_STRATEGIES = {
    "none": "videofm.attention.strategies.none:STRATEGY",
    "ulysses": "videofm.attention.strategies.ulysses:STRATEGY",
    "allgather_kv": "videofm.attention.strategies.allgather_kv:STRATEGY",
    "ring": "videofm.attention.strategies.ring:STRATEGY",
    "unified": "videofm.attention.strategies.unified:STRATEGY",
}

DECODERS = {
    "torchcodec": "videofm.data.decoders.torchcodec:DECODER",
    "pyav": "videofm.data.decoders.pyav:DECODER",
    "decord": "videofm.data.decoders.decord:DECODER",
}

CURATION_STAGES = {
    "probe": "data_pipelines.stages.probe:ProbeStage",
    "dedup": "data_pipelines.stages.dedup:DedupStage",
    "split": "data_pipelines.stages.split:SplitStage",
    "borders": "data_pipelines.stages.borders:BordersStage",
    "scores": "data_pipelines.stages.scores:ScoresStage",
    "filter": "data_pipelines.stages.filter:FilterStage",
    "near_dup": "data_pipelines.stages.near_dup:NearDupStage",
    "caption": "data_pipelines.stages.caption:CaptionStage",
    "transcode": "data_pipelines.stages.transcode:TranscodeStage",
    "score_model": "data_pipelines.stages.score_model:ScoreModelStage",
    "caption_model": "data_pipelines.stages.caption_model:CaptionModelStage",
    "balance": "data_pipelines.stages.balance:BalanceStage",
}

SCORE_MODELS = {
    "clip_aesthetic": "data_pipelines.models.clip:ClipHead",
    "clip_nsfw": "data_pipelines.models.clip:ClipHead",
    "clip_text_match": "data_pipelines.models.clip:ClipTextMatch",
    "embedding": "data_pipelines.models.clip:ClipEmbedding",
    "image_classifier": "data_pipelines.models.classifier:ImageClassifier",
    "ocr_text": "data_pipelines.models.text_area:TextArea",
}

ENCODERS = {
    "latents": "videofm.train.encoders:LatentEncoder",
    "tokens": "videofm.train.token_encoder:TokenEncoder",
    "text": "videofm.train.encoders:TextEncoder",
}

REWARDS = {
    "moving_shapes": "videofm.reward.moving_shapes:MovingShapes",
    "model": "videofm.reward.model:ModelScores",
}

CANDIDATES = {"pipeline": "videofm.sampling.candidates:CandidateMaker"}

ENCODER_POOLS = {"online": "data_pipelines.encode.online:OnlineEncoders"}

STAGES = {
    "demo_data": "data_pipelines.demo:run",
    "curate": "videofm.stages.curate:run",
    "encode": "data_pipelines.encode.run:run",
    "train": "videofm.stages.train:run",
    "sample": "videofm.stages.sample:run",
    "dpo_generate": "videofm.stages.dpo_generate:run",
    "dpo_rank": "videofm.stages.rank:run",
    "dpo_import": "data_pipelines.preferences.run:run",
    "evaluate": "videofm.stages.evaluate:run",
    "export": "videofm.stages.export:run",
    "report": "videofm.stages.report:run",
}

LAUNCHERS = {
    "local": "launch.local:start",
    "ray": "launch.ray_ranks:start",
    "slurm": "launch.srun:start",
}
"""Who starts the ranks of a training run (`VIDEOFM_RANKS`): functions that `launch.ranks` describes."""


def resolve(target: str) -> Any:
    """The object behind `"module:attribute"`; imports the module."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def lookup(table: dict[str, str], name: str, what: str) -> Any:
    """The object registered as `name` in `table`.

    Raises:
        ConfigError: there is no such name; the message offers the nearest one and lists all.
    """
    if name not in table:
        raise ConfigError(f"no {what} is called {name!r}{nearest(name, table)}. There are: {', '.join(sorted(table))}.")
    return resolve(table[name])


def nearest(word: str, words: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the closest of `words`, or an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""
