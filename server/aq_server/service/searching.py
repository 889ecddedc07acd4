"""Use cases of finding: one parsed filter, asked of the metadata store."""

from __future__ import annotations

from typing import Any

import msgspec

from aq_data.errors import QueryError
from aq_data.models.columns import field_segments, projected
from aq_data.models.datafile import DataFile
from aq_data.models.paths import parse_path, parse_sort
from aq_data.models.query import Node, parse_filter
from aq_data.models.structs import resolve
from aq_data.storage.metadata.store import MetadataStore, Page
from aq_server.service.growing import Growing

__all__ = ["MAX_LIMIT", "SearchRequest", "Searching"]

PAGE = 100
MAX_LIMIT = 1000
"""Documents on one page; a longer list is paged with the cursor."""
MAX_FIELDS = 1000
"""Paths that a search or a table may ask for."""


class SearchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A search. `fields` are dotted paths to keep of each document (`id` always is); without them documents are whole.

    Without a `limit` a page has `PAGE` documents, and a table every match.
    """

    filter: dict[str, Any] = {}
    sort: str = "-created_at"
    limit: int | None = None
    cursor: str | None = None
    fields: list[str] | None = None
    include_deleted: bool = False


class Searching:
    """Parses, asks, projects."""

    def __init__(self, metadata: MetadataStore, growing: Growing) -> None:
        self._metadata, self._growing = metadata, growing

    async def search(self, request: SearchRequest) -> Page:
        """One page. QueryError names what cannot be understood."""
        limit = PAGE if request.limit is None else request.limit
        if not 0 <= limit <= MAX_LIMIT:
            raise QueryError(f"limit is 0 to {MAX_LIMIT}, not {limit}; use the cursor for more")
        if request.fields is not None and len(request.fields) > MAX_FIELDS:
            raise QueryError(f"`fields` are at most {MAX_FIELDS} paths, not {len(request.fields)}")
        page = await self._metadata.search(
            parse_filter(request.filter), parse_sort(request.sort), limit, request.cursor, request.include_deleted
        )
        documents = [await self._present(document) for document in page.documents]
        page = msgspec.structs.replace(page, documents=documents)
        if request.fields is None:
            return page
        paths = [field_segments(field) for field in request.fields]
        documents = [msgspec.Raw(msgspec.json.encode(projected(msgspec.json.decode(d), paths))) for d in page.documents]
        return msgspec.structs.replace(page, documents=documents)

    async def _present(self, document: msgspec.Raw) -> msgspec.Raw:
        """A document as `GET` answers it: an open sweep's has the extents of now."""
        if b'"state":"open"' not in bytes(document):
            return document
        return msgspec.Raw(msgspec.json.encode(await self._growing.present(msgspec.json.decode(document, type=DataFile))))

    async def count(self, filter: dict[str, Any]) -> int:
        return await self._metadata.count(parse_filter(filter))

    async def distinct(self, field: str, filter: dict[str, Any], limit: int) -> list[tuple[object, int]]:
        """Values at one path with the number of documents of each, most frequent first."""
        if not 1 <= limit <= MAX_LIMIT:
            raise QueryError(f"limit is 1 to {MAX_LIMIT}, not {limit}")
        node: Node = parse_filter(filter)
        return await self._metadata.distinct(parse_path(field), node, limit)


resolve(SearchRequest)
