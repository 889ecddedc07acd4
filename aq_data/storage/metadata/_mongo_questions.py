"""How MongoDB answers a question: the total, then the page by the index of terms or by walking in sort order.

The total is counted from the index alone where one condition decides, and pages by time have ways of their own there
(`_mongo_times`); where several decide, documents are counted and the first of them found in one pass. A small set is
fetched and sorted. Of a large one the records are walked in the order asked for until the page is full, for a short time:
where those that match stand at the far end, everything is sorted after all. What is sorted by a path inside of snapshots is
sorted here, whole.

Snapshots are asked first, for what they may match (`_mongo_lookups`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from typing import Any, TypeVar

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.command_cursor import AsyncCommandCursor
from pymongo.errors import ExecutionTimeout, OperationFailure

from aq_data.errors import CorruptionError, QueryError
from aq_data.models.paths import SortKey
from aq_data.models.query import Node, check_dimension, quantities_of
from aq_data.models.terms import Kind
from aq_data.storage.metadata import _mql
from aq_data.storage.metadata._mongo_border import border
from aq_data.storage.metadata._mongo_lookups import Lookups, facts_of
from aq_data.storage.metadata._mongo_parts import Parts
from aq_data.storage.metadata._mongo_records import SNAPSHOT, TIME_INDEX, created_of, field_of
from aq_data.storage.metadata._mongo_snapshots import Snapshots
from aq_data.storage.metadata._mongo_times import ByTime
from aq_data.storage.metadata._shared import Shared, grouped, is_in_instruments
from aq_data.storage.metadata.cursors import Cursor, mark_of
from aq_data.storage.metadata.store import Page

__all__ = ["EXACT_TOTAL", "Questions"]

T = TypeVar("T")
Row = dict[str, Any]

EXACT_TOTAL = 10_000
"""Totals are counted exactly up to here; `count` is always exact."""
QUERY_SECONDS = 10.0
WALK_SECONDS = 0.3
"""How long to walk in vain before everything that matches is sorted instead."""
SORTED_ANYWAY = 200
"""So few matches are sorted whatever a walk would cost."""
KEYS_FOR_A_DOCUMENT = 4
"""So many keys of an index are read in the time that one document takes."""
SURVEY_SECONDS = 60.0
"""How long the number of records is remembered."""
REMEMBERED = 10_000
MOMENTS = 1_000
"""The times of so few are all read from the index, to find the first of them."""
SORTED_AT_ONCE = 1000
WHOLE = {"document": 1, "snapshot": 1, "apart": 1}
JUDGED_AT_ONCE = 200
REGEX_GAVE_UP = 51156
ALIVE: Row = {"deleted": False}


@dataclass(frozen=True, slots=True)
class Asked:
    """A filter, what snapshots say to its parts, and the filter that MongoDB is given for it."""

    node: Node
    include_deleted: bool
    shared: Shared
    deadline: float

    @property
    def left(self) -> float:
        """Seconds until it has taken too long."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def where(self) -> Row:
        return _mql.selection(self.node, self.include_deleted, self.shared)

    @property
    def is_exact(self) -> bool:
        return _mql.is_exact(self.node, self.shared)

    @property
    def is_indexed(self) -> bool:
        return _mql.is_indexed(self.node)

    @property
    def is_range(self) -> bool:
        return _mql.is_range(self.node)

    @property
    def fields(self) -> frozenset[str]:
        return _mql.fields_in(self.where)


