"""Where bytes rest: the contract of a blob store, a folder and memory. The only file that knows paths and fsync.

Keys are made by the server, segments joined by `/`, of which an array's name may be one (it has passed `check_name`).
A key is written once and then never changed, but for those that `replace` puts anew.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aq_data.errors import AqDataError, NotFoundError, StorageError, UnavailableError

__all__ = ["BlobEntry", "BlobStore", "FolderBlobs", "MemoryBlobs", "Upload"]

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """One stored blob: size in bytes, last change in seconds since 1970."""

    key: str
    size: int
    modified: float


class Upload(ABC):
    """A blob that arrives in pieces. Nothing stands under its key until `finish` returns; then it is durable."""

    @abstractmethod
    async def write(self, data: Buffer) -> None: ...

    @abstractmethod
    async def finish(self) -> None: ...

    @abstractmethod
    async def discard(self) -> None:
        """Forget what was written; a no-op after `finish`."""


class BlobStore(ABC):
    """Durable bytes under keys; callable from any task of one event loop, several processes at once.

    Absence raises NotFoundError. A store that cannot be reached or is full raises UnavailableError, any other failure
    StorageError: never absence, because a Zarr reader takes absence for "fill value".
    """

    @abstractmethod
    async def put_many(self, items: Sequence[tuple[str, Callable[[], Buffer]]]) -> None:
        """Write each key with what its function returns, called in a worker thread: in any order, in parallel.

        The bytes are durable on return; the names are only after `settle`.
        """

    @abstractmethod
    async def settle(self, prefix: str) -> None:
        """Make every name under `prefix` durable, up to the root of the store."""

    @abstractmethod
    async def get_many(self, keys: Sequence[str], consume: Callable[[int, bytes], None]) -> None:
        """Hand the bytes of `keys[i]` to `consume(i, data)`, called in worker threads, in parallel and in any order.

        NotFoundError naming the first key that is absent; what `consume` raises comes out as it is.
        """

    @abstractmethod
    async def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of one blob in the half-open range [start, stop)."""

    @abstractmethod
    async def size(self, key: str) -> int:
        """Its size in bytes."""

    @abstractmethod
    async def replace(self, key: str, data: Buffer) -> None:
        """Put a blob in place of another: a reader sees all of one or all of the other. Durable on return."""

    @abstractmethod
    async def upload(self, key: str) -> Upload:
        """Begin a blob whose size is not known yet."""

    @abstractmethod
    async def children(self, prefix: str) -> list[str]:
        """Names directly under `prefix` ("" for the root), sorted; empty when there is nothing."""

    @abstractmethod
    def walk(self, prefix: str) -> AsyncIterator[BlobEntry]:
        """Every blob under `prefix`."""

    @abstractmethod
    async def remove(self, prefix: str) -> None:
        """Delete every blob under `prefix`; a no-op when there is none."""

    @abstractmethod
    def location(self, key: str) -> str:
        """The address under which other programs find the key; "" when there is none."""

    @abstractmethod
    async def check(self) -> None:
        """Return when a blob can be written; raise otherwise."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what runs and let go of threads. No other call may follow."""


_TRANSIENT = {"EAGAIN", "EBUSY", "EDQUOT", "EHOSTDOWN", "EIO", "EMFILE", "ENFILE", "ENOSPC", "ESTALE", "ETIMEDOUT", "EROFS"}


