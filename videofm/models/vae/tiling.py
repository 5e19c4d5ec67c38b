"""Encoding and decoding in tiles, for clips that are too large for the memory. Takes any `VideoVAE`.

In space tiles overlap and are mixed with linear ramps. In time a direction that is causal is streamed, which is exact; another
is cut into tiles that overlap, which is approximate (spec A.7, B.6): `seam_error` measures by how much.

Tiles in time follow the frame rule. The first latent frame of a tile stands for its first frame alone, while the same latent
frame inside a clip stands for `time` frames: encoding gives it no weight in any tile but the first. Decoding has no such frame:
the one that the first latent frame of a tile becomes is the last of those that it becomes inside a clip. Tiles are mixed by
ramps; a switch at the start, in the middle or at the end of the overlap had higher errors in nearly all cases (a random small
LTX VAE that sees both ways), and two shared latent frames instead of one lowered the mean error at seams to about a third.

Results are summed into one tensor, and one tile gives bitwise what no tiling gives. A decoder that injects noise draws it anew
for each tile in space, so that its noise depends on the tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from videofm.errors import ConfigError
from videofm.ops.causal_conv import ChunkCache
from videofm.types import Posterior

if TYPE_CHECKING:
    from videofm.models.vae.base import VideoVAE


@dataclass(frozen=True)
class Tiles:
    """The size of tiles, and what neighbours share. A clip that is smaller than a tile is one tile along that axis.

    The last tile along an axis is moved back until it ends with the clip: all are of one size, and the last two may share more.

    Attributes:
        height, width: pixels of a tile, multiples of the compression.
        overlap_height, overlap_width: pixels that neighbours share, multiples of the compression, less than a tile.
        num_frames: `1 + time * n` frames of a tile, or of the first chunk where time is streamed (later ones have `time * n`);
            None leaves time whole.
        overlap_frames: `1 + time * n` frames that tiles in time share, fewer than a tile's. A stream needs none.
    """

    height: int
    width: int
    overlap_height: int
    overlap_width: int
    num_frames: int | None = None
    overlap_frames: int = 1

    def check(self, vae: VideoVAE) -> None:
        """Refuse tiles that `vae` cannot take.

        Raises:
            ConfigError: sizes off the grid of the VAE, an overlap as large as the tile, or time tiles for a VAE that cuts time
                itself.
        """
        for name, rule in (("height", vae.compression.height), ("width", vae.compression.width)):
            size, overlap = getattr(self, name), getattr(self, f"overlap_{name}")
            if size <= 0 or size % rule or overlap < 0 or overlap % rule:
                raise ConfigError(
                    f"tiles have a {name} of {size} and an overlap_{name} of {overlap} pixels; both must be multiples of "
                    f"{rule}, the pixels of a latent cell."
                )
            if overlap >= size:
                raise ConfigError(f"overlap_{name} is {overlap}, but a tile has {size} pixels: give less than {size}.")
        if self.num_frames is not None:
            self._check_time(self.num_frames, vae)

    def _check_time(self, num_frames: int, vae: VideoVAE) -> None:
        rule = vae.compression.time
        if vae.chunk_frames != rule:
            raise ConfigError(
                f"this {vae.spec_name} cuts time into chunks of {vae.chunk_frames} frames itself: leave num_frames out "
                f"(it is {num_frames}), so that only space is tiled."
            )
        for name, value, least in (("num_frames", num_frames, 1 + rule), ("overlap_frames", self.overlap_frames, 1)):
            if value < least or (value - 1) % rule:
                raise ConfigError(f"{name} of a tile is {value}; this VAE takes 1 + {rule} * n, at least {least}.")
        if self.overlap_frames >= num_frames:
            raise ConfigError(
                f"overlap_frames is {self.overlap_frames}, but a tile has {num_frames} frames: give at most "
                f"{num_frames - rule}."
            )


@dataclass(frozen=True)
class Span:
    """One tile along one axis: its cells of the latents and its positions of the video."""

    cells: slice
    pixels: slice


@dataclass(frozen=True)
class Plan:
    """The tiles of a clip: those along time, height and width, of which every combination is one.

    `streams` is whether those along time are the chunks of a stream, one after the other, instead of tiles that overlap.
    """

    axes: tuple[list[Span], list[Span], list[Span]]
    streams: bool

    @property
    def is_whole(self) -> bool:
        """Whether one tile is the clip."""
        return all(len(axis) == 1 for axis in self.axes)

    def columns(self) -> Iterator[tuple[int, int]]:
        """Indices of the tiles in space, row by row."""
        _, rows, columns = self.axes
        return product(range(len(rows)), range(len(columns)))


def encode_tiled(vae: VideoVAE, video: Tensor, tiles: Tiles) -> Posterior:
    """The posterior of `video` `(B, 3, T, H, W)`, tile by tile; means and log-variances are mixed.

    Raises:
        ConfigError: tiles that do not fit the VAE.
        DataError: as `vae.encode`.
    """
    tiles.check(vae)
    vae.check_video(video)
    vae._check_frames(video.shape[2])
    c = vae.compression
    shape = (vae.latent_frames(video.shape[2]), video.shape[3] // c.height, video.shape[4] // c.width)
    plan = make_plan(vae, tiles, shape, vae.encoder_causal)
    if plan.is_whole:
        return vae.encode(video)
    mean, logvar = _Sum(plan, "cells"), _Sum(plan, "cells")
    for row, column in plan.columns():
        cache: ChunkCache | None = None
        for index, time in enumerate(plan.axes[0]):
            tile = video[:, :, time.pixels, plan.axes[1][row].pixels, plan.axes[2][column].pixels]
            if plan.streams:
                chunk = vae.encode_stream(tile, cache)
                posterior, cache = chunk.posterior, chunk.cache
            else:
                posterior = vae.encode(tile)
            mean.add((index, row, column), posterior.mean)
            logvar.add((index, row, column), posterior.logvar)
    return Posterior(mean.total, logvar.total)


def decode_tiled(
    vae: VideoVAE,
    latents: Tensor,
    tiles: Tiles,
    sigma: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Video `(B, 3, T, H, W)` of raw latents, tile by tile.

    Args:
        latents: `(B, C, T', H', W')`.
        tiles: their sizes.
        sigma, generator: as in `vae.decode`; each tile in space draws its own noise.

    Raises:
        ConfigError: tiles that do not fit the VAE, or as `vae.decode`.
        DataError: as `vae.decode`.
    """
    tiles.check(vae)
    vae._check_latents(latents)
    plan = make_plan(vae, tiles, tuple(latents.shape[2:]), vae.decoder_causal)
    if plan.is_whole:
        return vae.decode(latents, sigma, generator)
    video = _Sum(plan, "pixels")
    for row, column in plan.columns():
        cache: ChunkCache | None = None
        for index, time in enumerate(plan.axes[0]):
            tile = latents[:, :, time.cells, plan.axes[1][row].cells, plan.axes[2][column].cells]
            if plan.streams:
                chunk = vae.decode_stream(tile, cache, sigma, generator)
                decoded, cache = chunk.video, chunk.cache
            else:
                decoded = vae.decode(tile, sigma, generator)
            video.add((index, row, column), decoded)
    return video.total


