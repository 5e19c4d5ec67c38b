"""The objective of reward models: its loss by hand, what ties and votes on axes weigh, what it refuses, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from videofm import models
from videofm.config.reward import RewardTrainingConfig
from videofm.errors import ConfigError
from videofm.objectives.reward import RewardObjective, accuracy
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch, Compression, Conditioning, Posterior

CHANNELS, WIDTH, SHAPE = 4, 8, (2, 2, 2)
CAPTIONS = ["up", "down", "left", "up"]


class VAE(nn.Module):
    """A VAE whose latents are means of pixels over its cells, normalised by a factor of 2."""

    latent_channels, compression = CHANNELS, Compression(1, 2, 2)
    latent_statistics = type("Statistics", (), {"hash": "abc"})()

    def encode(self, video: Tensor) -> Posterior:
        cells = nn.functional.avg_pool3d(video, (1, 2, 2))
        mean = torch.cat([cells, cells[:, :1]], dim=1)
        return Posterior(mean, torch.full_like(mean, -8.0))

    def normalize(self, latents: Tensor) -> Tensor:
        return latents * 2


class Text(nn.Module):
    """A fixed vector for each caption, by its letters, and one token of padding."""

    spec_name = "text/t5"

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.config = type("Config", (), {"width": width})()
        self.table = nn.Parameter(torch.randn(128, width, generator=torch.Generator().manual_seed(0)))

    def encode(self, captions: list[str]) -> Conditioning:
        rows = torch.tensor([sum(map(ord, caption)) % 128 for caption in captions])
        mask = (torch.arange(2) < 1).expand(len(captions), -1)
        return Conditioning(self.table[rows][:, None].repeat(1, 2, 1), mask, longest=1)

    def cuts(self, captions: list[str]) -> dict[str, list[bool]]:
        return {"text": [len(caption) > 3 for caption in captions]}


def make(
    axes: tuple[str, ...] = ("overall",), greyscale: bool = False, **options: Any
) -> tuple[RewardObjective, dict[str, Any]]:
    torch.manual_seed(0)
    sizes = {"latent_channels": CHANNELS, "num_layers": 2, "width": 32, "num_heads": 2, "caption_channels": WIDTH}
    reward = models.build("reward/video", "tiny", axes=axes, greyscale=greyscale, **sizes)
    objective = RewardObjective(RewardTrainingConfig(kind="reward", **options))
    return objective, {"reward": reward, "vae": VAE(), "text_encoder": Text()}


def batch_of(
    latents: Tensor,
    captions: list[str] = CAPTIONS,
    ties: list[bool] | None = None,
    weights: list[float] | None = None,
    **more: Any,
) -> Batch:
    """Pairs of latents `(2P, ...)`, winners first, that came normalised by a half."""
    num_pairs = len(latents) // 2
    tied = torch.tensor(ties or [False] * num_pairs)
    weight = torch.tensor(weights or [1.0] * num_pairs).where(~tied, 0.0)
    ids = [f"pair-{number}" for number in range(num_pairs)] * 2
    return Batch(
        torch.zeros(2 * num_pairs, 3, 0, 0, 0), captions * 2, torch.ones(2 * num_pairs), ids, 0, num_pairs, latents=latents / 2,
        pair_weights=weight, pair_ties=tied, **more,
    )  # fmt: skip


def random_latents(num_pairs: int = 4, seed: int = 3) -> Tensor:
    return torch.randn(2 * num_pairs, CHANNELS, *SHAPE, generator=torch.Generator().manual_seed(seed))


def run(objective: RewardObjective, built: dict[str, Any], batch: Batch) -> Any:
    return objective.loss(built, batch, KeyedRng(0, batch.step, batch.sample_ids), "train")


def nll_by_hand(a: float, b: float, outcome: str, theta: float) -> float:
    """Minus the log of the probabilities of spec C2, as they stand there."""
    x, y = math.exp(a), math.exp(b)
    tie = (theta**2 - 1) * x * y / ((x + theta * y) * (theta * x + y))
    return -math.log({"winner": x / (x + theta * y), "loser": y / (y + theta * x), "tie": tie}[outcome])


# --- the loss ----------------------------------------------------------------------------------------------------------------


def test_loss_and_metrics_are_those_of_a_loop_over_pairs() -> None:
    """Four pairs: a plain one, one of weight 3, a tie (which counts with weight 1), and one of weight 0."""
    objective, built = make(theta=3.0, centre_weight=0.2)
    built["reward"].head.data.mul_(50)  # scores of some units
    ties, weights = [False, False, True, False], [1.0, 3.0, 1.0, 0.0]
    batch = batch_of(random_latents(), ties=ties, weights=weights)
    with torch.no_grad():
        text = built["text_encoder"].encode(CAPTIONS * 2)
        scores = built["reward"](random_latents(), text)[:, 0].double().tolist()
    wanted = dict.fromkeys(("loss", "nll", "accuracy", "score_gap"), 0.0)
    for pair in range(4):
        a, b = scores[pair], scores[4 + pair]
        nll = nll_by_hand(a, b, "tie" if ties[pair] else "winner", 3.0)
        wanted["nll"] += nll
        wanted["loss"] += (1.0 if ties[pair] else weights[pair]) * nll + 0.2 * ((a + b) / 2) ** 2
        wanted["accuracy"] += 0.5 if ties[pair] else float(a > b)
        wanted["score_gap"] += 0.0 if ties[pair] else a - b
    found = run(objective, built, batch)
    assert float(found.total.detach()) == pytest.approx(wanted["loss"], rel=1e-5)
    for name, value in wanted.items():
        assert float(found.metrics[name]) == pytest.approx(value, rel=1e-5), name
        assert not found.metrics[name].requires_grad
    assert found.metrics["tied"] == 1 and found.metrics["cut_text"] == 2  # "down" and "left", counted once a pair
    assert {round(wanted["accuracy"] * 2)} <= {1, 3, 5, 7}


def test_what_the_clips_of_a_pair_cost_is_counted() -> None:
    objective, built = make()
    found = run(objective, built, batch_of(random_latents())).metrics
    assert found["tokens"] == 8 * 8 and found["text_tokens"] == 8 * 2
    assert found["flops"] == 8 * built["reward"].config.flops(8, 2) and found["padding_share"] == pytest.approx(4 * 0.5)


def test_votes_on_axes_teach_the_scores_of_their_axes() -> None:
    """A vote for the loser, a tie, none, one for the winner; the loss is the mean over both axes, and a pair's weight counts on
    both."""
    objective, built = make(("overall", "motion"), theta=3.0)
    built["reward"].head.data.mul_(50)
    votes = [{"motion": "loser"}, {"motion": "tie", "text": "winner"}, {}, {"motion": "winner"}]
    weights = [1.0, 1.0, 1.0, 2.0]
    batch = batch_of(random_latents(), weights=weights, pair_axes=votes)
    with torch.no_grad():
        scores = built["reward"](random_latents(), built["text_encoder"].encode(CAPTIONS * 2)).double()
    total, motion, right = 0.0, 0.0, 0.0
    for pair, vote in enumerate(votes):
        (a, x), (b, y) = scores[pair].tolist(), scores[4 + pair].tolist()
        nll = nll_by_hand(x, y, vote["motion"], 3.0) if "motion" in vote else 0.0
        motion += nll
        total += weights[pair] * (nll_by_hand(a, b, "winner", 3.0) + nll) / 2
        right += {"winner": float(x > y), "loser": float(y > x)}.get(vote.get("motion", "tie"), 0.5)
    found = run(objective, built, batch)
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-5)
    assert float(found.metrics["nll/motion"]) == pytest.approx(motion, rel=1e-5)
    assert float(found.metrics["accuracy/motion"]) == right and found.metrics["voted/motion"] == 3


def test_pairs_without_a_vote_do_not_move_the_axis() -> None:
    """Also at theta 1, where the tie that stands in for a missing vote has an infinite nll."""
    objective, built = make(("overall", "motion"), theta=1.0)
    found = run(objective, built, batch_of(random_latents(), pair_axes=[{}] * 4))
    found.total.backward()
    grad = built["reward"].head.grad
    assert found.total.isfinite() and grad.isfinite().all() and grad[0].any() and not grad[1].any()
    assert found.metrics["voted/motion"] == 0 and found.metrics["accuracy/motion"] == 2


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Along the gradient itself, the loss rises by its squared norm; ties, weights and the centre are in it."""
    objective, built = make(("overall", "motion"), centre_weight=0.5)
    built["reward"].head.data.mul_(20)
    batch = batch_of(
        random_latents(), ties=[False, True, False, False], weights=[1.0, 1.0, 2.5, 0.5], pair_axes=[{"motion": "loser"}] * 4
    )
    run(objective, built, batch).total.backward()
    head = built["reward"].head
    grad = head.grad.clone()
    values, step = [], 0.02 / grad.norm()
    for sign in (1, -1):
        with torch.no_grad():
            head.add_(sign * step * grad)
            values.append(float(run(objective, built, batch).total))
            head.sub_(sign * step * grad)
    assert (values[0] - values[1]) / (2 * float(step)) == pytest.approx(float(grad.square().sum()), rel=2e-3)


