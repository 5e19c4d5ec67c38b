"""CV-VAE: the image VAE that it starts as, the authors' arithmetic, and its laws (spec A, F-CV-VAE)."""

import copy
import re

import pytest
import torch
from torch.nn import functional as F

from videofm import models
from videofm.attention.backends.math import BACKEND as MATH
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models.spec import ParallelOptions
from videofm.models.vae.cv_vae import ADAPTER, SD3_ADAPTER, CVVAEConfig, CVVAESD3Config, parallelize
from videofm.ops.causal_conv import CausalConv3d
from videofm.types import Compression

RELEASED = {"norm_scope": "clip", "norm_eps": 1e-5, "temporal_attention": "released"}
CAUSAL_BOTH = {"causal_decoder": True, "temporal_attention": "none"}


@torch.no_grad()
def small(name="vae/cv_vae", **overrides):
    """Tiny, with every tensor random: zeros and ones of a fresh model would hide mistakes."""
    torch.manual_seed(0)
    model = models.build(name, "tiny", **overrides).eval()
    for key, parameter in model.named_parameters():
        if ".norm" in key:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if "temporal.out" in key:
            parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A random image VAE without quant convs, and its folder."""
    torch.manual_seed(1)
    model = models.build("vae/image_kl", "tiny").eval()
    return model, models.save_public(model, tmp_path_factory.mktemp("image"))


def inflated(image, dtype=torch.float32, **overrides):
    model = models.build("vae/cv_vae", "tiny", **overrides).eval()
    models.inflate(model, image[1])
    return model.to(dtype)


def clip(num_frames=9, batch=1, dtype=torch.float32):
    return torch.rand(batch, 3, num_frames, 16, 24, generator=torch.Generator().manual_seed(2), dtype=dtype) * 2 - 1


def drawn_latents(num_latent_frames=3, dtype=torch.float32):
    return torch.randn(2, 4, num_latent_frames, 2, 3, generator=torch.Generator().manual_seed(3), dtype=dtype)


def held(images, num_frames=4):
    """Each image for `num_frames` frames, the first for one."""
    return torch.cat([images[:, :, :1], images[:, :, 1:].repeat_interleave(num_frames, dim=2)], dim=2)


# -- sizes and layout


@pytest.mark.parametrize(
    ("size", "encoder", "decoder"),
    [
        ("sd21", 68_748_936, 113_697_539),
        ("sd21_full3d", 100_009_608, 155_869_955),
        # Against sd21, `encoder.conv_out` has 24 more outputs of 512 * 27 + 1 (331,800), `decoder.conv_in` 12 more inputs of
        # 27 * 512 (165,888): 182,446,475 + 497,688 = 182,944,163.
        ("sd3", 69_080_736, 113_863_427),
    ],
)
def test_sizes(size, encoder, decoder):
    """Spec A.2, measured on the authors' code."""
    model = models.build("vae/cv_vae", size, device="meta")
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    assert model.compression == Compression(4, 8, 8)
    assert (model.encoder_causal, model.decoder_causal, model.strictly_causal) == (True, False, False)


def test_size_of_the_sd3_release():
    """The size sd3 without temporal attention: four linear layers of 512 * 513, a LayerNorm of 2 * 512, 10 tensors."""
    model = models.build("vae/cv_vae_sd3", "released", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 182_944_163 - 4 * 512 * 513 - 2 * 512
    assert len(SD3_ADAPTER.to_public(model.state_dict())) == 254 - 10
    assert not model.encoder_causal


def authors_keys():
    """Spec A.10, written out."""

    def both(names):
        return [f"{name}.{p}" for name in names for p in ("weight", "bias")]

    def res_block(name, widens=False):
        return [f"{name}.{part}" for part in ("norm1", "conv1", "norm2", "conv2", *["nin_shortcut"] * widens)]

    def middle(name):
        attention = [f"{name}.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")]
        return res_block(f"{name}.block_1") + res_block(f"{name}.block_2") + attention

    encoder, decoder = ["conv_in", "norm_out", "conv_out", *middle("mid")], ["conv_in", "norm_out", "conv_out", *middle("mid")]
    for i in range(4):
        encoder += [key for j in range(2) for key in res_block(f"down.{i}.block.{j}", widens=j == 0 and i in (1, 2))]
        decoder += [key for j in range(3) for key in res_block(f"up.{i}.block.{j}", widens=j == 0 and i in (0, 1))]
    encoder += [f"down.{i}.downsample.conv" for i in range(3)]
    decoder += [f"up.{i}.upsample.conv" for i in range(1, 4)] + [
        f"mid.attn_1.{part}_t" for part in ("norm", "q", "k", "v", "proj_out")
    ]
    return [f"encoder.{key}" for key in both(encoder)], [f"decoder.{key}" for key in both(decoder)]


