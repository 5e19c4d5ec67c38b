"""What is given clean: which cells each mode gives, how often, keyed by sample; and what cannot be given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from pydantic import ValidationError
from torch import Tensor

from videofm.config.flow_matching import ConditioningConfig
from videofm.objectives.conditioning import MODES, Given, draw_given
from videofm.parallel.rng import KeyedRng

SHAPE = (5, 4, 6)


def config(**fields: Any) -> ConditioningConfig:
    return ConditioningConfig.model_validate(fields)


MIXED = config(
    first_frame=0.2,
    first_and_last=0.15,
    continuation={"probability": 0.25, "num_frames": [2, 4]},
    inpainting={"probability": 0.3},
)


def draw(section: ConditioningConfig, num_samples: int = 64, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Given:
    given = draw_given(section, shape, KeyedRng(seed, 3, [f"clip{index}" for index in range(num_samples)]))
    assert given is not None
    return given


def cells(given: Given, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return rearrange(given.mask, "b (t h w) -> b t h w", t=shape[0], h=shape[1], w=shape[2])


def given_frames(section: ConditioningConfig) -> set[tuple[int, ...]]:
    """Which frames are given whole, over many samples; no frame is given in part."""
    found = cells(draw(section)).flatten(2)
    assert torch.equal(found.all(dim=2), found.any(dim=2))
    return {tuple(row.nonzero().flatten().tolist()) for row in found.all(dim=2)}


def test_modes_give_their_frames() -> None:
    assert given_frames(config(first_frame=1.0)) == {(0,)}
    assert given_frames(config(first_and_last=1.0)) == {(0, 4)}
    several = config(continuation={"probability": 1.0, "num_frames": [1, 3, 5, 9]})
    assert given_frames(several) == {(0,), (0, 1, 2)}  # 5 would be the whole clip


def test_inpainting_gives_all_but_a_box() -> None:
    """Of 5 x 4 x 6 cells a box of 40% to 100% of each axis covers 2 to 5 frames, 2 to 4 rows and 2 to 6 columns."""
    section = config(inpainting={"probability": 1.0, "min_size": 0.4, "max_size": 1.0})
    asked = ~cells(draw(section, 400))
    sizes, starts = [], []
    for sample in asked:
        corners = sample.nonzero()
        low, high = corners.min(dim=0).values, corners.max(dim=0).values
        assert len(corners) == (high - low + 1).prod()  # a box, and a full one
        sizes.append(high - low + 1)
        starts.append(low)
    found = torch.stack(sizes)
    assert found.min(dim=0).values.tolist() == [2, 2, 2]
    assert found.max(dim=0).values.tolist() == [5, 4, 6]
    assert torch.stack(starts).max(dim=0).values.tolist() == [3, 2, 4]


def test_a_box_has_at_least_one_cell() -> None:
    section = config(inpainting={"probability": 1.0, "min_size": 0.01, "max_size": 0.02})
    assert (~draw(section).mask).sum(dim=1).tolist() == [1] * 64


def test_modes_come_in_their_shares() -> None:
    """Of 4,000 samples a share p misses its expectation by more than 4 * sqrt(p (1 - p) / 4000) < 0.03 once in 10,000 times."""
    mode = draw(MIXED, 4000).mode
    shares = [(mode == index).double().mean().item() for index in range(len(MODES) + 1)]
    assert shares == pytest.approx([0.2, 0.15, 0.25, 0.3, 0.1], abs=0.03)
    text_only = draw(MIXED, 4000).mask[mode == len(MODES)]
    assert len(text_only) > 0
    assert not text_only.any()


def test_every_sample_keeps_a_token_to_learn_from() -> None:
    for shape in ((1, 1, 1), (2, 1, 1), (3, 2, 2), SHAPE):
        assert (~draw(MIXED, 200, shape).mask).any(dim=1).all()


def test_draws_are_keyed_by_sample() -> None:
    whole = draw(MIXED, 8)
    alone = draw_given(MIXED, SHAPE, KeyedRng(0, 3, ["clip5"]))
    assert alone is not None
    assert torch.equal(alone.mask[0], whole.mask[5])
    assert not torch.equal(draw(MIXED, 8, seed=1).mask, whole.mask)


def test_what_a_clip_is_too_short_for_falls_back_to_text() -> None:
    """Two frames have no middle and no continuation of 2: those samples see text only. The rest is as in longer clips."""
    long, short = draw(MIXED, 400), draw(MIXED, 400, (2, 4, 6))
    lost = torch.isin(long.mode, torch.tensor([MODES.index("first_and_last"), MODES.index("continuation")]))
    assert (short.mode[lost] == len(MODES)).all()
    assert not short.mask[lost].any()
    assert torch.equal(short.mode[~lost], long.mode[~lost])


def test_images_are_given_nothing_but_what_surrounds_a_box() -> None:
    assert draw_given(config(first_frame=0.5, first_and_last=0.5), (1, 4, 4), KeyedRng(0, 0, ["a"])) is None
    assert draw_given(config(), SHAPE, KeyedRng(0, 0, ["a"])) is None
    assert draw(config(inpainting={"probability": 1.0}), shape=(1, 4, 4)).mask.any()


def test_given_tokens_have_a_level_of_their_own() -> None:
    clean, noisy = draw(config(first_frame=0.5)), draw(config(first_frame=0.5, condition_sigma=0.1), 1000)
    assert clean.sigma.tolist() == [0.0] * 64
    assert 0.09 < noisy.sigma.max() <= 0.1
    assert noisy.sigma.mean().item() == pytest.approx(0.05, abs=0.01)
    per_sample = torch.linspace(0.3, 0.9, 64)
    per_token = torch.rand(64, 120, generator=torch.Generator().manual_seed(0))
    for sigma, expected in ((per_sample, per_sample[:, None].expand(64, 120)), (per_token, per_token)):
        levels = clean.levels(sigma)
        assert (levels[clean.mask] == 0).all()
        assert torch.equal(levels[~clean.mask], expected[~clean.mask])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"first_frame": 0.6, "inpainting": {"probability": 0.5}}, "probabilities of the modes add up to 1.1; they are shares"),
        ({"inpainting": {"min_size": 0.5, "max_size": 0.4}}, "min_size 0.5 is above max_size 0.4: no box"),
        ({"continuation": {"num_frames": []}}, r"num_frames\n +List should have at least 1 item"),
        ({"continuation": {"num_frames": [0]}}, r"num_frames.0\n +Input should be greater than or equal to 1"),
    ],
)
def test_impossible_sections_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**section)
