"""A guided transformer from a config: which weights it starts from, what trains, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from tests.unit.train.test_build import config
from videofm import models
from videofm.config.model import ModelConfig
from videofm.config.train import TrainConfig
from videofm.errors import CheckpointError, ConfigError
from videofm.train.build import build_models, dry_run

TINY = {"num_layers": 2}


def read(**dit):
    return TrainConfig.model_validate(config(**{"overrides": TINY, **dit}))


def injected(model):
    return {key: value for key, value in model.state_dict().items() if key.startswith("injection.")}


def test_a_base_gets_an_injection_that_is_drawn_from_the_seed(tmp_path):
    """Through `init_from` as through `path`: the base's weights are there, strictly, and the injection is fresh."""
    before = models.build("dit/ltx", "tiny", **TINY)
    models.save(before, tmp_path)
    added = {"kind": "mlp", "blocks": [1], "hidden_width": 8}
    first = build_models(read(init_from=str(tmp_path), injection=added, overrides={}))["dit"]
    torch.rand(3)
    second = build_models(read(name=None, path=str(tmp_path), injection=added, overrides={}))["dit"]
    for model in (first, second):
        assert models.injection_spec(model) == models.InjectionSpec("mlp", (1,), 16, 8)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.state_dict().items())
    assert injected(first).keys() == injected(second).keys()
    assert all(torch.equal(value, injected(second)[key]) for key, value in injected(first).items())
    with pytest.raises(CheckpointError, match=r"missing: blocks\.{2-3}"):  # a base of two blocks for a model of four
        build_models(read(init_from=str(tmp_path), size="tiny", injection=added, overrides={}))


def test_a_guided_run_goes_on_with_its_injection(tmp_path):
    """With the same section or without it, whether loaded or started from; another section is another model."""
    guided = models.build("dit/ltx", "tiny", **TINY)
    models.inject_features(guided, models.InjectionSpec("mlp"))
    models.save(guided, tmp_path)
    same = {"kind": "mlp", "blocks": "first_half", "feature_channels": 16, "hidden_width": 128}
    for section in ({}, {"injection": same}):
        for source in ({"name": None, "path": str(tmp_path)}, {"init_from": str(tmp_path)}):
            found = build_models(read(**source, **section, overrides={}))["dit"]
            assert all(torch.equal(value, found.state_dict()[key]) for key, value in guided.state_dict().items())
    with pytest.raises(ConfigError, match=r"another injection already: blocks \(0,\) there, \(1,\) asked for"):
        build_models(read(name=None, path=str(tmp_path), injection={**same, "blocks": [1]}, overrides={}))


def test_a_frozen_base(tmp_path):
    """By hand, with D 128 and one guided block of 2: 16*8+8, null 8, 8*8+8, 8*384+384."""
    chosen = read(injection={"kind": "adaptive_norm", "hidden_width": 8}, freeze_base=True)
    dit = build_models(chosen)["dit"]
    assert {key for key, value in dit.named_parameters() if value.requires_grad} == set(injected(dit))
    assert "of which 3,672 are the injection's and trained" in dry_run(chosen)
    assert "parameters, trained" in dry_run(read(injection={}))
    models.save(dit, tmp_path)
    again = read(init_from=str(tmp_path), freeze_base=True, overrides={})
    assert not build_models(again)["dit"].proj_in.weight.requires_grad
    assert "(found)" in dry_run(again)  # what it brings is seen when it is loaded
    models.save(models.build("dit/ltx", "tiny", **TINY), tmp_path)
    with pytest.raises(ConfigError, match="freeze_base trains the injection alone, and dit/ltx has none"):
        build_models(again)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"injection": {"kind": "mlpp"}}, "no injection is called 'mlpp', did you mean 'mlp'"),
        ({"injection": {"blocks": [-1]}}, "greater than or equal to 0"),
        ({"injection": {"blocks": "third"}}, "first_half"),
        ({"injection": {}, "lora": {"rank": 2}}, "`lora` trains adapters only, and `injection` is trained whole"),
        ({"freeze_base": True, "lora": {"rank": 2}}, "set `freeze_base` in the place of `lora`"),
        ({"freeze_base": True}, "`freeze_base` trains the injection alone, and a new model has none: give `injection`"),
    ],
)
def test_sections_that_cannot_be(fields, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({"name": "dit/ltx", **fields})


@pytest.mark.parametrize("fields", [{"injection": {}}, {"freeze_base": True, "injection": {}}])
def test_a_frozen_role_has_no_injection_to_train(fields):
    sections = config()
    sections["models"]["vae"] |= fields
    with pytest.raises(
        ConfigError, match=r"models.vae.injection, .*: objective 'flow_matching' does not train vae; leave them"
    ):
        dry_run(TrainConfig.model_validate(sections))
