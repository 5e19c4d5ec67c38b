"""Tokens one after another: an autoregressive transformer draws the indices of a video, in raster order t, h, w.

The numbers that decide a token are keyed by (seed of the video, position in the window) and by nothing else, so neither the
batch nor the cache changes what is drawn.

Tokens alone go on to any length in windows (`continue_tokens`, `continue_windows`): each begins with the last token frames of
the one before, under the same or another prompt, with a cache of its own, and with `continue_token`. These two are for programs
that want tokens without pixels; no stage calls them. A long video (`sampling.pipeline`) encodes its last frames again for the
next window, so that its tokens are those of the pixels that were made: it calls `sample_tokens`, with `start_token`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from videofm.errors import ConfigError, DataError
from videofm.sampling.guidance import cfg, joined
from videofm.sampling.noise import derived_seed
from videofm.sampling.windows import Window, spans
from videofm.types import Conditioning

Shape = tuple[int, int, int]
"""Token frames, rows and columns of a window."""
Text = tuple[Conditioning, Conditioning | None]
"""The prompts of a batch, and what guidance moves away from (None where there is no guidance)."""
Start = str | Sequence[str]
"""`"start"` where a window begins a video, `"continue"` where it begins inside one; for all videos, or one for each."""
NextLogits = Callable[[Tensor], Tensor]
"""Tokens `(B, n)` that come next in the input -> logits `(B, V)` of what follows the last of them."""


@dataclass(frozen=True)
class TokenSampling:
    """How a token is drawn from logits.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens are drawn, of equal ones those with lower ids; 0 keeps all.
        top_p: only the most likely tokens are drawn that together reach this probability (nucleus sampling, Holtzman et al.
            2020, arXiv 1904.09751), of those that `top_k` keeps; 1 keeps all.
        guidance_scale: w of classifier-free guidance on logits, `negative + w (positive - negative)`; 1 is off and costs no
            second evaluation.

    Raises:
        ConfigError: a number out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "0 (the most likely token) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, and 1 (all tokens) at most"),
            "guidance_scale": (0 <= self.guidance_scale < math.inf, "1 (off), or another number from 0 on"),
        }
        for name, (fits, rule) in rules.items():
            if not fits:
                raise ConfigError(f"{name} is {getattr(self, name)}; give {rule}.")


