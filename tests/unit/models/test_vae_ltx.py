"""The LTX VAE against diffusers, and its laws (spec B, F-LTX)."""

import math

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo

from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models.vae.ltx import ADAPTER, LTXVAEConfig
from videofm.types import Compression

SMALL = {
    "0.9.0": {"encoder_widths": (8, 12, 16, 16), "decoder_widths": (16, 16, 12, 8)},
    "0.9.1": {"encoder_widths": (8, 12, 16, 16), "decoder_widths": (32, 16, 8)},
    "0.9.5": {"encoder_widths": (8, 8, 16, 16, 32), "decoder_widths": (32, 16, 8)},
    "tiny": {},
}
"""Overrides that shrink each release to a few thousand parameters without changing its structure."""


def small(version, **overrides):
    torch.manual_seed(0)
    if version != "tiny":
        release = models.config("vae/ltx", version)
        depths = {key: (1,) * len(getattr(release, key)) for key in ("encoder_depths", "decoder_depths")}
        overrides = {"latent_channels": 8} | depths | SMALL[version] | overrides
    model = models.build("vae/ltx", version, **overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialised noise scales and near-zero biases would hide mistakes
            if parameter.ndim != 0 and parameter.abs().max() < 0.1:
                parameter.normal_(std=0.1)
        model.latents_mean.normal_()
    return model


def diffusers_twin(model):
    theirs = AutoencoderKLLTXVideo.from_config(ADAPTER.public_config(model.config)).eval()
    theirs.load_state_dict(ADAPTER.to_public(model.state_dict()), strict=True)
    return theirs


def clip(model, num_latent_frames=2, cells=2, batch=2):
    c = model.compression
    return torch.rand(batch, 3, 1 + c.time * (num_latent_frames - 1), c.height * cells, c.width * cells) * 2 - 1


@pytest.mark.parametrize("version", SMALL)
@torch.no_grad()
def test_equal_to_diffusers(version):
    """Moments, and decoding at a noise level with the same noise maps: our generator and theirs start at one seed."""
    model = small(version)
    theirs, video = diffusers_twin(model), clip(model)
    ours, reference = model.encode(video), theirs.encode(video).latent_dist
    torch.testing.assert_close(ours.mean, reference.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logvar, reference.logvar, rtol=0, atol=1e-5)

    sigma = torch.tensor([0.05, 0.2]) if model.config.timestep_conditioning else None
    decoded = model.decode(reference.mean, sigma, torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    expected = theirs.decode(reference.mean, sigma).sample
    assert decoded.shape == video.shape
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", SMALL)
def test_layout_is_that_of_diffusers_both_ways(version):
    model = small(version)
    theirs = diffusers_twin(model)
    assert theirs.temporal_compression_ratio == model.compression.time
    assert theirs.spatial_compression_ratio == model.compression.height == model.compression.width
    back = ADAPTER.from_public(theirs.state_dict())
    model.load_state_dict(back, strict=True)
    assert ADAPTER.config_from_public(dict(theirs.config)) == model.config


@pytest.mark.parametrize(
    ("size", "encoder", "decoder", "num_tensors"),
    [
        ("0.9.0", 180_404_353, 238_789_296, 190),
        ("0.9.1", 180_404_353, 754_572_081, 294),
        ("0.9.5", 694_098_881, 552_814_641, 226),
    ],
)
def test_sizes_of_the_releases(size, encoder, decoder, num_tensors):
    """Spec B.3, measured on the released weights."""
    model = models.build("vae/ltx", size, device="meta")
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    assert len(model.state_dict()) == num_tensors
    assert model.compression == Compression(8, 32, 32)
    with torch.device("meta"):
        theirs = AutoencoderKLLTXVideo.from_config(ADAPTER.public_config(model.config))
    assert set(ADAPTER.to_public(model.state_dict())) == set(theirs.state_dict())


def test_tiny_fits_the_quickstart():
    model = models.build("vae/ltx", "tiny")
    posterior = model.encode(torch.zeros(1, 3, 9, 32, 32))
    assert model.compression == Compression(4, 8, 8)
    assert posterior.mean.shape == (1, 16, 3, 4, 4)
    assert model.latent_channels == 16
    assert (model.encoder_causal, model.decoder_causal, model.strictly_causal) == (True, False, False)


@pytest.mark.parametrize("version", SMALL)
@torch.no_grad()
def test_the_encoder_is_causal(version):
    """Frames from the second latent frame's end onwards are perturbed: latent frames 0 and 1 stay bitwise equal."""
    model = small(version)
    video = clip(model, num_latent_frames=4, cells=1)
    changed = video.clone()
    changed[:, :, 1 + model.compression.time :] *= -0.5
    first, second = model.encode(video), model.encode(changed)
    assert torch.equal(first.mean[:, :, :2], second.mean[:, :, :2])
    assert not torch.equal(first.mean[:, :, 2:], second.mean[:, :, 2:])
    prefix = model.encode(video[:, :, : 1 + model.compression.time])
    torch.testing.assert_close(prefix.mean, first.mean[:, :, :2], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_centred_encoder_is_not_causal():
    """The negative control of the test above."""
    model = small("tiny", encoder_causal=False)
    video = clip(model, num_latent_frames=4, cells=1)
    changed = video.clone()
    changed[:, :, 1 + model.compression.time :] *= -0.5
    assert not torch.equal(model.encode(video).mean[:, :, :2], model.encode(changed).mean[:, :, :2])


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_decoder_causality_is_what_the_config_says(causal):
    model = small("tiny", decoder_causal=causal)
    latents = torch.randn(1, 16, 4, 2, 2)
    error = (model.decode(latents[:, :, :2]) - model.decode(latents)[:, :, :5]).abs().max()
    assert (error < 1e-5) if causal else (error > 1e-2)
    assert model.strictly_causal is causal


@torch.no_grad()
def test_one_log_variance_for_all_channels():
    model = small("tiny")
    logvar = model.encode(clip(model)).logvar
    assert torch.equal(logvar, logvar[:, :1].expand_as(logvar))


@torch.no_grad()
def test_injected_noise_comes_from_the_generator_and_starts_at_zero():
    model = small("0.9.1")
    latents, sigma = torch.randn(1, 8, 2, 1, 1), torch.zeros(1)

    def decode(seed):
        return model.decode(latents, sigma, torch.Generator().manual_seed(seed))

    assert torch.equal(decode(0), decode(0))
    assert not torch.equal(decode(0), decode(1))
    with pytest.raises(ConfigError, match="injects noise: pass decode"):
        model.decode(latents, sigma)
    fresh = models.build("vae/ltx", "0.9.1", **SMALL["0.9.1"], latent_channels=8)
    assert all(not p.any() for name, p in fresh.named_parameters() if "noise_scale" in name)


@torch.no_grad()
def test_the_decoder_listens_to_sigma_when_conditioned():
    model = small("0.9.5")
    latents = torch.randn(1, 8, 2, 1, 1)
    assert not torch.equal(model.decode(latents, torch.zeros(1)), model.decode(latents, torch.ones(1)))
    with pytest.raises(ConfigError, match="conditioned on the noise level: pass"):
        model.decode(latents)
    with pytest.raises(ConfigError, match="not conditioned on the noise level"):
        small("tiny").decode(torch.zeros(1, 16, 1, 1, 1), torch.zeros(1))


def test_normalisation_and_its_inverse():
    model = models.build("vae/ltx", "tiny", scaling_factor=0.5)
    latents = torch.randn(4, 16, 3, 8, 8) * 3 + 2
    model.set_latent_statistics(latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4)))
    normal = model.normalize(latents)
    torch.testing.assert_close(normal.std(dim=(0, 2, 3, 4)), torch.full((16,), 0.5))
    torch.testing.assert_close(normal.mean(dim=(0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.denormalize(normal), latents)
    assert torch.equal(model.latent_statistics.mean, model.latents_mean)


@torch.no_grad()
def test_forward_reconstructs_from_mode_or_sample():
    model = small("tiny")
    video = clip(model)
    assert torch.equal(model(video), model.decode(model.encode(video).mode()))
    noise = torch.randn_like(model.encode(video).mean)
    assert not torch.equal(model(video, noise), model(video))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 32, 32), r"video has 8 frames; this VAE takes 1 \+ 4 \* n, the nearest are 5 and 9"),
        ((1, 3, 9, 36, 32), "height of 36 pixels; this VAE takes multiples of 8, the nearest: 32 and 40"),
        ((1, 3, 9, 32, 5), "width of 5 pixels; this VAE takes multiples of 8, the nearest: 8"),
        ((1, 4, 9, 32, 32), r"expected \(B, 3, T, H, W\)"),
    ],
)
def test_videos_that_do_not_fit(shape, message):
    with pytest.raises(DataError, match=message):
        models.build("vae/ltx", "tiny").encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"encoder_depths": (1, 1)}, r"encoder_depths has 2 entries \(1, 1\); .* it needs 5"),
        ({"encoder_downsample": ("conv", "cnov", "conv", "none")}, r"encoder_downsample has \['cnov'\]; there are: none, conv"),
        ({"encoder_downsample": ("conv", "spatial", "conv", "none")}, "mixes 'conv'"),
        ({"encoder_downsample": ("conv", "conv", "none", "none")}, "the encoder compresses by .* but the decoder expands"),
        ({"timestep_conditioning": True}, "decoder stage 2 starts with 512 channels but decoder_widths asks for 256"),
    ],
)
def test_configs_that_cannot_work(overrides, message):
    with pytest.raises(ConfigError, match=message):
        LTXVAEConfig(**overrides)


