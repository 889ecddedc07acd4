"""Search, count, distinct."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from litestar import Controller, Request, Response, post
from litestar.di import NamedDependency
from litestar.response import Stream

from aq_data.models.structs import resolve
from aq_data.wire.codec import ARROW, CSV, JSON, NDJSON
from aq_data.wire.routes import SEARCH
from aq_server.config import ServerConfig
from aq_server.routes.bodies import json_body
from aq_server.routes.openapi import BINARY, json_object, operation, refusals
from aq_server.routes.tables import choose_table, table_pieces
from aq_server.service.columns import Columns
from aq_server.service.searching import Searching, SearchRequest

__all__ = ["SearchRoutes"]

_REQUEST = json_object(
    "`filter` (MongoDB form), `text`, `sort` (a path, `-` before it: descending), `limit`, `cursor`, `fields`, "
    "`include_deleted`, `highlights`.",
    example={"filter": {"chip": "C7", "measured_at": {"$gte": "2026-01-01"}}, "sort": "-created_at", "limit": 100},
)


class CountRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to count."""

    filter: dict[str, Any] = {}
    text: str | None = None


class DistinctRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The path whose values are wanted, among the documents of the filter."""

    field: str
    filter: dict[str, Any] = {}
    text: str | None = None
    limit: int = 100


class SearchRoutes(Controller):
    """`/search`, `/search/count`, `/search/distinct`: posts that only read."""

    path = SEARCH
    tags = ["Search"]

    @post(
        operation_id="search",
        summary="Find DataFiles",
        description="By `Accept` a page of documents as JSON, or what stands at `fields` as a table of every match (up to "
        "`limit`), streamed: NDJSON (one flat object a line, what JSON lacks tagged), CSV (RFC 4180; missing is empty) or "
        "an Arrow stream (int64, float64, bool, timestamp, text; JSON text where values are nested or of several kinds, "
        "marked `aq_data: json` in the field's metadata; missing is null). A path through a list of objects gives a list. "
        "Text stands in the CSV as it is: a spreadsheet may run one that begins with `=` as a formula.",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(400, 406, 413, 415),
        operation_class=operation(
            body={JSON: _REQUEST},
            success={
                200: (
                    "`items`, `total`, `total_is_exact`, `cursor`, `highlights` if asked for; or a table.",
                    {JSON: json_object("One page."), **dict.fromkeys((NDJSON, CSV, ARROW), BINARY)},
                )
            },
        ),
    )
    async def search(
        self,
        request: Request[Any, Any, Any],
        searching: NamedDependency[Searching],
        columns: NamedDependency[Columns],
        config: NamedDependency[ServerConfig],
    ) -> Response[bytes] | Stream:
        wanted = await json_body(request, SearchRequest, config.max_document_bytes)
        media = choose_table(request.headers.get("accept", "*/*"))
        if media != JSON:
            return await _table(columns, wanted, media)
        page = await searching.search(wanted)
        answer: dict[str, Any] = {
            "items": page.documents,
            "total": page.total,
            "total_is_exact": page.total_is_exact,
            "cursor": page.cursor,
        }
        if page.highlights is not None:
            answer["highlights"] = page.highlights
        return Response(msgspec.json.encode(answer), media_type=JSON, headers={"Vary": "Accept"})

    @post(
        "/count",
        operation_id="count",
        summary="How many DataFiles match, exactly",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(400, 413, 415),
        operation_class=operation(
            body={JSON: json_object("`filter`, `text`.")}, success={200: ("`count`.", {JSON: json_object("The number.")})}
        ),
    )
    async def count(
        self, request: Request[Any, Any, Any], searching: NamedDependency[Searching], config: NamedDependency[ServerConfig]
    ) -> Response[bytes]:
        wanted = await json_body(request, CountRequest, config.max_document_bytes)
        return Response(msgspec.json.encode({"count": await searching.count(wanted.filter, wanted.text)}), media_type=JSON)

    @post(
        "/distinct",
        operation_id="distinct",
        summary="The values at one path, with the number of DataFiles of each",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(400, 413, 415),
        operation_class=operation(
            body={JSON: json_object("`field`, `filter`, `text`, `limit`.", example={"field": "station"})},
            success={200: ("`values`: a list of {value, count}.", {JSON: json_object("Most frequent first.")})},
        ),
    )
    async def distinct(
        self, request: Request[Any, Any, Any], searching: NamedDependency[Searching], config: NamedDependency[ServerConfig]
    ) -> Response[bytes]:
        wanted = await json_body(request, DistinctRequest, config.max_document_bytes)
        found = await searching.distinct(wanted.field, wanted.filter, wanted.text, wanted.limit)
        values = [{"value": value, "count": count} for value, count in found]
        return Response(msgspec.json.encode({"values": values}), media_type=JSON)


async def _table(columns: Columns, wanted: SearchRequest, media: str) -> Stream:
    pieces = table_pieces(wanted.fields or [], columns.rows(wanted), media)
    # The first piece is made before the head is sent: what is wrong with the question is answered as that.
    first = await anext(pieces)

    async def all_pieces() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return Stream(all_pieces(), media_type=media, headers={"Vary": "Accept"})


resolve(CountRequest, DistinctRequest)
