"""Laws of buckets: where a clip falls, how many make a micro-batch, that steps are pure in cost, that every clip comes once an
epoch, that a position resumes exactly, that padding with images evens steps, and that the report's counts add up.

The sizes of most tests, with tokens of 4 frames x 8x8 pixels and a cost of L + 0.01 L^2, under the budget 142.08 of two clips
of the first, which is the main one:

| size    | L  | cost  | clips | micro-batch | class at tolerance 0 | at 0.1 |
|---------|----|-------|-------|-------------|----------------------|--------|
| 9x32x32 | 48 | 71.04 | 2     | 142.08      | 4                    | 1      |
| 5x32x32 | 32 | 42.24 | 3     | 126.72      | 1                    | 0      |
| 9x16x32 | 24 | 29.76 | 4     | 119.04      | 0                    | 0      |
| 9x32x16 | 24 | 29.76 | 4     | 119.04      | 0                    | 0      |
| 1x32x32 | 16 | 18.56 | 7     | 129.92      | 2                    | 0      |
| 1x16x16 | 4  | 4.16  | 34    | 141.44      | 3                    | 1      |
"""

import json
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest
import torch
from pydantic import ValidationError

from tests.demo_shards import write_mixed_shards
from tests.unit.data.datasets import plan_of, usable
from videofm.cli import main
from videofm.config.data import DataConfig
from videofm.data import decode
from videofm.data.bucket_report import as_text, report
from videofm.data.buckets import Buckets, Placement, covering, describe_steps
from videofm.data.draws import Clip, PlanState, Shape
from videofm.data.index import ClipRecord
from videofm.data.loader import StepLoader, resize, video_tensor
from videofm.data.shards import read_clip
from videofm.errors import CheckpointError, ConfigError, DataError

SIZES = [(9, 32, 32), (5, 32, 32), (9, 16, 32), (9, 32, 16), (1, 32, 32), (1, 16, 16)]
SHAPES = [(16, 16), (32, 32), (32, 64), (64, 32), (40, 48), (16, 40), (33, 20), (8, 8)]
MODES = {
    "plain": {},
    "tolerance": {"tolerance": 0.1},
    "images": {"image_share": 0.3},
    "padding": {"image_share": 0.5, "image_padding": True},
}


def sizes(*of: tuple[int, int, int]) -> list[dict]:
    return [{"num_frames": num_frames, "height": height, "width": width} for num_frames, height, width in of or SIZES]


def config(changes: dict | None = None, **buckets) -> DataConfig:
    section = {"sizes": sizes(), "token": {"num_frames": 4, "height": 8, "width": 8}, "quadratic": 0.01, **buckets}
    values = {"manifest": "m", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2, "num_micro_batches": 4}
    return DataConfig.model_validate({**values, "crop": "random", "window_shards": 2, "buckets": section, **(changes or {})})


def record(num_frames: int, height: int, width: int, number: int = 0) -> ClipRecord:
    key = f"k{number:04d}"
    return ClipRecord(key, f"shards/{number % 5}.tar", 0, 1, "", num_frames, 24.0, height, width, "", f"s{number}", "train", {})


