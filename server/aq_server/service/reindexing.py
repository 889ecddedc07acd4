"""Rebuilding a lost catalogue from what lies beside the blobs."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from aq_data.errors import AqDataError, CorruptionError
from aq_data.models.datafile import check_document
from aq_data.models.structs import resolve
from aq_data.storage.arrays.format import chunk_key
from aq_data.storage.arrays.store import SNAPSHOTS, ArrayStore, group_prefix
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.copies import read_copy, whole_document
from aq_server.service.datafiles import TOMBSTONE
from aq_server.service.maintenance import measured_chunks
from aq_server.service.sweep_maintenance import SweepMaintenance

__all__ = ["Reindexed", "Reindexing"]


class Reindexed(msgspec.Struct, frozen=True):
    """What `reindex` did with one id: `outcome` is restored, tombstone, known, incomplete or unreadable."""

    id: str
    outcome: str
    detail: str


class Reindexing:
    """Safe beside running servers: what the database has stays as it is."""

    def __init__(self, metadata: MetadataStore, arrays: ArrayStore) -> None:
        self._metadata, self._arrays = metadata, arrays
        self._sweeps = SweepMaintenance(metadata, arrays)

    async def run(self) -> AsyncIterator[Reindexed]:
        """Insert a record for every complete DataFile among the blobs that the database does not have.

        What is beside the blobs is all there is: the history (old revisions, and who made them), changes newer than a
        metadata copy, tokens and tombstones of DataFiles whose blobs are gone cannot come back.
        """
        for id in await self._arrays.blobs.children(""):
            if id.startswith(".") or id == SNAPSHOTS:
                continue
            if await self._metadata.get(id) is not None:
                yield Reindexed(id, "known", "the database has it")
                continue
            names = await self._arrays.blobs.children(id)
            found = [await self._candidate(id, name) for name in names if not name.startswith(TOMBSTONE)]
            records = [record for record in found if isinstance(record, Record)]
            if not records:
                yield Reindexed(id, "incomplete", "; ".join(str(reason) for reason in found) or "no blobs but a tombstone")
                continue
            best = max(records, key=lambda r: (r.document.revision, r.document.created_at))
            is_dead = any(name.startswith(TOMBSTONE) for name in names)
            if is_dead:
                buried = msgspec.structs.replace(best.document, state="deleted", revision=best.document.revision + 1)
                best = msgspec.structs.replace(best, document=buried)
            if best.document.sweep is None or is_dead:
                await self._metadata.insert(best)
            else:
                restored = await self._sweeps.restore(best.document, best.attempt, best.digest)
                if isinstance(restored, str):
                    yield Reindexed(id, "incomplete", restored)
                    continue
                best = restored
            outcome = "tombstone" if is_dead else "restored"
            yield Reindexed(id, outcome, f"{best.document.name!r}, revision {best.document.revision}")

    async def _candidate(self, id: str, attempt: str) -> Record | str:
        """The record that an attempt's copy describes, or why it is none: an interrupted save may lack chunks."""
        prefix = group_prefix(id, attempt)
        try:
            copy = read_copy(await self._arrays.blobs.get(f"{prefix}/zarr.json"))
        except AqDataError as exc:
            return f"attempt {attempt}: {exc}"
        if copy.document.id != id:
            return f"attempt {attempt}: its copy is of {copy.document.id}"
        try:
            document = await whole_document(copy, self._arrays)
        except CorruptionError as exc:
            return f"attempt {attempt}: {exc}"
        present = {entry.key async for entry in self._arrays.blobs.walk(f"{id}/{attempt}")}
        wanted = {f"{id}/{attempt}/files/{info.key}" for info in copy.document.files}
        for array in copy.document.arrays if copy.document.state != "open" else ():
            try:
                wanted |= {
                    f"{prefix}/{chunk_key(array.name, i)}" for i in await measured_chunks(self._arrays, id, attempt, array)
                }
            except CorruptionError as exc:
                return f"attempt {attempt}: {exc}"
        if wanted - present:
            return f"attempt {attempt}: {len(wanted - present)} of {len(wanted)} blobs are missing"
        try:
            document = check_document(document)
        except AqDataError as exc:
            return f"attempt {attempt}: its copy is not valid: {exc}"
        document = msgspec.structs.replace(document, path=self._arrays.blobs.location(prefix))
        return Record(document, attempt, copy.digest)


resolve(Reindexed)
