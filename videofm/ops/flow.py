"""The sigma convention of the project, in the only place where it is written as code.

`sigma` in [0, 1]: 1 is noise, 0 is data. `noisy = (1 - sigma) * clean + sigma * noise`, `velocity = noise - clean`
(rectified flow, Liu et al. 2022, in the time direction of LTX-Video, arXiv 2501.00103).
"""

from __future__ import annotations

from torch import Tensor

from videofm.errors import DataError


def broadcast_sigma(sigma: Tensor, like: Tensor) -> Tensor:
    """`sigma` with trailing dims of one, so that it multiplies `like`.

    Args:
        sigma: `(B,)` for a level a sample, or `(B, L)` for a level a token when `like` is `(B, L, D)`.
        like: the tensor it will meet.

    Raises:
        DataError: the dims of `sigma` are not the leading dims of `like`.
    """
    lead = like.shape[: sigma.ndim]
    if sigma.ndim > like.ndim or any(s not in (1, n) for s, n in zip(sigma.shape, lead, strict=True)):
        raise DataError(
            f"sigma has shape {tuple(sigma.shape)}, which does not lead {tuple(like.shape)}: give one noise level "
            "a sample (B,) or one a token (B, L)."
        )
    return sigma.reshape(*sigma.shape, *[1] * (like.ndim - sigma.ndim))  # (B, ...) -> (B, ..., 1, 1)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`(1 - sigma) * clean + sigma * noise`; shapes of `clean`; `sigma` as in `broadcast_sigma`."""
    sigma = broadcast_sigma(sigma, clean)
    return (1.0 - sigma) * clean + sigma * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """The target of flow matching, `d noisy / d sigma = noise - clean`."""
    return noise - clean


def clean_from_velocity(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean tensor that `noisy` and an exact `velocity` imply: `noisy - sigma * velocity`."""
    return noisy - broadcast_sigma(sigma, noisy) * velocity


def noise_from_velocity(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The noise that `noisy` and an exact `velocity` imply: `noisy + (1 - sigma) * velocity`."""
    return noisy + (1.0 - broadcast_sigma(sigma, noisy)) * velocity
