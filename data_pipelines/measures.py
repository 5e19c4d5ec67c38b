"""Classical measures of pictures, without a model: pure functions over uint8 arrays."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

Array = np.ndarray[Any, Any]
Box = tuple[float, float, float, float]
"""Top, left, bottom, right of a part of a picture, as shares of its height and width."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
FLOW_PIXELS = 256 * 144
"""Flow is measured on pictures of at most this area."""
DARK, BRIGHT = 10, 250
"""Levels (of 255) at or below and at or above which a pixel counts as clipped."""
_LUMINANCE = np.array([0.114, 0.587, 0.299])  # of blue, green, red (BT.601)
_BORDER_LEVEL = 14
"""A row or column is border where (almost) none of its pixels is brighter, of 255: black with the noise of a codec."""
_EDGE_STEP = 4
"""A border ends where the mean level of lines rises by this much, of 255, within 3 of them."""


def inner(image: Array, box: Box) -> Array:
    """The part of an image `(H, W, ...)` that lies in `box`; at least one pixel."""
    if box == WHOLE:
        return image
    height, width = image.shape[:2]
    top, left = min(height - 1, math.ceil(box[0] * height)), min(width - 1, math.ceil(box[1] * width))
    return image[top : max(top + 1, math.floor(box[2] * height)), left : max(left + 1, math.floor(box[3] * width))]


def brightness(image: Array) -> float:
    """Mean luminance of a BGR image, in [0, 1]."""
    return float(np.dot(cv2.mean(image)[:3], _LUMINANCE)) / 255.0


def change(before: Array, image: Array) -> float:
    """Mean absolute difference of two BGR images over pixels and colours, in [0, 1].

    Colours and not luminance alone: a green shape on grey of the same luminance moves, too.
    """
    return float(np.mean(cv2.mean(cv2.absdiff(image, before))[:3])) / 255.0


def colours(image: Array) -> tuple[float, float, float]:
    """Mean saturation (HSV) of a BGR image, and the shares of its pixels that are clipped dark and bright; in [0, 1]."""
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    histogram = cv2.calcHist([hsv], [2], None, [256], [0, 256]).ravel()
    pixels = float(image.shape[0] * image.shape[1])
    return cv2.mean(hsv)[1] / 255.0, float(histogram[: DARK + 1].sum()) / pixels, float(histogram[BRIGHT:].sum()) / pixels


def perceptual_hash(grey: Array) -> int:
    """The 64-bit pHash of a grey image: signs of the 8x8 lowest frequencies of its 32x32 miniature, against their median."""
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def flow(before: Array, grey: Array) -> float:
    """Mean length of the motion vectors (Farneback) between two grey images, as a share of their shorter side."""
    scale = min(1.0, math.sqrt(FLOW_PIXELS / (grey.shape[0] * grey.shape[1])))
    if scale < 1:
        size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
        before, grey = (cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in (before, grey))
    vectors = cv2.calcOpticalFlowFarneback(before, grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
    return float(cv2.magnitude(vectors[..., 0], vectors[..., 1]).mean()) / min(grey.shape)


def sharpness(grey: Array) -> float:
    """Variance of the Laplacian of a grey image; comparable between images of the same height only."""
    return float(cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1][0, 0]) ** 2


def text_area(grey: Array) -> float:
    """A proxy for writing: the share of a grey image (about 360 pixels high) that is covered by wide, low, densely edged blobs.

    Fences, foliage and brick can pass for writing, and large or curved writing is missed: an OCR model tells better.
    """
    height = grey.shape[0]
    edges = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    strong = (edges > 80).astype(np.uint8)
    joined = cv2.morphologyEx(strong, cv2.MORPH_CLOSE, np.ones((1, 11), np.uint8))
    _, _, facts, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    _, _, widths, heights, areas = facts[1:].T  # the first component is the background
    dense = areas >= 0.45 * widths * heights
    alike = dense & (widths >= 2 * heights) & (heights >= 0.015 * height) & (heights <= 0.2 * height)
    return float((widths * heights)[alike].sum()) / grey.size


def picture_edges(grey: Array) -> tuple[float, float, float, float]:
    """Where the picture inside black borders begins and ends in a grey image: top, left, bottom, right as in `Box`; NaN for a
    side of which the image does not tell.

    A row or column belongs to the border as long as hardly any pixel of it (2%) is brighter than black. Where black turns into
    picture slowly, that is a dark scene and not a border, and the image says nothing; neither does one that is all black.
    """
    bright = (grey > _BORDER_LEVEL).astype(np.uint8)
    top, bottom = _ends(cv2.reduce(bright, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel(), grey.mean(axis=1), grey.shape[1])
    left, right = _ends(cv2.reduce(bright, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel(), grey.mean(axis=0), grey.shape[0])
    return top, left, bottom, right


def _ends(num_bright: Array, mean: Array, width: int) -> tuple[float, float]:
    """First line and end of the lines that are picture, as shares, from the bright pixels and the mean level of each line."""
    lines, unknown = np.flatnonzero(num_bright > 0.02 * width), float("nan")
    if not len(lines):
        return unknown, unknown
    num_lines, first, last = len(mean), int(lines[0]), int(lines[-1])
    # The line next to a border holds some of it, blurred by scaling and by the codec: it goes, too.
    begin = (first + 1) / num_lines if mean[min(first + 2, last)] - mean[max(first - 1, 0)] >= _EDGE_STEP else unknown
    end = last / num_lines if mean[max(last - 2, first)] - mean[min(last + 1, num_lines - 1)] >= _EDGE_STEP else unknown
    return (0.0 if first == 0 else begin), (1.0 if last == num_lines - 1 else end)


def union(edges: Array, otherwise: Box = WHOLE) -> Box:
    """The smallest box that holds the pictures of several images, from their edges `(N, 4)`; a side of which none of them tells
    is that of `otherwise`."""
    columns = [side[np.isfinite(side)] for side in edges.T]
    top, left, bottom, right = (
        float(choose(side)) if len(side) else other
        for side, other, choose in zip(columns, otherwise, (np.min, np.min, np.max, np.max), strict=True)
    )
    return (top, left, bottom, right) if top < bottom and left < right else otherwise


def area(box: Box) -> float:
    """Share of the picture that lies in `box`."""
    return (box[2] - box[0]) * (box[3] - box[1])
