"""Flow matching with features: which tokens they stand beside, what tolerance does to them, and what it may not depend on.

The tokenizer here is a stand-in whose features can be computed by hand: a token is the sign pattern of a 2x2 patch's mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from videofm import models
from videofm.config.flow_matching import FeaturesConfig, FlowMatchingConfig
from videofm.data.packing import pack
from videofm.errors import ConfigError, DataError
from videofm.objectives.features import FeatureSource
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.objectives.latents import clean_latents
from videofm.objectives.tokens import draw_subset
from videofm.ops.patchify import tokens_from_latents
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch

OFF: dict[str, Any] = {"dropout": 0.0, "uncertainty": 0.0}
TOLERANT: dict[str, Any] = {"dropout": 0.3, "uncertainty": 0.0, "corruption": {"probability": 0.5, "fraction": 0.4}}


@dataclass
class SignConfig:
    latent_channels: int = 16


class SignTokenizer(nn.Module):
    """A token a 2x2 patch of a frame: which of its first three mean channels are positive; 8 ids. Each id stands for a constant
    feature, `scale` times a fixed vector; another scale is another codebook."""

    vocab_size, num_books = 8, 1

    def __init__(self, scale: float = 1.0, channels: int = 16) -> None:
        super().__init__()
        self.config = SignConfig(channels)
        self.codes = nn.Parameter(scale * torch.randn(8, channels, generator=torch.Generator().manual_seed(7)))

    def token_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape[0], shape[1] // 2, shape[2] // 2

    def encode(self, z: Tensor) -> Tensor:
        means = reduce(z, "b c t (h p) (w q) -> b c t h w", "mean", p=2, q=2)
        return ((means[:, :3] > 0).long() * torch.tensor([1, 2, 4]).view(1, 3, 1, 1, 1)).sum(dim=1)

    def decode(self, indices: Tensor, num_frames: int) -> Tensor:
        assert indices.shape[1] == num_frames
        return repeat(self.codes[indices], "b t h w c -> b c t (h p) (w q)", p=2, q=2)


class Spy(nn.Module):
    """A dit that keeps what guides it and answers zeros."""

    injection: Any = None

    def coordinates(self, shape: tuple[int, int, int], fps: Tensor, compression: Any, causal_fix: bool = False) -> Tensor:
        return torch.zeros(len(fps), 3, shape[0] * shape[1] * shape[2])

    def forward(self, tokens: Tensor, *args: Any, features: Tensor, features_kept: Tensor) -> Tensor:
        self.features, self.kept = features, features_kept
        return torch.zeros_like(tokens)


def objective(features: Mapping[str, Any] | None, **fields: Any) -> FlowMatchingObjective:
    return FlowMatchingObjective(FlowMatchingConfig.model_validate({"kind": "flow_matching", "features": features} | fields))


@pytest.fixture(scope="module")
def frozen() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "vae": models.build("vae/ltx", "tiny"),
        "text_encoder": models.build("text/t5", "tiny", num_layers=1, max_length=24),
        "tokenizer": SignTokenizer().requires_grad_(False),
        "fine_tokenizer": SignTokenizer(scale=-3.0).requires_grad_(False),
    }


def guided_dit(kind: str = "adaptive_norm") -> nn.Module:
    """A dit with an injection, none of whose weights is zero."""
    torch.manual_seed(1)
    dit = models.build("dit/ltx", "tiny", num_layers=2)
    models.inject_features(dit, models.InjectionSpec(kind))
    with torch.no_grad():
        for parameter in dit.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    return dit


def clips(size: int = 4, height: int = 32, frames: int = 9, name: str = "clip", step: int = 5) -> Batch:
    """With the tiny VAE 3 x 4 x 4 latent cells: 48 tokens of a dit, 12 of the stand-in."""
    video = torch.rand(size, 3, frames, height, 32, generator=torch.Generator().manual_seed(height)) * 2 - 1
    ids = [f"{name}{index}" for index in range(size)]
    return Batch(video, [f"caption {'x' * index}" for index in range(size)], torch.full((size,), 24.0), ids, step, size)


def chosen_rows(batch: Batch, rows: list[int]) -> Batch:
    captions, ids = ([of[row] for row in rows] for of in (batch.captions, batch.sample_ids))
    return replace(batch, video=batch.video[rows], captions=captions, fps=batch.fps[rows], sample_ids=ids)


def rng_of(batch: Batch) -> KeyedRng:
    return KeyedRng(1, batch.step, batch.sample_ids)


def look(
    frozen: Mapping[str, nn.Module], batch: Batch, features: Mapping[str, Any], **fields: Any
) -> tuple[Spy, dict[str, float]]:
    """What a dit is given for `batch`, and the metrics."""
    spy = Spy()
    loss = objective(features, **fields).loss({**frozen, "dit": spy}, batch, rng_of(batch), "train")
    return spy, {name: value.item() for name, value in loss.metrics.items()}


def own_features(frozen: Mapping[str, Any], batch: Batch) -> Tensor:
    """`(B, C, T, H, W)`: the clips through the tokenizer, by hand."""
    clean = clean_latents(frozen["vae"], batch, rng_of(batch))
    return frozen["tokenizer"].decode(frozen["tokenizer"].encode(clean), clean.shape[2])


def test_roles_follow_the_switches() -> None:
    plain = ("dit", "vae", "text_encoder")
    assert objective(None).roles == plain
    assert objective({}).roles == (*plain, "tokenizer")
    assert objective({"rollouts": 0.1}).roles == (*plain, "tokenizer", "fine_tokenizer")
    assert objective({"rollouts": 0.1}).phases == {"train": ("dit",)}


def test_each_token_gets_its_own_feature(frozen: dict[str, nn.Module]) -> None:
    batch = clips()
    spy, metrics = look(frozen, batch, OFF)
    features = own_features(frozen, batch)
    assert torch.equal(spy.features, tokens_from_latents(features)) and spy.kept.all()
    clean = clean_latents(frozen["vae"], batch, rng_of(batch))
    assert metrics["features_mse"] == pytest.approx(float((features - clean).square().mean(dim=(1, 2, 3, 4)).sum()), rel=1e-5)
    assert {name for name in metrics if name.startswith("features")} == {"features_mse"}


def test_features_follow_the_tokens_that_stay(frozen: dict[str, nn.Module]) -> None:
    batch = clips()
    fields = {"token_dropping": {"num_tokens": 7}}
    spy, _ = look(frozen, batch, OFF | {"dropout": 0.5}, **fields)
    index = draw_subset(48, None, 7, rng_of(batch))
    whole = tokens_from_latents(own_features(frozen, batch))
    assert torch.equal(spy.features, torch.stack([rows[kept] for rows, kept in zip(whole, index, strict=True)]))
    assert spy.kept.shape == (4, 7)


def test_dropped_are_the_samples_whose_draw_says_so(frozen: dict[str, nn.Module]) -> None:
    """A sample is dropped whole; of 400 by a rate of 0.3 about 120, to within 4 standard deviations."""
    batch = clips()
    spy, metrics = look(frozen, batch, OFF | {"dropout": 0.5})
    dropped = rng_of(batch).uniform("features_dropout") < 0.5
    assert torch.equal(spy.kept, ~dropped[:, None].expand(4, 48)) and 0 < dropped.sum() < 4
    assert metrics["features_dropped"] == dropped.sum()
    many = clips(size=400, height=16, frames=1)
    share = look(frozen, many, OFF | {"dropout": 0.3})[1]["features_dropped"] / 400
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5


def test_corrupted_tokens_are_other_tokens(frozen: dict[str, Any]) -> None:
    """Of 200 clips of 12 tokens each, half of the clips have 40 % of their tokens wrong, to within 4 standard deviations.

    A clip's share has mean 0.2 and variance E[s^2] - 0.04, with E[s^2] = 0.5 * (0.16 + 0.24 / 12): 0.05.
    """
    batch = clips(size=200)
    spy, metrics = look(frozen, batch, OFF | {"corruption": {"probability": 0.5, "fraction": 0.4}})
    codes, cells = frozen["tokenizer"].codes, rearrange(spy.features, "b (t h w) c -> b c t h w", t=3, h=4)[..., ::2, ::2]
    clean = clean_latents(frozen["vae"], batch, rng_of(batch))
    indices = frozen["tokenizer"].encode(clean)
    seen = (rearrange(cells, "b c t h w -> b t h w 1 c") == codes).all(dim=-1)  # (B, T', H', W', 8)
    assert (seen.sum(dim=-1) == 1).all()
    wrong = (seen.long().argmax(dim=-1) != indices).float().mean(dim=(1, 2, 3))
    assert metrics["features_corrupted"] == pytest.approx(float(wrong.sum()), rel=1e-5)
    assert abs(float(wrong.mean()) - 0.2) < 4 * (0.05 / 200) ** 0.5
    assert 60 < int((wrong > 0).sum()) < 140


def test_rollouts_take_the_place_of_some(frozen: dict[str, Any]) -> None:
    batch = clips(size=6)
    shape = frozen["fine_tokenizer"].token_shape((3, 4, 4))
    rollouts = torch.randint(8, (6, *shape), generator=torch.Generator().manual_seed(0))
    spy, metrics = look(frozen, replace(batch, rollouts=rollouts), OFF | {"rollouts": 0.5})
    chosen = rng_of(batch).uniform("features_rollout") < 0.5
    assert 0 < chosen.sum() < 6 and metrics["features_rolled_out"] == chosen.sum()
    predicted, own = frozen["fine_tokenizer"].decode(rollouts, 3), own_features(frozen, batch)
    expected = torch.where(chosen.view(6, 1, 1, 1, 1), predicted, own)
    assert torch.equal(spy.features, tokens_from_latents(expected))


def test_rollouts_that_are_not_there_or_do_not_fit_are_refused(frozen: dict[str, nn.Module]) -> None:
    batch = clips(size=2)
    with pytest.raises(DataError, match="rollouts is 0.5, and these clips come without rollouts: make them"):
        look(frozen, batch, OFF | {"rollouts": 0.5})
    other = replace(batch, rollouts=torch.zeros(2, 3, 4, 2, dtype=torch.long))
    with pytest.raises(DataError, match="clips are 3 x 4 x 2 tokens .* fine_tokenizer makes 3 x 2 x 2 of their latents"):
        look(frozen, other, OFF | {"rollouts": 0.5})


def test_uncertainty_moves_some_by_the_spreads_of_the_micro_batch(frozen: dict[str, nn.Module]) -> None:
    """The samples whose draw says so have other features, of the same normalised map up to its sign; the others keep theirs bit
    for bit."""
    batch = clips(size=6)
    spy, metrics = look(frozen, batch, OFF | {"uncertainty": 0.5})
    own = tokens_from_latents(own_features(frozen, batch))
    moved = rng_of(batch).uniform("features_uncertainty") < 0.5
    assert 0 < moved.sum() < 6
    assert torch.equal((spy.features != own).flatten(1).any(dim=1), moved)
    assert torch.equal(spy.features[~moved], own[~moved])
    seen, kept = (
        (values - values.mean(dim=1, keepdim=True)) / values.std(dim=1, keepdim=True) for values in (spy.features, own)
    )
    signs = (seen * kept).mean(dim=1, keepdim=True).sign()
    torch.testing.assert_close(seen, signs * kept, rtol=1e-3, atol=1e-3)
    assert metrics["features_spread"] > 0
    alone = clips(size=1)
    assert look(frozen, alone, OFF | {"uncertainty": 1.0})[1]["features_spread"] == 0


def test_what_a_sample_gets_does_not_depend_on_its_place(frozen: dict[str, nn.Module]) -> None:
    """Every draw is keyed by sample: the same clips in another order, in one micro-batch, have the same features."""
    batch, order = clips(size=5), [3, 0, 4, 2, 1]
    turned = chosen_rows(batch, order)
    features = TOLERANT | {"uncertainty": 0.7}
    (spy, metrics), (other, others) = look(frozen, batch, features), look(frozen, turned, features)
    torch.testing.assert_close(other.features, spy.features[order], rtol=1e-5, atol=1e-5)
    assert torch.equal(other.kept, spy.kept[order])
    assert others == pytest.approx(metrics, rel=1e-5)


def run(of: dict[str, nn.Module], batches: list[Batch], features: Mapping[str, Any], **fields: Any) -> dict[str, Tensor]:
    """Total, metrics and gradients, summed over batches."""
    of["dit"].zero_grad()
    found: dict[str, Tensor] = {}
    for batch in batches:
        loss = objective(features, **fields).loss(of, batch, rng_of(batch), "train")
        loss.total.backward()
        for name, value in {"total": loss.total.detach(), **loss.metrics}.items():
            found[name] = found.get(name, torch.zeros(())) + value
    return found | {name: p.grad.clone() for name, p in of["dit"].named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    assert max(float(value.abs().max()) for name, value in wanted.items() if name.startswith("injection")) > 1e-2
    for name in set(wanted) - {"text_tokens", "padding_share", "flops"}:
        scale = max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", ["adaptive_norm", "mlp", "controlnet"])
def test_a_pack_is_the_sum_of_its_parts(frozen: dict[str, nn.Module], kind: str) -> None:
    """Two sizes in one sequence, some features dropped and some corrupted, equal the sizes one by one."""
    of = {**frozen, "dit": guided_dit(kind)}
    parts = [clips(2, 32, name="a"), clips(3, 64, 1, name="b")]
    fields = {"conditioning": {"first_frame": 0.5}}
    assert_same(run(of, [pack(parts)], TOLERANT, **fields), run(of, parts, TOLERANT, **fields))


def test_spreads_are_those_of_a_whole_pack(frozen: dict[str, nn.Module]) -> None:
    """One clip of each size: alone nothing would be uncertain, together each has the spread of both."""
    parts = [clips(1, 32, name="a"), clips(1, 64, 1, name="b")]
    source = FeatureSource(FeaturesConfig.model_validate(OFF | {"uncertainty": 1.0}))
    rngs = [rng_of(part) for part in parts]
    clean = [clean_latents(frozen["vae"], part, rng) for part, rng in zip(parts, rngs, strict=True)]
    together = source.draw(frozen, clean, parts, rngs)
    for part, latents, rng, drawn in zip(parts, clean, rngs, together, strict=True):
        (alone,) = source.draw(frozen, [latents], [part], [rng])
        assert torch.equal(alone.features.tokens, tokens_from_latents(own_features(frozen, part)))
        assert not torch.equal(drawn.features.tokens, alone.features.tokens)
        assert torch.equal(drawn.metrics["features_spread"], together[0].metrics["features_spread"])


@pytest.mark.parametrize("fields", [{}, {"conditioning": {"first_frame": 0.5}, "token_dropping": {"num_tokens": 9}}])
def test_sums_do_not_depend_on_how_a_batch_is_cut(frozen: dict[str, nn.Module], fields: dict[str, Any]) -> None:
    """Without uncertainty sampling, whose spreads are the micro-batch's."""
    of, whole = {**frozen, "dit": guided_dit()}, clips(4)
    pieces = [chosen_rows(whole, [0]), chosen_rows(whole, [1, 2, 3])]
    assert_same(run(of, pieces, TOLERANT, **fields), run(of, [whole], TOLERANT, **fields))


