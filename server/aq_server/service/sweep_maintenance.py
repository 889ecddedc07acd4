"""What an operator's commands must know of sweeps: which objects nobody needs, what must be whole, what can be rebuilt."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import numpy as np

from aq_data.errors import AqDataError, CorruptionError, NotFoundError
from aq_data.models.arrays import parse_dtype
from aq_data.models.datafile import DataFile, SweepInfo
from aq_data.models.sweep import Plan, Seal, State
from aq_data.models.values import format_instant
from aq_data.storage.arrays.blobs import BlobEntry
from aq_data.storage.arrays.folding import Folder
from aq_data.storage.arrays.format import decode_chunk
from aq_data.storage.arrays.growing import View
from aq_data.storage.arrays.manifest import NOTHING, PART, Manifest, cell_key, decode_mask, open_prefix, plan_key
from aq_data.storage.arrays.store import ArrayStore
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.listing import Attempt
from aq_server.service.saving import now

__all__ = ["SweepMaintenance"]


def manifest_keys(plan: Plan, manifest: Manifest) -> set[str]:
    """Every object that a manifest names."""
    keys = {segment.key for segment in manifest.segments} | {key for _, keys in manifest.retired for key in keys}
    for number, array in enumerate(plan.arrays):
        cells = manifest.arrays.get(array.name)
        for index in map(tuple, np.argwhere(cells.coverage != NOTHING).tolist()) if cells is not None else ():
            generation, coverage = cells.at(index) if cells is not None else ("", NOTHING)
            key = cell_key(plan.id, plan.attempt, generation, number, index)
            keys |= {key, f"{key}.w"} if coverage == PART else {key}
    return keys


class SweepMaintenance:
    """Safe beside running servers, as `Maintenance` is."""

    def __init__(self, metadata: MetadataStore, arrays: ArrayStore) -> None:
        self._metadata, self._arrays, self._folder = metadata, arrays, Folder(arrays.blobs)

    async def orphans(self, record: Record, attempt: Attempt, older_than: float, delete: bool) -> AsyncIterator[BlobEntry]:
        """What of the open phase nobody needs any more, removed when `delete`; of an ended sweep whole prefixes."""
        prefixes = (open_prefix(attempt.id, attempt.key), f"{attempt.id}/{attempt.key}/blocks")
        found, blocks = attempt.below("open"), attempt.below("blocks")
        if record.document.state == "open":
            found, blocks = await self._unneeded(record, found, blocks, delete)
            unneeded = (*found, *blocks)
        else:
            unneeded = tuple(
                BlobEntry(prefix, sum(entry.size for entry in entries), max(entry.modified for entry in entries))
                for prefix, entries in zip(prefixes, (found, blocks), strict=True)
                if entries
            )
        for entry in unneeded:
            if entry.age >= older_than:
                if delete:
                    await self._arrays.blobs.remove(entry.key)
                yield entry

    async def _unneeded(
        self, record: Record, found: list[BlobEntry], blocks: list[BlobEntry], delete: bool
    ) -> tuple[list[BlobEntry], list[BlobEntry]]:
        """Of what was listed before: what the sweep does not name now, and never will."""
        id = record.document.id
        if delete:
            for entry in blocks:  # a block that is still arriving is refused, and sent again
                await self._metadata.bar(id, entry.key.rsplit("/", 1)[-1].removesuffix(".part"))
        try:
            tail = await self._metadata.sweeps.tail(id)
            needed = manifest_keys(tail.plan, await self._folder.manifest(tail.plan, tail.state))
        except NotFoundError:
            return [], []  # folded again, ended or deleted meanwhile: the next run sees
        prefix = open_prefix(id, record.attempt)
        needed.add(f"{prefix}/{tail.state.manifest}/manifest")
        refs = {row.ref for row in tail.rows}

        def is_over(entry: BlobEntry) -> bool:
            # A fold under the newest token may still come into force; one under an older token cannot.
            token = entry.key.removeprefix(f"{prefix}/").split("/")[0].rpartition("-")[2]
            return token.isdigit() and int(token) < tail.state.token

        return (
            [entry for entry in found if entry.key not in needed and is_over(entry)],
            [entry for entry in blocks if entry.key not in needed and entry.key.rsplit("/", 1)[-1] not in refs],
        )

    async def verify(self, record: Record) -> AsyncIterator[str]:
        """What is missing or damaged of an open sweep's folded chunks."""
        plan, state = await self._metadata.sweeps.get(record.document.id)
        try:
            manifest = await self._folder.manifest(plan, state)
        except AqDataError as exc:
            if (await self._metadata.sweeps.get(plan.id))[1].manifest == state.manifest:
                yield f"the map of its chunks cannot be read: {exc}"
            return
        for number, array in enumerate(plan.arrays):
            cells = manifest.arrays.get(array.name)
            if cells is None:
                continue
            dtype = parse_dtype(array.dtype, array.name)
            for index in map(tuple, np.argwhere(cells.coverage != NOTHING).tolist()):
                generation, coverage = cells.at(index)
                key = cell_key(plan.id, plan.attempt, generation, number, index)
                try:
                    decode_chunk(await self._arrays.blobs.get(key), array, dtype, key)
                    if coverage == PART:
                        decode_mask(await self._arrays.blobs.get(f"{key}.w"), array.chunks, f"{key}.w")
                except NotFoundError:
                    if (await self._metadata.sweeps.get(plan.id))[1].manifest == state.manifest:
                        yield f"chunk {key!r} is missing"
                except CorruptionError as exc:
                    yield str(exc)

    async def restore(self, document: DataFile, attempt: str, digest: str) -> Record | str:
        """Insert a sweep that the database lost; its record, or why it cannot be.

        One that was open becomes abandoned with what had been folded: the blocks after that were in the database.
        """
        id = document.id
        try:
            plan = msgspec.json.decode(await self._arrays.blobs.get(plan_key(id, attempt)), type=Plan)
            plan = msgspec.structs.replace(plan, store=document.store)
        except (AqDataError, msgspec.DecodeError) as exc:
            return f"attempt {attempt}: its plan cannot be read: {exc}"
        info = document.sweep or SweepInfo()
        if document.state != "open":
            state = State(extents={}, head=info.head, folded=info.head, ended_revision=document.revision, told=plan.notify)
            record = Record(document, attempt, digest)
        else:
            found = await self._newest_fold(plan)
            if found is None:
                return f"attempt {attempt}: the sweep was open and nothing of it was folded"
            manifest, cut = found
            at = format_instant(now())
            reason = f"the database was lost while it was open; what was folded, blocks 1 to {cut}, was rebuilt"
            state = State(
                extents=manifest.extents,
                touched=manifest.touched,
                head=cut,
                folded=cut,
                seal=Seal("abandoned", reason, at),
                ended_revision=document.revision + 1,
                told=plan.notify,
            )
            finals = await self._folder.publish(View(plan, state, manifest, ()))
            document = msgspec.structs.replace(
                document,
                state="abandoned",
                revision=document.revision + 1,
                updated_at=at,
                finished_at=at,
                arrays=finals,
                size=sum(array.nbytes for array in finals) + sum(file.size for file in document.files),
                sweep=msgspec.structs.replace(info, reason=reason, head=cut),
            )
            record = Record(document, attempt, digest)
            await self._arrays.write_copy(document, attempt, digest)
            await self._arrays.blobs.settle(f"{id}/{attempt}")
        await self._metadata.sweeps.open(record, plan, state, ())
        return record

    async def _newest_fold(self, plan: Plan) -> tuple[Manifest, int] | None:
        """The manifest with the highest cut whose objects are all there. Also one that never came into force is true."""
        prefix = open_prefix(plan.id, plan.attempt)
        present = {entry.key async for entry in self._arrays.blobs.walk(prefix)}
        names = [name.partition("-") for name in await self._arrays.blobs.children(prefix)]
        for cut, token in sorted(((int(c), int(t)) for c, _, t in names if c.isdigit() and t.isdigit()), reverse=True):
            key = f"{prefix}/{cut}-{token}/manifest"
            if key in present:
                manifest = Manifest.decode(await self._arrays.blobs.get(key), key)
                retired = {key for _, keys in manifest.retired for key in keys}
                if manifest_keys(plan, manifest) - retired <= present:
                    return manifest, cut
        return None
