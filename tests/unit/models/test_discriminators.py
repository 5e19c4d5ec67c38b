"""The 3D patch discriminator against a computation written out from the authors' layout, and its laws (spec A.5, F-CV-9)."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models.discriminators.patchgan_3d import SPEC, PatchGAN3dConfig
from videofm.objectives.adversarial import hinge_discriminator, reconstruction_gan_discriminator

NAME = "discriminator/patchgan_3d"
SIZES = ("tiny", "cv_vae", "reconstruction")


def tiny(**overrides):
    torch.manual_seed(0)
    return models.build(NAME, "tiny", **overrides)


def num_parameters(in_channels, widths, flat_widths):
    """A 3x3x3 convolution from i to o channels has 27 i o + o numbers, a 1x1x1 one i o + o, a norm of c channels 2 c. The head
    is a convolution to one channel; each ResBlock has norm, conv, norm, conv, and where the width changes a 1x1x1 shortcut; a
    norm follows it.
    """
    widths = (*widths, *flat_widths)
    total = 27 * in_channels * widths[0] + widths[0] + 27 * widths[-1] + 1
    for i, o in pairwise(widths):
        total += 2 * i + (27 * i * o + o) + 2 * o + (27 * o * o + o) + (i * o + o if i != o else 0) + 2 * o
    return total


@pytest.mark.parametrize(("size", "expected"), [("tiny", 213_729), ("cv_vae", 28_292_737), ("reconstruction", 28_297_921)])
def test_parameter_counts(size, expected):
    """Three more input channels cost 27 * 3 * 64 = 5,184."""
    model = models.build(NAME, size, device="meta")
    config = model.config
    assert num_parameters(config.in_channels, config.widths, config.flat_widths) == expected
    assert sum(p.numel() for p in model.parameters()) == expected


def authors_forward(public, video, num_groups):
    """The network from the authors' keys, written with functions: numbers in `main` count activations too."""

    def conv(x, key, **options):
        return F.conv3d(x, public[f"{key}.weight"], public[f"{key}.bias"], **options)

    def norm(x, key):
        return F.group_norm(x, num_groups, public[f"{key}.weight"], public[f"{key}.bias"], eps=1e-5)

    def pool(x):
        frames = list(x.unbind(2))
        frames = [frames[0], *frames] if len(frames) % 2 else frames
        pairs = [(frames[i] + frames[i + 1]) / 2 for i in range(0, len(frames), 2)]
        return torch.stack([F.avg_pool2d(pair, 2) for pair in pairs], dim=2)

    def block(x, key, halves):
        h = conv(F.silu(norm(x, f"{key}.norm1")), f"{key}.conv1", padding=1)
        h, x = (pool(h), pool(x)) if halves else (h, x)
        h = conv(F.silu(norm(h, f"{key}.norm2")), f"{key}.conv2", padding=1)
        return h + (conv(x, f"{key}.nin_shortcut") if f"{key}.nin_shortcut.weight" in public else x)

    x = F.leaky_relu(conv(video, "main.0", stride=2, padding=1), 0.2)
    for index, halves in ((2, True), (5, True), (8, False), (11, False)):
        x = F.leaky_relu(norm(block(x, f"main.{index}", halves), f"main.{index + 1}"), 0.2)
    return conv(x, "main.14", padding=1)


@pytest.mark.parametrize("num_frames", [1, 5, 8])
@torch.no_grad()
def test_equal_to_the_written_out_network(num_frames):
    """The structure of CV-VAE (two ResBlocks that halve, two that do not, the last without a shortcut) at small widths."""
    model = tiny(widths=(8, 16, 24), flat_widths=(32, 32), head_std=0.1)
    for parameter in model.parameters():  # norms at one and zero would hide mistakes
        if parameter.ndim == 1:
            parameter.normal_(std=0.5)
    video = torch.rand(2, 3, num_frames, 20, 26) * 2 - 1
    public = models.adapter(NAME).to_public(model.state_dict())
    logits = model(video)
    torch.testing.assert_close(logits, authors_forward(public, video, 8), rtol=0, atol=1e-5)
    after_stem = math.ceil(num_frames / 2)
    assert logits.shape == (2, 1, math.ceil(math.ceil(after_stem / 2) / 2), 2, 3)  # 20 -> 10 -> 5 -> 2, 26 -> 13 -> 6 -> 3


