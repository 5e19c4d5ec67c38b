"""Steps of the order that are passed over: what is left is the order without them, from any position on."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.preferred import candidates, neighbours
from tests.unit.data.test_order import KINDS, make
from tests.unit.data.test_pairs import plan_of as pairs_plan
from videofm.data.plan import DataPlan, PlanState

WINDOWS = [range(3, 5), range(9, 14), range(12, 16), range(40, 41)]
"""In the order in which they were given up; two overlap. Together 2 + 7 + 1 steps."""
LEFT = [step for step in range(50) if step not in {3, 4, *range(9, 16), 40}]


def through_json(state: PlanState) -> PlanState:
    return PlanState.from_json(json.loads(json.dumps(state.to_json())))


def check(plan: DataPlan, again: DataPlan) -> None:
    """Two plans of one order, of which `again` passes over `WINDOWS`."""
    whole = list(islice(plan.steps(), 50))
    again.pass_over(WINDOWS)
    found = list(islice(again.steps(), len(LEFT)))
    assert [step.micro_batches for step in found] == [whole[step].micro_batches for step in LEFT], "the rest, in order"
    assert [step.after.step for step in found] == list(range(1, len(LEFT) + 1)), "steps are counted without the others"
    assert [step.after.data_step for step in found] == [step + 1 for step in LEFT]
    for k in (0, 2, 3, 7, 8, 20):
        state = through_json(found[k - 1].after) if k else PlanState()
        assert list(islice(again.steps(state), 4)) == found[k : k + 4], "resumed after step k, at the edges of windows too"


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_without_some_of_its_steps(kind: str) -> None:
    check(make(kind)[0], make(kind)[0])


def test_the_order_of_pairs_without_some_of_its_steps(tmp_path: Path) -> None:
    """The pair that takes the place of a bad one is found by the step of the order too."""
    records = candidates(11)
    pairs: Any = neighbours(records)
    check(pairs_plan(tmp_path, pairs, num_micro_batches=4), pairs_plan(tmp_path, pairs, num_micro_batches=4))
    plan, other = (pairs_plan(tmp_path, pairs, num_micro_batches=4) for _ in range(2))
    other.pass_over([range(1, 3)])
    whole, rest = list(islice(plan.steps(), 4)), list(islice(other.steps(), 2))
    draw = rest[1].micro_batches[0][0]
    assert draw == whole[3].micro_batches[0][0] and other.replacement(draw, 0) == plan.replacement(draw, 0)


def test_a_window_that_begins_before_the_position_is_passed_over_from_there_on() -> None:
    """Steps 0 to 3 were read, then 2 to 5 were given up, and the run went back to step 3: it reads 6 next."""
    plan, _ = make("plain")
    whole = list(islice(plan.steps(), 8))
    other, _ = make("plain")
    other.pass_over([range(2, 6)])
    found = list(islice(other.steps(whole[2].after), 2))
    assert [step.micro_batches for step in found] == [step.micro_batches for step in whole[6:]]
    assert [(step.after.step, step.after.passed_over) for step in found] == [(4, 3), (5, 3)]


def test_spares_are_those_of_the_order() -> None:
    """The clip that takes the place of one that cannot be read does not depend on what was passed over before it."""
    plan, other = make("plain")[0], make("plain")[0]
    other.pass_over([range(1, 5)])
    draws = [list(islice(p.steps(), number))[-1].micro_batches[0][0] for p, number in ((plan, 8), (other, 4))]
    assert draws[0] == draws[1] and plan.replacement(draws[0], 0) == other.replacement(draws[1], 0)


def test_what_passes_over_nothing_says_nothing_of_it() -> None:
    """Positions are as they were before there was such a thing, and its identity does not know of windows."""
    plan, _ = make("plain")
    before = dict(plan.identity)
    state = next(plan.steps()).after
    assert "passed_over" not in state.to_json()
    plan.pass_over([range(2)])
    assert plan.identity == before
    assert through_json(replace(state, passed_over=3)) == replace(state, passed_over=3)
