"""The original single file of the LTX transformer, against diffusers' converter and the published configs (spec C.6)."""

import json

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from videofm import models
from videofm.errors import CheckpointError, ConfigError
from videofm.models.dit.ltx import ADAPTER, SIZES
from videofm.models.vae.ltx import ADAPTER as VAE_ADAPTER

PUBLISHED = {
    "_class_name": "Transformer3DModel",
    "_diffusers_version": "0.25.1",
    "_name_or_path": "PixArt-alpha/PixArt-XL-2-256x256",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 2048,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "num_attention_heads": 32,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 128,
    "project_to_2d_pos": True,
    "upcast_attention": False,
    "use_linear_projection": False,
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "timestep_scale_multiplier": 1000,
}
"""The config in the metadata of the released 2B file, as the authors write it."""


def state_of(size, device="meta"):
    return models.build("dit/ltx", size, device=device).state_dict()


def identical(left, right):
    """Whether both have the same tensor objects under the same names."""
    return left.keys() == right.keys() and all(left[key] is right[key] for key in left)


def tiny():
    torch.manual_seed(0)
    return models.build("dit/ltx", "tiny", num_layers=2).eval()


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("size", SIZES)
def test_diffusers_converts_our_original_to_its_own(size):
    """At full size: their converter moves each tensor object to the name that our public layout has it under."""
    state = state_of(size)
    original = ADAPTER.to_original(state, SIZES[size])
    assert all(key.startswith("model.diffusion_model.") for key in original)
    assert identical(convert_ltx_transformer_checkpoint_to_diffusers(dict(original)), ADAPTER.to_public(state))


@pytest.mark.parametrize("size", SIZES)
def test_there_and_back(size):
    """With the prefix and without it, beside a VAE; `from_public` knows the layout by its keys."""
    state, beside = state_of(size), {"vae.decoder.conv_in.conv.bias": torch.zeros(1)}
    for original in (ADAPTER.to_original(state, SIZES[size]), ADAPTER.to_original(state, SIZES[size], prefix="")):
        for file in (original, original | beside):
            assert identical(ADAPTER.from_original(file), state)
            assert identical(ADAPTER.from_public(file), state)
    assert identical(ADAPTER.from_public(ADAPTER.to_public(state)), state)


def test_the_published_configs():
    """Of 2B; 0.9.5 says that its coordinates have the causal fix, which is not about weights; 13B is wider and deeper."""
    later = PUBLISHED | {"causal_temporal_positioning": True}
    del later["project_to_2d_pos"]
    large = later | {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}
    assert ADAPTER.config_from_original(PUBLISHED) == SIZES["2b"]
    assert ADAPTER.config_from_original({"transformer": later, "vae": {}}) == SIZES["2b"]
    assert ADAPTER.config_from_original(large) == SIZES["13b"]
    ours = ADAPTER.original_config(SIZES["2b"])
    about_the_file = ("_diffusers_version", "_name_or_path", "project_to_2d_pos")
    assert all(ours[key] == value for key, value in PUBLISHED.items() if key not in about_the_file)


@pytest.mark.parametrize("size", SIZES)
def test_our_config_there_and_back(size):
    config = models.config("dit/ltx", size, theta=500.0)
    assert ADAPTER.config_from_original(json.loads(json.dumps(ADAPTER.original_config(config)))) == config


@torch.no_grad()
def test_diffusers_reads_our_single_file(tmp_path):
    """From disk, every tensor."""
    model = tiny()
    (tmp_path / "config.json").write_text(json.dumps(ADAPTER.public_config(model.config)))
    file = tmp_path / "ltx.safetensors"
    save_file(ADAPTER.to_original(model.state_dict(), model.config), file)
    theirs = LTXVideoTransformer3DModel.from_single_file(str(file), config=str(tmp_path), local_files_only=True)
    read, public = theirs.state_dict(), ADAPTER.to_public(model.state_dict())
    assert read.keys() == public.keys() and all(torch.equal(read[key], public[key]) for key in read)


