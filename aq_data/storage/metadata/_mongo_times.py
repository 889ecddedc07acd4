"""Pages in order of time on MongoDB, by the indexes that have the time: of one value, of a range, of what is few.

The index of terms has the records of one value in order of time. Of a range it has them in order of the values: the times
of a few are all read from it. Of many another index has them day by day, and a page reads the days that it is of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from heapq import nlargest, nsmallest
from typing import Any, Protocol

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import ExecutionTimeout

from aq_data.models.paths import SortKey
from aq_data.storage.metadata import _mql
from aq_data.storage.metadata._mongo_records import DAY, DAYS_INDEX, TERMS_INDEX, TIME_INDEX, created_of

__all__ = ["ByTime"]

Row = dict[str, Any]

MOMENTS_SECONDS = 10.0
DAYS_SECONDS = 0.05
"""How long to look for a page day by day."""
FIRST_DAY = -(1 << 40)


class Read(Protocol):
    """Rows of a pipeline over `datafiles`, by the index of that name."""

    async def __call__(self, pipeline: _mql.Pipeline, index: str | None = None) -> list[Row]: ...


class ByTime:
    """Reads pages of filters that compile exactly and find nothing but what is alive.

    `where` is the filter, `after` the place (`o`) behind which the page begins, None for the first page.
    """

    def __init__(self, datafiles: Callable[[], Awaitable[AsyncCollection[Row]]], read: Read) -> None:
        self._datafiles, self._read = datafiles, read

    async def of_few(self, where: Row, sort: SortKey, limit: int, middle: int) -> list[Row] | None:
        """Everything that matches, in order; None if that is not less than `limit`.

        It is looked for before and after the moment `middle` at once.
        """
        halves = [{"$and": [where, {"c": {than: middle}}]} for than in ("$gte", "$lt")]
        found = await asyncio.gather(*(self._read(_mql.few_pipeline(half, limit)) for half in halves))
        rows = _in_order([*found[0], *found[1]], sort)
        return rows if len(rows) < limit else None

    async def of_value(self, where: Row, sort: SortKey, after: Any, limit: int) -> list[Row]:
        """Of one value, or of a few, in one field: just the records of the page are read."""
        if after is not None:
            where = {"$and": [where, _mql.behind(sort, after)]}
        rows = await self._read(_mql.timed_pipeline(where, sort, limit + 1), TERMS_INDEX)
        if len(rows) > limit and rows[limit]["c"] == rows[limit - 1]["c"]:
            # Those of one moment come in no order, and all of them have to be seen to tell which are the first.
            moment = rows[limit]["c"]
            rows = [row for row in rows if row["c"] != moment]
            same = {"$and": [where, {"c": moment}]}
            rows += await self._read(_mql.page_pipeline(same, sort, None, limit - len(rows), False), TERMS_INDEX)
        return _in_order(rows[:limit], sort)

    async def of_one_field(self, where: Row, sort: SortKey, after: Any, limit: int) -> list[Row] | None:
        """Of any condition on one field: the times of all that match are read from the index. None as of `_at`."""
        asked = where if after is None else {"$and": [where, {"c": _mql.behind(sort, after)["c"]}]}
        datafiles = await self._datafiles()
        # Not a pipeline, which takes twice as long for it.
        found = datafiles.find(asked, {"_id": 0, "c": 1}, hint=TERMS_INDEX, max_time_ms=round(MOMENTS_SECONDS * 1000))
        moments = [row["c"] async for row in found.sort("c", _direction(sort)).limit(limit)]
        return await self._at(moments, where, sort, after, limit)

    async def of_range(self, where: Row, sort: SortKey, after: Any, limit: int) -> list[Row] | None:
        """Of a range of numbers: the times of all that match on the days of the page are read from the index.

        None as of `_at`, or when it takes long to come to these days.
        """
        start = FIRST_DAY if after is None else created_of(after) // DAY
        days = {"d": {"$lte": start} if sort.descending and after is not None else {"$gte": start}}
        asked = {"$and": [days, _mql.by_day(where)]}
        datafiles = await self._datafiles()
        found = datafiles.find(asked, {"_id": 0, "d": 1, "c": 1}, hint=DAYS_INDEX, max_time_ms=round(DAYS_SECONDS * 1000))
        moments: list[int] = []
        last: int | None = None
        try:
            async with found.sort("d", _direction(sort)).batch_size(2 * limit) as rows:
                async for row in rows:
                    if len(moments) >= limit and row["d"] != last:
                        break
                    last = row["d"]
                    if after is None or _is_behind(row["c"], created_of(after), sort):
                        moments.append(row["c"])
        except ExecutionTimeout:
            return None
        first = nlargest(limit, moments) if sort.descending else nsmallest(limit, moments)
        return await self._at(first, where, sort, after, limit)

    async def _at(self, moments: list[int], where: Row, sort: SortKey, after: Any, limit: int) -> list[Row] | None:
        """The first rows of these times.

        None when they are too few, for some went meanwhile, or others of the same moment are on the page before.
        """
        those = _mql.walked({"$and": [{"c": {"$in": list(set(moments))}}, where]})
        rows = await self._read(_mql.page_pipeline(those, sort, after, limit, False), TIME_INDEX)
        return rows if len(rows) == limit or len(moments) < limit else None


def _in_order(rows: list[Row], sort: SortKey) -> list[Row]:
    return sorted(rows, key=lambda row: bytes(row["o"]), reverse=sort.descending)


def _direction(sort: SortKey) -> int:
    return -1 if sort.descending else 1


def _is_behind(moment: int, start: int, sort: SortKey) -> bool:
    return moment <= start if sort.descending else moment >= start
