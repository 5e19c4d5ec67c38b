"""Reading the tars of others: where each member lies, without extracting anything, and with every oddity named.

`tarfile` and `webdataset` end quietly at a cut, at garbage and at the first of two concatenated tars; a header can ask them for
gigabytes. Here headers are read one by one within limits: what cannot be trusted as a whole is a `TarDamage`, and a member that
must not be used is told in `TarScan.refused`.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from videofm.errors import DataError

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_MAX_EXTENSION = 1 << 16
"""Bytes of a long name or of a pax header; names have at most 255."""
_MAX_NAME = 255
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = {
    tarfile.LNKTYPE: "link", tarfile.SYMTYPE: "link", tarfile.CHRTYPE: "device", tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "device", tarfile.DIRTYPE: "folder",
}  # fmt: skip


class TarDamage(DataError):
    """A tar that is not used at all, with a reason of one word for counts and a detail for people."""

    def __init__(self, path: Path, reason: str, detail: str) -> None:
        super().__init__(f"{path} is not used ({reason}): {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar: its name, the position of its first byte, and its bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class RefusedMember:
    """A member that is not used."""

    name: str
    reason: str
    detail: str


@dataclass
class TarScan:
    """The members of a tar, in its order, and those that are refused. Folders are only counted."""

    members: list[TarMember] = field(default_factory=list)
    refused: list[RefusedMember] = field(default_factory=list)
    num_folders: int = 0


@dataclass(frozen=True)
class TarLimits:
    """Largest member, in bytes, and most members of a tar."""

    max_member_bytes: int = 2 << 30
    max_members: int = 200_000


def scan_tar(path: Path, limits: TarLimits = TarLimits()) -> TarScan:
    """The members of the tar at `path`; only headers are read.

    Raises:
        TarDamage: it is empty, compressed, no tar, cut, sparse, followed by other data, or holds too many members.
    """
    with path.open("rb") as file:
        return _Scanner(path, file, limits).scan()


class _Scanner:
    def __init__(self, path: Path, file: IO[bytes], limits: TarLimits) -> None:
        self.path, self.file, self.limits = path, file, limits
        self.size, self.position = os.fstat(file.fileno()).st_size, 0
        self.found = TarScan()
        self.count = 0
        self.default_extension: dict[str, str] = {}  # of a global pax header

    def scan(self) -> TarScan:
        self._first_bytes()
        extension: dict[str, str] = {}
        while (info := self._header()) is not None:
            self.count += 1
            if self.count > self.limits.max_members:
                raise self._damage("too_many_members", f"over {self.limits.max_members:,} members")
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extension |= self._pax(info)
            elif info.type == tarfile.XGLTYPE:
                self.default_extension |= self._pax(info)
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                extension["path"] = self._text(info).rstrip("\0")
            elif info.type == tarfile.GNUTYPE_LONGLINK:
                self._text(info)
            else:
                self._member(info, {**self.default_extension, **extension})
                extension = {}
        if extension:
            raise self._damage("truncated", "it ends after the extended header of a member")
        self._check_end()
        return self.found

    def _first_bytes(self) -> None:
        head = self.file.read(_BLOCK)
        if not head:
            raise self._damage("empty", "the file has no bytes")
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise self._damage("compressed", f"it is compressed ({name}): no range of it can be read; unpack it first")
        self.file.seek(0)

    def _header(self) -> tarfile.TarInfo | None:
        """The next header; None at the end of the archive."""
        block = self.file.read(_BLOCK)
        if len(block) < _BLOCK and not self.position:
            raise self._damage("not_tar", f"{len(block)} bytes, a header has {_BLOCK}")
        if len(block) < _BLOCK:
            what = "after a member" if not block else f"{len(block)} bytes into a header"
            raise self._damage(
                "truncated", f"it ends {what} at byte {self.position + len(block)}, without an end-of-archive mark"
            )
        self.position += _BLOCK
        if block == _ZEROS:
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            first = self.position == _BLOCK
            reason = "not_tar" if first else "bad_header"
            raise self._damage(reason, f"no header of a member at byte {self.position - _BLOCK} ({error})") from None
        if info.size < 0:
            raise self._damage("bad_header", f"a member of {info.size} bytes at byte {self.position - _BLOCK}")
        return info

    def _skip(self, size: int, name: str) -> None:
        """Go to the header behind the data of a member."""
        after = self.position + -(-size // _BLOCK) * _BLOCK
        if self.position + size > self.size:
            there = self.size - self.position
            raise self._damage("truncated", f"{name!r} has {there} of its {size} bytes, then the file ends")
        self.position = after
        self.file.seek(after)

    def _text(self, info: tarfile.TarInfo) -> str:
        """The data of an extended header."""
        if info.size > _MAX_EXTENSION:
            raise self._damage("bad_header", f"an extended header of {info.size} bytes, at most {_MAX_EXTENSION}")
        content = self.file.read(info.size)
        self._skip(info.size, "an extended header")
        return content.decode("utf-8", "surrogateescape")

    def _pax(self, info: tarfile.TarInfo) -> dict[str, str]:
        """The records `LENGTH KEY=VALUE\\n` of a pax header."""
        content, records = self._text(info).encode("utf-8", "surrogateescape"), {}
        while content.strip(b"\0"):
            digits, _, _ = content.partition(b" ")
            length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
            record = content[len(digits) + 1 : length]
            key, equals, value = record.partition(b"=")
            if length > len(content) or not equals or not value.endswith(b"\n"):
                raise self._damage("bad_header", f"a pax record that does not parse: {content[:40]!r}")
            records[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
            content = content[length:]
        return records

    def _member(self, info: tarfile.TarInfo, extension: dict[str, str]) -> None:
        name = extension.get("path", info.name)
        if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extension):
            # Where the next member begins depends on a map that is not worth reading: video does not compress to holes.
            raise self._damage("sparse", f"{_shown(name)} is a sparse file; pack it as an ordinary one")
        if info.type in _WITHOUT_DATA:
            kind = _WITHOUT_DATA[info.type]
            if kind == "folder" and unsafe_name(name.rstrip("/")) is None:
                self.found.num_folders += 1
            else:
                self._refuse(name, "unsafe_name" if kind == "folder" else kind, f"a {kind}; only regular files are used")
            return
        digits = extension.get("size", "")
        if digits and (not digits.isdigit() or len(digits) > 18):
            raise self._damage("bad_header", f"the size of {_shown(name)} is {digits[:20]!r}")
        size, offset = int(digits) if digits else info.size, self.position
        self._skip(size, _shown(name))
        if info.type not in _REGULAR:
            self._refuse(name, "unknown_type", f"a member of type {info.type!r}; only regular files are used")
        elif (reason := unsafe_name(name)) is not None:
            self._refuse(name, "unsafe_name", reason)
        elif size > self.limits.max_member_bytes:
            self._refuse(name, "member_too_large", f"{size:,} bytes, at most {self.limits.max_member_bytes:,}")
        else:
            self.found.members.append(TarMember(name, offset, size))

    def _check_end(self) -> None:
        """Nothing but zeros may follow: a reader of tars would not see it."""
        while block := self.file.read(1 << 20):
            if block.count(0) != len(block):
                raise self._damage("data_after_end", f"data follows the end-of-archive mark at byte {self.position - _BLOCK}")
        if not self.count:
            raise self._damage("empty", "it holds no member")

    def _refuse(self, name: str, reason: str, detail: str) -> None:
        self.found.refused.append(RefusedMember(_shown(name), reason, detail))

    def _damage(self, reason: str, detail: str) -> TarDamage:
        return TarDamage(self.path, reason, detail)


def unsafe_name(name: str) -> str | None:
    """Why a member's name is refused; None where it is fine. We never write files by these names, but others do."""
    if name.startswith("/"):
        return "an absolute name"
    if ".." in name.split("/"):
        return "a name with `..` leaves its folder"
    if not name or len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME:
        return f"a name of 1 to {_MAX_NAME} bytes is needed"
    if any(ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in name):
        return "a name with control characters, or not UTF-8"
    return None


def _shown(name: str) -> str:
    """A name that any terminal and any JSON can take."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")[:_MAX_NAME]
