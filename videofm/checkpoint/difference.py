"""In what two checkpoints, or folders of models, differ: keys of their JSON files, and every tensor, read one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from torch import Tensor

from videofm.checkpoint.record import COMMITTED
from videofm.checkpoint.tensors import INDEX, SUFFIX, TensorFiles, shards_of
from videofm.config.base import result_fields
from videofm.config.train import TrainConfig
from videofm.errors import CheckpointError
from videofm.run_dir import leaves, read_json

CONFIG = "train_config.json"
_PIECE = 1 << 22
"""Elements that are compared at once, in float64."""

Kind = Literal["only in A", "only in B", "shape", "dtype", "values", "equal"]


@dataclass(frozen=True)
class ValueChange:
    """A key of a JSON file that differs; None where it is absent. `decides`: whether results depend on it."""

    file: str
    key: str
    a: Any
    b: Any
    decides: bool


@dataclass(frozen=True)
class Distance:
    """How far two tensors of one shape are from each other, in float64.

    Attributes:
        num_different: elements that are not equal (NaN equals NaN).
        largest: the largest absolute difference; inf where one of two is not finite.
        relative: `largest` over the largest magnitude in either tensor.
        cosine: of the angle between them as vectors; 1 where both are zero, None where there is something not finite.
    """

    num_different: int
    largest: float
    relative: float
    cosine: float | None


@dataclass(frozen=True)
class TensorChange:
    """A tensor of both sides, or of one: in what it differs, told in `detail`, and the distance where shapes allow one."""

    group: str
    name: str
    kind: Kind
    detail: str = ""
    distance: Distance | None = None

    def differs(self, tolerance: float) -> bool:
        """Whether it is absent on a side, of another shape or dtype, or farther off than `tolerance` somewhere."""
        if self.kind in ("equal", "values") and self.distance is not None and tolerance > 0:
            return self.distance.largest > tolerance
        return self.kind != "equal"


@dataclass(frozen=True)
class Difference:
    """What was compared, and everything that differs; tensors that are equal are listed, too."""

    a: Path
    b: Path
    values: list[ValueChange]
    tensors: list[TensorChange]

    def differs(self, tolerance: float = 0.0) -> bool:
        """Whether a value that decides about results, or a tensor beyond `tolerance` (absolute), differs."""
        return any(value.decides for value in self.values) or any(tensor.differs(tolerance) for tensor in self.tensors)

    def to_json(self, tolerance: float) -> dict[str, Any]:
        """Plain values, for programs: tensors that do not differ are counted only, and what is not finite is None."""
        tensors = [asdict(tensor) for tensor in self.tensors if tensor.differs(tolerance)]
        for told in (tensor["distance"] for tensor in tensors if tensor["distance"] is not None):
            told |= {name: None for name, value in told.items() if value is not None and not math.isfinite(value)}
        return {
            "a": str(self.a),
            "b": str(self.b),
            "differs": self.differs(tolerance),
            "num_tensors": len(self.tensors),
            "values": [asdict(value) for value in self.values],
            "tensors": tensors,
        }


def compare(a: Path, b: Path) -> Difference:
    """Compare two checkpoints, two folders of models, or two safetensors files.

    Raises:
        CheckpointError: one holds no tensors, or a file is damaged.
    """
    return Difference(a, b, list(_values(a, b)), list(_tensors(a, b)))


def _values(a: Path, b: Path) -> Iterator[ValueChange]:
    ours, theirs = _json_files(a), _json_files(b)
    for file in sorted({*ours, *theirs}):
        read = [read_json(files[file]) if file in files else {} for files in (ours, theirs)]
        deciding = _deciding([value for value in read if value]) if file == CONFIG else None
        one, other = (dict(leaves(value)) for value in read)
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key) or (key in one) != (key in other):
                yield ValueChange(file, key, one.get(key), other.get(key), deciding is None or key in deciding)


def _deciding(configs: list[Any]) -> set[str] | None:
    """Keys of training configs on which results depend; None, all, where a config is not one of this version."""
    try:
        return {key for config in configs for key, _ in leaves(result_fields(TrainConfig.model_validate(config)))}
    except ValidationError:
        return None


def _json_files(folder: Path) -> dict[str, Path]:
    if folder.is_file():
        return {}
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*.json")}
    return {name: path for name, path in found.items() if path.name != COMMITTED and not name.endswith(INDEX)}


def _tensors(a: Path, b: Path) -> Iterator[TensorChange]:
    ours, theirs = groups(a), groups(b)
    if len(ours) == len(theirs) == 1:  # two models, whatever their files are called
        (name,) = ours
        theirs = dict(zip([name], theirs.values(), strict=True))
    for group in sorted({*ours, *theirs}):
        yield from _compare_group(group, ours.get(group), theirs.get(group))


def groups(path: Path) -> dict[str, tuple[Path, str]]:
    """Names of tensor files below `path` without suffix, shards taken together -> the folder and name for `TensorFiles`.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        if not path.name.endswith(SUFFIX):
            raise CheckpointError(f"{path} is no {SUFFIX} file. Nothing else is read (a pickle can run code): convert it.")
        return {path.name.removesuffix(SUFFIX): (path.parent, path.name.removesuffix(SUFFIX))}
    indexes = sorted(path.rglob(f"*{INDEX}"))
    shards = {shard for index in indexes for shard in shards_of(index).values()}
    whole = [file for file in sorted(path.rglob(f"*{SUFFIX}")) if file not in shards]
    names = {str(file.relative_to(path)).removesuffix(INDEX).removesuffix(SUFFIX) for file in (*indexes, *whole)}
    if not names:
        raise CheckpointError(f"{path} holds no {SUFFIX} file: give a run, a checkpoint, a folder of a model, or such a file")
    return {name: (path, name) for name in sorted(names)}


