"""Use cases of reading: an array's selection, and the DataFile as a Zarr store."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from blake3 import blake3

from aq_data.errors import CorruptionError, NotFoundError
from aq_data.models.arrays import ArrayInfo
from aq_data.models.selection import Selection, format_selection, parse_selection
from aq_data.storage.arrays.chunking import chunk_grid
from aq_data.storage.arrays.format import array_document, chunk_key, group_document
from aq_data.storage.arrays.store import ArrayStore, group_prefix
from aq_data.storage.metadata.store import Record
from aq_server.service.datafiles import DataFiles

__all__ = ["Reading", "Slice", "ZarrBlob"]


_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True)
class Slice:
    """A selection of one stored array, not read yet. `tag` changes whenever the values could."""

    array: ArrayInfo
    selection: Selection
    tag: str
    _arrays: ArrayStore
    _prefix: str

    async def read(self) -> np.ndarray[Any, Any]:
        """All selected values, of `selection.shape`."""
        return await self._arrays.read(self._prefix, self.array, self.selection)

    async def give_way(self) -> None:
        """Let small reads come in between two pieces of a stream."""
        await self._arrays.give_way()

    def stream(self) -> AsyncIterator[np.ndarray[Any, Any]]:
        """The selected values in C order, in pieces that bound memory."""
        return self._arrays.stream(self._prefix, self.array, self.selection)


@dataclass(frozen=True, slots=True)
class ZarrBlob:
    """One key of a DataFile's Zarr view: a document made now, or a stored chunk. `is_final` when it can never change."""

    content: bytes
    tag: str
    is_final: bool


class Reading:
    """Reads of complete DataFiles; every read begins with the newest record, so none is stale."""

    def __init__(self, datafiles: DataFiles) -> None:
        self._datafiles, self._arrays = datafiles, datafiles.arrays

    async def slice(self, id: str, name: str, text: str) -> Slice:
        """Locate an array and normalise a selection against its shape; reads no chunk."""
        record = await self._datafiles.get(id)
        array = _array(record, name)
        selection = parse_selection(text, array.shape, name)
        # Arrays of an attempt never change: attempt, name and selection say everything, without reading the values.
        identity = f"{record.attempt}\0{name}\0{format_selection(selection)}".encode()
        tag = blake3(identity).hexdigest(length=12)
        return Slice(array, selection, tag, self._arrays, group_prefix(id, record.attempt))

    async def zarr(self, id: str, key: str) -> ZarrBlob:
        """One key of the Zarr v3 view. NotFoundError only for what does not exist: a lost chunk is CorruptionError."""
        record = await self._datafiles.get(id)
        document = record.document
        if key == "zarr.json":
            return ZarrBlob(group_document(document, record.digest), f"{record.attempt}.{document.revision}", False)
        name, _, rest = key.partition("/")
        array = next((a for a in document.arrays if a.name == name), None)
        if array is None:
            raise NotFoundError(f"the Zarr view of DataFile {id} has no key {key[:80]!r}")
        if rest == "zarr.json":
            return ZarrBlob(msgspec.json.encode(array_document(array)), f"{record.attempt}.a", False)
        stored = _chunk_of(array, rest)
        if stored is None:
            raise NotFoundError(f"array {name!r} of shape {array.shape} has no key {rest[:80]!r}")
        try:
            content = await self._arrays.blobs.get(f"{group_prefix(id, record.attempt)}/{stored}")
        except NotFoundError as exc:
            # A reader takes 404 for "fill value": a chunk that was stored must never be answered so.
            raise CorruptionError(f"array {name!r} of DataFile {id} has lost chunk {rest!r}") from exc
        return ZarrBlob(content, f"{record.attempt}.c", True)


def _array(record: Record, name: str) -> ArrayInfo:
    array = next((a for a in record.document.arrays if a.name == name), None)
    if array is None:
        shapes = ", ".join(f"{a.name!r} {a.shape}" for a in record.document.arrays) or "none"
        raise NotFoundError(f"DataFile {record.document.id} has no array {name[:80]!r}; it has {shapes}")
    return array


def _chunk_of(array: ArrayInfo, rest: str) -> str | None:
    """The stored key for `c/0/1`, built from the numbers, so that nothing of the client's text reaches a path."""
    head, *numbers = rest.split("/")
    if head != "c" or len(numbers) != len(array.shape) or not all(_INDEX.fullmatch(n) for n in numbers):
        return None
    index = tuple(int(n) for n in numbers)
    inside = all(i < n for i, n in zip(index, chunk_grid(array.shape, array.chunks), strict=True))
    return chunk_key(array.name, index) if inside else None
