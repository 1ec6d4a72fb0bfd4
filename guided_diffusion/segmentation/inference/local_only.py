"""Refusing requests that other web pages make a browser send to a local server."""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_LOCAL = ("localhost", "127.0.0.1", "::1")
_ALL_ADDRESSES = ("", "0.0.0.0", "::")


class LocalOnly:
    """An ASGI application that answers only where Host, and Origin if any, name this server.

    A page elsewhere can resolve its own name to this machine (DNS rebinding), but its requests
    still carry that name; the requests that it sends to localhost carry its origin.

    :param app: what answers the other requests.
    :param host: the address listened on. One for all addresses stands for this machine's names and
        every number: numbers cannot be rebound.
    :param more: further names that are allowed.
    """

    def __init__(self, app: App, host: str, more: Iterable[str] = ()):
        self.app = app
        host = host.strip("[]").lower()
        self.names = {*_LOCAL, host, *(name.lower() for name in more)} - {*_ALL_ADDRESSES}
        self.any_number = host in _ALL_ADDRESSES
        if self.any_number:
            here = socket.gethostname().lower()
            self.names |= {here, f"{here.partition('.')[0]}.local", socket.getfqdn().lower()}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._allows(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = b"403: this name or page may not reach the server; see serve.py --allow_hosts\n"
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _allows(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        found: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for name, value in headers:
            if name.lower() in found:
                found[name.lower()].append(value.decode("latin-1"))
        if len(found[b"host"]) != 1:
            return False
        places = [_split(f"//{found[b'host'][0]}"), *map(_split, found[b"origin"])]
        same_port = len({place and place[1] for place in places}) == 1
        return same_port and all(place and self._names(place[0]) for place in places)

    def _names(self, host: str) -> bool:
        return host in self.names or (self.any_number and _is_number(host))


def _split(url: str) -> tuple[str, int | None] | None:
    """Host and port; None if the text is no address."""
    try:
        parts: SplitResult = urlsplit(url)
        exact = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
        return ((parts.hostname or "").rstrip("."), parts.port) if exact else None
    except ValueError:
        return None


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
