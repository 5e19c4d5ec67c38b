"""What the stages of curation exchange: rows of paths and facts, never bytes of video; and what a stage is.

Where a stage works is its `placement`:

- `child`: one row after the other, in an isolated process; takes a row and gives zero or more rows. To refuse one it raises
  `Rejected` (the clip is sound but not wanted) or `Unusable` (the file is broken: it goes to quarantine).
- `barrier`: compares rows of the whole dataset; rows that share a key meet in one place (see `exchange.py`).
- `model`: batches of clips on a pool of Ray actors that hold weights (see `actors.py`).

Adding a stage is one file, one line in `videofm.registry` and one section in `videofm/config/curation_stages.py`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from data_pipelines.workspace import Workspace


@dataclass(frozen=True)
class SourceInfo:
    """Facts about a source file. Sizes are those of the picture as shown (rotation applied); `num_frames` counts packets."""

    sha256: str
    packets_sha256: str
    container: str
    codec: str
    num_frames: int
    fps: float
    height: int
    width: int
    duration: float


@dataclass(frozen=True)
class ClipFile:
    """A finished clip on scratch disk, in the canonical form."""

    path: str
    num_frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class Row:
    """A source, or after `split` a clip of it: its frames `[start, stop)` in presentation order (stop None: to the end).

    `source_id` is a hash of the path within the source folder: known before a byte is read, the same on every machine, and
    different for two copies of a file (dedup needs to tell them apart). `path` is where the file lies here.

    `span` is the part of a long source that is worked on as if it were the whole: seconds `[from, to)` since its first frame;
    `start` and `stop` then count from the first frame of the span. `border` is the picture inside black borders: top, left,
    height, width in pixels of the shown frame. `features` are small arrays as text (`pack_array`). `promised_sha256` is what a
    list of sources said about the file, empty where it said nothing. `scored_by` names the model that made a score, a feature
    or a caption, by the SHA-256 of its files; `captions` are all texts that a model wrote, by the name of their prompt.
    """

    source_id: str
    name: str
    path: str
    num_bytes: int
    info: SourceInfo | None = None
    start: int = 0
    stop: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    caption: str = ""
    clip: ClipFile | None = None
    features: dict[str, str] = field(default_factory=dict)
    border: tuple[int, int, int, int] | None = None
    span: tuple[float, float] | None = None
    promised_sha256: str = ""
    scored_by: dict[str, str] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """Name of what a child process opens at once: the source, or a span of it. Sorts as the spans do."""
        return self.source_id if self.span is None else f"{self.source_id}-{round(self.span[0] * 1000):010d}"

    @property
    def key(self) -> str:
        """Name of the clip in its shard: unique, and ascending with source, span and first frame."""
        return f"{self.unit}-{self.start:08d}"

    def with_(self, **changes: Any) -> Row:
        """This row with some fields changed."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Row:
        """The inverse of `to_json`."""
        info, clip, border, span = value["info"], value["clip"], value["border"], value["span"]
        tuples = {"border": border and tuple(border), "span": span and tuple(span)}
        return cls(**{**value, **tuples, "info": info and SourceInfo(**info), "clip": clip and ClipFile(**clip)})


def pack_array(array: np.ndarray[Any, Any]) -> str:
    """The values of a small array as base64 text, for `Row.features`; its dtype and shape are the reader's to know."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def unpack_array(text: str, dtype: Any) -> np.ndarray[Any, Any]:
    """The inverse of `pack_array`: the values of `dtype`, flat."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)


class Refusal(Exception):
    """A row that goes no further, with a reason of one word for the funnel and a detail for people. `scores` are those that
    the stage measured before it refused; they are told with the loss, beside those that the row had."""

    kind: ClassVar[str]

    def __init__(self, reason: str, detail: str = "", scores: dict[str, float] | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.scores = reason, detail, dict(scores or {})


class Rejected(Refusal):
    """Sound, but not wanted."""

    kind = "dropped"


class Unusable(Refusal):
    """Broken: quarantined, and never tried again."""

    kind = "quarantined"


@dataclass(frozen=True)
class Loss:
    """A row that left the pipeline. `kind` is `dropped`, `quarantined` or `errors`; `num_rows` is more than one when a crash
    took all the clips of a source. `scores` are those the row had; `span` as in `Row`."""

    kind: str
    stage: str
    source: str
    reason: str
    detail: str = ""
    start: int | None = None
    stop: int | None = None
    num_rows: int = 1
    scores: dict[str, float] = field(default_factory=dict)
    span: tuple[float, float] | None = None


Placement = Literal["child", "barrier", "model"]


class Stage(Protocol):
    """A stage that works on one row, in a child process. It is built from its section of the config."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    """Stages that must come before it."""
    placement: ClassVar[Placement]

    def __init__(self, config: Any) -> None: ...

    def process(self, row: Row, work: Workspace) -> list[Row]:
        """The rows that `row` becomes; `work` decodes its source.

        Raises:
            Rejected, Unusable: it goes no further.
        """
        ...


class BarrierStage(Protocol):
    """A stage that compares rows of the whole dataset. No process ever holds all of them: rows that share a key meet.

    What it drops may depend on the set of rows only, not on their order or on how they lie in groups.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    placement: ClassVar[Placement]
    num_fit_rows: int
    """How many rows `fit` looks at; 0 for a stage that fits nothing."""

    def __init__(self, config: Any) -> None: ...

    def fit(self, rows: Sequence[Row]) -> dict[str, Any]:
        """State for `keys`, as JSON values, from the `num_fit_rows` rows of smallest hash. Called once, if at all."""
        ...

    def keys(self, row: Row, state: dict[str, Any] | None) -> list[str]:
        """The keys of a row; `state` is what `fit` gave, None for a stage that fits nothing."""
        ...

    def choose(self, key: str, rows: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
        """Of the rows that share `key`, sorted by name and start, those to drop, with reason and detail. A row that one of its
        keys drops is dropped."""
        ...


@dataclass(frozen=True)
class FrameRequest:
    """The frames that a model wants of each clip: `num_frames` uniformly spaced ones, resized to cover `height` x `width` and
    cropped about the centre."""

    num_frames: int
    height: int
    width: int


class ModelStage(Protocol):
    """A stage with weights; works on batches of clips in a Ray actor. Its section has `num_actors`, `num_gpus`, `num_cpus`."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    placement: ClassVar[Placement]
    frames: FrameRequest

    def __init__(self, config: Any) -> None: ...

    def load(self, device: str) -> None:
        """Read the weights; called once, in the actor."""
        ...

    def process_batch(self, rows: Sequence[Row], frames: Sequence[np.ndarray[Any, Any]]) -> list[Row | Rejected]:
        """One answer a row; `frames` are RGB uint8 `(T, H, W, 3)` as asked for in `self.frames`."""
        ...

    def weights_hash(self) -> str:
        """SHA-256 (hex) over the files of weights; called in the driver, before `load`."""
        ...
