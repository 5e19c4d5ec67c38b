"""Laws of packs: no pack is over full, every clip comes once an epoch, an order resumes exactly and knows no ranks, few clips
wait, and a batch of a pack is its clips.

Tokens of 4 frames x 8x8 pixels: 9x32x32 has 48, 5x32x32 32, 9x16x32 24, 1x32x32 16; a pack of 100 holds two of the first.
"""

import json
from collections import Counter
from itertools import islice

import pytest
import torch
from pydantic import ValidationError

from tests.demo_shards import write_mixed_shards
from tests.unit.data.datasets import plan_of
from videofm.cli import main
from videofm.config.data import DataConfig
from videofm.config.train import TrainConfig
from videofm.data.bucket_report import as_text, report
from videofm.data.buckets import Buckets, describe_steps
from videofm.data.draws import Clip, PlanState, Shape, by_size
from videofm.data.fixed import clip_request
from videofm.data.index import ClipRecord
from videofm.data.loader import StepLoader
from videofm.data.packing import pack
from videofm.data.plan import DataPlan, StepPlan
from videofm.data.reader import ClipReader, ReaderSettings, video_tensor
from videofm.errors import CheckpointError, ConfigError

SIZES = {(9, 32, 32): 48, (5, 32, 32): 32, (9, 16, 32): 24, (1, 32, 32): 16}
LIMIT = 100
SHOTS = [(10, 32, 32), (6, 32, 32), (9, 16, 36), (3, 40, 40), (9, 32, 32), (9, 24, 40), (5, 36, 32), (12, 32, 34)]
"""Stored clips: frames, height, width."""


def config(changes: dict | None = None, **buckets) -> DataConfig:
    sizes = [dict(zip(("num_frames", "height", "width"), size, strict=True)) for size in SIZES]
    section = {"sizes": sizes, "token": {"num_frames": 4, "height": 8, "width": 8}, **buckets}
    values = {"manifest": "m", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2, "num_micro_batches": 4}
    packs = {"packing": {"num_tokens": LIMIT}, "crop": "random", "window_shards": 2}
    return DataConfig.model_validate({**values, **packs, "buckets": section, **(changes or {})})


def records(count: int = 300) -> list[ClipRecord]:
    shapes = [(12, 32, 32), (6, 40, 40), (10, 16, 40), (2, 32, 32), (9, 64, 64)]
    return [
        ClipRecord(f"k{i:04d}", f"shards/{i % 5}.tar", 0, 1, "", frames, 24.0, height, width, "", f"s{i}", "train", {})
        for i in range(count)
        for frames, height, width in [shapes[i * 7 % 5]]
    ]


def plan(count: int = 300, changes: dict | None = None, seed: int = 3) -> DataPlan:
    return plan_of(records(count), "h", config(changes), seed)


def tokens(draws) -> int:
    return sum(SIZES[draw.num_frames, draw.height, draw.width] for draw in draws)


def ids(steps: list[StepPlan]) -> list:
    return [[[draw.sample_id for draw in micro_batch] for micro_batch in step.micro_batches] for step in steps]


def first_epoch(of: DataPlan) -> list[StepPlan]:
    """Steps until no clip of epoch 0 is to come: it is over, and none is carried."""
    found = []
    for step in of.steps():
        found.append(step)
        if step.after.epoch > 0 and all(clip.epoch > 0 for clip in step.after.carry):
            return found
    raise AssertionError


def test_packs_are_never_over_full_and_the_fill_is_what_they_use() -> None:
    for step in islice(plan().steps(), 60):
        used = [tokens(draws) for draws in step.micro_batches]
        assert len(used) == 4 and max(used) <= LIMIT and step.fill == sum(used) / (4 * LIMIT)
    fills = [step.fill for step in islice(plan().steps(), 60)]
    assert sum(fills) / len(fills) > 0.9, "first-fit over five sizes"
    mixed = [len(by_size(draws)) for step in islice(plan().steps(), 60) for draws in step.micro_batches]
    assert max(mixed) >= 3, "packs hold several sizes"


def test_every_clip_comes_once_an_epoch() -> None:
    drawn = Counter(
        draw.sample_id for step in first_epoch(plan()) for draws in step.micro_batches for draw in draws if draw.epoch == 0
    )
    assert set(drawn) == {f"k{i:04d}@0" for i in range(300)} and set(drawn.values()) == {1}


def test_an_order_resumes_exactly_and_knows_no_ranks() -> None:
    steps = list(islice(plan().steps(), 40))
    for start in (1, 7, 22):
        state = PlanState.from_json(json.loads(json.dumps(steps[start - 1].after.to_json())))
        again = list(islice(plan().steps(state), 40 - start))
        assert ids(again) == ids(steps[start:]) and [step.fill for step in again] == [step.fill for step in steps[start:]]
    for step in steps[:5]:
        shares = [step.share(rank, 2) for rank in range(2)]
        assert [draws for pair in zip(*shares, strict=True) for draws in pair] == step.micro_batches


