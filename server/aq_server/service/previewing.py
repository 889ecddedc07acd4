"""Previews: a selection of one or two axes reduced to the pixels of a plot, tile by tile, while more is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import product
from typing import Any

import msgspec
import numpy as np

from aq_data.models.arrays import parse_dtype
from aq_data.models.preview import Reduction, check_preview, real_part
from aq_data.models.selection import Selection
from aq_data.models.structs import resolve
from aq_server.service.reading import Reading, Slice

__all__ = ["Preview", "previewed"]

TILE_BYTES = 2 << 20
AT_ONCE = 4
"""Tiles read at a time: the processors are busy while the next ones are fetched, and memory stays at a few MB."""


class Preview(msgspec.Struct, frozen=True):
    """The reduced values (float64), how many elements stand behind each bin along each axis, and the tag of the source."""

    values: np.ndarray[Any, Any]
    steps: tuple[int, ...]
    tag: str


async def previewed(reading: Reading, id: str, name: str, text: str, how: str, part: str, pixels: int) -> Preview:
    """Reduce a selection; see `models.preview` for the words. What was not measured counts as nothing."""
    source = await reading.slice(id, name, text)
    dtype, selection = parse_dtype(source.array.dtype, name), source.selection
    reduction = Reduction(selection.shape, pixels, check_preview(name, dtype, selection.shape, how, part, pixels))
    limit = asyncio.Semaphore(AT_ONCE)

    async def reduce(piece: Selection, offset: tuple[int, ...]) -> None:
        async with limit:
            values = await source.source.read(piece)
            measured = await source.source.written(piece) if source.array.is_partial and dtype.kind in "biu" else None

            def work() -> tuple[tuple[slice, ...], list[np.ndarray[Any, Any]]]:
                numbers = real_part(values, part)
                if numbers.dtype.kind == "b":
                    numbers = numbers.astype("u1")
                if measured is not None:
                    numbers = np.where(measured, numbers.astype("f8"), np.nan)
                return reduction.partial(numbers, offset)

            reduction.add(*await asyncio.to_thread(work))

    if 0 not in selection.shape:
        tasks = [asyncio.create_task(reduce(piece, offset)) for piece, offset in _tiles(source)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    return Preview(reduction.result(), reduction.steps, f"{source.tag}.{how}.{part}.{pixels}")


def _tiles(source: Slice) -> Iterator[tuple[Selection, tuple[int, ...]]]:
    """The selection in tiles of whole chunks, with where each lies in the result."""
    axes = source.selection.axes
    kept = [i for i, axis in enumerate(axes) if not axis.drop]
    itemsize = parse_dtype(source.array.dtype, source.array.name).itemsize
    extents: dict[int, int] = {}
    budget = max(1, TILE_BYTES // itemsize)
    for i in reversed(kept):
        chunk = min(source.array.chunks[i], axes[i].count)
        extents[i] = min(axes[i].count, max(1, budget // chunk) * chunk)
        budget = max(1, budget // extents[i])
    for starts in product(*(range(0, axes[i].count, extents[i]) for i in kept)):
        parts = list(axes)
        for i, start in zip(kept, starts, strict=True):
            parts[i] = axes[i].part(start, min(axes[i].count, start + extents[i]))
        yield Selection(tuple(parts)), starts


resolve(Preview)
