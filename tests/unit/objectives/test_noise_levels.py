"""Noise levels against the percentiles of spec C.4, against closed forms of their densities, against the laws they claim."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from videofm.config.flow_matching import NoiseLevels, ResolutionShiftNoiseLevels, ShiftedLogitNormalNoiseLevels
from videofm.objectives.noise_levels import ClipShape, NoiseLevelLaw, location, resolution_factor, shift
from videofm.types import Compression

GRID = (torch.arange(20_000) + 0.5) / 20_000
"""Evenly spread probabilities: what endless draws look like."""


def law(**section: Any) -> NoiseLevelLaw:
    return NoiseLevelLaw(TypeAdapter(NoiseLevels).validate_python(section))


def clip(num_tokens: int, num_frames: int = 1, height: int = 512, width: int = 512) -> ClipShape:
    return ClipShape(num_tokens, num_frames, height, width)


LTX = ShiftedLogitNormalNoiseLevels(kind="shifted_logit_normal")
SHIFTED = law(kind="shifted_logit_normal")
FLOOR = law(kind="shifted_logit_normal", tails="floor")
STRETCH = law(kind="shifted_logit_normal", tails="stretch")
ALL = [
    law(kind="uniform"),
    law(kind="logit_normal", mean=-0.5, std=1.7),
    SHIFTED,
    FLOOR,
    STRETCH,
    law(kind="mode"),
    law(kind="mode", scale=-1.0),
    law(kind="mode", scale=2 / (math.pi - 2)),
    law(kind="u_shaped"),
    law(kind="constant_shift", shift=13.0),
    law(kind="resolution_shift"),
    law(kind="resolution_shift", base={"kind": "shifted_logit_normal", "tails": "floor"}, scale=0.5),
]


def distance(law: NoiseLevelLaw, shape: ClipShape, distribution: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov and Smirnov's: the largest difference between the share of draws below a level and `distribution` of it."""
    sigma = law.quantile(GRID, shape).double()
    return (distribution(sigma) - GRID).abs().max().item()


def integral(density: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The distribution function of an unscaled density on [0, 1], by the trapezium rule on a grid that is fine at both ends."""
    grid = torch.special.expit(torch.linspace(-30, 30, 400_001, dtype=torch.float64))
    mass = torch.cumulative_trapezoid(density(grid), grid)
    mass = torch.cat([torch.zeros(1, dtype=mass.dtype), mass]) / mass[-1]

    def at(sigma: Tensor) -> Tensor:
        right = torch.searchsorted(grid, sigma).clamp(1, len(grid) - 1)
        share = (sigma - grid[right - 1]) / (grid[right] - grid[right - 1])
        return torch.lerp(mass[right - 1], mass[right], share)

    return at


def logit_normal(mean: float, std: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Its density."""

    def density(sigma: Tensor) -> Tensor:
        z = (torch.logit(sigma) - mean) / std
        return (-z.square() / 2).exp() / (std * math.sqrt(2 * math.pi) * sigma * (1 - sigma))

    return density


# -- what holds for every law


@pytest.mark.parametrize("law", ALL, ids=lambda law: str(law.config))
def test_draws_are_an_increasing_function_of_the_uniform(law: NoiseLevelLaw) -> None:
    """0 and the largest float32 below 1 are what a generator can return at the ends."""
    ends = torch.tensor([0.0, 1 - 2**-24])
    for shape in (clip(48, 2, 64, 64), clip(6144, 16, 512, 768)):
        sigma = law.quantile(torch.cat([ends[:1], GRID, ends[1:]]), shape)
        assert sigma.dtype == torch.float32
        assert (sigma.diff() >= 0).all()
        assert sigma[0] in (0, torch.tensor(1e-3))  # the newer trainers draw nothing below 1e-3
        assert 0.9 < sigma[-1] <= 1
        assert torch.equal(sigma[1:-1].view(4, -1), law.quantile(GRID.view(4, -1), shape))


def test_the_size_of_a_clip_follows_from_its_latents() -> None:
    assert ClipShape.of(torch.zeros(1, 4, 3, 5, 7), Compression(8, 32, 16)) == ClipShape(105, 3, 160, 112)


# -- logit-normal, shifted by the token count


@pytest.mark.parametrize(
    ("num_tokens", "low", "median", "high"),
    [(1024, 0.164, 0.721, 0.983), (4096, 0.372, 0.886, 0.994), (6144, 0.552, 0.942, 0.997)],
)
def test_shifted_quantiles_are_those_of_the_spec(num_tokens: int, low: float, median: float, high: float) -> None:
    """Spec C.4 lists the 0.5, 50 and 99.9 percentiles for three token counts."""
    found = SHIFTED.quantile(torch.tensor([0.005, 0.5, 0.999]), clip(num_tokens))
    torch.testing.assert_close(found, torch.tensor([low, median, high]), rtol=0.01, atol=0)


@pytest.mark.parametrize(("num_tokens", "expected"), [(1024, 0.95), (4096, 2.05), (6144, 2.7833), (48, 0.6005)])
def test_shift_is_linear_in_tokens(num_tokens: int, expected: float) -> None:
    """0.95 + (L - 1024) * 1.1 / 3072: for 6144 that is 0.95 + 1.8333, for 48 it is 0.95 - 0.3495."""
    assert location(LTX, num_tokens) == pytest.approx(expected, abs=1e-4)


def test_logits_of_draws_are_normal() -> None:
    logits = torch.logit(law(kind="logit_normal", mean=-0.5, std=1.7).quantile(GRID, clip(7)).double())
    assert logits.mean().item() == pytest.approx(-0.5, abs=1e-3)
    assert logits.std().item() == pytest.approx(1.7, rel=1e-2)


def test_uniform_is_the_draw_itself() -> None:
    assert torch.equal(law(kind="uniform").quantile(GRID, clip(5)), GRID)


@pytest.mark.parametrize("num_tokens", [1024, 4096, 6144])
def test_floor_keeps_the_density_of_the_percentiles_beyond_them(num_tokens: int) -> None:
    """The law is the density f(clamp(sigma, q0.005, q0.999)) scaled to mass 1; the plain law is another one."""
    mean = location(LTX, num_tokens)
    low, high = torch.special.expit(mean + torch.tensor([-2.575829, 3.090232], dtype=torch.float64)).tolist()
    expected = integral(lambda sigma: logit_normal(mean)(sigma.clamp(low, high)))
    assert distance(FLOOR, clip(num_tokens), expected) < 1e-4
    assert distance(SHIFTED, clip(num_tokens), expected) > 3e-3


def test_floor_has_a_density_at_both_ends() -> None:
    """Density is d probability / d sigma. For 1024 tokens it is f(q) / Z: at the low percentile f = phi(2.5758) / (.164 * .836)
    = .0145 / .1373 = .1053, at the high one .00337 / (.9827 * .0173) = .198; Z = .994 + .1053 * .1643 + .198 * .0173 = 1.015.
    The plain law has none: where floor has put one draw in 10,000, the plain law has hardly begun."""
    p = torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64)
    for floor, plain, expected in zip(
        FLOOR.quantile(p, clip(1024)), SHIFTED.quantile(p, clip(1024)), (0.1037, 0.195), strict=True
    ):
        from_end, plain_from_end = (min(sigma, 1 - sigma) for sigma in (floor.item(), plain.item()))
        assert 1e-4 / from_end == pytest.approx(expected, rel=0.02)
        assert plain_from_end > 10 * from_end


