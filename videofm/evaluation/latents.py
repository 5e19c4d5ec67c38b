"""What the latents of a VAE are like: collapsed channels, saturated variances, statistics over channels and over time.

The measures and thresholds are those of spec tokenizers-quantization 2e. Everything is a sum over positions in float64, so a
pass over any number of clips takes the memory of one, and passes of several processes add up (`merge`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from videofm.errors import DataError
from videofm.types import Posterior

ACTIVE_VARIANCE = 0.01
"""Variance of the posterior mean over the data from which a channel is in use (Burda et al. 2016, section 5)."""
COLLAPSED_KL = 0.01
"""Nats a position under which a channel carries nothing."""
LOGVAR_RANGE = (-30.0, 20.0)
"""Where our VAEs clamp their log-variance."""
MIN_ACTIVE_SHARE, MAX_CLAMPED_SHARE, MIN_RANK_SHARE, MAX_FIRST_FRAME_DEVIATION = 0.5, 0.01, 0.25, 0.2


class LatentDiagnostics:
    """A pass over posteriors: `update` with each batch, `merge` what other processes saw, then `result`.

    A sample is one position (clip, latent frame, row, column); one that has a value that is not finite is counted and left out
    of everything else. Power sums are about zero: kurtosis is exact to 1e-6 while a channel's mean is below 300 of its std.

    Args:
        logvar_range: the bounds at which the log-variance is clamped.
    """

    def __init__(self, logvar_range: tuple[float, float] = LOGVAR_RANGE) -> None:
        self.logvar_range = logvar_range
        self.sums: dict[str, Tensor] = {}
        """Name -> sum: scalars, `(C,)`, `(C, C)`, or `(T, C)` for what is told apart by latent frame."""

    @torch.no_grad()
    def update(self, posterior: Posterior) -> None:
        """Add a batch; fields `(B, C, T, H, W)`.

        Raises:
            DataError: another shape, or another number of channels than before.
        """
        mean, logvar = posterior.mean.detach(), posterior.logvar.detach()
        if mean.ndim != 5 or mean.shape != logvar.shape:
            raise DataError(
                f"posterior has mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)}; expected (B, C, T, H, W)."
            )
        known = self.sums.get("mean")
        if known is not None and known.shape[0] != mean.shape[1]:
            raise DataError(
                f"posterior has {mean.shape[1]} channels, those before had {known.shape[0]}: one pass is for one VAE."
            )
        low, high = self.logvar_range
        clamped = (logvar <= low) | (logvar >= high)
        # (B, C, T, H, W) -> (T, B * H * W, C)
        z, s, at_bound = (_positions(x) for x in (mean.double(), logvar.double(), clamped.double()))
        finite = (torch.isfinite(z) & torch.isfinite(s)).all(dim=2, keepdim=True)
        z, s, at_bound = (x.masked_fill(~finite, 0.0) for x in (z, s, at_bound))
        variance = s.exp() * finite
        kl = 0.5 * (z.square() + variance - 1.0 - s) * finite
        flat = z.flatten(0, 1)
        self._add(
            {
                "clips": z.new_tensor(mean.shape[0]),
                "nonfinite": (~finite).sum().double(),
                "clamped": at_bound.sum(),
                "mean": z.sum((0, 1)),
                "third": z.pow(3).sum((0, 1)),
                "fourth": z.pow(4).sum((0, 1)),
                "products": flat.T @ flat,
                "variance": variance.sum((0, 1)),
                "kl": kl.sum((0, 1)),
                "frame_count": finite.double().sum(1),
                "frame_mean": z.sum(1),
                "frame_square": z.square().sum(1),
            }
        )

    def merge(self, other: LatentDiagnostics) -> None:
        """Add what another pass saw."""
        self._add(other.sums)

    def result(self) -> dict[str, Any]:
        """The diagnostics, as JSON holds them: numbers, or lists of one number a channel or a latent frame.

        - `num_clips`, `num_positions`, `num_nonfinite_positions`;
        - `mean`, `std`, `kurtosis` (3 for a Gaussian) of the posterior mean of each channel over all positions;
        - `kl` nats a position of each channel, `kl_total` their sum, `num_collapsed` channels under 0.01 nat;
        - `num_active` channels whose posterior mean has a variance over 0.01, `active_share` of all;
        - `effective_rank` exp(entropy of the normalised eigenvalues) of the covariance of posterior means;
        - `clamped_share` of log-variances at their bounds;
        - `mutual_information_bound` nats a position: `kl_total` minus the divergence to the prior of the Gaussian that has the
          aggregated posterior's mean and covariance. That Gaussian has the greatest entropy, so this is an upper bound of the
          information between a position's latents and its input, exact where the aggregated posterior is Gaussian;
        - `frame_std` of each latent frame (over its positions, relative to the channels' own std, root mean square over active
          channels), `first_frame_std_ratio` of the first frame to all later ones, and `std_drift`, how much the least-squares
          line through the later frames rises from the second frame to the last, relative to its mean.

        A number is None where there is too little to measure it.

        Raises:
            DataError: there was no position with finite values.
        """
        sums = self.sums
        count = float(sums["frame_count"].sum()) if sums else 0.0
        if count == 0:
            raise DataError("there are no finite latents to diagnose: no batch was given, or every position has a NaN.")
        num_channels = sums["mean"].shape[0]
        mean = sums["mean"] / count
        covariance = sums["products"] / count - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp_min(0)
        active, kl = variance > ACTIVE_VARIANCE, sums["kl"] / count
        return {
            "num_clips": int(sums["clips"]),
            "num_positions": int(count),
            "num_nonfinite_positions": int(sums["nonfinite"]),
            "mean": mean.tolist(),
            "std": variance.sqrt().tolist(),
            "kurtosis": [_number(value) for value in self._kurtosis(count, mean, variance)],
            "kl": kl.tolist(),
            "kl_total": float(kl.sum()),
            "num_collapsed": int((kl < COLLAPSED_KL).sum()),
            "num_active": int(active.sum()),
            "active_share": float(active.double().mean()),
            "effective_rank": _effective_rank(covariance),
            "clamped_share": float(sums["clamped"]) / (count * num_channels),
            "mutual_information_bound": float(kl.sum()) - _gaussian_kl(mean, covariance + torch.diag(sums["variance"] / count)),
            **self._over_time(variance, active),
        }

    def _add(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            known = self.sums.get(name)
            self.sums[name] = value.clone() if known is None else _padded_sum(known, value.to(known.device))

    def _kurtosis(self, count: float, mean: Tensor, variance: Tensor) -> Tensor:
        second = self.sums["products"].diagonal() / count
        third, fourth = self.sums["third"] / count, self.sums["fourth"] / count
        central = fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean.pow(4)
        return central / variance.square()

    def _over_time(self, variance: Tensor, active: Tensor) -> dict[str, Any]:
        count, total, square = (self.sums[f"frame_{name}"] for name in ("count", "mean", "square"))
        per_frame = _relative_std(count, total, square, variance, active)
        count, total, square = (x[1:].sum(0, keepdim=True) for x in (count, total, square))
        later = _relative_std(count, total, square, variance, active)
        line = per_frame[1:][torch.isfinite(per_frame[1:])]
        drift = None
        if len(line) >= 2:
            steps = torch.arange(len(line), dtype=line.dtype, device=line.device)
            centred = steps - steps.mean()
            drift = _number((centred @ line) / centred.square().sum() * (len(line) - 1) / line.mean())
        return {
            "frame_std": [_number(value) for value in per_frame],
            "first_frame_std_ratio": _number(per_frame[0] / later),
            "std_drift": drift,
        }


def alarms(result: dict[str, Any]) -> list[str]:
    """What is wrong with the latents of `LatentDiagnostics.result`, a sentence each; empty when nothing is.

    Fewer than half of the channels active, a value that is not finite, over 1 % of log-variances at a bound, an effective rank
    under a quarter of the channels, a first frame whose std is over 20 % off that of later ones (spec 2e).
    """
    num_channels = len(result["mean"])
    found = []
    if result["num_nonfinite_positions"]:
        found.append(f"{result['num_nonfinite_positions']} positions have latents that are NaN or infinite.")
    if result["active_share"] < MIN_ACTIVE_SHARE:
        found.append(
            f"{result['num_active']} of {num_channels} channels are active (under {MIN_ACTIVE_SHARE:.0%}): the posterior "
            "collapses; lower the weight of the KL."
        )
    if result["clamped_share"] > MAX_CLAMPED_SHARE:
        found.append(
            f"{result['clamped_share']:.1%} of log-variances are at their bounds (over {MAX_CLAMPED_SHARE:.0%}): they have no "
            "gradient there."
        )
    if result["effective_rank"] < MIN_RANK_SHARE * num_channels:
        found.append(
            f"the effective rank of the latents is {result['effective_rank']:.1f} of {num_channels} channels (under "
            f"{MIN_RANK_SHARE:.0%}): channels repeat each other."
        )
    ratio = result["first_frame_std_ratio"]
    if ratio is not None and abs(ratio - 1) > MAX_FIRST_FRAME_DEVIATION:
        found.append(
            f"the std of the first latent frame is {ratio:.2f} times that of later ones (over {MAX_FIRST_FRAME_DEVIATION:.0%} "
            "off): one normalisation does not fit both."
        )
    return found


def _positions(x: Tensor) -> Tensor:
    return x.permute(2, 0, 3, 4, 1).flatten(1, 3)  # (B, C, T, H, W) -> (T, B * H * W, C)


def _padded_sum(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two tensors whose first dims may differ: clips of several lengths."""
    if a.ndim and a.shape[0] < b.shape[0]:
        a, b = b, a
    if a.shape == b.shape:
        return a + b
    total = a.clone()
    total[: b.shape[0]] += b
    return total


def _effective_rank(covariance: Tensor) -> float:
    """exp(H(p)), p the eigenvalues over their sum (Roy and Vetterli 2007); 0 where nothing varies."""
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(0)
    if eigenvalues.sum() == 0:
        return 0.0
    shares = eigenvalues / eigenvalues.sum()
    return float(torch.special.entr(shares).sum().exp())


def _gaussian_kl(mean: Tensor, covariance: Tensor) -> float:
    """KL divergence of `N(mean, covariance)` to the unit Gaussian, in nats."""
    return float(0.5 * (covariance.trace() + mean.square().sum() - len(mean) - torch.linalg.slogdet(covariance).logabsdet))


def _relative_std(count: Tensor, total: Tensor, square: Tensor, variance: Tensor, active: Tensor) -> Tensor:
    """Sums, count `(T, 1)`, others `(T, C)` -> `(T,)`: the std of each row, relative to `variance`, over active channels."""
    own = square / count - (total / count).square()
    return (own[:, active] / variance[active]).mean(dim=1).sqrt()


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if number == number and abs(number) != float("inf") else None