@dataclass(frozen=True)
class TiledVAE:
    """`vae` that encodes and decodes in `tiles`."""

    vae: VideoVAE
    tiles: Tiles

    def encode(self, video: Tensor) -> Posterior:
        """As `encode_tiled`."""
        return encode_tiled(self.vae, video, self.tiles)

    def decode(self, latents: Tensor, sigma: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """As `decode_tiled`."""
        return decode_tiled(self.vae, latents, self.tiles, sigma, generator)


def make_plan(vae: VideoVAE, tiles: Tiles, shape: tuple[int, ...], causal: bool) -> Plan:
    """The tiles of latents of `shape` (T', H', W'); `causal` is whether this direction of the VAE streams."""
    c = vae.compression
    space = []
    for length, size, overlap, pixels in (
        (shape[1], tiles.height, tiles.overlap_height, c.height),
        (shape[2], tiles.width, tiles.overlap_width, c.width),
    ):
        cells = _overlapping(length, size // pixels, overlap // pixels)
        space.append([Span(slice(a, b), slice(a * pixels, b * pixels)) for a, b in cells])
    time, streams = [Span(slice(0, shape[0]), slice(0, vae.pixel_frames(shape[0])))], False
    if tiles.num_frames is not None and vae.latent_frames(tiles.num_frames) < shape[0]:
        num, streams = vae.latent_frames(tiles.num_frames), causal
        if streams:  # the first chunk has one latent frame more than the others, which have c.time frames for each
            stops = [*range(num, shape[0], num - 1), shape[0]]
            cells = list(pairwise([0, *stops]))
            time = [Span(slice(a, b), slice(a and c.time * (a - 1) + 1, c.time * (b - 1) + 1)) for a, b in cells]
        else:
            cells = _overlapping(shape[0], num, vae.latent_frames(tiles.overlap_frames))
            time = [Span(slice(a, b), slice(c.time * a, c.time * (b - 1) + 1)) for a, b in cells]
    return Plan((time, space[0], space[1]), streams)


def _overlapping(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Starts and stops of tiles of `size` that cover `length`."""
    if length <= size:
        return [(0, length)]
    starts = [*range(0, length - size, size - overlap), length - size]
    return [(start, start + size) for start in starts]


def blend_weights(spans: list[slice], from_zero: bool = False) -> list[Tensor]:
    """The weight of each tile at each of its positions along one axis, float64; at every position of the axis they sum to 1.

    Over the n positions that a tile shares with the one before its weight rises in a line, 1 / (n + 1), ..., n / (n + 1), or
    `from_zero` 0, ..., (n - 1) / n, and the tiles before it share the rest.
    """
    weights: list[Tensor] = []
    for index, span in enumerate(spans):
        weight = torch.ones(span.stop - span.start, dtype=torch.float64)
        if index and (shared := spans[index - 1].stop - span.start) > 0:
            steps = torch.arange(shared, dtype=torch.float64)
            weight[:shared] = steps / shared if from_zero else (steps + 1) / (shared + 1)
        for before, other in zip(weights, spans, strict=False):
            if (shared := other.stop - span.start) > 0:
                before[span.start - other.start :] *= 1 - weight[:shared]
        weights.append(weight)
    return weights


class _Sum:
    """The weighted sum of tiles, `(B, C, T, H, W)`; `side` is the field of a span that places a tile."""

    total: Tensor

    def __init__(self, plan: Plan, side: str) -> None:
        self.spans = [[getattr(span, side) for span in axis] for axis in plan.axes]
        self.weights = [blend_weights(spans, axis == 0 and side == "cells") for axis, spans in enumerate(self.spans)]
        self.shape = [spans[-1].stop for spans in self.spans]

    def add(self, indices: tuple[int, int, int], tile: Tensor) -> None:
        """Add the tile with these indices along time, height and width."""
        if indices == (0, 0, 0):
            self.total = tile.new_zeros(*tile.shape[:2], *self.shape)
        place = [spans[index] for spans, index in zip(self.spans, indices, strict=True)]
        time, height, width = (weights[index].to(tile) for weights, index in zip(self.weights, indices, strict=True))
        weight = time[:, None, None] * height[:, None] * width  # (T, H, W)
        self.total[:, :, *place].addcmul_(tile, weight)


@dataclass(frozen=True)
class SeamError:
    """Absolute differences between tiles and the whole.

    Attributes:
        max, mean: over the positions that several tiles share; zero where there are none.
        max_elsewhere, mean_elsewhere: over all others, where a tile misses what lies beyond it.
        scale: the standard deviation of the whole, to read the others by.
    """

    max: float
    mean: float
    max_elsewhere: float
    mean_elsewhere: float
    scale: float


@dataclass(frozen=True)
class SeamReport:
    """Of the latents of a video encoded in tiles, and of the video decoded in tiles from the latents of the whole."""

    latents: SeamError
    video: SeamError


@torch.no_grad()
def seam_error(vae: VideoVAE, video: Tensor, tiles: Tiles, sigma: Tensor | None = None, seed: int = 0) -> SeamReport:
    """What tiles change for `video`, which has to fit the memory as a whole.

    Where a decoder injects noise, the difference between the draws is part of the answer.

    Raises:
        ConfigError, DataError: as `encode_tiled` and `decode_tiled`.
    """
    latents, tiled_latents = vae.encode(video).mean, encode_tiled(vae, video, tiles).mean
    decoded = vae.decode(latents, sigma, torch.Generator(video.device).manual_seed(seed))
    tiled = decode_tiled(vae, latents, tiles, sigma, torch.Generator(video.device).manual_seed(seed))
    shape = tuple(latents.shape[2:])
    encoding, decoding = (make_plan(vae, tiles, shape, causal) for causal in (vae.encoder_causal, vae.decoder_causal))
    return SeamReport(
        _difference(latents, tiled_latents, _seams(encoding, "cells")),
        _difference(decoded, tiled, _seams(decoding, "pixels")),
    )


def _seams(plan: Plan, side: str) -> Tensor:
    """Bool `(T, H, W)`: where tiles overlap."""
    shared = []
    for axis in plan.axes:
        spans = [getattr(span, side) for span in axis]
        counts = torch.zeros(spans[-1].stop)
        for span in spans:
            counts[span] += 1
        shared.append(counts > 1)
    return shared[0][:, None, None] | shared[1][:, None] | shared[2]


def _difference(whole: Tensor, tiled: Tensor, seams: Tensor) -> SeamError:
    difference = (tiled - whole).abs().float()
    shared, other = difference[..., seams.to(whole.device)], difference[..., ~seams.to(whole.device)]
    return SeamError(*_max_mean(shared), *_max_mean(other), float(whole.float().std()))


def _max_mean(values: Tensor) -> tuple[float, float]:
    return (float(values.max()), float(values.mean())) if values.numel() else (0.0, 0.0)
