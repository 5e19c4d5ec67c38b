"""Labels of a pair's pixel frames as labels of its latent frames (DenseDPO, Wu et al. 2025, arXiv 2506.03517; spec C2)."""

from __future__ import annotations

import torch
from torch import Tensor

from videofm.errors import DataError
from videofm.types import Compression


def latent_labels(labels: Tensor, num_latent_frames: int, compression: Compression) -> Tensor:
    """The label of each latent frame: the mean of those of the pixel frames that it holds, `(P, num_latent_frames)`.

    So a latent frame that lies across two segments counts in proportion, and nothing where they contradict each other; a latent
    frame inside of one has its label. Latent frame 0 of a chunk holds its first pixel frame, latent frame n the pixel frames
    `1 + time * (n - 1)` to `time * n` of it. A clip is one chunk by the frame rule `1 + time * n`; with a VAE of fixed chunks
    (Step-Video, 17 frames) it is the smallest number of equal ones for which that rule holds in each.

    Args:
        labels: `(P, T)` of pixel frames, -1, 0 or 1.
        num_latent_frames: of the clips.
        compression: of the VAE.

    Raises:
        DataError: T frames do not become so many latent frames.
    """
    num_frames = labels.shape[1]
    counts = range(1, num_latent_frames + 1)
    fitting = (count for count in counts if _fits(num_frames, num_latent_frames, count, compression))
    num_chunks = next(fitting, None)
    if num_chunks is None:
        raise DataError(
            f"segments label {num_frames} frames a clip, and the clips have {num_latent_frames} latent frames of "
            f"{compression.time} frames each, the first of a chunk of one: these do not belong together. Take data.num_frames "
            "by the frame rule of the VAE, and encode the clips again if data.cache has another length."
        )
    held = torch.arange(num_frames // num_chunks)
    # Latent frame of each pixel frame of a chunk: 0, then `time` frames each.
    holder = (held + compression.time - 1).div(compression.time, rounding_mode="floor")
    per_chunk = num_latent_frames // num_chunks
    shares = torch.nn.functional.one_hot(holder, per_chunk).float()  # (frames, latent frames) of a chunk
    shares = (shares / shares.sum(dim=0)).to(labels.device, non_blocking=True)
    chunks = labels.float().unflatten(1, (num_chunks, -1))  # (P, chunks, frames)
    return (chunks @ shares).flatten(1)


def _fits(num_frames: int, num_latent_frames: int, num_chunks: int, compression: Compression) -> bool:
    """Whether the clip is `num_chunks` equal chunks, each whole by the frame rule."""
    if num_frames % num_chunks or num_latent_frames % num_chunks:
        return False
    return num_frames // num_chunks == 1 + compression.time * (num_latent_frames // num_chunks - 1)
