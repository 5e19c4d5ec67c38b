"""The loader gives the frames that the plan names, whatever decodes them, and resumes at any step."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.demo_shards import write_demo_shards
from videofm.config.data import DataConfig
from videofm.data import decode, loader
from videofm.data.loader import StepLoader, resize, video_tensor
from videofm.data.manifest import Manifest
from videofm.data.reader import ClipReader
from videofm.data.shards import read_clip
from videofm.data.workers import InProcess


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("shards"), num_clips=12, held_out=2)


def config(shards: Path, **changes) -> DataConfig:
    values = {"manifest": str(shards), "num_frames": 5, "height": 32, "width": 32, "micro_batch_size": 2}
    return DataConfig.model_validate({**values, "num_micro_batches": 2, **changes})


@pytest.fixture(scope="module")
def large_shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("large"), num_clips=12, num_frames=16, size=48, held_out=2)


def mixed(shards: Path, **changes) -> DataConfig:
    """Steps of 4 micro-batches: 2 of 2 videos, 5 frames 1 or 3 apart, and 2 of 3 images; windows of 32x40 from 48x48."""
    images = {"image_share": 0.5, "image_micro_batch_size": 3, "num_micro_batches": 4}
    return config(shards, **images | {"frame_strides": [1, 3], "crop": "random", "width": 40} | changes)


def videos(steps) -> list[torch.Tensor]:
    return [batch.to("cpu").video for step in steps for batch in step.batches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_leave_as_they_were_decoded(shards, num_workers):
    """uint8, frames one after the other and never copied; `to` scales them, and then their memory serves later batches."""
    loader = StepLoader(config(shards, num_workers=num_workers), 0)
    steps = loader.steps()
    for _ in range(12):
        for batch in next(steps).batches:
            assert batch.video.dtype == torch.uint8 and batch.video.permute(0, 2, 3, 4, 1).is_contiguous()
            assert torch.equal(batch.to("cpu").video, video_tensor(batch.video.permute(0, 2, 3, 4, 1).numpy()))
            assert batch.to("meta").video.dtype == torch.float32
    steps.close()
    # Of 24 micro-batches and more: those of a step and of the one before, and of 32 clips that workers are asked for ahead.
    assert loader._frames.num_made <= (22 if num_workers else 6)


@pytest.mark.parametrize("changes", [{"cache_mib": 1}, {"num_workers": 2}, {"decoder": "pyav"}])
def test_cache_workers_and_decoder_do_not_change_a_batch(shards, changes):
    plain = list(islice(StepLoader(config(shards), 0).steps(), 7))
    other = list(islice(StepLoader(config(shards, **changes), 0).steps(), 7))
    assert [batch.sample_ids for step in plain for batch in step.batches] == [
        batch.sample_ids for step in other for batch in step.batches
    ]
    for ours, theirs in zip(videos(plain), videos(other), strict=True):
        # Decoders round colours each in their own way, by a level or two of 255.
        assert (ours - theirs).abs().max() <= (4 / 127.5 if "decoder" in changes else 0)


def test_resume_gives_the_same_batches(shards):
    straight = list(islice(StepLoader(config(shards), 3).steps(), 9))
    resumed = list(islice(StepLoader(config(shards), 3).steps(straight[3].after), 5))
    assert [step.after for step in resumed] == [step.after for step in straight[4:]]
    for ours, theirs in zip(videos(resumed), videos(straight[4:]), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed[0].batches[0].step == 4 and straight[0].batches[0].step == 0


def test_two_ranks_read_the_step_of_one(shards):
    whole = next(StepLoader(config(shards), 0).steps())
    halves = [next(StepLoader(config(shards), 0, rank, 2).steps()) for rank in (0, 1)]
    assert [half.batches[0].sample_ids for half in halves] == [batch.sample_ids for batch in whole.batches]
    assert all(batch.num_step_samples == 4 for half in halves for batch in half.batches)


@pytest.mark.parametrize("changes", [{}, {"cache_mib": 1}])
def test_batches_hold_the_pixels_that_the_plan_names(large_shards, changes):
    """Each clip of each batch is its whole stored clip, decoded here, then sliced in time and cut in space."""
    loader, decoder = StepLoader(mixed(large_shards, **changes), 0), decode.choose("auto")
    strides = set()
    for plan, step in zip(islice(loader.plan.steps(), 4), loader.steps(), strict=False):
        assert [batch.video.shape for batch in step.batches] == [(2, 3, 5, 32, 40)] * 2 + [(3, 3, 1, 32, 40)] * 2
        for draws, batch in zip(plan.micro_batches, step.batches, strict=True):
            for draw, video, fps in zip(draws, batch.to("cpu").video, batch.fps, strict=True):
                whole = decoder.read(read_clip(large_shards, loader.plan.record(draw)), range(16))
                times = [draw.start_frame + draw.stride * i for i in range(draw.num_frames)]
                expected = whole[times][:, draw.top : draw.top + 32, draw.left : draw.left + 40]
                assert torch.equal(video, video_tensor(expected[None])[0])
                assert fps == 25.0 / draw.stride
                strides.add((draw.num_frames, draw.stride))
    assert strides == {(5, 1), (5, 3), (1, 1)}


def test_mixed_steps_count_their_samples(large_shards):
    """Shares of 0.25 of 2 micro-batches: steps of 2 + 2 videos and of 2 videos and 3 images take turns, 4 and 5 samples."""
    loader = StepLoader(mixed(large_shards, image_share=0.25, num_micro_batches=2), 0)
    steps = list(islice(loader.steps(), 4))
    assert [step.num_samples for step in steps] == [4, 5, 4, 5]
    assert [{batch.num_step_samples for batch in step.batches} for step in steps] == [{4}, {5}, {4}, {5}]
    first = list(islice(loader.first_clips(), 4))
    facts = [(len(batch.video), batch.step, batch.num_step_samples) for batch in first]
    assert facts == [(2, 0, 4), (2, 0, 4), (2, 1, 5), (3, 1, 5)]
    rest = list(islice(StepLoader(mixed(large_shards, image_share=0.25, num_micro_batches=2), 0).steps(steps[0].after), 3))
    assert [step.num_samples for step in rest] == [5, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(videos(steps[1:]), videos(rest), strict=True))


def test_frames_are_resized_before_the_window_is_cut(large_shards):
    """48x48 at a short side of 36, window 32x32: the batch is a window of the resized clip, from memory or not."""
    settings = {"resize_short_side": 36, "crop": "random"}
    loader, decoder = StepLoader(config(large_shards, **settings), 0), decode.choose("auto")
    step, draws = next(loader.steps()), next(loader.plan.steps()).micro_batches[0]
    for draw, video in zip(draws, step.batches[0].to("cpu").video, strict=True):
        frames = resize(decoder.read(read_clip(large_shards, loader.plan.record(draw)), draw.frames), 36, 36)
        window = frames[:, draw.top : draw.top + 32, draw.left : draw.left + 32]
        assert torch.equal(video, video_tensor(window[None])[0])
    cached = next(StepLoader(config(large_shards, cache_mib=1, **settings), 0).steps())
    assert all(torch.equal(a, b) for a, b in zip(videos([step]), videos([cached]), strict=True))


def test_resizing_is_the_antialiased_bilinear_filter():
    """At half the size the triangle of width 2 lies on four pixels at distances 1.5, 0.5, 0.5, 1.5: weights (1, 3, 3, 1) / 8 on
    each axis, up to the rounding of both passes. Taking every second pixel instead (a negative control) is far off."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    weights = np.array([1, 3, 3, 1]) / 8
    rows = sum(weights[i] * frames[:, 1 + i : 13 + i : 2].astype(float) for i in range(4))
    expected = sum(weights[i] * rows[:, :, 1 + i : 21 + i : 2] for i in range(4))
    inside = resize(frames, 8, 12)[:, 1:-1, 1:-1]
    assert inside.dtype == np.uint8 and inside.shape == expected.shape == (2, 6, 10, 3)
    assert np.abs(inside - expected).max() <= 1.01
    assert np.abs(frames[:, 2:-2:2, 2:-2:2] - expected).max() > 50
    assert resize(frames, 16, 24) is frames


