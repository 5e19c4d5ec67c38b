"""Low-rank adapters: against peft's own merge, diffusers' loader, and what a checkpoint must hold."""

import copy
import json
import sys

import peft
import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from safetensors.torch import load_file, save_file

from videofm import models
from videofm.errors import CheckpointError, ConfigError
from videofm.models.lora import LoraSpec, add_lora, is_lora
from videofm.ops.rope import video_coordinates
from videofm.types import Compression, Conditioning

RANK, ALPHA = 3, 6.0
LAYERS_OF_A_BLOCK = 8
"""q, k, v and out of two attentions."""


def base():
    torch.manual_seed(0)
    model = models.build("dit/ltx", "tiny", num_layers=2, num_heads=2, head_width=16, caption_channels=12).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros of the start would hide mistakes
            if parameter.abs().max() < 0.1:
                parameter.normal_(std=0.1)
    return model


def adapted(trained=True, seed=2):
    model = base()
    models.inject_lora(model, RANK, ALPHA)
    if trained:
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_lora(name):
                    parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def velocity(model):
    generator = torch.Generator().manual_seed(1)
    text = Conditioning(torch.randn(1, 6, 12, generator=generator), torch.ones(1, 6, dtype=torch.bool))
    where = video_coordinates((3, 2, 4), torch.tensor([8.0]), Compression(4, 8, 8))
    return model(torch.randn(1, 24, 16, generator=generator), torch.tensor([0.5]), text, where)


def run_with(tmp_path, model, averaged=None):
    """A run directory as training writes it."""
    models.save_base(model, tmp_path / "base" / "dit")
    folder = tmp_path / "checkpoints" / "step_00000001"
    models.save(model, folder / "models" / "dit")
    if averaged is not None:
        (folder / "ema" / "dit").mkdir(parents=True)
        save_file(models.weights(averaged), folder / "ema" / "dit" / "model.safetensors")
    (folder / "COMMITTED.json").write_text("{}")
    return tmp_path


def test_training_starts_from_the_model_as_it_was():
    assert torch.equal(velocity(adapted(trained=False)), velocity(base()))


def test_only_the_adapters_train():
    """A (3 x 32) and B (32 x 3) on 8 layers of 2 blocks; the gradient of B is not zero from the start."""
    model = adapted(trained=False)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * LAYERS_OF_A_BLOCK and all(map(is_lora, trained))
    assert sum(parameter.numel() for parameter in trained.values()) == 2 * LAYERS_OF_A_BLOCK * 2 * 3 * 32
    text = Conditioning(torch.randn(1, 6, 12), torch.ones(1, 6, dtype=torch.bool))
    where = video_coordinates((1, 2, 2), torch.tensor([8.0]), Compression(4, 8, 8))
    model(torch.randn(1, 4, 16), torch.tensor([0.5]), text, where).square().mean().backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)
    assert all(parameter.grad.abs().max() > 0 for name, parameter in trained.items() if "lora_B" in name)
    model.requires_grad_(True)
    models.freeze_all_but_lora(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(trained)


def test_merged_equals_the_model_with_adapters_and_the_merge_of_peft():
    model = adapted()
    theirs, merged = copy.deepcopy(model), models.merge_lora(copy.deepcopy(model))
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    assert merged.state_dict().keys() == base().state_dict().keys()
    assert models.lora_spec(merged) is None and models.merge_lora(merged) is merged
    torch.testing.assert_close(velocity(merged), velocity(model), rtol=0, atol=1e-5)
    weight = theirs.get_submodule("blocks.1.cross_attention.k").base_layer.weight
    torch.testing.assert_close(merged.blocks[1].cross_attention.k.weight, weight, rtol=0, atol=1e-6)
    assert (velocity(merged) - velocity(base())).abs().max() > 1e-2


def test_a_checkpoint_holds_the_adapters_and_loads_merged(tmp_path):
    model, averaged = adapted(), adapted(seed=3)
    run = run_with(tmp_path, model, averaged)
    stored = load_file(run / "checkpoints" / "step_00000001" / "models" / "dit" / "model.safetensors")
    assert len(stored) == 2 * 2 * LAYERS_OF_A_BLOCK and all(map(is_lora, stored))
    plain = load_file(run / "base" / "dit" / "model.safetensors")
    before = base().state_dict()
    assert plain.keys() == before.keys() and all(torch.equal(plain[key], before[key]) for key in plain)
    for ema, wanted in ((True, averaged), (False, model)):
        loaded = models.load(run, ema=ema)
        assert loaded.config == model.config and models.lora_spec(loaded) is None
        torch.testing.assert_close(velocity(loaded), velocity(wanted), rtol=0, atol=1e-5)
    assert (velocity(model) - velocity(averaged)).abs().max() > 1e-2


def test_adapters_go_on_where_they_were(tmp_path):
    """As on resuming: into a model that got fresh adapters, which change nothing, hence the base of the run again."""
    model, fresh = adapted(), adapted(trained=False)
    models.load_weights(fresh, models.weights(model), "a checkpoint")
    assert torch.equal(velocity(fresh), velocity(model))
    assert all(is_lora(name) == parameter.requires_grad for name, parameter in fresh.named_parameters())
    less = dict(list(models.weights(model).items())[1:])
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.0\.self_attention\.q\.lora_A\.default\.weight\.$"):
        models.load_weights(fresh, less, "a checkpoint")


@torch.no_grad()
def test_diffusers_loads_the_adapter(tmp_path):
    """`load_lora_weights` on a pipeline of the base gives the velocity of the merged model."""
    model = adapted()
    adapter = models.adapter("dit/ltx")
    theirs = LTXVideoTransformer3DModel.from_config(adapter.public_config(model.config)).eval()
    theirs.load_state_dict(adapter.to_public(base().state_dict()))
    file = models.save_adapter(run_with(tmp_path / "run", model), tmp_path / "adapter")
    assert file.name == "pytorch_lora_weights.safetensors"
    vae = models.build("vae/ltx", "tiny")
    public = AutoencoderKLLTXVideo.from_config(models.adapter("vae/ltx").public_config(vae.config))
    pipeline = LTXPipeline(FlowMatchEulerDiscreteScheduler(), public, None, None, theirs)
    pipeline.load_lora_weights(str(tmp_path / "adapter"))
    generator = torch.Generator().manual_seed(1)
    text, tokens = torch.randn(1, 6, 12, generator=generator), torch.randn(1, 24, 16, generator=generator)
    where = video_coordinates((3, 2, 4), torch.tensor([8.0]), Compression(4, 8, 8))
    found = theirs(tokens, text, torch.tensor([500.0]), torch.ones(1, 6), video_coords=where).sample
    torch.testing.assert_close(found, velocity(models.merge_lora(model)), rtol=0, atol=1e-5)


def test_without_peft_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ConfigError, match=r"LoRA needs peft, which is not installed: pip install -c constraints\.txt -e '\.\[lora\]'"
    ):
        models.inject_lora(base(), RANK)


