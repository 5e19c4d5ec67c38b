"""Closed forms and laws of the adversarial losses (spec A.5, B.5)."""

import math

import pytest
import torch

from videofm.objectives.adversarial import (
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    reconstruction_gan_discriminator,
    reconstruction_gan_generator,
)


def logits(*values):
    """`(B, 1, 1, 1, n)` of rows of n values."""
    return torch.tensor(values).view(len(values), 1, 1, 1, -1)


def test_hinge_by_hand():
    """Sample 0: real 0.5 and 3 give relu(1 - r) 0.5 and 0; fake -2 and 0 give relu(1 + f) 0 and 1: (0.25 + 0.5) / 2. Sample 1:
    real -1 twice gives 2; fake 1 twice gives 2: (2 + 2) / 2.
    """
    real, fake = logits((0.5, 3.0), (-1.0, -1.0)), logits((-2.0, 0.0), (1.0, 1.0))
    torch.testing.assert_close(hinge_discriminator(real, fake), torch.tensor([0.375, 2.0]))
    torch.testing.assert_close(hinge_generator(fake), torch.tensor([1.0, -1.0]))


def test_hinge_stops_beyond_the_margin():
    real, fake = logits((1.5, 0.5)).requires_grad_(), logits((-1.5, -0.5)).requires_grad_()
    hinge_discriminator(real, fake).sum().backward()
    assert real.grad.flatten().tolist() == [0.0, -0.25]
    assert fake.grad.flatten().tolist() == [0.0, 0.25]


def test_zero_logits():
    """Hinge is 1; the two cross-entropies of the reconstruction GAN are ln 2 each, for both players."""
    zero = torch.zeros(2, 1, 3, 4, 4)
    assert hinge_discriminator(zero, zero).tolist() == [1.0, 1.0]
    for loss in (reconstruction_gan_discriminator, reconstruction_gan_generator):
        torch.testing.assert_close(loss(zero, zero), torch.full((2,), 2 * math.log(2)))


def test_reconstruction_gan_by_hand():
    """a = ln 3: softplus(-a) = ln(1 + 1/3); b = -ln 2: softplus(b) = ln(1 + 1/2). The generator swaps roles:
    softplus(a) + softplus(-b) = ln 4 + ln 3.
    """
    a, b = logits((math.log(3),)), logits((-math.log(2),))
    torch.testing.assert_close(reconstruction_gan_discriminator(a, b), torch.tensor([math.log(4 / 3) + math.log(3 / 2)]))
    torch.testing.assert_close(reconstruction_gan_generator(a, b), torch.tensor([math.log(4) + math.log(3)]))


def test_swapping_inputs_negates_the_optimal_logit():
    """Let (original, reconstruction) be (u, v) with probability p(u, v) over three values. The expected loss of a table of
    logits D(u, v) is stationary at D = ln p(u, v) - ln p(v, u), which is minus its transpose; and not at zero.
    """
    torch.manual_seed(0)
    p = torch.rand(3, 3, dtype=torch.float64)
    best = p.log() - p.log().T
    torch.testing.assert_close(best.T, -best)

    def gradient(table):
        table = table.clone().requires_grad_()
        pairs = [(u, v) for u in range(3) for v in range(3)]
        a = torch.stack([table[u, v] for u, v in pairs]).view(9, 1, 1, 1, 1)
        b = torch.stack([table[v, u] for u, v in pairs]).view(9, 1, 1, 1, 1)
        (p.flatten() * reconstruction_gan_discriminator(a, b)).sum().backward()
        return table.grad.abs().max().item()

    assert gradient(best) < 1e-6
    assert gradient(torch.zeros_like(best)) > 1e-2


def test_samples_stay_apart_and_sums_are_in_float32():
    a, b = torch.randn(3, 1, 2, 3, 3), torch.randn(3, 1, 2, 3, 3)
    for loss in (hinge_discriminator, reconstruction_gan_discriminator, reconstruction_gan_generator):
        torch.testing.assert_close(loss(a, b)[1:2], loss(a[1:2], b[1:2]))
        assert loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert hinge_generator(a.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("reference", "adversarial", "expected"),
    [(2.0, 0.5, 2.0 / 0.5001), (0.0, 0.0, 0.0), (0.0, 3.0, 0.0), (5.0, 0.0, 1e4)],
)
def test_adaptive_weight(reference, adversarial, expected):
    """reference / (adversarial + 1e-4); 5 / 1e-4 is above the limit of 1e4 (spec F-CV-9 after a factor of 0.5: 0.5e4)."""
    norm = torch.tensor(reference, requires_grad=True)
    weight = adaptive_weight(norm, torch.tensor(adversarial))
    assert weight.item() == pytest.approx(expected)
    assert not weight.requires_grad
    assert adaptive_weight(norm, torch.tensor(adversarial), limit=1.5).item() == pytest.approx(min(expected, 1.5))
