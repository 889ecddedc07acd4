"""What a call of a sweep names becomes pieces of a block as NumPy would place them, or is refused at the call."""

from __future__ import annotations

import math
import warnings
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from aq_data.client.regions import Variables
from aq_data.errors import ValidationError
from aq_data.models.arrays import parse_dtype
from aq_data.models.sweep import NewSweepArray
from aq_data.storage.arrays.format import text_from_wire

SIZES: dict[str, int | None] = {"x": None, "y": None, "k": 3, "m": 1}
DIMS = {"a": ("x",), "b": ("k", "x"), "c": ("y", "m", "x"), "s": (), "f": ("k", "m")}
FREE = 9
"""Length of a growing dim in the model."""


def variables(**dtypes: str) -> Variables:
    return Variables(
        NewSweepArray(name, dtypes.get(name, "<i8"), tuple(SIZES[dim] for dim in dims), dims) for name, dims in DIMS.items()
    )


VARIABLES = variables()


def decoded(pieces: tuple, buffers: list) -> list[np.ndarray]:
    return [
        np.frombuffer(bytes(b), parse_dtype(p.dtype, p.name)).reshape(p.shape) for p, b in zip(pieces, buffers, strict=True)
    ]


# --- places --------------------------------------------------------------------------------------------------------

places = st.one_of(
    st.integers(-4, 6), st.builds(slice, st.none() | st.integers(0, 4), st.none() | st.integers(0, 6)), st.just(slice(None))
)


@given(st.sampled_from(sorted(DIMS)), st.dictionaries(st.sampled_from(["x", "y", "k", "m"]), places), st.data())
def test_a_written_region_is_the_one_numpy_assigns_to(name, at, data):
    """`array[key] = value` where the key is `at`, with the value's own lengths where no stop was given."""
    dims = DIMS[name]
    lengths = [data.draw(st.integers(0, 3)) for dim in dims if not isinstance(at.get(dim), int)]
    value = np.arange(1, 1 + math.prod(lengths)).reshape(lengths)
    whole = np.zeros(tuple(SIZES[dim] or FREE for dim in dims), int)
    expected = whole.copy()
    key, axis, is_good = [], 0, set(at) <= set(dims)
    for dim, size in zip(dims, whole.shape, strict=True):
        place = at.get(dim, slice(0, None))
        if isinstance(place, int):
            is_good &= -size <= place < size and (place >= 0 or SIZES[dim] is not None)
            key.append(place)
            continue
        first, length = place.start or 0, lengths[axis]
        is_good &= place.stop is None or place.stop - first == length
        is_good &= first + length <= size
        key.append(slice(first, first + length))
        axis += 1
    if not is_good:
        with pytest.raises(ValidationError):
            VARIABLES.pieces({name: value}, at, None)
        return
    expected[tuple(key)] = value
    pieces, buffers = VARIABLES.pieces({name: value}, at, None)
    [piece], [region] = pieces, decoded(pieces, buffers)
    assert (piece.name, piece.dtype, piece.append) == (name, "<i8", None)
    found = whole.copy()
    found[tuple(slice(s, s + n) for s, n in zip(piece.start, piece.shape, strict=True))] = region
    np.testing.assert_array_equal(found, expected)


@given(st.lists(st.sampled_from(sorted(DIMS)), min_size=1, unique=True), st.sampled_from(["x", "y"]), st.data())
def test_appended_variables_take_one_step_or_as_many_as_all_the_others(names, dim, data):
    """A value without the axis is one step; variables that lack the dim are written where they are."""
    values, steps = {}, set()
    for name in names:
        dims = DIMS[name]
        is_step = data.draw(st.booleans())
        count = data.draw(st.integers(0, 2))
        steps |= {1 if is_step else count} if dim in dims else set()
        values[name] = np.zeros([count if d == dim else SIZES[d] or 2 for d in dims if not (d == dim and is_step)], int)
    if len(steps) != 1:
        with pytest.raises(ValidationError):
            VARIABLES.pieces(values, None, dim)
        return
    pieces, _ = VARIABLES.pieces(values, None, dim)
    for piece in pieces:
        dims = DIMS[piece.name]
        assert piece.append == (dim if dim in dims else None)
        expected = tuple(next(iter(steps)) if d == dim else SIZES[d] or 2 for d in dims)
        assert piece.shape == expected


