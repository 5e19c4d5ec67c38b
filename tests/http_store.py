"""A web server on loopback that serves a dictionary of files and misbehaves on request, for tests of remote places."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Bucket:
    """What the server holds, the faults it has yet to show, and the requests that it saw.

    `faults` maps a path to a list of faults, taken one a request: `503` or any status, `reset` (the connection ends without an
    answer), `stall` (headers, then silence until the server stops), `drip` (as that, after a byte), `short` (half of the
    announced body), `endless` (a body without end), or an address, to which it redirects.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.ranges = dict(files), True
        self.faults: dict[str, list[int | str]] = {}
        self.seen: list[tuple[str, str, str | None]] = []
        self.url, self.stopped, self.lock = "", threading.Event(), threading.Lock()

    def fault(self, path: str) -> int | str | None:
        with self.lock:
            waiting = self.faults.get(path)
            return waiting.pop(0) if waiting else None


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_PUT(self) -> None:
        path, content = self._path(), self.rfile.read(int(self.headers["Content-Length"]))
        self.bucket.seen.append(("PUT", path, self.headers["If-None-Match"]))
        with self.bucket.lock:
            taken = self.headers["If-None-Match"] == "*" and path in self.bucket.files
            if not taken:
                self.bucket.files[path] = content
        fault = self.bucket.fault(path)  # after the write: the answer is what gets lost
        self._status(fault if isinstance(fault, int) else 412 if taken else 201)

    def _path(self) -> str:
        return self.path.lstrip("/").partition("?")[0]

    def _status(self, code: int, location: str | None = None) -> None:
        self.send_response(code)
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _serve(self, body: bool) -> None:
        path, bucket = self._path(), self.bucket
        bucket.seen.append((self.command, path, self.headers["Range"]))
        fault = bucket.fault(path)
        if isinstance(fault, int):
            return self._status(fault)
        if fault == "reset":
            self.close_connection = True
            return None
        if isinstance(fault, str) and "://" in fault:
            return self._status(302, fault)
        if fault == "endless":
            return self._endless()
        content, kind = bucket.files.get(path), "application/octet-stream"
        if content is None and (page := self._page(path)):
            content, kind = page, "text/html"
        if content is None:
            return self._status(404)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "") if bucket.ranges else None
        if found and int(found[1]) >= len(content):
            return self._status(416)
        part = content[int(found[1]) : int(found[2]) + 1 if found[2] else None] if found else content
        self.send_response(206 if found else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if fault == "drip":
            self.wfile.write(part[:1])
        if fault in ("stall", "drip"):
            bucket.stopped.wait()
        elif body:
            self.wfile.write(part[: len(part) // 2] if fault == "short" else part)
        self.close_connection = True
        return None

    def _endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):  # the other side had enough
            while not self.bucket.stopped.is_set():
                self.wfile.write(bytes(1 << 16))
        self.close_connection = True

    def _page(self, path: str) -> bytes:
        """Links to what lies directly under a folder, and one to the outside."""
        prefix = path.rstrip("/") + "/"
        inside = {name[len(prefix) :] for name in self.bucket.files if name.startswith(prefix)}
        links = sorted({name.partition("/")[0] + ("/" if "/" in name else "") for name in inside})
        outside = ["../", "/elsewhere.tar", "?C=N"] if links else []
        return "".join(f'<a href="{link}">{link}</a>\n' for link in outside + links).encode()


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Bucket]:
    """A running server; `bucket.url` is its address."""
    bucket = Bucket(files)
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        bucket.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
