"""A config becomes everything a run needs: models in their roles, the objective, engines, loader, callbacks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from videofm import models, registry
from videofm.config.train import ModelConfig, TrainConfig
from videofm.data.loader import StepLoader
from videofm.errors import ConfigError
from videofm.parallel.mesh import Mesh
from videofm.parallel.rng import derive_seed
from videofm.run_dir import RunDirectory
from videofm.train.engine import PhaseEngine
from videofm.train.optim import MovingAverage
from videofm.types import Objective


@dataclass
class Job:
    """A training run, built. `position` moves as steps are consumed; everything else is fixed."""

    config: TrainConfig
    run: RunDirectory
    mesh: Mesh
    models: Mapping[str, nn.Module]
    objective: Objective
    engines: Mapping[str, PhaseEngine]
    averages: Mapping[str, MovingAverage]
    loader: StepLoader
    trained_roles: tuple[str, ...] = field(default=())


def build_job(config: TrainConfig, run: RunDirectory, mesh: Mesh, loader: StepLoader, models_: Mapping[str, nn.Module]) -> Job:
    """Wrap loaded models into engines and moving averages. `models_` already carry the weights to start from."""
    objective = build_objective(config)
    # Dropout and the like belong to the objective, keyed by sample; modules stay deterministic.
    for role, model in models_.items():
        trained = role in trained_roles(objective)
        model.to(mesh.device).train(trained).requires_grad_(trained)
        _parallelize(model, mesh, config, role)
    engines = {phase: PhaseEngine(models_, objective, phase, config, mesh) for phase in objective.phases}
    averages = {}
    if config.optimizer.ema_decay > 0:
        averages = {
            role: MovingAverage(models_[role].named_parameters(), config.optimizer.ema_decay)
            for role in trained_roles(objective)
        }
    return Job(config, run, mesh, models_, objective, engines, averages, loader, trained_roles(objective))


def _parallelize(model: nn.Module, mesh: Mesh, config: TrainConfig, role: str) -> None:
    dtype = torch.bfloat16 if config.trainer.precision == "bf16_autocast" else None
    chosen = config.models[role]
    options = models.ParallelOptions(chosen.attention, chosen.cross_attention, dtype)
    models.model_spec(model.spec_name).parallelize(model, mesh, options)


def build_objective(config: TrainConfig) -> Objective:
    """The configured objective.

    Raises:
        ConfigError: its roles are not the ones that `models` fills.
    """
    kind = config.objective.kind
    objective: Objective = registry.lookup(registry.OBJECTIVES, kind, "objective")(config.objective)
    missing, extra = set(objective.roles) - set(config.models), set(config.models) - set(objective.roles)
    if missing or extra:
        raise ConfigError(
            f"objective {kind!r} takes the models {', '.join(sorted(objective.roles))}; "
            f"missing: {', '.join(sorted(missing)) or 'none'}; unknown: {', '.join(sorted(extra)) or 'none'}"
        )
    return objective


def trained_roles(objective: Objective) -> tuple[str, ...]:
    """The roles that any phase trains, in order of first mention."""
    return tuple(dict.fromkeys(role for roles in objective.phases.values() for role in roles))


def build_models(config: TrainConfig, device: str = "cpu") -> dict[str, nn.Module]:
    """Every role's model, new ones with weights drawn from (seed, role): the same on every rank and in every run."""
    built = {}
    for role, model_config in config.models.items():
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(config.seed, "weights", role))
            built[role] = _build_model(model_config, device)
    return built


def _build_model(config: ModelConfig, device: str) -> nn.Module:
    if config.path is not None:
        return models.load(config.path, role=config.role)
    assert config.name is not None
    return models.build(config.name, size=config.size or "tiny", device=device, **config.overrides)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device of this rank.

    Raises:
        ConfigError: CUDA is asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device is cuda, but torch sees no CUDA device; set trainer.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def dry_run(config: TrainConfig) -> str:
    """Build what can be built without weights or data, and say what it is: roles, parameters, samples of a step."""
    objective = build_objective(config)
    lines = []
    for role, model_config in config.models.items():
        if model_config.path is not None:
            state = "found" if Path(model_config.path).exists() else "not there yet"
            lines.append(f"{role}: from {model_config.path} ({state})")
            continue
        model = _build_model(model_config, "meta")
        count = sum(parameter.numel() for parameter in model.parameters())
        trained = "trained" if role in trained_roles(objective) else "frozen"
        lines.append(f"{role}: {model_config.name} {model_config.size or 'tiny'}, {count:,} parameters, {trained}")
    samples = config.data.micro_batch_size * config.data.num_micro_batches
    size = f"{config.data.num_frames}x{config.data.height}x{config.data.width}"
    lines.append(
        f"{config.trainer.max_steps} steps of {samples} clips of {size}"
        f" on {config.parallel.data_degree} processes, ZeRO stage {config.parallel.zero_stage}, {config.trainer.precision}"
    )
    return "\n".join(lines)