@torch.no_grad()
def sample_tokens(
    ar: nn.Module,
    text: Conditioning,
    negative: Conditioning | None,
    shape: Shape,
    seeds: Sequence[int],
    settings: TokenSampling = TokenSampling(),
    prefix: Tensor | None = None,
    start: Start = "start",
    use_cache: bool = True,
    on_step: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Indices `(B, T, H, W)` int64 of one window, on the device of `ar`.

    Args:
        ar: an `ar/transformer`, in eval mode.
        text: the prompts, B of them.
        negative: what guidance moves away from, B of them; read where `settings.guidance_scale` is not 1.
        shape: (T, H, W) of the window in tokens.
        seeds: B generator seeds; a video depends on its own, whatever the batch.
        settings: how tokens are drawn.
        prefix: indices `(B, t, H, W)` of the first t token frames, which come back as they are.
        start: whether the window begins a video or lies inside one.
        use_cache: keep keys and values; False computes the whole sequence for every token (slow: the reference).
        on_step: called with the guided logits `(B, V)` of each position before it is drawn; may raise to stop.

    Raises:
        ConfigError: a prefix, seeds or texts that do not fit the window, guidance without `negative`, or a `top_k` beyond the
            vocabulary.
        DataError: ids in `prefix` that the vocabulary does not have, or more rows or columns than `ar` knows.
    """
    given = _checked(ar, text, negative, shape, seeds, settings, prefix)
    indices = torch.zeros(len(seeds), *shape, dtype=torch.int64, device=given.device)
    indices[:, : given.shape[1]] = given
    inputs = ar.inputs_of(indices, start)
    guided = settings.guidance_scale != 1.0
    texts = joined([negative, text]) if guided and negative is not None else text
    next_logits = (_cached if use_cache else _whole)(ar, texts, inputs, 1 + guided)
    flat = indices.flatten(1)  # (B, T, H, W) -> (B, L), in raster order
    first = given[0].numel()
    new = inputs.tokens[:, : first + 1]  # the token before each position up to the first that is drawn
    for position in range(first, flat.shape[1]):
        logits = next_logits(new).double()
        if guided:
            without, with_prompt = logits.chunk(2)
            logits = cfg(without, with_prompt, settings.guidance_scale)
        if on_step is not None:
            on_step(logits)
        flat[:, position] = draw(logits, seeds, position, settings)
        new = flat[:, position : position + 1]
    return flat.unflatten(1, shape)


def continue_tokens(
    ar: nn.Module,
    texts: Sequence[Text],
    shape: Shape,
    num_token_frames: int,
    prefix_frames: int,
    seeds: Sequence[int],
    settings: TokenSampling = TokenSampling(),
    prefix: Tensor | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Indices `(B, num_token_frames, H, W)` int64 of videos of any length; takes what `continue_windows` takes."""
    windows = continue_windows(ar, texts, shape, num_token_frames, prefix_frames, seeds, settings, prefix, use_cache)
    return torch.cat(list(windows), dim=1)


def continue_windows(
    ar: nn.Module,
    texts: Sequence[Text],
    shape: Shape,
    num_token_frames: int,
    prefix_frames: int,
    seeds: Sequence[int],
    settings: TokenSampling = TokenSampling(),
    prefix: Tensor | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """The new indices `(B, t, H, W)` of window after window: with k = `prefix_frames`, T frames in the first one, T - k in each
    that follows, and what is left in the last. What is kept from window to window are k token frames and nothing else.

    Args:
        ar: an `ar/transformer`, in eval mode.
        texts: prompts and negatives of each window, or one pair for all of them.
        shape: (T, H, W) of a window, in tokens.
        num_token_frames: of the whole video.
        prefix_frames: token frames at the end of a window that begin the next one.
        seeds: B generator seeds; those of later windows are derived from them.
        settings: how tokens are drawn.
        prefix: the first token frames of the video, as in `sample_tokens`.
        use_cache: as in `sample_tokens`.

    Raises:
        ConfigError: another number of texts than of windows, a prompt that changes between windows that share no frames, or
            windows that do not go on.
        DataError: as in `sample_tokens`.
    """
    if prefix_frames == 0 and len(texts) > 1:
        raise ConfigError(
            f"{len(texts)} prompts with prefix_frames 0: a prompt changes from window to window, and a window goes on from the "
            "last token frames of the one before. Give prefix_frames of at least 1, or one prompt."
        )
    windows = spans(num_token_frames, Window(shape[0], prefix_frames))
    if len(texts) not in (1, len(windows)):
        raise ConfigError(
            f"{len(texts)} prompts for {len(windows)} windows: {num_token_frames} token frames in windows of {shape[0]} that "
            f"share {prefix_frames} take {len(windows)}; give one prompt for each, or one for all."
        )
    for number, frames in enumerate(windows):
        text, negative = texts[number if len(texts) > 1 else 0]
        own = [derived_seed(seed, f"window:{number}") for seed in seeds] if number else list(seeds)
        size = (len(frames), *shape[1:])
        start = "continue" if number else "start"
        made = sample_tokens(ar, text, negative, size, own, settings, prefix, start, use_cache)
        yield made[:, prefix_frames:] if number else made
        prefix = made[:, made.shape[1] - prefix_frames :].clone()


def draw(logits: Tensor, seeds: Sequence[int], position: int, settings: TokenSampling) -> Tensor:
    """Token ids `(B,)` for logits `(B, V)`, drawn for the position of a window with one number for each video and id.

    The largest of `log p + gumbel` is a sample of p (Gumbel-max). A rounding error of p moves a draw with a probability of its
    own size, where one number against cumulative sums would add up the errors of all their borders.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=1)
    scaled = (logits.double() - logits.amax(dim=1, keepdim=True)) / settings.temperature  # at most 0: nothing overflows
    kept = filtered(scaled, settings.top_k, settings.top_p)
    return (kept + _gumbel(seeds, position, logits.shape[1]).to(logits.device)).argmax(dim=1)


def filtered(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits `(B, V)` with those at minus infinity that are not to be drawn; see `TokenSampling`."""
    if top_k == 0 and top_p == 1.0:
        return logits
    ordered, ids = logits.sort(dim=1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -math.inf
    if top_p < 1.0:
        probabilities = ordered.softmax(dim=1)
        before = probabilities.cumsum(dim=1) - probabilities  # 0 for the first, which always stays
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(1, ids, ordered)


def _gumbel(seeds: Sequence[int], position: int, vocab_size: int) -> Tensor:
    """Standard Gumbel numbers `(B, V)` float64 on the CPU."""
    generators = [torch.Generator().manual_seed(derived_seed(seed, f"token:{position}")) for seed in seeds]
    uniform = torch.stack([torch.rand(vocab_size, generator=one, dtype=torch.float64) for one in generators])
    return -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()


def _cached(ar: Any, text: Conditioning, inputs: Any, copies: int) -> NextLogits:
    """Logits of one position after another; what has passed is a cache of keys and values."""
    positions, cells = inputs.positions.repeat(copies, 1), inputs.cells.repeat(copies, 1, 1)
    cache, seen = ar.empty_cache(text), 0

    def next_logits(tokens: Tensor) -> Tensor:
        nonlocal cache, seen
        span = slice(seen, seen + tokens.shape[1])
        found = ar.forward_cached(tokens.repeat(copies, 1), positions[:, span], cells[:, :, span], None, cache)
        cache, seen = found.cache, span.stop
        logits: Tensor = found.logits[:, -1]
        return logits

    return next_logits


def _whole(ar: Any, text: Conditioning, inputs: Any, copies: int) -> NextLogits:
    """The same logits, of the whole sequence every time."""
    positions, cells = inputs.positions.repeat(copies, 1), inputs.cells.repeat(copies, 1, 1)
    passed = inputs.tokens[:, :0]

    def next_logits(tokens: Tensor) -> Tensor:
        nonlocal passed
        passed = torch.cat([passed, tokens], dim=1)
        end = passed.shape[1]
        logits: Tensor = ar(passed.repeat(copies, 1), positions[:, :end], cells[:, :, :end], text)[:, -1]
        return logits

    return next_logits


def _checked(
    ar: nn.Module,
    text: Conditioning,
    negative: Conditioning | None,
    shape: Shape,
    seeds: Sequence[int],
    settings: TokenSampling,
    prefix: Tensor | None,
) -> Tensor:
    """What is given, `(B, t, H, W)` on the device of `ar`, with t = 0 without a prefix; what does not fit is refused."""
    vocab_size: int = ar.config.vocab_size
    if min(shape) < 1:
        raise ConfigError(f"a window of {shape} tokens (frames, rows, columns) holds none: each is at least 1.")
    counts = {"seeds": len(seeds), "texts": len(text.mask)}
    if settings.guidance_scale != 1.0:
        if negative is None:
            raise ConfigError(
                f"guidance_scale is {settings.guidance_scale:g}, and there is no negative text: give one, such as the empty "
                "caption, or set the scale to 1."
            )
        counts["negative texts"] = len(negative.mask)
    if prefix is not None:
        counts["prefixes"] = len(prefix)
    if len(set(counts.values())) > 1 or not seeds:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ConfigError(f"{found}: there is one of each for every video, and at least one video.")
    if settings.top_k > vocab_size:
        raise ConfigError(f"top_k is {settings.top_k}, and the vocabulary has {vocab_size} tokens; 0 keeps all.")
    device = next(ar.parameters()).device
    if prefix is None:
        return torch.zeros(len(seeds), 0, *shape[1:], dtype=torch.int64, device=device)
    if prefix.ndim != 4 or tuple(prefix.shape[2:]) != shape[1:] or prefix.shape[1] > shape[0]:
        raise ConfigError(
            f"a prefix of shape {tuple(prefix.shape)} does not begin a window of {shape} tokens: it is (videos, frames, rows, "
            f"columns), with at most {shape[0]} frames of {shape[1]}x{shape[2]}."
        )
    if prefix.numel() and not 0 <= int(prefix.min()) <= int(prefix.max()) < vocab_size:
        raise DataError(
            f"ids {int(prefix.min())} to {int(prefix.max())} in a prefix, and the vocabulary has {vocab_size} tokens, 0 to "
            f"{vocab_size - 1}: these tokens are of another tokenizer than the model was trained on."
        )
    return prefix.to(device, torch.int64)
