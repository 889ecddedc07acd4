"""Blocks of a sweep as they travel: u32 length (little-endian), JSON header, then the values of its variables in turn."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator

import msgspec

from aq_data.errors import ValidationError
from aq_data.models.sweep import Block

__all__ = ["BlockReader", "block_head"]

MAX_HEADER_BYTES = 1 << 18


def block_head(header: Block) -> bytes:
    """What stands before the values of a block."""
    encoded = msgspec.json.encode(header)
    return struct.pack("<I", len(encoded)) + encoded


class BlockReader:
    """Takes a body apart that arrives in pieces of any size."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    async def header(self) -> Block | None:
        """The next header; None at the end of the body. ValidationError when it is cut short or no header."""
        length = await self._exactly(4, may_end=True)
        if length is None:
            return None
        size = struct.unpack("<I", length)[0]
        if size > MAX_HEADER_BYTES:
            raise ValidationError(f"a block's header has {size} bytes; the limit is {MAX_HEADER_BYTES}")
        encoded = await self._exactly(size)
        assert encoded is not None
        try:
            return msgspec.json.decode(encoded, type=Block)
        except msgspec.ValidationError as exc:
            raise ValidationError(f"a block's header does not fit: {exc}") from exc
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise ValidationError(f"a block's header is not valid JSON: {exc}") from exc

    async def some(self, most: int) -> memoryview:
        """The next bytes, at least one and at most `most`."""
        if not self._rest:
            self._rest = memoryview(await self._piece())
        found, self._rest = self._rest[:most], self._rest[most:]
        return found

    async def _piece(self) -> bytes:
        async for piece in self._pieces:
            if piece:
                return piece
        raise ValidationError("the body ends in the middle of a block")

    async def _exactly(self, count: int, may_end: bool = False) -> bytes | None:
        if len(self._rest) >= count:
            found, self._rest = bytes(self._rest[:count]), self._rest[count:]
            return found
        gathered = bytearray(self._rest)
        self._rest = memoryview(b"")
        while len(gathered) < count:
            try:
                piece = await self._piece()
            except ValidationError:
                if may_end and not gathered:
                    return None
                raise
            gathered += piece
        self._rest = memoryview(bytes(gathered[count:]))
        return bytes(gathered[:count])
