"""Snapshots of instruments on MongoDB: a document each, to which records refer, and which is found by terms of its own.

    _id       the hash
    t, x      its terms and long texts, named as those of a record
    content   the instruments as JSON, in zlib
    size      bytes of that JSON
    at        when it was put there
    leaving   the mark of a `gc` that is about to remove it

A record claims a snapshot in its own document (`holds`) before it makes sure that the snapshot is there, and is published
only while the claim stands. Who removes one first marks it as leaving, then takes away the claims of what is not published;
one that comes after the mark sees it, and takes it off again (docs/decisions/0014).
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import bson
import msgspec
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import DuplicateKeyError

from aq_data.errors import CorruptionError, TooLargeError
from aq_data.models.datafile import DataFile
from aq_data.models.matching import Facts, matches
from aq_data.models.paths import SortKey
from aq_data.models.query import Node
from aq_data.models.snapshots import SNAPSHOT_BYTES, Snapshot, joined_json, separated, snapshot_document
from aq_data.models.terms import KIND_ORDER, Kind
from aq_data.storage.metadata import _mql
from aq_data.storage.metadata._mongo_records import field_of, found_by, make_mark

__all__ = ["Snapshots"]

T = TypeVar("T")
Row = dict[str, Any]

DOCUMENT_BYTES = (16 << 20) - (64 << 10)
CACHED_BYTES = 32 << 20
"""Contents kept in memory: what a hash stands for never changes."""
BATCH = 1000


class Database(Protocol):
    """What the snapshots need of the store."""

    async def collection(self, name: str) -> AsyncCollection[Row]: ...

    async def again(self, write: Callable[[], Awaitable[T]]) -> T: ...

    async def keep_kinds(self, quantities: Collection[tuple[str, Kind]]) -> None: ...


class Snapshots:
    """Puts, reads, finds and removes them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._contents: OrderedDict[str, bytes] = OrderedDict()
        self._cached_bytes = 0

    # --- putting and reading -----------------------------------------------------------------------------------------

    async def put(self, snapshot: Snapshot) -> None:
        """Make sure that a snapshot is there and stays, which its claim must stand for already.

        TooLargeError when it, or what it is found by, is too large for one document.
        """
        snapshots = await self._database.collection("snapshots")
        if await snapshots.find_one({"_id": snapshot.hash, "leaving": {"$exists": False}}, {"_id": 1}) is not None:
            return
        row, quantities = await asyncio.to_thread(_row_of, snapshot)
        await self._database.keep_kinds(quantities)
        change = {"$setOnInsert": row, "$unset": {"leaving": ""}}

        async def attempt() -> None:
            try:
                await snapshots.update_one({"_id": snapshot.hash}, change, upsert=True)
            except DuplicateKeyError:  # another put it at the same moment, whole
                await snapshots.update_one({"_id": snapshot.hash}, change, upsert=True)

        await self._database.again(attempt)

    async def contents(self, hashes: Iterable[str]) -> dict[str, bytes]:
        """The instruments, as JSON, of those that are there."""
        wanted = set(hashes)
        found = {hash: self._contents[hash] for hash in wanted & self._contents.keys()}
        missing = sorted(wanted - found.keys())
        if missing:
            snapshots = await self._database.collection("snapshots")
            async for row in snapshots.find({"_id": {"$in": missing}}, {"content": 1}):
                found[row["_id"]] = content = zlib.decompress(row["content"])
                self._remember(row["_id"], content)
        for hash in found.keys() & self._contents.keys():
            self._contents.move_to_end(hash)
        return found

    async def content(self, hash: str) -> bytes:
        """The instruments of one; CorruptionError when it is not there."""
        found = await self.contents([hash])
        if hash not in found:
            raise CorruptionError(f"the snapshot {hash} of the instruments is missing from the database")
        return found[hash]

    def _remember(self, hash: str, content: bytes) -> None:
        if hash not in self._contents and len(content) <= CACHED_BYTES // 2:
            self._contents[hash] = content
            self._cached_bytes += len(content)
        while self._cached_bytes > CACHED_BYTES:
            self._cached_bytes -= len(self._contents.popitem(last=False)[1])

    async def joined(self, rows: Sequence[Row]) -> list[msgspec.Raw]:
        """The whole documents of rows (document, snapshot). CorruptionError when a snapshot is not there."""
        contents = await self.contents(row["snapshot"] for row in rows if "snapshot" in row)
        return [
            joined_json(row["document"], contents.get(row["snapshot"]) or await self.content(row["snapshot"]))
            if "snapshot" in row
            else msgspec.Raw(row["document"])
            for row in rows
        ]

    # --- finding -----------------------------------------------------------------------------------------------------

    async def matching(
        self, node: Node, limit: int, seconds: float, among: Collection[str] | None = None
    ) -> list[str] | None:
        """The hashes of those that match, of all or `among` some; None when there are more than `limit`."""
        snapshots = await self._database.collection("snapshots")
        where = _mql.compile_filter(node)
        if among is not None:
            where = {"$and": [{"_id": {"$in": list(among)}}, where]}
        rows = snapshots.find(where, {"_id": 1}, limit=limit + 1).max_time_ms(round(seconds * 1000))
        found = [row["_id"] async for row in rows]
        if len(found) > limit:
            return None
        if _mql.is_exact(node):
            return found
        judged: list[str] = []
        for hash in found:  # one by one: each may be large
            content = (await self.contents([hash])).get(hash)
            if content is not None and matches(node, Facts(snapshot_document(content))):
                judged.append(hash)
        return judged

    async def have(self, path: str) -> bool:
        """Whether in any of them something stands at a path that has an order."""
        snapshots = await self._database.collection("snapshots")
        some = {"$or": [{f"t.{field_of(path, kind)}": {"$exists": True}} for kind in KIND_ORDER]}
        return await snapshots.find_one(some, {"_id": 1}) is not None

    async def places(self, sort: SortKey, hashes: Collection[str]) -> dict[str, tuple[int, Any]]:
        """Rank and value by which records are sorted at a path inside, for those that have one."""
        best = max if sort.descending else min
        listed = await self.values(sort.path, tuple(KIND_ORDER), hashes)
        return {hash: best((KIND_ORDER[kind], value) for kind, value in values) for hash, values in listed.items()}

    async def values(self, path: str, kinds: Sequence[Kind], hashes: Collection[str]) -> dict[str, list[tuple[Kind, Any]]]:
        """The values at a path, each with its kind, of those that have any."""
        snapshots = await self._database.collection("snapshots")
        names = {field_of(path, kind): kind for kind in kinds}
        fields = {f"t.{name}": 1 for name in names}
        some = {"$or": [{field: {"$exists": True}} for field in fields]}
        found: dict[str, list[tuple[Kind, Any]]] = {}
        listed = list(hashes)
        for first in range(0, len(listed), BATCH):
            where = {"_id": {"$in": listed[first : first + BATCH]}, **some}
            async for row in snapshots.find(where, fields):
                found[row["_id"]] = [(names[name], value) for name, given in row["t"].items() for value in _listed(given)]
        return found

    # --- removing ----------------------------------------------------------------------------------------------------

    async def used(self) -> set[str]:
        """The hashes of all that records have; of those too that an older version left whole in their document."""
        datafiles = await self._database.collection("datafiles")
        found = {row["_id"] async for row in await datafiles.aggregate([{"$group": {"_id": "$snapshot"}}])} - {None}
        large = {"snapshot": {"$exists": False}, "$expr": {"$gte": [{"$binarySize": "$document"}, SNAPSHOT_BYTES]}}
        async for row in datafiles.find({"document": {"$exists": True}, **large}, {"document": 1}):
            snapshot = separated(msgspec.json.decode(row["document"], type=DataFile))[1]
            found |= set() if snapshot is None else {snapshot.hash}
        return found

    async def unclaimed(self, older_than: float) -> AsyncIterator[tuple[str, int, float]]:
        """Hash, size and age in seconds of each, at least so old, that no record has at this moment."""
        snapshots, datafiles = await self._database.collection("snapshots"), await self._database.collection("datafiles")
        latest, after = time.time() - older_than, ""
        while True:
            batch = await snapshots.find(
                {"_id": {"$gt": after}}, {"size": 1, "at": 1}, sort=[("_id", 1)], limit=BATCH
            ).to_list()
            if not batch:
                return
            after = batch[-1]["_id"]
            old = {row["_id"]: row for row in batch if row["at"] <= latest}
            having = datafiles.find({"holds": {"$in": list(old)}}, {"snapshot": 1})
            used = {row.get("snapshot") async for row in having}
            for hash, row in old.items():
                if hash not in used:
                    yield hash, row["size"], max(0.0, time.time() - row["at"])

    async def remove(self, hash: str) -> bool:
        """Remove one unless a record has it, or claims it in time; whether it is gone."""
        snapshots, datafiles = await self._database.collection("snapshots"), await self._database.collection("datafiles")
        mark = make_mark()
        await snapshots.update_one({"_id": hash}, {"$set": {"leaving": mark}})
        holders: list[Row] = await datafiles.find({"holds": hash}, {"snapshot": 1}).to_list()
        if not any(row.get("snapshot") == hash for row in holders):
            for row in holders:
                await datafiles.update_one({"_id": row["_id"], "snapshot": {"$ne": hash}}, {"$pull": {"holds": hash}})
            if await datafiles.find_one({"holds": hash}, {"_id": 1}) is None:
                gone = await snapshots.delete_one({"_id": hash, "leaving": mark})
                return bool(gone.deleted_count)
        await snapshots.update_one({"_id": hash, "leaving": mark}, {"$unset": {"leaving": ""}})
        return False


def _row_of(snapshot: Snapshot) -> tuple[Row, frozenset[tuple[str, Kind]]]:
    found = found_by(snapshot_document(snapshot.content), f"the snapshot {snapshot.hash}")
    content = zlib.compress(snapshot.content, 1)
    row: Row = {"t": found.terms, "x": found.texts, "content": content, "size": len(snapshot.content), "at": time.time()}
    size = len(bson.encode(row))
    if size > DOCUMENT_BYTES:
        raise TooLargeError(
            f"the instruments have {len(snapshot.content)} bytes, and {size} with what they are found by; MongoDB takes "
            f"{DOCUMENT_BYTES}: keep long lists and programs of instruments as arrays or attached files",
            limit=DOCUMENT_BYTES,
        )
    return row, found.quantities


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
