"""Guidance: each piece against its formula with a toy model, and skip guidance against what the blocks compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.sampling import tiny
from videofm.config.sample import GuidanceConfig, PerturbationConfig
from videofm.errors import ConfigError
from videofm.sampling import Guidance, Perturbation
from videofm.sampling.guidance import cfg, guided_velocity, joined, linear_decay, rescaled, star
from videofm.sampling.perturbation import perturbed
from videofm.types import Conditioning


class FromText(nn.Module):
    """The velocity is the embedding; counts the samples of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, tokens: Tensor, sigma: Tensor, conditioning: Conditioning, coordinates: Tensor) -> Tensor:
        assert len(tokens) == len(sigma) == len(conditioning.mask) == len(coordinates)
        self.rows.append(len(tokens))
        return conditioning.embeddings.expand_as(tokens)


def text(value: float) -> Conditioning:
    return Conditioning(torch.full((2, 1, 1), value), torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize(("scale", "expected", "rows"), [(1.0, 5.0, 2), (3.0, 11.0, 4), (0.0, 2.0, 4)])
def test_guidance_goes_on_from_the_empty_prompt(scale: float, expected: float, rows: int) -> None:
    """2 + scale * (5 - 2); without guidance the empty prompt is not evaluated."""
    dit = FromText()
    velocity = guided_velocity(dit, text(5.0), text(2.0), torch.zeros(2, 3, 4), Guidance(scale))
    assert velocity(torch.zeros(2, 4, 3), torch.ones(2)).unique().tolist() == [expected]
    assert dit.rows == [rows]


def test_rescale_mixes_in_the_deviation_of_the_prompts_velocity() -> None:
    """phi 1 gives the standard deviation of `positive`, phi 0 changes nothing, between them it is linear."""
    torch.manual_seed(0)
    guided, positive = torch.randn(2, 5, 3) * 4 + 1, torch.randn(2, 5, 3)
    whole = rescaled(guided, positive, 1.0)
    torch.testing.assert_close(whole.flatten(1).std(dim=1), positive.flatten(1).std(dim=1))
    torch.testing.assert_close(rescaled(guided, positive, 0.0), guided)
    torch.testing.assert_close(rescaled(guided, positive, 0.3), 0.3 * whole + 0.7 * guided)


def test_star_projects_and_leaves_a_remainder_at_right_angles() -> None:
    torch.manual_seed(0)
    negative, positive = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    projected = star(negative, positive)
    torch.testing.assert_close(((positive - projected) * negative).sum(dim=(1, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(star(negative, 2.5 * negative), 2.5 * negative)
    found = Guidance(4.0, star=True).combine(positive, negative, None)
    torch.testing.assert_close(found, projected + 4 * (positive - projected))


def test_all_pieces_meet_in_the_order_of_ltx_video() -> None:
    """CFG, then skip guidance, then one rescale over the sum of both (spec C.5)."""
    torch.manual_seed(0)
    positive, negative, disturbed = torch.randn(3, 2, 5, 3)
    guidance = Guidance(3.0, rescale=0.7, perturbation=Perturbation((0,), scale=1.5))
    expected = negative + 3 * (positive - negative) + 1.5 * (positive - disturbed)
    torch.testing.assert_close(guidance.combine(positive, negative, disturbed), rescaled(expected, positive, 0.7))


def test_step_videos_decay() -> None:
    """Spec A10: cfg_max at t = 0, 1 from t = 1/9 on; halfway, at t = 1/18, the middle of 5 and 1."""
    assert linear_decay(5.0, 1.0) == 5.0
    assert linear_decay(5.0, 1 - 1 / 18) == pytest.approx(3.0)
    assert linear_decay(5.0, 8 / 9) == pytest.approx(1.0)
    assert linear_decay(5.0, 0.3) == 1.0


def test_outside_of_the_interval_a_step_is_one_plain_evaluation() -> None:
    """Also where some tokens are given: the level of the step is the highest one."""
    dit = FromText()
    guidance = Guidance(3.0, interval=(0.25, 0.75), perturbation=None)
    velocity = guided_velocity(dit, text(5.0), text(2.0), torch.zeros(2, 3, 4), guidance)
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.2])
    found = [velocity(torch.zeros(2, 4, 3), torch.tensor([[0.0, 0.1, level, level]] * 2)).unique().item() for level in levels]
    assert found == [5.0, 11.0, 11.0, 11.0, 5.0]
    assert dit.rows == [2, 4, 4, 4, 2]


def test_decay_stops_paying_for_the_negative_prompt() -> None:
    dit = FromText()
    velocity = guided_velocity(dit, text(5.0), text(2.0), torch.zeros(2, 3, 4), Guidance(3.0, decay=True))
    found = [velocity(torch.zeros(2, 4, 3), torch.full((2,), level)).unique().item() for level in (1.0, 0.5)]
    assert found == [11.0, 5.0]
    assert dit.rows == [4, 2]


def test_joined_pads_shorter_texts_and_keeps_clip_states() -> None:
    long = Conditioning(torch.ones(1, 3, 2), torch.ones(1, 3, dtype=torch.bool), torch.full((1, 2, 5), 7.0))
    short = Conditioning(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool), torch.full((1, 2, 5), 8.0))
    both = joined([short, long])
    assert both.mask.tolist() == [[True, False, False], [True, True, True]]
    assert both.embeddings[0].sum() == 2
    assert both.clip_embeddings is not None
    assert both.clip_embeddings[:, 0, 0].tolist() == [8.0, 7.0]


def test_config_says_all_of_it() -> None:
    perturbation = PerturbationConfig(blocks=[1, 2], scale=0.5, mode="attention_skip")
    section = GuidanceConfig(rescale=0.7, interval=[0.1, 0.9], star=True, decay=True, perturbation=perturbation)
    expected = Guidance(4.0, 0.7, (0.1, 0.9), True, True, Perturbation((1, 2), 0.5, "attention_skip"))
    assert Guidance.from_config(4.0, section) == expected
    assert Guidance.from_config(3.0, GuidanceConfig()) == Guidance()
    with pytest.raises(ValueError, match=r"0 <= low < high <= 1, not \[0.9, 0.1\]"):
        GuidanceConfig(interval=[0.9, 0.1])


# -- skip guidance


@pytest.fixture(scope="module")
def dit() -> Any:
    return tiny.pipeline().dit.eval()


def inputs(num_rows: int) -> tuple[Tensor, Tensor, Conditioning, Tensor]:
    torch.manual_seed(1)
    embeddings, mask = torch.randn(1, 3, 64).expand(num_rows, -1, -1), torch.ones(num_rows, 3, dtype=torch.bool)
    tokens, sigma = torch.randn(1, 6, 16).expand(num_rows, -1, -1), torch.full((num_rows,), 0.5)
    return tokens, sigma, Conditioning(embeddings, mask), torch.rand(1, 3, 6).expand(num_rows, -1, -1)


MODES = ("attention_values", "attention_skip", "transformer_block")


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_only_the_last_samples_are_disturbed_and_only_inside(dit: Any, mode: str) -> None:
    plain = dit(*inputs(3))
    with perturbed(dit, Perturbation((1,), mode=mode), first_row=2):
        found = dit(*inputs(3))
    torch.testing.assert_close(found[:2], plain[:2], atol=1e-6, rtol=0)
    assert (found[2] - plain[2]).abs().max() > 1e-3
    assert dit(*inputs(3)).equal(plain)


@torch.no_grad()
def test_what_stands_in_for_attention(dit: Any) -> None:
    """One token attends to itself alone: attention is its values, so `attention_values` changes nothing there, and
    `attention_skip` does. With more tokens, the out-projection gets the values, or the input."""
    attention = dit.blocks[0].self_attention
    torch.manual_seed(0)
    x = torch.randn(2, 5, attention.out.in_features)
    for mode, expected in (("attention_values", attention.v(x)), ("attention_skip", x)):
        with perturbed(dit, Perturbation((0,), mode=mode), first_row=1):
            found = attention(x, x)
        torch.testing.assert_close(found[1], attention.out(expected)[1], atol=1e-6, rtol=0)
        torch.testing.assert_close(found[0], attention(x, x)[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_skipping_every_block_leaves_what_goes_in(dit: Any) -> None:
    seen: list[Tensor] = []
    tokens, *rest = inputs(2)
    with perturbed(dit, Perturbation((0, 1), mode="transformer_block"), first_row=1):
        # Hooks run in the order of registration: the one that records comes last.
        with dit.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out)):
            dit(tokens, *rest)
    torch.testing.assert_close(seen[-1][1], dit.proj_in(tokens)[1])


@torch.no_grad()
def test_skip_guidance_is_a_third_entry_of_the_batch(dit: Any) -> None:
    tokens, sigma, positive, coordinates = inputs(2)
    negative = Conditioning(positive.embeddings * 0.5, positive.mask)
    perturbation = Perturbation((0,), scale=2.0)
    velocity = guided_velocity(dit, positive, negative, coordinates, Guidance(3.0, perturbation=perturbation))
    with perturbed(dit, perturbation, first_row=0):
        disturbed = dit(tokens, sigma, positive, coordinates)
    with_text = dit(tokens, sigma, positive, coordinates)
    expected = cfg(dit(tokens, sigma, negative, coordinates), with_text, 3.0) + 2 * (with_text - disturbed)
    torch.testing.assert_close(velocity(tokens, sigma), expected, atol=1e-4, rtol=0)


def test_unknown_blocks_and_modes_are_refused_and_leave_the_model_alone(dit: Any) -> None:
    attend = dit.blocks[0].self_attention.attend
    with pytest.raises(ConfigError, match=r"cannot disturb the blocks \[0, 19\]: this model has 2, numbered from 0"):
        with perturbed(dit, Perturbation((0, 19)), 1):
            pass
    with pytest.raises(ConfigError, match="no perturbation is called 'residual'. There are: attention_values"):
        with perturbed(dit, Perturbation((0,), mode="residual"), 1):
            pass
    with pytest.raises(RuntimeError), perturbed(dit, Perturbation((0,)), 1):
        raise RuntimeError
    assert dit.blocks[0].self_attention.attend is attend


def test_a_rank_with_some_of_the_heads_cannot_skip_attention() -> None:
    """What a tensor rank has: an input of 8 channels, and one of two heads of width 4."""

    class HalfOfTheHeads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            heads = x[..., None, :4]
            return self.attend(heads, heads, heads)

    block = nn.Module()
    block.self_attention = HalfOfTheHeads()
    block.self_attention.attend = lambda q, k, v, mask=None: v
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    with perturbed(model, Perturbation((0,), mode="attention_skip"), first_row=1):
        with pytest.raises(ConfigError, match=r"width 8 in place of 1 heads of width 4: tensor ranks hold some of the heads"):
            block.self_attention(torch.zeros(2, 3, 8))
