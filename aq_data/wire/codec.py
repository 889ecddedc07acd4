"""How values travel: arrays as raw C-order little-endian bytes, saves as multipart/form-data."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np

from aq_data.models.arrays import STRING, stored_dtype

__all__ = [
    "ARROW",
    "CSV",
    "JSON",
    "NDJSON",
    "NPY",
    "PIECE",
    "RAW",
    "MultipartBody",
    "Part",
    "array_pieces",
    "in_pieces",
    "little_endian",
    "raw_view",
    "text_bytes",
]

RAW = "application/octet-stream"
NPY = "application/x-npy"
JSON = "application/json"
NDJSON = "application/x-ndjson"
CSV = "text/csv"
ARROW = "application/vnd.apache.arrow.stream"

PIECE = 1 << 20
"""Bytes handed to the socket at a time: whole arrays in one piece cost fresh pages and are 3 times slower."""

Buffer = bytes | memoryview


def little_endian(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`array` with little-endian items; the same object when it is already so."""
    if array.dtype.kind in "OT":
        return array  # text of variable length has no byte order
    little = array.dtype.newbyteorder("<")
    return array if array.dtype == little else array.astype(little)


def array_pieces(array: np.ndarray[Any, Any]) -> Iterator[memoryview]:
    """The raw form in pieces of `PIECE` bytes: views into a C-ordered array, copies of one slab at a time of any other."""
    if array.size == 0:
        return
    if array.flags.c_contiguous:
        flat = raw_view(array)
        for start in range(0, len(flat), PIECE):
            yield flat[start : start + PIECE]
        return
    rows = max(1, 8 * PIECE // max(1, array.nbytes // array.shape[0]))
    for first in range(0, array.shape[0], rows):
        yield from array_pieces(np.ascontiguousarray(array[first : first + rows]))


def raw_view(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of a C-ordered array, without a copy; writable if the array is."""
    return memoryview(array.reshape(-1).view(stored_dtype(array.dtype)).data).cast("B")


def text_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """Variable-length text as it travels: u32 count, then u32 length and UTF-8 of each, little-endian, C order."""
    encoded = [str(text).encode("utf-8") for text in array.reshape(-1)]
    return struct.pack("<I", len(encoded)) + b"".join(struct.pack("<I", len(text)) + text for text in encoded)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name by which a dtype is declared: NumPy's `dtype.str`, "string" for text kept as objects."""
    return STRING if dtype.kind == "O" else "|T16" if dtype.kind == "T" else dtype.str


@dataclass(frozen=True, slots=True)
class Part:
    """One form part: its name, media type, exact length in bytes, and where the bytes come from.

    A file is read from its current position.
    """

    name: str
    content_type: str
    length: int
    source: bytes | np.ndarray[Any, Any] | BinaryIO
    filename: str | None = None

    def pieces(self) -> Iterator[Buffer]:
        """The content, at most a few MB in memory at a time."""
        if isinstance(self.source, bytes):
            yield self.source
        elif isinstance(self.source, np.ndarray):
            yield from array_pieces(self.source)
        else:
            left = self.length
            while left:
                piece = self.source.read(min(PIECE, left))
                if not piece:
                    raise OSError(f"{self.filename} became shorter while it was sent")
                left -= len(piece)
                yield piece


def in_pieces(contents: Iterable[Buffer]) -> Iterator[bytes]:
    """Contents of any size as pieces of about `PIECE` bytes: each send has its price."""
    waiting: list[Buffer] = []
    size = 0
    for content in contents:
        waiting.append(content)
        size += len(content)
        if size >= PIECE:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


class MultipartBody:
    """A multipart/form-data body of known length (RFC 7578), iterated once; `close` it afterwards."""

    def __init__(self, parts: list[Part], boundary: str | None = None) -> None:
        self._parts = parts
        self._boundary = boundary or secrets.token_hex(16)
        self.content_type = f"multipart/form-data; boundary={self._boundary}"
        self.length = sum(len(self._head(part)) + part.length + 2 for part in parts) + len(self._end())

    def _head(self, part: Part) -> bytes:
        disposition = f'form-data; name="{part.name}"'
        if part.filename is not None:
            # The plain form cannot tell `%22` from a quote; the extended one (RFC 5987) holds the name exactly.
            name = part.filename.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
            disposition += f"; filename=\"{name}\"; filename*=UTF-8''{quote(part.filename, safe='')}"
        return (
            f"--{self._boundary}\r\nContent-Disposition: {disposition}\r\n"
            f"Content-Type: {part.content_type}\r\nContent-Length: {part.length}\r\n\r\n"
        ).encode()

    def again(self, parts: list[Part]) -> MultipartBody:
        """The same body over parts opened anew, for another try."""
        return MultipartBody(parts, self._boundary)

    def close(self) -> None:
        """Close the files among the parts."""
        for part in self._parts:
            if not isinstance(part.source, (bytes, np.ndarray)):
                part.source.close()

    def _end(self) -> bytes:
        return f"--{self._boundary}--\r\n".encode()

    def __iter__(self) -> Iterator[bytes]:
        """The body in pieces; heads and small parts go together."""
        yield from in_pieces(self._contents())

    def _contents(self) -> Iterator[Buffer]:
        for part in self._parts:
            yield self._head(part)
            yield from part.pieces()
            yield b"\r\n"
        yield self._end()
