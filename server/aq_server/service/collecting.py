"""Finding and removing what nobody needs in one store."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator

import msgspec

from aq_data.models.datafile import is_id
from aq_data.models.structs import resolve
from aq_data.storage.arrays.store import ArrayStore, group_prefix
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.snapshots import SnapshotMaintenance
from aq_server.service.sweep_maintenance import SweepMaintenance

__all__ = ["LEFT_OVER", "Collecting", "Orphan"]

LEFT_OVER = "left by an open sweep"
_ATTEMPT = re.compile(r"[0-9a-f]{16}")


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

    async def run(self, older_than: float, delete: bool) -> AsyncIterator[Orphan]:
        """Orphans at least `older_than` seconds old, removed when `delete`.

        A removed attempt is barred first: a save that is still running under it fails cleanly and is sent again.
        """
        for id in await self._arrays.blobs.children(""):
            for attempt in await self._arrays.blobs.children(id):
                if not _ATTEMPT.fullmatch(attempt) or not is_id(id):
                    continue  # not ours
                async for orphan in self._orphans(id, attempt, older_than, delete):
                    yield orphan
        async for entry in self._snapshots.orphans(older_than, delete):
            yield self._orphan(
                entry.key, entry.size, max(0.0, time.time() - entry.modified), "no record refers to it", delete
            )

    def _orphan(self, prefix: str, size: int, age: float, reason: str, removed: bool) -> Orphan:
        return Orphan(self._store, prefix, size, age, reason, removed)

    async def _orphans(self, id: str, attempt: str, older_than: float, delete: bool) -> AsyncIterator[Orphan]:
        record = await self._metadata.get(id)
        if record is None or record.attempt != attempt or record.document.state == "deleted":
            reason = "deleted" if record is not None and record.attempt == attempt else "never published"
            orphan = await self._collect(id, attempt, attempt, reason, older_than, delete)
            if orphan is not None:
                yield orphan
            if delete and reason == "deleted":
                await self._metadata.sweeps.forget(id)
            return
        if record.document.sweep is not None:
            async for entry in self._sweeps.orphans(record, older_than, delete):
                yield self._orphan(entry.key, entry.size, max(0.0, time.time() - entry.modified), LEFT_OVER, delete)
        async for leftover in self._unfinished(f"{group_prefix(id, attempt)}", older_than, delete):
            yield leftover
        known = {info.key for info in record.document.files}
        for key in await self._arrays.blobs.children(f"{id}/{attempt}/files"):
            if key not in known:
                prefix = f"{attempt}/files/{key}"
                bar = key.removesuffix(".part")  # an upload that has not ended
                orphan = await self._collect(id, prefix, bar, "never attached", older_than, delete)
                if orphan is not None:
                    yield orphan

    async def _unfinished(self, group: str, older_than: float, delete: bool) -> AsyncIterator[Orphan]:
        """What a process that died while it replaced a metadata copy left beside it; a living one starts over."""
        for name in await self._arrays.blobs.children(group):
            if not name.endswith(".tmp"):
                continue
            async for entry in self._arrays.blobs.walk(f"{group}/{name}"):
                age = max(0.0, time.time() - entry.modified)
                if age >= older_than:
                    if delete:
                        await self._arrays.blobs.remove(entry.key)
                    yield self._orphan(entry.key, entry.size, age, "never finished", delete)

    async def _collect(self, id: str, below: str, bar: str, reason: str, older_than: float, delete: bool) -> Orphan | None:
        prefix = f"{id}/{below}"
        size, newest = 0, 0.0
        async for entry in self._arrays.blobs.walk(prefix):
            size, newest = size + entry.size, max(newest, entry.modified)
        age = max(0.0, time.time() - newest)
        # Empty folders have no age to go by: they may belong to a save that is just beginning.
        if age < older_than or (older_than and not newest):
            return None
        if delete:
            await self._metadata.bar(id, bar)
            if await self._is_named(id, bar):
                return None
            await self._arrays.blobs.remove(prefix)
        return self._orphan(prefix, size, age, reason, delete)

    async def _is_named(self, id: str, key: str) -> bool:
        record = await self._metadata.get(id)
        if record is None or record.document.state == "deleted":
            return False
        return record.attempt == key or any(info.key == key for info in record.document.files)


resolve(Orphan)
