"""Chunk arithmetic: extents within bounds, exactly the chunks that are needed, pieces that add up to the whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aq_data.models.selection import Selection, select
from aq_data.storage.arrays.chunking import (
    BUCKET_TARGET_BYTES,
    TARGET_BYTES,
    chunk_grid,
    chunk_parts,
    chunk_shape,
    growing_chunk_shape,
    split_by_size,
)

extents = st.integers(0, 5) | st.integers(0, 300) | st.integers(0, 1 << 34)
itemsizes = st.sampled_from([1, 2, 4, 8, 12, 16, 100, 1 << 16, TARGET_BYTES, TARGET_BYTES + 1, 1 << 24])


@given(st.lists(extents, max_size=6).map(tuple), itemsizes, st.sampled_from([TARGET_BYTES, BUCKET_TARGET_BYTES]))
@example((1, 1_000_000), 8, TARGET_BYTES)
@example((3, 5, 7, 11, 13, 17), 1 << 16, BUCKET_TARGET_BYTES)
def test_a_chunk_is_within_the_target_unless_one_element_is_larger(shape, itemsize, target):
    chunks = chunk_shape(shape, itemsize, target)
    assert len(chunks) == len(shape)
    assert all(1 <= c <= max(1, n) for c, n in zip(chunks, shape, strict=True))
    assert math.prod(chunks) * itemsize <= max(target, itemsize)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=3).map(tuple), st.sampled_from([1, 8, 16]))
def test_an_array_below_the_target_is_one_chunk_and_a_larger_one_has_chunks_of_fair_size(shape, itemsize):
    chunks = chunk_shape(shape, itemsize)
    if math.prod(shape) * itemsize <= TARGET_BYTES:
        assert chunks == shape
    else:
        assert math.prod(chunks) * itemsize >= TARGET_BYTES / 2 ** (len(shape) + 1)


axes_that_may_grow = st.lists(
    st.tuples(st.none(), extents) | st.tuples(st.sampled_from([0, 1, 2, 7, 1000, 1 << 40]), st.just(0)), max_size=5
)


@given(axes_that_may_grow, itemsizes)
@example([(None, 21), (0, 0)], 16)
@example([(0, 0), (None, 1 << 34)], 8)
def test_a_chunk_of_a_growing_array_is_within_the_target_and_holds_the_fixed_axes_first(axes, itemsize):
    """A fixed part that fits is whole in each chunk; no growing axis is cut longer than it is planned to be."""
    growing, shape = tuple(g for g, _ in axes), tuple(n for _, n in axes)
    chunks = growing_chunk_shape(shape, growing, itemsize)
    assert len(chunks) == len(shape)
    assert math.prod(chunks) * itemsize <= max(TARGET_BYTES, itemsize)
    fixed = tuple(n for n, g in zip(shape, growing, strict=True) if g is None)
    assert tuple(c for c, g in zip(chunks, growing, strict=True) if g is None) == chunk_shape(fixed, itemsize)
    for chunk, planned in zip(chunks, growing, strict=True):
        assert chunk >= 1
        assert not planned or chunk <= planned
    if all(g is None for g in growing):
        assert chunks == chunk_shape(shape, itemsize)


@pytest.mark.parametrize(
    ("shape", "growing", "itemsize", "chunks"),
    [
        ((0,), (0,), 8, (65536,)),
        ((0,), (500,), 8, (500,)),
        ((21, 0), (None, 0), 16, (21, 1560)),
        ((0, 21), (0, None), 16, (1560, 21)),
        ((0, 0), (0, 0), 8, (256, 256)),
        ((0, 0), (4, 0), 8, (4, 16384)),
        ((0, 65536), (0, None), 8, (1, 65536)),
        ((), (), 8, ()),
    ],
)
def test_chunks_of_growing_arrays_are_these(shape, growing, itemsize, chunks):
    """Traces, grids of two sweeps, a whole trace per step, a scalar."""
    assert growing_chunk_shape(shape, growing, itemsize) == chunks


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 7)), max_size=4))
def test_the_grid_covers_the_array_and_no_chunk_is_empty(axes):
    shape, chunks = tuple(n for n, _ in axes), tuple(c for _, c in axes)
    for count, n, c in zip(chunk_grid(shape, chunks), shape, chunks, strict=True):
        assert count * c >= n > (count - 1) * c or (count, n) == (0, 0)


def entries(size: int) -> st.SearchStrategy[Any]:
    bounds = st.none() | st.integers(-size - 2, size + 2)
    kinds = [st.builds(slice, bounds, bounds, st.none() | st.integers(-5, 5).filter(bool))]
    if size:
        kinds += [st.integers(0, size - 1), st.lists(st.integers(-size, size - 1), max_size=9)]
    return st.one_of(kinds)


@st.composite
def selections(draw) -> tuple[Selection, tuple[int, ...]]:
    """A selection and a chunk shape, of which border chunks may reach beyond the array."""
    shape = tuple(draw(st.lists(st.integers(0, 12), max_size=3)))
    chunks = tuple(draw(st.integers(1, max(1, n) + 1)) for n in shape)
    return select(tuple(draw(entries(n)) for n in shape), shape), chunks


def taken(array: np.ndarray, selection: Selection) -> np.ndarray:
    """The selected values, integer axes kept as length 1."""
    return array[np.ix_(*(axis.positions() for axis in selection.axes))] if selection.axes else array


def orthogonal(index: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
    return np.ix_(*(np.arange(n)[entry] for entry, n in zip(index, shape, strict=True))) if index else ()


@given(selections())
def test_parts_touch_exactly_the_chunks_that_hold_selected_positions_each_once(case):
    selection, chunks = case
    touched = [part.index for part in chunk_parts(selection, chunks)]
    needed = [set()] if not chunks else [
        {int(p) // c for p in axis.positions()} for axis, c in zip(selection.axes, chunks, strict=True)
    ]  # fmt: skip
    expected = {()} if not chunks else {tuple(index) for index in np.ndindex(*chunk_grid(selection.array_shape, chunks))
                                        if all(i in axis for i, axis in zip(index, needed, strict=True))}  # fmt: skip
    assert len(touched) == len(set(touched))
    assert set(touched) == expected


@given(selections())
def test_parts_put_every_selected_value_in_its_place_once(case):
    selection, chunks = case
    array = np.arange(math.prod(selection.array_shape)).reshape(selection.array_shape)
    result = np.full(selection.full_shape, -1)
    writes = np.zeros(selection.full_shape, dtype=int)
    for part in chunk_parts(selection, chunks):
        chunk = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(part.index, chunks, strict=True))]
        target = orthogonal(part.target, result.shape)
        result[target] = chunk[orthogonal(part.source, chunk.shape)]
        writes[target] += 1
    assert np.array_equal(result, taken(array, selection))
    assert (writes == 1).all()


@given(selections(), st.integers(1, 20), st.integers(1, 500))
def test_pieces_one_after_the_other_are_the_whole_and_each_within_the_limit(case, itemsize, limit):
    selection, chunks = case
    array = np.arange(math.prod(selection.array_shape)).reshape(selection.array_shape)
    pieces = list(split_by_size(selection, chunks, itemsize, limit))
    values = [taken(array, piece).reshape(-1) for piece in pieces]
    assert np.array_equal(np.concatenate(values), taken(array, selection).reshape(-1))
    for piece in pieces:
        count = math.prod(piece.full_shape)
        assert count * itemsize <= limit or count == 1
        assert [axis.drop for axis in piece.axes] == [axis.drop for axis in selection.axes]


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(1, 3),
    st.data(),
)
def test_no_chunk_is_read_twice_where_a_row_of_chunks_is_within_the_limit(axes, itemsize, rows, data):
    """Cuts fall on chunk borders: of a progression, each chunk belongs to one piece."""
    shape, chunks = tuple(n for n, _ in axes), tuple(min(n, c) for n, c in axes)
    steps = [data.draw(st.sampled_from([1, 2, -1, -3])) for _ in shape]
    selection = select(tuple(slice(None, None, step) for step in steps), shape)
    first = next((i for i, axis in enumerate(selection.axes) if axis.count > 1), 0)
    band = chunks[first] * math.prod(selection.full_shape[first + 1 :]) * itemsize
    pieces = list(split_by_size(selection, chunks, itemsize, rows * band))
    touched = [part.index for piece in pieces for part in chunk_parts(piece, chunks)]
    assert len(touched) == len(set(touched))


@given(st.integers(2, 200), st.integers(1, 30), st.integers(2, 12))
def test_pieces_are_not_cut_finer_than_the_limit_asks(size, extent, chunks_per_piece):
    """A plain axis of small chunks is cut into about as few pieces as fit."""
    extent = min(extent, size)
    limit = extent * chunks_per_piece
    pieces = list(split_by_size(select((), (size,)), (extent,), 1, limit))
    assert len(pieces) <= math.ceil(size / limit) + 1


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_what_is_empty_or_scalar_is_one_piece(shape):
    selection = select((), shape)
    assert list(split_by_size(selection, chunk_shape(shape, 8), 8, 1)) == [selection]