class Questions:
    """Asks the collections that `collection` names."""

    def __init__(
        self, collection: Callable[[str], Awaitable[AsyncCollection[Row]]], snapshots: Snapshots, parts: Parts
    ) -> None:
        self._collection, self._snapshots, self._parts = collection, snapshots, parts
        self._lookups = Lookups(snapshots)
        self._by_time = ByTime(lambda: collection("datafiles"))
        self._met_by_many: set[frozenset[str]] = set()
        self._size, self._middle, self._surveyed_at = 0, 0, float("-inf")

    async def search(self, node: Node, sort: SortKey, limit: int, cursor: str | None, include_deleted: bool) -> Page:
        mark = mark_of(node, include_deleted)
        start = Cursor.decode(cursor, sort, mark, str) if cursor is not None else None
        after = _mql.place_of(start, sort) if start else None

        async def page(asked: Asked) -> Page:
            if start is None:
                total, is_exact, rows = await self._start(asked, sort, limit + 1 if limit else 0)
            else:
                total, is_exact = start.total, start.total_is_exact
                rows = await self._rows(asked, sort, after, limit + 1, total) if limit else []
            more = len(rows) > limit
            following = _mql.cursor_of(rows[limit - 1], sort, total, is_exact).encode(sort, mark) if more else None
            await self._parts.fill(rows[:limit])
            return Page(await self._snapshots.joined(rows[:limit]), total, is_exact, following)

        try:
            return await self._answer(node, page, include_deleted)
        except CorruptionError:  # a record was changed, and its snapshot removed, after it was found
            return await self._answer(node, page, include_deleted)

    async def count(self, node: Node) -> int:
        return await self._answer(node, lambda asked: self._counted(asked, None))

    async def distinct(self, path: str, node: Node, limit: int) -> list[tuple[object, int]]:
        async def values(asked: Asked) -> list[tuple[object, int]]:
            may_be_inside = is_in_instruments(path)
            if asked.is_exact and not may_be_inside:
                found = await self._aggregate(_mql.distinct_pipeline(path, asked.where, limit))
                return [(_mql.shown(row["_id"]["k"], row["_id"]["v"]), row["n"]) async for row in found]
            counts = await self._values_of_records(path, asked)
            if may_be_inside:
                having = await self._records_of_snapshots(asked)
                inside = await self._snapshots.values(path, _mql.DISTINCT_KINDS, having)
                for hash, listed in inside.items():
                    for value in listed:
                        counts[value] += having[hash]
            wanted = sorted((-n, key) for key, n in counts.items())
            return [(_mql.shown(*key), -n) for n, key in wanted[:limit]]

        return await self._answer(node, values)

    # --- how -------------------------------------------------------------------------------------------------------

    async def _answer(self, node: Node, ask: Callable[[Asked], Awaitable[T]], include_deleted: bool = False) -> T:
        """What `ask` returns for the filter and what snapshots say to it."""
        with _asking():
            await self._check_dimensions(node)
            node, deadline = grouped(node), time.monotonic() + QUERY_SECONDS
            return await self._lookups.settled(
                node, lambda shared: ask(Asked(node, include_deleted, shared, deadline)), QUERY_SECONDS
            )

    async def _check_dimensions(self, node: Node) -> None:
        asked = list(quantities_of(node))
        if asked:
            kinds = await self._collection("kinds")
            rows = await kinds.find({"path": {"$in": [one.path for one in asked]}}).to_list()
            for one in asked:
                known = [row["kind"] for row in rows if row["path"] == one.path]
                try:
                    check_dimension(one, known)
                except QueryError:  # rare enough to look whether the dimensions are still those of some document
                    check_dimension(one, [kind for kind in known if await self._is_there(one.path, kind)])

    async def _is_there(self, path: str, kind: Kind) -> bool:
        """Whether any document has a value of the kind at the path; kinds that were there once are never forgotten."""
        found: list[Row] = [{f"t.{field_of(path, kind)}": {"$exists": True}}]
        if is_in_instruments(path) and (hashes := await self._snapshots.having(path, kind)):
            found.append({f"t.{SNAPSHOT}": {"$in": hashes}})  # those that nothing refers to are there until `gc`
        datafiles = await self._collection("datafiles")
        return await datafiles.find_one({"$or": found}, {"_id": 1}) is not None

    async def _start(self, asked: Asked, sort: SortKey, limit: int) -> tuple[int, bool, list[Row]]:
        """The total, whether it is exact, and the rows of the first page in order."""
        if limit and await self._is_one_pass(asked, sort):
            return await self._met_by_several(asked, sort, limit)
        if limit and _is_timed(asked, sort):
            if _mql.is_point(asked.where):
                return await self._at_once(asked, sort, limit)
            if asked.is_range:
                return await self._in_range(asked, sort, limit)
        total, is_exact = await self._total(asked)
        return total, is_exact, await self._rows(asked, sort, None, limit, total) if limit and total else []

    async def _at_once(self, asked: Asked, sort: SortKey, limit: int) -> tuple[int, bool, list[Row]]:
        """As `_start` where so many match that the total does not decide how the page is read."""
        (total, is_exact), rows = await asyncio.gather(self._total(asked), self._rows(asked, sort, None, limit, EXACT_TOTAL))
        return max(total, min(len(rows), EXACT_TOTAL)), is_exact, rows  # one may have been saved in between

    async def _in_range(self, asked: Asked, sort: SortKey, limit: int) -> tuple[int, bool, list[Row]]:
        """As `_start` of a range by time: a few are counted before they are read."""
        if not self._is_remembered(asked):
            total = await self._counted(asked, MOMENTS + 1)
            if total <= MOMENTS:
                return total, True, await self._rows(asked, sort, None, limit, total) if total else []
        found = await self._at_once(asked, sort, limit)
        self._remember(asked, found[0] > MOMENTS)
        return found

    async def _met_by_several(self, asked: Asked, sort: SortKey, limit: int) -> tuple[int, bool, list[Row]]:
        """As `_start` of several conditions: a few by time are read without being counted before."""
        if sort.path == "created_at" and not self._is_remembered(asked):
            await self._survey()
            few = await self._by_time.of_few(asked.where, sort, limit, asked.left, self._middle)
            if few is not None:
                return len(few), True, few[:limit]
        found = await self._one_pass(asked, sort, limit)
        self._remember(asked, found[0] > 2 * limit)
        return found

    def _is_remembered(self, asked: Asked) -> bool:
        """Whether the last question about these fields had many matches: it is taken to have as many again."""
        return asked.fields in self._met_by_many

    def _remember(self, asked: Asked, is_many: bool) -> None:
        if not is_many:
            self._met_by_many.discard(asked.fields)
        elif len(self._met_by_many) < REMEMBERED:
            self._met_by_many.add(asked.fields)

    async def _is_one_pass(self, asked: Asked, sort: SortKey) -> bool:
        """Whether to count means to read the documents, so that they are better put in order on the way."""
        if not asked.is_exact or not asked.is_indexed or asked.include_deleted or _mql.is_covered(asked.where):
            return False
        return not (is_in_instruments(sort.path) and await self._snapshots.have(sort.path))

    async def _one_pass(self, asked: Asked, sort: SortKey, limit: int) -> tuple[int, bool, list[Row]]:
        pipeline = _mql.start_pipeline(asked.where, sort, limit, EXACT_TOTAL + 1)
        found = await (await self._aggregate(pipeline, asked.left)).to_list()
        if not found:
            return 0, True, []
        if found[0]["n"] > EXACT_TOTAL:
            return EXACT_TOTAL, False, await self._rows(asked, sort, None, limit, EXACT_TOTAL)
        datafiles = await self._collection("datafiles")
        orders = [row["o"] for row in found[0]["top"]]
        wanted = {"deleted": False, "c": {"$in": [created_of(order) for order in orders]}, "o": {"$in": orders}}
        documents = {row["o"]: row async for row in datafiles.find(wanted, {**WHOLE, "o": 1}, hint=TIME_INDEX)}
        rows = [{**documents[row["o"]], **row} for row in found[0]["top"] if row["o"] in documents]
        return found[0]["n"], True, rows

    async def _total(self, asked: Asked) -> tuple[int, bool]:
        if asked.where == ALIVE and await self._are_many():
            return EXACT_TOTAL, False
        found = await self._counted(asked, EXACT_TOTAL + 1)
        return min(found, EXACT_TOTAL), found <= EXACT_TOTAL

    async def _are_many(self) -> bool:
        """Whether more records are alive than are counted: all there may be, without those that are deleted or nothing yet.

        How many there are in all is an estimate, hence twice as many.
        """
        size = await self._estimate()
        if size <= 3 * EXACT_TOTAL:
            return False
        others = await (await self._aggregate(_mql.total_pipeline({"deleted": {"$ne": False}}, EXACT_TOTAL))).to_list()
        return not others or others[0]["n"] < EXACT_TOTAL

    async def _counted(self, asked: Asked, limit: int | None) -> int:
        if not asked.is_exact:
            pipeline = [{"$match": asked.where}, {"$project": WHOLE}]
            return sum([1 async for _ in self._first(asked, pipeline, limit)])
        datafiles = await self._collection("datafiles")
        if limit and _mql.is_covered(asked.where) and not await datafiles.database.client.is_mongos:
            # Half of what a pipeline takes that has a limit. On a cluster it also counts what is moved from shard to shard.
            command: Row = {"count": datafiles.name, "query": asked.where, "limit": limit, "maxTimeMS": _ms(QUERY_SECONDS)}
            command["readConcern"] = datafiles.read_concern.document
            return int((await datafiles.database.command(command))["n"])
        found = await self._aggregate(_mql.total_pipeline(asked.where, limit))
        rows = await found.to_list()
        return int(rows[0]["n"]) if rows else 0

    async def _values_of_records(self, path: str, asked: Asked) -> Counter[tuple[str, Any]]:
        """How many records have each value outside of their snapshots."""
        counts: Counter[tuple[str, Any]] = Counter()
        if asked.is_exact:
            found = await self._aggregate(_mql.distinct_pipeline(path, asked.where, None))
            counts.update({(row["_id"]["k"], row["_id"]["v"]): row["n"] async for row in found})
            return counts
        pipeline = [{"$match": asked.where}, {"$project": WHOLE}]
        async for row in self._first(asked, pipeline, None):
            terms = [(term.kind, term.value) for term in facts_of(row).terms if term.path == path]
            counts.update({value for value in terms if value[0] in _mql.DISTINCT_KINDS})
        return counts

    async def _records_of_snapshots(self, asked: Asked) -> Counter[str]:
        """How many of the records that match have each snapshot."""
        if asked.is_exact:
            found = await self._aggregate(_mql.distinct_snapshots_pipeline(asked.where))
            return Counter({row["_id"]: row["n"] async for row in found})
        pipeline = [{"$match": asked.where}, {"$project": WHOLE}]
        return Counter([row["snapshot"] async for row in self._first(asked, pipeline, None) if "snapshot" in row])

    async def _rows(self, asked: Asked, sort: SortKey, after: Any, limit: int, total: int) -> list[Row]:
        """The rows of one page in order."""
        if is_in_instruments(sort.path) and await self._snapshots.have(sort.path):
            return await self._sorted_here(asked, sort, after, limit)
        if _is_timed(asked, sort):
            if _mql.is_point(asked.where):
                return await self._by_time.of_value(asked.where, sort, after, limit, asked.left)
            if total > MOMENTS and asked.is_range:
                rows = await self._by_time.of_range(asked.where, sort, after, limit, asked.left)
                if rows is not None:
                    return rows
                total, _ = await self._total(asked)  # of a first page it is known only that it is more than a few
            if total < EXACT_TOTAL and await self._is_near(total, limit * KEYS_FOR_A_DOCUMENT):
                rows = await self._by_time.of_one_field(asked.where, sort, after, limit, asked.left)
                if rows is not None:
                    return rows
        index = None if asked.include_deleted else _mql.sort_index(sort)
        needed = limit if asked.is_exact else None
        if index is not None and not (asked.is_indexed and await self._is_near(total, limit)):
            pipeline = _mql.page_pipeline(_mql.walked(asked.where), sort, after, needed, asked.include_deleted)
            try:
                seconds = WALK_SECONDS if asked.is_indexed else None
                return [row async for row in self._first(asked, pipeline, limit, seconds, index)]
            except ExecutionTimeout:
                if not asked.is_indexed:
                    raise
        pipeline = _mql.page_pipeline(asked.where, sort, after, needed, asked.include_deleted)
        return [row async for row in self._first(asked, pipeline, limit)]

    async def _is_near(self, total: int, limit: int) -> bool:
        """Whether sorting what matches costs less than walking past what does not."""
        return total <= SORTED_ANYWAY or total < limit * await self._estimate() / total

    async def _estimate(self) -> int:
        """How many records there were a short time ago."""
        await self._survey()
        return self._size

    async def _survey(self) -> None:
        """Look how many records there are, and for the middle of their time; not again for a short time."""
        now = time.monotonic()
        if now - self._surveyed_at > SURVEY_SECONDS:
            self._surveyed_at = now
            datafiles = await self._collection("datafiles")
            self._size = await datafiles.estimated_document_count()
            ends = [await datafiles.find_one(ALIVE, {"c": 1}, sort={"c": way}, hint=TIME_INDEX) for way in (1, -1)]
            self._middle = sum(end["c"] for end in ends if end) // 2

    async def _sorted_here(self, asked: Asked, sort: SortKey, after: Any, limit: int) -> list[Row]:
        """As `_rows` by a path that snapshots have: the places of all that match, then the documents of the page."""
        best = nlargest if sort.descending else nsmallest
        last = None if after is None else _key(after)
        found: list[Row] = []
        pipeline = _mql.places_pipeline(asked.where, sort, asked.include_deleted, whole=not asked.is_exact)
        async for batch in _batches(self._first(asked, pipeline, None), SORTED_AT_ONCE):
            inside = await self._snapshots.places(sort, {row["snapshot"] for row in batch if "snapshot" in row})
            for row in batch:
                row.pop("document", None)
                rank, value = inside.get(row.get("snapshot", ""), (row["place"]["r"], row["place"]["v"]))
                row["place"] = {"r": rank, "v": value, "o": row["o"]}
            try:
                keyed = [(_key(row["place"]), row) for row in batch]
                behind = [row for key, row in keyed if last is None or (key < last if sort.descending else key > last)]
            except TypeError as exc:
                raise QueryError("the cursor is not one that this server gave", code="bad_cursor") from exc
            found = best(limit, [*found, *behind], key=lambda row: _key(row["place"]))
        datafiles = await self._collection("datafiles")
        wanted = {"_id": {"$in": [row["_id"] for row in found]}}
        documents = {row["_id"]: row async for row in datafiles.find(wanted, WHOLE)}
        return [{**documents[row["_id"]], "place": row["place"], "o": row["o"]} for row in found if row["_id"] in documents]

    async def _first(
        self,
        asked: Asked,
        pipeline: _mql.Pipeline,
        limit: int | None,
        seconds: float | None = None,
        index: str | None = None,
    ) -> AsyncGenerator[Row, None]:
        """Rows of the pipeline that match, each judged again where the filter is only an upper bound."""
        hint: Row = {} if index is None else {"hint": index}
        count = 0
        async with await self._aggregate(pipeline, seconds, **hint) as found, aclosing(self._judged(asked, found)) as rows:
            async for row in rows:
                yield row
                count += 1
                if count == limit:
                    return

    async def _judged(self, asked: Asked, rows: AsyncIterator[Row]) -> AsyncGenerator[Row, None]:
        if asked.is_exact:
            async for row in rows:
                yield row
            return
        async for batch in _batches(rows, JUDGED_AT_ONCE):
            left = asked.deadline - time.monotonic()
            if left <= 0:
                raise _too_long()
            await self._parts.fill(batch)
            for row in await self._lookups.judged(asked.node, asked.shared, batch, left):
                yield row

    async def _aggregate(
        self, pipeline: _mql.Pipeline, seconds: float | None = None, **options: Any
    ) -> AsyncCommandCursor[Row]:
        datafiles = await self._collection("datafiles")
        # What has to be sorted may be more than MongoDB sorts in memory.
        return await datafiles.aggregate(
            pipeline, maxTimeMS=_ms(QUERY_SECONDS if seconds is None else seconds), allowDiskUse=True, **options
        )


