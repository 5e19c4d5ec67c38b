"""A VAE exported by itself: diffusers decodes the same frames, statistics travel along, the single file is the authors'."""

import json

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo

from videofm import models
from videofm.errors import ConfigError
from videofm.export import write_vae_folder
from videofm.export.vae_folder import ORIGINAL_FILE
from videofm.models.vae.statistics import apply_statistics


def vae(name="vae/ltx", **overrides):
    torch.manual_seed(0)
    model = models.build(name, "tiny", **overrides).eval()
    model.set_latent_statistics(torch.randn(model.latent_channels), torch.rand(model.latent_channels) + 0.5)
    return model


@torch.no_grad()
def test_diffusers_decodes_the_same_frames(tmp_path):
    ours = vae()
    folder = write_vae_folder(tmp_path / "vae", ours, num_statistics_clips=3)
    theirs = AutoencoderKLLTXVideo.from_pretrained(folder, local_files_only=True).eval()
    latents = torch.randn(1, 16, 3, 4, 4)
    torch.testing.assert_close(theirs.decode(latents).sample, ours.decode(latents), rtol=0, atol=1e-5)
    assert torch.equal(theirs.latents_mean, ours.latents_mean)


@pytest.mark.parametrize("name", ["vae/ltx", "vae/cv_vae", "vae/od_vae", "vae/step_video", "vae/image_kl"])
@torch.no_grad()
def test_every_vae_loads_back(name, tmp_path):
    """Weights from the public layout, statistics from the file beside it."""
    ours = vae(name)
    folder = write_vae_folder(tmp_path / "vae", ours, num_statistics_clips=3)
    back = models.load(folder)
    apply_statistics(back, folder)
    for key, tensor in ours.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], tensor, rtol=0, atol=0, msg=key)
    write_vae_folder(tmp_path / "vae", ours)
    assert not (tmp_path / "vae" / "latent_statistics.json").exists(), "an export is replaced as a whole"


@torch.no_grad()
def test_the_single_file_of_the_authors(tmp_path):
    ours = vae()
    folder = write_vae_folder(tmp_path / "vae", ours, original=True)
    back = models.load(folder / ORIGINAL_FILE)
    assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in ours.state_dict().items())
    with pytest.raises(ConfigError, match="vae/cv_vae has no original single file; these have one: vae/ltx"):
        write_vae_folder(tmp_path / "other", vae("vae/cv_vae"), original=True)


def test_another_folder_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not an exported folder \(it has no config.json\)"):
        write_vae_folder(tmp_path, vae())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_stored_in_bfloat16(tmp_path):
    folder = write_vae_folder(tmp_path / "vae", vae(), dtype="bf16")
    assert next(models.load(folder).parameters()).dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "AutoencoderKLLTXVideo"
