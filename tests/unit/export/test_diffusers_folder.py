"""The exported folder: plain diffusers loads it without a missing key, and makes the frames that we make."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tests.unit.sampling import tiny
from videofm.errors import ConfigError
from videofm.export import write_diffusers_folder
from videofm.sampling import Pipeline
from videofm.sampling.noise import initial_noise, video_seed

SIZE = {"num_frames": 5, "height": 32, "width": 32}
PROMPTS = ["a red circle moving left", "a cyan square"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny.pipeline(text_length=128)


def export(pipeline: Pipeline, folder: Path, dtype: str = "fp32") -> Path:
    parts = {"dit": pipeline.dit, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    return write_diffusers_folder(folder, **parts, scheduler_config=pipeline.schedule.public_config(), dtype=dtype)  # type: ignore


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(pipeline, tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> diffusers.LTXPipeline:
    loaded = diffusers.LTXPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def components(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in sorted(folder.glob("*/*.safetensors"))}


def test_no_key_is_missing_or_left_over(folder: Path) -> None:
    kinds = {
        "transformer": diffusers.LTXVideoTransformer3DModel,
        "vae": diffusers.AutoencoderKLLTXVideo,
        "text_encoder": transformers.T5EncoderModel,
    }
    for name, kind in kinds.items():
        _, info = kind.from_pretrained(folder, subfolder=name, output_loading_info=True)
        assert not any(info.values()), f"{name}: {info}"


def test_same_embeddings_and_noise_make_the_same_frames(pipeline: Pipeline, theirs: diffusers.LTXPipeline) -> None:
    ours = pipeline.generate(PROMPTS, fps=24.0, num_steps=4, guidance_scale=2.5, **SIZE)
    noise = initial_noise([video_seed(0, index) for index in range(2)], (16, 2, 4, 4))
    with torch.no_grad():
        positive, negative = pipeline.text_encoder.encode(PROMPTS), pipeline.text_encoder.encode(["", ""])
    frames = theirs(
        prompt_embeds=positive.embeddings,
        prompt_attention_mask=positive.mask,
        negative_prompt_embeds=negative.embeddings,
        negative_prompt_attention_mask=negative.mask,
        latents=noise.flatten(2).transpose(1, 2),  # (B, C, T, H, W) -> (B, L, C)
        frame_rate=24.0,
        num_inference_steps=4,
        guidance_scale=2.5,
        output_type="pt",
        **SIZE,
    ).frames
    torch.testing.assert_close(frames.transpose(1, 2) * 2 - 1, ours, atol=1e-4, rtol=0)


def test_same_prompts_and_seeds_make_the_same_frames(pipeline: Pipeline, theirs: diffusers.LTXPipeline) -> None:
    ours = pipeline.generate(PROMPTS, fps=25.0, num_steps=3, seed=7, **SIZE)
    generators = [torch.Generator().manual_seed(video_seed(7, index)) for index in range(2)]
    frames = theirs(PROMPTS, frame_rate=25, num_inference_steps=3, generator=generators, output_type="pt", **SIZE).frames
    torch.testing.assert_close(frames.transpose(1, 2) * 2 - 1, ours, atol=1e-4, rtol=0)


def test_what_was_exported_loads_here_too_and_exports_to_the_same_bytes(
    pipeline: Pipeline, folder: Path, tmp_path: Path
) -> None:
    again = Pipeline.load(folder)
    settings = {"fps": 25.0, "num_steps": 2, **SIZE}
    torch.testing.assert_close(again.generate(PROMPTS, **settings), pipeline.generate(PROMPTS, **settings), atol=0, rtol=0)
    second = export(again, tmp_path / "second")
    for name, path in components(folder).items():
        first, copy = load_file(path), load_file(components(second)[name])
        assert first.keys() == copy.keys()
        assert all(torch.equal(tensor.view(torch.uint8), copy[key].view(torch.uint8)) for key, tensor in first.items()), name


def test_files_carry_no_path_and_no_pickle(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            text = path.read_text(encoding="utf-8")
            assert "name_or_path" not in text
            assert str(folder.parent) not in text
        else:
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "LTXPipeline"
    assert index["tokenizer"] == ["transformers", "ByT5Tokenizer"]


def test_bf16_is_stored_and_still_samples(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = export(pipeline, tmp_path / "half", "bf16")
    for path in components(folder).values():
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    settings = {"fps": 25.0, "num_steps": 2, **SIZE}
    ours = Pipeline.load(folder).generate(PROMPTS, **settings)
    torch.testing.assert_close(ours, pipeline.generate(PROMPTS, **settings), atol=0.2, rtol=0)
    loaded = diffusers.LTXPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert len(loaded(PROMPTS, num_inference_steps=2, output_type="np", **SIZE).frames) == 2


def test_an_older_export_is_replaced_as_a_whole(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = export(pipeline, tmp_path / "model")
    (folder / "left_over.txt").write_text("old")
    for leftover in (".model.tmp", ".model.old"):  # of an export that was killed
        (tmp_path / leftover / "vae").mkdir(parents=True)
    export(pipeline, folder)
    assert not (folder / "left_over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_folders_are_not_replaced(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not an exported folder .* it is not replaced"):
        export(pipeline, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_model_that_the_pipeline_cannot_hold_is_refused_and_leaves_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    parts: dict[str, nn.Module] = {"dit": pipeline.vae, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    with pytest.raises(
        ConfigError, match="vae/ltx is of the public class AutoencoderKLLTXVideo, and LTXPipeline needs LTXVideoTrans"
    ):
        write_diffusers_folder(tmp_path / "model", **parts, scheduler_config={})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
