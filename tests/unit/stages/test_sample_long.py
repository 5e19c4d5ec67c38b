"""Stage `sample` with storyboards and guides, on runs with random tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import nn

from tests.unit.runs import write_run
from tests.unit.sampling import tiny
from videofm import media, models
from videofm.config import StageConfig
from videofm.config.sample import GuideConfig
from videofm.errors import ConfigError, Interrupted
from videofm.run_dir import RunDirectory
from videofm.sampling import Pipeline, Segment, Storyboard, Window, generate, token_guide
from videofm.sampling.autoregressive import TokenSampling
from videofm.sampling.loading import load_pipeline
from videofm.sampling.origin import check_origin
from videofm.sampling.settings import SamplingSettings
from videofm.sampling.token_guide import TokenGuide
from videofm.stages import sample

ADAPTER: TypeAdapter[Any] = TypeAdapter(StageConfig)
SIZE: dict[str, Any] = {"num_frames": 21, "height": 16, "width": 16, "fps": 25.0, "num_steps": 2}
WINDOW = {"num_frames": 9, "overlap_frames": 5}
TOLD = "- {start: 0, stop: 13, prompt: a red circle moving left}\n- {start: 13, stop: 21, prompt: a red circle moving right}\n"
LEFT, RIGHT = "a red circle moving left", "a red circle moving right"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A guided DiT, the tokenizer and the autoregressive model that guide it, and such a tokenizer of another VAE."""
    folder, built = tmp_path_factory.mktemp("runs"), tiny.pipeline(num_layers=1, text_length=64)
    models.inject_features(built.dit, models.injection.InjectionSpec(blocks="all"))
    assert built.dit.injection is not None
    for parameter in built.dit.injection.parameters():  # type: ignore[union-attr]
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    tokenizer = models.build("arlon/tokenizer", "tiny", latent_channels=16)
    ar = models.build("ar/transformer", "tiny", vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in ar.parameters():
            parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
    found = {"dit": write_run(folder / "dit", {"dit": built.dit, "text_encoder": built.text_encoder}, {"vae": built.vae}, {})}
    for name, vae in (("tokenizer", built.vae), ("other_tokenizer", models.build("vae/ltx", "tiny"))):
        found[name] = write_run(folder / name, {"tokenizer": tokenizer}, {"vae": vae}, {})
    for name, path in (("ar", found["tokenizer"]), ("other_ar", found["other_tokenizer"]), ("orphan", folder / "gone")):
        trained = {"ar": ar, "text_encoder": built.text_encoder}
        told = {"models": {"tokenizer": {"path": str(path)}}}
        found[name] = write_run(folder / name, trained, {"tokenizer": tokenizer}, told)
    return found


def config(runs: dict[str, Path], tmp_path: Path, told: str = TOLD, **fields: Any) -> Any:
    (tmp_path / "board.yaml").write_text(told)
    defaults = {"kind": "sample", "run": str(runs["dit"]), "prompts_file": str(tmp_path / "board.yaml"), "window": WINDOW}
    return ADAPTER.validate_python(defaults | SIZE | fields)


def directory(path: Path) -> RunDirectory:
    path.mkdir(parents=True, exist_ok=True)
    return RunDirectory(path)


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]


def test_a_storyboard_becomes_a_video(runs: dict[str, Path], tmp_path: Path) -> None:
    """Windows of 9 that share 5: new frames from 0, 9, 13 and 17 on. The file is what the pipeline makes, the list its plan."""
    run = directory(tmp_path / "sample")
    assert sample.run(config(runs, tmp_path), run)["num_videos"] == 1
    (row,) = rows(run)
    assert row["file"] == "samples/000.mp4" and row["caption"] == LEFT
    spans = [(0, 9, LEFT), (9, 13, LEFT), (13, 17, RIGHT), (17, 21, RIGHT)]
    assert row["windows"] == [{"start": start, "stop": stop, "prompt": prompt} for start, stop, prompt in spans]
    assert row["dit_seconds"] > 0 and "ar_seconds" not in row
    told = Storyboard((Segment(0, 13, LEFT), Segment(13, 21, RIGHT)))
    expected = Pipeline.load(runs["dit"]).generate([told], guidance_scale=3.0, **SIZE | {"window": Window(9, 5)})
    media.write_video(tmp_path / "whole.mp4", media.to_frames(expected[0]), 25)
    assert (tmp_path / "whole.mp4").read_bytes() == (run.path / "samples" / "000.mp4").read_bytes()
    # Four windows: eight frames of 16 x 16, drawn six times as large, in one strip.
    assert Image.open(run.path / "samples" / "contact_sheet.png").size[0] >= 8 * 96


