"""One phase of training through DeepSpeed: the trained roles, their optimizer, and the one place that scales the loss.

DeepSpeed reduces gradients and shards state (ZeRO). What it averages we undo here: an objective returns the *sum* over the
local samples, and the gradient must be that of the mean over all samples of the step, however they are spread.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from videofm.config.train import TrainConfig
from videofm.errors import VideofmError
from videofm.parallel.mesh import Mesh
from videofm.parallel.mpu import DeepSpeedMpu
from videofm.parallel.rng import KeyedRng
from videofm.train.optim import parameter_groups, take_shard
from videofm.types import Batch, Objective

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state, safe_set_local_optimizer_state

MOMENTS = ("exp_avg", "exp_avg_sq")


class PhaseModule(nn.Module):
    """The trained roles of a phase as one module whose forward is the objective, so that ZeRO's hooks see every use.

    Frozen roles are kept out of the module tree: DeepSpeed neither shards nor reduces them.
    """

    def __init__(self, models: Mapping[str, nn.Module], objective: Objective, phase: str, config: TrainConfig) -> None:
        super().__init__()
        trained = objective.phases[phase]
        self.roles = nn.ModuleDict({role: models[role] for role in trained})
        self._frozen = [{role: model for role, model in models.items() if role not in trained}]
        self._objective, self._phase, self._seed = [objective], phase, config.seed
        self._autocast = config.trainer.precision == "bf16_autocast"

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over the samples of `batch`, and sums of its metrics."""
        device = batch.video.device
        rng = KeyedRng(self._seed, batch.step, batch.sample_ids, device)
        models = {**self._frozen[0], **self.roles}
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            loss = self._objective[0].loss(models, batch, rng, self._phase)
        return loss.total, loss.metrics


