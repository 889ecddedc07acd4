"""Pages in order of time on MongoDB, by the indexes that have the time: of one value, of a range, of what is few.

The index of terms has the records of one value in order of time. Of a range it has them in order of the values: the times
of a few are all read from it. Of many another index has them day by day, and a page reads the days that it is of.

All by `find`: a pipeline takes longer for the same, at times twice as long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from heapq import nlargest, nsmallest
from typing import Any

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import ExecutionTimeout

from aq_data.models.paths import SortKey
from aq_data.storage.metadata import _mql
from aq_data.storage.metadata._mongo_records import DAY, DAYS_INDEX, TERMS_INDEX, TIME_INDEX, created_of

__all__ = ["ByTime"]

Row = dict[str, Any]

DAYS_SECONDS = 0.05
"""How long to look for the days of a page."""
DENSE = 2000
"""Of a day with more matches the records are better walked in order of time."""
FIRST_DAY = -(1 << 40)
"""Before all: the index of days is read in its order only where the day is asked for."""
SHOWN = {"document": 1, "snapshot": 1, "apart": 1, "o": 1, "c": 1}


class ByTime:
    """Reads pages of filters that compile exactly and find nothing but what is alive.

    `where` is the filter, `after` the place (`o`) behind which the page begins, None for the first page; no command takes
    longer than `seconds`. Rows have document, snapshot, o and place, as those of `_mql.page_pipeline`.
    """

    def __init__(self, datafiles: Callable[[], Awaitable[AsyncCollection[Row]]]) -> None:
        self._datafiles = datafiles

    async def of_few(self, where: Row, sort: SortKey, limit: int, seconds: float, middle: int) -> list[Row] | None:
        """Everything that matches, in order; None if some half of the records has `limit` of it.

        The halves, before and after the moment `middle`, are looked through at once.
        """
        halves = [{"$and": [where, {"c": {than: middle}}]} for than in ("$gte", "$lt")]
        found = await asyncio.gather(*(self._rows(half, {}, limit, seconds) for half in halves))
        if any(len(rows) == limit for rows in found):
            return None
        return _in_order([*found[0], *found[1]], sort)

    async def of_value(self, where: Row, sort: SortKey, after: Any, limit: int, seconds: float) -> list[Row]:
        """Of one value, or of a few, in one field: just the records of the page are read."""
        direction = _direction(sort)
        if after is not None:
            where = {"$and": [where, _mql.behind(sort, after)]}
        rows = await self._rows(where, {"c": direction}, limit + 1, seconds, TERMS_INDEX)
        if len(rows) > limit and rows[limit]["c"] == rows[limit - 1]["c"]:
            # Those of one moment come in no order, and all of them have to be seen to tell which are the first.
            moment = rows[limit]["c"]
            rows = [row for row in rows if row["c"] != moment]
            same = {"$and": [where, {"c": moment}]}
            rows += await self._rows(same, {"c": direction, "o": direction}, limit - len(rows), seconds, TERMS_INDEX)
        return _in_order(rows[:limit], sort)

    async def of_one_field(self, where: Row, sort: SortKey, after: Any, limit: int, seconds: float) -> list[Row] | None:
        """Of any condition on one field: the times of all that match are read from the index. None as of `_at`."""
        asked = {"$and": [where, *_later(sort, after)]}
        keys = await self._find(asked, {"_id": 0, "c": 1}, {"c": _direction(sort)}, limit, seconds, TERMS_INDEX)
        return await self._at([key["c"] for key in keys], where, sort, after, limit, seconds)

    async def of_range(self, where: Row, sort: SortKey, after: Any, limit: int, seconds: float) -> list[Row] | None:
        """Of a range of numbers: the times of all that match on the days of the page are read from the index.

        None as of `_at`, or when it takes long to come to these days, or one of them has very many.
        """
        start = FIRST_DAY if after is None else created_of(after) // DAY
        read = limit + limit // 2 + 1
        try:
            keys = await self._keys(
                where, {"$lte" if sort.descending and after is not None else "$gte": start}, sort, after, read
            )
            if len(keys) == read:  # of the last day there may be more, in no order
                last = keys[-1]["d"]
                keys = [key for key in keys if key["d"] != last]
                if len(keys) < limit:
                    rest = await self._keys(where, {"$eq": last}, sort, after, DENSE)
                    if len(rest) == DENSE:
                        return None
                    keys += rest
        except ExecutionTimeout:
            return None
        best = nlargest if sort.descending else nsmallest
        return await self._at(best(limit, [key["c"] for key in keys]), where, sort, after, limit, seconds)

    async def _keys(self, where: Row, days: Row, sort: SortKey, after: Any, limit: int) -> list[Row]:
        """The days and times of what is in a range on these days, in order of the days."""
        asked = {"$and": [{"d": days}, *_later(sort, after), _mql.by_day(where)]}
        return await self._find(asked, {"_id": 0, "d": 1, "c": 1}, {"d": _direction(sort)}, limit, DAYS_SECONDS, DAYS_INDEX)

    async def _at(
        self, moments: list[int], where: Row, sort: SortKey, after: Any, limit: int, seconds: float
    ) -> list[Row] | None:
        """The first rows of these times, after those of the moment at which the page before ended.

        None when they are too few, for some went meanwhile.
        """
        behind, times = [], set(moments)
        if after is not None:
            behind, times = [_mql.behind(sort, after)], times | {created_of(after)}
        asked = {"$and": [{"deleted": False, "c": {"$in": list(times)}}, where, *behind]}
        rows = await self._rows(asked, {"c": _direction(sort), "o": _direction(sort)}, limit, seconds, TIME_INDEX)
        return rows if len(rows) == limit or len(moments) < limit else None

    async def _rows(
        self, where: Row, order: dict[str, int], limit: int, seconds: float, index: str | None = None
    ) -> list[Row]:
        return [{**row, "place": row["o"]} for row in await self._find(where, SHOWN, order, limit, seconds, index)]

    async def _find(
        self, where: Row, shown: Row, order: dict[str, int], limit: int, seconds: float, index: str | None
    ) -> list[Row]:
        datafiles = await self._datafiles()
        found = datafiles.find(
            where, shown, limit=limit, batch_size=limit, hint=index, max_time_ms=max(1, round(seconds * 1000))
        )
        return await (found.sort(order) if order else found).to_list()


def _later(sort: SortKey, after: Any) -> list[Row]:
    """That it comes after the moment at which the page before ended."""
    return [] if after is None else [{"c": {"$lt" if sort.descending else "$gt": created_of(after)}}]


def _in_order(rows: list[Row], sort: SortKey) -> list[Row]:
    return sorted(rows, key=lambda row: bytes(row["o"]), reverse=sort.descending)


def _direction(sort: SortKey) -> int:
    return -1 if sort.descending else 1