def test_foreign_keys_are_refused():
    with pytest.raises(CheckpointError, match=r"encoder\.extra is not in the public layout"):
        ADAPTER.from_public({"encoder.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"encoder\.extra is not a tensor of this model"):
        ADAPTER.to_public({"encoder.extra": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"unknown keys \['wings'\]"):
        ADAPTER.config_from_public({"_class_name": "AutoencoderKLLTXVideo", "wings": 2})


@pytest.mark.parametrize("version", SMALL)
@pytest.mark.parametrize("latent_chunks", [[1, 1, 1, 1], [1, 3], [2, 2], [3, 1]])
@torch.no_grad()
def test_streaming_equals_the_whole(version, latent_chunks):
    """Both ways, for every chunking that the frame rule allows; the decoder causal, which no release is."""
    model = small(version, decoder_causal=True)
    video, time = clip(model, num_latent_frames=4, cells=1), model.compression.time
    sigma = torch.tensor([0.05, 0.2]) if model.config.timestep_conditioning else None
    whole = model.encode(video).mean
    reference = model.decode(whole, sigma, torch.Generator().manual_seed(3))

    frames = [(count - (index == 0)) * time + (index == 0) for index, count in enumerate(latent_chunks)]
    cache, chunks = None, []
    for chunk in video.split(frames, dim=2):
        encoded = model.encode_stream(chunk, cache)
        cache = encoded.cache
        chunks.append(encoded.posterior.mean)
    torch.testing.assert_close(torch.cat(chunks, dim=2), whole, rtol=0, atol=2e-6 * float(whole.abs().max()))

    cache, chunks, generator = None, [], torch.Generator().manual_seed(3)
    for chunk in whole.split(latent_chunks, dim=2):
        decoded = model.decode_stream(chunk, cache, sigma, generator)
        cache = decoded.cache
        chunks.append(decoded.video)
    torch.testing.assert_close(torch.cat(chunks, dim=2), reference, rtol=0, atol=2e-6 * float(reference.abs().max()))


@torch.no_grad()
def test_a_stream_is_bitwise_where_shapes_agree():
    """The first chunk runs the same convolutions on the same shapes as that prefix alone."""
    model = small("tiny", decoder_causal=True)
    video = clip(model, num_latent_frames=3)
    prefix = video[:, :, : 1 + model.compression.time]
    assert torch.equal(model.encode_stream(prefix).posterior.mean, model.encode(prefix).mean)
    latents = model.encode(prefix).mean
    assert torch.equal(model.decode_stream(latents).video, model.decode(latents))


@torch.no_grad()
def test_what_cannot_stream_says_so():
    released = small("tiny")
    with pytest.raises(ConfigError, match="the decoder of this vae/ltx looks at later frames"):
        released.decode_stream(torch.zeros(1, 16, 1, 2, 2))
    with pytest.raises(ConfigError, match="the encoder of this vae/ltx looks at later frames"):
        small("tiny", encoder_causal=False).encode_stream(torch.zeros(1, 3, 5, 16, 16))
    first = released.encode_stream(torch.zeros(1, 3, 5, 16, 16))
    with pytest.raises(DataError, match=r"a chunk of 5 frames follows the first; .* 4 \* n in every later one"):
        released.encode_stream(torch.zeros(1, 3, 5, 16, 16), first.cache)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8), r"video is torch.uint8; expected floats in \[-1, 1\]"),
        (torch.full((1, 3, 5, 16, 16), 255.0), r"pixels lie in \[255, 255\]; expected \[-1, 1\]"),
        (
            torch.zeros(2, 3, 5, 16, 16).index_fill(2, torch.tensor([3]), math.nan),
            "frame 3 of sample 0 has pixels that are NaN",
        ),
    ],
)
def test_pixels_that_are_none(video, message):
    with pytest.raises(DataError, match=message):
        models.build("vae/ltx", "tiny").encode(video)


def test_latents_and_statistics_of_another_vae():
    model = models.build("vae/ltx", "tiny")
    with pytest.raises(DataError, match=r"latents have shape \(1, 128, 2, 4, 4\); this VAE decodes \(B, 16, T', H', W'\)"):
        model.decode(torch.zeros(1, 128, 2, 4, 4))
    with pytest.raises(DataError, match="but this VAE has 16 latent channels: they are another VAE's"):
        model.set_latent_statistics(torch.zeros(128), torch.ones(128))
    with pytest.raises(DataError, match="positive standard deviations"):
        model.set_latent_statistics(torch.zeros(16), torch.zeros(16))
