"""Encoder actors without Ray: what the cluster cannot hold is refused, and whatever loses an actor brings another."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipelines import engine, shard_actors
from data_pipelines.encode import online
from data_pipelines.encode import run as encode_stage
from data_pipelines.encode.online import OnlineEncoders
from tests.unit.encoding import encode_config
from videofm.config.cache import OnlineConfig
from videofm.config.reading import ReadingConfig
from videofm.errors import ConfigError, DataError, VideofmError

EXCEPTIONS = engine.ray.exceptions
DEATHS = [
    EXCEPTIONS.ActorDiedError(),
    EXCEPTIONS.OutOfMemoryError("the node ran low on memory"),
    EXCEPTIONS.NodeDiedError("the node went away"),
    EXCEPTIONS.ObjectLostError("00", None, ""),
]


class FakeRay:
    """References are answers or errors; `answers` are what the calls of actors give, in turn."""

    exceptions = EXCEPTIONS

    def __init__(self, *answers: Any, ready: Any = None) -> None:
        self.answers, self.ready, self.num_actors = list(answers), ready, 0
        self.timeouts: list[float | None] = []

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def remote(self, **options: Any) -> Any:
        return lambda kind: SimpleNamespace(remote=self._make)

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, references: Any, timeout: float | None = None) -> Any:
        self.timeouts.append(timeout)
        many = references if isinstance(references, list) else [references]
        for reference in many:
            if isinstance(reference.answer, Exception):
                raise reference.answer
        found = [reference.answer for reference in many]
        return found if isinstance(references, list) else found[0]

    def _make(self, *arguments: Any) -> Any:
        self.num_actors += 1
        encode = SimpleNamespace(remote=lambda *arguments: SimpleReference(self.answers.pop(0)))
        first = SimpleNamespace(remote=lambda: SimpleReference(self.ready))
        return SimpleNamespace(encode=encode, work=encode, ready=first, identities=first)


class SimpleReference:
    """What Ray gives for a call."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


def use(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    for module in (engine, shard_actors, online):
        monkeypatch.setattr(module, "ray", fake)
    return fake


def encode(**options: Any) -> list[Any]:
    config = encode_config("m", {"vae": "v", "text_encoder": "t"}, engine=options)
    return list(encode_stage.encode_groups(config, Path("x"), ["00000"], lambda: False))


def pool(**options: Any) -> OnlineEncoders:
    identities: dict[str, Any] = {"text": {"config": {"max_length": None}}}
    return OnlineEncoders(OnlineConfig(**options), {}, identities, "auto", ReadingConfig())


ASKED: Any = SimpleNamespace(
    request=SimpleNamespace(to_json=dict, describe=lambda: "clip 7"), record=SimpleNamespace(caption="a cat")
)


def next_of(encoders: OnlineEncoders) -> Any:
    return next(encoders.follow(iter([[ASKED]])))


def test_actors_that_the_cluster_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would look for a GPU for ever."""
    fake = use(FakeRay(), monkeypatch)
    with pytest.raises(ConfigError, match="engine: 1 actors with 1 GPU each need 1, the cluster has 0; lower .* num_gpus"):
        encode(num_gpus=1.0)
    with pytest.raises(
        ConfigError, match=r"data\.online: 3 actors with 1 CPU each need 3, the cluster has 2; lower num_actors"
    ):
        next_of(pool(num_actors=3))
    assert fake.num_actors == 0


@pytest.mark.parametrize("error", [EXCEPTIONS.GetTimeoutError("no answer"), *DEATHS], ids=lambda e: type(e).__name__)
def test_actors_that_do_not_start_are_told_as_an_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(FakeRay(ready=error), monkeypatch)
    with pytest.raises(DataError, match="engine: an actor did not start"):
        encode()
    with pytest.raises(DataError, match=r"data\.online: an actor did not start"):
        next_of(pool())
    assert fake.timeouts == [engine.START_SECONDS] * 2


@pytest.mark.parametrize("error", DEATHS, ids=lambda e: type(e).__name__)
def test_whatever_loses_an_actor_brings_another(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(FakeRay(error, "report"), monkeypatch)
    assert encode() == ["report"] and fake.num_actors == 2
    fake.answers = [error]
    with pytest.raises(DataError, match="shard 00000 killed 1 encoder actors"):
        encode(max_deaths=0)
    fake = use(FakeRay(error, [{"bad": "it is damaged"}], ready={"text": {"config": {"max_length": None}}}), monkeypatch)
    encoders = pool()
    assert [str(clip) for clip in next_of(encoders)] == ["it is damaged"]
    assert encoders.counts["deaths"] == 1 and fake.num_actors == 2
    fake.answers = [error]
    with pytest.raises(DataError, match="1 encoder actors died over the micro-batch of clip 7: .*raise max_deaths"):
        next_of(pool(max_deaths=0))


def test_a_pool_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose replacement finds no place any more."""
    answer = EXCEPTIONS.GetTimeoutError("no answer")
    use(FakeRay(answer, ready={"text": {"config": {"max_length": None}}}), monkeypatch)
    with pytest.raises(VideofmError, match=r"data\.online: an encoder actor did not answer for 1800 s"):
        next_of(pool())