def test_floor_is_continuous_and_reaches_both_ends() -> None:
    assert FLOOR.quantile(torch.tensor([0.0, 1.0]), clip(4096)).tolist() == [0, 1]
    steps = FLOOR.quantile(GRID, clip(4096)).diff()
    assert steps.max() < 0.01


@pytest.mark.parametrize("num_tokens", [48, 1024, 6144])
def test_stretch_is_the_trainers_procedure(num_tokens: int) -> None:
    """Stretch a logit-normal draw so that its percentiles become 0 and 1, reflect it at 1e-3, cut it at 1; one in ten is
    uniform in [1e-3, 1]. Done to 200,000 evenly spread draws, which tell a share to 1 / 200,000."""
    mean = location(LTX, num_tokens)
    low, high = (1 / (1 + math.exp(-mean - NormalDist().inv_cdf(p))) for p in (0.005, 0.999))
    even = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    draws = (torch.sigmoid(mean + torch.special.ndtri(even)) - low) / (high - low)
    draws = torch.where(draws < 1e-3, 2e-3 - draws, draws).clamp(max=1).sort().values
    sigma = STRETCH.quantile(GRID, clip(num_tokens)).double()
    below_one = sigma < 1  # there the law has a step: 0.1% of nine draws in ten
    shares = 0.9 * torch.searchsorted(draws, sigma, right=True) / len(draws) + 0.1 * (sigma - 1e-3) / (1 - 1e-3)
    assert (shares - GRID)[below_one].abs().max().item() < 2e-5
    assert (~below_one).double().mean().item() == pytest.approx(0.0009, abs=1e-4)


# -- mode, U shape


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.29, 1.75])
def test_mode_is_the_formula_of_the_paper(scale: float) -> None:
    """Esser et al. 2024, equation 20: 1 - u - s (cos^2(pi u / 2) - 1 + u) of a uniform u, which falls; so at u = 1 - p."""
    u = 1 - GRID.double()
    expected = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(law(kind="mode", scale=scale).quantile(GRID, clip(1)).double(), expected, rtol=0, atol=1e-6)


