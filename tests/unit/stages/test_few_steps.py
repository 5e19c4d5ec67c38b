"""Measures of guided generation on videos of known content: rendered and drawn ones in the place of what models make.

A stand-in for the pipeline makes the shot that a caption names, so all shares are 1; for another caption they are what the two
captions share. Long videos are drawn: a square that moves a pixel a frame, whose differences between frames are all alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from data_pipelines.demo import render_shot
from videofm import media, shapes
from videofm.config import StageConfig
from videofm.config.evaluate_arlon import FewStepsMetric
from videofm.config.sample import SampleConfig
from videofm.errors import DataError, Interrupted
from videofm.run_dir import RunDirectory
from videofm.sampling.request import MadeWindow
from videofm.sampling.settings import SamplingSettings
from videofm.stages import evaluate, evaluate_guided
from videofm.stages.evaluate_guided import measure_few_steps

ADAPTER: TypeAdapter[Any] = TypeAdapter(StageConfig)
CAPTIONS = ["a red circle moving left", "a blue square moving up", "a yellow circle moving down"]
SHARES = ("colour", "direction", "shape", "all")


class Clock:
    """Stands still but where something says that it takes time."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Renderer:
    """Draws what each caption names, or `instead` of it; a step takes half a second of `clock`, a guide 3, text and VAE 7."""

    def __init__(self, config: SampleConfig, instead: str | None, clock: Clock) -> None:
        self.config, self.instead, self.clock = config, instead, clock
        self.parts: list[tuple[int, int]] = []
        """First index and number of the videos of each batch."""

    def draw(self, prompts: Sequence[str], settings: SamplingSettings) -> Tensor:
        """Videos in [-1, 1], of the size in `settings`."""
        rng = np.random.default_rng(settings.seed)
        motifs = [shapes.parse(self.instead or prompt) for prompt in prompts]
        shots = [render_shot(m.colour, m.shape, m.direction, settings.num_frames, settings.height, rng) for m in motifs]
        return torch.from_numpy(np.stack(shots)).permute(0, 4, 1, 2, 3) / 127.5 - 1  # (B, T, H, W, C) -> (B, C, T, H, W)

    def stream_windows(self, prompts: Sequence[str], *, first_index: int, settings: SamplingSettings) -> Iterator[MadeWindow]:
        """One window."""
        self.parts.append((first_index, len(prompts)))
        dit_seconds, ar_seconds = 0.5 * settings.num_steps, 3.0 if self.config.guide else 0.0
        self.clock.now += dit_seconds + ar_seconds + 7
        indices = torch.zeros(len(prompts), 1, 1, 1, dtype=torch.int64) if self.config.guide else None
        video = self.draw(prompts, settings)
        yield MadeWindow(range(settings.num_frames), video, tuple(prompts), dit_seconds, ar_seconds, indices)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Renderer]:
    """The pipelines that were loaded, which takes 1000 seconds each; the run `wrong` makes a green square that moves left,
    whatever it is told."""
    found: list[Renderer] = []
    clock = Clock()

    def load(config: SampleConfig, settings: SamplingSettings) -> Renderer:
        clock.now += 1000
        found.append(Renderer(config, "a green square moving left" if config.run == "wrong" else None, clock))
        return found[-1]

    monkeypatch.setattr(evaluate_guided, "load_pipeline", load)
    monkeypatch.setattr("time.perf_counter", clock)
    return found


def few_steps(tmp_path: Path, **fields: Any) -> FewStepsMetric:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS))
    size = {"num_frames": 9, "height": 32, "width": 32, "fps": 25}
    return FewStepsMetric(kind="few_steps", prompts_file=str(prompts), **size | fields)


def run_directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", ADAPTER.validate_python({"kind": "demo_data"}))


