"""The metadata store on MongoDB: any number of servers on one database, a replica set or a sharded cluster.

Every step changes one document, so it is atomic without transactions, on any number of shards; the shard key is `_id`. What
is acknowledged is on disk of most members and found by the next question on any server (docs/decisions/0008).

- `insert` and `bar` compete for the document under the DataFile's id. `bar` adds the key to its `barred`, making a document
  of nothing else where there is none; `insert` fills a document that is absent or has nothing else, if its attempt is not
  barred. Whichever comes second sees the first.
- `replace` is a compare-and-set of `revision`, which also looks at `barred`. The change stands in the document itself until
  the next one replaces it; before that it is copied to `changes`, where so only what was true is found.
- Steps of sweeps: see `_mongo_sweeps`.

When no answer comes to a write, it is tried again, and a mark that only this call could have made (`attempt`, `by`) tells
whether the first one counted. If that can no longer be told it is UnavailableError: read again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from pymongo import AsyncMongoClient, IndexModel, ReadPreference, UpdateOne
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import ConnectionFailure, DuplicateKeyError, ServerSelectionTimeoutError

from aq_data.errors import ConfigError, UnavailableError
from aq_data.models.datafile import FORMAT, DataFileId
from aq_data.models.history import Change
from aq_data.models.paths import SortKey
from aq_data.models.query import Node
from aq_data.models.stores import AddedStore
from aq_data.storage.metadata._mongo_border import border, open_client, taken_pid
from aq_data.storage.metadata._mongo_questions import Questions
from aq_data.storage.metadata._mongo_records import INDEXES, SCHEMA_VERSION, Stored, make_mark, read_record, stored
from aq_data.storage.metadata._mongo_stores import change_store, is_stored, read_stores
from aq_data.storage.metadata._mongo_sweeps import MongoSweeps
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import CHANGES_BYTES, MetadataStore, Page, Token
from aq_data.storage.metadata.sweeplog import SweepLog

__all__ = ["MongoStore"]

T = TypeVar("T")
Row = dict[str, Any]

TRIES = 4
PAUSE = 0.2
"""Seconds before the second try; each further pause is twice as long. An election takes the driver's own waiting besides."""
SCANNED = 200


