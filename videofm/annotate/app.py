"""The page over HTTP: its files, the state of a desk, votes, and videos in ranges. All state is the store's."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from videofm.annotate.access import Access, Session
from videofm.annotate.desk import Desk
from videofm.annotate.store import Refused
from videofm.errors import VideofmError
from videofm.progress import LOG

PAGE = Path(__file__).parent / "page"
FILES = {
    "index.html": "text/html",
    "annotate.css": "text/css",
    "annotate.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
CHANGE_HEADER = "x-videofm-change"
MAX_BODY = 16 << 10
"""Bytes of a request; a vote has some hundred."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""On every answer, unless it says otherwise itself."""

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
Handler = Callable[["Pages", Request, Session], Awaitable[Response]]


def application(desk: Desk, access: Access) -> ASGIApp:
    """The ASGI application of one server."""
    pages = Pages(desk, access)
    routes = [
        Route("/", pages.guarded(Pages.index)),
        *(Route(f"/page/{name}", pages.guarded(Pages.page_file)) for name in FILES if name != "index.html"),
        Route("/api/state", pages.guarded(Pages.state)),
        Route("/api/name", pages.guarded(Pages.name), methods=["POST"]),
        Route("/api/vote", pages.guarded(Pages.vote), methods=["POST"]),
        Route("/api/undo", pages.guarded(Pages.undo), methods=["POST"]),
        Route("/video/{name}", pages.guarded(Pages.video)),
    ]
    handlers: Any = {HTTPException: _as_text}
    return _Headers(Starlette(routes=routes, exception_handlers=handlers), access)


