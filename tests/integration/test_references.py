"""Preference training that goes on where it was, with a reference that has a state: a second adapter, and measured errors."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import launch_ranks
from tests.unit.data.preferred import neighbours, write_candidates
from videofm import models
from videofm.config.train import TrainConfig
from videofm.data.manifest import Manifest
from videofm.data.preferences import write_preferences
from videofm.errors import CheckpointError

STEPS, HALF, PROMPTS = 5, 3, 5
REFERENCES = {
    "second_adapter": {"kind": "second_adapter", "refresh_every": 2},
    "cached": {"kind": "cached", "num_draws": 2},
}
FACTS = ("step", "loss", "margin", "winner_error", "winner_reference_error", "loser_reference_error", "grad_norm")


def config(folder: Path, reference: str, max_steps: int) -> TrainConfig:
    """Steps of two pairs, of five in all: epochs do not end with steps."""
    return TrainConfig.model_validate(
        {
            "kind": "train", "seed": 3,
            "models": {
                "dit": {"path": str(folder / "base"), "lora": {"rank": 2}},
                "vae": {"name": "vae/ltx"},
                "text_encoder": {"name": "text/t5"},
            },
            "objective": {"kind": "dpo", "reference": REFERENCES[reference], "beta": 200.0},
            "data": {
                "manifest": str(folder / "candidates"), "pairs": {"path": str(folder / "pairs")}, "start": "first",
                "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 1, "num_micro_batches": 2,
            },
            "optimizer": {"lr": 3e-2, "schedule": "constant"},
            "trainer": {"max_steps": max_steps, "precision": "fp32", "device": "cpu", "num_threads": 1},
            "wandb": {"mode": "disabled"},
        }
    )  # fmt: skip


def refusal(*arguments: Any) -> str:
    """What `train_here` raises."""
    with pytest.raises(CheckpointError) as caught:
        train_here(*arguments)
    return str(caught.value)


def train_here(folder: Path, name: str, reference: str, max_steps: int, attempt: int | str = 1) -> None:
    """Train in this process, as a rank does."""
    from videofm.run_dir import RunDirectory
    from videofm.train.worker import train

    os.environ["VIDEOFM_RENDEZVOUS"] = str(folder / f"rendezvous-{name}-{max_steps}-{attempt}")
    run = RunDirectory(folder / name)
    run.path.mkdir(exist_ok=True)
    train(config(folder, reference, max_steps), run, 1)


def run_rank(folder: Path) -> None:
    """Five steps; three and, from their checkpoint, two more; then what must be refused."""
    for reference in REFERENCES:
        train_here(folder, f"{reference}-straight", reference, STEPS)
        train_here(folder, f"{reference}-halves", reference, HALF)
        train_here(folder, f"{reference}-halves", reference, STEPS, 2)
    refused = {}
    halves, broken = folder / "cached-halves", folder / "broken"
    for case in ("weights", "damaged", "missing"):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(halves, broken)
        shutil.rmtree(broken / "checkpoints" / f"step_{STEPS:08d}")
        listing = broken / "reference_errors.json"
        if case == "weights":  # as if the run had started from others
            told = json.loads(listing.read_text())
            told["identity"]["weights"]["dit"] = "0" * 64
            listing.write_text(json.dumps(told))
        elif case == "damaged":
            save_file({"values": torch.zeros(PROMPTS, 2, 2, 1)}, broken / "reference_errors.safetensors")
        elif case == "missing":
            listing.unlink()
        refused[case] = refusal(folder, "broken", "cached", STEPS, case)
    (folder / "refused.json").write_text(json.dumps(refused))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    clips = write_candidates(folder / "candidates", PROMPTS)
    records = sorted(Manifest.load(clips).records(), key=lambda record: record.key)
    write_preferences(folder / "pairs", neighbours(records), clips)
    dit = models.build("dit/ltx", "tiny", num_layers=1)
    with torch.no_grad():  # a fresh transformer answers 0 whatever its adapters say
        for name, parameter in dit.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    models.save(dit, folder / "base")
    launch_ranks(__file__, 1, folder)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in FACTS} for row in lines]


@pytest.mark.parametrize("reference", REFERENCES)
def test_resuming_is_exact(runs: Path, reference: str) -> None:
    """Metrics and every tensor of the last checkpoint, bit for bit; and the policy has moved, so that there is something to
    keep."""
    straight, halves = runs / f"{reference}-straight", runs / f"{reference}-halves"
    assert rows(halves) == rows(straight) and [row["step"] for row in rows(straight)] == list(range(1, STEPS + 1))
    last = f"checkpoints/step_{STEPS:08d}"
    files = sorted(path.relative_to(straight / last) for path in (straight / last).rglob("*.safetensors"))
    assert (Path("models/dit/reference.safetensors") in files) == (reference == "second_adapter")
    for file in files:
        wanted, found = load_file(straight / last / file), load_file(halves / last / file)
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted), file
    assert max(abs(row["margin"]) for row in rows(straight)) > 1e-6


def test_the_second_adapter_is_the_learner_of_the_last_refresh(runs: Path) -> None:
    """`refresh_every: 2`: the learner before step 4 (the fifth), that is after four; the checkpoint after three has the one
    of before step 2."""
    run = runs / "second_adapter-straight"
    stored = load_file(run / f"checkpoints/step_{STEPS:08d}/models/dit/reference.safetensors")
    learner = load_file(run / f"checkpoints/step_{STEPS:08d}/models/dit/model.safetensors")
    assert {name.replace(".reference.", ".default.") for name in stored} == learner.keys()
    assert any(not torch.equal(stored[name], learner[name.replace(".reference.", ".default.")]) for name in stored)
    margins = [row["margin"] for row in rows(run)]
    assert [margin == 0.0 for margin in margins] == [True, False, True, False, True], "steps 0, 2 and 4 start anew"


def test_a_run_with_a_second_adapter_is_read_like_any_other(runs: Path) -> None:
    """`load` gives the base with the learner added; the second adapter is nowhere in it."""
    run = runs / "second_adapter-straight"
    loaded, base = models.load(run, "dit", ema=False), load_file(run / "base/dit/model.safetensors")
    assert loaded.state_dict().keys() == base.keys()
    learner = load_file(run / f"checkpoints/step_{STEPS:08d}/models/dit/model.safetensors")
    layer = "blocks.0.self_attention.q"
    product = learner[f"{layer}.lora_B.default.weight"] @ learner[f"{layer}.lora_A.default.weight"]
    torch.testing.assert_close(loaded.state_dict()[f"{layer}.weight"], base[f"{layer}.weight"] + product)


def test_errors_are_measured_once_and_are_those_of_the_first_policy(runs: Path) -> None:
    """Of each pair at two draws, winner and loser; in the log of the run the reference errors of a step are among them, and at
    the first step the policy's own are the same."""
    run = runs / "cached-halves"
    told = json.loads((run / "reference_errors.json").read_text())
    values = load_file(run / "reference_errors.safetensors")["values"]
    assert told["samples"] == [f"{prompt:06d}-000-{prompt:06d}-001" for prompt in range(PROMPTS)]
    assert values.shape == (PROMPTS, 2, 2, 1) and len(values.unique()) == values.numel()
    assert json.loads((runs / "cached-straight/reference_errors.json").read_text()) == told
    assert torch.equal(load_file(runs / "cached-straight/reference_errors.safetensors")["values"], values)
    for step, row in enumerate(rows(run)):
        means = [(a + b) / 2 for i, a in enumerate(values[:, step % 2, 0, 0]) for b in values[i + 1 :, step % 2, 0, 0]]
        assert any(row["winner_reference_error"] == pytest.approx(mean.item(), rel=1e-5) for mean in means), step
    first = rows(run)[0]
    assert first["winner_error"] == pytest.approx(first["winner_reference_error"], rel=1e-5)
    assert abs(first["margin"]) < 1e-6 < abs(rows(run)[1]["margin"])


def test_errors_of_something_else_are_refused(runs: Path) -> None:
    refused = json.loads((runs / "refused.json").read_text())
    assert "was measured on something else than this run starts from: they differ in weights" in refused["weights"]
    assert "is missing or damaged: its SHA-256 is not the one that reference_errors.json names" in refused["damaged"]
    assert "reference_errors.json is missing, and the weights that it was measured with have moved" in refused["missing"]


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
