"""Moving blocks of a sweep into chunks, and publishing the finished group: every object is durable before it is named."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from aq_data.errors import CorruptionError, NotFoundError
from aq_data.models.arrays import ArrayInfo, fill_of, parse_dtype
from aq_data.models.datafile import DataFileId
from aq_data.models.sweep import Plan, Region, State, chunks_of, grown_arrays
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.chunking import chunk_grid
from aq_data.storage.arrays.format import array_document, chunk_key, decode_chunk, encode_chunk, pack, unpack
from aq_data.storage.arrays.growing import View
from aq_data.storage.arrays.manifest import (
    FULL,
    NOTHING,
    PART,
    Cells,
    Manifest,
    Segment,
    block_key,
    cell_key,
    decode_mask,
    events_prefix,
    open_prefix,
    written_prefix,
)
from aq_data.storage.arrays.payload import Payloads
from aq_data.storage.arrays.store import group_prefix
from aq_data.storage.metadata.sweeplog import Row

__all__ = ["Folder"]

GROUP_BYTES = 64 << 20
"""Chunks that are in memory at once while they are made anew."""
SEGMENT_BYTES = 2 << 20
"""Headers of blocks share an object of events up to about so many bytes; the last one is written anew by each fold."""
RETIRED_SECONDS = 30.0
"""Replaced objects stay so long: a reader that holds an older manifest finishes its answer."""
KEPT_BYTES = 64 << 20
"""Maps kept decoded, the newest of each sweep."""

COPIED = 1000
"""Objects copied at a time."""

Chunk = tuple[int, tuple[int, ...]]
"""Number of the array in the plan, index of the chunk."""


@dataclass(slots=True)
class _Cell:
    """One chunk being made anew: what was there, what comes over it, what it became."""

    key: str
    old_key: str
    old_coverage: int
    pieces: list[tuple[Row, int, Region]]
    values: np.ndarray[Any, Any] | None = None
    mask: np.ndarray[Any, Any] | None = None
    large: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    coverage: int = PART


class Folder:
    """Makes the objects of sweeps; decides nothing about when, and switches nothing over: the metadata store does."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._manifests: OrderedDict[DataFileId, tuple[str, Manifest]] = OrderedDict()

    async def manifest(self, plan: Plan, state: State) -> Manifest:
        """The manifest that a state names. NotFoundError when it was replaced and removed meanwhile. Not to be changed."""
        if not state.manifest:
            return Manifest()
        key = f"{open_prefix(plan.id, plan.attempt)}/{state.manifest}/manifest"
        known = self._manifests.get(plan.id)
        if known is not None and known[0] == key:
            return known[1]
        data = await self._blobs.get(key)
        manifest = await asyncio.to_thread(Manifest.decode, data, key)
        self._keep(plan.id, key, manifest)
        return manifest

    def _keep(self, id: DataFileId, key: str, manifest: Manifest) -> None:
        self._manifests[id] = (key, manifest)
        self._manifests.move_to_end(id)
        while self._manifests and sum(kept.nbytes for _, kept in self._manifests.values()) > KEPT_BYTES:
            self._manifests.popitem(last=False)

    # --- fold ------------------------------------------------------------------------------------------------------

    async def fold(self, plan: Plan, state: State, rows: tuple[Row, ...]) -> tuple[str, list[str]]:
        """Write the chunks that `rows`, the oldest blocks beyond what is folded, touch, and a manifest that names them.

        The name of the new manifest, durable with all its objects, and the keys that may be removed once it is in force.
        """
        before = await self.manifest(plan, state)
        cut, prefix = rows[-1].placed.seq, open_prefix(plan.id, plan.attempt)
        generation = f"{cut}-{state.token}"
        arrays = {
            array.name: before.arrays.get(array.name, Cells.empty((0,) * len(array.shape))).resized(
                chunk_grid(array.shape, array.chunks)
            )
            for array in grown_arrays(plan, state)
        }
        retired: list[str] = [block_key(plan.id, plan.attempt, row.ref) for row in rows if row.ref]
        payloads = Payloads(self._blobs, plan)
        for chunks in await asyncio.to_thread(lambda: list(_groups(plan, rows))):
            for (number, index), cell in await self._make(plan, arrays, generation, payloads, chunks):
                if cell.old_key:
                    retired += [cell.old_key] + [f"{cell.old_key}.w"] * (cell.old_coverage == PART)
                arrays[plan.arrays[number].name].put(index, cut, state.token, cell.coverage)
        now = time.time()
        segments = await self._events(prefix, generation, before.segments, rows)
        retired += [s.key for s in before.segments if s not in segments]
        if state.manifest:
            retired.append(f"{prefix}/{state.manifest}/manifest")
        gone = [key for at, keys in before.retired if at + RETIRED_SECONDS <= now for key in keys]
        waiting = tuple(entry for entry in before.retired if entry[0] + RETIRED_SECONDS > now)
        after = Manifest(arrays, segments, (*waiting, (now, tuple(retired))), state.extents, state.touched)
        key = f"{prefix}/{generation}/manifest"
        await self._blobs.put_many([(key, after.encode)])
        await self._blobs.settle(f"{prefix}/{generation}")
        self._keep(plan.id, key, after)
        return generation, gone

    async def _make(
        self,
        plan: Plan,
        arrays: dict[str, Cells],
        generation: str,
        payloads: Payloads,
        chunks: dict[Chunk, list[tuple[Row, int, Region]]],
    ) -> list[tuple[Chunk, _Cell]]:
        """Read, lay over, encode and store a group of chunks."""
        made: list[tuple[Chunk, _Cell]] = []
        for (number, index), pieces in chunks.items():
            old, coverage = arrays[plan.arrays[number].name].at(index)
            old_key = cell_key(plan.id, plan.attempt, old, number, index) if coverage != NOTHING else ""
            key = cell_key(plan.id, plan.attempt, generation, number, index)
            made.append(((number, index), _Cell(key, old_key, coverage, pieces)))
        await self._load(plan, made)
        producers = [_Producer(plan, number, index, cell, payloads) for (number, index), cell in made]
        for producer in producers:
            await producer.prepare()
        items = [(producer.key, producer) for producer in producers]
        await self._blobs.put_many(items)
        masks = [
            (f"{cell.key}.w", _packed(cell.mask)) for _, cell in made if cell.mask is not None and cell.coverage == PART
        ]
        await self._blobs.put_many(masks)
        for _, cell in made:
            cell.values = cell.mask = None
            cell.large.clear()
        return made

    async def _load(self, plan: Plan, made: list[tuple[Chunk, _Cell]]) -> None:
        """What was folded of each chunk before."""
        old = [(chunk, cell) for chunk, cell in made if cell.old_key]

        def take_values(i: int, data: bytes) -> None:
            (number, _), cell = old[i]
            array = plan.arrays[number]
            values = decode_chunk(data, array, parse_dtype(array.dtype, array.name), cell.old_key)
            cell.values = values.copy()

        partial = [(chunk, cell) for chunk, cell in old if cell.old_coverage == PART]

        def take_mask(i: int, data: bytes) -> None:
            (number, _), cell = partial[i]
            cell.mask = decode_mask(data, plan.arrays[number].chunks, cell.old_key).copy()

        try:
            await self._blobs.get_many([cell.old_key for _, cell in old], take_values)
            await self._blobs.get_many([f"{cell.old_key}.w" for _, cell in partial], take_mask)
        except NotFoundError as exc:
            raise CorruptionError(f"sweep {plan.id} has lost a chunk: {exc}") from exc

    async def _events(
        self, prefix: str, generation: str, segments: tuple[Segment, ...], rows: tuple[Row, ...]
    ) -> tuple[Segment, ...]:
        """The segments with the headers of `rows`: appended to the last one, in a new object, while that is short."""
        key = f"{prefix}/{generation}/events"
        lines = b"".join(msgspec.json.encode(row.placed) + b"\n" for row in rows)
        kept, first = segments, rows[0].placed.seq
        if segments and segments[-1].size < SEGMENT_BYTES:
            kept, first = segments[:-1], segments[-1].first
            data = await self._blobs.get(segments[-1].key)
            lines = await asyncio.to_thread(unpack, data, segments[-1].key) + lines
        await self._blobs.put_many([(key, lambda: pack(lines))])
        return (*kept, Segment(first, rows[-1].placed.seq, key, len(lines)))

    async def events(self, segment: Segment) -> list[bytes]:
        """The JSON headers of a segment's blocks, in order."""
        data = await self._blobs.get(segment.key)
        return (await asyncio.to_thread(unpack, data, segment.key)).splitlines()

    # --- the end ---------------------------------------------------------------------------------------------------

    async def publish(self, view: View) -> tuple[ArrayInfo, ...]:
        """Give the chunks of a sealed, wholly folded sweep their final keys; the arrays as the document is to have them.

        Repeating it, also at the same time elsewhere, is harmless: the content follows from the sealed log alone.
        """
        plan, finals = view.plan, []
        group = group_prefix(plan.id, plan.attempt)
        for array in grown_arrays(plan, view.state, is_partial=False):
            number = next(i for i, a in enumerate(plan.arrays) if a.name == array.name)
            grid = chunk_grid(array.shape, array.chunks)
            cells = view.manifest.arrays.get(array.name, Cells.empty((0,) * len(grid))).resized(grid)
            coverage = await self._final_coverage(plan, number, array, cells)
            pairs = await asyncio.to_thread(_final_keys, plan, number, cells, coverage)
            for start in range(0, len(pairs), COPIED):
                await self._blobs.copy_many(pairs[start : start + COPIED])
            final = msgspec.structs.replace(array, is_partial=bool((coverage != FULL).any()))
            if final.is_partial:
                key = f"{written_prefix(plan.id, plan.attempt, array.name)}/grid"
                await self._blobs.replace(key, pack(coverage.tobytes()))
            document = msgspec.json.format(msgspec.json.encode(array_document(final)), indent=1)
            await self._blobs.replace(f"{group}/{array.name}/zarr.json", document)
            finals.append(final)
        segments = view.manifest.segments
        names = [f"{events_prefix(plan.id, plan.attempt)}/{s.first}-{s.last}" for s in segments]
        await self._blobs.copy_many(list(zip((s.key for s in segments), names, strict=True)))
        return tuple(finals)

    async def published_segments(self, plan: Plan) -> list[Segment]:
        """Where the events of a sweep that has ended lie, in order."""
        prefix = events_prefix(plan.id, plan.attempt)
        found = [name.partition("-") for name in await self._blobs.children(prefix)]
        return sorted(Segment(int(first), int(last), f"{prefix}/{first}-{last}", 0) for first, _, last in found)

    async def _final_coverage(self, plan: Plan, number: int, array: ArrayInfo, cells: Cells) -> np.ndarray[Any, Any]:
        """Coverage within the final extents: a chunk that reaches beyond them may be full though its map has gaps."""
        coverage = cells.coverage.copy()
        partial = [tuple(index) for index in np.argwhere(coverage == PART).tolist()]
        border = [
            index
            for index in partial
            if any((i + 1) * c > n for i, c, n in zip(index, array.chunks, array.shape, strict=True))
        ]

        def take(i: int, data: bytes) -> None:
            mask = decode_mask(data, array.chunks, keys[i])
            if mask[_inside(border[i], array.chunks, array.shape)].all():
                coverage[border[i]] = FULL

        keys = [f"{cell_key(plan.id, plan.attempt, cells.at(index)[0], number, index)}.w" for index in border]
        await self._blobs.get_many(keys, take)
        return coverage


