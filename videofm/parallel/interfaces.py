"""The network interface over which gloo reaches the other nodes.

Left to itself gloo takes the interface that the name of its own machine leads to. Debian writes that name into /etc/hosts
beside 127.0.1.1, so ranks on two such nodes would offer each other their loopback. Here the kernel is asked instead: from
where would it send to them?
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys
from contextlib import suppress

from videofm.parallel.rendezvous import Place

_SIOCGIFADDR = 0x8915
"""Linux: the address of an interface."""


def interface_to_peers(place: Place) -> str | None:
    """The interface that leads from here to where ranks meet, or to the nodes of the others.

    An address that leads to the loopback counts only where nothing else does: rank 0 may know its own machine by such a one.

    Returns:
        None where it cannot be told: gloo chooses.
    """
    sources = [source for name in dict.fromkeys((place.address, *place.hosts)) if (source := _source(name)) is not None]
    leads_away = next((source for source in sources if not _is_loopback(source)), None)
    if leads_away is not None:
        return interface_of(leads_away)
    # A name may lead to the loopback on its own machine only; 127.0.0.1 as the address for all means that there is one machine.
    is_one_machine = bool(place.hosts) or place.local_world_size == place.world_size or _is_loopback(place.address)
    return interface_of(sources[0]) if sources and is_one_machine else None


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has the IPv4 `address`; None where none says so."""
    if sys.platform != "linux":
        return None
    if _is_loopback(address):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _source(name: str) -> str | None:
    """The address of this machine from which it would send to `name`. Nothing is sent."""
    if not name:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, suppress(OSError):
        asked.connect((name, 9))
        return str(asked.getsockname()[0])
    return None
