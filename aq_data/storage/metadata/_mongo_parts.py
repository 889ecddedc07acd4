"""Large values of records on MongoDB, apart from the documents that name them: no document comes near 16 MB.

    _id     id of the DataFile / key / name of the value / number of the piece
    data    a piece of it
    at      when it was put there

What a document has `apart` is the key, made for one write and known to no other, and the size of each value under it:
`document` and `change` of the record, `plan` of its sweep. The pieces are put first, and published unless the key was
barred, as blobs are. They never change.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from pymongo.asynchronous.collection import AsyncCollection

from aq_data.errors import CorruptionError
from aq_data.models.datafile import DataFileId
from aq_data.storage.metadata._mongo_tries import again

__all__ = ["APART_BYTES", "Parts", "Place"]

T = TypeVar("T")
Row = dict[str, Any]

APART_BYTES = 256 << 10
"""Values of more bytes are kept apart."""
PIECE_BYTES = 4 << 20


class Place(NamedTuple):
    """Where the pieces of a value lie."""

    id: DataFileId
    key: str
    name: str

    @property
    def range(self) -> Row:
        prefix = "/".join(self)
        return {"$gt": f"{prefix}/", "$lt": f"{prefix}0"}  # 0 follows /


class Database(Protocol):
    """What the parts need of the store."""

    async def collection(self, name: str) -> AsyncCollection[Row]: ...

    async def mark(self, id: DataFileId, change: Row) -> None: ...


class Parts:
    """Puts, reads and removes them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, id: DataFileId, key: str, values: Mapping[str, bytes]) -> Row:
        """Put values under a fresh key; what a document has `apart` then."""
        parts, at = await self._database.collection("parts"), time.time()
        rows = [
            {"_id": f"{id}/{key}/{name}/{start // PIECE_BYTES:04}", "data": value[start : start + PIECE_BYTES], "at": at}
            for name, value in values.items()
            for start in range(0, len(value), PIECE_BYTES)
        ]

        for row in rows:
            await again(lambda: parts.replace_one({"_id": row["_id"]}, row, upsert=True))  # noqa: B023
        return {"key": key, **{name: len(value) for name, value in values.items()}}

    async def read(self, id: DataFileId, apart: Row, name: str) -> bytes:
        """A value that a document has apart; CorruptionError when it is not there, or not whole."""
        parts, place = await self._database.collection("parts"), Place(id, apart["key"], name)
        value = b"".join([row["data"] async for row in parts.find({"_id": place.range}, sort=[("_id", 1)])])
        if len(value) != apart[name]:
            raise CorruptionError(f"{'/'.join(place)} is missing from the database")
        return value

    async def fill(self, rows: Sequence[Row]) -> None:
        """Put into rows of `datafiles` the documents that they have apart."""
        for row in rows:
            if "document" in row.get("apart", ()):
                row["document"] = await self.read(row["_id"], row["apart"], "document")

    async def remove(self, place: Place) -> None:
        """Remove what no document names, nor ever will."""
        parts = await self._database.collection("parts")
        await again(lambda: parts.delete_many({"_id": place.range}))

    async def leftovers(self, older_than: float, delete: bool) -> AsyncIterator[tuple[Place, int, float]]:
        """What no document names, with its size and its age in seconds; with `delete` it is barred and removed."""
        parts, latest = await self._database.collection("parts"), time.time() - older_than
        fields = {"at": 1, "size": {"$binarySize": "$data"}}
        sizes: Counter[Place] = Counter()
        newest = dict[Place, float]()
        async for row in parts.find({}, fields):
            place = Place(*row["_id"].split("/")[:3])
            sizes[place] += row["size"]
            newest[place] = max(row["at"], newest.get(place, 0.0))
        for place, size in sizes.items():
            if newest[place] > latest or await self._is_named(place):
                continue
            if delete:
                await self._database.mark(place.id, {"$addToSet": {"barred": place.key}})
                if await self._is_named(place):
                    continue
                await self.remove(place)
            yield place, size, max(0.0, time.time() - newest[place])

    async def _is_named(self, place: Place) -> bool:
        datafiles, changes = await self._database.collection("datafiles"), await self._database.collection("changes")
        row = await datafiles.find_one({"_id": place.id}, {"apart": 1, "sweep.apart": 1}) or {}
        known = (row.get("apart", {}), row.get("sweep", {}).get("apart", {}))
        if any(apart.get("key") == place.key and place.name in apart for apart in known):
            return True
        # A change is copied to the older ones before it leaves the record, so it is looked for there second.
        older = {"_id": {"$gt": f"{place.id}/", "$lt": f"{place.id}0"}, "apart.key": place.key}
        return place.name == "change" and await changes.find_one(older, {"_id": 1}) is not None