def translate(exc: OSError, key: str) -> AqDataError:
    """Our error for the operating system's: absence, what waiting or the operator may mend, and the rest."""
    if isinstance(exc, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return NotFoundError(f"there is no blob {key!r}")
    name = errno.errorcode.get(exc.errno or 0, type(exc).__name__)
    message = f"the blob store failed at {key!r} ({name}): {exc.strerror or exc}"
    return UnavailableError(message) if name in _TRANSIENT else StorageError(message)


@contextmanager
def _border(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise translate(exc, key) from exc


class _Workers:
    """Threads for files and codecs: a few for small requests, so that these never queue behind a large one."""

    QUICK = 4
    """Up to this many keys a request counts as small."""

    def __init__(self) -> None:
        self.width = max(2, os.cpu_count() or 1)
        self._quick = ThreadPoolExecutor(2 * self.width, thread_name_prefix="blob-quick")
        self._bulk = ThreadPoolExecutor(self.width, thread_name_prefix="blob-bulk")

    async def run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._quick, call)

    async def each(self, count: int, call: Callable[[int], None]) -> None:
        """`call(i)` for each i below `count`, spread over the threads; the first failure stops the rest."""
        loop = asyncio.get_running_loop()
        if count <= self.QUICK:
            return await loop.run_in_executor(self._quick, lambda: _in_turn(count, call))
        numbers, lock, failed = itertools.count(), threading.Lock(), threading.Event()

        def work() -> None:
            while not failed.is_set():
                with lock:
                    i = next(numbers)
                if i >= count:
                    return
                try:
                    call(i)
                except BaseException:
                    failed.set()
                    raise

        tasks = [loop.run_in_executor(self._bulk, work) for _ in range(min(self.width, count))]
        try:
            await asyncio.gather(*tasks)
        finally:
            # Also when the caller is cancelled: nobody may write into buffers that are already let go.
            failed.set()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        self._quick.shutdown()
        self._bulk.shutdown()


def _in_turn(count: int, call: Callable[[int], None]) -> None:
    for i in range(count):
        call(i)


OPEN_FILES = 64
"""Files held open at a time while a batch is written."""


class FolderBlobs(BlobStore):
    """Blobs as files under `root`. Success means fsynced: file contents by `put_many`, directory entries by `settle`."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        with _border(str(root)):
            self._root.mkdir(parents=True, exist_ok=True)
        self._workers = _Workers()

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    async def put_many(self, items: Sequence[tuple[str, Callable[[], Buffer]]]) -> None:
        for first in range(0, len(items), OPEN_FILES):
            await self._put_group(items[first : first + OPEN_FILES])

    async def _put_group(self, items: Sequence[tuple[str, Callable[[], Buffer]]]) -> None:
        """All are written before the first is flushed: the journal is then committed once, not once for each."""
        descriptors: list[int] = []

        def write(i: int) -> None:
            key, produce = items[i]
            data = produce()
            with _border(key):
                descriptor = _create(self._path(key))
                descriptors.append(descriptor)
                _write_all(descriptor, data)

        def sync(i: int) -> None:
            with _border(items[i][0]):
                os.fsync(descriptors[i])

        try:
            await self._workers.each(len(items), write)
            await self._workers.each(len(items), sync)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def settle(self, prefix: str) -> None:
        def sync_directories() -> None:
            with _border(prefix):
                for directory, _, _ in os.walk(self._path(prefix), topdown=False):
                    _sync_directory(directory)
                above = Path(self._path(prefix))
                while above != self._root:
                    above = above.parent
                    _sync_directory(str(above))

        await self._workers.run(sync_directories)

    def _read_file(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with _border(key), open(self._path(key), "rb", buffering=0) as file:
            if start:
                file.seek(start)
            length = os.fstat(file.fileno()).st_size - start if stop is None else stop - start
            data = file.read(max(0, length))
            if len(data) < length and stop is None:  # a signal or a network mount may cut a read short
                rest = file.readall()
                data += rest or b""
            return data

    async def get_many(self, keys: Sequence[str], consume: Callable[[int, bytes], None]) -> None:
        await self._workers.each(len(keys), lambda i: consume(i, self._read_file(keys[i])))

    async def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        return await self._workers.run(lambda: self._read_file(key, start, stop))

    async def size(self, key: str) -> int:
        def stat() -> int:
            with _border(key):
                if os.path.isdir(self._path(key)):
                    raise NotFoundError(f"there is no blob {key!r}")
                return os.stat(self._path(key)).st_size

        return await self._workers.run(stat)

    async def replace(self, key: str, data: Buffer) -> None:
        path = self._path(key)
        temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.{time.monotonic_ns()}.tmp"

        def swap() -> None:
            with _border(key):
                try:
                    descriptor = _create(temporary)
                    try:
                        _write_all(descriptor, data)
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)
                    Path(temporary).replace(path)
                except BaseException:
                    Path(temporary).unlink(missing_ok=True)
                    raise
                _sync_directory(os.path.dirname(path))

        await self._workers.run(swap)

    async def upload(self, key: str) -> Upload:
        return await self._workers.run(lambda: _FileUpload(key, self._path(key), self._workers))

    async def children(self, prefix: str) -> list[str]:
        def names() -> list[str]:
            with _border(prefix):
                try:
                    return sorted(os.listdir(self._path(prefix)))
                except (FileNotFoundError, NotADirectoryError):
                    return []

        return await self._workers.run(names)

    async def walk(self, prefix: str) -> AsyncIterator[BlobEntry]:
        def entries() -> list[BlobEntry]:
            found = []
            for directory, _, names in os.walk(self._path(prefix)):
                for name in names:
                    path = os.path.join(directory, name)
                    try:
                        stat = os.stat(path)
                    except FileNotFoundError:
                        continue  # removed meanwhile
                    found.append(BlobEntry(os.path.relpath(path, self._root), stat.st_size, stat.st_mtime))
            return found

        for entry in await self._workers.run(entries):
            yield entry

    async def remove(self, prefix: str) -> None:
        def delete() -> None:
            path = self._path(prefix)
            with _border(prefix):
                try:
                    shutil.rmtree(path)
                except NotADirectoryError:
                    os.unlink(path)
                except FileNotFoundError:
                    return
                _sync_directory(os.path.dirname(path))
                parent = os.path.dirname(path)
                if parent != str(self._root):
                    try:
                        Path(parent).rmdir()
                    except OSError:
                        return  # other attempts lie there
                    _sync_directory(os.path.dirname(parent))

        await self._workers.run(delete)

    def location(self, key: str) -> str:
        return self._path(key)

    async def check(self) -> None:
        await self.replace(".ready", b"")

    async def close(self) -> None:
        # Waits on this thread: at the end of the interpreter no other can be started.
        self._workers.close()


def _create(path: str) -> int:
    """A descriptor of a fresh file, whose folders are made when they are not there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o644)


