"""The contract of a blob store: where bytes rest.

Keys are made by the server, segments joined by `/`, of which an array's name may be one (it has passed `check_name`).
A key is written once and then never changed, but for those that `replace` puts anew.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

from aq_data.storage.arrays.chunking import TARGET_BYTES

__all__ = ["BlobEntry", "BlobStore", "Buffer", "Upload"]

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """One stored blob: size in bytes, last change in seconds since 1970."""

    key: str
    size: int
    modified: float

    @property
    def age(self) -> float:
        """Seconds since then, none where the store's clock is ahead of ours."""
        return max(0.0, time.time() - self.modified)


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

    chunk_bytes = TARGET_BYTES
    """How large a chunk of an array is best here, before it is compressed."""

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
    async def copy_many(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Let the bytes of each (source, target) stand under the target too, without moving them through this process.

        What stands under a target already stays, or is replaced whole where a bucket cannot promise that: only equal bytes
        may be copied to one target. Durable as `put_many` is. NotFoundError when a source is absent and its target is, too.
        """

    @abstractmethod
    async def upload(self, key: str) -> Upload:
        """Begin a blob whose size is not known yet."""

    @abstractmethod
    async def children(self, prefix: str) -> list[str]:
        """Names directly under `prefix` ("" for the root), sorted; empty when there is nothing."""

    @abstractmethod
    def walk(self, prefix: str, *, folders: bool = False) -> AsyncIterator[BlobEntry]:
        """Every blob under `prefix`; those that a longer prefix has in common follow one another.

        With `folders` also folders in which nothing lies, where there are such, as keys that end in `/`. Costs a bucket one
        request for each thousand blobs, one after another.
        """

    @abstractmethod
    async def remove(self, prefix: str) -> None:
        """Delete every blob under `prefix`; a no-op when there is none."""

    @abstractmethod
    async def remove_many(self, keys: Sequence[str]) -> None:
        """Delete single blobs; those that are not there are passed over."""

    @abstractmethod
    def location(self, key: str) -> str:
        """The address under which other programs find the key; "" when there is none."""

    def check_names(self, names: Iterable[str]) -> None:  # noqa: B027  (most tell all apart)
        """Refuse names of arrays that this store would take for one another; a no-op where it tells all apart."""

    async def is_bare(self) -> bool:
        """Whether it is a folder in which nothing lies: a new one, or the place where a disk is to be mounted."""
        return False

    @abstractmethod
    async def check(self) -> None:
        """Return when a blob can be written; raise otherwise."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what runs and let go of threads. No other call may follow."""
