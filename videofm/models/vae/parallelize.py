"""Encoding and decoding one clip on several ranks, each some of its frames (spec sequence-parallel, 1.8): what VAEs share.

Every context rank calls `encode` and `decode` with the whole input and gets the whole result; the result, and gradients of the
input, are what one device gives. In between a rank runs the network on its own latent frames, and the frames that belong to
them, as on a chunk of a stream whose cache is on the other ranks. Convolutions get halos, norms over the clip statistics,
attention among frames all of them. Parameters get a part of their gradient on each rank: SUM it over the context group.

All context ranks have to call, with equal inputs and generators drawn alike. Streams (`encode_stream`) use no other rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from videofm.models.vae.base import VideoVAE
from videofm.ops.causal_conv import CausalConv3d, ChunkCache, Surrounded
from videofm.parallel.halo import ContextRanks, Span, Spans, scale_gradient, spans_of
from videofm.types import Posterior

Layouts = dict[tuple[nn.Module, int], Spans]
"""What the ranks hold of the input of a layer, by the layer and the latent frames of the clip."""


def split_frames(model: VideoVAE, mesh: Any) -> None:
    """Spread the frames of each clip over the context ranks of `mesh`, if there are several; None is one process."""
    if (ranks := context_ranks(mesh)) is not None:
        model.split = FrameSplit(ranks)


def context_ranks(mesh: Any) -> ContextRanks | None:
    """The context ranks of `mesh`, or None for a single one. Tensor ranks all do the same: weights are whole on each."""
    return ContextRanks(mesh.context_group) if getattr(mesh, "context_degree", 1) > 1 else None


def latent_spans(num_latent_frames: int, degree: int) -> Spans | None:
    """The latent frames of each rank; None when there are fewer than ranks.

    The first latent frame stands for one frame, every other for `time`: rank 0 has it on top of an even share of the others.
    """
    each, surplus = divmod(num_latent_frames - 1, degree)
    counts = [each + (rank >= degree - surplus) + (rank == 0) for rank in range(degree)]
    return spans_of(counts) if all(counts) else None


def pixel_spans(latents: Spans, time: int) -> Spans:
    """The frames that belong to `latents`, by the rule of `1 + time * n` frames."""
    starts = [0 if span.start == 0 else 1 + time * (span.start - 1) for span in latents]
    return tuple(Span(start, 1 + time * (span.stop - 1)) for start, span in zip(starts, latents, strict=True))


class FrameSplit:
    """Runs the networks of a VAE on the latent frames of this rank (see the head of this file).

    A clip of fewer latent frames than ranks, such as an image, is computed whole by each rank, and each counts for its share of
    the gradient.
    """

    def __init__(self, ranks: ContextRanks) -> None:
        self.ranks = ranks
        self.layouts: Layouts = {}

    def encode(self, vae: VideoVAE, video: Tensor) -> Posterior:
        """As `vae.encode`, of a checked video."""
        num_latent_frames = vae.latent_frames(video.shape[2])
        latents, degree = latent_spans(num_latent_frames, self.ranks.degree), self.ranks.degree
        if latents is None:
            posterior = vae._encode(scale_gradient(video, degree))
            return Posterior(*(scale_gradient(part, 1 / degree) for part in (posterior.mean, posterior.logvar)))
        part = self.ranks.take(video, pixel_spans(latents, vae.compression.time))
        posterior = vae._encode(part, ContextCache(self.ranks, self.layouts, num_latent_frames))
        moments = self.ranks.join(torch.cat([posterior.mean, posterior.logvar], dim=1), latents)
        return Posterior(*moments.chunk(2, dim=1))

    def decode(self, vae: VideoVAE, latents: Tensor, sigma: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """As `vae.decode`, of checked latents."""
        spans, degree = latent_spans(latents.shape[2], self.ranks.degree), self.ranks.degree
        if spans is None:
            return scale_gradient(vae._decode(scale_gradient(latents, degree), sigma, generator), 1 / degree)
        cache = ContextCache(self.ranks, self.layouts, latents.shape[2])
        part = vae._decode(self.ranks.take(latents, spans), sigma, generator, cache)
        return self.ranks.join(part, pixel_spans(spans, vae.compression.time))


class ContextCache(ChunkCache):
    """What a rank's layers get of the rest of the clip: from the other ranks, which compute theirs at the same time.

    The ranks ask each other once for each layer and length of clip what they hold; resamplers change it as they like.
    """

    def __init__(self, ranks: ContextRanks, layouts: Layouts, num_latent_frames: int) -> None:
        super().__init__(is_first=ranks.rank == 0)
        self.ranks, self.layouts, self.num_latent_frames = ranks, layouts, num_latent_frames

    def following(self) -> ChunkCache:
        """There is none: all chunks of the clip are being computed."""
        raise AssertionError("a clip on several ranks has no next chunk")

    def padded(self, conv: CausalConv3d, x: Tensor) -> Tensor:
        """`x` with all frames that this rank's outputs see. An output is computed where the frame that it stands at lies."""
        (before, after), stride = conv.reach, conv.stride[0]
        if before == after == 0 and stride == 1:
            return x
        held = self._held(conv, x)
        num_frames = held[-1].stop
        seen = tuple(_seen(span, before, after, stride) for span in held)
        x = self.ranks.exchange(x, held, tuple(_inside(span, num_frames) for span in seen))
        own = seen[self.ranks.rank]
        return x if own.num_frames == 0 else conv.pad_time(x, max(0, -own.start), max(0, own.stop - num_frames))

    def around(self, layer: nn.Module, x: Tensor, before: int, after: int) -> Surrounded:
        """`x`, the input of `layer`, with so many frames before and after it, fewer at the ends of the clip."""
        held = self._held(layer, x)
        wanted = tuple(_inside(Span(span.start - before, span.stop + after), held[-1].stop) for span in held)
        own = held[self.ranks.rank]
        return Surrounded(self.ranks.exchange(x, held, wanted), own.start - wanted[self.ranks.rank].start)

    def whole(self, layer: nn.Module, x: Tensor) -> Tensor:
        """All frames of the clip of which `x`, the input of `layer`, are some."""
        held = self._held(layer, x)
        return self.ranks.exchange(x, held, (Span(0, held[-1].stop),) * self.ranks.degree)

    def of_all_chunks(self, values: Tensor) -> Tensor:
        """`values` of all ranks, `(P, ...)`."""
        return self.ranks.stack(values)

    def _held(self, layer: nn.Module, x: Tensor) -> Spans:
        key = (layer, self.num_latent_frames)
        if key not in self.layouts:
            self.layouts[key] = self.ranks.spans(x.shape[2], x.device)
        held = self.layouts[key]
        assert held[self.ranks.rank].num_frames == x.shape[2], (key, held, x.shape)
        return held


def _seen(held: Span, before: int, after: int, stride: int) -> Span:
    """What the outputs at every `stride`-th frame of the clip see, of those that stand in `held`; may lie beyond its ends."""
    first, stop = -(-held.start // stride), -(-held.stop // stride)
    return Span(first * stride - before, (stop - 1) * stride + after + 1) if stop > first else Span(held.start, held.start)


def _inside(span: Span, num_frames: int) -> Span:
    return span.overlap(Span(0, num_frames))
