"""Next-token prediction: its formula, its windows, what it refuses, and that it learns a grammar (spec F-B 4, 5)."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from videofm import models
from videofm.config.next_token import NextTokenConfig
from videofm.errors import ConfigError, DataError
from videofm.models.flops import flops_per_sample
from videofm.objectives.next_token import NextTokenObjective, token_errors
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch, Conditioning

VOCAB, SHAPE, LENGTH = 12, (4, 2, 3), 24
CAPTIONS = ["a", "bb", "ccc", ""]
NUM_TEXT, CHANNELS = 3, 16


class Text(torch.nn.Module):
    """A text encoder of captions that are counted by their length: a fixed vector, and padding of another number."""

    spec_name = "text/t5"

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"width": CHANNELS})()
        self.table = torch.randn(8, CHANNELS, generator=torch.Generator().manual_seed(0))

    def encode(self, captions):
        rows = torch.tensor([len(caption) for caption in captions])
        mask = (torch.arange(NUM_TEXT) < 2).expand(len(captions), -1)
        return Conditioning(self.table[rows][:, None].repeat(1, NUM_TEXT, 1), mask, longest=2)

    def cuts(self, captions):
        return {"text": [len(caption) > 2 for caption in captions]}


class Tokenizer(torch.nn.Module):
    """What the objective asks of a tokenizer."""

    vocab_size, num_books = VOCAB, 1


def make(text="cross_attention", **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "num_layers": 2, "width": 64, "num_heads": 4, "caption_channels": CHANNELS}
    ar = models.build("ar/transformer", "tiny", text=text, **sizes)
    objective = NextTokenObjective(NextTokenConfig(kind="next_token", **options))
    return objective, {"ar": ar, "text_encoder": Text(), "tokenizer": Tokenizer()}


def make_batch(indices, captions=CAPTIONS, step=0):
    ids = [f"clip-{number}" for number in range(len(captions))]
    return Batch(torch.zeros(len(ids), 3, 0, 0, 0), list(captions), torch.ones(len(ids)), ids, step, len(ids), indices=indices)


def rng_of(batch):
    return KeyedRng(0, batch.step, batch.sample_ids)


def random_indices(size=4, num_frames=SHAPE[0]):
    return torch.randint(0, VOCAB, (size, num_frames, *SHAPE[1:]), generator=torch.Generator().manual_seed(3))


# --- the loss ----------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_pytorch_and_the_z_term():
    """With smoothing e and weight w: torch's smoothed cross-entropy plus w times the mean square of log Z; means over a
    sample's tokens, sums over samples."""
    objective, built = make(caption_dropout=0.0, label_smoothing=0.2, z_loss=0.3)
    batch = make_batch(random_indices())
    found = objective.loss(built, batch, rng_of(batch), "train")
    inputs = built["ar"].inputs_of(batch.indices)
    logits = built["ar"](inputs.tokens, inputs.positions, inputs.cells, built["text_encoder"].encode(CAPTIONS))
    plain = cross_entropy(logits.transpose(1, 2), inputs.targets, reduction="none")  # (B, V, L) -> (B, L)
    smooth = cross_entropy(logits.transpose(1, 2), inputs.targets, reduction="none", label_smoothing=0.2)
    squares = logits.logsumexp(dim=2).square()
    wanted = {
        "nll": plain.mean(dim=1).sum(),
        "z_loss": squares.mean(dim=1).sum(),
        "loss": (smooth + 0.3 * squares).mean(dim=1).sum(),
        "perplexity": plain.mean(dim=1).exp().sum(),
        "accuracy": (logits.argmax(dim=2) == inputs.targets).float().mean(dim=1).sum(),
    }
    torch.testing.assert_close(found.total, wanted["loss"], rtol=1e-5, atol=0)
    for name, value in wanted.items():
        torch.testing.assert_close(found.metrics[name], value, rtol=1e-5, atol=0)
        assert not found.metrics[name].requires_grad


def test_what_a_step_costs_is_counted():
    """Four samples of 24 tokens, texts of two tokens and one of padding, one caption of more than two letters."""
    objective, built = make(caption_dropout=0.0)
    batch = make_batch(random_indices())
    metrics = objective.loss(built, batch, rng_of(batch), "train").metrics
    assert metrics["tokens"] == 4 * LENGTH and metrics["text_tokens"] == 4 * NUM_TEXT
    assert metrics["flops"] == 4 * flops_per_sample(built["ar"], LENGTH, NUM_TEXT)
    assert float(metrics["padding_share"]) == pytest.approx(4 / 3) and metrics["cut_text"] == 1