def _compare_group(group: str, a: tuple[Path, str] | None, b: tuple[Path, str] | None) -> Iterator[TensorChange]:
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(TensorFiles(*side)) if side else None for side in (a, b))
        in_a, in_b = (set(files.keys()) if files else set() for files in (ours, theirs))
        for key in sorted(in_a | in_b):
            if ours is None or theirs is None or key not in in_a & in_b:
                yield TensorChange(group, key, "only in A" if key in in_a else "only in B")
            else:
                yield _compare_tensor(group, key, ours, theirs)


def _compare_tensor(group: str, key: str, ours: TensorFiles, theirs: TensorFiles) -> TensorChange:
    shapes = ours.shape(key), theirs.shape(key)
    if shapes[0] != shapes[1]:
        return TensorChange(group, key, "shape", f"{shapes[0]} | {shapes[1]}")
    distance = distance_of(ours.tensor(key), theirs.tensor(key))
    dtypes = ours.dtype(key), theirs.dtype(key)
    if dtypes[0] != dtypes[1]:
        return TensorChange(group, key, "dtype", f"{dtypes[0]} | {dtypes[1]}", distance)
    return TensorChange(group, key, "values" if distance.num_different else "equal", "", distance)


def distance_of(a: Tensor, b: Tensor) -> Distance:
    """The distance of two tensors of one shape."""
    different, largest, magnitude = 0, 0.0, 0.0
    dot = squares_a = squares_b = 0.0
    for piece_a, piece_b in zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True):
        x, y = piece_a.double(), piece_b.double()
        if not len(x):
            continue
        same = (piece_a == piece_b) | (x.isnan() & y.isnan()) if a.dtype == b.dtype else (x == y) | (x.isnan() & y.isnan())
        different += int((~same).sum())
        gaps = (x - y).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        largest = max(largest, float(gaps.max()))
        magnitude = max(magnitude, float(x.nan_to_num(nan=0.0).abs().max()), float(y.nan_to_num(nan=0.0).abs().max()))
        dot, squares_a, squares_b = dot + float(x @ y), squares_a + float(x @ x), squares_b + float(y @ y)
    relative = largest / magnitude if magnitude else 0.0
    return Distance(different, largest, math.inf if math.isnan(relative) else relative, _cosine(dot, squares_a, squares_b))


def _cosine(dot: float, squares_a: float, squares_b: float) -> float | None:
    norm = (squares_a * squares_b) ** 0.5
    if not (math.isfinite(dot) and math.isfinite(norm)):
        return None
    if norm == 0:
        return 1.0 if squares_a == squares_b == 0 else 0.0
    return max(-1.0, min(1.0, dot / norm))