class MongoStore(MetadataStore):
    """Connects when first used. `url` may hold a password and is never shown; TLS and X.509 are options of it."""

    def __init__(self, url: str, database: str = "aq_data") -> None:
        self._client: AsyncMongoClient[Row] = open_client(url)
        self._name = database
        self._opening = asyncio.Lock()
        self._database: AsyncDatabase[Row] | None = None
        self._known_quantities: set[tuple[str, str]] = set()
        self._questions = Questions(self.collection)
        self._sweeps = MongoSweeps(self)

    async def collection(self, name: str) -> AsyncCollection[Row]:
        """A collection of the database, which is made ready when first asked for."""
        if self._database is None:
            async with self._opening:
                if self._database is None:
                    self._database = await self._prepared()
        return self._database[name]

    async def _prepared(self) -> AsyncDatabase[Row]:
        # Whatever the address says: a member that lags behind would not have what was acknowledged.
        database = self._client.get_database(self._name, read_preference=ReadPreference.PRIMARY)
        with border():
            versions = {"version": SCHEMA_VERSION, "format": FORMAT}
            await database["meta"].update_one({"_id": "schema"}, {"$setOnInsert": versions}, upsert=True)
            found = await database["meta"].find_one({"_id": "schema"}) or {}
            for key, known in versions.items():
                if found[key] > known:
                    raise ConfigError(
                        f"the database {self._name!r} is of {key} {found[key]}, this aq-data reads {known}; use the one "
                        "that made it"
                    )
            await database["datafiles"].create_indexes(
                [IndexModel(keys, name=name, **options) for name, keys, options in INDEXES]
            )
            await database["tokens"].create_index([("hash", 1)], name="hash", unique=True)
            await database["kinds"].create_index([("path", 1)], name="path")
        return database

    @property
    def sweeps(self) -> SweepLog:
        return self._sweeps

    # --- writing ---------------------------------------------------------------------------------------------------

    async def again(self, write: Callable[[], Awaitable[T]]) -> T:
        """The answer of a write that does no harm when it is done twice."""
        for pause in pauses():
            try:
                return await write()
            except ServerSelectionTimeoutError:
                raise
            except ConnectionFailure:
                if pause is None:
                    raise
                await asyncio.sleep(pause)
        raise AssertionError("the last pause is None")

    async def insert(self, record: Record) -> Record | None:
        return await self.publish(record, {})

    async def publish(self, record: Record, more: Row, keys: tuple[str, ...] = ()) -> Record | None:
        """`insert` with further fields, and with further keys that must not be barred."""
        datafiles, kept = await self.collection("datafiles"), await self.kept(record)
        id, keys = record.document.id, (record.attempt, *keys)
        absent = {"_id": id, "deleted": {"$exists": False}, "barred": {"$nin": list(keys)}}
        change = {"$set": {**kept.fields, **more, "by": make_mark()}}
        was_cut_off = False
        with border():
            for pause in pauses():
                try:
                    await datafiles.update_one(absent, change, upsert=True)
                    return None
                except DuplicateKeyError as exc:
                    found = await datafiles.find_one({"_id": id})
                    if taken_pid(exc) is not None and (found is None or "deleted" not in found):
                        raise
                except ServerSelectionTimeoutError:
                    raise
                except ConnectionFailure:
                    if pause is None:
                        raise
                    was_cut_off, found = True, None
                if found is not None and "deleted" in found:
                    is_mine = was_cut_off and found["attempt"] == record.attempt
                    return None if is_mine else read_record(found)
                if found is not None:
                    check_not_barred(found, keys)
                await asyncio.sleep(pause or 0.0)
        raise UnavailableError(f"the DataFile {id} is being written by many at once; send it again")

    async def replace(self, record: Record, expected_revision: int, publishes: str = "") -> bool:
        document = record.document
        if document.sweep is not None and document.state == "open":
            return await self._sweeps.replace(record, expected_revision, publishes)
        datafiles, kept, mark = await self.collection("datafiles"), await self.kept(record, expected_revision), make_mark()
        wanted = {"_id": document.id, "revision": expected_revision, "barred": {"$ne": publishes}}
        was_cut_off = False
        with border():
            for pause in pauses():
                try:
                    change = {"$set": {**kept.fields, "by": mark}, "$unset": kept.removed}
                    if (await datafiles.update_one(wanted, change)).matched_count:
                        return True
                except ServerSelectionTimeoutError:
                    raise
                except ConnectionFailure:
                    if pause is None:
                        raise
                    was_cut_off = True
                    await asyncio.sleep(pause)
                found = await datafiles.find_one({"_id": document.id}, {"revision": 1, "by": 1, "barred": 1})
                if found is None or found.get("revision", 0) < expected_revision:
                    return False
                if found["by"] == mark:
                    return True
                if found["revision"] != expected_revision:
                    if was_cut_off and found["revision"] > document.revision:
                        break
                    return False
                check_not_barred(found, (publishes,))
        raise UnavailableError(f"whether the change of {document.id} was made cannot be told; read it again")

    async def kept(self, record: Record, replaced: int | None = None) -> Stored:
        """The form in which a record is stored; before that, the dimensions of its quantities are.

        When it is to replace a revision, the change that stands there is moved to the others first.
        """
        kept = stored(record)
        with border():
            new = kept.quantities - self._known_quantities
            if new:
                kinds = await self.collection("kinds")
                rows = [
                    UpdateOne({"_id": f"{path}\0{kind}"}, {"$setOnInsert": {"path": path, "kind": kind}}, upsert=True)
                    for path, kind in sorted(new)
                ]
                await self.again(lambda: kinds.bulk_write(rows, ordered=False))
                self._known_quantities |= new
            if replaced is not None:
                await self._move_change(record.document.id, replaced)
        return kept

    async def _move_change(self, id: DataFileId, revision: int) -> None:
        datafiles, changes = await self.collection("datafiles"), await self.collection("changes")
        row = await datafiles.find_one({"_id": id, "revision": revision, "change": {"$exists": True}}, {"change": 1})
        if row is not None:
            key, change = _change_key(id, revision), {"$setOnInsert": {"change": row["change"]}}
            await self.again(lambda: changes.update_one({"_id": key}, change, upsert=True))

    async def bar(self, id: DataFileId, key: str) -> None:
        datafiles = await self.collection("datafiles")
        with border():
            for pause in pauses():
                try:
                    change = {"$addToSet": {"barred": key}}
                    await self.again(lambda: datafiles.update_one({"_id": id}, change, upsert=True))  # noqa: B023
                    return
                except DuplicateKeyError:  # another made the document meanwhile
                    if pause is None:
                        raise

    # --- reading ---------------------------------------------------------------------------------------------------

    async def get(self, id: DataFileId) -> Record | None:
        datafiles = await self.collection("datafiles")
        with border():
            row = await datafiles.find_one({"_id": id}, {"document": 1, "attempt": 1, "digest": 1})
        return None if row is None or "document" not in row else read_record(row)

    async def changes(self, id: DataFileId, limit: int, before: int | None = None) -> list[Change]:
        datafiles, changes = await self.collection("datafiles"), await self.collection("changes")
        found: list[Change] = []
        size = 0
        with border():
            # All but the newest were moved before that one could be written.
            newest = await datafiles.find_one({"_id": id}, {"change": 1, "revision": 1}) or {}
            last = newest.get("revision", 0)
            if "change" in newest and (before is None or last < before) and limit:
                found.append(msgspec.json.decode(newest["change"], type=Change))
                size = len(newest["change"])
            if limit <= len(found):
                return found
            behind = {"_id": {"$gt": f"{id}/", "$lt": _change_key(id, last if before is None else min(before, last))}}
            async with changes.find(behind, batch_size=10).sort("_id", -1).limit(limit - len(found)) as rows:
                async for row in rows:
                    size += len(row["change"])
                    if found and size > CHANGES_BYTES:
                        break
                    found.append(msgspec.json.decode(row["change"], type=Change))
        return found

    async def search(self, node: Node, sort: SortKey, limit: int, cursor: str | None, include_deleted: bool = False) -> Page:
        return await self._questions.search(node, sort, limit, cursor, include_deleted)

    async def count(self, node: Node) -> int:
        return await self._questions.count(node)

    async def distinct(self, path: str, node: Node, limit: int) -> list[tuple[object, int]]:
        return await self._questions.distinct(path, node, limit)

    async def scan(self) -> AsyncIterator[Record]:
        datafiles = await self.collection("datafiles")
        fields = {"document": 1, "attempt": 1, "digest": 1}
        found = datafiles.find({"deleted": {"$in": [False, True]}}, fields, batch_size=SCANNED).sort("o", 1)
        with border():
            async for row in found:
                yield read_record(row)

    # --- tokens ----------------------------------------------------------------------------------------------------

    async def add_token(self, token: Token) -> None:
        tokens = await self.collection("tokens")
        row = {"hash": token.hash, "token": msgspec.json.encode(token), "revoked_at": token.revoked_at}
        with border():
            await self.again(lambda: tokens.update_one({"_id": token.id}, {"$setOnInsert": row}, upsert=True))

    async def find_token(self, hash: str) -> Token | None:
        tokens = await self.collection("tokens")
        with border():
            row = await tokens.find_one({"hash": hash})
        return None if row is None else _token(row)

    async def tokens(self) -> list[Token]:
        tokens = await self.collection("tokens")
        with border():
            return [_token(row) async for row in tokens.find().sort("_id", 1)]

    async def revoke_token(self, id: str, revoked_at: str) -> bool:
        tokens = await self.collection("tokens")
        with border():
            change = {"$set": {"revoked_at": revoked_at}}
            await self.again(lambda: tokens.update_one({"_id": id, "revoked_at": None}, change))
            return await tokens.find_one({"_id": id}, {"_id": 1}) is not None

    # --- stores ----------------------------------------------------------------------------------------------------

    async def added_stores(self) -> list[AddedStore]:
        stores = await self.collection("stores")
        with border():
            return await read_stores(stores)

    async def change_store(self, before: AddedStore | None, after: AddedStore | None) -> bool:
        stores, was_cut_off = await self.collection("stores"), False
        with border():
            for pause in pauses():
                try:
                    # The try that got no answer may have been the one that changed it.
                    return await change_store(stores, before, after) or (
                        was_cut_off and await is_stored(stores, before, after)
                    )
                except ServerSelectionTimeoutError:
                    raise
                except ConnectionFailure:
                    if pause is None:
                        raise
                    was_cut_off = True
                    await asyncio.sleep(pause)
        raise AssertionError("the last pause is None")

    async def lease(self, name: str, owner: str, now: float, until: float) -> bool:
        leases = await self.collection("leases")
        free = {"_id": name, "$or": [{"until": {"$lt": now}}, {"owner": owner}]}
        change = {"$set": {"owner": owner, "until": until}}
        with border():
            try:
                await self.again(lambda: leases.update_one(free, change, upsert=True))
            except DuplicateKeyError:
                return False
        return True

    async def check(self) -> None:
        meta = await self.collection("meta")
        with border():
            await meta.update_one({"_id": "check"}, {"$set": {"at": time.time()}}, upsert=True)

    async def close(self) -> None:
        await self._client.close()


def _change_key(id: DataFileId, revision: int) -> str:
    return f"{id}/{revision:016}"


def pauses() -> list[float | None]:
    """Before each further try so many seconds; None is the end."""
    return [*(PAUSE * 2**i for i in range(TRIES - 1)), None]


def check_not_barred(row: Row, keys: tuple[str, ...]) -> None:
    """UnavailableError when the document under this id bars one of the keys."""
    if not set(keys).isdisjoint(row.get("barred", ())):
        raise UnavailableError("what was sent was collected as an orphan before it was recorded; send it again")


def _token(row: Row) -> Token:
    return msgspec.structs.replace(msgspec.json.decode(row["token"], type=Token), revoked_at=row["revoked_at"])
