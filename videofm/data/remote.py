"""Stores that are reached over a network, behind one small interface: HTTP by aiohttp, the others by their fsspec file systems.

HTTP has its own code because fsspec's reads a range without looking whether the server sent that range: a server that ignores
`Range` would give other bytes than those asked for.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import fsspec
from fsspec.asyn import sync

from videofm.data.hosts import NotPublic, guarded

SCHEMES = ("http", "https", "s3", "gs", "memory")
_CHUNK = 1 << 20
_RANGE = 16 << 20
"""Bytes of one request while a whole object is read."""
_HEAD_WAITS = 4
"""Times the time limit of one wait that an answer to a request may take to begin, with its redirects."""

_TRANSIENT_STATUS = (408, 425, 429)
_TRANSIENT_ERRNO = (
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPIPE,
)  # fmt: skip


class Store(Protocol):
    """What a store does. Errors are those of its library: `is_missing` and `is_transient` tell them apart."""

    def read(self, place: str, offset: int | None, size: int | None) -> bytes:
        """Bytes of an object from `offset` on, at most `size` of them; fewer where it ends."""
        ...

    def chunks(self, place: str) -> Iterator[bytes]:
        """A whole object, a piece at a time."""
        ...

    def size(self, place: str) -> int | None:
        """Bytes of an object; None where the store does not say."""
        ...

    def list(self, place: str) -> list[tuple[str, bool, int | None]]:
        """What lies directly under a place: place, whether it holds others, bytes (None where the store does not say)."""
        ...

    def create(self, place: str, content: bytes) -> bool:
        """Write an object if there is none, in one step; whether it was written."""
        ...

    def write(self, path: Path, place: str) -> None:
        """Write an object from a file, whole or not at all."""
        ...


def is_missing(error: BaseException) -> bool:
    """Whether the error says that there is no such object."""
    return isinstance(error, FileNotFoundError) or _status(error) in (404, 410)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may work a moment later: no answer, a broken connection, HTTP 408, 425, 429 or 5xx."""
    if _not_public(error):
        return False
    if (status := _status(error)) is not None:
        return status in _TRANSIENT_STATUS or 500 <= status < 600
    if isinstance(error, ConnectionError | TimeoutError | asyncio.TimeoutError | aiohttp.ClientConnectionError):
        return True
    if isinstance(error, aiohttp.ClientPayloadError):
        return True  # the body was shorter than announced
    # botocore's family of connection errors; the package need not be here.
    if any(kind.__name__ == "HTTPClientError" for kind in type(error).__mro__):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO


def reason(error: BaseException) -> str:
    """What went wrong, without any address: the text of a library's error may hold a signed URL."""
    if (status := _status(error)) is not None:
        return f"HTTP {status}"
    if refusal := _not_public(error):
        return str(refusal.strerror)
    if isinstance(error, OSError) and error.errno:
        return errno.errorcode.get(error.errno, str(error.errno))
    return type(error).__name__


def _not_public(error: BaseException) -> NotPublic | None:
    found = getattr(error, "os_error", None)
    return found if isinstance(found, NotPublic) else None


