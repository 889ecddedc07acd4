"""Use cases of reading: an array's selection, its written map, and the DataFile as a Zarr store."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np
from blake3 import blake3

from aq_data.errors import ConflictError, CorruptionError, NotFoundError, TooLargeError, UnavailableError
from aq_data.models.arrays import ArrayInfo
from aq_data.models.selection import Selection, format_selection, parse_selection
from aq_data.storage.arrays.chunking import chunk_grid
from aq_data.storage.arrays.format import array_document, chunk_key, encode_chunk, group_document
from aq_data.storage.arrays.growing import GrowingArray, ObjectGoneError, View
from aq_data.storage.arrays.manifest import NOTHING
from aq_data.storage.arrays.store import SLAB_BYTES, ArrayStore, group_prefix
from aq_data.storage.arrays.writing import TEXT_ITEM
from aq_data.storage.metadata.record import Record
from aq_server.service.datafiles import DataFiles
from aq_server.service.growing import Growing

__all__ = ["Reading", "Slice", "ZarrBlob"]

T = TypeVar("T")

_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")
TRIES = 5
TEXTS_AT_ONCE = 64
"""Texts that are read before their bytes are counted, where a chunk has no more."""
TEXT_HEAD = 4
"""Bytes of a text as it travels, beside its letters."""


class FinishedSource:
    """An array that never changes. `content` names what was read, among all that the array ever held."""

    def __init__(self, arrays: ArrayStore, record: Record, array: ArrayInfo, again: Callable[[], Awaitable[Source]]) -> None:
        """`again` makes a source of a later moment: what waited in a fallback may lie where it belongs by then."""
        self._arrays, self.array, self._again = arrays, array, again
        self._where = (record.document.id, record.attempt, array)
        self.content = record.attempt

    async def read(self, selection: Selection) -> np.ndarray[Any, Any]:
        return await self._tried(lambda source: source.read(selection), lambda: self._arrays.read(*self._where, selection))

    async def written(self, selection: Selection) -> np.ndarray[Any, Any]:
        return await self._tried(
            lambda source: source.written(selection), lambda: self._arrays.written(*self._where, selection)
        )

    async def _tried(self, later: Callable[[Source], Awaitable[T]], at_once: Callable[[], Awaitable[T]]) -> T:
        """What `at_once` gives, or `later` of a source made anew when the blobs were moved meanwhile."""
        try:
            return await at_once()
        except CorruptionError:
            source = await self._again()
            if source.content == self.content:
                raise
            result = await later(source)
            self.content = source.content
            return result

    async def stream(self, selection: Selection, limit: int | None = None) -> AsyncIterator[np.ndarray[Any, Any]]:
        try:
            async for piece in self._arrays.stream(*self._where, selection, limit):
                yield piece
        except CorruptionError as exc:
            if (await self._again()).content == self.content:
                raise
            raise UnavailableError("the DataFile was brought to another store while it was read; read again") from exc

    async def give_way(self) -> None:
        await self._arrays.give_way()


class GrowingSource:
    """An array of an open sweep as of the moment the source was made; `content` names it, or a later one it had to take."""

    def __init__(self, arrays: ArrayStore, view: View, array: ArrayInfo, again: Callable[[], Awaitable[Source]]) -> None:
        """`again` makes a source of a later moment."""
        self._arrays, self._growing, self.manifest = arrays, GrowingArray(arrays.blobs, view, array), view.state.manifest
        self.array, self._again = array, again
        self.content = f"{view.plan.attempt}.{view.state.head}"

    async def read(self, selection: Selection) -> np.ndarray[Any, Any]:
        return await self._tried(lambda source: source.read(selection), lambda: self._growing.read(selection))

    async def written(self, selection: Selection) -> np.ndarray[Any, Any]:
        return await self._tried(lambda source: source.written(selection), lambda: self._growing.written(selection))

    async def give_way(self) -> None:
        await self._arrays.give_way()

    async def _tried(self, later: Callable[[Source], Awaitable[T]], at_once: Callable[[], Awaitable[T]]) -> T:
        """What `at_once` gives, or `later` of a source made anew when objects of this one were removed meanwhile."""
        try:
            return await at_once()
        except ObjectGoneError as exc:
            source = await self._again()
            if isinstance(source, GrowingSource) and source.manifest == self.manifest:
                raise CorruptionError(f"array {self.array.name!r} has lost a chunk: {exc}") from exc
            result = await later(source)
            self.content = source.content
            return result

    async def stream(self, selection: Selection, limit: int | None = None) -> AsyncIterator[np.ndarray[Any, Any]]:
        try:
            async for piece in self._growing.stream(selection, limit or SLAB_BYTES):
                yield piece
        except ObjectGoneError as exc:
            # Half of an older moment and half of a later one would be torn: the reader starts over.
            raise UnavailableError("the sweep was folded while it was read; read again") from exc


Source = FinishedSource | GrowingSource


@dataclass(frozen=True, slots=True)
class Slice:
    """A selection of one array, not read yet."""

    array: ArrayInfo
    selection: Selection
    source: Source

    @property
    def tag(self) -> str:
        """Names the values: content, name and selection say everything without reading them. Ask again after `read`."""
        identity = f"{self.source.content}\0{self.array.name}\0{format_selection(self.selection)}".encode()
        return blake3(identity).hexdigest(length=12)

    async def read(self) -> np.ndarray[Any, Any]:
        """All selected values, of `selection.shape`."""
        return await self.source.read(self.selection)

    async def read_text(self, limit: int) -> np.ndarray[Any, Any]:
        """All selected texts; TooLargeError beyond `limit` bytes as they travel, unless it is a single one.

        How long they are is known when they are there: of much text no more than one piece beyond the limit is read.
        """
        count = math.prod(self.selection.full_shape)
        at_once = max(TEXTS_AT_ONCE, math.prod(self.array.chunks))
        left = limit - TEXT_HEAD * count
        pieces: list[np.ndarray[Any, Any]] = []
        if left >= 0 and count <= at_once:
            pieces = [(await self.read()).reshape(-1)]
            left -= await asyncio.to_thread(_utf8_bytes, pieces[0])
        elif left >= 0:
            async for values in self.source.stream(self.selection, TEXT_ITEM * at_once):
                pieces.append(values.reshape(-1))
                left -= await asyncio.to_thread(_utf8_bytes, pieces[-1])
                if left < 0:
                    break
        if left < 0 and count > 1:
            raise TooLargeError(f"text is given up to {limit >> 20} MiB at once; select less of array {self.array.name!r}")
        return np.concatenate(pieces).reshape(self.selection.shape)

    async def written(self) -> np.ndarray[Any, Any]:
        """Which of the selected elements were measured."""
        return await self.source.written(self.selection)

    async def give_way(self) -> None:
        """Let small reads come in between two pieces of a stream."""
        await self.source.give_way()

    def stream(self) -> AsyncIterator[np.ndarray[Any, Any]]:
        """The selected values in C order, in pieces that bound memory."""
        return self.source.stream(self.selection)


@dataclass(frozen=True, slots=True)
class ZarrBlob:
    """One key of a DataFile's Zarr view: a document made now, or a stored chunk. `is_final` when it can never change."""

    content: bytes
    tag: str
    is_final: bool


