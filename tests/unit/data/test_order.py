"""Laws that hold for every kind of order alike: plain, buckets, a view, a mix, and a mix with buckets.

The kinds share 280 clips of 8 shapes in 7 shards, in windows of 2 shards, and a second dataset of 90 in 3 for the mixes.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pyarrow
import pytest

from tests.unit.data.datasets import MemoryDataset
from videofm.config.data import DataConfig
from videofm.data.index import ClipRecord
from videofm.data.plan import DataPlan, PlanState
from videofm.errors import CheckpointError, DataError, ParallelError

SIZES = [(9, 32, 32), (5, 32, 32), (9, 16, 32)]
BUCKETS = {
    "sizes": [{"num_frames": t, "height": h, "width": w} for t, h, w in SIZES],
    "token": {"num_frames": 4, "height": 8, "width": 8},
}
MIX = [{"name": "web", "manifest": "web", "weight": 0.7}, {"name": "own", "manifest": "own", "weight": 0.3}]
KINDS = {
    "plain": {},
    "buckets": {"buckets": BUCKETS},
    "view": {"view": "v.yaml"},
    "mix": {"manifest": None, "mix": MIX},
    "mix of buckets": {"manifest": None, "mix": MIX, "buckets": BUCKETS},
}


class View:
    """A view as the plan knows it: clips with a score of at least a threshold."""

    def __init__(self, least: float) -> None:
        self.least, self.columns, self.hash = least, ["split", "score_motion"], f"motion >= {least}"

    def keep(self, table: pyarrow.Table) -> np.ndarray:
        return table["score_motion"].to_numpy() >= self.least


def records(count: int, shards: int, prefix: str = "k") -> list[ClipRecord]:
    lengths, shapes = [5, 9, 12, 20], [(32, 32), (16, 40)]
    found = []
    for i in range(count):
        key, shard, split = f"{prefix}{i:04d}", f"shards/{i % shards}.tar", "held_out" if i % 20 == 19 else "train"
        facts = (lengths[i % 4], 24.0, *shapes[i // 4 % 2], "", f"s{i}", split, {"motion": i % 10 / 10})
        found.append(ClipRecord(key, shard, 0, 1, "", *facts))
    return found


def make(kind: str, seed: int = 5, least: float = 0.2, **changes) -> tuple[DataPlan, list[MemoryDataset]]:
    values = {"manifest": "m", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2, "num_micro_batches": 4}
    config = DataConfig.model_validate({**values, "crop": "random", "window_shards": 2, **KINDS[kind], **changes})
    datasets = [MemoryDataset(records(280, 7), "web"), MemoryDataset(records(90, 3), "own")][: len(config.sources)]
    views = [View(least) if config.view is not None else None for _ in datasets]
    return DataPlan(datasets, config, seed, views), datasets


def usable_ids(plan: DataPlan, name: str) -> set[str]:
    """Keys that one epoch of a dataset should draw, from its records: a second way to say what is eligible."""
    source = plan.sources[name]
    everything = records(90, 3) if name == "own" else records(280, 7)
    found = set()
    for record in everything:
        big = record.height == 32
        fits = record.num_frames >= (5 if big else 9) if plan.buckets is not None else big and record.num_frames >= 9
        if record.split == "train" and fits and (source.view is None or record.scores["motion"] >= source.view.least):
            found.add(record.key)
    return found


def edges(steps) -> dict[str, int]:
    """The first k at which the state after k steps is inside a window, at its edge, and at the edge of an epoch."""
    positions = [[(s.epoch, s.window, s.step_in_window) for s in (step.after, *step.after.sources.values())] for step in steps]
    found = {"0": 0, "1": 1}
    for k, (before, after) in enumerate(pairwise(positions), start=2):
        for (epoch, window, _), (new_epoch, new_window, inside) in zip(before, after, strict=True):
            if new_epoch > epoch:
                found.setdefault("epoch edge", k)
            elif new_window > window:
                found.setdefault("window edge", k)
            elif inside > 1:
                found.setdefault("mid-window", k)
    return found


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_exactly_with_any_number_of_ranks(kind, before, after):
    """What `before` ranks read up to step k and `after` ranks from there on is what one reads: ids, frames, windows, states.

    k is 0, 1, inside a window, at a window's edge and at an epoch's; the state goes through JSON into a plan that is built
    anew, whose datasets list their records in another order.
    """
    straight = list(islice(make(kind)[0].steps(), 60))
    ks = edges(straight[:50])
    assert set(ks) == {"0", "1", "mid-window", "window edge", "epoch edge"}
    for k in ks.values():
        state = straight[k - 1].after if k else PlanState()
        text = json.dumps(state.to_json())
        resumed = list(islice(make(kind)[0].steps(PlanState.from_json(json.loads(text))), 8))
        assert resumed == straight[k : k + 8]
        read = [deal(step, before) for step in straight[:k]] + [deal(step, after) for step in resumed]
        assert read == [step.micro_batches for step in straight[: k + 8]]


def deal(step, degree: int) -> list:
    """The micro-batches of a step as `degree` ranks read them: slot a of rank r is number a * W + r."""
    shares = [step.share(rank, degree) for rank in range(degree)]
    assert len({len(share) for share in shares}) == 1, "every rank gets as many"
    return [batch for together in zip(*shares, strict=True) for batch in together]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_draws_every_usable_clip_once(kind):
    """Of each dataset: finished epochs drew every usable clip but for what waits, none twice; the clips of two steps are never
    the same draw."""
    plan, _ = make(kind)
    steps = list(islice(plan.steps(), 120))
    drawn = Counter((d.source, d.key, d.epoch) for step in steps for batch in step.micro_batches for d in batch)
    assert max(drawn.values()) == 1
    last = steps[-1].after
    for name in plan.sources:
        position = last.sources[name] if name else last
        waits = {clip[:2] for clip in position.carry}
        assert position.epoch >= 3
        for epoch in range(position.epoch):
            of = {key for source, key, number in drawn if (source, number) == (name, epoch)}
            assert of | {key for key, number in waits if number == epoch} == usable_ids(plan, name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_micro_batch_has_one_shape_and_clips_that_fit_it(kind):
    plan, _ = make(kind)
    full = {str(b): b.micro_batch_size for b in plan.buckets.all} if plan.buckets else {"9x32x32": 2}
    for step in islice(plan.steps(), 40):
        assert len(step.micro_batches) == 4
        for batch in step.micro_batches:
            (size,) = {f"{draw.num_frames}x{draw.height}x{draw.width}" for draw in batch}
            assert len(batch) == full[size]
            for draw in batch:
                stored = plan.record(draw)
                assert draw.frames[-1] < stored.num_frames and draw.resized <= (stored.height, stored.width)
                assert plan.folder(draw) == "m" and stored.key == draw.key
                assert stored.shard == plan.sources[draw.source].dataset.tars[draw.shard]


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_small(kind):
    """JSON of a few hundred bytes besides the carry, which holds less than a step, or with buckets than a step of every cost
    class and a micro-batch of every bucket."""
    plan, _ = make(kind)
    bound = 4 * 2
    if plan.buckets is not None:
        largest = {
            b.cost_class: max(c.micro_batch_size for c in plan.buckets.all if c.cost_class == b.cost_class)
            for b in plan.buckets.all
        }
        bound = 4 * sum(largest.values()) + sum(b.micro_batch_size for b in plan.buckets.all)
    carried = 0
    for step in islice(plan.steps(), 80):
        for position in (step.after, *step.after.sources.values()):
            assert len(position.carry) < bound
            carried = max(carried, len(position.carry))
        value = step.after.to_json()
        for part in (value, *value.get("sources", {}).values()):
            part["carry"] = []
        assert len(json.dumps(value)) < 400
    assert carried > 0 or kind == "mix", "a mix of clips stops at any clip, so that nothing waits"


@pytest.mark.parametrize("kind", KINDS)
def test_a_spare_is_a_function_of_the_draw(kind):
    """Of the same dataset and shape, no clip of the step, another for each attempt, the same in a plan that began elsewhere or
    that planned on; its id is no other's."""
    plan, _ = make(kind)
    steps = list(islice(plan.steps(), 20))
    for step in steps[::5]:
        in_step = {(d.source, d.key) for batch in step.micro_batches for d in batch}
        ids = {d.sample_id for batch in step.micro_batches for d in batch}
        again = make(kind)[0]
        state = steps[step.after.step - 2].after if step.after.step > 1 else PlanState()
        assert next(again.steps(state)) == step
        for draw in (batch[0] for batch in step.micro_batches):
            spares = [plan.replacement(draw, attempt) for attempt in range(3)]
            assert spares == [again.replacement(draw, attempt) for attempt in range(3)]
            assert len({spare.key for spare in spares}) == 3
            for spare in spares:
                assert (spare.source, spare.key) not in in_step and spare.source == draw.source
                assert (spare.num_frames, spare.height, spare.width) == (draw.num_frames, draw.height, draw.width)
                assert spare.frames[-1] < plan.record(spare).num_frames and spare.epoch == draw.epoch
                ids.add(spare.sample_id)
                assert spare.sample_id.endswith(f"~{draw.sample_id}")
        assert len(ids) == len(in_step) + 4 * 3