def test_a_guide_draws_tokens_for_it(runs: dict[str, Path], tmp_path: Path) -> None:
    """With the settings of the config; the seconds of both models are in the list, and stay when nothing is left to do."""
    run = directory(tmp_path / "sample")
    guide = {"run": str(runs["ar"]), "temperature": 0.5, "top_k": 9, "top_p": 0.9, "guidance_scale": 2.0, "start_sigma": 0.6}
    wanted = config(runs, tmp_path, guide=guide | {"features_in_negative": True})
    sample.run(wanted, run)
    (row,) = rows(run)
    assert row["ar_seconds"] > 0 and row["dit_seconds"] > 0
    guiding = TokenGuide.load(runs["ar"], settings=TokenSampling(0.5, 9, 0.9, 2.0))
    pipeline = Pipeline.load(runs["dit"], guide=guiding)
    told = Storyboard((Segment(0, 13, LEFT), Segment(13, 21, RIGHT)))
    settings = SIZE | {"window": Window(9, 5), "start_sigma": 0.6, "features_in_negative": True}
    expected = media.to_frames(pipeline.generate([told], guidance_scale=3.0, **settings)[0])
    media.write_video(tmp_path / "whole.mp4", expected, 25)
    assert (tmp_path / "whole.mp4").read_bytes() == (run.path / "samples" / "000.mp4").read_bytes()
    sample.run(wanted, run)
    assert rows(run) == [row]
    plain = directory(tmp_path / "plain")
    sample.run(config(runs, tmp_path), plain)
    unguided = media.read_video(plain.path / "samples" / "000.mp4")
    assert np.abs(unguided.astype(int) - media.read_video(run.path / "samples" / "000.mp4")).mean() > 2


def unchecked(run: Path) -> str:
    """What the log says of a guide whose tokenizer has no run."""
    guide = f"the tokenizer of guide {str(run)!r}"
    return f"no run of its training tells which VAE {guide} is of: that it is this one was not checked"


def test_a_guide_of_another_vae_is_refused(runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="other_tokenizer was trained on latents of another VAE than that of run"):
        sample.run(config(runs, tmp_path, guide={"run": str(runs["other_ar"])}), directory(tmp_path / "sample"))
    with caplog.at_level("WARNING", logger="videofm"):
        sample.run(config(runs, tmp_path, guide={"run": str(runs["ar"])}), directory(tmp_path / "known"))
        assert not caplog.messages
        sample.run(config(runs, tmp_path, guide={"run": str(runs["orphan"])}), directory(tmp_path / "unknown"))
    assert caplog.messages == [unchecked(runs["orphan"])]


def test_a_guide_whose_tokenizer_changed_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    """The run of the tokenizer has other weights than what lies in the run of the AR model; by the stage and by `generate`."""
    changed = models.build("arlon/tokenizer", "tiny", latent_channels=16)
    write_run(tmp_path / "tokenizer", {"tokenizer": changed}, {"vae": models.load(runs["dit"], role="vae")}, {})
    roles = {role: models.load(runs["ar"], role=role) for role in ("ar", "text_encoder", "tokenizer")}
    told = {"models": {"tokenizer": {"path": str(tmp_path / "tokenizer")}}}
    ar = write_run(tmp_path / "ar", {}, roles, told)
    message = "tokenizer at .*tokenizer is not the one that this AR model was trained with"
    with pytest.raises(ConfigError, match=message):
        sample.run(config(runs, tmp_path, guide={"run": str(ar)}), directory(tmp_path / "sample"))
    size = {**SIZE, "num_frames": 9, "num_steps": 1, "device": "cpu"}
    with pytest.raises(ConfigError, match=message):
        generate(runs["dit"], LEFT, guide=ar, **size)
    with pytest.raises(ConfigError, match="other_tokenizer was trained on latents of another VAE than that of run"):
        generate(runs["dit"], LEFT, guide=runs["other_ar"], **size)
    assert generate(runs["dit"], LEFT, guide=runs["ar"], **size).shape == (1, 3, 9, 16, 16)


def test_a_bfloat16_copy_of_the_vae_is_the_same_vae(runs: dict[str, Path], tmp_path: Path) -> None:
    roles = {role: models.load(runs["dit"], role=role).bfloat16() for role in ("dit", "vae", "text_encoder")}
    copy = write_run(tmp_path / "copy", {"dit": roles.pop("dit")}, roles, {})
    for dtype in ("fp32", "bf16"):
        wanted = config(runs, tmp_path, run=str(copy), guide={"run": str(runs["ar"])}, dtype=dtype)
        assert load_pipeline(wanted, SamplingSettings.from_config(wanted)).guide is not None


