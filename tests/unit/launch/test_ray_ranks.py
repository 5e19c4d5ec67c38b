"""Which rank is where on a Ray cluster, what it is told, and how the ends of actors become one outcome. No cluster is started:
`tests/integration/test_ray_train.py` has real ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray

from launch import ranks as ranks_of
from launch import ray_host, ray_ranks
from launch.ranks import Attempt
from launch.ray_config import SETTINGS, RayRanksConfig
from launch.ray_host import RankHost, Spot
from videofm.errors import ConfigError, Interrupted, ParallelError, TransientError
from videofm.parallel.rendezvous import FIRST_PORT, NUM_PORTS
from videofm.run_dir import RunDirectory, write_json


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    folder = tmp_path / "attempts" / "0001"
    folder.mkdir(parents=True)
    return Attempt(RunDirectory(tmp_path), folder, 3)


def spot(node: str, address: str = "10.0.0.1", gpus: tuple[str, ...] = (), actor: Any = None) -> Spot:
    return Spot(actor, node, address, gpus)


def test_ranks_of_a_node_count_by_themselves_and_see_the_same_gpus(attempt: Attempt) -> None:
    """Two on node a with its GPUs 3 and GPU-5, one on node b: LOCAL_RANK is the index into CUDA_VISIBLE_DEVICES."""
    spots = [spot("a", gpus=("3",)), spot("a", gpus=("GPU-5",)), spot("b", "10.0.0.2", gpus=("0",))]
    found = ray_ranks.environments(attempt, spots, 4321)
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    assert [tuple(place[key] for key in keys) for place in found] == [
        ("0", "3", "0", "2", "10.0.0.1", "4321", "3,GPU-5"),
        ("1", "3", "1", "2", "10.0.0.1", "4321", "3,GPU-5"),
        ("2", "3", "0", "1", "10.0.0.1", "4321", "0"),
    ]
    assert "CUDA_VISIBLE_DEVICES" not in ray_ranks.environments(attempt, [spot("a")], 1)[0]


NODES = [
    {"Alive": True, "NodeID": "a" * 56, "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 5.0, "GPU": 2.0}},
    {"Alive": True, "NodeID": "b" * 56, "NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 3.0}},
    {"Alive": False, "NodeID": "c" * 56, "NodeManagerAddress": "10.0.0.3", "Resources": {}},
]


@pytest.mark.parametrize(
    ("settings", "device", "need"),
    [
        (RayRanksConfig(), "auto", {"CPU": 1.0, "GPU": 1.0}),
        (RayRanksConfig(), "cpu", {"CPU": 1.0}),
        (RayRanksConfig(gpus=0, cpus=2.0), "cuda", {"CPU": 2.0}),
        (RayRanksConfig(gpus=1, resources={"fast": 0.5}), "cpu", {"CPU": 1.0, "GPU": 1.0, "fast": 0.5}),
    ],
)
def test_what_a_rank_takes_of_a_node(settings: RayRanksConfig, device: str, need: dict[str, float]) -> None:
    with mock.patch.object(ray, "nodes", return_value=NODES):
        assert ray_ranks._need(settings, device) == need
        without = [{**node, "Resources": {"CPU": 4.0}} for node in NODES]
    with mock.patch.object(ray, "nodes", return_value=without):
        assert "GPU" not in ray_ranks._need(RayRanksConfig(), "auto")


def test_room_is_counted_by_what_is_scarcest() -> None:
    """Node a: 5 CPUs and 2 GPUs hold 2 ranks with 2 CPUs and a GPU each; node b without GPUs none, or 1 without a GPU."""
    assert [ray_ranks._room_on(node, {"CPU": 2.0, "GPU": 1.0}) for node in NODES] == [2, 0, 0]
    assert [ray_ranks._room_on(node, {"CPU": 2.0}) for node in NODES] == [2, 1, 0]


class Group:
    """A placement group that never gets its room, or at once."""

    def __init__(self, ready: bool) -> None:
        self.ready = ready

    def wait(self, timeout_seconds: float) -> bool:
        return self.ready


def reserve(attempt: Attempt, settings: RayRanksConfig, ready: bool, need: dict[str, float]) -> list[Any]:
    """Call `_reserve` against `NODES`; what was given back."""
    given: list[Any] = []
    with (
        mock.patch.object(ray_ranks, "placement_group", return_value=Group(ready)),
        mock.patch.object(ray_ranks, "remove_placement_group", given.append),
        mock.patch.object(ray, "nodes", return_value=NODES),
        mock.patch.object(ray, "cluster_resources", return_value={"CPU": 8.0, "GPU": 2.0}),
        mock.patch.object(ray, "available_resources", return_value={"CPU": 1.5}),
        ExitStack() as stack,
    ):
        try:
            ray_ranks._reserve(attempt, settings, need, stack)
        finally:
            stack.close()
    return given


def test_no_room_says_what_is_asked_and_what_there_is(attempt: Attempt) -> None:
    settings = RayRanksConfig(start_timeout=0.01, placement="SPREAD")
    expected = (
        r"no room within 0.01 s \(cluster.ranks.start_timeout\) for 3 ranks with CPU 2, GPU 1 each, placed SPREAD. It "
        r"has 2 nodes: 10.0.0.1 \(CPU 5, GPU 2\); 10.0.0.2 \(CPU 3, GPU 0\); empty, they hold 2 such ranks; free now, in all: "
        r"CPU 1.5, GPU 0. Add"
    )
    with pytest.raises(ParallelError, match=expected):
        reserve(attempt, settings, ready=False, need={"CPU": 2.0, "GPU": 1.0})


def test_cpus_stay_free_for_the_data(attempt: Attempt) -> None:
    """3 ranks of 2 CPUs leave 2 of 8: 2 may be asked for and 3 not, even where the ranks themselves have their room."""
    assert len(reserve(attempt, RayRanksConfig(spare_cpus=2.0), ready=True, need={"CPU": 2.0})) == 1
    with pytest.raises(ParallelError, match=r"3 CPUs are to stay free \(cluster.ranks.spare_cpus\)"):
        reserve(attempt, RayRanksConfig(spare_cpus=3.0, start_timeout=0.01), ready=True, need={"CPU": 2.0})


def test_a_stop_ends_the_wait_for_room(attempt: Attempt) -> None:
    attempt.run.request_stop()
    with pytest.raises(Interrupted, match="while 3 ranks waited for room"):
        reserve(attempt, RayRanksConfig(), ready=False, need={"CPU": 2.0})


def test_an_address_for_everybody_is_refused(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTINGS, '{"address": "0.0.0.0:6379"}')
    with pytest.raises(ConfigError, match=r"ranks.address \(in VIDEOFM_RAY\) 0.0.0.0:6379 stands for all interfaces"):
        ray_ranks.start(attempt)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "auto"])
def test_a_cluster_that_does_not_answer(attempt: Attempt, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Ray itself would ask for twenty minutes. Port 9 is that of `discard`, which nobody serves."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv(SETTINGS, json.dumps({"address": address}))
    monkeypatch.setattr(ray_ranks, "_KNOCK_SECONDS", 0.1)
    with pytest.raises(ParallelError, match=f"no Ray cluster answers at {address}: .*refused.* or unset VIDEOFM_RANKS"):
        ray_ranks.start(attempt)
    assert not ray.is_initialized()


# -- a wait for actors that start

ENDED = "The actor died unexpectedly"


class Starting:
    """Actors that answer nothing, or fail; a stop is asked for after two looks."""

    def __init__(self, run: RunDirectory, error: Exception | None) -> None:
        self.run, self.error, self.looks = run, error, 0

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.looks += 1
        if self.looks == 2:
            self.run.request_stop()
        return (references[:1], references[1:]) if self.error else ([], references)

    def get(self, references: Any, timeout: float | None = None) -> list[Any]:
        if references and self.error:
            raise self.error
        if timeout is not None:
            raise ray.exceptions.GetTimeoutError("it waited until the end")
        return []


def start_spots(attempt: Attempt, seconds: float) -> None:
    with ExitStack() as stack:
        ray_ranks._spots(attempt, mock.Mock(), {"CPU": 1.0}, RayRanksConfig(start_timeout=seconds), stack)


def see_folders(attempt: Attempt, seconds: float) -> None:
    with mock.patch.object(ray_ranks, "SEE_SECONDS", seconds / 3):
        ray_ranks._check_folders(attempt, [spot("a", actor=mock.Mock()), spot("b", actor=mock.Mock())])


@pytest.mark.parametrize("step", [start_spots, see_folders])
@pytest.mark.parametrize(
    ("error", "seconds", "kind", "told"),
    [
        (None, 600.0, Interrupted, "^stopped on request while 3 ranks were started"),
        (ray.exceptions.ActorDiedError(), 600.0, TransientError, f"lost while ranks were started on the Ray cluster: {ENDED}"),
        (ray.exceptions.NodeDiedError("n2 is gone"), 600.0, TransientError, "lost while ranks were started.*n2 is gone"),
        (ray.exceptions.RayActorError(error_msg="no videofm", actor_init_failed=True), 600.0, ParallelError, "no videofm. See"),
        (None, 1e-9, ParallelError, "did not start: no answer within 1e-09 s. See that all nodes have the same"),
    ],
)
def test_ranks_that_start_are_not_waited_for_in_vain(
    attempt: Attempt, step: Any, error: Exception | None, seconds: float, kind: type[Exception], told: str
) -> None:
    """A stop is heard at the next look; what is lost may be tried again; a node without videofm is no place to try again."""
    actors = Starting(attempt.run, error)
    with (
        mock.patch.object(ray, "wait", actors.wait),
        mock.patch.object(ray, "get", actors.get),
        mock.patch.object(ray, "remote", mock.Mock()),
        mock.patch.object(ray, "kill", mock.Mock()),
        mock.patch.object(ray_ranks, "PlacementGroupSchedulingStrategy", mock.Mock()),
        pytest.raises(kind, match=told) as caught,
    ):
        step(attempt, seconds)
    assert type(caught.value) is kind and not (attempt.folder / "seen.txt").exists()


# -- what runs on a node


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> RankHost:
    """The host of a rank without an actor around it."""
    context = mock.Mock(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    return RankHost()


def test_a_rank_is_a_process_with_the_environment_of_its_node(here: RankHost, tmp_path: Path, monkeypatch) -> None:
    """Ray's own variables describe the actor and do not reach the rank, but the address of the cluster and the token do."""
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/token")
    monkeypatch.setenv("OF_THE_NODE", "1")
    code = "import json, os, pathlib; print(json.dumps(dict(os.environ))); pathlib.Path('word').touch(); raise SystemExit(75)"
    output, word = tmp_path / "out", tmp_path / "word"
    assert here.run(["python", "-c", code], {"RANK": "1"}, str(tmp_path), str(output), str(word)) == (75, True)
    found = json.loads(output.read_text())
    expected = {
        "RANK": "1", "OF_THE_NODE": "1", "RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN_PATH": "/token",
        "VIDEOFM_LAUNCHER": str(os.getpid()),
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected and "RAY_JOB_ID" not in found


def test_folders_that_a_node_does_not_see(here: RankHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_host, "SEE_SECONDS", 0.0)
    note = tmp_path / "note"
    note.write_text("abc")
    assert here.sees([str(tmp_path)], str(note), "abc") == ""
    assert here.sees([str(tmp_path)], str(note), "of another run") == str(note)
    assert here.sees([str(tmp_path), "/not/there"], str(note), "abc") == "/not/there"


def test_a_port_that_is_free(here: RankHost) -> None:
    """Of those that meetings have: none that the kernel gives away in between."""
    drawn = {here.free_port(FIRST_PORT, NUM_PORTS) for _ in range(8)}
    assert len(drawn) > 1 and drawn <= set(range(FIRST_PORT, FIRST_PORT + NUM_PORTS))
    with socket.socket() as held:
        held.bind(("", drawn.pop()))
        taken = held.getsockname()[1]
        with pytest.raises(OSError, match=f"all of the ports from {taken} to {taken} are taken"):
            here.free_port(taken, 1)


def test_gpus_keep_their_names(here: RankHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of GPUs have no numbers; numbers come in their order."""
    named: list[str] = []

    class Context:
        def get_node_id(self) -> str:
            return "a"

        def get_accelerator_ids(self) -> dict[str, list[str]]:
            return {"GPU": named}

    monkeypatch.setattr(ray_host.ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray_host.ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    for names, expected in [(["10", "9"], ("9", "10")), (["MIG-b", "GPU-a"], ("GPU-a", "MIG-b"))]:
        named[:] = names
        assert here.describe() == ("a", "10.0.0.1", expected)


# -- how they end


class Actors:
    """In place of Ray: what each rank's call came to, known from the start."""

    def __init__(self, results: list[Any], nodes: list[dict[str, Any]]) -> None:
        self.results, self._nodes = results, nodes
        self.killed: list[int] = []

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        done = [rank for rank in references if self.results[rank] is not None]
        return done, [rank for rank in references if rank not in done]

    def get(self, rank: int) -> Any:
        if isinstance(self.results[rank], Exception):
            raise self.results[rank]
        return self.results[rank]

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def actor(self, rank: int) -> Any:
        def kill() -> None:
            self.killed.append(rank)
            self.results[rank] = self.results[rank] or (-9, False)

        return mock.Mock(kill=mock.Mock(remote=kill))


def outcome(
    attempt: Attempt, results: list[Any], nodes: list[dict[str, Any]] = NODES, **settings: Any
) -> tuple[Any, Actors, mock.Mock]:
    """What `RayRanks.wait` makes of ranks that end so: on node a, b, and one on node c, which is gone."""
    actors, closed = Actors(results, nodes), mock.Mock()
    room = ExitStack()
    room.callback(closed)
    spots = [spot(name * 56, f"10.0.0.{1 + number}", actor=actors.actor(number)) for number, name in enumerate("abc")]
    with (
        mock.patch.object(ray, "wait", actors.wait),
        mock.patch.object(ray, "get", actors.get),
        mock.patch.object(ray, "nodes", actors.nodes),
        mock.patch.object(ranks_of, "_GRACE", {"stop": 0.0, "hung": 0.0, "other": 0.0}),
        mock.patch.object(ray_ranks, "_NOTICE_SECONDS", 0.0),
    ):
        ranks = ray_ranks.RayRanks(attempt, spots, range(3), room, {"CPU": 3.0}, RayRanksConfig(**settings))
        found = ranks.wait()
        ranks.end()  # may be called again
    return found, actors, closed


def say(attempt: Attempt, *states: str, kind: str = "") -> None:
    for rank, state in enumerate(states):
        if state:
            write_json(attempt.folder / f"rank_{rank}.json", {"state": state, "message": f"word of {rank}", "kind": kind})


def test_ranks_that_finish(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    """What rank 0 printed is seen where the verb runs, once."""
    say(attempt, "finished", "finished", "finished")
    attempt.output(0).write_text("step 1\nstep 2\n")
    found, actors, closed = outcome(attempt, [(0, True)] * 3)
    assert (found.state, actors.killed) == ("finished", [])
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    assert closed.call_count == 1


def test_one_that_died_ends_the_others(attempt: Attempt) -> None:
    found, actors, closed = outcome(attempt, [None, (-11, False), None])
    assert (found.state, found.rank, actors.killed) == ("died", 1, [0, 2])
    assert found.message == "rank 1 was killed by SIGSEGV" and not found.gone and found.may_restart
    assert closed.call_count == 1


LOST = ray.exceptions.ActorDiedError()


def test_a_rank_whose_node_is_gone_without_room_elsewhere_cannot_come_back(attempt: Attempt) -> None:
    """3 CPUs a rank: node a (5) holds one, node b (3) one, so the third rank has no place."""
    found, _, _ = outcome(attempt, [None, None, LOST])
    assert (found.state, found.rank, found.gone) == ("died", 2, {2: "node 10.0.0.3 (cccccccc)"})
    assert found.message == "rank 2 ended without a word on node 10.0.0.3 (cccccccc), which is gone"


def test_a_rank_whose_node_is_gone_comes_back_where_there_is_room(attempt: Attempt) -> None:
    spare = {"Alive": True, "NodeID": "d" * 56, "NodeManagerAddress": "10.0.0.4", "Resources": {"CPU": 3.0}}
    found, _, _ = outcome(attempt, [None, None, LOST], [*NODES, spare])
    assert (found.state, found.rank, found.gone) == ("died", 2, {})


WIDE = [
    {"Alive": True, "NodeID": name * 56, "NodeManagerAddress": "10.0.0.9", "Resources": {"CPU": cpus}}
    for name, cpus in {"a": 6.0, "b": 4.0}.items()
]


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        ({}, 0),  # nodes of 6 and 4 CPUs hold three ranks of 3
        ({"placement": "SPREAD"}, 0),
        ({"placement": "STRICT_SPREAD"}, 1),  # one a node
        ({"placement": "STRICT_PACK"}, 1),  # two on the larger one
        ({"spare_cpus": 1.0}, 0),
        ({"spare_cpus": 2.0}, 1),  # of ten CPUs eight, which are two ranks
        ({"spare_cpus": 2.0, "placement": "STRICT_PACK"}, 1),
        ({"spare_cpus": 12.0}, 1),  # no more than were lost
    ],
)
def test_room_for_a_lost_rank_is_counted_as_ranks_are_placed(attempt: Attempt, settings: dict[str, Any], gone: int) -> None:
    """Of which `faults.fewer_ranks` learns with how many to go on."""
    found, _, _ = outcome(attempt, [None, None, LOST], WIDE, **settings)
    assert len(found.gone) == gone
    message = ray_ranks._room(WIDE, {"CPU": 3.0}, RayRanksConfig(**settings))
    assert (message < 3) == bool(gone)


def test_an_actor_that_dies_on_a_living_node_is_not_gone(attempt: Attempt) -> None:
    found, _, _ = outcome(attempt, [LOST, None, None])
    assert (found.state, found.rank, found.gone) == ("died", 0, {})


def test_who_noticed_is_no_cause(attempt: Attempt) -> None:
    say(attempt, "failed", kind="CollectiveError")
    found, _, _ = outcome(attempt, [(1, True), None, LOST])
    assert (found.state, found.rank) == ("died", 2) and found.message.endswith("rank 0 says: word of 0")


def test_a_file_of_another_node_is_waited_for(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system shows it later; a rank that left none is not waited for."""
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        say(attempt, "failed")

    monkeypatch.setattr(ray_ranks.time, "sleep", sleep)
    assert ray_ranks._seen(attempt.folder, 0, wrote=False) is None and not sleeps
    assert (ray_ranks._seen(attempt.folder, 0, wrote=True) or {})["state"] == "failed" and len(sleeps) == 1


def test_importing_it_starts_nothing() -> None:
    code = "import launch.ray_ranks, launch.ray_jobs, ray; raise SystemExit(ray.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
