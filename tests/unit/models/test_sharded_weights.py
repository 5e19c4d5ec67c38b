"""Models whose weights lie in shards beside an index: the checkpoints of several ranks, and folders of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from videofm import models
from videofm.errors import CheckpointError
from videofm.models.stored import read_weights, weight_files


def spread(file: Path, num_shards: int = 3) -> None:
    """Put the tensors of a file into shards, every n-th into the n-th."""
    tensors = load_file(file)
    names = [f"{file.stem}-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]
    where = {key: names[index % num_shards] for index, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in tensors if where[key] == name}, file.with_name(name), {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose checkpoint has the weights and another moving average."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    models.save(models.build("vae/ltx", "tiny"), checkpoint / "models" / "vae")
    models.save(models.build("vae/ltx", "tiny"), checkpoint / "ema" / "vae")
    (checkpoint / "COMMITTED.json").write_text("{}")
    return tmp_path / "run"


def test_a_checkpoint_in_shards_is_the_model(run: Path) -> None:
    whole = {ema: models.load(run, ema=ema) for ema in (True, False)}
    assert not same(whole[True], whole[False])
    for place in ("models", "ema"):
        spread(run / "checkpoints" / "step_00000001" / place / "vae" / "model.safetensors")
    for ema, model in whole.items():
        assert same(models.load(run, ema=ema), model)
    (run / "checkpoints/step_00000001/ema/vae/model.safetensors.index.json").unlink()
    assert same(models.load(run, ema=True), whole[False]), "no index, no average"
    filled = models.initial("vae/ltx", str(run))
    assert same(filled.model, whole[False]), "`init_from` reads shards too"
    assert same(models.load(models.save_public(models.load(run), run / "public")), whole[False]), "and so does export"


def test_the_newest_average_in_shards_is_adopted_by_init_from(run: Path) -> None:
    averaged = models.load(run, ema=True)
    spread(run / "checkpoints/step_00000001/ema/vae/model.safetensors", 2)
    assert same(models.initial("vae/ltx", str(run)).model, averaged)


def test_what_is_wrong_with_shards_is_said(tmp_path: Path) -> None:
    file = models.save(models.build("vae/ltx", "tiny"), tmp_path) / "model.safetensors"
    assert weight_files(file) == [file]
    spread(file)
    assert [path.name[:11] for path in weight_files(file)] == ["model-00001", "model-00002", "model-00003"]
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors does not exist"):
        read_weights(file, "cpu")
    for content in ("[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match="index.json is damaged: it must map names of tensors to files beside it"):
            weight_files(file)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert weight_files(file) == []
    with pytest.raises(CheckpointError, match="model.safetensors does not exist"):
        read_weights(file, "cpu")