def _is_timed(asked: Asked, sort: SortKey) -> bool:
    """Whether it asks for one field, by time."""
    is_by_time = sort.path == "created_at" and not asked.include_deleted
    return is_by_time and asked.is_exact and asked.is_indexed and _mql.is_covered(asked.where)


async def _batches(rows: AsyncIterator[Row], size: int) -> AsyncGenerator[list[Row], None]:
    batch: list[Row] = []
    async for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _key(place: Row) -> tuple[int, Any, bytes]:
    return place["r"], place["v"], bytes(place["o"])


def _too_long() -> QueryError:
    return QueryError(
        f"the query took longer than {QUERY_SECONDS:g} s; narrow it with an equality, a range or ^ in a pattern"
    )


def _ms(seconds: float) -> int:
    """As MongoDB takes it, for whom 0 is without a limit."""
    return max(1, round(seconds * 1000))


@contextmanager
def _asking() -> Iterator[None]:
    """Errors of a question, those of its time limit among them, are ours when they leave this block."""
    with border():
        try:
            yield
        except (ExecutionTimeout, TimeoutError) as exc:  # of MongoDB, or of what is judged here
            raise _too_long() from exc
        except OperationFailure as exc:
            if exc.code != REGEX_GAVE_UP:
                raise
            raise QueryError("a pattern takes too long on some text; write it without nested repetitions") from exc
