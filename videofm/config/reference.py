"""What preference training compares the policy with: the section `objective.reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from videofm.config.base import Section, execution

if TYPE_CHECKING:
    from videofm.config.data import DataConfig


class AdaptersOffReference(Section):
    """The policy without its adapters: what they were added to. No second copy of any weight; needs `models.dit.lora`."""

    kind: Literal["adapters_off"]


class SecondAdapterReference(Section):
    """A second adapter on the weights of the policy, which does not train: the policy as it was some steps ago.

    It starts as a copy of the one that learns; needs `models.dit.lora`.
    """

    kind: Literal["second_adapter"]
    refresh_every: int = Field(
        0,
        ge=0,
        description="Optimizer steps after which it becomes a copy of the adapter that learns, again and again (online DPO); 0 "
        "never.",
    )


class FrozenReference(Section):
    """A whole model of its own, the role `reference` of `models`, of the architecture of the policy."""

    kind: Literal["frozen"]
    offload: bool = execution(
        False, description="Keep it in host memory, and bring it to the device for each micro-batch (slower, less memory)."
    )


class CachedReference(Section):
    """The policy as the run starts with it, by its errors alone: measured before the first step at a few draws of each pair.

    Training then draws nothing else: step s takes draw number s modulo `num_draws` of each of its pairs.
    """

    kind: Literal["cached"]
    num_draws: int = Field(
        8,
        ge=1,
        description="Draws of noise and noise level for each pair (K). More cost more time before the first step (K forward "
        "passes a pair), fewer repeat sooner.",
    )


ReferenceConfig = Annotated[
    AdaptersOffReference | SecondAdapterReference | FrozenReference | CachedReference,
    Field(discriminator="kind"),
]


def reference_problem(reference: ReferenceConfig, has_adapters: bool, data: DataConfig, zero_stage: int) -> str | None:
    """Why a reference does not go with the rest of the config, in words; None where it does.

    Args:
        reference: the section.
        has_adapters: whether the policy (`models.dit`) trains adapters.
        data: how clips are cut.
        zero_stage: what DeepSpeed shards.
    """
    kind = reference.kind
    if kind in ("adapters_off", "second_adapter") and not has_adapters:
        return (
            f"objective.reference.kind {kind} needs adapters, and models.dit has no lora: give models.dit.lora, or take kind "
            "frozen (a copy of the model) or cached (errors that are measured once)"
        )
    if kind == "second_adapter" and zero_stage == 3:
        return (
            "objective.reference.kind second_adapter with parallel.zero_stage 3: an adapter is copied to the other between the "
            "forward passes, while stage 3 may be gathering it. Take zero_stage 2, or kind adapters_off"
        )
    if isinstance(reference, FrozenReference) and reference.offload and zero_stage == 3:
        return (
            "objective.reference.offload with parallel.zero_stage 3: stage 3 shards the reference over the ranks and gathers a "
            "layer at a time; leave offload out"
        )
    if kind == "cached":
        drawn = {
            "start random (take first or centre)": data.start == "random",
            "crop random (take centre or none)": data.crop == "random",
            f"frame_strides {data.frame_strides} (name one)": len(data.frame_strides) > 1,
        }
        if found := [name for name, is_drawn in drawn.items() if is_drawn]:
            return (
                "objective.reference.kind cached measures each pair once, and other pixels of it would be drawn by "
                f"data.{', data.'.join(found)}"
            )
    return None
