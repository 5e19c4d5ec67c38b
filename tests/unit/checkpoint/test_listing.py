"""What is told about checkpoints: by markers and sizes alone, and after hashing everything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.unit.checkpoint.written import edit_config, tiny_dit, write_step
from videofm.checkpoint import listing
from videofm.config.train import TrainerConfig
from videofm.errors import CheckpointError
from videofm.run_dir import RunDirectory
from videofm.train import state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 10 to 40, of which the third is not healthy."""
    for step, loss in zip((10, 20, 30, 40), (0.5, 0.2, 0.1, 0.3), strict=True):
        write_step(tmp_path / "run", step, {"dit": tiny_dit(step)}, healthy=step != 30, metrics={"loss": loss})
    return tmp_path / "run"


def test_entries_say_what_markers_and_the_disk_say(run: Path) -> None:
    edit_config(run, keep_every=20, keep_best={"metric": "loss", "mode": "min"})
    found = listing.entries(run)
    assert [entry.step for entry in found] == [10, 20, 30, 40]
    assert [entry.record.facts.healthy for entry in found if entry.record] == [True, True, False, True]
    assert [entry.kept for entry in found] == [(), ("permanent",), ("best",), ("permanent",)]
    assert all(entry.damage is None for entry in found)
    for entry in found:
        files = [path for path in entry.folder.rglob("*") if path.is_file()]
        assert entry.num_bytes == sum(len(path.read_bytes()) for path in files) > 1000
        marker = json.loads((entry.folder / "COMMITTED.json").read_text())
        assert entry.to_json()["time"] == marker["time"] and entry.to_json()["metrics"] == marker["metrics"]


def test_the_table_has_a_line_for_each(run: Path) -> None:
    lines = listing.as_text(listing.entries(run)).splitlines()
    assert lines[0].split() == ["step", "committed", "(UTC)", "size", "healthy", "kept", "state"]
    assert [line.split()[0] for line in lines[1:]] == ["10", "20", "30", "40"]
    assert [" no " in line for line in lines[1:]] == [False, False, True, False]
    assert all(line.endswith("whole") for line in lines[1:])


def test_a_listing_sees_what_sizes_and_markers_tell_and_no_more(run: Path) -> None:
    folders = sorted((run / "checkpoints").iterdir())
    (folders[0] / "COMMITTED.json").unlink()
    (folders[1] / "state.json").unlink()
    (folders[2] / "COMMITTED.json").write_text("{")
    weights = folders[3] / "models/dit/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")  # the size is right
    told = [entry.damage for entry in listing.entries(run)]
    assert "never completed" in str(told[0]) and "state.json is missing" in str(told[1]) and "not valid JSON" in str(told[2])
    assert told[3] is None
    assert [item.folder for item in listing.damage(run)] == folders, "hashes tell"


def test_damage_names_every_file_and_what_to_do(run: Path) -> None:
    folders = sorted((run / "checkpoints").iterdir())
    assert listing.damage(run) == []
    (folders[3] / "state.json").write_text("{}")
    (folders[3] / "optimizer/train.safetensors").unlink()
    (folders[3] / "models/dit/model.safetensors.index.json").write_text("{}")
    (folders[3] / ".nfs0001").write_text("hidden files are the file system's")
    (found,) = listing.damage(run)
    text = "\n".join(found.problems)
    assert len(found.problems) == 3
    for named in ("state.json has", "optimizer/train.safetensors is missing", "model.safetensors.index.json is no part of it"):
        assert named in text
    assert found.instead == folders[2] and f"{folders[2].name} is whole" in found.advice
    (alone,) = listing.damage(folders[3])
    assert alone == found, "one checkpoint that is asked about is told the same"


def test_without_a_whole_one_the_advice_is_another(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    found = listing.damage(run)
    assert len(found) == 4 and all(item.instead is None for item in found)
    assert "no other checkpoint of the run is whole" in found[0].advice
    (one,) = listing.damage(found[0].folder)
    assert one.instead is None


def test_the_spare_folder_belongs_to_the_run(run: Path, tmp_path: Path) -> None:
    """Where a run found no room at home it saved elsewhere: that is listed, verified, and can be what is used instead."""
    (run / "lineage.json").write_text(json.dumps({"fingerprint": "0123456789abcdef"}))
    edit_config(run, spare_checkpoints=str(tmp_path / "spare"))
    trainer = TrainerConfig(max_steps=1, spare_checkpoints=str(tmp_path / "spare"))
    spare = listing.spare_of(run)
    assert spare is not None and spare == state.places(RunDirectory(run), trainer)[1]
    assert len(listing.entries(run)) == 4 and not spare.exists()
    elsewhere = write_step(tmp_path / "other", 50, {"dit": tiny_dit(5)})
    shutil.copytree(elsewhere, spare / elsewhere.name)
    found = listing.entries(run)
    assert [entry.step for entry in found] == [10, 20, 30, 40, 50] and found[-1].folder.parent == spare
    assert listing.as_text(found).splitlines()[-1].endswith(f"whole, in {spare}")
    (run / "checkpoints" / "step_00000040" / "state.json").unlink()
    (broken,) = listing.damage(run)
    assert broken.instead == spare / elsewhere.name


def test_places_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist: give a run directory"):
        listing.entries(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is neither a run \(it has no checkpoints/\) nor a checkpoint"):
        listing.entries(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        listing.entries(tmp_path)
    (tmp_path / "checkpoints" / "step_00000001").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint that was finished"):
        listing.finished_checkpoints(tmp_path)
