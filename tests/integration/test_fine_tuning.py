"""Fine-tuning as a user runs it: from the weights of another run, adapters only, interrupted, sampled, exported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.demo_shards import write_demo_shards
from videofm import models
from videofm.checkpoint.save import read_tensors
from videofm.models.lora import is_lora

FROZEN = {"vae": {"name": "vae/ltx", "size": "tiny"}, "text_encoder": {"name": "text/t5", "size": "tiny"}}
CONFIG = {
    "kind": "train",
    "objective": {"kind": "flow_matching", "noise_levels": {"kind": "logit_normal"}},
    "optimizer": {"lr": 1e-2, "ema_decay": 0.9},
    "wandb": {"mode": "disabled"},
}


def videofm(*arguments: str) -> str:
    command = [sys.executable, "-m", "videofm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(folder: Path, name: str, dit: dict, *overrides: str) -> str:
    data = {"manifest": str(folder / "data"), "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 3}
    data |= {"num_micro_batches": 2, "cache_mib": 64}
    trainer = {"max_steps": 6, "precision": "fp32", "checkpoint_every": 3, "log_every": 1, "num_threads": 1}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(CONFIG | {"models": FROZEN | {"dit": dit}, "data": data, "trainer": trainer}))
    return videofm("train", str(path), "--run-dir", str(folder / name), *overrides)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with shards and a DiT that was trained for six steps."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    write_demo_shards(folder / "data", num_clips=24)
    train(folder, "dit", {"name": "dit/ltx", "size": "tiny"})
    return folder


@pytest.fixture(scope="module")
def adapted(work) -> Path:
    """A run that trained adapters on it."""
    train(work, "adapted", {"name": "dit/ltx", "init_from": str(work / "dit"), "role": "dit", "lora": {"rank": 4}})
    return work / "adapted"


def test_a_run_starts_from_the_weights_of_another(work, adapted) -> None:
    """They are those that it would sample with; the log says what matched."""
    before, base = models.load(work / "dit").state_dict(), load_file(adapted / "base" / "dit" / "model.safetensors")
    assert base.keys() == before.keys() and all(torch.equal(base[name], before[name]) for name in before)
    log = " ".join((adapted / "log.txt").read_text().split())
    assert f"dit/ltx starts from {work / 'dit'}: all 115 tensors matched by name and shape, none left over" in log
    assert "32 layers have adapters of rank 4, 32,768 parameters" in log


def test_only_adapters_are_in_a_checkpoint_and_they_moved(adapted) -> None:
    """4 blocks of 8 layers, two matrices each; `load` adds them to the base."""
    last = adapted / "checkpoints" / "step_00000006"
    for file in (last / "models" / "dit", last / "ema" / "dit"):
        tensors = load_file(file / "model.safetensors")
        assert len(tensors) == 64 and all(map(is_lora, tensors))
        assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    (state,) = (load_file(file) for file in (last / "optimizer").glob("*.safetensors"))
    assert {is_lora(name) for name in state if name.startswith("exp_avg.")} == {True}
    merged, base = models.load(adapted, "dit").state_dict(), load_file(adapted / "base" / "dit" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert merged.keys() == base.keys() and len(changed) == 32 and all("attention" in name for name in changed)


def test_adapters_resume_bitwise(work, adapted) -> None:
    """Without its last checkpoint the run goes on from step 3 and ends the same; on two ranks of ZeRO 3 to 1e-5."""
    last = Path("checkpoints") / "step_00000006"
    wanted = read_tensors(adapted / last, "models/dit/model")
    dit = {"name": "dit/ltx", "init_from": str(work / "dit"), "role": "dit", "lora": {"rank": 4}}
    for name, overrides, tolerance in (
        ("same", (), 0.0),
        ("sharded", ("parallel.data_degree=2", "parallel.zero_stage=3"), 1e-5),
    ):
        shutil.copytree(adapted, work / name)
        shutil.rmtree(work / name / "checkpoints" / "step_00000006")
        shutil.rmtree(work / name / "attempts")  # which say that it is finished
        assert "resuming from step_00000003" in train(work, name, dit, *overrides)
        found = read_tensors(work / name / last, "models/dit/model")
        assert found.keys() == wanted.keys()
        assert max((found[key] - wanted[key]).abs().max() for key in wanted) <= tolerance


def test_a_run_of_adapters_is_exported_merged_and_alone(work, adapted) -> None:
    """The pipeline has been loaded by diffusers when the verb is done; what `load_lora_weights` makes of adapters is a unit
    test of theirs.
    """

    def export(name: str, *overrides: str) -> str:
        return videofm("export", str(adapted), "--run-dir", str(work / f"{name}_run"), f"output={work / name}", *overrides)

    assert "loads in diffusers" in export("export")
    merged = models.load(adapted, "dit").state_dict()
    public = models.load(work / "export", component="transformer").state_dict()
    assert merged.keys() == public.keys() and all(torch.equal(merged[name], public[name]) for name in merged)
    export("alone", "adapter=true")
    assert [file.name for file in (work / "alone").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert len(load_file(work / "alone" / "pytorch_lora_weights.safetensors")) == 64
