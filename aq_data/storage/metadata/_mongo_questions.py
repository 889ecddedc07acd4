"""How MongoDB answers a question: the total, then the page by the index of terms or by walking in sort order.

The total is counted from the index alone where one condition decides. A small set is fetched and sorted. Of a large one the
records are walked in the order asked for until the page is full, for a short time: where those that match stand at the far
end, everything is sorted after all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import ExecutionTimeout, OperationFailure

from aq_data.errors import QueryError
from aq_data.models.matching import Facts, matches
from aq_data.models.paths import SortKey
from aq_data.models.query import Compare, Node, check_dimension, nodes_of
from aq_data.models.units import QUANTITY
from aq_data.storage.metadata import _mql
from aq_data.storage.metadata._mongo_border import border
from aq_data.storage.metadata.cursors import Cursor
from aq_data.storage.metadata.store import Page

__all__ = ["EXACT_TOTAL", "Questions"]

Row = dict[str, Any]

EXACT_TOTAL = 10_000
"""Totals are counted exactly up to here; `count` is always exact."""
QUERY_SECONDS = 10.0
WALK_SECONDS = 0.3
"""How long to walk in vain before everything that matches is sorted instead."""
SORTED_ANYWAY = 200
"""So few matches are sorted whatever a walk would cost."""
SIZE_SECONDS = 60.0
"""How long the number of records is remembered; it only helps to choose a way."""
REGEX_GAVE_UP = 51156


class Questions:
    """Asks the collections that `collection` names."""

    def __init__(self, collection: Callable[[str], Awaitable[AsyncCollection[Row]]]) -> None:
        self._collection = collection
        self._size, self._size_at = 0, float("-inf")

    async def search(self, node: Node, sort: SortKey, limit: int, cursor: str | None, include_deleted: bool) -> Page:
        start = Cursor.decode(cursor, sort, str) if cursor is not None else None
        after = _mql.place_of(start, sort) if start else None
        with _asking():
            await self._check_dimensions(node)
            where = _mql.selection(node, include_deleted)
            total, is_exact = (start.total, start.total_is_exact) if start else await self._total(node, where)
            rows: list[Row] = []
            if limit and total:
                rows = await self._rows(node, where, sort, after, limit + 1, total, include_deleted)
        more = len(rows) > limit
        following = _mql.cursor_of(rows[limit - 1], sort, total, is_exact).encode(sort) if more else None
        return Page([msgspec.Raw(row["document"]) for row in rows[:limit]], total, is_exact, following)

    async def count(self, node: Node) -> int:
        with _asking():
            await self._check_dimensions(node)
            return await self._counted(node, _mql.selection(node, False), None)

    async def distinct(self, path: str, node: Node, limit: int) -> list[tuple[object, int]]:
        datafiles = await self._collection("datafiles")
        where = _mql.selection(node, False)
        with _asking():
            await self._check_dimensions(node)
            if _mql.is_exact(node):
                found = await datafiles.aggregate(_mql.distinct_pipeline(path, where, limit), maxTimeMS=_ms(QUERY_SECONDS))
                return [(_mql.shown(row["_id"]["k"], row["_id"]["v"]), row["n"]) async for row in found]
            counts: Counter[tuple[str, Any]] = Counter()
            async for row in self._judged(node, [{"$match": where}, {"$project": {"document": 1}}]):
                terms = Facts(msgspec.json.decode(row["document"])).terms
                counts.update((term.kind, term.value) for term in terms if term.path == path)
        wanted = [(-n, key) for key, n in counts.items() if key[0] in _mql.DISTINCT_KINDS]
        return [(_mql.shown(*key), -n) for n, key in sorted(wanted)[:limit]]

    # --- how -------------------------------------------------------------------------------------------------------

    async def _check_dimensions(self, node: Node) -> None:
        asked = [one for one in nodes_of(node) if isinstance(one, Compare) and one.kind.startswith(QUANTITY)]
        if asked:
            kinds = await self._collection("kinds")
            rows = await kinds.find({"path": {"$in": [one.path for one in asked]}}).to_list()
            for one in asked:
                check_dimension(one, [row["kind"] for row in rows if row["path"] == one.path])

    async def _total(self, node: Node, where: Row) -> tuple[int, bool]:
        found = await self._counted(node, where, EXACT_TOTAL + 1)
        return min(found, EXACT_TOTAL), found <= EXACT_TOTAL

    async def _counted(self, node: Node, where: Row, limit: int | None) -> int:
        if not _mql.is_exact(node):
            pipeline = [{"$match": where}, {"$project": {"document": 1}}]
            return len(await self._first(node, pipeline, limit or -1))
        datafiles = await self._collection("datafiles")
        found = await datafiles.aggregate(_mql.total_pipeline(where, limit), maxTimeMS=_ms(QUERY_SECONDS))
        rows = await found.to_list()
        return int(rows[0]["n"]) if rows else 0

    async def _rows(
        self, node: Node, where: Row, sort: SortKey, after: Any, limit: int, total: int, include_deleted: bool
    ) -> list[Row]:
        """The rows of one page in order."""
        index = None if include_deleted else _mql.sort_index(sort)
        needed = limit if _mql.is_exact(node) else None
        if index is not None and not (_mql.is_indexed(node) and await self._is_near(total, limit)):
            pipeline = _mql.page_pipeline(_mql.walked(where), sort, after, needed, include_deleted)
            try:
                return await self._first(node, pipeline, limit, WALK_SECONDS if _mql.is_indexed(node) else None, index)
            except ExecutionTimeout:
                if not _mql.is_indexed(node):
                    raise
        return await self._first(node, _mql.page_pipeline(where, sort, after, needed, include_deleted), limit)

    async def _is_near(self, total: int, limit: int) -> bool:
        """Whether sorting what matches costs less than walking past what does not."""
        if total <= SORTED_ANYWAY:
            return True
        now = time.monotonic()
        if now - self._size_at > SIZE_SECONDS:
            datafiles = await self._collection("datafiles")
            self._size, self._size_at = await datafiles.estimated_document_count(), now
        return total < limit * self._size / total

    async def _first(
        self, node: Node, pipeline: _mql.Pipeline, limit: int, seconds: float | None = None, index: str | None = None
    ) -> list[Row]:
        rows: list[Row] = []
        async with aclosing(self._judged(node, pipeline, seconds, index)) as found:
            async for row in found:
                rows.append(row)
                if len(rows) == limit:
                    break
        return rows

    async def _judged(
        self, node: Node, pipeline: _mql.Pipeline, seconds: float | None = None, index: str | None = None
    ) -> AsyncGenerator[Row, None]:
        """Rows of the pipeline that match, each judged again where the filter is only an upper bound."""
        datafiles = await self._collection("datafiles")
        hint: Row = {} if index is None else {"hint": index}
        found = await datafiles.aggregate(pipeline, maxTimeMS=_ms(seconds or QUERY_SECONDS), **hint)
        is_exact = _mql.is_exact(node)
        async with found:
            async for row in found:
                if is_exact or matches(node, Facts(msgspec.json.decode(row["document"]))):
                    yield row


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


@contextmanager
def _asking() -> Iterator[None]:
    """Errors of a question, those of its time limit among them, are ours when they leave this block."""
    with border():
        try:
            yield
        except ExecutionTimeout as exc:
            raise QueryError(
                f"the query took longer than {QUERY_SECONDS:g} s; narrow it with an equality, a range or ^ in a pattern"
            ) from exc
        except OperationFailure as exc:
            if exc.code != REGEX_GAVE_UP:
                raise
            raise QueryError("a pattern takes too long on some text; write it without nested repetitions") from exc
