"""A checkpoint is whole or absent, and damage is found before it is used."""

import os

import pytest
import torch

from videofm.checkpoint import save
from videofm.errors import CheckpointError


def files(value: float) -> save.CheckpointFiles:
    tensors = {"models/dit/model": {"weight": torch.full((3, 5), value).t()}, "optimizer/train": {"exp_avg.w": torch.ones(2)}}
    return save.CheckpointFiles(tensors, {"state": {"step": int(value)}})


def write(folder, *steps):
    return [save.write_checkpoint(folder, step, files(float(step))) for step in steps]


def test_what_is_written_is_read_back(tmp_path):
    (folder,) = write(tmp_path, 7)
    assert folder.name == "step_00000007"
    save.verify(folder)
    assert torch.equal(save.read_tensors(folder, "models/dit/model")["weight"], torch.full((5, 3), 7.0))
    assert save.newest(tmp_path) == folder


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "uncommit"])
@pytest.mark.parametrize("name", ["models/dit/model.safetensors", "optimizer/train.safetensors", "state.json"])
def test_any_damage_is_found_and_the_one_before_is_used(tmp_path, damage, name):
    old, new = write(tmp_path, 1, 2)
    path = new / name
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "delete":
        path.unlink()
    else:
        (new / save.COMMITTED).unlink()
    assert save.newest(tmp_path) == old
    with pytest.raises(CheckpointError, match=name if damage != "uncommit" else "never completed"):
        save.verify(new)


def test_nothing_whole_is_an_error_and_nothing_at_all_is_none(tmp_path):
    assert save.newest(tmp_path) is None
    (only,) = write(tmp_path, 1)
    (only / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        save.newest(tmp_path)


def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    """Fail the k-th rename or flush for every k: a reader then sees step 1, or step 2 in full, never a mixture."""
    real = {name: getattr(os, name) for name in ("replace", "fsync")}
    seen = set()
    for k in range(100):
        root = tmp_path / str(k)
        write(root, 1)
        calls = 0

        def failing(name, k=k):
            def call(*arguments):
                nonlocal calls
                calls += 1
                if calls == k + 1:
                    raise OSError(28, "No space left on device")
                return real[name](*arguments)

            return call

        for name in real:
            monkeypatch.setattr(os, name, failing(name))
        try:
            write(root, 2)
            crashed = False
        except OSError:
            crashed = True
        for name, function in real.items():
            monkeypatch.setattr(os, name, function)
        newest = save.newest(root)
        seen.add((crashed, newest.name))
        save.verify(newest)
        write(root, 2)  # and the next attempt succeeds over whatever was left
        assert save.newest(root).name == "step_00000002"
        if not crashed:
            break
    assert k > 8, "the fault must have fired at many places"
    assert (True, "step_00000001") in seen and (False, "step_00000002") in seen


def test_pruning_keeps_the_newest(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    save.prune(tmp_path, 2)
    assert [folder.name for folder in save.committed(tmp_path)] == ["step_00000003", "step_00000004"]
    assert len(list(tmp_path.iterdir())) == 2
