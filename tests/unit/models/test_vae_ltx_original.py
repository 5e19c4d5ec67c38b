"""The original single file of the LTX VAE, against diffusers' converter and the published configs (spec B.3, B.7)."""

import json

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers
from safetensors.torch import save_file

from videofm import models
from videofm.errors import CheckpointError, ConfigError
from videofm.models.vae.ltx import ADAPTER, SIZES

RELEASES = ("0.9.0", "0.9.1", "0.9.5")
ENCODER = [
    ["res_x", {"num_layers": 4}],
    ["compress_all", {}],
    ["res_x_y", 1],
    ["res_x", {"num_layers": 3}],
    ["compress_all", {}],
    ["res_x_y", 1],
    ["res_x", {"num_layers": 3}],
    ["compress_all", {}],
    ["res_x", {"num_layers": 3}],
    ["res_x", {"num_layers": 4}],
]
COMMON = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "scaling_factor": 1.0,
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
}
DOUBLING = ["compress_all", {"residual": True, "multiplier": 2}]
PUBLISHED = {
    "0.9.0": {
        "blocks": [[name, options if isinstance(options, int) else options.get("num_layers", 1)] for name, options in ENCODER]
    },
    "0.9.1": {
        "encoder_blocks": ENCODER,
        "decoder_blocks": [
            ["res_x", {"num_layers": 5, "inject_noise": True}],
            DOUBLING,
            ["res_x", {"num_layers": 6, "inject_noise": True}],
            DOUBLING,
            ["res_x", {"num_layers": 7, "inject_noise": True}],
            DOUBLING,
            ["res_x", {"num_layers": 8, "inject_noise": False}],
        ],
        "timestep_conditioning": True,
    },
    "0.9.5": {
        "encoder_blocks": [
            ["res_x", {"num_layers": 4}],
            ["compress_space_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 6}],
            ["compress_time_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 6}],
            ["compress_all_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 2}],
            ["compress_all_res", {"multiplier": 2}],
            ["res_x", {"num_layers": 2}],
        ],
        "decoder_blocks": [["res_x", {"num_layers": 5, "inject_noise": False}], *[DOUBLING, ["res_x", {"num_layers": 5}]] * 3],
        "timestep_conditioning": True,
        "spatial_padding_mode": "zeros",
    },
}
"""The configs in the metadata of the released files, as the authors write them: fine to coarse, 0.9.0 in the older form."""


def state_of(size, device="meta"):
    return models.build("vae/ltx", size, device=device).state_dict()


LONE_NUMBER = {"decoder.time_scale", "decoder.timestep_scale_multiplier"}


def moved(left, right):
    """Whether both have the same tensor objects under the same names; but one number is reshaped, hence another object."""
    others = {key for key in right if key not in left or left[key] is not right[key]}
    return left.keys() == right.keys() and others <= LONE_NUMBER and all(left[key].shape == right[key].shape for key in others)


def measured():
    torch.manual_seed(0)
    model = models.build("vae/ltx", "tiny").eval()
    model.set_latent_statistics(torch.randn(16), torch.rand(16) + 0.5)
    return model


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("size", RELEASES)
def test_diffusers_converts_our_original_to_its_own(size):
    """At full size: their converter moves each tensor object to the name that our public layout has it under."""
    state = state_of(size)
    original, public = ADAPTER.to_original(state, SIZES[size], prefix="vae."), ADAPTER.to_public(state)
    converted = convert_ltx_vae_checkpoint_to_diffusers(dict(original))
    assert moved(converted, public)


@pytest.mark.parametrize("size", SIZES)
def test_there_and_back(size):
    """Through `from_public` too, which knows the layout by its keys; beside a transformer, and with the unread statistics."""
    state = state_of(size)
    alone = ADAPTER.to_original(state, SIZES[size])
    assert not any(key.startswith("vae.") for key in alone)
    extra = ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
    combined = ADAPTER.to_original(state, SIZES[size], prefix="vae.")
    combined |= {f"vae.per_channel_statistics.{name}": torch.zeros(1) for name in extra}
    combined |= {"model.diffusion_model.patchify_proj.weight": torch.zeros(1)}
    for file in (alone, combined):
        for back in (ADAPTER.from_original(file), ADAPTER.from_public(file)):
            assert moved(back, state)
    assert ADAPTER.from_public(ADAPTER.to_public(state)).keys() == state.keys()


@pytest.mark.parametrize("size", RELEASES)
def test_the_published_configs(size):
    published = COMMON | PUBLISHED[size]
    assert ADAPTER.config_from_original(published) == SIZES[size]
    assert ADAPTER.config_from_original({"vae": published, "transformer": {}}) == SIZES[size]
    ours = ADAPTER.original_config(SIZES[size])
    names = [name for name, _ in published.get("encoder_blocks", published.get("blocks"))]
    assert [name for name, _ in ours["encoder_blocks"]] == names
    assert {key: ours[key] for key in COMMON} == COMMON


@pytest.mark.parametrize("size", SIZES)
def test_our_config_there_and_back(size):
    config = SIZES[size]
    assert ADAPTER.config_from_original(json.loads(json.dumps(ADAPTER.original_config(config)))) == config


@pytest.mark.parametrize(("size", "decoder_widths"), [("0.9.0", (32, 32, 16, 8)), ("0.9.1", (32, 16, 8))])
@torch.no_grad()
def test_diffusers_reads_our_single_file(tmp_path, size, decoder_widths):
    """From disk, and it decodes the same frames; 0.9.5 is known to diffusers by its width of 2048, so it has no tiny one."""
    torch.manual_seed(0)
    model = models.build("vae/ltx", size, encoder_widths=(8, 16, 32, 32), decoder_widths=decoder_widths).eval()
    model.set_latent_statistics(torch.randn(128), torch.rand(128) + 0.5)
    (tmp_path / "config.json").write_text(json.dumps(ADAPTER.public_config(model.config)))
    file = tmp_path / "ltx.safetensors"
    save_file(ADAPTER.to_original(model.state_dict(), model.config, prefix="vae."), file)
    theirs = AutoencoderKLLTXVideo.from_single_file(str(file), config=str(tmp_path), local_files_only=True)
    assert torch.equal(theirs.latents_std, model.latents_std)
    sigma = torch.tensor([0.05]) if model.config.timestep_conditioning else None
    latents = torch.randn(1, 128, 2, 1, 1)
    torch.manual_seed(3)
    expected = theirs.decode(latents, sigma).sample
    torch.testing.assert_close(model.decode(latents, sigma, torch.Generator().manual_seed(3)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("metadata", [True, False])
def test_a_single_file_loads(tmp_path, metadata):
    """Alone or beside a transformer; with the config of its metadata, or by the shapes of a release."""
    model = measured()
    config = {"config": json.dumps({"vae": ADAPTER.original_config(model.config)})} if metadata else None
    alone, combined = tmp_path / "vae.safetensors", tmp_path / "ltx.safetensors"
    save_file(ADAPTER.to_original(model.state_dict(), model.config), alone, metadata=config)
    beside = {"model.diffusion_model.patchify_proj.weight": torch.zeros(3)}
    save_file(ADAPTER.to_original(model.state_dict(), model.config, prefix="vae.") | beside, combined, metadata=config)
    for loaded in (models.load(alone), models.load(alone, component="vae"), models.load(combined, component="vae")):
        assert same(loaded, model)
        assert loaded.config == model.config
        assert not loaded.training
    with pytest.raises(ConfigError, match=r"holds more than one model; say which component: vae \(1 tensors are of none\)"):
        models.load(combined)
    with pytest.raises(ConfigError, match=r"has no component 'transformer' that is read here\. There are: vae"):
        models.load(combined, component="transformer")


def test_single_files_that_do_not_load(tmp_path):
    torch.manual_seed(0)
    model = models.build("vae/ltx", "tiny", encoder_widths=(8, 16, 32), decoder_widths=(32, 16))
    file = tmp_path / "vae.safetensors"
    original = ADAPTER.to_original(model.state_dict(), model.config)
    save_file(original, file)
    with pytest.raises(CheckpointError, match="no config in its metadata, and its tensors are of no size of vae/ltx"):
        models.load(file)
    save_file(original, file, metadata={"config": "{"})
    with pytest.raises(CheckpointError, match=r"the config in the metadata of .*vae\.safetensors is damaged"):
        models.load(file)
    other = json.dumps({"vae": ADAPTER.original_config(SIZES["tiny"])})
    save_file(original, file, metadata={"config": other})
    with pytest.raises(CheckpointError, match=r"does not fit vae/ltx\. .* of another shape"):
        models.load(file)
    save_file({key: tensor for key, tensor in original.items() if "std-of-means" not in key}, file)
    with pytest.raises(CheckpointError, match=r"vae\.safetensors: the file has no per_channel_statistics\.std-of-means"):
        models.load(file)


@pytest.mark.parametrize(("given", "wanted"), [("0.9.1", "0.9.0"), ("0.9.5", "0.9.1"), ("0.9.0", "0.9.5")])
def test_tensors_of_another_release_are_named(given, wanted):
    """Whatever layout they come in."""
    model, state = models.build("vae/ltx", wanted, device="meta"), state_of(given)
    message = rf"a file does not fit vae/ltx\. These tensors look like vae/ltx {given}, not {wanted}\. Tensors [0-9]+ missing"
    for public in (ADAPTER.to_public(state), ADAPTER.to_original(state, SIZES[given], prefix="vae.")):
        with pytest.raises(CheckpointError, match=message):
            models.load_weights(model, ADAPTER.from_public(public), "a file")


def test_what_tensors_look_like():
    state = state_of("0.9.1")
    assert ADAPTER.looks_like(state) == "0.9.1"
    assert ADAPTER.looks_like(dict(list(state.items())[10:])) == "0.9.1"  # a few are missing
    assert ADAPTER.looks_like({key: tensor for key, tensor in state.items() if key.startswith("encoder.")}) is None
    narrow = models.build("vae/ltx", "0.9.1", device="meta", encoder_widths=(64, 128, 256, 256))
    assert ADAPTER.looks_like(narrow.state_dict()) is None
    with pytest.raises(CheckpointError, match="look like vae/ltx 0.9.1, not this config of it"):
        models.load_weights(narrow, state, "a file")


def test_missing_statistics_are_explained(tmp_path):
    model = measured()
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in ("latents_mean", "latents_std")}
    with pytest.raises(CheckpointError, match=r"2 missing: latents_mean, latents_std\. .* are the latent statistics"):
        models.load_weights(model, ADAPTER.from_public(ADAPTER.to_public(state)), "a file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_layer": "group_norm"}, "norm_layer 'group_norm' .must be 'pixel_norm'"),
        ({"_class_name": "CausalDiffusionVAE"}, "_class_name 'CausalDiffusionVAE'"),
        ({"spatial_padding_mode": "replicate"}, "spatial_padding_mode 'replicate'"),
        ({"wings": 2}, "unknown key 'wings'"),
        ({"out_channels": 4}, r"in_channels 3 and out_channels 4 \(must be equal\)"),
        ({"latent_channels": None}, "no latent_channels"),
        ({"encoder_blocks": [["attn_res_x", 2]]}, r"encoder_blocks has blocks that vae/ltx does not \(attn_res_x\)"),
        (
            {"encoder_blocks": [["compress_all", 1], ["res_x", 2]]},
            r"vae/ltx does not \(compress_all, res_x\): stages are res_x",
        ),
        ({"encoder_blocks": [["res_x", 1], ["res_x_y", 1], ["res_x", 2]]}, "res_x_y stands between stages"),
        (
            {"decoder_blocks": [["res_x", {"num_layers": 1, "attention_head_dim": 8}]]},
            r"does not \(res_x with attention_head_dim\)",
        ),
        ({"decoder_blocks": [["res_x", 1], ["compress_time_res", 1], ["res_x", 2]]}, "has compress_time_res; the decoder"),
    ],
)
def test_configs_of_other_models(change, message):
    with pytest.raises(ConfigError, match=message):
        ADAPTER.config_from_original(COMMON | PUBLISHED["0.9.5"] | change)


def test_what_the_original_cannot_express():
    config = models.config("vae/ltx", "0.9.0", encoder_widths=(8, 12, 16, 16))
    with pytest.raises(ConfigError, match="cannot go from 8 to 12 channels: write the layout of diffusers"):
        ADAPTER.original_config(config)
    with pytest.raises(ConfigError, match="has a causal encoder and norm_eps 1e-06; this one has encoder_causal False"):
        ADAPTER.original_config(models.config("vae/ltx", "0.9.0", encoder_causal=False))


def test_files_of_something_else():
    original = ADAPTER.to_original(state_of("tiny"), SIZES["tiny"])
    with pytest.raises(CheckpointError, match="there is no VAE in the original layout"):
        ADAPTER.from_original({"encoder.conv_in.conv.weight": torch.zeros(1)})
    holed = {key: tensor for key, tensor in original.items() if not key.startswith("encoder.down_blocks.1.")}
    with pytest.raises(CheckpointError, match=r"encoder\.down_blocks of this file is no sequence of residual blocks"):
        ADAPTER.from_original(holed)
    with pytest.raises(CheckpointError, match=r"decoder\.up_blocks\.0\.attention\.weight is not in the public layout"):
        ADAPTER.from_original(original | {"decoder.up_blocks.0.attention.weight": torch.zeros(1)})
