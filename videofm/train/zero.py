"""DeepSpeed made ready: its environment, its config, and the one place that undoes its averaging.

An objective gives each rank the *sum* of the losses it has to answer for, divided by the global count of samples: all ranks
that hold a weight have a part of its gradient, and the parts are to be summed, over `data` and over `context` alike. DeepSpeed
divides by the size of the group instead, in different places for different ZeRO stages; `summed` multiplies by it, and
`check_scaling` asks DeepSpeed itself whether that is right.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from videofm.config.train import ParallelConfig
from videofm.errors import ConfigError
from videofm.parallel.mesh import Mesh
from videofm.parallel.mpu import DeepSpeedMpu

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.utils import combine_grad_norm_groups, is_model_parallel_parameter
    from deepspeed.utils import logger as deepspeed_logger
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state
    from deepspeed.utils.tensor_fragment import safe_get_local_optimizer_state

__all__ = [
    "check_offload",
    "check_scaling",
    "combine_grad_norm_groups",
    "engine_config",
    "initialize",
    "is_model_parallel_parameter",
    "safe_get_local_optimizer_state",
    "safe_set_full_optimizer_state",
    "safe_set_local_optimizer_state",
    "shard_frozen",
    "summed",
]
"""Ours, and what the engine needs of DeepSpeed's inside: this file is where DeepSpeed is imported."""


def summed(loss: Tensor, mesh: Mesh, num_samples: int) -> Tensor:
    """The sum `loss` over this rank's samples as what DeepSpeed has to go backward from, so that the gradient becomes that of
    the mean over the `num_samples` of all ranks."""
    return loss * (mesh.gradient_degree / num_samples)


def initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: torch.device) -> Any:
    """A DeepSpeed engine on the mesh that exists."""
    _prepare(device)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, mpu=DeepSpeedMpu(), dist_init_required=False
    )
    return engine


def shard_frozen(module: nn.Module, config: ParallelConfig, device: torch.device) -> None:
    """Spread the weights of a frozen model over the ranks, as stage 3 does those that train, in place: its forward pass gathers
    a layer at a time from then on. Every rank calls it, and runs the same forward passes."""
    _prepare(device)
    settings = engine_config(config.model_copy(update={"offload_optimizer": False}), device, 1, 1, grad_clip=0.0)
    deepspeed.initialize(model=module, config=settings, mpu=DeepSpeedMpu(), dist_init_required=False)


def engine_config(
    config: ParallelConfig, device: torch.device, micro_batch_size: int, num_micro_batches: int, grad_clip: float
) -> dict[str, Any]:
    """DeepSpeed's config. `num_micro_batches` of a rank are for its own books only: the caller says where a step ends.

    Raises:
        ConfigError: the optimizer's state is to be kept on the CPU and nothing of it is sharded.
    """
    check_offload(config)
    on_gpu = device.type == "cuda"
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": on_gpu}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": grad_clip,
        "zero_optimization": zero,
        # The optimizer is torch's: DeepSpeed's own needs a compiler on the machine.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def check_offload(config: ParallelConfig) -> None:
    """
    Raises:
        ConfigError: the optimizer's state is to be kept on the CPU and nothing of it is sharded.
    """
    if config.offload_optimizer and config.zero_stage == 0:
        raise ConfigError(
            "parallel.offload_optimizer needs DeepSpeed to keep the optimizer's state, which it does not at "
            "parallel.zero_stage 0; set parallel.zero_stage=1 or higher, or parallel.offload_optimizer=false."
        )


def check_scaling(config: ParallelConfig, mesh: Mesh) -> None:
    """Take one step of plain descent on one parameter, at the configured stage, and see that gradients were summed.

    Rank r of the gradient group has the slopes r + 1 and 1 in two micro-batches, of one sample in all; a rate of 1 moves the
    parameter by minus their sum over the group of n ranks, n (n + 1) / 2 + n. All ranks call it. With one rank there is nothing
    to sum.
    """
    if mesh.gradient_degree == 1:
        return
    module = nn.Linear(1, 1, bias=False, device=mesh.device)
    nn.init.zeros_(module.weight)
    settings = engine_config(config, mesh.device, 1, 2, grad_clip=0.0)
    # The buckets of a real run would take gigabytes for this.
    settings["zero_optimization"] |= {"reduce_bucket_size": 64, "allgather_bucket_size": 64, "stage3_prefetch_bucket_size": 64}
    engine = initialize(module, torch.optim.SGD(module.parameters(), lr=1.0), settings, mesh.device)
    one, ranks = torch.ones(1, 1, device=mesh.device), mesh.gradient_degree
    for index, slope in enumerate((DeepSpeedMpu().get_data_parallel_rank() + 1, 1)):
        engine.set_gradient_accumulation_boundary(index == 1)
        engine.backward(summed(slope * engine(one).sum(), mesh, num_samples=1), scale_wrt_gas=False)
        engine.step()
    with torch.no_grad():
        moved, expected = -float(engine(one)), ranks * (ranks + 1) / 2 + ranks
    engine.destroy()
    assert moved == expected, (
        f"DeepSpeed at ZeRO stage {config.zero_stage} makes a gradient of {moved:g} from parts whose sum over {ranks} ranks is "
        f"{expected:g}: its averaging has changed, and `summed` must follow it"
    )


def _prepare(device: torch.device) -> None:
    """Quiet its log, and keep it from compiling at start an op that only its CPU inference uses."""
    deepspeed_logger.setLevel(logging.WARNING)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even of a single process
    if device.type == "cpu":
        ops = deepspeed.ops.__compatible_ops__
        assert "deepspeed_shm_comm" in ops, "DeepSpeed renamed the op that must not be built"
        ops["deepspeed_shm_comm"] = False
