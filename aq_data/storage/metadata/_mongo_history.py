"""The history of records on MongoDB: the newest change stands in the record's document, the older ones in `changes`.

There each is under (id, revision). It is copied there before the next one may replace it in the document, so what lies there
was true, and nothing is missing behind the record.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from pymongo.asynchronous.collection import AsyncCollection

from aq_data.models.datafile import DataFileId
from aq_data.models.history import Change
from aq_data.storage.metadata.store import CHANGES_BYTES

__all__ = ["Changes"]

T = TypeVar("T")
Row = dict[str, Any]


class Database(Protocol):
    """What the history needs of the store."""

    async def collection(self, name: str) -> AsyncCollection[Row]: ...

    async def again(self, write: Callable[[], Awaitable[T]]) -> T: ...


class Changes:
    """Keeps and lists them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def move(self, id: DataFileId, revision: int, row: Row) -> None:
        """Keep the change that stands in `row`, the document of a record of that revision, which is to be replaced."""
        if "change" in row:
            changes = await self._database.collection("changes")
            key, change = _key(id, revision), {"$setOnInsert": {"change": row["change"]}}
            await self._database.again(lambda: changes.update_one({"_id": key}, change, upsert=True))

    async def listed(self, id: DataFileId, limit: int, before: int | None) -> list[Change]:
        """`MetadataStore.changes`."""
        datafiles, changes = await self._database.collection("datafiles"), await self._database.collection("changes")
        found: list[Change] = []
        size = 0
        # All but the newest were moved before that one could be written.
        newest = await datafiles.find_one({"_id": id}, {"change": 1, "revision": 1}) or {}
        last = newest.get("revision", 0)
        if "change" in newest and (before is None or last < before) and limit:
            found.append(msgspec.json.decode(newest["change"], type=Change))
            size = len(newest["change"])
        if limit <= len(found):
            return found
        behind = {"_id": {"$gt": f"{id}/", "$lt": _key(id, last if before is None else min(before, last))}}
        async with changes.find(behind, batch_size=10).sort("_id", -1).limit(limit - len(found)) as rows:
            async for row in rows:
                size += len(row["change"])
                if found and size > CHANGES_BYTES:
                    break
                found.append(msgspec.json.decode(row["change"], type=Change))
        return found


def _key(id: DataFileId, revision: int) -> str:
    return f"{id}/{revision:016}"
