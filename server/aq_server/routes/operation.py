"""Health, readiness, metrics."""

from __future__ import annotations

import msgspec
from litestar import Controller, Response, get
from litestar.di import NamedDependency
from litestar.response import Redirect
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from aq_data.errors import AqDataError
from aq_data.wire.codec import JSON
from aq_server.routes.openapi import json_object, operation, refusals
from aq_server.service.datafiles import DataFiles

__all__ = ["OperationRoutes"]


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
        summary="Database and blob store answer and take writes",
        responses=refusals(),
        operation_class=operation(
            success={
                200: ("Both do.", {JSON: json_object("`metadata` and `blobs`.")}),
                503: ("One does not; the body tells which.", {JSON: json_object("`metadata` and `blobs`.")}),
            }
        ),
    )
    async def ready(self, datafiles: NamedDependency[DataFiles]) -> Response[bytes]:
        states = {}
        blobs = (await datafiles.stores.at("default")).blobs
        for name, check in (("metadata", datafiles.metadata.check), ("blobs", blobs.check)):
            try:
                await check()
                states[name] = "ok"
            except AqDataError as exc:
                states[name] = exc.message
        status = 200 if set(states.values()) == {"ok"} else 503
        headers = {} if status == 200 else {"Retry-After": "1"}
        return Response(msgspec.json.encode(states), status_code=status, media_type=JSON, headers=headers)

    @get(
        "/metrics",
        operation_id="metrics",
        summary="Counters and times, in the Prometheus text format",
        responses=refusals(),
        operation_class=operation(success={200: ("The metrics.", {"text/plain": json_object("Prometheus text.")})}),
    )
    async def metrics(self, registry: NamedDependency[CollectorRegistry]) -> Response[bytes]:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
