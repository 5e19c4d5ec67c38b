"""Which Ray clusters are joined. Whoever reaches Ray's ports can run code there, so an address says who that may be."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from videofm.errors import ConfigError

LOCAL = ("auto", "localhost")


def check_address(address: str, environment: Mapping[str, str], key: str = "engine.address") -> None:
    """Refuse a cluster at an address that stands for all interfaces, and one that is public but asks for no token.

    Args:
        address: `HOST:PORT`, `ray://HOST:PORT` or `auto` (then RAY_ADDRESS counts where it is set).
        environment: of this process.
        key: where the address was given, in messages.

    Raises:
        ConfigError: see above.
    """
    if address == "auto" and environment.get("RAY_ADDRESS"):
        address = environment["RAY_ADDRESS"]
    if address == "local":
        raise ConfigError(f"{key} local names no cluster; leave engine.address null to start a node on this machine")
    if address in LOCAL:
        return
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        ip = None
    if ip is not None and ip.is_unspecified:
        raise ConfigError(f"{key} {address} stands for all interfaces of a machine; name the one address of the head")
    if host in LOCAL or (ip is not None and (ip.is_loopback or ip.is_private) and not ip.is_unspecified):
        return
    if environment.get("RAY_AUTH_MODE") != "token" or not _has_token(environment):
        raise ConfigError(
            f"{key} {address} is not known to be private, and whoever reaches a Ray cluster can run code on it; start "
            "the cluster and this program with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH), or name it by "
            "a private address"
        )


def _has_token(environment: Mapping[str, str]) -> bool:
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    return bool(environment.get("RAY_AUTH_TOKEN")) or (path is not None and Path(path).is_file())
