"""Tagged JSON carries what JSON lacks, refuses what nothing could read back, and names the place."""

from __future__ import annotations

import base64
import enum
import math
import pathlib
import struct
import uuid
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_data.errors import ValidationError
from aq_data.models.values import (
    MAX_DEPTH,
    TAGS,
    check_value,
    format_instant,
    from_tagged,
    parse_instant,
    tag_of,
    to_tagged,
)

reals = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, -0.0])
texts = st.text(max_size=8)
instants = st.datetimes(timezones=st.just(UTC))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**30), 10**30)
    | reals
    | st.builds(complex, reals, reals)
    | texts
    | instants
    | st.binary(max_size=8)
)
keys = texts | st.sampled_from(sorted(TAGS)) | st.just("$gt")


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists and dicts, among them dicts that look like a tag."""
    lookalikes = st.builds(lambda tag, value: {tag: value}, st.sampled_from(sorted(TAGS)), children)
    return st.lists(children, max_size=4) | st.dictionaries(keys, children, max_size=4) | lookalikes


nested = st.recursive(scalars, containers, max_leaves=12)


def canonical(value: Any) -> Any:
    """A form in which values are equal only if they are the same, NaN and the sign of zero included."""
    if isinstance(value, float):
        return ("float", "nan" if math.isnan(value) else struct.pack("<d", value))
    if isinstance(value, complex):
        return ("complex", canonical(value.real), canonical(value.imag))
    if isinstance(value, list):
        return [canonical(item) for item in value]
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    return (type(value).__name__, value)


@given(nested)
def test_values_come_back_from_tagged_json_as_they_were(value):
    assert canonical(from_tagged(to_tagged(value))) == canonical(value)


@given(nested)
def test_tagged_values_survive_json_text(value):
    tagged = to_tagged(value)
    assert canonical(msgspec.json.decode(msgspec.json.encode(tagged))) == canonical(tagged)


@given(nested)
def test_whatever_to_tagged_makes_is_accepted(value):
    check_value(to_tagged(value), "metadata")


@given(st.recursive(st.none() | st.booleans() | st.integers(-3, 3) | texts | reals, containers, max_leaves=12))
def test_what_check_value_accepts_from_tagged_can_read(raw):
    try:
        check_value(raw, "metadata")
    except ValidationError:
        return
    from_tagged(raw)


dtypes = st.sampled_from(
    ["?", "i1", "u2", ">i4", "u8", "f2", "f4", ">f8", "c8", "c16", "U3", "S2", "M8[ns]", "m8[s]", "M8[3D]", "f8"]
)


@given(dtypes, st.lists(st.integers(0, 3), max_size=3), st.binary(min_size=1, max_size=16))
def test_arrays_in_attributes_keep_dtype_shape_and_every_bit(dtype, shape, pattern):
    dtype = np.dtype(dtype)
    count = math.prod(shape)
    data = (pattern * (count * dtype.itemsize + 1))[: count * dtype.itemsize]
    if dtype.kind in "bU":
        data = np.ones(count, dtype=dtype).tobytes()
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    tagged = to_tagged(array, keep_arrays=True)
    check_value(tagged, "attrs")
    back = np.asarray(from_tagged(tagged))
    if dtype.kind in "US" and not shape:
        assert back == array  # a text scalar of NumPy has the length of its text
        return
    assert back.dtype == dtype.newbyteorder("<")
    assert back.shape == array.shape
    assert back.tobytes() == array.astype(dtype.newbyteorder("<")).tobytes()


def test_numpy_values_in_documents_become_plain_searchable_values():
    tagged = to_tagged(
        {"scalar": np.float32(0.5), "count": np.int64(3), "flag": np.True_, "row": np.arange(3), "name": np.str_("x"),
         "gap": np.array([1.0, np.nan]), "when": np.datetime64("2026-01-31T08:00"), "never": np.datetime64("NaT"),
         "days": np.array(["2026-01-31", "NaT"], dtype="M8[D]"), "empty": np.empty((2, 0))}
    )  # fmt: skip
    assert tagged == {
        "scalar": 0.5, "count": 3, "flag": True, "row": [0, 1, 2], "name": "x",
        "gap": [1.0, {"$float": "NaN"}], "when": {"$date": "2026-01-31T08:00:00.000000Z"}, "never": None,
        "days": [{"$date": "2026-01-31T00:00:00.000000Z"}, None], "empty": [[], []],
    }  # fmt: skip
    assert type(tagged["count"]) is int
    assert type(tagged["flag"]) is bool


class Colour(enum.Enum):
    """A user's own class."""

    RED = "red"


class Level(enum.IntEnum):
    """A user's own numbers."""

    HIGH = 3