def test_a_tokenizer_without_its_run_is_compared_alone(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder of a single model says nothing of a VAE, and is not taken for one."""
    guide = TokenGuide.load(runs["ar"], device="cpu")
    alone = models.save(guide.tokenizer, tmp_path / "alone")
    ar = write_run(tmp_path / "ar", {}, {}, {"models": {"tokenizer": {"path": str(alone)}}})
    vae = models.load(runs["dit"], role="vae")
    with caplog.at_level("WARNING", logger="videofm"):
        check_origin(guide, ar, vae, runs["dit"])
    assert caplog.messages == [unchecked(ar)]
    models.save(models.build("arlon/tokenizer", "tiny", latent_channels=16), alone)
    with pytest.raises(ConfigError, match="tokenizer at .*alone is not the one that this AR model was trained with"):
        check_origin(guide, ar, vae, runs["dit"])


def test_several_videos_and_a_stop_between_windows(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop in the second video leaves the first and nothing of the second; the same command goes on behind it."""
    told = "videos:\n- [{start: 0, stop: 21, prompt: a}]\n- [{start: 0, stop: 9, prompt: b}, {start: 9, stop: 21, prompt: c}]\n"
    wanted, run = config(runs, tmp_path, told, batch_size=1), directory(tmp_path / "sample")
    made = Pipeline.stream_windows

    def stopping(self: Pipeline, prompts: Any, **how: Any) -> Any:
        for window in made(self, prompts, **how):
            yield window
            if how["first_index"] == 1:
                run.request_stop()

    monkeypatch.setattr(Pipeline, "stream_windows", stopping)
    with pytest.raises(Interrupted, match="stopped on request"):
        sample.run(wanted, run)
    assert [path.name for path in (run.path / "samples").iterdir()] == ["000.mp4"]
    (first,) = rows(run)
    monkeypatch.setattr(Pipeline, "stream_windows", made)
    run.start_attempt()
    sample.run(wanted, run)
    assert rows(run)[0] == first
    assert [row["caption"] for row in rows(run)] == ["a", "b"]
    assert [span["prompt"] for span in rows(run)[1]["windows"]] == ["b", "c", "c", "c"]
    assert media.read_video(run.path / "samples" / "001.mp4").shape == (21, 16, 16, 3)


def test_a_stop_is_heard_between_tokens(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for before the second token of the first window: the third is not drawn, and no video is begun."""
    run, made, tokens = directory(tmp_path / "sample"), token_guide.sample_tokens, []

    def stopping(*args: Any, on_step: Any, **how: Any) -> Any:
        def each(logits: Any) -> None:
            tokens.append(logits)
            if len(tokens) == 2:
                run.request_stop()
            on_step(logits)

        return made(*args, on_step=each, **how)

    monkeypatch.setattr(token_guide, "sample_tokens", stopping)
    with pytest.raises(Interrupted, match="stopped on request"):
        sample.run(config(runs, tmp_path, guide={"run": str(runs["ar"])}), run)
    assert len(tokens) == 2 and not list((run.path / "samples").iterdir())


def test_requests_that_do_not_fit_are_refused_before_models_are_read(runs: dict[str, Path], tmp_path: Path) -> None:
    run = directory(tmp_path / "sample")
    for fields, message in (
        ({"num_frames": 25}, "stops at 21, but the video has 25 frames: write `stop: 25`, or make 21 frames"),
        ({"window": None}, "but the video is made at once: give windows"),
        ({"told": TOLD.replace("13, stop", "11, stop")}, "board.yaml:1: .* overlap in frames 11 to 12"),
    ):
        wanted = config({"dit": tmp_path}, tmp_path, **fields)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            sample.run(wanted, run)
    with pytest.raises(ConfigError, match="board.yaml' is a storyboard: a text file with one caption a line is needed"):
        sample.read_prompts(config(runs, tmp_path))
    with pytest.raises(ValueError, match="`sampler: diffusers` does not read guide, window; take `sampler: videofm`"):
        config(runs, tmp_path, sampler="diffusers", guide={"run": "ar"})


def test_guidance_of_tokens_below_one_is_refused() -> None:
    """It would move away from the prompt; 1 is off."""
    with pytest.raises(ValueError, match="guidance_scale"):
        GuideConfig(run="runs/ar", guidance_scale=0.5)
