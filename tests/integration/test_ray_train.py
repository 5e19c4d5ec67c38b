"""Training on a Ray cluster of a head and two nodes on this machine: as a job of its job server, with a node killed in
mid-training, and without room. What ends, ends as the same ranks do without Ray, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import ray

from launch.ray_config import RayConfig, RayRanksConfig
from launch.ray_jobs import RayLauncher
from launch.submission import Launch, work_of
from tests import hold
from tests.demo_shards import write_demo_shards
from tests.integration.test_train import VAE, rows, train_arguments, workers_of
from tests.ray_nodes import ROOT, RayNodes
from videofm.errors import VideofmError
from videofm.run_dir import RunDirectory

NUM_STEPS, HELD = 30, 7
DEADLINE = 500.0
"""Seconds for what takes ten; ranks share the cores with whatever else runs here."""
RANKS = RayRanksConfig(placement="STRICT_SPREAD", start_timeout=300.0)


@dataclass
class Work:
    """A cluster, a folder with data, and the run without Ray."""

    folder: Path
    nodes: RayNodes
    local: Path

    def train(self, name: str, *overrides: str, **ranks: float) -> subprocess.Popen[str]:
        """Start `videofm train` with two ranks on the cluster, as on a node of it."""
        settings = RANKS.model_copy(update=ranks).model_dump_json()
        environment = self.nodes.environment | {"VIDEOFM_RANKS": "ray", "VIDEOFM_RAY": settings}
        return start(self.folder, name, environment, *overrides)


def start(folder: Path, name: str, environment: dict[str, str] | None = None, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "videofm", *arguments(folder, name), *overrides]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def arguments(folder: Path, name: str) -> list[str]:
    return train_arguments(folder, name, VAE, "parallel.data_degree=2", "trainer.checkpoint_every=5", max_steps=NUM_STEPS)


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a verb printed that ended with `code`."""
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == code, output
    return output


def reach(run: Path, step: int) -> None:
    """Wait until `run` has done so many steps."""
    deadline = time.monotonic() + DEADLINE
    while not (run / "metrics.jsonl").exists() or not rows(run) or rows(run)[-1]["step"] < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    folder = tmp_path_factory.mktemp("ray")
    short = Path(tempfile.mkdtemp(prefix="vfm-nodes-", dir="/tmp"))
    write_demo_shards(folder / "data", num_clips=24)
    with ThreadPoolExecutor(1) as pool:
        local = pool.submit(lambda: finished(start(folder, "local")))
        with mock.patch.dict(os.environ, hold.environment(folder / "hold")):
            nodes = RayNodes(short, dashboard=True)
        try:
            nodes.add(), nodes.add()
            local.result()
            yield Work(folder, nodes, folder / "local")
        finally:
            nodes.close()
            shutil.rmtree(short, ignore_errors=True)


@pytest.fixture
def held(work: Work) -> Iterator[Path]:
    """While this file is there, ranks on the cluster make `HELD` steps and no more in an attempt."""
    path = work.folder / "hold"
    path.write_text(str(HELD))
    yield path
    path.unlink(missing_ok=True)


def wait_for(path: Path) -> None:
    """Until `path` exists."""
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


def assert_same_losses(run: Path, local: Path) -> None:
    """Every loss and every norm of the gradients, to the last bit."""
    ours, theirs = ([(row["step"], row["loss"], row["grad_norm"]) for row in rows(path)] for path in (run, local))
    assert len(theirs) == NUM_STEPS
    assert ours == theirs


def kill_a_node(work: Work, run: Path, node: int) -> None:
    """In mid-training, where the ranks are held; the others see it by the death of its rank alone."""
    reach(run, HELD)
    wait_for(run / f"checkpoints/step_{HELD // 5 * 5:08d}/COMMITTED.json")
    work.nodes.kill(node)
    assert rows(run)[-1]["step"] < NUM_STEPS, "the kill came too late"


def test_a_node_that_is_killed_in_mid_training_is_replaced(work: Work, held: Path) -> None:
    """All of its processes get SIGKILL, a new one comes: the supervisor goes on from the last checkpoint, on other nodes."""
    process = work.train("replaced")
    run = work.folder / "replaced"
    kill_a_node(work, run, 2)
    work.nodes.add()
    wait_for(run / "attempts/0002")
    held.unlink()
    finished(process)
    assert_same_losses(run, work.local)
    assert len(list((run / "attempts").iterdir())) == 2
    log = (run / "log.txt").read_text()
    assert "1 on node 127.0.0.3" in log and "1 on node 127.0.0.4" in log and "1 on node 127.0.0.5" in log
    # Whether its place counts as gone depends on who is sooner, the new node or the question for room.
    assert json.loads((run / "attempts/0001/outcome.json").read_text())["message"].startswith("rank 1 ended without a word")
    assert "resuming from step_" in log and not workers_of(run)


