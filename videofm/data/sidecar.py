"""Sidecar shards: what frozen encoders make of the clips of a shard, beside it and under the same keys.

```
header-latents.json                      what encoded, on what: one a kind (`latents`, `tokens`, `text`)
sidecars/shard-00003.latents.tar         header.json; then KEY.latents.safetensors for each clip
sidecars/shard-00003.tokens.tar          header.json; then KEY.tokens.safetensors for each clip
sidecars/shard-00003.text.tar            header.json; header.empty.safetensors (the empty caption); KEY.text.safetensors
index/shard-00003.latents.parquet        one row a clip: where its tensors lie in the tar, their SHA-256, the content key
manifest/shard-00003.latents.json        the commit point
```

A *content key* is the SHA-256 of all that decides the tensors: of latents and tokens the header, the SHA-256 of the clip's mp4,
its frames and its window, and of tokens with rollouts the caption; of text the header and the caption (UTF-8, NFC). The header
has the encoder's name, config, the SHA-256 of its weights (and tokenizer), types, and the version of the code; of tokens also
the VAE's, and the hash of the codebook. A reader recomputes the key for what it is about to replace, so that nothing stale is
ever used. Tensors: `mean` and `logvar`, or `sample`, `(C, T, H, W)`; `indices` and, where an AR model made them, `rollouts`,
`(T', H', W')` int32; `text` `(L, D)` without padding and, of a second encoder, `clip_text` `(M, E)`. Bytes depend on content
alone, as those of shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import unicodedata
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import pyarrow
import pyarrow.parquet
from safetensors.torch import load, save
from torch import Tensor

from videofm.data import storage
from videofm.data.files import HashingFile, lock
from videofm.data.reader import BadClipError
from videofm.errors import DataError, MissingError
from videofm.files import sha256_of, sync

VERSION = 1
KINDS = ("latents", "tokens", "text")
EMPTY = "header.empty.safetensors"
_MAX_ROWS = 300_000
"""Rows of indexes that a reader keeps: a window of 256 shards of a thousand clips fits."""


@dataclass(frozen=True)
class SidecarEntry:
    """The manifest entry of a sidecar. `shard_sha256` is that of the tar whose clips were encoded; `failed` names clips that
    do not decode, with the reason."""

    version: int
    kind: str
    group: str
    tar: str
    bytes: int
    sha256: str
    index: str
    index_sha256: str
    shard_sha256: str
    header_sha256: str
    num_clips: int
    failed: dict[str, str]


def canonical(value: Any) -> str:
    """One text for equal plain values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def hash_of(value: Any) -> str:
    """SHA-256 (hex) of plain values."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def content_key(header_sha256: str, made_from: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of all that decides what is stored of a clip."""
    return hash_of({"header": header_sha256, **made_from})


def text_source(caption: str) -> dict[str, Any]:
    """What embeddings are made from, besides the encoder."""
    return {"caption": unicodedata.normalize("NFC", caption)}


def entry_path(folder: Path, group: str, kind: str) -> Path:
    """Where the entry of a sidecar stands."""
    return Path(folder) / "manifest" / f"shard-{group}.{kind}.json"


def header_name(kind: str) -> str:
    """The file of the header of a kind."""
    return f"header-{kind}.json"


