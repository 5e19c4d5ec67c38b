"""What the stages of curation exchange: rows of paths and facts, never bytes of video; and what a stage is.

A stage takes a row and gives zero or more rows; to refuse one it raises `Rejected` (the clip is sound but not wanted) or
`Unusable` (the file is broken: it goes to quarantine). A stage whose class says `barrier = True` sees all rows at once, in the
driver, so it must be cheap. Adding a stage is one file, one line in `videofm.registry` and one section in `config/data.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

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

    def with_(self, **changes: Any) -> Row:
        """This row with some fields changed."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Row:
        """The inverse of `to_json`."""
        info, clip = value["info"], value["clip"]
        return cls(**{**value, "info": info and SourceInfo(**info), "clip": clip and ClipFile(**clip)})


class Refusal(Exception):
    """A row that goes no further, with a reason of one word for the funnel and a detail for people."""

    kind: ClassVar[str]

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Rejected(Refusal):
    """Sound, but not wanted."""

    kind = "dropped"


class Unusable(Refusal):
    """Broken: quarantined, and never tried again."""

    kind = "quarantined"


@dataclass(frozen=True)
class Loss:
    """A row that left the pipeline. `kind` is `dropped`, `quarantined` or `errors`; `num_rows` is more than one when a crash
    took all the clips of a source."""

    kind: str
    stage: str
    source: str
    reason: str
    detail: str = ""
    start: int | None = None
    stop: int | None = None
    num_rows: int = 1


class Stage(Protocol):
    """A stage that works on one row, in a child process. It is built from its section of the config."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    """Stages that must come before it."""
    barrier: ClassVar[bool]

    def __init__(self, config: Any) -> None: ...

    def process(self, row: Row, work: Workspace) -> list[Row]:
        """The rows that `row` becomes; `work` decodes its source.

        Raises:
            Rejected, Unusable: it goes no further.
        """
        ...


class BarrierStage(Protocol):
    """A stage that sees all rows, in the driver."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    barrier: ClassVar[bool]

    def __init__(self, config: Any) -> None: ...

    def process_all(self, rows: Sequence[Row]) -> tuple[list[Row], list[Loss]]:
        """The rows that stay, and those that do not."""
        ...