def test_common_python_objects_become_their_plain_equals():
    one = uuid.UUID(int=1)
    tagged = to_tagged({"tuple": (1, 2), "set": {1}, "colour": Colour.RED, 7: Level.HIGH,
    Level.HIGH: pathlib.PurePosixPath("a/b"),
                        "id": one, "day": date(2026, 1, 31), "buffer": bytearray(b"a"), np.int64(9): None})  # fmt: skip
    assert tagged == {"tuple": [1, 2], "set": [1], "colour": "red", "7": 3, "3": "a/b", "id": str(one),
                      "day": {"$date": "2026-01-31T00:00:00.000000Z"}, "buffer": {"$bytes": "YQ=="}, "9": None}  # fmt: skip


def test_instants_are_kept_in_utc():
    east = timezone(timedelta(hours=2))
    assert to_tagged(datetime(2026, 1, 31, 10, tzinfo=east)) == {"$date": "2026-01-31T08:00:00.000000Z"}


@given(instants, instants)
def test_instants_as_text_sort_in_time_order_and_read_back(one, other):
    texts = sorted([format_instant(one), format_instant(other)])
    assert [parse_instant(text, "") for text in texts] == sorted([one, other])


UNKEEPABLE = {
    "an object": object(),
    "a function": len,
    "a complex in a set of objects": [object()],
    "a lone surrogate": "\ud800",
    "a lone surrogate as a key": {"\ud800": 1},
    "a float key": {1.5: 1},
    "a boolean key": {True: 1},
    "a tuple key": {(1, 2): 1},
    "a key of None": {None: 1},
    "one key as text and number": {"1": "a", 1: "b"},
    "a timedelta": timedelta(1),
    "a NumPy timedelta": np.timedelta64(1, "s"),
    "a structured scalar": np.zeros(1, dtype=[("a", "i4")])[0],
    "objects in an array": np.array([object()]),
    "a long double": np.longdouble(1) / 3,
    "complex long doubles": np.ones(2, np.clongdouble),
    "a lone surrogate in an array": np.array(["a", "\udfff"]),
    "an instant before year 1 in UTC": datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
    "an instant after year 9999 in UTC": datetime.max.replace(tzinfo=timezone(timedelta(hours=-12))),
    "a NumPy instant beyond year 9999": np.datetime64(1 << 62, "us"),
    "a NumPy instant whose microseconds overflow": np.datetime64(1 << 62, "D"),
}


@pytest.mark.parametrize("name", UNKEEPABLE)
def test_what_json_cannot_carry_is_refused_at_its_place(name):
    with pytest.raises(ValidationError) as caught:
        to_tagged({"a": [0, UNKEEPABLE[name]]}, "metadata")
    assert "metadata.a[1]" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        np.longdouble(1) / 3, np.ones(2, np.clongdouble), {"b": [np.zeros((), np.longdouble)]}, np.array(["a", "\ud800"]),
        np.array(["a", "\ud800"], ">U1"), np.ma.array([1.0, 2.0], mask=[False, True]), np.ma.masked,
        pd.Timestamp("2026-01-31T08:00:00.000000001Z"), pd.NaT,
    ],
    ids=repr,
)  # fmt: skip
def test_an_attribute_that_would_come_back_changed_is_refused_at_its_place(value):
    """Longer than any float that is kept, masked, finer than a datetime, or no text."""
    with pytest.raises(ValidationError, match=r"attrs\.a"):
        to_tagged({"a": value}, "attrs", keep_arrays=True)


MALFORMED = [
    {"$float": "nan"}, {"$float": "inf"}, {"$float": "+Infinity"}, {"$float": 1}, {"$float": 1.5}, {"$float": None},
    {"$float": ["NaN"]}, {"$float": {}}, {"$float": {"$float": "NaN"}},
    {"$complex": 1}, {"$complex": None}, {"$complex": []}, {"$complex": [1]}, {"$complex": [1, 2, 3]},
     {"$complex": ["1", 2]},
    {"$complex": [True, 1]}, {"$complex": [None, 1]}, {"$complex": {"re": 1, "im": 2}}, {"$complex": [{"$float": "x"}, 1]},
    {"$complex": [{"$float": []}, 1]}, {"$complex": [{"$date": "2026-01-01"}, 1]}, {"$complex": [[1], 1]},
     {"$complex": [10**400, 0]},
    {"$date": 1}, {"$date": None}, {"$date": ""}, {"$date": "yesterday"}, {"$date": "2026-13-01"}, {"$date": "2026-02-30"},
    {"$date": "2026-01-01T25:00"}, {"$date": "0001-01-01T00:00:00+14:00"}, {"$date": "9999-12-31T23:59:59-12:00"},
    {"$date": ["2026-01-01"]}, {"$date": {}}, {"$date": "١٢٣٤-01-01"},
    {"$bytes": 1}, {"$bytes": None}, {"$bytes": "a"}, {"$bytes": "YQ"}, {"$bytes": "Y Q=="}, {"$bytes": "YQ==\n"},
     {"$bytes": "é"},
    {"$bytes": []}, {"$bytes": {}},
    {"$literal": 1}, {"$literal": None}, {"$literal": []}, {"$literal": "x"}, {"$literal": {"a": {"$float": "x"}}},
    {"$literal": {"$float": {"$float": "x"}}},
]  # fmt: skip


