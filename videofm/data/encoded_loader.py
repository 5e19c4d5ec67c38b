"""A loader whose micro-batches bring latents, tokens, text, or several of these, that were encoded elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch

from videofm.config.data import DataConfig
from videofm.data.draws import by_size, units
from videofm.data.encoded import Asked, EncodedClip, batch_fields
from videofm.data.fixed import clip_request
from videofm.data.loader import Step, StepLoader
from videofm.data.manifest import Manifest
from videofm.data.packing import pack
from videofm.data.plan import Draw, PlanState, StepPlan
from videofm.data.reader import BadClipError
from videofm.types import Batch


class EncodedSource(Protocol):
    """Where encoded clips come from: sidecars, or a pool of encoders."""

    @property
    def needs_pixels(self) -> bool:
        """Whether clips are decoded here, since neither latents nor tokens of them come."""

    @property
    def max_length(self) -> int | None:
        """Tokens that the text encoder cuts captions at."""

    def encoded(self, asked: Asked) -> EncodedClip:
        """What is made of one clip.

        Raises:
            BadClipError: the clip cannot be encoded; another takes its place.
            DataError: anything else.
        """

    def follow(self, batches: Iterator[list[Asked]]) -> Iterator[list[EncodedClip | BadClipError]]:
        """What is made of each micro-batch, in order; `batches` may be asked for more than was given back."""

    def close(self) -> None:
        """Give up what was not consumed."""


class EncodedLoader(StepLoader):
    """A `StepLoader` that reads the same draws in the same order."""

    def __init__(
        self, config: DataConfig, seed: int, source: EncodedSource, data_rank: int = 0, data_degree: int = 1, **options: Any
    ) -> None:
        super().__init__(config, seed, data_rank, data_degree, **options)
        self.source = source

    def steps(self, state: PlanState | None = None) -> Iterator[Step]:
        """Steps from `state` on, without end."""
        if self.source.needs_pixels:
            yield from super().steps(state)
            return
        encoded = self.source.follow(self._asked(state))
        for step in self.plan.steps(state):
            before, share = self.bad_clips.num_replaced, step.share(self.data_rank, self.data_degree)
            batches = [self._encoded(draws, encoded, step) for draws in share]
            yield Step(batches, step.num_samples, step.after, self.bad_clips.num_replaced - before, step.fill)

    def close(self) -> None:
        """Give up what was read ahead."""
        self.source.close()

    def _ask(self, draw: Draw) -> Asked:
        record, dataset = self.plan.record(draw), cast(Manifest, self.plan.sources[draw.source].dataset)
        group = str(dataset.table["group"][draw.shard].as_py())
        return Asked(draw, record, clip_request(dataset, draw.shard, record, draw), group)

    def _asked(self, state: PlanState | None) -> Iterator[list[Asked]]:
        for step in self.plan.steps(state):
            for draws in step.share(self.data_rank, self.data_degree):
                for same in by_size(draws):
                    yield [self._ask(draw) for draw in same]

    def _encoded(self, draws: Sequence[Draw], encoded: Iterator[list[EncodedClip | BadClipError]], step: StepPlan) -> Batch:
        """The next micro-batch; of a pack the clips of each size come by themselves."""
        parts = [self._encoded_batch(same, next(encoded), step) for same in by_size(draws)]
        return parts[0] if self.config.packing is None else pack(parts)

    def _encoded_batch(self, draws: Sequence[Draw], found: Sequence[EncodedClip | BadClipError], step: StepPlan) -> Batch:
        """The micro-batch, with spares in the place of clips that cannot be encoded."""
        read: dict[int, tuple[Draw, EncodedClip]] = {}
        for unit in units(draws):
            spares = self._spares([draws[index] for index in unit], [found[index] for index in unit])
            read |= dict(zip(unit, spares, strict=True))
        used, clips = zip(*(read[index] for index in range(len(draws))), strict=True)
        records = [self.plan.record(draw) for draw in used]
        return Batch(
            video=torch.zeros(len(used), 3, 0, 0, 0),
            captions=[record.caption for record in records],
            fps=torch.tensor([r.fps / draw.stride for r, draw in zip(records, used, strict=True)], dtype=torch.float32),
            sample_ids=[draw.sample_id for draw in used],
            step=step.after.step - 1,
            num_step_samples=step.num_samples,
            **batch_fields(clips, self.source.max_length),
            **self.plan.batch_fields(used),
        )

    def _spares(self, drawn: list[Draw], found: Sequence[EncodedClip | BadClipError]) -> list[tuple[Draw, EncodedClip]]:
        """What is made of the draws of one sample, or of those of the first of its spares that can be encoded."""
        draws, num_spares = drawn, 0
        while bad := [(draw, error) for draw, error in zip(draws, found, strict=True) if isinstance(error, BadClipError)]:
            self._blame([(draw, self._ask(draw).request, error) for draw, error in bad])
            draws, num_spares = [self.plan.replacement(draw, num_spares) for draw in drawn], num_spares + 1
            found = [self._encode(draw) for draw in draws]
        self.bad_clips.good(len(draws))
        return [(draw, clip) for draw, clip in zip(draws, found, strict=True) if isinstance(clip, EncodedClip)]

    def _encode(self, draw: Draw) -> EncodedClip | BadClipError:
        """What is made of a draw, or why it cannot be encoded."""
        asked = self._ask(draw)
        try:
            return self.bad_clips.problem(asked.request) or self.source.encoded(asked)
        except BadClipError as error:
            return error

    def _beside(self, draw: Draw) -> EncodedClip:
        """The text of a decoded clip."""
        return self.source.encoded(self._ask(draw))

    def _fields(self, beside: Sequence[EncodedClip]) -> dict[str, Any]:
        """The text of a micro-batch of decoded clips."""
        return batch_fields(beside, self.source.max_length)
