"""Bytes in pages: any part of them comes back as it was written, and a changed bit is never read."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_data.storage.arrays.pages import PAGE_BYTES, PageWriter, content_of, pages_of

SIZES = st.one_of(
    st.integers(0, 40), st.integers(-3, 3).flatmap(lambda n: st.integers(1, 3).map(lambda k: k * PAGE_BYTES + n))
)


def content(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def paged(data: bytes, cuts: list[int]) -> bytes:
    writer, bounds = PageWriter(), sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = [bytearray(data[a:b]) for a, b in itertools.pairwise(bounds)]
    return b"".join([*(writer.write(piece) for piece in pieces), writer.finish()])


@given(size=SIZES, cuts=st.lists(st.integers(0, 1 << 20), max_size=5), a=st.integers(0, 1 << 20), b=st.integers(0, 1 << 20))
def test_any_part_comes_back_however_it_was_written(size, cuts, a, b):
    data = content(size)
    stored = paged(data, cuts)
    start, stop = sorted((a % (size + 1), b % (size + 1)))
    first, last = pages_of(start, stop, size)
    assert 0 <= first <= last <= len(stored)
    assert last - first <= stop - start + 2 * (PAGE_BYTES + 4) + 4 * (size // PAGE_BYTES + 1)
    assert content_of(stored[first:last], start, stop) == data[start:stop]
    assert content_of(stored, 0, size) == data
    assert pages_of(0, size, size) == (0, len(stored))


@given(size=SIZES.filter(bool), at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_a_changed_bit_is_never_read(size, at, bit):
    stored = bytearray(paged(content(size), []))
    stored[at % len(stored)] ^= 1 << bit
    with pytest.raises(ValueError, match="checksum"):
        content_of(bytes(stored), 0, size)


@given(size=SIZES.filter(bool), kept=st.integers(0, 1 << 20))
def test_what_was_cut_off_is_told(size, kept):
    stored = paged(content(size), [])
    with pytest.raises(ValueError, match=r"checksum|instead of"):
        content_of(stored[: kept % len(stored)], 0, size)
