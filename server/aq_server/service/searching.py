"""Use cases of finding: one parsed filter, asked of the metadata store."""

from __future__ import annotations

from typing import Any

import msgspec

from aq_data.errors import QueryError
from aq_data.models.datafile import DataFile
from aq_data.models.paths import parse_path, parse_sort, path_segments
from aq_data.models.query import Node, parse_filter
from aq_data.models.structs import resolve
from aq_data.storage.metadata.store import MetadataStore, Page
from aq_server.service.growing import Growing

__all__ = ["MAX_LIMIT", "SearchRequest", "Searching"]

MAX_LIMIT = 1000
"""Documents on one page; a longer list is paged with the cursor."""


class SearchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A search. `fields` are dotted paths to keep of each document (`id` always is); without them documents are whole."""

    filter: dict[str, Any] = {}
    sort: str = "-created_at"
    limit: int = 100
    cursor: str | None = None
    fields: list[str] | None = None
    include_deleted: bool = False


class Searching:
    """Parses, asks, projects."""

    def __init__(self, metadata: MetadataStore, growing: Growing) -> None:
        self._metadata, self._growing = metadata, growing

    async def search(self, request: SearchRequest) -> Page:
        """One page. QueryError names what cannot be understood."""
        if not 0 <= request.limit <= MAX_LIMIT:
            raise QueryError(f"limit is 0 to {MAX_LIMIT}, not {request.limit}; use the cursor for more")
        page = await self._metadata.search(
            parse_filter(request.filter), parse_sort(request.sort), request.limit, request.cursor, request.include_deleted
        )
        documents = [await self._present(document) for document in page.documents]
        page = msgspec.structs.replace(page, documents=documents)
        if request.fields is None:
            return page
        paths = [_segments(field) for field in request.fields]
        documents = [msgspec.Raw(msgspec.json.encode(_project(msgspec.json.decode(d), paths))) for d in page.documents]
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


def _segments(field: str) -> list[str]:
    """The keys to follow; attrs, path and format are not searched, but may be asked for."""
    first = path_segments(field)[0]
    return path_segments(field if first in DataFile.__struct_fields__ else parse_path(field))


def _project(document: dict[str, Any], paths: list[list[str]]) -> dict[str, Any]:
    kept: dict[str, Any] = {"id": document["id"]}
    for path in paths:
        source: Any = document
        for segment in path:
            if not isinstance(source, dict) or segment not in source:
                break
            source = source[segment]
        else:
            target = kept
            for segment in path[:-1]:
                target = target.setdefault(segment, {})
            target[path[-1]] = source
    return kept


resolve(SearchRequest)