@pytest.mark.parametrize("size", ["sd21", "sd21_full3d"])
def test_layout_of_the_authors(size):
    encoder, decoder = authors_keys()
    assert (len(encoder), len(decoder)) == (106, 148)
    model = models.build("vae/cv_vae", size, device="meta")
    public = ADAPTER.to_public(model.state_dict())
    assert set(public) == {*encoder, *decoder}
    assert [public[f"decoder.up.{i}.upsample.conv.weight"].shape[0] for i in (1, 2, 3)] == [512, 512, 1024]
    assert public["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert public["decoder.mid.attn_1.q_t.weight"].shape == (512, 512)
    assert public["encoder.down.1.block.0.nin_shortcut.weight"].shape == (256, 128, 1, 1, 1)
    assert public["encoder.down.0.block.0.conv2.weight"].ndim == (4 if size == "sd21" else 5)


def test_layout_of_the_sd3_release():
    """Names like diffusers', whose decoder counts from the coarsest; 2D convolutions and shortcuts with four dims."""
    public = SD3_ADAPTER.to_public(models.build("vae/cv_vae_sd3", "released", device="meta").state_dict())
    assert public["decoder.up_blocks.0.upsamplers.0.conv.weight"].shape == (1024, 512, 3, 3, 3)
    assert public["decoder.up_blocks.1.upsamplers.0.conv.weight"].shape == (512, 512, 3, 3, 3)
    assert public["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"].shape == (256, 512, 1, 1)
    assert public["encoder.down_blocks.0.resnets.0.conv2.weight"].shape == (128, 128, 3, 3)
    assert public["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (512, 512)
    assert "decoder.up_blocks.3.upsamplers.0.conv.weight" not in public


@pytest.mark.parametrize("folder", ["public", "ours"])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vae/cv_vae", {}),
        ("vae/cv_vae", RELEASED | {"num_groups": 16}),
        ("vae/cv_vae", CAUSAL_BOTH | {"half_3d": False, "shift_factor": 0.1}),
        ("vae/cv_vae_sd3", {}),
        ("vae/cv_vae_sd3", {"norm_scope": "frame", "scaling_factor": 1.0}),
    ],
)
def test_written_and_read_again(name, overrides, folder, tmp_path):
    model = small(name, **overrides)
    loaded = models.load({"public": models.save_public, "ours": models.save}[folder](model, tmp_path))
    assert loaded.spec_name == name
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_configs_of_the_releases():
    """The authors' config.json has no key for what their code fixes; both directions agree on it."""
    theirs = {"_class_name": "CVVAEModel", "_diffusers_version": "0.27", "z_channels": 4, "ch_mult": [1, 2, 4, 4]}
    assert ADAPTER.config_from_public(theirs) == CVVAEConfig(**RELEASED)
    written = ADAPTER.public_config(CVVAEConfig(**RELEASED))
    assert not set(written) & {"norm_scope", "norm_eps", "num_groups", "padding", "shift_factor", "temporal_attention"}
    assert written["decoder_attn_type"] == "spatial-temporal-xformer"
    assert ADAPTER.public_config(CVVAEConfig())["norm_scope"] == "frame"
    assert SD3_ADAPTER.config_from_public({"_class_name": "CVVAESD3Model"}) == CVVAESD3Config()
    assert "norm_scope" not in SD3_ADAPTER.public_config(CVVAESD3Config())


