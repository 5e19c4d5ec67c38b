"""Curation that is killed, out of disk, doubled or cut off: nothing lost, nothing twice, and in the end the same dataset."""

from __future__ import annotations

import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import ray

from data_pipelines import curate, demo, engine, sink
from data_pipelines.actors import Client, Model
from data_pipelines.groups import process_group
from data_pipelines.rows import FrameRequest, Row
from data_pipelines.sources import find_sources
from tests.unit.data_pipelines.tiny_groups import job, make_rows, report
from videofm.config import CurateConfig, DemoDataConfig
from videofm.config.curate import EngineConfig
from videofm.data import storage
from videofm.data.manifest import Manifest, read_entries
from videofm.data.shards import ShardWriter
from videofm.errors import DataError
from videofm.run_dir import RunDirectory

FOLDERS = ("shards", "index", "manifest")

NUM_MOMENTS = 11
"""Durable steps of the commit protocol; a worker is killed before each."""


def in_fork(work) -> int:
    """Run `work` in a fork of this process; its wait status. Exit code 7 is an OSError, 8 a DataError, 9 anything else."""
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            work()
        except OSError:
            code = 7
        except DataError:
            code = 8
        except BaseException:
            code = 9
        os._exit(code)
    return os.waitpid(pid, 0)[1]


