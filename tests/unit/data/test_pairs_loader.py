"""Batches of pairs, from pixels and from a cache: what they hold, and what happens where a clip of a pair cannot be read."""

from __future__ import annotations

import json
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.encode.shard import ShardEncoder
from data_pipelines.encode.shard import data_config as encoded_as
from tests.unit.data.preferred import data_config, neighbours, write_candidates, write_neighbours
from tests.unit.encoding import encode_config, save_encoders
from videofm.config.data import DataConfig
from videofm.data.encoded import ClipCache
from videofm.data.encoded_loader import EncodedLoader
from videofm.data.fixed import clip_request
from videofm.data.index import ClipRecord
from videofm.data.loader import Step, StepLoader
from videofm.data.manifest import Manifest
from videofm.data.pairs import PairPlan
from videofm.data.preferences import Segments, read_preferences, write_preferences
from videofm.data.reader import video_tensor
from videofm.errors import DataError

BAD = ("000001-001", "000003-000", "000003-001")
"""Clips that do not decode: a loser, and both of a pair."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six pairs of which two cannot be read, and a cache of latents and text of their clips."""
    folder = tmp_path_factory.mktemp("pairs")
    clips = write_candidates(folder / "clips", 6)
    records = Manifest.load(clips).records()
    write_neighbours(folder / "preferences", records, clips)
    for record in records:
        if record.key in BAD:
            damage(clips, record)
    encoding = encode_config(clips, save_encoders(folder))
    encoder = ShardEncoder(encoding, folder / "run", "cpu")
    for group in ("00000", "00001"):
        encoder.encode(group)
    values = encoded_as(encoding).model_dump(include={"start", "crop", "frame_strides"})
    return {"folder": folder, "clips": clips, "values": values, "run": str(folder / "run")}


