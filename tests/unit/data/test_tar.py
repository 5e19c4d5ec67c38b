"""Tars of others: every member where `tarfile` says it is, and every oddity of spec section 7 named."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from videofm.data.tar import TarDamage, TarLimits, scan_tar, unsafe_name

FILES = {"a.mp4": b"video" * 200, "a.txt": b"", "a.json": b"{}", "b.mp4": b"x" * 512, "b.txt": b"words"}


def write(path: Path, files: dict[str, bytes] = FILES, form: int = tarfile.PAX_FORMAT, **facts: object) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in facts.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_tarfile_says(tmp_path, form):
    """Also with names over 100 bytes, names that are not ASCII, and times that need a pax header."""
    deep = "/".join(["folder" * 3] * 7) + "/clip.mp4"
    extra = {deep: b"long", "é/clip.mp4": b"accent"}
    path = write(tmp_path / "a.tar", FILES | extra, form, mtime=1.5 if form == tarfile.PAX_FORMAT else 1)
    with tarfile.open(path) as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    assert [(member.name, member.offset, member.size) for member in scan_tar(path).members] == expected
    content = path.read_bytes()
    assert {m.name: content[m.offset : m.offset + m.size] for m in scan_tar(path).members} == FILES | extra


def _cut(offset: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    return lambda content: content[: offset(content)]


def _flip(position: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    # USTAR: a.mp4 has its header at 0 and data to 1536, a.txt 1536, a.json 2048 to 3072, b.mp4 3072 to 4096, b.txt 4096 to 5120
    "cut between samples": (_cut(lambda _: 3072), "truncated", "ends after a member at byte 3072"),
    "cut between members": (_cut(lambda _: 4096), "truncated", "without an end-of-archive mark"),
    "cut inside a member": (_cut(lambda _: 3700), "truncated", "'?b.mp4'? has 116 of its 512 bytes"),
    "cut inside a header": (_cut(lambda _: 3100), "truncated", "28 bytes into a header"),
    "empty file": (_cut(lambda _: 0), "empty", "no bytes"),
    "no members": (lambda _: bytes(10240), "empty", "holds no member"),
    "garbage": (lambda _: bytes(range(256)) * 9, "not_tar", "no header of a member at byte 0"),
    "a few bytes": (lambda _: b"hello", "not_tar", "5 bytes, a header has 512"),
    "a damaged header": (_flip(3080), "bad_header", "at byte 3072"),
    "gzip": (gzip.compress, "compressed", "gzip"),
    "two tars in one": (lambda content: content + content, "data_after_end", "data follows the end-of-archive mark"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(tmp_path, what):
    change, reason, detail = DAMAGE[what]
    path = write(tmp_path / "a.tar", form=tarfile.USTAR_FORMAT)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TarDamage, match=rf"a\.tar is not used \({reason}\): .*{detail}") as caught:
        scan_tar(path)
    assert caught.value.reason == reason


def test_members_that_are_no_plain_files_are_refused_and_the_others_stay(tmp_path):
    path = tmp_path / "a.tar"
    kinds = {
        "link.mp4": tarfile.SYMTYPE, "hard.mp4": tarfile.LNKTYPE, "null.mp4": tarfile.CHRTYPE, "disk.mp4": tarfile.BLKTYPE,
        "pipe.mp4": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE, "odd.mp4": b"Q",
    }  # fmt: skip
    with tarfile.open(path, "w") as archive:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("good.mp4")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"yes"))
    found = scan_tar(path)
    assert [member.name for member in found.members] == ["good.mp4"] and found.num_folders == 1
    assert {item.name: item.reason for item in found.refused} == {
        "link.mp4": "link", "hard.mp4": "link", "null.mp4": "device", "disk.mp4": "device", "pipe.mp4": "device",
        "odd.mp4": "unknown_type",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/abs/a.mp4", "absolute"),
        ("../../etc/a.mp4", "leaves its folder"),
        ("x/../a.mp4", "leaves its folder"),
        ("a\nb.mp4", "control characters"),
        ("n" * 256 + ".mp4", "1 to 255 bytes"),
        (b"\xff.mp4".decode("utf-8", "surrogateescape"), "not UTF-8"),
    ],
)
def test_unsafe_names_are_refused(tmp_path, name, why):
    assert why in str(unsafe_name(name))
    path = write(tmp_path / "a.tar", {name: b"1", "good.mp4": b"2"}, tarfile.GNU_FORMAT)
    found = scan_tar(path)
    assert [member.name for member in found.members] == ["good.mp4"]
    assert [item.reason for item in found.refused] == ["unsafe_name"]
    found.refused[0].name.encode()  # what is shown is plain UTF-8


def test_limits(tmp_path):
    path = write(tmp_path / "a.tar")
    found = scan_tar(path, TarLimits(max_member_bytes=600))
    assert [(item.name, item.reason) for item in found.refused] == [("a.mp4", "member_too_large")]
    assert len(found.members) == 4
    with pytest.raises(TarDamage, match="too_many_members.*over 3 members"):
        scan_tar(path, TarLimits(max_members=3))


def test_sparse_files_are_refused(tmp_path):
    path = write(tmp_path / "a.tar", {"a.mp4": b"1"}, type=tarfile.GNUTYPE_SPARSE)
    with pytest.raises(TarDamage, match="sparse"):
        scan_tar(path)
    path = write(tmp_path / "b.tar", {"a.mp4": b"1"}, pax_headers={"GNU.sparse.major": "1"})
    with pytest.raises(TarDamage, match="sparse"):
        scan_tar(path)


@pytest.mark.parametrize("record", [b"9999 path=x\n", b"x path=y\n", b"12 nothing...", b"16 size=-1234567\n"])
def test_a_pax_header_that_lies_is_refused(tmp_path, record):
    """It may not move the reader, nor make it read more than is there."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, kind, content in (("pax", tarfile.XHDTYPE, record), ("a.mp4", tarfile.REGTYPE, b"1")):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(TarDamage, match="bad_header"):
        scan_tar(tmp_path / "a.tar")


def test_an_extended_header_of_gigabytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate((1 << 33) + 512)
    with pytest.raises(TarDamage, match="an extended header of 8589934592 bytes, at most 65536"):
        scan_tar(path)
