"""OD-VAE against a second writing of the released network, and its laws (spec D.1)."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models.spec import ParallelOptions
from videofm.models.vae.od_vae import ADAPTER, ODVAEConfig, parallelize
from videofm.types import Compression

VARIANTS = ("variant1", "variant2", "variant3", "variant4")
RELEASE = {
    "_class_name": "CausalVAEModel",
    "hidden_size": 128,
    "hidden_size_mult": [1, 2, 4, 4],
    "z_channels": 4,
    "embed_dim": 4,
    "num_res_blocks": 2,
    "double_z": True,
    "dropout": 0.0,
    "resolution": 256,
    "attn_resolutions": [],
    "q_conv": "CausalConv3d",
    "encoder_conv_in": "Conv2d",
    "encoder_conv_out": "CausalConv3d",
    "encoder_attention": "AttnBlock3DFix",
    "encoder_resnet_blocks": ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"],
    "encoder_mid_resnet": "ResnetBlock3D",
    "encoder_spatial_downsample": ["Downsample", "Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DDownsample", ""],
    "encoder_temporal_downsample": ["", "", "", ""],
    "decoder_conv_in": "CausalConv3d",
    "decoder_conv_out": "CausalConv3d",
    "decoder_attention": "AttnBlock3DFix",
    "decoder_resnet_blocks": ["ResnetBlock3D"] * 4,
    "decoder_mid_resnet": "ResnetBlock3D",
    "decoder_spatial_upsample": ["", "SpatialUpsample2x", "Spatial2xTime2x3DUpsample", "Spatial2xTime2x3DUpsample"],
    "decoder_temporal_upsample": ["", "", "", ""],
}
"""The config of `CausalVAEModel_4x8x8`, release 1.2 of Open-Sora-Plan."""


def small(size="variant4", **overrides):
    """A few thousand parameters with the structure of `size`; norms and biases are random, so that none goes unnoticed."""
    torch.manual_seed(0)
    narrow = {"widths": (8, 16, 16, 16), "num_res_blocks": 1, "num_groups": 4}
    model = models.build("vae/od_vae", size, **narrow | overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def clip(num_frames, side=16, batch=1):
    return torch.rand(batch, 3, num_frames, side, side) * 2 - 1


# -- the released network, written again from the public names


class Reference:
    """Encode and decode with a public state dict, whose names say which layers are 2D."""

    def __init__(self, state, config):
        self.state, self.config, self.groups = state, config, config.get("num_groups", 32)

    def conv(self, name, x, stride=(1, 1, 1), inside=1):
        if f"{name}.weight" in self.state:
            weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
            inside = inside if weight.shape[-1] == 3 else 0
            return torch.stack([F.conv2d(frame, weight, bias, stride[1:], inside) for frame in x.unbind(2)], dim=2)
        weight, bias = self.state[f"{name}.conv.weight"], self.state[f"{name}.conv.bias"]
        inside = inside if weight.shape[-1] == 3 else 0
        x = torch.cat([x[:, :, :1]] * (weight.shape[2] - 1) + [x], dim=2)
        return F.conv3d(x, weight, bias, stride, (0, inside, inside))

    def norm(self, name, x):
        return F.group_norm(x, self.groups, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def block(self, name, x):
        if f"{name}.conv1.weight" in self.state and x.shape[2] > 1:  # a 2D block sees one frame at a time
            return torch.cat([self.block(name, frame) for frame in x.split(1, dim=2)], dim=2)
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        shortcut = any(key.startswith(f"{name}.nin_shortcut") for key in self.state)
        return h + (self.conv(f"{name}.nin_shortcut", x) if shortcut else x)

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{each}", h).flatten(3) for each in "qkv")  # (B, C, T, HW)
        weights = (torch.einsum("bctq,bctk->btqk", q, k) / x.shape[1] ** 0.5).softmax(dim=-1)
        return x + self.conv(f"{name}.proj_out", torch.einsum("btqk,bctk->bctq", weights, v).reshape(x.shape))

    def middle(self, half, x):
        return self.block(f"{half}.mid.block_2", self.attention(f"{half}.mid.attn_1", self.block(f"{half}.mid.block_1", x)))

    def out(self, half, x):
        return self.conv(f"{half}.conv_out", F.silu(self.norm(f"{half}.norm_out", x)))

    def moments(self, video):
        x = self.conv("encoder.conv_in", video)
        for level, kind in enumerate(self.config["encoder_spatial_downsample"]):
            for index in range(self.config["num_res_blocks"]):
                x = self.block(f"encoder.down.{level}.block.{index}", x)
            if kind:
                stride = (2 if "Time" in kind else 1, 2, 2)
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride, inside=0)
        return self.conv("quant_conv", self.out("encoder", self.middle("encoder", x)))

    def decode(self, latents):
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", latents)))
        for level in reversed(range(4)):
            for index in range(self.config["num_res_blocks"] + 1):
                x = self.block(f"decoder.up.{level}.block.{index}", x)
            kind = self.config["decoder_spatial_upsample"][level]
            if "Time" in kind:
                first = F.interpolate(x[:, :, :1], scale_factor=(1, 2, 2), mode="trilinear")
                rest = [F.interpolate(x[:, :, 1:], scale_factor=(2, 2, 2), mode="trilinear")] if x.shape[2] > 1 else []
                x = torch.cat([first, *rest], dim=2)
            elif kind:
                x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = self.conv(f"decoder.up.{level}.upsample.conv", x) if kind else x
        return self.out("decoder", x)


@pytest.mark.parametrize("size", VARIANTS)
@torch.no_grad()
def test_equal_to_the_released_network(size):
    """With the released norms (over the clip) and interpolation; moments and frames, of a clip and of an image."""
    model = small(size, norm_scope="clip")
    assert {module.eps for module in model.modules() if isinstance(module, nn.GroupNorm)} == {1e-6}
    reference = Reference(ADAPTER.to_public(model.state_dict()), ADAPTER.public_config(model.config))
    for num_frames in (1, 9):
        video = clip(num_frames, batch=2)
        ours, (mean, logvar) = model.encode(video), reference.moments(video).chunk(2, dim=1)
        torch.testing.assert_close(ours.mean, mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.logvar, logvar, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.decode(ours.mean), reference.decode(ours.mean), rtol=0, atol=1e-5)


# -- sizes and layout


def convolution(entering, leaving, size):
    return entering * leaving * size + leaving


def blocks(entering, leaving, sizes, count):
    first, second = sizes
    one = convolution(entering, leaving, first) + convolution(leaving, leaving, second) + 2 * entering + 2 * leaving
    one += convolution(entering, leaving, 1) if entering != leaving else 0
    return one if count == 1 else one + blocks(leaving, leaving, sizes, count - 1)


def middle(sizes):
    return blocks(512, 512, sizes, 2) + 2 * 512 + 4 * convolution(512, 512, 1)


FULL, HALF, FLAT = (27, 27), (27, 9), (9, 9)
"""Elements of the two kernels of a ResBlock."""


@pytest.mark.parametrize(
    ("size", "encoder", "decoder", "pinned"),
    [
        ("variant1", (FULL, FULL, FULL), (FULL, FULL, FULL), 244_505_319),
        ("variant2", (HALF, HALF, HALF), (HALF, HALF, HALF), 171_072_231),
        ("variant3", (FLAT, FULL, FULL), (FLAT, FULL, FULL), 228_861_159),
        ("variant4", (FLAT, FULL, FULL), (FULL, FULL, FULL), 239_189_991),
    ],
)
def test_parameters_of_the_variants(size, encoder, decoder, pinned):
    """Variant 4 is the released one: 239.19 M in the paper. Each count is derived here, layer by layer, from the kernels of the
    ResBlocks of the outer two levels, of the inner two, and of the middle.

    Widths 128 256 512 512; two ResBlocks a level in the encoder, three in the decoder. Resamplers have 27 elements where time
    is resampled too, and 9 at the finest step. The convolution at the pixels has 9 elements when the outer blocks are 2D. The
    two 1x1x1 convolutions between moments and latents count 8 * 8 + 8 and 4 * 4 + 4.
    """
    outer, inner, mid = encoder
    expected_encoder = convolution(3, 128, outer[0]) + blocks(128, 128, outer, 2) + convolution(128, 128, 9)
    expected_encoder += blocks(128, 256, outer, 2) + convolution(256, 256, 27)
    expected_encoder += blocks(256, 512, inner, 2) + convolution(512, 512, 27) + blocks(512, 512, inner, 2)
    expected_encoder += middle(mid) + 2 * 512 + convolution(512, 8, 27)
    outer, inner, mid = decoder
    expected_decoder = convolution(4, 512, 27) + middle(mid) + 2 * (blocks(512, 512, inner, 3) + convolution(512, 512, 27))
    expected_decoder += blocks(512, 256, outer, 3) + convolution(256, 256, 9) + blocks(256, 128, outer, 3)
    expected_decoder += 2 * 128 + convolution(128, 3, outer[0])

    model = models.build("vae/od_vae", size, device="meta")
    assert sum(p.numel() for p in model.encoder.parameters()) == expected_encoder
    assert sum(p.numel() for p in model.decoder.parameters()) == expected_decoder
    assert sum(p.numel() for p in model.parameters()) == expected_encoder + expected_decoder + 72 + 20 == pinned
    assert model.compression == Compression(4, 8, 8)


def test_the_default_is_variant_4():
    assert ODVAEConfig() == models.config("vae/od_vae", "variant4")
    assert round(239_189_991 / 1e6, 2) == 239.19


def test_the_released_config_and_ours():
    """The release has norms over the clip; a public config that says nothing of norms means them."""
    ours = ADAPTER.config_from_public(RELEASE | {"_diffusers_version": "0.27.2", "norm_type": "groupnorm"})
    assert ours == dataclasses.replace(models.config("vae/od_vae", "variant4"), norm_scope="clip")
    assert ADAPTER.public_config(ours) == RELEASE
    twin = RELEASE | {"encoder_spatial_downsample": ["SpatialDownsample2x", *RELEASE["encoder_spatial_downsample"][1:]]}
    assert ADAPTER.config_from_public(twin) == ours  # computes the same


@pytest.mark.parametrize("size", models.sizes("vae/od_vae"))
def test_configs_survive_the_round_trip(size):
    config = dataclasses.replace(
        models.config("vae/od_vae", size), time_interpolation="nearest", space_interpolation="nearest", scaling_factor=0.5
    )
    assert ADAPTER.config_from_public(ADAPTER.public_config(config)) == config


def test_public_names_of_the_release():
    """Which layers are 2D shows in the names: those of the two outer levels of the encoder, but not the resampler of time."""
    public = ADAPTER.to_public(models.build("vae/od_vae", device="meta").state_dict())
    flat = {
        "encoder.conv_in": (128, 3, 3, 3),
        "encoder.down.0.block.1.conv2": (128, 128, 3, 3),
        "encoder.down.0.downsample.conv": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut": (256, 128, 1, 1),
    }
    causal = {
        "encoder.down.1.downsample.conv": (256, 256, 3, 3, 3),
        "encoder.down.2.block.0.nin_shortcut": (512, 256, 1, 1, 1),
        "encoder.mid.attn_1.proj_out": (512, 512, 1, 1, 1),
        "quant_conv": (8, 8, 1, 1, 1),
        "post_quant_conv": (4, 4, 1, 1, 1),
        "decoder.up.0.block.2.conv1": (128, 128, 3, 3, 3),
        "decoder.up.1.upsample.conv": (256, 256, 1, 3, 3),
        "decoder.up.3.upsample.conv": (512, 512, 3, 3, 3),
        "decoder.conv_out": (3, 128, 3, 3, 3),
    }
    assert len(public) == 248  # 250 of ours without the two statistics
    for name, shape in flat.items():
        assert public[f"{name}.weight"].shape == shape
        assert f"{name}.bias" in public
    for name, shape in causal.items():
        assert public[f"{name}.conv.weight"].shape == shape
        assert f"{name}.conv.bias" in public
    assert sum(tensor.ndim == 4 for tensor in public.values()) == 1 + 4 + 1 + 5


@pytest.mark.parametrize("size", ["tiny", *VARIANTS])
def test_strict_both_ways(size):
    """Every tensor goes there and comes back bitwise; the public layout has no statistics, which come back as none measured."""
    model = small(size)
    public = ADAPTER.to_public(model.state_dict())
    assert sum(t.numel() for t in public.values()) == sum(p.numel() for p in model.parameters())
    again = small(size)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(ADAPTER.from_public(public), strict=True)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("scope", ["clip", "frame"])
@torch.no_grad()
def test_a_folder_in_the_public_layout_loads(tmp_path, scope):
    """The class is known by its name, and the norm scope survives though the authors' code has only one."""
    model, video = small(norm_scope=scope), clip(5)
    again = models.load(models.save_public(model, tmp_path))
    assert again.config == model.config
    assert torch.equal(again.encode(video).mean, model.encode(video).mean)


