"""Reading a sweep while it grows: the chunks its manifest names, and over them the blocks that are not folded yet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aq_data.errors import NotFoundError
from aq_data.models.arrays import ArrayInfo, fill_of, parse_dtype
from aq_data.models.selection import Axis, Selection
from aq_data.models.sweep import Plan, Region, State, grown_arrays
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.chunking import ChunkPart, chunk_parts, split_by_size
from aq_data.storage.arrays.format import decode_chunk
from aq_data.storage.arrays.manifest import FULL, NOTHING, Cells, Manifest, cell_key, decode_mask
from aq_data.storage.arrays.payload import Payloads
from aq_data.storage.arrays.store import orthogonal
from aq_data.storage.metadata.sweeplog import Row

__all__ = ["GrowingArray", "ObjectGoneError", "View", "box_bounds"]

Index = tuple["slice | np.ndarray[Any, Any]", ...]


class ObjectGoneError(Exception):
    """An object of this view was folded into another and removed: take a new view."""


@dataclass(frozen=True, slots=True)
class View:
    """One moment of a sweep: the state, the manifest it names, and every block beyond what is folded."""

    plan: Plan
    state: State
    manifest: Manifest
    rows: tuple[Row, ...]

    def arrays(self) -> tuple[ArrayInfo, ...]:
        """The arrays with the extents of this moment."""
        return grown_arrays(self.plan, self.state)


class GrowingArray:
    """One array as of one `View`: what is read agrees with it, however much later; ObjectGoneError when it is too late."""

    def __init__(self, blobs: BlobStore, view: View, array: ArrayInfo) -> None:
        self._blobs, self._view, self.array = blobs, view, array
        self._number = next(i for i, a in enumerate(view.plan.arrays) if a.name == array.name)
        self._cells = view.manifest.arrays.get(array.name) or Cells.empty((0,) * len(array.shape))
        self._payloads = Payloads(blobs, view.plan)
        self._rows = [
            (row, k, region)
            for row in view.rows
            for k, region in enumerate(row.placed.variables)
            if region.name == array.name and 0 not in region.shape
        ]

    async def read(self, selection: Selection) -> np.ndarray[Any, Any]:
        """The selected values, of `selection.shape`; what was not measured is `fill_of` the dtype."""
        dtype = parse_dtype(self.array.dtype, self.array.name)
        result = np.full(selection.full_shape, fill_of(dtype), dtype)

        def take(part: ChunkPart, data: bytes, key: str) -> None:
            values = decode_chunk(data, self.array, dtype, key)
            result[orthogonal(part.target, result.shape)] = values[orthogonal(part.source, values.shape)]

        parts = [(part, *self._cell(part.index)) for part in chunk_parts(selection, self.array.chunks)]
        await self._get([(part, key) for part, key, coverage in parts if coverage != NOTHING], take)
        for row, k, region in self._rows:
            await self._lay_over(result, selection, row, k, region)
        return result.reshape(selection.shape)

    async def written(self, selection: Selection) -> np.ndarray[Any, Any]:
        """Which of the selected elements were measured: booleans of `selection.shape`."""
        result = np.zeros(selection.full_shape, bool)

        def take(part: ChunkPart, data: bytes, key: str) -> None:
            mask = decode_mask(data, self.array.chunks, key)
            result[orthogonal(part.target, result.shape)] = mask[orthogonal(part.source, mask.shape)]

        partial = []
        for part in chunk_parts(selection, self.array.chunks):
            key, coverage = self._cell(part.index)
            if coverage == FULL:
                result[orthogonal(part.target, result.shape)] = True
            elif coverage != NOTHING:
                partial.append((part, f"{key}.w"))
        await self._get(partial, take)
        for _, _, region in self._rows:
            met = _meet_all(selection.axes, region)
            if met is not None:
                result[orthogonal(met[0], result.shape)] = True
        return result.reshape(selection.shape)

    async def stream(self, selection: Selection, limit: int) -> AsyncIterator[np.ndarray[Any, Any]]:
        """The selected values in C order as arrays of about `limit` bytes, all of the same moment."""
        itemsize = parse_dtype(self.array.dtype, self.array.name).itemsize or 16
        for piece in split_by_size(selection, self.array.chunks, itemsize, limit):
            yield await self.read(piece)

    async def read_chunk(self, index: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A whole chunk, of the chunk shape, also where it reaches beyond the array."""
        chunks, shape = self.array.chunks, self.array.shape
        axes = tuple(Axis(n, i * c, 1, min(c, n - i * c)) for i, c, n in zip(index, chunks, shape, strict=True))
        values = await self.read(Selection(axes))
        whole = np.full(chunks, fill_of(values.dtype), values.dtype)
        whole[tuple(slice(0, n) for n in values.shape)] = values
        return whole

    def stored_chunk(self, index: tuple[int, ...]) -> tuple[str, bool]:
        """The key of a chunk ("" when nothing of it was folded) and whether blocks lie over it."""
        key, coverage = self._cell(index)
        low = tuple(i * c for i, c in zip(index, self.array.chunks, strict=True))
        over = any(
            all(s < b + c and b < s + n for s, n, b, c in zip(r.start, r.shape, low, self.array.chunks, strict=True))
            for _, _, r in self._rows
        )
        return key if coverage != NOTHING else "", over

    def _cell(self, index: tuple[int, ...]) -> tuple[str, int]:
        generation, coverage = self._cells.at(index)
        plan = self._view.plan
        return cell_key(plan.id, plan.attempt, generation, self._number, index), coverage

    async def _get(self, wanted: Sequence[tuple[ChunkPart, str]], take: Any) -> None:
        try:
            await self._blobs.get_many([key for _, key in wanted], lambda i, data: take(wanted[i][0], data, wanted[i][1]))
        except NotFoundError as exc:
            raise ObjectGoneError(str(exc)) from exc

    async def _lay_over(self, result: np.ndarray[Any, Any], selection: Selection, row: Row, k: int, region: Region) -> None:
        met = _meet_all(selection.axes, region)
        if met is None:
            return
        target, source = met
        if not row.ref:
            values = self._payloads.inline(row, k, self.array)
            _put(result, target, values, source)
            return
        low, high = box_bounds(source, region.shape)
        try:
            values = await self._payloads.box(row, k, self.array, tuple(map(slice, low, high)))
        except NotFoundError as exc:
            raise ObjectGoneError(str(exc)) from exc
        inside = tuple(
            entry - start if isinstance(entry, np.ndarray) else slice(entry.start - start, entry.stop - start, entry.step)
            for entry, start in zip(source, low, strict=True)
        )
        _put(result, target, values, inside)


