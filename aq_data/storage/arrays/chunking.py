"""How an array is cut into chunks, and which parts of which chunks a selection needs. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from aq_data.models.selection import Axis, Selection

__all__ = [
    "BUCKET_TARGET_BYTES",
    "TARGET_BYTES",
    "ChunkPart",
    "chunk_grid",
    "chunk_parts",
    "chunk_shape",
    "growing_chunk_shape",
    "split_by_size",
]

TARGET_BYTES = 1 << 19
"""Half a MiB uncompressed: docs/decisions/0001 has the measurements."""
BUCKET_TARGET_BYTES = 1 << 21
"""In buckets, where each chunk is a request that is waited and paid for: about what arrives while one is waited for."""


def chunk_shape(shape: tuple[int, ...], itemsize: int, target: int = TARGET_BYTES) -> tuple[int, ...]:
    """A chunk shape of at most `target` bytes: short axes whole, long ones cut to equal extents of about one length.

    An array below the target is one chunk. Extents are 1 or more, also along an axis of length 0.
    """
    budget = max(1, target // max(1, itemsize))
    extents = [max(1, n) for n in shape]
    if math.prod(extents) <= budget:
        return tuple(extents)
    left = len(extents)
    for axis in sorted(range(len(extents)), key=lambda i: extents[i]):
        share = max(1, int(budget ** (1 / left) + 1e-9))
        pieces = math.ceil(extents[axis] / share)
        extents[axis] = math.ceil(extents[axis] / pieces)
        budget = max(1, budget // extents[axis])
        left -= 1
    return tuple(extents)


def growing_chunk_shape(shape: tuple[int, ...], growing: tuple[int | None, ...], itemsize: int) -> tuple[int, ...]:
    """A chunk shape for an array that grows: the fixed axes first, as `chunk_shape` cuts them, then the growing ones.

    `growing` has, for each axis, None where it is fixed, else its planned length, 0 if nobody knows. So a step along a
    growing axis touches as few chunks as the fixed ones allow.
    """
    fixed = chunk_shape(tuple(n for n, g in zip(shape, growing, strict=True) if g is None), itemsize)
    left = max(1, TARGET_BYTES // max(1, itemsize * math.prod(fixed)))
    count = sum(g is not None for g in growing)
    fixed_extents, extents = iter(fixed), []
    for planned in growing:
        if planned is None:
            extents.append(next(fixed_extents))
            continue
        extent = max(1, int(left ** (1 / count) + 1e-9))
        extents.append(min(extent, planned) if planned else extent)
        left, count = max(1, left // extents[-1]), count - 1
    return tuple(extents)


def chunk_grid(shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[int, ...]:
    """How many chunks there are along each axis; 0 along an axis of length 0."""
    return tuple(math.ceil(n / c) for n, c in zip(shape, chunks, strict=True))


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """What a selection needs of one chunk: `source` picks inside the chunk, `target` places it in the result.

    Both have one entry per axis of the array (integer axes count as length 1): slices, or index arrays where the
    positions do not form a progression. Where both are arrays they go through `np.ix_`.
    """

    index: tuple[int, ...]
    source: tuple[slice | np.ndarray[Any, Any], ...]
    target: tuple[slice | np.ndarray[Any, Any], ...]


_AxisPart = tuple[int, "slice | np.ndarray[Any, Any]", "slice | np.ndarray[Any, Any]"]


def _axis_parts(axis: Axis, extent: int) -> list[_AxisPart]:
    if axis.count == 0:
        return []
    if axis.picks is not None:
        positions = axis.positions()
        chunks = positions // extent
        parts: list[_AxisPart] = []
        for chunk in np.unique(chunks):
            where = np.flatnonzero(chunks == chunk)
            parts.append((int(chunk), positions[where] - int(chunk) * extent, where))
        return parts
    return list(_progression_parts(axis, extent))


def _progression_parts(axis: Axis, extent: int) -> Iterator[_AxisPart]:
    done = 0
    while done < axis.count:
        position = axis.start + done * axis.step
        chunk = position // extent
        inside = position - chunk * extent
        room = (min((chunk + 1) * extent, axis.size) - 1 - position) if axis.step > 0 else inside
        count = min(axis.count - done, room // abs(axis.step) + 1)
        last = inside + (count - 1) * axis.step
        if axis.step > 0:
            source = slice(inside, last + 1, axis.step)
        else:
            source = slice(inside, last - 1 if last else None, axis.step)
        yield chunk, source, slice(done, done + count)
        done += count


def chunk_parts(selection: Selection, chunks: tuple[int, ...]) -> Iterator[ChunkPart]:
    """The chunks that overlap the selection, each once, and only those."""
    per_axis = [_axis_parts(axis, extent) for axis, extent in zip(selection.axes, chunks, strict=True)]
    for combination in product(*per_axis):
        yield ChunkPart(
            tuple(part[0] for part in combination),
            tuple(part[1] for part in combination),
            tuple(part[2] for part in combination),
        )


def split_by_size(selection: Selection, chunks: tuple[int, ...], itemsize: int, limit: int) -> Iterator[Selection]:
    """Pieces of at most about `limit` bytes whose results, one after the other, are the whole result in C order.

    Cuts fall on chunk borders where they can, so that a chunk is decoded once; only where one row of chunks is over the
    limit is it cut finer.
    """
    total = math.prod(selection.full_shape) * itemsize
    axis = next((i for i, a in enumerate(selection.axes) if a.count > 1), None)
    if total <= limit or axis is None:
        yield selection
        return
    entry = selection.axes[axis]
    row = total // entry.count
    ends = _cuts(entry, chunks[axis], max(1, limit // max(1, row)))
    first = 0
    for last in ends:
        axes = (*selection.axes[:axis], entry.part(first, last), *selection.axes[axis + 1 :])
        yield from split_by_size(Selection(axes), chunks, itemsize, limit)
        first = last


def _cuts(axis: Axis, extent: int, rows: int) -> list[int]:
    """Output positions to cut at, at most `rows` apart, on chunk borders where these come first."""
    if axis.picks is not None:
        return [*range(rows, axis.count, rows), axis.count]
    borders = [target.stop for _, _, target in _progression_parts(axis, extent) if isinstance(target, slice)]
    cuts: list[int] = []
    start = 0
    for i, border in enumerate(borders):
        following = borders[i + 1] if i + 1 < len(borders) else None
        if following is not None and following - start <= rows:
            continue
        cuts.extend(range(start + rows, border, rows))
        cuts.append(border)
        start = border
    return cuts
