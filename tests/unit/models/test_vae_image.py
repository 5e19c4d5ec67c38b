"""The image VAE against diffusers, whose model it wraps."""

import json
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models.spec import ParallelOptions
from videofm.models.vae.image_kl import ADAPTER, ImageKLConfig, parallelize
from videofm.types import Compression

SMALL = {"tiny": {}, "sd21": {"widths": (8, 16), "num_groups": 4}, "sd3": {"widths": (8, 16), "num_groups": 4}}


def small(size="tiny", **overrides):
    torch.manual_seed(0)
    return models.build("vae/image_kl", size, **SMALL[size], **overrides).eval()


@pytest.mark.parametrize("size", SMALL)
@torch.no_grad()
def test_each_frame_is_an_image_of_diffusers(size, tmp_path):
    """Written by us, read by diffusers: moments and images of every frame are theirs."""
    model = small(size)
    theirs = AutoencoderKL.from_pretrained(models.save_public(model, tmp_path)).eval()
    video = torch.rand(2, 3, 3, 16, 24) * 2 - 1
    posterior = model.encode(video)
    decoded = model.decode(posterior.mean)
    assert decoded.shape == video.shape
    for frame in range(3):
        reference = theirs.encode(video[:, :, frame]).latent_dist
        torch.testing.assert_close(posterior.mean[:, :, frame], reference.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.logvar[:, :, frame], reference.logvar, rtol=0, atol=1e-5)
        torch.testing.assert_close(decoded[:, :, frame], theirs.decode(reference.mean).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "num_parameters", "num_tensors"),
    [
        # The quant convs hold 8 * 8 + 8 + 4 * 4 + 4 = 92. With 16 channels `encoder.conv_out` has 24 more outputs of
        # 512 * 9 + 1, `decoder.conv_in` 12 * 9 * 512 more weights: 83,653,863 - 92 + 110,616 + 55,296.
        ("sd21", 83_653_863, 248),
        ("sd3", 83_819_683, 244),
    ],
)
def test_sizes(size, num_parameters, num_tensors):
    model = models.build("vae/image_kl", size, device="meta")
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert model.compression == Compression(1, 8, 8)
    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(ADAPTER.public_config(model.config))
    public = ADAPTER.to_public(model.state_dict())
    assert set(public) == set(theirs.state_dict())
    assert len(public) == num_tensors


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("size", SMALL)
def test_a_folder_of_diffusers_loads(size, old_names, tmp_path):
    """Also one with the attention names of old; the shift of the config becomes the mean of latents."""
    model = small(size)
    theirs = AutoencoderKL.from_config(ADAPTER.public_config(model.config))
    theirs.load_state_dict(ADAPTER.to_public(model.state_dict()))
    theirs.save_pretrained(tmp_path)
    if old_names:
        file, old = tmp_path / "diffusion_pytorch_model.safetensors", {"to_q": "query", "to_k": "key", "to_v": "value"}
        tensors = load_file(file)
        for new, name in (old | {"to_out.0": "proj_attn"}).items():
            tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        save_file(tensors, file)
    loaded = models.load(tmp_path)
    assert loaded.spec_name == "vae/image_kl"
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    latents = torch.randn(1, loaded.latent_channels, 2, 2, 2)
    shift, scale = model.config.shift_factor, model.config.scaling_factor
    torch.testing.assert_close(loaded.normalize(latents), (latents - shift) * scale)


def test_save_and_load_in_our_layout(tmp_path):
    model = small("sd21")
    loaded = models.load(models.save(model, tmp_path))
    assert loaded.config == model.config
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_a_config_that_says_little_has_the_defaults_of_diffusers():
    theirs = AutoencoderKL()
    ours = ADAPTER.config_from_public({"_class_name": "AutoencoderKL", "_diffusers_version": "0.2"})
    model = models.model_spec("vae/image_kl").build(ours)
    assert {key: x.shape for key, x in ADAPTER.to_public(model.state_dict()).items()} == {
        key: x.shape for key, x in theirs.state_dict().items()
    }
    assert ADAPTER.config_from_public(json.loads(theirs.to_json_string())) == ours


@torch.no_grad()
def test_streaming_and_causality():
    """Frames know nothing of each other: any chunks give the whole, and prefixes are prefixes."""
    model = small()
    assert model.strictly_causal
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    whole = model.encode(video).mean
    first = model.encode_stream(video[:, :, :2])
    second = model.encode_stream(video[:, :, 2:], first.cache)
    chunks = torch.cat([first.posterior.mean, second.posterior.mean], dim=2)
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-6)
    opened = model.decode_stream(whole[:, :, :3])
    rest = model.decode_stream(whole[:, :, 3:], opened.cache)
    torch.testing.assert_close(torch.cat([opened.video, rest.video], dim=2), model.decode(whole), rtol=0, atol=1e-5)
    assert (model.latent_frames(5), model.pixel_frames(5)) == (5, 5)


def test_it_trains():
    """A few steps towards one clip lower its error, through every parameter of encoder and decoder."""
    model = small().train()
    video, optimizer = torch.rand(1, 3, 2, 16, 16) * 2 - 1, torch.optim.Adam(model.parameters(), lr=2e-3)
    errors = []
    for _ in range(8):
        loss = (model(video) - video).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.8 * errors[0]
    assert all(p.grad is not None for p in model.parameters())
    assert model.last_layer is model.image_vae.decoder.conv_out.weight


def test_bad_requests(monkeypatch):
    model = small()
    with pytest.raises(DataError, match="height of 20 pixels; this VAE takes multiples of 8"):
        model.encode(torch.zeros(1, 3, 1, 20, 16))
    with pytest.raises(ConfigError, match=r"widths \(8, 12\) must be multiples of num_groups \(8\); not so: \[12\]"):
        ImageKLConfig(widths=(8, 12), num_groups=8)
    with pytest.raises(ConfigError, match="runs the attention of diffusers, which is sdpa, not 'math'"):
        parallelize(model, options=ParallelOptions(attention="math"))
    assert parallelize(model, options=ParallelOptions(attention="sdpa")) is model
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        ConfigError, match=r"needs diffusers, which is not installed \(pip install -c constraints\.txt -e '\.\[export\]'\)"
    ):
        small()


def test_foreign_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"encoder\.wings is not in the public layout"):
        ADAPTER.from_public({"encoder.wings": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"encoder\.wings is not a tensor of this model"):
        ADAPTER.to_public({"encoder.wings": torch.zeros(1)})
    folder = models.save_public(small(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"act_fn": "gelu"}, r"vae/image_kl can hold: \{'act_fn': 'gelu'\}"),
        ({"wings": 2}, r"can hold: \{'wings': 2\}"),
        ({"latents_mean": [0.1] * 4}, "'latents_mean'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "'down_block_types'"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=message):
            models.load(folder)