def watch(out: Path, die_at: int | None, log: Path | None = None) -> None:
    """Count what is made durable or visible in the dataset's folders, and die just before number `die_at`."""
    count = 0

    def watched(function, path_of):
        def call(*arguments, **options):
            nonlocal count
            path = str(path_of(*arguments))
            if any(path.startswith(str(out / name)) for name in FOLDERS):
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                if log is not None:
                    with log.open("a") as file:
                        file.write(f"{function.__name__} {path}\n")
            return function(*arguments, **options)

        return call

    os.fsync = watched(os.fsync, lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    os.replace = watched(os.replace, lambda source, target: target)
    os.link = watched(os.link, lambda source, target: target)
    add = ShardWriter.add

    def watched_add(self, *arguments, **options):
        return watched(lambda *_: add(self, *arguments, **options), lambda path: path)(self.folder / "shards")

    ShardWriter.add = watched_add


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Sources, and the hash of the dataset that they give without a fault; with the moments at which a worker can die."""
    folder = tmp_path_factory.mktemp("undisturbed")
    made = make_rows(folder, "one", "two")
    log = folder / "log"

    def work():
        watch(folder / "out", None, log)
        process_group(job(folder, made))

    assert in_fork(work) == 0
    return made, Manifest.load(folder / "out").hash, log.read_text().splitlines()


def test_there_are_eight_moments_at_which_a_worker_can_die(undisturbed):
    """Each of two clips goes into the tar; tar and index are flushed, put in place, their folders flushed; the entry is
    flushed, linked, its folder flushed."""
    moments = undisturbed[2]
    assert len(moments) == NUM_MOMENTS >= 8
    assert sum("link" in moment for moment in moments) == 1 and sum("replace" in moment for moment in moments) == 2


@pytest.mark.parametrize("moment", range(NUM_MOMENTS))
def test_a_killed_worker_leaves_nothing_half_done(undisturbed, tmp_path, moment):
    made, wanted, moments = undisturbed

    def work():
        watch(tmp_path / "out", moment)
        process_group(job(tmp_path, made))

    assert in_fork(work) == signal.SIGKILL
    committed = bool(read_entries(tmp_path / "out"))
    assert committed == any("link" in before for before in moments[:moment])
    if committed:
        Manifest.load(tmp_path / "out").verify()
        assert Manifest.load(tmp_path / "out").hash == wanted
    assert process_group(job(tmp_path, made))
    manifest = Manifest.load(tmp_path / "out")
    manifest.verify()
    assert manifest.hash == wanted and len(manifest.records()) == 2


def test_two_workers_on_one_group_commit_one_shard(undisturbed, tmp_path):
    made, wanted, _ = undisturbed
    work = job(tmp_path, made)
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if process_group(work) else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert Manifest.load(tmp_path / "out").hash == wanted
    assert len(list((tmp_path / "out/shards").iterdir())) == len(list((tmp_path / "out/index").iterdir())) == 1


@pytest.mark.parametrize(("num_bytes", "code"), [(6000, 7), (1200, 8)])
def test_a_full_disk_costs_no_clip(undisturbed, tmp_path, num_bytes, code):
    """Files end at 6,000 bytes, so that the tar does not fit, or at 1,200, so that no clip does: a clean failure both times."""
    made, wanted, _ = undisturbed

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        process_group(job(tmp_path, made))

    status = in_fork(work)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == code
    assert read_entries(tmp_path / "out") == [] and list((tmp_path / "out/shards").iterdir()) == []
    assert process_group(job(tmp_path, made)) and report(tmp_path)[1] == []
    assert Manifest.load(tmp_path / "out").hash == wanted


def config(source: Path, **changes) -> CurateConfig:
    stages = [{"kind": kind} for kind in ("probe", "dedup", "split")]
    stages.append({"kind": "transcode", "height": 32, "width": 32, "fps": 25.0})
    value = {"kind": "curate", "source": str(source), "stages": stages, "held_out": 0.2}
    return CurateConfig.model_validate({**value, "engine": {"num_workers": 2, "group_size": 1}, **changes})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("demo"))
    demo.run(DemoDataConfig(kind="demo_data", num_videos=5, shots_per_video=2, broken=False), run)
    return run.path / "videos"


@pytest.fixture(scope="module")
def node():
    """A Ray node for the tests that do not kill theirs. Tests that fork come before it: Ray's threads do not survive a fork."""
    with engine.cluster(EngineConfig(num_workers=2)):
        yield


def test_a_killed_driver_and_a_second_one(source, node, tmp_path):
    """The driver dies with some groups committed; while it lived a second one was refused; a third ends what it began, and
    copies the dataset."""
    whole = curate.run(config(source), RunDirectory(tmp_path / "whole"))
    script = tmp_path / "driver.py"
    script.write_text(
        "import json, sys\nfrom data_pipelines import curate\nfrom videofm.config import CurateConfig\n"
        "from videofm.run_dir import RunDirectory\n"
        "import time\nfrom pathlib import Path\nfrom data_pipelines.live import LiveMetrics\n"
        "group_done = LiveMetrics.group_done\n"
        "def wait_to_be_killed(self, metrics):\n"
        "    group_done(self, metrics)\n"
        "    while list(Path(sys.argv[2]).glob('manifest/shard-*.json')):\n"
        "        time.sleep(1)\n"
        "LiveMetrics.group_done = wait_to_be_killed\n"
        "if __name__ == '__main__':\n"
        "    curate.run(CurateConfig.model_validate(json.loads(sys.argv[1])), RunDirectory(sys.argv[2]))\n"
    )
    folder = tmp_path / "killed"
    command = [sys.executable, str(script), config(source).model_dump_json(), str(folder)]
    root = str(Path(curate.__file__).parent.parent)
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": root})
    deadline = time.monotonic() + 600
    while not list(folder.glob("manifest/shard-*.json")) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if driver.poll() is None:
        with pytest.raises(DataError, match="another process curates into .*; wait for it, stop it, or choose another"):
            curate.run(config(source), RunDirectory(folder))
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert list(folder.glob("manifest/shard-*.json")) and not (folder / "funnel.json").exists()
    output = tmp_path / "copy"
    again = curate.run(config(source, output=str(output)), RunDirectory(folder))
    assert again["manifest_hash"] == whole["manifest_hash"] and again["num_clips"] == whole["num_clips"]
    copied = Manifest.load(output)
    copied.verify()
    assert copied.hash == whole["manifest_hash"]
    assert (output / "manifest/snapshot.parquet").read_bytes() == (folder / "manifest/snapshot.parquet").read_bytes()


def test_a_copy_is_resumed_and_belongs_to_one_dataset(undisturbed, tmp_path):
    made, wanted, _ = undisturbed
    process_group(job(tmp_path, made))
    output = str(tmp_path / "copy")
    sink.claim(output, "c")
    sink.claim(str(tmp_path / "other"), "d")
    with pytest.raises(DataError, match="holds another dataset .manifest hash d, this one has e"):
        sink.claim(str(tmp_path / "other"), "e")
    put_new = storage.put_new
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "put_new", lambda *a: (_ for _ in ()).throw(storage.TransientError("cut off")))
        with pytest.raises(storage.TransientError):
            sink.upload(str(tmp_path / "out"), output, ["00000"])
    assert put_new is storage.put_new and read_entries(Path(output)) == []  # tar and index are there, and nobody sees them
    for _ in range(2):
        sink.claim(output, "c")
        sink.upload(str(tmp_path / "out"), output, ["00000"])
        assert Manifest.load(output).hash == wanted
    (tmp_path / "copy/manifest/shard-00000.json").write_text("{}")
    with pytest.raises(DataError, match="is the entry of another shard"):
        sink.upload(str(tmp_path / "out"), output, ["00000"])