@pytest.mark.parametrize(
    ("values", "at", "dim", "told"),
    [
        ({}, None, None, "at least one variable"),
        ({"q": 1}, None, None, "no variable 'q'; it has 'a', 'b'"),
        ({"a": [1]}, {"y": 0}, None, "'y'"),
        ({"a": [1]}, None, "k", "no dim that grows"),
        ({"a": [1]}, None, "q", "no dim that grows"),
        ({"f": np.zeros((3, 1), int)}, None, "x", "has the dim 'x'"),
        ({"a": [1]}, {"x": 0}, "x", "leave it out of at"),
        ({"a": 1}, {"x": 1.0}, None, "never a coordinate value"),
        ({"a": 1}, {"x": True}, None, "one index or one slice"),
        ({"a": 1}, {"x": None}, None, "one index or one slice"),
        ({"a": 1}, {"x": [0]}, None, "one index or one slice"),
        ({"a": 1}, {"x": -1}, None, "out of range"),
        ({"b": [1]}, {"k": 3}, None, "out of range"),
        ({"b": [1]}, {"k": -4}, None, "out of range"),
        ({"a": [1]}, {"x": slice(0, 4, 2)}, None, "step of 1"),
        ({"a": [1]}, {"x": slice(-1, None)}, None, "0 <= start"),
        ({"a": []}, {"x": slice(3, 2)}, None, "0 <= start"),
        ({"a": [1]}, {"x": slice(0.5, None)}, None, "never coordinate values"),
        ({"a": [1]}, {"x": slice(0, 2)}, None, "2 places for 1 values"),
        ({"b": np.zeros((4, 2), int)}, None, None, "outside dim 'k'"),
        ({"b": np.zeros((2, 2), int)}, {"k": slice(2, None)}, None, "outside dim 'k'"),
        ({"b": np.zeros(2, int)}, None, None, "2 axes is needed"),
        ({"s": [1]}, None, None, "0 axes is needed"),
        ({"a": [1, 2], "b": np.zeros((3, 1), int)}, None, "x", "1 steps of 'x', an earlier variable 2"),
    ],
)
def test_a_call_that_errs_is_told_what_is_wrong(values, at, dim, told):
    """Each row is one mistake and a part of what is said about it."""
    with pytest.raises(ValidationError, match=told):
        VARIABLES.pieces(values, at, dim)


@pytest.mark.parametrize("place", [slice(0.0, None), slice(False, None), slice("", None)])
def test_a_slice_that_begins_at_a_coordinate_value_is_refused_also_at_zero(place):
    """0.0 is a flux, not a position."""
    with pytest.raises(ValidationError):
        VARIABLES.pieces({"a": [1]}, {"x": place}, None)


def test_any_layout_of_a_value_is_sent_in_c_order():
    """Transposed, strided, reversed, Fortran-ordered, big-endian, read-only, of xarray."""
    wanted = np.arange(6).reshape(3, 2)
    frozen = wanted.copy()
    frozen.flags.writeable = False
    wide = np.zeros((6, 4), int)
    wide[::2, 1::2] = wanted
    for value in (
        wanted.copy().T.copy().T,
        np.asfortranarray(wanted),
        wide[::2, 1::2],
        wanted[::-1].copy()[::-1],
        wanted.astype(">i8"),
        wanted.astype("<i4"),
        frozen,
        wanted.tolist(),
        xr.DataArray(wanted),
    ):
        pieces, buffers = VARIABLES.pieces({"b": value}, None, None)
        np.testing.assert_array_equal(decoded(pieces, buffers)[0], wanted)


# --- dtypes --------------------------------------------------------------------------------------------------------


