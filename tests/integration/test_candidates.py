"""`videofm dpo generate` through Ray: what actors write does not depend on how many they are, nor on whether one dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipelines.candidates import run as stage
from tests.unit.data_pipelines.stub_maker import PROMPTS, StubMaker, config_of, make_all, tree
from videofm import registry
from videofm.run_dir import RunDirectory

STUB = "tests.unit.data_pipelines.stub_maker:StubMaker"


def run_stage(folder: Path, **engine: Any) -> dict[str, Any]:
    config = config_of(engine=engine)
    return stage.run(config, PROMPTS, RunDirectory.create(folder, config))


def test_two_actors_of_which_one_dies_write_what_one_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_all(config_of(), tmp_path / "alone")
    monkeypatch.setitem(registry.CANDIDATES, "pipeline", STUB)
    monkeypatch.setenv("VIDEOFM_STUB_DEATH", str(tmp_path / "died"))
    with caplog.at_level("WARNING", logger="videofm"):
        result = run_stage(tmp_path / "run", num_actors=2)
    assert result == {
        "num_prompts": 5,
        "num_videos": 15,
        "num_cut_prompts": 1,
        "policy": StubMaker(config_of()).origin["policy"],
    }
    assert (tmp_path / "died").exists()
    assert tree(tmp_path / "run") == tree(tmp_path / "alone")
    assert "another one begins it again" in caplog.text
    assert "1 of 5 prompts are longer than the text encoder takes; their ends are cut" in caplog.text