class Reading:
    """The use cases; nothing of value lives in an instance."""

    def __init__(self, datafiles: DataFiles, growing: Growing) -> None:
        self._datafiles, self._growing, self._stores = datafiles, growing, datafiles.stores

    async def source(self, id: str, name: str, head: int | None = None) -> Source:
        """One array as of now; with `head` as of when a sweep had so many blocks.

        ConflictError (`illegal_state`) when that moment is gone: later blocks lie over it in the chunks already.
        """
        for _ in range(TRIES):
            record = await self._datafiles.get(id)
            if record.document.state != "open":
                sweep = record.document.sweep
                if head is not None and sweep is not None and sweep.head != head:
                    raise _gone(id, head)
                array = _array(record.document.id, record.document.arrays, name)
                arrays = await self._stores.at(record.document.store)
                return FinishedSource(arrays, record, array, lambda: self.source(id, name, head))
            view = await self._growing.view(record.document.id)
            if not view.state.ended_revision:
                array = _array(record.document.id, view.arrays(), name)
                if head is not None:
                    if not view.state.folded <= head <= view.state.head:
                        raise _gone(id, head)
                    rows = tuple(row for row in view.rows if row.placed.seq <= head)
                    view = View(view.plan, msgspec.structs.replace(view.state, head=head), view.manifest, rows)
                arrays = await self._stores.at(view.plan.store)
                return GrowingSource(arrays, view, array, lambda: self.source(id, name, head))
            await asyncio.sleep(0)
        raise UnavailableError(f"DataFile {id} changes faster than it can be read; try again")

    async def slice(self, id: str, name: str, text: str, head: int | None = None) -> Slice:
        """Locate an array and normalise a selection against its shape; reads no chunk. `head` as in `source`."""
        source = await self.source(id, name, head)
        return Slice(source.array, parse_selection(text, source.array.shape, name), source)

    async def zarr(self, id: str, key: str) -> ZarrBlob:
        """One key of the Zarr v3 view. NotFoundError only for what does not exist: a lost chunk is CorruptionError."""
        record = await self._datafiles.get(id)
        id = record.document.id
        if record.document.state == "open":
            view = await self._growing.view(id)
            if not view.state.ended_revision:
                return await self._open_zarr(record, view, key)
            record = await self._datafiles.get(id)
        document = record.document
        if key == "zarr.json":
            return ZarrBlob(group_document(document, record.digest), f"{record.attempt}.{document.revision}", False)
        array, rest = _zarr_array(id, document.arrays, key)
        if rest == "zarr.json":
            return ZarrBlob(msgspec.json.encode(array_document(array)), f"{record.attempt}.a", False)
        index = _chunk_of(array, rest)
        arrays = await self._stores.at(document.store)
        if array.is_partial and (await arrays.coverage(id, record.attempt, array))[index] == NOTHING:
            raise NotFoundError(f"nothing of chunk {rest!r} of array {array.name!r} was measured")
        try:
            content = await arrays.blobs.get(f"{group_prefix(id, record.attempt)}/{chunk_key(array.name, index)}")
        except NotFoundError as exc:
            if (await self._datafiles.get(id)).attempt != record.attempt:
                return await self.zarr(id, key)  # it was brought to another store
            # A reader takes 404 for "fill value": a chunk that was stored must never be answered so.
            raise CorruptionError(f"array {array.name!r} of DataFile {id} has lost chunk {rest!r}") from exc
        return ZarrBlob(content, f"{record.attempt}.c", True)

    async def _open_zarr(self, record: Record, view: View, key: str) -> ZarrBlob:
        """The view of a sweep as of now: chunks are put together from what is folded and the blocks over it."""
        id, tag = record.document.id, f"{record.attempt}.{record.document.revision}.{view.state.head}"
        if key == "zarr.json":
            # Readers are shown what there is: the state in the copy is that of a DataFile whose arrays can be read.
            document = self._growing.shown(record.document, view.plan, view.state)
            return ZarrBlob(group_document(document, record.digest, is_view=True), tag, False)
        array, rest = _zarr_array(id, view.arrays(), key)
        if rest == "zarr.json":
            return ZarrBlob(msgspec.json.encode(array_document(array)), tag, False)
        index = _chunk_of(array, rest)
        blobs = (await self._stores.at(view.plan.store)).blobs
        growing = GrowingArray(blobs, view, array)
        stored, is_covered = growing.stored_chunk(index)
        if not stored and not is_covered:
            raise NotFoundError(f"nothing of chunk {rest!r} of array {array.name!r} was measured yet")
        try:
            if stored and not is_covered:
                return ZarrBlob(await blobs.get(stored), tag, False)
            content = encode_chunk(await growing.read_chunk(index), array.codec)
        except (ObjectGoneError, NotFoundError) as exc:
            later = await self._growing.view(id)
            if later.state.manifest == view.state.manifest and not later.state.ended_revision:
                raise CorruptionError(f"array {array.name!r} of DataFile {id} has lost chunk {rest!r}") from exc
            return await self.zarr(id, key)
        return ZarrBlob(content, tag, False)


