"""Averages of checkpoints: the numbers against float64 and longer, what is refused, and that everything reads the result."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.unit.checkpoint.written import CONFIG, TINY, tiny_dit, write_step
from videofm import models, sampling
from videofm.checkpoint import listing
from videofm.checkpoint.averaging import average
from videofm.checkpoint.tensors import TensorFiles
from videofm.config import ExportConfig
from videofm.errors import CheckpointError, ConfigError
from videofm.models.initial import initial
from videofm.run_dir import RunDirectory
from videofm.stages import export


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps of a DiT with a moving average, of which the second was written by two ranks."""
    for step, ranks in ((1, 1), (2, 2), (3, 1)):
        write_step(tmp_path / "run", step, {"dit": tiny_dit(step)}, ema={"dit": tiny_dit(10 + step)}, num_ranks=ranks)
    return tmp_path / "run"


def steps(run: Path, *wanted: int) -> list[Path]:
    return [run / "checkpoints" / f"step_{step:08d}" for step in wanted]


def weights_of(out: Path) -> dict[str, Tensor]:
    (file,) = out.glob("checkpoints/step_*/models/dit/model.safetensors")
    return load_file(file)


def longer(shares: list[float], sources: list[nn.Module]) -> dict[str, Tensor]:
    """The weighted mean in numpy's longest floats, rounded to float32 once."""
    states = [models.weights(model) for model in sources]
    total = np.longdouble(sum(map(np.longdouble, shares)))
    found = {}
    for name in states[0]:
        parts = [
            np.longdouble(share) * state[name].numpy().astype(np.longdouble)
            for share, state in zip(shares, states, strict=True)
        ]
        found[name] = torch.from_numpy((sum(parts) / total).astype(np.float32))
    return found


@pytest.mark.parametrize("shares", [None, [1.0, 2.0, 5.0]])
@pytest.mark.parametrize("ema", [False, True])
def test_the_average_is_that_of_longer_numbers(run: Path, tmp_path: Path, shares: list[float] | None, ema: bool) -> None:
    """To half a unit in the last place of float32 (2^-24), and a hair for ties that rounding twice decides otherwise."""
    made = average(steps(run, 1, 2, 3), tmp_path / "out", shares, ema)
    expected = longer(shares or [1.0] * 3, [tiny_dit(step + 10 * ema) for step in (1, 2, 3)])
    found = weights_of(made.folder)
    assert found.keys() == expected.keys() and made.roles == ["dit"] and not made.notes
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name].double(), value.double(), rtol=2**-23, atol=0)
    assert sum(torch.equal(found[name], value) for name, value in expected.items()) > len(expected) / 2


def test_sums_that_float32_loses_are_kept(tmp_path: Path) -> None:
    """(1e9 + 1 - 1e9) / 3 is a third; in float32 1e9 + 1 is 1e9, and it would be 0."""
    for step, value in ((1, 1e9), (2, 1.0), (3, -1e9)):
        write_step(tmp_path / "run", step, {"dit": tiny_dit(1)}, extra={"models/dit/model": {"scale": torch.full((2,), value)}})
    made = average(steps(tmp_path / "run", 1, 2, 3), tmp_path / "out")
    assert torch.allclose(weights_of(made.folder)["scale"], torch.tensor(1 / 3), rtol=1e-6)


def test_bfloat16_stays_what_it_is(tmp_path: Path) -> None:
    """Means of 1 and 1 + 2^-7, neighbours in bfloat16: halfway, rounded to even, 1; with weights 1 and 3 it is the other."""
    for step, value in ((1, 1.0), (2, 1.0 + 2**-7)):
        extra = {"models/dit/model": {"scale": torch.full((2,), value, dtype=torch.bfloat16)}}
        write_step(tmp_path / "run", step, {"dit": tiny_dit(1)}, extra=extra)
    for weights, wanted in ((None, 1.0), ([1.0, 3.0], 1.0 + 2**-7)):
        out = tmp_path / f"out_{wanted}"
        scale = weights_of(average(steps(tmp_path / "run", 1, 2), out, weights).folder)["scale"]
        assert scale.dtype == torch.bfloat16 and scale.tolist() == [wanted] * 2


def test_the_average_of_equal_models_is_that_model_to_the_last_bit(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_step(tmp_path / "run", step, {"dit": tiny_dit(7)})
    made = average(steps(tmp_path / "run", 1, 2, 3), tmp_path / "out", [0.1, 0.7, 0.3])
    expected = models.weights(tiny_dit(7))
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(made.folder).items())


