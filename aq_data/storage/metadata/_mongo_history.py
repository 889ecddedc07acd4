"""The history of records on MongoDB: the newest change stands in the record's document, the older ones in `changes`.

There each is under (id, revision). It is copied there before the next one may replace it in the document, so what lies there
was true, and nothing is missing behind the record.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import msgspec
from pymongo.asynchronous.collection import AsyncCollection

from aq_data.models.datafile import DataFileId
from aq_data.models.history import Change
from aq_data.storage.metadata._mongo_parts import Parts
from aq_data.storage.metadata._mongo_tries import again
from aq_data.storage.metadata.store import CHANGES_BYTES

__all__ = ["Changes"]

T = TypeVar("T")
Row = dict[str, Any]


class Database(Protocol):
    """What the history needs of the store."""

    async def collection(self, name: str) -> AsyncCollection[Row]: ...


class Changes:
    """Keeps and lists them."""

    def __init__(self, database: Database, parts: Parts) -> None:
        self._database, self._parts = database, parts

    async def move(self, id: DataFileId, revision: int, row: Row) -> None:
        """Keep the change that stands in `row`, the document of a record of that revision, which is to be replaced."""
        kept = _kept(row)
        if kept:
            changes = await self._database.collection("changes")
            key, change = _key(id, revision), {"$setOnInsert": kept}
            await again(lambda: changes.update_one({"_id": key}, change, upsert=True))

    async def listed(self, id: DataFileId, limit: int, before: int | None) -> list[Change]:
        """`MetadataStore.changes`."""
        datafiles, changes = await self._database.collection("datafiles"), await self._database.collection("changes")
        found: list[Change] = []
        size = 0
        # All but the newest were moved before that one could be written.
        newest = await datafiles.find_one({"_id": id}, {"change": 1, "apart": 1, "revision": 1}) or {}
        last = newest.get("revision", 0)
        if _kept(newest) and (before is None or last < before) and limit:
            found.append(await self._read(id, newest))
            size = _size(newest)
        if limit <= len(found):
            return found
        behind = {"_id": {"$gt": f"{id}/", "$lt": _key(id, last if before is None else min(before, last))}}
        async with changes.find(behind, batch_size=10).sort("_id", -1).limit(limit - len(found)) as rows:
            async for row in rows:
                size += _size(row)
                if found and size > CHANGES_BYTES:
                    break
                found.append(await self._read(id, row))
        return found

    async def _read(self, id: DataFileId, row: Row) -> Change:
        change = row["change"] if "change" in row else await self._parts.read(id, row["apart"], "change")
        return msgspec.json.decode(change, type=Change)


def _kept(row: Row) -> Row:
    """Where the change of a document stands: in itself, or apart; nothing when it has none."""
    if "change" in row:
        return {"change": row["change"]}
    apart = row.get("apart", {})
    return {"apart": {name: apart[name] for name in ("key", "change")}} if "change" in apart else {}


def _size(row: Row) -> int:
    return len(row["change"]) if "change" in row else int(row["apart"]["change"])


def _key(id: DataFileId, revision: int) -> str:
    return f"{id}/{revision:016}"