def test_a_row_for_each_model_and_count_of_steps(loaded: list[Renderer], tmp_path: Path) -> None:
    """The right model has all shares 1 and moves evenly. The wrong one, always a green square that moves left, shares a
    direction with the first caption, the shape with the second, a colour with none."""
    metric = few_steps(
        tmp_path, variants={"right": {"run": "right", "guide": {"run": "ar", "top_p": 0.5}}, "wrong": {"run": "wrong"}},
        num_steps=[5, 10], repeats=2, batch_size=4,
    )  # fmt: skip
    found = measure_few_steps(metric, run_directory(tmp_path), seed=3)
    assert found["num_videos"] == 2 * len(CAPTIONS)
    rows = found["rows"]
    assert [(row["variant"], row["num_steps"]) for row in rows] == [("right", 5), ("right", 10), ("wrong", 5), ("wrong", 10)]
    for row in rows[:2]:
        assert [row[name] for name in SHARES] == [1.0] * 4
        assert row["motion_smoothness"] > 0.9 and row["background_drift"] < 2 and row["hue_drift"] < 5
    for row in rows[2:]:
        assert [row[name] for name in SHARES] == pytest.approx([0, 1 / 3, 1 / 3, 0])
    assert [(renderer.config.run, renderer.config.seed) for renderer in loaded] == [("right", 3), ("wrong", 3)]
    assert loaded[0].config.guide is not None and loaded[0].config.guide.top_p == 0.5 and loaded[1].config.guide is None


def test_seconds_are_those_of_guide_and_steps(loaded: list[Renderer], tmp_path: Path) -> None:
    """Six videos in batches of four and two: two batches of n half seconds, and of 3 seconds of the guide where there is one.
    Loading, captions and decoding are not in it; each model is loaded once."""
    variants = {"guided": {"run": "a", "guide": {"run": "ar"}}, "plain": {"run": "b"}}
    metric = few_steps(tmp_path, variants=variants, num_steps=[2, 12], repeats=2, batch_size=4)
    rows = measure_few_steps(metric, run_directory(tmp_path), seed=0)["rows"]
    assert [row["dit_seconds"] for row in rows] == pytest.approx([n * 0.5 * 2 / 6 for n in (2, 12, 2, 12)])
    assert [row["ar_seconds"] for row in rows] == [1.0, 1.0, None, None]
    assert "seconds_a_video" not in rows[0]
    assert [renderer.parts for renderer in loaded] == [[(0, 4), (4, 2)] * 2] * 2, "each video has noise of its own"


def test_two_frames_are_too_few(tmp_path: Path) -> None:
    """Drift compares thirds."""
    with pytest.raises(ValidationError, match=r"num_frames\n +Input should be greater than or equal to 3"):
        few_steps(tmp_path, variants={"a": {"run": "a"}}, num_frames=2)


def test_three_frames_are_enough(loaded: list[Renderer], tmp_path: Path) -> None:
    metric = few_steps(tmp_path, variants={"a": {"run": "a"}}, num_steps=[5], num_frames=3)
    (row,) = measure_few_steps(metric, run_directory(tmp_path), 0)["rows"]
    assert row["background_drift"] < 3 and row["hue_drift"] < 10


