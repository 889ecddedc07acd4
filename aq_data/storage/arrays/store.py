"""Arrays over any blob store: written as they arrive, read chunk by chunk.

The layout of one attempt to save is `<id>/<attempt>/arrays.zarr/…` and `<id>/<attempt>/files/…`; a prefix of its own keeps
the loser of a race away from the winner's bytes. Large instruments lie once in `snapshots/`, whoever refers to them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from aq_data.errors import CorruptionError, NotFoundError
from aq_data.models.arrays import ArrayInfo, NewArray, fill_of, parse_dtype
from aq_data.models.datafile import DataFile
from aq_data.models.selection import Selection
from aq_data.models.snapshots import Snapshot, separated, snapshot_hash
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.chunking import ChunkPart, chunk_grid, chunk_parts, split_by_size
from aq_data.storage.arrays.format import array_document, chunk_key, decode_chunk, group_document, is_string, unpack
from aq_data.storage.arrays.manifest import FULL, NOTHING, PART, decode_mask, written_prefix
from aq_data.storage.arrays.writing import TEXT_ITEM, ArrayWriter, plan_array

__all__ = ["SNAPSHOTS", "ArrayStore", "group_prefix", "orthogonal", "snapshot_key"]

SNAPSHOTS = "snapshots"
"""The only name beside the ids in the root of a store that is ours."""

SLAB_BYTES = 32 << 20
"""Values per piece of a large read."""
LEAST_SLAB_BYTES = 1 << 20
SMALL_READ_CHUNKS = 4
SMALL_AROUND_SECONDS = 0.03
PAUSE_SECONDS = 0.003
"""While somebody reads slices, a stream pauses so long after each piece: it has half the throughput, they their latency."""
KEPT_COVERAGES = 64

Index = tuple["slice | np.ndarray[Any, Any]", ...]


def group_prefix(id: str, attempt: str) -> str:
    """Key of the Zarr group of an attempt."""
    return f"{id}/{attempt}/arrays.zarr"


def snapshot_key(hash: str) -> str:
    """Key of a snapshot: one for all attempts whose metadata copies refer to it."""
    return f"{SNAPSHOTS}/{hash}.json"


class ArrayStore:
    """Reads and writes the arrays of attempts in one blob store. Arrays of a published attempt never change."""

    def __init__(self, blobs: BlobStore, scratch: Path | None = None) -> None:
        """`scratch` is a folder for buffers too large for memory; None is the system's."""
        self.blobs, self._scratch = blobs, scratch
        self._streams = 0
        self._last_small = 0.0
        self._coverages: dict[str, np.ndarray[Any, Any]] = {}

    def writer(self, id: str, attempt: str, new: NewArray) -> ArrayWriter:
        """Begin one array of an attempt."""
        return ArrayWriter(self.blobs, group_prefix(id, attempt), plan_array(new, self.blobs.chunk_bytes), self._scratch)

    async def publish_group(
        self, document: DataFile, attempt: str, digest: str, writers: list[ArrayWriter]
    ) -> Snapshot | None:
        """Store what the writers hold back, every `zarr.json`, and make the whole attempt durable.

        The document's snapshot, when it has one, is stored too, and returned: once the record is published,
        `keep_snapshot` has to be called again, for until then a `gc` may take it.
        """
        self.blobs.check_names(array.name for array in document.arrays)
        separate, snapshot = separated(document)
        prefix = group_prefix(document.id, attempt)
        items = [item for writer in writers for item in writer.pending]
        for array in document.arrays if document.state != "open" else ():
            encoded = msgspec.json.format(msgspec.json.encode(array_document(array)), indent=1)
            items.append((f"{prefix}/{array.name}/zarr.json", lambda encoded=encoded: encoded))  # type: ignore[misc]
        items.append((f"{prefix}/zarr.json", lambda: group_document(separate, digest, snapshot=_hash_of(snapshot))))
        storing = [self.blobs.put_many(items), *([self.keep_snapshot(snapshot)] if snapshot is not None else [])]
        # A failure comes out when nothing is under way any more: who removes what was stored must find all of it.
        for failure in await asyncio.gather(*storing, return_exceptions=True):
            if failure is not None:
                raise failure
        await self.blobs.settle(f"{document.id}/{attempt}")
        return snapshot

    async def write_copy(self, document: DataFile, attempt: str, digest: str) -> None:
        """Put the metadata copy of a changed document in place of the old one, after its snapshot when it has one."""
        separate, snapshot = separated(document)
        if snapshot is not None:
            await self.keep_snapshot(snapshot)
        content = group_document(separate, digest, snapshot=_hash_of(snapshot))
        await self.blobs.replace(f"{group_prefix(document.id, attempt)}/zarr.json", content)

    async def keep_snapshot(self, snapshot: Snapshot) -> None:
        """Make sure that a snapshot lies in the store, durably; what lies there already stays."""
        try:
            await self.blobs.size(snapshot_key(snapshot.hash))
        except NotFoundError:
            await self.replace_snapshot(snapshot)

    async def replace_snapshot(self, snapshot: Snapshot) -> None:
        """Store a snapshot, durably, also over one that is damaged."""
        await self.blobs.replace(snapshot_key(snapshot.hash), snapshot.content)
        await self.blobs.settle(SNAPSHOTS)

    async def snapshot(self, hash: str) -> Snapshot:
        """A stored snapshot; CorruptionError naming it when it is missing or is not what its hash says."""
        key = snapshot_key(hash)
        try:
            content = await self.blobs.get(key)
        except NotFoundError as exc:
            raise CorruptionError(f"the snapshot {key!r} of the instruments is missing") from exc
        if snapshot_hash(content) != hash:
            raise CorruptionError(f"the snapshot {key!r} of the instruments does not match its SHA-256")
        return Snapshot(hash, content)

    async def read(self, id: str, attempt: str, array: ArrayInfo, selection: Selection) -> np.ndarray[Any, Any]:
        """The selected values, C-ordered, owned by the caller, of `selection.shape`. Reads only chunks that overlap.

        CorruptionError when a chunk is missing or does not match its checksum: never the fill value instead, which is read
        only where a partial array says that nothing was measured.
        """
        dtype = parse_dtype(array.dtype, array.name)
        parts = list(chunk_parts(selection, array.chunks))
        if array.is_partial:
            result = np.full(selection.full_shape, fill_of(dtype), dtype)
            coverage = await self.coverage(id, attempt, array)
            parts = [part for part in parts if coverage[part.index] != NOTHING]
        else:
            result = np.empty(selection.full_shape, dtype=dtype)
        if len(parts) <= SMALL_READ_CHUNKS:
            self._last_small = time.monotonic()
        keys = [f"{group_prefix(id, attempt)}/{chunk_key(array.name, part.index)}" for part in parts]

        def consume(i: int, data: bytes) -> None:
            _place(result, parts[i], data, array, dtype, keys[i])

        try:
            await self.blobs.get_many(keys, consume)
        except NotFoundError as exc:
            raise CorruptionError(f"array {array.name!r} has lost a chunk: {exc}; `aq-data verify` lists all") from exc
        return result.reshape(selection.shape)

    async def coverage(self, id: str, attempt: str, array: ArrayInfo) -> np.ndarray[Any, Any]:
        """How much of each chunk was measured (NOTHING, PART, FULL), in the shape of the chunk grid."""
        grid = chunk_grid(array.shape, array.chunks)
        if not array.is_partial:
            return np.full(grid, FULL, "u1")
        key = f"{written_prefix(id, attempt, array.name)}/grid"
        if key not in self._coverages:
            try:
                data = await self.blobs.get(key)
            except NotFoundError as exc:
                raise CorruptionError(f"array {array.name!r} has lost its written map: {exc}") from exc
            if len(self._coverages) >= KEPT_COVERAGES:
                self._coverages.pop(next(iter(self._coverages)))
            self._coverages[key] = np.frombuffer(unpack(data, key), "u1").reshape(grid)
        return self._coverages[key]

    async def written(self, id: str, attempt: str, array: ArrayInfo, selection: Selection) -> np.ndarray[Any, Any]:
        """Which of the selected elements were measured: booleans of `selection.shape`."""
        result = np.zeros(selection.full_shape, bool)
        coverage = await self.coverage(id, attempt, array)
        partial = []
        for part in chunk_parts(selection, array.chunks):
            if coverage[part.index] == FULL:
                result[orthogonal(part.target, result.shape)] = True
            elif coverage[part.index] == PART:
                partial.append(part)
        prefix = written_prefix(id, attempt, array.name)
        keys = ["/".join(map(str, (prefix, "c", *part.index))) for part in partial]

        def consume(i: int, data: bytes) -> None:
            mask = decode_mask(data, array.chunks, keys[i])
            result[orthogonal(partial[i].target, result.shape)] = mask[orthogonal(partial[i].source, mask.shape)]

        try:
            await self.blobs.get_many(keys, consume)
        except NotFoundError as exc:
            raise CorruptionError(f"array {array.name!r} has lost its written map: {exc}") from exc
        return result.reshape(selection.shape)

    async def give_way(self) -> None:
        """What a stream awaits between two pieces: nothing long, unless small reads came just now, for which it pauses."""
        small_around = time.monotonic() - self._last_small < SMALL_AROUND_SECONDS
        await asyncio.sleep(PAUSE_SECONDS if small_around else 0)

    async def stream(
        self, id: str, attempt: str, array: ArrayInfo, selection: Selection, limit: int | None = None
    ) -> AsyncIterator[np.ndarray[Any, Any]]:
        """The selected values in C order as arrays of about `limit` bytes, the next read while one is used.

        Without a limit, streams at once share `SLAB_BYTES` among them: memory does not grow with the number of readers.
        """
        self._streams += 1
        limit = limit or max(LEAST_SLAB_BYTES, SLAB_BYTES // self._streams)
        itemsize = TEXT_ITEM if is_string(array) else parse_dtype(array.dtype, array.name).itemsize
        following: asyncio.Task[np.ndarray[Any, Any]] | None = None
        try:
            for piece in split_by_size(selection, array.chunks, itemsize, limit):
                task = asyncio.create_task(self.read(id, attempt, array, piece))
                if following is not None:
                    current, following = following, task
                    yield await current
                else:
                    following = task
            if following is not None:
                yield await following
        finally:
            self._streams -= 1
            if following is not None:
                following.cancel()


def _hash_of(snapshot: Snapshot | None) -> str:
    return "" if snapshot is None else snapshot.hash


def _place(
    result: np.ndarray[Any, Any], part: ChunkPart, data: bytes, array: ArrayInfo, dtype: np.dtype[Any], key: str
) -> None:
    values = decode_chunk(data, array, dtype, key)
    result[orthogonal(part.target, result.shape)] = values[orthogonal(part.source, values.shape)]


def orthogonal(index: Index, shape: tuple[int, ...]) -> Any:
    """`index` into an array of `shape`, so that NumPy applies each axis in turn also where several entries are lists."""
    if sum(isinstance(entry, np.ndarray) for entry in index) < 2:
        return index
    lists = (np.arange(n)[entry] if isinstance(entry, slice) else entry for entry, n in zip(index, shape, strict=True))
    return np.ix_(*lists)