@pytest.mark.parametrize(
    ("given", "built", "message"),
    [
        ("sd21_full3d", "sd21", "These tensors look like vae/cv_vae sd21_full3d, not sd21"),
        ("sd3", "sd21_full3d", "These tensors look like vae/cv_vae sd3, not sd21_full3d"),
        ("tiny", "sd3", "These tensors look like vae/cv_vae tiny, not sd3"),
    ],
)
def test_weights_of_another_size_say_which(given, built, message):
    tensors = models.build("vae/cv_vae", given, device="meta").state_dict()
    with pytest.raises(CheckpointError, match=message):
        models.load_weights(models.build("vae/cv_vae", built, device="meta"), tensors, "a file")
    assert ADAPTER.looks_like({}) is None
    assert ADAPTER.looks_like(models.build("vae/cv_vae", "tiny", latent_channels=5).state_dict()) is None


# -- the authors' arithmetic, from their names and their paddings (models/vae_models.py, models/vae_blocks3d_sd3.py)


class Authors:
    """The released forward pass as functions of a state dict in their layout: v1 (`replicate=False`) or SD3."""

    def __init__(self, tensors, num_groups, replicate):
        self.t, self.num_groups, self.replicate, self.eps = tensors, num_groups, replicate, 1e-6 if replicate else 1e-5

    def norm(self, x, name):
        return F.group_norm(x, self.num_groups, self.t[f"{name}.weight"], self.t[f"{name}.bias"], self.eps)

    def conv(self, x, name, time, space=(1, 1, 1, 1), stride=1):
        weight, bias = self.t[f"{name}.weight"], self.t[f"{name}.bias"]
        if weight.ndim == 4:
            frames = [F.conv2d(frame, weight, bias, padding=weight.shape[-1] // 2) for frame in x.unbind(2)]
            return torch.stack(frames, dim=2)
        if weight.shape[-1] == 1:
            return F.conv3d(x, weight, bias)
        x = F.pad(x, (*space, 0, 0), mode="replicate") if self.replicate else F.pad(x, (*space, 0, 0))
        causal = time == "causal"
        x = F.pad(x, (0, 0, 0, 0, 2, 0) if causal else (0, 0, 0, 0, 1, 1), mode="constant" if time == "zeros" else "replicate")
        return F.conv3d(x, weight, bias, stride=stride)

    def res_block(self, x, name, time):
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", time)
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2", time)
        return h + (self.conv(x, f"{name}.nin_shortcut", time) if f"{name}.nin_shortcut.weight" in self.t else x)

    def attention(self, x, name):
        frames = []
        for frame in x.unbind(2):
            h = self.norm(frame, f"{name}.norm")
            q, k, v = (F.conv2d(h, self.t[f"{name}.{n}.weight"], self.t[f"{name}.{n}.bias"]).flatten(2) for n in "qkv")
            weights = (torch.einsum("bcm,bcn->bmn", q, k) * q.shape[1] ** -0.5).softmax(dim=-1)
            h = torch.einsum("bmn,bcn->bcm", weights, v).view_as(frame)
            frames.append(F.conv2d(h, self.t[f"{name}.proj_out.weight"], self.t[f"{name}.proj_out.bias"]))
        h = torch.stack(frames, dim=2)
        if f"{name}.q_t.weight" not in self.t:
            return x + h
        linear = lambda y, n: F.linear(y, self.t[f"{name}.{n}_t.weight"], self.t[f"{name}.{n}_t.bias"])  # noqa: E731
        tokens = F.layer_norm(h.movedim(1, -1), h.shape[1:2], self.t[f"{name}.norm_t.weight"], self.t[f"{name}.norm_t.bias"])
        q, k, v = (linear(tokens, n) for n in "qkv")  # (B, T, H, W, C)
        weights = (torch.einsum("bthwc,bshwc->bhwts", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return x + linear(torch.einsum("bhwts,bshwc->bthwc", weights, v), "proj_out").movedim(-1, 1)

    def middle(self, x, name, time):
        x = self.attention(self.res_block(x, f"{name}.block_1", time), f"{name}.attn_1")
        return self.res_block(x, f"{name}.block_2", time)

    def encode(self, x, num_blocks=1):
        x = self.conv(x, "encoder.conv_in", "causal")
        for i in range(4):
            for j in range(num_blocks):
                x = self.res_block(x, f"encoder.down.{i}.block.{j}", "causal")
            if i < 3:
                space = (1, 1, 1, 1) if self.replicate else (0, 1, 0, 1)
                x = self.conv(x, f"encoder.down.{i}.downsample.conv", "causal", space, (2 if i in (0, 2) else 1, 2, 2))
        x = self.middle(x, "encoder.mid", "causal")
        return self.conv(F.silu(self.norm(x, "encoder.norm_out")), "encoder.conv_out", "causal")

    def decode(self, z, num_blocks=2):
        time = "replicate" if self.replicate else "zeros"
        x = self.middle(self.conv(z, "decoder.conv_in", time), "decoder.mid", time)
        for i in (3, 2, 1, 0):
            for j in range(num_blocks):
                x = self.res_block(x, f"decoder.up.{i}.block.{j}", time)
            if i > 0:
                x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
                x = self.conv(x, f"decoder.up.{i}.upsample.conv", "replicate")
                if i in (1, 3):
                    x = torch.stack(x.chunk(2, dim=1), dim=3).flatten(2, 3)  # (B, 2C, T, H, W) -> (B, C, 2T, H, W)
                    x = x[:, :, 1:]
        return self.conv(F.silu(self.norm(x, "decoder.norm_out")), "decoder.conv_out", time)


@pytest.mark.parametrize("half_3d", [True, False])
@pytest.mark.parametrize(("name", "options"), [("vae/cv_vae", RELEASED), ("vae/cv_vae_sd3", {})])
@torch.no_grad()
def test_equal_to_the_released_arithmetic(name, options, half_3d):
    model = small(name, half_3d=half_3d, **options)
    tensors = ADAPTER.to_public(model.state_dict())  # one set of names for both: those of SD3 are tested above
    theirs = Authors(tensors, model.config.num_groups, replicate=name == "vae/cv_vae_sd3")
    video, latents = clip(batch=2), drawn_latents()
    posterior = model.encode(video)
    mean, logvar = theirs.encode(video).chunk(2, dim=1)
    torch.testing.assert_close(posterior.mean, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, logvar, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(latents), theirs.decode(latents), rtol=0, atol=2e-5)


@torch.no_grad()
def test_own_residual_adds_to_the_frames_attention():
    """In `released` the temporal output replaces the spatial one: with a zero output the spatial attention is gone."""
    for kind, kept in (("own_residual", True), ("released", False)):
        model = small(temporal_attention=kind)
        middle, x = model.decoder.middle, torch.randn(1, 32, 3, 2, 2)
        middle.temporal.out.weight.zero_()
        middle.temporal.out.bias.zero_()
        spatial = middle.blocks[1](middle.attention(middle.blocks[0](x)))
        without = middle.blocks[1](middle.blocks[0](x))
        torch.testing.assert_close(middle(x), spatial if kept else without)
        assert (spatial - without).abs().max() > 1e-2
    fresh = models.build("vae/cv_vae", "tiny").decoder.middle.temporal.out
    assert not fresh.weight.any()
    assert not fresh.bias.any()


# -- inflation


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("overrides", [{}, {"half_3d": False}, {"causal_decoder": True}, {"temporal_attention": "none"}])
@torch.no_grad()
def test_an_inflated_video_vae_is_the_image_vae(image, overrides, dtype, atol):
    """Encoder: frames 0, 4, 8. Decoder: each image held for the frames of its latent (spec A.3: 2e-6, 6e-6 in float32)."""
    video_vae, image_vae = inflated(image, dtype, **overrides), copy.deepcopy(image[0]).to(dtype)
    video, latents = clip(9, 2, dtype), drawn_latents(3, dtype)
    ours, theirs = video_vae.encode(video), image_vae.encode(video[:, :, ::4])
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=atol)
    torch.testing.assert_close(ours.logvar, theirs.logvar, rtol=0, atol=atol)
    torch.testing.assert_close(video_vae.decode(latents), held(image_vae.decode(latents)), rtol=0, atol=atol)
    torch.testing.assert_close(video_vae.decode_images(latents), image_vae.decode(latents), rtol=0, atol=atol)


@torch.no_grad()
def test_with_norms_over_the_clip_only_one_frame_agrees(image):
    """Spec A.3: statistics over time break the equality of clips, not of images."""
    video_vae, image_vae = inflated(image, norm_scope="clip"), image[0]
    one, many, latents = clip(1), clip(9), drawn_latents()
    torch.testing.assert_close(video_vae.encode(one).mean, image_vae.encode(one).mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(video_vae.decode(latents[:, :, :1]), image_vae.decode(latents[:, :, :1]), rtol=0, atol=1e-5)
    assert (video_vae.encode(many).mean - image_vae.encode(many[:, :, ::4]).mean).abs().max() > 1e-3
    assert (video_vae.decode(latents) - held(image_vae.decode(latents))).abs().max() > 1e-3


@torch.no_grad()
def test_the_wrong_tap_is_not_the_image_vae(image):
    """The centre in the causal encoder breaks clips (not images: its padding repeats them); the tail in the decoder, which is
    padded with zeros, breaks even images."""
    video_vae, image_vae = inflated(image), image[0]
    for coder in (video_vae.encoder, video_vae.decoder):
        for module in coder.modules():
            if isinstance(module, CausalConv3d) and module.kernel_size[0] == 3:
                module.weight.copy_(module.weight.roll(-1 if module.causal else 1, dims=2))
    one, many, latents = clip(1), clip(9), drawn_latents(1)
    torch.testing.assert_close(video_vae.encode(one).mean, image_vae.encode(one).mean, rtol=0, atol=1e-5)
    assert (video_vae.encode(many).mean - image_vae.encode(many[:, :, ::4]).mean).abs().max() > 1e-2
    assert (video_vae.decode(latents) - image_vae.decode(latents)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "vae/cv_vae",
            {"temporal_attention": "released"},
            "with {'temporal_attention': 'released'} cannot start as an image VAE",
        ),
        ("vae/cv_vae_sd3", {}, "vae/cv_vae_sd3 with {'padding': 'replicate'} cannot start"),
        ("vae/cv_vae", {"num_groups": 16}, "has norms of 8 groups, not 16: set num_groups"),
    ],
)
def test_what_cannot_start_as_the_image_vae(image, name, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        models.inflate(models.build(name, "tiny", **overrides), image[1])


# -- frames, causality, streaming


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17])
@torch.no_grad()
def test_shapes(num_frames):
    model, num_latent_frames = small(), 1 + (num_frames - 1) // 4
    posterior = model.encode(clip(num_frames))
    assert posterior.mean.shape == posterior.logvar.shape == (1, 4, num_latent_frames, 2, 3)
    assert model.decode(posterior.mean).shape == (1, 3, num_frames, 16, 24)
    assert model.decode_images(posterior.mean).shape == (1, 3, num_latent_frames, 16, 24)
    assert (model.latent_frames(num_frames), model.pixel_frames(num_latent_frames)) == (num_latent_frames, num_frames)


@pytest.mark.parametrize("index", [0, 1, 2])
@torch.no_grad()
def test_the_encoder_is_causal(index):
    """Frames from 4 index + 1 on are changed: latents 0..index stay bitwise equal, and the next does not."""
    model, video = small(), clip(13)
    changed = video.clone()
    changed[:, :, 4 * index + 1 :] *= -0.5
    first, second = model.encode(video), model.encode(changed)
    assert torch.equal(first.mean[:, :, : index + 1], second.mean[:, :, : index + 1])
    assert torch.equal(first.logvar[:, :, : index + 1], second.logvar[:, :, : index + 1])
    assert not torch.equal(first.mean[:, :, index + 1], second.mean[:, :, index + 1])


@pytest.mark.parametrize("overrides", [{"norm_scope": "clip"}, {"causal_encoder": False}])
@torch.no_grad()
def test_an_encoder_that_sees_the_future_is_not_called_causal(overrides):
    """The negative control of the test above."""
    model, video = small(**overrides), clip(13)
    changed = video.clone()
    changed[:, :, 5:] *= -0.5
    assert (model.encode(video).mean[:, :, :2] - model.encode(changed).mean[:, :, :2]).abs().max() > 1e-3
    assert not model.encoder_causal
    with pytest.raises(ConfigError, match="the encoder of this vae/cv_vae looks at later frames"):
        model.encode_stream(video)


@pytest.mark.parametrize(
    ("overrides", "causal"),
    [
        (CAUSAL_BOTH, True),
        (CAUSAL_BOTH | {"temporal_attention": "own_residual"}, False),
        (CAUSAL_BOTH | {"norm_scope": "clip"}, False),
        ({"temporal_attention": "none"}, False),
    ],
)
@torch.no_grad()
def test_the_decoder_is_causal_exactly_when_it_says_so(overrides, causal):
    model, latents = small(**overrides), drawn_latents(4)
    changed = latents.clone()
    changed[:, :, 2:] *= -0.5
    same = torch.equal(model.decode(latents)[:, :, :5], model.decode(changed)[:, :, :5])
    assert model.decoder_causal is same is causal
    if not causal:
        with pytest.raises(ConfigError, match="the decoder of this vae/cv_vae looks at later frames"):
            model.decode_stream(latents)


@pytest.mark.parametrize("half_3d", [True, False])
@pytest.mark.parametrize("latent_chunks", [[1, 1, 1, 1], [1, 3], [2, 2], [3, 1]])
@torch.no_grad()
def test_streaming_equals_the_whole(latent_chunks, half_3d):
    """Both ways, for every chunking of four latent frames that the frame rule allows."""
    model, video = small(half_3d=half_3d, **CAUSAL_BOTH), clip(13)
    assert model.strictly_causal
    whole = model.encode(video).mean
    reference = model.decode(whole)

    frames = [4 * count - 3 * (index == 0) for index, count in enumerate(latent_chunks)]
    cache, chunks = None, []
    for chunk in video.split(frames, dim=2):
        encoded = model.encode_stream(chunk, cache)
        cache = encoded.cache
        chunks.append(encoded.posterior.mean)
    torch.testing.assert_close(torch.cat(chunks, dim=2), whole, rtol=0, atol=1e-6)

    cache, chunks = None, []
    for chunk in whole.split(latent_chunks, dim=2):
        decoded = model.decode_stream(chunk, cache)
        cache = decoded.cache
        chunks.append(decoded.video)
    torch.testing.assert_close(torch.cat(chunks, dim=2), reference, rtol=0, atol=2e-6)


@torch.no_grad()
def test_image_mode_is_each_latent_decoded_alone():
    model, latents = small(), drawn_latents(3)
    images = model.decode_images(latents)
    for index in range(3):
        alone = model.decode(latents[:, :, index : index + 1])
        torch.testing.assert_close(images[:, :, index : index + 1], alone, rtol=0, atol=1e-5)
    assert (images - model.decode(latents)[:, :, ::4]).abs().max() > 1e-2  # video mode mixes frames
    with pytest.raises(DataError, match=r"this VAE decodes \(B, 4, T', H', W'\)"):
        model.decode_images(latents[:, :2])


# -- training, devices, mistakes


def test_gradients_reach_every_parameter():
    """Also those of the temporal attention, once its zero output has moved."""
    model = small().train()
    model(clip(5), torch.randn(1, 4, 2, 2, 3)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.last_layer is model.decoder.conv_out.weight


@torch.no_grad()
def test_latents_of_the_sd3_target_are_shifted():
    """As the pipelines of that image VAE do, until statistics are measured."""
    model = small(shift_factor=0.0609, scaling_factor=1.5305)
    latents = drawn_latents()
    torch.testing.assert_close(model.normalize(latents), (latents - 0.0609) * 1.5305)


@torch.no_grad()
def test_parallelize_binds_every_attention():
    model, latents = small(), drawn_latents()
    before = model.decode(latents)
    assert parallelize(model, options=ParallelOptions(attention="math")) is model
    attentions = [module for module in model.modules() if hasattr(module, "attend")]
    assert len(attentions) == 3  # among positions in both middles, among frames in the decoder's
    assert {id(module.attend) for module in attentions} == {id(attentions[0].attend)}
    torch.testing.assert_close(model.decode(latents), before, rtol=0, atol=1e-5)
    q = torch.randn(2, 3, 1, 32)
    assert torch.equal(attentions[0].attend(q, q, q, None), MATH(q, q, q, None))
    with pytest.raises(ConfigError, match="no attention backend for 1 heads of width 32"):
        parallelize(model, options=ParallelOptions(attention="flash_attn"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"norm_scope": "layer"}, "norm_scope is 'layer'; there are: frame, clip"),
        ({"temporal_attention": "yes"}, "temporal_attention is 'yes'; there are: own_residual, released, none"),
        ({"padding": "zeros"}, "padding is 'zeros'; there are: sd, replicate"),
        ({"widths": (128, 200)}, r"widths \(128, 200\) must be two or more multiples of num_groups \(32\); not so: \[200\]"),
        ({"widths": (128,)}, r"widths \(128,\) must be two or more"),
    ],
)
def test_configs_that_cannot_work(overrides, message):
    with pytest.raises(ConfigError, match=message):
        CVVAEConfig(**overrides)


