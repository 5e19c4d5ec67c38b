"""Who a process is, by each kind of environment; and what a meeting says when a rank does not come. Real processes meet in
tests/distributed/test_rendezvous.py; here ranks are threads."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.ranks import Outcome
from videofm.config.train import ParallelConfig
from videofm.errors import ParallelError, TransientError
from videofm.parallel import mesh, rendezvous
from videofm.parallel.collectives import CollectiveError
from videofm.parallel.hostlist import expand_counts, expand_hosts
from videofm.parallel.rendezvous import Place, find_place, meet, slurm_port

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "n[01-02]",
}  # fmt: skip

BY_HAND = {
    "login1": ["login1"],
    "n[01-03,7],login1,rack[1-2]-gpu[03-04]": [
        "n01", "n02", "n03", "n7", "login1", "rack1-gpu03", "rack1-gpu04", "rack2-gpu03", "rack2-gpu04",
    ],
    "n[1-3]x[1-2],n[1-2]": ["n1x1", "n1x2", "n2x1", "n2x2", "n3x1", "n3x2", "n1", "n2"],
    "n[8-11]": ["n8", "n9", "n10", "n11"],
    "b[098-101]": ["b098", "b099", "b100", "b101"],
    "n[008-010]": ["n008", "n009", "n010"],
    "n[9-011]": ["n9", "n10", "n11"],
    "n[0-2]": ["n0", "n1", "n2"],
    "n[1-2,2],n1": ["n1", "n2", "n2", "n1"],
}  # fmt: skip


@pytest.mark.parametrize("text", BY_HAND)
def test_node_lists(text: str) -> None:
    assert expand_hosts(text) == BY_HAND[text]


@pytest.mark.parametrize("text", BY_HAND)
def test_slurm_reads_them_the_same(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        pytest.skip("scontrol is not installed (package slurm-client); the lists above are expanded by hand")
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    done = subprocess.run([scontrol, "show", "hostnames", text], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.split() == expand_hosts(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "do not fit together"),
        ("a,,b", "do not fit together"),
        ("n[1-2", "do not fit together"),
        ("n[1-2]]", "do not fit together"),
        ("n[1-[2]]", "do not fit together"),
        ("n[]", r"\[\] is not made of numbers"),
        ("n[1-a]", r"\[1-a\] is not made of numbers"),
        ("n[3-1]", "the range 3-1 runs backwards"),
        ("n[0-99999999]", "more than 1048576 hosts"),
        ("n[1-2000]x[1-2000]", "more than 1048576 hosts"),
    ],
)
def test_what_is_no_node_list(text: str, why: str) -> None:
    with pytest.raises(ParallelError, match=rf"is not a Slurm node list: .*{why}.*MASTER_ADDR"):
        expand_hosts(text)


def test_tasks_of_nodes() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1] and expand_counts("4") == [4] and expand_counts("1,2(x2)") == [1, 2, 2]
    with pytest.raises(ParallelError, match=r"'2\(x\)' does not say how many tasks each node has"):
        expand_counts("2(x)")


def test_the_parsers_need_no_torch() -> None:
    code = "import sys, videofm.parallel.hostlist; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- who a process is


def test_alone() -> None:
    assert find_place({}) == Place() and find_place({"SLURM_JOB_ID": "1"}, attempt=4) == Place(attempt="4")


def test_our_file_comes_first(tmp_path: Path) -> None:
    place = find_place({**SLURM, **TORCHRUN, **ADDRESS, "VIDEOFM_RENDEZVOUS": str(tmp_path)}, attempt=2)
    expected = Place(3, 4, 1, 2, store="file", file=tmp_path, attempt="2", ranks_per_node=2)
    assert place == expected and find_place(TORCHRUN, 2, file=tmp_path) == expected


def test_torchrun_comes_before_slurm() -> None:
    """Its agent hosts the store, and counts its own restarts of one command; without an agent rank 0 hosts it."""
    rank = find_place({**SLURM, **TORCHRUN, **ADDRESS}, attempt=2)
    assert rank == Place(3, 4, 1, 2, "n1", 29500, "rank", attempt="2", ranks_per_node=2)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert find_place({**TORCHRUN, **ADDRESS, **agent}, 2) == Place(
        3, 4, 1, 2, "n1", 29500, "agent", attempt="2.1", ranks_per_node=2
    )
    assert find_place({**TORCHRUN, **ADDRESS, "TORCHELASTIC_USE_AGENT_STORE": "False"}).store == "rank"


def test_slurm() -> None:
    """Two nodes of two tasks: task 3 is the second of n02. The port is that of the job and the attempt."""
    assert find_place(SLURM, attempt=5) == Place(
        3, 4, 1, 2, "n01", slurm_port(4711, 5), "rank", attempt="4711.5", ranks_per_node=2, hosts=("n01", "n01", "n02", "n02")
    )
    told = find_place({**SLURM, **ADDRESS})
    assert (told.address, told.port) == ("n1", 29500), "what a user sets is taken"


def test_a_step_of_slurm_may_be_smaller_than_its_job() -> None:
    """Three tasks on the last two of four nodes: the step's own list has the host of its task 0."""
    step = {
        **SLURM, "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "2(x4)",
        "SLURM_STEP_NODELIST": "n[3-4]", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1",
        "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    }  # fmt: skip
    place = find_place(step)
    assert (place.address, place.world_size, place.hosts) == ("n3", 3, ("n3", "n3", "n4"))
    assert (place.local_world_size, place.ranks_per_node) == (1, 1), "blocks of two neighbours would cross nodes"


def test_a_batch_script_of_slurm_is_one_process() -> None:
    """Its environment speaks of task 0 and of all tasks, which it is not; it has no step. A step of one task is alone too."""
    script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}
    assert find_place(script) == Place()
    assert find_place({**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}).store == "alone"


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({**TORCHRUN, "RANK": "4"}, "RANK 4 must be from 0 to WORLD_SIZE - 1 = 3"),
        ({"WORLD_SIZE": "2"}, "RANK is '' and must be a whole number"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, "WORLD_SIZE is 'four' and must be a whole number"),
        ({**TORCHRUN, "MASTER_ADDR": "n1"}, "WORLD_SIZE is 4, but MASTER_PORT is not set.*a free port of the node of rank 0"),
        (TORCHRUN, "MASTER_ADDR and MASTER_PORT are not set"),
        ({**TORCHRUN, **ADDRESS, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999' and must be from 1 to 65535"),
        ({**SLURM, "SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is not set.*set MASTER_ADDR"),
        ({**SLURM, "SLURM_JOB_ID": ""}, "SLURM_JOB_ID, of which the port is made, is not set; set MASTER_PORT"),
        # Dealt out in turn, tasks 0 and 2 are on the first node, 1 and 3 on the second.
        ({**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, "task 1 is number 0 of node 1.*srun --distribution=block"),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_be(held: dict[str, str], told: str) -> None:
    with pytest.raises(ParallelError, match=told):
        find_place(held)


def test_ports() -> None:
    """In range; jobs near each other and the attempts of a job have ports of their own."""
    ports = {(job, attempt): slurm_port(job, attempt) for job in range(123456, 123456 + 625) for attempt in range(16)}
    assert len(set(ports.values())) == len(ports) == 10000
    assert (min(ports.values()), max(ports.values())) == (20000, 29999)


def test_ports_are_none_that_the_kernel_gives_away() -> None:
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not ephemeral.exists():
        pytest.skip("this kernel does not tell its ephemeral ports")
    first, _ = map(int, ephemeral.read_text().split())
    assert first >= rendezvous.FIRST_PORT + rendezvous.NUM_PORTS


def test_what_libraries_are_told() -> None:
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert find_place(SLURM).environment() == told
    assert Place().environment() == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


# -- how they meet


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def meet_as(ranks: list[int], world_size: int, timeout: float, **place: object) -> dict[int, str]:
    """Let threads meet; what each was told: `met`, or the error."""
    told: dict[int, str] = {}
    stores = []  # rank 0 hosts the store that the others still read

    def one(rank: int) -> None:
        try:
            stores.append(meet(Place(rank, world_size, **place), timeout))  # type: ignore[arg-type]
            told[rank] = "met"
        except (CollectiveError, ParallelError) as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return told


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ((2, 2, 1, 1), 1),  # pairs would lie on two nodes
        ((2, 2, 2, 2), 2),
        ((2, 2, None, None), 4),  # where one does not know, nobody does: all exchange heads
    ],
)
def test_ranks_of_uneven_nodes_make_the_same_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: tuple[int | None, ...], expected: int
) -> None:
    """Each is told how many ranks its own node has, by torchrun or Ray; which ranks exchange heads holds for all of them."""
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(mesh, "_split", lambda layout, *_: layout)
    config, found = ParallelConfig(context_degree=4, context_strategy="unified"), {}

    def one(rank: int) -> None:
        place = Place(rank, 4, 0, told[rank], store="file", file=tmp_path / "store", ranks_per_node=told[rank])
        found[rank] = mesh.create_mesh(config, torch.device("cpu"), place, [4]).ulysses_degree

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == dict.fromkeys(range(4), expected)


def check_seconds(told: str) -> None:
    """The time that is told was measured, from where the store was there: most of the 4 s that ranks have here."""
    found = re.search(r" did not come within (\d+) s; ", told)
    assert found is not None and 1 <= int(found[1]) < 60, told


def test_a_rank_that_does_not_come_is_named_with_its_host() -> None:
    """To all that came, in the words of rank 0."""
    hosts = ("n1", "n1", "n2", "n2")
    told = meet_as([0, 1], 4, 4.0, address="127.0.0.1", port=free_port(), store="rank", hosts=hosts)
    assert told[0] == told[1]
    here = socket.gethostname()
    assert told[0].startswith("rank 2 (on n2), rank 3 (on n2) of 4 did not come within ")
    assert f" s; 2 came, from {here}. They died" in told[0]
    check_seconds(told[0])


def test_others_look_for_themselves_where_rank_0_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_SLACK", 0.0)
    told = meet_as([1], 2, 4.0, store="file", file=tmp_path / "store")
    assert told[1].startswith("rank 0 of 2 did not come within ") and " s; 1 came, from " in told[1]
    check_seconds(told[1])


def test_where_nobody_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    told = meet_as([1], 2, 0.3, address="127.0.0.1", port=port, store="rank", hosts=("n1", "n2"))
    assert f"reached nobody at 127.0.0.1:{port}: Connection refused. rank 0 (on n1) did not come" in told[1]

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    told = meet_as([1], 2, 5.0, address="no-such-node", port=port, store="rank")
    assert "cannot find the address of 'no-such-node', where rank 0 is; set MASTER_ADDR" in told[1]


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TransientError, match=f"rank 0 cannot host the store at 127.0.0.1:{port}: .*EADDRINUSE") as caught:
            meet(Place(0, 2, address="127.0.0.1", port=port, store="rank"), 5.0)
    assert "set MASTER_PORT to a free one, the same on all ranks, or end that program" in str(caught.value)
    assert Outcome("failed", str(caught.value), type(caught.value).__name__).may_restart, "another attempt has another port"