class PhaseEngine:
    """A phase's module behind `deepspeed.initialize`, with optimizer state that is read and written by parameter name."""

    def __init__(
        self, models: Mapping[str, nn.Module], objective: Objective, phase: str, config: TrainConfig, mesh: Mesh
    ) -> None:
        self.config, self.mesh, self.phase = config, mesh, phase
        self.num_local_micro_batches = config.data.num_micro_batches // config.parallel.data_degree
        module = PhaseModule(models, objective, phase, config)
        optimizer = torch.optim.AdamW(
            parameter_groups(module, config.optimizer.weight_decay),
            lr=config.optimizer.lr,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            eps=config.optimizer.eps,
            fused=True,
        )
        prepare_deepspeed(mesh.device)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._deepspeed_config(), mpu=DeepSpeedMpu(), dist_init_required=False
        )
        self.named_parameters = dict(module.roles.named_parameters())

    def step(self, batches: Sequence[Batch], lr: float) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches.

        Returns:
            The mean of the loss and of each metric over all samples of the step, and the gradient's norm before clipping.

        Raises:
            VideofmError: the loss is not finite; no weight was changed by this step.
        """
        assert len(batches) == self.num_local_micro_batches, (len(batches), self.num_local_micro_batches)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            total, metrics = self.engine(batch)
            # DeepSpeed averages over the ranks of the gradient group; a sum is wanted.
            scaled = total * (self.config.parallel.data_degree / batch.num_step_samples)
            self.engine.backward(scaled, scale_wrt_gas=False)
            for name, value in {"loss": total, **metrics}.items():
                share = value.detach().float() / batch.num_step_samples
                sums[name] = sums[name] + share if name in sums else share
            if index + 1 == len(batches):
                means = self._all_means(sums)
                self._refuse_non_finite(means, batch.step)
            grad_norm = self._grad_norm_before_step()
            self.engine.step()
        if grad_norm is None:
            grad_norm = float(self.engine.get_global_grad_norm())
        return {**means, "grad_norm": grad_norm}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Adam's two moments as whole fp32 tensors, `exp_avg.ROLE.NAME`; the same for every ZeRO stage. All ranks call it."""
        state = {}
        self._link_optimizer_state()
        for name, parameter in self._trained():
            for moment in MOMENTS:
                value = (
                    self._base.state[parameter][moment]
                    if self._stage == 0
                    else safe_get_full_optimizer_state(parameter, moment)
                )
                state[f"{moment}.{name}"] = value.detach().cpu().clone()
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor], num_steps: int) -> None:
        """Set Adam's moments from whole tensors and its count of steps, before the first step of this process."""
        for flat in self._optimizer_tensors():
            # Without state of its own DeepSpeed has nothing to write into, and would drop the values silently.
            self._base.state[flat] = {
                "step": torch.tensor(float(num_steps), device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        self._link_optimizer_state()
        for name, parameter in self._trained():
            for moment in MOMENTS:
                value = state[f"{moment}.{name}"].to(self.mesh.device)
                if self._stage == 0:
                    self._base.state[parameter][moment].copy_(value)
                elif self._stage == 3:
                    # DeepSpeed's setter for whole tensors fails where a size does not divide by the ranks.
                    shard = take_shard(parameter, value, self.mesh.gradient_group)
                    safe_set_local_optimizer_state(parameter, shard, moment)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)

    # -- DeepSpeed's inside

    @property
    def _stage(self) -> int:
        return self.config.parallel.zero_stage

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The torch optimizer below DeepSpeed's."""
        return self.engine.optimizer if self._stage == 0 else self.engine.optimizer.optimizer

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.named_parameters.items() if parameter.requires_grad]

    def _optimizer_tensors(self) -> list[Tensor]:
        """The tensors that the torch optimizer steps: parameters, or the flat fp32 partitions of ZeRO."""
        if self._stage == 0:
            return [parameter for _, parameter in self._trained()]
        zero = self.engine.optimizer
        return list(zero.single_partition_of_fp32_groups if self._stage in (1, 2) else zero.fp32_partitioned_groups_flat)

    def _link_optimizer_state(self) -> None:
        """Connect parameters to their moments in ZeRO 1 and 2. DeepSpeed does so after the first step of the first group
        of parameters, and leaves the other groups without."""
        if self._stage in (1, 2):
            zero = self.engine.optimizer
            assert hasattr(zero, "_hp_optimizer_states_linked"), "DeepSpeed renamed its mark"
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _grad_norm_before_step(self) -> float | None:
        """The norm at stage 0, whose engine does not report one; None where it will."""
        if self._stage != 0 or not self.engine.is_gradient_accumulation_boundary():
            return None
        grads = [parameter.grad for _, parameter in self._trained() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def _all_means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        values = self.mesh.sum(torch.stack([sums[name] for name in names]))
        return dict(zip(names, values.tolist(), strict=True))

    def _refuse_non_finite(self, means: dict[str, float], step: int) -> None:
        if not all(map(torch.isfinite, torch.tensor(list(means.values())))):
            raise VideofmError(
                f"the loss of step {step} is not finite ({', '.join(f'{name} {value:g}' for name, value in means.items())}); "
                "no weight was changed by it. Resume from the last checkpoint with a smaller optimizer.lr, or look at the data."
            )

    def _deepspeed_config(self) -> dict[str, Any]:
        data, optimizer = self.config.data, self.config.optimizer
        return {
            "train_micro_batch_size_per_gpu": data.micro_batch_size,
            "gradient_accumulation_steps": self.num_local_micro_batches,
            "gradient_clipping": optimizer.grad_clip,
            "zero_optimization": {"stage": self._stage, "overlap_comm": self.mesh.device.type == "cuda"},
            # The optimizer is torch's: DeepSpeed's own needs a compiler on the machine.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000_000,
            "wall_clock_breakdown": False,
        }


def prepare_deepspeed(device: torch.device) -> None:
    """Quiet its log, and keep it from compiling at start an op that only its CPU inference uses."""
    deepspeed_logger.setLevel(logging.WARNING)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even of a single process
    if device.type == "cpu":
        ops = deepspeed.ops.__compatible_ops__
        assert "deepspeed_shm_comm" in ops, "DeepSpeed renamed the op that must not be built"
        ops["deepspeed_shm_comm"] = False
