"""Health, readiness, metrics."""

from __future__ import annotations

import msgspec
from litestar import Controller, Response, get
from litestar.di import NamedDependency
from litestar.response import Redirect
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from aq_data.wire.codec import JSON
from aq_server.routes.openapi import json_object, operation, refusals
from aq_server.service.health import Health

__all__ = ["OperationRoutes"]

_READINESS = json_object(
    '`status`; `metadata` and, by name, `stores`: "ok", or what is wrong; `waiting`: DataFiles by the store they wait for.'
)


class OperationRoutes(Controller):
    """Addresses outside the API's prefix."""

    tags = ["Operation"]

    @get("/", include_in_schema=False)
    async def root(self) -> Redirect:
        return Redirect("/docs")

    @get(
        "/healthz",
        operation_id="health",
        summary="The process runs",
        responses=refusals(),
        operation_class=operation(success={200: ("It does.", {JSON: json_object("`status`.")})}),
    )
    async def health(self) -> Response[bytes]:
        return Response(b'{"status":"ok"}', media_type=JSON)

    @get(
        "/readyz",
        operation_id="ready",
        summary="Whether the database and each store answer and take writes",
        description="Of about the last second. A store that is down, unless it is the default, makes a server `degraded`, "
        "not `unavailable`: everything that does not lie there works.",
        responses=refusals(),
        operation_class=operation(
            success={
                200: ("`ready` or `degraded`.", {JSON: _READINESS}),
                503: ("`unavailable`: the database, or the default store and its fallback, is down.", {JSON: _READINESS}),
            }
        ),
    )
    async def ready(self, health: NamedDependency[Health]) -> Response[bytes]:
        readiness = await health.readiness()
        is_ready = readiness.status != "unavailable"
        headers = {"Cache-Control": "no-store"} | ({} if is_ready else {"Retry-After": "1"})
        return Response(
            msgspec.json.encode(readiness), status_code=200 if is_ready else 503, media_type=JSON, headers=headers
        )

    @get(
        "/metrics",
        operation_id="metrics",
        summary="Counters and times, in the Prometheus text format",
        responses=refusals(),
        operation_class=operation(success={200: ("The metrics.", {"text/plain": json_object("Prometheus text.")})}),
    )
    async def metrics(self, registry: NamedDependency[CollectorRegistry]) -> Response[bytes]:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
