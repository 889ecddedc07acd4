"""Search, count, distinct."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Controller, Request, Response, post
from litestar.di import NamedDependency

from aq_data.models.structs import resolve
from aq_data.wire.codec import JSON
from aq_data.wire.routes import SEARCH
from aq_server.config import ServerConfig
from aq_server.routes.bodies import json_body
from aq_server.routes.openapi import json_object, operation, refusals
from aq_server.service.searching import Searching, SearchRequest

__all__ = ["SearchRoutes"]

_REQUEST = json_object(
    "`filter` (MongoDB form), `sort` (a path, `-` before it: descending), `limit`, `cursor`, `fields`, `include_deleted`.",
    example={"filter": {"chip": "C7", "measured_at": {"$gte": "2026-01-01"}}, "sort": "-created_at", "limit": 100},
)


class CountRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The filter to count."""

    filter: dict[str, Any] = {}


class DistinctRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The path whose values are wanted, among the documents of the filter."""

    field: str
    filter: dict[str, Any] = {}
    limit: int = 100


class SearchRoutes(Controller):
    """`/search`, `/search/count`, `/search/distinct`: posts that only read."""

    path = SEARCH
    tags = ["Search"]

    @post(
        operation_id="search",
        summary="Find DataFiles",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(400, 413, 415),
        operation_class=operation(
            body={JSON: _REQUEST},
            success={200: ("`items`, `total`, `total_is_exact`, `cursor`.", {JSON: json_object("One page.")})},
        ),
    )
    async def search(
        self, request: Request[Any, Any, Any], searching: NamedDependency[Searching], config: NamedDependency[ServerConfig]
    ) -> Response[bytes]:
        page = await searching.search(await json_body(request, SearchRequest, config.max_document_bytes))
        answer = {
            "items": page.documents,
            "total": page.total,
            "total_is_exact": page.total_is_exact,
            "cursor": page.cursor,
        }
        return Response(msgspec.json.encode(answer), media_type=JSON)

    @post(
        "/count",
        operation_id="count",
        summary="How many DataFiles match, exactly",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(400, 413, 415),
        operation_class=operation(
            body={JSON: json_object("`filter`.")}, success={200: ("`count`.", {JSON: json_object("The number.")})}
        ),
    )
    async def count(
        self, request: Request[Any, Any, Any], searching: NamedDependency[Searching], config: NamedDependency[ServerConfig]
    ) -> Response[bytes]:
        wanted = await json_body(request, CountRequest, config.max_document_bytes)
        return Response(msgspec.json.encode({"count": await searching.count(wanted.filter)}), media_type=JSON)

    @post(
        "/distinct",
        operation_id="distinct",
        summary="The values at one path, with the number of DataFiles of each",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(400, 413, 415),
        operation_class=operation(
            body={JSON: json_object("`field`, `filter`, `limit`.", example={"field": "station"})},
            success={200: ("`values`: a list of {value, count}.", {JSON: json_object("Most frequent first.")})},
        ),
    )
    async def distinct(
        self, request: Request[Any, Any, Any], searching: NamedDependency[Searching], config: NamedDependency[ServerConfig]
    ) -> Response[bytes]:
        wanted = await json_body(request, DistinctRequest, config.max_document_bytes)
        found = await searching.distinct(wanted.field, wanted.filter, wanted.limit)
        values = [{"value": value, "count": count} for value, count in found]
        return Response(msgspec.json.encode({"values": values}), media_type=JSON)


resolve(CountRequest, DistinctRequest)
