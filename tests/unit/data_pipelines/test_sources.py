"""Folders, lists and URLs as sources: the same groups whatever order files come in, and errors that name the entry."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipelines import fetching, sources
from data_pipelines.fetching import fetched, sidecar_place, wait_for_space
from data_pipelines.rows import Row, Unusable
from data_pipelines.sources import find_sources, source_id_of, source_rows
from videofm.data import storage
from videofm.errors import ConfigError, DataError, TransientError


def fill(folder: Path, count: int) -> None:
    for number in range(count):
        path = folder / f"d{number % 3}" / f"v{number:04d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(number % 7))
    (folder / "d0" / "v0000.txt").write_text("caption")
    (folder / "readme.pdf").write_text("?")


def test_a_folder_becomes_groups_by_hash(tmp_path):
    fill(tmp_path / "in", 100)
    found = find_sources(str(tmp_path / "in"), tmp_path / "run", 10)
    assert (found.num_sources, found.num_ignored) == (100, 1)
    assert sum(group.num_sources for group in found.groups) == 100 and 8 <= len(found.groups) <= 10
    rows = [row for group in found.groups for row in source_rows(tmp_path / "run", group.name)]
    ids = [row.source_id for row in rows]
    assert ids == sorted(ids) and set(ids) == {source_id_of(f"d{n % 3}/v{n:04d}.mp4") for n in range(100)}
    assert all(Path(row.path).stat().st_size == row.num_bytes for row in rows)
    for group in found.groups:
        members = source_rows(tmp_path / "run", group.name)
        assert all(int(row.source_id[:8], 16) * 10 // 2**32 == int(group.name) for row in members)


def test_groups_stay_what_they_are(tmp_path):
    """Another place of the same files gives the same hashes; more files change their groups and no others; the number of
    groups is that of the first run."""
    for name in ("a", "b"):
        fill(tmp_path / name, 50)
    first = find_sources(str(tmp_path / "a"), tmp_path / "run", 10)
    assert find_sources(str(tmp_path / "b"), tmp_path / "run", 10) == first
    (tmp_path / "a" / "new.mp4").write_bytes(b"x")
    (tmp_path / "a" / "d0" / "v0000.mp4").write_bytes(b"longer")
    again = find_sources(str(tmp_path / "a"), tmp_path / "run", 10)
    changed = {new.name for new, old in zip(again.groups, first.groups, strict=True) if new != old}
    at = [int(source_id_of(name)[:8], 16) * 5 // 2**32 for name in ("new.mp4", "d0/v0000.mp4")]
    assert changed == {f"{number:05d}" for number in at}


def test_memory_does_not_decide_what_is_found(tmp_path, monkeypatch):
    fill(tmp_path / "in", 300)
    first = find_sources(str(tmp_path / "in"), tmp_path / "run-1", 20)
    monkeypatch.setattr(sources.sorted_values, "__defaults__", (0, 64))  # depth, bytes that are sorted in memory
    assert find_sources(str(tmp_path / "in"), tmp_path / "run-2", 20) == first


def test_jsonl_and_parquet_lists(tmp_path):
    fill(tmp_path / "in", 4)
    entries = [
        {"uri": "in/d0/v0000.mp4", "caption": "a red circle", "bytes": 0, "sha256": "E3B0"},
        {"uri": str(tmp_path / "in/d1/v0001.mp4"), "source_id": "mine", "bytes": None},
        {"uri": "https://user:secret@example.com/v.mp4?signature=abc", "bytes": 7},
    ]  # fmt: skip
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"source_id": None, **entry} for entry in entries]), tmp_path / "list.parquet"
    )
    found = [find_sources(str(tmp_path / f"list.{ending}"), tmp_path / ending, 8) for ending in ("jsonl", "parquet")]
    assert found[0] == found[1] and found[0].num_sources == 3
    rows = {row.name: row for row in source_rows(tmp_path / "jsonl", "00000")}
    first = rows["in/d0/v0000.mp4"]
    assert (first.caption, first.promised_sha256, first.path) == ("a red circle", "e3b0", str(tmp_path / "in/d0/v0000.mp4"))
    assert rows[str(tmp_path / "in/d1/v0001.mp4")].source_id == source_id_of("mine")
    remote = rows["https://example.com/v.mp4"]
    assert remote.path == entries[2]["uri"] and remote.num_bytes == 7
    assert remote.source_id == source_id_of("https://example.com/v.mp4")  # a new signature is no new source
    assert os.stat(tmp_path / "jsonl/sources/00000.jsonl").st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of the list .* is not JSON"),
        ("[]", "entry 2 of the list .* has no `uri`"),
        ('{"url": "x"}', "entry 2 of the list .* has no `uri`"),
        ('{"uri": "x", "title": "y"}', "entry 2 .* has the unknown field 'title'; fields are uri, source_id, bytes"),
        ('{"uri": "x", "bytes": "7"}', "entry 2 .*: bytes is '7', it must be of type int"),
        ('{"uri": "in/a.mp4"}', "the source 'in/a.mp4' is listed twice"),
        (
            '{"uri": "a\\u0000.mp4"}',
            r"entry 2 .*: uri is 'a\\x00.mp4', which is no plain text; take out NUL and lone surrogates",
        ),
        ('{"uri": "x", "caption": "\\ud800"}', r"entry 2 .*: caption is '\\ud800', which is no plain text"),
        ('{"uri": "x", "source_id": "\\udfff"}', r"entry 2 .*: source_id is '\\udfff', which is no plain text"),
        ('{"uri": "https://[a/v.mp4"}', "entry 2 .*: uri is no address: Invalid IPv6 URL"),
        ("[" * 100_000, "line 2 of the list .* is not JSON: maximum recursion"),
        ('{"uri": "\udcff"}', "line 2 of the list .* is not JSON: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_lists_that_are_wrong(tmp_path, line, message):
    (tmp_path / "list.jsonl").write_text('{"uri": "in/a.mp4"}\n' + line + "\n", errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        find_sources(str(tmp_path / "list.jsonl"), tmp_path / "run", 8)


def test_places_that_are_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"holds no video file \(looked for .*\.mp4"):
        find_sources(str(tmp_path / "empty"), tmp_path / "run", 8)
    with pytest.raises(DataError, match="does not exist; set `source` to a folder of videos, or to a list"):
        find_sources(str(tmp_path / "absent"), tmp_path / "run", 8)
    with pytest.raises(DataError, match="the list of sources .* does not exist"):
        find_sources(str(tmp_path / "absent.jsonl"), tmp_path / "run", 8)
    with pytest.raises(ConfigError, match="lies in the source folder"):
        find_sources(str(tmp_path), tmp_path / "run", 8)
    (tmp_path / "bad.parquet").write_text("x" * 100)
    with pytest.raises(DataError, match="is no Parquet file"):
        find_sources(str(tmp_path / "bad.parquet"), tmp_path / "run", 8)
    for place in ("pipe:cat x.mp4", "data:video/mp4;base64,AAAA"):
        (tmp_path / "evil.jsonl").write_text(json.dumps({"uri": place}) + "\n")
        with pytest.raises(ConfigError):
            find_sources(str(tmp_path / "evil.jsonl"), tmp_path / "run", 8)


def test_texts_of_a_parquet_list_that_are_not_utf8(tmp_path):
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"uri": texts}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match="has a text that is not UTF-8: invalid start byte"):
        find_sources(str(tmp_path / "list.parquet"), tmp_path / "run", 8)


def test_file_names_that_are_not_utf8(tmp_path):
    """Each is a source of its own, whose name is plain text, and whose file is found."""
    (tmp_path / "in").mkdir()
    names = (b"a\xff.mp4", b"a\\xff.mp4", "a\u00ff.mp4".encode())
    for name in names:
        (tmp_path / "in" / os.fsdecode(name)).write_bytes(name)
    find_sources(str(tmp_path / "in"), tmp_path / "run", 8)
    rows = source_rows(tmp_path / "run", "00000")
    assert sorted(row.name for row in rows) == ["a\\xff.mp4", "a\\xff.mp4", "a\u00ff.mp4"]
    assert {Path(row.path).read_bytes() for row in rows} == set(names)


def test_sidecars_lie_beside_the_link_not_beside_what_it_names(tmp_path):
    """Folders of Hugging Face's cache and of git-annex are links to blobs."""
    for name in ("in", "blobs"):
        (tmp_path / name).mkdir()
    (tmp_path / "blobs" / "0f").write_bytes(b"x")
    (tmp_path / "in" / "v.mp4").symlink_to("../blobs/0f")
    (tmp_path / "list.jsonl").write_text('{"uri": "in/v.mp4"}')
    for source in ("in", "list.jsonl"):
        find_sources(str(tmp_path / source), tmp_path / f"run-{source}", 8)
        assert source_rows(tmp_path / f"run-{source}", "00000")[0].path == str(tmp_path / "in" / "v.mp4")


