"""Snapshots of instruments on MongoDB: stored once, and found by terms of their own, however many records have them.

    snapshots       _id (the hash), content (the instruments as JSON, in zlib), size (of that JSON), at (when it was put)
                    ready       the mark of whoever put it; not there before all its terms are
                    fillers     the marks of those who are about to
                    leaving     the mark of a `gc` that is about to remove it
    snapshot_terms  _id (hash/mark/number), snapshot (the hash), t and x as a record has them: all of one path in one
                    document, and no more values in one than MongoDB writes at once

A record claims a snapshot in its own document (`holds`) before it makes sure that the snapshot is there, and is published
only while the claim stands. Who removes one first marks it as leaving, then takes away the claims of what is not published;
one that comes after the mark sees it, and takes it off again. Terms say what is true of a hash whoever wrote them, so those
that are left over do no harm; what removes them never meets those of another mark (docs/decisions/0014).
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import bson
import msgspec
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import DuplicateKeyError

from aq_data.errors import CorruptionError, TooLargeError, UnavailableError
from aq_data.models.datafile import DataFile
from aq_data.models.matching import Facts, matches, outside
from aq_data.models.paths import SortKey
from aq_data.models.query import All, AnyOf, Compare, Element, Exists, Match, Node
from aq_data.models.snapshots import SNAPSHOT_BYTES, Snapshot, joined_json, separated, snapshot_document
from aq_data.models.terms import KIND_ORDER, Kind, Term
from aq_data.storage.metadata import _mql
from aq_data.storage.metadata._mongo_records import (
    INDEXED_BYTES,
    INDEXED_KEYS,
    WORDS,
    field_of,
    fields_of,
    found_by,
    make_mark,
)
from aq_data.storage.metadata._mongo_tries import again

__all__ = ["Snapshots"]

T = TypeVar("T")
Row = dict[str, Any]

CONTENT_BYTES = 15 << 20
PART_KEYS = 20_000
"""Values in one document of terms."""
TRIES = 20
CACHED_BYTES = 32 << 20
"""Contents kept in memory: what a hash stands for never changes."""
BATCH = 1000


class Database(Protocol):
    """What the snapshots need of the store."""

    async def collection(self, name: str) -> AsyncCollection[Row]: ...

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

        TooLargeError when it, or a list in it, is too large.
        """
        snapshots, terms = await self._collections()
        settled = {"_id": snapshot.hash, "ready": {"$exists": True}, "leaving": {"$exists": False}}
        if await snapshots.find_one(settled, {"_id": 1}) is not None:
            return
        content, parts, quantities = await asyncio.to_thread(_taken_apart, snapshot)
        await self._database.keep_kinds(quantities)
        for _ in range(TRIES):
            # Whole, and perhaps about to leave: then it stays.
            stays = {"_id": snapshot.hash, "ready": {"$exists": True}}
            if (await again(partial(snapshots.update_one, stays, {"$unset": {"leaving": ""}}))).matched_count:
                return
            mark, at = make_mark().hex(), time.time()
            rows = [
                {"_id": f"{snapshot.hash}/{mark}/{number:04}", "snapshot": snapshot.hash, "at": at, **part}
                for number, part in enumerate(parts)
            ]
            await self._fill(snapshot.hash, mark)
            for row in rows:  # one by one: each may be as much as MongoDB writes at once
                await again(partial(terms.replace_one, {"_id": row["_id"]}, row, upsert=True))
            whole = {"content": content, "size": len(snapshot.content), "at": at, "ready": mark}
            change = {"$set": whole, "$unset": {"leaving": "", "fillers": ""}}
            mine = {"_id": snapshot.hash, "$or": [{"fillers": mark}, {"ready": mark}]}
            if (await again(partial(snapshots.update_one, mine, change))).matched_count:
                return
            await again(partial(terms.delete_many, {"_id": _range(snapshot.hash, mark)}))
        raise UnavailableError(f"the snapshot {snapshot.hash} is written and removed by many at once; try again")

    async def _fill(self, hash: str, mark: str) -> None:
        snapshots, _ = await self._collections()
        change = {"$addToSet": {"fillers": mark}, "$setOnInsert": {"size": 0, "at": time.time()}}
        try:
            await again(partial(snapshots.update_one, {"_id": hash}, change, upsert=True))
        except DuplicateKeyError:  # another made it at the same moment
            await again(partial(snapshots.update_one, {"_id": hash}, change, upsert=True))

    async def _collections(self) -> tuple[AsyncCollection[Row], AsyncCollection[Row]]:
        return await self._database.collection("snapshots"), await self._database.collection("snapshot_terms")

    async def contents(self, hashes: Iterable[str]) -> dict[str, bytes]:
        """The instruments, as JSON, of those that are there."""
        wanted = set(hashes)
        found = {hash: self._contents[hash] for hash in wanted & self._contents.keys()}
        missing = sorted(wanted - found.keys())
        if missing:
            snapshots = await self._database.collection("snapshots")
            async for row in snapshots.find({"_id": {"$in": missing}, "ready": {"$exists": True}}, {"content": 1}):
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
        self, node: Node, limit: int | None, seconds: float, among: Collection[str] | None = None
    ) -> set[str] | None:
        """The hashes of those that match a part of a filter, of all or `among` some; None for more than about `limit`.

        TimeoutError when to judge them takes longer.
        """
        if isinstance(node, (All, AnyOf)):
            groups = _by_path(node)
            found = await asyncio.gather(*(self.matching(one, limit, seconds, among) for one in groups if one != node))
            if not found:
                return await self._found(node, limit, seconds, among)
            known = [hashes for hashes in found if hashes is not None]
            if isinstance(node, AnyOf):
                return set().union(*known) if len(known) == len(found) else None
            if not known:
                return None
            common = set.intersection(*known)
            for one, hashes in zip(groups, found, strict=True):
                if hashes is None and common:
                    common = await self.matching(one, None, seconds, common) or set()
            return common
        if not isinstance(node, Element):
            return await self._found(node, limit, seconds, among)
        # What its elements are matched by must stand somewhere below, if it is not negated.
        upper = [one for one in (Exists(node.path), outside(node.child, node.path)) if one != All(())]
        wide = await self.matching(All(tuple(upper)), limit, seconds, among)
        if wide is None:
            return None
        judged: set[str] = set()
        end = time.monotonic() + seconds
        for hash in wide:  # one by one: each may be large
            content = (await self.contents([hash])).get(hash)
            if content is not None and await asyncio.to_thread(_is_match, node, content, end):
                judged.add(hash)
        return judged

    async def _found(self, node: Node, limit: int | None, seconds: float, among: Collection[str] | None) -> set[str] | None:
        """`matching` of conditions on one path, or of a word: what they ask of stands in one document."""
        _, terms = await self._collections()
        where = _mql.compile_filter(node)
        if among is not None:
            where = {"$and": [{"snapshot": {"$in": list(among)}}, where]}
        most = 0 if limit is None else limit + 1
        rows = terms.find(where, {"_id": 0, "snapshot": 1}, limit=most).max_time_ms(max(1, round(seconds * 1000)))
        found = [row["snapshot"] async for row in rows]
        return set(found) if limit is None or len(found) <= limit else None

    async def have(self, path: str) -> bool:
        """Whether in any of them something stands at a path that has an order."""
        _, terms = await self._collections()
        some = {"$or": [{f"t.{field_of(path, kind)}": {"$exists": True}} for kind in KIND_ORDER]}
        return await terms.find_one(some, {"_id": 1}) is not None

    async def having(self, path: str, kind: Kind) -> list[str]:
        """The hashes of some in which a value of the kind stands at a path."""
        _, terms = await self._collections()
        found = terms.find({f"t.{field_of(path, kind)}": {"$exists": True}}, {"snapshot": 1}).limit(BATCH)
        return [row["snapshot"] async for row in found]

    async def places(self, sort: SortKey, hashes: Collection[str]) -> dict[str, tuple[int, Any]]:
        """Rank and value by which records are sorted at a path inside, for those that have one."""
        best = max if sort.descending else min
        listed = await self.values(sort.path, tuple(KIND_ORDER), hashes)
        return {hash: best((KIND_ORDER[kind], value) for kind, value in values) for hash, values in listed.items()}

    async def values(self, path: str, kinds: Sequence[Kind], hashes: Collection[str]) -> dict[str, list[tuple[Kind, Any]]]:
        """The values at a path, each with its kind, of those that have any."""
        _, terms = await self._collections()
        names = {field_of(path, kind): kind for kind in kinds}
        fields = {f"t.{name}": 1 for name in names}
        some = {"$or": [{field: {"$exists": True}} for field in fields]}
        found: dict[str, list[tuple[Kind, Any]]] = {}
        listed = list(hashes)
        for first in range(0, len(listed), BATCH):
            where = {"snapshot": {"$in": listed[first : first + BATCH]}, **some}
            async for row in terms.find(where, {"snapshot": 1, **fields}):
                found[row["snapshot"]] = [
                    (names[name], value) for name, given in row["t"].items() for value in _listed(given)
                ]
        return found

    # --- removing ----------------------------------------------------------------------------------------------------

    async def used(self, store: str) -> set[str]:
        """The hashes of all that records of DataFiles in a store have."""
        datafiles, where = await self._database.collection("datafiles"), _in_store(store)
        found = await datafiles.aggregate([{"$match": where}, {"$group": {"_id": "$snapshot"}}])
        hashes = {row["_id"] async for row in found} - {None}
        return hashes | {hash async for hash in self._whole(where)}

    async def is_used(self, store: str, hash: str) -> bool:
        """Whether one is among them."""
        datafiles, where = await self._database.collection("datafiles"), _in_store(store)
        if await datafiles.find_one({"holds": hash, "snapshot": hash, **where}, {"_id": 1}) is not None:
            return True
        return hash in {each async for each in self._whole(where)}

    async def _whole(self, where: Row) -> AsyncIterator[str]:
        """The hashes of those that an older version left in their document."""
        datafiles = await self._database.collection("datafiles")
        large = {"snapshot": {"$exists": False}, "$expr": {"$gte": [{"$binarySize": "$document"}, SNAPSHOT_BYTES]}}
        async for row in datafiles.find({"document": {"$exists": True}, **large, **where}, {"document": 1}):
            snapshot = separated(msgspec.json.decode(row["document"], type=DataFile))[1]
            if snapshot is not None:
                yield snapshot.hash

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
                gone = await snapshots.find_one_and_delete({"_id": hash, "leaving": mark}, {"ready": 1})
                if gone is not None and "ready" in gone:
                    terms = await self._database.collection("snapshot_terms")
                    await terms.delete_many({"_id": _range(hash, gone["ready"])})
                return gone is not None
        await snapshots.update_one({"_id": hash, "leaving": mark}, {"$unset": {"leaving": ""}})
        return False

    async def remove_terms(self) -> None:
        """Remove terms that no snapshot names, nor ever will: each mark is named before anything is written under it."""
        snapshots, terms = await self._collections()
        async for row in terms.find({}, {"snapshot": 1}):
            hash, mark, _ = row["_id"].split("/")
            if await snapshots.find_one({"_id": hash, "$or": [{"ready": mark}, {"fillers": mark}]}, {"_id": 1}) is None:
                await terms.delete_one({"_id": row["_id"]})


