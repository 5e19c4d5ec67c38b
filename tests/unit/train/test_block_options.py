"""From a training config to the blocks of a transformer: compile, recompute, offload; and what is refused."""

import pytest
import torch

from videofm import models
from videofm.config.train import TrainConfig
from videofm.errors import ConfigError, ParallelError
from videofm.train import build


class Alone:
    """The mesh of one process."""

    tensor_degree = context_degree = 1


def config(trainer=None, **parallel):
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {"vae": {"name": "vae/ltx"}, "text_encoder": {"name": "text/t5"}, "dit": {"name": "dit/ltx"}},
            "objective": {"kind": "flow_matching", "noise_levels": {"kind": "uniform"}},
            "optimizer": {"lr": 1e-3},
            "data": {"manifest": "nowhere", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 1},
            "trainer": {"max_steps": 1} | (trainer or {}),
            "parallel": parallel,
        }
    )


@pytest.fixture
def dit():
    return models.build("dit/ltx", "tiny", num_layers=4, num_heads=2, head_width=16)


def test_the_config_reaches_the_blocks(dit, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    build._parallelize(dit, Alone(), config(), "dit")
    assert [("forward" in vars(block)) for block in dit.blocks] == [False] * 4
    build._parallelize(dit, Alone(), config(activation_checkpointing="full", checkpoint_every_blocks=2), "dit")
    assert [("forward" in vars(block)) for block in dit.blocks] == [True, False, True, False] and not compiled
    build._parallelize(dit, Alone(), config({"compile": True}), "dit")
    assert len(compiled) == 4
    with pytest.raises(ConfigError, match=r"offload_activations is true, but the model is on cpu"):
        build._parallelize(dit, Alone(), config(offload_activations=True), "dit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (config({"compile": True}), r"trainer\.compile: this is about blocks of a transformer, and vae has none"),
        (config(activation_checkpointing="full"), r"parallel\.activation_checkpointing: .* and vae has none\. Leave it out"),
        (config(offload_activations=True), r"parallel\.offload_activations: .* and vae has none\. Leave it out"),
    ],
)
def test_a_run_without_a_transformer_has_no_use_for_them(dit, settings, message):
    build._check_blocks(settings, {"dit": dit})
    with pytest.raises(ConfigError, match=message):
        build._check_blocks(settings, {"vae": models.build("vae/ltx", "tiny", device="meta")})
    build._check_blocks(config(), {"vae": models.build("vae/ltx", "tiny", device="meta")})


@pytest.mark.parametrize(
    ("trainer", "policy", "message"),
    [
        (
            {"compile": True},
            "none",
            r"trainer\.compile with parallel\.zero_stage 3: .* Take zero_stage 2, or set trainer\.compile",
        ),
        ({}, "selective", r"activation_checkpointing selective with parallel\.zero_stage 3: .* Take full, or zero_stage 2"),
    ],
)
def test_what_does_not_work_under_zero_stage_3(dit, trainer, policy, message):
    build._check_blocks(config(trainer, activation_checkpointing=policy, zero_stage=2), {"dit": dit})
    build._check_blocks(config(activation_checkpointing="full", zero_stage=3), {"dit": dit})
    with pytest.raises(ConfigError, match=message):
        build._check_blocks(config(trainer, activation_checkpointing=policy, zero_stage=3), {"dit": dit})


def test_tensor_ranks_need_something_to_split(dit):
    settings, vae = config(tensor_degree=2), models.build("vae/ltx", "tiny", device="meta")
    build._check_tensor_ranks(settings, {"dit": dit, "vae": vae})
    build._check_tensor_ranks(config(), {"vae": vae})
    with pytest.raises(ParallelError, match=r"parallel.tensor_degree is 2, but vae cannot be split .* raise data_degree"):
        build._check_tensor_ranks(settings, {"vae": vae})


def test_a_dry_run_refuses_ranks_that_do_not_get_whole_heads(dit):
    """The tiny LTX has 4 heads."""
    assert "2 tensor" in build.dry_run(config(tensor_degree=2))
    with pytest.raises(ParallelError, match=r"tensor_degree 3 does not divide the 4 heads of LTXVideoDiT.* It can be 1, 2, 4"):
        build.dry_run(config(tensor_degree=3))
    with pytest.raises(ConfigError, match=r"trainer\.compile with parallel\.zero_stage 3"):
        build.dry_run(config({"compile": True}, zero_stage=3))
