"""Operator's use cases: find and remove orphans, prove that what is recorded is there."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import msgspec
import numpy as np

from aq_data.errors import CorruptionError, NotFoundError, UnavailableError
from aq_data.models.arrays import ArrayInfo, parse_dtype
from aq_data.models.datafile import DataFile
from aq_data.models.selection import Axis, Selection
from aq_data.models.snapshots import separated
from aq_data.models.stores import DEFAULT_STORE
from aq_data.models.structs import resolve
from aq_data.storage.arrays.chunking import chunk_grid
from aq_data.storage.arrays.format import array_document, chunk_key, decode_chunk
from aq_data.storage.arrays.manifest import NOTHING, PART
from aq_data.storage.arrays.store import ArrayStore, group_prefix
from aq_data.storage.arrays.stores import ArrayStores
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.collecting import LEFT_OVER, Collecting, Orphan
from aq_server.service.copies import Copy, read_copy
from aq_server.service.datafiles import TOMBSTONE, write_newest_copy
from aq_server.service.snapshots import SnapshotMaintenance
from aq_server.service.sweep_maintenance import SweepMaintenance
from aq_server.service.tasks import ahead

__all__ = ["Finding", "Maintenance", "measured_chunks"]

AT_ONCE = 8
"""DataFiles looked at a time: each waits for its store several times."""
FEW = 16
"""Chunks of an array that is read beside others."""
BATCH = 256
TRIES = 3
READERS_SECONDS = 120.0
"""A server keeps what it replaced a while for those who read it; until then it is no finding."""


class Finding(msgspec.Struct, frozen=True):
    """Something `verify` found: `kind` is one of missing_group, stale_copy, missing_array, missing_chunk, damaged_chunk,
    missing_file, damaged_file, damaged_snapshot, no_blobs, no_store, orphan, half_deleted.
    """

    kind: str
    id: str
    detail: str
    repaired: bool = False
    store: str = DEFAULT_STORE


class Maintenance:
    """Safe beside running servers: nothing is removed that a record names or could still come to name."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores) -> None:
        self._metadata, self._stores = metadata, stores

    async def gc(self, older_than: float, delete: bool, force: bool = False) -> AsyncIterator[Orphan]:
        """Orphans of every store that are at least `older_than` seconds old, removed when `delete`.

        A removed attempt is barred first: a save that is still running under it fails cleanly and is sent again. Where the
        database knows nothing of what lies in a store, or nothing of many DataFiles that look whole, it may have been lost
        or be a copy of long ago: these are told and kept, unless `force`.
        UnavailableError, at the end, when a store could not be looked into.
        """
        failure: UnavailableError | None = None
        for name in await self._stores.names():
            try:
                arrays = await self._stores.at(name)
                async for orphan in Collecting(self._metadata, arrays, name).run(older_than, delete, force):
                    yield orphan
            except UnavailableError as exc:
                failure = failure or exc
        async for left in self._metadata.leftovers(older_than, delete):
            yield Orphan("", left.key, left.size, left.age, "in the database, and no record has it", delete)
        if failure is not None:
            raise failure

    # --- verify ----------------------------------------------------------------------------------------------------

    async def verify(self, repair: bool = False) -> AsyncIterator[Finding]:
        """Read every stored byte and compare it with its checksum and its record; yields what does not agree."""
        verifiers = _Verifiers(self._metadata, self._stores)
        async for findings in ahead(self._metadata.scan(), lambda record: verifiers.look(record, repair), AT_ONCE):
            for finding in findings:
                yield finding
        try:
            async for orphan in self.gc(0.0, delete=False):
                if orphan.reason == LEFT_OVER and orphan.age < READERS_SECONDS:
                    continue
                detail = f"{orphan.prefix} ({orphan.size} bytes, {orphan.reason})"
                yield Finding("orphan", orphan.prefix.split("/")[0], detail, store=orphan.store)
        except UnavailableError as exc:
            if not verifiers.unreachable:
                yield Finding("no_store", "", str(exc))


