"""Use cases of one DataFile: begin to save it, find it, change it, delete it, attach files."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from aq_data.errors import (
    AqDataError,
    ConflictError,
    CorruptionError,
    NotFoundError,
    StaleRevisionError,
    UnavailableError,
    ValidationError,
)
from aq_data.models.datafile import (
    DataFile,
    FileInfo,
    NewDataFile,
    apply_patch,
    check_file_name,
    check_new,
    next_state,
)
from aq_data.models.history import change_between
from aq_data.models.values import format_instant
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.stores import ArrayStores
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.saving import FileWriter, Save, file_key, now
from aq_server.service.signals import Signals

__all__ = ["TOMBSTONE", "DataFiles", "StoredFile", "write_newest_copy"]

log = logging.getLogger("aq_data")

TOMBSTONE = "tombstone-"
"""How the names of deletion marks beside the attempts of an id begin."""
COMPARE_AND_SET_TRIES = 50
"""A change without `If-Match` starts over when another came first; this often before it gives up."""


async def write_newest_copy(metadata: MetadataStore, stores: ArrayStores, record: Record) -> None:
    """Write the copy until it is that of the newest revision: a slower process may have written an older one over it."""
    arrays = await stores.at(record.document.store)
    while True:
        await arrays.write_copy(record.document, record.attempt, record.digest)
        newest = await metadata.get(record.document.id)
        if newest is None or newest.document.revision == record.document.revision or newest.attempt != record.attempt:
            return
        record = newest


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An attached file and a way to its bytes: `read(start, stop)` gives pieces of a half-open range."""

    info: FileInfo
    read: Callable[[int, int], AsyncIterator[bytes]]