def _write_all(descriptor: int, data: Buffer) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _FileUpload(Upload):
    """Written in place: the attempt's prefix is not published before `finish`, so no reader can come too early."""

    def __init__(self, key: str, path: str, workers: _Workers) -> None:
        self._key, self._path, self._workers = key, path, workers
        with _border(key):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._file: Any = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by finish or discard)

    async def write(self, data: Buffer) -> None:
        def write() -> None:
            view = memoryview(data).cast("B")
            with _border(self._key):
                while view:
                    view = view[self._file.write(view) :]

        await self._workers.run(write)

    async def finish(self) -> None:
        def sync() -> None:
            with _border(self._key):
                os.fsync(self._file.fileno())
                self._file.close()

        await self._workers.run(sync)

    async def discard(self) -> None:
        def forget() -> None:
            self._file.close()
            Path(self._path).unlink(missing_ok=True)

        if not self._file.closed:
            await self._workers.run(forget)


class MemoryBlobs(BlobStore):
    """Blobs in a dict: for `--memory` servers and tests. Durable as long as the process."""

    def __init__(self) -> None:
        self._blobs: dict[str, BlobEntry] = {}
        self._data: dict[str, bytes] = {}
        self._workers = _Workers()

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

    async def upload(self, key: str) -> Upload:
        return _MemoryUpload(self, key)

    async def children(self, prefix: str) -> list[str]:
        start = f"{prefix}/" if prefix else ""
        return sorted({key[len(start) :].split("/", 1)[0] for key in list(self._blobs) if key.startswith(start)})

    async def walk(self, prefix: str) -> AsyncIterator[BlobEntry]:
        for key, entry in list(self._blobs.items()):
            if key == prefix or key.startswith(f"{prefix}/"):
                yield entry

    async def remove(self, prefix: str) -> None:
        async for entry in self.walk(prefix):
            del self._blobs[entry.key], self._data[entry.key]

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
