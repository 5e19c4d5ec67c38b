"""One rank of a training run: `python -m videofm.train.worker RUN_DIR ATTEMPT`.

A launcher starts as many as the mesh has ranks, with torchrun's environment. Each writes `attempts/NNNN/rank_R.json`, because
launchers flatten exit codes: the verb that waits reads those files.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from videofm.config.autoencoder import AutoencoderConfig
from videofm.config.train import TrainConfig
from videofm.data.buckets import describe_steps
from videofm.errors import Interrupted, VideofmError
from videofm.parallel.collectives import naming
from videofm.parallel.mesh import Mesh, create_mesh, destroy_mesh
from videofm.progress import LOG, setup_logging
from videofm.run_dir import RunDirectory, write_json
from videofm.train import callbacks, reference_errors, state, watch
from videofm.train.build import Job, build_job, build_models, build_objective, fate, pick_device, split_heads, trained_roles
from videofm.train.cached import OnlineCounts, SpotCheck, open_loader
from videofm.train.optim import num_elements
from videofm.train.share import compare_orders
from videofm.train.token_origin import check_tokenizers
from videofm.train.trainer import Callback, fit


def train(config: TrainConfig, run: RunDirectory, attempt: int) -> None:
    """Build the run of `config`, go on from its newest checkpoint, and train to the end.

    Raises:
        Interrupted: a stop was asked for, and everything is saved.
    """
    device = pick_device(config.trainer.device)
    share_cores(config.trainer.num_threads, device)
    rendezvous = os.environ.get("VIDEOFM_RENDEZVOUS")
    models = build_models(config)
    mesh = create_mesh(config.parallel, device, Path(rendezvous) if rendezvous else None, split_heads(models))
    try:
        with naming("run"):
            _train_on(mesh, config, run, attempt, models)
    finally:
        destroy_mesh()


def _train_on(mesh: Mesh, config: TrainConfig, run: RunDirectory, attempt: int, models: Mapping[str, nn.Module]) -> None:
    objective = build_objective(config)
    loader = open_loader(config, mesh, models, run.path / "quarantine.jsonl")
    compare_orders(loader.plan.identity, mesh)
    check_tokenizers(config, models, trained_roles(objective), loader)
    state.save_bases(run, models, mesh)
    start = reference_errors.identity(config, objective, loader.plan, models)
    folder = state.resume_folder(run)
    if folder is not None:
        state.load_weights(folder, models, trained_roles(objective))
    job = build_job(config, run, mesh, loader, models)
    _describe(job, folder)
    position = state.load_state(job, folder) if folder is not None else state.PlanState()
    state.save_frozen(job)
    if config.data.cache is not None:
        SpotCheck(job).check(job, position)
    reference_errors.provide(job, start, resumed=folder is not None)
    fit(job, position, _callbacks(job, position.step, attempt))


def share_cores(num_threads: int | None, device: torch.device) -> None:
    """Give this rank its share of the machine's cores; more threads than cores slow every rank down."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads or max(1, cores // local))


def _callbacks(job: Job, step: int, attempt: int) -> list[Callback]:
    trainer, watched = job.config.trainer, watching(job)
    main: list[Callback] = []
    if job.mesh.is_main:
        main.append(callbacks.Metrics(job.run, step, trainer.max_steps, trainer.log_every, attempt))
        if job.config.wandb.mode != "disabled":
            main.append(callbacks.Wandb(job))
    finish = getattr(job.objective, "after_training", None)
    last: list[Callback] = [callbacks.Checkpoints()]
    if isinstance(objective := job.config.objective, AutoencoderConfig):
        last = [*last, callbacks.Diagnostics(objective.diagnostics_every, objective.num_statistics_clips)]
    # What is watched comes first: the held-out loss is one of the metrics.
    return [*watched, *main, *([callbacks.AfterTraining(finish)] if finish else []), *last]


def watching(job: Job) -> list[Callback]:
    """What looks at the model while it trains, as configured."""
    found: list[Callback] = []
    if (samples := job.config.samples) is not None:
        if getattr(job.config.objective, "features", None) is not None:
            LOG.info("samples are made with the null feature, for want of a guide: `videofm sample` with one makes guided ones")
        found.append(watch.Samples(samples))
    if (held_out := job.config.held_out) is not None:
        found.append(watch.HeldOut(held_out, job))
    if job.config.data.cache is not None:
        found.append(SpotCheck(job))
    if job.config.data.online is not None:
        found.append(OnlineCounts(job))
    return found


def _describe(job: Job, folder: Path | None) -> None:
    if not job.mesh.is_main:
        return
    for role, model in job.models.items():
        count = sum(map(num_elements, model.parameters()))
        trained = fate(model, role in job.trained_roles)
        LOG.info("%s: %s, %s parameters, %s", role, model.spec_name, f"{count:,}", trained)
    plan = job.loader.plan
    LOG.info("%s; steps of %s", plan.describe(), describe_steps(job.config.data))
    if job.mesh.world_size > 1:
        LOG.info("%s, ZeRO stage %d", job.mesh.layout.describe(), job.config.parallel.zero_stage)
    for line in plan.left_out():
        LOG.warning(line)
    LOG.info("resuming from %s" if folder else "a new run", *([folder.name] if folder else []))


def main(arguments: list[str]) -> int:
    """Run one rank and write how it ended."""
    _die_with_parent()
    # The verb that started us turns Ctrl-C and SIGTERM into `control/stop`, which every rank sees at a step boundary.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run, attempt = RunDirectory(arguments[0]), int(arguments[1])
    rank = int(os.environ.get("RANK", "0"))
    folder = run.path / "attempts" / f"{attempt:04d}"
    setup_logging(run.path / "log.txt" if rank == 0 else folder / f"rank_{rank}.log")
    # Libraries (wandb) leave folders for an orderly exit of Python to remove, which a rank does not have.
    with tempfile.TemporaryDirectory(prefix="videofm-rank-", ignore_cleanup_errors=True) as scratch:
        tempfile.tempdir = scratch
        outcome = _train(run, attempt, folder / f"rank_{rank}_traceback.txt")
        tempfile.tempdir = None
    write_json(folder / f"rank_{rank}.json", outcome)
    return {"finished": 0, "interrupted": 75, "failed": 1}[outcome["state"]]


def _train(run: RunDirectory, attempt: int, traceback_file: Path) -> dict[str, str]:
    """Train, and say how it ended: `state`, `message` and, of a failure, the name of our error as `kind`."""
    try:
        train(TrainConfig.model_validate(run.config), run, attempt)
    except Interrupted as error:
        return {"state": "interrupted", "message": str(error)}
    except VideofmError as error:
        return {"state": "failed", "message": str(error), "kind": type(error).__name__}
    except Exception as error:
        traceback_file.write_text(traceback.format_exc())
        return {"state": "failed", "message": f"{type(error).__name__}: {error}", "kind": ""}
    return {"state": "finished", "message": ""}


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies: no rank outlives its launcher."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" not in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.stdout.flush()
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)