def parse_entry(text: str | bytes, place: str) -> SidecarEntry:
    """A manifest entry from its JSON.

    Raises:
        DataError: not an entry of this version.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}; encode again") from None
    if not isinstance(value, dict) or value.get("version") != VERSION or set(value) != {f.name for f in fields(SidecarEntry)}:
        found = value.get("version") if isinstance(value, dict) else None
        raise DataError(f"{place} is not a sidecar entry of version {VERSION} (found version {found!r}); encode again")
    return SidecarEntry(**value)


class SidecarWriter:
    """Writes one sidecar; visible from `commit` on. Leaving the context without it removes what was written."""

    def __init__(self, folder: Path, group: str, kind: str, header: Mapping[str, Any], shard_sha256: str) -> None:
        assert kind in KINDS, kind
        self.folder, self.group, self.kind = Path(folder), group, kind
        self.header_sha256, self.shard_sha256 = hash_of(header), shard_sha256
        self.tar, self.index = f"sidecars/shard-{group}.{kind}.tar", f"index/shard-{group}.{kind}.parquet"
        for name in ("sidecars", "index", "manifest"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._rows: list[dict[str, Any]] = []
        self._failed: dict[str, str] = {}
        self._suffix = f".tmp-{os.getpid()}-{os.urandom(4).hex()}"
        self._file = HashingFile((self.folder / (self.tar + self._suffix)).open("wb"))
        self._archive = tarfile.TarFile(fileobj=cast(IO[bytes], self._file), mode="w", format=tarfile.USTAR_FORMAT)
        self._member("header.json", canonical(header).encode())

    def __enter__(self) -> SidecarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._discard()

    def add(self, key: str, tensors: Mapping[str, Tensor], made_from: Mapping[str, Any]) -> None:
        """Store the tensors of a clip, which were made from `made_from` and what the header says."""
        self._store(key, f"{key}.{self.kind}.safetensors", tensors, made_from)

    def add_empty(self, tensors: Mapping[str, Tensor]) -> None:
        """Store the embeddings of the empty caption."""
        self._store("", EMPTY, tensors, text_source(""))

    def fail(self, key: str, reason: str) -> None:
        """Note that a clip cannot be encoded."""
        self._failed[key] = reason

    def commit(self) -> SidecarEntry:
        """Make the sidecar visible: flush, write the index, rename both, and create the manifest entry.

        Returns:
            the entry; where another writer was first, that writer's, which has the same content.
        """
        self._archive.close()
        self._file.sync()
        temporary = self.folder / (self.index + self._suffix)
        names = ("key", "offset", "size", "sha256", "content_key", "made_from")
        rows = sorted(self._rows, key=lambda row: str(row["key"]))
        pyarrow.parquet.write_table(pyarrow.table({name: [row[name] for row in rows] for name in names}), temporary)
        sync(temporary)
        entry = SidecarEntry(
            VERSION, self.kind, self.group, self.tar, self._file.count, self._file.hash.hexdigest(), self.index,
            sha256_of(temporary), self.shard_sha256, self.header_sha256, sum(row["key"] != "" for row in rows), self._failed,
        )  # fmt: skip
        path = entry_path(self.folder, self.group, self.kind)
        with lock(path.with_name(f".{path.stem}.lock")):
            if not path.exists():
                os.replace(self.folder / (self.tar + self._suffix), self.folder / self.tar)
                os.replace(temporary, self.folder / self.index)
                sync(self.folder / "sidecars")
                sync(self.folder / "index")
                _publish(path, entry)
        self._discard()
        return parse_entry(path.read_bytes(), str(path))

    def _store(self, key: str, name: str, tensors: Mapping[str, Tensor], made_from: Mapping[str, Any]) -> None:
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        offset = self._member(name, content)
        row = {"key": key, "offset": offset, "size": len(content), "sha256": hashlib.sha256(content).digest()}
        row |= {"content_key": bytes.fromhex(content_key(self.header_sha256, made_from)), "made_from": canonical(made_from)}
        self._rows.append(row)

    def _member(self, name: str, content: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        self._archive.addfile(info, BytesIO(content))
        return self._file.count - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def _discard(self) -> None:
        self._file.close()
        for name in (self.tar, self.index):
            (self.folder / (name + self._suffix)).unlink(missing_ok=True)


def _publish(path: Path, entry: SidecarEntry) -> None:
    """Create an entry whole, under the lock of its group."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(entry), indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


@dataclass(frozen=True)
class _Index:
    """The rows of a sidecar by key, and the tar that they point into."""

    tar: str
    rows: dict[str, int]
    table: pyarrow.Table
    failed: dict[str, str]

    def value(self, key: str, column: str) -> Any:
        return self.table.column(column)[self.rows[key]].as_py()


