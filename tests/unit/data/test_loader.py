"""The loader gives the frames that the plan names, whatever decodes them, and resumes at any step."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.demo_shards import write_demo_shards
from videofm.config.data import DataConfig
from videofm.data.loader import StepLoader, video_tensor
from videofm.errors import DataError


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("shards"), num_clips=12, held_out=2)


def config(shards: Path, **changes) -> DataConfig:
    values = {"manifest": str(shards), "num_frames": 5, "height": 32, "width": 32, "micro_batch_size": 2}
    return DataConfig.model_validate({**values, "num_micro_batches": 2, **changes})


def videos(steps) -> list[torch.Tensor]:
    return [batch.video for step in steps for batch in step.batches]


def test_pixels_map_to_minus_one_and_one():
    frames = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 1, 3)
    assert video_tensor(frames).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])


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


def test_captions_belong_to_their_clips(shards):
    loader = StepLoader(config(shards), 0)
    for batch in next(loader.steps()).batches:
        keys = [sample_id.split("@")[0] for sample_id in batch.sample_ids]
        assert batch.captions == [loader.plan.records[key].caption for key in keys]
        assert all(record.split == "train" for record in loader.plan.records.values())


def test_a_flipped_byte_in_a_shard_is_found(shards, tmp_path):
    copy = write_demo_shards(tmp_path / "copy", num_clips=6, num_shards=1, held_out=1)
    tar = next((copy / "shards").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=tar.name):
        StepLoader(config(copy), 0)