def test_only_the_owner_may_read_a_fetched_list(tmp_path, monkeypatch):
    def fetch(place, path, **_):
        assert path.parent.stat().st_mode & 0o077 == 0  # while it comes, too
        path.write_text('{"uri": "v.mp4"}')

    monkeypatch.setattr(storage, "fetch", fetch)
    find_sources("https://example.com/list.jsonl?key=1", tmp_path / "run", 8)
    assert (tmp_path / "run/sources/list.jsonl").stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in (tmp_path / "run/sources").iterdir()) == ["00000.jsonl", "groups.json", "list.jsonl"]


def remote_row(**changes) -> Row:
    return Row("0" * 24, "a/v.mp4", "https://example.com/a/v.mp4?key=1", 3).with_(**changes)


def test_a_remote_source_is_here_only_while_it_is_worked_on(tmp_path, monkeypatch):
    there = {"https://example.com/a/v.mp4?key=1": b"abc", "https://example.com/a/v.txt?key=1": b"caption"}
    monkeypatch.setattr(storage, "fetch", lambda place, path, **_: path.write_bytes(there[place]))
    monkeypatch.setattr(storage, "exists", lambda place, **_: place in there)
    with fetched(remote_row(), tmp_path, sidecars=True) as path:
        assert path.read_bytes() == b"abc" and path.suffix == ".mp4"
        assert path.with_suffix(".txt").read_bytes() == b"caption" and not path.with_suffix(".json").exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Unusable, match="checksum: the list promises SHA-256 00, the file has ba78"):
        with fetched(remote_row(promised_sha256="00"), tmp_path, sidecars=False):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "sidecar"),
    [
        ("s3://bucket/a.b/v.mp4", "s3://bucket/a.b/v.json"),
        ("s3://bucket/a#1.mp4", "s3://bucket/a#1.json"),
        ("https://cdn.example.com/v/123?sig=SECRET/a.b", "https://cdn.example.com/v/123.json?sig=SECRET/a.b"),
        ("https://cdn.example.com/v.1/123", "https://cdn.example.com/v.1/123.json"),
        ("https://cdn.example.com", "https://cdn.example.com/.json"),
        ("https://cdn.example.com?sig=SECRET", "https://cdn.example.com/.json?sig=SECRET"),
    ],
)
def test_a_sidecar_is_on_the_host_of_its_source(place, sidecar):
    assert sidecar_place(place, ".json") == sidecar