def _is_match(node: Node, content: bytes, end: float) -> bool:
    return matches(node, Facts(snapshot_document(content)), end)


def _in_store(store: str) -> Row:
    """Records of DataFiles in a store; and those that do not say, for which nothing must be removed."""
    name = field_of("store", "text")
    return {f"t.{name}": {"$in": [store, None]}, f"g.{name}": {"$in": [store, None]}}


def _range(hash: str, mark: str) -> Row:
    return {"$gt": f"{hash}/{mark}/", "$lt": f"{hash}/{mark}0"}  # 0 follows /


def _by_path(node: All | AnyOf) -> list[Node]:
    """The children, those on one path together; the node itself when all are on one."""
    groups: dict[Any, list[Node]] = {}
    for child in node.children:
        key = child.path if isinstance(child, (Compare, Exists, Match)) else child
        groups.setdefault(key, []).append(child)
    if len(groups) == 1 and isinstance(node.children[0], (Compare, Exists, Match)):
        return [node]
    return [listed[0] if len(listed) == 1 else type(node)(tuple(listed)) for listed in groups.values()]


def _taken_apart(snapshot: Snapshot) -> tuple[bytes, list[Row], frozenset[tuple[str, Kind]]]:
    """Content, terms in documents without their ids, quantities."""
    content = zlib.compress(snapshot.content, 1)
    if len(content) > CONTENT_BYTES:
        raise _too_large(snapshot, f"{len(content)} in zlib", CONTENT_BYTES)
    document = snapshot_document(snapshot.content)
    found = found_by(document, f"the snapshot {snapshot.hash}")
    paths: dict[str, list[Term]] = {}
    for term in found.known:
        paths.setdefault(term.path, []).append(term)
    words = found.terms.get(WORDS, [])
    parts: list[Row] = [{"t": {WORDS: words[i : i + PART_KEYS]}} for i in range(0, len(words), PART_KEYS)]
    batch: list[Term] = []
    for listed in [*paths.values(), []]:
        if batch and (not listed or len(batch) + len(listed) > PART_KEYS):
            fields, texts = fields_of(batch, document)
            parts.append({"t": fields, "x": texts})
            batch = []
        batch += listed
    for part in parts:
        keys = sum(len(value) if isinstance(value, list) else 1 for value in part["t"].values())
        if keys > INDEXED_KEYS:
            raise _too_large(snapshot, f"a list of {keys} values", INDEXED_KEYS)
        size = len(bson.encode(part))
        if size > INDEXED_BYTES:
            raise _too_large(snapshot, f"texts of {size}", INDEXED_BYTES)
    return content, parts, found.quantities


def _too_large(snapshot: Snapshot, what: str, limit: int) -> TooLargeError:
    return TooLargeError(
        f"the instruments have {len(snapshot.content)} bytes, {what}; MongoDB takes {limit}: keep long lists of instruments "
        "as arrays, long texts and programs as attached files",
        limit=limit,
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