def kept(dtype: str, value: Any) -> np.ndarray:
    """What of a value is sent for one step of a variable of `dtype`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pieces, buffers = variables(a=dtype).pieces({"a": value}, None, "x")
    if dtype in ("string", "|T16"):
        return text_from_wire(bytes(buffers[0]), pieces[0].shape[0])
    return decoded(pieces, buffers)[0]


INSTANT = np.datetime64("2026-01-31T08:00:00.000000001", "ns")
KEPT = [
    ("<f8", 1), ("<f8", 1.5), ("<f8", float("nan")), ("<f8", np.float32(1.5)), ("<f8", np.arange(3, dtype="i4")),
    ("<f4", 0.5), ("<f4", [0.5, float("inf")]), ("<c16", 1), ("<c16", 1j), ("<c16", [1, 2j]), ("<c8", 1.5),
    ("<i8", 2**62), ("<i4", [1, -2]), ("|u1", 255), ("|b1", True), ("|b1", [True, False]), ("|b1", np.bool_(True)),
    ("<U4", "abcd"), ("<U4", ["", "äbc"]), ("|S3", [b"abc"]), ("string", ["", "a" * 1000, "💥", "a\0b"]), ("string", "x"),
    ("|T16", ["a", ""]), ("<M8[us]", np.datetime64("2026-01-31")), ("<M8[us]", [np.datetime64("NaT")]),
    ("<m8[ms]", np.timedelta64(3, "s")), ("<M8[ns]", INSTANT),
    ("<u8", [2**63]), ("<U4", []),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), KEPT, ids=repr)
def test_a_value_that_fits_the_dtype_comes_out_as_it_went_in(dtype, value):
    """Python numbers, lists and narrower arrays become the variable's dtype."""
    np.testing.assert_array_equal(np.ravel(kept(dtype, value)), np.ravel(np.asarray(value)))


LOST = [
    ("<f8", 1j), ("<f8", "1"), ("<f8", None), ("<f8", [None]), ("<f8", [1j]), ("<f8", 2**2000), ("<f8", [[1], [1, 2]]),
    ("<f8", np.ma.masked_array([1.0], [True])), ("<f4", np.array([1e300])),
    ("<i8", 1.0), ("<i8", [1.0]), ("<i8", True), ("<i8", 2**63), ("<i4", [2**31]), ("|u1", -1),
    ("|u1", 256), ("|u1", [-1]), ("|b1", 1), ("|b1", [1]), ("|b1", 0.0), ("<U4", "abcde"), ("<U4", 1),
    ("|S3", np.array([b"abcd"])), ("|S3", "abc"), ("string", 1), ("string", [b"a"]), ("string", [None]), ("|T16", [1]),
    ("<M8[us]", "2026-01-31"), ("<M8[us]", INSTANT), ("<M8[us]", 5), ("<m8[us]", 5), ("<m8[us]", 1.5),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), LOST, ids=repr)
