"""What lies where a sampler is pointed at: a training run, a checkpoint of it, an exported folder, the run of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from videofm.errors import ConfigError
from videofm.run_dir import read_json


def models_folder(path: str | Path) -> Path:
    """`path`, or what it wrote where it is the run directory of an `export` stage."""
    path = Path(path)
    if (path / "lineage.json").exists():
        config = read_json(path / "config.yaml")
        if config.get("kind") == "export":
            return Path(config["output"])
    return path


def training_config(path: str | Path) -> dict[str, Any]:
    """The config of the training that made what lies at `path`; empty for a folder that does not say.

    It stands in a checkpoint, and in the run directory that holds the checkpoint or the folder; an export says which run it
    was made of.
    """
    path = Path(path)
    if (path / "train_config.json").exists():
        found: dict[str, Any] = read_json(path / "train_config.json")
        return found
    # A checkpoint lies in RUN/checkpoints/step_N: its run is two levels up.
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / "lineage.json").exists():
            found = read_json(folder / "config.yaml")
            return training_config(found["run"]) if found.get("kind") == "export" else found
    return {}


def trained_with_causal_fix(path: str | Path) -> bool:
    """Whether the models at `path` were trained with `objective.causal_fix`. A folder without a run is taken for one of
    `LTXPipeline`, which has no fix."""
    return bool(training_config(path).get("objective", {}).get("causal_fix", False))


def training_size(path: str | Path, given: dict[str, int | None]) -> dict[str, int]:
    """`given` (`num_frames`, `height`, `width`), with what is None there taken from the clips of the training.

    Raises:
        ConfigError: something is not given, and nothing at `path` says it.
    """
    data = training_config(path).get("data", {})
    size = {name: value or data.get(name) for name, value in given.items()}
    if all(size.values()):
        return size
    unknown = ", ".join(name for name, value in given.items() if value is None)
    raise ConfigError(f"{path} does not say how large its clips are: pass {unknown}.")
