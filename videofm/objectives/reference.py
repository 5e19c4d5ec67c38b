"""What the errors of a policy are compared with in preference training: the errors of a reference, by four ways to have one.

All four give the same loss where they are the same model. A reference computes before the policy does, without gradients and
with the same draws, so that it leaves nothing behind for the backward pass. An objective hands its own hooks on:

    self.reference = reference_of(config.reference)
    self.roles = (*self.roles, *self.reference.roles)
    self.precomputed = self.reference.precomputed(self.errors)       # errors(models, batch, rng) -> (2P, S), of the policy
    def extend(self, models): self.reference.extend(models)          # and check(models) likewise
    ... in loss:  rng = self.reference.draws(rng, batch.step)        # before anything is drawn
                  errors = self.reference.errors(models, batch, compute)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from videofm.config.reference import (
    AdaptersOffReference,
    CachedReference,
    FrozenReference,
    ReferenceConfig,
    SecondAdapterReference,
)
from videofm.errors import ConfigError, DataError
from videofm.ops.adapters import (
    adapter_layers,
    adapters_off,
    add_second_adapter,
    has_second_adapter,
    refresh_second_adapter,
    second_adapter,
)
from videofm.types import Batch, Precomputed, SampleRng, lasting_id

Models = Mapping[str, nn.Module]
Measure = Callable[[Models, Batch, SampleRng], Tensor]
"""models, pairs, draws -> errors of the policy `(2P, S)` float32."""


class Reference(Protocol):
    """A model, or what is known of one, whose errors the policy's are compared with.

    `roles` are those that it adds to the objective's. P is the number of pairs of a micro-batch, whose 2P clips are the winners
    and then the losers; S is 1, or the latent frames where a loss looks at each.
    """

    roles: tuple[str, ...]

    def extend(self, models: Models) -> None:
        """Add to the policy, in place, what this reference needs of it (`types.Objective.extend`)."""
        ...

    def check(self, models: Models) -> None:
        """
        Raises:
            ConfigError: the models do not fit.
        """
        ...

    def draws(self, rng: SampleRng, step: int) -> SampleRng:
        """What the objective draws with in optimizer step `step`, in the place of `rng`."""
        ...

    def errors(self, models: Models, batch: Batch, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """The errors of the reference, `(2P, S)` float32 without a gradient.

        Args:
            models: by role; the policy is `dit`.
            batch: the pairs.
            compute: the errors of the model that it is given, with what was drawn.
        """
        ...

    def precomputed(self, measure: Measure) -> Precomputed | None:
        """What the trainer has to measure before the first step, by `measure`; None for nothing."""
        ...


def reference_of(config: ReferenceConfig) -> Reference:
    """The configured reference."""
    match config:
        case AdaptersOffReference():
            return AdaptersOff()
        case SecondAdapterReference():
            return SecondAdapter(config.refresh_every)
        case FrozenReference():
            return Frozen(config.offload)
        case CachedReference():
            return Cached(config.num_draws)


class _Live:
    """A reference that is asked in each step."""

    roles: tuple[str, ...] = ()

    def extend(self, models: Models) -> None:
        """Nothing is needed."""

    def draws(self, rng: SampleRng, step: int) -> SampleRng:
        """`rng` itself."""
        return rng

    def precomputed(self, measure: Measure) -> Precomputed | None:
        """Nothing is measured before."""
        return None


class AdaptersOff(_Live):
    """The policy with its adapters switched off."""

    def check(self, models: Models) -> None:
        """
        Raises:
            ConfigError: the policy has no adapters.
        """
        _check_adapters(models["dit"], "adapters_off")

    @torch.no_grad()
    def errors(self, models: Models, batch: Batch, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """Those of the weights that the adapters are added to."""
        with adapters_off(models["dit"]):
            return compute(models["dit"])


class SecondAdapter(_Live):
    """The policy with another adapter, which is a copy of the learner as it was at the last multiple of `refresh_every` steps.

    Which step copies is a function of its number alone, and the copy is in the checkpoints: a run that goes on is the same run.
    """

    def __init__(self, refresh_every: int) -> None:
        self.refresh_every = refresh_every

    def extend(self, models: Models) -> None:
        """Put the second adapter in; where there are none, `check` will say so."""
        if adapter_layers(models["dit"]):
            add_second_adapter(models["dit"])

    def check(self, models: Models) -> None:
        """
        Raises:
            ConfigError: the policy has no adapters, or `extend` was not called.
        """
        _check_adapters(models["dit"], "second_adapter")
        if not has_second_adapter(models["dit"]):
            raise ConfigError("the policy has no second adapter: call `extend` of the reference on its models first.")

    @torch.no_grad()
    def errors(self, models: Models, batch: Batch, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """Those of the second adapter, brought up to the learner where the step says so.

        Weights do not move within a step: to copy for each of its micro-batches is to copy once.
        """
        if self.refresh_every and batch.step > 0 and batch.step % self.refresh_every == 0:
            refresh_second_adapter(models["dit"])
        with second_adapter(models["dit"]):
            return compute(models["dit"])


class Frozen(_Live):
    """A model of its own, the role `reference`, with the weights that it was loaded with."""

    roles: tuple[str, ...] = ("reference",)

    def __init__(self, offload: bool = False) -> None:
        self._memory = _HostMemory() if offload else None

    def check(self, models: Models) -> None:
        """
        Raises:
            ConfigError: it is of another model or config than the policy.
        """
        policy, reference = models["dit"], models["reference"]
        if _kind(policy) != _kind(reference):
            (name, config), (other, other_config) = _kind(policy), _kind(reference)
            raise ConfigError(
                f"models.reference ({other}, {other_config}) is not of the architecture of models.dit ({name}, {config}): its "
                "errors say nothing about the policy's. Load into it what the policy starts from."
            )

    @torch.no_grad()
    def errors(self, models: Models, batch: Batch, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """Those of the role `reference`, in the mode (training or not) that the policy is in."""
        reference = models["reference"].train(models["dit"].training)
        if self._memory is None:
            return compute(reference)
        with self._memory.on_device(reference, batch.video.device):
            return compute(reference)


class Cached:
    """The policy as the run began, by its errors at `num_draws` draws of each pair, which the trainer has measured before.

    The draws of a pair are a function of the seed and its id, not of the step or epoch, so that what was measured is exactly
    what a copy of the first policy would give.
    """

    roles: tuple[str, ...] = ()

    def __init__(self, num_draws: int) -> None:
        self.num_draws = num_draws
        self._rows: dict[str, int] = {}
        self._errors = torch.zeros(0)  # (pairs, K, 2, S): winner, loser

    def extend(self, models: Models) -> None:
        """Nothing is needed."""

    def check(self, models: Models) -> None:
        """Any policy will do."""

    def draws(self, rng: SampleRng, step: int) -> SampleRng:
        """The draw number `step` modulo K of each pair."""
        return rng.fixed(step % self.num_draws)

    def take(self, table: Mapping[str, Tensor]) -> None:
        """What was measured: id of each pair -> `(K, 2, S)`."""
        self._rows = {name: row for row, name in enumerate(table)}
        self._errors = torch.stack(list(table.values()))

    def errors(self, models: Models, batch: Batch, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """Those that were measured at the draw of this step.

        Raises:
            DataError: a pair was not measured.
        """
        pairs = [lasting_id(name) for name in batch.sample_ids[: len(batch.sample_ids) // 2]]
        if missing := [name for name in pairs if name not in self._rows]:
            raise DataError(
                f"objective.reference cached: {len(missing)} pairs of step {batch.step} have no measured errors, the first "
                f"{missing[0]}; {len(self._rows)} pairs were measured before the first step. The preferences or their clips "
                "changed since: start a new run."
            )
        found = self._errors[[self._rows[name] for name in pairs], batch.step % self.num_draws]  # (P, 2, S)
        return torch.cat([found[:, 0], found[:, 1]]).to(batch.video.device, non_blocking=True)

    def precomputed(self, measure: Measure) -> Precomputed | None:
        """The errors of all pairs at all draws."""
        return _ReferenceErrors(self, measure)


class _ReferenceErrors:
    """What the trainer measures for a `Cached` reference (`types.Precomputed`)."""

    name = "reference_errors"

    def __init__(self, reference: Cached, measure: Measure) -> None:
        self.num_draws, self._reference, self._measure = reference.num_draws, reference, measure

    @torch.no_grad()
    def measure(self, models: Models, batch: Batch, rng: SampleRng) -> Tensor:
        """Errors of winner and loser of each pair, `(P, 2, S)`."""
        errors = self._measure(models, batch, rng)
        return torch.stack(errors.chunk(2), dim=1)  # (2P, S) -> (P, 2, S)

    def take(self, table: Mapping[str, Tensor]) -> None:
        """Hand them to the reference."""
        self._reference.take(table)


class _HostMemory:
    """Weights of a frozen model that are on the device only while it is used; pinned where they go to a GPU."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    @contextmanager
    def on_device(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        """Inside, the weights of `model` are on `device`; outside they are in host memory, from the first use on."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        if not self._held:
            self._held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
            if device.type == "cuda":
                self._held = {name: tensor.pin_memory() for name, tensor in self._held.items()}
        try:
            for name, tensor in tensors.items():
                tensor.data = self._held[name].to(device, non_blocking=True)
            yield
        finally:
            for name, tensor in tensors.items():
                tensor.data = self._held[name]


def _check_adapters(policy: nn.Module, kind: str) -> None:
    if not adapter_layers(policy):
        raise ConfigError(
            f"objective.reference.kind {kind}: the policy has no adapters. Give models.dit.lora, or take kind frozen or cached."
        )


def _kind(model: nn.Module) -> tuple[str, str]:
    """Name and config of a model, for comparison and messages."""
    return str(getattr(model, "spec_name", type(model).__name__)), str(getattr(model, "config", None))