class Pages:
    """The answers. Each handler is given the session of a browser that may come in."""

    def __init__(self, desk: Desk, access: Access) -> None:
        self.desk, self.access = desk, access
        self._files = {name: (PAGE / name).read_bytes() for name in FILES}

    def guarded(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """`handler` behind the token, with errors of ours as answers. Who is not among the named annotators is asked again."""

        async def answer(request: Request) -> Response:
            session = self.access.opened(request.cookies.get(self.access.cookie))
            shown = request.query_params.get("token")
            if shown is not None and self.access.token is not None and not self.access.token_fits(shown):
                return PlainTextResponse(_WRONG_TOKEN, 401)
            if session is None:
                if self.access.token is not None and shown is None:
                    return PlainTextResponse(_NO_TOKEN, 401)
                session = self.access.new_session()
            if session.annotator is not None and not self.desk.admits(session.annotator):
                session = Session(session.id, None)
            try:
                return await handler(self, request, session)
            except Refused as error:
                return JSONResponse({"error": str(error)}, error.status)
            except sqlite3.Error as error:
                LOG.error("the votes cannot be written or read: %s", error)
                return JSONResponse({"error": f"not saved: {error}. Try again, and tell the one who runs the server"}, 503)
            except VideofmError as error:
                LOG.error("%s", error)  # here with names of files and clips, which the page must not show
                return JSONResponse(
                    {"error": "this cannot be read here; the one who runs the server finds why in its log"}, 500
                )

        return answer

    async def index(self, request: Request, session: Session) -> Response:
        """The page. A name in the address (`?annotator=NAME`) is the one that votes; where it cannot be one, nobody votes until
        the page has asked, whoever voted before. A link of another site is not heard."""
        name = request.query_params.get("annotator")
        if name is not None and request.headers.get("sec-fetch-site") != "cross-site":
            try:
                session = Session(session.id, await run_in_threadpool(self.desk.join, name))
            except Refused:
                session = Session(session.id, None)
        return self._seal(self._file("index.html"), session)

    async def page_file(self, request: Request, session: Session) -> Response:
        """A file that the page names."""
        return self._file(request.url.path.rpartition("/")[2])

    async def state(self, request: Request, session: Session) -> Response:
        """The desk, or a question for the name."""
        return self._seal(JSONResponse(await self._state(session)), session)

    async def name(self, request: Request, session: Session) -> Response:
        """Say who votes."""
        body = await self._change(request, session)
        annotator = await run_in_threadpool(self.desk.join, body.get("name", ""))
        session = Session(session.id, annotator)
        return self._seal(JSONResponse(await self._state(session)), session)

    async def vote(self, request: Request, session: Session) -> Response:
        """Take a vote; the answer, which is the next desk, is sent when the vote is on disk."""
        return await self._done(self.desk.vote, request, session)

    async def undo(self, request: Request, session: Session) -> Response:
        """Take the last vote back."""
        return await self._done(self.desk.undo, request, session)

    async def video(self, request: Request, session: Session) -> Response:
        """A video of the desk, whole or the range that is asked for (Safari plays no other)."""
        content = await run_in_threadpool(self.desk.video, _named(session), request.path_params["name"])
        return ranged(content, request.headers.get("range"))

    async def _done(self, action: Callable[[str, Any], None], request: Request, session: Session) -> Response:
        """Do what the page asks for, and answer with the desk as it is then: one way to a thread for both."""
        body, annotator = await self._change(request, session), _named(session)

        def work() -> dict[str, Any]:
            action(annotator, body)
            return self.desk.state(annotator)

        return JSONResponse(self._facts(session) | await run_in_threadpool(work))

    async def _state(self, session: Session) -> dict[str, Any]:
        if session.annotator is None:
            return self._facts(session)
        return self._facts(session) | await run_in_threadpool(self.desk.state, session.annotator)

    def _facts(self, session: Session) -> dict[str, Any]:
        """What the page is told whoever votes."""
        return {"change": self.access.change_key(session), "names": self.desk.names, "annotator": None}

    async def _change(self, request: Request, session: Session) -> dict[str, Any]:
        """The body of a request that changes something, after it has shown that it comes from the page."""
        if not self.access.change_key_fits(session, request.headers.get(CHANGE_HEADER, "")):
            raise Refused("this request does not come from the page of this session; load the page again", 403)
        content = b""
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_BODY:
                raise Refused(f"the request has more than {MAX_BODY} bytes", 413)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Refused("the request is no JSON object", 400)
        return body

    def _file(self, name: str) -> Response:
        return Response(self._files[name], media_type=FILES[name])

    def _seal(self, response: Response, session: Session) -> Response:
        response.set_cookie(
            self.access.cookie, self.access.sealed(session), max_age=30 * 86400, httponly=True, samesite="strict", path="/"
        )
        return response


def ranged(content: bytes, asked: str | None) -> Response:
    """An MP4 file: all of it, or the one range of bytes that is asked for (RFC 9110, section 14)."""
    headers, size = {"accept-ranges": "bytes", "cache-control": "private, max-age=3600"}, len(content)
    found = _RANGE.fullmatch(asked.strip()) if asked is not None else None
    if found is None or found.groups() == ("", ""):
        return Response(content, media_type="video/mp4", headers=headers)
    first, last = found.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if start > end:
        return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
    headers["content-range"] = f"bytes {start}-{end}/{size}"
    return Response(content[start : end + 1], 206, media_type="video/mp4", headers=headers)


class _Headers:
    """Refuses requests under foreign names of hosts, and puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                said = {name for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in said]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        host = Request(scope).headers.get("host")
        if not self._access.host_fits(host):
            refusal = PlainTextResponse(f"This server is not called {host!r}. Start it with --name to allow that.\n", 421)
            await refusal(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)


def _named(session: Session) -> str:
    if session.annotator is None:
        raise Refused("nobody has said a name in this session; load the page again", 403)
    return session.annotator


def _as_text(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"{error.detail}\n", error.status_code)


_NO_TOKEN = "This page needs a token: open the whole address that `videofm dpo annotate` printed, with ?token= at its end.\n"
_WRONG_TOKEN = "The token in this address is wrong. Open the address that `videofm dpo annotate` printed last.\n"
