"""Finding and removing what nobody needs in one store."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from aq_data.errors import CorruptionError, NotFoundError
from aq_data.models.structs import resolve
from aq_data.storage.arrays.blobs import BlobEntry
from aq_data.storage.arrays.store import ArrayStore, group_prefix
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.copies import read_copy
from aq_server.service.listing import Attempt, attempts
from aq_server.service.snapshots import SnapshotMaintenance
from aq_server.service.sweep_maintenance import SweepMaintenance
from aq_server.service.tasks import ahead

__all__ = ["LEFT_OVER", "UNKNOWN", "Collecting", "Orphan"]

LEFT_OVER = "left by an open sweep"
UNPUBLISHED = "never published"
UNKNOWN = "whole, but not known to the database: kept; `aq-data reindex` takes it in, --force removes it"
FEW = 20
"""Saves that died just before they were published: they have their metadata, as what a lost database knew has."""
AT_ONCE = 8
"""Attempts looked at a time, each of which waits for the database."""


class Orphan(msgspec.Struct, frozen=True):
    """Blobs under `prefix` in a store, or (`store` is "") something in the database, that no record names.

    `age` is seconds since the last of it was written.
    """

    store: str
    prefix: str
    size: int
    age: float
    reason: str
    removed: bool


class Collecting:
    """Of one store. What a record names is kept wherever it lies, also in a store other than the record's."""

    def __init__(self, metadata: MetadataStore, arrays: ArrayStore, store: str) -> None:
        self._metadata, self._arrays, self._store = metadata, arrays, store
        self._sweeps = SweepMaintenance(metadata, arrays)
        self._snapshots = SnapshotMaintenance(metadata, arrays, store)
        self._unknown: list[Attempt] = []
        self._known = 0

    async def run(self, older_than: float, delete: bool, force: bool) -> AsyncIterator[Orphan]:
        """As `Maintenance.gc`; to be run once."""

        async def judge(attempt: Attempt) -> list[Orphan]:
            return [orphan async for orphan in self._orphans(attempt, older_than, delete)]

        async for orphans in ahead(attempts(self._arrays.blobs), judge, AT_ONCE):
            for orphan in orphans:
                yield orphan
        is_lost = not force and (len(self._unknown) > FEW or not self._known)
        reason = UNKNOWN if is_lost else UNPUBLISHED
        for attempt in self._unknown:
            async for orphan in self._whole(attempt, reason, older_than, delete and not is_lost):
                yield orphan
        if is_lost and self._unknown:
            return  # their snapshots are theirs
        async for entry in self._snapshots.orphans(older_than, delete):
            yield self._orphan(entry, "no record refers to it", delete)

    def _orphan(self, entry: BlobEntry, reason: str, removed: bool) -> Orphan:
        return Orphan(self._store, entry.key, entry.size, entry.age, reason, removed)

    async def _orphans(self, attempt: Attempt, older_than: float, delete: bool) -> AsyncIterator[Orphan]:
        id, key = attempt.id, attempt.key
        record = await self._metadata.get(id)
        if record is None and await self._has_copy(attempt):
            self._unknown.append(attempt)
            return
        self._known += record is not None
        if record is None or record.attempt != key or record.document.state == "deleted":
            is_deleted = record is not None and record.attempt == key
            async for orphan in self._whole(attempt, "deleted" if is_deleted else UNPUBLISHED, older_than, delete):
                yield orphan
            if delete and is_deleted:
                await self._metadata.sweeps.forget(id)
            return
        if record.document.sweep is not None:
            async for entry in self._sweeps.orphans(record, attempt, older_than, delete):
                yield self._orphan(entry, LEFT_OVER, delete)
        for entry in attempt.unfinished:
            # Of a process that died while it replaced a metadata copy; a living one starts over.
            if entry.age >= older_than:
                if delete:
                    await self._arrays.blobs.remove(entry.key)
                yield self._orphan(entry, "never finished", delete)
        known = {info.key for info in record.document.files}
        for entry in attempt.below("files"):
            name = entry.key.rsplit("/", 1)[-1]
            bar = name.removesuffix(".part")  # an upload that has not ended
            if name not in known and await self._collect(id, bar, entry, older_than, delete):
                yield self._orphan(entry, "never attached", delete)

    async def _whole(self, attempt: Attempt, reason: str, older_than: float, delete: bool) -> AsyncIterator[Orphan]:
        entry = BlobEntry(f"{attempt.id}/{attempt.key}", attempt.size, attempt.newest)
        if await self._collect(attempt.id, attempt.key, entry, older_than, delete):
            yield self._orphan(entry, reason, delete)

    async def _has_copy(self, attempt: Attempt) -> bool:
        """Whether a metadata copy lies there, from which `reindex` makes a record."""
        try:
            copy = await self._arrays.blobs.get(f"{group_prefix(attempt.id, attempt.key)}/zarr.json")
            return read_copy(copy).document.id == attempt.id
        except (NotFoundError, CorruptionError):
            return False

    async def _collect(self, id: str, bar: str, entry: BlobEntry, older_than: float, delete: bool) -> bool:
        """Whether it is an orphan of that age, which is gone now when `delete`."""
        if entry.age < older_than:
            return False
        if delete:
            await self._metadata.bar(id, bar)
            if await self._is_named(id, bar):
                return False
            await self._arrays.blobs.remove(entry.key)
        return True

    async def _is_named(self, id: str, key: str) -> bool:
        record = await self._metadata.get(id)
        if record is None or record.document.state == "deleted":
            return False
        return record.attempt == key or any(info.key == key for info in record.document.files)


resolve(Orphan)