@pytest.mark.parametrize("value", MALFORMED, ids=lambda value: ascii(value)[:60])
def test_a_malformed_tag_is_refused_at_its_place(value):
    with pytest.raises(ValidationError) as caught:
        check_value({"a": [0, {"b": value}]}, "metadata")
    assert "metadata.a[1].b" in str(caught.value)


def ndarray(**changes: Any) -> dict[str, Any]:
    return {"$ndarray": {"dtype": "<f4", "shape": [2], "data": base64.b64encode(bytes(8)).decode(), **changes}}


MALFORMED_ARRAYS = {
    "nothing": {"$ndarray": {}},
    "a number": {"$ndarray": 1},
    "none": {"$ndarray": None},
    "a list": {"$ndarray": ["<f4", [2], "AAAAAAAAAAA="]},
    "an object dtype": ndarray(dtype="O"),
    "an unknown dtype": ndarray(dtype="float7"),
    "a number for a dtype": ndarray(dtype=1),
    "a structured dtype": ndarray(dtype=[["a", "<f4"]]),
    "a dtype that is not even closed": ndarray(dtype="f4,("),
    "a dtype of no length": ndarray(dtype="<U0", data=""),
    "a shape that does not fit": ndarray(shape=[3]),
    "a negative shape": ndarray(shape=[-1, -2]),
    "a shape of text": ndarray(shape="2"),
    "a shape of texts": ndarray(shape=["2"]),
    "a shape of floats": ndarray(shape=[2.0]),
    "a shape of a broken float": ndarray(shape=[2.5]),
    "no shape": ndarray(shape=None),
    "a number for a shape": ndarray(shape=2),
    "too many axes": ndarray(shape=[1] * 99 + [2]),
    "a huge empty shape": ndarray(shape=[0, 10**30], data=""),
    "an infinite shape": ndarray(shape=[math.inf]),
    "a long double": ndarray(dtype="<f16", shape=[1], data=base64.b64encode(bytes(16)).decode()),
    "a complex long double": ndarray(dtype="<c32", shape=[1], data=base64.b64encode(bytes(32)).decode()),
    "a lone surrogate": ndarray(dtype="<U1", data=base64.b64encode(b"a\0\0\0\0\xd8\0\0").decode()),
    "a lone surrogate, big-endian": ndarray(dtype=">U1", data=base64.b64encode(b"\0\0\0a\0\0\xdf\xff").decode()),
    "what is no letter": ndarray(dtype="<U2", shape=[1], data=base64.b64encode(b"\xff" * 8).decode()),
    "data that is no base64": ndarray(data="é"),
    "data that is no text": ndarray(data=[1]),
    "truncated data": ndarray(data="AAAA"),
}


@pytest.mark.parametrize("name", MALFORMED_ARRAYS)
def test_a_malformed_array_is_refused_at_its_place(name):
    with pytest.raises(ValidationError) as caught:
        check_value({"a": MALFORMED_ARRAYS[name]}, "attrs")
    assert "attrs.a" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [{}, {"$float": 1, "b": 2}, {"$gt": 1}, {"": 1}, [], [[]], {"$float": "NaN", "$date": 1}],
    ids=lambda value: ascii(value),
)
def test_a_dict_of_several_keys_or_another_dollar_is_no_tag(value):
    assert tag_of(value) is None
    check_value(value, "metadata")
    assert from_tagged(value) == value


def deep(levels: int, core: Any, dicts: bool) -> Any:
    for _ in range(levels):
        core = {"k": core} if dicts else [core]
    return core


@pytest.mark.parametrize("dicts", [True, False])
def test_nesting_is_limited_alike_on_both_sides(dicts):
    fits, over = deep(MAX_DEPTH, 1, dicts), deep(MAX_DEPTH + 1, 1, dicts)
    check_value(to_tagged(fits), "metadata")
    for refuse in (lambda: to_tagged(over), lambda: check_value(over, "metadata")):
        with pytest.raises(ValidationError, match=str(MAX_DEPTH)):
            refuse()


def test_nesting_of_any_depth_is_refused_without_unbounded_recursion():
    over = deep(100_000, 1, dicts=False)
    try:
        with pytest.raises(ValidationError):
            check_value(over, "metadata")
        with pytest.raises(ValidationError):
            to_tagged(over)
    finally:
        while isinstance(over, list) and over:
            over = over.pop()  # taken apart by hand: freeing it in one go would recurse


@pytest.mark.parametrize("dtype", ["M8[s]", "f8"])
def test_axes_of_an_array_count_as_levels(dtype):
    """What `to_tagged` makes of an array inside lists is not deeper than `check_value` allows."""
    value = deep(MAX_DEPTH - 2, np.zeros((1, 1, 1, 1), dtype=dtype), dicts=False)
    with pytest.raises(ValidationError, match=str(MAX_DEPTH)):
        to_tagged(value)