# -- shapes and causality


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17])
@torch.no_grad()
def test_shapes(num_frames):
    model = models.build("vae/od_vae", "tiny").eval()
    posterior = model.encode(clip(num_frames, side=24))
    assert posterior.mean.shape == posterior.logvar.shape == (1, 4, 1 + (num_frames - 1) // 4, 3, 3)
    assert model.decode(posterior.mode()).shape == (1, 3, num_frames, 24, 24)


@torch.no_grad()
def test_the_log_variance_is_kept_in_range():
    model = small()
    model.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 0.0, 0.0])
    logvar = model.encode(clip(1)).logvar
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all() and (logvar[:, 2:].abs() < 20).all()


NO_TIME = (False, False, False)
COMBINATIONS = [
    (scope, interpolation, doubles_time)
    for scope in ("frame", "clip")
    for interpolation in ("nearest", "trilinear")
    for doubles_time in ((False, True, True), NO_TIME)
]


@pytest.mark.parametrize(("scope", "interpolation", "doubles_time"), COMBINATIONS)
@torch.no_grad()
def test_causality_is_what_the_model_says(scope, interpolation, doubles_time):
    """Later frames (latents) change: earlier latents (frames) stay bitwise equal when and only when the model says so.

    Norms over the clip leak in both directions; trilinear doubling leaks in the decoder. Each is the negative control of the
    combination without it.
    """
    model = small(norm_scope=scope, time_interpolation=interpolation, doubles_time=doubles_time)
    known = 1 + model.compression.time  # frames of two latents
    video = clip(1 + 3 * model.compression.time)
    changed = torch.cat([video[:, :, :known], -video[:, :, known:]], dim=2)
    first, second = model.encode(video).mean, model.encode(changed).mean
    assert torch.equal(first[:, :, :2], second[:, :, :2]) is model.encoder_causal is (scope == "frame")
    assert not torch.equal(first[:, :, 2:], second[:, :, 2:])

    latents = torch.randn(1, 4, 4, 2, 2)
    changed = torch.cat([latents[:, :, :2], -latents[:, :, 2:]], dim=2)
    first, second = model.decode(latents), model.decode(changed)
    held = interpolation == "nearest" or doubles_time == NO_TIME
    assert torch.equal(first[:, :, :known], second[:, :, :known]) is model.decoder_causal is (held and scope == "frame")
    assert not torch.equal(first[:, :, known:], second[:, :, known:])
    assert model.strictly_causal is (model.encoder_causal and model.decoder_causal)


