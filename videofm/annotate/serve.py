"""A server of the page that answers until it is told to end: its socket, its addresses, signals."""

from __future__ import annotations

import errno
import secrets
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import urlencode

import uvicorn

from videofm.annotate.access import Access, is_loopback
from videofm.annotate.app import application
from videofm.annotate.desk import Desk
from videofm.annotate.queue import Pool
from videofm.annotate.store import Refused, Store
from videofm.errors import ConfigError


@dataclass(frozen=True)
class Server:
    """Where the page is: an address for each annotator that was named, or one for all."""

    addresses: list[str]
    socket: socket.socket
    access: Access
    desk: Desk

    def run(self) -> None:
        """Answer until SIGTERM or Ctrl-C; what was answered is on disk."""
        config = uvicorn.Config(
            application(self.desk, self.access), log_level="warning", access_log=False, server_header=False, lifespan="off",
            timeout_graceful_shutdown=2, ws="none",
        )  # fmt: skip
        with _signals_end_it():
            uvicorn.Server(config).run(sockets=[self.socket])


def listen(
    candidates: Path,
    pool: Pool,
    store: Store,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    annotators: Sequence[str] = (),
    names: Sequence[str] = (),
) -> Server:
    """A server that listens and answers once it is run.

    Args:
        candidates: the dataset.
        pool: its pairs.
        store: for the votes.
        host: address to listen on; any other than this machine's own needs a token, which is made if none is given.
        port: 0: one that is free.
        token: what a first visit must show.
        annotators: the only names that may vote; empty: any.
        names: of this machine, by which browsers reach it.

    Raises:
        ConfigError: the port is in use, the address is not one of this machine, the token is too short, or a name is none.
    """
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    secret = store.secret()
    access = Access(secret, token, host, tuple(names))
    try:
        desk = Desk(candidates, pool, store, secret, annotators)
    except Refused as error:
        raise ConfigError(f"--annotator: {error}") from None
    bound = _bind(host, port)
    shown = names[0] if names else _reached_by(host)
    place = f"http://{f'[{shown}]' if ':' in shown else shown}:{bound.getsockname()[1]}/"
    queries = [{"annotator": name} for name in desk.names] or [{}]
    if token is not None:
        queries = [query | {"token": token} for query in queries]
    return Server([place + (f"?{urlencode(query)}" if query else "") for query in queries], bound, access, desk)


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port is {port}; ports go from 0 (one that is free) to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host {host} is no address to listen on ({error})") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use by another program; choose another --port (0 takes one that is free)"
            ) from None
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another --host or --port") from None
    return bound


def _reached_by(host: str) -> str:
    """A name by which browsers find a server that listens on `host`."""
    return socket.gethostname() if host in ("0.0.0.0", "::", "") else host


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more, for whoever handled it before: here that is the end, not a death."""

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    handlers: dict[int, Callable[..., object] | int | None] = {}
    try:
        for ending in (signal.SIGINT, signal.SIGTERM):
            handlers[ending] = signal.signal(ending, ignore)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
