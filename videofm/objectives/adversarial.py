"""Losses of discriminators and of what they judge, as means over each sample's logits, in float32.

Hinge: spec A.5 (CV-VAE, as in VQGAN). Reconstruction GAN: spec B.5 (LTX-Video), where the discriminator sees the original x
and its reconstruction r together, on channels, in both orders: `a = D([x; r])` and `b = D([r; x])`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu, softplus

_MIN_NORM = 1e-4


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """`0.5 * (relu(1 - real) + relu(1 + fake))`, which is 1 at zero logits.

    Args:
        real, fake: logits `(B, 1, T, H, W)` of originals and of reconstructions.

    Returns:
        `(B,)`.
    """
    return 0.5 * (_sample_means(relu(1 - real.float())) + _sample_means(relu(1 + fake.float())))


def hinge_generator(fake: Tensor) -> Tensor:
    """`-fake`, `(B,)`, for the logits `(B, 1, T, H, W)` of reconstructions."""
    return -_sample_means(fake.float())


def reconstruction_gan_discriminator(a: Tensor, b: Tensor) -> Tensor:
    """`softplus(-a) + softplus(b)`: tell which of the two is the original; 2 ln 2 at zero logits.

    Args:
        a, b: logits `(B, 1, T, H, W)` of [original; reconstruction] and of [reconstruction; original].

    Returns:
        `(B,)`.
    """
    return _sample_means(softplus(-a.float())) + _sample_means(softplus(b.float()))


def reconstruction_gan_generator(a: Tensor, b: Tensor) -> Tensor:
    """`softplus(a) + softplus(-b)`: be taken for the original. Arguments as in `reconstruction_gan_discriminator`; the
    caller detaches the original.
    """
    return reconstruction_gan_discriminator(b, a)


def adaptive_weight(reference_norm: Tensor, adversarial_norm: Tensor, limit: float = 1e4) -> Tensor:
    """What makes an adversarial gradient as long as the gradient of the other losses (VQGAN, Esser et al. 2021).

    Args:
        reference_norm, adversarial_norm: norms `()` of the two gradients at the last layer of the decoder.
        limit: upper bound.

    Returns:
        `clamp(reference_norm / (adversarial_norm + 1e-4), 0, limit)`, float32, without a gradient.
    """
    return (reference_norm.detach().float() / (adversarial_norm.detach().float() + _MIN_NORM)).clamp(0.0, limit)


def _sample_means(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)  # (B, ...) -> (B,)
