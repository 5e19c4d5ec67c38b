"""A barrier over many groups gives what one process with all rows would give, however groups are cut and sorted."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from data_pipelines import exchange
from data_pipelines.exchange import Barrier
from data_pipelines.metrics import StageMetrics
from data_pipelines.reports import Input, Summary, read_losses, read_rows, write_report
from data_pipelines.rows import Row, SourceInfo
from data_pipelines.spill import Spill, grouped, sorted_values
from data_pipelines.stages.dedup import DedupStage
from videofm.config.curation_stages import DedupConfig


def make_rows(count: int) -> list[Row]:
    """Sources of which many are copies (same bytes) or have the packets of another."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        packets = rng.randrange(count // 2)
        info = SourceInfo(f"s{packets}-{rng.randrange(2)}", f"p{packets}", "mp4", "h264", 9, 25.0, 32, 32, 1.0)
        name = f"v-{rng.randrange(10**6):06d}.mp4"
        rows.append(Row(f"{number:024x}", name, f"/videos/{name}", 1, info=info))
    return rows


def reference(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """Dedup as it reads: of rows sorted by name, the first with its packets stays."""
    dropped, first, by_bytes = {}, dict[str, str](), dict[str, str]()
    for row in sorted(rows, key=lambda row: row.name):
        assert row.info is not None
        twin = by_bytes.setdefault(row.info.sha256, row.name)
        if first.setdefault(row.info.packets_sha256, row.name) != row.name:
            same = twin != row.name
            dropped[row.name] = (
                "same_bytes" if same else "same_packets",
                f"equals {twin if same else first[row.info.packets_sha256]}",
            )
    return dropped


def run_barrier(folder: Path, rows: list[Row], section: dict, num_groups: int, num_partitions: int, batch_size: int) -> None:
    """Step 0 left `rows` in groups; run a barrier as step 1."""
    (folder / "sources").mkdir(parents=True)
    names = [f"{index:05d}" for index in range(num_groups)]
    for index, name in enumerate(names):
        members = rows[index::num_groups]
        (folder / "sources" / f"{name}.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in members))
        write_report(folder, 0, name, ("c", "i"), {name: members}, [], [])
    barrier = Barrier(str(folder), 1, section, section["kind"], "c", num_partitions)
    batches = [
        dataclasses.replace(barrier, batch=number, groups=names[start : start + batch_size], inputs=["i"] * batch_size)
        for number, start in enumerate(range(0, num_groups, batch_size))
    ]
    batches = [dataclasses.replace(batch, inputs=batch.inputs[: len(batch.groups)]) for batch in batches]
    if barrier.stage().num_fit_rows:
        for batch in batches:
            exchange.sample(batch)
        exchange.fit(barrier)
    for batch in batches:
        exchange.map_keys(batch)
    for partition in range(num_partitions):
        exchange.reduce_partition(dataclasses.replace(barrier, partition=partition))
    for batch in batches:
        exchange.apply_drops(batch)


def outcome(folder: Path, num_groups: int) -> tuple[set[str], dict[str, tuple[str, str]]]:
    """Names that stayed, and why others did not; every group's counts add up."""
    kept, lost = set(), {}
    for index in range(num_groups):
        name = f"{index:05d}"
        summary = Summary.load(folder, 1, name)
        assert summary is not None
        for value in summary.metrics:
            StageMetrics.from_json(value).check()
        kept |= {row.name for row in read_rows(folder, 2, name)}
        lost |= {loss["source"]: (loss["reason"], loss["detail"]) for loss in read_losses(folder, 1, name)}
    return kept, lost


@pytest.mark.parametrize(("num_groups", "num_partitions", "batch_size"), [(1, 1, 1), (7, 3, 2), (12, 17, 5)])
def test_dedup_is_the_same_for_every_layout(tmp_path, num_groups, num_partitions, batch_size):
    rows = make_rows(200)
    run_barrier(tmp_path, rows, {"kind": "dedup"}, num_groups, num_partitions, batch_size)
    kept, lost = outcome(tmp_path, num_groups)
    assert lost == reference(rows) and {reason for reason, _ in lost.values()} == {"same_bytes", "same_packets"}
    assert kept == {row.name for row in rows} - set(lost)


@pytest.mark.parametrize("reverse", [False, True])
def test_sources_of_one_name_are_told_apart_by_their_ids(reverse):
    """Addresses that differ in their query have one name. Rows are clips, whose order of frames mixes the sources."""
    info = SourceInfo("s", "p", "mp4", "h264", 9, 25.0, 32, 32, 1.0)
    rows = [Row(f"{n:024x}", "https://h/watch", "?", 1, info, start) for start in (0, 9) for n in range(3)]
    rows = sorted(rows, key=lambda row: row.start, reverse=reverse)
    found = list(DedupStage(DedupConfig()).choose("p", rows))
    assert sorted(row.key for row, _, _ in found) == sorted(row.key for row in rows if row.source_id != f"{0:024x}")
    assert {(reason, detail) for _, reason, detail in found} == {("same_bytes", "equals https://h/watch")}


def test_more_partitions_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "MAX_OPEN", 4)
    rows = make_rows(60)
    run_barrier(tmp_path, rows, {"kind": "dedup"}, 3, 11, 3)
    assert outcome(tmp_path, 3)[1] == reference(rows)


class Median:
    """Fits the median of the start frames of a sample, and drops what lies above; each row has two keys."""

    num_fit_rows = 25

    def fit(self, rows):
        assert len(rows) == self.num_fit_rows
        return {"sample": sorted(row.name for row in rows)}

    def keys(self, row, state):
        return ["all", "in" if row.name in state["sample"] else "out"]

    def choose(self, key, rows):
        assert [row.name for row in rows] == sorted(row.name for row in rows)
        for row in rows:
            if key == "in":
                yield row, "sampled", key
            elif key == "all" and row.name < rows[len(rows) // 4].name:
                yield row, "early", key


@pytest.mark.parametrize(("num_groups", "batch_size"), [(1, 1), (9, 2)])
def test_a_fitted_barrier_sees_the_rows_of_smallest_hash(tmp_path, monkeypatch, num_groups, batch_size):
    """The sample is a function of the rows alone, and of two reasons for a row the first in the alphabet is told."""
    monkeypatch.setattr(Barrier, "stage", lambda self: Median())
    rows = make_rows(100)
    run_barrier(tmp_path, rows, {"kind": "dedup"}, num_groups, 3, batch_size)
    kept, lost = outcome(tmp_path, num_groups)
    sample = {row.name for row in sorted(rows, key=lambda row: exchange._hash(row.key))[:25]}
    early = {row.name for row in sorted(rows, key=lambda row: row.name)[:25]}
    assert {name: reason for name, (reason, _) in lost.items()} == {
        **dict.fromkeys(sample, "sampled"), **dict.fromkeys(early, "early"),
    }  # fmt: skip
    assert kept == {row.name for row in rows} - sample - early


def test_inputs_of_a_barrier_are_all_groups():
    one, two = Input("00000", 3, "a"), Input("00001", 3, "b")
    assert exchange.inputs_hash(one.hash, "everything") != exchange.inputs_hash(one.hash, "something else")
    assert exchange.inputs_hash(one.hash, "everything") != exchange.inputs_hash(two.hash, "everything")
    assert [exchange.num_partitions(count) for count in (0, 1, 50_000, 50_001, 10**12)] == [1, 1, 1, 2, 4096]


@pytest.mark.parametrize("max_bytes", [1, 300, 1 << 20])
def test_sorting_on_disk_is_sorting(tmp_path, max_bytes):
    """Also where one key alone is larger than what is sorted in memory."""
    rng = random.Random(1)
    pairs = [(f"{rng.randrange(40):08x}{'0' * 56}" if i % 2 else f"{rng.getrandbits(256):064x}", i) for i in range(300)]
    with Spill(tmp_path / "s") as spill:
        for key, value in pairs:
            spill.add(key, value)
    found = list(sorted_values(tmp_path / "s", max_bytes=max_bytes))
    assert [key for key, _ in found] == sorted(key for key, _ in pairs)
    assert sorted(found) == sorted(pairs) and not (tmp_path / "s").exists()
    assert sum(len(values) for _, values in grouped(found)) == 300
