"""Places: every kind reads and writes alike, faults that pass are tried again, others are raised at once, secrets stay out."""

from __future__ import annotations

import hashlib
import os

import pytest

from tests.http_store import serve
from videofm.data import hosts, storage
from videofm.errors import ConfigError, DataError, MissingError, TransientError

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses between tries, which are not slept."""
    slept: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    return slept


@pytest.fixture
def bucket():
    with serve({"set/a.tar": CONTENT, "set/deep/b.tar": b"b", "set/deep/er/c.tar": b"", "other.tar": b"no"}) as running:
        yield running


@pytest.fixture(params=["path", "file", "http", "http without ranges", "memory"])
def place(request, tmp_path, bucket):
    """A folder with a.tar, deep/b.tar and deep/er/c.tar."""
    if request.param.startswith("http"):
        bucket.ranges = request.param == "http"
        return f"{bucket.url}/set"
    folder = {"path": str(tmp_path), "file": tmp_path.as_uri(), "memory": f"memory://{tmp_path.name}/set"}[request.param]
    source = tmp_path / "source"
    for name, content in {"a.tar": CONTENT, "deep/b.tar": b"b", "deep/er/c.tar": b""}.items():
        source.write_bytes(content)
        storage.put_file(source, storage.join(folder, name))
    source.unlink()
    return folder


def test_reads_wholes_and_parts(place):
    name = storage.join(place, "a.tar")
    assert storage.read_bytes(name) == CONTENT
    for offset, size in [(0, 10), (1000, 300), (len(CONTENT) - 5, 100), (len(CONTENT), 1), (7, 0)]:
        assert storage.read_bytes(name, offset, size) == CONTENT[offset : offset + size], (offset, size)
    assert storage.read_bytes(name, 10000) == CONTENT[10000:]
    assert storage.exists(name) and not storage.exists(storage.join(place, "z.tar"))


def test_lists_files_however_deep(place):
    found = list(storage.list_files(place))
    assert [file.name for file in found] == ["a.tar", "deep/b.tar", "deep/er/c.tar"]
    assert [storage.read_bytes(file.place) for file in found] == [CONTENT, b"b", b""]
    assert {file.num_bytes for file in found} in ({len(CONTENT), 1, 0}, {None})


def test_listing_does_not_follow_links_to_folders(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"1")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [file.name for file in storage.list_files(tmp_path)] == ["real/x"]


def test_fetches_whole_and_checks_the_hash(place, tmp_path):
    target, name = tmp_path / "got", storage.join(place, "a.tar")
    storage.fetch(name, target, hashlib.sha256(CONTENT).hexdigest())
    assert target.read_bytes() == CONTENT
    with pytest.raises(DataError, match="is damaged: SHA-256 expected 0{64}, found [0-9a-f]{64}; restore it"):
        storage.fetch(name, tmp_path / "other", "0" * 64)
    assert not [path for path in tmp_path.iterdir() if "part" in path.name or path.name == "other"]


def test_missing_is_not_transient(place, pauses):
    for action in (
        storage.read_bytes,
        lambda name: storage.fetch(name, "/nowhere"),
        lambda name: storage.read_bytes(name, 3, 4),
    ):
        with pytest.raises((MissingError, FileNotFoundError)) as caught:
            action(storage.join(place, "z.tar"))
        assert not isinstance(caught.value, MissingError) or "z.tar does not exist; restore it" in str(caught.value)
    assert pauses == []


def test_put_new_writes_once(place):
    name = storage.join(place, "new/entry.json")
    assert storage.put_new(name, b"first") is True
    assert storage.put_new(name, b"second") is False
    assert storage.read_bytes(name) == b"first"


@pytest.mark.parametrize("fault", [503, 429, 408, "reset", "short"])
def test_faults_that_pass_are_tried_again(bucket, fault, pauses):
    bucket.faults["set/a.tar"] = [fault] * 3
    assert storage.read_bytes(f"{bucket.url}/set/a.tar") == CONTENT
    # The first pause lies in [0.25, 0.5] s, and each next one in twice that. aiohttp itself asks again after a reset.
    assert all(0.25 * 2**n <= pause <= 0.5 * 2**n for n, pause in enumerate(pauses))
    assert len(pauses) in ((1, 2, 3) if fault == "reset" else (3,))


def test_a_fetch_starts_again_after_a_short_body(bucket, tmp_path, pauses):
    bucket.faults["set/a.tar"] = ["short", 500]
    storage.fetch(f"{bucket.url}/set/a.tar", tmp_path / "a", hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "a").read_bytes() == CONTENT and len(pauses) == 2


def test_a_stall_ends_at_the_time_limit(bucket, pauses):
    bucket.faults["set/a.tar"] = ["stall"]
    assert storage.read_bytes(f"{bucket.url}/set/a.tar", timeout=2.0) == CONTENT
    assert len(pauses) == 1


def test_faults_that_stay_are_raised(bucket, pauses):
    bucket.faults["set/a.tar"] = [503] * 99
    with pytest.raises(
        TransientError, match=r"set/a\.tar could not be reached: HTTP 503, 6 times in a row; see that the store"
    ):
        storage.read_bytes(f"{bucket.url}/set/a.tar")
    assert len(pauses) == 5
    with pytest.raises(TransientError, match="could not be reached"):
        storage.exists(f"{bucket.url}/set/a.tar")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_raised_at_once_without_secrets(bucket, status, pauses):
    bucket.faults["set/a.tar"] = [status]
    place = bucket.url.replace("http://", "http://me:hunter2@") + "/set/a.tar?X-Signature=abcdef"
    with pytest.raises(DataError, match=f"cannot be used: HTTP {status}") as caught:
        storage.read_bytes(place)
    assert "hunter2" not in str(caught.value) and "abcdef" not in str(caught.value) and "set/a.tar?..." in str(caught.value)
    assert caught.value.__suppress_context__ and pauses == []


def test_nobody_there_is_transient(pauses):
    with pytest.raises(TransientError, match="could not be reached"):
        storage.read_bytes("http://127.0.0.1:9/x")
    assert len(pauses) == 5


def test_a_create_whose_answer_was_lost_counts_as_written(bucket):
    bucket.faults["set/new"] = [503]
    assert storage.put_new(f"{bucket.url}/set/new", b"ours") is True
    bucket.files["set/theirs"], bucket.faults["set/theirs"] = b"theirs", [503]
    assert storage.put_new(f"{bucket.url}/set/theirs", b"ours") is False


@pytest.mark.parametrize(
    "place",
    ["pipe:cat /etc/passwd", "data:text/plain,x", "ftp://x/y", "simplecache::http://x/y", "http://a::file://b", "a:b.tar"],
)
def test_other_places_are_refused(place):
    with pytest.raises(ConfigError, match="is no place for data: only local paths and file://, http://") as caught:
        storage.read_bytes(place)
    assert "passwd" not in str(caught.value)


def test_a_store_whose_package_is_absent_says_so():
    with pytest.raises(ConfigError, match="s3://bucket/x needs the package s3fs; install it with `pip install s3fs`"):
        storage.read_bytes("s3://bucket/x")


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../b", "http://x/y"])
def test_names_do_not_lead_out_of_a_folder(name):
    with pytest.raises(DataError, match="leads out of its folder"):
        storage.join("s3://bucket/set", name)


def test_joining_keeps_what_signs_a_place():
    assert storage.join("https://host/set/?sig=1", "a/b.tar") == "https://host/set/a/b.tar?sig=1"
    assert storage.join("data/set", "a.tar") == os.path.join("data/set", "a.tar")
    assert storage.is_local("data/set") and storage.is_local("file:///x") and not storage.is_local("s3://x/y")
    assert storage.redacted("https://u:p@host:8/a?k=v") == "https://host:8/a?..."


def test_a_full_disk_is_not_blamed_on_the_store(bucket, tmp_path, monkeypatch, pauses):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.fetch(f"{bucket.url}/set/a.tar", tmp_path / "a")
    assert list(tmp_path.iterdir()) == [] and pauses == []


def test_a_copy_has_limits(bucket, tmp_path, pauses):
    """Of bytes and of time, whatever the server announces; what goes beyond them is refused at once and leaves nothing."""
    name = f"{bucket.url}/set/a.tar"
    bucket.faults["set/a.tar"] = ["endless", "drip"]
    with pytest.raises(DataError, match=r"set/a\.tar has more than 1000000 bytes, the most that are copied"):
        storage.fetch(name, tmp_path / "a", max_bytes=1_000_000)
    with pytest.raises(DataError, match=r"set/a\.tar comes too slowly: the time for its copy is over after 1 bytes"):
        storage.fetch(name, tmp_path / "a", seconds=0.0)
    (tmp_path / "here").write_bytes(CONTENT)
    for place in (name, str(tmp_path / "here")):
        with pytest.raises(DataError, match=f"has more than {len(CONTENT) - 1} bytes"):
            storage.fetch(place, tmp_path / "a", max_bytes=len(CONTENT) - 1)
        assert [path.name for path in tmp_path.iterdir()] == ["here"]
        storage.fetch(place, tmp_path / "a", max_bytes=len(CONTENT), seconds=600.0)
        assert (tmp_path / "a").read_bytes() == CONTENT
        (tmp_path / "a").unlink()
    assert pauses == []


NOT_PUBLIC = "cannot be used: its host is not public; only the host of the list of sources may be of a private network"


@pytest.mark.parametrize("named_by", ["http://127.0.0.2/list.jsonl", "s3://bucket/list.jsonl"])
def test_a_list_from_elsewhere_leads_into_no_private_network(bucket, tmp_path, named_by, pauses):
    port = bucket.url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "169.254.169.254"):
        place = f"http://{host}:{port}/set/a.tar"
        with pytest.raises(DataError, match=NOT_PUBLIC) as caught:
            storage.fetch(place, tmp_path / "a", named_by=named_by)
        assert not isinstance(caught.value, TransientError)
        with pytest.raises(DataError, match=NOT_PUBLIC):
            storage.exists(place, named_by=named_by)
    assert bucket.seen == [] and pauses == [] and list(tmp_path.iterdir()) == []


def test_a_redirect_leads_into_no_private_network(bucket, tmp_path):
    """The host of the list may be private, and that which a local list names; from there it goes to no other."""
    place, other = f"{bucket.url}/set/x", bucket.url.replace("127.0.0.1", "127.0.0.2")
    for named_by in (f"{bucket.url}/list.jsonl", "list.jsonl"):
        bucket.faults["set/x"] = [f"{bucket.url}/set/a.tar", f"{other}/set/a.tar"]
        storage.fetch(place, tmp_path / "a", named_by=named_by)
        assert (tmp_path / "a").read_bytes() == CONTENT
        with pytest.raises(DataError, match=NOT_PUBLIC):
            storage.fetch(place, tmp_path / "a", named_by=named_by)


def test_nobody_vouches_for_link_local_addresses():
    assert hosts.private_addresses("http://127.0.0.1:8/x", "list.jsonl") == {"127.0.0.1"}
    assert hosts.private_addresses("http://169.254.169.254/x", "list.jsonl") == set()
    assert hosts.private_addresses("http://8.8.8.8/x", "list.jsonl") == set()
    make = hosts.guarded(frozenset({"10.0.0.1"}))
    for address in ("8.8.8.8", "10.0.0.1", "2606:4700::1"):
        make((hosts.socket.AF_INET, hosts.socket.SOCK_STREAM, 0, "", (address, 80))).close()
    for address in ("10.0.0.2", "192.168.1.1", "100.64.0.1", "169.254.9.9", "::1", "fe80::1%1", "fd00::1", "::ffff:10.0.0.2"):
        with pytest.raises(hosts.NotPublic):
            make((hosts.socket.AF_INET, hosts.socket.SOCK_STREAM, 0, "", (address, 80)))