def test_a_store_that_refuses_to_tell_of_sidecars_costs_no_source(tmp_path, monkeypatch):
    """A signed address is answered with 403 for what is not there; one that does not answer is still tried again."""

    def exists(place, **_):
        raise DataError("403")

    monkeypatch.setattr(storage, "fetch", lambda place, path, **_: path.write_bytes(b"abc"))
    monkeypatch.setattr(storage, "exists", exists)
    notes: Counter[str] = Counter()
    with fetched(remote_row(), tmp_path, True, notes) as path:
        assert list(tmp_path.iterdir()) == [path]
    assert notes == {"sidecar_refused": 5}

    def silent(place, **_):
        raise TransientError("no answer")

    monkeypatch.setattr(storage, "exists", silent)
    with pytest.raises(TransientError, match="no answer"), fetched(remote_row(), tmp_path, True, notes):
        raise AssertionError


def test_names_that_are_too_long_for_a_file_system(tmp_path, monkeypatch):
    with pytest.raises(Unusable, match="missing"), fetched(Row("0" * 24, "x", "/" + "x" * 5000, 1), tmp_path, False):
        raise AssertionError
    monkeypatch.setattr(storage, "fetch", lambda place, path, **_: path.write_bytes(b"abc"))
    with fetched(remote_row(name="v." + "x" * 5000), tmp_path, sidecars=False) as path:
        assert path.read_bytes() == b"abc"


def test_what_a_store_says_decides_whether_a_source_is_lost(tmp_path, monkeypatch):
    def fails(error):
        def fetch(place, path, **_):
            raise error

        monkeypatch.setattr(storage, "fetch", fetch)
        with fetched(remote_row(), tmp_path, sidecars=False):
            raise AssertionError

    with pytest.raises(Unusable, match="missing: the object vanished"):
        fails(storage.MissingError("gone"))
    with pytest.raises(Unusable, match="unfetchable: denied"):
        fails(DataError("denied"))
    with pytest.raises(TransientError, match="no answer"):  # says nothing about the source: the group is tried again
        fails(TransientError("no answer"))


def test_the_limits_of_a_copy_reach_the_store(tmp_path, monkeypatch):
    asked = []

    def fetch(place, path, **limits):
        asked.append((place, limits))
        path.write_bytes(b"abc")

    monkeypatch.setattr(storage, "fetch", fetch)
    monkeypatch.setattr(storage, "exists", lambda place, named_by: asked.append(named_by) or ".txt" in place)
    limits = fetching.CopyLimits(7, 3.0, "https://example.com/list.jsonl")
    with fetched(remote_row(), tmp_path, sidecars=True, limits=limits):
        pass
    common = {"seconds": 3.0, "named_by": "https://example.com/list.jsonl"}
    assert [one for one in asked if isinstance(one, tuple)] == [
        ("https://example.com/a/v.mp4?key=1", {"max_bytes": 7, **common}),
        ("https://example.com/a/v.txt?key=1", {"max_bytes": 64 << 20, **common}),
    ]
    assert [one for one in asked if isinstance(one, str)] == [limits.named_by] * 5


def test_scratch_space_is_waited_for(tmp_path, monkeypatch):
    free = iter([1 << 20, 1 << 20, 5 << 20])
    monkeypatch.setattr(fetching, "_free_bytes", lambda folder: next(free))
    wait_for_space(tmp_path, 4, 60.0, lambda: False, poll=0.0)
    assert next(free, None) is None
    monkeypatch.setattr(fetching, "_free_bytes", lambda folder: 1 << 20)
    with pytest.raises(DataError, match="has 1 MiB free, engine.scratch_free_mib asks for 4, and 0 s of waiting did not help"):
        wait_for_space(tmp_path, 4, 0.0, lambda: False)
    wait_for_space(tmp_path, 4, 60.0, lambda: True)
