"""How well an autoregressive model predicts the tokens of clips: against their frequencies, and under other captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from videofm.errors import DataError

Predict = Callable[[Tensor, Sequence[str]], Tensor]
"""Indices `(B, T, H, W)` and B captions -> logits `(B, L, V)`, each of a token from those before it, in raster order."""


@dataclass(frozen=True)
class TokenClips:
    """Clips of one size: `indices` `(B, T, H, W)` int64, and their captions."""

    indices: Tensor
    captions: list[str]


@dataclass(frozen=True)
class NextTokenScores:
    """Means over all tokens, in nats but for `accuracy`, the share of tokens that are the most likely one.

    Attributes:
        nll: negative log likelihood of a token.
        unigram_nll: that of a model which knows only how often each token occurs in training clips.
        shuffled_nll: that of the model when clips have each other's captions.
        accuracy: of the model, with the right captions.
        num_tokens, num_clips: what the means are over.
        shuffled_share: share of the clips whose caption the shuffle has changed; 1 unless one caption has more than half of
            the clips.
    """

    nll: float
    unigram_nll: float
    shuffled_nll: float
    accuracy: float
    num_tokens: int
    num_clips: int
    shuffled_share: float


def unigram(indices: Iterable[Tensor], vocab_size: int) -> Tensor:
    """Log probability of each token `(V,)` float64, of how often it occurs in `indices`, with one more of each (Laplace).

    Raises:
        DataError: an id that the vocabulary does not have.
    """
    counts = torch.ones(vocab_size, dtype=torch.float64)
    for part in indices:
        found = torch.bincount(part.flatten().cpu())
        if len(found) > vocab_size:
            raise DataError(
                f"id {len(found) - 1} among the tokens of training clips, and the vocabulary has {vocab_size}, 0 to "
                f"{vocab_size - 1}: these tokens are of another tokenizer."
            )
        counts[: len(found)] += found
    return (counts / counts.sum()).log()


def shuffled(captions: Sequence[str]) -> list[str]:
    """Each caption given to another clip, always in the same way, so that no clip keeps the text it had if that is possible.

    Captions are sorted and rotated by the number of times that the most frequent one occurs: a run of equal captions of that
    length or less lands outside of itself unless it makes up more than half of all.
    """
    order = sorted(range(len(captions)), key=lambda clip: captions[clip])
    step = max(Counter(captions).values(), default=0)
    found = list(captions)
    for place, clip in enumerate(order):
        found[clip] = captions[order[(place + step) % len(order)]]
    return found


@torch.no_grad()
def next_token_scores(predict: Predict, clips: Sequence[TokenClips], baseline: Tensor) -> NextTokenScores:
    """Predict every token of `clips` with their captions and with shuffled ones.

    Args:
        predict: the model.
        clips: in batches.
        baseline: log probabilities `(V,)` of `unigram`.

    Raises:
        DataError: there is no clip.
    """
    captions = [caption for batch in clips for caption in batch.captions]
    if not captions:
        raise DataError("there are no clips to predict the tokens of.")
    others = shuffled(captions)
    nll = shuffled_nll = unigram_nll = correct = 0.0
    num_tokens = first = 0
    for batch in clips:
        targets = batch.indices.flatten(1)  # (B, T, H, W) -> (B, L), in raster order
        last = first + len(batch.captions)
        logits = predict(batch.indices, batch.captions)
        nll += _total(logits, targets)
        correct += float((logits.argmax(dim=2) == targets).sum())
        shuffled_nll += _total(predict(batch.indices, others[first:last]), targets)
        unigram_nll -= float(baseline[targets.cpu()].sum())
        num_tokens, first = num_tokens + targets.numel(), last
    changed = sum(own != other for own, other in zip(captions, others, strict=True))
    return NextTokenScores(
        nll=nll / num_tokens,
        unigram_nll=unigram_nll / num_tokens,
        shuffled_nll=shuffled_nll / num_tokens,
        accuracy=correct / num_tokens,
        num_tokens=num_tokens,
        num_clips=len(captions),
        shuffled_share=changed / len(captions),
    )


def _total(logits: Tensor, targets: Tensor) -> float:
    """Sum of the negative log likelihoods, in nats."""
    return float(cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum"))
