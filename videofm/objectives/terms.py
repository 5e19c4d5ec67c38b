"""The weight of a term of a loss as a function of the step."""

from __future__ import annotations

from videofm.config.autoencoder import LossTerm


def weight_at(term: LossTerm, step: int) -> float:
    """The weight at optimizer step `step` (0 is the first): 0 before `start_step`, then a linear rise over `ramp_steps`."""
    if step < term.start_step:
        return 0.0
    done = step - term.start_step + 1
    return term.weight if done > term.ramp_steps else term.weight * done / term.ramp_steps
