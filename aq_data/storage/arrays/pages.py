"""Bytes in pages with a checksum each, so that a part of them can be read and believed.

A page is up to `PAGE_BYTES` of content, only the last one less, and behind it their CRC-32C, four bytes little-endian.
"""

from __future__ import annotations

import struct

import google_crc32c

__all__ = ["PAGE_BYTES", "PageWriter", "content_of", "pages_of"]

PAGE_BYTES = 64 << 10
_CHECKSUM = struct.Struct("<I")
_WHOLE = PAGE_BYTES + _CHECKSUM.size


class PageWriter:
    """Puts content into pages as it comes."""

    def __init__(self) -> None:
        self._rest = b""

    def write(self, data: bytes | bytearray | memoryview) -> bytes:
        """The pages that are full now; what is left waits."""
        content = memoryview(self._rest + data if self._rest else data)
        full = len(content) - len(content) % PAGE_BYTES
        self._rest = bytes(content[full:])
        return b"".join(part for at in range(0, full, PAGE_BYTES) for part in _page(content[at : at + PAGE_BYTES]))

    def finish(self) -> bytes:
        """The last page, unless everything was in full ones."""
        rest, self._rest = self._rest, b""
        return b"".join(_page(memoryview(rest))) if rest else b""


def _page(content: memoryview) -> tuple[memoryview, bytes]:
    return content, _CHECKSUM.pack(google_crc32c.value(bytes(content)))


def pages_of(start: int, stop: int, size: int) -> tuple[int, int]:
    """Which bytes have the pages of content [start, stop), of `size` in all; half-open, too."""
    first, last = start // PAGE_BYTES, -(-stop // PAGE_BYTES)
    return first * _WHOLE, min(last * _WHOLE, size + -(-size // PAGE_BYTES) * _CHECKSUM.size)


def content_of(pages: bytes, start: int, stop: int) -> bytes:
    """The content [start, stop) out of the bytes that `pages_of` names. ValueError where a checksum does not match."""
    view, parts = memoryview(pages), list[memoryview]()
    for at in range(0, len(view), _WHOLE):
        page = view[at : at + _WHOLE]
        content, checksum = page[: -_CHECKSUM.size], page[-_CHECKSUM.size :]
        if len(page) <= _CHECKSUM.size or _CHECKSUM.unpack(checksum)[0] != google_crc32c.value(bytes(content)):
            raise ValueError(f"page {start // PAGE_BYTES + at // _WHOLE} does not match its checksum")
        parts.append(content)
    before = start % PAGE_BYTES
    found = b"".join(parts)
    if len(found) < before + stop - start:
        raise ValueError(f"there are {max(0, len(found) - before)} bytes instead of {stop - start}")
    return found[before : before + stop - start] if before or len(found) > stop - start else found
