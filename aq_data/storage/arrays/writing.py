"""Storing the values of arrays chunk by chunk as they arrive."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from aq_data.errors import UnavailableError, ValidationError
from aq_data.models.arrays import ArrayInfo, NewArray, dims_of, is_text, parse_dtype
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.chunking import TARGET_BYTES, chunk_grid, chunk_shape, growing_chunk_shape
from aq_data.storage.arrays.format import chunk_key, encode_chunk, text_from_wire

__all__ = ["TEXT_ITEM", "ArrayWriter", "plan_array", "plan_growing_array"]

SLAB_BYTES = 32 << 20
"""Values held in memory per array being written."""
TEXT_BYTES = 256 << 20
"""Variable-length text is held whole while it arrives; more than this in one array is refused."""
TEXT_ITEM = 16
"""Assumed bytes per text when choosing chunks."""

Item = tuple[str, Callable[[], bytes]]


def plan_array(new: NewArray, chunk_bytes: int = TARGET_BYTES) -> ArrayInfo:
    """Everything decided that the client left open: dims, chunks, of about `chunk_bytes`."""
    dtype = parse_dtype(new.dtype, new.name)
    itemsize = TEXT_ITEM if is_text(dtype) else dtype.itemsize
    chunks = tuple(min(c, max(1, n)) for c, n in zip(new.chunks, new.shape, strict=True)) if new.chunks else None
    return ArrayInfo(
        name=new.name,
        dtype=new.dtype,
        shape=new.shape,
        dims=dims_of(new),
        chunks=chunks if chunks is not None else chunk_shape(new.shape, itemsize, chunk_bytes),
        nbytes=0 if is_text(dtype) else math.prod(new.shape) * dtype.itemsize,
        attrs=new.attrs,
        role=new.role,
        codec=new.codec,
    )


def plan_growing_array(new: NewArray, growing: tuple[int | None, ...]) -> ArrayInfo:
    """As `plan_array` for an array of a sweep; `growing` has the planned length of each axis that grows, None elsewhere."""
    planned = plan_array(new)
    if new.chunks is not None:
        return msgspec.structs.replace(planned, chunks=new.chunks)
    dtype = parse_dtype(new.dtype, new.name)
    itemsize = TEXT_ITEM if is_text(dtype) else dtype.itemsize
    return msgspec.structs.replace(planned, chunks=growing_chunk_shape(new.shape, growing, itemsize))


class ArrayWriter:
    """Takes the values of one array in C order, in pieces of any size, and stores them chunk by chunk.

    Chunks are written as soon as the values of a row of them are there, so memory stays within about three slabs.
    An array of one chunk waits in `pending` instead: a small save then writes all its files at one go.
    """

    def __init__(self, blobs: BlobStore, prefix: str, info: ArrayInfo, scratch: Path | None) -> None:
        self.info = info
        self.pending: list[Item] = []
        self._blobs, self._prefix = blobs, prefix
        self._dtype = parse_dtype(info.dtype, info.name)
        self._received = 0
        self._text = bytearray() if is_text(self._dtype) else None
        self._rows = _Rows(info, self._dtype, scratch) if self._text is None else None
        self._running: set[asyncio.Task[None]] = set()

    @property
    def expected(self) -> int | None:
        """Bytes to come in all; None for variable-length text."""
        return None if self._text is not None else self.info.nbytes

    async def write(self, data: memoryview) -> None:
        """Take the next bytes. ValidationError when there are more than the declared shape holds."""
        self._received += len(data)
        if self._text is not None:
            if self._received > TEXT_BYTES:
                raise ValidationError(f"array {self.info.name!r}: over {TEXT_BYTES >> 20} MiB of text; save it as a file")
            self._text += data
            return
        if self._received > self.info.nbytes:
            raise self._wrong_length("more")
        assert self._rows is not None
        while data:
            data = data[self._rows.fill(data) :]
            if self._rows.is_full:
                await self._store_rows()

    async def finish(self) -> None:
        """Every byte is stored (or pending). ValidationError when some are missing."""
        if self._text is not None:
            await asyncio.to_thread(self._take_text, bytes(self._text))
        elif self._received != self.info.nbytes:
            raise self._wrong_length("fewer")
        await self._wait(0)

    async def flush(self) -> None:
        """Write what is pending now, to free its memory."""
        items, self.pending = self.pending, []
        await self._blobs.put_many(items)

    async def discard(self) -> None:
        """Stop what runs; the caller removes the prefix."""
        self.pending.clear()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._rows is not None:
            self._rows.close()

    def _wrong_length(self, word: str) -> ValidationError:
        return ValidationError(
            f"array {self.info.name!r}: {word} bytes came than the {self.info.nbytes} that dtype {self.info.dtype} and "
            f"shape {self.info.shape} need"
        )

    def _take_text(self, data: bytes) -> None:
        try:
            values = text_from_wire(data, math.prod(self.info.shape)).reshape(self.info.shape)
        except (ValueError, RuntimeError) as exc:
            raise ValidationError(f"array {self.info.name!r}: {exc}") from exc
        self.info = msgspec.structs.replace(self.info, nbytes=len(data))
        self.pending = list(self._items(values, 0))

    def _items(self, values: np.ndarray[Any, Any], first: int) -> list[Item]:
        """One item per chunk of `values`, whose rows begin at row `first` of the chunk grid."""
        items: list[Item] = []
        for index in np.ndindex(*chunk_grid(values.shape, self.info.chunks)):
            where = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, self.info.chunks, strict=True))
            placed = (index[0] + first, *index[1:]) if index else ()
            key = f"{self._prefix}/{chunk_key(self.info.name, placed)}"
            items.append((key, _encoder(values, where, self.info)))
        return items

    async def _store_rows(self) -> None:
        assert self._rows is not None
        values, first = self._rows.take()
        items = self._items(values, first)
        if math.prod(chunk_grid(self.info.shape, self.info.chunks)) == 1:
            self.pending = items
            return
        await self._wait(1)
        self._running.add(asyncio.create_task(self._blobs.put_many(items)))

    async def _wait(self, running: int) -> None:
        while len(self._running) > running:
            done, self._running = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            failures = [error for task in done if (error := task.exception()) is not None]
            if failures:
                raise failures[0]


def _encoder(values: np.ndarray[Any, Any], where: tuple[slice, ...], info: ArrayInfo) -> Callable[[], bytes]:
    def encode() -> bytes:
        part = np.asarray(values[where], dtype=values.dtype)  # of a scalar array too
        if part.shape != info.chunks:
            # Zarr stores border chunks whole; what lies beyond the array is never read.
            padded = (
                np.zeros(info.chunks, dtype=values.dtype) if values.dtype != object else np.full(info.chunks, "", object)
            )
            padded[tuple(slice(0, n) for n in part.shape)] = part
            part = padded
        return encode_chunk(part, info.codec)

    return encode


class _Rows:
    """The buffer of an `ArrayWriter`: whole rows of chunks along the first axis, in memory or, if huge, in a file."""

    def __init__(self, info: ArrayInfo, dtype: np.dtype[Any], scratch: Path | None) -> None:
        self._info, self._dtype, self._scratch = info, dtype, scratch
        self._tail = info.shape[1:]
        self._row_bytes = math.prod(self._tail) * dtype.itemsize
        # Several rows of chunks at once where they are small: fewer, larger hand-overs to the worker threads.
        band = (info.chunks[0] if info.shape else 1) * max(1, self._row_bytes)
        self._bands = max(1, SLAB_BYTES // max(1, band))
        self._next_row = 0
        self._buffer: np.ndarray[Any, Any] = np.empty(0, "u1")
        self._filled = self._size = 0
        self._file: Any = None
        self._open()

    def _open(self) -> None:
        rows = self._rows_left()
        self._size = rows * self._row_bytes if self._info.shape else self._dtype.itemsize
        self._filled, self._file = 0, None
        self._in_file = self._size > 2 * SLAB_BYTES
        if not self._in_file:
            self._buffer = np.empty(self._size, "u1")

    def _rows_left(self) -> int:
        if not self._info.shape:
            return 1
        return min(self._bands * self._info.chunks[0], self._info.shape[0] - self._next_row)

    @property
    def is_full(self) -> bool:
        return self._filled == self._size > 0

    def fill(self, data: memoryview) -> int:
        """Take as many bytes as there is room for; how many. UnavailableError when the disk has no room for them."""
        count = min(len(data), self._size - self._filled)
        if self._in_file:
            try:
                # Made by the first bytes and growing with them: a declaration alone takes no room.
                self._file = self._file or tempfile.TemporaryFile(dir=self._scratch, buffering=0)  # noqa: SIM115
                count = self._file.write(data[:count])
            except OSError as exc:
                raise UnavailableError(f"no room to buffer {self._size >> 20} MiB: {exc.strerror}") from exc
        else:
            self._buffer[self._filled : self._filled + count] = np.frombuffer(data[:count], "u1")
        self._filled += count
        return count

    def take(self) -> tuple[np.ndarray[Any, Any], int]:
        """The full rows as an array, and the chunk row they start at; the buffer is fresh afterwards."""
        rows = self._rows_left()
        shape = (rows, *self._tail) if self._info.shape else ()
        buffer: np.ndarray[Any, Any] = self._buffer
        if self._file is not None:
            with self._file as file:
                buffer = np.memmap(file, dtype="u1", mode="r", shape=(self._size,))
        values = buffer.view(self._dtype).reshape(shape)
        first = self._next_row // self._info.chunks[0] if self._info.shape else 0
        self._next_row += rows
        if self._info.shape and self._next_row < self._info.shape[0]:
            self._open()
        else:
            self.close()
        return values, first

    def close(self) -> None:
        """Let go of the buffer."""
        self._buffer, self._filled, self._size = np.empty(0, "u1"), 0, 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        # A writer that is dropped with its task, without `discard`, must not keep a file open.
        if self._file is not None:
            self._file.close()