def test_first_fit_in_order() -> None:
    shapes = [(9, 32, 32), (5, 32, 32), (9, 32, 32), (5, 32, 32), (9, 16, 32), (1, 32, 32), (9, 32, 32), (5, 32, 32)]
    clips = [Clip(f"k{i}", 0, 0, Shape(*shape)) for i, shape in enumerate(shapes)]
    buckets = Buckets(config({"num_micro_batches": 1}))
    by_shape = {(b.num_frames, b.height, b.width): b for b in buckets.all}
    # 48 opens a pack, 32 joins it (80); 48 opens the next, which 32 joins (80); 24 opens a third; 16 fills the first (96).
    packed = buckets.pack(clips, lambda clip: by_shape[tuple(clip.shape)])
    found = [[clip.key for _, clip in one.pairs] for (one,) in packed.steps]
    assert found == [["k0", "k1", "k5"]]
    # Then 48 joins the third (72), where 32 does not fit any more, nor in the second.
    assert [clip.key for clip in packed.rest] == ["k2", "k3", "k4", "k6", "k7"]


def test_few_clips_wait() -> None:
    """Clips of 96 of 100 tokens never fill a pack for a size of 4: the oldest of nine is closed, so eight and a step wait."""
    sizes = [{"num_frames": 1, "height": height, "width": 96} for height in (64,)] + [
        {"num_frames": 1, "height": 16, "width": 16}
    ]
    changes = {"num_frames": 1, "height": 64, "width": 96, "micro_batch_size": 1, "num_micro_batches": 2}
    buckets = Buckets(config(changes, sizes=sizes))
    (large,) = [bucket for bucket in buckets.all if bucket.num_tokens == 96]
    clips = [Clip(f"k{i}", 0, 0, Shape(1, 64, 96)) for i in range(100)]
    packed = buckets.pack(clips, lambda clip: large)
    assert [clip.key for clip in packed.rest] == [f"k{i}" for i in range(92, 100)]
    assert [[one.pairs[0][1].key for one in step] for step in packed.steps[:2]] == [["k0", "k1"], ["k2", "k3"]]


def test_a_mix_takes_turns_with_packs(tmp_path) -> None:
    """Two datasets of one weight: their packs take turns by steps, none of which holds clips of both."""
    for name in ("a", "b"):
        write_mixed_shards(tmp_path / name, SHOTS)
    mix = [{"name": name, "manifest": str(tmp_path / name), "weight": 1} for name in ("a", "b")]
    found = DataPlan.open(config({"manifest": None, "mix": mix}), 0)
    names = [{draw.source for draws in step.micro_batches for draw in draws} for step in islice(found.steps(), 6)]
    assert all(len(name) == 1 for name in names) and Counter(name for (name,) in names) == {"a": 3, "b": 3}


def test_another_limit_is_another_order() -> None:
    before = plan().identity
    assert before["packing"] == {"num_tokens": LIMIT} and "packing" not in plan(changes={"packing": None}).identity
    with pytest.raises(CheckpointError, match="packing.num_tokens was 100, now 120"):
        plan(changes={"packing": {"num_tokens": 120}}).check(before)
    with pytest.raises(CheckpointError, match="packing.num_tokens was None, now 100"):
        plan().check(plan(changes={"packing": None}).identity)


def test_a_spare_has_the_size_of_what_it_replaces() -> None:
    order = plan()
    step = next(order.steps())
    for draws in step.micro_batches:
        for draw in draws:
            spare = order.replacement(draw, 0)
            assert (spare.num_frames, spare.height, spare.width) == (draw.num_frames, draw.height, draw.width)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValidationError, match="packing takes its sizes from buckets"):
        config({"buckets": None})
    for field, value in {"budget": 96, "quadratic": 0.1, "tolerance": 0.5, "image_padding": True}.items():
        with pytest.raises(ValidationError, match=f"buckets: {field} would have no effect with packing"):
            config(**{field: value})
    measured = [{"num_frames": 9, "height": 32, "width": 32, "seconds": 1.0}]
    with pytest.raises(ValidationError, match="seconds of sizes would have no effect"):
        config(sizes=measured)
    with pytest.raises(ConfigError, match=r"num_tokens 40 holds no clip of 9x32x32 \(48 tokens\); raise it"):
        Buckets(config({"packing": {"num_tokens": 40}}))
    with pytest.raises(
        ConfigError, match="holds 3 clips of the main size 9x32x32, of 48 tokens each, and data.micro_batch_size says 2"
    ):
        Buckets(config({"packing": {"num_tokens": 150}}))


