"""The contract of a blob store over a bucket: one request for each blob, many at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from aq_data.errors import AqDataError, NotFoundError, StorageError
from aq_data.storage.arrays._bucket import Bucket, Page, Parts, asking, refusal, translate
from aq_data.storage.arrays.blobs import BlobEntry, BlobStore, Buffer, Upload
from aq_data.storage.arrays.chunking import BUCKET_TARGET_BYTES
from aq_data.storage.arrays.workers import Workers

__all__ = ["CONNECTIONS", "BucketBlobs"]

T = TypeVar("T")

CONNECTIONS = 128
"""To the bucket, of all that a server does at a time."""
AT_ONCE = 32
"""Requests of one call at a time."""
PART_BYTES = 8 << 20
"""What an upload holds in memory; a smaller blob is one request. Parts grow, so that 10,000 of them hold a terabyte."""
PARTS_OF_A_SIZE = 250
WHOLE_BYTES = 32 << 20
"""What a blob that is read whole is given time for; it is nearly always a chunk."""
READY = 64
"""Places that `check` writes to: a provider allows about one write in a second to the same."""


class BucketBlobs(BlobStore):
    """Blobs in a bucket. A blob is durable and named when its request is answered, so there is nothing to settle."""

    chunk_bytes = BUCKET_TARGET_BYTES

    def __init__(self, address: str, root: str, kind: type[Bucket], make: Callable[[], Bucket]) -> None:
        """`root` is put before every key. `make` is called by the first request, in a thread, to make one of its `kind`."""
        self._address, self._root, self._kind, self._make = address, root, kind, make
        self._bucket: Bucket | None = None
        self._opening = asyncio.Lock()
        self._workers = Workers()

    async def ask(
        self, key: str, call: Callable[[Bucket], Awaitable[T]], nbytes: int = 0, *, may_be_absent: bool = False
    ) -> T:
        """What `call` returns, with the errors of a blob store.

        Absence only where it `may_be_absent`, and when it is the key's: an answer that does not say so may be that of a
        missing bucket or of something else at its endpoint, and costs a request more.
        """
        bucket = await self._opened(key)
        try:
            return await asking(bucket, self._address, key, lambda: call(bucket), nbytes)
        except StorageError as exc:
            refused = refusal(bucket, exc.__cause__)
            if not may_be_absent or refused is None or refused.status != 404 or refused.code == "NoSuchBucket":
                raise
        await asking(bucket, self._address, key, lambda: bucket.page(self._root, "", "", 1))
        raise NotFoundError(f"there is no blob {key!r} in {self._address}")

    async def _opened(self, key: str) -> Bucket:
        if self._bucket is None:
            async with self._opening:
                if self._bucket is None:
                    try:
                        self._bucket = await self._workers.run(self._make)
                    except self._kind.failures as exc:
                        raise translate(self._kind, self._address, exc, key) from exc
        return self._bucket

    async def put_many(self, items: Sequence[tuple[str, Callable[[], Buffer]]]) -> None:
        if len(items) <= Workers.QUICK:
            made: list[Buffer] = []
            await self._workers.run(lambda: made.extend(produce() for _, produce in items))
            await self._lanes(len(items), lambda i: self._put(items[i][0], made[i]))
            return

        async def put(i: int) -> None:
            key, produce = items[i]
            await self._put(key, await self._workers.run(produce, is_bulk=True))

        await self._lanes(len(items), put)

    async def _put(self, key: str, data: Buffer) -> None:
        content = memoryview(data).cast("B") if not isinstance(data, (bytes, bytearray)) else data
        await self._write(key, lambda bucket: bucket.put(self._root + key, content), len(content))

    async def _write(
        self, key: str, call: Callable[[Bucket], Awaitable[None]], nbytes: int = 0, *, may_be_absent: bool = False
    ) -> None:
        """As `ask`. Who is cancelled waits for the answer: obeyed later, it would bring back what he removes."""
        sent = asyncio.create_task(self.ask(key, call, nbytes, may_be_absent=may_be_absent))
        try:
            await asyncio.shield(sent)
        except asyncio.CancelledError:
            while not sent.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({sent})
            if not sent.cancelled():
                sent.exception()  # nobody is left to be told
            raise

    async def settle(self, prefix: str) -> None:
        """Nothing: what a bucket has acknowledged has its name."""

    async def get_many(self, keys: Sequence[str], consume: Callable[[int, bytes], None]) -> None:
        if len(keys) <= Workers.QUICK:
            found: list[bytes] = [b""] * len(keys)

            async def fetch(i: int) -> None:
                found[i] = await self.get(keys[i])

            await self._lanes(len(keys), fetch)
            await self._workers.each(len(keys), lambda i: consume(i, found[i]))
            return

        async def get(i: int) -> None:
            data = await self.get(keys[i])
            await self._workers.run(lambda: consume(i, data), is_bulk=True)

        await self._lanes(len(keys), get)

    async def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            await self.size(key)
            return b""
        nbytes = WHOLE_BYTES if stop is None else stop - start
        return await self.ask(key, lambda bucket: bucket.get(self._root + key, start, stop), nbytes, may_be_absent=True)

    async def size(self, key: str) -> int:
        return await self.ask(key, lambda bucket: bucket.size(self._root + key), may_be_absent=True)

    async def replace(self, key: str, data: Buffer) -> None:
        await self._put(key, data)

    async def copy_many(self, pairs: Sequence[tuple[str, str]]) -> None:
        async def copy(i: int) -> None:
            source, target = pairs[i]
            try:
                await self._write(
                    source, lambda bucket: bucket.copy(self._root + source, self._root + target), may_be_absent=True
                )
            except NotFoundError as absent:
                try:
                    await self.size(target)
                except NotFoundError:
                    raise absent from None

        await self._lanes(len(pairs), copy)

    async def upload(self, key: str) -> Upload:
        return _BucketUpload(self, key)

    async def begin(self, key: str) -> Parts:
        """An upload in parts."""
        return await self.ask(key, lambda bucket: bucket.begin(self._root + key))

    async def children(self, prefix: str) -> list[str]:
        start = f"{prefix}/" if prefix else ""
        names: set[str] = set()
        async for page in self._pages(start, "/"):
            names.update(folder.removeprefix(self._root + start).rstrip("/") for folder in page.folders)
            names.update(entry.key.removeprefix(self._root + start) for entry in page.entries)
        return sorted(names - {""})

    async def _pages(self, prefix: str, delimiter: str = "") -> AsyncIterator[Page]:
        following = ""
        while True:
            at = following
            page = await self.ask(prefix, lambda bucket: bucket.page(self._root + prefix, delimiter, at))  # noqa: B023
            yield page
            following = page.following
            if not following:
                return

    async def walk(self, prefix: str, *, folders: bool = False) -> AsyncIterator[BlobEntry]:  # noqa: ARG002  (it has none)
        async for entries in self._entries(prefix):
            for entry in entries:
                yield entry

    async def _entries(self, prefix: str) -> AsyncIterator[list[BlobEntry]]:
        """One listing finds the blob of that very name and those below it, and neighbours that begin alike."""
        async for page in self._pages(prefix):
            found = [BlobEntry(entry.key.removeprefix(self._root), entry.size, entry.modified) for entry in page.entries]
            yield [e for e in found if not prefix or e.key == prefix or e.key.startswith(f"{prefix}/")]

    async def remove(self, prefix: str) -> None:
        async for entries in self._entries(prefix):
            await self.remove_many([entry.key for entry in entries])

    async def remove_many(self, keys: Sequence[str]) -> None:
        size = self._kind.deleted_at_once
        batches = [[self._root + key for key in keys[i : i + size]] for i in range(0, len(keys), size)]
        await self._lanes(len(batches), lambda i: self.ask(keys[i * size], lambda bucket: bucket.delete(batches[i])))

    def location(self, key: str) -> str:
        return f"{self._address}/{key}"

    async def check(self) -> None:
        await self.replace(f".ready-{os.getpid() % READY}", b"")

    async def close(self) -> None:
        # Waits on this thread: at the end of the interpreter no other can be started.
        self._workers.close()
        if self._bucket is not None:
            await self._bucket.close()

    async def _lanes(self, count: int, work: Callable[[int], Awaitable[None]]) -> None:
        """`work(i)` for each i below `count`, `AT_ONCE` at a time; the first failure stops the rest, and comes out."""
        if count == 1:
            await work(0)
            return
        numbers = iter(range(count))

        async def lane() -> None:
            for i in numbers:
                await work(i)

        tasks = [asyncio.create_task(lane()) for _ in range(min(AT_ONCE, count))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            while not all(task.done() for task in tasks):
                try:
                    await asyncio.wait(tasks)
                except asyncio.CancelledError:
                    continue


class _BucketUpload(Upload):
    """Holds one part; what fits into one is sent as one blob."""

    def __init__(self, blobs: BucketBlobs, key: str) -> None:
        self._blobs, self._key = blobs, key
        self._held = bytearray()
        self._parts: Parts | None = None
        self._count = 0
        self._is_over = False

    @property
    def _part_bytes(self) -> int:
        return PART_BYTES * (1 + self._count // PARTS_OF_A_SIZE)

    async def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        while view:  # the last part is held back: it has to be sent as such
            if len(self._held) == self._part_bytes:
                await self._send(is_last=False)
            taken = min(len(view), self._part_bytes - len(self._held))
            self._held += view[:taken]
            view = view[taken:]

    async def _send(self, is_last: bool) -> None:
        if self._parts is None:
            self._parts = await self._blobs.begin(self._key)
        parts, part = self._parts, bytes(self._held)
        await self._blobs.ask(self._key, lambda _: parts.send(part, is_last), len(part))
        self._held.clear()
        self._count += 1

    async def finish(self) -> None:
        if self._parts is None:
            await self._blobs.replace(self._key, self._held)
        else:
            await self._send(is_last=True)
        self._is_over = True
        self._held = bytearray()

    async def discard(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._held = bytearray()
        if self._parts is not None:
            parts = self._parts
            try:
                await self._blobs.ask(self._key, lambda _: parts.abort())
            except AqDataError:
                return  # the provider forgets it after the time that the bucket's rules say