def damage(clips: Path, record: ClipRecord) -> None:
    with (clips / record.shard).open("r+b") as file:
        file.seek(record.offset + record.size // 2)
        file.write(b"\0" * 64)


def config(shared: dict[str, Any], **changes: Any) -> DataConfig:
    section = {"on_bad": "skip", **changes.pop("pairs", {})}
    values = shared["values"] | {"manifest": str(shared["clips"]), **changes}
    return data_config(shared["folder"] / "preferences", section, **values)


def is_bad(name: str) -> bool:
    """Whether a pair, or a draw of it, is one that cannot be read."""
    return name[:6] in ("000001", "000003")


def pairs_of(step: Step) -> list[str]:
    return [name.split("@")[0] for batch in step.batches for name in batch.sample_ids]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pair_is_read_whole_or_replaced_whole(shared: dict[str, Any], tmp_path: Path, num_workers: int) -> None:
    """Six epochs of six pairs: no clip of the two bad pairs is ever in a batch, not even the good winner; spares fill their
    places, counted as one sample each; the good pairs come once an epoch besides; every bad clip is written down."""
    loader = StepLoader(config(shared, num_workers=num_workers), 0, quarantine=tmp_path / "quarantine.jsonl")
    steps = list(islice(loader.steps(), 9))
    found = [name for step in steps for batch in step.batches for name in batch.sample_ids[: len(batch.sample_ids) // 2]]
    plan = loader.plan
    bad = [draw for step in islice(plan.steps(), 9) for batch in step.micro_batches for draw in batch[:2] if is_bad(draw.pair)]
    tried = [next(n for n in count() if not is_bad(plan.replacement(draw, n).pair)) + 1 for draw in bad]
    assert len(found) == 36 and len(bad) == 12 < sum(tried), "a spare may be the other bad pair"
    assert sum(step.num_replaced for step in steps) == loader.bad_clips.num_replaced == sum(tried)
    spares = [name for name in found if "~" in name]
    assert len(spares) == 12 and all(is_bad(name.split("~")[1]) for name in spares)
    good = [name for name in found if "~" not in name]
    assert len(set(good)) == 24 and not any(map(is_bad, found))
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["key"] for row in rows) == list(BAD)
    # With the list at hand, a second run reads the same.
    again = StepLoader(config(shared), 0, quarantine=tmp_path / "quarantine.jsonl")
    assert [pairs_of(step) for step in islice(again.steps(), 9)] == [pairs_of(step) for step in steps]


def test_a_batch_holds_what_the_plan_drew(shared: dict[str, Any]) -> None:
    """Pixels of each side are those of its clip; captions and ids are the same for both; numbers count pairs."""
    loader = StepLoader(config(shared, crop="none", start="random"), 3)
    plan, num_looked_at = loader.plan, 0
    assert isinstance(plan, PairPlan)
    manifest = Manifest.load(shared["clips"])
    for step, drawn in zip(islice(loader.steps(), 3), plan.steps(), strict=False):
        assert step.num_samples == drawn.num_samples == 4
        for batch, draws in zip(step.batches, drawn.micro_batches, strict=True):
            assert batch.video.shape == (4, 3, 9, 32, 32) and batch.num_step_samples == 4
            assert batch.sample_ids[:2] == batch.sample_ids[2:] and batch.captions[:2] == batch.captions[2:]
            assert batch.pair_weights is not None and batch.pair_weights.tolist() == [1.0, 1.0]
            assert batch.pair_ties is not None and not batch.pair_ties.any()
            assert batch.frame_labels is None and batch.rewards is None and batch.pair_axes is None
            for video, name, draw in zip(batch.to("cpu").video, batch.sample_ids, draws, strict=True):
                if draw.sample_id == name:
                    frames = loader._reader.read(clip_request(manifest, draw.shard, plan.record(draw), draw))
                    assert torch.equal(video, video_tensor(frames[None])[0])
                    num_looked_at += 1
            assert not torch.equal(batch.video[0], batch.video[2])
    assert num_looked_at >= 12


def test_a_bad_clip_stops_the_run_where_nothing_may_be_skipped(shared: dict[str, Any], tmp_path: Path) -> None:
    """The message has the pair, the clip and the way out; nothing is quarantined, so that a repaired clip is read again."""
    told = (
        r"pair 00000[13]-000-00000[13]-001 \(\S+ over \S+\) cannot be read: .*clip 00000[13]-00[01] .*"
        "Restore its clips, or set data.pairs.on_bad to skip"
    )
    quarantine = tmp_path / "quarantine.jsonl"
    loader = StepLoader(config(shared, pairs={"on_bad": "fail"}), 0, quarantine=quarantine)
    with pytest.raises(DataError, match=told):
        list(islice(loader.steps(), 2))
    cached = config(shared, pairs={"on_bad": "fail"}, cache={"path": shared["run"], "mode": "latents"})
    with pytest.raises(DataError, match=told):
        list(islice(EncodedLoader(cached, 0, ClipCache(cached), quarantine=quarantine).steps(), 2))
    assert not quarantine.exists()


@pytest.mark.parametrize("mode", ["latents", "full", "text"])
def test_a_cache_gives_the_same_pairs_as_pixels(shared: dict[str, Any], mode: str) -> None:
    """Ids, captions, fields about pairs, positions and spares; latents of both clips, winners first."""
    settings = config(shared, cache={"path": shared["run"], "mode": mode})
    live = islice(StepLoader(config(shared), 0).steps(), 6)
    cached = islice(EncodedLoader(settings, 0, ClipCache(settings)).steps(), 6)
    replaced = 0
    for step, other in zip(live, cached, strict=True):
        assert (step.after, step.num_replaced, step.num_samples) == (other.after, other.num_replaced, other.num_samples)
        replaced += other.num_replaced
        for batch, encoded in zip(step.batches, other.batches, strict=True):
            assert (encoded.sample_ids, encoded.captions) == (batch.sample_ids, batch.captions)
            assert torch.equal(encoded.fps, batch.fps)
            assert encoded.pair_weights is not None and encoded.pair_weights.shape == (2,)
            if mode == "text":
                assert torch.equal(encoded.video, batch.video) and encoded.text is not None
                continue
            assert encoded.latents is not None and encoded.video.shape == (4, 3, 0, 0, 0)
            for index in range(2):  # a clip and the same one reversed: unlike, and of one shape
                assert not torch.equal(encoded.latents[index], encoded.latents[2 + index])
    assert replaced >= 8  # two bad pairs in each of four epochs, and spares that are bad too


def test_labels_and_rewards_come_in_batches_and_move_with_them(shared: dict[str, Any], tmp_path: Path) -> None:
    """Data that have segments and scores, read through the loader of a run; `to` moves every tensor."""
    records = [record for record in Manifest.load(shared["clips"]).records() if not is_bad(record.key)]
    pairs = []
    for number, pair in enumerate(neighbours(records)):
        values = {**pair.to_json(), "segments": {"seconds": 0.2, "labels": [1, 0, -1]}, "weight": 1.0 + number}
        values["axes"] = {} if number else {"motion": "tie"}
        for name, score in (("winner", 2.0), ("loser", 1.0)):
            values[name] = {**values[name], "scores": {"overall": score + number}}
        pairs.append(type(pair).from_json(values))
    assert pairs[0].segments == Segments(0.2, (1, 0, -1))
    write_preferences(tmp_path, pairs, shared["clips"])
    step = next(StepLoader(config(shared, pairs={"path": str(tmp_path)}), 0).steps())
    numbers = {pair.pair_id: number for number, pair in enumerate(read_preferences(tmp_path).pairs)}
    for batch in step.batches:
        n = torch.tensor([float(numbers[name.split("@")[0]]) for name in batch.sample_ids])
        moved = batch.to("meta")
        for name in ("pair_weights", "pair_ties", "frame_labels", "rewards"):
            assert getattr(moved, name).device.type == "meta" and getattr(batch, name).device.type == "cpu"
        assert torch.equal(batch.pair_weights, 1 + n[:2])
        assert batch.pair_axes == [{} if number else {"motion": "tie"} for number in n[:2]]
        assert torch.equal(batch.rewards, n + torch.tensor([2.0, 2.0, 1.0, 1.0]))
        # Nine frames at 25 a second from the first or second on: at least three of the first label and of the second.
        assert batch.frame_labels.shape == (2, 9) and set(batch.frame_labels.flatten().tolist()) == {1.0, 0.0}


def test_a_run_says_what_it_reads(shared: dict[str, Any]) -> None:
    assert StepLoader(config(shared), 0).plan.describe() == "6 pairs of 12 clips"
    plain = config(shared).model_copy(update={"pairs": None})
    assert StepLoader(plain, 0).plan.describe() == "12 clips"
