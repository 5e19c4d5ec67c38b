"""Clips that cannot be read, shards that are elsewhere, and decoders that take their process down, seen from the loader."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.demo_shards import write_demo_shards
from tests.http_store import serve
from tests.ready_nursery import Origin, ReadyNursery
from videofm.config.data import DataConfig
from videofm.data import decode, processes, reader, storage, workers
from videofm.data.bad_clips import BadClips
from videofm.data.index import ClipRecord
from videofm.data.loader import Step, StepLoader
from videofm.data.manifest import Manifest
from videofm.errors import ConfigError, DataError, MissingError, TransientError


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("shards"), num_clips=12, num_shards=3, held_out=0)


@pytest.fixture
def shards(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def config(place: object, **changes) -> DataConfig:
    values = {"manifest": str(place), "num_frames": 5, "height": 32, "width": 32, "micro_batch_size": 2}
    return DataConfig.model_validate({**values, "num_micro_batches": 2, **changes})


def take(loader: StepLoader, num_steps: int = 4) -> list[Step]:
    return list(islice(loader.steps(), num_steps))


def ids(steps: list[Step]) -> list[list[str]]:
    return [batch.sample_ids for step in steps for batch in step.batches]


def same(ours: list[Step], theirs: list[Step]) -> bool:
    pairs = zip((b for s in ours for b in s.batches), (b for s in theirs for b in s.batches), strict=True)
    return ids(ours) == ids(theirs) and all(torch.equal(a.video, b.video) and a.captions == b.captions for a, b in pairs)


def damage(folder: Path, record: ClipRecord) -> None:
    """Flip a bit in the middle of a clip."""
    with (folder / record.shard).open("r+b") as file:
        file.seek(record.offset + record.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def records(folder: Path) -> list[ClipRecord]:
    return Manifest.load(folder).records("train")


@pytest.fixture(scope="module")
def origin():
    found = Origin()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def ready(origin, monkeypatch):
    """Nurseries start at once; a test with `real_start` starts its own."""
    origin.faults = {}
    monkeypatch.setattr(workers, "Nursery", lambda: ReadyNursery(origin))


@pytest.fixture
def faults(origin):
    """Make decoding processes hang or crash on clips: SHA-256 of a clip -> what happens, see `tests.stub_nursery`."""
    return origin.faults.update


@pytest.fixture
def real_start(ready, monkeypatch):
    monkeypatch.setattr(workers, "Nursery", processes.Nursery)


def check_replaced(steps: list[Step], plain: list[Step], bad: str) -> None:
    """Every draw of the clip `bad` is another one of the same shape, all else is as it was."""
    for ours, theirs in zip(ids(steps), ids(plain), strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == other if not other.startswith(bad) else mine.endswith("~" + other) and not mine.startswith(bad)


def test_a_damaged_clip_is_replaced_alike_on_every_layout(whole, shards, tmp_path, caplog):
    victim = records(shards)[4]
    damage(shards, victim)
    plain = take(StepLoader(config(whole), 0), 7)
    one = StepLoader(config(shards), 0, quarantine=tmp_path / "quarantine.jsonl")
    steps = take(one, 7)  # 28 draws of 12 clips: each at least twice
    check_replaced(steps, plain, victim.key)
    assert sum(step.num_replaced for step in steps) == one.bad_clips.num_replaced >= 2
    assert len([record for record in caplog.records if victim.key in record.getMessage()]) == 1
    (row,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert row["key"] == victim.key and row["sha256"] == victim.sha256 and "its bytes are damaged" in row["reason"]
    halves = [take(StepLoader(config(shards), 0, rank, 2), 7) for rank in (0, 1)]
    assert [found for pair in zip(*map(ids, halves), strict=True) for found in pair] == ids(steps)
    assert same(take(StepLoader(config(shards, num_workers=2), 0), 7), steps)
    assert same(list(islice(StepLoader(config(shards), 0).steps(steps[2].after), 4)), steps[3:])


@pytest.mark.parametrize("fault", ["hang", "crash"])
def test_a_decoder_that_hangs_or_crashes_costs_one_clip(whole, faults, fault):
    victim = records(whole)[4]
    plain = take(StepLoader(config(whole), 0), 7)
    faults({victim.sha256: fault})
    loader = StepLoader(config(whole, num_workers=2, reading={"decode_timeout": 3.0 if fault == "hang" else 60.0}), 0)
    steps = take(loader, 7)
    check_replaced(steps, plain, victim.key)
    # Tried twice, once for all draws of it, also of those that another process held meanwhile.
    assert loader.counts[fault] == 2 and loader.bad_clips.num_replaced >= 2


def test_clips_that_crash_and_hang_leave_nothing_in_the_trainer(whole, faults):
    """Invariant 12: open files, threads and memory are after eighteen lost processes what they were after the first ones."""
    *crashing, hanging = records(whole)[:9]
    faults({record.sha256: "crash" for record in crashing} | {hanging.sha256: "hang"})
    reading = {"decode_timeout": 3.0, "max_replaced_share": 1.0, "clips_per_worker": 3}
    loader = StepLoader(config(whole, num_workers=2, reading=reading), 0)
    before, steps, held = len(os.listdir("/proc/self/fd")), loader.steps(), []
    for _ in range(12):
        next(steps)
        held.append((len(os.listdir("/proc/self/fd")), threading.active_count(), loader._frames.num_bytes, resident_bytes()))
    steps.close()
    assert (loader.counts["crash"], loader.counts["hang"]) == (16, 2) and loader.counts["recycled"] >= 4
    files, threads, frames, resident = zip(*held, strict=True)
    # A process has a socket, two files for frames and their maps, and one end of a socket more while it starts; the pool has
    # four sockets and files of its own, and the nursery's.
    assert max(files) - before <= 2 * 6 + 5 and len(set(threads)) == 1
    assert frames[-1] <= max(frames[:4]) and resident[-1] - resident[2] < 8 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_decoder_that_crashes_once_costs_nothing(whole, faults, tmp_path):
    victim = records(whole)[4]
    faults({victim.sha256: f"once:{tmp_path / 'marker'}"})
    loader = StepLoader(config(whole, num_workers=1), 0)
    steps = take(loader, 3)
    assert loader.counts["crash"] == 1 and loader.bad_clips.num_replaced == 0
    assert same(steps, take(StepLoader(config(whole), 0), 3))


def test_a_clip_that_was_quarantined_before_is_not_tried_again(whole, faults, tmp_path):
    victim = records(whole)[4]
    row = {"key": victim.key, "sha256": victim.sha256, "reason": "hung"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    loader = StepLoader(config(whole), 0, quarantine=tmp_path / "q.jsonl")
    check_replaced(take(loader), take(StepLoader(config(whole), 0)), victim.key)
    assert loader.bad_clips.num_replaced and (tmp_path / "q.jsonl").read_text() == json.dumps(row) + "\n"
    (tmp_path / "q.jsonl").write_text("?\n")
    with pytest.raises(DataError, match="q.jsonl is not a list of quarantined clips .*move it away"):
        StepLoader(config(whole), 0, quarantine=tmp_path / "q.jsonl")


def test_too_many_bad_clips_stop_the_run(shards):
    for record in records(shards)[:4]:
        damage(shards, record)
    with pytest.raises(
        DataError, match=r"4 of \d+ clips cannot be read, more than data.reading.max_replaced_share 0.001, .*verify"
    ):
        take(StepLoader(config(shards), 0), 9)
    assert take(StepLoader(config(shards, reading={"max_replaced_share": 1.0}), 0), 9)


def test_a_hundred_in_a_row_stop_the_run():
    bad, request = (
        BadClips(1.0),
        reader.ClipRequest("k", "p", 0, 1, "s", "s", 1, True, (8, 8), 1, (0, 1, 1), (8, 8), (0, 0, 8, 8)),
    )
    for _ in range(99):
        bad.bad(request, reader.BadClipError("why"))
    bad.good()
    for _ in range(99):
        bad.bad(request, reader.BadClipError("why"))
    with pytest.raises(DataError, match="100 clips in a row cannot be read, the last one: why"):
        bad.bad(request, reader.BadClipError("why"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_disappears_is_no_bad_clip(shards, num_workers):
    loader = StepLoader(config(shards, num_workers=num_workers), 0)
    for tar in (shards / "shards").glob("*.tar"):
        tar.unlink()
    with pytest.raises(MissingError, match=r"shard-\d+\.tar does not exist; restore it"):
        take(loader)
    assert loader.bad_clips.num_replaced == 0


def test_a_shard_that_is_cut_short_loses_the_clips_behind_the_cut(shards):
    last = max(records(shards), key=lambda record: (record.shard, record.offset))
    os.truncate(shards / last.shard, last.offset + 10)
    loader = StepLoader(config(shards), 0)
    assert all(not name.startswith(last.key) for batch in ids(take(loader, 6)) for name in batch)
    assert loader.bad_clips.num_replaced


@pytest.fixture
def web(whole, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.0)
    files = {f"set/{path.relative_to(whole).as_posix()}": path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with serve(files) as bucket:
        yield bucket


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_a_remote_dataset_gives_the_same_batches(whole, web, tmp_path, num_workers, cached):
    """With an unsteady store: the first three requests of each shard fail."""
    web.faults = {name: [503, "reset", 503] for name in web.files if name.endswith(".tar")}
    settings = {"cache_dir": str(tmp_path / "copies")} if cached else {}
    loader = StepLoader(config(f"{web.url}/set", num_workers=num_workers, reading=settings), 0)
    assert same(take(loader, 6), take(StepLoader(config(whole), 0), 6))
    wholes = [name for method, name, span in web.seen if method == "GET" and name.endswith(".tar") and span is None]
    if cached:
        assert loader.counts["download"] == 3 and set(wholes) == {n for n in web.files if n.endswith(".tar")}
        seen = len([name for _, name, _ in web.seen if name.endswith((".tar", ".parquet"))])
        take(StepLoader(config(f"{web.url}/set", reading=settings), 0), 6)
        assert len([name for _, name, _ in web.seen if name.endswith(("s/shard-00000.tar", ".parquet"))]) <= seen
    else:
        assert not wholes


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_store_that_stays_away_is_raised_and_replaces_nothing(web, num_workers):
    """The error has the same type and names the same place, without password, whichever process asked."""
    place = f"{web.url.replace('//', '//me:secret@')}/set"
    loader = StepLoader(config(place, num_workers=num_workers), 0)
    web.faults = {name: [503] * 999 for name in web.files if name.endswith(".tar")}
    with pytest.raises(
        TransientError, match=r"127.0.0.1:\d+/set/\S+.tar could not be reached: HTTP 503 ?.*, 6 times in"
    ) as error:
        take(loader)
    assert "secret" not in str(error.value) and loader.bad_clips.num_replaced == 0 and not loader.counts["crash"]


def test_no_process_outlives_the_trainer(whole, monkeypatch):
    """A trainer is killed while a decoder hangs with Python's lock held."""
    monkeypatch.setenv("VIDEOFM_STUB_FAULTS", json.dumps({record.sha256: "hang" for record in records(whole)}))
    code = f"""
import sys
from videofm.config.data import DataConfig
from videofm.data import processes
from videofm.data.loader import StepLoader
processes.COMMAND = (sys.executable, "-m", "tests.stub_nursery")
start = processes.Nursery.start
def told(*arguments):
    pid = start(*arguments)
    print(pid, flush=True)
    return pid
processes.Nursery.start = told
next(StepLoader(DataConfig.model_validate({config(whole, num_workers=1).model_dump(mode="json")!r}), 0).steps())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        worker = os.pidfd_open(int(trainer.stdout.readline()))
        assert not select.select([worker], [], [], 0)[0]  # it lives
        trainer.kill()
        assert select.select([worker], [], [], 30)[0]  # it has ended
    os.close(worker)


def test_frames_that_are_not_those_of_the_index_are_refused(whole):
    loader = StepLoader(config(whole), 0)
    draw = next(loader.plan.steps()).micro_batches[0][0]
    record, found = loader.plan.record(draw), reader.ClipReader(reader.ReaderSettings())
    request = reader.ClipRequest(
        record.key, str(whole / record.shard), record.offset, record.size, record.sha256, "", 0, True, (16, 64), 11, (0, 3, 1),
        (16, 16), (0, 0, 16, 16),
    )  # fmt: skip
    with pytest.raises(reader.BadClipError, match=r"promises frames \(3 of 16x64\) that are not those read \(3 of 32x32\)"):
        found.read(request)
    assert reader.ClipRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_what_a_library_raises_is_the_clips_fault(whole, monkeypatch):
    def fails(source, indices):
        raise ZeroDivisionError("deep inside")

    loader = StepLoader(config(whole), 0)
    monkeypatch.setattr(decode.choose("auto"), "read", fails, raising=False)
    with pytest.raises(DataError, match="failed with ZeroDivisionError: deep inside"):
        take(loader)


def test_decord_is_not_for_files_of_others(shards):
    for path in (shards / "manifest").glob("shard-*.json"):
        path.write_text(path.read_text().replace('"config_hash": "test"', '"config_hash": "foreign:1"'))
    with pytest.raises(ConfigError, match="'decord' returns wrong frames of files that `videofm curate` did not encode"):
        StepLoader(config(shards, decoder="decord"), 0)
    assert decode.choose("auto", canonical=False).name != "decord"
    take(StepLoader(config(shards), 0), 1)
    take(StepLoader(config(shards, num_workers=1), 0), 1)


def test_a_pickle_in_a_shard_is_never_run(whole, shards, tmp_path):
    """In place of a clip: it is bytes that do not decode, whatever its hash says."""
    marker = tmp_path / "ran"
    payload = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    for record in records(shards)[:2]:
        with (shards / record.shard).open("r+b") as file:
            file.seek(record.offset)
            file.write(payload.ljust(record.size, b"."))
    for checked in (True, False):
        loader = StepLoader(config(shards, verify_checksums=checked), 0)
        take(loader, 6)
        assert loader.bad_clips.num_replaced >= 2 and not marker.exists()


def test_workers_end_with_the_loader_and_make_way_for_fresh_ones(whole):
    loader = StepLoader(config(whole, num_workers=1, reading={"clips_per_worker": 5}), 0)
    steps = loader.steps()
    for _ in range(4):
        next(steps)
    assert loader.counts["recycled"] >= 2
    steps.close()
    assert same(take(loader, 2), take(StepLoader(config(whole), 0), 2))


def test_a_nursery_that_dies_is_told(whole, real_start, monkeypatch):
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", ""))
    with pytest.raises(DataError, match="the parent of the decoding processes ended or does not answer; .*num_workers: 0"):
        take(StepLoader(config(whole, num_workers=1), 0))


def test_frames_come_through_slots_that_grow(whole, real_start):
    """Clips of 1 and 5 frames in turns, more of them than slots."""
    (record, *_) = records(whole)
    settings = reader.ReaderSettings()
    pool = workers.WorkerPool(1, settings, config(whole).reading)
    try:
        jobs = []
        for num in (1, 5, 1, 5, 11):
            request = reader.ClipRequest(
                record.key, str(whole / record.shard), record.offset, record.size, record.sha256, "", 0, True, (32, 32), 11,
                (0, num, 1), (32, 32), (0, 0, 32, 32),
            )  # fmt: skip
            jobs.append(pool.ask(request, np.empty(request.shape, np.uint8)))
        for job in jobs:
            pool.wait(job)
            assert np.array_equal(job.out, reader.ClipReader(settings).read(job.request))
        for number in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler signals every process of a job, and ends none of these
            os.kill(pool._nursery._process.pid, number), os.kill(pool._workers[0].pid, number)
        pool.wait(job := pool.ask(jobs[0].request, np.empty_like(jobs[0].out)))
        assert np.array_equal(job.out, jobs[0].out) and not pool.counts
        os.kill(pool._workers[0].pid, signal.SIGKILL)  # idle: nothing to blame
        pool.wait(job := pool.ask(jobs[0].request, np.empty_like(jobs[0].out)))
        assert np.array_equal(job.out, jobs[0].out)
    finally:
        pool.close()
    pool.close()
