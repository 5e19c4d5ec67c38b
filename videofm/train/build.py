"""A config becomes everything a run needs: models in their roles, the objective, engines, loader, callbacks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from videofm import models, registry
from videofm.config.model import ModelConfig
from videofm.config.train import TrainConfig
from videofm.data.buckets import describe_steps
from videofm.data.loader import StepLoader
from videofm.errors import ConfigError, ParallelError
from videofm.objectives.roles import check_kinds
from videofm.parallel.layout import layout_of
from videofm.parallel.mesh import Mesh
from videofm.parallel.rng import derive_seed
from videofm.parallel.tensor import check_heads
from videofm.progress import LOG
from videofm.run_dir import RunDirectory
from videofm.train.divergence import Divergence
from videofm.train.engine import PhaseEngine
from videofm.train.optim import MovingAverage, num_elements
from videofm.train.watchdog import Heartbeat
from videofm.train.zero import check_offload, check_scaling, shard_frozen
from videofm.types import Objective


@dataclass
class Job:
    """A training run, built, with the heartbeat that its loop moves on and the count of steps that were skipped lately.
    `num_samples` counts the samples that training has seen; None if a run that an earlier version began does not say."""

    config: TrainConfig
    run: RunDirectory
    mesh: Mesh
    models: Mapping[str, nn.Module]
    objective: Objective
    engines: Mapping[str, PhaseEngine]
    averages: Mapping[str, MovingAverage]
    loader: StepLoader
    trained_roles: tuple[str, ...] = field(default=())
    num_samples: int | None = 0
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    divergence: Divergence = field(init=False)

    def __post_init__(self) -> None:
        self.divergence = Divergence(self.config.faults.divergence)


def build_job(config: TrainConfig, run: RunDirectory, mesh: Mesh, loader: StepLoader, models_: Mapping[str, nn.Module]) -> Job:
    """Wrap loaded models into engines and moving averages. `models_` already carry the weights to start from."""
    objective = build_objective(config)
    if len(objective.phases) > 1 and config.parallel.zero_stage == 3:
        raise ParallelError(
            f"objective {config.objective.kind!r} has the phases {', '.join(objective.phases)}, which share models; ZeRO "
            "stage 3 shards a model for one phase only. Set parallel.zero_stage to 0, 1 or 2."
        )
    if unknown := set(config.phase_optimizers) - set(objective.phases):
        raise ConfigError(
            f"phase_optimizers has {', '.join(sorted(unknown))}; this objective has the phases {', '.join(objective.phases)}."
        )
    if check := getattr(objective, "check", None):
        check(models_)
    check_scaling(config.parallel, mesh)
    _check_tensor_ranks(config, {role: models_[role] for role in trained_roles(objective)})
    _check_blocks(config, {role: models_[role] for role in trained_roles(objective)})
    # Dropout and the like belong to the objective, keyed by sample; modules stay deterministic.
    for role, model in models_.items():
        trained = role in trained_roles(objective)
        if mesh.tensor_degree == 1 or not transformers({role: model}):  # one that is split moves once it is
            model.to(mesh.device)
        model.train(trained).requires_grad_(trained)
        if trained:
            models.freeze_all_but_lora(model)
            if role in config.models and config.models[role].freeze_base:
                models.freeze_base(model)
        _parallelize(model, mesh, config, role)
        if config.parallel.zero_stage == 3 and not trained and transformers({role: model}):
            shard_frozen(model, config.parallel, mesh.device)  # as large as what trains
    engines = {phase: PhaseEngine(models_, objective, phase, config, mesh) for phase in objective.phases}
    averages: dict[str, MovingAverage] = {}
    for phase, roles in objective.phases.items():
        decay = config.phase_optimizers.get(phase, config.optimizer).ema_decay
        averages |= {role: MovingAverage(_trainable(models_[role]), decay) for role in roles if decay > 0}
    return Job(config, run, mesh, models_, objective, engines, averages, loader, trained_roles(objective))


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _parallelize(model: nn.Module, mesh: Mesh, config: TrainConfig, role: str) -> None:
    chosen, parallel = config.models.get(role), config.parallel
    options = models.ParallelOptions(
        context_strategy=parallel.context_strategy,
        dtype=torch.bfloat16 if config.trainer.precision == "bf16_autocast" else None,
        compile=config.trainer.compile,
        activation_checkpointing=parallel.activation_checkpointing,
        checkpoint_every_blocks=parallel.checkpoint_every_blocks,
        offload_activations=parallel.offload_activations,
    )
    if chosen is not None:
        options = replace(options, attention=chosen.attention, cross_attention=chosen.cross_attention)
    models.model_spec(model.spec_name).parallelize(model, mesh, options)


def _check_tensor_ranks(config: TrainConfig, trained: Mapping[str, nn.Module]) -> None:
    """Refuse tensor ranks that do not divide the heads, or where nothing that is trained is split: all would do the same."""
    degree, split = config.parallel.tensor_degree, transformers(trained)
    if degree > 1 and not split:
        raise ParallelError(
            f"parallel.tensor_degree is {degree}, but {', '.join(sorted(trained))} cannot be split over tensor ranks: "
            "they would all do the same work. Set it to 1, and raise data_degree or context_degree instead."
        )
    for model in split:
        check_heads(model, degree)


def _check_blocks(config: TrainConfig, trained: Mapping[str, nn.Module]) -> None:
    """Refuse options about blocks of a transformer where nothing that is trained has any, or where DeepSpeed breaks them."""
    parallel = config.parallel
    wanted = {
        "trainer.compile": config.trainer.compile,
        "parallel.activation_checkpointing": parallel.activation_checkpointing != "none",
        "parallel.offload_activations": parallel.offload_activations,
    }
    names = [name for name, is_set in wanted.items() if is_set]
    if names and not split_heads(trained):
        raise ConfigError(
            f"{', '.join(names)}: this is about blocks of a transformer, and {', '.join(sorted(trained))} has none. "
            "Leave it out."
        )
    if parallel.zero_stage == 3 and config.trainer.compile:
        raise ConfigError(
            "trainer.compile with parallel.zero_stage 3: DeepSpeed gathers weights in Python around each layer, which would be "
            "compiled anew time and again. Take zero_stage 2, or set trainer.compile to false."
        )
    if parallel.zero_stage == 3 and parallel.activation_checkpointing == "selective":
        raise ConfigError(
            "parallel.activation_checkpointing selective with parallel.zero_stage 3: DeepSpeed's linear layers add their bias "
            "in place to products that would be kept, which makes gradients wrong. Take full, or zero_stage 2."
        )


def build_objective(config: TrainConfig) -> Objective:
    """The configured objective.

    Raises:
        ConfigError: its roles are not the ones that `models` fills, or one that it does not train is to have adapters or an
            injection.
    """
    kind = config.objective.kind
    objective: Objective = registry.lookup(registry.OBJECTIVES, kind, "objective")(config.objective)
    wanted = set(objective.roles) - set(getattr(objective, "own_models", {}))
    missing, extra = wanted - set(config.models), set(config.models) - wanted
    if missing or extra:
        raise ConfigError(
            f"objective {kind!r} takes the models {', '.join(sorted(wanted))}; "
            f"missing: {', '.join(sorted(missing)) or 'none'}; unknown: {', '.join(sorted(extra)) or 'none'}"
        )
    for role, chosen in config.models.items():
        if chosen.lora is not None and role not in trained_roles(objective):
            raise ConfigError(f"models.{role}.lora: objective {kind!r} does not train {role}; leave it out.")
        if (chosen.injection is not None or chosen.freeze_base) and role not in trained_roles(objective):
            raise ConfigError(
                f"models.{role}.injection, models.{role}.freeze_base: objective {kind!r} does not train {role}; leave them "
                "out. A run that has an injection brings it (`path`)."
            )
    return objective


def trained_roles(objective: Objective) -> tuple[str, ...]:
    """The roles that any phase trains, in order of first mention."""
    return tuple(dict.fromkeys(role for roles in objective.phases.values() for role in roles))


def build_models(config: TrainConfig, device: str = "cpu") -> dict[str, nn.Module]:
    """Every role's model, new ones with weights drawn from (seed, role): the same on every rank and in every run.

    Raises:
        ConfigError: a role has a model of another kind than it takes, or one that cannot be built.
        CheckpointError: weights are missing, or do not fit.
    """
    objective = build_objective(config)
    own = getattr(objective, "own_models", {})
    wanted = {**config.models, **{role: ModelConfig.model_validate(fields) for role, fields in own.items()}}
    built = {}
    for role, model_config in wanted.items():
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(config.seed, "weights", role))
            built[role] = _build_model(model_config, device)
    check_kinds(built)
    if extend := getattr(objective, "extend", None):
        extend(built)
    return built


def _build_model(config: ModelConfig, device: str) -> nn.Module:
    model = _base_model(config, device)
    if (wanted := config.injection) is not None:
        blocks = wanted.blocks if isinstance(wanted.blocks, str) else tuple(wanted.blocks)
        models.inject_features(model, models.InjectionSpec(wanted.kind, blocks, wanted.feature_channels, wanted.hidden_width))
    if config.freeze_base:
        models.freeze_base(model)
    if config.lora is not None:
        models.inject_lora(model, config.lora.rank, config.lora.alpha, config.lora.targets)
        adapters = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        LOG.info(
            "%d layers have adapters of rank %d, %s parameters", len(adapters) // 2, config.lora.rank, f"{sum(adapters):,}"
        )
    return model


def _base_model(config: ModelConfig, device: str) -> nn.Module:
    if config.path is not None:
        return models.load(config.path, role=config.role)
    assert config.name is not None
    if config.init_from is not None:
        filled = models.initial(
            config.name, config.init_from, config.size, config.role, config.init_component, **config.overrides
        )
        LOG.info(filled.report())
        return filled.model
    model = models.build(config.name, size=config.size or "tiny", device=device, **config.overrides)
    if config.inflate_from is not None and device != "meta":
        models.inflate(model, config.inflate_from)
    return model


def fate(model: nn.Module, trained: bool) -> str:
    """Whether the weights of a role are trained, frozen, or only its adapters or its injection are trained."""
    moving = sum(num_elements(parameter) for parameter in model.parameters() if parameter.requires_grad)
    if trained and models.lora_spec(model) is not None:
        return f"of which {moving:,} are adapters and trained"
    if trained and models.injection_spec(model) is not None and not all(value.requires_grad for value in model.parameters()):
        return f"of which {moving:,} are the injection's and trained"
    return "trained" if trained else "frozen"


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device of this rank.

    Raises:
        ConfigError: CUDA is asked for and is not there, or there are fewer devices than ranks of this node.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device is cuda, but torch sees no CUDA device; set trainer.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, num_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if num_devices == 1:
        local_rank = 0  # Slurm may show each task its own device only; preflight sees to it that no two ranks share one
    if local_rank >= num_devices:
        raise ConfigError(
            f"rank {local_rank} of this node sees {num_devices} CUDA devices; start at most {num_devices} ranks a node, or set "
            "trainer.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def split_heads(built: Mapping[str, nn.Module]) -> list[int]:
    """Heads of the models whose attention context ranks share, a number a model."""
    return [int(model.config.num_heads) for model in transformers(built)]


def transformers(built: Mapping[str, nn.Module]) -> list[Any]:
    """The models that tensor ranks split, and whose attention context ranks share."""
    return [model for model in built.values() if str(model.spec_name).startswith(("dit/", "ar/"))]


def dry_run(config: TrainConfig) -> str:
    """Build what can be built without weights or data, and say what it is: roles, parameters, samples of a step, the mesh."""
    objective = build_objective(config)
    check_offload(config.parallel)
    lines, trained_models = [], {}
    for role, model_config in config.models.items():
        source = model_config.path or model_config.init_from or model_config.overrides.get("path")
        state = "" if source is None else f"from {source} ({'found' if Path(source).exists() else 'not there yet'})"
        size = model_config.size or (None if source else "tiny")
        if model_config.name is None or size is None:
            lines.append(f"{role}: {state}")
            continue
        # Whether `init_from` brings an injection is seen when it is loaded.
        frozen = model_config.freeze_base and model_config.injection is not None
        model = _build_model(model_config.model_copy(update={"init_from": None, "freeze_base": frozen}), "meta")
        check_kinds({role: model})
        if check_context := models.model_spec(model.spec_name).check_context:
            check_context(model, config.parallel.context_degree)
        count = sum(parameter.numel() for parameter in model.parameters())
        if role in trained_roles(objective):
            trained_models[role] = model
        trained = fate(model, role in trained_roles(objective))
        told = f"{role}: {model_config.name} {size}, {count:,} parameters, {trained}"
        lines.append(f"{told}, {state}" if state else told)
    if set(trained_models) == set(trained_roles(objective)):  # else the path of one tells what it is, later
        _check_tensor_ranks(config, trained_models)
        _check_blocks(config, trained_models)
    lines.append(
        f"{config.trainer.max_steps} steps of {describe_steps(config.data)}"
        f" on {layout_of(config.parallel).describe()}, ZeRO stage {config.parallel.zero_stage}, {config.trainer.precision}"
    )
    return "\n".join(lines)