class DataFiles:
    """The use cases. One instance serves all requests of a process; nothing of value lives in it."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores, signals: Signals | None = None) -> None:
        """`signals` wakes those who follow a DataFile when it changes."""
        self.metadata, self.stores, self._signals = metadata, stores, signals or Signals()

    async def begin_save(self, new: NewDataFile, user: str | None) -> Save:
        """Check the whole declaration and begin an attempt. `user` (from a token) takes the place of the client's word."""
        if user is not None:
            new = msgspec.structs.replace(new, user=user)
        new = check_new(new)
        existing = await self.metadata.get(new.id) if new.id is not None else None
        return Save(self.metadata, new, existing or await self.stores.target(new.store, new.kind, may_fall_back=True))

    async def get(self, id: str, include_deleted: bool = False) -> Record:
        """The record; NotFoundError, with code `deleted` for a tombstone unless those are included."""
        id = id.lower()
        record = await self.metadata.get(id)
        if record is None:
            raise NotFoundError(f"there is no DataFile {id[:60]!r}")
        if record.document.state == "deleted" and not include_deleted:
            raise NotFoundError(f"DataFile {id} was deleted", code="deleted")
        return record

    async def change(
        self,
        id: str,
        step: Callable[[DataFile, str], DataFile],
        if_match: int | None,
        user: str | None = None,
        publishes: str = "",
    ) -> DataFile:
        """Replace the document by `step(document, now)`, atomically; then bring the copy beside the blobs up to date.

        The change stands in the history as made by `user`. StaleRevisionError when `if_match` is not the current revision.
        Without it the change is made to the newest.
        """
        for _ in range(COMPARE_AND_SET_TRIES):
            record = await self._check_revision(id, if_match)
            document = step(record.document, format_instant(now()))
            if document is record.document:
                return document
            change = change_between(record.document, document, user or "")
            changed = msgspec.structs.replace(record, document=document, change=change)
            if await self.metadata.replace(changed, record.document.revision, publishes):
                await self._update_copy(changed)
                self._signals.tell(record.document.id)
                return changed.document
        raise UnavailableError(f"DataFile {id} is being changed by many others at once; try again")

    async def _update_copy(self, record: Record) -> None:
        """The change is committed. A copy that cannot be written now is logged; `verify --repair` catches it up."""
        try:
            await write_newest_copy(self.metadata, self.stores, record)
        except AqDataError as exc:
            log.warning("a metadata copy is behind", extra={"fields": {"id": record.document.id, "error": str(exc)}})

    async def patch(self, id: str, patch: dict[str, Any], if_match: int | None, user: str | None = None) -> DataFile:
        """Merge `patch` (RFC 7396) into the document; see `apply_patch` for what is refused.

        Where tokens tell who the user is (`user` is set), the field `user` cannot be patched.
        """
        if user is not None and "user" in patch:
            raise ValidationError("'user' comes from the token; it cannot be patched")
        return await self.change(id, lambda document, now: apply_patch(document, patch, now), if_match, user)

    async def delete(self, id: str, if_match: int | None, user: str | None = None) -> None:
        """Turn the DataFile into a tombstone; its bytes stay until `gc`. Deleting again is NotFoundError (`deleted`)."""
        record = await self._check_revision(id, if_match)
        id = record.document.id  # as it lies there, however it was written
        blobs = (await self.stores.at(record.document.store)).blobs
        # First beside the blobs: a catalogue rebuilt from them must not raise the dead. Each attempt to delete has a mark of
        # its own, so that one that fails never takes away the mark of one that succeeds.
        mark = f"{id}/{TOMBSTONE}{secrets.token_hex(8)}"
        await blobs.replace(mark, msgspec.json.encode({"id": id, "at": format_instant(now())}))

        def bury(document: DataFile, now: str) -> DataFile:
            state = next_state(document.state, "delete")
            return msgspec.structs.replace(document, state=state, revision=document.revision + 1, updated_at=now)

        try:
            await self.change(id, bury, if_match, user)
        except (StaleRevisionError, NotFoundError):
            await blobs.remove(mark)
            raise

    async def _check_revision(self, id: str, if_match: int | None) -> Record:
        record = await self.get(id)
        revision = record.document.revision
        if if_match is not None and if_match != revision:
            raise StaleRevisionError(
                f"DataFile {id} is at revision {revision}, not {if_match}; read it again and repeat the change",
                revision=revision,
            )
        return record

    async def open_file(self, id: str, name: str) -> StoredFile:
        """An attached file, to be read in ranges. NotFoundError names the files there are."""
        record = await self.get(id)
        id = record.document.id
        info = next((info for info in record.document.files if info.name == name), None)
        if info is None:
            names = ", ".join(repr(info.name) for info in record.document.files) or "none"
            raise NotFoundError(f"DataFile {id} has no file {name[:80]!r}; it has {names}")
        blobs, key = (await self.stores.at(record.document.store)).blobs, file_key(id, record.attempt, info.key)
        if await _stored_size(blobs, key) != info.size:
            if (await self.get(id)).attempt != record.attempt:
                return await self.open_file(id, name)  # it was brought to another store
            raise CorruptionError(f"file {name!r} of DataFile {id} is missing or not as long as recorded")

        async def read(start: int, stop: int) -> AsyncIterator[bytes]:
            while start < stop:
                piece = await blobs.get(key, start, min(stop, start + (1 << 20)))
                if not piece:
                    raise CorruptionError(f"file {name!r} of DataFile {id} is shorter than recorded")
                start += len(piece)
                yield piece

        return StoredFile(info, read)

    async def attach(
        self, id: str, name: str, content_type: str, body: AsyncIterator[bytes], user: str | None = None
    ) -> tuple[FileInfo, bool]:
        """Attach one more file; whether it is new. The same content again is harmless, other content is ConflictError."""
        check_file_name(name)
        record = await self.get(id)
        id = record.document.id
        blobs, key = (await self.stores.at(record.document.store)).blobs, secrets.token_hex(8)
        blob = file_key(id, record.attempt, key)
        writer = FileWriter(name, content_type, key, await blobs.upload(blob))
        try:
            async for piece in body:
                await writer.write(memoryview(piece))
            info = await writer.finish()
            await blobs.settle(f"{id}/{record.attempt}/files")
        except BaseException:
            await writer.discard()
            raise

        def add(document: DataFile, now: str) -> DataFile:
            if document.path != record.document.path:
                raise UnavailableError(f"DataFile {id} was brought to another store meanwhile; attach the file again")
            known = next((other for other in document.files if other.name == name), None)
            if known is not None and known.sha256 != info.sha256:
                raise ConflictError(f"DataFile {id} has another file {name!r}; attach it under a new name", code="finished")
            if known is not None:
                return document
            return msgspec.structs.replace(
                document,
                files=(*document.files, info),
                size=document.size + info.size,
                revision=document.revision + 1,
                updated_at=now,
            )

        try:
            document = await self.change(id, add, None, user, publishes=key)
        except (ConflictError, NotFoundError):
            await blobs.remove(blob)
            raise
        stored = next(other for other in document.files if other.name == name)
        if stored.key != key:
            await blobs.remove(blob)
        return stored, stored.key == key


async def _stored_size(blobs: BlobStore, key: str) -> int | None:
    try:
        return await blobs.size(key)
    except NotFoundError:
        return None