def test_two_ranks_read_the_mixed_step_of_one(large_shards):
    whole = next(StepLoader(mixed(large_shards), 0).steps())
    halves = [next(StepLoader(mixed(large_shards), 0, rank, 2).steps()) for rank in (0, 1)]
    dealt = [batch for together in zip(*(half.batches for half in halves), strict=True) for batch in together]
    assert [batch.sample_ids for batch in dealt] == [batch.sample_ids for batch in whole.batches]
    assert all(torch.equal(a.video, b.video) for a, b in zip(dealt, whole.batches, strict=True))
    assert all(batch.num_step_samples == 2 * 2 + 2 * 3 for batch in dealt)


def test_captions_belong_to_their_clips(shards):
    loader = StepLoader(config(shards), 0)
    records = {record.key: record for record in Manifest.load(shards).records()}
    for batch in next(loader.steps()).batches:
        found = [records[sample_id.split("@")[0]] for sample_id in batch.sample_ids]
        assert batch.captions == [record.caption for record in found]
        assert all(record.split == "train" for record in found)


def test_no_step_is_read_further_ahead_than_its_spares_are_known(tmp_path, monkeypatch):
    """17 workers ask for 272 clips ahead, which here are as many steps; the plan knows the spares of the last 256."""
    folder = write_demo_shards(tmp_path, num_clips=4, num_shards=1, held_out=0)
    bad = Manifest.load(folder).records("train")[0]
    with (folder / bad.shard).open("r+b") as file:
        file.seek(bad.offset)
        file.write(b"\0" * 64)
    monkeypatch.setattr(loader, "WorkerPool", lambda num_workers, settings, reading: InProcess(ClipReader(settings)))
    ahead = config(folder, micro_batch_size=1, num_micro_batches=1, num_workers=17)
    steps = list(islice(StepLoader(ahead, 0).steps(), 4))
    assert [step.num_replaced for step in steps].count(1) == 1
