"""What stage `evaluate` measures of reward models: how often they agree with preferences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from videofm import models
from videofm.config import TrainConfig
from videofm.config.data import DataConfig
from videofm.config.evaluate_reward import RewardMetric
from videofm.config.reward import RewardTrainingConfig
from videofm.data.loader import StepLoader
from videofm.data.pairs import PairPlan
from videofm.data.preferences import read_preferences
from videofm.errors import ConfigError, DataError, Interrupted
from videofm.objectives.bradley_terry import log_outcomes, outcome_nll
from videofm.objectives.reward import SIGNS, accuracy, check_reward
from videofm.progress import progress
from videofm.reward.model import ROLES, score_clips
from videofm.run_dir import RunDirectory
from videofm.sampling.source import training_config
from videofm.stages.stored_clips import device, existing
from videofm.types import Batch


@dataclass(frozen=True)
class Judged:
    """Of some pairs the model's scores of winner and loser, `(P, A)` each, and what was judged: `sign` `(P, A)` as in
    `objectives.reward.Votes`, NaN where nobody said. All float64 on the CPU."""

    winner: Tensor
    loser: Tensor
    sign: Tensor


def measure_reward(metric: RewardMetric, run: RunDirectory, seed: int) -> dict[str, Any]:
    """Score both clips of each pair as the training read clips, by their most likely latents, and compare.

    Returns:
        - `accuracy`, the share of pairs with a winner in which it scores higher (equal scores count one half), and
          `outcome_accuracy`, the share of all pairs whose likeliest outcome of three, by the theta of the training, is the one
          that was judged;
        - `nll` in nats, the mean over all pairs, which log 3 = 1.10 of a guess is to be compared with;
        - `score_gap`, the mean of winner minus loser over pairs with a winner, and `tie_gap`, the mean distance in ties (None
          where there are none);
        - `num_pairs`, ties among them, `num_ties`, `num_bad` records that were left out, `theta`;
        - `rows`: for each axis of the model `accuracy` and `num_decided`, the pairs that are decided on it.

    Raises:
        ConfigError: `metric.run` is no training of a reward model.
        DataError: the preferences cannot be used, or none of them has a winner.
        Interrupted: stopped on request.
    """
    folder = existing(metric.run)
    config = _training(metric, training_config(folder))
    roles = {role: models.load(folder, role=role, device=device()) for role in ROLES}
    check_reward(roles)
    loader = StepLoader(_data(metric, config), seed)
    plan = cast(PairPlan, loader.plan)
    axes = tuple(cast(Any, roles["reward"]).config.axes)
    parts = list(_judged(metric, loader, plan, roles, axes, run))
    winner, loser, sign = (torch.cat([getattr(part, name) for part in parts]) for name in ("winner", "loser", "sign"))
    if not bool(sign[:, 0].any()):
        raise DataError(f"{metric.pairs}: none of the {len(sign)} pairs has a winner; there is nothing to agree with.")
    assert isinstance(config.objective, RewardTrainingConfig)
    theta = config.objective.theta
    return {**_agreement(winner - loser, sign, theta), "num_bad": len(plan.matched.bad), "theta": theta} | {
        "rows": [_row(axis, (winner - loser)[:, number], sign[:, number]) for number, axis in enumerate(axes)]
    }


def _training(metric: RewardMetric, found: Mapping[str, Any]) -> TrainConfig:
    """The config of the training at `metric.run`."""
    kind = found["objective"]["kind"] if found.get("kind") == "train" else None
    if kind != "reward":
        what = "no training run" if kind is None else f"a training of objective {kind}"
        raise ConfigError(
            f"reward: {metric.run} is {what}; give the run of a reward model (objective reward), whose config says how its "
            "clips are read."
        )
    return TrainConfig.model_validate(found)


def _data(metric: RewardMetric, config: TrainConfig) -> DataConfig:
    """The section `data` of the training, for the pairs of the metric: pixels, and ties too."""
    changes: dict[str, Any] = {
        "manifest": read_preferences(metric.pairs).clips,
        "split": metric.split,
        "pairs": {"path": metric.pairs, "on_bad": metric.on_bad, "ties": True},
        "micro_batch_size": metric.batch_size,
        "num_micro_batches": 1,
        "cache": None,
        "num_workers": 0,
    }
    return DataConfig.model_validate(config.data.model_dump() | changes)


def _judged(
    metric: RewardMetric,
    loader: StepLoader,
    plan: PairPlan,
    roles: dict[str, nn.Module],
    axes: tuple[str, ...],
    run: RunDirectory,
) -> Iterator[Judged]:
    """The pairs of the first epoch, or the first `metric.num_pairs` of them, each once."""
    wanted = min(plan.num_pairs, metric.num_pairs or plan.num_pairs)
    done, batches = 0, loader.first_clips()
    with progress(f"{metric.kind} pairs", wanted) as bar:
        while done < wanted:
            if run.stop_requested:
                raise Interrupted("evaluation stopped on request; the same command starts it again")
            batch = next(batches)
            found = _scored(batch, roles, axes, min(wanted - done, len(batch.captions) // 2))
            yield found
            done += len(found.sign)
            bar.advance(len(found.sign))


def _scored(batch: Batch, roles: dict[str, nn.Module], axes: tuple[str, ...], num_pairs: int) -> Judged:
    """The first `num_pairs` of a micro-batch."""
    assert batch.pair_ties is not None
    scores = score_clips(roles, batch.to(device()).video, batch.captions).double().cpu()
    winner, loser = scores.chunk(2)
    columns = [torch.where(batch.pair_ties, 0.0, 1.0).double()]
    for axis in axes[1:]:
        votes = batch.pair_axes or [{}] * len(batch.pair_ties)
        columns.append(torch.tensor([SIGNS[vote[axis]] if axis in vote else torch.nan for vote in votes], dtype=torch.float64))
    return Judged(winner[:num_pairs], loser[:num_pairs], torch.stack(columns, dim=1)[:num_pairs])


def _agreement(gaps: Tensor, signs: Tensor, theta: float) -> dict[str, Any]:
    """The numbers about the axis `overall`, the first column of `gaps` and `signs` `(P, A)`."""
    gap, sign = gaps[:, 0], signs[:, 0]
    tied = sign == 0
    logs = log_outcomes(gap, theta)
    likeliest = torch.stack([logs.first, logs.tie, logs.second], dim=1).argmax(dim=1)
    nll = outcome_nll(gap, sign, theta)
    return {
        "accuracy": float(accuracy(gap, sign)[~tied].mean()),
        "outcome_accuracy": float((likeliest == 1 - sign.long()).double().mean()),
        "nll": float(nll.mean()) if bool(nll.isfinite().all()) else None,  # JSON has no infinity: ties at theta 1
        "score_gap": float(gap[~tied].mean()),
        "tie_gap": float(gap[tied].abs().mean()) if bool(tied.any()) else None,
        "num_pairs": len(gap),
        "num_ties": int(tied.sum()),
    }


def _row(axis: str, gap: Tensor, sign: Tensor) -> dict[str, Any]:
    """What is known of one axis."""
    decided = sign.abs() == 1
    right = float(accuracy(gap, sign)[decided].mean()) if bool(decided.any()) else None
    return {"axis": axis, "accuracy": right, "num_decided": int(decided.sum())}