def _utf8_bytes(texts: np.ndarray[Any, Any]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts.tolist())


def _gone(id: str, head: int) -> ConflictError:
    return ConflictError(
        f"DataFile {id} cannot be read as of block {head} any more; read its document again", code="illegal_state"
    )


def _array(id: str, arrays: tuple[ArrayInfo, ...], name: str) -> ArrayInfo:
    array = next((a for a in arrays if a.name == name), None)
    if array is None:
        shapes = ", ".join(f"{a.name!r} {a.shape}" for a in arrays) or "none"
        raise NotFoundError(f"DataFile {id} has no array {name[:80]!r}; it has {shapes}")
    return array


def _zarr_array(id: str, arrays: tuple[ArrayInfo, ...], key: str) -> tuple[ArrayInfo, str]:
    name, _, rest = key.partition("/")
    array = next((a for a in arrays if a.name == name), None)
    if array is None:
        raise NotFoundError(f"the Zarr view of DataFile {id} has no key {key[:80]!r}")
    return array, rest


def _chunk_of(array: ArrayInfo, rest: str) -> tuple[int, ...]:
    """The index in `c/0/1`; NotFoundError unless it is one of the array's chunks. The client's text reaches no path."""
    head, *numbers = rest.split("/")
    if head == "c" and len(numbers) == len(array.shape) and all(_INDEX.fullmatch(n) for n in numbers):
        index = tuple(int(n) for n in numbers)
        if all(i < n for i, n in zip(index, chunk_grid(array.shape, array.chunks), strict=True)):
            return index
    raise NotFoundError(f"array {array.name!r} of shape {array.shape} has no key {rest[:80]!r}")