def test_half_of_a_batch_and_the_other_make_the_whole():
    """Sums over samples, draws keyed by sample: how samples are spread changes nothing."""
    objective, built = make(caption_dropout=0.5, window=2)
    batch = make_batch(random_indices())
    halves = [
        replace(batch, captions=CAPTIONS[rows], sample_ids=batch.sample_ids[rows], indices=batch.indices[rows])
        for rows in (slice(0, 1), slice(1, 4))
    ]
    whole = objective.loss(built, batch, rng_of(batch), "train")
    parts = [objective.loss(built, half, rng_of(half), "train") for half in halves]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, rtol=1e-6, atol=0)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), value, rtol=1e-5, atol=0)


def test_dropped_captions_are_empty_ones():
    objective, built = make(caption_dropout=1.0)
    plain, _ = make(caption_dropout=0.0)
    batch, empty = make_batch(random_indices()), make_batch(random_indices(), [""] * 4)
    dropped = objective.loss(built, batch, rng_of(batch), "train").total
    assert torch.equal(dropped, plain.loss(built, empty, rng_of(empty), "train").total)
    assert not torch.equal(dropped, plain.loss(built, batch, rng_of(batch), "train").total)


def test_text_that_came_with_the_batch_is_that_of_the_encoder():
    """`data.cache.mode: tokens_text`: a row for each caption, and last that of the empty one."""
    objective, built = make(caption_dropout=0.5)
    batch = make_batch(random_indices())
    stored = built["text_encoder"].encode([*CAPTIONS, ""]).embeddings
    cached = replace(batch, text=stored, text_lengths=[2] * 5)
    totals = [objective.loss(built, each, rng_of(each), "train").total for each in (batch, cached)]
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-6, atol=0)


# --- windows -----------------------------------------------------------------------------------------------------------------


def test_windows_are_cuts_and_say_where_they_begin():
    """Each is a run of its own clip's frames; it begins the clip in `first_window_share` of the draws, else anywhere later."""
    objective, _ = make(window=2, first_window_share=0.25)
    frames = torch.arange(5).view(1, 5, 1, 1) + 100 * torch.arange(4).view(4, 1, 1, 1)  # the clip's number, the frame's
    places = []
    for step in range(200):
        batch = make_batch(frames, step=step)
        windows = objective.draw_windows(frames, rng_of(batch))
        firsts = windows.indices[:, 0, 0, 0] - 100 * torch.arange(4)
        assert torch.equal(windows.indices[:, 1, 0, 0], windows.indices[:, 0, 0, 0] + 1)
        assert windows.starts == ["continue" if first else "start" for first in firsts.tolist()]
        places += firsts.tolist()
    counts = torch.tensor(places).bincount(minlength=4) / len(places)
    assert len(counts) == 4  # 5 frames have windows of 2 at 0, 1, 2 and 3
    torch.testing.assert_close(counts, torch.full((4,), 0.25), rtol=0, atol=0.05)  # 0.015 is a standard deviation of 800


@pytest.mark.parametrize("window", [None, 4, 9])
def test_clips_that_are_no_longer_than_the_window_stay_whole(window):
    objective, _ = make(window=window)
    indices = random_indices()
    windows = objective.draw_windows(indices, rng_of(make_batch(indices)))
    assert torch.equal(windows.indices, indices) and windows.starts == ["start"] * 4


def test_a_window_is_trained_as_it_is_sampled():
    """Positions and rows count from the window's own first token, after the token that says how it begins."""
    objective, built = make(window=2, first_window_share=0.0, caption_dropout=0.0)
    batch = make_batch(random_indices())
    windows = objective.draw_windows(batch.indices, rng_of(batch))
    assert windows.starts == ["continue"] * 4
    inputs = built["ar"].inputs_of(windows.indices, "continue")
    logits = built["ar"](inputs.tokens, inputs.positions, inputs.cells, built["text_encoder"].encode(CAPTIONS))
    wanted = cross_entropy(logits.transpose(1, 2), inputs.targets, reduction="none").mean(dim=1).sum()
    found = objective.loss(built, batch, rng_of(batch), "train")
    torch.testing.assert_close(found.total, wanted, rtol=1e-5, atol=0)
    assert found.metrics["first_windows"] == 0 and found.metrics["tokens"] == 4 * 12


# --- refusals ----------------------------------------------------------------------------------------------------------------


def test_a_batch_without_tokens():
    objective, built = make()
    batch = make_batch(None)
    with pytest.raises(ConfigError, match=r"next_token trains on tokens.* data\.cache\.mode to tokens \(or tokens_text\)"):
        objective.loss(built, batch, rng_of(batch), "train")


@pytest.mark.parametrize("wrong", [-1, VOCAB, 900])
def test_ids_out_of_range(wrong):
    objective, built = make()
    indices = random_indices()
    indices[2, 1, 0, 2] = wrong
    batch = make_batch(indices)
    with pytest.raises(DataError, match=rf"token ids from .*{wrong}.* vocabulary of 12, ids 0 to 11: .* another tokenizer's"):
        objective.loss(built, batch, rng_of(batch), "train")


