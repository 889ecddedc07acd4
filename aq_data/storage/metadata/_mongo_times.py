"""Pages in order of time on MongoDB, by the indexes that have the time: of one value, of a range, of what is few.

The index of terms has the records of one value in order of time. Of a range it has them in order of the values: the times
of a few are all read from it. Of many another index has them day by day, and a page reads the days that it is of.

All by `find`: a pipeline takes up to twice as long for the same.
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

SECONDS = 10.0
DAYS_SECONDS = 0.05
"""How long to look for a page day by day."""
FIRST_DAY = -(1 << 40)
SHOWN = {"document": 1, "snapshot": 1, "apart": 1, "o": 1, "c": 1}


class ByTime:
    """Reads pages of filters that compile exactly and find nothing but what is alive.

    `where` is the filter, `after` the place (`o`) behind which the page begins, None for the first page. Rows have document,
    snapshot, o and place, as those of `_mql.page_pipeline`.
    """

    def __init__(self, datafiles: Callable[[], Awaitable[AsyncCollection[Row]]]) -> None:
        self._datafiles = datafiles

    async def of_few(self, where: Row, sort: SortKey, limit: int, middle: int) -> list[Row] | None:
        """Everything that matches, in order; None if that is not less than `limit`.

        It is looked for before and after the moment `middle` at once.
        """
        halves = [{"$and": [where, {"c": {than: middle}}]} for than in ("$gte", "$lt")]
        found = await asyncio.gather(*(self._find(half, SHOWN, {}, limit) for half in halves))
        rows = _in_order([*found[0], *found[1]], sort)
        return rows if len(rows) < limit else None

    async def of_value(self, where: Row, sort: SortKey, after: Any, limit: int) -> list[Row]:
        """Of one value, or of a few, in one field: just the records of the page are read."""
        direction = _direction(sort)
        if after is not None:
            where = {"$and": [where, _mql.behind(sort, after)]}
        rows = await self._find(where, SHOWN, {"c": direction}, limit + 1, TERMS_INDEX)
        if len(rows) > limit and rows[limit]["c"] == rows[limit - 1]["c"]:
            # Those of one moment come in no order, and all of them have to be seen to tell which are the first.
            moment = rows[limit]["c"]
            rows = [row for row in rows if row["c"] != moment]
            same = {"$and": [where, {"c": moment}]}
            rows += await self._find(same, SHOWN, {"c": direction, "o": direction}, limit - len(rows), TERMS_INDEX)
        return _in_order(rows[:limit], sort)

    async def of_one_field(self, where: Row, sort: SortKey, after: Any, limit: int) -> list[Row] | None:
        """Of any condition on one field: the times of all that match are read from the index. None as of `_at`."""
        asked = where if after is None else {"$and": [where, {"c": _mql.behind(sort, after)["c"]}]}
        keys = await self._find(asked, {"_id": 0, "c": 1}, {"c": _direction(sort)}, limit, TERMS_INDEX)
        return await self._at([key["c"] for key in keys], where, sort, after, limit)

    async def of_range(self, where: Row, sort: SortKey, after: Any, limit: int) -> list[Row] | None:
        """Of a range of numbers: the times of all that match on the days of the page are read from the index.

        None as of `_at`, or when it takes long to come to these days.
        """
        start = FIRST_DAY if after is None else created_of(after) // DAY
        days = {"$lte": start} if sort.descending and after is not None else {"$gte": start}
        moments, read = list[int](), limit + limit // 2 + 1
        try:
            while len(moments) < limit:
                keys = await self._keys(where, days, sort, read)
                last = keys[-1]["d"] if len(keys) == read else None  # of this day there may be more, in no order
                moments += _behind([key for key in keys if key["d"] != last], after, sort)
                if last is None:
                    break
                if len(moments) < limit:
                    moments += _behind(await self._keys(where, {"$eq": last}, sort, 0), after, sort)
                days = {"$lt" if sort.descending else "$gt": last}
        except ExecutionTimeout:
            return None
        first = nlargest(limit, moments) if sort.descending else nsmallest(limit, moments)
        return await self._at(first, where, sort, after, limit)

    async def _keys(self, where: Row, days: Row, sort: SortKey, limit: int) -> list[Row]:
        """The days and times of what is in a range on these days, in order of the days; all for a `limit` of 0."""
        asked, shown = {"$and": [{"d": days}, _mql.by_day(where)]}, {"_id": 0, "d": 1, "c": 1}
        return await self._find(asked, shown, {"d": _direction(sort)}, limit, DAYS_INDEX, DAYS_SECONDS)

    async def _at(self, moments: list[int], where: Row, sort: SortKey, after: Any, limit: int) -> list[Row] | None:
        """The first rows of these times.

        None when they are too few, for some went meanwhile, or others of the same moment are on the page before.
        """
        those = {"$and": [{"deleted": False, "c": {"$in": list(set(moments))}}, where]}
        if after is not None:
            those = {"$and": [those, _mql.behind(sort, after)]}
        order = {"c": _direction(sort), "o": _direction(sort)}
        rows = await self._find(those, SHOWN, order, limit, TIME_INDEX)
        return rows if len(rows) == limit or len(moments) < limit else None

    async def _find(
        self, where: Row, shown: Row, order: dict[str, int], limit: int, index: str | None = None, seconds: float = SECONDS
    ) -> list[Row]:
        datafiles = await self._datafiles()
        found = datafiles.find(where, shown, limit=limit, batch_size=limit, hint=index, max_time_ms=round(seconds * 1000))
        rows = await (found.sort(order) if order else found).to_list()
        for row in rows:
            row["place"] = row.get("o")
        return rows


def _in_order(rows: list[Row], sort: SortKey) -> list[Row]:
    return sorted(rows, key=lambda row: bytes(row["o"]), reverse=sort.descending)


def _direction(sort: SortKey) -> int:
    return -1 if sort.descending else 1


def _behind(keys: list[Row], after: Any, sort: SortKey) -> list[int]:
    """The times that are not before the beginning of the page."""
    if after is None:
        return [key["c"] for key in keys]
    start = created_of(after)
    return [key["c"] for key in keys if (key["c"] <= start if sort.descending else key["c"] >= start)]