def _put(result: np.ndarray[Any, Any], target: Index, values: np.ndarray[Any, Any], source: Index) -> None:
    """Place selected values; without any axis too, where NumPy would put an array of objects in as one object."""
    if not result.shape:
        result[...] = values
    else:
        result[orthogonal(target, result.shape)] = values[orthogonal(source, values.shape)]


def box_bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The least half-open box around non-empty slices of positive step and index arrays."""
    low = tuple(int(e.min()) if isinstance(e, np.ndarray) else e.start for e in index)
    high = tuple(int(e.max()) + 1 if isinstance(e, np.ndarray) else e.stop for e in index)
    return low, tuple(min(h, n) for h, n in zip(high, shape, strict=True))


def _meet_all(axes: tuple[Axis, ...], region: Region) -> tuple[Index, Index] | None:
    """Where a selection and a region meet: positions in the result and inside the region; None where they do not."""
    target: list[slice | np.ndarray[Any, Any]] = []
    source: list[slice | np.ndarray[Any, Any]] = []
    for axis, start, length in zip(axes, region.start, region.shape, strict=True):
        met = _meet(axis, start, length)
        if met is None:
            return None
        target.append(met[0])
        source.append(met[1])
    return tuple(target), tuple(source)


_Entry = slice | np.ndarray[Any, Any]


def _meet(axis: Axis, start: int, length: int) -> tuple[_Entry, _Entry] | None:
    if axis.picks is None and axis.step > 0:
        first = max(0, -((axis.start - start) // axis.step))
        last = min(axis.count, (start + length - 1 - axis.start) // axis.step + 1)
        if first >= last:
            return None
        begin = axis.start + first * axis.step - start
        return slice(first, last), slice(begin, begin + (last - first - 1) * axis.step + 1, axis.step)
    positions = axis.positions()
    where = np.flatnonzero((positions >= start) & (positions < start + length))
    return (where, positions[where] - start) if len(where) else None