def test_spares_of_a_tiny_dataset():
    """All 3 clips are in the first step: they take each other's place, and when these are used up the error says so."""
    config = DataConfig.model_validate(
        {"manifest": "m", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 3, "num_micro_batches": 1}
    )
    clips = [ClipRecord(f"k{i}", "a.tar", 0, 1, "", 9, 24.0, 32, 32, "", "s", "train", {}) for i in range(3)]
    plan = DataPlan([MemoryDataset(clips)], config, 0)
    draw = next(plan.steps()).micro_batches[0][0]
    assert {plan.replacement(draw, attempt).key for attempt in range(2)} == {"k0", "k1", "k2"} - {draw.key}
    with pytest.raises(DataError, match=rf"clip {draw.key} cannot be read, and m has no more clip .*\(2 were tried\)"):
        plan.replacement(draw, 2)
    with pytest.raises(AssertionError, match="ask for another one of the first draw"):
        plan.replacement(plan.replacement(draw, 0), 1)


def test_ranks_that_cannot_share_a_step():
    step = next(make("plain")[0].steps())
    with pytest.raises(ParallelError, match="3 data ranks cannot share 4 micro-batches of a step evenly; take a multiple of 3"):
        step.share(0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_indexes_of_a_window_are_read(kind):
    """At the start and after a million steps alike: one look for a usable clip, and the 2 shards of a window, of each dataset
    that the step draws from. Planning on within the window reads nothing."""
    for state in (PlanState(), far(kind)):
        plan, datasets = make(kind)
        looks = [sum(dataset.reads.values()) for dataset in datasets]
        assert looks == [1] * len(datasets)
        step = next(plan.steps(state))
        assert step.after.step == state.step + 1
        for dataset in datasets:
            assert sum(dataset.reads.values()) <= 1 + 2
    small, datasets = make("plain", window_shards=1)
    steps = small.steps()
    for _ in range(40):
        before = sum(datasets[0].reads.values())
        step = next(steps)
        assert sum(datasets[0].reads.values()) - before <= 2, "a step of 8 of a window of about 14 clips"
    assert len(small.sources[""]._windows) <= 2


def far(kind: str) -> PlanState:
    """A position after a million steps: at the start of a window, with nothing carried."""
    inside = PlanState(step=1_000_000, epoch=70_000, window=1)
    return PlanState(1_000_000, sources=dict.fromkeys(("web", "own"), inside)) if "mix" in kind else inside


def test_a_view_leaves_out_what_it_drops():
    plan, _ = make("view", least=0.7)
    keys = {d.key for step in islice(plan.steps(), 40) for batch in step.micro_batches for d in batch}
    assert keys == usable_ids(plan, "") and all(int(key[1:]) % 10 >= 7 for key in keys)
    with pytest.raises(DataError, match=r"the view drops all 266 clips of split 'train'; see which rule"):
        make("view", least=2.0)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("view", {"least": 0.3}, "view was 'motion >= 0.2', now 'motion >= 0.3'"),
        ("view", {"seed": 6}, "seed was 5, now 6"),
        ("view", {"view": None}, "view was 'motion >= 0.2', now None"),
        ("mix", {"seed": 6}, "seed was 5, now 6"),
        ("mix", {"mix": [MIX[0], {**MIX[1], "weight": 0.4}]}, r"mix.own.weight was 0.3, now 0.4\. Restore"),
        ("mix", {"mix": [MIX[0], {**MIX[1], "split": "held_out"}]}, r"mix.own.split was 'train', now 'held_out'\. Restore"),
        ("mix", {"mix": [{**MIX[0], "name": "net"}, MIX[1]]}, "mix.net.manifest was None, now 'web'"),
        ("mix", {"mix": None, "manifest": "m"}, "manifest was None, now 'web'"),
        ("mix of buckets", {"buckets": {**BUCKETS, "tolerance": 0.5}}, r"buckets.tolerance was 0.0, now 0.5\. Restore"),
        ("mix of buckets", {"num_micro_batches": 8}, "num_micro_batches was 4, now 8"),
    ],
)
def test_another_order_is_refused_by_field(kind, changes, match):
    """What was saved is compared as JSON gives it back; the order in which a mix is written plays no part."""
    saved = json.loads(json.dumps(make(kind)[0].identity))
    make(kind)[0].check(saved)
    with pytest.raises(CheckpointError, match=match):
        make(kind, **changes)[0].check(saved)


