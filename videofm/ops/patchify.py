"""Moves of pixels between channels, space and the token sequence. Nothing is computed; every move has its inverse."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from videofm.errors import DataError


def patchify(video: Tensor, patch_size: int, patch_size_t: int = 1) -> Tensor:
    """Space to depth at the input of the LTX VAE.

    The channel of colour c at (i_t, i_h, i_w) in its patch is `((c * p_t + i_t) * p + i_w) * p + i_h`: the *width* index is
    slower than the height index, an accident of the released weights that must be kept (spec B.1).

    Args:
        video: `(B, C, T, H, W)`, T a multiple of `patch_size_t`, H and W of `patch_size`.

    Returns:
        `(B, C * p_t * p * p, T / p_t, H / p, W / p)`.
    """
    return rearrange(
        video,
        "b c (t pt) (h ph) (w pw) -> b (c pt pw ph) t h w",
        pt=patch_size_t,
        ph=patch_size,
        pw=patch_size,
    )


def unpatchify(cells: Tensor, patch_size: int, patch_size_t: int = 1) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(
        cells,
        "b (c pt pw ph) t h w -> b c (t pt) (h ph) (w pw)",
        pt=patch_size_t,
        ph=patch_size,
        pw=patch_size,
    )


def space_to_depth(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """`(B, C, T*st, H*sh, W*sw)` -> `(B, C*st*sh*sw, T, H, W)`, channel order c, i_t, i_h, i_w (the resamplers of LTX)."""
    st, sh, sw = stride
    return rearrange(x, "b c (t st) (h sh) (w sw) -> b (c st sh sw) t h w", st=st, sh=sh, sw=sw)


def depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """The inverse of `space_to_depth`."""
    st, sh, sw = stride
    return rearrange(x, "b (c st sh sw) t h w -> b c (t st) (h sh) (w sw)", st=st, sh=sh, sw=sw)


def tokens_from_latents(latents: Tensor) -> Tensor:
    """Latents `(B, C, T, H, W)` -> tokens `(B, L, C)` with `L = T * H * W`, width fastest."""
    return rearrange(latents, "b c t h w -> b (t h w) c")


def latents_from_tokens(tokens: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Tokens `(B, L, C)` -> latents `(B, C, T, H, W)`; `shape` is (T, H, W) in latent cells.

    Raises:
        DataError: L is not T * H * W.
    """
    num_frames, height, width = shape
    if tokens.shape[1] != num_frames * height * width:
        raise DataError(
            f"{tokens.shape[1]} tokens do not fill latents of {num_frames}x{height}x{width}, "
            f"which have {num_frames * height * width} cells."
        )
    return rearrange(tokens, "b (t h w) c -> b c t h w", t=num_frames, h=height, w=width)
