"""Blocks of sweeps on MongoDB: a document each, under sweep, attempt of the opening and position. `_mongo_sweeps` says when.

Only `_id` is indexed, and a sweep's blocks lie together in it. `by` is the mark of the append that put a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import BulkWriteError

from aq_data.models.datafile import DataFileId
from aq_data.models.sweep import Plan
from aq_data.storage.metadata._mongo_tries import again
from aq_data.storage.metadata.sweeplog import Row

__all__ = ["Blocks", "Fields", "position_of"]

T = TypeVar("T")
Fields = dict[str, Any]

DUPLICATE_KEY = 11000
LAST = 10**16 - 1


class Database(Protocol):
    """What the blocks need of the store."""

    async def collection(self, name: str) -> AsyncCollection[Fields]: ...


class Blocks:
    """Puts, reads and removes; which of them are real is for the state of the sweep to say."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, plan: Plan, rows: Sequence[Row], mark: bytes) -> bool:
        """Put blocks in their places; False, leaving none, when another's stands in one of them."""
        blocks = await self._database.collection("blocks")
        documents = [
            {
                "_id": _key(plan.id, plan.attempt, row.placed.seq),
                "header": msgspec.json.encode(row.placed),
                "size": sum(region.nbytes for region in row.placed.variables),
                "payload": row.payload,
                "ref": row.ref,
                "by": mark,
            }
            for row in rows
        ]

        async def attempt() -> bool:
            try:
                await blocks.insert_many(documents, ordered=False)
            except BulkWriteError as exc:
                if any(error["code"] != DUPLICATE_KEY for error in (exc.details or {}).get("writeErrors", ())):
                    raise
                # Its own, when the first try had no answer.
                mine = {"_id": {"$in": [document["_id"] for document in documents]}, "by": mark}
                return await blocks.count_documents(mine) == len(documents)
            return True

        is_put = await again(attempt)
        if not is_put:
            await self.remove(plan, rows[0].placed.seq - 1, marks=[mark])
        return is_put

    async def marks(self, plan: Plan, after: int) -> list[bytes]:
        """The marks of the blocks behind a position."""
        blocks = await self._database.collection("blocks")
        return list({row["by"] async for row in blocks.find(_range(plan, after), {"by": 1})})

    async def read(
        self, plan: Plan, after: int, through: int, limit_bytes: int | None, fields: Sequence[str]
    ) -> list[Fields]:
        """Blocks behind `after` up to `through`, in order; of `limit_bytes` the first ones, at least one."""
        rows: list[Fields] = []
        size = 0
        if through > after:
            blocks = await self._database.collection("blocks")
            async with blocks.find(_range(plan, after, through), list(fields)).sort("_id", 1) as found:
                async for row in found:
                    size += row.get("size", 0)
                    if rows and limit_bytes is not None and size > limit_bytes:
                        break
                    rows.append(row)
        return rows

    async def size(self, plan: Plan, after: int, through: int) -> int:
        """Bytes of the values in them."""
        if through <= after:
            return 0
        blocks = await self._database.collection("blocks")
        total = {"$group": {"_id": None, "size": {"$sum": "$size"}}}
        rows = await (await blocks.aggregate([{"$match": _range(plan, after, through)}, total])).to_list()
        return int(rows[0]["size"]) if rows else 0

    async def remove(self, plan: Plan, after: int, through: int = LAST, marks: list[bytes] | None = None) -> None:
        """Remove the blocks behind `after` up to `through`, or those of them with one of the marks."""
        await self._remove({**_range(plan, after, through), **({} if marks is None else {"by": {"$in": marks}})})

    async def remove_all(self, id: DataFileId) -> None:
        """Every block under an id, of any opening."""
        await self._remove({"_id": {"$gt": f"{id}/", "$lt": f"{id}0"}})  # 0 follows /

    async def _remove(self, where: Fields) -> None:
        blocks = await self._database.collection("blocks")
        await again(lambda: blocks.delete_many(where))


def position_of(row: Fields) -> int:
    """The position of a block that `read` gave."""
    return int(row["_id"][-16:])


def _key(id: DataFileId, attempt: str, seq: int) -> str:
    return f"{id}/{attempt}/{seq:016}"


def _range(plan: Plan, after: int, through: int = LAST) -> Fields:
    return {"_id": {"$gt": _key(plan.id, plan.attempt, after), "$lte": _key(plan.id, plan.attempt, through)}}