def test_half_of_a_batch_and_the_other_make_the_whole() -> None:
    """Sums over pairs, draws keyed by pair: how pairs are spread changes nothing."""
    objective, built = make(("overall", "motion"))
    more = {"ties": [False, True, False, False], "weights": [1.0, 1.0, 2.0, 0.3]}
    votes = [{"motion": word} for word in ("winner", "tie", "loser", "winner")]
    whole = replace(batch_of(random_latents(), pair_axes=votes, **more), logvar=torch.zeros(8, CHANNELS, *SHAPE))
    parts = []
    for pairs in ([0], [1, 2, 3]):
        rows = [*pairs, *(4 + pair for pair in pairs)]
        assert whole.latents is not None and whole.logvar is not None and whole.pair_weights is not None
        assert whole.pair_ties is not None
        part = replace(
            whole, video=whole.video[rows], captions=[whole.captions[row] for row in rows], fps=whole.fps[rows],
            sample_ids=[whole.sample_ids[row] for row in rows], latents=whole.latents[rows], logvar=whole.logvar[rows],
            pair_weights=whole.pair_weights[pairs], pair_ties=whole.pair_ties[pairs], pair_axes=[votes[pair] for pair in pairs],
        )  # fmt: skip
        parts.append(run(objective, built, part))
    found = run(objective, built, whole)
    torch.testing.assert_close(sum(part.total for part in parts), found.total, rtol=1e-6, atol=0)
    for name, value in found.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), value, rtol=1e-5, atol=1e-6)


