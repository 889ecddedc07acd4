"""Blobs as files: the only place that knows paths and fsync."""

from __future__ import annotations

import errno
import os
import threading
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from aq_data.errors import AqDataError, NotFoundError, StorageError, UnavailableError, ValidationError
from aq_data.storage.arrays import _files
from aq_data.storage.arrays.blobs import BlobEntry, BlobStore, Buffer, Upload
from aq_data.storage.arrays.workers import Workers

__all__ = ["FolderBlobs", "translate"]

_TRANSIENT = frozenset(
    "EAGAIN EBUSY EDQUOT EHOSTDOWN EIO EMFILE ENFILE ENOSPC ESTALE ETIMEDOUT EROFS".split()  # noqa: SIM905
)


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


_NO_LINKS = frozenset((errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))

OPEN_FILES = 64
"""Files held open at a time while a batch is written."""
LISTED = 1000
"""Entries of a listing that are in memory at a time."""


@contextmanager
def _writing(key: str) -> Iterator[None]:
    """As `_border`, but what is in a writer's way is no absence."""
    try:
        yield
    except OSError as exc:
        error = translate(exc, key)
        if isinstance(exc, FileNotFoundError):
            error = UnavailableError(f"the folder of {key!r} was removed while it was written; send it again")
        elif isinstance(error, NotFoundError):
            error = StorageError(f"the blob store cannot write {key!r}: {exc.strerror or exc}")
        raise error from exc


