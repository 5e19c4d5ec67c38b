"""Every YAML below configs/ is a valid config: a recipe whose stages resolve, or a stage of the kind that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from videofm.config.describe import schema_of
from videofm.config.load import load
from videofm.config.recipe import RecipeConfig
from videofm.config.source import read_file
from videofm.recipe import plan
from videofm.sampling.storyboard import read_storyboards
from videofm.train.build import build_objective, dry_run, trained_roles

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".yml"))


def load_any(path: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """The config in `path`, with the run directory of a recipe moved to `tmp_path`."""
    kind = read_file(path).values.get("kind", "recipe")
    if kind != "recipe":
        return load(path, [], schema_of(kind))
    return load(path, [f"run={json.dumps(str(tmp_path / 'run'))}", f"source={json.dumps(str(tmp_path))}"], RecipeConfig)


def test_every_file_is_seen() -> None:
    """What lies below configs/ is YAML, and the parametrization below covers every file of it."""
    there = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert len(there) == len(FILES) >= 5, sorted(set(there) - set(FILES))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_a_valid_config(path: Path, tmp_path: Path) -> None:
    if path.name.startswith("storyboard"):
        assert read_storyboards(path)
        return
    config = load_any(path, tmp_path)
    stages = [stage.config for stage in plan(config).stages] if isinstance(config, RecipeConfig) else [config]
    for stage in stages:
        if stage.kind == "train":
            told = dry_run(stage)
            of_earlier_stages = [role for role in trained_roles(build_objective(stage)) if stage.models[role].path is not None]
            found = re.search("parameters, (trained|of which [0-9,]+ are adapters and trained)", told)
            assert found or (all(f"{role}: from " in told for role in of_earlier_stages) and of_earlier_stages), told
