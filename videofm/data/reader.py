"""From a place in a shard to frames: fetch the clip's bytes, see that they are the right ones, decode, resize, cut."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from videofm.data import storage
from videofm.data.cache import ShardCache
from videofm.data.decode import Decoder, choose
from videofm.errors import DataError
from videofm.pixels import scaled


class BadClipError(DataError):
    """A clip whose bytes are damaged or do not decode, now or later: another sample takes its place."""


@dataclass(frozen=True)
class ReaderSettings:
    """How clips are read, in plain values that travel to decoding processes; see `DataConfig` and `ReadingConfig`."""

    decoder: str = "auto"
    cache_mib: int = 0
    read_timeout: float = storage.TIMEOUT
    cache_dir: str | None = None
    cache_gib: float = 100.0


@dataclass(frozen=True)
class ClipRequest:
    """The pixels of a draw, and where they are. Whoever holds it needs neither plan nor index.

    Attributes:
        key: of the clip, for messages.
        place: of its shard.
        offset: of its file in the shard, in bytes.
        size: of its file, in bytes.
        sha256: of its file (hex); None does not check it.
        shard_sha256: of the shard (hex).
        shard_bytes: length of the shard.
        canonical: whether we encoded it, and any decoder may read it.
        stored: height and width of its frames.
        num_stored: how many there are.
        frames: start, stop and step of the frames to read.
        resized: height and width that frames are brought to.
        window: top, left, height and width of what is cut from them.
    """

    key: str
    place: str
    offset: int
    size: int
    sha256: str | None
    shard_sha256: str
    shard_bytes: int
    canonical: bool
    stored: tuple[int, int]
    num_stored: int
    frames: tuple[int, int, int]
    resized: tuple[int, int]
    window: tuple[int, int, int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the frames that are read, (T, H, W, 3)."""
        return len(range(*self.frames)), self.window[2], self.window[3], 3

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ClipRequest:
        """The inverse of `to_json`."""
        plain: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
        return cls(**plain)

    def describe(self) -> str:
        """The clip in messages."""
        return f"clip {self.key} of {storage.redacted(self.place)}"


class ClipReader:
    """Reads clips in this process. Keeps recently decoded clips up to a number of bytes.

    Attributes:
        counts: how clips were fetched from remote shards; see `ShardCache.counts`.
    """

    def __init__(self, settings: ReaderSettings) -> None:
        """
        Raises:
            ConfigError: the folder for copies of shards cannot be made.
        """
        self.settings = settings
        self._decoders: dict[bool, Decoder] = {}
        self._cache: OrderedDict[tuple[str, str, tuple[int, int]], np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        self._copies: ShardCache | None = None
        if settings.cache_dir is not None:
            self._copies = ShardCache(settings.cache_dir, int(settings.cache_gib * 2**30), settings.read_timeout)

    @property
    def counts(self) -> Counter[str]:
        return self._copies.counts if self._copies is not None else Counter()

    def decoder(self, canonical: bool = True) -> Decoder:
        """The decoder for our own clips, or for those of others.

        Raises:
            ConfigError, DataError: see `decode.choose`.
        """
        # Chosen in the process that uses it: it need not survive the trip to a worker.
        if canonical not in self._decoders:
            self._decoders[canonical] = choose(self.settings.decoder, canonical)
        return self._decoders[canonical]

    def read(self, request: ClipRequest, on_fetched: Callable[[], None] | None = None) -> np.ndarray:
        """The frames of a request, uint8 `request.shape`.

        Args:
            request: what to read.
            on_fetched: called between the work of the store and that of the decoder.

        Raises:
            BadClipError: the clip is damaged or does not decode.
            MissingError, TransientError: its shard is not there, or cannot be reached.
        """
        wanted = range(*request.frames)
        if self.settings.cache_mib:
            frames = self._whole(request, on_fetched)[wanted.start : wanted.stop : wanted.step]
        else:
            frames = self._decode(request, wanted, on_fetched)
        top, left, height, width = request.window
        return frames[:, top : top + height, left : left + width]

    def fetch(self, request: ClipRequest) -> bytes:
        """The clip's file.

        Raises:
            BadClipError: the shard is too short, or has other bytes there than its index says.
            MissingError, TransientError: the shard is not there, or cannot be reached.
        """
        for copies in (self._copies, None):  # a second look, past the copy: the network or a disk may have failed once
            content = None
            if copies is not None and not storage.is_local(request.place):
                content = copies.read(request.place, request.shard_sha256, request.shard_bytes, request.offset, request.size)
            if content is None:
                content = storage.read_bytes(request.place, request.offset, request.size, timeout=self.settings.read_timeout)
            problem = _problem(request, content)
            if problem is None:
                return content
        raise BadClipError(f"{request.describe()}: {problem}")

    def _whole(self, request: ClipRequest, on_fetched: Callable[[], None] | None) -> np.ndarray:
        """All frames of a clip at a size, from memory where they are."""
        name = (request.place, request.key, request.resized)
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name]
        frames = self._decode(request, range(request.num_stored), on_fetched)
        self._cache[name] = frames
        self._cached_bytes += frames.nbytes
        while self._cached_bytes > self.settings.cache_mib << 20 and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return frames

    def _decode(self, request: ClipRequest, frames: range, on_fetched: Callable[[], None] | None) -> np.ndarray:
        decoder, content = self.decoder(request.canonical), self.fetch(request)
        if on_fetched is not None:
            on_fetched()
        try:
            images = decoder.read(content, frames)
        except DataError as error:
            raise BadClipError(f"{request.describe()}: {error}") from error
        except Exception as error:  # what a library makes of damaged bytes is open-ended
            raise BadClipError(f"{request.describe()}: {decoder.name} failed with {type(error).__name__}: {error}") from error
        if images.shape != (len(frames), *request.stored, 3):
            expected = f"{len(frames)} of {request.stored[0]}x{request.stored[1]}"
            found = f"{images.shape[0]} of {images.shape[1]}x{images.shape[2]}"
            raise BadClipError(
                f"{request.describe()}: its index promises frames ({expected}) that are not those read ({found})"
            )
        return resize(images, *request.resized)


def _problem(request: ClipRequest, content: bytes) -> str | None:
    """What is wrong with the bytes of a clip, or None."""
    if len(content) != request.size:
        return f"the shard ended early ({len(content)} of {request.size} bytes at {request.offset}); restore it or curate again"
    if request.sha256 is None:
        return None
    found = hashlib.sha256(content).hexdigest()
    if found != request.sha256:
        return f"its bytes are damaged (SHA-256 expected {request.sha256}, found {found}); restore the shard or curate again"
    return None


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 frames `(T, H, W, 3)` at another size, bilinear and antialiased; each frame by itself."""
    if frames.shape[1:3] == (height, width):
        return frames
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (T, H, W, C) -> (T, C, H, W)
    images = interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1).contiguous().numpy()  # (T, C, H, W) -> (T, H, W, C)


def video_view(frames: np.ndarray) -> torch.Tensor:
    """uint8 frames `(B, T, H, W, 3)` as a video `(B, 3, T, H, W)`, still uint8 and the same memory."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3)  # (B, T, H, W, C) -> (B, C, T, H, W)


def video_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 frames `(B, T, H, W, 3)` as a float32 video `(B, 3, T, H, W)` in [-1, 1]."""
    return scaled(video_view(frames))
