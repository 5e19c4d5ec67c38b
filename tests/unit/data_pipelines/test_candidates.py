"""Candidates: what a shard holds follows from prompts, seeds and weights, however often and by whomever it is begun again."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import shard_actors
from data_pipelines.candidates import run as stage
from data_pipelines.candidates.clips import choose_clips
from data_pipelines.candidates.shard import ShardMaker
from data_pipelines.clip_file import ClipFormat, ClipWriter, constant_rate
from data_pipelines.shard_actors import ShardActors
from tests.unit.data_pipelines.stub_maker import PROMPTS, StubMaker, config_of, make_all, tree
from videofm import registry
from videofm.config.candidates import CandidatesConfig, FromClipsConfig
from videofm.data import decode
from videofm.data.candidates import by_prompt, read_candidates
from videofm.data.index import ClipRecord
from videofm.data.manifest import Manifest
from videofm.data.preferences import Origin
from videofm.data.shards import ShardWriter, read_clip
from videofm.errors import ConfigError, DataError, Interrupted
from videofm.media import Frames
from videofm.report.collect import images_of, videos_of
from videofm.run_dir import RunDirectory
from videofm.stages import dpo_generate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All candidates of `config_of()`, made at one go."""
    folder = tmp_path_factory.mktemp("candidates")
    make_all(config_of(), folder)
    return folder


def test_a_clip_says_all_that_it_was_made_by(made: Path) -> None:
    """5 prompts of 3 candidates; keys, groups and metadata as the readers of candidates want them. A prompt that is given twice
    has one group."""
    manifest = Manifest.load(made)
    assert [len(manifest.read_shard(shard)) for shard in range(3)] == [6, 6, 3]
    found = list(read_candidates(manifest))
    groups: dict[tuple[str, str], list[str]] = {}
    for number, prompt in enumerate(PROMPTS):
        groups.setdefault((prompt, ""), []).extend(f"{number:06d}-{candidate:03d}" for candidate in range(3))
    assert {group: [candidate.key for candidate in members] for group, members in by_prompt(found).items()} == groups
    assert [clip.prompt for clip in sorted(found, key=lambda clip: clip.key)[::3]] == PROMPTS
    for number in range(5):
        for candidate, clip in enumerate(sorted(found, key=lambda clip: clip.key)[3 * number : 3 * number + 3]):
            sampler = {"num_steps": 30}
            assert clip.origin == Origin("stub", "a" * 64, 1000 * number + candidate, sampler)
            assert (clip.record.num_frames, clip.record.height, clip.record.width) == (5, 16, 24)
            assert clip.record.fps == 24000 / 1001 and clip.record.split == "train"
    with tarfile.open(made / manifest.tars[1]) as tar:
        member = tar.extractfile("000002-001.json")
        assert member is not None
        facts = json.loads(member.read())
    assert (facts["prompt_number"], facts["candidate"], facts["source_id"]) == (2, 1, "000002")


def test_what_is_decoded_is_what_was_made(tmp_path: Path) -> None:
    """Grey frames at crf 0: x264 then loses nothing of luma, and conversion from and to RGB is off by a level at most."""
    config = config_of(crf=0)
    maker = StubMaker(config)
    make_all(config, tmp_path, maker)
    for clip in read_candidates(Manifest.load(tmp_path)):
        assert clip.origin is not None
        frames = decode.choose("auto").read(read_clip(tmp_path, clip.record), list(range(5)))
        wanted = maker._video(clip.prompt, clip.origin.seed or 0)
        assert np.abs(frames.astype(int) - wanted).max() <= 1


def test_equal_prompts_have_candidates_of_their_own(made: Path) -> None:
    records = {record.key: record for record in Manifest.load(made).records()}
    assert len({record.sha256 for record in records.values()}) == 15


class Dies(StubMaker):
    """Ends with an error over its batch number `after` + 1, as if it were killed there."""

    def __init__(self, config: CandidatesConfig, after: int, half: bool) -> None:
        super().__init__(config)
        self.after, self.half = after, half

    def make(self, prompts: Sequence[str], seeds: Sequence[int], on_step: Any, given: Any = ()) -> Iterator[Sequence[Frames]]:
        for number, part in enumerate(super().make(prompts, seeds, on_step, given)):
            if self.num_batches > self.after and (number or not self.half):
                raise KeyboardInterrupt
            yield part