class _Verifiers:
    """Of all stores, each from the first DataFile in it on."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores) -> None:
        self._metadata, self._stores = metadata, stores
        self._known: dict[str, _Verifying] = {}
        self.unreachable: set[str] = set()

    async def look(self, scanned: Record, repair: bool) -> list[Finding]:
        """What is wrong with a DataFile, as it is now: the scan reads ahead."""
        findings: list[Finding] = []
        for _ in range(TRIES):
            record = await self._metadata.get(scanned.document.id)
            if record is None or record.document.state == "deleted":
                return []
            findings = await self._look(record, repair)
            now = await self._metadata.get(scanned.document.id) if findings else record
            if now is not None and now.document.revision == record.document.revision:
                break  # else it was changed, moved or deleted under our hands, which is no damage
        return findings

    async def _look(self, record: Record, repair: bool) -> list[Finding]:
        store = record.document.store
        if store in self.unreachable:
            return []
        try:
            arrays = await self._stores.at(store)
        except UnavailableError as exc:
            if store in self.unreachable:
                return []
            self.unreachable.add(store)
            return [Finding("no_store", record.document.id, f"{exc}; nothing there was looked at", store=store)]
        if store not in self._known:
            self._known[store] = _Verifying(self._metadata, self._stores, arrays, store)
        findings = self._known[store].record(record, repair)
        return [msgspec.structs.replace(finding, store=store) async for finding in findings]


class _Verifying:
    """Of one store."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores, arrays: ArrayStore, store: str) -> None:
        self._metadata, self._stores, self._arrays = metadata, stores, arrays
        self._sweeps = SweepMaintenance(metadata, arrays)
        self._snapshots = SnapshotMaintenance(metadata, arrays, store)
        self._lookers: dict[str, str] = {}
        """The DataFile with which a snapshot is looked at, by its hash: many records have the same."""
        self._many = asyncio.Lock()
        """Arrays of many chunks are read one after another: each is read in parallel, and takes memory."""

    async def record(self, record: Record, repair: bool) -> AsyncIterator[Finding]:
        """What is wrong with a DataFile."""
        document, blobs = record.document, self._arrays.blobs
        prefix = group_prefix(document.id, record.attempt)
        sizes = {entry.key: entry.size async for entry in blobs.walk(document.id)}
        if not any(key.startswith(f"{document.id}/{record.attempt}/") for key in sizes):
            yield Finding("no_blobs", document.id, f"nothing lies under {document.id}/{record.attempt}")
            return
        marks = [key for key in sizes if key.startswith(f"{document.id}/{TOMBSTONE}")]
        if marks:
            await blobs.remove_many(marks if repair else ())
            yield Finding("half_deleted", document.id, "a deletion was begun and never committed", repair)
        snapshot = separated(document)[1]
        if snapshot is not None and self._lookers.setdefault(snapshot.hash, document.id) == document.id:
            flaw = await self._snapshots.flaw(snapshot, repair)
            if flaw:
                yield Finding("damaged_snapshot", document.id, flaw, repair)
        finding = await self._verify_copy(record, prefix, repair)
        if finding is not None:
            yield finding
        if document.state == "open":
            async for detail in self._sweeps.verify(record):
                yield Finding("damaged_chunk", document.id, detail)
        for array in document.arrays if document.state != "open" else ():
            async for finding in self._verify_array(document.id, record.attempt, array, sizes):
                yield finding
        async for finding in self._verify_files(record, sizes):
            yield finding

    async def _verify_files(self, record: Record, sizes: dict[str, int]) -> AsyncIterator[Finding]:
        document, blobs = record.document, self._arrays.blobs
        for info in document.files:
            key = f"{document.id}/{record.attempt}/files/{info.key}"
            digest, at = hashlib.sha256(), 0
            try:
                while at < info.size:
                    piece = await blobs.get(key, at, at + (8 << 20))
                    if not piece:
                        break
                    digest.update(piece)
                    at += len(piece)
            except NotFoundError:
                sizes.pop(key, None)
            if key not in sizes:
                yield Finding("missing_file", document.id, f"file {info.name!r} is missing")
            elif sizes[key] != info.size or digest.hexdigest() != info.sha256:
                yield Finding("damaged_file", document.id, f"file {info.name!r} does not match its SHA-256")

    async def _verify_copy(self, record: Record, prefix: str, repair: bool) -> Finding | None:
        document = record.document
        try:
            copy = read_copy(await self._arrays.blobs.get(f"{prefix}/zarr.json"))
            newest = await self._metadata.get(document.id)
            document = newest.document if newest is not None else document
            if copy.revision > document.revision or (copy.revision == document.revision and _is_copy(copy, document)):
                return None
            finding = Finding("stale_copy", document.id, f"the copy has revision {copy.revision}, not {document.revision}")
        except (NotFoundError, CorruptionError) as exc:
            finding = Finding("missing_group", document.id, f"zarr.json of the group is missing or unreadable: {exc}")
        if repair:
            await write_newest_copy(self._metadata, self._stores, record)
        return msgspec.structs.replace(finding, repaired=repair)

    async def _verify_array(self, id: str, attempt: str, array: ArrayInfo, sizes: dict[str, int]) -> AsyncIterator[Finding]:
        blobs, prefix = self._arrays.blobs, group_prefix(id, attempt)
        try:
            stored = msgspec.json.decode(await blobs.get(f"{prefix}/{array.name}/zarr.json"))
            if stored != msgspec.json.decode(msgspec.json.encode(array_document(array))):
                yield Finding("missing_array", id, f"zarr.json of array {array.name!r} is not what was stored")
        except (NotFoundError, msgspec.DecodeError):
            yield Finding("missing_array", id, f"zarr.json of array {array.name!r} is missing or unreadable")
        dtype = parse_dtype(array.dtype, array.name)
        try:
            indices = await measured_chunks(self._arrays, id, attempt, array)
        except CorruptionError as exc:
            yield Finding("damaged_chunk", id, str(exc))
            return
        keys = [f"{prefix}/{chunk_key(array.name, index)}" for index in indices]
        present = [key for key in keys if key in sizes]
        for key in set(keys).difference(present):
            yield Finding("missing_chunk", id, f"chunk {key!r} is missing")
        async with self._many if len(present) > FEW else nullcontext():
            for first in range(0, len(present), BATCH):
                for finding in await self._verify_chunks(id, array, dtype, present[first : first + BATCH]):
                    yield finding

    async def _verify_chunks(self, id: str, array: ArrayInfo, dtype: np.dtype[Any], keys: list[str]) -> list[Finding]:
        findings: list[Finding] = []

        def consume(i: int, data: bytes) -> None:
            try:
                decode_chunk(data, array, dtype, keys[i])
            except CorruptionError as exc:
                findings.append(Finding("damaged_chunk", id, str(exc)))

        try:
            await self._arrays.blobs.get_many(keys, consume)
        except NotFoundError as exc:  # it was there when it was listed
            findings.append(Finding("missing_chunk", id, str(exc)))
        return findings


def _is_copy(copy: Copy, document: DataFile) -> bool:
    """Whether it says the same; copies of older versions have also large instruments in them."""
    separate, snapshot = separated(document)
    is_separate = snapshot is not None and (copy.document, copy.snapshot) == (separate, snapshot.hash)
    return is_separate or (copy.document, copy.snapshot) == (document, "")


async def measured_chunks(arrays: ArrayStore, id: str, attempt: str, array: ArrayInfo) -> list[tuple[int, ...]]:
    """The chunks that must be there: those of a sweep that measured nothing of them were never stored."""
    if not array.is_partial:
        return list(np.ndindex(*chunk_grid(array.shape, array.chunks)))
    coverage = await arrays.coverage(id, attempt, array)
    for index in np.argwhere(coverage == PART).tolist():  # the maps are whole too
        bounds = zip(index, array.chunks, array.shape, strict=True)
        axes = tuple(Axis(n, i * c, 1, min(c, n - i * c)) for i, c, n in bounds)
        await arrays.written(id, attempt, array, Selection(axes))
    return [tuple(index) for index in np.argwhere(coverage != NOTHING).tolist()]


resolve(Finding)