@pytest.mark.parametrize("metadata", [True, False])
def test_a_single_file_loads(tmp_path, metadata):
    """Alone or beside the VAE; with the config of its metadata, or by the shapes of a size."""
    torch.manual_seed(0)
    model, vae = models.build("dit/ltx", "tiny").eval(), models.build("vae/ltx", "tiny").eval()
    described = {"transformer": ADAPTER.original_config(model.config), "vae": VAE_ADAPTER.original_config(vae.config)}
    config = {"config": json.dumps(described)} if metadata else None
    alone, combined = tmp_path / "dit.safetensors", tmp_path / "ltx.safetensors"
    tensors = ADAPTER.to_original(model.state_dict(), model.config)
    save_file(tensors, alone, metadata=config)
    save_file(tensors | VAE_ADAPTER.to_original(vae.state_dict(), vae.config, prefix="vae."), combined, metadata=config)
    for loaded in (models.load(alone), models.load(combined, component="transformer")):
        assert same(loaded, model)
        assert loaded.config == model.config
        assert not loaded.training
    assert same(models.load(combined, component="vae"), vae)
    with pytest.raises(ConfigError, match=r"holds more than one model; say which component: vae, transformer \(0 tensors"):
        models.load(combined)


def test_single_files_that_do_not_load(tmp_path):
    model, file = tiny(), tmp_path / "ltx.safetensors"
    original = ADAPTER.to_original(model.state_dict(), model.config)
    save_file(original, file)
    with pytest.raises(CheckpointError, match=r"its tensors are of no size of dit/ltx \(tiny, 2b, 13b\)"):
        models.load(file)
    save_file(original, file, metadata={"config": json.dumps({"transformer": ADAPTER.original_config(SIZES["tiny"])})})
    with pytest.raises(CheckpointError, match=r"does not fit dit/ltx\. .* missing: blocks\.\{2-3\}"):
        models.load(file)
    save_file(original | {"model.diffusion_model.audio_patchify_proj.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"ltx\.safetensors: audio_patchify_proj\.weight is not in the public layout"):
        models.load(file)


@pytest.mark.parametrize(("given", "wanted"), [("2b", "13b"), ("13b", "2b"), ("2b", "tiny")])
def test_tensors_of_another_size_are_named(given, wanted):
    """Whatever layout they come in."""
    model, state = models.build("dit/ltx", wanted, device="meta"), state_of(given)
    for public in (ADAPTER.to_public(state), ADAPTER.to_original(state, SIZES[given])):
        with pytest.raises(CheckpointError, match=rf"These tensors look like dit/ltx {given}, not {wanted}\. Tensors"):
            models.load_weights(model, ADAPTER.from_public(public), "a file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AVTransformer3DModel"}, "_class_name 'AVTransformer3DModel'"),
        ({"adaptive_norm": "single_scale"}, "adaptive_norm 'single_scale'"),
        ({"positional_embedding_max_pos": [20, 1024, 1024]}, r"positional_embedding_max_pos \[20, 1024, 1024\]"),
        ({"cross_attention_dim": 1024}, "cross_attention_dim 1024"),
        ({"out_channels": 64}, "out_channels 64"),
        ({"wings": 2}, "wings 2"),
        ({"num_layers": None, "qk_norm": None}, "dit/ltx can hold: no qk_norm, no num_layers"),
    ],
)
def test_configs_of_other_models(change, message):
    with pytest.raises(ConfigError, match=message):
        ADAPTER.config_from_original(PUBLISHED | change)


def test_files_of_something_else():
    with pytest.raises(CheckpointError, match=r"no transformer in the original layout .*no patchify_proj\.weight and no adaln"):
        ADAPTER.from_original({"model.diffusion_model.x_embedder.weight": torch.zeros(1)})