def test_the_order_in_which_a_mix_is_written_plays_no_part():
    plan, (web, own) = make("mix")
    config = plan.config.model_copy(update={"mix": plan.config.mix[::-1]})
    other = DataPlan([own, web], config, 5)
    other.check(plan.identity)
    assert list(islice(other.steps(), 10)) == list(islice(plan.steps(), 10))


def test_a_position_of_an_earlier_version_is_refused():
    with pytest.raises(CheckpointError, match="clips that wait without their shards, as earlier versions"):
        PlanState.from_json({**PlanState().to_json(), "carry": [["k0001", 0]]})


def test_what_is_left_out_is_told():
    """Of 38 or 37 train clips a shard, the first 16 shards are all 7: 266 clips, of which half is too small and of the others a
    quarter too short."""
    plan, _ = make("plain")
    assert plan.num_clips == 266 and plan.num_usable(1000) == len(usable_ids(plan, "")) and plan.num_usable(5) == 5
    text = "\n".join(plan.left_out())
    assert "of 266 clips in 7 of 7 shards are not used: no window of 32x32 can be taken" in text
    assert "are not used: fewer than 9 frames" in text and len(plan.left_out()) == 2
    mixed = make("mix")[0]
    assert mixed.num_clips == 266 + 86 and any(line.startswith("own: ") for line in mixed.left_out())
    assert mixed.num_usable(10_000) == len(usable_ids(mixed, "web")) + len(usable_ids(mixed, "own"))
