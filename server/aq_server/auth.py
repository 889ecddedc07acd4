"""Who may come in: a layer around the whole application, so that a new route is guarded before anyone thinks of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from aq_data.errors import AqDataError, AuthenticationError, ForbiddenError
from aq_data.storage.metadata.store import Token
from aq_data.wire.routes import BULK_GET, COMPARE, SEARCH, STORES
from aq_server.problems import PROBLEM_JSON, problem_headers, problem_of
from aq_server.service.tokens import allows

__all__ = ["Guard", "required_scope"]

PUBLIC = ("/healthz", "/readyz")
"""Answered without a token: they say nothing about the data."""

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def required_scope(method: str, path: str) -> str | None:
    """The scope a request needs, decided by method: reading methods need `read`, all others `write`.

    Searches, comparisons and the bulk `get` are posts that only read; stores are changed by admins. None for what is public.
    """
    if path in PUBLIC or path == "/" or path == "/docs" or path.startswith("/docs/"):
        return None
    if path.startswith(f"{STORES}/"):
        return "read" if method in ("GET", "HEAD", "OPTIONS") else "admin"
    only_reads = path in (SEARCH, COMPARE, BULK_GET) or path.startswith(f"{SEARCH}/")
    if method in ("GET", "HEAD", "OPTIONS") or (method == "POST" and only_reads):
        return "read"
    return "write"


class Guard:
    """Checks tokens and scopes, or, on a server without tokens, that Host and Origin are its own.

    The latter keeps web pages that a user visits from reaching a server on the same computer (DNS rebinding, CSRF).
    """

    def __init__(
        self, app: ASGIApp, check: Callable[[str], Awaitable[Token]] | None, allowed_hosts: tuple[str, ...] = ()
    ) -> None:
        """`check` turns a secret into its token; None lets everyone in who speaks to this host by a local name."""
        self._app, self._check = app, check
        self._hosts = LOCAL_NAMES | {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if str(scope["type"]) == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "there are no websockets here"})
            return
        if scope["type"] == ScopeType.HTTP:
            try:
                await self._admit(scope)
            except AqDataError as exc:
                await _refuse(exc, scope, send)
                return
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._check is None:
            self._admit_local(headers)
            return
        needed = required_scope(str(scope.get("method")), scope["path"])
        if needed is None:
            return
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise AuthenticationError("this server asks for a token: send `Authorization: Bearer aqd_…`")
        token = await self._check(secret.strip())
        if not allows(token, needed):
            raise ForbiddenError(f"the token {token.name!r} has {', '.join(token.scopes)}; this needs {needed}")
        scope.setdefault("state", {})["user"] = token.name

    def _admit_local(self, headers: dict[str, str]) -> None:
        host = _hostname(f"//{headers.get('host', '')}")
        if host not in self._hosts:
            raise ForbiddenError(
                f"this open server does not answer to the host {host!r}; use localhost, or set server.allowed_hosts"
            )
        origin = headers.get("origin")
        if origin is not None and (_hostname(origin) not in self._hosts or urlsplit(origin).netloc != headers.get("host")):
            raise ForbiddenError(f"this open server does not answer pages of {origin!r}")


def _hostname(address: str) -> str:
    try:
        return (urlsplit(address).hostname or "").lower()
    except ValueError:
        return ""


async def _refuse(exc: AqDataError, scope: Scope, send: Send) -> None:
    problem = problem_of(exc, scope["path"], str(scope.get("state", {}).get("request_id", "")))
    body = msgspec.json.encode(problem)
    headers: dict[str, Any] = {"content-type": PROBLEM_JSON, "content-length": str(len(body))}
    headers |= problem_headers(exc, problem.status)
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
