"""The order of samples, as a pure function of a seed, manifests and a few numbers.

Shards are permuted by (seed, epoch) and cut into windows; the clips of a window are permuted; consecutive runs of clips are
the optimizer steps, and what is left over is carried into the next window. A data rank r of W takes the micro-batches
`r, W + r, 2W + r, ...` of each step. World size, workers and prefetch do not enter, so the position is a few integers and the
carried clips, the same on every rank. Only the indexes of a window are read, when its turn comes: to go on at step 1,000,000
costs what the first step does.

A micro-batch holds videos or images. Of the first n micro-batches of a run, floor(n * image_share) hold images, so the number
of clips that a step takes is a function of its index alone. Within a step videos come first: of the rounds in which ranks work
side by side, at most one mixes the kinds, whatever W is. Gradients are sums, so a mixed round is right too, but its ranks wait
for the slowest, and a model must run the same parameters for both kinds where ZeRO gathers or reduces them as they are used.

With `data.buckets` the clips of a window, and those carried into it, are sorted into buckets; those of a bucket fill its
micro-batches, micro-batches of one cost class fill steps, and the steps of the window are permuted. Each clip still comes once
an epoch, and each bucket takes its share of the steps; what fills no step is carried, at most a step of every cost class and
a micro-batch of every bucket. With `data.packing` micro-batches are packs of several sizes instead.

With `data.mix` every dataset has its own epochs, windows and carry, and datasets take turns (`mix.py`). A turn is a clip, so
that every micro-batch is mixed and each share exact to one sample; with buckets it is a step, because micro-batches of a step
cost the same and two datasets, images and videos for one, may have no cost in common.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from videofm.config.data import DataConfig
from videofm.data.buckets import Bucket, BucketBatch, Buckets, Pack, covering, fill_of
from videofm.data.draws import Clip, Draw, PlanState, generator, units
from videofm.data.identity import DEFAULTS, flat, identity_of
from videofm.data.index import ClipRecord
from videofm.data.manifest import Manifest
from videofm.data.mix import next_turn, whole_weights
from videofm.data.sizes import frame_size
from videofm.data.source import ClipSource, ClipStream, Dataset
from videofm.data.view import ResolvedView, View
from videofm.errors import CheckpointError, DataError, ParallelError

__all__ = ["Clip", "DataPlan", "Draw", "PlanState", "StepPlan"]

REMEMBERED_STEPS = 256
"""Steps planned last, whose keys are remembered so that a spare is none of them."""

_LOOK_SHARDS = 16
"""Shards that are read to say what is left out."""


@dataclass(frozen=True)
class StepPlan:
    """The micro-batches of one optimizer step, the state after it, and with `data.packing` the share of their tokens that is
    used."""

    micro_batches: list[list[Draw]]
    after: PlanState
    fill: float | None = None

    @property
    def num_samples(self) -> int:
        """Samples of the step over all ranks: videos and images, or pairs."""
        return sum(len(units(draws)) for draws in self.micro_batches)

    def share(self, data_rank: int, data_degree: int) -> list[list[Draw]]:
        """The micro-batches of one data rank, in order.

        Raises:
            ParallelError: the ranks would not get as many each.
        """
        if len(self.micro_batches) % data_degree:
            raise ParallelError(
                f"{data_degree} data ranks cannot share {len(self.micro_batches)} micro-batches of a step evenly; take a "
                f"multiple of {data_degree} for data.num_micro_batches"
            )
        return self.micro_batches[data_rank::data_degree]


class DataPlan:
    """The endless order of one configuration."""

    def __init__(
        self, datasets: Sequence[Dataset], config: DataConfig, seed: int, views: Sequence[ResolvedView | None] = ()
    ) -> None:
        """
        Args:
            datasets: one for each of `config.sources`.
            config: the section `data`.
            seed: of the run.
            views: the resolved view of each dataset; none by default.

        Raises:
            DataError: a dataset has no clip that is long enough, or stored at a size that the configured one can be taken from.
            ConfigError: the budget of `data.buckets` does not fit its sizes.
        """
        self.config, self.seed = config, seed
        self._image_share = Fraction(str(config.image_share))  # the decimal that was written, so that counts are exact
        self.buckets = Buckets(config) if config.buckets is not None else None
        views = views or [None] * len(datasets)
        settings = sorted(zip(config.sources, datasets, views, strict=True), key=lambda item: item[0].name)
        self.sources = {
            (named := source.name if config.mix is not None else ""): ClipSource(
                named, dataset, str(source.split), view, config, self.buckets, seed
            )
            for source, dataset, view in settings
        }
        self._weights = whole_weights([source.weight for source, _, _ in settings])
        self._recent: OrderedDict[int, frozenset[tuple[str, str]]] = OrderedDict()
        self._passed_over: list[range] = []
        self.identity = identity_of(config, seed, list(self.sources.values()))

    @classmethod
    def open(cls, config: DataConfig, seed: int, fetch: Callable[[str, str, str], Path] | None = None) -> DataPlan:
        """The plan of the datasets and views that `config` names.

        Args:
            config: the section `data`.
            seed: of the run.
            fetch: gives a dataset's file (place of the dataset, name of the file, SHA-256) as a checked local file; needed for
                none, it saves reading the indexes of remote datasets again.

        Raises:
            DataError: a dataset is missing or damaged, or has no usable clip.
            ConfigError: a view is not valid.
        """
        manifests = [
            Manifest.load(source.manifest, partial(fetch, source.manifest) if fetch is not None else None)
            for source in config.sources
        ]
        views = [
            View.load(source.view).resolve(manifest) if source.view is not None else None
            for source, manifest in zip(config.sources, manifests, strict=True)
        ]
        return cls(manifests, config, seed, views)

    @property
    def num_clips(self) -> int:
        """Clips of the splits that are read, usable or not."""
        return sum(source.num_clips for source in self.sources.values())

    def describe(self) -> str:
        """What is read, in words."""
        return f"{self.num_clips:,} clips"

    def num_usable(self, at_most: int) -> int:
        """How many clips can be used; counting ends at `at_most`, so that no more shards are read than it takes."""
        found = 0
        for source in self.sources.values():
            found += source.num_usable(at_most - found)
            if found >= at_most:
                break
        return found

    def left_out(self) -> list[str]:
        """What is not used of a look at each dataset's first shards, and why, in words."""
        lines = []
        for name, source in self.sources.items():
            survey = source.survey(_LOOK_SHARDS)
            clips = survey.used.total() + survey.left_out.total()
            of = f"of {clips:,} clips in {survey.num_shards} of {source.num_shards} shards"
            at = f"{name}: " if name else ""
            lines += [f"{at}{count:,} {of} are not used: {reason}" for reason, count in survey.left_out.most_common()]
        return lines

    def record(self, draw: Draw) -> ClipRecord:
        """All that the index says about the clip of a draw."""
        return self.sources[draw.source].record(draw.shard, draw.key)

    def folder(self, draw: Draw) -> str:
        """The place of the dataset that the clip of a draw is in."""
        return self.sources[draw.source].dataset.place

    def pass_over(self, windows: Sequence[range]) -> None:
        """Leave out these steps of the order from now on: the one behind them takes their place, as if they had never been.

        Positions say how many were left out before them, so the order from a position on is a function of it and of `windows`.
        """
        self._passed_over = list(windows)

    def steps(self, state: PlanState | None = None) -> Iterator[StepPlan]:
        """The steps from `state` on, without end."""
        state = state or PlanState()
        passed_over = state.passed_over
        for step in self._ordered(replace(state, step=state.data_step, passed_over=0)):
            number = step.after.step - 1
            if any(number in window for window in self._passed_over):
                passed_over += 1
                continue
            keys = frozenset((draw.source, draw.key) for batch in step.micro_batches for draw in batch)
            self._recent[number] = keys
            while len(self._recent) > REMEMBERED_STEPS:
                self._recent.popitem(last=False)
            yield replace(step, after=replace(step.after, step=step.after.step - passed_over, passed_over=passed_over))

    def _ordered(self, state: PlanState) -> Iterator[StepPlan]:
        """All steps of the order from `state` on, whose `step` counts them: none was passed over."""
        make = self._bucketed_steps if self.buckets is not None else self._clip_steps
        if self.config.mix is not None:
            make = self._mixed_bucketed_steps if self.buckets is not None else self._mixed_clip_steps
        return make(state)

    def replacement(self, draw: Draw, attempt: int) -> Draw:
        """What is read in place of a clip that cannot be: the spare number `attempt` (from 0) of `draw`, of the same dataset,
        bucket and epoch.

        It is a function of the plan and its arguments, so every rank finds the same. No clip of the step is its own spare's
        twin: clips of the step are taken only when the dataset has no others, and its `sample_id` is no other's.

        Args:
            draw: as the plan gave it, one of the last 256 steps that were planned here; not a spare.
            attempt: how many spares of `draw` could not be read either.

        Raises:
            DataError: the dataset has no more clips of this bucket.
        """
        assert not draw.instead_of, f"{draw.sample_id} is a spare: ask for another one of the first draw"
        assert draw.step in self._recent, f"step {draw.step} was not planned lately"
        source = self.sources[draw.source]
        avoid = {key for name, key in self._recent[draw.step] if name == draw.source}
        clip = next(islice(source.spares(draw, avoid), attempt, None), None)
        if clip is None:
            raise DataError(
                f"the clip {draw.key} cannot be read, and {source.dataset.place} has no {'other' if attempt == 0 else 'more'} "
                f"clip to take its place ({attempt} were tried); curate more clips, or repair it"
            )
        if self.buckets is None:
            spare = self._draw(source, clip, draw.num_frames, draw.step)
        else:
            size = draw.num_frames, draw.height, draw.width
            bucket = next(b for b in self.buckets.all if (b.num_frames, b.height, b.width) == size)
            spare = self._bucket_draw(source, clip, bucket, draw.step)
        return replace(spare, instead_of=draw.sample_id)

    def check_replaceable(self, draw: Draw, error: DataError) -> None:
        """Refuse, where the config says so, that another takes the place of `draw`, which cannot be read because of `error`;
        here it does not."""

    def batch_fields(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """More fields of the `Batch` of the draws that were read for a micro-batch; here there are none."""
        return {}

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse a position that belongs to another order.

        Raises:
            CheckpointError: a field differs; the message names each with both values.
        """
        before, after = flat(DEFAULTS | identity), flat(DEFAULTS | self.identity)
        changed = [
            f"{name} was {before.get(name)!r}, now {after.get(name)!r}"
            for name in after | before
            if before.get(name) != after.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"the data order of the checkpoint is not the one asked for: {'; '.join(changed)}. "
                "Restore these values, or start a new run from the weights alone."
            )

    def _clip_steps(self, state: PlanState) -> Iterator[StepPlan]:
        """Steps of one dataset and one size."""
        source = self.sources[""]
        while True:
            carry, rows = list(state.carry), source.window(state.epoch, state.window)
            first = self._clips_before(state.step - state.step_in_window)
            while (end := self._clips_before(state.step + 1) - first) <= len(carry) + len(rows):
                start = self._clips_before(state.step) - first
                clips = carry[start:end] + rows.clips(max(0, start - len(carry)), end - len(carry))
                state = replace(state, step=state.step + 1, step_in_window=state.step_in_window + 1)
                yield StepPlan(self._micro_batches([(source, clip) for clip in clips], state.step - 1), state)
            start = self._clips_before(state.step) - first
            state = source.next_window(state, carry[start:] + rows.clips(max(0, start - len(carry))))

    def _mixed_clip_steps(self, state: PlanState) -> Iterator[StepPlan]:
        """Steps of one size, every clip from the dataset whose turn it is."""
        sources = list(self.sources.values())
        streams = [ClipStream(source, state.sources.get(source.name, PlanState())) for source in sources]
        counts = [stream.position.step for stream in streams]
        while True:
            clips = []
            for _ in range(self._clips_before(state.step + 1) - self._clips_before(state.step)):
                turn = next_turn(self._weights, counts)
                clips.append((sources[turn], streams[turn].take()))
                counts[turn] += 1
            after = {source.name: stream.position for source, stream in zip(sources, streams, strict=True)}
            state = PlanState(state.step + 1, sources=after)
            yield StepPlan(self._micro_batches(clips, state.step - 1), state)

    def _bucketed_steps(self, state: PlanState) -> Iterator[StepPlan]:
        """Steps of one dataset and several sizes."""
        source = self.sources[""]
        for batches, after in _packed_steps(source, state):
            yield self._bucket_step(source, batches, after.step - 1, after)

    def _mixed_bucketed_steps(self, state: PlanState) -> Iterator[StepPlan]:
        """Steps of several sizes, each from the dataset whose turn it is."""
        sources = list(self.sources.values())
        positions = {source.name: state.sources.get(source.name, PlanState()) for source in sources}
        steps = [_packed_steps(source, positions[source.name]) for source in sources]
        for step in range(state.step, 1 << 62):
            turn = next_turn(self._weights, [positions[source.name].step for source in sources])
            batches, after = next(steps[turn])
            positions = positions | {sources[turn].name: after}
            yield self._bucket_step(sources[turn], batches, step, PlanState(step + 1, sources=positions))

    def _image_batches_before(self, step: int) -> int:
        """Micro-batches of images in the steps before `step`."""
        return int(step * self.config.num_micro_batches * self._image_share)

    def _clips_before(self, step: int) -> int:
        """Clips that the steps before `step` take."""
        images = self._image_batches_before(step)
        videos = step * self.config.num_micro_batches - images
        return videos * self.config.micro_batch_size + images * self._num_images

    @property
    def _num_images(self) -> int:
        return self.config.image_micro_batch_size or self.config.micro_batch_size

    def _micro_batches(self, clips: Sequence[tuple[ClipSource, Clip]], step: int) -> list[list[Draw]]:
        num_images = self._image_batches_before(step + 1) - self._image_batches_before(step)
        num_videos = self.config.num_micro_batches - num_images
        video, image = (self.config.micro_batch_size, self.config.num_frames), (self._num_images, 1)
        rest = iter(clips)
        return [
            [self._draw(source, clip, num_frames, step) for source, clip in islice(rest, size)]
            for size, num_frames in [video] * num_videos + [image] * num_images
        ]

    def _bucket_step(
        self, source: ClipSource, batches: Sequence[BucketBatch[Clip] | Pack[Clip]], step: int, after: PlanState
    ) -> StepPlan:
        draws = [[self._bucket_draw(source, clip, bucket, step) for bucket, clip in batch.pairs] for batch in batches]
        return StepPlan(draws, after, fill_of(batches, self.config))

    def _bucket_draw(self, source: ClipSource, clip: Clip, bucket: Bucket, step: int) -> Draw:
        resized = covering(clip.shape.height, clip.shape.width, bucket)
        return self._cut(source, clip, bucket.num_frames, resized, (bucket.height, bucket.width), step)

    def _draw(self, source: ClipSource, clip: Clip, num_frames: int, step: int) -> Draw:
        resized = frame_size(clip.shape.height, clip.shape.width, self.config)
        return self._cut(source, clip, num_frames, resized, (self.config.height, self.config.width), step)

    def _cut(
        self, source: ClipSource, clip: Clip, num_frames: int, resized: tuple[int, int], window: tuple[int, int], step: int
    ) -> Draw:
        """Stride, first frame and window of one clip, each from a generator of its own, keyed by (seed, epoch, key)."""
        draw, strides = partial(_generator, source, clip), [1]
        if num_frames > 1:
            strides = [s for s in sorted(self.config.frame_strides) if (num_frames - 1) * s < clip.shape.num_frames]
        stride = strides[int(draw("stride").integers(len(strides)))] if len(strides) > 1 else strides[0]
        spare_frames = clip.shape.num_frames - 1 - (num_frames - 1) * stride
        start_frame = spare_frames // 2 if self.config.start == "centre" else 0
        if self.config.start == "random":
            start_frame = int(draw("start").integers(spare_frames + 1))
        spare = resized[0] - window[0], resized[1] - window[1]
        top, left = spare[0] // 2, spare[1] // 2
        if self.config.crop == "random":
            top, left = map(int, draw("crop").integers([spare[0] + 1, spare[1] + 1]))
        return Draw(
            clip.key, clip.epoch, start_frame, num_frames, stride, resized, top, left, *window,
            shard=clip.shard, source=source.name, step=step,
        )  # fmt: skip


def _generator(source: ClipSource, clip: Clip, what: str) -> Any:
    return generator(*source.key, what, clip.epoch, clip.key)


def _packed_steps(source: ClipSource, state: PlanState) -> Iterator[tuple[Sequence[BucketBatch[Clip] | Pack[Clip]], PlanState]]:
    """The steps of a source with buckets, each with the source's position after it."""
    while True:
        packed = source.packed(state)
        order = generator(*source.key, "steps", state.epoch, state.window).permutation(len(packed.steps))
        for index in order[state.step_in_window :]:
            state = replace(state, step=state.step + 1, step_in_window=state.step_in_window + 1)
            yield packed.steps[index], state
        state = source.next_window(state, packed.rest)
        del packed  # before the next one is made
