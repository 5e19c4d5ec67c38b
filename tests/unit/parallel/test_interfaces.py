"""Which interface gloo is told to use: never the loopback where ranks are on several machines."""

from __future__ import annotations

import fcntl
import os
import socket

import pytest
import torch.distributed as dist

from videofm.parallel import interfaces, mesh
from videofm.parallel.interfaces import interface_of, interface_to_peers
from videofm.parallel.rendezvous import Place

TWO_NODES = Place(
    rank=0, world_size=4, local_world_size=2, address="n1", port=20001, store="rank", hosts=("n1", "n1", "n2", "n2")
)


def test_the_interface_is_the_one_with_the_address() -> None:
    assert interface_of("127.0.0.1") == interface_of("127.0.0.3") == "lo"
    assert interface_of("192.0.2.77") is None  # an address that nobody has (RFC 5737)
    assert interface_of("head") is None
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            try:
                answer = fcntl.ioctl(asked.fileno(), 0x8915, name.encode().ljust(256, b"\0"))
            except OSError:
                continue
        address = socket.inet_ntoa(answer[20:24])
        if not address.startswith("127."):
            assert interface_of(address) == name


def somewhere(address: str, local_world_size: int = 2) -> Place:
    """A rank of four whose launcher does not name the nodes."""
    return Place(world_size=4, local_world_size=local_world_size, address=address)


@pytest.mark.parametrize(
    ("sources", "place", "expected"),
    [
        pytest.param({"n1": "10.0.0.1", "n2": "10.0.0.1"}, TWO_NODES, "eth0", id="names lead to the network"),
        pytest.param({"n1": "127.0.1.1", "n2": "10.0.0.1"}, TWO_NODES, "eth0", id="Debian: the own name is a loopback"),
        pytest.param({"n1": "127.0.0.1"}, TWO_NODES, "lo", id="two nodes of Slurm on one machine"),
        pytest.param({}, TWO_NODES, None, id="names that nobody knows"),
        pytest.param({"h": "127.0.1.1"}, somewhere("h"), None, id="a name, other nodes unknown"),
        pytest.param({"h": "127.0.1.1"}, somewhere("h", 4), "lo", id="a name, one node"),
        pytest.param({"127.0.0.1": "127.0.0.1"}, somewhere("127.0.0.1"), "lo", id="one machine"),
        pytest.param({"10.0.0.9": "10.0.0.1"}, somewhere("10.0.0.9"), "eth0", id="an address"),
        pytest.param({}, Place(), None, id="one process"),
    ],
)
def test_what_leads_to_the_other_nodes(
    sources: dict[str, str], place: Place, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interfaces, "_source", sources.get)
    monkeypatch.setattr(interfaces, "interface_of", lambda address: {"10.0.0.1": "eth0"}.get(address, "lo"))
    assert interface_to_peers(place) == expected


def test_what_the_kernel_says() -> None:
    assert interfaces._source("127.0.0.1") == "127.0.0.1"
    assert interfaces._source("no-such-host.invalid") is None and interfaces._source("") is None


@pytest.mark.parametrize("word", [None, "ib0"])
def test_gloo_is_told_unless_the_user_has(word: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if word is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", word)
    store, told = dist.HashStore(), []
    store.set("ranks_per_node", "2")
    monkeypatch.setattr(mesh, "meet", lambda *_: store)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: told.append(os.environ["GLOO_SOCKET_IFNAME"]))
    monkeypatch.setattr(mesh, "interface_to_peers", lambda _: "eth0")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what is set here is for this test alone
    assert mesh._join(TWO_NODES, "gloo", 5.0) == 2
    assert told == [word or "eth0"]
