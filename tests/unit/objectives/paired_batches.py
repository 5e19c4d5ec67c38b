"""Pairs of clips and models small enough to compute a loss of pairs by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from videofm.ops.rope import video_coordinates
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch, Compression, Conditioning, Posterior

SEED, STEP = 3, 5
PIXELS, FRAMES = 8, 5
"""Of a clip: 8 x 8 pixels, 5 frames. `PlainVae` makes of it 3 latent frames of 2 x 2 cells with 3 channels."""


class PlainVae(nn.Module):
    """Latents are every fourth pixel of every second frame, (z - 0.25) / 2; the posterior has a standard deviation of 0.1."""

    compression = Compression(2, 4, 4)
    latent_statistics = SimpleNamespace(hash="statistics")

    def encode(self, video: Tensor) -> Posterior:
        mean = video[:, :, ::2, ::4, ::4]
        return Posterior(mean, torch.full_like(mean, 0.01).log())

    def normalize(self, latents: Tensor) -> Tensor:
        return (latents - 0.25) / 2


class CaptionLengths(nn.Module):
    """Embeds a caption as its length."""

    def encode(self, prompts: list[str]) -> Conditioning:
        lengths = torch.tensor([[[float(len(prompt))]] for prompt in prompts])
        return Conditioning(lengths, torch.ones(len(prompts), 1, dtype=torch.bool))

    def cuts(self, prompts: list[str]) -> dict[str, list[bool]]:
        return {"text": [len(prompt) > 9 for prompt in prompts]}


class Coordinates(nn.Module):
    """What every stand-in has: coordinates, and what it was asked last."""

    def coordinates(
        self, shape: tuple[int, int, int], fps: Tensor, compression: Compression, causal_fix: bool = False
    ) -> Tensor:
        return video_coordinates(shape, fps, compression, causal_fix)

    def forward(self, tokens: Tensor, sigma: Tensor, text: Conditioning, coordinates: Tensor) -> Tensor:
        self.seen = (tokens, sigma, text)
        return self.answer(tokens, sigma, text)

    def answer(self, tokens: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        raise NotImplementedError


class PerToken(Coordinates):
    """A velocity that is a function of each token, of the noise level and of the text alone, wherever the token lies."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 3, generator=draw))
        self.level = nn.Parameter(torch.randn(3, generator=draw))
        self.text = nn.Parameter(0.1 * torch.randn(3, generator=draw))

    def answer(self, tokens: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        linear = tokens @ self.weight + sigma[:, None, None] * self.level + text.embeddings[:, :1] * self.text
        return torch.tanh(linear)


class Answer(Coordinates):
    """The same velocity for every clip, which is its parameter `(L, C)`: clips share the whole map to outputs."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def answer(self, tokens: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        return self.value.expand(len(tokens), -1, -1)


class FixedReference:
    """A reference that is another model, and keeps what it was asked."""

    roles: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def draws(self, rng: Any, step: int) -> Any:
        return rng

    @torch.no_grad()
    def errors(self, models: Any, batch: Batch, compute: Any) -> Tensor:
        return compute(self.model)

    def check(self, models: Any) -> None:
        """Any model will do."""


def pairs(num_pairs: int = 3, seed: int = 0, **fields: Any) -> Batch:
    """A micro-batch of pairs of random clips with weights 1."""
    draw = torch.Generator().manual_seed(seed)
    video = torch.rand(2 * num_pairs, 3, FRAMES, PIXELS, PIXELS, generator=draw) * 2 - 1
    captions = [f"clip {'x' * index}" for index in range(num_pairs)] * 2
    ids = [f"pair{index}" for index in range(num_pairs)] * 2
    held: dict[str, Any] = {"pair_weights": torch.ones(num_pairs), "pair_ties": torch.zeros(num_pairs, dtype=torch.bool)}
    return Batch(video, captions, torch.full((2 * num_pairs,), 24.0), ids, STEP, num_pairs, **held | fields)


def swapped(batch: Batch) -> Batch:
    """The pairs with winner and loser changed over."""
    winner, loser = batch.video.chunk(2)
    return replace(batch, video=torch.cat([loser, winner]))


def roles(dit: nn.Module) -> dict[str, nn.Module]:
    return {"dit": dit, "vae": PlainVae(), "text_encoder": CaptionLengths()}


def rng_of(batch: Batch) -> KeyedRng:
    return KeyedRng(SEED, batch.step, batch.sample_ids)
