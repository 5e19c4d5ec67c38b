"""What is watched while a diffusion transformer trains: videos of fixed prompts, and the held-out loss at fixed noise levels.

Both look at the weights that would be shipped, the moving averages where there are any, and draw the same noise each time, so
that one step differs from the next by its weights alone. Every rank does the same work, which ZeRO 3 needs to gather weights;
one writes.

```
samples/step_00000200/000.mp4 ... contact_sheet.png    samples.jsonl (of the newest step: file, caption, seed, step)
held_out.jsonl (a row each time: step, num_clips, loss, loss_at_sigma)
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from videofm import media
from videofm.config.flow_matching import FlowMatchingConfig
from videofm.config.train import TRAINS_A_DIT, HeldOutConfig, SamplesConfig
from videofm.data.loader import StepLoader
from videofm.data.plan import PlanState
from videofm.evaluation.held_out_loss import held_out_loss
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.objectives.latent_statistics import first_clips
from videofm.objectives.latents import encoded_latents
from videofm.parallel.rng import KeyedRng
from videofm.progress import LOG
from videofm.run_dir import RunDirectory, read_jsonl, write_atomic
from videofm.sampling import Pipeline
from videofm.sampling.noise import video_seed
from videofm.sampling.pipeline import evaluating
from videofm.train.optim import averaged_weights
from videofm.types import Batch

if TYPE_CHECKING:  # it brings DeepSpeed, which `held_out_losses` does without
    from videofm.train.build import Job


class Samples:
    """Videos of the configured prompts, each `every` steps and at the end."""

    def __init__(self, config: SamplesConfig) -> None:
        self.config = config

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Make them where the count says so."""
        if _is_due(job, position, self.config.every):
            self._make(job, position.step)

    def after_training(self, job: Job, position: PlanState) -> None:
        """The last step has made its own."""

    def _make(self, job: Job, step: int) -> None:
        config, seed = self.config, job.config.seed
        settings = config.model_dump(exclude={"every", "prompts"}) | {"causal_fix": _flow_matching(job).causal_fix}
        pipeline = Pipeline(*(job.models[role] for role in FlowMatchingObjective.roles))
        with _as_shipped(job):
            videos = pipeline.generate(config.prompts, seed=seed, on_step=job.heartbeat.beat, **settings)
        if not job.mesh.is_main:
            return
        folder = job.run.path / "samples" / f"step_{step:08d}"
        frames = [media.to_frames(video) for video in videos]
        for index, clip in enumerate(frames):
            media.write_video(folder / f"{index:03d}.mp4", clip, config.fps)
        media.contact_sheet(frames, config.prompts, folder / "contact_sheet.png")
        rows = [
            {"file": f"samples/{folder.name}/{index:03d}.mp4", "caption": prompt, "seed": video_seed(seed, index), "step": step}
            for index, prompt in enumerate(config.prompts)
        ]
        _write_rows(job.run, "samples.jsonl", rows)


class HeldOut:
    """The flow-matching loss on held-out clips at each noise level, each `every` steps and at the end; the mean over the levels
    also stands in the metrics of the step, as `held_out_loss`."""

    def __init__(self, config: HeldOutConfig, job: Job) -> None:
        """
        Raises:
            DataError: the split has no clip of the configured size.
        """
        self.config = config
        # Clips of one size at a time, each by itself; a pack gives the same loss.
        data = job.config.data
        changes: dict[str, Any] = {"split": config.split, "num_workers": 0, "packing": None, "pairs": None}
        if config.manifest is not None:
            changes |= {"manifest": config.manifest, "mix": None, "view": None}
        elif data.mix is not None:  # a dataset's own split is that of the training
            changes["mix"] = [source.model_copy(update={"split": None}) for source in data.mix]
        self._loader = StepLoader(data.model_copy(update=changes), job.config.seed)

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Measure where the count says so."""
        if not _is_due(job, position, self.config.every):
            return
        num_clips = self._loader.plan.num_usable(self.config.num_clips)
        clips = job.heartbeat.over(first_clips(self._loader.first_clips(), num_clips), "held-out loss")
        batches = (batch.to(job.mesh.device) for batch in clips)
        objective = FlowMatchingObjective(_flow_matching(job))
        with _as_shipped(job):
            found = held_out_losses(objective, job.models, batches, self.config.sigmas, job.config.seed)
        metrics["held_out_loss"] = found["loss"]
        if job.mesh.is_main:
            LOG.info("held-out loss at step %d: %.5f", position.step, found["loss"])
            path = job.run.path / "held_out.jsonl"
            before = [row for row in read_jsonl(path) if row["step"] < position.step]  # a resumed run measures again
            _write_rows(job.run, path.name, [*before, {"step": position.step, **found}])

    def after_training(self, job: Job, position: PlanState) -> None:
        """The last step was measured."""


def held_out_losses(
    objective: FlowMatchingObjective,
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    sigmas: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """Flow-matching loss at each noise level: latents are the most likely, noise is keyed by (seed, clip).

    Args:
        objective: how clips become tokens; nothing is given, dropped or weighted.
        models: the roles of `objective`.
        batches: the clips, on the device of the models.
        sigmas: noise levels.
        seed: of the noise.

    Returns:
        `num_clips`, `loss` (the mean over the levels) and `loss_at_sigma`.

    Raises:
        DataError: there is no clip.
    """
    num_clips = 0

    def prepare(batch: Batch) -> Callable[[Tensor], Tensor]:
        nonlocal num_clips
        num_clips += len(batch.video)
        clean = encoded_latents(models["vae"], batch.video)
        noise = KeyedRng(seed, 0, batch.sample_ids, clean.device).normal("held_out_noise", tuple(clean.shape[1:]))
        return lambda sigma: objective.velocity_errors(models, clean, batch.captions, batch.fps, sigma, noise)

    with evaluating(*models.values()):
        losses = held_out_loss(prepare, batches, sigmas)
    by_sigma = {f"{sigma:g}": loss for sigma, loss in losses.items()}
    return {"num_clips": num_clips, "loss": sum(losses.values()) / len(losses), "loss_at_sigma": by_sigma}


def _is_due(job: Job, position: PlanState, every: int) -> bool:
    return position.step % every == 0 or position.step == job.config.trainer.max_steps


def _flow_matching(job: Job) -> FlowMatchingConfig:
    """How the objective noises clips: its own section, or what it has of flow matching."""
    objective = job.config.objective
    assert isinstance(objective, TRAINS_A_DIT), "the schema has checked it"
    return objective if isinstance(objective, FlowMatchingConfig) else objective.flow_matching


@contextmanager
def _as_shipped(job: Job) -> Iterator[None]:
    """Inside, models carry their moving averages, and compute in the precision of the training."""
    bf16 = job.config.trainer.precision == "bf16_autocast"
    with averaged_weights(job.averages.values()), torch.autocast(job.mesh.device.type, torch.bfloat16, enabled=bf16):
        yield


def _write_rows(run: RunDirectory, name: str, rows: list[dict[str, Any]]) -> None:
    write_atomic(run.path / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