def test_a_value_that_the_dtype_cannot_keep_is_refused_by_name(dtype, value):
    """Another kind, a narrower type, a number out of range, a mask."""
    with pytest.raises(ValidationError, match="'a'"):
        kept(dtype, value)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("<U4", ["abcde"]), ("|S3", [b"abcd"]), ("<M8[us]", [INSTANT]), ("<m8[s]", [np.timedelta64(1, "ms")]),
        ("<f4", [1e300]), ("<f4", 1e300), ("<c8", 1e300), ("<f2", 70000), ("<f8", 2**53 + 1), ("<f8", [2**53 + 1]),
        ("<f8", np.array([2**53 + 1])), ("<M8[ns]", np.array(["3000-01-01"], "M8[D]")), ("<U4", np.array([3], "i1")),
        ("<U5", np.array([True])), ("<m8[us]", [3]), ("string", ["\ud800"]),
        ("<U4", b"a"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_is_never_changed_silently(dtype, value):
    """Cut, rounded to infinity, moved to another century, turned into text."""
    with pytest.raises(ValidationError, match="'a'"):
        kept(dtype, value)


@pytest.mark.parametrize(("dtype", "value"), [("|u1", [1, 255]), ("<u4", [1]), ("<i4", [])])
def test_a_list_of_numbers_that_all_fit_is_kept(dtype, value):
    """A list has no dtype of its own."""
    np.testing.assert_array_equal(kept(dtype, value), np.array(value, dtype))


naive = datetime.fromisoformat
NINE = datetime(2026, 1, 31, 9, tzinfo=timezone(timedelta(hours=1)))
TIMES = [
    ("<M8[s]", naive("2026-01-31T08:00:00"), "2026-01-31T08"), ("<M8[us]", naive("0001-01-01"), "0001-01-01"),
    ("<M8[ns]", naive("2026-01-31T08:00:00.000001"), "2026-01-31T08:00:00.000001"), ("<M8[us]", NINE, "2026-01-31T08"),
    ("<M8[D]", date(1600, 1, 1), "1600-01-01"), ("<M8[us]", [NINE, None, pd.NaT], ["2026-01-31T08", "NaT", "NaT"]),
    ("<M8[ns]", pd.Timestamp("2026-01-31T08:00:00.000000001"), "2026-01-31T08:00:00.000000001"),
    ("<M8[s]", pd.Timestamp("2026-01-31T09", tz=NINE.tzinfo), "2026-01-31T08"),
    ("<M8[s]", np.array([naive("1600-01-01"), pd.Timestamp("2026-01-31")], object), ["1600-01-01", "2026-01-31"]),
    ("<M8[s]", [np.datetime64("1600-01-01"), np.datetime64("2026-01-31", "ns")], ["1600-01-01", "2026-01-31"]),
    ("<m8[s]", timedelta(seconds=3), 3), ("<m8[ms]", [timedelta(milliseconds=1999), pd.NaT, None], [1999, "NaT", "NaT"]),
    ("<m8[ns]", [pd.Timedelta(1, "ns"), np.timedelta64(2, "us"), timedelta(0)], [1, 2000, 0]),
    ("<m8[s]", timedelta(days=10**8), 10**8 * 86400),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value", "expected"), TIMES, ids=repr)
def test_times_of_python_and_pandas_are_kept_as_they_are(dtype, value, expected):
    """Each in its own unit, with a time zone in UTC, in lists of several kinds; nothing is a NaT but what was missing."""
    found = kept(dtype, value)
    np.testing.assert_array_equal(found, np.array(expected, dtype).reshape(found.shape))


LONG_AGO = naive("1600-01-01")
CUT = [
    ("<M8[ns]", LONG_AGO), ("<M8[ns]", [naive("2026-01-31"), LONG_AGO]), ("<M8[ns]", LONG_AGO.replace(tzinfo=UTC)),
    ("<M8[s]", naive("2026-01-31T08:00:00.999999")), ("<M8[D]", [naive("2026-01-31T08:00:00")]),
    ("<m8[s]", timedelta(milliseconds=1999)), ("<m8[s]", [timedelta(0), timedelta(milliseconds=1)]),
    ("<m8[ns]", timedelta(days=10**6)), ("<m8[s]", timedelta.max), ("<m8[D]", timedelta.min),
    ("<M8[us]", pd.Timestamp("2026-01-31T08:00:00.123456789")), ("<m8[us]", [pd.Timedelta(1, "ns")]),
    ("<M8[ns]", [np.datetime64("1600-01-01"), np.datetime64("2026-01-31", "ns")]),
    ("<M8[ns]", [[np.datetime64("1600-01-01")], [np.datetime64("2026-01-31", "ns")]]),
    ("<M8[ns]", np.array([LONG_AGO, None], object)), ("<M8[as]", np.array(["2026-01-31"], "M8[D]")),
    ("<M8[us]", datetime.min.replace(tzinfo=timezone(timedelta(hours=1)))), ("<M8[us]", [naive("2026-01-31"), 5]),
    ("<M8[us]", [naive("2026-01-31"), "2026-01-31"]), ("<M8[us]", timedelta(1)), ("<m8[us]", naive("2026-01-31")),
    ("<M8[us]", pd.Period("2026")), ("<M8[us]", [naive("2026-01-31"), timedelta(1)]),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), CUT, ids=repr)
def test_a_time_is_never_cut_nor_moved(dtype, value):
    """Of Python, pandas or NumPy, alone or in a list: what has no place in the unit is refused."""
    with pytest.raises(ValidationError, match="'a'"):
        kept(dtype, value)
