"""What an operator's commands must know of snapshots: which nobody needs, and whether those that are needed are whole."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aq_data.errors import CorruptionError, NotFoundError
from aq_data.models.snapshots import Snapshot
from aq_data.storage.arrays.blobs import BlobEntry
from aq_data.storage.arrays.store import SNAPSHOTS, ArrayStore
from aq_data.storage.metadata.store import MetadataStore

__all__ = ["SnapshotMaintenance"]


class SnapshotMaintenance:
    """Of one store. Safe beside running servers, as `Maintenance` is."""

    def __init__(self, metadata: MetadataStore, arrays: ArrayStore, store: str) -> None:
        self._metadata, self._arrays, self._store = metadata, arrays, store

    async def orphans(self, older_than: float, delete: bool) -> AsyncIterator[BlobEntry]:
        """What no record of a DataFile in this store refers to, removed when `delete`."""
        found = [entry async for entry in self._arrays.blobs.walk(SNAPSHOTS) if entry.age >= older_than]
        known = await self._metadata.snapshots(self._store) if found else set()
        for entry in found:
            hash = entry.key.removeprefix(f"{SNAPSHOTS}/").removesuffix(".json")
            if hash not in known and (not delete or await self._remove(entry.key, hash)):
                yield entry

    async def _remove(self, key: str, hash: str) -> bool:
        """Whether it is gone for good: a record may come to refer to it at any moment.

        Who publishes one looks after that whether its snapshot is there, and writes it again. If that was before the
        removal, the record is there after it: then it is put back here.
        """
        try:
            content = await self._arrays.blobs.get(key)
        except NotFoundError:
            return False
        await self._arrays.blobs.remove(key)
        if await self._metadata.needs_snapshot(self._store, hash):
            await self._arrays.keep_snapshot(Snapshot(hash, content))
            return False
        return True

    async def flaw(self, snapshot: Snapshot, repair: bool) -> str:
        """What is wrong with the blob of a snapshot that a record has, or ""; with `repair` it is written anew."""
        try:
            await self._arrays.snapshot(snapshot.hash)
        except CorruptionError as exc:
            if repair:
                await self._arrays.replace_snapshot(snapshot)
            return str(exc)
        return ""
