"""The metric of latent tokenizers on stored clips, against the same numbers by another path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.demo_shards import write_demo_shards
from videofm import models
from videofm.config import EvaluateConfig
from videofm.data import decode
from videofm.data.loader import video_tensor
from videofm.data.manifest import Manifest
from videofm.data.shards import read_clip
from videofm.errors import CheckpointError, ConfigError
from videofm.run_dir import RunDirectory
from videofm.stages import evaluate

SIZE = {"num_frames": 9, "height": 32, "width": 32}
QUANTIZER = {"kind": "vq", "codebook_size": 32, "dim": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, and what a run of a tokenizer leaves: its checkpoint and its frozen VAE. Also one whose VAE is another."""
    folder = tmp_path_factory.mktemp("evaluate_arlon")
    write_demo_shards(folder / "clips", num_clips=5, num_shards=1, num_frames=9, held_out=3)
    torch.manual_seed(0)
    vae = models.build("vae/ltx", "tiny")
    vae.set_latent_statistics(torch.linspace(-0.5, 0.5, 16), torch.linspace(0.5, 2.0, 16))
    tokenizer = models.build("arlon/tokenizer", "tiny", widths=[8, 8], num_groups=4, quantizer=QUANTIZER)
    for name, frozen in (("run", vae), ("other", models.build("vae/ltx", "tiny", latent_channels=4))):
        step = folder / name / "checkpoints" / "step_00000001"
        models.save(tokenizer, step / "models" / "tokenizer")
        (step / "COMMITTED.json").write_text("{}")
        models.save(frozen, folder / name / "frozen" / "vae")
    models.save(vae, folder / "vae")
    return folder


def measure(folder: Path, run: str, tmp_path: Path) -> dict[str, Any]:
    metric = {"kind": "tokenizer", "run": str(folder / run), "manifest": str(folder / "clips"), "batch_size": 2, **SIZE}
    config = EvaluateConfig.model_validate({"kind": "evaluate", "metrics": [metric]})
    result: dict[str, Any] = evaluate.run(config, RunDirectory(tmp_path))["metrics"][0]
    return result


def held_out_clips(folder: Path) -> torch.Tensor:
    manifest, decoder = Manifest.load(str(folder / "clips")), decode.choose("auto")
    records = manifest.records("held_out")
    return torch.cat([
        video_tensor(decoder.read(read_clip(str(folder / "clips"), record), range(9))[None]) for record in records
    ])  # fmt: skip


def test_numbers_by_another_path(folder: Path, tmp_path: Path) -> None:
    """All held-out clips at once through `forward`, in place of tokens and back in batches of two; PSNR by its formula."""
    found = measure(folder, "run", tmp_path)
    video = held_out_clips(folder)
    vae, tokenizer = models.load(folder / "run", role="vae"), models.load(folder / "run", role="tokenizer")
    with torch.no_grad():
        z = vae.normalize(vae.encode(video).mode())
        out = tokenizer(z)
        error = (out.features - z).square().sum() / (z - z.mean(dim=(0, 2, 3, 4), keepdim=True)).square().sum()
        videos = [vae.decode(vae.denormalize(x)).clamp(-1, 1) for x in (out.features, z)]
        errors = [(made - video).square().mean(dim=(1, 2, 3, 4)) for made in videos]
        decibels = [float((10 * (4 / each).log10()).mean()) for each in errors]
    assert found["num_clips"] == len(video) == 3 and found["num_tokens"] == 3 * 3 * 2 * 2
    assert found["relative_mse"] == pytest.approx(float(error), rel=1e-4)
    assert [found["psnr"], found["psnr_of_latents"]] == pytest.approx(decibels, rel=1e-4)
    # 36 boxes, and 32 codes: close to the boxes' own means, and above them.
    assert found["relative_mse_box_mean"] < found["relative_mse_nearest_mean"] < found["relative_mse_box_mean"] + 0.1
    used = out.quantized.indices.unique()
    assert found["usage"] == pytest.approx(len(used) / 32) and found["dead"] == 32 - len(used) and found["bits_per_token"] == 5
    assert found["rate"] == [1, 2, 2] and found["clip"] == [9, 32, 32]


def test_what_is_no_tokenizer_or_of_another_vae(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for 16 latent channels, and the VAE has 4"):
        measure(folder, "other", tmp_path)
    with pytest.raises(ConfigError, match="holds vae/ltx, which is no latent tokenizer"):
        measure(folder, "vae", tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        measure(folder, "nothing", tmp_path)
