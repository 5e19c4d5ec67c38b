"""The one engine: Ray tasks, on one local node by default or on a cluster.

Core tasks rather than Ray Data: a group is a task that commits its own shard, so blocks, operators and a streaming scheduler
would have nothing to move, and Ray Data's answers to a worker that dies (retry for ever, or lose the block) are wrong here.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from data_pipelines.groups import Job, process_group
from data_pipelines.scratch import RAY, scratch_folder
from videofm.config.curate import EngineConfig
from videofm.errors import DataError, VideofmError

_WORKER_DEATHS = 2
"""A task whose worker process dies is begun again this often; the attempts log keeps a source from doing that twice."""

LOOPBACK = "127.0.0.2"
"""Address of a local node. Ray takes 127.0.0.1 for a slip and puts the machine's outward address in its place."""


@contextmanager
def cluster(config: EngineConfig) -> Iterator[None]:
    """A Ray cluster to work on: the one of this process, the one at `config.address`, or a local node for this call.

    The local node talks over loopback, has no dashboard, sends no usage statistics, and asks for a random token: some of Ray's
    ports listen on all interfaces whatever it is told. The token lives in the environment of these processes, not in a file.
    """
    if ray.is_initialized():
        yield
        return
    handlers = _signal_handlers()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if config.address is None:
        # `ray.init` of a local node switches token mode on by itself; with a token at hand it makes no file in the user's
        # home. Ray reads the token once a process, so it stays in the environment.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Unix sockets lie in it, and their paths may have 107 bytes: it must be short.
    with scratch_folder(RAY, Path("/tmp")) as folder:
        try:
            if config.address is None:
                ray.init(
                    num_cpus=config.num_workers or os.cpu_count(),
                    include_dashboard=False,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(folder),
                    object_store_memory=config.object_store_mib * 2**20,
                    log_to_driver=False,
                    configure_logging=False,
                )
            else:
                ray.init(address=config.address, log_to_driver=False, configure_logging=False)
            _restore_signal_handlers(handlers)  # Ray takes SIGTERM, which must stop the run cleanly
            yield
        finally:
            ray.shutdown()
            _restore_signal_handlers(handlers)


def run_jobs(
    jobs: Sequence[Job], config: EngineConfig, should_stop: Callable[[], bool]
) -> Iterator[tuple[Job, dict[str, Any] | None]]:
    """Run jobs on the cluster, a bounded number at once; yields each with its report as it ends (None: it was stopped).

    Once `should_stop()` is true nothing more is submitted; what runs ends by itself at its next source.

    Raises:
        DataError: a task failed for a reason outside of its sources, such as a full disk.
    """
    # An idle task slot costs a scheduling round, so one more than can run is kept waiting.
    limit = (config.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))) + 1
    task = ray.remote(num_cpus=1, max_retries=_WORKER_DEATHS)(_task)
    waiting = list(reversed(jobs))
    running: dict[Any, Job] = {}
    while running or (waiting and not should_stop()):
        while waiting and not should_stop() and len(running) < limit:
            job = waiting.pop()
            running[task.remote(asdict(job))] = job
        done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        for reference in done:
            job = running.pop(reference)
            yield job, _result(reference, job)


def _task(job: dict[str, Any]) -> dict[str, Any] | None:
    """What runs in a Ray worker."""
    return process_group(Job(**job))


def _result(reference: Any, job: Job) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] | None = ray.get(reference)
        return report
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, VideofmError):
            raise error.cause from None
        if isinstance(error.cause, OSError):
            raise DataError(f"group {job.group} could not be written: {error.cause}. Free the disk and run again") from None
        raise
    except ray.exceptions.RayError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        times = _WORKER_DEATHS + 1
        raise DataError(f"the worker of group {job.group} died {times} times: {first}. Run again to go on") from None


def _signal_handlers() -> dict[signal.Signals, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def _restore_signal_handlers(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, handler)