def test_one_tensor_is_in_memory_at_a_time(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a tensor is read, no other one that was read is still held."""
    read, held, real = [], [], TensorFiles.tensor

    def tensor(self: TensorFiles, key: str) -> Tensor:
        held.append(sum(reference() is not None for reference in read))
        found = real(self, key)
        read.append(weakref.ref(found))
        return found

    monkeypatch.setattr(TensorFiles, "tensor", tensor)
    average(steps(run, 1, 2, 3), tmp_path / "out")
    assert len(held) == 3 * len(models.weights(tiny_dit(1))) and max(held) == 0


# -- what reads it


TOLD = {
    **CONFIG,
    "models": {"dit": {"name": "dit/ltx"}, "vae": {"name": "vae/ltx"}, "text_encoder": {"name": "text/t5"}},
    "objective": {"kind": "flow_matching", "causal_fix": True},
}


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    """Two steps of a DiT with all that sampling needs."""
    vae, encoder = models.build("vae/ltx", "tiny"), models.build("text/t5", "tiny", num_layers=1, max_length=16)
    fits = {"in_channels": vae.latent_channels, "caption_channels": encoder.config.width}
    run = tmp_path / "run"
    for step in (4, 8):
        write_step(run, step, {"dit": tiny_dit(step, **fits)}, config=TOLD)
    models.save(vae, run / "frozen" / "vae")
    models.save(encoder, run / "frozen" / "text_encoder")
    return run


def test_everything_that_reads_a_run_reads_an_average(whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = average(steps(whole_run, 4, 8), tmp_path / "out")
    expected = models.weights(tiny_dit(0, **_sizes(whole_run)))
    parts = [models.weights(models.load(folder)) for folder in steps(whole_run, 4, 8)]
    for name in expected:
        expected[name] = ((parts[0][name].double() + parts[1][name].double()) / 2).float()
    for place in (made.folder, made.folder / "checkpoints" / "step_00000008"):
        assert same(models.weights(models.load(place, role="dit")), expected)
        assert same(models.weights(models.load(place, role="vae")), models.weights(models.load(whole_run, role="vae")))
    assert same(models.weights(initial("dit/ltx", made.folder, role="dit").model), expected)
    assert sampling.Pipeline.load(made.folder, device="cpu").causal_fix, "the config of the training came along"
    videos = sampling.generate(made.folder, ["a red circle"], seed=1, num_frames=9, height=32, width=32, num_steps=2)
    assert videos.shape == (1, 3, 9, 32, 32) and bool(videos.isfinite().all())
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda _: None)  # the check by diffusers takes a process
    config = ExportConfig.model_validate({"kind": "export", "run": str(made.folder), "output": str(tmp_path / "exported")})
    export.run(config, RunDirectory(tmp_path / "export_run"))
    assert same(models.weights(models.load(tmp_path / "exported", component="transformer")), expected)
    assert [entry.damage for entry in listing.entries(made.folder)] == [None] and listing.damage(made.folder) == []


def _sizes(run: Path) -> dict[str, Any]:
    config = models.load(run, role="dit").config
    return {"in_channels": config.in_channels, "caption_channels": config.caption_channels}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_lineage_names_the_parents(run: Path, tmp_path: Path) -> None:
    made = average(steps(run, 1, 3), tmp_path / "out", [1, 3])
    lineage = json.loads((made.folder / "lineage.json").read_text())
    parents = lineage["average"]["parents"]
    assert [(parent["step"], parent["share"]) for parent in parents] == [(1, 0.25), (3, 0.75)]
    assert [parent["checkpoint"] for parent in parents] == [str(folder) for folder in steps(run, 1, 3)]
    again = average(steps(run, 1, 3), tmp_path / "again", [1, 3])
    other = average(steps(run, 1, 3), tmp_path / "other", [1, 2])
    prints = [RunDirectory(average_.folder).fingerprint for average_ in (made, again, other)]
    assert prints[0] == prints[1] != prints[2]


def test_an_average_can_be_averaged(run: Path, tmp_path: Path) -> None:
    first = average(steps(run, 1, 2), tmp_path / "first")
    second = average([*listing.finished_checkpoints(first.folder), *steps(run, 3)], tmp_path / "second", [2, 1])
    expected = longer([1.0] * 3, [tiny_dit(step) for step in (1, 2, 3)])
    for name, value in weights_of(second.folder).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8)


# -- what is refused


def test_wrong_requests(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes two or more different checkpoints"):
        average(steps(run, 1), tmp_path / "out")
    with pytest.raises(ConfigError, match="takes two or more different checkpoints"):
        average(steps(run, 1, 1), tmp_path / "out")
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ConfigError, match="give 2 positive numbers"):
            average(steps(run, 1, 2), tmp_path / "out", weights)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="full exists already: choose another folder"):
        average(steps(run, 1, 2), tmp_path / "full")
    assert not (tmp_path / "out").exists()


def refused(match: str, *folders: Path, ema: bool = False) -> None:
    """An error, and nothing left of it."""
    out = folders[0].parents[2] / "out"
    with pytest.raises(CheckpointError, match=match):
        average(folders, out, ema=ema)
    assert not list(out.parent.glob("*out*"))


def test_other_models_are_refused(run: Path, tmp_path: Path) -> None:
    other = write_step(tmp_path / "other", 1, {"dit": tiny_dit(1, num_layers=2)})
    refused("has another model as dit than .*: config.num_layers 2, not 1", *steps(run, 1), other)
    named = write_step(tmp_path / "named", 1, {"policy": tiny_dit(1)})
    refused("trained policy, .* dit: only checkpoints of the same models", *steps(run, 1), named)
    more = write_step(tmp_path / "more", 1, {"dit": tiny_dit(1)}, extra={"models/dit/model": {"more": torch.ones(2)}})
    refused(r"has other tensors as dit than .*: more \('F32', \(2,\)\), not no such tensor \(1 in all\)", *steps(run, 1), more)


def test_whole_numbers_must_agree(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        extra = {"models/dit/model": {"counter": torch.tensor([step // 3])}}
        write_step(tmp_path / "run", step, {"dit": tiny_dit(1)}, extra=extra)
    assert weights_of(average(steps(tmp_path / "run", 1, 2), tmp_path / "agree").folder)["counter"].tolist() == [0]
    refused("counter of dit is torch.int64 and differs between .*whole numbers have no average", *steps(tmp_path / "run", 1, 3))


def test_adapters_are_refused(run: Path) -> None:
    for folder in steps(run, 1, 2):
        described = json.loads((folder / "models/dit/model.json").read_text())
        lora = {**described, "lora": {"rank": 2, "alpha": 2.0, "targets": ["*"]}}
        (folder / "models/dit/model.json").write_text(json.dumps(lora))
    refused("are adapters: the average of their factors is not", *steps(run, 1, 2))


@pytest.mark.parametrize("ema", [False, True])
def test_damage_is_found_before_it_is_averaged(run: Path, ema: bool) -> None:
    """One flipped bit in a weight; the file that is not read may be damaged."""
    place = "ema" if ema else "models"
    for folder in steps(run, 1):
        path = folder / place / "dit/model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(f"the SHA-256 of {place}/dit/model.safetensors is not .*checkpoint verify", *steps(run, 1, 3), ema=ema)
    average(steps(run, 1, 3), run.parent / "other", ema=not ema)


def test_moving_averages_must_be_there_for_all_or_none(run: Path, tmp_path: Path) -> None:
    plain = [write_step(tmp_path / "plain", step, {"dit": tiny_dit(step)}) for step in (4, 5)]
    refused("has no moving average of dit, others have: leave out --ema", *steps(run, 1), plain[0], ema=True)
    made = average(plain, tmp_path / "made", ema=True)
    assert made.notes == ["dit has no moving average: its weights were averaged"]


def test_other_frozen_models_are_refused(whole_run: Path, tmp_path: Path) -> None:
    """Another VAE has other latents. Runs with the same one, as after fine-tuning on other data, can be averaged."""
    second = shutil.copytree(whole_run, tmp_path / "second")
    average([*steps(whole_run, 4), *steps(second, 8)], tmp_path / "made")
    models.save(models.build("vae/ltx", "tiny"), second / "frozen" / "vae")
    refused(r"was trained with another vae \(frozen/vae\) than", *steps(whole_run, 4), *steps(second, 8))
    shutil.rmtree(whole_run / "frozen" / "vae")
    refused(
        "was trained with vae, which should lie in .*frozen: give a checkpoint that is still in its run",
        *steps(whole_run, 4, 8),
    )


def test_objectives_that_differ_are_told(whole_run: Path, tmp_path: Path) -> None:
    changed = {**TOLD, "objective": {"kind": "flow_matching", "causal_fix": False}}
    sizes = _sizes(whole_run)
    write_step(whole_run, 9, {"dit": tiny_dit(9, **sizes)}, config=changed)
    (note,) = average(steps(whole_run, 4, 9), tmp_path / "out").notes
    assert "objectives differ" in note and "causal_fix False, not True" in note


def test_statistics_of_a_vae_are_not_averaged(tmp_path: Path) -> None:
    """Two encoders make two spaces of latents, and their average makes a third that nobody has measured."""
    config = {**CONFIG, "models": {"vae": {"name": "vae/ltx"}}, "objective": {"kind": "autoencoder"}}
    for step in (1, 2, 3):
        vae = models.build("vae/ltx", "tiny")
        size = vae.latent_channels
        if step > 1:
            vae.set_latent_statistics(torch.full((size,), 0.5), torch.full((size,), 2.0))
        write_step(tmp_path / "run", step, {"vae": vae}, config=config)
    made = average(steps(tmp_path / "run", 1, 2), tmp_path / "differ")
    vae = models.load(made.folder)
    assert vae.latents_mean.eq(0).all() and vae.latents_std.eq(1).all()
    assert len(made.notes) == 1 and "vae has no latent statistics" in made.notes[0] and "latent_diagnostics" in made.notes[0]
    agree = average(steps(tmp_path / "run", 2, 3), tmp_path / "agree")
    assert models.load(agree.folder).latents_mean.eq(0.5).all() and not agree.notes


def test_a_crash_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = TensorFiles.tensor, 0

    def failing(self: TensorFiles, key: str) -> Tensor:
        nonlocal count
        count += 1
        if count == 9:
            raise OSError(28, "No space left on device")
        return real(self, key)

    monkeypatch.setattr(TensorFiles, "tensor", failing)
    with pytest.raises(OSError, match="No space left"):
        average(steps(run, 1, 2), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert TINY["num_layers"] == 1 and count == 9, "the fault fired in the middle of a file"
