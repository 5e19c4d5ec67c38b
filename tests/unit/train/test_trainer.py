"""One step of the loop, with engines that only say what they did."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from videofm.config.train import OptimizerConfig
from videofm.data.loader import Step
from videofm.data.plan import PlanState
from videofm.train.trainer import train_step


class Engine:
    def __init__(self, skipped: bool) -> None:
        self.skipped = skipped

    def step(self, batches: list[Any], lr: float) -> dict[str, float]:
        return {"loss": lr, "skipped": float(self.skipped)}


class Average:
    def __init__(self) -> None:
        self.updated: list[int] = []

    def update(self, step: int) -> None:
        self.updated.append(step)


@pytest.mark.parametrize("skipped", [False, True])
def test_the_average_of_a_phase_stands_still_where_its_step_was_skipped(skipped: bool) -> None:
    """The other phase's goes on, and so does the count of steps."""
    averages = {"vae": Average(), "discriminator": Average()}
    job: Any = SimpleNamespace(
        config=SimpleNamespace(optimizer=OptimizerConfig(lr=1.0), phase_optimizers={}, trainer=SimpleNamespace(max_steps=10)),
        mesh=SimpleNamespace(device="cpu"),
        objective=SimpleNamespace(phases={"generator": ("vae",), "discriminator": ("discriminator",)}),
        engines={"generator": Engine(skipped), "discriminator": Engine(False)},
        averages=averages,
    )
    metrics = train_step(job, Step([], 4, PlanState(step=7)))
    assert averages["vae"].updated == ([] if skipped else [6]) and averages["discriminator"].updated == [6]
    assert metrics["skipped"] == skipped and metrics["discriminator_skipped"] == 0
