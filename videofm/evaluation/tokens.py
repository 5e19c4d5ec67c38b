"""What a latent tokenizer keeps of latents, beside plain means, and how it uses its codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn.functional import pad

from videofm.errors import DataError


class TokenScores:
    """A pass over clips: `update` with each batch, then `result`. Sums are in float64.

    Errors are of normalised latents, over their variance around the mean of each channel over all clips: a constant for each
    channel gives 1. Beside that of the features stand those of `box_mean`, each box of cells that a token stands for replaced
    by its own mean in each channel, in full precision; and of `first_frame`, each frame replaced by the first of its clip.

    Args:
        rate: latent cells of a token along (time, height, width).
        vocab_sizes: codes of each codebook.
    """

    def __init__(self, rate: tuple[int, int, int], vocab_sizes: tuple[int, ...]) -> None:
        self.rate = rate
        self.counts = [torch.zeros(size, dtype=torch.float64) for size in vocab_sizes]
        self.errors = dict.fromkeys(("features", "box_mean", "first_frame"), 0.0)
        self.boxes: list[Boxes] = []
        self.num_clips = self.num_cells = 0
        self.sums: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    @torch.no_grad()
    def update(self, latents: Tensor, features: Tensor, indices: Tensor) -> None:
        """Add a batch.

        Args:
            latents, features: `(B, C, T, H, W)`.
            indices: `(B, T', H', W')` or `(B, T', H', W', Q)`.

        Raises:
            DataError: features of another shape than the latents.
        """
        if latents.shape != features.shape:
            raise DataError(
                f"features have shape {tuple(features.shape)} and the latents {tuple(latents.shape)}: not of one clip."
            )
        wide = latents.double().cpu()
        self.num_clips += len(wide)
        self.num_cells += wide[:, 0].numel()
        self.sums = self.sums + wide.sum(dim=(0, 2, 3, 4))
        self.squares = self.squares + wide.square().sum(dim=(0, 2, 3, 4))
        boxes = boxes_of(wide, self.rate)
        self.boxes.append(boxes)
        guesses = {"features": features.double().cpu(), "box_mean": boxes.spread(), "first_frame": wide[:, :, :1]}
        for name, guess in guesses.items():
            self.errors[name] += float((guess - wide).square().sum())
        by_book = indices.cpu().reshape(-1, len(self.counts))  # (B, T', H', W'[, Q]) -> (tokens, Q)
        for counts, book in zip(self.counts, by_book.unbind(dim=1), strict=True):
            counts += torch.bincount(book, minlength=len(counts))

    def box_vectors(self) -> Tensor:
        """The mean of every box `(N, C)` float32: what a codebook without a network would be made of."""
        return torch.cat([boxes.vectors() for boxes in self.boxes]).float()

    def error_of(self, codes: Tensor) -> float:
        """Relative error of latents whose boxes are replaced by `codes` `(N, C)`, one for each of `box_vectors`.

        It is the error of the boxes' own means, plus what the codes are off these, once for each cell of the box.
        """
        sizes = torch.cat([boxes.cells() for boxes in self.boxes])
        off = (torch.cat([boxes.vectors() for boxes in self.boxes]) - codes.double().cpu()).square().sum(dim=1)
        return (self.errors["box_mean"] + float((sizes * off).sum())) / self._spread()

    def _spread(self) -> float:
        spread = float((self.squares - torch.as_tensor(self.sums).square() / max(1, self.num_cells)).sum())
        if spread <= 0:
            raise DataError(f"{self.num_clips} clips whose latents do not vary: there is nothing to compare an error with.")
        return spread

    def result(self) -> dict[str, Any]:
        """`num_clips`, `num_tokens`, `relative_mse`, `relative_mse_box_mean`, `relative_mse_first_frame`; and of the codebook,
        a list where there are several: `codebook_size`, `usage` (share of codes that occur), `perplexity` (exp of the entropy
        of their frequencies in nats), `dead` (codes that do not occur).

        Raises:
            DataError: there was no clip, or nothing varies in them.
        """
        spread = self._spread()
        errors = {name: error / spread for name, error in self.errors.items()}
        of_books = [_use(counts) for counts in self.counts]
        use = {
            name: values if len(of_books) > 1 else values[0] for name in of_books[0] if (values := [b[name] for b in of_books])
        }
        return {
            "num_clips": self.num_clips,
            "num_tokens": int(self.counts[0].sum()),
            "relative_mse": errors.pop("features"),
            **{f"relative_mse_{name}": error for name, error in errors.items()},
            **use,
        }


def _use(counts: Tensor) -> dict[str, float | int]:
    share = counts[counts > 0] / counts.sum()
    dead = int((counts == 0).sum())
    entropy = float(-(share * share.log()).sum())
    size = len(counts)
    return {
        "codebook_size": size,
        "usage": 1 - dead / size,
        "perplexity": float(torch.tensor(entropy, dtype=torch.float64).exp()),
        "dead": dead,
    }


@dataclass(frozen=True)
class Boxes:
    """Means of the boxes of cells that tokens stand for, `means` `(B, C, T', H', W')`, and the shape of a box.

    Boxes of `rate` cells end with the last frame, as tokens do: the first lacks `missing` frames.
    """

    means: Tensor
    rate: tuple[int, int, int]
    missing: int

    def spread(self) -> Tensor:
        """`(B, C, T, H, W)`, each cell the mean of its box."""
        time, height, width = self.rate
        whole = repeat(self.means, "b c t h w -> b c (t r) (h p) (w q)", r=time, p=height, q=width)
        return whole[:, :, self.missing :]

    def vectors(self) -> Tensor:
        """The means as `(B * T' * H' * W', C)`."""
        return rearrange(self.means, "b c t h w -> (b t h w) c")

    def cells(self) -> Tensor:
        """How many cells each of `vectors` is the mean of, `(B * T' * H' * W',)`."""
        time, height, width = self.rate
        sizes = torch.full_like(self.means[:, 0], time * height * width)  # (B, T', H', W')
        sizes[:, 0] = (time - self.missing) * height * width
        return sizes.flatten()


def boxes_of(latents: Tensor, rate: tuple[int, int, int]) -> Boxes:
    """The boxes of `latents` `(B, C, T, H, W)` at `rate` cells along time, height and width."""
    time, height, width = rate
    missing = -latents.shape[2] % time
    padded = pad(latents, (0, 0, 0, 0, missing, 0))
    sums = reduce(padded, "b c (t r) (h p) (w q) -> b c t h w", "sum", r=time, p=height, q=width)
    means = sums / (time * height * width)
    means[:, :, 0] *= time / (time - missing)
    return Boxes(means, rate, missing)
