"""The stages behind training, on a run with random tiny models: what they write, how they go on, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from data_pipelines.demo import render_shot
from tests.unit.sampling import tiny
from videofm import media, models
from videofm.config import StageConfig
from videofm.data.shards import ShardWriter
from videofm.errors import CheckpointError, ConfigError, DataError, Interrupted
from videofm.evaluation.reconstruction import psnr
from videofm.run_dir import RunDirectory
from videofm.sampling import Pipeline, PixelCondition
from videofm.sampling.images import fitted, read_image
from videofm.shapes import captions, motifs
from videofm.stages import evaluate, export, sample, stored_clips

SIZE = {"num_frames": 5, "height": 32, "width": 32}
ADAPTER: TypeAdapter[Any] = TypeAdapter(StageConfig)


def config(kind: str, **fields: Any) -> Any:
    return ADAPTER.validate_python({"kind": kind} | fields)


def sampling_config(run: Path, **fields: Any) -> Any:
    defaults = {"run": str(run), "prompts": ["a red circle", "b"], "fps": 25.0, "num_steps": 2, "batch_size": 2, **SIZE}
    return config("sample", **defaults | fields)


def directory(path: Path) -> RunDirectory:
    path.mkdir(parents=True, exist_ok=True)
    return RunDirectory(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a checkpoint of random models."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("runs") / "dit"
    checkpoint = run / "checkpoints" / "step_00000002"
    built = tiny.pipeline(num_layers=1, text_length=128)
    for role in ("dit", "vae", "text_encoder"):
        models.save(getattr(built, role), checkpoint / "models" / role)
    (checkpoint / "COMMITTED.json").write_text("{}")
    return run


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard with eleven held-out clips of the demo renderer, and one of two frames."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "00000", "hash") as writer:
        for index, motif in enumerate(motifs()[:12]):
            length = 12 if index else 2
            frames = render_shot(motif.colour, motif.shape, motif.direction, length, 48, rng)
            media.write_video(folder / "clip.mp4", frames, 25)
            facts = {"num_frames": length, "fps": 25.0, "height": 48, "width": 48, "source_id": str(index)}
            video = (folder / "clip.mp4").read_bytes()
            writer.add(f"clip-{index:02d}", video, caption=motif.caption, split="held_out", **facts)  # type: ignore[arg-type]
        writer.commit()
    return folder


def test_sample_writes_videos_a_list_and_a_sheet(trained: Path, tmp_path: Path) -> None:
    run = directory(tmp_path / "sample")
    results = sample.run(sampling_config(trained), run)
    assert results["num_videos"] == 2
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["samples/000.mp4", "samples/001.mp4"]
    assert [row["caption"] for row in rows] == ["a red circle", "b"]
    assert len({row["seed"] for row in rows}) == 2
    assert media.read_video(run.path / rows[0]["file"]).shape == (5, 32, 32, 3)
    assert (run.path / "samples" / "contact_sheet.png").exists()


def test_sample_goes_on_behind_the_last_video(trained: Path, tmp_path: Path) -> None:
    whole, resumed = directory(tmp_path / "whole"), directory(tmp_path / "resumed")
    wanted = sampling_config(trained, prompts=["a", "b", "c"])
    sample.run(wanted, whole)
    sample.run(wanted, resumed)
    (resumed.path / "samples" / "001.mp4").unlink()
    (resumed.path / "samples" / "002.mp4").unlink()
    kept = (resumed.path / "samples" / "000.mp4").stat().st_mtime_ns
    sample.run(wanted, resumed)
    assert (resumed.path / "samples" / "000.mp4").stat().st_mtime_ns == kept
    for name in ("001.mp4", "002.mp4"):
        again, first = media.read_video(resumed.path / "samples" / name), media.read_video(whole.path / "samples" / name)
        assert np.abs(again.astype(int) - first).mean() < 0.5


@pytest.mark.parametrize("sampler", ["videofm", "diffusers"])
def test_sample_stops_on_request(trained: Path, tmp_path: Path, sampler: str) -> None:
    run, source = directory(tmp_path / "sample"), trained
    if sampler == "diffusers":
        source = tmp_path / "model"
        source.mkdir()
        (source / "model_index.json").write_text("{}")
    run.request_stop()
    with pytest.raises(Interrupted, match="stopped on request"):
        sample.run(sampling_config(source, sampler=sampler), run)


def test_prompts_come_from_a_file(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  b  \n")
    assert sample.read_prompts(sampling_config(trained, prompts=[], prompts_file=str(file))) == ["a red circle", "b"]
    file.write_text("\n \n")
    with pytest.raises(ConfigError, match="prompts.txt' is empty: write one caption a line"):
        sample.read_prompts(sampling_config(trained, prompts=[], prompts_file=str(file)))
    with pytest.raises(ConfigError, match="none.txt' cannot be read as text"):
        sample.read_prompts(sampling_config(trained, prompts=[], prompts_file=str(tmp_path / "none.txt")))


def test_sample_refuses_what_it_cannot_use(trained: Path, tmp_path: Path) -> None:
    run = directory(tmp_path / "sample")
    with pytest.raises(CheckpointError, match="nowhere' does not exist: give a training run of a DiT"):
        sample.run(sampling_config(tmp_path / "nowhere"), run)
    with pytest.raises(
        CheckpointError, match="has no model_index.json: plain diffusers needs a folder that `videofm export` wrote"
    ):
        sample.run(sampling_config(trained, sampler="diffusers"), run)
    with pytest.raises(ConfigError, match="num_steps 1 at 32x32: LTXPipeline of diffusers takes 2 steps or more"):
        sample.run(sampling_config(trained, sampler="diffusers", num_steps=1), run)


def pictures(folder: Path, count: int) -> list[str]:
    """Square images, 48 pixels, that differ."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(count)]


