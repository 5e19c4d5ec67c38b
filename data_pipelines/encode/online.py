"""Encoders beside the training (`data.online`): Ray actors decode and encode what a data rank will read, in its plan's order.

A rank asks for its micro-batches in order, each from one actor, and takes them back in order; at most `max_in_flight` are asked
for and not consumed, which bounds the memory that waits. An actor that dies is replaced and its micro-batches are asked for
again, so nothing is lost and the order stays. Nothing is kept between runs: a position counts what was consumed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from data_pipelines import engine
from videofm import registry
from videofm.config.cache import OnlineConfig
from videofm.config.curate import EngineConfig
from videofm.config.encode import LatentsConfig, TextConfig
from videofm.config.reading import ReadingConfig
from videofm.data.encoded import Asked, EncodedClip
from videofm.data.reader import BadClipError, ClipRequest, ReaderSettings, video_tensor
from videofm.data.sidecar import differences
from videofm.data.workers import Decoding, WorkerPool
from videofm.errors import DataError, VideofmError
from videofm.progress import LOG


@dataclass
class _Batch:
    """A micro-batch that was asked for: of which actor, and how many died over it."""

    asked: list[Asked]
    actor: Any
    reference: Any
    num_deaths: int = 0


class EncoderActor:
    """A Ray actor with both encoders; loaded with the first call, so that what is wrong with them is told as an error."""

    def __init__(
        self, sections: dict[str, dict[str, Any]], decoder: str, device: str, num_threads: int, reading: dict[str, Any]
    ) -> None:
        torch.set_num_threads(num_threads)
        self._sections, self._device = sections, device
        self._encoders: dict[str, Any] | None = None
        # A clip that hangs or crashes its decoder costs itself, not this actor.
        plain = ReadingConfig.model_validate(reading)
        settings = ReaderSettings(decoder, 0, plain.read_timeout, plain.cache_dir, plain.cache_gib)
        self._decoding: Decoding = WorkerPool(1, settings, plain)

    def encoder(self, kind: str) -> Any:
        """The encoder of a kind."""
        if self._encoders is None:
            schemas: dict[str, Any] = {"latents": LatentsConfig, "text": TextConfig}
            self._encoders = {}
            for name, section in self._sections.items():
                encoder = registry.lookup(registry.ENCODERS, name, "encoder")
                self._encoders[name] = encoder.load(schemas[name].model_validate(section), self._device)
        return self._encoders[kind]

    def identities(self) -> dict[str, dict[str, Any]]:
        """What names each encoder."""
        return {kind: self.encoder(kind).header()["encoder"] for kind in self._sections}

    def encode(self, requests: list[dict[str, Any]], captions: list[str]) -> list[dict[str, Any]]:
        """What is made of the clips of a micro-batch: of each `latents text empty`, or `bad`, why it cannot be read."""
        found: list[dict[str, Any]] = [{} for _ in requests]
        frames: dict[int, np.ndarray] = {}
        asked = [ClipRequest.from_json(value) for value in requests]
        jobs = [self._decoding.ask(request, np.empty(request.shape, np.uint8)) for request in asked]
        for place, job in enumerate(jobs):
            try:
                self._decoding.wait(job)
                frames[place] = job.out
            except BadClipError as error:
                found[place]["bad"] = str(error)
        if frames:
            names = [str(requests[place]["sha256"]) for place in frames]
            latents = self.encoder("latents").encode(video_tensor(np.stack(list(frames.values()))), names)
            for place, tensors in zip(frames, latents, strict=True):
                found[place]["latents"] = tensors
        *texts, empty = self.encoder("text").encode([*captions, ""])
        for place, text in enumerate(texts):
            found[place] |= {"text": text, "empty": empty}
        return found


class OnlineEncoders:
    """The pool of one data rank.

    Args:
        config: the section `data.online`.
        sections: `latents` and `text` as `videofm encode` has them, the models of the training's roles.
        identities: what names the models of the training; those of the actors must be the same.
        decoder: as `data.decoder`.
        reading: as `data.reading`; folders are those of the machines of the actors.

    Attributes:
        counts: micro-batches `asked`, `consumed`, and actors that died, `deaths`.
    """

    needs_pixels = False

    def __init__(
        self,
        config: OnlineConfig,
        sections: Mapping[str, LatentsConfig | TextConfig],
        identities: Mapping[str, Mapping[str, Any]],
        decoder: str,
        reading: ReadingConfig,
    ) -> None:
        self.config, self.identities = config, identities
        self.counts = Counter[str]()
        self.max_length: int | None = identities["text"]["config"]["max_length"]
        plain = {kind: section.model_dump(mode="json") for kind, section in sections.items()}
        device = "cuda" if config.num_gpus else "cpu"
        self._arguments = (plain, decoder, device, config.num_cpus, reading.model_dump(mode="json"))
        self._stack = ExitStack()
        self._actors: list[Any] = []
        self._waiting: deque[_Batch] = deque()
        self._turn = 0

    def encoded(self, asked: Asked) -> EncodedClip:
        """One clip, now; see `EncodedSource`."""
        (clip,) = self._result(self._ask([asked]))
        if isinstance(clip, BadClipError):
            raise clip
        return clip

    def follow(self, batches: Iterator[list[Asked]]) -> Iterator[list[EncodedClip | BadClipError]]:
        """What the pool makes of each micro-batch, in order.

        Raises:
            ConfigError: the cluster has not the CPUs and GPUs for the actors.
            DataError: actors die over a micro-batch again and again, or do not answer; or they load other weights than
                the training.
        """
        self._waiting.clear()
        while True:
            while len(self._waiting) < self.config.max_in_flight and (asked := next(batches, None)) is not None:
                self._waiting.append(self._ask(asked))
            if not self._waiting:
                return
            clips = self._result(self._waiting[0])
            self._waiting.popleft()
            self.counts["consumed"] += 1
            yield clips

    def metrics(self) -> dict[str, float]:
        """Counts for the log: micro-batches that the pool has made and that were taken from it, actors that died."""
        references = [batch.reference for batch in self._waiting]
        ready = len(ray.wait(references, num_returns=len(references), timeout=0)[0]) if references else 0
        consumed = self.counts["consumed"]
        return {"online_produced": consumed + ready, "online_consumed": consumed, "online_deaths": self.counts["deaths"]}

    def close(self) -> None:
        """Let the actors go."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
        self._waiting.clear()
        self._stack.close()

    def _start(self) -> None:
        config = self.config
        workers = EngineConfig(num_workers=config.num_actors * config.num_cpus, address=config.address)
        self._stack.enter_context(engine.cluster(workers))
        engine.check_actors("data.online", config.num_actors, config.num_cpus, config.num_gpus)
        self._actors = [self._new() for _ in range(config.num_actors)]
        for found in engine.first_answers("data.online", [actor.identities.remote() for actor in self._actors]):
            if changed := differences(self.identities, found):
                raise DataError(
                    f"the encoders of the pool are not those of the training: {'; '.join(changed)}. See that the paths of "
                    "models.vae and models.text_encoder hold the same files on every machine"
                )

    def _new(self) -> Any:
        actor = ray.remote(num_cpus=self.config.num_cpus, num_gpus=self.config.num_gpus)(EncoderActor)
        return actor.remote(*self._arguments)

    def _ask(self, asked: list[Asked]) -> _Batch:
        if not self._actors:
            self._start()
        actor = self._actors[self._turn % len(self._actors)]
        self._turn += 1
        self.counts["asked"] += 1
        return _Batch(asked, actor, _submit(actor, asked))

    def _result(self, batch: _Batch) -> list[EncodedClip | BadClipError]:
        while True:
            try:
                return [_clip(found) for found in self._get(batch.reference)]
            except engine.DEATHS as error:
                batch.num_deaths += 1
                if batch.num_deaths > self.config.max_deaths:
                    raise DataError(
                        f"{batch.num_deaths} encoder actors died over the micro-batch of "
                        f"{batch.asked[0].request.describe()}: {engine.first_line(error)}. "
                        "Give actors more memory, or raise max_deaths"
                    ) from None
                self._replace(batch)

    def _replace(self, batch: _Batch) -> None:
        """A new actor for the one that died, which begins with what the old one owed, in order."""
        dead = batch.actor
        if dead in self._actors:
            self.counts["deaths"] += 1
            LOG.warning("an encoder actor died; another one takes its place")
            self._actors[self._actors.index(dead)] = self._new()
        owed = [other for other in self._waiting if other.actor is dead and other is not batch]
        for other in [batch, *owed]:
            other.actor = self._actors[self._turn % len(self._actors)]
            self._turn += 1
            other.reference = _submit(other.actor, other.asked)

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=engine.START_SECONDS)  # an actor that replaces another may find no place
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, VideofmError):
                raise error.cause from None
            raise
        except ray.exceptions.GetTimeoutError:
            raise DataError(
                f"data.online: an encoder actor did not answer for {engine.START_SECONDS:g} s; see that the cluster still has "
                "the CPUs and GPUs of num_actors actors"
            ) from None


def _submit(actor: Any, asked: Sequence[Asked]) -> Any:
    return actor.encode.remote([one.request.to_json() for one in asked], [one.record.caption for one in asked])


def _clip(found: Mapping[str, Any]) -> EncodedClip | BadClipError:
    if "bad" in found:
        return BadClipError(found["bad"])
    return EncodedClip(found["latents"], found["text"], found["empty"])
