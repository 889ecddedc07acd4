"""Search results as columns: a row for each match, a cell for each path asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import msgspec

from aq_data.errors import QueryError
from aq_data.models.columns import Cell, cell_at, field_segments
from aq_server.service.searching import MAX_LIMIT, Searching, SearchRequest

__all__ = ["Columns"]

MAX_ROWS = 1_000_000
MAX_COLUMNS = 1000
FIRST_PAGE = 20
PAGE_BYTES = 2 << 20
"""Documents fetched at a time, about: few pages of small ones, and no page of large ones that fills the memory."""


class Columns:
    """Walks all pages of a search; one page is in memory at a time."""

    def __init__(self, searching: Searching) -> None:
        self._searching = searching

    async def rows(self, request: SearchRequest) -> AsyncIterator[list[list[Cell]]]:
        """Rows of `request.fields`, a page at a time, from after `cursor` up to `limit` or to the last match.

        Stable as paging is while others save. QueryError, before the first page, names what cannot be understood.
        """
        fields = request.fields
        if not fields or len(fields) > MAX_COLUMNS:
            raise QueryError(f'a table needs 1 to {MAX_COLUMNS} `fields`, as in ["name", "metadata.chip"]')
        for field in fields:
            if fields.count(field) > 1:
                raise QueryError(f"the field {field[:80]!r} is asked for twice")
        if request.limit is not None and not 0 <= request.limit <= MAX_ROWS:
            raise QueryError(f"limit is 0 to {MAX_ROWS}, not {request.limit}; a table without one has every match")
        paths = [field_segments(field) for field in fields]
        left, size, cursor = request.limit, FIRST_PAGE, request.cursor
        while True:
            limit = size if left is None else min(size, left)
            page = await self._searching.search(msgspec.structs.replace(request, fields=None, limit=limit, cursor=cursor))
            yield await asyncio.to_thread(_rows, page.documents, paths)
            left = None if left is None else left - len(page.documents)
            if page.cursor is None or left == 0:
                return
            cursor = page.cursor
            held = sum(map(len, page.documents))
            size = max(1, min(MAX_LIMIT, PAGE_BYTES * len(page.documents) // max(1, held)))


def _rows(documents: Sequence[msgspec.Raw], paths: Sequence[Sequence[str]]) -> list[list[Cell]]:
    found = []
    for encoded in documents:
        document = msgspec.json.decode(encoded)
        found.append([cell_at(document, path) for path in paths])
    return found