def stream(step, whole, chunks):
    cache, parts = None, []
    for part in whole.split(chunks, dim=2):
        done = step(part, cache)
        cache = done.cache
        parts.append(done)
    return parts


@pytest.mark.parametrize("chunks", [[17], [1, 4, 4, 4, 4], [1, 16], [5, 8, 4], [13, 4]])
@pytest.mark.parametrize("size", ["variant2", "variant4"])
@torch.no_grad()
def test_encoding_in_chunks_equals_the_whole(size, chunks):
    model, video = small(size).double(), clip(17).double()
    whole, parts = model.encode(video), stream(model.encode_stream, video, chunks)
    mean, logvar = (torch.cat([getattr(part.posterior, name) for part in parts], dim=2) for name in ("mean", "logvar"))
    torch.testing.assert_close(mean, whole.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(logvar, whole.logvar, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunks", [[5], [1, 1, 1, 1, 1], [1, 4], [2, 3], [3, 1, 1]])
@pytest.mark.parametrize("size", ["variant3", "variant4"])
@torch.no_grad()
def test_decoding_in_chunks_equals_the_whole(size, chunks):
    model = small(size, time_interpolation="nearest").double()
    latents = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64)
    parts = stream(model.decode_stream, latents, chunks)
    assert [part.video.shape[2] for part in parts] == [4 * count - 3 * (n == 0) for n, count in enumerate(chunks)]
    torch.testing.assert_close(torch.cat([part.video for part in parts], dim=2), model.decode(latents), rtol=0, atol=1e-12)


def test_what_cannot_stream_refuses():
    latents = torch.zeros(1, 4, 1, 2, 2)
    with pytest.raises(ConfigError, match="the decoder of this vae/od_vae looks at later frames"):
        small().decode_stream(latents)
    with pytest.raises(ConfigError, match="the encoder of this vae/od_vae looks at later frames"):
        small(norm_scope="clip").encode_stream(clip(1))


# -- from an image VAE


@pytest.fixture(scope="module")
def image_vae(tmp_path_factory):
    """A random image VAE of the widths of `small`, and the folder it was saved to."""
    torch.manual_seed(1)
    shape = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**shape, **kinds).eval().requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("image_vae")
    vae.save_pretrained(folder)
    return vae, folder


