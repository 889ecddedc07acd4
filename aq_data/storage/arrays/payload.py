"""The values of blocks in the log: in their row, or in a blob of their own of which only parts are read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from aq_data.errors import CorruptionError
from aq_data.models.arrays import ArrayInfo, is_text, parse_dtype
from aq_data.models.sweep import Placed, Plan
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.format import text_from_wire
from aq_data.storage.arrays.manifest import block_key, is_paged
from aq_data.storage.arrays.pages import content_of, pages_of
from aq_data.storage.metadata.sweeplog import Row

__all__ = ["Payloads", "decode_text"]

Box = tuple[slice, ...]
Index = tuple[Any, ...]

SLAB_BYTES = 32 << 20
"""At most about so much of a large block is in memory at once."""


def decode_text(data: bytes, array: ArrayInfo, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Text of variable length as it came; ValueError or RuntimeError when it is not as many texts as the shape has."""
    values = text_from_wire(data, math.prod(shape)).reshape(shape)
    return values.astype(parse_dtype(array.dtype, array.name))


def _offset(placed: Placed, k: int) -> int:
    return sum(region.nbytes for region in placed.variables[:k])


class Payloads:
    """Parts of the values of a sweep's blocks. Keeps the slab of a large block that was read last."""

    def __init__(self, blobs: BlobStore, plan: Plan) -> None:
        self._blobs, self._plan = blobs, plan
        self._slab: tuple[tuple[int, int, int, int], np.ndarray[Any, Any]] | None = None

    def inline(self, row: Row, k: int, array: ArrayInfo) -> np.ndarray[Any, Any]:
        """All values of region `k` of a row that holds them itself; read-only."""
        region, dtype, at = row.placed.variables[k], parse_dtype(array.dtype, array.name), _offset(row.placed, k)
        if is_text(dtype):
            return self._text(row.payload[at : at + region.nbytes], row, array, region.shape)
        return np.frombuffer(row.payload, dtype, math.prod(region.shape), at).reshape(region.shape)

    async def box(self, row: Row, k: int, array: ArrayInfo, box: Box) -> np.ndarray[Any, Any]:
        """The values in `box` (slices of step 1 inside region `k`), read-only."""
        inside: Index = (*box, ...)  # an array also where there is no axis
        if not row.ref:
            return self.inline(row, k, array)[inside]
        region, dtype = row.placed.variables[k], parse_dtype(array.dtype, array.name)
        if is_text(dtype):
            data = await self._read(row, _offset(row.placed, k), region.nbytes)
            return self._text(data, row, array, region.shape)[inside]
        axis = next((i for i, n in enumerate(region.shape) if n > 1), 0)
        if not region.shape:
            return np.frombuffer(await self._read(row, _offset(row.placed, k), region.nbytes), dtype).reshape(())
        first, last = box[axis].start, box[axis].stop
        row_bytes = math.prod(region.shape[axis + 1 :]) * dtype.itemsize
        if (last - first) * row_bytes > SLAB_BYTES and last - first > 1:
            middle = (first + last) // 2
            halves = [
                await self.box(row, k, array, (*box[:axis], part, *box[axis + 1 :]))
                for part in (slice(first, middle), slice(middle, last))
            ]
            return np.concatenate(halves, axis=axis)
        name = (row.placed.seq, k, first, last)
        if self._slab is None or self._slab[0] != name:
            start = _offset(row.placed, k) + first * row_bytes
            data = await self._read(row, start, (last - first) * row_bytes)
            shape = (*region.shape[:axis], last - first, *region.shape[axis + 1 :])
            self._slab = (name, np.frombuffer(data, dtype).reshape(shape))
        return self._slab[1][(*box[:axis], slice(None), *box[axis + 1 :])]

    def _text(self, data: bytes, row: Row, array: ArrayInfo, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        try:
            return decode_text(data, array, shape)
        except (ValueError, RuntimeError) as exc:
            raise CorruptionError(f"block {row.placed.seq} of sweep {self._plan.id} holds no text: {exc}") from exc

    async def _read(self, row: Row, start: int, length: int) -> bytes:
        key = block_key(self._plan.id, self._plan.attempt, row.ref)
        if not length:
            return b""
        first, last = start, start + length
        if is_paged(row.ref):
            first, last = pages_of(start, start + length, sum(region.nbytes for region in row.placed.variables))
        data = await self._blobs.get(key, first, last)
        if len(data) != last - first:
            raise CorruptionError(f"block {row.placed.seq} of sweep {self._plan.id} has lost values: {key!r} is too short")
        try:
            return content_of(data, start, start + length) if is_paged(row.ref) else data
        except ValueError as exc:
            raise CorruptionError(f"block {row.placed.seq} of sweep {self._plan.id} is damaged: {key!r}: {exc}") from exc