def test_a_hopeless_prediction_has_a_finite_perplexity():
    """Logits a thousand times too sure: their nll is far above 80, where exp would leave float32."""
    objective, built = make()
    batch = make_batch(random_indices())
    with torch.no_grad():
        for name, value in built["ar"].named_parameters():
            if name.startswith(("head", "token_embed")):
                value.mul_(1e4)
    metrics = objective.loss(built, batch, rng_of(batch), "train").metrics
    assert metrics["nll"] / len(batch.captions) > 100
    assert metrics["perplexity"].isfinite() and metrics["perplexity"] > 1e30


def test_models_that_do_not_fit():
    objective, built = make()
    objective.check(built)
    several, other, narrow, two, fresh = Tokenizer(), Tokenizer(), Text(), Text(), Tokenizer()
    fresh.quantizer = torch.nn.Module()
    fresh.quantizer.is_ready = False
    several.num_books, other.vocab_size, narrow.config.width, two.config.clip_width = 3, 16, 8, 4
    for role, model, message in (
        ("tokenizer", fresh, "codebook of role tokenizer has not started"),
        ("tokenizer", several, "the tokenizer has 3 codebooks: .* one token a place"),
        ("tokenizer", other, r"vocabulary of 12, the tokenizer one of 16: set models\.ar\.overrides\.vocab_size to 16"),
        ("text_encoder", narrow, r"takes text of 16 channels, .* gives 8: set models\.ar\.overrides\.caption_channels to 8"),
        ("text_encoder", two, "text/t5 gives the text of two encoders"),
    ):
        with pytest.raises(ConfigError, match=message):
            objective.check({**built, role: model})


def test_a_share_of_cuts_without_cuts():
    NextTokenConfig(kind="next_token", window=2, first_window_share=0.5)
    NextTokenConfig(kind="next_token", first_window_share=0.25)  # the default, as a resolved config has it
    with pytest.raises(ValueError, match="first_window_share 0.5 without `window`: .* Give `window`, or leave it out"):
        NextTokenConfig(kind="next_token", first_window_share=0.5)


def test_what_is_trained():
    assert make()[0].phases == {"train": ("ar",)}
    assert make(train_text_encoder=True)[0].phases == {"train": ("ar", "text_encoder")}


# --- learning ----------------------------------------------------------------------------------------------------------------


def grammar(size, generator):
    """Clips of a language: the first frame is drawn, and a token of a later one is the token of its cell one frame before, plus
    the length of the caption, plus its row, all modulo V. So a token needs the frame before, the text and its place."""
    captions = [CAPTIONS[number] for number in torch.randint(0, 4, (size,), generator=generator).tolist()]
    steps = torch.tensor([len(caption) for caption in captions])[:, None, None] + torch.arange(SHAPE[1])[None, :, None]
    frames = [torch.randint(0, VOCAB, (size, *SHAPE[1:]), generator=generator)]
    while len(frames) < SHAPE[0]:
        frames.append((frames[-1] + steps) % VOCAB)
    return torch.stack(frames, dim=1), captions


@pytest.mark.parametrize("text", ["cross_attention", "prefix"])
def test_it_learns_a_grammar_and_listens_to_the_text(text):
    """After 100 steps more than 95 % of the tokens that the grammar fixes are the likeliest, on clips that were never seen.

    With captions of other clips the loss rises by more than log V, and accuracy falls below a half (F-B 5).
    """
    generator = torch.Generator().manual_seed(7)
    objective, built = make(text, caption_dropout=0.0)
    optimizer = torch.optim.AdamW(built["ar"].parameters(), lr=4e-3, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=100, pct_start=0.1)
    for step in range(100):
        batch = make_batch(*grammar(32, generator), step)
        loss = objective.loss(built, batch, rng_of(batch), "train")
        optimizer.zero_grad()
        (loss.total / 32).backward()
        optimizer.step()
        schedule.step()
    indices, captions = grammar(64, generator)
    windows = objective.draw_windows(indices, rng_of(make_batch(indices, captions)))
    shuffled = ["a" if caption != "a" else "bb" for caption in captions]
    with torch.no_grad():
        told, lied = (token_errors(built["ar"], windows, built["text_encoder"].encode(texts)) for texts in (captions, shuffled))
    fixed = slice(SHAPE[1] * SHAPE[2], None)
    accuracy = [float(errors.hit[:, fixed].mean()) for errors in (told, lied)]
    losses = [float(errors.nll[:, fixed].mean()) for errors in (told, lied)]
    assert accuracy[0] > 0.95 and accuracy[1] < 0.5, accuracy
    assert losses[1] > losses[0] + math.log(VOCAB), losses
