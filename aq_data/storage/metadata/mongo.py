"""The metadata store on MongoDB: any number of servers on one database, a replica set or a sharded cluster.

Every step changes one document, so it is atomic without transactions, on any number of shards; the shard key is `_id`. What
is acknowledged is on disk of most members and found by the next question on any server (docs/decisions/0008).

- `insert` and `bar` compete for the document under the DataFile's id. `bar` adds the key to its `barred`, making a document
  of nothing else where there is none; `insert` fills a document that is absent or has nothing else, if its attempt is not
  barred. Whichever comes second sees the first.
- `replace` is a compare-and-set of `revision`, which also looks at `barred`. The change stands in the document itself until
  the next one replaces it; before that it is copied to `changes`, where so only what was true is found.
- What a record has outside of its document, its pid and its snapshot, is claimed before it is published: `_mongo_claims`.
- Steps of sweeps: see `_mongo_sweeps`.

When no answer comes to a write, it is tried again, and a mark that only this call could have made (`attempt`, `by`) tells
whether the first one counted. If that can no longer be told it is UnavailableError: read again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import msgspec
from pymongo import AsyncMongoClient, ReadPreference
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import BulkWriteError, ConnectionFailure, DuplicateKeyError, PyMongoError, ServerSelectionTimeoutError

from aq_data.errors import CorruptionError, UnavailableError
from aq_data.models.datafile import DataFile, DataFileId
from aq_data.models.history import Change
from aq_data.models.paths import SortKey
from aq_data.models.query import Node
from aq_data.models.snapshots import joined, separated
from aq_data.models.stores import AddedStore
from aq_data.models.terms import Kind
from aq_data.storage.metadata._mongo_border import border, open_client
from aq_data.storage.metadata._mongo_claims import Claims
from aq_data.storage.metadata._mongo_history import Changes
from aq_data.storage.metadata._mongo_parts import APART_BYTES, Parts, Place
from aq_data.storage.metadata._mongo_questions import Questions
from aq_data.storage.metadata._mongo_records import LARGE_BYTES, Stored, claims_of, make_mark, stored
from aq_data.storage.metadata._mongo_schema import prepare
from aq_data.storage.metadata._mongo_snapshots import Snapshots
from aq_data.storage.metadata._mongo_stores import change_store, read_stores
from aq_data.storage.metadata._mongo_sweeps import MongoSweeps
from aq_data.storage.metadata._mongo_tokens import Tokens
from aq_data.storage.metadata._mongo_tries import again, pauses
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import Leftover, MetadataStore, Page, Token
from aq_data.storage.metadata.sweeplog import SweepLog

__all__ = ["MongoStore"]

T = TypeVar("T")
Row = dict[str, Any]

TRIES = 20
"""How often a record is claimed and published anew, when others, or `gc`, took away what it had claimed."""
PATIENCE = 0.02
"""Seconds in between, at random up to twice as many."""
OPEN_SECONDS = 20.0
"""For whoever asks while the database is made ready."""
KINDS_AT_ONCE = 2_000
DUPLICATE_KEY = 11000
SCANNED = 200
READ = {"document": 1, "snapshot": 1, "apart": 1, "attempt": 1, "digest": 1}
KNOWN = {**READ, "deleted": 1, "barred": 1}


class MongoStore(MetadataStore):
    """Connects when first used. `url` may hold a password and is never shown; TLS and X.509 are options of it."""

    def __init__(self, url: str, database: str = "aq_data") -> None:
        self._client: AsyncMongoClient[Row] = open_client(url)
        self._name = database
        self._opening: asyncio.Task[AsyncDatabase[Row]] | None = None
        self._database: AsyncDatabase[Row] | None = None
        self._known_quantities: set[tuple[str, str]] = set()
        self._parts = Parts(self)
        self._snapshots = Snapshots(self)
        self._claims = Claims(self, self._snapshots)
        self._changes = Changes(self, self._parts)
        self._questions = Questions(self.collection, self._snapshots, self._parts)
        self._sweeps = MongoSweeps(self)
        self._tokens = Tokens(self)

    async def collection(self, name: str) -> AsyncCollection[Row]:
        """A collection of the database, which is made ready when first asked for."""
        if self._database is None:
            # All who ask wait for one attempt, and hear of its failure together; the next who asks tries again.
            if self._opening is None:
                self._opening = asyncio.create_task(self._prepared())
                self._opening.add_done_callback(self._opened)
            try:
                async with asyncio.timeout(OPEN_SECONDS):
                    self._database = await asyncio.shield(self._opening)
            except TimeoutError as exc:  # it goes on: an index over many records takes minutes
                raise UnavailableError("the metadata database is being made ready; try again") from exc
        return self._database[name]

    def _opened(self, task: asyncio.Task[AsyncDatabase[Row]]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._opening = None

    async def _prepared(self) -> AsyncDatabase[Row]:
        # Whatever the address says: a member that lags behind would not have what was acknowledged.
        database = self._client.get_database(self._name, read_preference=ReadPreference.PRIMARY)
        with border():
            await prepare(database)
        return database

    @property
    def sweeps(self) -> SweepLog:
        return self._sweeps

    # --- writing ---------------------------------------------------------------------------------------------------

    async def insert(self, record: Record) -> Record | None:
        return await self.publish(record, {})

    async def publish(self, record: Record, more: Row, keys: tuple[str, ...] = ()) -> Record | None:
        """`insert` with further fields, and with further keys that must not be barred."""
        datafiles, kept = await self.collection("datafiles"), await self.kept(record)
        id, keys = record.document.id, (record.attempt, *keys, *kept.keys)
        absent = {"_id": id, "deleted": {"$exists": False}, "barred": {"$nin": list(keys)}, **kept.wanted}
        change = {"$set": {**kept.fields, **more, "by": make_mark()}}
        was_cut_off, pausing = False, pauses()
        with border():
            for _ in range(TRIES):
                # With claims the document stands there already; who has lost the race should not claim.
                found = await datafiles.find_one({"_id": id}, KNOWN) if kept.needs else None
                if found is None or "deleted" not in found:
                    await self.claim(id, kept)
                    try:
                        done = await datafiles.update_one(absent, change, upsert=not kept.needs)
                        if done.matched_count or done.upserted_id is not None:
                            return None
                    except DuplicateKeyError:
                        pass
                    except ServerSelectionTimeoutError:
                        raise
                    except ConnectionFailure:
                        pause = next(pausing)
                        if pause is None:
                            raise
                        was_cut_off = True
                        await asyncio.sleep(pause)
                        continue
                    found = await datafiles.find_one({"_id": id}, KNOWN)
                if found is not None and "deleted" in found:
                    is_mine = was_cut_off and found["attempt"] == record.attempt
                    if is_mine:
                        return None
                    if not was_cut_off:  # else what it put apart may yet be published, as far as it knows: for `gc`
                        await self._discard(id, kept)
                    return await self._read(found)
                if found is not None:
                    check_not_barred(found, keys)
                await asyncio.sleep(random.uniform(0.0, 2 * PATIENCE))  # noqa: S311
        raise UnavailableError(f"the DataFile {id} is being written by many at once; send it again")

    async def replace(self, record: Record, expected_revision: int, publishes: str = "") -> bool:
        document = record.document
        if document.sweep is not None and document.state == "open":
            return await self._sweeps.replace(record, expected_revision, publishes)
        datafiles, kept, mark = await self.collection("datafiles"), await self.kept(record, expected_revision), make_mark()
        barring = [publishes, *kept.keys]
        wanted = {"_id": document.id, "revision": expected_revision, "barred": {"$nin": barring}, **kept.wanted}
        was_cut_off = False
        with border():
            for pause in pauses():
                await self.claim(document.id, kept)
                try:
                    change = {"$set": {**kept.fields, "by": mark}, "$unset": kept.removed}
                    if (await datafiles.update_one(wanted, change)).matched_count:
                        await self.replaced(kept)
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
                    await self.replaced(kept)
                    return True
                if found["revision"] != expected_revision:
                    if was_cut_off and found["revision"] > document.revision:
                        break
                    return False
                check_not_barred(found, barring)
        raise UnavailableError(f"whether the change of {document.id} was made cannot be told; read it again")

    async def kept(self, record: Record, replaced: int | None = None) -> Stored:
        """The form in which a record is stored; before that, the dimensions of its quantities are.

        When it is to replace a revision, the change that stands there is moved to the others first. What that revision has
        need not be claimed.
        """
        document, snapshot = separated(record.document)
        encoded = msgspec.json.encode(document)
        if len(encoded) < LARGE_BYTES:
            kept = stored(record, encoded, snapshot)
        else:
            kept = await asyncio.to_thread(stored, record, encoded, snapshot)
        id = record.document.id
        with border():
            await self.keep_kinds(kept.quantities)
            kept = await self._put_apart(id, kept)
            if replaced is not None:
                datafiles = await self.collection("datafiles")
                fields = {"change": 1, "snapshot": 1, "pid": 1, "apart": 1}
                row = await datafiles.find_one({"_id": id, "revision": replaced}, fields)
                if row is not None:
                    await self._changes.move(id, replaced, row)
                # What is replaced by then has none of it, and is not replaced again.
                claimed = kept.needs if row is None else claims_of(row)
                apart = (row or {}).get("apart", {})
                before = Place(id, apart["key"], "document") if "document" in apart else None
                needs = tuple(key for key in kept.needs if key not in claimed)
                kept = dataclasses.replace(kept, needs=needs, replaces=before)
        return kept

    async def _put_apart(self, id: DataFileId, kept: Stored) -> Stored:
        large = {name: kept.fields[name] for name in ("document", "change") if len(kept.fields.get(name, b"")) > APART_BYTES}
        if not large:
            return dataclasses.replace(kept, removed={**kept.removed, "apart": ""})
        key = make_mark().hex()
        apart = await self._parts.put(id, key, large)
        fields = {name: value for name, value in kept.fields.items() if name not in large}
        removed = {**kept.removed, **dict.fromkeys(large, "")}
        return dataclasses.replace(kept, fields={**fields, "apart": apart}, removed=removed, keys=(key,))

    async def replaced(self, kept: Stored) -> None:
        """To be called when `kept` has taken the place of the record before."""
        if kept.replaces is not None:
            with suppress(PyMongoError):  # then it is for `gc`: the record is written
                await self._parts.remove(kept.replaces)

    async def _discard(self, id: DataFileId, kept: Stored) -> None:
        for key in kept.keys:
            await self._parts.remove(Place(id, key, "document"))

    async def put_apart(self, id: DataFileId, name: str, value: bytes) -> tuple[Row, str]:
        """Put a large value apart: where it lies, and the key that must not be barred when that is published."""
        with border():
            key = make_mark().hex()
            return await self._parts.put(id, key, {name: value}), key

    async def read_apart(self, id: DataFileId, apart: Row, name: str) -> bytes:
        """A value that was put apart."""
        return await self._parts.read(id, apart, name)

    async def claim(self, id: DataFileId, kept: Stored) -> None:
        """Before each attempt to write what `kept` gave; ConflictError when another record has its pid."""
        await self._claims.claim(id, kept)

    async def keep_kinds(self, quantities: Collection[tuple[str, Kind]]) -> None:
        """Note in which dimensions something is measured, before anything is found by it."""
        new = set(quantities) - self._known_quantities
        if new:
            kinds = await self.collection("kinds")
            rows = [{"_id": f"{path}\0{kind}", "path": path, "kind": kind} for path, kind in sorted(new)]
            for first in range(0, len(rows), KINDS_AT_ONCE):
                await again(partial(_add, kinds, rows[first : first + KINDS_AT_ONCE]))
            self._known_quantities |= new

    async def bar(self, id: DataFileId, key: str) -> None:
        with border():
            await self.mark(id, {"$addToSet": {"barred": key}})

    async def mark(self, id: DataFileId, change: Row) -> None:
        """Change the document under an id, which is made if need be: something that does no harm when it is done twice."""
        datafiles = await self.collection("datafiles")
        for pause in pauses():
            try:
                await again(lambda: datafiles.update_one({"_id": id}, change, upsert=True))
                return
            except DuplicateKeyError:  # another made the document meanwhile
                if pause is None:
                    raise

    # --- reading ---------------------------------------------------------------------------------------------------

    async def get(self, id: DataFileId) -> Record | None:
        datafiles = await self.collection("datafiles")
        with border():
            row = await datafiles.find_one({"_id": id}, READ)
            try:
                return None if row is None or "attempt" not in row else await self._read(row)
            except CorruptionError:  # or it was changed in between, and then its snapshot removed
                row = await datafiles.find_one({"_id": id}, READ)
                return None if row is None else await self._read(row)

    async def _read(self, row: Row) -> Record:
        """The record in a document of `datafiles`."""
        await self._parts.fill([row])
        document = msgspec.json.decode(row["document"], type=DataFile)
        content = await self._snapshots.content(row["snapshot"]) if "snapshot" in row else None
        return Record(joined(document, content), row["attempt"], row["digest"])

    async def changes(self, id: DataFileId, limit: int, before: int | None = None) -> list[Change]:
        with border():
            return await self._changes.listed(id, limit, before)

    async def search(self, node: Node, sort: SortKey, limit: int, cursor: str | None, include_deleted: bool = False) -> Page:
        return await self._questions.search(node, sort, limit, cursor, include_deleted)

    async def count(self, node: Node) -> int:
        return await self._questions.count(node)

    async def distinct(self, path: str, node: Node, limit: int) -> list[tuple[object, int]]:
        return await self._questions.distinct(path, node, limit)

    async def scan(self) -> AsyncIterator[Record]:
        datafiles = await self.collection("datafiles")
        found = datafiles.find({"deleted": {"$in": [False, True]}}, READ, batch_size=SCANNED).sort([("c", 1), ("o", 1)])
        with border():
            async for row in found:
                try:
                    yield await self._read(row)
                except CorruptionError:
                    record = await self.get(row["_id"])
                    if record is not None:
                        yield record

    async def snapshots(self, store: str) -> set[str]:
        with border():
            return await self._snapshots.used(store)

    async def needs_snapshot(self, store: str, hash: str) -> bool:
        with border():
            return await self._snapshots.is_used(store, hash)

    async def leftovers(self, older_than: float, delete: bool) -> AsyncIterator[Leftover]:
        with border():
            async for hash, size, age in self._snapshots.unclaimed(older_than):
                if not delete or await self._snapshots.remove(hash):
                    yield Leftover(f"snapshots/{hash}", size, age)
            if delete:
                await self._snapshots.remove_terms()
            async for place, size, age in self._parts.leftovers(older_than, delete):
                yield Leftover("/".join(place), size, age)

    # --- tokens ----------------------------------------------------------------------------------------------------

    async def add_token(self, token: Token) -> None:
        await self._tokens.add(token)

    async def find_token(self, hash: str) -> Token | None:
        return await self._tokens.find(hash)

    async def tokens(self) -> list[Token]:
        return await self._tokens.all()

    async def revoke_token(self, id: str, revoked_at: str) -> bool:
        return await self._tokens.revoke(id, revoked_at)

    # --- stores ----------------------------------------------------------------------------------------------------

    async def added_stores(self) -> list[AddedStore]:
        stores = await self.collection("stores")
        with border():
            return await read_stores(stores)

    async def change_store(self, before: AddedStore | None, after: AddedStore | None) -> bool:
        stores = await self.collection("stores")
        with border():
            return await change_store(stores, before, after)

    async def lease(self, name: str, owner: str, now: float, until: float) -> bool:
        leases = await self.collection("leases")
        free = {"_id": name, "$or": [{"until": {"$lt": now}}, {"owner": owner}]}
        change = {"$set": {"owner": owner, "until": until}}
        with border():
            try:
                await again(lambda: leases.update_one(free, change, upsert=True))
            except DuplicateKeyError:
                return False
        return True

    async def check(self) -> None:
        meta = await self.collection("meta")
        with border():
            await meta.update_one({"_id": "check"}, {"$set": {"at": time.time()}}, upsert=True)

    async def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        await self._client.close()


async def _add(collection: AsyncCollection[Row], rows: list[Row]) -> None:
    """Add those of some equal documents that are not there."""
    try:
        await collection.insert_many(rows, ordered=False)
    except BulkWriteError as exc:
        if any(error["code"] != DUPLICATE_KEY for error in (exc.details or {}).get("writeErrors", ())):
            raise


def check_not_barred(row: Row, keys: Collection[str]) -> None:
    """UnavailableError when the document under this id bars one of the keys."""
    if not set(keys).isdisjoint(row.get("barred", ())):
        raise UnavailableError("what was sent was collected as an orphan before it was recorded; send it again")
