"""Small pictures of clips for the report, decoded in a child process: what was refused may well be hostile.

The child is that of curation with another stage list: `python -m data_pipelines.thumbnails`. A picture of a clip that begins
late in a long file is found by seeking, so it costs no more than one of the first minute.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import cv2
import numpy as np

from data_pipelines.child import die_with_parent, run_isolated
from data_pipelines.isolate import Isolate
from data_pipelines.rows import Placement, Row, Unusable
from data_pipelines.scratch import scratch_folder
from data_pipelines.sources import is_list
from data_pipelines.video import open_video
from data_pipelines.workspace import Workspace
from videofm.data import storage
from videofm.data.decoders.pyav import Converter
from videofm.errors import DataError, MissingError

COMMAND = (sys.executable, "-m", "data_pipelines.thumbnails")
MAX_HEIGHT, MAX_WIDTH = 120, 176
"""A picture fits into this many pixels; a smaller frame stays as it is."""
MAX_BYTES = 8 << 10
"""A picture has at most this many bytes of JPEG: its quality is lowered until it does."""
MAX_FETCH, MAX_FETCHED = 32 << 20, 512 << 20
"""Bytes of a remote source, and of all of them: larger ones are not copied for a picture."""
_QUALITIES = (82, 70, 55, 40, 25, 10)
_NEAR = 600
"""A frame with at most this index is found by counting frames from the first, which is exact; a later one by seeking to its
time, which is exact where the frame rate is constant."""
_MEMORY_MIB = 1024
_PREFIX = "picture_"
_SCRATCH = "videofm-thumbnails"


class ThumbnailStage:
    """Puts JPEG pictures of `num_frames` frames of a row, evenly spaced in `[start, stop)`, into its features as base64."""

    name: ClassVar[str] = "thumbnails"
    requires: ClassVar[tuple[str, ...]] = ()
    placement: ClassVar[Placement] = "child"

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames

    def process(self, row: Row, work: Workspace) -> list[Row]:
        pictures = [base64.b64encode(as_jpeg(frame)).decode() for frame in spaced_frames(work.path, row, self.num_frames)]
        return [row.with_(features={f"{_PREFIX}{index:03d}": picture for index, picture in enumerate(pictures)})]


class Thumbnails:
    """Makes the pictures of a report; each is a JPEG file.

    Args:
        source: where curation took its sources from, a folder or a list.
        seconds: time for all pictures together; what is asked for later is refused.
        timeout: time for the pictures of one clip, in seconds.
    """

    def __init__(self, source: str, seconds: float = 180.0, timeout: float = 30.0) -> None:
        self.source, self.seconds, self.timeout = source, seconds, timeout
        self._stack = ExitStack()
        self._isolates: dict[int, Isolate] = {}
        self._spent, self._num_fetched = 0.0, 0

    def __enter__(self) -> Thumbnails:
        self._scratch = self._stack.enter_context(scratch_folder(_SCRATCH, Path(tempfile.gettempdir())))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        self._isolates.clear()

    def of_source(self, name: str, start: int | None, stop: int | None, span: tuple[float, float] | None) -> bytes:
        """The middle frame of the frames `[start, stop)` of the source `name` (None: of all), counted in `span`, if given.

        Raises:
            DataError: the source is gone, no longer decodes, or there is no time left; the message is short.
        """
        try:
            with self._local(place_of(self.source, name)) as path:
                return self._pictures(path, 1, start or 0, stop, span)[0]
        except MissingError:
            raise DataError("the source is gone") from None

    def of_clip(self, video: bytes, num_frames: int) -> list[bytes]:
        """At most `num_frames` frames, evenly spaced, of the file `video`.

        Raises:
            DataError: it does not decode, or there is no time left.
        """
        path = self._scratch / "clip.mp4"
        path.write_bytes(video)
        return self._pictures(path, num_frames)

    @contextmanager
    def _local(self, place: str) -> Iterator[Path]:
        """A source as a local file; a remote one is copied if it is small and few bytes were copied before."""
        path = storage.local_path(place)
        if path is not None:
            if not path.is_file():
                raise MissingError(f"{path} is missing")
            yield path
            return
        self._check_time()
        if self._num_fetched >= MAX_FETCHED:
            raise DataError(f"not fetched: {MAX_FETCHED >> 20} MiB of other sources were")
        begun = time.monotonic()
        try:
            content = storage.read_bytes(place, 0, MAX_FETCH + 1)
        finally:
            self._spent += time.monotonic() - begun
        self._num_fetched += len(content)
        if len(content) > MAX_FETCH:
            raise DataError(f"not fetched: larger than {MAX_FETCH >> 20} MiB")
        path = self._scratch / "source"
        path.write_bytes(content)
        yield path

    def _check_time(self) -> None:
        if self._spent > self.seconds:
            raise DataError(f"no time left: all pictures have {self.seconds:g} s")

    def _pictures(
        self, path: Path, num_frames: int, start: int = 0, stop: int | None = None, span: tuple[float, float] | None = None
    ) -> list[bytes]:
        self._check_time()
        begun = time.monotonic()
        row = Row("thumbnail", path.name, str(path), path.stat().st_size, start=start, stop=stop, span=span)
        result = self._isolate(num_frames).run(row)
        self._spent += time.monotonic() - begun
        if result.failure is not None:
            raise DataError(f"no picture: {result.failure.kind}")
        for loss in itertools.chain.from_iterable(stage["losses"] for stage in result.stages):
            raise DataError(f"no picture: {loss['reason']}")
        features = result.rows[0].features
        return [base64.b64decode(features[name]) for name in sorted(features) if name.startswith(_PREFIX)]

    def _isolate(self, num_frames: int) -> Isolate:
        if num_frames not in self._isolates:
            isolate = Isolate([{"num_frames": num_frames}], self._scratch, _MEMORY_MIB, self.timeout, COMMAND)
            self._isolates[num_frames] = self._stack.enter_context(isolate)
        return self._isolates[num_frames]


def place_of(source: str, name: str) -> str:
    """Where the source `name` of the folder or list `source` lies. A signature that its address had is not known any more."""
    if not is_list(source):
        return storage.join(source, name)
    path, listed_in = storage.local_path(name), storage.local_path(source)
    if path is None:
        return name
    if listed_in is not None:
        return str(listed_in.parent / path)
    return storage.join(source.partition("?")[0].rpartition("/")[0], name)


def as_jpeg(frame: np.ndarray[Any, Any]) -> bytes:
    """RGB uint8 `(H, W, 3)` as a JPEG of at most `MAX_BYTES`, made smaller where it does not fit into the largest size.

    Raises:
        Unusable: no quality makes it small enough.
    """
    height, width = frame.shape[:2]
    scale = min(1.0, MAX_HEIGHT / height, MAX_WIDTH / width)
    if scale < 1:
        frame = cv2.resize(frame, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
    image = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
    for quality in _QUALITIES:
        done, content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        if done and len(content) <= MAX_BYTES:
            return content.tobytes()
    raise Unusable("no_picture", f"no JPEG of {width}x{height} pixels has at most {MAX_BYTES} bytes")


def spaced_frames(path: Path, row: Row, num_frames: int) -> Iterator[np.ndarray[Any, Any]]:
    """Frames of `row` at the middles of `num_frames` equal parts, RGB uint8 `(H, W, 3)`; fewer where it has fewer.

    Raises:
        Unusable: nothing decodes.
    """
    to_rgb, found = Converter(), False
    with open_video(path) as (container, stream):
        start, stop = _bounds(container, stream, row)
        wanted = sorted({start + (stop - start) * (2 * i + 1) // (2 * num_frames) for i in range(num_frames)})
        for frame in _nearest(container, stream, wanted):
            found = True
            yield to_rgb(frame)
    if not found:
        raise Unusable("undecodable", "no frame decodes")


def _bounds(container: Any, stream: Any, row: Row) -> tuple[int, int]:
    """First frame of `row` and the one after its last, counted from the start of the file."""
    first, end = 0, _count(container, stream)
    if row.span:  # the frames whose time lies in it; the last span of a source goes on beyond its end
        first, last = (math.ceil(edge * _rate(stream) - 1e-3) for edge in row.span)
        end = min(last, max(end, first + 1))
    start = first + row.start
    return start, max(start + 1, end if row.stop is None else first + row.stop)


def _count(container: Any, stream: Any) -> int:
    """About how many frames there are; 1 where the file does not say."""
    seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    return int(stream.frames or seconds * _rate(stream) or 1)


def _rate(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def _nearest(container: Any, stream: Any, wanted: list[int]) -> Iterator[Any]:
    """The frames with the indices `wanted` (ascending); in place of the first beyond the end, the last frame."""
    if wanted[-1] > _NEAR:
        for index in wanted:
            yield from itertools.islice(_sought(container, stream, index), 1)
        return
    left, last = list(wanted), None
    for index, frame in enumerate(container.decode(stream)):
        last = frame
        if index == left[0]:
            yield frame
            last = None
            left.pop(0)
            if not left:
                return
    if last is not None:
        yield last


def _sought(container: Any, stream: Any, index: int) -> Iterator[Any]:
    """Frames from the time of frame `index` on; the last one where they end before."""
    target = (stream.start_time or 0) + int((index - 0.5) / _rate(stream) / stream.time_base)  # between it and the one before
    container.seek(target, stream=stream)
    last = None
    for frame in container.decode(stream):
        if frame.pts is not None and frame.pts >= target:
            yield frame
            return
        last = frame
    if last is not None:
        yield last


def main() -> None:
    """Serve the rows that come on standard input, as `data_pipelines.child` does."""
    die_with_parent()
    header = json.loads(sys.stdin.readline())
    stages = [ThumbnailStage(**section) for section in header["stages"]]
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run_isolated(stages, Row.from_json(json.loads(line)), header)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