def test_what_cannot_have_adapters(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'\*atention\*' matches no linear layer of dit/ltx\. There are: proj_in, .*blocks\.\{0-1\}"
    ):
        models.inject_lora(base(), RANK, targets=["*attention.q", "*atention*"])
    vae = models.build("vae/ltx", "tiny")
    with pytest.raises(ConfigError, match="matches no linear layer of vae/ltx"):
        models.inject_lora(vae, RANK)


def test_adapters_of_something_else(tmp_path):
    model, spec = adapted(), LoraSpec(RANK, ALPHA, ("*",))
    tensors = models.weights(model)
    wide = models.build("dit/ltx", "tiny", num_layers=2, num_heads=4, head_width=16)
    with pytest.raises(
        CheckpointError, match=r"a file has matrices \(32, 3\) and \(3, 32\) for blocks\.0.*its weight is \(64, 64\)"
    ):
        add_lora(wide, tensors, spec, "a file")
    with pytest.raises(CheckpointError, match=r"a file: blocks\.0\.self_attention\.q is no pair of matrices"):
        add_lora(base(), dict(list(tensors.items())[1:]), spec, "a file")
    run = run_with(tmp_path / "run", model)
    described = run / "checkpoints" / "step_00000001" / "models" / "dit" / "model.json"
    (run / "base").rename(run / "elsewhere")
    with pytest.raises(CheckpointError, match=r"holds adapters, and what they are added to is not in .*base"):
        models.load(run)
    (run / "elsewhere").rename(run / "base")
    described.write_text(json.dumps(json.loads(described.read_text()) | {"lora": {"rank": 3}}))
    with pytest.raises(CheckpointError, match="must describe adapters by rank, alpha and targets, not by rank"):
        models.load(run)
    whole = run_with(tmp_path / "whole", base())
    with pytest.raises(CheckpointError, match="holds a whole model and no adapters: it was trained without models.ROLE.lora"):
        models.save_adapter(whole, tmp_path)


def test_adapters_of_a_model_that_diffusers_has_none_for(tmp_path):
    torch.manual_seed(0)
    encoder = models.build("text/t5", "tiny")
    models.inject_lora(encoder, RANK, targets=["*SelfAttention.q"])
    with pytest.raises(ConfigError, match="diffusers has no place for adapters of text/t5: export the merged model"):
        models.save_adapter(run_with(tmp_path, encoder), tmp_path)
    tokens = torch.ones(1, 4, dtype=torch.long)
    torch.testing.assert_close(models.load(tmp_path, "dit")(tokens), encoder(tokens), rtol=0, atol=1e-5)