def luma(frames: media.Frames) -> np.ndarray[Any, Any]:
    """What H.264 keeps of single pixels: `(T, H, W)`; it halves the resolution of colours."""
    return frames @ np.array([0.299, 0.587, 0.114])


def test_sample_takes_images_and_clips(trained: Path, tmp_path: Path) -> None:
    """One image a prompt, in batches of which the last is shorter, and a clip of one frame as the last frame of all."""
    files = pictures(tmp_path / "images", 3)
    media.write_video(tmp_path / "clip.mp4", np.full((6, 48, 48, 3), 90, np.uint8), 25)
    ending = [{"video": str(tmp_path / "clip.mp4"), "num_frames": 1, "frame": -1, "strength": 0.9}]
    prompts = ["a", "a", "a"]
    wanted = sampling_config(trained, prompts=prompts, images=files, conditions=ending)
    run = directory(tmp_path / "sample")
    sample.run(wanted, run)
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == files
    pipeline = Pipeline.load(trained)
    frames = [fitted(read_image(file), 32, 32, pipeline.vae.compression) for file in files]  # type: ignore[arg-type]
    last = fitted(np.full((1, 48, 48, 3), 90, np.uint8), 32, 32, pipeline.vae.compression)  # type: ignore[arg-type]
    given = [PixelCondition(torch.cat(frames)), PixelCondition(last, -1, 0.9)]
    expected = pipeline.generate(prompts, fps=25.0, num_steps=2, conditions=given, **SIZE)
    for row, video in zip(rows, expected, strict=True):
        assert np.abs(luma(media.read_video(run.path / row["file"])) - luma(media.to_frames(video))).mean() < 3
    free = pipeline.generate(prompts, fps=25.0, num_steps=2, **SIZE)
    assert np.abs(luma(media.to_frames(free[0])) - luma(media.to_frames(expected[0]))).mean() > 10


def test_sample_refuses_images_that_do_not_fit(trained: Path, tmp_path: Path) -> None:
    files = pictures(tmp_path / "images", 2)
    run = directory(tmp_path / "sample")
    with pytest.raises(ConfigError, match="images lists 1 files for 2 prompts: give one for each"):
        sample.run(sampling_config(trained, images=files[:1]), run)
    wide = sampling_config(trained, image=files[0], width=64)
    with pytest.raises(ConfigError, match="48x48 .* and the video 32x64: another shape. Make the video 64x64 or 32x32"):
        sample.run(wide, run)
    sample.run(wide.model_copy(update={"fit": "pad"}), run)
    assert media.read_video(run.path / "samples" / "000.mp4").shape == (5, 32, 64, 3)
    with pytest.raises(DataError, match="absent.png cannot be read as an image"):
        sample.run(sampling_config(trained, image="absent.png"), directory(tmp_path / "other"))


