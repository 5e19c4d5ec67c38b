"""One phase of training through DeepSpeed: the trained roles, their optimizer, the norm and the fate of each step.

DeepSpeed reduces gradients and shards state (ZeRO). An objective returns the *sum* over the local samples, and the gradient
must be that of the mean over all samples of the step, however they and their tokens are spread: `zero.summed` sees to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videofm.checkpoint.content import StoredTensor, replicated
from videofm.config.train import TrainConfig
from videofm.parallel.collectives import naming
from videofm.parallel.mesh import Mesh
from videofm.parallel.replicated import Replicated
from videofm.parallel.rng import KeyedRng
from videofm.parallel.shards import gather_tensor
from videofm.progress import LOG
from videofm.train.busy import BusyTime
from videofm.train.optim import (
    GradientClip,
    bring_shard,
    bring_to_tensor_rank,
    parameter_groups,
    take_shard,
    whole_shape,
)
from videofm.train.zero import (
    combine_grad_norm_groups,
    engine_config,
    initialize,
    is_model_parallel_parameter,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
    summed,
)
from videofm.types import Batch, Objective, Precomputed, Ranks

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

    def forward(self, batch: Batch, prepared: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over the samples of `batch`, and sums of its metrics."""
        extra = () if prepared is None else (prepared,)
        with torch.autocast(batch.video.device.type, torch.bfloat16, enabled=self._autocast):
            loss = self._objective[0].loss(self._models, batch, self._rng(batch), self._phase, *extra)
        return loss.total, loss.metrics

    def prepare(self, batches: Sequence[Batch], all_sum: Callable[[Tensor], Tensor]) -> Any:
        """What the objective has to know about the whole step before its first loss (see `types.Objective`)."""
        prepare = getattr(self._objective[0], "prepare", None)
        if prepare is None:
            return None
        rngs = [self._rng(batch) for batch in batches]
        with torch.autocast(batches[0].video.device.type, torch.bfloat16, enabled=self._autocast):
            return prepare(self._models, batches, rngs, self._phase, all_sum)

    @torch.no_grad()
    def measure(self, wanted: Precomputed, batch: Batch) -> Tensor:
        """What an objective wants to know of the models before the first step, of R samples: `(R, num_draws, ...)`."""
        rng = self._rng(batch)
        with torch.autocast(batch.video.device.type, torch.bfloat16, enabled=self._autocast):
            draws = [wanted.measure(self._models, batch, rng.fixed(number)) for number in range(wanted.num_draws)]
        return torch.stack(draws, dim=1)

    def after_step(self, skipped: bool, ranks: Ranks) -> dict[str, float]:
        """What the objective does, and measures, once the step is done (see `types.Objective`)."""
        after = getattr(self._objective[0], "after_step", None)
        return {} if after is None else after(self._models, self._phase, skipped, ranks)

    def train_only_mine(self, trains: Callable[[nn.Parameter], bool]) -> None:
        """Let gradients reach the parameters of this phase's roles that `trains` accepts, and no others.

        Phases share models: without this a generator's backward pass would fill the discriminator's gradients too.
        """
        for model in self._frozen[0].values():
            model.requires_grad_(False)
        for parameter in self.roles.parameters():
            parameter.requires_grad_(trains(parameter))

    @property
    def _models(self) -> dict[str, nn.Module]:
        return {**self._frozen[0], **self.roles}

    def _rng(self, batch: Batch) -> KeyedRng:
        return KeyedRng(self._seed, batch.step, batch.sample_ids, batch.video.device)


