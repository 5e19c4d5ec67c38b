"""Bradley-Terry with ties (Rao & Kupper 1967; for reward models of video Liu et al. 2025, arXiv 2501.13918; spec C2).

Of two things with scores a and b, and theta = exp(k) >= 1,

    P(A better) = e^a / (e^a + theta e^b)                                               = s(a - b - k)
    P(B better) = e^b / (e^b + theta e^a)                                               = s(b - a - k)
    P(tie)      = (theta^2 - 1) e^a e^b / ((e^a + theta e^b) (theta e^a + e^b))         = (theta^2 - 1) P(A better) P(B better)

with s the logistic function; the three sum to 1. They depend on the gap a - b alone, and are computed from it in logarithms, so
that nothing overflows at any gap. At theta 1 there are no ties, and the first is plain Bradley-Terry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class LogOutcomes:
    """Logarithms of the probabilities that the first, the second, or neither is better; each of the shape of the gap."""

    first: Tensor
    second: Tensor
    tie: Tensor


def log_outcomes(gap: Tensor, theta: float) -> LogOutcomes:
    """The three outcomes at `gap`, the first score minus the second, of any shape, in its dtype; `theta` is at least 1.

    At theta 1 `tie` is minus infinity everywhere.
    """
    k = math.log(theta)
    first, second = logsigmoid(gap - k), logsigmoid(-gap - k)
    # log((theta - 1)(theta + 1)): theta^2 - 1 would lose digits near 1.
    log_odds = math.log(theta - 1.0) + math.log(theta + 1.0) if theta > 1.0 else -math.inf
    return LogOutcomes(first, second, log_odds + first + second)


def outcome_nll(gap: Tensor, sign: Tensor, theta: float) -> Tensor:
    """Minus the log of the probability of what was judged, in nats, of the shape of `gap`; finite for theta above 1.

    Args:
        gap: the first score minus the second.
        sign: of the shape of `gap`: positive where the first was judged better, negative where the second, 0 for a tie.
        theta: at least 1; at 1 a tie is impossible, and its nll infinite.
    """
    k = math.log(theta)
    decided = -logsigmoid(gap * sign.sign() - k)
    if theta == 1.0:
        return decided.masked_fill(sign == 0, math.inf)
    tied = -log_outcomes(gap, theta).tie
    return tied.where(sign == 0, decided)
