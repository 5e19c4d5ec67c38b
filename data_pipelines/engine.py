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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import ray

from data_pipelines.address import check_address
from data_pipelines.scratch import RAY, scratch_folder
from videofm.config.curate import EngineConfig
from videofm.errors import ConfigError, DataError, TransientError, VideofmError
from videofm.progress import LOG

_WORKER_DEATHS = 2
"""A task whose worker process dies is begun again this often; the attempts log keeps a source from doing that twice."""

_TRANSIENT_GROUPS = 10
"""After so many groups whose store did not answer nothing more is begun."""

LOOPBACK = "127.0.0.2"
"""Address of a local node. Ray takes 127.0.0.1 for a slip and puts the machine's outward address in its place."""

START_SECONDS = 1800.0
"""Actors that do not answer for so long, while they wait for a place, load weights or are replaced, are given up."""

DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)
"""What Ray raises where an actor, or what it answered, was lost with its process or its machine: another may take its place."""

Task = TypeVar("Task")
Tick = Callable[[int], None]
"""Called about once a second with the number of tasks that run."""


@contextmanager
def cluster(config: EngineConfig) -> Iterator[None]:
    """A Ray cluster to work on: the one of this process, the one at `config.address`, or a local node for this call.

    The local node talks over loopback, has no dashboard, sends no usage statistics, and asks for a random token: some of Ray's
    ports listen on all interfaces whatever it is told. The token lives in the environment of these processes, not in a file.

    Raises:
        ConfigError: `config.address` is open to everybody, or public without a token.
    """
    if ray.is_initialized():
        yield
        return
    if config.address is not None:
        check_address(config.address, os.environ)
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
                    address="local",  # else RAY_ADDRESS would count
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


def run_tasks(
    function: Callable[..., Any],
    tasks: Iterable[tuple[Task, tuple[Any, ...]]],
    config: EngineConfig,
    should_stop: Callable[[], bool],
    *,
    num_cpus: float = 1.0,
    reserved_cpus: float = 0.0,
    tick: Tick = lambda running: None,
    failed: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Task, Any]]:
    """Run `function(*arguments)` for pairs of task and arguments, a bounded number at once; yields each with its result.

    Args:
        function: a function of a module; arguments and result travel to and from a Ray worker.
        tasks: drawn from as workers become free.
        config: how many at once, and the memory of one.
        should_stop: once it is true nothing more is begun; what runs ends by itself.
        num_cpus: CPUs of a task; 0 where it only waits for actors, so that it cannot keep them from starting.
        reserved_cpus: those that actors hold.
        tick: see `Tick`.
        failed: called when a task fails for a reason outside of its sources; may ask the others to end early. Nothing more is
            begun then, and what runs is waited for: a task that is killed would look as if its source had killed it.

    Raises:
        TransientError: stores of some groups did not answer; all others were done first.
        DataError: a task failed for a reason outside of its sources, such as a full disk.
        ConfigError: no node of the cluster has the memory that a task may use.
    """
    cpus = float(ray.cluster_resources().get("CPU", 1.0)) - reserved_cpus
    # An idle task slot costs a scheduling round, so one more than can run is kept waiting.
    limit = (config.num_workers or max(1, int(cpus))) + 1
    remote = ray.remote(num_cpus=num_cpus, memory=_task_memory(config), max_retries=_WORKER_DEATHS)(_call)
    waiting, running = iter(tasks), dict[Any, Task]()
    transient: list[TransientError] = []
    failure: Exception | None = None
    exhausted = False
    while True:
        while not (exhausted or failure or should_stop()) and len(running) < limit and len(transient) < _TRANSIENT_GROUPS:
            task = next(waiting, None)
            if task is None:
                exhausted = True
            else:
                running[remote.remote(function, task[1])] = task[0]
        if not running:
            break
        done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        tick(len(running))
        for reference in done:
            name = running.pop(reference)
            try:
                result = _result(reference, name)
            except TransientError as error:
                transient.append(error)
            except Exception as error:
                if failure is None:
                    failure = error
                    failed()
            else:
                yield name, result
    if failure is not None:
        raise failure
    if transient:
        raise TransientError(f"{len(transient)} groups could not read their sources; the first: {transient[0]}")


def check_actors(name: str, count: int, num_cpus: float, num_gpus: float) -> None:
    """Refuse actors that Ray would look for a place for without end, and say where they leave the GPUs of a cluster idle.

    Args:
        name: who wants them, in messages.
        count: how many.
        num_cpus: of each.
        num_gpus: of each.

    Raises:
        ConfigError: the cluster has not the CPUs and GPUs for them, beside nothing else.
    """
    has = ray.cluster_resources()
    for kind, need in {"CPU": num_cpus, "GPU": num_gpus}.items():
        if need * count > has.get(kind, 0.0):
            raise ConfigError(
                f"{name}: {count} actors with {need:g} {kind} each need {need * count:g}, the cluster has "
                f"{has.get(kind, 0.0):g}; lower num_actors or num_{kind.lower()}s"
            )
    if not num_gpus and has.get("GPU"):
        LOG.warning("%s: num_gpus is 0, so actors compute on CPUs, and the %g GPUs of the cluster do nothing", name, has["GPU"])


def first_answers(name: str, references: Any) -> Any:
    """What actors answer that were just made: they may have to wait for a place, and to load weights.

    Raises:
        DataError: one of them died, or did not answer for `START_SECONDS`. What an actor raised itself is raised as it was.
    """
    try:
        return ray.get(references, timeout=START_SECONDS)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except (*DEATHS, ray.exceptions.GetTimeoutError) as error:
        raise DataError(f"{name}: an actor did not start: {first_line(error)}") from None


def cause_of(error: Any, what: str) -> Exception:
    """Why a task failed, of a RayTaskError: our own error as it was raised; that `what` could not be written; or itself."""
    if isinstance(error.cause, VideofmError):
        return error.cause
    if isinstance(error.cause, OSError):
        return DataError(f"{what} could not be written: {error.cause}. Free the disk and run again")
    return cast(Exception, error)


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def call(function: Callable[..., Any], config: EngineConfig, *arguments: Any) -> Any:
    """The result of one call in a Ray worker."""
    ((_, result),) = run_tasks(function, [("the listing of sources", arguments)], config, lambda: False)
    return result


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What runs in a Ray worker."""
    return function(*arguments)


def _task_memory(config: EngineConfig) -> int:
    """The bytes of memory that a task is declared to use."""
    need = config.task_memory_mib * 2**20
    most = max((node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if need > most:
        raise ConfigError(
            f"engine.task_memory_mib is {config.task_memory_mib}, no node of the cluster has more than {most / 2**20:.0f} MiB "
            "for tasks; lower it, or free memory"
        )
    return need


def _result(reference: Any, name: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error, f"group {name}") from None
    except ray.exceptions.RayError as error:
        times = _WORKER_DEATHS + 1
        raise DataError(f"the worker of group {name} died {times} times: {first_line(error)}. Run again to go on") from None


def _signal_handlers() -> dict[signal.Signals, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def _restore_signal_handlers(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, handler)