class PhaseEngine:
    """A phase's module behind `deepspeed.initialize`, with optimizer state that is read and written by parameter name."""

    def __init__(
        self, models: Mapping[str, nn.Module], objective: Objective, phase: str, config: TrainConfig, mesh: Mesh
    ) -> None:
        self.config, self.mesh, self.phase = config, mesh, phase
        self.optimizer_config = config.phase_optimizers.get(phase, config.optimizer)
        self.clip = GradientClip(self.optimizer_config)
        self.busy = BusyTime(mesh.device)
        self.module = PhaseModule(models, objective, phase, config)
        trained = {name: value for name, value in self.module.roles.named_parameters() if value.requires_grad}
        self.named_parameters = trained
        self.groups = parameter_groups(trained, self.optimizer_config)
        optimizer = torch.optim.AdamW(
            [{"params": group.parameters, "weight_decay": group.weight_decay} for group in self.groups],
            lr=self.optimizer_config.lr,
            betas=(self.optimizer_config.betas[0], self.optimizer_config.betas[1]),
            eps=self.optimizer_config.eps,
            fused=True,
        )
        data, grad_clip = config.data, self.optimizer_config.grad_clip
        num_micro_batches = data.num_micro_batches // mesh.data_degree
        settings = engine_config(config.parallel, mesh.device, data.micro_batch_size, num_micro_batches, grad_clip)
        self.engine = initialize(self.module, optimizer, settings, mesh.device)
        self._shares_models = len(objective.phases) > 1 or bool(self.optimizer_config.groups)
        self._grad_norm, self._loss_is_lost = 0.0, False
        self._guard_steps()

    def step(self, batches: Sequence[Batch], lr: float) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches, however many; other ranks have as many.

        Returns:
            The mean of the loss and of each metric over all samples of the step, the gradient's norm before clipping (inf where
            it or the loss is not finite), `skipped` (1 if the step moved nothing) and `num_skipped`, the count of such steps;
            besides what the objective measures after the step. `divergence` says how many of them are too many.
        """
        self._set_rates(lr, batches[0].step)
        self._set_clip(self.clip.limit)
        prepared = self.module.prepare(batches, self.mesh.sum_gradients)
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index + 1 == len(batches))
            with self.busy.piece(), naming("forward pass", self.mesh.sample_group):
                total, metrics = self.engine(batch, prepared)
            with naming("backward pass", self.mesh.gradient_group):
                self.engine.backward(summed(total, self.mesh, batch.num_step_samples), scale_wrt_gas=False)
            for name, value in {"loss": total, **metrics}.items():
                share = value.detach().float() / batch.num_step_samples
                sums[name] = sums[name] + share if name in sums else share
            if index + 1 == len(batches):
                means = self._all_means(sums)
                # Ranks that share samples see the loss of their own tokens, and must decide alike.
                self._loss_is_lost = self.mesh.any_rank(not math.isfinite(means["loss"]))
            with naming("optimizer step", self.mesh.gradient_group):
                self._before_step()
                self.engine.step()
        skipped = self._judged(batches[0].step)
        with naming("statistics after the step", self.mesh.data_group):
            means |= self.module.after_step(skipped, Replicated(self.mesh))
        return {**means, "grad_norm": self._grad_norm, "skipped": float(skipped), "num_skipped": self.clip.num_skipped}

    def optimizer_state(self) -> dict[str, Tensor]:
        """What `stored_state` lists, whole on every rank, as copies on the CPU. All ranks call it."""
        whole = {tensor.name: tensor.bring(None) for tensor in self.stored_state("")}
        return {name: value.cpu().clone() for name, value in whole.items() if value is not None}

    def stored_state(self, file: str) -> list[StoredTensor]:
        """Adam's two moments as whole fp32 tensors of `file` in a checkpoint, `exp_avg.ROLE.NAME`; the same for every ZeRO
        stage. Beside them what `GradientClip` keeps; `num_steps` is the number of steps taken."""
        clip = self.clip
        if clip.num_taken == 0:
            self._make_state()
        counts = {
            "num_steps": torch.tensor(clip.num_taken),
            "num_skipped": torch.tensor(clip.num_skipped),
            "clip_average": torch.tensor(clip.average, dtype=torch.float64),
        }
        self._link_optimizer_state()
        moments = [
            StoredTensor(
                file, f"{moment}.{name}", whole_shape(parameter), torch.float32, partial(self._bring_moment, parameter, moment)
            )
            for name, parameter in self.named_parameters.items()
            for moment in MOMENTS
        ]
        return [*(replicated(file, name, value) for name, value in counts.items()), *moments]

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Set what `optimizer_state` gave, before the first step of this process."""
        self.clip.num_taken, self.clip.average = int(state["num_steps"]), float(state["clip_average"])
        self.clip.num_skipped = int(state.get("num_skipped", 0))
        self._make_state()
        self._link_optimizer_state()
        for name, parameter in self.named_parameters.items():
            for moment in MOMENTS:
                # DeepSpeed's setter for whole tensors fails at stage 3 where a size does not divide by the ranks.
                value = take_shard(parameter, state[f"{moment}.{name}"].to(self.mesh.device), self.mesh.gradient_group)
                if self._stage == 0:
                    self._base.state[parameter][moment].copy_(value)
                elif self._stage == 3:
                    safe_set_local_optimizer_state(parameter, value, moment)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)

    def _set_rates(self, lr: float, step: int) -> None:
        """The rate of each group; frozen ones get no gradient either, so that nothing is computed for them."""
        frozen: set[int] = set()
        for group, inside in zip(self.groups, self.engine.optimizer.param_groups, strict=True):
            scale = group.lr_scale(step)
            inside["lr"] = lr * scale
            if scale == 0:  # not the rate, which a schedule may end at 0
                frozen.update(map(id, group.parameters))
        if self._shares_models:
            mine = set(map(id, self.named_parameters.values())) - frozen
            self.module.train_only_mine(lambda parameter: id(parameter) in mine)

    # -- DeepSpeed's inside

    @property
    def _stage(self) -> int:
        return self.config.parallel.zero_stage

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The torch optimizer below DeepSpeed's."""
        return self.engine.optimizer if self._stage == 0 else self.engine.optimizer.optimizer

    def _set_clip(self, limit: float) -> None:
        """DeepSpeed clips at a constant of its config: stage 0 reads it there, the others keep a copy."""
        self.engine._config.gradient_clipping = limit
        if self._stage > 0:
            assert hasattr(self.engine.optimizer, "clip_grad"), "DeepSpeed renamed its limit"
            self.engine.optimizer.clip_grad = limit

    def _make_state(self) -> None:
        """Moments of zero, for an optimizer that has not stepped: DeepSpeed would have nothing to read or to write into."""
        for flat in self._optimizer_tensors():
            self._base.state[flat] = {
                "step": torch.tensor(float(self.clip.num_taken), device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }

    def _optimizer_tensors(self) -> list[Tensor]:
        """The tensors that the torch optimizer steps: parameters, or the flat fp32 partitions of ZeRO."""
        if self._stage == 0:
            return list(self.named_parameters.values())
        zero = self.engine.optimizer
        return list(zero.single_partition_of_fp32_groups if self._stage in (1, 2) else zero.fp32_partitioned_groups_flat)

    def _bring_moment(self, parameter: nn.Parameter, moment: str, to: int | None) -> Tensor | None:
        """A whole moment at rank `to`, as `bring_shard` brings it."""
        if self._stage == 0:
            return bring_shard(parameter, self._base.state[parameter][moment], self.mesh, to)
        if self._stage == 3:
            return bring_shard(parameter, safe_get_local_optimizer_state(parameter, moment), self.mesh, to)
        share = self._join_fragments(parameter, moment, to)
        return gather_tensor(parameter, share) if to is None else bring_to_tensor_rank(parameter, share, self.mesh, to)

    def _join_fragments(self, parameter: nn.Parameter, moment: str, to: int | None) -> Tensor:
        """A moment of which, in ZeRO 1 and 2, each rank of the gradient group has a fragment or none; right on the rank that
        stands there as `to` does, on others of no use."""
        mapping, group = parameter._hp_mapping, self.mesh.gradient_group  # type: ignore[attr-defined]
        if self.mesh.gradient_degree == 1:
            whole: Tensor = mapping.get_hp_fragment(moment).view(parameter.shape)
            return whole.to(self.mesh.device)  # an optimizer that is offloaded has it in host memory
        flat = torch.zeros(parameter.numel(), device=self.mesh.device)
        if mapping is not None:
            start, fragment = mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment)
            flat[start : start + fragment.numel()] = fragment
        # One rank has each element, the others zero: a sum of the bits is that element, also where it is minus zero.
        bits = flat.view(torch.int32)
        if to is None:
            dist.all_reduce(bits, group=group)
        else:
            dist.reduce(bits, group=group, group_dst=self.mesh.gradient_rank(to))
        return flat.view(parameter.shape)

    def _link_optimizer_state(self) -> None:
        """Connect parameters to their moments in ZeRO 1 and 2. DeepSpeed does so after the first step of the first group
        of parameters, and leaves the other groups without."""
        if self._stage in (1, 2):
            zero = self.engine.optimizer
            assert hasattr(zero, "_hp_optimizer_states_linked"), "DeepSpeed renamed its mark"
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _guard_steps(self) -> None:
        """Put the spike guard where ZeRO looks for an overflow, between the norm and the update.

        ZeRO throws a step away whose norm is not finite, and clears its gradients; so a norm that the guard does not admit is
        handed on as infinity. The norm is the same on all ranks, and so is the decision.
        """
        if self._stage == 0:
            return
        zero, name = self.engine.optimizer, "scaled_global_norm" if self._stage < 3 else "_get_norm_groups"
        assert hasattr(zero, name), "DeepSpeed renamed its norm"
        measure = getattr(zero, name)

        def guarded() -> Any:
            found = measure()  # at stage 3 the norm of each group, below that of all
            norm = combine_grad_norm_groups(found) if self._stage == 3 else found
            self._grad_norm = math.inf if self._loss_is_lost else float(norm)
            if self.clip.admits(self._grad_norm):
                return found
            refused = torch.full_like(norm, math.inf)
            return [refused] if self._stage == 3 else refused

        setattr(zero, name, guarded)

    def _before_step(self) -> None:
        """At stage 0, whose engine measures no norm and steps only what has a gradient: the norm, and what the guard says.

        Frozen parameters get a gradient of zero, so that Adam counts their steps as ZeRO does, which steps whole partitions.
        Where the step is to be skipped no parameter has a gradient: then AdamW touches neither weights nor moments.
        """
        if self._stage != 0 or not self.engine.is_gradient_accumulation_boundary():
            return
        parameters = self.named_parameters.values()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = self._total_norm()
        self._grad_norm = norm if math.isfinite(norm) and not self._loss_is_lost else math.inf
        if not self.clip.admits(self._grad_norm):
            self._set_clip(0.0)  # there is nothing to clip, which DeepSpeed cannot
            for parameter in parameters:
                parameter.grad = None

    def _total_norm(self) -> float:
        """The norm of the gradients that this rank has whole. Of tensor ranks each brings what it has a share of, and the first
        what all of them have alike; the sum is one number for all."""
        grads = [parameter.grad for parameter in self.named_parameters.values()]
        if self.mesh.tensor_degree == 1:
            return float(torch.nn.utils.get_total_norm(grads))
        counted = [is_model_parallel_parameter(p) or self.mesh.tensor_rank == 0 for p in self.named_parameters.values()]
        mine = torch.nn.utils.get_total_norm([grad for grad, mine in zip(grads, counted, strict=True) if mine])
        square = mine.to(self.mesh.device).double().square()
        dist.all_reduce(square, group=self.mesh.tensor_group)
        return float(square.sqrt())

    def _judged(self, step: int) -> bool:
        """Count the step that was just done as taken or skipped; whether it was skipped."""
        clip, norm, limit = self.clip, self._grad_norm, self.clip.spike
        skipped = not clip.admits(norm)
        zero = self.engine.optimizer
        assert self._stage == 0 or zero.overflow == skipped, "DeepSpeed decided otherwise than the spike guard"
        clip.update(norm)
        if not skipped:
            return False
        why = "is not finite"
        if math.isfinite(norm):
            factor = self.optimizer_config.spike_factor
            why = f"{norm:.4g} is beyond {limit:.4g}, spike_factor {factor:g} times its average"
        what = "loss" if self._loss_is_lost else "gradient norm"
        if self.mesh.is_main:
            told = f"the {what} of step {step} in phase {self.phase} {why}"
            LOG.warning("%s; step skipped, nothing moved (%d skipped so far)", told, clip.num_skipped)
        return True

    def _all_means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        values = self.mesh.sum(torch.stack([sums[name] for name in names]))
        return dict(zip(names, values.tolist(), strict=True))
