"""How Step-Video's VAE is laid out over devices: whole chunks of a clip over the context ranks; binds its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from videofm.models.bind import bind_single_head
from videofm.models.spec import ParallelOptions
from videofm.models.vae.base import VideoVAE
from videofm.models.vae.parallelize import context_ranks
from videofm.models.vae.step_video.config import CHUNK_FRAMES
from videofm.models.vae.step_video.model import StepVideoVAE, blend_seams
from videofm.parallel.halo import ContextRanks, spans_of
from videofm.types import Posterior


def parallelize(model: StepVideoVAE, mesh: Any = None, options: ParallelOptions | None = None) -> StepVideoVAE:
    """`model`, whose chunks are spread over the context ranks of `mesh`, with the attention of both middles bound, by a backend
    that takes a mask.

    Raises:
        ConfigError: the attention backend cannot serve this model; the message has the reason.
    """
    if (ranks := context_ranks(mesh)) is not None:
        model.split = ChunkSplit(ranks)
    attentions = [coder.middle.attention for coder in (model.encoder, model.decoder)]
    bind_single_head(model, attentions, options, has_mask=True)
    return model


class ChunkSplit:
    """Codes the chunks of this rank; as chunks do not see each other, only results are exchanged. Gradients are as described in
    `videofm.models.vae.parallelize`.

    All ranks code equally many chunks, because an engine may have to meet the others at every call of a layer. Copies of the
    last chunk, of which nothing is kept, make them even: a clip of one chunk gains nothing from several ranks.
    """

    def __init__(self, ranks: ContextRanks) -> None:
        self.ranks = ranks

    def encode(self, vae: VideoVAE, video: Tensor) -> Posterior:
        """As `vae.encode`, of a checked video."""

        def moments(part: Tensor) -> Tensor:
            posterior = vae._encode(part)
            return torch.cat([posterior.mean, posterior.logvar], dim=1)

        return Posterior(*self._spread(moments, video, CHUNK_FRAMES).chunk(2, dim=1))

    def decode(self, vae: VideoVAE, latents: Tensor, sigma: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """As `vae.decode`, of checked latents. Seams are blended in the whole clip, on every rank."""
        assert isinstance(vae, StepVideoVAE)
        video = self._spread(vae.decode_chunks, latents, vae.config.chunk_latents)
        return blend_seams(video) if vae.config.blend_seams else video

    def _spread(self, code: Callable[[Tensor], Tensor], x: Tensor, chunk: int) -> Tensor:
        """`code` of `x`, whose chunks have `chunk` frames, or which is one frame."""
        chunk = min(chunk, x.shape[2])
        num_chunks, degree = x.shape[2] // chunk, self.ranks.degree
        num_own = -(-num_chunks // degree)
        if surplus := num_own * degree - num_chunks:
            x = torch.cat([x, x[:, :, -chunk:].repeat(1, 1, surplus, 1, 1)], dim=2)
        coded = code(self.ranks.take(x, spans_of([num_own * chunk] * degree)))
        whole = self.ranks.join(coded, spans_of([coded.shape[2]] * degree))
        return whole[:, :, : coded.shape[2] // num_own * num_chunks]