def inflated(image_vae, size="variant4", **overrides):
    model = small(size, **overrides)
    models.inflate(model, image_vae[1])
    return model


def encode_frames(image_vae, video):
    return torch.stack([image_vae[0].encode(frame).latent_dist.mean for frame in video.unbind(2)], dim=2)


def decode_frames(image_vae, latents):
    return torch.stack([image_vae[0].decode(frame).sample for frame in latents.unbind(2)], dim=2)


def error(ours, expected):
    return (ours - expected).abs().max().item()


@pytest.mark.parametrize("scope", ["frame", "clip"])
@pytest.mark.parametrize("size", VARIANTS)
@torch.no_grad()
def test_inflated_it_is_the_image_vae_on_images(image_vae, size, scope):
    """One frame makes both norm scopes and both interpolations of time the same; only that of space has to be nearest."""
    model = inflated(image_vae, size, norm_scope=scope, space_interpolation="nearest")
    video = clip(1, side=32, batch=2)
    latents = encode_frames(image_vae, video)
    assert error(model.encode(video).mean, latents) < 1e-5
    assert error(model.decode(latents), decode_frames(image_vae, latents)) < 1e-5
    released = inflated(image_vae, size, norm_scope=scope)
    assert error(released.decode(latents), decode_frames(image_vae, latents)) > 1e-2


