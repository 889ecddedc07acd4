"""What operators see: a request id on every answer, a JSON log line and metrics for every request."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from typing import Any, cast

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client import CollectorRegistry, Counter, Histogram

from aq_data.wire.routes import API, SEARCH, SERVER_NAME

__all__ = ["Observer", "configure_logging"]

log = logging.getLogger("aq_data.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """One JSON object per line on standard error, for this program and the HTTP server under it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    # The HTTP server's own progress reports are noise beside ours.
    for name, least in (("aq_data", level), ("uvicorn.error", "debug" if level == "debug" else "warning")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least.upper())
        logger.propagate = False


def _route(path: str) -> str:
    """The path with everything that clients choose left out, so that metrics have few labels."""
    if not path.startswith(API):
        return path if path in ("/", "/docs", "/healthz", "/readyz", "/metrics") else "other"
    parts = path.removeprefix(API).strip("/").split("/")
    if parts[0] == "search":
        return "/".join(["/search", *parts[1:2]]) if parts[1:2] in ([], ["count"], ["distinct"]) else "other"
    if parts[0] == "stores":
        return "/stores" if len(parts) == 1 else "/stores/{name}"
    if parts[0] != "datafiles":
        return "other"
    if parts[1:2] == ["bulk"]:
        return "/".join(["/datafiles/bulk", *parts[2:]]) if parts[2:] in ([], ["get"], ["delete"]) else "other"
    if len(parts) > 2 and parts[2] in ("arrays", "files", "zarr"):
        return f"/datafiles/{{id}}/{parts[2]}"
    return "/datafiles" if len(parts) == 1 else "/datafiles/{id}"


class Observer:
    """The outermost layer. A request id that the client sends is kept when it is harmless."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._requests = Counter("aq_data_requests", "Answered requests.", ("method", "route", "status"), registry=registry)
        self._seconds = Histogram(
            "aq_data_request_seconds", "Time to the last byte.", ("method", "route"), registry=registry, buckets=_BUCKETS
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        given = next((v.decode("latin-1") for n, v in scope["headers"] if n.lower() == b"request-id"), "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        is_head = scope["method"] == "HEAD"
        if is_head:
            # HEAD is answered as GET without its body, on every route alike.
            # A copy: the HTTP server looks at its own scope to know that no body may follow.
            scope = cast(Scope, {**scope, "method": "GET"})
        scope["state"]["is_head"] = is_head
        status, started = 500, time.perf_counter()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [(n, v) for n, v in message["headers"] if n.lower() != b"server"]
                message["headers"] = [*headers, (b"server", SERVER_NAME.encode()), (b"request-id", request_id.encode())]
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            elapsed = time.perf_counter() - started
            method, route = ("HEAD" if is_head else str(scope.get("method"))), _route(scope["path"])
            self._requests.labels(method, route, status).inc()
            self._seconds.labels(method, route).observe(elapsed)
            fields = {"request_id": request_id, "method": method, "path": scope["path"], "status": status}
            # Reads come by the thousand; what changed something, and what failed, is told at the default level.
            is_read = scope.get("method") in ("GET", "OPTIONS") or scope["path"].startswith(SEARCH)
            is_told = status >= 400 or not is_read
            log.log(
                logging.INFO if is_told else logging.DEBUG,
                "request",
                extra={"fields": {**fields, "ms": round(elapsed * 1000, 2)}},
            )
