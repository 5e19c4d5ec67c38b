"""Options of DeepSpeed that do not go together are refused before anything is built."""

import pytest
import torch

from videofm.config.train import ParallelConfig
from videofm.errors import ConfigError
from videofm.train.zero import engine_config


def test_offload_needs_a_stage() -> None:
    with pytest.raises(ConfigError, match=r"offload_optimizer needs .* parallel.zero_stage 0; set parallel.zero_stage=1"):
        engine_config(ParallelConfig(zero_stage=0, offload_optimizer=True), torch.device("cpu"), 1, 1, 0.0)


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_offload_is_deepspeeds(device: str, pinned: bool) -> None:
    """With torch's optimizer, which needs no compiler; without the option nothing is said of it."""
    settings = engine_config(ParallelConfig(zero_stage=2, offload_optimizer=True), torch.device(device), 1, 1, 0.0)
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": pinned}
    assert settings["zero_force_ds_cpu_optimizer"] is False
    plain = engine_config(ParallelConfig(zero_stage=2), torch.device(device), 1, 1, 0.0)
    assert "offload_optimizer" not in plain["zero_optimization"]
