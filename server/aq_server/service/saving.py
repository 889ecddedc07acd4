"""One attempt to save one DataFile, and the bytes of attached files as they arrive.

The order of steps is what makes a write true: blobs first, durable, under a prefix of their own; then one insert publishes
the record; success is answered after it. A crash leaves an orphan prefix, which `Maintenance.gc` finds.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from blake3 import blake3

from aq_data.errors import AqDataError, ConflictError, ValidationError
from aq_data.models.datafile import TYPED_FIELDS, DataFile, FileInfo, NewDataFile, check_file_name, make_id
from aq_data.models.values import format_instant
from aq_data.storage.arrays.blobs import Upload
from aq_data.storage.arrays.store import group_prefix
from aq_data.storage.arrays.stores import Target
from aq_data.storage.arrays.writing import ArrayWriter
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore

__all__ = ["FileWriter", "Save", "file_key", "now"]

log = logging.getLogger("aq_data")

HELD_BYTES = 16 << 20
"""Values of one-chunk arrays that wait in memory to be written at one go with the rest of a save."""
DISCARD_SECONDS = 2.0
"""For undoing a save. Where a store is down its client should not wait for that twice; `gc` has what is left."""


def now() -> datetime:
    """The present, in UTC."""
    return datetime.now(UTC)


class FileWriter:
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


class Save:
    """One attempt to save one DataFile: feed arrays and files in any order, then `commit` or `discard`.

    When the id is already taken nothing is stored: the bytes are only hashed, to tell an honest retry from a conflict.
    """

    def __init__(self, metadata: MetadataStore, new: NewDataFile, home: Target | Record) -> None:
        """`home` is where to save, or what has the id already."""
        self._metadata, self._new, self._home = metadata, new, home
        self.id = new.id or make_id(time.time_ns() // 1_000_000, os.urandom(10))
        self._attempt = secrets.token_hex(8)
        self._writers: list[ArrayWriter | None] = [None] * len(new.arrays)
        self._array_digests: dict[int, Any] = {}
        self._current: int | None = None
        self._file: FileWriter | None = None
        self._files: list[FileInfo] = []
        self._publishing = False
        self._held = 0

    async def begin_array(self, index: int) -> None:
        """The bytes that follow are those of the declared array `index`."""
        if not 0 <= index < len(self._new.arrays) or index in self._array_digests:
            raise ValidationError(f"part array:{index} is not declared in the document, or came twice")
        self._array_digests[index] = blake3()
        self._current = index
        if isinstance(self._home, Target):
            self._writers[index] = self._home.arrays.writer(self.id, self._attempt, self._new.arrays[index])

    async def begin_file(self, name: str, content_type: str) -> None:
        """The bytes that follow are those of an attached file."""
        check_file_name(name)
        if any(info.name == name for info in self._files):
            raise ValidationError(f"two files are named {name!r}", code="bad_name")
        key = secrets.token_hex(8)
        upload = None
        if isinstance(self._home, Target):
            upload = await self._home.arrays.blobs.upload(file_key(self.id, self._attempt, key))
        self._file = FileWriter(name, content_type, key, upload)

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

    async def commit(self, at: datetime | None = None) -> tuple[DataFile, bool]:
        """Publish. The document and whether it is new; ConflictError (`id_taken`) when the id holds other content.

        `at`: when it counts as saved, for those who save several at once in an order; else now.
        """
        for index, array in enumerate(self._new.arrays):
            if index not in self._array_digests:
                await self.begin_array(index)
                await self.end_part()
                if isinstance(self._home, Record) and all(array.shape):
                    raise ValidationError(f"the values of array {array.name!r} are missing: no part array:{index} came")
        digest = self._digest()
        if isinstance(self._home, Record):
            return self._answer_existing(self._home, digest), False
        document, arrays = self._document(self._home, at or now()), self._home.arrays
        snapshot = await arrays.publish_group(document, self._attempt, digest, [w for w in self._writers if w])
        await self._home.confirm()
        self._publishing = True
        existing = await self._metadata.insert(Record(document, self._attempt, digest))
        if existing is None:
            if snapshot is not None:
                await arrays.keep_snapshot(snapshot)
            return document, True
        await arrays.blobs.remove(f"{self.id}/{self._attempt}")
        return self._answer_existing(existing, digest), False

    async def discard(self) -> None:
        """Undo what was stored. Once publishing has begun its outcome may be unknown: then only `gc` may clean up."""
        if self._publishing or isinstance(self._home, Record):
            return
        for writer in self._writers:
            if writer is not None:
                await writer.discard()
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                if self._file is not None:
                    await self._file.discard()
                await self._home.arrays.blobs.remove(f"{self.id}/{self._attempt}")
        except (AqDataError, TimeoutError) as exc:
            log.warning("an abandoned save left blobs for gc", extra={"fields": {"id": self.id, "error": str(exc)}})

    def _digest(self) -> str:
        """BLAKE3 over the canonical document (without id and store), every array and every file."""
        canonical = msgspec.structs.replace(self._new, id=None, store=msgspec.UNSET)
        total = blake3(msgspec.json.encode(canonical, order="deterministic"))
        for index in range(len(self._new.arrays)):
            total.update(self._array_digests[index].digest())
        for info in self._files:
            total.update(msgspec.json.encode([info.name, info.content_type, info.size, info.sha256]))
        return str(total.hexdigest())

    def _document(self, home: Target, at: datetime) -> DataFile:
        saved_at = format_instant(at)
        infos = tuple(writer.info for writer in self._writers if writer is not None)
        typed = {field: getattr(self._new, field) for field in TYPED_FIELDS}
        return DataFile(
            **typed,
            id=self.id,
            state="complete",
            revision=1,
            created_at=saved_at,
            updated_at=saved_at,
            finished_at=saved_at,
            size=sum(info.nbytes for info in infos) + sum(info.size for info in self._files),
            arrays=infos,
            files=tuple(self._files),
            path=group_prefix(self.id, self._attempt),
            store=home.name,
            intended_store=home.intended,
        )

    def _answer_existing(self, existing: Record, digest: str) -> DataFile:
        if existing.document.state == "deleted":
            raise ConflictError(f"the id {self.id} belonged to a DataFile that was deleted; save under a new id")
        if existing.digest != digest:
            raise ConflictError(f"the id {self.id} already holds other content; finished data never changes, use a new id")
        return existing.document


def file_key(id: str, attempt: str, key: str) -> str:
    """Where the blob of an attached file lies."""
    return f"{id}/{attempt}/files/{key}"