def test_what_cannot_be_measured_is_none(loaded: list[Renderer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey videos have no shape: no share, no motion, no hue."""
    grey = torch.zeros(3, 3, 9, 32, 32)
    monkeypatch.setattr(Renderer, "draw", lambda self, prompts, settings: grey)
    (row,) = measure_few_steps(few_steps(tmp_path, variants={"a": {"run": "a"}}, num_steps=[5]), run_directory(tmp_path), 0)[
        "rows"
    ]
    assert [row[name] for name in SHARES] == [0.0] * 4
    assert row["motion_smoothness"] is None and row["hue_drift"] is None and row["background_drift"] == 0


def test_a_stop_is_heard_between_batches(loaded: list[Renderer], tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    run.request_stop()
    with pytest.raises(Interrupted, match="stopped on request"):
        measure_few_steps(few_steps(tmp_path, variants={"a": {"run": "a"}}), run, 0)


LEFT, RIGHT = "a red square moving left", "a red square moving right"
STARTS = (0, 9, 17, 25)


def drawn(turns: Sequence[int], colour: tuple[int, int, int] = shapes.COLOURS["red"]) -> np.ndarray[Any, Any]:
    """A square of 10 pixels on grey 60, 32x32, that moves by `turns[i]` pixels a frame in window i; windows start at `STARTS`,
    the last ends with frame 24 or 32."""
    stops = (*STARTS[1 : len(turns)], 9 + 8 * (len(turns) - 1))
    steps = [turn for turn, start, stop in zip(turns, STARTS, stops, strict=False) for _ in range(stop - start)]
    columns = 18 + np.cumsum([0, *steps[1:]])
    frames = np.full((len(steps), 32, 32, 3), 60, np.uint8)
    for frame, x in zip(frames, columns, strict=True):
        frame[11:21, x : x + 10] = colour
    return frames


def long_video(
    tmp_path: Path, videos: Sequence[np.ndarray[Any, Any]], prompts: Sequence[Sequence[str]], kind: str = "long_video"
) -> dict[str, Any]:
    """What metric `kind` finds in the folder of these videos, which have a prompt a window."""
    folder = tmp_path / "samples"
    folder.mkdir(parents=True)
    rows = []
    for number, (video, texts) in enumerate(zip(videos, prompts, strict=True)):
        media.write_video(folder / f"{number}.mp4", video, 25)
        stops = [*STARTS[1 : len(texts)], len(video)]
        windows = [
            {"start": start, "stop": stop, "prompt": text} for start, stop, text in zip(STARTS, stops, texts, strict=False)
        ]
        rows.append({"file": f"{number}.mp4", "caption": texts[0], "windows": windows, "ar_seconds": 1.5, "dit_seconds": 2.0})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return measured(folder, tmp_path / "run", kind)


def measured(samples: Path, run: Path, kind: str = "long_video") -> dict[str, Any]:
    config = ADAPTER.validate_python({"kind": "evaluate", "metrics": [{"kind": kind, "samples": str(samples)}]})
    run.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = evaluate.run(config, RunDirectory(run))["metrics"][0]
    return found


def test_windows_are_judged_by_their_own_prompts(tmp_path: Path) -> None:
    """One square turns as it is told. The other stands still in the second window, where it is right in colour and shape but
    not in direction; so of two videos a half is right there, and all in the windows around."""
    prompts = [LEFT, RIGHT, LEFT]
    found = long_video(tmp_path, [drawn([-1, 1, -1]), drawn([-1, 0, -1])], [prompts, prompts])
    assert (found["num_videos"], found["num_frames"]) == (2, 25)
    assert [row["first_frame"] for row in found["rows"]] == list(STARTS[:3])
    assert [row["direction"] for row in found["rows"]] == [1.0, 0.5, 1.0]
    assert [row["all"] for row in found["rows"]] == [1.0, 0.5, 1.0]
    assert all(row["colour"] == row["shape"] == 1.0 for row in found["rows"])
    assert (found["ar_seconds"], found["dit_seconds"]) == (3.0, 4.0)


def test_another_colour_and_its_drift_are_seen(tmp_path: Path) -> None:
    """Red turns blue at the second seam: only that window is wrong in colour, and hue drifts by the angle between the two,
    the arccos of the cosine of their parts that are not grey."""
    video = drawn([-1, 1, -1])
    video[17:] = drawn([-1, 1, -1], shapes.COLOURS["blue"])[17:]
    found = long_video(tmp_path, [video], [[LEFT, RIGHT, LEFT]])
    assert [row["colour"] for row in found["rows"]] == [1.0, 1.0, 0.0]
    red, blue = (np.array(shapes.COLOURS[name]) - np.mean(shapes.COLOURS[name]) for name in ("red", "blue"))
    angle = np.degrees(np.arccos(red @ blue / np.linalg.norm(red) / np.linalg.norm(blue)))
    assert found["hue_drift"] == pytest.approx(angle, abs=15)  # the last nine frames, of which one is red still


def test_a_planted_jump_at_a_seam_is_measured(tmp_path: Path) -> None:
    """Steps of one pixel change 20 of 1024 pixels, by 170, 30 and 30: 1.5 levels in the mean, at seams as elsewhere. A picture
    that is 20 levels lighter from the second window on changes as many at its seam, 13 times as much."""
    video = drawn([-1, 1, -1])
    smooth = long_video(tmp_path / "smooth", [video], [[LEFT, RIGHT, LEFT]])
    assert smooth["seam_ratio"] == smooth["seam_ratio_max"] == pytest.approx(1, abs=0.2)
    video[9:] += 20 * (video[9:] < 200).astype(np.uint8)  # where there is room
    jump = long_video(tmp_path / "jump", [video, drawn([-1, 1, -1])], [[LEFT, RIGHT, LEFT]] * 2)
    assert jump["seam_ratio_max"] > 8
    assert jump["seam_ratio"] == pytest.approx((jump["seam_ratio_max"] + smooth["seam_ratio"]) / 2, rel=0.05)
    assert smooth["background_drift"] < 1
    assert jump["background_drift"] == pytest.approx(20 / 2, abs=1), "20 levels in one of the two videos"


def test_two_windows_are_enough(tmp_path: Path) -> None:
    """17 frames are less than twice the first window of 9: drift compares halves of 8."""
    found = long_video(tmp_path, [drawn([-1, 1])], [[LEFT, RIGHT]])
    assert [row["all"] for row in found["rows"]] == [1.0, 1.0]
    assert found["background_drift"] < 1


@pytest.mark.parametrize("rows", ["", '{"file": "0.mp4", "caption": "a red circle moving left"}\n'])
def test_a_run_without_windows_is_refused(tmp_path: Path, rows: str) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "samples.jsonl").write_text(rows)
    with pytest.raises(
        DataError, match=r"has no samples\.jsonl with windows: give the run of a `sample` stage that has `window`"
    ):
        measured(tmp_path / "samples", tmp_path / "run")


def test_a_video_that_only_changes_at_seams_is_counted_apart(tmp_path: Path) -> None:
    """Its jump over the usual change would be infinite, which JSON has no word for."""
    video = np.repeat(drawn([0, 0, 0])[:1], 25, axis=0)
    video[9:] //= 2
    found = long_video(tmp_path, [video], [[LEFT, RIGHT, LEFT]])
    assert found["num_still"] == 1 and found["seam_ratio"] is None and found["seam_ratio_max"] is None


def test_seconds_that_some_videos_lack_are_no_sum(tmp_path: Path) -> None:
    """An unguided run has none of the AR model; a video that an older version made has none at all."""
    long_video(tmp_path, [drawn([-1, 1]), drawn([-1, 1])], [[LEFT, RIGHT]] * 2)
    listed = tmp_path / "samples" / "samples.jsonl"
    first, second = map(json.loads, listed.read_text().splitlines())
    del second["ar_seconds"]
    listed.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    found = measured(tmp_path / "samples", tmp_path / "run")
    assert found["ar_seconds"] is None and found["dit_seconds"] == 4.0
    del second["dit_seconds"]
    listed.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    assert measured(tmp_path / "samples", tmp_path / "run")["dit_seconds"] is None


def test_a_storyboard_is_not_judged_by_its_first_prompt(tmp_path: Path) -> None:
    """Windows of one prompt are a video of one caption."""
    refused = rf"0\.mp4 has 2 prompts \({LEFT} -> {RIGHT}\), .* use metric `long_video`"
    with pytest.raises(DataError, match=refused):
        long_video(tmp_path / "two", [drawn([-1, 1, -1])], [[LEFT, RIGHT, LEFT]], kind="caption_following")
    one = long_video(tmp_path / "one", [drawn([-1, -1])], [[LEFT, LEFT]], kind="caption_following")
    assert one["num_videos"] == 1 and one["all"] == 1.0