def test_without_a_replacement_the_deadline_says_what_is_missing(work: Work, held: Path) -> None:
    """The verb waits for `start_timeout` and ends; once there is a node again, the same command goes on."""
    process = work.train("waiting", start_timeout=45.0)
    run = work.folder / "waiting"
    kill_a_node(work, run, 3)
    output = " ".join(finished(process, code=2).split())
    assert "the Ray cluster had no room within 45 s (cluster.ranks.start_timeout) for 2 ranks with CPU 1 each" in output
    assert "placed STRICT_SPREAD. It has 2 nodes: 127.0.0." in output and "(CPU 1, GPU 0)" in output
    assert "empty, they hold 1 such ranks" in output
    work.nodes.add()
    held.unlink()
    finished(work.train("waiting"))
    assert_same_losses(run, work.local)


def test_with_leave_to_the_rank_that_is_left_goes_on(work: Work) -> None:
    """The node that is left has two CPUs, and room for one rank all the same: each is to have a node of its own."""
    work.nodes.add(num_cpus=2)
    work.nodes.kill(1)
    process = work.train("fewer", "faults.fewer_ranks=true")
    run = work.folder / "fewer"
    kill_a_node(work, run, 4)
    finished(process)
    work.nodes.add()
    log = (run / "log.txt").read_text()
    assert "gone: going on with parallel.data_degree 1 in place of 2" in log and "1 ranks on Ray: 1 on node 127.0.0.7" in log
    assert rows(run)[-1]["step"] == NUM_STEPS and len(list((run / "attempts").iterdir())) == 2


@pytest.fixture(scope="module")
def launcher(work: Work) -> RayLauncher:
    config = RayConfig(
        kind="ray", dashboard=work.nodes.dashboard, token_file=str(work.nodes.token), folder=str(ROOT),
        python=sys.executable, environment={"OMP_NUM_THREADS": "1"}, stop_timeout=60, ranks=RANKS,
    )  # fmt: skip
    return RayLauncher(config)


def submit(work: Work, launcher: RayLauncher, name: str) -> Launch:
    """Hand a training over to the job server."""
    _, path, _, run_dir, *overrides = arguments(work.folder, name)
    launcher.submit(work_of(path, overrides, run_dir))
    return Launch.read(work.folder / name)


def test_a_job_trains_on_the_cluster(work: Work, launcher: RayLauncher) -> None:
    launch = submit(work, launcher, "job")
    text = "".join(launcher.logs(launch, follow=True))
    assert [state.state for state in launcher.states(launch)] == ["finished"], text
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in text and text.strip() == "".join(launcher.logs(launch)).strip()
    assert_same_losses(work.folder / "job", work.local)
    assert launcher.cancel(launch, now=False) == "no job of it runs"


def test_a_job_that_is_cancelled_saves(work: Work, launcher: RayLauncher, held: Path) -> None:
    """Ray's SIGTERM reaches the verb, its ranks save at the next step, and a new job goes on from there."""
    launch = submit(work, launcher, "cancelled")
    run = RunDirectory(work.folder / "cancelled")
    reach(run.path, 2)
    assert [state.state for state in launcher.states(launch)] == ["running"]
    assert "saving, then stopping" in launcher.cancel(launch, now=False)
    for _ in launcher.logs(launch, follow=True):
        pass
    assert [state.state for state in launcher.states(launch)] == ["cancelled"]
    assert run.outcome is not None and run.outcome["state"] == "interrupted"
    stopped_at = rows(run.path)[-1]["step"]
    assert stopped_at < NUM_STEPS and (run.path / f"checkpoints/step_{stopped_at:08d}").is_dir()
    held.unlink()
    again = submit(work, launcher, "cancelled")
    for _ in launcher.logs(again, follow=True):
        pass
    assert [state.state for state in launcher.states(again)] == ["finished"]
    assert_same_losses(run.path, work.local)


def test_a_job_server_asks_for_its_token(
    work: Work, launcher: RayLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):  # of a cluster of another test in this process
        monkeypatch.delenv(name, raising=False)
    launch, before = Launch.read(work.folder / "job"), ray.is_initialized()
    with pytest.raises(VideofmError, match="asks for a token and got none; name its file in cluster.token_file"):
        RayLauncher(launcher.config.model_copy(update={"token_file": None})).states(launch)
    other = tmp_path / "token"
    other.touch(mode=0o600)
    other.write_text("of another cluster")
    with pytest.raises(VideofmError, match="the token is not that of the cluster"):
        RayLauncher(launcher.config.model_copy(update={"token_file": str(other)})).states(launch)
    assert ray.is_initialized() == before  # asking a job server joins no cluster
