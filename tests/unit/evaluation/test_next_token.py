"""Scores of a next-token model against predictors whose scores are known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from videofm.errors import DataError
from videofm.evaluation.next_token import TokenClips, next_token_scores, shuffled, unigram

VOCABULARY = 6


def clips(captions: Sequence[str] = ("a", "b", "c", "a"), batch_size: int = 3) -> list[TokenClips]:
    """A clip of caption `a` holds ids 0 and 1, of `b` 2 and 3, of `c` 4 and 5, evenly in no order."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for first in range(0, len(captions), batch_size):
        part = list(captions[first : first + batch_size])
        bits = torch.randint(2, (len(part), 2, 3, 4), generator=generator)
        base = torch.tensor([2 * "abc".index(caption) for caption in part])
        found.append(TokenClips(bits + base.view(-1, 1, 1, 1), part))
    return found


def knows_captions(indices: Tensor, captions: Sequence[str]) -> Tensor:
    """Even chances for the two ids of the caption, `e**-20` for the others."""
    logits = torch.full((len(captions), indices[0].numel(), VOCABULARY), -20.0)
    for row, caption in enumerate(captions):
        logits[row, :, 2 * "abc".index(caption) : 2 * "abc".index(caption) + 2] = 0.0
    return logits


def test_scores_of_a_predictor_that_reads_the_caption() -> None:
    """It loses log 2 a token with the right caption, 20 + log 2 with a wrong one; all captions of a, b, c, a can be changed."""
    even = torch.full((VOCABULARY,), -math.log(VOCABULARY), dtype=torch.float64)
    scores = next_token_scores(knows_captions, clips(), even)
    assert scores.nll == pytest.approx(math.log(2), abs=1e-6)
    assert scores.shuffled_nll == pytest.approx(20 + math.log(2), abs=1e-6)
    assert scores.unigram_nll == pytest.approx(math.log(VOCABULARY), abs=1e-12)
    assert (scores.num_tokens, scores.num_clips, scores.shuffled_share) == (4 * 24, 4, 1.0)
    ties = torch.cat([batch.indices.flatten() for batch in clips()])  # of two equal logits the first is taken
    assert scores.accuracy == pytest.approx(float((ties % 2 == 0).double().mean()))


def test_a_predictor_that_knows_frequencies_alone_is_the_baseline() -> None:
    """Its loss is the baseline's own, whatever the captions; so the comparison is between equals."""
    measured = clips()
    baseline = unigram((batch.indices for batch in measured), VOCABULARY)

    def frequencies(indices: Tensor, captions: Sequence[str]) -> Tensor:
        return baseline.expand(len(captions), indices[0].numel(), -1) + 3.0

    scores = next_token_scores(frequencies, measured, baseline)
    assert scores.nll == pytest.approx(scores.unigram_nll, abs=1e-12)
    assert scores.shuffled_nll == pytest.approx(scores.nll, abs=1e-12)


def test_batches_do_not_matter() -> None:
    """One clip at a time gives the same numbers: captions are shuffled over all of them."""
    together, apart = clips(batch_size=4)[0], []
    for row in range(4):
        apart.append(TokenClips(together.indices[row : row + 1], together.captions[row : row + 1]))
    baseline = unigram([together.indices], VOCABULARY)
    one, many = (next_token_scores(knows_captions, batches, baseline) for batches in ([together], apart))
    for name in ("nll", "unigram_nll", "shuffled_nll", "accuracy", "num_tokens", "num_clips", "shuffled_share"):
        assert getattr(one, name) == pytest.approx(getattr(many, name)), name


def test_frequencies_are_counts_and_one() -> None:
    """Ids 0, 0, 2 out of 4: (3, 1, 2, 1) of 7. Probabilities sum to 1, and an id never seen has one."""
    found = unigram([torch.tensor([[[[0, 0]]]]), torch.tensor([[[[2]]]])], 4)
    torch.testing.assert_close(found.exp(), torch.tensor([3, 1, 2, 1], dtype=torch.float64) / 7)
    with pytest.raises(DataError, match="id 4 among the tokens of training clips, and the vocabulary has 4, 0 to 3"):
        unigram([torch.tensor([[[[4]]]])], 4)


@pytest.mark.parametrize("captions", ["ab", "aabb", "abcabca", "aaabbc", "cababacbb", "zyxwv", "aabbbaab"])
def test_no_clip_keeps_its_caption(captions: str) -> None:
    """No caption has more than half of the clips: all change, and it is a permutation; again the same."""
    found = shuffled(list(captions))
    assert Counter(found) == Counter(captions)
    assert all(own != other for own, other in zip(captions, found, strict=True))
    assert found == shuffled(list(captions))


def test_a_caption_of_more_than_half_the_clips_stays_with_some() -> None:
    """Of `a a a b` two clips can change. One caption for all: none, which the share says."""
    found = shuffled(list("aaab"))
    assert Counter(found) == Counter("aaab") and sum(own != other for own, other in zip("aaab", found, strict=True)) == 2
    scores = next_token_scores(knows_captions, clips(["a", "a"]), torch.zeros(VOCABULARY).double())
    assert scores.shuffled_share == 0 and scores.shuffled_nll == scores.nll


def test_no_clips() -> None:
    with pytest.raises(DataError, match="no clips to predict"):
        next_token_scores(knows_captions, [], torch.zeros(VOCABULARY))
