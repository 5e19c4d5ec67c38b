"""Differences of checkpoints: distances against closed forms, every kind of change, whole files against shards."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.checkpoint.written import CONFIG, tiny_dit, write_step
from videofm import models
from videofm.checkpoint import difference
from videofm.checkpoint.difference import distance_of
from videofm.errors import CheckpointError

WEIGHTS = "models/dit/model.safetensors"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and its copy."""
    a = write_step(tmp_path / "run", 5, {"dit": tiny_dit(1)}, ema={"dit": tiny_dit(2)})
    return a, shutil.copytree(a, tmp_path / "copy")


def edit(folder: Path, change: Any, file: str = WEIGHTS) -> None:
    """Let `change` alter the tensors of a file."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def test_a_copy_does_not_differ(pair: tuple[Path, Path]) -> None:
    found = difference.compare(*pair)
    assert not found.differs() and not found.values
    groups = {tensor.group for tensor in found.tensors}
    assert groups == {"models/dit/model", "ema/dit/model", "optimizer/train"}
    assert len(found.tensors) == sum(len(load_file(path)) for path in pair[0].rglob("*.safetensors"))
    assert all(tensor.distance is not None and tensor.distance.cosine == pytest.approx(1.0) for tensor in found.tensors)


def test_one_element_is_found_and_measured(pair: tuple[Path, Path]) -> None:
    """An element that is moved by 0.25: that is the largest difference, and no other tensor is named."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["proj_in.weight"].view(-1)[7] += 0.25

    before = load_file(pair[0] / WEIGHTS)["proj_in.weight"].double()
    edit(pair[1], change)
    found = difference.compare(*pair)
    (changed,) = [tensor for tensor in found.tensors if tensor.differs(0.0)]
    assert (changed.group, changed.name, changed.kind) == ("models/dit/model", "proj_in.weight", "values")
    after = load_file(pair[1] / WEIGHTS)["proj_in.weight"].double()  # the sum was rounded to float32
    assert changed.distance is not None and changed.distance.num_different == 1
    assert changed.distance.largest == pytest.approx(0.25, rel=1e-6)
    assert changed.distance.relative == pytest.approx(0.25 / float(torch.stack([before, after]).abs().max()), rel=1e-6)
    cosine = float((before * after).sum() / before.norm() / after.norm())
    assert changed.distance.cosine == pytest.approx(cosine, rel=1e-9)
    assert found.differs(0.2) and not found.differs(0.3)


