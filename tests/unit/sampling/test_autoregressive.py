"""Tokens one after another: what is drawn, what is kept, what a window may not be. The model is the real one, with random
weights that are large enough for every token to depend on those before it and on the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from videofm.errors import ConfigError, DataError
from videofm.models.ar.config import ARConfig
from videofm.models.ar.model import ARTransformer
from videofm.sampling.autoregressive import (
    TokenSampling,
    continue_tokens,
    continue_windows,
    draw,
    filtered,
    sample_tokens,
)
from videofm.sampling.noise import derived_seed
from videofm.types import Conditioning

SHAPE = (3, 2, 3)
SEEDS = [5, 6, 7]
ARGMAX = TokenSampling(temperature=0.0)


def model(text: str = "cross_attention", vocab_size: int = 16) -> ARTransformer:
    torch.manual_seed(0)
    config = ARConfig(vocab_size, 2, 32, 2, 48, caption_channels=8, text=text, max_rows=4, max_columns=4)  # type: ignore[arg-type]
    ar = ARTransformer(config).eval()
    with torch.no_grad():
        for name, parameter in ar.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(12.0 if name.startswith("head") else 6.0)
    return ar


def texts(seed: int = 0, count: int = 3, length: int = 4) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[0, -1] = False
    return Conditioning(torch.randn(count, length, 8, generator=generator), mask)


@pytest.fixture(scope="module")
def ar() -> ARTransformer:
    return model()


class Recorded:
    """Calls `forward_cached` and `forward` of a model as it would, and notes the rows and how many tokens a cache held."""

    def __init__(self, ar: ARTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.held: list[int] = []
        inner = ar.forward_cached

        def recording(tokens: Tensor, *args: Any) -> Any:
            found = inner(tokens, *args)
            self.rows.append(len(tokens))
            self.held.append(found.cache.layers[0].k.shape[1])
            return found

        monkeypatch.setattr(ar, "forward_cached", recording)


def logits_of(ar: ARTransformer, indices: Tensor, text: Conditioning, start: str | Sequence[str] = "start") -> Tensor:
    """Teacher forcing: `(B, L, V)`."""
    inputs = ar.inputs_of(indices, start)
    with torch.no_grad():
        return ar(inputs.tokens, inputs.positions, inputs.cells, text)


@pytest.mark.parametrize("kind", ["cross_attention", "prefix"])
def test_the_most_likely_rollout_is_the_teacher_forced_argmax(kind: str) -> None:
    """Every token is the argmax of the logits that one pass over the whole rollout gives it. The control: tokens matter, as
    with another first token the argmax differs elsewhere."""
    ar = model(kind)
    made = sample_tokens(ar, texts(), None, SHAPE, SEEDS, ARGMAX)
    assert made.shape == (3, *SHAPE) and made.dtype == torch.int64 and len(made.unique()) > 3
    torch.testing.assert_close(logits_of(ar, made, texts()).argmax(dim=2), made.flatten(1), rtol=0, atol=0)
    other = made.clone()
    other[:, 0, 0, 0] = (other[:, 0, 0, 0] + 1) % 16
    assert (logits_of(ar, other, texts()).argmax(dim=2)[:, 1:] != made.flatten(1)[:, 1:]).any()


@pytest.mark.parametrize("kind", ["cross_attention", "prefix"])
@pytest.mark.parametrize("num_given", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_cache_changes_nothing(kind: str, num_given: int, scale: float) -> None:
    """Same tokens with and without, and logits equal to 1e-5, with negatives of another length in the same batch."""
    ar = model(kind)
    prefix = torch.randint(16, (3, num_given, 2, 3), generator=torch.Generator().manual_seed(1))
    settings = TokenSampling(guidance_scale=scale)
    found, seen = [], []
    for use_cache in (True, False):
        logits: list[Tensor] = []
        found.append(
            sample_tokens(ar, texts(), texts(1, length=6), SHAPE, SEEDS, settings, prefix, "continue", use_cache, logits.append)
        )
        seen.append(torch.stack(logits, dim=1))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-5)
    assert seen[0].shape == (3, 18 - 6 * num_given, 16)
    torch.testing.assert_close(found[0][:, :num_given], prefix, rtol=0, atol=0)


def test_a_video_depends_on_its_own_seed_only(ar: ARTransformer) -> None:
    """Each alone, or all in another order: the same tokens. Another seed: others."""
    text = texts()
    together = sample_tokens(ar, text, None, SHAPE, SEEDS)
    for row, seed in enumerate(SEEDS):
        alone = sample_tokens(ar, text.rows(slice(row, row + 1)), None, SHAPE, [seed])
        torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=0)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(sample_tokens(ar, text.rows(order), None, SHAPE, [7, 5, 6]), together[order], rtol=0, atol=0)
    assert (sample_tokens(ar, text, None, SHAPE, [8, 6, 7])[0] != together[0]).any()


@pytest.mark.parametrize("num_given", [1, 2, 3])
def test_what_is_given_changes_no_draw(ar: ARTransformer, num_given: int) -> None:
    """A video whose first frames are given goes on with the very tokens that it was drawn with: draws are keyed by position."""
    whole = sample_tokens(ar, texts(), None, SHAPE, SEEDS)
    again = sample_tokens(ar, texts(), None, SHAPE, SEEDS, prefix=whole[:, :num_given])
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_one_candidate_is_the_argmax(ar: ARTransformer) -> None:
    most_likely = sample_tokens(ar, texts(), None, SHAPE, SEEDS, ARGMAX)
    cold = TokenSampling(temperature=1e-300, top_p=0.9)  # logits over it are beyond what a number can hold
    for settings in (TokenSampling(top_k=1), TokenSampling(temperature=3.0, top_k=1), TokenSampling(top_p=1e-9), cold):
        torch.testing.assert_close(sample_tokens(ar, texts(), None, SHAPE, SEEDS, settings), most_likely, rtol=0, atol=0)
    assert (sample_tokens(ar, texts(), None, SHAPE, SEEDS) != most_likely).any()
    tied = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    torch.testing.assert_close(draw(tied, [0], 0, TokenSampling(top_k=1)), draw(tied, [0], 0, ARGMAX), rtol=0, atol=0)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic."""
    expected = probabilities * counts.sum()
    return float(((counts - expected).square() / expected).sum())