@pytest.mark.parametrize("size", VARIANTS)
@torch.no_grad()
def test_inflated_it_is_the_image_vae_on_clips(image_vae, size):
    """Last taps only: a stride of two in time keeps frames 0, 2, 4, ..., twice over 0, 4, 8, ...; and a frame held twice over
    is held four times, but for the first.

    The controls are norms over the clip, and frames that are interpolated.
    """
    model = inflated(image_vae, size, time_interpolation="nearest", space_interpolation="nearest")
    video = clip(9)
    latents = encode_frames(image_vae, video[:, :, ::4])
    held = decode_frames(image_vae, latents).repeat_interleave(torch.tensor([1, 4, 4]), dim=2)
    assert error(model.encode(video).mean, latents) < 1e-5
    assert error(model.decode(latents), held) < 1e-5
    over_clip = inflated(image_vae, size, norm_scope="clip", time_interpolation="nearest", space_interpolation="nearest")
    assert error(over_clip.encode(video).mean, latents) > 1e-2
    assert error(over_clip.decode(latents), held) > 1e-2
    assert error(inflated(image_vae, size, space_interpolation="nearest").decode(latents), held) > 1e-2


def test_image_vaes_that_do_not_fit(image_vae):
    folder = image_vae[1]
    with pytest.raises(CheckpointError, match="has norms of 4 groups, this vae/od_vae of 8: build it with num_groups=4"):
        models.inflate(small(num_groups=8), folder)
    with pytest.raises(CheckpointError, match="does not fit vae/od_vae"):
        models.inflate(small(num_res_blocks=2), folder)
    with pytest.raises(
        CheckpointError, match=r"does not fit vae/od_vae.* of another shape: encoder.conv_in.weight \(8, 3, 3, 3\)"
    ):
        models.inflate(small(widths=(16, 16, 16, 16)), folder)


# -- attention, training, mistakes


