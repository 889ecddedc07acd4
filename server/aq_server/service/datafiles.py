"""Use cases of one DataFile: save it, find it, change it, delete it, attach files.

The order of steps is what makes a write true: blobs first, durable, under a prefix of their own; then one insert publishes
the record; success is answered after it. A crash leaves an orphan prefix, which `Maintenance.gc` finds.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from blake3 import blake3

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
    TYPED_FIELDS,
    DataFile,
    FileInfo,
    NewDataFile,
    apply_patch,
    check_file_name,
    check_new,
    make_id,
    next_state,
)
from aq_data.models.values import format_instant
from aq_data.storage.arrays.blobs import Upload
from aq_data.storage.arrays.store import ArrayStore, ArrayWriter, group_prefix
from aq_data.storage.metadata.store import MetadataStore, Record

__all__ = ["TOMBSTONE", "DataFiles", "Save", "StoredFile", "write_newest_copy"]

log = logging.getLogger("aq_data")

TOMBSTONE = "tombstone-"
"""How the names of deletion marks beside the attempts of an id begin."""
HELD_BYTES = 16 << 20
"""Values of one-chunk arrays that wait in memory to be written at one go with the rest of a save."""
COMPARE_AND_SET_TRIES = 50
"""A change without `If-Match` starts over when another came first; this often before it gives up."""


def _now() -> datetime:
    return datetime.now(UTC)


class _FileWriter:
    """One attached file as it arrives: stored, counted and hashed."""

    def __init__(self, name: str, content_type: str, key: str, upload: Upload | None) -> None:
        # What no header could carry back is kept as "some bytes".
        is_plain = content_type.isascii() and content_type.isprintable() and len(content_type) <= 255
        self._name, self._content_type, self._key = name, content_type if is_plain else "application/octet-stream", key
        self._upload = upload
        self._size = 0
        self._sha256 = hashlib.sha256()

    async def write(self, data: memoryview) -> None:
        self._size += len(data)
        self._sha256.update(data)
        if self._upload is not None:
            await self._upload.write(data)

    async def finish(self) -> FileInfo:
        if self._upload is not None:
            await self._upload.finish()
        return FileInfo(self._name, self._size, self._content_type, self._sha256.hexdigest(), self._key)

    async def discard(self) -> None:
        if self._upload is not None:
            await self._upload.discard()


async def write_newest_copy(metadata: MetadataStore, arrays: ArrayStore, record: Record) -> None:
    """Write the copy until it is that of the newest revision: a slower process may have written an older one over it."""
    while True:
        await arrays.write_copy(record.document, record.attempt, record.digest)
        newest = await metadata.get(record.document.id)
        if newest is None or newest.document.revision == record.document.revision or newest.attempt != record.attempt:
            return
        record = newest


class Save:
    """One attempt to save one DataFile: feed arrays and files in any order, then `commit` or `discard`.

    When the id is already taken nothing is stored: the bytes are only hashed, to tell an honest retry from a conflict.
    """

    def __init__(self, service: DataFiles, new: NewDataFile, existing: Record | None) -> None:
        self._service, self._new, self._existing = service, new, existing
        self.id = new.id or make_id(time.time_ns() // 1_000_000, os.urandom(10))
        self._attempt = secrets.token_hex(8)
        self._writers: list[ArrayWriter | None] = [None] * len(new.arrays)
        self._array_digests: dict[int, Any] = {}
        self._current: int | None = None
        self._file: _FileWriter | None = None
        self._files: list[FileInfo] = []
        self._publishing = False
        self._held = 0

    async def begin_array(self, index: int) -> None:
        """The bytes that follow are those of the declared array `index`."""
        if not 0 <= index < len(self._new.arrays) or index in self._array_digests:
            raise ValidationError(f"part array:{index} is not declared in the document, or came twice")
        self._array_digests[index] = blake3()
        self._current = index
        if self._existing is None:
            self._writers[index] = self._service.arrays.writer(self.id, self._attempt, self._new.arrays[index])

    async def begin_file(self, name: str, content_type: str) -> None:
        """The bytes that follow are those of an attached file."""
        check_file_name(name)
        if any(info.name == name for info in self._files):
            raise ValidationError(f"two files are named {name!r}", code="bad_name")
        key = secrets.token_hex(8)
        upload = None
        if self._existing is None:
            upload = await self._service.arrays.blobs.upload(_file_key(self.id, self._attempt, key))
        self._file = _FileWriter(name, content_type, key, upload)

    async def write(self, data: memoryview) -> None:
        """The next bytes of the array or file begun last."""
        if self._file is not None:
            await self._file.write(data)
        elif self._current is not None:
            self._array_digests[self._current].update(data)
            writer = self._writers[self._current]
            if writer is not None:
                await writer.write(data)

    async def end_part(self) -> None:
        """All bytes of the array or file begun last have come."""
        if self._file is not None:
            self._files.append(await self._file.finish())
            self._file = None
        elif self._current is not None:
            writer, self._current = self._writers[self._current], None
            if writer is not None:
                await writer.finish()
                self._held += writer.info.nbytes if writer.pending else 0
                if self._held > HELD_BYTES:
                    for other in self._writers:
                        if other is not None:
                            await other.flush()
                    self._held = 0

    async def commit(self) -> tuple[DataFile, bool]:
        """Publish. The document and whether it is new; ConflictError (`id_taken`) when the id holds other content."""
        for index, array in enumerate(self._new.arrays):
            if index not in self._array_digests:
                await self.begin_array(index)
                await self.end_part()
                if self._existing is not None and all(array.shape):
                    raise ValidationError(f"the values of array {array.name!r} are missing: no part array:{index} came")
        digest = self._digest()
        if self._existing is not None:
            return self._answer_existing(self._existing, digest), False
        document = self._document()
        await self._service.arrays.publish_group(document, self._attempt, digest, [w for w in self._writers if w])
        self._publishing = True
        existing = await self._service.metadata.insert(Record(document, self._attempt, digest))
        if existing is None:
            return document, True
        await self._service.arrays.blobs.remove(f"{self.id}/{self._attempt}")
        return self._answer_existing(existing, digest), False

    async def discard(self) -> None:
        """Undo what was stored. Once publishing has begun its outcome may be unknown: then only `gc` may clean up."""
        if self._publishing:
            return
        for writer in self._writers:
            if writer is not None:
                await writer.discard()
        if self._file is not None:
            await self._file.discard()
        try:
            await self._service.arrays.blobs.remove(f"{self.id}/{self._attempt}")
        except AqDataError as exc:
            log.warning("an abandoned save left blobs for gc", extra={"fields": {"id": self.id, "error": str(exc)}})

    def _digest(self) -> str:
        """BLAKE3 over the canonical document (without its id), every array and every file."""
        canonical = msgspec.structs.replace(self._new, id=None)
        total = blake3(msgspec.json.encode(canonical, order="deterministic"))
        for index in range(len(self._new.arrays)):
            total.update(self._array_digests[index].digest())
        for info in self._files:
            total.update(msgspec.json.encode([info.name, info.content_type, info.size, info.sha256]))
        return str(total.hexdigest())

    def _document(self) -> DataFile:
        now = format_instant(_now())
        infos = tuple(writer.info for writer in self._writers if writer is not None)
        typed = {field: getattr(self._new, field) for field in TYPED_FIELDS}
        return DataFile(
            **typed,
            id=self.id,
            state="complete",
            revision=1,
            created_at=now,
            updated_at=now,
            finished_at=now,
            size=sum(info.nbytes for info in infos) + sum(info.size for info in self._files),
            arrays=infos,
            files=tuple(self._files),
            path=self._service.arrays.blobs.location(group_prefix(self.id, self._attempt)),
        )

    def _answer_existing(self, existing: Record, digest: str) -> DataFile:
        if existing.document.state == "deleted":
            raise ConflictError(f"the id {self.id} belonged to a DataFile that was deleted; save under a new id")
        if existing.digest != digest:
            raise ConflictError(f"the id {self.id} already holds other content; finished data never changes, use a new id")
        return existing.document


def _file_key(id: str, attempt: str, key: str) -> str:
    return f"{id}/{attempt}/files/{key}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An attached file and a way to its bytes: `read(start, stop)` gives pieces of a half-open range."""

    info: FileInfo
    read: Callable[[int, int], AsyncIterator[bytes]]