def test_mode_prefers_the_middle_above_zero_and_the_ends_below() -> None:
    """Its density at sigma = f(u) is 1 / |f'(u)| = 1 / |1 + s - s pi / 2 sin(pi u)|: for s = 1.29 0.437 at the ends and
    1 / |2.29 - 2.026| = 3.79 in the middle, for s = -1 1 / (pi / 2) = 0.637 in the middle."""
    ends, middle = torch.tensor([0.0, 1e-3]), torch.tensor([0.4995, 0.5005])
    density: dict[float, list[float]] = {scale: [] for scale in (1.29, -0.9)}
    for scale, found in density.items():
        for p in (ends, middle):
            sigma = law(kind="mode", scale=scale).quantile(p.double(), clip(1))
            found.append(1e-3 / (sigma[1] - sigma[0]).item())
    assert density[1.29] == pytest.approx([1 / 2.29, 1 / (2.29 - 1.29 * math.pi / 2)], rel=0.01)
    assert density[-0.9] == pytest.approx([1 / 0.1, 1 / (0.1 + 0.9 * math.pi / 2)], rel=0.05)


def test_u_shape_is_symmetric_with_its_minimum_in_the_middle() -> None:
    """Density in proportion to exp(5 u) + exp(5 (1 - u)); as printed in the paper, exp(5 u) + exp(-5 u), it only rises."""
    u_shaped = law(kind="u_shaped", steepness=5.0)
    assert distance(u_shaped, clip(1), integral(lambda u: (5 * u).exp() + (5 * (1 - u)).exp())) < 1e-5
    assert distance(u_shaped, clip(1), integral(lambda u: (5 * u).exp() + (-5 * u).exp())) > 0.3
    sigma = u_shaped.quantile(GRID, clip(1)).double()
    torch.testing.assert_close(sigma, 1 - sigma.flip(0), rtol=0, atol=1e-6)
    assert abs(sigma.diff().argmax().item() - 9_999) < 400  # the largest step is where the density is least; it is flat there
    assert sigma.diff().max().item() > 5 * sigma.diff()[[0, -1]].max().item()


# -- shifts


def test_shift_composes_and_keeps_the_ends() -> None:
    """sigma / (1 - sigma) is multiplied by the factor, and factors multiply."""
    sigma = GRID.double()
    torch.testing.assert_close(shift(shift(sigma, 3.0), 4.0), shift(sigma, 12.0))
    torch.testing.assert_close(shift(sigma, 1.0), sigma, rtol=0, atol=0)
    torch.testing.assert_close(shift(shift(sigma, 5.0), 0.2), sigma)
    assert shift(torch.tensor([0.0, 1.0]), 13.0).tolist() == [0, 1]
    assert (shift(sigma, 13.0).diff() > 0).all()


def test_constant_shift_moves_a_law() -> None:
    """A logit-normal law shifted by s has its mean moved by ln s; a uniform one shifted by 13 has its median at 13 / 14."""
    moved = law(kind="constant_shift", shift=13.0, base={"kind": "logit_normal", "mean": -1.0, "std": 0.8})
    expected = law(kind="logit_normal", mean=-1.0 + math.log(13.0), std=0.8)
    torch.testing.assert_close(moved.quantile(GRID, clip(1)), expected.quantile(GRID, clip(1)))
    median = law(kind="constant_shift", shift=13.0).quantile(torch.tensor([0.5]), clip(1))
    assert median.item() == pytest.approx(13 / 14)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (clip(1, 1, 512, 512), 1.0),
        (clip(1, 1, 256, 256), 0.5),
        (clip(1, 4, 512, 512), 2.0),
        (clip(1, 15, 720, 1280), math.sqrt(720 * 1280) / 512 * math.sqrt(15)),
    ],
)
def test_resolution_shift_is_the_rule_of_open_sora(shape: ClipShape, expected: float) -> None:
    """sqrt(height * width / 512^2) * sqrt(latent frames): half for a quarter of the pixels, twice for four frames."""
    section = ResolutionShiftNoiseLevels(kind="resolution_shift")
    assert resolution_factor(section, shape) == pytest.approx(expected)
    assert resolution_factor(section.model_copy(update={"scale": 3.0}), shape) == pytest.approx(3 * expected)
    found = NoiseLevelLaw(section).quantile(GRID, shape)
    torch.testing.assert_close(found, law(kind="logit_normal", mean=math.log(expected)).quantile(GRID, shape))


def test_resolution_shift_takes_other_bases() -> None:
    section = ResolutionShiftNoiseLevels(kind="resolution_shift", base_pixels=64 * 64, base_frames=4)
    assert resolution_factor(section, clip(1, 16, 128, 128)) == pytest.approx(2 * 2)


# -- sections that make no sense


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "mode", "scale": 1.8}, r"scale\n +Input should be less than or equal to 1\.75"),
        ({"kind": "constant_shift", "shift": 0.0}, "shift\n +Input should be greater than 0"),
        ({"kind": "u_shaped", "steepness": 0.0}, "steepness\n +Input should be greater than 0"),
        ({"kind": "shifted_logit_normal", "max_tokens": 1024}, "base_tokens and max_tokens are both 1024; two different"),
        ({"kind": "constant_shift", "shift": 2.0, "base": {"kind": "constant_shift", "shift": 2.0}}, "does not match any of"),
    ],
)
def test_impossible_laws_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        law(**section)
