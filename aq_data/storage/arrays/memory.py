"""Blobs in memory: for `--memory` servers and tests."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence

from aq_data.errors import NotFoundError
from aq_data.storage.arrays.blobs import BlobEntry, BlobStore, Buffer, Upload
from aq_data.storage.arrays.workers import Workers

__all__ = ["MemoryBlobs"]


class MemoryBlobs(BlobStore):
    """Blobs in a dict, durable as long as the process."""

    def __init__(self) -> None:
        self._blobs: dict[str, BlobEntry] = {}
        self._data: dict[str, bytes] = {}
        self._workers = Workers()

    def _put(self, key: str, data: Buffer) -> None:
        self._data[key] = bytes(data)
        self._blobs[key] = BlobEntry(key, len(self._data[key]), time.time())

    def _get(self, key: str) -> bytes:
        try:
            return self._data[key]
        except KeyError:
            raise NotFoundError(f"there is no blob {key!r}") from None

    async def put_many(self, items: Sequence[tuple[str, Callable[[], Buffer]]]) -> None:
        await self._workers.each(len(items), lambda i: self._put(items[i][0], items[i][1]()))

    async def settle(self, prefix: str) -> None:  # noqa: ARG002  (nothing outlives the process)
        return None

    async def get_many(self, keys: Sequence[str], consume: Callable[[int, bytes], None]) -> None:
        await self._workers.each(len(keys), lambda i: consume(i, self._get(keys[i])))

    async def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        return self._get(key)[start:stop]

    async def size(self, key: str) -> int:
        return len(self._get(key))

    async def replace(self, key: str, data: Buffer) -> None:
        self._put(key, data)

    async def copy_many(self, pairs: Sequence[tuple[str, str]]) -> None:
        for source, target in pairs:
            if target not in self._blobs:
                self._put(target, self._get(source))

    async def upload(self, key: str) -> Upload:
        return _MemoryUpload(self, key)

    async def children(self, prefix: str) -> list[str]:
        start = f"{prefix}/" if prefix else ""
        return sorted({key[len(start) :].split("/", 1)[0] for key in list(self._blobs) if key.startswith(start)})

    async def walk(self, prefix: str, *, folders: bool = False) -> AsyncIterator[BlobEntry]:  # noqa: ARG002  (it has none)
        for key, entry in sorted(self._blobs.items()):
            if not prefix or key == prefix or key.startswith(f"{prefix}/"):
                yield entry

    async def remove(self, prefix: str) -> None:
        await self.remove_many([entry.key async for entry in self.walk(prefix)])

    async def remove_many(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._blobs.pop(key, None)
            self._data.pop(key, None)

    def location(self, key: str) -> str:  # noqa: ARG002  (no other program can come here)
        return ""

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        # Waits on this thread: at the end of the interpreter no other can be started.
        self._workers.close()


class _MemoryUpload(Upload):
    def __init__(self, store: MemoryBlobs, key: str) -> None:
        self._store, self._key, self._parts = store, key, [b""]

    async def write(self, data: Buffer) -> None:
        self._parts.append(bytes(data))

    async def finish(self) -> None:
        await self._store.replace(self._key, b"".join(self._parts))

    async def discard(self) -> None:
        self._parts.clear()
