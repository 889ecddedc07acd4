"""The slice language equals NumPy applied axis by axis, and refuses everything else by its own error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aq_data.errors import SelectionError
from aq_data.models.selection import Selection, format_selection, parse_selection, select, whole

VECTORS = json.loads(Path(__file__).with_name("selection_vectors.json").read_text(encoding="utf-8"))
HUGE = 10**18 - 1
"""The largest number the text form takes."""

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
bounds = st.none() | st.integers(-9, 9) | st.sampled_from([-HUGE, HUGE])
steps = st.none() | st.integers(-4, 4).filter(bool) | st.sampled_from([-HUGE, HUGE])


@st.composite
def entries_for(draw, size: int):
    """One entry that fits an axis of `size`."""
    kinds = [st.builds(slice, bounds, bounds, steps), st.lists(st.booleans(), min_size=size, max_size=size).map(np.array)]
    if size:
        kinds += [st.integers(-size, size - 1), st.lists(st.integers(-size, size - 1), max_size=8)]
    else:
        kinds.append(st.just([]))
    entry = draw(st.one_of(kinds))
    return entry.astype(bool) if isinstance(entry, np.ndarray) else entry


@st.composite
def cases(draw):
    """A shape and a key for it: fewer entries than axes, and an ellipsis anywhere or nowhere."""
    shape = draw(shapes)
    count = draw(st.integers(0, len(shape)))
    if draw(st.booleans()):
        before = draw(st.integers(0, count))
        axes = [*range(before), *range(len(shape) - (count - before), len(shape))]
        key: list[Any] = [draw(entries_for(shape[axis])) for axis in axes]
        key.insert(before, Ellipsis)
    else:
        key = [draw(entries_for(shape[axis])) for axis in range(count)]
    return shape, tuple(key)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def by_numpy(array: np.ndarray, key: tuple[Any, ...]) -> np.ndarray:
    """`key` applied by NumPy one axis after the other, the last first, so that dropped axes move none to come."""
    dots = next((i for i, entry in enumerate(key) if entry is Ellipsis), len(key))
    after = key[dots + 1 :]
    entries = [*key[:dots], *[slice(None)] * (array.ndim - dots - len(after)), *after]
    for axis in reversed(range(array.ndim)):
        entry = entries[axis]
        if isinstance(entry, slice):
            array = array[(slice(None),) * axis + (entry,)]
        elif isinstance(entry, np.ndarray):
            array = np.compress(entry, array, axis=axis)
        else:
            array = np.take(array, np.asarray(entry, dtype=np.intp), axis=axis)
    return array


def by_positions(array: np.ndarray, selection: Selection) -> np.ndarray:
    """What a normalised selection says, read literally."""
    for axis in reversed(range(array.ndim)):
        array = np.take(array, selection.axes[axis].positions(), axis=axis)
    return array.reshape(selection.shape)


def as_text(key: tuple[Any, ...], draw) -> str:
    """A key in text form, with blanks wherever these are allowed."""

    def number(value: int | None) -> str:
        if value is None:
            return ""
        return (
            draw(st.sampled_from(["", " "])) + draw(st.sampled_from(["+", ""]) if value >= 0 else st.just("")) + str(value)
        )

    parts = []
    for entry in key:
        if entry is Ellipsis:
            parts.append("...")
        elif isinstance(entry, slice):
            ends = [entry.start, entry.stop] if entry.step is None else [entry.start, entry.stop, entry.step]
            parts.append(":".join(number(end) for end in ends))
        elif isinstance(entry, int):
            parts.append(number(entry))
        else:
            picks = np.flatnonzero(entry).tolist() if isinstance(entry, np.ndarray) else entry
            parts.append("[" + ",".join(number(pick) for pick in picks) + "]")
    return ",".join(parts)


@given(cases())
@example(((3,), (slice(None, None, -1),)))
@example(((3,), (slice(0, None, -1),)))
@example(((), (Ellipsis,)))
def test_a_key_selects_what_numpy_selects_axis_by_axis(case):
    shape, key = case
    selection = select(key, shape)
    expected = by_numpy(numbered(shape), key)
    assert selection.array_shape == shape
    assert selection.shape == expected.shape
    assert np.array_equal(by_positions(numbered(shape), selection), expected)
    assert selection.is_whole == (selection.axes == whole(shape).axes)


@given(cases(), st.data())
def test_text_selects_what_its_key_selects(case, data):
    shape, key = case
    text = as_text(key, data.draw)
    found = by_positions(numbered(shape), parse_selection(text, shape))
    assert np.array_equal(found, by_numpy(numbered(shape), key)), text


@given(cases())
@example(((3,), (slice(2, None, HUGE),)))
def test_the_text_of_a_selection_reads_back_to_an_equal_result(case):
    shape, key = case
    selection = select(key, shape)
    again = parse_selection(format_selection(selection), shape)
    assert again.shape == selection.shape
    for mine, other in zip(selection.axes, again.axes, strict=True):
        assert mine.drop == other.drop
        assert mine.positions().tolist() == other.positions().tolist()


@given(cases(), st.data())
def test_a_part_of_an_axis_has_the_positions_between_its_ends(case, data):
    shape, key = case
    for axis in select(key, shape).axes:
        first, last = sorted(data.draw(st.tuples(st.integers(0, axis.count), st.integers(0, axis.count))))
        part = axis.part(first, last)
        assert part.positions().tolist() == axis.positions()[first:last].tolist()
        assert part.count == last - first


@given(
    st.integers(0, 5), st.sampled_from([-(10**30), 10**30, -(1 << 63), 1 << 63]), st.sampled_from([-(10**30), 10**30, None])
)
def test_slice_bounds_and_steps_of_any_magnitude_are_clipped_as_python_clips_them(size, bound, step):
    for key in (slice(bound, None, step), slice(None, bound, step)):
        assert select(key, (size,)).axes[0].positions().tolist() == list(range(size))[key]


@pytest.mark.parametrize("text", ["", "   ", "...", ":", ":,...", "...,::1"])
def test_blank_text_and_what_says_everything_select_everything(text):
    selection = parse_selection(text, (2, 3))
    assert selection.is_whole
    assert selection.shape == (2, 3)


@pytest.mark.parametrize("integer", [np.int8(-1), np.uint64(2), np.array(2), np.array(-1, dtype="i2")])
def test_numpy_integers_are_integers(integer):
    assert select(integer, (3,)).axes[0].positions().tolist() == [2]
    assert select(integer, (3,)).shape == ()


@pytest.mark.parametrize("entries", [range(0, 3, 2), (0, 2), np.array([0, 2], dtype="u1"), [True, False, True], [0, -1]])
def test_any_sequence_of_integers_is_a_list(entries):
    assert select((entries,), (3,)).axes[0].positions().tolist() == [0, 2]


BAD_KEYS = {
    "a step of 0": ((slice(None, None, 0),), (3,)),
    "too many axes": ((0, 0), (3,)),
    "an axis of a scalar": (0, ()),
    "a slice of a scalar": (slice(None), ()),
    "an index past the end": (3, (3,)),
    "an index before the start": (-4, (3,)),
    "any index of an empty axis": (0, (0,)),
    "an out of range index in a list": ([0, 3], (3,)),
    "a negative out of range index in a list": ([0, -4], (3,)),
    "two ellipses": ((..., 0, ...), (3, 3)),
    "a new axis": (None, (3,)),
    "a new axis in a tuple": ((0, None), (3, 3)),
    "a mask of two dimensions": (np.ones((3, 3), dtype=bool), (3, 3)),
    "a short mask": (np.ones(2, dtype=bool), (3,)),
    "a long mask": ([True] * 4, (3,)),
    "an empty mask of a longer axis": (np.ones(0, dtype=bool), (3,)),
    "a single boolean": (True, (3,)),
    "a NumPy boolean": (np.True_, (3,)),
    "a boolean of no dimensions": (np.array(True), (3,)),
    "a list of two dimensions": ([[0], [1]], (3,)),
    "a ragged list": ([[0], [1, 2]], (3,)),
    "a float": (1.0, (3,)),
    "a NumPy float": (np.float64(1), (3,)),
    "a list of floats": ([0.0, 1.0], (3,)),
    "NaN": (math.nan, (3,)),
    "text": ("0", (3,)),
    "text that is a selection": ("0:1", (3,)),
    "a list of texts": (["0"], (3,)),
    "an object": (object(), (3,)),
    "a dict": ({0: 1}, (3,)),
    "a set": ({0}, (3,)),
    "an array of nothing": (np.array(None), (3,)),
    "a slice of floats": (slice(0.5, None), (3,)),
    "a slice of text": (slice("a", "b"), (3,)),
    "a step that is a small float": (slice(None, None, 0.5), (3,)),
    "a step that is text": (slice(None, None, "a"), (3,)),
    "a step that is a list": (slice(None, None, []), (3,)),
    "a step that is NaN": (slice(None, None, math.nan), (3,)),
    "a huge index": (10**30, (3,)),
    "a huge negative index": (-(10**30), (3,)),
    "a list of huge integers": ([10**30], (3,)),
    "a list that needs 64 unsigned bits": ([-1, (1 << 64) - 1], (3,)),
    "a date": (np.datetime64("2026-01-01"), (3,)),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_key_that_does_not_fit_is_refused_with_the_real_shape(name):
    key, shape = BAD_KEYS[name]
    with pytest.raises(SelectionError) as caught:
        select(key, shape, "iq")
    assert caught.value.details["shape"] == list(shape)
    assert str(shape) in str(caught.value)
    assert "iq" in str(caught.value)


BAD_TEXTS = [
    "::0", "0:1:0", "0,0,0,0", "9", "-6", "[0,9]", "...,...", ".", "..", "....", "1.5", "1.0", "1e3", "0x1", "1_0",
    "a", "None",
    "nan", "-", "+", "--1", "+-1", "- 1", "1 2", "0:1:2:3", "::::", "[1,", "[1", "1]", "]", "[", "[]]", "[[]]",
    "[1,]", "[,1]",
    "[1,,2]", "[1:2]", "[...]", "[a]", "[1.5]", "1,,2", ",", ",1", "1,", "1;2", "1\n,x", "0:1,", ":a", "(1)", "{1}", "'1'",
    "١", "１", "[२]", "１:", "−1", "１…", "…", "1\x00", "\x00", "\ud800", "True", "newaxis", "9" * 18, "9" * 19,
    "-" + "9" * 19,
    "9" * 5000, ":" + "9" * 19, "[" + "9" * 5000 + "]", "0:1:" + "9" * 4301,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_TEXTS, ids=lambda text: ascii(text[:24]))
def test_text_that_is_no_selection_of_the_array_is_refused_with_a_short_message(text):
    with pytest.raises(SelectionError) as caught:
        parse_selection(text, (5, 4, 3))
    assert len(str(caught.value)) < 1000


def test_every_refusal_of_a_text_carries_the_real_shape():
    refusals = []
    for text in [*BAD_TEXTS, "x" * (1 << 21)]:
        with pytest.raises(SelectionError) as caught:
            parse_selection(text, (5, 4, 3))
        refusals.append((text[:40], caught.value.details.get("shape")))
    assert [text for text, shape in refusals if shape != [5, 4, 3]] == []


@pytest.mark.parametrize(
    "text",
    ["1," * (1 << 19), "[" + "1," * (1 << 19) + "1]", "[" * (1 << 20), "1" * (1 << 20), " " * (1 << 19) + "x",
     "1:" * (1 << 19),
     "[" + " " * (1 << 19) + "x", "1" + " " * (1 << 19) + "x", "x" * (1 << 21), "...," * (1 << 17), "," * (1 << 20)],
    ids=lambda text: ascii(text[:5]),
)  # fmt: skip
def test_a_megabyte_of_text_is_refused_with_a_short_message(text):
    with pytest.raises(SelectionError) as caught:
        parse_selection(text, (5, 4, 3))
    assert len(str(caught.value)) < 1000


@given(st.text(alphabet="0123456789-+:,[]. ax\n١", max_size=12), shapes)
def test_any_text_is_a_selection_within_bounds_or_refused(text, shape):
    try:
        selection = parse_selection(text, shape)
    except SelectionError:
        return
    for axis, size in zip(selection.axes, shape, strict=True):
        positions = axis.positions()
        assert len(positions) == axis.count
        assert ((positions >= 0) & (positions < size)).all()


def test_there_are_vectors():
    """The file two languages share holds selections and refusals."""
    assert len(VECTORS) >= 40
    assert {"error" in vector for vector in VECTORS} == {True, False}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: f"{vector['text']!r} of {vector['shape']}")
def test_vector(vector):
    """Each text of the shared file selects the positions that stand beside it, or is refused."""
    shape = tuple(vector["shape"])
    if "error" in vector:
        with pytest.raises(SelectionError):
            parse_selection(vector["text"], shape)
        return
    axes = parse_selection(vector["text"], shape).axes
    found = [axis.start if axis.drop else axis.positions().tolist() for axis in axes]
    assert found == vector["positions"]