def test_pairs_of_tokens_have_the_probabilities_of_the_model() -> None:
    """Windows of two tokens out of 4, 3,000 of them: the 16 counts fit p(a) p(b | a), which teacher forcing gives exactly.

    With 15 degrees of freedom the statistic lies below 30.6 with probability 0.99; seeds are fixed. The control: it is far
    beyond that for independent tokens with the same marginals, and for the probabilities at another temperature.
    """
    ar, count, temperature = model(vocab_size=4), 3000, 1.5
    text = texts(count=1).rows(torch.zeros(count, dtype=torch.int64))
    made = sample_tokens(ar, text, None, (1, 1, 2), range(count), TokenSampling(temperature=temperature)).flatten(1)
    counts = torch.bincount(made[:, 0] * 4 + made[:, 1], minlength=16).double().view(4, 4)

    grid = torch.tensor([[[[a, 0]]] for a in range(4)])
    logits = logits_of(ar, grid, text.rows(slice(0, 4))).double()

    def joint(temperature: float) -> Tensor:
        first, second = (logits / temperature).softmax(dim=2).unbind(dim=1)
        return first[0, :, None] * second

    assert joint(temperature).min() * count > 5  # so that the statistic has its distribution
    assert chi_square(counts, joint(temperature)) < 30.6
    marginals = joint(temperature).sum(1, keepdim=True) * joint(temperature).sum(0, keepdim=True)
    assert chi_square(counts, marginals) > 100
    assert chi_square(counts, joint(1.0)) > 100


def test_draws_of_a_position_and_of_a_seed_are_their_own() -> None:
    """Uniform logits over 4 ids: the ids of 4,000 seeds at two positions, and at one position of seeds one apart, are
    independent (15 degrees of freedom)."""
    logits, settings = torch.zeros(4000, 4), TokenSampling()
    first, second = (draw(logits, range(4000), position, settings) for position in (0, 1))
    neighbour = draw(logits, range(1, 4001), 0, settings)
    for other in (second, neighbour):
        counts = torch.bincount(first * 4 + other, minlength=16).double()
        assert chi_square(counts, torch.full((16,), 1 / 16)) < 30.6


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(5, 1.0, 1.0), (0, 0.7, 1.0), (9, 0.8, 0.6), (1, 0.1, 2.0), (0, 1.0, 1.0)]
)
def test_candidates_are_those_of_transformers(top_k: int, top_p: float, temperature: float) -> None:
    """The same logits survive as in `transformers`: temperature, then top-k, then top-p of what is left."""
    logits = torch.randn(40, 31, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    theirs = TemperatureLogitsWarper(temperature)(None, logits)  # type: ignore[arg-type]
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)  # type: ignore[arg-type]
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)  # type: ignore[arg-type]
    torch.testing.assert_close(filtered(logits / temperature, top_k, top_p), theirs, rtol=0, atol=0)
    kept = draw(logits, range(40), 3, TokenSampling(temperature, top_k, top_p))
    assert theirs.gather(1, kept[:, None]).isfinite().all()