def test_gradients_reach_the_injection_and_no_frozen_role(frozen: dict[str, nn.Module]) -> None:
    """With half of the samples dropped, the null feature learns beside the way in of the others."""
    of = {**frozen, "dit": guided_dit()}
    found = run(of, [clips()], {"dropout": 0.5})
    assert 0 < found["features_dropped"] < 4
    for name in ("linear.weight", "null"):
        assert found[f"injection.way_in.{name}"].abs().max() > 1e-3
    assert all(p.grad is None for role in frozen for p in of[role].parameters())


def test_held_out_errors_take_the_features_as_they_are(frozen: dict[str, nn.Module]) -> None:
    """Whatever the tolerance: the same numbers, and those of the dit called by hand."""
    dit, batch = guided_dit(), clips(3)
    of = {**frozen, "dit": dit}
    draw = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 16, 3, 4, 4, generator=draw) for _ in range(2))
    sigma = torch.tensor([0.2, 0.5, 0.8])
    hard = TOLERANT | {"dropout": 1.0, "uncertainty": 1.0}
    with torch.no_grad():
        settings = (OFF, hard, {"rollouts": 1.0})
        found = [objective(one).velocity_errors(of, clean, batch.captions, batch.fps, sigma, noise) for one in settings]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        tokens = objective(OFF).tokens(of, clean, noise, sigma, batch.fps)
        text = objective(OFF)._conditioning(frozen["text_encoder"], batch.captions)
        tokenizer: Any = frozen["tokenizer"]
        features = tokens_from_latents(tokenizer.decode(tokenizer.encode(clean), 3))
        by_hand = dit(tokens.noisy, sigma, text, tokens.coordinates, features=features)
        torch.testing.assert_close(found[0], (by_hand - tokens.velocity).square().mean(dim=(1, 2)), rtol=1e-5, atol=1e-6)
        null = dit(tokens.noisy, sigma, text, tokens.coordinates)
    assert (null - by_hand).abs().max() > 1e-3