@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("half", [False, True])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(after: int, half: bool, made: Path, tmp_path: Path) -> None:
    """Cut off in each of the 5 batches, before or within a video; what is finished is not made again."""
    config = config_of()
    with pytest.raises(KeyboardInterrupt):
        make_all(config, tmp_path, Dies(config, after, half))
    assert not list(tmp_path.glob("work/*/.*"))
    maker = StubMaker(config)
    make_all(config, tmp_path, maker)
    assert maker.num_batches == 5 - after
    assert tree(tmp_path) == tree(made)


def test_a_killed_process_leaves_nothing_that_counts(made: Path, tmp_path: Path) -> None:
    """Half of a video under its temporary name, and a tar that was not committed."""
    (tmp_path / "work" / "00000").mkdir(parents=True)
    (tmp_path / "work" / "00000" / ".000000-000.tmp-7.mp4").write_bytes(b"half")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shard-00000.tar.tmp-7-ab").write_bytes(b"half")
    make_all(config_of(), tmp_path)
    (tmp_path / "shards" / "shard-00000.tar.tmp-7-ab").unlink()  # `videofm data gc` does that
    assert tree(tmp_path) == tree(made)


def test_a_committed_shard_is_not_made_again(made: Path) -> None:
    before = tree(made)
    maker = StubMaker(config_of())
    shards = make_all(config_of(), made, maker)
    assert maker.num_batches == 0 and tree(made) == before
    report = shards.work("00000")
    assert report is not None and (report.num_made, report.num_cut_prompts) == (0, 1)


def test_a_stop_is_heard_within_a_video_and_keeps_whole_batches(made: Path, tmp_path: Path) -> None:
    config = config_of()

    class Stops(StubMaker):
        def make(
            self, prompts: Sequence[str], seeds: Sequence[int], on_step: Any, given: Any = ()
        ) -> Iterator[Sequence[Frames]]:
            for number, part in enumerate(super().make(prompts, seeds, on_step, given)):
                yield part
                if self.num_batches == 2 and number == 0:
                    RunDirectory(tmp_path).request_stop()

    shards = ShardMaker(config, PROMPTS, tmp_path, Stops(config))
    assert shards.work("00000") is None
    assert sorted(path.name for path in (tmp_path / "work" / "00000").iterdir()) == [
        f"00000{i}-00{n}.mp4" for i, n in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]
    assert not list(tmp_path.glob("manifest/*"))
    assert shards.work("00001") is None  # nothing is begun
    (tmp_path / "control" / "stop").unlink()
    make_all(config, tmp_path)
    assert tree(tmp_path) == tree(made)


@pytest.mark.parametrize(
    ("change", "policy", "says"),
    [
        ({}, "b" * 64, r"holds candidates of another model: policy was 'a{12}', now 'b{12}'. Choose another run directory"),
        ({"num_candidates": 4}, "a" * 64, "num_candidates was 3, now 4"),
        ({"num_steps": 4}, "a" * 64, "sampler.num_steps was 30, now 4"),
        ({"crf": 30}, "a" * 64, "stored.crf was 8, now 30"),
    ],
)
def test_other_weights_or_settings_do_not_mix(change: Any, policy: str, says: str, made: Path) -> None:
    config = config_of(**change)
    with pytest.raises(DataError, match=says):
        ShardMaker(config, PROMPTS, made, StubMaker(config, policy))
    with pytest.raises(DataError, match="prompts was"):
        ShardMaker(config_of(), [*PROMPTS, "more"], made, StubMaker(config_of()))


def test_a_maker_that_makes_other_videos_is_told(tmp_path: Path) -> None:
    class Short(StubMaker):
        def make(
            self, prompts: Sequence[str], seeds: Sequence[int], on_step: Any, given: Any = ()
        ) -> Iterator[Sequence[Frames]]:
            yield next(iter(super().make(prompts, seeds, on_step, given)))

    with pytest.raises(DataError, match=r"candidate 000000-000: wrote 5 frames of \(16, 24\), read back 2"):
        make_all(config_of(), tmp_path, Short(config_of()))
    assert not list(tmp_path.glob("work/*/*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"height": 17}, "frames of 17x24 cannot be stored: H.264 needs an even height and width"),
        ({"prompts": ["a", " "]}, "prompts 1 are blank"),
        ({"num_candidates": 1}, "num_candidates"),
        ({"prompts": []}, "give one of `prompts` .*, not none"),
        ({"from_clips": {"manifest": "x"}}, "not prompts and from_clips"),
        ({"prompts": [], "from_clips": {"manifest": "x", "eta_min": 0.9}}, "eta_min 0.9 is more than eta_max 0.8"),
        (
            {"prompts": [], "from_clips": {"manifest": "x"}, "window": {"num_frames": 3, "overlap_frames": 1}},
            "leaves nothing to a `window` or a `guide`",
        ),
        ({"window": {"num_frames": 5, "overlap_frames": 5}}, "overlap_frames 5 must be less than num_frames 5"),
    ],
)
def test_refusals_of_the_config(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config_of(**change)


def test_too_many_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "MAX_PROMPTS", 4)
    with pytest.raises(ConfigError, match="5 prompts are more than 4: make them in several run directories"):
        stage.run(config_of(), PROMPTS, RunDirectory(tmp_path))