def test_guidance_on_logits(ar: ARTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are `u + w (c - u)` of those that each text gives by itself, in one batch of twice the rows; w = 0 samples with
    the negative, w = 1 with the prompt alone, whose batch is not doubled."""
    text, negative = texts(), texts(9)
    logits: list[Tensor] = []
    made = sample_tokens(ar, text, negative, SHAPE, SEEDS, TokenSampling(guidance_scale=3.0), on_step=logits.append)
    c, u = (logits_of(ar, made, which).double() for which in (text, negative))
    torch.testing.assert_close(torch.stack(logits, dim=1), u + 3.0 * (c - u), rtol=1e-4, atol=1e-4)
    unguided = sample_tokens(ar, negative, None, SHAPE, SEEDS)
    off = TokenSampling(guidance_scale=0.0)
    torch.testing.assert_close(sample_tokens(ar, text, negative, SHAPE, SEEDS, off), unguided, rtol=0, atol=0)
    recorded = Recorded(ar, monkeypatch)
    sample_tokens(ar, text, negative, SHAPE, SEEDS, off)
    sample_tokens(ar, text, negative, SHAPE, SEEDS)
    assert recorded.rows == [6] * 18 + [3] * 18


def test_one_window_is_plain_sampling(ar: ARTransformer) -> None:
    plain = sample_tokens(ar, texts(), None, SHAPE, SEEDS)
    torch.testing.assert_close(continue_tokens(ar, [(texts(), None)], SHAPE, 3, 1, SEEDS), plain, rtol=0, atol=0)
    given = plain[:, :2]
    torch.testing.assert_close(
        continue_tokens(ar, [(texts(), None)], (3, 2, 3), 3, 0, SEEDS, prefix=given), plain, rtol=0, atol=0
    )


def test_windows_go_on_from_the_tokens_before(ar: ARTransformer) -> None:
    """9 frames in windows of 4 that share 2: frames 0-3, 2-5, 4-7, 6-8. Each is `sample_tokens` by hand: last two frames as
    the prefix, `continue` as the start, its own text and seeds. Total = windows * (T - k) + k, less what the last lacks."""
    shape, prompts = (4, 2, 3), [(texts(number), None) for number in range(4)]
    video = continue_tokens(ar, prompts, shape, 9, 2, SEEDS)
    assert video.shape == (3, 9, 2, 3)
    by_hand = sample_tokens(ar, prompts[0][0], None, shape, SEEDS)
    for number, length in ((1, 4), (2, 4), (3, 3)):
        seeds = [derived_seed(seed, f"window:{number}") for seed in SEEDS]
        text, tail = prompts[number][0], by_hand[:, -2:]
        made = sample_tokens(ar, text, None, (length, 2, 3), seeds, prefix=tail, start="continue")
        torch.testing.assert_close(made[:, :2], tail, rtol=0, atol=0)
        by_hand = torch.cat([by_hand, made[:, 2:]], dim=1)
    torch.testing.assert_close(video, by_hand, rtol=0, atol=0)


def test_a_prompt_changes_what_follows_and_nothing_before(ar: ARTransformer) -> None:
    """The first window is the same under both storyboards; from where the prompt changes on the tokens differ."""
    same = continue_tokens(ar, [(texts(0), None)], (4, 2, 3), 8, 2, SEEDS)
    changed = continue_tokens(ar, [(texts(0), None), (texts(1), None), (texts(1), None)], (4, 2, 3), 8, 2, SEEDS)
    torch.testing.assert_close(same[:, :4], changed[:, :4], rtol=0, atol=0)
    assert (same[:, 4:6] != changed[:, 4:6]).any()


def test_nothing_grows_with_length(ar: ARTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the video: a cache holds a window at most, and every window after the first makes the same calls."""
    recorded, peaks = Recorded(ar, monkeypatch), []
    for new in continue_windows(ar, [(texts(), None)], (3, 2, 2), 21, 1, SEEDS):
        peaks.append((new.shape[1], len(recorded.held), max(recorded.held)))
        recorded.held.clear()
    assert peaks[0] == (3, 12, 12)
    assert peaks[1:] == [(2, 8, 12)] * 9


def test_each_video_may_begin_in_its_own_way(ar: ARTransformer) -> None:
    starts = ["start", "continue", "start"]
    mixed = sample_tokens(ar, texts(), None, SHAPE, SEEDS, start=starts)
    for word in ("start", "continue"):
        rows = [row for row, start in enumerate(starts) if start == word]
        torch.testing.assert_close(
            mixed[rows], sample_tokens(ar, texts(), None, SHAPE, SEEDS, start=word)[rows], rtol=0, atol=0
        )
    assert (mixed[1] != sample_tokens(ar, texts(), None, SHAPE, SEEDS)[1]).any()


def test_a_step_may_stop_it(ar: ARTransformer) -> None:
    def stop(logits: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_tokens(ar, texts(), None, SHAPE, SEEDS, on_step=stop)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; give 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; give 0"),
        ({"top_p": 0.0}, "top_p is 0.0; give above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0; give 1"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenSampling(**fields)


def test_what_does_not_fit_a_window(ar: ARTransformer) -> None:
    text, long = texts(), torch.zeros(3, 4, 2, 3, dtype=torch.int64)

    def refused(error: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(error, match=message):
            sample_tokens(ar, *args, **kwargs)

    refused(ConfigError, r"a prefix of shape \(3, 4, 2, 3\).*at most 3 frames of 2x3", text, None, SHAPE, SEEDS, prefix=long)
    refused(ConfigError, r"a prefix of shape \(3, 1, 3, 2\)", text, None, SHAPE, SEEDS, prefix=long[:, :1].mT)
    refused(
        DataError,
        "ids 0 to 16 in a prefix.*16 tokens, 0 to 15",
        text,
        None,
        SHAPE,
        SEEDS,
        prefix=long[:, :2] + torch.tensor([0, 16, 3]),
    )
    refused(DataError, "ids -1 to -1 in a prefix", text, None, SHAPE, SEEDS, prefix=long[:, :1] - 1)
    refused(ConfigError, "2 seeds, 3 texts", text, None, SHAPE, [1, 2])
    refused(ConfigError, "3 seeds, 3 texts, 2 prefixes", text, None, SHAPE, SEEDS, prefix=long[:2, :1])
    refused(ConfigError, "0 seeds", text, None, SHAPE, [])
    refused(ConfigError, "there is no negative text", text, None, SHAPE, SEEDS, TokenSampling(guidance_scale=2.0))
    refused(ConfigError, "1 negative texts", text, texts(count=1), SHAPE, SEEDS, TokenSampling(guidance_scale=2.0))
    refused(ConfigError, "top_k is 17, and the vocabulary has 16", text, None, SHAPE, SEEDS, TokenSampling(top_k=17))
    refused(ConfigError, r"a window of \(0, 2, 3\) tokens", text, None, (0, 2, 3), SEEDS)
    refused(DataError, "5 rows x 3 columns", text, None, (1, 5, 3), SEEDS)
    refused(ConfigError, "start is 'middle'", text, None, SHAPE, SEEDS, start="middle")


def test_windows_that_do_not_go_on(ar: ARTransformer) -> None:
    pairs = [(texts(number), None) for number in range(3)]
    with pytest.raises(ConfigError, match="3 prompts with prefix_frames 0.*Give prefix_frames of at least 1, or one prompt"):
        continue_tokens(ar, pairs, SHAPE, 9, 0, SEEDS)
    with pytest.raises(ConfigError, match="3 prompts for 4 windows: 9 token frames in windows of 3 that share 1 take 4"):
        continue_tokens(ar, pairs, SHAPE, 9, 1, SEEDS)
    with pytest.raises(ConfigError, match="windows of 3 frames that share 3 do not go on"):
        continue_tokens(ar, pairs[:1], SHAPE, 9, 3, SEEDS)
