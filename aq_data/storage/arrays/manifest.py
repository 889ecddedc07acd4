"""Which object holds which chunk of a sweep that grows, and how much of each chunk was measured.

A fold writes its chunks under keys that nobody used before, then a manifest that names them; the metadata store switches to
it in one step. So an object never changes, and whoever holds a manifest reads one moment of the sweep.

    <id>/<attempt>/sweep.json                     a copy of the plan
    <id>/<attempt>/open/<cut>-<token>/manifest    this map
                                      0.3.1       chunk (3, 1) of the plan's array 0, as it will stand in `arrays.zarr`
                                      0.3.1.w     its written map, where only part of it was measured
                                      events      headers of folded blocks, one JSON line each
    <id>/<attempt>/blocks/<ref>                   values of a block too large for the log, in pages (`pages`)
    <id>/<attempt>/events/<first>-<last>          after the end: the headers of all blocks
    <id>/<attempt>/written/<name>/grid, c/3/1     after the end, for arrays not measured whole: coverage and written maps
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from aq_data.errors import CorruptionError
from aq_data.models.structs import resolve
from aq_data.storage.arrays.format import pack, unpack

__all__ = [
    "FULL",
    "NOTHING",
    "PART",
    "Cells",
    "Manifest",
    "Segment",
    "block_key",
    "cell_key",
    "decode_mask",
    "events_prefix",
    "is_paged",
    "make_ref",
    "open_prefix",
    "plan_key",
    "written_prefix",
]

Grid = np.ndarray[Any, Any]

_PAGED = ".p"

NOTHING, PART, FULL = 0, 1, 2
"""How much of a chunk was measured."""


def open_prefix(id: str, attempt: str) -> str:
    """Where the chunks of a sweep lie until it ends."""
    return f"{id}/{attempt}/open"


def block_key(id: str, attempt: str, ref: str) -> str:
    """Where the values of a large block lie until they are folded."""
    return f"{id}/{attempt}/blocks/{ref}"


def make_ref() -> str:
    """What tells the values of one large block from every other."""
    return f"{secrets.token_hex(8)}{_PAGED}"


def is_paged(ref: str) -> bool:
    """Whether the values lie in pages: those of older versions do not."""
    return ref.endswith(_PAGED)


def written_prefix(id: str, attempt: str, name: str) -> str:
    """Where the written map of an array lies after the end."""
    return f"{id}/{attempt}/written/{name}"


def plan_key(id: str, attempt: str) -> str:
    """Where a copy of a sweep's plan lies."""
    return f"{id}/{attempt}/sweep.json"


def events_prefix(id: str, attempt: str) -> str:
    """Where the headers of all blocks lie after the end, as `<first>-<last>`."""
    return f"{id}/{attempt}/events"


class Segment(msgspec.Struct, frozen=True, array_like=True, order=True):
    """An object with the headers of the blocks `first` to `last`, of `size` bytes before compression."""

    first: int
    last: int
    key: str
    size: int


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    shape: tuple[int, ...]
    cut: bytes
    token: bytes
    coverage: bytes


class _Encoded(msgspec.Struct, frozen=True, array_like=True):
    arrays: dict[str, _Packed]
    segments: tuple[Segment, ...]
    retired: tuple[tuple[float, tuple[str, ...]], ...]
    extents: dict[str, int]
    touched: tuple[str, ...]


@dataclass(slots=True)
class Cells:
    """The chunks of one array, in the shape of its grid: the generation (`cut`, `token`) that holds each, and `coverage`."""

    cut: Grid
    token: Grid
    coverage: Grid

    @classmethod
    def empty(cls, grid: tuple[int, ...]) -> Cells:
        """Nothing measured."""
        return cls(np.zeros(grid, "<i8"), np.zeros(grid, "<u4"), np.zeros(grid, "u1"))

    def resized(self, grid: tuple[int, ...]) -> Cells:
        """A copy that has at least the chunks of `grid`."""
        grown = Cells.empty(tuple(max(a, b) for a, b in zip(self.coverage.shape, grid, strict=True)))
        inside = tuple(slice(0, n) for n in self.coverage.shape)
        grown.cut[inside], grown.token[inside], grown.coverage[inside] = self.cut, self.token, self.coverage
        return grown

    def at(self, index: tuple[int, ...]) -> tuple[str, int]:
        """The generation that holds a chunk, and its coverage; NOTHING also for one outside."""
        if any(i >= n for i, n in zip(index, self.coverage.shape, strict=True)):
            return "", NOTHING
        return f"{self.cut[index]}-{self.token[index]}", int(self.coverage[index])

    def put(self, index: tuple[int, ...], cut: int, token: int, coverage: int) -> None:
        """Say that the generation (`cut`, `token`) holds a chunk."""
        self.cut[index], self.token[index], self.coverage[index] = cut, token, coverage


@dataclass(slots=True)
class Manifest:
    """The cells of each array by its name, where older events lie, and objects to be removed once no reader needs them.

    `extents` and `touched` are those of the state at the fold: with them a lost database can be rebuilt.
    """

    arrays: dict[str, Cells] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    retired: tuple[tuple[float, tuple[str, ...]], ...] = ()
    extents: dict[str, int] = field(default_factory=dict)
    touched: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        return sum(13 * cells.coverage.size for cells in self.arrays.values()) + 200 * (
            len(self.segments) + sum(len(keys) for _, keys in self.retired)
        )

    def encode(self) -> bytes:
        """The object's bytes, with a checksum."""
        arrays = {
            name: _Packed(
                cells.coverage.shape, pack(cells.cut.tobytes()), pack(cells.token.tobytes()), pack(cells.coverage.tobytes())
            )
            for name, cells in self.arrays.items()
        }
        return pack(msgspec.msgpack.encode(_Encoded(arrays, self.segments, self.retired, self.extents, self.touched)))

    @classmethod
    def decode(cls, data: bytes, key: str) -> Manifest:
        """CorruptionError naming `key` when the bytes are not what was stored."""
        try:
            encoded = msgspec.msgpack.decode(unpack(data, key), type=_Encoded)
        except msgspec.DecodeError as exc:
            raise CorruptionError(f"the manifest {key!r} cannot be read: {exc}") from exc
        arrays = {
            name: Cells(
                *(
                    np.frombuffer(unpack(content, key), dtype).reshape(packed.shape)
                    for content, dtype in ((packed.cut, "<i8"), (packed.token, "<u4"), (packed.coverage, "u1"))
                )
            )
            for name, packed in encoded.arrays.items()
        }
        return cls(arrays, encoded.segments, encoded.retired, encoded.extents, encoded.touched)


def decode_mask(data: bytes, chunks: tuple[int, ...], key: str) -> np.ndarray[Any, Any]:
    """The written map of one chunk, of the chunk shape."""
    try:
        return np.frombuffer(unpack(data, key), bool).reshape(chunks)
    except ValueError as exc:
        raise CorruptionError(f"the written map {key!r} does not fit its chunk") from exc


def cell_key(id: str, attempt: str, generation: str, array: int, index: tuple[int, ...]) -> str:
    """Where a chunk lies while its sweep is open; its written map lies under the same key with `.w`."""
    return f"{open_prefix(id, attempt)}/{generation}/" + ".".join(map(str, (array, *index)))


resolve(Segment, _Packed, _Encoded)