def run_stage(folder: Path) -> dict[str, Any]:
    return stage.run(config_of(), PROMPTS, RunDirectory.create(folder, config_of()))


def test_a_finished_run_starts_no_actors_and_a_stopped_one_is_resumable(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result is read from what is committed."""

    def no_ray(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(shard_actors.engine, "cluster", no_ray)
    (made / "work" / "00001").mkdir()
    (made / "work" / "00001" / "000002-000.mp4").write_bytes(b"of an actor that was killed behind its commit")
    assert run_stage(made) == {"num_prompts": 5, "num_videos": 15, "num_cut_prompts": 1, "policy": "a" * 64}
    assert not list(made.glob("work/*"))
    run = RunDirectory.create(tmp_path, config_of())
    run.request_stop()
    with pytest.raises(Interrupted, match="stopped with 0 of 3 shards of candidates done; run it again to go on"):
        stage.run(config_of(), PROMPTS, run)
    assert Interrupted.exit_code == 75


def test_dry_run_says_what_would_run() -> None:
    assert stage.dry_run(config_of()) == "3 candidates of 5x16x24 for each of 5 prompts, 1 actors"
    config = config_of(prompts=[], prompts_file="all.txt", engine={"num_actors": 4})
    assert stage.dry_run(config) == "3 candidates of 5x16x24 for each of the prompts of all.txt, 4 actors"


def test_some_candidates_are_shown(made: Path) -> None:
    """The files are those of the shards; the report finds the sheet and the list."""
    before = tree(made)
    dpo_generate.run(config_of(), RunDirectory(made))
    assert tree(made) == before
    records = {record.key: record for record in Manifest.load(made).records()}
    for key, record in records.items():
        assert hashlib.sha256((made / "samples" / f"{key}.mp4").read_bytes()).hexdigest() == record.sha256
    assert images_of(made) == [made / "samples" / "contact_sheet.png"]
    assert [caption for _, caption in videos_of(made)] == [PROMPTS[number // 3] for number in range(12)]


def test_of_many_prompts_some_are_shown(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_generate, "_SHEET_PROMPTS", 3)
    shown: list[Any] = []
    monkeypatch.setattr(dpo_generate.media, "stacked_sheet", lambda stacks, captions, *_, **__: shown.append(captions))
    dpo_generate.run(config_of(), RunDirectory(made))
    assert shown == [[PROMPTS[0], PROMPTS[2], PROMPTS[4]]]


# -- from clips


def write_clips(folder: Path) -> Path:
    """Clips of which three serve: others are short, small, slow, or have no caption."""
    whole = {"num_frames": 7, "fps": 24000 / 1001, "height": 32, "width": 32, "caption": "a red circle", "source_id": "s"}
    changes: list[dict[str, Any]] = [
        {}, {}, {"num_frames": 4}, {"height": 14}, {"fps": 25.0}, {"caption": " "}, {"split": "held_out"}, {"width": 48},
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "00000", "hash") as writer:
        for number, change in enumerate(changes):
            facts = {"split": "train", **whole, **change}
            form = ClipFormat(constant_rate(facts["fps"]), facts["height"], facts["width"], 0, "medium", 24)
            with ClipWriter(folder / "clip.mp4", form) as clip:
                for _ in range(facts["num_frames"]):
                    clip.write(np.full((facts["height"], facts["width"], 3), rng.integers(256), np.uint8))
            writer.add(f"clip-{number}", (folder / "clip.mp4").read_bytes(), **facts)
        writer.commit()
    return folder


def clips_config(folder: Path, **wanted: Any) -> CandidatesConfig:
    return config_of(prompts=[], from_clips={"manifest": str(folder), **wanted})


def chosen(config: CandidatesConfig) -> list[ClipRecord]:
    assert config.from_clips is not None
    return choose_clips(config, config.from_clips)


def test_clips_that_do_not_serve_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_clips(tmp_path)
    with caplog.at_level("INFO", logger="videofm"):
        assert [record.key for record in chosen(clips_config(folder))] == ["clip-0", "clip-1", "clip-7"]
    assert caplog.messages == [
        "3 clips are begun from; left out: 1 of another rate than 23.976 frames a second, 1 smaller than 16x24, "
        "1 with fewer than 5 frames, 1 without a caption"
    ]
    few = [tuple(r.key for r in chosen(clips_config(folder, num_clips=2).model_copy(update={"seed": s}))) for s in range(20)]
    assert set(few) == {("clip-0", "clip-1"), ("clip-0", "clip-7"), ("clip-1", "clip-7")}
    assert [record.key for record in chosen(clips_config(folder, split="held_out"))] == ["clip-6"]
    with pytest.raises(DataError, match=r"no clip of split 'train' .* \(6 with fewer than 9 frames, 1 without a caption\)"):
        chosen(clips_config(folder).model_copy(update={"num_frames": 9}))
    with pytest.raises(ConfigError, match="from_clips.manifest = 's3://bucket/x': clips are begun from where they lie"):
        chosen(clips_config(Path("x")).model_copy(update={"from_clips": FromClipsConfig(manifest="s3://bucket/x")}))


def test_candidates_from_clips_say_which_and_from_what_level(tmp_path: Path) -> None:
    """The frames are what the maker makes of those of the clip, which are grey at one level, and of noise by the seed."""
    config = clips_config(write_clips(tmp_path / "clips"), num_clips=2).model_copy(update={"crf": 0})
    clips = chosen(config)
    maker = StubMaker(config)
    shards = ShardMaker(config, [clip.caption for clip in clips], tmp_path / "run", maker, clips)
    assert shards.work("00000") is not None
    found = by_prompt(read_candidates(Manifest.load(tmp_path / "run")))
    assert len(found) == 2
    for members, clip in zip(found.values(), clips, strict=True):
        content = read_clip(tmp_path / "clips", clip)
        grey = decode.choose("auto").read(content, [0, 1, 2, 3, 4])[:, :1, :1]
        assert hashlib.sha256(content).hexdigest() == clip.sha256
        for candidate in members:
            assert candidate.origin is not None and candidate.prompt == clip.caption
            told = {"key": clip.key, "sha256": clip.sha256, "level": maker.level(clip.sha256)}
            assert candidate.origin.sampler["from_clip"] == told
            frames = decode.choose("auto").read(read_clip(tmp_path / "run", candidate.record), list(range(5)))
            wanted = maker._video(candidate.prompt, candidate.origin.seed or 0) // 2 + grey // 2
            assert np.abs(frames.astype(int) - wanted).max() <= 1
    with pytest.raises(DataError, match="clips.content was"):
        ShardMaker(config, [clip.caption for clip in clips], tmp_path / "run", maker, clips[::-1])


def test_a_clip_that_is_damaged_is_named(tmp_path: Path) -> None:
    config = clips_config(write_clips(tmp_path))
    clip = chosen(config)[0]
    with (tmp_path / clip.shard).open("r+b") as file:
        file.seek(clip.offset + clip.size // 2)
        file.write(b"damaged")
    shards = ShardMaker(config, ["a"], tmp_path / "run", StubMaker(config), [clip])
    with pytest.raises(DataError, match="clip clip-0 of .* is damaged: its SHA-256 is not the one of the index"):
        shards.work("00000")


def test_the_stage_hands_clips_to_its_actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From config to sheet, with an actor in this process: captions are the prompts, and each has its own clip."""

    def work(self: ShardActors, groups: Sequence[str], should_stop: Any, tick: Any) -> Iterator[Any]:
        actor = self.kind(*self.arguments)
        for group in groups:
            yield actor.work(group)
            tick()

    monkeypatch.setattr(ShardActors, "work", work)
    monkeypatch.setattr(ShardActors, "cluster", lambda self: nullcontext())
    monkeypatch.setitem(registry.CANDIDATES, "pipeline", "tests.unit.data_pipelines.stub_maker:StubMaker")
    config = clips_config(write_clips(tmp_path / "clips"))
    result = dpo_generate.run(config, RunDirectory.create(tmp_path / "run", config))
    assert (result["num_prompts"], result["num_videos"], result["num_cut_prompts"]) == (3, 9, 0)
    found = by_prompt(read_candidates(Manifest.load(tmp_path / "run")))
    begun = [members[0].origin.sampler["from_clip"]["key"] for members in found.values() if members[0].origin is not None]
    assert begun == ["clip-0", "clip-1", "clip-7"]
    assert (tmp_path / "run" / "samples" / "contact_sheet.png").exists()
