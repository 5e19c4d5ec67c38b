"""Step-Video's VAE against a reference that is written from the authors' names; its layouts, weights and bad input."""

from fnmatch import fnmatchcase

import pytest
import torch

from tests.unit.models.step_video import SMALL, Reference, clip, small
from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.models.vae.step_video import ADAPTER, StepVideoVAEConfig, load_stage_one
from videofm.types import Compression

PATTERNS = {
    "dual path": ("*.dual_path.*",),
    "middle": ("*.middle.*",),
    "backbone": ("*.stages.*", "*.conv_*", "*.norm_out.*"),
}


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_equal_to_the_authors_network(version):
    """An image and two chunks: moments and frames. Frames beside the seam are 0.76 a + 0.24 b and 0.6 b + 0.4 a."""
    model = small(dual_path=version == 2, norm_scope="clip" if version == 1 else "frame")
    reference = Reference(ADAPTER.to_public(model.state_dict()), version)
    for video in (clip(1), clip(34, batch=2)):
        chunks = video.split(17, dim=2)
        moments = [reference.encode(chunk) for chunk in chunks]
        posterior = model.encode(video)
        torch.testing.assert_close(posterior.mean, torch.cat([mean for mean, _ in moments], dim=2), rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, torch.cat([logvar for _, logvar in moments], dim=2), rtol=0, atol=1e-5)

        decoded = model.decode(posterior.mean)
        expected = torch.cat([reference.decode(mean) for mean, _ in moments], dim=2)
        if len(chunks) == 2:
            a, b = expected[:, :, 16].clone(), expected[:, :, 17].clone()
            expected[:, :, 16], expected[:, :, 17] = 0.76 * a + 0.24 * b, 0.6 * b + 0.4 * a
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
        assert decoded.shape == video.shape


# -- sizes and layout


@pytest.mark.parametrize(
    ("size", "encoder", "decoder", "compression"),
    [
        ("16x16x8", 109_885_696, 388_933_123, Compression(8, 16, 16)),
        ("8x8x4", 99_710_880, 159_117_315, Compression(4, 8, 8)),
    ],
)
def test_sizes(size, encoder, decoder, compression):
    """Spec F-A.1: 498,818,819 in all.

    Stage one has one convolution (27 taps and a bias) where the dual paths have two. Encoder: 512 -> 256 and 2048 -> 128, of
    3,539,200 + 7,078,016 parameters, give way to 512 -> 32, of 442,400: 10,174,816 less. Decoder: 64 -> 2048 and 2048 -> 4096,
    of 3,540,992 + 226,496,512, give way to 16 -> 512, of 221,696: 229,815,808 less.
    """
    model = models.build("vae/step_video", size, device="meta")
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    assert model.compression == compression
    assert model.config.scaling_factor == 1.0


def layer(name):
    return {f"{name}.weight", f"{name}.bias"}


def res_block(name, changes_width):
    keys = layer(f"{name}.norm1") | layer(f"{name}.conv1.conv") | layer(f"{name}.norm2") | layer(f"{name}.conv2.conv")
    return keys | (layer(f"{name}.nin_shortcut.conv") if changes_width else set())


def public_keys(version):
    """The authors' module tree: encoder widths 32 -> 128 -> 256 -> 512 -> 512, decoder levels 3 to 0 at 512, 512, 256, 128."""
    keys = layer("encoder.conv_in.conv") | layer("encoder.conv_out.conv")
    keys |= layer("decoder.conv_in.conv") | layer("decoder.conv_out.conv")
    for coder in ("encoder", "decoder"):
        keys |= layer(f"{coder}.norm_out") | layer(f"{coder}.mid.attn_1.norm")
        keys |= res_block(f"{coder}.mid.block_1", False) | res_block(f"{coder}.mid.block_2", False)
        for name in ("q", "k", "v", "proj_out"):
            keys |= layer(f"{coder}.mid.attn_1.{name}.conv")
    for level in range(4):
        for block in range(2):
            keys |= res_block(f"encoder.down.{level}.block.{block}", changes_width=block == 0 and level < 3)
        for block in range(3):
            keys |= res_block(f"decoder.up.{level}.block.{block}", changes_width=block == 0 and level < 2)
    keys |= layer("encoder.down.0.downsample.conv") | layer("decoder.up.1.upsample.conv")
    for level in (1, 2):
        keys |= layer(f"encoder.down.{level}.downsample.conv.conv")
    for level in (2, 3):
        for part in ("conv1.conv", "norm1", "conv2.conv", "norm2"):
            keys |= layer(f"decoder.up.{level}.upsample.conv3d.{part}")
    if version == 2:
        keys |= layer("encoder.conv_patchify.conv.conv") | layer("decoder.conv_unpatchify.conv.conv")
    return keys