def _final_keys(plan: Plan, number: int, cells: Cells, coverage: np.ndarray[Any, Any]) -> list[tuple[str, str]]:
    """Where the chunks and written maps of an array lie, and where they are to stand."""
    name, pairs = plan.arrays[number].name, []
    group, written = group_prefix(plan.id, plan.attempt), written_prefix(plan.id, plan.attempt, name)
    for index in map(tuple, np.argwhere(coverage != NOTHING).tolist()):
        key = cell_key(plan.id, plan.attempt, cells.at(index)[0], number, index)
        pairs.append((key, f"{group}/{chunk_key(name, index)}"))
        if coverage[index] == PART:
            pairs.append((f"{key}.w", "/".join(map(str, (written, "c", *index)))))
    return pairs


def _inside(index: tuple[int, ...], chunks: tuple[int, ...], shape: tuple[int | None, ...]) -> tuple[slice, ...]:
    """The part of a chunk that lies inside the array; None in `shape` is no bound."""
    return tuple(slice(0, c if n is None else min(c, n - i * c)) for i, c, n in zip(index, chunks, shape, strict=True))


def _groups(plan: Plan, rows: tuple[Row, ...]) -> Iterable[dict[Chunk, list[tuple[Row, int, Region]]]]:
    """The touched chunks with what comes over each, in order of the log; as many at a time as fit in memory."""
    touched: dict[Chunk, list[tuple[Row, int, Region]]] = {}
    numbers = {array.name: i for i, array in enumerate(plan.arrays)}
    for row in rows:
        for k, region in enumerate(row.placed.variables):
            number = numbers[region.name]
            for index in chunks_of(region, plan.arrays[number].chunks):
                touched.setdefault((number, index), []).append((row, k, region))
    group: dict[Chunk, list[tuple[Row, int, Region]]] = {}
    size = 0
    for chunk in sorted(touched):
        array = plan.arrays[chunk[0]]
        group[chunk] = touched[chunk]
        # Values, written map, and what is laid over it.
        size += 3 * math.prod(array.chunks) * (parse_dtype(array.dtype, array.name).itemsize + 1)
        if size > GROUP_BYTES:
            yield group
            group, size = {}, 0
    if group:
        yield group