@torch.no_grad()
def test_parallelize_binds_attention_of_both_halves():
    model, video = small(), clip(5)
    before = model.encode(video).mean
    attentions = [model.encoder.middle.attention, model.decoder.middle.attention]
    old = [each.attend for each in attentions]
    assert parallelize(model, None, ParallelOptions(attention="math")) is model
    assert all(each.attend is not was for each, was in zip(attentions, old, strict=True))
    torch.testing.assert_close(model.encode(video).mean, before, rtol=0, atol=1e-5)
    attentions[0].attend = lambda q, k, v, mask: torch.zeros_like(q)
    assert not torch.allclose(model.encode(video).mean, before)


def test_every_parameter_gets_a_gradient():
    model = small().train()
    video = clip(5)
    (model(video, torch.randn(1, 4, 2, 2, 2)) - video).abs().mean().backward()
    # Softmax does not see a constant that all keys share.
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert sorted(dead) == ["decoder.middle.attention.k.bias", "encoder.middle.attention.k.bias"]
    assert model.last_layer.shape[0] == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"encoder_blocks": ("2d", "3d")}, r"encoder_blocks has 2 entries \('2d', '3d'\); with 4 levels \(widths\) it needs 4"),
        ({"doubles_time": (True,) * 4}, r"doubles_time has 4 entries .* it needs 3"),
        ({"decoder_blocks": ("2D", "3d", "3d", "3d")}, r"decoder_blocks has \['2D'\]; there are: 2d, half, 3d"),
        ({"middle_block": "2d"}, r"middle_block has \['2d'\]; there are: half, 3d"),
        ({"norm_scope": "video"}, r"norm_scope has \['video'\]; there are: frame, clip"),
        ({"time_interpolation": "linear"}, r"time_interpolation has \['linear'\]; there are: trilinear, nearest"),
        ({"space_interpolation": "linear"}, r"space_interpolation has \['linear'\]; there are: trilinear, nearest"),
        ({"widths": (48, 64, 64, 64)}, r"widths \[48\] are no multiples of num_groups 32"),
    ],
)
def test_configs_that_cannot_work(overrides, message):
    with pytest.raises(ConfigError, match=message):
        ODVAEConfig(**overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"encoder_attention": "AttnBlock3D", "encoder_temporal_downsample": ["", "TimeDownsampleRes2x", "", ""]},
            "looks like release 1.1 or older.* encoder_attention is 'AttnBlock3D', expected 'AttnBlock3DFix'",
        ),
        ({"encoder_conv_in": "CausalConv3d"}, "encoder_conv_in is 'CausalConv3d', expected 'Conv2d'"),
        ({"dropout": 0.1}, "dropout is 0.1, expected 0.0"),
        ({"embed_dim": 8}, "embed_dim is 8, expected 4"),
        ({"norm_type": "layernorm"}, "norm_type is 'layernorm', expected 'groupnorm'"),
        ({"wings": 2}, "wings is 2, expected None"),
        ({"_class_name": "WFVAEModel"}, "_class_name is 'WFVAEModel', expected 'CausalVAEModel'"),
        ({"encoder_resnet_blocks": ["ResnetBlock3D_GC"] * 4}, r"encoder_blocks has \['ResnetBlock3D_GC'\]"),
    ],
)
def test_public_configs_of_other_networks(change, message):
    with pytest.raises(ConfigError, match=message):
        ADAPTER.config_from_public(RELEASE | change)


def test_public_configs_without_what_is_needed():
    with pytest.raises(ConfigError, match="CausalVAEModel needs 'hidden_size', which this one lacks"):
        ADAPTER.config_from_public({key: value for key, value in RELEASE.items() if key != "hidden_size"})


def test_foreign_keys_are_refused():
    one = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"decoder\.extra is not in the public layout"):
        ADAPTER.from_public({"decoder.extra": one})
    with pytest.raises(CheckpointError, match=r"decoder\.extra is not a tensor of this model"):
        ADAPTER.to_public({"decoder.extra": one})
    with pytest.raises(CheckpointError, match=r"encoder\.down\.2\.time_downsample\.mix_factor .* looks like release 1\.1"):
        ADAPTER.from_public({"encoder.down.2.time_downsample.mix_factor": one})


def test_clips_off_the_rule():
    with pytest.raises(DataError, match=r"video has 8 frames; this VAE takes 1 \+ 4 \* n, the nearest are 5 and 9"):
        small().encode(clip(8))
    with pytest.raises(DataError, match=r"this VAE decodes \(B, 4, T', H', W'\)"):
        small().decode(torch.zeros(1, 16, 1, 2, 2))