@pytest.mark.parametrize(("size", "version", "num_tensors"), [("16x16x8", 2, 262), ("8x8x4", 1, 258)])
def test_layout_is_that_of_the_authors_both_ways(size, version, num_tensors):
    """262 tensors: 24 ResBlocks of 8 (8 in the encoder, 12 in the decoder, 2 in each middle), 5 of them with 2 for a shortcut;
    3 strided and 1 upsampling convolution of 2, 2 upsamplers of 8, 2 attentions of 10, 4 outer convolutions and 2 norms of 2,
    and 4 for patchify and unpatchify: 192 + 10 + 8 + 16 + 20 + 12 + 4.
    """
    model = models.build("vae/step_video", size, device="meta")
    public = ADAPTER.to_public(model.state_dict())
    assert set(public) == public_keys(version)
    assert len(public) == num_tensors
    assert public["encoder.down.0.downsample.conv.weight"].shape == (128, 128, 3, 3)
    assert public["decoder.up.1.upsample.conv.weight"].shape == (256, 256, 3, 3)
    assert public["decoder.mid.attn_1.proj_out.conv.weight"].shape == (512, 512, 1, 1, 1)
    assert public["decoder.up.0.block.0.nin_shortcut.conv.weight"].shape == (128, 256, 1, 1, 1)

    in_file = ADAPTER.to_file(model.state_dict())
    assert set(in_file) ^ set(public) == layer("decoder.conv_out") | layer("decoder.conv_out.conv")
    for theirs in (public, in_file):
        back = ADAPTER.from_public(theirs)
        assert {key: tensor.shape for key, tensor in back.items()} == {k: t.shape for k, t in model.state_dict().items()}


@pytest.mark.parametrize("dual_path", [True, False])
def test_weights_survive_the_round_trip(dual_path):
    model = small(dual_path=dual_path)
    back = ADAPTER.from_public(ADAPTER.to_public(model.state_dict()))
    model.load_state_dict(back, strict=True)
    for key, tensor in small(dual_path=dual_path).state_dict().items():
        assert torch.equal(back[key], tensor), key


def test_configs_both_ways():
    """The published size takes nothing but the constructor's arguments; what these cannot say is added under our names."""
    released = models.config("vae/step_video", "16x16x8")
    assert ADAPTER.public_config(released) == {
        "_class_name": "StepVideoAutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "z_channels": 64,
        "num_res_blocks": 2,
        "version": 2,
    }
    assert set(ADAPTER.public_config(models.config("vae/step_video", "8x8x4"))) - {"norm_scope"} == set(
        ADAPTER.public_config(released)
    )
    for config in (*(models.config("vae/step_video", size) for size in models.sizes("vae/step_video")), small().config):
        assert ADAPTER.config_from_public(ADAPTER.public_config(config)) == config
    version_1 = ADAPTER.config_from_public({})
    assert (version_1.dual_path, version_1.latent_channels, version_1.norm_scope) == (False, 16, "clip")