def test_each_kind_of_change_is_named(pair: tuple[Path, Path]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = sorted(tensors)
        del tensors[names[0]]
        tensors[names[1]] = tensors[names[1]].reshape(-1, 1)
        tensors[names[2]] = tensors[names[2]].double()
        tensors["new"] = torch.zeros(2)

    names = sorted(load_file(pair[0] / WEIGHTS))
    edit(pair[1], change)
    found = {tensor.name: tensor for tensor in difference.compare(*pair).tensors if tensor.differs(math.inf)}
    kinds = {name: tensor.kind for name, tensor in found.items()}
    assert kinds == {names[0]: "only in A", names[1]: "shape", names[2]: "dtype", "new": "only in B"}
    assert found[names[2]].detail == "F32 | F64" and found[names[2]].distance is not None


def test_a_whole_group_that_is_absent_is_named(pair: tuple[Path, Path]) -> None:
    shutil.rmtree(pair[1] / "ema")
    found = [tensor for tensor in difference.compare(*pair).tensors if tensor.differs(math.inf)]
    assert {(tensor.group, tensor.kind) for tensor in found} == {("ema/dit/model", "only in A")}
    assert len(found) == len(load_file(pair[0] / "ema/dit/model.safetensors"))


def test_shards_are_the_file_that_they_were_cut_from(tmp_path: Path) -> None:
    one = write_step(tmp_path / "one", 5, {"dit": tiny_dit(1)})
    four = write_step(tmp_path / "four", 5, {"dit": tiny_dit(1)}, num_ranks=4)
    assert len(list((four / "models/dit").glob("model-*-of-00004.safetensors"))) == 4
    found = difference.compare(one, four)
    assert not found.differs() and len(found.tensors) == sum(len(load_file(path)) for path in one.rglob("*.safetensors"))


def test_config_keys_on_which_results_depend_count_and_others_are_told(tmp_path: Path) -> None:
    """A rate decides; a ZeRO stage does not."""
    a = write_step(tmp_path / "a", 5, {"dit": tiny_dit(1)}, config={**CONFIG, "parallel": {"zero_stage": 1}})
    b = write_step(tmp_path / "b", 5, {"dit": tiny_dit(1)}, config={**CONFIG, "parallel": {"zero_stage": 3}})
    (value,) = difference.compare(a, b).values
    assert (value.file, value.key, value.a, value.b) == ("train_config.json", "parallel.zero_stage", 1, 3)
    assert not value.decides and not difference.compare(a, b).differs()
    c = write_step(tmp_path / "c", 5, {"dit": tiny_dit(1)}, config={**CONFIG, "optimizer": {"lr": 0.02}})
    deciding = {value.key for value in difference.compare(a, c).values if value.decides}
    assert deciding == {"optimizer.lr"} and difference.compare(a, c).differs()
    d = write_step(tmp_path / "d", 5, {"dit": tiny_dit(1)}, config={**CONFIG, "of_another_version": 1})
    assert {value.key for value in difference.compare(a, d).values if value.decides} >= {"of_another_version"}


def test_two_models_are_compared_whatever_their_files_are_called(tmp_path: Path) -> None:
    model = tiny_dit(1)
    save_file(models.weights(model), tmp_path / "diffusion_pytorch_model.safetensors")
    models.save(model, tmp_path / "folder")
    found = difference.compare(tmp_path / "folder", tmp_path / "diffusion_pytorch_model.safetensors")
    assert len(found.tensors) > 5 and not any(tensor.differs(0.0) for tensor in found.tensors)


@pytest.mark.parametrize("piece", [1 << 22, 3])
def test_distances_have_their_closed_forms(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """(3, 4) and (4, 3): 24 / 25, and 1 of at most 4; the same where a tensor is read in pieces."""
    monkeypatch.setattr(difference, "_PIECE", piece)
    found = distance_of(torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.tensor([4.0, 3.0, 0.0, 0.0]))
    assert (found.num_different, found.largest, found.relative) == (2, 1.0, 0.25)
    assert found.cosine == pytest.approx(24 / 25, abs=1e-15)
    opposite = distance_of(torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0]))
    assert opposite.cosine == pytest.approx(-1.0) and opposite.relative == 2.0
    nothing = distance_of(torch.zeros(2, 0), torch.zeros(2, 0))
    assert (nothing.num_different, nothing.cosine) == (0, 1.0)
    assert distance_of(torch.zeros(3), torch.ones(3)).cosine == 0.0


def test_what_is_not_finite_is_equal_to_itself_only() -> None:
    nan, inf = math.nan, math.inf
    same = distance_of(torch.tensor([nan, inf, -inf, 1.0]), torch.tensor([nan, inf, -inf, 1.0]))
    assert (same.num_different, same.largest, same.cosine) == (0, 0.0, None)
    for other in ([nan, 1.0], [inf, 1.0]):
        assert distance_of(torch.tensor([1.0, 1.0]), torch.tensor(other)).largest == inf
    assert distance_of(torch.tensor([inf]), torch.tensor([-inf])).largest == inf


def test_json_has_no_infinity(pair: tuple[Path, Path]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["proj_in.weight"].view(-1)[7] = math.inf

    edit(pair[1], change)
    (told,) = json.loads(json.dumps(difference.compare(*pair).to_json(0.0), allow_nan=False))["tensors"]
    assert told["distance"] == {"num_different": 1, "largest": None, "relative": None, "cosine": None}


def test_integers_that_no_float_tells_apart_differ() -> None:
    """2^53 and 2^53 + 1 are one number in float64."""
    found = distance_of(torch.tensor([2**53]), torch.tensor([2**53 + 1]))
    assert found.num_different == 1
    assert difference.TensorChange("g", "n", "values", "", found).differs(0.0)


def test_places_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="holds no .safetensors file: give a run"):
        difference.compare(tmp_path, tmp_path)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no .safetensors file. Nothing else is read"):
        difference.compare(tmp_path / "model.pt", tmp_path)