class DataFiles:
    """The use cases. One instance serves all requests of a process; nothing of value lives in it."""

    def __init__(self, metadata: MetadataStore, arrays: ArrayStore) -> None:
        self.metadata, self.arrays = metadata, arrays

    async def begin_save(self, new: NewDataFile, user: str | None) -> Save:
        """Check the whole declaration and begin an attempt. `user` (from a token) takes the place of the client's word."""
        if user is not None:
            new = msgspec.structs.replace(new, user=user)
        new = check_new(new)
        return Save(self, new, await self.metadata.get(new.id) if new.id is not None else None)

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
        self, id: str, step: Callable[[DataFile, str], DataFile], if_match: int | None, publishes: str = ""
    ) -> DataFile:
        """Replace the document by `step(document, now)`, atomically; then bring the copy beside the blobs up to date.

        StaleRevisionError when `if_match` is not the current revision. Without it the change is made to the newest.
        """
        for _ in range(COMPARE_AND_SET_TRIES):
            record = await self._check_revision(id, if_match)
            changed = msgspec.structs.replace(record, document=step(record.document, format_instant(_now())))
            if changed.document is record.document:
                return record.document
            if await self.metadata.replace(changed, record.document.revision, publishes):
                await self._update_copy(changed)
                return changed.document
        raise UnavailableError(f"DataFile {id} is being changed by many others at once; try again")

    async def _update_copy(self, record: Record) -> None:
        """The change is committed. A copy that cannot be written now is logged; `verify --repair` catches it up."""
        try:
            await write_newest_copy(self.metadata, self.arrays, record)
        except AqDataError as exc:
            log.warning("a metadata copy is behind", extra={"fields": {"id": record.document.id, "error": str(exc)}})

    async def patch(self, id: str, patch: dict[str, Any], if_match: int | None, user: str | None = None) -> DataFile:
        """Merge `patch` (RFC 7396) into the document; see `apply_patch` for what is refused.

        Where tokens tell who the user is (`user` is set), the field `user` cannot be patched.
        """
        if user is not None and "user" in patch:
            raise ValidationError("'user' comes from the token; it cannot be patched")
        return await self.change(id, lambda document, now: apply_patch(document, patch, now), if_match)

    async def delete(self, id: str, if_match: int | None) -> None:
        """Turn the DataFile into a tombstone; its bytes stay until `gc`. Deleting again is NotFoundError (`deleted`)."""
        await self._check_revision(id, if_match)
        # First beside the blobs: a catalogue rebuilt from them must not raise the dead. Each attempt to delete has a mark of
        # its own, so that one that fails never takes away the mark of one that succeeds.
        mark = f"{id}/{TOMBSTONE}{secrets.token_hex(8)}"
        await self.arrays.blobs.replace(mark, msgspec.json.encode({"id": id, "at": format_instant(_now())}))

        def bury(document: DataFile, now: str) -> DataFile:
            state = next_state(document.state, "delete")
            return msgspec.structs.replace(document, state=state, revision=document.revision + 1, updated_at=now)

        try:
            await self.change(id, bury, if_match)
        except (StaleRevisionError, NotFoundError):
            await self.arrays.blobs.remove(mark)
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
        info = next((info for info in record.document.files if info.name == name), None)
        if info is None:
            names = ", ".join(repr(info.name) for info in record.document.files) or "none"
            raise NotFoundError(f"DataFile {id} has no file {name[:80]!r}; it has {names}")
        key = _file_key(id, record.attempt, info.key)
        if await self._stored_size(key) != info.size:
            raise CorruptionError(f"file {name!r} of DataFile {id} is missing or not as long as recorded")

        async def read(start: int, stop: int) -> AsyncIterator[bytes]:
            while start < stop:
                piece = await self.arrays.blobs.get(key, start, min(stop, start + (1 << 20)))
                if not piece:
                    raise CorruptionError(f"file {name!r} of DataFile {id} is shorter than recorded")
                start += len(piece)
                yield piece

        return StoredFile(info, read)

    async def _stored_size(self, key: str) -> int | None:
        try:
            return await self.arrays.blobs.size(key)
        except NotFoundError:
            return None

    async def attach(self, id: str, name: str, content_type: str, body: AsyncIterator[bytes]) -> tuple[FileInfo, bool]:
        """Attach one more file; whether it is new. The same content again is harmless, other content is ConflictError."""
        check_file_name(name)
        record = await self.get(id)
        key = secrets.token_hex(8)
        blob = _file_key(id, record.attempt, key)
        writer = _FileWriter(name, content_type, key, await self.arrays.blobs.upload(blob))
        try:
            async for piece in body:
                await writer.write(memoryview(piece))
            info = await writer.finish()
            await self.arrays.blobs.settle(f"{id}/{record.attempt}/files")
        except BaseException:
            await writer.discard()
            raise

        def add(document: DataFile, now: str) -> DataFile:
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
            document = await self.change(id, add, None, publishes=key)
        except (ConflictError, NotFoundError):
            await self.arrays.blobs.remove(blob)
            raise
        stored = next(other for other in document.files if other.name == name)
        if stored.key != key:
            await self.arrays.blobs.remove(blob)
        return stored, stored.key == key