def test_both_clips_of_a_pair_are_sampled_with_one_draw() -> None:
    """Equal clips with a wide posterior have equal scores, whatever is drawn; with draws of their own they have not."""
    objective, built = make()
    latents = random_latents()
    twins = torch.cat([latents[:4], latents[:4]])
    batch = replace(batch_of(twins), logvar=torch.zeros_like(twins))
    assert run(objective, built, batch).metrics["score_gap"] == 0
    apart = replace(batch, sample_ids=[f"{number}" for number in range(8)])
    assert run(objective, built, apart).metrics["score_gap"] != 0


def test_pixels_are_encoded_and_a_greyscale_model_sees_no_colour() -> None:
    """Two colours of one luma (red 0.587 and green 0.299, times their weights) tie for a greyscale model, and for no other."""
    video = torch.full((8, 3, 2, 4, 4), -1.0)
    video[:4, 0] += 0.587
    video[4:, 1] += 0.299
    gaps = {}
    for greyscale in (False, True):
        objective, built = make(greyscale=greyscale)
        batch = replace(batch_of(random_latents()), latents=None, video=video)
        gaps[greyscale] = float(run(objective, built, batch).metrics["score_gap"])
    assert abs(gaps[True]) < 1e-5 < 1e-3 < abs(gaps[False])


@pytest.mark.parametrize("trained", [False, True])
def test_the_text_encoder_trains_where_it_is_asked_to(trained: bool) -> None:
    objective, built = make(train_text_encoder=trained)
    assert objective.phases == {"train": ("reward", "text_encoder") if trained else ("reward",)}
    run(objective, built, batch_of(random_latents())).total.backward()
    assert (built["text_encoder"].table.grad is not None) == trained


def test_accuracy_of_a_tie_and_of_equal_scores_is_one_half() -> None:
    gap, sign = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 0.0])
    assert accuracy(gap, sign).tolist() == [1, 0, 0, 1, 0.5, 0.5]


# --- refusals ----------------------------------------------------------------------------------------------------------------


def test_models_that_do_not_fit_are_refused() -> None:
    objective, built = make()
    objective.check(built)
    with pytest.raises(ConfigError, match="text of 8 channels, and the text encoder gives 9: set .*caption_channels to 9"):
        objective.check(built | {"text_encoder": Text(9)})
    other = models.build("reward/video", "tiny", latent_channels=5, caption_channels=WIDTH)
    with pytest.raises(ConfigError, match="latents of 5 channels, and the VAE gives 4: set .*latent_channels to 4"):
        objective.check(built | {"reward": other})
    with pytest.raises(ConfigError, match="role reward is text/t5, which scores nothing: take reward/video"):
        objective.check(built | {"reward": Text()})
    two = Text()
    two.config.clip_width = 4
    with pytest.raises(ConfigError, match="gives the text of two encoders"):
        objective.check(built | {"text_encoder": two})
    with pytest.raises(ConfigError, match="objective.latent_statistics_hash is xyz, but the statistics of role vae have abc"):
        make(latent_statistics_hash="xyz")[0].check(built)


