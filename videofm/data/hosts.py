"""Which hosts an address may lead to that somebody else wrote: public ones, and the one that its list lies on. Otherwise a list
of videos, or a redirect, could make a worker ask the services of its own network.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit


class NotPublic(OSError):
    """A connection that was not made, because the address is of a private network."""

    def __init__(self) -> None:
        super().__init__(
            errno.EACCES, "its host is not public; only the host of the list of sources may be of a private network"
        )


def private_addresses(place: str, named_by: str) -> frozenset[str]:
    """Addresses of private networks that may be asked for `place`.

    Args:
        place: an address of a video.
        named_by: the list or folder that names it. One on a web server vouches for its own host, and a local one, which the
            user wrote, for the host of `place`; nobody vouches for link-local addresses, where clouds hand out credentials.
    """
    source = urlsplit(named_by)
    host = source.hostname if source.scheme in ("http", "https") else None if "://" in named_by else urlsplit(place).hostname
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except OSError:
        found = []  # the request itself tells
    addresses = {_parsed(str(info[4][0])) for info in found}
    return frozenset(str(one) for one in addresses if not one.is_global and not one.is_link_local)


def guarded(allowed: frozenset[str]) -> Callable[[Any], socket.socket]:
    """What makes the sockets of connections, where only public addresses and those `allowed` are asked.

    Every connection passes here, that of a redirect too, with the address that is really used.
    """

    def make(info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        found = _parsed(str(address[0]))
        if not found.is_global and str(found) not in allowed:
            raise NotPublic
        return socket.socket(family, kind, protocol)

    return make


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address(address.partition("%")[0])
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found