def records(count: int = 400) -> list[ClipRecord]:
    """Every pair of 7 lengths and 8 shapes about equally often; the 8x8 ones fall nowhere."""
    lengths = [1, 3, 5, 7, 9, 12, 20]
    return [record(lengths[i % 7], *SHAPES[i // 7 % 8], i) for i in range(count)]


def sample_ids(steps) -> list:
    return [[[draw.sample_id for draw in batch] for batch in step.micro_batches] for step in steps]


def where(buckets: Buckets, num_frames: int, height: int, width: int) -> str:
    place = buckets.place(Shape(num_frames, height, width))
    return str(place.bucket) if isinstance(place, Placement) else place


def test_the_table_of_costs():
    """The table above, and the same with costs that are decimals: 3 clips of 0.1 s fit 0.3 s, though 0.3 // 0.1 is 2.0."""
    rows = [(str(b), b.num_tokens, float(b.cost), b.micro_batch_size, b.cost_class) for b in Buckets(config()).all]
    assert sorted(rows) == [
        ("1x16x16", 4, 4.16, 34, 3),
        ("1x32x32", 16, 18.56, 7, 2),
        ("5x32x32", 32, 42.24, 3, 1),
        ("9x16x32", 24, 29.76, 4, 0),
        ("9x32x16", 24, 29.76, 4, 0),
        ("9x32x32", 48, 71.04, 2, 4),
    ]
    classes = {str(bucket): bucket.cost_class for bucket in Buckets(config(tolerance=0.1)).all}
    assert classes == {"9x32x32": 1, "5x32x32": 0, "9x16x32": 0, "9x32x16": 0, "1x32x32": 0, "1x16x16": 1}
    measured = [{**sizes((9, 32, 32))[0], "seconds": 0.3}, {**sizes((5, 32, 32))[0], "seconds": 0.1}]
    found = Buckets(config({"micro_batch_size": 1}, sizes=measured, quadratic=0.0, budget=0.3)).all
    assert {str(bucket): bucket.micro_batch_size for bucket in found} == {"9x32x32": 1, "5x32x32": 3}
    assert 0.3 // 0.1 == 2.0


def test_tokens_of_step_video():
    """17 frames become 3 latent ones: lengths 1, 68, 136, 204 (spec A7) are 1, 12, 24, 36, of 16x16 pixels a token."""
    found = Buckets(
        config(
            {"num_frames": 204, "height": 256, "width": 256},
            sizes=sizes(*((num_frames, 256, 256) for num_frames in (1, 68, 136, 204))),
            token={"num_frames": 5.667, "height": 16, "width": 16},
            quadratic=0.0,
        )
    )
    assert {bucket.num_frames: bucket.num_tokens // 256 for bucket in found.all} == {1: 1, 68: 12, 136: 24, 204: 36}


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ((20, 40, 48), "9x32x32"),  # ratios of aspects: 1.2, 9x16x32 has 1.67, 9x32x16 2.4
        ((9, 32, 64), "9x16x32"),  # 1; 9x32x32 has 2
        ((9, 64, 32), "9x32x16"),
        ((9, 16, 40), "9x16x32"),  # 32 pixels of height are not there
        ((7, 32, 64), "5x32x32"),  # too short for 9 frames, and a video before an image; half of the frame is cut off
        ((9, 16, 16), "1x16x16"),  # no video is so small
        ((4, 40, 48), "1x32x32"),  # the larger of two images
        ((1, 17, 31), "1x16x16"),
        ((20, 15, 64), "smaller than every size that the length allows"),
        ((20, 16, 100), "more than 50% of the frame outside of every window (data.buckets.max_crop)"),  # 3.1 times too wide
    ],
)
def test_where_a_clip_falls(clip, expected):
    assert where(Buckets(config()), *clip) == expected
    assert where(Buckets(config({}, sizes=sizes()[::-1])), *clip) == expected, "the order of sizes plays no part"


def test_options_of_the_placement():
    exact = Buckets(config({"crop": "none"}))
    assert where(exact, 9, 64, 64) == "9x32x32" and where(exact, 9, 64, 128) == "9x16x32"
    assert where(exact, 9, 40, 48) == "another aspect than every size, and data.crop is none"
    strided = Buckets(config({"frame_strides": [3, 2]}))
    assert where(strided, 17, 32, 32) == "9x32x32" and where(strided, 16, 32, 32) == "5x32x32"
    videos = Buckets(config({}, sizes=sizes((9, 32, 32), (5, 32, 32))))
    assert where(videos, 4, 64, 64) == "fewer than 5 frames"
    both = Buckets(config({}, sizes=sizes((9, 32, 32), (1, 16, 32))))
    assert where(both, 9, 32, 64) == "9x32x32", "a video, though an image would be of its aspect"
    assert where(both, 8, 32, 64) == "1x16x32"
    # 180x315 is 1.75 wide, as 80x140 is; 36x64 is 1.6% wider, and longer.
    wide = {"sizes": sizes((17, 36, 64), (9, 80, 140)), "token": {"num_frames": 8, "height": 2, "width": 2}, "quadratic": 0.0}
    main = {"num_frames": 9, "height": 80, "width": 140}
    for tolerance, expected in ((0.0, "9x80x140"), (0.01, "9x80x140"), (0.02, "17x36x64")):
        assert where(Buckets(config(main, **wide, aspect_tolerance=tolerance)), 30, 180, 315) == expected


def test_frames_just_cover_the_window():
    """One side becomes the window's, the other is at least as long and keeps the aspect to half a pixel."""
    bucket = next(bucket for bucket in Buckets(config()).all if str(bucket) == "9x16x32")
    for height in range(16, 60):
        for width in range(32, 70):
            high, wide = covering(height, width, bucket)
            assert (high == 16 and wide >= 32) or (wide == 32 and high >= 16)
            assert min(abs(high - 32 * height / width), abs(wide - 16 * width / height)) <= 0.5 + 1e-9
    assert covering(48, 64, bucket) == (24, 32) and covering(16, 40, bucket) == (16, 40)


@pytest.mark.parametrize("mode", MODES)
def test_every_clip_comes_once_an_epoch(mode):
    """No clip is drawn twice in an epoch, and at the end of a window what was not drawn is what is carried: at most one clip
    less than a micro-batch of every bucket, and one micro-batch less than a step of every class.

    What falls nowhere is counted: the 49 clips of 8x8, and the 28 of 16x40 with fewer than 9 frames, which only 1x16x16 is
    small enough for, with 60% cut off.
    """
    plan = plan_of(records(), "h", config(**MODES[mode]), 0)
    (source,) = plan.sources.values()
    assert sorted(source.survey().left_out.values()) == [28, 49] and len(usable(plan)) == 400 - 49 - 28
    largest: dict[int, int] = {}
    for bucket in plan.buckets.all:
        largest[bucket.cost_class] = max(largest.get(bucket.cost_class, 0), bucket.micro_batch_size)
    bound = sum(bucket.micro_batch_size - 1 for bucket in plan.buckets.all) + 3 * sum(largest.values())
    drawn: Counter[tuple[str, int]] = Counter()
    edges, before = 0, PlanState()
    for step in islice(plan.steps(), 120):
        if (step.after.epoch, step.after.window) != (before.epoch, before.window):
            edges += 1
            carry = {clip[:2] for clip in step.after.carry}
            assert len(carry) <= bound and not carry & drawn.keys()
            for epoch in range(step.after.epoch):
                assert {key for key, of in drawn.keys() | carry if of == epoch} == usable(plan).keys()
        drawn.update((draw.key, draw.epoch) for batch in step.micro_batches for draw in batch)
        before = step.after
    assert max(drawn.values()) == 1 and edges >= 5


@pytest.mark.parametrize("mode", MODES)
def test_resuming_after_any_step_gives_the_same_order(mode):
    plan = plan_of(records(), "h", config(**MODES[mode]), 5)
    straight = list(islice(plan.steps(), 64))
    assert straight[-1].after.epoch >= 2 and any(step.after.carry for step in straight)
    other = plan_of(records()[::-1], "h", config(**{"sizes": sizes()[::-1], **MODES[mode]}), 5)
    for k in range(60):
        state = straight[k - 1].after if k else PlanState()
        restored = PlanState.from_json(json.loads(json.dumps(state.to_json())))
        assert list(islice(other.steps(restored), 4)) == straight[k : k + 4]
    assert sample_ids(islice(plan_of(records(), "h", config(**MODES[mode]), 6).steps(), 8)) != sample_ids(straight[:8])


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_of_a_step_cost_the_same(mode):
    """Each has one size and costs no more than the budget; for 1, 2 or 4 ranks every rank gets as many, of equal cost in each
    round, to the tolerance. Clips are long and large enough for their size."""
    plan = plan_of(records(), "h", config(**MODES[mode]), 1)
    cost = {str(bucket): bucket.cost for bucket in plan.buckets.all}
    full = {str(bucket): bucket.micro_batch_size for bucket in plan.buckets.all}
    seen, mixed = set(), 0
    for step in islice(plan.steps(), 80):
        names = []
        for batch in step.micro_batches:
            (name,) = {f"{draw.num_frames}x{draw.height}x{draw.width}" for draw in batch}
            names.append((name, len(batch), len(batch) * cost[name]))
            assert len(batch) * cost[name] <= plan.buckets.budget
            for draw in batch:
                stored = plan.record(draw)
                assert draw.frames[-1] < stored.num_frames and draw.resized <= (stored.height, stored.width)
                assert 0 <= draw.top <= draw.resized[0] - draw.height and 0 <= draw.left <= draw.resized[1] - draw.width
        assert all(size == full[name] for name, size, _ in names[:4])
        assert len(names) in ((4, 8) if mode == "padding" else (4,))
        seen.update(name for name, _, _ in names)
        mixed += len({name for name, _, _ in names[:4]}) > 1
        for degree in (1, 2, 4):
            shares = [step.share(rank, degree) for rank in range(degree)]
            assert [batch for together in zip(*shares, strict=True) for batch in together] == step.micro_batches
            for first in range(0, len(names), degree):
                costs = [value for _, _, value in names[first : first + degree]]
                assert max(costs) <= min(costs) * (Fraction("1.1") if mode == "tolerance" else 1)
        assert step.num_samples == sum(size for _, size, _ in names)
    assert seen == set(cost) and mixed, "every size occurs, and sizes of equal cost share steps"


def test_buckets_take_steps_by_their_clips():
    """With 24 clips of 9x32x32 and 24 of 9x16x32 an epoch has 24 / (4 * 2) = 3 and 24 / (4 * 4) = 1.5 steps; over 6 epochs 18
    and 9. They are mixed: not one after the other."""
    clips = [record(9, *((32, 32) if i % 2 else (16, 32)), i) for i in range(48)]
    steps = list(islice(plan_of(clips, "h", config({"window_shards": 9}), 0).steps(), 27))
    heights = [step.micro_batches[0][0].height for step in steps]
    assert heights.count(32) == 18 and heights.count(16) == 9 and steps[-1].after.epoch == 5
    assert heights != sorted(heights) and heights != sorted(heights, reverse=True)


def test_steps_of_one_kind_do_not_follow_each_other():
    """Videos of the dearest size take no images, whose 8 steps come among the 24 of videos: at random 4 of the first half of an
    epoch's 32, and none or all with chance 2 * C(16, 8) / C(32, 8) = 0.002."""
    clips = [record(9, 32, 32, i) for i in range(8 * 24)] + [record(1, 32, 32, 200 + i) for i in range(28 * 8)]
    plan = plan_of(clips, "h", config({"window_shards": 9}, image_padding=True), 0)
    steps = list(islice(plan.steps(), 32))
    images = [step.micro_batches[0][0].num_frames == 1 for step in steps]
    assert sum(images) == 8 and 0 < sum(images[:16]) < 8 and steps[-1].after.epoch == 0


def test_a_share_of_the_videos_are_images_and_others_in_each_epoch():
    """Of 300 videos over 8 epochs 30% are images, to 4.5 standard errors: 4.5 * sqrt(0.3 * 0.7 / 2400) = 0.042. Each draw is an
    image with the same chance: a clip is never one in all 8 with probability 0.7^8 = 5.8%, so in about 17 of 300."""
    clips = [record(12, 40, 48, i) for i in range(300)]
    plan = plan_of(clips, "h", config(image_share=0.3), 0)
    (source,) = plan.sources.values()
    buckets = [[source.bucket_of(Clip(clip.key, epoch, 0, Shape(12, 40, 48))) for epoch in range(8)] for clip in clips]
    image = [[bucket.num_frames == 1 for bucket in row] for row in buckets]
    assert abs(sum(map(sum, image)) / 2400 - 0.3) < 0.042
    assert 4 <= sum(not any(row) for row in image) <= 36
    assert {str(row[0]) for row in buckets} == {"9x32x32", "1x32x32"}
    starts = {
        draw.start_frame for step in islice(plan.steps(), 40) for b in step.micro_batches for draw in b if draw.num_frames == 1
    }
    assert starts == set(range(12))


def test_padding_evens_steps():
    """Step-Video's greedy rule, by its laws: the images of a step make equal micro-batches; no step exceeds the dearest; a step
    that got an image was the cheapest before its last; where images are left, no step could take one more. Steps are more even
    than without."""
    spreads = {}
    for padding in (False, True):
        plan = plan_of(records(2000), "h", config({"window_shards": 9}, image_share=0.5, image_padding=padding), 0)
        (source,) = plan.sources.values()
        packed = source.packed(PlanState())
        spreads[padding] = report(source).spread
    target = max(bucket.micro_batch_cost for bucket in plan.buckets.all)
    steps = [step for step in packed.steps if step[0].bucket.num_frames > 1]
    padded = [step for step in steps if len(step) == 8]
    costs = {id(step): step[0].cost + (step[4].cost if len(step) == 8 else 0) for step in steps}
    assert len(padded) > 5
    for step in padded:
        assert len({(batch.bucket, len(batch.clips)) for batch in step[4:]}) == 1 and step[4].bucket.num_frames == 1
        assert costs[id(step)] <= target
        before = costs[id(step)] - step[4].bucket.cost
        assert all(before <= costs[id(other)] for other in steps)
    left = Counter(source.bucket_of(clip) for clip in packed.rest if source.bucket_of(clip).num_frames == 1)
    left.update(b.bucket for step in packed.steps if step[0].bucket.num_frames == 1 for b in step for _ in b.clips)
    for step in padded:
        assert left[step[4].bucket] < 4 or costs[id(step)] + step[4].bucket.cost > target
    assert spreads[True] < spreads[False] and spreads[True] < 1.06


@pytest.mark.parametrize("padding", [False, True])
def test_packing_numbers_is_packing_clips(padding):
    """A source packs the numbers of clips and makes clips of a step when it is asked for; to pack the clips themselves, those
    that are carried first, gives the same steps and the same rest. Three windows, the last two with clips carried into them."""
    plan = plan_of(records(2000), "h", config({"window_shards": 9}, image_share=0.5, image_padding=padding), 0)
    (source,), state, carried = plan.sources.values(), PlanState(), []
    for _ in range(3):
        packed = source.packed(state)
        clips = [*state.carry, *source.window(state.epoch, state.window).clips()]
        expected = plan.buckets.pack(clips, source.bucket_of)
        assert [list(step) for step in packed.steps] == expected.steps and packed.rest == expected.rest
        assert list(packed.steps[-2:]) == expected.steps[-2:] and packed.steps[-1] == expected.steps[-1]
        carried.append(len(state.carry))
        state = source.next_window(state, packed.rest)
    assert carried[0] == 0 < min(carried[1:])


def test_another_order_is_refused_by_field():
    plain = plan_of(records(), "h", config({"buckets": None, "crop": "random"}), 0)
    assert "buckets" not in plain.identity
    before = plan_of(records(), "h", config(), 0)
    before.check(json.loads(json.dumps(before.identity)))
    before.check(plan_of(records(), "h", config(sizes=sizes()[::-1]), 0).identity)
    with pytest.raises(CheckpointError, match=r"buckets.tolerance was 0.0, now 0.1\. "):
        plan_of(records(), "h", config(tolerance=0.1), 0).check(before.identity)
    with pytest.raises(CheckpointError, match="buckets was None, now None|buckets.sizes was None, now "):
        before.check(plain.identity)
    with pytest.raises(CheckpointError, match=r"buckets.sizes was \[.*, now None"):
        plain.check(before.identity)


@pytest.mark.parametrize(
    ("changes", "buckets", "match"),
    [
        ({"num_frames": 7}, {}, "main size 7x32x32 is not among buckets.sizes 9x32x32, 5x32x32"),
        ({}, {"sizes": sizes() + sizes((5, 32, 32))}, "names 5x32x32 twice"),
        ({}, {"sizes": sizes((9, 32, 32), (9, 36, 32))}, "9x36x32 does not divide into tokens of 8x8 pixels.*near 32x32"),
        ({}, {"sizes": [{**sizes()[0], "seconds": 1.0}, *sizes()[1:2]]}, "not for 5x32x32; give all or none"),
        ({}, {"sizes": [{**sizes()[0], "seconds": 1.0}]}, "quadratic 0.01 has no effect while"),
        ({}, {"sizes": sizes((9, 32, 32)), "image_share": 0.5}, "need a size of one frame"),
        ({}, {"sizes": sizes((9, 32, 32)), "image_padding": True}, "need a size of one frame"),
        ({"image_share": 0.5}, {}, "set buckets.image_share"),
        ({"resize_short_side": 32}, {}, "resize_short_side 32 has no effect with buckets"),
    ],
)
def test_sections_that_contradict_themselves(changes, buckets, match):
    with pytest.raises(ValidationError, match=match):
        config(changes, **buckets)


def test_budgets_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"the budget 142.08 .* holds no clip of 17x64x64 \(a clip costs 1344\)"):
        Buckets(config(sizes=sizes(*SIZES, (17, 64, 64))))
    with pytest.raises(ConfigError, match=r"budget 300 holds 4 clips of the main size 9x32x32.*micro_batch_size says 2.*=4"):
        Buckets(config(budget=300))


def test_a_dataset_that_falls_nowhere():
    with pytest.raises(DataError, match=r"falls into a bucket \(3: smaller than .*; 1: more than 50% .*smaller or shorter"):
        plan_of([*[record(9, 8, 8, i) for i in range(3)], record(9, 16, 100, 4)], "h", config(), 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    shapes = [(12, 32, 32), (9, 40, 48), (6, 32, 48), (10, 20, 40), (9, 40, 20), (1, 40, 40)]
    return write_mixed_shards(tmp_path_factory.mktemp("mixed"), shapes * 2)


def read(shards, changes: dict | None = None) -> StepLoader:
    settings = {"manifest": str(shards), "num_micro_batches": 2, "micro_batch_size": 1, **(changes or {})}
    fewer = sizes(*(size for size in SIZES if size != (1, 32, 32)))
    return StepLoader(config(settings, sizes=fewer, image_share=0.5, image_padding=True), 3)


@pytest.mark.parametrize("changes", [{}, {"cache_mib": 1}])
def test_batches_hold_the_pixels_that_the_plan_names(shards, changes):
    """Each clip of a batch is its stored clip, decoded here, resized to cover the window and cut; a batch has one shape and
    knows the samples of its step; two ranks read the step of one. Clips come as videos in one epoch and as images of 16x16 in
    another."""
    loader, decoder = read(shards, changes), decode.choose("auto")
    halves = [StepLoader(loader.config, 3, rank, 2).steps() for rank in (0, 1)]
    shapes = set()
    for plan, step, first, second in zip(islice(loader.plan.steps(), 16), loader.steps(), *halves, strict=False):
        dealt = [batch for pair in zip(first.batches, second.batches, strict=True) for batch in pair]
        for draws, batch, other in zip(plan.micro_batches, step.batches, dealt, strict=True):
            assert torch.equal(batch.video, other.video) and batch.sample_ids == other.sample_ids
            assert batch.num_step_samples == step.num_samples == sum(map(len, plan.micro_batches))
            shapes.add(tuple(batch.video.shape[2:]))
            for draw, video in zip(draws, batch.to("cpu").video, strict=True):
                frames = decoder.read(read_clip(shards, loader.plan.record(draw)), draw.frames)
                rows, columns = slice(draw.top, draw.top + draw.height), slice(draw.left, draw.left + draw.width)
                assert torch.equal(video, video_tensor(resize(frames, *draw.resized)[None, :, rows, columns])[0])
    assert shapes == {(9, 32, 32), (5, 32, 32), (9, 16, 32), (9, 32, 16), (1, 16, 16)}
    resumed = list(islice(read(shards, changes).steps(first.after), 2))
    assert [batch.sample_ids for batch in resumed[0].batches] == [
        [draw.sample_id for draw in draws] for draws in next(loader.plan.steps(first.after)).micro_batches
    ]


def test_the_report_adds_up():
    """Clips of the buckets and of none make the dataset; shares of steps make 1. 40 clips of 9x32x32 and 40 of 9x16x32 make 5
    and 2.5 steps an epoch, in which a rank with one of four micro-batches has 142.08 and 119.04: max/mean =
    142.08 * 3 / (2 * 142.08 + 119.04)."""
    plan = plan_of(records(), "h", config(), 0)
    found = report(plan.sources[""])
    assert sum(row.clips for row in found.rows) == pytest.approx(323) and found.left_out.total() == 77
    assert sum(row.step_share for row in found.rows) == pytest.approx(1) and found.idle_share == pytest.approx(0)
    two = report(plan_of([record(9, *((32, 32) if i % 2 else (16, 40)), i) for i in range(80)], "h", config(), 0).sources[""])
    assert two.spread == pytest.approx(142.08 * 3 / (2 * 142.08 + 119.04), abs=0.003)
    shares = {str(row.bucket): (row.clips, row.step_share, row.cropped) for row in two.rows if row.clips}
    assert shares["9x32x32"] == pytest.approx((40, 2 / 3, 0), abs=0.01)
    assert shares["9x16x32"] == pytest.approx((40, 1 / 3, 0.2), abs=0.01), "8 of 40 columns are cut off"
    assert two.mean_cost == pytest.approx((2 * 142.08 + 119.04) / 3, rel=0.01) and two.max_cost == pytest.approx(142.08)
    tolerant = report(plan_of(records(), "h", config(tolerance=0.1), 0).sources[""])
    assert 0 < tolerant.idle_share < 0.1 and tolerant.largest_carry < found.largest_carry
    assert (
        "2 clips of 9x32x32" in describe_steps(config()) and describe_steps(config({"buckets": None})) == "8 clips of 9x32x32"
    )


def test_the_report_of_a_train_config(shards, tmp_path, capsys, monkeypatch):
    """`videofm data buckets` says where each of the 12 clips falls, and what falls nowhere and why."""
    monkeypatch.chdir(tmp_path)
    data = config({"manifest": str(shards)}, sizes=sizes((9, 32, 32), (5, 32, 32), (9, 16, 32))).model_dump()
    text = {
        "models": {"vae": {"name": "vae/ltx"}}, "objective": {"kind": "autoencoder"}, "data": data,
        "optimizer": {"lr": 1e-3}, "trainer": {"max_steps": 1},
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(json.dumps(text))
    (tmp_path / "recipe.yaml").write_text(json.dumps({"stages": {"dit": {"kind": "train", **text}}}))
    assert main(["data", "buckets", "train.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "12 clips, 8 in buckets, 4 in none" in printed
    rows = {line.split()[0]: line.split()[1:5] for line in printed.splitlines() if line.startswith(("9x", "5x"))}
    assert rows == {
        "9x32x32": ["4", "48", "71.04", "2"], "5x32x32": ["2", "32", "42.24", "3"], "9x16x32": ["2", "24", "29.76", "4"],
    }  # fmt: skip
    assert "        2  fewer than 5 frames\n" in printed
    assert "        2  smaller than every size that the length allows\n" in printed
    assert f"       48  {'#' * 40}   50.0%" in printed and f"       32  {'#' * 20:<40}   25.0%" in printed
    assert "modelled step time: max/mean 1.0" in printed
    assert main(["data", "buckets", "recipe.yaml", "--stage", "dit"]) == 0 and capsys.readouterr().out == printed
    assert main(["data", "buckets", "train.yaml", "data.buckets.image_padding=true"]) == 2
    assert "need a size of one frame" in capsys.readouterr().err
    assert main(["data", "buckets", "train.yaml", "data.buckets=null"]) == 2
    assert "no section data.buckets" in capsys.readouterr().err


def test_padding_stands_in_the_report():
    plan = plan_of(records(), "h", config(image_share=0.5, image_padding=True), 0)
    found = report(plan.sources[""])
    assert found.num_padding_images > 0 and "images given to steps of videos: " in as_text(plan.sources[""], found)
