"""The one pass over all frames of a source that feeds cuts and all classical scores. It keeps numbers, never pictures."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from data_pipelines import measures
from data_pipelines.measures import WHOLE, Array, Box
from data_pipelines.rows import Unusable
from videofm.errors import DataError

SCAN_WIDTH = 256
"""Every frame is looked at when it is scaled to at most this width, in pixels."""
SAMPLE_SIDE = 360
"""Sampled frames are looked at with their shorter side scaled to this many pixels, up or down."""


@dataclass(frozen=True)
class Wanted:
    """What to measure. `scores`: colours, hashes, flow and sharpness; `text`: the proxy for writing; `borders`: black borders;
    `samples_per_second`: how often what is dear is measured (flow, sharpness, writing, borders)."""

    scores: bool = False
    text: bool = False
    borders: bool = False
    samples_per_second: float = 0.0
    cuts: str = ""
    """Settings of the cut detector, as a text; empty for none."""

    def __or__(self, other: Wanted) -> Wanted:
        values = {name: max(value, getattr(other, name)) for name, value in asdict(self).items()}
        return Wanted(**values)

    def covers(self, other: Wanted) -> bool:
        """Whether a scan made for this serves `other`, too."""
        return self | other == self


@dataclass(frozen=True)
class Scan:
    """What one pass over T frames gave; S of them were sampled.

    `times` (T,) are presentation times in seconds from the first frame; `motion` (T,) the mean absolute change since the frame
    before, `brightness` (T,) the mean luminance, both in [0, 1]; `saturation`, `dark`, `bright` (T,) see `measures.colours`;
    `hashes` (T,) are pHashes. `sampled` (S,) are indices; at each, `flow` is the mean length of motion vectors since the frame
    before, in shorter sides a second (NaN for the first frame), `sharpness` the variance of the Laplacian, `text` see
    `measures.text_area`, `edges` (S, 4) see `measures.picture_edges`. All but `edges` is measured within `box`. What was not
    wanted has no elements. `cuts` are the indices of the first frames of new shots.
    """

    times: Array
    motion: Array
    brightness: Array
    saturation: Array
    dark: Array
    bright: Array
    hashes: Array
    sampled: Array
    flow: Array
    sharpness: Array
    text: Array
    edges: Array
    cuts: list[int]
    box: Box

    def part(self, start: int, stop: int) -> Scan:
        """The frames `[start, stop)` as a scan of their own, without what compares the first frame with the one before."""
        frames, samples = slice(start, stop), slice(*np.searchsorted(self.sampled, (start, stop)).tolist())
        values: dict[str, Any] = {}
        for name in _FRAMES:
            values[name] = getattr(self, name)[frames]
        for name in _SAMPLES:
            values[name] = getattr(self, name)[samples]
        values["motion"] = values["motion"].copy()
        values["motion"][:1] = 0.0
        if len(values["flow"]):
            values["flow"] = np.where(values["sampled"] == start, np.nan, values["flow"])
        values["sampled"] = values["sampled"] - start
        values["times"] = values["times"] - values["times"][:1]
        return replace(self, **values, cuts=[cut - start for cut in self.cuts if start < cut < stop])


_FRAMES = ("times", "motion", "brightness", "saturation", "dark", "bright", "hashes")
_SAMPLES = ("sampled", "flow", "sharpness", "text", "edges")


class CutDetector(Protocol):
    """Finds cuts in a stream of frames."""

    def observe(self, index: int, frame: Array) -> list[int]:
        """Take frame `index`, BGR uint8 `(H, W, 3)`; the cuts found with it."""
        ...


def measure(
    frames: Iterable[tuple[float, Any]],
    wanted: Wanted,
    stride: int,
    box: Box = WHOLE,
    detector: CutDetector | None = None,
    phase: int = 0,
) -> Scan:
    """Look at decoded frames, one after the other.

    Args:
        frames: presentation times in seconds with PyAV frames.
        wanted: what to measure.
        stride: every `stride`-th frame is sampled, beginning with frame `phase`.
        box: the part of the picture that counts.
        detector: is shown each frame within `box`: black borders, all alike, would hide cuts from it.

    Raises:
        Unusable: there is no frame.
    """
    meter = _Meter(wanted, stride, phase, box)
    cuts: list[int] = []
    for index, (time, frame) in enumerate(frames):
        image = meter.look(index, time, frame)
        if detector is not None:
            cuts.extend(detector.observe(index, image))
    if not meter.values["times"]:
        raise Unusable("undecodable", "no frame decodes")
    arrays: dict[str, Any] = {name: np.array(values, _DTYPES.get(name, np.float32)) for name, values in meter.values.items()}
    arrays["times"] -= arrays["times"][0]
    arrays["edges"] = arrays["edges"].reshape(-1, 4)
    return Scan(**arrays, cuts=sorted(set(cuts) - {0}), box=box)


_DTYPES: dict[str, Any] = {"times": np.float64, "hashes": np.uint64, "sampled": np.int64}


class _Meter:
    """Measures frames; holds the one before and lists of numbers."""

    def __init__(self, wanted: Wanted, stride: int, phase: int, box: Box) -> None:
        self.wanted, self.stride, self.phase, self.box = wanted, stride, phase, box
        self.values: dict[str, list[Any]] = {name: [] for name in (*_FRAMES, *_SAMPLES)}
        self._small, self._large = VideoReformatter(), VideoReformatter()
        self._before: Array | None = None
        self._time = 0.0

    def look(self, index: int, time: float, frame: Any) -> Array:
        """Measure a frame; what of it counts, small, BGR."""
        whole = _scaled(self._small, frame, min(1.0, SCAN_WIDTH / frame.width), "bgr24")
        image = measures.inner(whole, self.box)
        before = self._before if self._before is not None and self._before.shape == image.shape else None
        values = self.values
        values["times"].append(time)
        values["motion"].append(0.0 if before is None else measures.change(before, image))
        values["brightness"].append(measures.brightness(image))
        if self.wanted.scores:
            saturation, dark, bright = measures.colours(image)
            values["saturation"].append(saturation)
            values["dark"].append(dark)
            values["bright"].append(bright)
            values["hashes"].append(measures.perceptual_hash(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)))
        if self._dear() and (index - self.phase) % self.stride == 0:
            self._sample(index, time, frame, before, image)
        self._before, self._time = image, time
        return image

    def _dear(self) -> bool:
        return self.wanted.scores or self.wanted.text or self.wanted.borders

    def _sample(self, index: int, time: float, frame: Any, before: Array | None, image: Array) -> None:
        large = _scaled(self._large, frame, SAMPLE_SIDE / min(frame.width, frame.height), "gray")
        picture, values = np.ascontiguousarray(measures.inner(large, self.box)), self.values
        values["sampled"].append(index)
        if self.wanted.scores:
            length = float("nan")
            if before is not None:
                greys = [cv2.cvtColor(x, cv2.COLOR_BGR2GRAY) for x in (before, image)]
                length = measures.flow(greys[0], greys[1]) / max(time - self._time, 1e-3)
            values["flow"].append(length)
            values["sharpness"].append(measures.sharpness(picture))
        if self.wanted.text:
            values["text"].append(measures.text_area(picture))
        if self.wanted.borders:
            values["edges"].append(measures.picture_edges(large))


def _scaled(scaler: VideoReformatter, frame: Any, scale: float, pixels: str) -> Array:
    """A PyAV frame scaled and rotated as it is shown."""
    size = {"width": max(2, round(frame.width * scale)), "height": max(2, round(frame.height * scale))}
    image: Array = scaler.reformat(frame, format=pixels, threads=1, **size).to_ndarray()
    turns, rest = divmod(int(frame.rotation), 90)
    if rest:
        raise Unusable("odd_rotation", f"rotated by {frame.rotation} degrees")
    return np.ascontiguousarray(np.rot90(image, turns)) if turns % 4 else image


def still_box(frames: Iterable[Any]) -> Box:
    """The picture inside the black borders that all of some frames share."""
    scaler = VideoReformatter()
    edges = [
        measures.picture_edges(_scaled(scaler, frame, SAMPLE_SIDE / min(frame.width, frame.height), "gray")) for frame in frames
    ]
    return measures.union(np.array(edges).reshape(-1, 4))


def save_scan(path: Path, scan: Scan, wanted: Wanted, source: Sequence[Any]) -> None:
    """Keep a scan for a later pass over the same `source` (JSON values that identify it); the file appears when it is whole."""
    facts = {"wanted": asdict(wanted), "source": list(source), "cuts": scan.cuts, "box": scan.box}
    arrays = {name: getattr(scan, name) for name in (*_FRAMES, *_SAMPLES)}
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with aside.open("wb") as file:
        np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
    os.replace(aside, path)


def load_scan(path: Path, wanted: Wanted, source: Sequence[Any]) -> tuple[Scan, Wanted] | None:
    """The scan that was kept at `path` and what was wanted of it; None where there is none, or it is of another source or
    measured less than is wanted now.

    Raises:
        DataError: the file cannot be read.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            made_for = Wanted(**facts["wanted"])
            if facts["source"] != list(source) or not made_for.covers(wanted):
                return None
            arrays = {name: file[name] for name in (*_FRAMES, *_SAMPLES)}
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"the kept scan {path} cannot be read ({error}); delete it and run again") from None
    assert {*arrays, "cuts", "box"} == {field.name for field in fields(Scan)}
    return Scan(**arrays, cuts=facts["cuts"], box=tuple(facts["box"])), made_for
