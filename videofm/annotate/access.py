"""Who may ask the page for something: names of hosts, the token, sessions, and the value that every change must carry.

A session is a cookie that says who votes, signed with a key of this store and token; nothing about it is kept here. It is sent
by no other site (SameSite=Strict) and seen by no script (HttpOnly).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from videofm.errors import ConfigError

MIN_TOKEN = 16
"""Shortest token that is taken, in characters."""


@dataclass(frozen=True)
class Session:
    """A browser that may vote: a random id, and the annotator, once a name was said."""

    id: str
    annotator: str | None


@dataclass(frozen=True)
class Access:
    """The rules of one server.

    Attributes:
        secret: of the store.
        token: what a first visit must show; None: nothing.
        host: the address that the server listens on.
        names: further names that it is reached by.
    """

    secret: bytes = field(repr=False)
    token: str | None = field(repr=False)
    host: str
    names: Sequence[str] = ()
    _key: bytes = field(init=False, repr=False, default=b"")
    _known: frozenset[str] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < MIN_TOKEN:
            raise ConfigError(
                f"--token has {len(self.token)} characters; it needs {MIN_TOKEN} or more, or leave it away and one is made"
            )
        # Cookies of another token end with it.
        object.__setattr__(self, "_key", hmac.new(self.secret, (self.token or "").encode(), hashlib.sha256).digest())
        known = {"localhost", *(name.lower() for name in self.names)}
        if not is_loopback(self.host):  # asked once: a slow name server must not hold up each request
            known |= {self.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        object.__setattr__(self, "_known", frozenset(known))

    @property
    def cookie(self) -> str:
        """Name of the cookie. Browsers do not tell ports apart, and two stores may be open on one machine."""
        return f"videofm-{hashlib.sha256(self.secret).hexdigest()[:10]}"

    def token_fits(self, shown: str) -> bool:
        """Whether `shown` is the token; takes as long for any text."""
        return self.token is not None and hmac.compare_digest(_digest(shown), _digest(self.token))

    def host_fits(self, header: str | None) -> bool:
        """Whether the header `Host` names this server. A page of another site that makes its name point here (DNS rebinding)
        comes with that name; an address in numbers cannot be made to point elsewhere."""
        name = _host_of(header or "")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._known
        return address.is_loopback or not is_loopback(self.host)

    def new_session(self) -> Session:
        """A session without a name."""
        return Session(secrets.token_hex(16), None)

    def sealed(self, session: Session) -> str:
        """The cookie of a session."""
        name = "" if session.annotator is None else base64.urlsafe_b64encode(session.annotator.encode()).decode()
        return f"{session.id}.{name}.{self._sign('session', session.id, name)}"

    def opened(self, cookie: str | None) -> Session | None:
        """The session of a cookie that this server sealed; None for any other."""
        parts = (cookie or "").split(".")
        if len(parts) != 3 or not hmac.compare_digest(_digest(parts[2]), _digest(self._sign("session", *parts[:2]))):
            return None
        try:
            name = base64.urlsafe_b64decode(parts[1]).decode()
        except (binascii.Error, UnicodeDecodeError):
            return None
        return Session(parts[0], name or None)

    def change_key(self, session: Session) -> str:
        """What every request that changes something must carry in a header: only a page of this server can know it."""
        return self._sign("change", session.id)

    def change_key_fits(self, session: Session, shown: str) -> bool:
        """Whether a request carries it."""
        return hmac.compare_digest(_digest(shown), _digest(self.change_key(session)))

    def _sign(self, *words: str) -> str:
        return hmac.new(self._key, "\0".join(words).encode(), hashlib.sha256).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host_of(header: str) -> str:
    """The name or address in a header `Host`, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def _digest(text: str) -> bytes:
    """Equally long for all texts, so that comparing takes as long, and in bytes, which may be compared whatever they hold."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
