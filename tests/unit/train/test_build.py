"""What a config makes of the models' sections, before any process group."""

import pytest
import torch

from videofm import models
from videofm.config.train import TrainConfig
from videofm.errors import ConfigError, ParallelError
from videofm.models.lora import is_lora
from videofm.train.build import build_models, dry_run


def config(**dit):
    """A DiT with its frozen roles; nothing of `data` is read."""
    frozen = {"vae": {"name": "vae/ltx"}, "text_encoder": {"name": "text/t5"}}
    data = {"manifest": "nowhere", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 1}
    return {
        "kind": "train",
        "models": frozen | {"dit": {"name": "dit/ltx"} | dit},
        "objective": {"kind": "flow_matching", "noise_levels": {"kind": "uniform"}},
        "optimizer": {"lr": 1e-3},
        "data": data,
        "trainer": {"max_steps": 1},
    }


def test_a_model_starts_from_a_file_and_gets_adapters(tmp_path):
    """Rank 2 on q, k, v and out of two attentions of width 128 in 4 blocks: 32 layers of 2 * 2 * 128 parameters."""
    before = models.build("dit/ltx", "tiny")
    models.save(before, tmp_path)
    read = TrainConfig.model_validate(config(init_from=str(tmp_path), lora={"rank": 2}))
    dit = build_models(read)["dit"]
    trained = [parameter.numel() for name, parameter in dit.named_parameters() if parameter.requires_grad]
    assert sum(trained) == 32 * 2 * 2 * 128
    weights = models.merge_lora(dit).state_dict()  # B is zero, so that the sum is what was there
    assert all(torch.equal(tensor, weights[name]) for name, tensor in before.state_dict().items())
    assert "dit: from " in dry_run(read) and "(found)" in dry_run(read)


def test_adapters_are_drawn_from_the_seed():
    """The same on every rank, whatever was drawn before."""
    read = TrainConfig.model_validate(config(lora={"rank": 2, "alpha": 8.0, "targets": ["*.feed_forward.*"]}))
    first = {name: tensor for name, tensor in build_models(read)["dit"].state_dict().items() if is_lora(name)}
    torch.rand(3)
    second = build_models(read)["dit"]
    assert len(first) == 16 and all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.items())
    assert models.lora_spec(second).scale == 4.0
    assert "parameters, of which 10,240 are adapters and trained" in dry_run(read)  # 8 layers of 2 * (128 + 512)


def test_a_frozen_role_has_no_adapters():
    fields = config()
    fields["models"]["vae"]["lora"] = {"rank": 2}
    with pytest.raises(ConfigError, match=r"models\.vae\.lora: objective 'flow_matching' does not train vae; leave it out"):
        dry_run(TrainConfig.model_validate(fields))


def test_a_dry_run_refuses_a_prefix_over_context_ranks():
    """As the training would, with the words of `parallelize`."""
    roles = {"text_encoder": {"name": "text/t5"}, "tokenizer": {"path": "runs/tokenizer"}}
    data = {"manifest": "none", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 1, "start": "centre"}
    fields = {
        "kind": "train",
        "objective": {"kind": "next_token"},
        "data": {**data, "cache": {"path": "encoded", "mode": "tokens"}},
        "optimizer": {"lr": 1e-3},
        "trainer": {"max_steps": 1, "precision": "fp32"},
    }
    for text, degree in (("prefix", 2), ("prefix", 1), ("cross_attention", 2)):
        ar = {"name": "ar/transformer", "overrides": {"text": text}}
        parallel = {"parallel": {"context_degree": degree}}
        config = TrainConfig.model_validate({**fields, **parallel, "models": {**roles, "ar": ar}})
        if (text, degree) == ("prefix", 2):
            with pytest.raises(ParallelError, match="context_degree is 2, but this ar/transformer takes the text as a prefix"):
                dry_run(config)
        else:
            assert "ar: ar/transformer tiny" in dry_run(config)