def test_models_that_do_not_fit_are_refused(frozen: dict[str, nn.Module]) -> None:
    plain, guided = models.build("dit/ltx", "tiny", num_layers=1), guided_dit()
    objective({}).check({**frozen, "dit": guided})
    objective(None).check({**frozen, "dit": plain})
    with pytest.raises(ConfigError, match="role dit has no place for features: set models.dit.injection"):
        objective({}).check({**frozen, "dit": plain})
    with pytest.raises(ConfigError, match="role dit has an injection of features, and objective.features is null"):
        objective(None).check({**frozen, "dit": guided})
    with pytest.raises(ConfigError, match="tokenizer is for 4 latent channels, and the VAE has 16"):
        objective({}).check({**frozen, "dit": guided, "tokenizer": SignTokenizer(channels=4)})
    with pytest.raises(ConfigError, match="tokenizer is for 4 latent channels, and the VAE has 16"):
        objective({"rollouts": 0.5}).check({**frozen, "dit": guided, "fine_tokenizer": SignTokenizer(channels=4)})
    models.inject_features(plain, models.InjectionSpec("mlp", feature_channels=5))
    with pytest.raises(ConfigError, match="takes features with 5 channels, and those of tokenizers have the 16 of the latents"):
        objective({}).check({**frozen, "dit": plain})
    two = SignTokenizer()
    two.num_books = 2
    with pytest.raises(ConfigError, match="corruption replaces ids of one codebook, and role tokenizer has 2"):
        objective(TOLERANT).check({**frozen, "dit": guided, "tokenizer": two})
    objective(OFF).check({**frozen, "dit": guided, "tokenizer": two})


