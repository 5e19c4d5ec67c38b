"""Which frame stands for a latent frame, and whom the regularisation trains (spec A.4, F-CV-VAE 5 and 6)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from videofm.config.autoencoder import AutoencoderConfig
from videofm.errors import ConfigError
from videofm.objectives.autoencoder import AutoencoderObjective
from videofm.objectives.latent_regularisation import check_image_vae, map_frames
from videofm.objectives.terms import weight_at
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch, Compression, Posterior

GROUP = 4


class ToyVAE(nn.Module):
    """Encodes by averaging 2x2 pixels and groups of `time` frames (frame 0 alone) times `scale`, decodes by repeating."""

    timestep_conditioning = False
    latent_channels = 3

    def __init__(self, time: int, scale: float = 1.0) -> None:
        super().__init__()
        self.compression = Compression(time, 2, 2)
        self.encode_scale, self.decode_scale = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(scale))

    def encode(self, video: Tensor) -> Posterior:
        cells = nn.functional.avg_pool3d(video, (1, 2, 2))
        first, rest = cells[:, :, :1], cells[:, :, 1:].unflatten(2, (-1, self.compression.time))
        rest = rest[:, :, :, -1]
        mean = torch.cat([first, rest], dim=2) * self.encode_scale
        return Posterior(mean, torch.full_like(mean, -30.0))

    def decode(self, latents: Tensor, sigma: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        first, rest = latents[:, :, :1], latents[:, :, 1:].repeat_interleave(self.compression.time, dim=2)
        frames = torch.cat([first, rest], dim=2) * self.decode_scale
        return frames.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)


def make_batch(size: int = 2, num_frames: int = 9) -> Batch:
    video = torch.rand(size, 3, num_frames, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(video, [""] * size, torch.ones(size), [str(index) for index in range(size)], 0, size)


def objective(**regularisation: object) -> AutoencoderObjective:
    """Nothing but the regularisation."""
    off = {"weight": 0.0}
    fields = {"kind": "autoencoder", "l1": off, "kl": off, "latent_regularisation": regularisation}
    return AutoencoderObjective(AutoencoderConfig.model_validate(fields))


def gradients(model: nn.Module) -> dict[str, bool]:
    return {name: value.grad is not None and bool(value.grad.any()) for name, value in model.named_parameters()}


@pytest.mark.parametrize("mapping", ["first", "slice", "average", "random"])
def test_every_mapping_keeps_frame_0_and_gives_one_frame_a_latent(mapping: str) -> None:
    video = make_batch().video
    mapped = map_frames(video, GROUP, mapping, torch.rand(2, 9))
    assert mapped.frames.shape == (2, 3, 3, 8, 8)
    assert torch.equal(mapped.frames[:, :, 0], video[:, :, 0])
    assert mapped.num_compared == (1 if mapping == "first" else 3)
    image = map_frames(video[:, :, :1], GROUP, mapping, torch.rand(2, 1))
    assert torch.equal(image.frames, video[:, :, :1])


def test_slice_and_average() -> None:
    video = make_batch().video
    assert torch.equal(map_frames(video, GROUP, "slice", torch.rand(2, 9)).frames, video[:, :, ::GROUP])
    means = map_frames(video, GROUP, "average", torch.rand(2, 9)).frames
    torch.testing.assert_close(means[:, :, 2], video[:, :, 5:9].mean(dim=2))


def test_random_is_uniform_in_its_group() -> None:
    """Pixels hold their frame's number: group j gives frames 4j+1 .. 4j+4, each in a quarter of 4000 draws (3 degrees of
    freedom: chi-square below 16.3 with probability 0.999)."""
    video = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(4000, 1, 9, 1, 1)
    uniform = torch.rand(4000, 9, generator=torch.Generator().manual_seed(0))
    chosen = map_frames(video, GROUP, "random", uniform).frames[:, 0, 1:, 0, 0]
    for group in range(2):
        counts = torch.bincount(chosen[:, group].long(), minlength=9)
        inside = counts[4 * group + 1 : 4 * group + 5]
        assert inside.sum() == 4000
        assert ((inside - 1000.0).square() / 1000).sum() < 16.3


def test_decoder_form_trains_the_video_encoder_alone() -> None:
    vae, image_vae = ToyVAE(GROUP, 0.9), ToyVAE(1, 0.8).requires_grad_(False)
    batch = make_batch()
    loss = objective(mapping="slice").loss(
        {"vae": vae, "image_vae": image_vae}, batch, KeyedRng(0, 0, batch.sample_ids), "generator"
    )
    loss.total.backward()
    assert gradients(vae) == {"encode_scale": True, "decode_scale": False}
    assert gradients(image_vae) == {"encode_scale": False, "decode_scale": False}


def test_encoder_form_trains_the_video_decoder_alone() -> None:
    vae, image_vae = ToyVAE(GROUP, 0.9), ToyVAE(1, 0.8).requires_grad_(False)
    batch = make_batch()
    fields = {"decoder": {"weight": 0.0}, "encoder": {"weight": 1.0}, "mapping": "slice"}
    roles = {"vae": vae, "image_vae": image_vae}
    objective(**fields).loss(roles, batch, KeyedRng(0, 0, batch.sample_ids), "generator").total.backward()
    assert gradients(vae) == {"encode_scale": False, "decode_scale": True}
    assert gradients(image_vae) == {"encode_scale": False, "decode_scale": False}


@pytest.mark.parametrize("mapping", ["first", "slice"])
def test_an_inflated_vae_starts_at_the_image_vaes_own_error(mapping: str) -> None:
    """The toys are an image VAE and its inflation: E_v(X) is E_i of every fourth frame. So the decoder form is
    `|psi(X) - D_i(E_i(psi(X)))|`, the image VAE's own reconstruction error on the frames that are compared."""
    vae, image_vae, batch = ToyVAE(GROUP), ToyVAE(1), make_batch()
    roles = {"vae": vae, "image_vae": image_vae}
    loss = objective(mapping=mapping).loss(roles, batch, KeyedRng(0, 0, batch.sample_ids), "generator")
    frames = batch.video[:, :, ::GROUP][:, :, : 1 if mapping == "first" else None]
    own = (image_vae.decode(image_vae.encode(frames).mean) - frames).abs().flatten(1).mean(dim=1)
    torch.testing.assert_close(loss.total, own.sum(), rtol=0, atol=1e-5)
    torch.testing.assert_close(loss.metrics["image_decoder"], own.sum(), rtol=0, atol=1e-5)


def test_weights_start_and_ramp() -> None:
    """Weight 2 from step 3 on, over 4 steps: 0.5, 1, 1.5, 2, 2."""
    term = AutoencoderConfig.model_validate(
        {"kind": "autoencoder", "wavelet": {"weight": 2.0, "start_step": 3, "ramp_steps": 4}}
    ).wavelet
    assert [weight_at(term, step) for step in (0, 2, 3, 4, 5, 6, 7)] == [0, 0, 0.5, 1.0, 1.5, 2.0, 2.0]


def test_image_vaes_that_do_not_fit() -> None:
    config = objective().config.latent_regularisation
    assert config is not None
    with pytest.raises(ConfigError, match="role image_vae compresses time by 4; it must encode frame by frame"):
        check_image_vae(config, ToyVAE(GROUP), ToyVAE(GROUP))
    other = ToyVAE(1)
    other.latent_channels = 16
    with pytest.raises(ConfigError, match="the image VAE has 16 channels at 1/2, the video VAE 3 at 1/2: they must agree"):
        check_image_vae(config, ToyVAE(GROUP), other)
