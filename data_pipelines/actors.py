"""Ray actors that hold a model: a pool of fixed size, whose dead members are replaced, and the way to ask it.

An actor writes to the attempts log before it looks at clips, so that after its death it is known which ones it was at, and
which only waited for it. Frames travel through Ray's object store, rows as plain values.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from pydantic import TypeAdapter

from data_pipelines import engine
from data_pipelines.attempts import log_end, log_start
from data_pipelines.batches import Answers, Array, ModelDied
from data_pipelines.engine import START_SECONDS
from data_pipelines.plan import build_stage
from data_pipelines.rows import ModelStage, Rejected, Row
from videofm.config.curate import CurationStage
from videofm.errors import DataError, VideofmError

_PAUSE_SECONDS = 0.2


class Model:
    """What runs in an actor. The weights are read at the first call, also in one that replaces a dead actor."""

    def __init__(self, section: dict[str, Any], device: str) -> None:
        self.stage: ModelStage = build_stage(TypeAdapter[Any](CurationStage).validate_json(json.dumps(section)))
        self.device, self.loaded = device, False

    def ready(self) -> int:
        """Load the weights where that was not done; the id of this process."""
        if not self.loaded:
            self.stage.load(self.device)
            self.loaded = True
        return os.getpid()

    def process(self, rows: list[dict[str, Any]], log: str, *frames: Array) -> dict[str, Any]:
        """The model's answers, as plain values, with the seconds that they took."""
        self.ready()
        members = [Row.from_json(row) for row in rows]
        keys = [row.key for row in members]
        log_start(Path(log), keys)
        cpu, wall = time.process_time(), time.monotonic()
        try:
            answers = [_plain(answer) for answer in self.stage.process_batch(members, list(frames))]
        except Exception as error:
            if "CUDA error" in str(error):
                os._exit(1)  # every later call of this process would fail, too; the start without an end tells who was at it
            raise
        finally:  # an exception is an answer, too; only a death leaves the start without an end
            log_end(Path(log), keys, "done")
        return {"answers": answers, "cpu": time.process_time() - cpu, "wall": time.monotonic() - wall}


class Pool:
    """The actors of a model step, from the driver; `ask` goes into the tasks.

    Raises:
        ConfigError: the cluster has not the CPUs and GPUs for the pool, beside nothing else.
    """

    def __init__(self, section: dict[str, Any], name: str) -> None:
        needs = {"CPU": float(section["num_cpus"]), "GPU": float(section["num_gpus"])}
        count = int(section["num_actors"])
        engine.check_actors(f"stage {name}", count, needs["CPU"], needs["GPU"])
        self.num_cpus = needs["CPU"] * count
        device = "cuda" if needs["GPU"] else "cpu"
        actor = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_restarts=-1, max_task_retries=0)(Model)
        self.handles = [actor.remote(section, device) for _ in range(count)]
        engine.first_answers(f"stage {name}", [handle.ready.remote() for handle in self.handles])

    def close(self) -> None:
        """End the actors and free what they hold."""
        for handle in self.handles:
            ray.kill(handle, no_restart=True)


class Client:
    """Asks the actors of a pool in turn, from a task; see `batches.Ask`."""

    def __init__(self, handles: Sequence[Any], first: int) -> None:
        self._turns = itertools.cycle([*handles[first % len(handles) :], *handles[: first % len(handles)]])

    def __call__(self, rows: Sequence[Row], frames: Sequence[Array], log: Path) -> Answers:
        handle = self._awake(next(self._turns))
        try:
            answer = ray.get(handle.process.remote([row.to_json() for row in rows], str(log), *frames))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except engine.DEATHS as error:
            raise ModelDied(str(error)) from None
        except ray.exceptions.RayError as error:  # such as a full object store: not the clips' fault
            raise DataError(f"the model could not be asked: {engine.first_line(error)}; run again to go on") from None
        made = [_answer(value) for value in answer["answers"]]
        return Answers(made, answer["cpu"], answer["wall"])

    def _awake(self, handle: Any) -> Any:
        """The actor, once it answers: it may be starting again after a death.

        Raises:
            VideofmError: it cannot load its weights, or does not come back. No clip is to blame.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                ray.get(handle.ready.remote(), timeout=START_SECONDS)
                return handle
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, VideofmError):
                    raise error.cause from None
                raise DataError(f"the model's process, begun again, does not load it: {error.cause!r}") from None
            except (*engine.DEATHS, ray.exceptions.GetTimeoutError) as error:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"the model's process did not come back: {engine.first_line(error)}; run again to go on"
                    ) from None
                time.sleep(_PAUSE_SECONDS)


def _plain(answer: Row | Rejected) -> dict[str, Any]:
    if isinstance(answer, Rejected):
        return {"reason": answer.reason, "detail": answer.detail, "scores": answer.scores}
    return {"row": answer.to_json()}


def _answer(value: dict[str, Any]) -> Row | Rejected:
    if "row" in value:
        return Row.from_json(value["row"])
    return Rejected(value["reason"], value["detail"], value["scores"])