def test_an_output_that_cannot_be_written(source):
    with pytest.raises(DataError, match="could not be written: .*Free the disk, or choose another run directory"):
        curate.run(config(source), RunDirectory("/proc/videofm"))


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Answers 503 to the first three requests for each file, and never has `gone.mp4`."""

    asked: Counter[str] = Counter()

    def send_head(self):
        name = self.path.rpartition("/")[2]
        self.asked[name] += 1
        if name.endswith(".mp4") and self.asked[name] <= 3:
            self.send_error(503)
            return None
        return super().send_head()

    def log_message(self, *arguments):
        pass


def test_a_store_that_fails_three_times_costs_nothing(undisturbed, tmp_path, monkeypatch):
    """Remote sources from a list that lies in the store itself; one of them has vanished."""
    made, _, _ = undisturbed
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.0)
    folder = Path(made[0].path).parent
    names = [*(row.name for row in made), "gone.mp4"]
    (folder / "list.jsonl").write_text("".join(json.dumps({"uri": name, "source_id": name}) + "\n" for name in names))

    def handler(*arguments):
        return Flaky(*arguments, directory=str(folder))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = find_sources(f"http://127.0.0.1:{server.server_port}/list.jsonl", tmp_path / "out", 8)
        assert found.num_sources == 3
        work = job(tmp_path / "unused", made)
        assert process_group(type(work)(**{**vars(work), "folder": str(tmp_path / "out")}))
    finally:
        server.shutdown()
        server.server_close()
    assert Flaky.asked["one.mp4"] == Flaky.asked["two.mp4"] == 4
    _, losses = report(tmp_path)
    assert [(loss["source"].rpartition("/")[2], loss["reason"]) for loss in losses] == [("gone.mp4", "missing")]
    local = {record.sha256 for record in Manifest.load(folder / "out").records()}
    assert {record.sha256 for record in Manifest.load(tmp_path / "out").records()} == local


class DeadlyStage:
    """Dies with the clip that says so; else answers with the process that it is."""

    frames = FrameRequest(2, 8, 8)

    def load(self, device):
        self.device = device

    def process_batch(self, rows, frames):
        if any("kill" in row.name for row in rows):
            os._exit(1)
        return [
            row.with_(scores={"pid": float(os.getpid()), "mean": float(f.mean())}) for row, f in zip(rows, frames, strict=True)
        ]


class DeadlyModel(Model):
    """The actor of the engine, around another stage."""

    def __init__(self):
        self.stage, self.device, self.loaded = DeadlyStage(), "cpu", False


def test_a_clip_that_kills_its_actor_twice_is_quarantined(undisturbed, node, tmp_path):
    """The actor comes back each time, on a node all of whose CPUs it holds, and the other clips get through."""
    made = make_rows(tmp_path, "a", "kill", "b")
    frames = {"num_frames": 2, "height": 8, "width": 8}
    options = {"num_cpus": 2, "max_restarts": -1, "max_task_retries": 0}
    handles = [ray.remote(**options)(DeadlyModel).remote()]
    work = job(tmp_path, made, stages=[], names=["model"], pack=False, frames=frames)
    assert process_group(work, Client(handles, 0))
    ray.kill(handles[0])
    summary, losses = report(tmp_path)
    assert [(loss["source"], loss["kind"], loss["reason"]) for loss in losses] == [("kill.mp4", "quarantined", "model_crash")]
    rows = [Row.from_json(json.loads(line)) for line in (tmp_path / "out/groups/0/00000.rows.jsonl").read_text().splitlines()]
    assert [row.name for row in rows] == ["a.mp4", "b.mp4"] and rows[0].scores["pid"] != rows[1].scores["pid"]
    (stage,) = summary.metrics
    assert (stage["num_in"], stage["num_out"], stage["quarantined"], stage["retries"]) == (3, 2, {"model_crash": 1}, 2)
