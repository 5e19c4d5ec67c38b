"""Laws of the data order: coverage, resume anywhere, independence of the number of ranks, refusal of another order, and the
laws of what is drawn for a clip: stride, first frame, window, image or video."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
from pydantic import ValidationError

from tests.unit.data.datasets import plan_of, usable
from videofm.config.data import DataConfig
from videofm.data.index import ClipRecord
from videofm.data.plan import DataPlan, PlanState
from videofm.errors import CheckpointError, DataError


def config(**changes) -> DataConfig:
    values = {"manifest": "m", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 3, "num_micro_batches": 4}
    return DataConfig.model_validate({**values, "window_shards": 2, **changes})


def records(count: int = 100, shards: int = 7) -> list[ClipRecord]:
    return [
        ClipRecord(f"k{i:04d}", f"shards/{i % shards}.tar", 0, 1, "", 9 + i % 5, 25.0, 32, 32, "", f"s{i}", "train", {})
        for i in range(count)
    ]


MIXED = {"image_share": 0.3, "image_micro_batch_size": 5, "frame_strides": [1, 2, 4], "crop": "random"}
"""1.2 of 4 micro-batches hold 5 images, the others 3 videos: steps of 14 and 16 samples."""


def large(count: int = 100) -> list[ClipRecord]:
    """Clips of 9 to 40 frames of 40x48, room for every draw of `MIXED`."""
    return [
        replace(record, num_frames=9 + 7 * i % 32, height=40, width=48, fps=24.0) for i, record in enumerate(records(count))
    ]


def draws_of(plan: DataPlan, num_steps: int) -> list:
    return [draw for step in islice(plan.steps(), num_steps) for batch in step.micro_batches for draw in batch]


def chi_square(values, cells) -> float:
    """Sum of (observed - expected)^2 / expected of `values` against equal chances of `cells`."""
    counts = Counter(values)
    assert set(counts) <= set(cells), set(counts) - set(cells)
    expected = len(values) / len(cells)
    return sum((counts[cell] - expected) ** 2 / expected for cell in cells)


def ids(steps) -> list:
    return [[[draw.sample_id for draw in batch] for batch in step.micro_batches] for step in steps]


def test_every_clip_comes_once_an_epoch():
    """25 epochs of 100 clips in steps of 12: 208 full steps hold 2,496 draws; no clip is drawn twice in one epoch, and after
    k epochs each clip was drawn k times but for the at most 11 that are carried."""
    steps = islice(plan_of(records(), "h", config(), 0).steps(), 208)
    drawn = [draw for step in steps for batch in step.micro_batches for draw in batch]
    assert max(Counter(draw.sample_id for draw in drawn).values()) == 1
    per_epoch = Counter(draw.epoch for draw in drawn)
    assert all(per_epoch[epoch] == 100 for epoch in range(24))
    assert 100 - per_epoch[24] == 25 * 100 - 208 * 12


@pytest.mark.parametrize("k", [0, 1, 2, 3, 7, 8, 9, 26, 100])
def test_resuming_after_any_step_gives_the_same_order(k):
    """The state after step k, through JSON, continues as the straight run does: within windows and at their edges."""
    plan = plan_of(records(), "h", config(), 5)
    straight = list(islice(plan.steps(), k + 30))
    state = straight[k - 1].after if k else PlanState()
    resumed = list(islice(plan_of(records(), "h", config(), 5).steps(PlanState.from_json(state.to_json())), 30))
    assert ids(resumed) == ids(straight[k:])
    assert [step.after for step in resumed] == [step.after for step in straight[k:]]


def test_ranks_share_a_step_without_changing_it():
    """Any degree that divides the 4 micro-batches deals the same micro-batches: slot a of rank r is number a * W + r."""
    step = next(plan_of(records(), "h", config(), 1).steps())
    for degree in (1, 2, 4):
        shares = [step.share(rank, degree) for rank in range(degree)]
        dealt = [shares[index % degree][index // degree] for index in range(4)]
        assert dealt == step.micro_batches


def test_order_depends_on_seed_and_epoch_but_not_on_the_order_of_records():
    plan = plan_of(records(), "h", config(), 0)
    first = ids(islice(plan.steps(), 8))
    assert first != ids(islice(plan_of(records(), "h", config(), 1).steps(), 8))
    assert first == ids(islice(plan_of(records()[::-1], "h", config(), 0).steps(), 8))
    keys = [draw.key for step in islice(plan.steps(), 100) for batch in step.micro_batches for draw in batch]
    assert keys[:100] != keys[100:200], "the second epoch must be in another order"


def test_start_frames_cover_what_fits():
    """Clips have 9 to 13 frames and 9 are read: starts lie in 0 to 4 and every start occurs."""
    plan = plan_of(records(), "h", config(), 0)
    draws = [draw for step in islice(plan.steps(), 80) for batch in step.micro_batches for draw in batch]
    assert all(draw.start_frame + 9 <= plan.record(draw).num_frames for draw in draws)
    assert {draw.start_frame for draw in draws} == {0, 1, 2, 3, 4}


def test_a_dataset_smaller_than_a_step_fills_it_from_several_epochs():
    step = next(plan_of(records(5, 1), "h", config(), 0).steps())
    drawn = [draw for batch in step.micro_batches for draw in batch]
    assert len(drawn) == 12 and len({draw.sample_id for draw in drawn}) == 12
    assert Counter(draw.epoch for draw in drawn) == {0: 5, 1: 5, 2: 2}


def test_another_order_is_refused_by_field():
    old = plan_of(records(), "h", config(), 0).identity
    with pytest.raises(CheckpointError, match="num_micro_batches was 4, now 2"):
        plan_of(records(), "h", config(num_micro_batches=2), 0).check(old)
    with pytest.raises(CheckpointError, match="manifest was 'h', now 'other'"):
        plan_of(records(), "other", config(), 0).check(old)
    plan_of(records(), "h", config(), 0).check(old)


def test_the_order_under_default_fields_is_pinned():
    """Keys, epochs and first frames of the first 60 steps of seed 5, and the positions after them, hashed when the order was
    first released: checkpoints in the world stand somewhere in it."""
    steps = list(islice(plan_of(records(), "h", config(), 5).steps(), 60))
    rows = [[[draw.key, draw.epoch, draw.start_frame] for draw in batch] for step in steps for batch in step.micro_batches]
    states = [step.after.to_json() for step in steps]
    for state in states:
        state["carry"] = [clip[:2] for clip in state["carry"]]  # where and what they are came later
    digests = [hashlib.sha256(json.dumps(value).encode()).hexdigest() for value in (rows, states)]
    assert digests == [
        "7c89aa4dcc9a249457d6b0546ebaadcf399fb402ffee6fb896e10c33f902fa90",
        "920b5628fd8d1910eb488cb3831a2ec8c28e3068a34eae845eeab0c1f5d78059",
    ]
    assert all((draw.num_frames, draw.stride, draw.top, draw.left) == (9, 1, 0, 0) for draw in steps[0].micro_batches[0])
    assert all((draw.resized, draw.height, draw.width) == ((32, 32), 32, 32) for draw in steps[0].micro_batches[0])
    assert "buckets" not in plan_of(records(), "h", config(), 5).identity


def test_fields_at_their_defaults_do_not_enter_the_identity():
    """An identity that does not name the fields is that of their defaults, in both directions."""
    plain, mixed = plan_of(large(), "h", config(crop="random"), 0), plan_of(large(), "h", config(**MIXED), 0)
    assert set(plain.identity) - {"crop"} == set(plan_of(records(), "h", config(), 0).identity)
    with pytest.raises(CheckpointError, match=r"frame_strides was \[1\], now \[1, 2, 4\]; image_share was 0.0, now 0.3"):
        mixed.check(plain.identity)
    with pytest.raises(CheckpointError, match=r"image_share was 0.3, now 0.0; image_micro_batch_size was 5, now None"):
        plain.check(mixed.identity)
    plan_of(large(), "h", config(**MIXED | {"frame_strides": [4, 1, 2]}), 0).check(json.loads(json.dumps(mixed.identity)))


def test_resuming_a_mixed_order_after_any_step_gives_the_same_order():
    """Steps of 14 and 16 clips over windows of about 29 of 100: 60 steps pass 30 windows and 9 epochs, most with a carry."""
    plan = plan_of(large(), "h", config(**MIXED), 5)
    straight = list(islice(plan.steps(), 66))
    assert len({len(step.after.carry) for step in straight}) > 8 and straight[-1].after.epoch >= 9
    for k in range(60):
        state = straight[k - 1].after if k else PlanState()
        restored = PlanState.from_json(json.loads(json.dumps(state.to_json())))
        again = plan_of(large()[::-1], "h", config(**MIXED), 5).steps(restored)
        assert list(islice(again, 6)) == straight[k : k + 6]


def test_a_mixed_order_draws_every_clip_once_an_epoch():
    """Videos and images take clips from the same order: no clip comes twice in an epoch, finished epochs hold all 100."""
    draws = draws_of(plan_of(large(), "h", config(**MIXED), 0), 100)
    assert max(Counter(draw.sample_id for draw in draws).values()) == 1
    per_epoch = Counter(draw.epoch for draw in draws)
    last = max(per_epoch)
    assert last == 14 and all(per_epoch[epoch] == 100 for epoch in range(last))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_share_of_images_is_exact(share, groups):
    """After s steps of G micro-batches floor(s * G * share) held images, in whole numbers of thousandths; a step of v videos
    and i images has 3 v + 5 i samples, and the mean over 1000 steps is that of the config."""
    settings = {"image_share": share, "image_micro_batch_size": 5, "num_micro_batches": groups}
    plan = plan_of(records(), "h", config(**settings), 0)
    images = samples = 0
    for number, step in enumerate(islice(plan.steps(), 1000), start=1):
        sizes = [(len(batch), {draw.num_frames for draw in batch}) for batch in step.micro_batches]
        assert set(map(str, sizes)) <= {"(3, {9})", "(5, {1})"} and len(sizes) == groups
        step_images = sizes.count((5, {1}))
        images, samples = images + step_images, samples + step.num_samples
        assert step.num_samples == 5 * step_images + 3 * (groups - step_images)
        assert images == number * groups * round(1000 * share) // 1000
    assert samples / 1000 == pytest.approx(plan.config.mean_step_samples)


def test_ranks_share_a_mixed_step_and_at_most_one_round_mixes_kinds():
    """A round is what the ranks do at the same time: slot a of every rank. Of degrees 1, 2, 4 the shares make up the step."""
    for step in islice(plan_of(large(), "h", config(**MIXED), 1).steps(), 10):
        for degree in (1, 2, 4):
            shares = [step.share(rank, degree) for rank in range(degree)]
            rounds = list(zip(*shares, strict=True))
            assert [batch for together in rounds for batch in together] == step.micro_batches
            assert sum(len({batch[0].num_frames for batch in together}) > 1 for together in rounds) <= 1


def test_strides_are_uniform_over_those_that_fit():
    """9 frames at stride s span 8 s + 1: of strides 1 to 4 a clip of 33 frames fits all, one of 20 fits 1 and 2. The 0.999
    quantiles of chi-square are 16.3 (3 degrees of freedom) and 10.8 (1). Negative control: strides 1, 1, 2, ... fail."""
    clips = [replace(record, num_frames=20 if i % 2 else 33) for i, record in enumerate(records())]
    plan = plan_of(clips, "h", config(frame_strides=[4, 2, 1, 3]), 0)
    draws = draws_of(plan, 160)
    long = [draw.stride for draw in draws if plan.record(draw).num_frames == 33]
    short = [draw.stride for draw in draws if plan.record(draw).num_frames == 20]
    assert min(len(long), len(short)) > 900
    assert chi_square(long, range(1, 5)) < 16.3 and chi_square(short, (1, 2)) < 10.8
    assert chi_square([1, 1, 2] * 300, (1, 2)) > 10.8
    assert all(len(draw.frames) == 9 and draw.frames[-1] < plan.record(draw).num_frames for draw in draws)
    starts = {draw.start_frame for draw in draws if draw.stride == 2 and plan.record(draw).num_frames == 20}
    assert starts == {0, 1, 2, 3}, "17 of 20 frames: four places"
    assert {tuple(draw.frames) for draw in draws if draw.stride == 4} == {tuple(range(0, 33, 4))}


def test_clips_that_fit_no_stride_are_left_out():
    """8 * 2 + 1 = 17 frames at the smallest stride."""
    clips = [replace(record, num_frames=16 + i % 2) for i, record in enumerate(records(10))]
    assert len(usable(plan_of(clips, "h", config(frame_strides=[2, 3]), 0))) == 5


def test_windows_are_uniform_and_lie_inside():
    """32x32 of 40x48: 9 x 17 corners of equal chance (152 degrees of freedom, 0.999 quantile about 152 + 3.1 * sqrt(304) + 4 =
    210), drawn afresh in each epoch; the centre is (4, 8) for all."""
    draws = draws_of(plan_of(large(), "h", config(crop="random"), 0), 300)
    corners = [(top, left) for top in range(9) for left in range(17)]
    assert chi_square([(draw.top, draw.left) for draw in draws], corners) < 210
    assert len({(draw.top, draw.left) for draw in draws if draw.key == "k0003"}) > 20
    assert {(draw.top, draw.left) for draw in draws_of(plan_of(large(), "h", config(crop="centre"), 0), 20)} == {(4, 8)}


def test_windows_are_cut_from_resized_frames():
    """40x48 at a short side of 36 is 36x43 (48 * 36 / 40 = 43.2): 5 x 12 corners; 30x40 is too small to be resized."""
    clips = [*large(), *[replace(record, key=f"s{i}", height=30, width=40) for i, record in enumerate(records(9))]]
    plan = plan_of(clips, "h", config(crop="random", resize_short_side=36), 0)
    assert len(usable(plan)) == 100
    draws = draws_of(plan, 100)
    assert {draw.top for draw in draws} == set(range(5)) and {draw.left for draw in draws} == set(range(12))
    exact = config(resize_short_side=20, height=20, width=24)
    assert len(usable(plan_of(large(), "h", exact, 0))) == 100, "without a crop the resized size must be the wanted one"


def test_images_are_uniform_over_the_frames_of_a_clip():
    """One frame of the 12 of a clip, whatever the strides (11 degrees of freedom, 0.999 quantile 31.3)."""
    clips = [replace(record, num_frames=12) for record in records()]
    draws = draws_of(plan_of(clips, "h", config(image_share=0.5, image_micro_batch_size=6, frame_strides=[1]), 0), 200)
    images = [draw for draw in draws if draw.num_frames == 1]
    assert len(images) == 200 * 2 * 6 and all(draw.frames == range(draw.start_frame, draw.start_frame + 1) for draw in images)
    assert chi_square([draw.start_frame for draw in images], range(12)) < 31.3


def test_draws_of_a_clip_do_not_hang_together():
    """Stride, first frame and window come from generators of their own: correlations over 3,000 draws of one kind stay within
    4.5 standard errors, 4.5 / sqrt(3000) = 0.082."""
    clips = [replace(record, num_frames=60) for record in large()]
    draws = draws_of(plan_of(clips, "h", config(crop="random", frame_strides=[1, 2, 3, 4]), 0), 250)
    assert len(draws) == 3000
    # A first frame as a share of its places, so that the stride does not enter by what fits.
    columns = [
        [draw.stride for draw in draws],
        [draw.start_frame / (60 - 8 * draw.stride) for draw in draws],
        [draw.top for draw in draws],
        [draw.left for draw in draws],
    ]
    for i, first in enumerate(columns):
        for second in columns[:i]:
            assert abs(correlation(first, second)) < 0.082


def correlation(a: list, b: list) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    product = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_strides": [1, 2, 1]}, r"frame_strides \[1, 2, 1\] names a stride twice"),
        ({"frame_strides": [0]}, "greater than or equal to 1"),
        ({"frame_strides": []}, "at least 1 item"),
        ({"image_share": 1.0}, "less than 1"),
        ({"image_micro_batch_size": 8}, "image_micro_batch_size 8 has no effect while image_share is 0; set image_share"),
        ({"resize_short_side": 24}, "resize_short_side 24 leaves no room for frames of 32x32; take at least 32"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_clips_that_strides_and_windows_do_not_fit_are_explained():
    with pytest.raises(DataError, match=r"has 33 frames \(data.num_frames 9 at stride 4\); the longest has 13. .*strides"):
        plan_of(records(), "h", config(frame_strides=[8, 4]), 0)
    with pytest.raises(DataError, match=r"is stored at 64x64 or larger; stored are 40x48. Set .* smaller"):
        plan_of(large(), "h", config(height=64, width=64, crop="random"), 0)
    with pytest.raises(DataError, match=r"so that a shorter side of 44 \(data.resize_short_side\) makes it 32x32 or larger"):
        plan_of(large(), "h", config(crop="centre", resize_short_side=44), 0)


def test_unusable_clips_are_explained():
    with pytest.raises(DataError, match=r"no clip of split 'train' is stored at 64x64; stored are 32x32"):
        plan_of(records(), "h", config(height=64, width=64), 0)
    with pytest.raises(DataError, match=r"no clip of split 'train' has 33 frames; the longest has 13"):
        plan_of(records(), "h", config(num_frames=33), 0)
    short = [replace(record, num_frames=5) for record in records(10)]
    assert len(usable(plan_of([*short, *records(20)[10:]], "h", config(), 0))) == 10
