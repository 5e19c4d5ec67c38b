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
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn

from videofm.config.autoencoder import AutoencoderConfig
from videofm.config.train import TrainConfig
from videofm.data.buckets import describe_steps
from videofm.errors import Interrupted, VideofmError
from videofm.parallel.collectives import naming
from videofm.parallel.mesh import Mesh, create_mesh, destroy_mesh
from videofm.parallel.rendezvous import Place, find_place
from videofm.progress import LOG, setup_logging
from videofm.run_dir import RunDirectory, write_json
from videofm.train import callbacks, divergence, goodput, reference_errors, state, watch
from videofm.train.build import Job, build_job, build_models, build_objective, fate, pick_device, split_heads, trained_roles
from videofm.train.cached import OnlineCounts, SpotCheck, open_loader
from videofm.train.optim import num_elements
from videofm.train.preflight import preflight
from videofm.train.share import compare_orders
from videofm.train.signals import RankSignals
from videofm.train.timeline import timed
from videofm.train.token_origin import check_tokenizers
from videofm.train.trainer import Callback, fit
from videofm.train.watchdog import Heartbeat, Watchdog


def train(
    config: TrainConfig,
    run: RunDirectory,
    attempt: int,
    place: Place | None = None,
    heartbeat: Heartbeat | None = None,
) -> None:
    """Build the run of `config`, go on from its newest checkpoint, and train to the end.

    Args:
        config: of the run.
        run: where it is kept.
        attempt: number of this attempt.
        place: of this process among the ranks; looked for in the environment unless given.
        heartbeat: is moved on by whatever is done; made unless given.

    Raises:
        Interrupted: a stop was asked for, and everything is saved.
        Diverged: another attempt may go on, with other data.
    """
    heartbeat = heartbeat or Heartbeat()
    place = place or find_place(attempt=attempt)
    os.environ.update(place.environment())  # libraries read torchrun's words, whoever started this rank
    device = pick_device(config.trainer.device)
    share_cores(config.trainer.num_threads, device)
    models = build_models(config)
    mesh = create_mesh(config.parallel, device, place, split_heads(models))
    try:
        with naming("run"):
            preflight(config, run, mesh, models, attempt)
            _train_on(mesh, config, run, attempt, models, heartbeat)
    finally:
        destroy_mesh()


def _train_on(
    mesh: Mesh,
    config: TrainConfig,
    run: RunDirectory,
    attempt: int,
    models: Mapping[str, nn.Module],
    heartbeat: Heartbeat | None = None,
) -> None:
    heartbeat = heartbeat or Heartbeat()
    objective = build_objective(config)
    heartbeat.beat("opening of the data")
    loader = open_loader(config, mesh, models, run.path / "quarantine.jsonl")
    windows = divergence.read_windows(run, state.peers_of(mesh))
    compare_orders({**loader.plan.identity, **divergence.identity(windows)}, mesh)
    check_tokenizers(config, models, trained_roles(objective), loader)
    state.save_bases(run, models, mesh)
    start = reference_errors.identity(config, objective, loader.plan, models)
    divergence.keep_to_course(loader.plan, windows, mesh, state.places(run, config.trainer))
    heartbeat.beat("reading of the checkpoint")
    folder = state.resume_folder(run, mesh, config.trainer)
    if folder is not None:
        state.load_weights(folder, models, trained_roles(objective))
    heartbeat.beat("building of the engines")
    job = build_job(config, run, mesh, loader, models)
    job.heartbeat = heartbeat
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
    finish = getattr(job.objective, "after_training", None)
    checkpoints = callbacks.Checkpoints(lambda: job.divergence.healthy)
    last: list[Callback] = [checkpoints]
    if isinstance(objective := job.config.objective, AutoencoderConfig):
        last = [*last, callbacks.Diagnostics(objective.diagnostics_every, objective.num_statistics_clips)]
    if job.mesh.is_main and job.config.wandb.mode != "disabled":
        last = [*last, callbacks.Wandb(job)]  # behind all that must not wait for a service
    # What is watched comes first: the held-out loss is one of the metrics.
    found = [*watched, checkpoints.copying, *main, *([callbacks.AfterTraining(finish)] if finish else []), *last]
    return timed(found, job.run, attempt) if job.mesh.is_main else found


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
    run, attempt = RunDirectory(arguments[0]), int(arguments[1])
    try:
        place = find_place(attempt=attempt)
    except VideofmError as error:
        print(f"videofm: {error}", file=sys.stderr, flush=True)  # there is no rank yet whose files could say it
        return error.exit_code
    rank = place.rank
    folder = run.path / "attempts" / f"{attempt:04d}"
    setup_logging(run.path / "log.txt" if rank == 0 else folder / f"rank_{rank}.log")
    if rank == 0:
        goodput.record(run, attempt, goodput.LOADED)
    said = folder / f"rank_{rank}.json"
    with RankSignals(run.request_stop, partial(_leave, said)):
        # Libraries (wandb) leave folders for an orderly exit of Python to remove, which a rank does not have.
        with tempfile.TemporaryDirectory(prefix="videofm-rank-", ignore_cleanup_errors=True) as scratch:
            tempfile.tempdir = scratch
            outcome = _train(run, attempt, place, folder)
            tempfile.tempdir = None
        _say(said, outcome)
    return {"finished": 0, "interrupted": Interrupted.exit_code}.get(outcome["state"], 1)