def test_batches_that_cannot_be_learned_from_are_refused() -> None:
    objective, built = make(("overall", "motion"))
    batch = batch_of(random_latents())
    with pytest.raises(ConfigError, match="objective reward reads pair_weights of pairs, and the micro-batch has none"):
        run(objective, built, replace(batch, pair_weights=None, pair_ties=None))
    with pytest.raises(ConfigError, match="has the axis 'motion', and the pairs of this micro-batch have no votes by axis"):
        run(objective, built, batch)
    strict, _ = make(("overall", "motion"), theta=1.0)
    with pytest.raises(ConfigError, match="pair pair-2 is a tie on axis 'motion', which objective.theta 1 makes impossible"):
        run(strict, built, replace(batch, pair_axes=[{}, {}, {"motion": "tie"}, {}]))
    grey, coloured = make(greyscale=True)
    with pytest.raises(
        ConfigError, match="reward model is greyscale, .* latents of coloured ones: set data.cache.mode to text"
    ):
        run(grey, coloured, batch)


# --- learning ----------------------------------------------------------------------------------------------------------------

COLOUR = torch.randn(CHANNELS, 1, 1, 1, generator=torch.Generator().manual_seed(11))
FEATURE = torch.cat([COLOUR, -COLOUR], dim=1).expand(CHANNELS, *SHAPE)


def linear(latents: Tensor, captions: list[str]) -> Tensor:
    """Quality of clips: a feature that is linear in their latents, of unit variance; a "colour" that is in the first frame and
    not in the second, so that the same frames in the other order are as bad as these are good."""
    return (latents * FEATURE).flatten(1).sum(dim=1) / FEATURE.norm()


def as_told(latents: Tensor, captions: list[str]) -> Tensor:
    """The same upside down where the caption is `down`: without the caption nothing can be known."""
    return linear(latents, captions) * torch.tensor([-1.0 if caption == "down" else 1.0 for caption in captions])


def judged(quality: Callable[[Tensor, list[str]], Tensor], seed: int, num_pairs: int, tie_below: float = 0.3) -> Batch:
    """Random pairs, the better clip first; those that are nearly as good tie."""
    latents = random_latents(num_pairs, seed)
    generator = torch.Generator().manual_seed(seed)
    captions = [("up", "down")[number] for number in torch.randint(0, 2, (num_pairs,), generator=generator).tolist()]
    first, second = latents.chunk(2)
    gap = quality(first, captions) - quality(second, captions)
    swap = (gap < 0).view(-1, 1, 1, 1, 1)
    ordered = torch.cat([torch.where(swap, second, first), torch.where(swap, first, second)])
    return batch_of(ordered, captions, ties=(gap.abs() < tie_below).tolist())


def accuracy_of(built: dict[str, Any], batch: Batch) -> float:
    """The share of decided pairs whose winner scores higher."""
    with torch.no_grad():
        assert batch.latents is not None and batch.pair_ties is not None
        winner, loser = built["reward"](batch.latents * 2, built["text_encoder"].encode(batch.captions))[:, 0].chunk(2)
    return float((winner > loser)[~batch.pair_ties].float().mean())


@pytest.mark.parametrize(("quality", "num_steps"), [(linear, 100), (as_told, 130)])
def test_it_learns_what_is_better(quality: Callable[[Tensor, list[str]], Tensor], num_steps: int) -> None:
    """More than 90 % of 400 unseen pairs in the right order, near one half before; where quality depends on the caption, this
    takes the caption: with the captions exchanged nearly every pair is in the wrong order."""
    objective, built = make()
    held_out = judged(quality, 10_000, 400)
    assert 0.3 < accuracy_of(built, held_out) < 0.7
    optimizer = torch.optim.AdamW(built["reward"].parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(num_steps):
        batch = judged(quality, step, 32)
        optimizer.zero_grad()
        (run(objective, built, batch).total / 32).backward()
        optimizer.step()
    assert accuracy_of(built, held_out) > 0.9
    if quality is as_told:
        exchanged = replace(held_out, captions=["up" if text == "down" else "down" for text in held_out.captions])
        assert accuracy_of(built, exchanged) < 0.1