def train_config(objective: dict, **trainer) -> TrainConfig:
    data = config().model_dump(exclude_defaults=True)
    return TrainConfig.model_validate(
        {
            "kind": "train", "models": {"vae": {"name": "vae/ltx"}}, "objective": objective, "data": data,
            "optimizer": {"lr": 1e-3}, "trainer": {"max_steps": 1, **trainer},
        }
    )  # fmt: skip


def test_trainings_that_cannot_pack_are_refused() -> None:
    train_config({"kind": "flow_matching"})
    with pytest.raises(ValidationError, match="objective autoencoder takes videos of one size; only flow_matching trains"):
        train_config({"kind": "autoencoder"})
    with pytest.raises(ValidationError, match="two answers to clips of several sizes"):
        train_config({"kind": "flow_matching", "token_dropping": {"num_tokens": 8}})
    with pytest.raises(ValidationError, match="other documents in each step, and blocks would be compiled anew"):
        train_config({"kind": "flow_matching"}, compile=True)


def test_the_report_tells_how_full_packs_are(tmp_path, capsys) -> None:
    source = plan().sources[""]
    found = report(source)
    assert sum(row.step_share for row in found.rows) == pytest.approx(1) and sum(row.clips for row in found.rows) == 300
    assert len(found.fills) == 4 * found.num_steps and 0.9 < sum(found.fills) / len(found.fills) <= 1
    text = as_text(source, found)
    assert "a pack holds at most 100 tokens; a step has 4 packs" in text
    assert f"packs: {4 * found.num_steps:,}; full to {sum(found.fills) / len(found.fills):.1%}" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("9x32x32")]
    assert row[1:4] == ["120", "48", "48.0%"]
    assert "4 packs of up to 100 tokens, of clips of 9x32x32, 5x32x32, 9x16x32, 1x32x32," in describe_steps(source.config)

    write_mixed_shards(tmp_path / "shards", SHOTS)
    data = config({"manifest": str(tmp_path / "shards"), "num_micro_batches": 1}).model_dump(exclude_defaults=True)
    (tmp_path / "train.yaml").write_text(
        json.dumps(
            {
                "kind": "train", "models": {"vae": {"name": "vae/ltx"}}, "objective": {"kind": "flow_matching"}, "data": data,
                "optimizer": {"lr": 1e-3}, "trainer": {"max_steps": 1},
            }
        )
    )  # fmt: skip
    assert main(["data", "buckets", str(tmp_path / "train.yaml")]) == 0
    assert "full to" in capsys.readouterr().out


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_batch_of_a_pack_is_its_clips(tmp_path, num_workers: int) -> None:
    """Each part has the clips of one size, with pixels, captions and rates of the plan's draws, read one by one here."""
    write_mixed_shards(tmp_path / "shards", SHOTS)
    changes = {"manifest": str(tmp_path / "shards"), "num_micro_batches": 2, "num_workers": num_workers}
    loader = StepLoader(config(changes), seed=1)
    reader = ClipReader(ReaderSettings())
    plans, steps, num_mixed = loader.plan.steps(), loader.steps(), 0
    for found in islice(steps, 4):
        step = next(plans)
        assert (found.fill, found.after, found.num_samples) == (step.fill, step.after, step.num_samples)
        for batch, draws in zip(found.batches, step.micro_batches, strict=True):
            groups = by_size(draws)
            num_mixed += len(groups) > 1
            assert batch.sample_ids == [draw.sample_id for group in groups for draw in group]
            assert batch.captions == [caption for part in batch.parts for caption in part.captions]
            assert torch.equal(batch.fps, torch.cat([part.fps for part in batch.parts])) and len(batch.video) == len(draws)
            for part, group in zip(batch.parts, groups, strict=True):
                assert part.sample_ids == [draw.sample_id for draw in group]
                for row, draw in enumerate(group):
                    record = loader.plan.record(draw)
                    request = clip_request(loader.plan.sources[""].dataset, draw.shard, record, draw)
                    assert torch.equal(part.to("cpu").video[row], video_tensor(reader.read(request)[None])[0])
                    assert part.captions[row] == record.caption and part.fps[row] == record.fps / draw.stride
    steps.close()
    assert num_mixed, "some pack has two sizes"


def test_a_pack_moves_with_its_parts(tmp_path) -> None:
    write_mixed_shards(tmp_path / "shards", SHOTS)
    loader = StepLoader(config({"manifest": str(tmp_path / "shards"), "num_micro_batches": 1}), seed=1)
    steps = loader.steps()
    (batch,) = next(steps).batches
    steps.close()
    moved = batch.to("meta")
    assert moved.video.is_meta and all(part.video.is_meta and part.fps.is_meta for part in moved.parts)
    assert pack(batch.parts).sample_ids == batch.sample_ids