def test_a_fraction_of_no_corruption_is_refused() -> None:
    objective({"corruption": {"probability": 0.5, "fraction": 0.3}})
    objective({"corruption": {"fraction": 0.1}})  # the default, as a resolved config has it
    with pytest.raises(
        ValueError, match="fraction 0.3 with probability 0: no sample is corrupted.* Give a probability above 0"
    ):
        objective({"corruption": {"fraction": 0.3}})


def test_tokenizers_of_other_rates_take_each_others_place(frozen: dict[str, nn.Module]) -> None:
    """Coarse for the clip's own features, fine for the rollouts, of the real model: the dit's weights do not know the rate."""
    torch.manual_seed(2)
    coarse, fine = (models.build("arlon/tokenizer", size).eval().requires_grad_(False) for size in ("tiny_coarse", "tiny"))
    of = {**frozen, "dit": guided_dit(), "tokenizer": coarse, "fine_tokenizer": fine}
    for role, tokenizer in (("tokenizer", coarse), ("fine_tokenizer", fine)):
        with pytest.raises(ConfigError, match=f"codebook of role {role} has not started"):
            objective({"rollouts": 0.5}).check(of)
        tokenizer.quantizer.counters[4] = 1  # `started`
    batch = clips(4)
    rollouts = torch.randint(fine.vocab_size, (4, *fine.token_shape((3, 4, 4))), generator=torch.Generator().manual_seed(0))
    features = TOLERANT | {"uncertainty": 0.5, "rollouts": 0.5, "dropout": 0.0}
    objective(features).check(of)
    state = {name: value.clone() for name, value in coarse.state_dict().items()}
    found = run(of, [replace(batch, rollouts=rollouts)], features)
    assert found["total"].isfinite() and found["injection.way_in.linear.weight"].abs().max() > 1e-3
    assert 0 < found["features_rolled_out"] < 4 and found["features_spread"] > 0
    assert all(torch.equal(value, state[name]) for name, value in coarse.state_dict().items())