def test_foreign_configs_and_keys():
    with pytest.raises(ConfigError, match="vae/cv_vae_sd3 has no temporal attention, not 'released'"):
        CVVAESD3Config(temporal_attention="released")
    with pytest.raises(ConfigError, match=r"holds widths that are multiples of the first, not \(32, 48\)"):
        ADAPTER.public_config(CVVAEConfig(widths=(32, 48), num_groups=16))
    for change, message in (
        ({"wings": 2}, r"unknown keys \['wings'\]"),
        ({"use_3d_conv": False}, "'use_3d_conv': False"),
        ({"encoder_attn_type": "linear"}, "'encoder_attn_type': 'linear'"),
        ({"ch_mult": [2, 4]}, r"'ch_mult': \[2, 4\]"),
    ):
        with pytest.raises(ConfigError, match=f"not a config of CVVAEModel that vae/cv_vae can hold: .*{message}"):
            ADAPTER.config_from_public({"_class_name": "CVVAEModel"} | change)
    for change in ({"wings": 2}, {"act_fn": "gelu"}, {"mid_block_add_attention": False}):
        with pytest.raises(ConfigError, match=f"CVVAESD3Model that vae/cv_vae_sd3 can hold: .*{next(iter(change))}"):
            SD3_ADAPTER.config_from_public({"_class_name": "CVVAESD3Model"} | change)
    for adapter in (ADAPTER, SD3_ADAPTER):
        with pytest.raises(CheckpointError, match=r"encoder\.extra is not in the public layout"):
            adapter.from_public({"encoder.extra": torch.zeros(1)})
        with pytest.raises(CheckpointError, match=r"encoder\.extra is not a tensor of this model"):
            adapter.to_public({"encoder.extra": torch.zeros(1)})