def test_configs_of_samples_that_contradict_themselves(trained: Path) -> None:
    for fields, message in (
        ({"image": "a.png", "images": ["a.png"]}, "either `image` .* or `images`"),
        ({"sampler": "diffusers", "image": "a.png", "solver": "heun"}, "does not read image, solver; take `sampler: videofm`"),
        ({"conditions": [{"frame": 3}]}, "give either `image` or `video`"),
        ({"conditions": [{"video": "a.mp4"}]}, "`num_frames` says how many of the last frames"),
        ({"window": {"num_frames": 5, "overlap_frames": 5}}, "overlap_frames 5 must be less than num_frames 5"),
        ({"schedule": {"kind": "ltx", "max_tokens": 1024}}, "a line needs two token counts"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling_config(trained, **fields)  # type: ignore[arg-type]


def test_prompts_that_are_cut_are_a_number_in_the_result(trained: Path, tmp_path: Path) -> None:
    """The tokenizer counts bytes and one for the end: 127 letters fit into 128 tokens, 128 do not. Videos of an earlier try
    count too."""
    run = directory(tmp_path / "sample")
    wanted = sampling_config(trained, prompts=["a" * 128, "a" * 127])
    assert sample.run(wanted, run)["num_cut_prompts"] == 1
    (run.path / "samples" / "001.mp4").unlink()
    assert sample.run(wanted, run)["num_cut_prompts"] == 1
    assert sample.run(wanted, run)["num_cut_prompts"] is None


def test_long_videos_and_other_settings_reach_the_sampler(trained: Path, tmp_path: Path) -> None:
    run = directory(tmp_path / "sample")
    fields = {
        "num_frames": 13,
        "window": {"num_frames": 9, "overlap_frames": 5},
        "schedule": {"kind": "shifted", "shift": 13.0},
        "solver": "heun",
        "guidance": {"rescale": 0.5, "perturbation": {"blocks": [0]}},
        "negative_prompt": "blurry",
        "dtype": "bf16",
    }
    assert sample.run(sampling_config(trained, prompts=["a"], **fields), run)["num_videos"] == 1
    assert media.read_video(run.path / "samples" / "000.mp4").shape == (13, 32, 32, 3)
    unknown = sampling_config(trained, guidance={"perturbation": {"blocks": [7]}})
    with pytest.raises(ConfigError, match=r"cannot disturb the blocks \[7\]: this model has 1"):
        sample.run(unknown, directory(tmp_path / "other"))


def test_export_is_checked_and_sampled_by_plain_diffusers(trained: Path, tmp_path: Path) -> None:
    """A fresh process without videofm makes, from the same seeds, the videos that we make."""
    output = tmp_path / "model"
    wanted = config("export", run=str(trained), output=str(output))
    exported = RunDirectory.create(tmp_path / "export", wanted)
    results = export.run(wanted, exported)
    assert results["checked"] is True
    counted = sum(p.numel() for p in Pipeline.load(trained).dit.parameters())
    assert results["num_parameters"]["transformer"] == counted
    ours, theirs = directory(tmp_path / "ours"), directory(tmp_path / "theirs")
    prompts = ["a red circle", "b" * 140]  # 140 letters are more than 128 tokens
    counts = [
        sample.run(sampling_config(trained, prompts=prompts), ours)["num_cut_prompts"],
        # The stage stands for what it wrote.
        sample.run(sampling_config(exported.path, prompts=prompts, sampler="diffusers"), theirs)["num_cut_prompts"],
    ]
    assert counts == [1, 1]
    for name in ("000.mp4", "001.mp4"):
        difference = media.read_video(ours.path / "samples" / name).astype(int) - media.read_video(
            theirs.path / "samples" / name
        )
        assert np.abs(difference).mean() < 2  # frames agree to 1e-5; H.264 makes a rounded pixel into a few levels nearby
    with pytest.raises(CheckpointError, match="is an exported folder already"):
        export.run(config("export", run=str(output), output=str(tmp_path / "again")), directory(tmp_path / "again_run"))
    with pytest.raises(CheckpointError, match="nowhere' does not exist"):
        export.run(config("export", run=str(tmp_path / "nowhere"), output="x"), directory(tmp_path / "again_run"))


def test_evaluate_measures_all_three(trained: Path, clips: Path, tmp_path: Path) -> None:
    run = directory(tmp_path / "evaluate")
    shots = directory(tmp_path / "shots")
    rng = np.random.default_rng(1)
    rows = []
    for index, motif in enumerate(motifs()[:4]):
        frames = render_shot(motif.colour, motif.shape, motif.direction, 9, 32, rng)
        media.write_video(shots.path / f"{index}.mp4", frames, 25)
        rows.append({"file": f"{index}.mp4", "caption": captions()[index if index else 47], "seed": 0})
    (shots.path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"run": str(trained), "manifest": str(clips), "num_clips": 9, **SIZE}
    metrics = [
        {"kind": "reconstruction"} | where,
        {"kind": "held_out_loss", "sigmas": [0.25, 0.75]} | where,
        {"kind": "caption_following", "samples": str(shots.path)},
    ]
    wanted = config("evaluate", metrics=metrics)
    found = evaluate.run(wanted, run)["metrics"]
    assert json.loads((run.path / "evaluation.json").read_text())["metrics"] == found
    assert (run.path / "originals_vs_reconstructions.png").exists()
    assert found[0]["num_clips"] == 9
    assert 0 < found[0]["psnr_min"] <= found[0]["psnr"] < 30
    assert found[1]["loss"] == pytest.approx(sum(found[1]["loss_at_sigma"].values()) / 2)
    assert found[2]["both"] == 0.75
    assert evaluate.run(wanted, run)["metrics"] == found


def test_evaluate_refuses_what_it_cannot_use(trained: Path, clips: Path, tmp_path: Path) -> None:
    run = directory(tmp_path / "evaluate")
    where = {"kind": "reconstruction", "run": str(trained), "manifest": str(clips), **SIZE}
    with pytest.raises(DataError, match=r"has no clip of 13 frames in split 'held_out' \(12 shorter\)"):
        evaluate.run(config("evaluate", metrics=[where | {"num_frames": 13}]), run)
    with pytest.raises(CheckpointError, match="nowhere' does not exist"):
        evaluate.run(config("evaluate", metrics=[where | {"run": str(tmp_path / "nowhere")}]), run)
    with pytest.raises(DataError, match="has no samples.jsonl with rows"):
        evaluate.run(config("evaluate", metrics=[{"kind": "caption_following", "samples": str(tmp_path)}]), run)
    run.request_stop()
    with pytest.raises(Interrupted, match="evaluation stopped on request"):
        evaluate.run(config("evaluate", metrics=[where]), run)


def test_fit_cuts_the_centre_and_resizes() -> None:
    """A 20x12 frame for a 5x6 window keeps its 10x12 centre, halved; a constant stays constant."""
    video = torch.zeros(1, 1, 2, 20, 12)
    video[..., 5:15, :] = 1.0
    found = stored_clips.fit(video, 5, 6)
    assert found.shape == (1, 1, 2, 5, 6)
    torch.testing.assert_close(found[..., 1:4, :], torch.ones(1, 1, 2, 3, 6))
    same = torch.rand(2, 3, 4, 8, 8)
    assert torch.equal(stored_clips.fit(same, 8, 8), same)


def test_image_to_video_keeps_what_it_was_given(trained: Path, clips: Path, tmp_path: Path) -> None:
    """The first frame is the decoder's of the given image's latents; a model that sees no image does not make it."""
    wanted = config("evaluate", metrics=[{
        "kind": "image_to_video", "run": str(trained), "manifest": str(clips), "num_clips": 3, "num_steps": 2, **SIZE,
    }])  # fmt: skip
    run = directory(tmp_path / "evaluate")
    (found,) = evaluate.run(wanted, run)["metrics"]
    assert found["num_videos"] == 3 and 0 <= found["both"] <= min(found["colour"], found["direction"]) <= 1

    pipeline = Pipeline.load(trained)
    (batch,) = stored_clips.clip_batches(wanted.metrics[0], run, wanted.seed)
    settings = {"fps": 25.0, "num_steps": 2, "guidance_scale": 3.0, **SIZE}
    first = batch.video[:, :, :1]
    with_image = pipeline.generate(batch.captions, conditions=[PixelCondition(first)], **settings)[:, :, :1]
    without = pipeline.generate(batch.captions, **settings)[:, :, :1]
    assert found["first_frame_psnr"] == pytest.approx(psnr(with_image, first).mean().item(), abs=1e-3)
    assert abs(found["first_frame_psnr"] - psnr(without, first).mean().item()) > 1e-2
