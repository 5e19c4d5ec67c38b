"""A model from weights that are there: what it takes, what it reports, and what it refuses."""

import json
import re

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from videofm import models
from videofm.config.model import ModelConfig
from videofm.errors import CheckpointError, ConfigError
from videofm.models.spec import list_all_keys

TINY = {"num_layers": 1, "num_heads": 2, "head_width": 8, "caption_channels": 4}


def tiny(**overrides):
    torch.manual_seed(0)
    return models.build("dit/ltx", "tiny", **TINY | overrides).eval()


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def pipeline(folder, model, names=("transformer",)):
    for name in names:
        models.save_public(model, folder / name)
    models.save_public(models.build("vae/ltx", "tiny"), folder / "vae")
    models.save_public(models.build("text/t5", "tiny"), folder / "text_encoder")
    (folder / "model_index.json").write_text("{}")
    return folder


def run(folder, model):
    checkpoint = folder / "checkpoints" / "step_00000001"
    models.save(model, checkpoint / "models" / "dit")
    (checkpoint / "COMMITTED.json").write_text("{}")
    return folder


def single_file(folder, model, dtype=torch.float32):
    """The transformer beside a VAE, as the authors keep them."""
    dit, vae = models.adapter("dit/ltx"), models.build("vae/ltx", "tiny")
    tensors = dit.to_original(model.state_dict(), model.config)
    tensors |= models.adapter("vae/ltx").to_original(vae.state_dict(), vae.config, prefix="vae.")
    file = folder / "ltx.safetensors"
    config = {"config": json.dumps({"transformer": dit.original_config(model.config)})}
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, file, metadata=config)
    return file


@pytest.mark.parametrize("place", [pipeline, run, single_file])
def test_from_a_pipeline_a_run_and_a_single_file(tmp_path, place):
    """Each holds more than this model, or is found by its name alone; the config is that of the file."""
    model = tiny()
    filled = models.initial("dit/ltx", place(tmp_path, model))
    assert same(filled.model, model) and filled.model.config == model.config
    num_tensors, num_parameters = len(model.state_dict()), sum(p.numel() for p in model.parameters())
    assert (filled.num_tensors, filled.num_parameters, filled.dtype) == (num_tensors, num_parameters, "float32")
    message = f"starts from {filled.source}: all {num_tensors} tensors matched by name and shape, none left over; "
    assert filled.report() == f"dit/ltx {message}{num_parameters:,} parameters, float32 there"


def test_weights_are_float32_whatever_the_file_has(tmp_path):
    model = tiny().bfloat16()
    filled = models.initial("dit/ltx", single_file(tmp_path, model, torch.bfloat16))
    assert filled.dtype == "bfloat16" and {p.dtype for p in filled.model.parameters()} == {torch.float32}
    assert same(filled.model.bfloat16(), model)


def test_overrides_replace_fields_that_no_tensor_shows(tmp_path):
    folder = run(tmp_path, tiny())
    assert models.initial("dit/ltx", folder, norm_eps=0.5).model.config == tiny(norm_eps=0.5).config
    with pytest.raises(ConfigError, match="no option 'norm_epsilon', did you mean 'norm_eps'"):
        models.initial("dit/ltx", folder, norm_epsilon=0.5)


def test_another_size_lists_every_tensor(tmp_path):
    """Of 4 blocks where 28 are wanted; tensors that differ by numbers are one entry, and no name of a block is left out."""
    model = models.build("dit/ltx", "tiny").eval()
    folder = run(tmp_path, model)
    assert same(models.initial("dit/ltx", folder, size="tiny").model, model)
    with pytest.raises(CheckpointError, match=r"These tensors look like dit/ltx tiny, not 2b") as caught:
        models.initial("dit/ltx", folder, size="2b")
    assert "blocks.{4-27}.self_attention.q_norm.weight (24)" in str(caught.value)
    assert "proj_in.weight (128, 16) for (2048, 128)" in str(caught.value)
    assert "blocks.{0-3}.scale_shift_table (4) (6, 128) for (6, 2048)" in str(caught.value)
    named = {re.sub(r"\{0-3\}|\{4-27\}", "0", name) for name in re.findall(r"[\w.{}-]+\.\w+(?= \()", str(caught.value))}
    assert {name for name in model.state_dict() if name.startswith("blocks.0.")} <= named


def test_equal_tensors_and_another_config(tmp_path):
    folder = run(tmp_path, models.build("dit/ltx", "tiny", theta=77.0))
    message = r"fits the tensors of dit/ltx tiny and not its config: theta 77\.0 there, 10000\.0 in tiny\. Leave size out"
    with pytest.raises(CheckpointError, match=message):
        models.initial("dit/ltx", folder, size="tiny")
    assert models.initial("dit/ltx", folder, size="tiny", theta=5.0).model.config.theta == 5.0


def test_another_model(tmp_path):
    with pytest.raises(CheckpointError, match="holds dit/ltx, not vae/ltx: set name to it"):
        models.initial("vae/ltx", run(tmp_path, tiny()))
    file, vae = tmp_path / "vae.safetensors", models.build("vae/ltx", "tiny")
    save_file(models.adapter("vae/ltx").to_original(vae.state_dict(), vae.config), file)
    with pytest.raises(ConfigError, match="has no component 'transformer'"):
        models.initial("dit/ltx", file)


def test_two_of_a_kind_need_a_name(tmp_path):
    model = tiny()
    folder = pipeline(tmp_path, model, ("transformer", "transformer_2"))
    with pytest.raises(ConfigError, match="say which component: text_encoder, transformer, transformer_2, vae"):
        models.initial("dit/ltx", folder)
    assert same(models.initial("dit/ltx", folder, component="transformer_2").model, model)


def test_a_text_encoder_keeps_its_tokenizer(tmp_path):
    """Where the tokenizer lies is no part of the size."""
    folder = pipeline(tmp_path, tiny())
    (folder / "tokenizer").mkdir()
    filled = models.initial("text/t5", folder, size="tiny").model
    assert filled.config.tokenizer_path == str(folder / "tokenizer") and filled.config.path is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "a", "init_from": "b"}, "give no `path` and no `inflate_from` beside it"),
        ({"name": "dit/ltx", "init_from": "b", "inflate_from": "c"}, "give no `path` and no `inflate_from` beside it"),
        ({"name": "dit/ltx", "init_component": "vae"}, "`init_component` chooses from what `init_from` holds"),
        ({"name": "dit/ltx", "lora": {"rank": 0}}, "greater than or equal to 1"),
    ],
)
def test_sections_that_contradict_themselves(fields, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(fields)


def test_listed_keys():
    """Numbers become ranges, in words of their own only; what stands alone stays as it is, braces too."""
    keys = ["a.0.b", "a.2.b", "a.1.c1", "a.{0}.b", "x.3.y.1", "x.5.y.0"]
    assert list_all_keys(keys) == "a.{0-2}.b (2), a.1.c1, a.{0}.b, x.{3-5}.y.{0-1} (2)"
    assert list_all_keys(["a.0.b", "a.1.b"], {"a.1.b": " (3,) for (4,)"}) == "a.0.b, a.1.b (3,) for (4,)"