def _status(error: BaseException) -> int | None:
    for name in ("status", "code", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return None


class HttpStore:
    """HTTP and HTTPS. Listing reads the links of a page, so it works where the server shows folders."""

    def __init__(self, timeout: float, private: frozenset[str] | None = None) -> None:
        # No limit on the whole, which may be large: on connecting, and on each wait for more of the body.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        headers = {"Accept-Encoding": "identity"}  # a range is one of the bytes that are stored
        options = {"timeout": limits, "headers": headers}
        self.head_seconds = _HEAD_WAITS * timeout

        async def client(**arguments: Any) -> aiohttp.ClientSession:
            connector = None if private is None else aiohttp.TCPConnector(socket_factory=guarded(private))
            return aiohttp.ClientSession(connector=connector, **arguments)

        self.system: Any = fsspec.filesystem(
            "http", client_kwargs=options, encoded=True, skip_instance_cache=True, get_client=client
        )

    def read(self, place: str, offset: int | None, size: int | None) -> bytes:
        return bytes(self._run(self._read, place, offset, size))

    def chunks(self, place: str) -> Iterator[bytes]:
        stream = self._body(place)

        async def more() -> bytes | None:
            return await anext(stream, None)

        try:
            while (chunk := self._run(more)) is not None:
                yield chunk
        finally:
            self._run(stream.aclose)

    def size(self, place: str) -> int | None:
        found: int | None = self._run(self._size, place)
        return found

    def list(self, place: str) -> list[tuple[str, bool, int | None]]:
        folder = place.rstrip("/") + "/"
        names = {item["name"] for item in self.system.ls(folder, detail=True)}
        inside = [name for name in names if name.startswith(folder) and not set("?#") & set(name) and name != folder]
        return [(name.rstrip("/"), name.endswith("/"), None) for name in inside]

    def create(self, place: str, content: bytes) -> bool:
        return bool(self._run(self._put, place, content, {"If-None-Match": "*"}))

    def write(self, path: Path, place: str) -> None:
        with path.open("rb") as file:
            self._run(self._put, place, file, {})

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return sync(self.system.loop, function, *arguments)

    async def _read(self, place: str, offset: int | None, size: int | None) -> bytes:
        session = await self.system.set_session()
        if offset is None and size is None:
            async with session.get(place) as response:
                response.raise_for_status()
                return bytes(await response.read())
        first = offset or 0
        headers = {"Range": f"bytes={first}-{'' if size is None else first + size - 1}"}
        async with session.get(place, headers=headers) as response:
            if response.status == 416:  # the object ends before `first`
                return b""
            response.raise_for_status()
            if response.status == 206:
                return bytes(await response.read())
            return await _part(response, first, size)

    async def _body(self, place: str) -> AsyncGenerator[bytes, None]:
        session = await self.system.set_session()
        # A server may send a head of many lines a byte at a time.
        async with await asyncio.wait_for(session.get(place), self.head_seconds) as response:
            response.raise_for_status()
            async for chunk in response.content.iter_chunked(_CHUNK):
                yield chunk

    async def _size(self, place: str) -> int | None:
        session = await self.system.set_session()
        async with session.head(place, allow_redirects=True) as response:
            if response.status not in (405, 501):
                response.raise_for_status()
                return int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        async with session.get(place) as response:  # a server without HEAD; the body is not read
            response.raise_for_status()
            return response.content_length

    async def _put(self, place: str, content: Any, headers: dict[str, str]) -> bool:
        session = await self.system.set_session()
        async with session.put(place, data=content, headers=headers) as response:
            if response.status == 412:
                return False
            response.raise_for_status()
            return True


async def _part(response: aiohttp.ClientResponse, first: int, size: int | None) -> bytes:
    """The asked part of a body that is the whole object, because the server knows no ranges."""
    seen, found = 0, bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        skip = max(0, first - seen)
        found += chunk[skip:]
        seen += len(chunk)
        if size is not None and len(found) >= size:
            break
    return bytes(found if size is None else found[:size])


class FsspecStore:
    """A file system of fsspec: S3 (s3fs), Google (gcsfs), memory."""

    def __init__(self, scheme: str, timeout: float) -> None:
        """
        Raises:
            ImportError: the package of this scheme is not installed.
        """
        limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}
        known: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": limits}, "gs": {"requests_timeout": timeout}}
        self.system: Any = fsspec.filesystem(scheme, use_listings_cache=False, **known.get(scheme, {}))

    def read(self, place: str, offset: int | None, size: int | None) -> bytes:
        end = None if size is None else (offset or 0) + size
        if offset is not None and end is not None and offset >= end:
            return b""
        return bytes(self.system.cat_file(place, start=offset, end=end))

    def chunks(self, place: str) -> Iterator[bytes]:
        total = int(self.system.info(place)["size"])
        for start in range(0, total, _RANGE):
            yield self.read(place, start, min(_RANGE, total - start))

    def size(self, place: str) -> int | None:
        found = self.system.info(place).get("size")
        return None if found is None else int(found)

    def list(self, place: str) -> list[tuple[str, bool, int | None]]:
        folder, found = self.system._strip_protocol(place), self.system.ls(place, detail=True)
        inside = [(item["name"].rstrip("/").removeprefix(folder + "/"), item) for item in found]
        return [(f"{place}/{name}", item["type"] == "directory", item.get("size")) for name, item in inside]

    def create(self, place: str, content: bytes) -> bool:
        try:
            self.system.pipe_file(place, content, mode="create")
        except FileExistsError:
            return False
        return True

    def write(self, path: Path, place: str) -> None:
        self.system.put_file(str(path), place)


def open_store(scheme: str, timeout: float, private: frozenset[str] | None = None) -> Store:
    """The store of a scheme of `SCHEMES`; each wait of it for the other side ends after `timeout` seconds.

    With `private` HTTP asks public addresses only, and those of private networks that it holds (see `hosts.py`).

    Raises:
        ImportError: the package of this scheme is not installed.
    """
    return HttpStore(timeout, private) if scheme in ("http", "https") else FsspecStore(scheme, timeout)
