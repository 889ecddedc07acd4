"""Use cases of finding: one parsed filter, asked of the metadata store."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from aq_data.errors import QueryError
from aq_data.models.columns import field_segments, projected
from aq_data.models.paths import parse_path, parse_sort
from aq_data.models.query import looked_for, parse_filter
from aq_data.models.structs import resolve
from aq_data.models.words import highlights
from aq_data.storage.metadata.store import MetadataStore, Page
from aq_server.service.growing import Growing

__all__ = ["MAX_LIMIT", "Found", "SearchRequest", "Searching"]

PAGE = 100
MAX_LIMIT = 1000
"""Documents on one page; a longer list is paged with the cursor."""
MAX_FIELDS = 1000
"""Paths that a search or a table may ask for."""


class SearchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A search. `fields` are dotted paths to keep of each document (`id` always is); without them documents are whole.

    Without a `limit` a page has `PAGE` documents, and a table every match. `text` has to be found besides the filter, as
    `$text` in it has. With `highlights` the answer says where the words stand.
    """

    filter: dict[str, Any] = {}
    text: str | None = None
    sort: str = "-created_at"
    limit: int | None = None
    cursor: str | None = None
    fields: list[str] | None = None
    include_deleted: bool = False
    highlights: bool = False


class Found(Page, frozen=True):
    """A page. `highlights`, if asked for: for each document where the words stand (`models.words`)."""

    highlights: list[list[dict[str, Any]]] | None = None


class Searching:
    """Parses, asks, projects."""

    def __init__(self, metadata: MetadataStore, growing: Growing) -> None:
        self._metadata, self._growing = metadata, growing

    async def search(self, request: SearchRequest) -> Found:
        """One page. QueryError names what cannot be understood."""
        limit = PAGE if request.limit is None else request.limit
        if not 0 <= limit <= MAX_LIMIT:
            raise QueryError(f"limit is 0 to {MAX_LIMIT}, not {limit}; use the cursor for more")
        if request.fields is not None and len(request.fields) > MAX_FIELDS:
            raise QueryError(f"`fields` are at most {MAX_FIELDS} paths, not {len(request.fields)}")
        node = parse_filter(request.filter, request.text)
        page = await self._metadata.search(node, parse_sort(request.sort), limit, request.cursor, request.include_deleted)
        documents = await self._presented(page.documents)
        # A page of large documents would keep everybody else waiting.
        shown = await asyncio.to_thread(_highlights, documents, looked_for(node)) if request.highlights else None
        if request.fields is not None:
            documents = await asyncio.to_thread(_projected, documents, [field_segments(field) for field in request.fields])
        return Found(documents, page.total, page.total_is_exact, page.cursor, shown)

    async def _presented(self, documents: list[msgspec.Raw]) -> list[msgspec.Raw]:
        """Documents as `GET` answers them."""
        found = await self._growing.present_json([bytes(document) for document in documents])
        return [msgspec.Raw(document) for document in found]

    async def count(self, filter: dict[str, Any], text: str | None) -> int:
        return await self._metadata.count(parse_filter(filter, text))

    async def distinct(self, field: str, filter: dict[str, Any], text: str | None, limit: int) -> list[tuple[object, int]]:
        """Values at one path with the number of documents of each, most frequent first."""
        if not 1 <= limit <= MAX_LIMIT:
            raise QueryError(f"limit is 1 to {MAX_LIMIT}, not {limit}")
        return await self._metadata.distinct(parse_path(field), parse_filter(filter, text), limit)


def _highlights(documents: list[msgspec.Raw], words: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    return [highlights(msgspec.json.decode(document), words) for document in documents]


def _projected(documents: list[msgspec.Raw], paths: list[list[str]]) -> list[msgspec.Raw]:
    return [msgspec.Raw(msgspec.json.encode(projected(msgspec.json.decode(document), paths))) for document in documents]


resolve(SearchRequest, Found)
