"""The snapshot of a manifest: the same dataset in one file, believed only while the entries are those it was made of."""

from __future__ import annotations

import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet
import pytest

from videofm.config.data import DataConfig
from videofm.data import manifest as module
from videofm.data import snapshot
from videofm.data.manifest import Manifest, assign_split
from videofm.data.plan import DataPlan
from videofm.data.shards import ShardWriter, read_clip
from videofm.errors import DataError


def write(folder: Path, group: str, split: str = "train") -> None:
    with ShardWriter(folder, group, "c" * 64) as writer:
        for number in range(3):
            facts = {"num_frames": 9, "fps": 25.0, "height": 32, "width": 32, "source_id": f"s{group}{number}", "split": split}
            writer.add(f"{group}-{number}", b"clip" * (number + 1), caption="é", scores={"motion": number / 2}, **facts)
        writer.commit([f"source-{number}" for number in range(50)])


@pytest.fixture
def dataset(tmp_path) -> Path:
    for group in ("00000", "00001", "00002"):
        write(tmp_path, group, "held_out" if group == "00001" else "train")
    return tmp_path


def entries_read(monkeypatch) -> list[str]:
    """Names of the entries that are opened one by one, as they are."""
    names: list[str] = []
    read = module._read_entry
    monkeypatch.setattr(module, "_read_entry", lambda place, name: (names.append(name), read(place, name))[1])
    return names


def test_a_snapshot_is_the_manifest_in_one_file(dataset, monkeypatch):
    """The same table, hash and records without opening an entry, and without the ids of sources, which are most of an entry."""
    plain = Manifest.load(dataset)
    path = plain.write_snapshot()
    names = entries_read(monkeypatch)
    quick = Manifest.load(dataset)
    assert names == [] and quick.table.to_pylist() == plain.table.to_pylist() and quick.hash == plain.hash
    assert quick.records("train") == plain.records("train") and quick.num_clips("train").tolist() == [3, 0, 3]
    assert "source_ids" not in quick.table.column_names and path.name == snapshot.NAME
    assert quick.entries == plain.entries and len(quick.entries[0].source_ids) == 50


def test_a_snapshot_of_mixed_configs_is_refused_too(dataset, monkeypatch):
    """Rows are read in groups, here of two: the configs of all of them count."""
    monkeypatch.setattr(snapshot, "_ROWS", 2)
    manifest = Manifest.load(dataset)
    manifest.write_snapshot()
    assert Manifest.load(dataset).records() == manifest.records()
    path = dataset / "manifest/shard-00002.json"
    path.write_text(path.read_text().replace("c" * 64, "d" * 64))
    manifest.write_snapshot()
    with pytest.raises(DataError, match="2 different curation configs .cccccccccccc, dddddddddddd"):
        Manifest.load(dataset)


def test_new_and_removed_entries_make_it_stale(dataset, monkeypatch):
    Manifest.load(dataset).write_snapshot()
    write(dataset, "00003")
    names = entries_read(monkeypatch)
    assert len(Manifest.load(dataset).table) == 4 and len(names) == 4
    Manifest.load(dataset).write_snapshot()
    (dataset / "manifest/shard-00003.json").unlink()
    assert Manifest.load(dataset).tars == [f"shards/shard-0000{number}.tar" for number in range(3)]


def test_a_replaced_entry_removes_it(dataset):
    """An entry of the same name is another one: `assign_split` makes such, and the old table is not read again."""
    before = Manifest.load(dataset)
    path = before.write_snapshot()
    assign_split(dataset, before.entries[0], "s000000", "held_out")
    assert not path.exists()
    after = Manifest.load(dataset)
    assert after.num_clips("held_out").tolist() == [1, 3, 0] and after.hash != before.hash


def test_entries_that_change_while_it_is_written(dataset, monkeypatch):
    """An entry that is replaced after it was read is not in the snapshot that stays; one that always changes is an error."""
    loaded, entry, writes = Manifest.load(dataset), Manifest.load(dataset).entries[2], []
    put = snapshot.write

    def write_late(path, table, names):
        put(path, table, names)
        if not writes:
            assign_split(dataset, entry, "s000020", "held_out")
        writes.append(path)

    monkeypatch.setattr(snapshot, "write", write_late)
    loaded.write_snapshot()
    assert len(writes) == 2 and Manifest.load(dataset).num_clips("held_out").tolist() == [0, 3, 1]
    stamps = iter(range(100))
    monkeypatch.setattr(module, "_stamps", lambda folder: {"shard-00000.json": (next(stamps), 0, 0)})
    with pytest.raises(DataError, match="change while they are read; write the snapshot when curation has ended"):
        loaded.write_snapshot()
    assert not (dataset / "manifest" / snapshot.NAME).exists()


def test_a_damaged_snapshot_is_refused(dataset):
    path = Manifest.load(dataset).write_snapshot()
    content = path.read_bytes()
    path.write_bytes(content[:200])
    with pytest.raises(
        DataError, match=r"snapshot.parquet cannot be read .*; delete it: the entries beside it are what counts"
    ):
        Manifest.load(dataset)
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    other = table.set_column(3, "sha256", pyarrow.array(["0" * 64] * 3))
    pyarrow.parquet.write_table(other, path)
    with pytest.raises(DataError, match="is damaged: its rows do not have the hash it states; delete it"):
        Manifest.load(dataset)
    pyarrow.parquet.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(DataError, match="is not of version 1; delete it"):
        Manifest.load(dataset)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing on the console."""


@pytest.fixture
def url(dataset):
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *values: Quiet(*values, directory=str(dataset)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def settings(place: str) -> DataConfig:
    return DataConfig.model_validate({"manifest": place, "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2})


def test_a_dataset_under_a_url_is_the_one_in_its_folder(dataset, url):
    """With a snapshot and without, the plan of both places is the same; `fetch` is asked for files by name and hash."""
    local = DataPlan.open(settings(str(dataset)), 0)
    for _ in range(2):
        remote = DataPlan.open(settings(url), 0)
        assert remote.identity == local.identity
        step = next(remote.steps())
        assert step == next(local.steps()) and remote.folder(step.micro_batches[0][0]) == url
        assert remote.record(step.micro_batches[0][0]) == local.record(step.micro_batches[0][0])
        Manifest.load(dataset).write_snapshot()
    asked = []

    def fetch(place: str, name: str, sha256: str) -> Path:
        asked.append((place, name, sha256))
        return dataset / name

    assert next(DataPlan.open(settings(url), 0, fetch).steps()) == step
    entry = Manifest.load(dataset).entries[0]
    assert (url, entry.index, entry.index_sha256) in asked


def test_damage_under_a_url_is_named(dataset, url):
    manifest = Manifest.load(url)
    (dataset / manifest.table["index"][0].as_py()).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"http://127.0.0.1:\d+/index/shard-00000.parquet is damaged: SHA-256 expected"):
        manifest.read_shard(0)
    (dataset / "manifest/shard-00001.json").write_text(json.dumps({"version": 9}))
    with pytest.raises(DataError, match=r"http://.*/shard-00001.json is not a manifest entry of version 1 .found version 9"):
        Manifest.load(url)
    with pytest.raises(DataError, match=r"/empty has no committed shard"):
        Manifest.load(f"{url}/empty")


def test_an_index_that_is_none_is_named(dataset):
    manifest = Manifest.load(dataset)
    assert read_clip(dataset, manifest.records()[1]) == b"clip" * 2
    path = dataset / "x.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"the index .*x.parquet cannot be read"):
        module.read_table(path)