def test_foreign_keys_and_configs_are_refused():
    with pytest.raises(CheckpointError, match=r"encoder\.extra is not in the public layout"):
        ADAPTER.from_public({"encoder.extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"encoder\.extra is not a tensor of this model"):
        ADAPTER.to_public({"encoder.extra": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"unknown keys \['down_block_types'\]\."):
        ADAPTER.config_from_public({"_class_name": "StepVideoAutoencoderKL", "down_block_types": []})
    with pytest.raises(ConfigError, match=r"version 3 \(must be 1 or 2\)"):
        ADAPTER.config_from_public({"version": 3})


@pytest.mark.parametrize("dual_path", [True, False])
def test_unfreezing_patterns_part_the_parameters(dual_path):
    """Each parameter matches the patterns of one group, and the docstring of the config lists these patterns."""
    found = dict.fromkeys(PATTERNS, 0)
    for name, _ in models.build("vae/step_video", "16x16x8", device="meta", dual_path=dual_path).named_parameters():
        groups = [group for group, patterns in PATTERNS.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
        assert len(groups) == 1, (name, groups)
        found[groups[0]] += 1
    assert found == {"dual path": 8 * dual_path, "middle": 52, "backbone": 202 + 4 * (not dual_path)}
    assert all(pattern in StepVideoVAEConfig.__doc__ for patterns in PATTERNS.values() for pattern in patterns)


# -- training


def test_fresh_weights():
    """Each ResBlock is its skip, and the log-variances are near -6."""
    model = models.build("vae/step_video", "tiny")
    x = torch.randn(1, 32, 3, 4, 4)
    assert torch.equal(model.encoder.middle.block1(x), x)
    for dual_path in (True, False):
        logvar = models.build("vae/step_video", "tiny", dual_path=dual_path).encode(clip(17)).logvar
        assert (logvar + 6).abs().mean() < 1.5


@torch.no_grad()
def test_stage_two_starts_from_stage_one():
    """All but the dual paths and the statistics are copied, so that both agree up to the end of the middle."""
    first, second = small(dual_path=False), models.build("vae/step_video", "tiny", **SMALL)
    drawn = {key: tensor.clone() for key, tensor in second.state_dict().items()}
    first.latents_mean.fill_(3)
    fresh = load_stage_one(second, first.state_dict())
    expected = {f"{c}.dual_path.{n}.conv.{p}" for c in ("encoder", "decoder") for n in (0, 1) for p in ("weight", "bias")}
    assert set(fresh) == expected | {"latents_mean", "latents_std"}
    for key, tensor in second.state_dict().items():
        assert torch.equal(tensor, drawn[key] if key in fresh else first.state_dict()[key]), key
    x = torch.randn(1, 16, 3, 2, 2)
    assert torch.equal(first.decoder.middle(x), second.decoder.middle(x))


def test_what_is_not_stage_one():
    stage_one = small(dual_path=False)
    with pytest.raises(ConfigError, match="without dual path is of stage one itself"):
        load_stage_one(stage_one, stage_one.state_dict())
    with pytest.raises(CheckpointError, match=r"not of stage one .* 8 unexpected: encoder\.dual_path\.0\.conv\.weight"):
        load_stage_one(small(), small().state_dict())
    deeper = small(dual_path=False, num_res_blocks=2)
    with pytest.raises(CheckpointError, match=r"unexpected: encoder\.stages\.0\.blocks\.1\."):
        load_stage_one(small(), deeper.state_dict())
    with pytest.raises(CheckpointError, match=r"missing: encoder\.stages\.0\.blocks\.1\."):
        load_stage_one(small(num_res_blocks=2), stage_one.state_dict())
    wider = small(dual_path=False, widths=(8, 8, 16, 32))
    with pytest.raises(CheckpointError, match=r"of another shape: encoder\.stages\.3\.blocks\.0"):
        load_stage_one(small(), wider.state_dict())


# -- bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 16, 16), r"video has 16 frames; this VAE takes 1 or 17 \* n, the nearest are 1 and 17"),
        ((1, 3, 35, 16, 16), r"video has 35 frames; .* the nearest are 34 and 51"),
        ((1, 3, 0, 16, 16), r"video has 0 frames"),
        ((1, 3, 17, 24, 16), "height of 24 pixels; this VAE takes multiples of 16"),
    ],
)
def test_videos_that_do_not_fit(shape, message):
    model = models.build("vae/step_video", "tiny", **SMALL)
    with pytest.raises(DataError, match=message):
        model.encode(torch.zeros(shape))


def test_other_inputs_that_do_not_fit():
    model = models.build("vae/step_video", "tiny", **SMALL, blend_seams=False)
    with pytest.raises(DataError, match=r"latents have 4 frames; this VAE decodes 1 \(an image\) or 3 \* n"):
        model.decode(torch.zeros(1, 2, 4, 1, 1))
    with pytest.raises(DataError, match=r"latents have shape \(1, 5, 3, 1, 1\); this VAE decodes \(B, 2,"):
        model.decode(torch.zeros(1, 5, 3, 1, 1))
    with pytest.raises(DataError, match="latents have 5 frames"):
        model.pixel_frames(5)
    with pytest.raises(DataError, match="video has 18 frames"):
        model.latent_frames(18)
    with pytest.raises(DataError, match="video has 8 frames"):
        model.encode_stream(torch.zeros(1, 3, 8, 16, 16), model.encode_stream(torch.zeros(1, 3, 17, 16, 16)).cache)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"norm_scope": "batch"}, "norm_scope is 'batch'; there are: frame, clip"),
        ({"widths": (128, 256, 512)}, r"widths has 3 entries \(128, 256, 512\); it needs 4"),
        ({"stem_width": 24}, "must be multiples of num_groups 32; 24 is not"),
        ({"latent_channels": 48}, r"the last of widths, 512, must be a multiple of 4 \* latent_channels = 192"),
    ],
)
def test_configs_that_cannot_work(overrides, message):
    with pytest.raises(ConfigError, match=message):
        StepVideoVAEConfig(**overrides)