class Sidecars:
    """Reads the sidecars of one kind in a folder, which may be remote."""

    def __init__(self, place: str, kind: str) -> None:
        """
        Raises:
            DataError: nothing was encoded there.
        """
        self.place, self.kind = place, kind
        try:
            self.header: dict[str, Any] = json.loads(storage.read_bytes(storage.join(place, header_name(kind))))
        except MissingError:
            raise DataError(
                f"{storage.redacted(place)} has no {header_name(kind)}: no {kind} were encoded there; run `videofm encode` "
                f"with the section `{kind}`"
            ) from None
        self.header_sha256 = hash_of(self.header)
        self._indexes: OrderedDict[str, _Index] = OrderedDict()

    def entry(self, group: str) -> SidecarEntry:
        """The manifest entry of the sidecar of a shard.

        Raises:
            DataError: it is not encoded, or by another encoder than the header says.
        """
        place = storage.join(self.place, f"manifest/shard-{group}.{self.kind}.json")
        try:
            entry = parse_entry(storage.read_bytes(place), storage.redacted(place))
        except MissingError:
            raise DataError(
                f"the {self.kind} of shard {group} are not in {storage.redacted(self.place)}; `videofm encode` with the same "
                "config encodes what is missing"
            ) from None
        if entry.header_sha256 != self.header_sha256:
            raise DataError(
                f"the {self.kind} of shard {group} are of another encoder than {header_name(self.kind)}; encode again"
            )
        return entry

    def check(self, group: str, shard_sha256: str) -> None:
        """Refuse a sidecar of another shard than the one of this SHA-256.

        Raises:
            DataError: it is stale; both hashes are named.
        """
        entry = self.entry(group)
        if entry.shard_sha256 != shard_sha256:
            raise DataError(
                f"the {self.kind} of shard {group} in {storage.redacted(self.place)} are stale: they were made from a tar with "
                f"SHA-256 {entry.shard_sha256[:12]}, and the shard now has {shard_sha256[:12]}. Encode into a new run directory"
            )

    def read(self, group: str, key: str, made_from: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a clip of a shard (with the key ``""`` of the empty caption), where they were made from `made_from`.

        Raises:
            BadClipError: the clip could not be encoded, or what is stored is damaged.
            DataError: it was never encoded, or from something else; the message says what differs.
        """
        index = self._index(group)
        name = f"the {self.kind} of {key or 'the empty caption'} in shard {group}"
        if key not in index.rows:
            if key in index.failed:
                raise BadClipError(f"{name} are not in {storage.redacted(self.place)}: it does not decode: {index.failed[key]}")
            raise DataError(
                f"{name} are not in {storage.redacted(self.place)}: it was not among the clips encoded; encode with the "
                "split and the view of the training"
            )
        if index.value(key, "content_key").hex() != content_key(self.header_sha256, made_from):
            raise DataError(f"{name} are stale: {self._difference(index, key, made_from)}. Encode into a new run directory")
        content = storage.read_bytes(storage.join(self.place, index.tar), index.value(key, "offset"), index.value(key, "size"))
        if hashlib.sha256(content).digest() != index.value(key, "sha256"):
            raise BadClipError(
                f"{name} are damaged: their SHA-256 is not the one of the index; restore {index.tar} or encode again"
            )
        return load(content)

    def _difference(self, index: _Index, key: str, made_from: Mapping[str, Any]) -> str:
        before = json.loads(index.value(key, "made_from"))
        now = json.loads(canonical(made_from))
        changed = [name for name in now | before if now.get(name) != before.get(name)]
        return "; ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in changed) or "another key"

    def _index(self, group: str) -> _Index:
        if group in self._indexes:
            self._indexes.move_to_end(group)
            return self._indexes[group]
        entry = self.entry(group)
        place = storage.join(self.place, entry.index)
        content = storage.read_bytes(place)
        if (found := hashlib.sha256(content).hexdigest()) != entry.index_sha256:
            raise DataError(
                f"{storage.redacted(place)} is damaged: SHA-256 expected {entry.index_sha256}, found {found}; encode again"
            )
        table = pyarrow.parquet.read_table(BytesIO(content))
        keys = table.column("key").to_pylist()
        self._indexes[group] = _Index(entry.tar, {key: row for row, key in enumerate(keys)}, table, entry.failed)
        while len(self._indexes) > 1 and sum(len(index.rows) for index in self._indexes.values()) > _MAX_ROWS:
            self._indexes.popitem(last=False)
        return self._indexes[group]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, with dotted names and both values; hashes are shortened."""
    old, new = _flat(before), _flat(now)
    return [
        f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}"
        for name in old | new
        if old.get(name) != new.get(name)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {prefix + name: item}
    return found


def _short(value: Any) -> str:
    return repr(value[:12] if isinstance(value, str) and len(value) == 64 else value)