def _leave(said: Path, name: str) -> None:
    """End at once: a signal has come again."""
    message = f"a second {name}: stopped at once, with nothing saved; the same command goes on from the last checkpoint"
    try:
        _say(said, {"state": "interrupted", "message": message})
    finally:
        os._exit(Interrupted.exit_code)


def _say(said: Path, outcome: Mapping[str, str]) -> None:
    """Write how this rank ended. Where the disk does not take it the exit code tells of a stop, and what is printed tells the
    rest: a run that saved elsewhere for want of room must not look as if it had died."""
    try:
        write_json(said, outcome)
    except OSError as error:
        told = f"{outcome['state']}: {outcome['message']}".rstrip(": ")
        with suppress(OSError):  # what is printed may go to the same disk
            print(f"videofm: {said.stem} {told} ({said} cannot be written: {error})", file=sys.stderr, flush=True)


def _train(run: RunDirectory, attempt: int, place: Place, folder: Path) -> dict[str, str]:
    """Train, and say how it ended: `state`, `message` and, of a failure, the name of our error as `kind`.

    Where training does not go on, this does not return: the watchdog says so and ends the process.
    """
    traceback_file = folder / f"rank_{place.rank}_traceback.txt"
    try:
        config = TrainConfig.model_validate(run.config)
        with Watchdog(config.faults, folder, place.rank, place.world_size) as watchdog:
            train(config, run, attempt, place, watchdog.heartbeat)
    except Interrupted as error:
        return {"state": "interrupted", "message": str(error)}
    except divergence.Diverged as error:
        return {"state": "diverged", "message": str(error)}
    except VideofmError as error:
        return {"state": "failed", "message": str(error), "kind": type(error).__name__}
    except Exception as error:
        with suppress(OSError):
            traceback_file.write_text(traceback.format_exc())
        return {"state": "failed", "message": f"{type(error).__name__}: {error}", "kind": ""}
    return {"state": "finished", "message": ""}


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies: no rank outlives its launcher."""
    if sys.platform != "linux":
        return
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    launcher = os.environ.get("VIDEOFM_LAUNCHER")  # of a launcher on this machine
    if launcher is not None and not _lives(launcher):
        os._exit(1)  # it died before we could ask: the imports take seconds


def _lives(process: str) -> bool:
    """Whether there is such a process on this machine, which is Linux. One that only waits to be reaped is dead."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


if __name__ == "__main__":
    sys.stdout.flush()
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)