class FolderBlobs(BlobStore):
    """Blobs as files under `root`. Success means fsynced: file contents by `put_many`, directory entries by `settle`."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        with _border(str(root)):
            self._root.mkdir(parents=True, exist_ok=True)
            self._identity = self._identify()
        self._folds_names = _files.folds_names(self._root)
        self._workers = Workers()

    def check_names(self, names: Iterable[str]) -> None:
        known: dict[str, str] = {}
        for name in names if self._folds_names else ():
            other = known.setdefault(unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()), name)
            if other != name:
                raise ValidationError(
                    f"the arrays {other!r} and {name!r} have one name in {self._root}, whose file system does not tell them "
                    "apart; rename one, or use another store",
                    code="bad_name",
                )

    def _identify(self) -> tuple[int, int]:
        stat = os.stat(self._root)
        return stat.st_dev, stat.st_ino

    def _check_root(self) -> None:
        """UnavailableError when another folder has taken the place of the root, and nothing lies in it.

        That is what a disk leaves that is no longer mounted. What is written there would be hidden by the disk when it comes
        back, and what cannot be found there is not absent.
        """
        try:
            identity = self._identify()
            if identity == self._identity:
                return
            if self._has_anything():
                self._identity = identity  # mounted again
                return
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as exc:
            raise translate(exc, "") from exc
        raise UnavailableError(f"the folder {self._root} is not the one that was opened, and empty: is its disk mounted?")

    def _has_anything(self) -> bool:
        with os.scandir(self._root) as entries:
            return any(not entry.name.startswith(".") for entry in entries)

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
            self._check_root()
            with _writing(key):
                descriptor = _files.create(self._path(key))
                descriptors.append(descriptor)
                _files.write_all(descriptor, data)

        def sync(i: int) -> None:
            with _writing(items[i][0]):
                os.fsync(descriptors[i])

        try:
            await self._workers.each(len(items), write)
            await self._workers.each(len(items), sync)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def settle(self, prefix: str) -> None:
        def sync_directories() -> None:
            with _writing(prefix):
                for directory, _, _ in os.walk(self._path(prefix), topdown=False, onerror=_files.refuse):
                    _files.sync_directory(directory)
                above = Path(self._path(prefix))
                while above != self._root:
                    above = above.parent
                    _files.sync_directory(str(above))

        await self._workers.run(sync_directories)

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        """As `_border`; absence counts only in the folder that was opened."""
        try:
            with _border(key):
                yield
        except NotFoundError:
            self._check_root()
            raise

    def _read_file(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with self._reading(key), open(self._path(key), "rb", buffering=0) as file:
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
            with self._reading(key):
                if os.path.isdir(self._path(key)):
                    raise NotFoundError(f"there is no blob {key!r}")
                return os.stat(self._path(key)).st_size

        return await self._workers.run(stat)

    async def replace(self, key: str, data: Buffer) -> None:
        path = self._path(key)
        temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.{time.monotonic_ns()}.tmp"

        def swap() -> None:
            self._check_root()
            with _writing(key):
                for _ in range(_files.RACES):
                    try:
                        _files.replace(path, temporary, data)
                        return
                    except FileNotFoundError:
                        continue  # the temporary file was collected as an orphan
                _files.replace(path, temporary, data)

        await self._workers.run(swap)

    async def copy_many(self, pairs: Sequence[tuple[str, str]]) -> None:
        await self._workers.each(len(pairs), lambda i: self._copy(*pairs[i]))

    def _copy(self, source: str, target: str) -> None:
        """A second name for the file, which was flushed under its first; a copy where the file system has no such names."""
        self._check_root()
        with _border(source):
            try:
                _files.link(self._path(source), self._path(target))
                return
            except OSError as exc:
                if exc.errno not in _NO_LINKS:
                    raise
            data = self._read_file(source)
        temporary = f"{self._path(target)}.{os.getpid()}.{threading.get_ident()}.{time.monotonic_ns()}.tmp"
        with _writing(target):
            _files.replace(self._path(target), temporary, data)

    async def upload(self, key: str) -> Upload:
        def begin() -> Upload:
            self._check_root()
            return _FileUpload(key, self._path(key), self._workers)

        return await self._workers.run(begin)

    async def children(self, prefix: str) -> list[str]:
        def names() -> list[str]:
            with _border(prefix):
                try:
                    return sorted(os.listdir(self._path(prefix)))
                except (FileNotFoundError, NotADirectoryError):
                    self._check_root()
                    return []

        return await self._workers.run(names)

    async def is_bare(self) -> bool:
        def look() -> bool:
            with _border(""):
                return not self._has_anything()

        return await self._workers.run(look)

    def _entries(self, prefix: str, folders: bool) -> Iterator[BlobEntry]:
        top = self._path(prefix)
        if not os.path.isdir(top):
            yield from self._entry(top)
            return
        for directory, below, names in os.walk(top, onerror=_files.refuse):
            for name in names:
                yield from self._entry(os.path.join(directory, name))
            if folders and not below and not names and directory != top:
                yield from self._entry(directory, "/")

    def _entry(self, path: str, end: str = "") -> Iterator[BlobEntry]:
        try:
            stat = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return  # removed meanwhile
        yield BlobEntry(os.path.relpath(path, self._root) + end, 0 if end else stat.st_size, stat.st_mtime)

    async def walk(self, prefix: str, *, folders: bool = False) -> AsyncIterator[BlobEntry]:
        await self._workers.run(self._check_root)
        entries = self._entries(prefix, folders)

        def take() -> list[BlobEntry]:
            with _border(prefix):
                return list(islice(entries, LISTED))

        while batch := await self._workers.run(take):
            for entry in batch:
                yield entry

    async def remove(self, prefix: str) -> None:
        def delete() -> None:
            path = self._path(prefix)
            with _border(prefix):
                try:
                    _files.remove_tree(path)
                except NotADirectoryError:
                    Path(path).unlink(missing_ok=True)
                except FileNotFoundError:
                    return
                _files.sync_directory(os.path.dirname(path))
                parent = os.path.dirname(path)
                if parent != str(self._root):
                    try:
                        Path(parent).rmdir()
                    except OSError:
                        return  # other attempts lie there
                    _files.sync_directory(os.path.dirname(parent))

        await self._workers.run(delete)

    async def remove_many(self, keys: Sequence[str]) -> None:
        def unlink(i: int) -> None:
            with _border(keys[i]):
                Path(self._path(keys[i])).unlink(missing_ok=True)

        await self._workers.each(len(keys), unlink)

        def settle() -> None:
            for folder in {os.path.dirname(self._path(key)) for key in keys}:
                with _border(folder):
                    try:
                        Path(folder).rmdir()
                    except FileNotFoundError:
                        continue
                    except OSError:  # others lie there
                        _files.sync_directory(folder)

        await self._workers.run(settle)

    def location(self, key: str) -> str:
        return self._path(key)

    async def check(self) -> None:
        await self.replace(".ready", b"")

    async def close(self) -> None:
        # Waits on this thread: at the end of the interpreter no other can be started.
        self._workers.close()


class _FileUpload(Upload):
    """Written beside its place and renamed into it."""

    def __init__(self, key: str, path: str, workers: Workers) -> None:
        self._key, self._path, self._workers = key, path, workers
        self._partial = f"{path}.part"
        with _writing(key):
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, "a folder stands there", path)
            self._descriptor: int | None = _files.create(self._partial)

    async def write(self, data: Buffer) -> None:
        def write() -> None:
            assert self._descriptor is not None
            with _writing(self._key):
                _files.write_all(self._descriptor, data)

        await self._workers.run(write)

    async def finish(self) -> None:
        def sync() -> None:
            assert self._descriptor is not None
            with _writing(self._key):
                os.fsync(self._descriptor)
                self._close()
                Path(self._partial).replace(self._path)

        await self._workers.run(sync)

    async def discard(self) -> None:
        def forget() -> None:
            with _writing(self._key):
                self._close()
                Path(self._partial).unlink(missing_ok=True)

        if self._descriptor is not None:
            await self._workers.run(forget)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
