"""A fixed number of Ray actors that take a shard at a time; one that dies is replaced, and its shard begun again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray

from data_pipelines import engine
from videofm.config.actors import ActorsConfig
from videofm.config.curate import EngineConfig
from videofm.errors import DataError
from videofm.progress import LOG


@dataclass(frozen=True)
class ShardActors:
    """What the actors are.

    Attributes:
        kind: their class. `ready()` answers once the actor has a place; `work(group)` makes a shard and returns a report, or
            None where a stop was asked for.
        arguments: of its constructor.
        config: how many, and what each needs.
        name: what they are called in messages, as in "an encoder actor".
        made: what they write, for the message that it could not be written.
    """

    kind: type
    arguments: tuple[Any, ...]
    config: ActorsConfig
    name: str
    made: str

    def cluster(self) -> AbstractContextManager[None]:
        """The cluster to work on; a local node has a CPU for each thread of each actor."""
        config = self.config
        return engine.cluster(EngineConfig(num_workers=config.num_actors * config.num_cpus, address=config.address))

    def work(
        self, groups: Iterable[str], should_stop: Callable[[], bool], tick: Callable[[], None] = lambda: None
    ) -> Iterator[Any]:
        """Have the shards of `groups` made, one at a time by each actor; yields a report as each ends.

        Args:
            groups: names of the shards.
            should_stop: once it is true no shard is begun; those that are being made end by themselves.
            tick: called about once a second.

        Raises:
            ConfigError: the cluster has not the CPUs and GPUs for the actors.
            DataError: a shard killed more actors than allowed, or cannot be read or written; or an actor does not start.
            VideofmError: what an actor raised itself.
        """
        waiting, deaths = list(reversed(list(groups))), Counter[str]()
        idle = self._start(min(self.config.num_actors, len(waiting)))
        running: dict[Any, tuple[Any, str]] = {}
        while running or (waiting and not should_stop()):
            while waiting and not should_stop() and len(running) < self.config.num_actors:
                worker, group = idle.pop() if idle else self._start(1)[0], waiting.pop()
                running[worker.work.remote(group)] = worker, group
            finished, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            tick()
            for reference in finished:
                worker, group = running.pop(reference)
                try:
                    report = self._result(reference)
                except engine.DEATHS as error:
                    deaths[group] += 1
                    if deaths[group] > self.config.max_deaths:
                        first = engine.first_line(error)
                        raise DataError(f"shard {group} killed {deaths[group]} {self.name} actors: {first}") from None
                    LOG.warning("the %s actor of shard %s died; another one begins it again", self.name, group)
                    waiting.append(group)
                    continue
                idle.append(worker)
                if report is not None:
                    yield report

    def _start(self, count: int) -> list[Any]:
        """So many actors, once they have a place."""
        engine.check_actors("engine", count, self.config.num_cpus, self.config.num_gpus)
        actor: Any = ray.remote(num_cpus=self.config.num_cpus, num_gpus=self.config.num_gpus)(self.kind)
        handles = [actor.remote(*self.arguments) for _ in range(count)]
        engine.first_answers("engine", [handle.ready.remote() for handle in handles])
        return handles

    def _result(self, reference: Any) -> Any:
        """What a call gives; our own errors as they were raised."""
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise engine.cause_of(error, self.made) from None