class _Producer:
    """Makes the bytes of one chunk: `prepare` reads, then a call in a worker thread lays over and encodes."""

    def __init__(self, plan: Plan, number: int, index: tuple[int, ...], cell: _Cell, payloads: Payloads) -> None:
        self._array, self._index, self._cell, self._payloads = plan.arrays[number], index, cell, payloads
        # A growing dim has no end yet: a chunk is full only when all of it was measured.
        self._shape = tuple(
            None if dim in plan.growing else n for dim, n in zip(self._array.dims, self._array.shape, strict=True)
        )

    @property
    def key(self) -> str:
        return self._cell.key

    async def prepare(self) -> None:
        """Read what large blocks hold of this chunk; small ones are at hand."""
        for i, (row, k, region) in enumerate(self._cell.pieces):
            if row.ref:
                try:
                    self._cell.large[i] = await self._payloads.box(row, k, self._array, self._meet(region)[1])
                except NotFoundError as exc:
                    raise CorruptionError(f"block {row.placed.seq} has lost its values: {exc}") from exc

    def _meet(self, region: Region) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the chunk and a region meet: inside the chunk, and inside the region."""
        target, source = [], []
        for i, c, s, n in zip(self._index, self._array.chunks, region.start, region.shape, strict=True):
            first, last = max(s, i * c), min(s + n, (i + 1) * c)
            target.append(slice(first - i * c, last - i * c))
            source.append(slice(first - s, last - s))
        return tuple(target), tuple(source)

    def __call__(self) -> bytes:
        array, cell = self._array, self._cell
        dtype = parse_dtype(array.dtype, array.name)
        values = cell.values if cell.values is not None else np.full(array.chunks, fill_of(dtype), dtype)
        if cell.old_coverage == FULL:
            cell.coverage = FULL
        else:
            cell.mask = cell.mask if cell.mask is not None else np.zeros(array.chunks, bool)
        for i, (row, k, region) in enumerate(cell.pieces):
            target, source = self._meet(region)
            # With `...` values are placed also where there is no axis: else an array of objects would take one array in.
            place: tuple[Any, ...] = (*target, ...)
            inside: tuple[Any, ...] = (*source, ...)
            values[place] = cell.large[i] if row.ref else self._payloads.inline(row, k, array)[inside]
            if cell.mask is not None:
                cell.mask[target] = True
        if cell.mask is not None and cell.mask[_inside(self._index, array.chunks, self._shape)].all():
            cell.coverage = FULL
        return encode_chunk(values, array.codec)


def _packed(mask: np.ndarray[Any, Any]) -> Any:
    return lambda: pack(mask.tobytes())