def test_what_listens_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program has the port; torch finds out when it speaks to it."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("validation failed\nand a stack of C++")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(dist, "TCPStore", refuse)
        port = taken.getsockname()[1]
        told = meet_as([1], 2, 5.0, address="127.0.0.1", port=port, store="rank")
    assert told[1].startswith(f"the store at 127.0.0.1:{port} does not answer as a store does: validation failed. If another")


def test_a_store_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> bool:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(rendezvous, "_wait", gone)
    told = meet_as([1], 2, 5.0, store="file", file=tmp_path / "store")
    assert told[1].startswith(f"the file {tmp_path / 'store'} went away while rank 1 waited for the others; rank 0 or the")


def test_ranks_that_came_but_cannot_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours in the same call passes as it is."""
    text = "[/torch/gloo/transport/tcp/pair.cc:144] Gloo connectFullMesh failed with timed out"

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(CollectiveError, match=r"all 1 ranks came, but rank 0 on .* cannot connect.*GLOO_SOCKET_IFNAME"):
        mesh._join(Place(), "gloo", 5.0)
    text = "a fault of ours"
    with pytest.raises(RuntimeError, match="a fault of ours"):
        mesh._join(Place(), "gloo", 5.0)


def test_ranks_of_a_dead_attempt_are_not_taken_for_those_of_this_one() -> None:
    """In a store that outlives attempts. The last line is the control: with the number of the dead attempt they would be."""
    host = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    where = {"address": "127.0.0.1", "port": host.port, "store": "agent"}
    assert meet_as([0, 1], 2, 20.0, attempt="0", **where) == {0: "met", 1: "met"}
    assert "rank 1 of 2 did not come" in meet_as([0], 2, 0.3, attempt="1", **where)[0]
    assert meet_as([0], 2, 20.0, attempt="0", **where) == {0: "met"}
