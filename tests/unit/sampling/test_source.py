"""What a sampler finds where it is pointed at: the clips and the coordinates of the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.sampling import tiny
from videofm import models, sampling
from videofm.config.sample import SampleConfig
from videofm.errors import ConfigError
from videofm.export import write_diffusers_folder
from videofm.sampling import Pipeline
from videofm.sampling.settings import SamplingSettings
from videofm.sampling.source import models_folder, trained_with_causal_fix, training_config, training_size

SIZE = {"num_frames": 5, "height": 16, "width": 24}
FIXED: dict[str, Any] = {"kind": "train", "objective": {"kind": "flow_matching", "causal_fix": True}, "data": SIZE}


def run_directory(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "lineage.json").write_text("{}")
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Everything that was made of one run."""
    run = run_directory(tmp_path / "run", FIXED)
    checkpoint, within = run / "checkpoints" / "step_00000001", run / "export"
    moved, output = tmp_path / "moved", tmp_path / "output"
    for folder in (checkpoint, within, moved, output):
        folder.mkdir(parents=True)
    (moved / "train_config.json").write_text(json.dumps(FIXED))
    export = run_directory(tmp_path / "exporting", {"kind": "export", "run": str(checkpoint), "output": str(output)})
    return {"run": run, "checkpoint": checkpoint, "within": within, "moved": moved, "export": export, "output": output}


@pytest.mark.parametrize("place", ["run", "checkpoint", "within", "moved", "export"])
def test_what_was_made_of_a_run_says_how_it_was_trained(places: dict[str, Path], place: str) -> None:
    assert training_config(places[place]) == FIXED
    assert trained_with_causal_fix(places[place])
    assert training_size(places[place], dict.fromkeys(SIZE)) == SIZE
    assert training_size(places[place], {"num_frames": 9, "height": None, "width": None}) == SIZE | {"num_frames": 9}


def test_a_folder_without_a_run_says_nothing(places: dict[str, Path]) -> None:
    assert training_config(places["output"]) == {}
    assert not trained_with_causal_fix(places["output"])
    assert models_folder(places["export"]) == places["output"]
    with pytest.raises(ConfigError, match="does not say how large its clips are: pass height, width"):
        training_size(places["output"], {"num_frames": 9, "height": None, "width": None})


def test_a_run_without_the_fix_or_of_something_else(tmp_path: Path) -> None:
    for number, objective in enumerate(({"kind": "flow_matching", "causal_fix": False}, {"kind": "autoencoder"}, {})):
        assert not trained_with_causal_fix(run_directory(tmp_path / str(number), {"kind": "train", "objective": objective}))


def test_videos_are_made_as_the_run_was_trained(tmp_path: Path) -> None:
    """Null follows the run, a value wins; an exported folder that does not know its run is one of LTXPipeline."""
    trained = tiny.pipeline(num_layers=1)
    run = run_directory(tmp_path / "run", FIXED)
    for role in ("dit", "vae", "text_encoder"):
        models.save(getattr(trained, role), run / "checkpoints" / "step_00000001" / "models" / role)
    (run / "checkpoints" / "step_00000001" / "COMMITTED.json").write_text("{}")
    how: dict[str, Any] = {"num_steps": 2, **SIZE}
    plain, fixed = (trained.generate(["a"], fps=25.0, causal_fix=fix, **how) for fix in (False, True))
    assert (plain - fixed).abs().max() > 1e-3
    assert sampling.generate(run, "a", **how).equal(fixed)
    assert sampling.generate(run, "a", causal_fix=False, **how).equal(plain)
    assert Pipeline.load(run / "checkpoints" / "step_00000001").causal_fix

    parts: dict[str, Any] = {role: getattr(trained, role) for role in ("dit", "vae", "text_encoder")}
    folder = write_diffusers_folder(tmp_path / "folder", **parts, scheduler_config=trained.schedule.public_config())  # type: ignore[attr-defined]
    assert sampling.generate(folder, "a", **how).equal(sampling.generate(folder, "a", causal_fix=False, **how))
    assert not Pipeline.load(folder).causal_fix


@pytest.mark.parametrize("value", [None, False, True])
def test_the_stage_passes_its_settings_on(value: bool | None) -> None:
    fields = {"causal_fix": value, "masked_text": value, "condition_noise_scale": 0.15, "solver": "stochastic"}
    config = SampleConfig.model_validate({"kind": "sample", "run": "x", "prompts": ["a"], "fps": 25, **SIZE, **fields})
    settings = SamplingSettings.from_config(config)
    assert {name: getattr(settings, name) for name in fields} == fields
    with pytest.raises(ValueError, match="does not read .*solver, condition_noise_scale"):
        SampleConfig.model_validate(config.model_dump() | {"sampler": "diffusers"})
