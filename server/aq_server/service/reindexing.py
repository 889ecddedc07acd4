"""Rebuilding a lost catalogue from what lies beside the blobs."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from aq_data.errors import AqDataError, CorruptionError
from aq_data.models.datafile import check_document
from aq_data.models.structs import resolve
from aq_data.storage.arrays.format import chunk_key
from aq_data.storage.arrays.store import SNAPSHOTS, ArrayStore, group_prefix
from aq_data.storage.arrays.stores import ArrayStores
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.copies import read_copy, whole_document
from aq_server.service.datafiles import TOMBSTONE
from aq_server.service.maintenance import measured_chunks
from aq_server.service.sweep_maintenance import SweepMaintenance
from aq_server.service.tasks import ahead

__all__ = ["Reindexed", "Reindexing"]

AT_ONCE = 8
"""DataFiles looked at a time: each waits for its store several times."""


class Reindexed(msgspec.Struct, frozen=True):
    """What `reindex` did with one id: `outcome` is restored, tombstone, known, incomplete or unreadable.

    `store` is where it was found.
    """

    id: str
    outcome: str
    detail: str
    store: str = ""


class Reindexing:
    """Safe beside running servers: what the database has stays as it is."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores) -> None:
        self._metadata, self._stores = metadata, stores

    async def run(self) -> AsyncIterator[Reindexed]:
        """Insert a record for every complete DataFile among the blobs of all stores that the database does not have.

        What is beside the blobs is all there is: the history (old revisions, and who made them), changes newer than a
        metadata copy, tokens, stores that an admin added, and tombstones of DataFiles whose blobs are gone cannot come back.
        """
        homes: dict[str, list[_Home]] = {}  # an attempt that was broken off may lie in another store than the true one
        for info in await self._stores.infos():
            home = _Home(info.name, self._metadata, await self._stores.at(info.name))
            for id in await home.arrays.blobs.children(""):
                if not id.startswith(".") and id != SNAPSHOTS:
                    homes.setdefault(id, []).append(home)

        async def look(id: str) -> tuple[str, _Found | None]:
            return id, await self._found(id, homes[id]) if await self._metadata.get(id) is None else None

        async for id, found in ahead(_each(sorted(homes)), look, AT_ONCE):
            # One after another: the order of saving is that of the ids.
            yield await self._restored(id, *found) if found else Reindexed(id, "known", "the database has it")

    async def _found(self, id: str, homes: list[_Home]) -> _Found:
        candidates: list[tuple[Record | str, _Home]] = []
        is_dead = False
        for home in homes:
            for name in await home.arrays.blobs.children(id):
                if name.startswith(TOMBSTONE):
                    is_dead = True
                else:
                    candidates.append((await home.candidate(id, name), home))
        return candidates, is_dead

    async def _restored(self, id: str, found: list[tuple[Record | str, _Home]], is_dead: bool) -> Reindexed:
        """One that the database does not have; that it was deleted counts wherever it is said."""
        records = [(record, home) for record, home in found if isinstance(record, Record)]
        if not records:
            reasons = "; ".join(str(reason) for reason, _ in found)
            return Reindexed(id, "incomplete", reasons or "no blobs but a tombstone")
        best, home = max(records, key=lambda pair: (pair[0].document.revision, pair[0].document.created_at))
        if is_dead:
            buried = msgspec.structs.replace(best.document, state="deleted", revision=best.document.revision + 1)
            best = msgspec.structs.replace(best, document=buried)
        if best.document.sweep is None or is_dead:
            await self._metadata.insert(best)
        else:
            restored = await home.sweeps.restore(best.document, best.attempt, best.digest)
            if isinstance(restored, str):
                return Reindexed(id, "incomplete", restored, home.store)
            best = restored
        detail = f"{best.document.name!r}, revision {best.document.revision}"
        return Reindexed(id, "tombstone" if is_dead else "restored", detail, home.store)


async def _each(ids: list[str]) -> AsyncIterator[str]:
    for id in ids:
        yield id


class _Home:
    """One store in which something lies."""

    def __init__(self, store: str, metadata: MetadataStore, arrays: ArrayStore) -> None:
        self.store, self.arrays, self.sweeps = store, arrays, SweepMaintenance(metadata, arrays)

    async def candidate(self, id: str, attempt: str) -> Record | str:
        """The record that an attempt's copy describes, or why it is none: an interrupted save may lack chunks."""
        prefix = group_prefix(id, attempt)
        try:
            copy = read_copy(await self.arrays.blobs.get(f"{prefix}/zarr.json"))
        except AqDataError as exc:
            return f"attempt {attempt}: {exc}"
        if copy.document.id != id:
            return f"attempt {attempt}: its copy is of {copy.document.id}"
        try:
            document = await whole_document(copy, self.arrays)
        except CorruptionError as exc:
            return f"attempt {attempt}: {exc}"
        present = {entry.key async for entry in self.arrays.blobs.walk(f"{id}/{attempt}")}
        wanted = {f"{id}/{attempt}/files/{info.key}" for info in copy.document.files}
        for array in copy.document.arrays if copy.document.state != "open" else ():
            try:
                wanted |= {
                    f"{prefix}/{chunk_key(array.name, i)}" for i in await measured_chunks(self.arrays, id, attempt, array)
                }
            except CorruptionError as exc:
                return f"attempt {attempt}: {exc}"
        if wanted - present:
            return f"attempt {attempt}: {len(wanted - present)} of {len(wanted)} blobs are missing"
        try:
            document = check_document(document)
        except AqDataError as exc:
            return f"attempt {attempt}: its copy is not valid: {exc}"
        intended = document.intended_store if document.intended_store != self.store else None
        document = msgspec.structs.replace(document, path=prefix, store=self.store, intended_store=intended)
        return Record(document, attempt, copy.digest)


_Found = tuple[list[tuple[Record | str, _Home]], bool]
"""What an id's blobs describe, or why not, and whether one of its stores says that it was deleted."""

resolve(Reindexed)
