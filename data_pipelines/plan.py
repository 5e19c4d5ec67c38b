"""From the stages of a config to *steps*: what a task does to a group between two points where rows lie on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_pipelines.rows import ModelStage
from videofm import registry
from videofm.config.base import result_fields
from videofm.config.curate import CurateConfig
from videofm.errors import ConfigError

PIPELINE_VERSION = 3
"""Part of the config hash: raise it when a change of code changes what is written."""

CHUNK = "chunk"
"""Name in the funnel of the step that cuts long sources into spans."""

StepKind = Literal["child", "model", "barrier", "chunk"]


@dataclass(frozen=True)
class Step:
    """Stages that run together: several in a child process, or one `model` or `barrier` alone; or the cutting of long sources.

    `sections` are those of the config, as plain values; `names` are those in the funnel. The last step packs shards.
    """

    kind: StepKind
    sections: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    pack: bool = False

    @property
    def label(self) -> str:
        """The step in a message."""
        return "+".join(self.names)


def plan_steps(config: CurateConfig) -> list[Step]:
    """The steps of a config, in order.

    Raises:
        ConfigError: two stages have one name, a stage comes before one that it needs, the last one is not `transcode`, or long
            sources are to be cut without `probe`, which measures them.
    """
    _check_order(config)
    steps: list[Step] = []
    chunked = config.engine.chunk_seconds is None
    for section in config.stages:
        name, placement = stage_name(section), _placement(section)
        probed = any("probe" in step.names for step in steps)
        if not chunked and probed and placement != "barrier":
            steps.append(Step("chunk", (), (CHUNK,)))
            chunked = True
        plain = section.model_dump(mode="json")
        if placement == "child" and steps and steps[-1].kind == "child" and (chunked or not probed):
            before = steps.pop()
            steps.append(Step("child", (*before.sections, plain), (*before.names, name)))
        else:
            steps.append(Step(placement, (plain,), (name,)))
    last = steps[-1]
    return [*steps[:-1], Step(last.kind, last.sections, last.names, pack=True)]


def _check_order(config: CurateConfig) -> None:
    order = ", ".join(map(stage_name, config.stages))
    seen: list[str] = []
    names: list[str] = []
    for section in config.stages:
        stage, name = _stage_class(section), stage_name(section)
        missing = [needed for needed in stage.requires if needed not in seen]
        if missing:
            raise ConfigError(f"stages: {name!r} needs {missing[0]!r} before it; the order is {order}")
        if name in names or name == CHUNK:
            raise ConfigError(f"stages: {name!r} is named twice; the order is {order}. Where a stage has a `name`, set another")
        seen.append(section.kind)
        names.append(name)
    if seen[-1] != "transcode":
        raise ConfigError(f"stages: the last must be 'transcode', which makes what is packed; the order is {order}")
    if config.engine.chunk_seconds is not None and "probe" not in seen:
        raise ConfigError(f"engine.chunk_seconds needs the stage 'probe', which measures sources; the order is {order}")


def stage_name(section: Any) -> str:
    """The name of a stage in the funnel: its own where it has one, else its kind."""
    return str(getattr(section, "name", None) or section.kind)


def build_stage(section: Any) -> Any:
    """The stage for a section of the config."""
    return _stage_class(section)(section)


def _stage_class(section: Any) -> Any:
    return registry.lookup(registry.CURATION_STAGES, section.kind, "curation stage")


def _placement(section: Any) -> Literal["child", "model", "barrier"]:
    placement: Literal["child", "model", "barrier"] = getattr(_stage_class(section), "placement", "child")
    return placement


def config_hash(config: CurateConfig) -> str:
    """SHA-256 of all that determines the content of a shard, given its sources: stages, weights of models, grouping.

    Raises:
        ConfigError, CheckpointError: weights are missing.
    """
    weights: dict[str, str] = {}
    for section in config.stages:
        if _placement(section) == "model":
            stage: ModelStage = build_stage(section)
            weights[stage_name(section)] = stage.weights_hash()
    value = {
        "version": PIPELINE_VERSION, "stages": [result_fields(section) for section in config.stages],
        "held_out": config.held_out, "group_size": config.engine.group_size, "chunk_seconds": config.engine.chunk_seconds,
        "weights": weights,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def spans(duration: float, chunk_seconds: float) -> Sequence[tuple[float, float] | None]:
    """A source of `duration` seconds in equal spans of at most `chunk_seconds`; `[None]` where it is no longer than that."""
    if duration <= chunk_seconds:
        return [None]
    count = -int(-duration // chunk_seconds)
    edges = [round(duration * index / count, 3) for index in range(count)]
    # The length of a file is often a little wrong; the last span goes on to where the frames end.
    return [(start, stop) for start, stop in zip(edges, [*edges[1:], duration + 3600.0], strict=True)]