def test_authors_layout():
    """Their blocks also hold an unused `temb_proj` (512 numbers a channel and a bias): zeros from us, ignored by us."""
    model = models.build(NAME, "cv_vae", device="meta")
    adapter = models.adapter(NAME)
    public = adapter.to_public(model.state_dict())
    assert public["main.2.temb_proj.weight"].shape == (128, 512)
    assert public["main.11.temb_proj.bias"].shape == (512,)
    assert {"main.0.weight", "main.2.nin_shortcut.weight", "main.3.weight", "main.8.conv1.bias", "main.14.bias"} <= set(public)
    assert "main.11.nin_shortcut.weight" not in public
    assert set(adapter.from_public(public)) == set(model.state_dict())
    assert adapter.config_from_public(adapter.public_config(model.config)) == model.config
    with pytest.raises(CheckpointError, match=r"main\.0\.wing is not in the public layout"):
        adapter.from_public({"main.0.wing": torch.zeros(1)})
    with pytest.raises(ConfigError, match="not a config of NLayerDiscriminator3D: class 'UNet'"):
        adapter.config_from_public({"_class_name": "UNet"})


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_losses_start_where_they_should(size):
    """At zero logits hinge is 1 and the reconstruction GAN 2 ln 2. Fresh logits are small, so both start within 2% of that, on
    clips that are nothing alike.
    """
    torch.manual_seed(0)
    model = models.build(NAME, size)
    shape = (2, 3, 5, 16, 16)
    original = torch.rand(shape) * 2 - 1
    reconstruction = torch.linspace(-1, 1, 16).expand(shape)
    if model.config.in_channels == 3:
        a, b = model(original), model(reconstruction)
    else:
        a, b = (model(torch.cat(pair, dim=1)) for pair in ((original, reconstruction), (reconstruction, original)))
    assert a.std() > 1e-3, "logits that are all zero would pass nothing back"
    torch.testing.assert_close(hinge_discriminator(a, b), torch.ones(2), rtol=0.02, atol=0)
    torch.testing.assert_close(reconstruction_gan_discriminator(a, b), torch.full((2,), 2 * math.log(2)), rtol=0.02, atol=0)


@torch.no_grad()
def test_the_authors_head_starts_elsewhere():
    """The negative control: with all convolutions at 0.02 the logits are of order one, and chance moves the loss off 2 ln 2."""
    torch.manual_seed(0)
    model = models.build(NAME, "cv_vae", head_std=0.02)
    a, b = model(torch.rand(1, 3, 5, 16, 16) * 2 - 1), model(torch.linspace(-1, 1, 16).expand(1, 3, 5, 16, 16))
    assert abs(reconstruction_gan_discriminator(a, b).item() / (2 * math.log(2)) - 1) > 0.02


def test_initial_weights():
    model = models.build(NAME, "cv_vae")
    convs = [module for module in model.modules() if isinstance(module, torch.nn.Conv3d)]
    for conv in convs[:-1]:
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert convs[-1].weight.std().item() == pytest.approx(0.001, rel=0.05)


@torch.no_grad()
def test_samples_do_not_mix():
    model = tiny(head_std=0.1)
    video = torch.rand(3, 3, 5, 16, 16)
    torch.testing.assert_close(model(video)[1:2], model(video[1:2]))
    changed = video.clone()
    changed[0] = 0
    torch.testing.assert_close(model(changed)[1:], model(video)[1:], rtol=0, atol=0)


def test_every_parameter_and_every_pixel_gets_a_gradient():
    model = tiny()
    video = torch.rand(1, 3, 4, 16, 16, requires_grad=True)
    model(video).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert (video.grad.abs() > 0).float().mean() > 0.99


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 6, 5, 16, 16), r"takes \(B, 3, T, H, W\), not \(1, 6, 5, 16, 16\)"),
        ((1, 3, 5, 2, 16), "needs at least one frame of 3x3 pixels, not 5 of 2x16"),
        ((1, 3, 0, 16, 16), "needs at least one frame"),
    ],
)
def test_videos_that_do_not_fit(shape, message):
    with pytest.raises(DataError, match=message):
        tiny()(torch.zeros(shape))


@torch.no_grad()
def test_the_smallest_frame_leaves_one_patch():
    model = tiny(widths=(16, 16, 16), flat_widths=(16,))
    assert model.config.min_size == 7
    assert model(torch.zeros(1, 3, 1, 7, 7)).shape == (1, 1, 1, 1, 1)


def test_configs_that_cannot_work():
    with pytest.raises(ConfigError, match=r"widths \[100\] are not multiples of num_groups 32"):
        PatchGAN3dConfig(widths=(64, 100))
    with pytest.raises(ConfigError, match="widths is empty"):
        PatchGAN3dConfig(widths=())


@pytest.mark.parametrize("context_degree", [1, 3])
def test_context_ranks_share_its_gradient(context_degree):
    """Each context rank runs it whole, and the engine sums over them: each counts for its share."""
    model = models.build(NAME, "tiny")
    video = torch.rand(1, 3, 9, 32, 32)
    model(video).square().mean().backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert SPEC.parallelize(model, SimpleNamespace(context_degree=context_degree)) is model
    model(video).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad * context_degree, whole[name])
