"""What stands at a path, and the one type that holds a column of it without loss."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_data.errors import QueryError
from aq_data.models.columns import cell_at, column_type, field_segments, kinds, projected, typed_values
from aq_data.models.values import check_value, from_tagged, to_tagged

DOCUMENT = {
    "id": "x",
    "name": "T1",
    "measured_at": "2026-01-01T00:00:00.000000Z",
    "instruments": {"vna": {"settings": {"power": {"value": -30, "unit": "dBm"}}}},
    "arrays": [{"name": "iq", "attrs": {"units": "V"}}, {"name": "flux", "attrs": {}}],
    "metadata": {
        "chip": "C7",
        "a.b": 1,
        "none": None,
        "list": [1, 5],
        "mixed": [{"v": 1}, 2, {"v": [3]}, [{"v": 9}], {"w": 4}],
        "when": {"$date": "2026-01-01T00:00:00Z"},
        "literal": {"$literal": {"$date": "no date"}},
        "deep": {"$literal": {"$float": {"x": 7}}},
    },
}


@pytest.mark.parametrize(
    ("field", "cell"),
    [
        ("name", "T1"),
        ("chip", "C7"),
        ("metadata.chip", "C7"),
        (r"a\.b", 1),
        ("none", None),
        ("nothing.at.all", None),
        ("chip.x", None),
        ("list", [1, 5]),
        ("list.x", None),
        ("mixed.v", [1, None, [3], None, None]),
        ("arrays.name", ["iq", "flux"]),
        ("arrays.attrs.units", ["V", None]),
        ("arrays.nothing", None),
        ("instruments.vna.settings.power.value", -30),
        ("instruments.vna.settings.power", {"value": -30, "unit": "dBm"}),
        ("when", {"$date": "2026-01-01T00:00:00Z"}),
        (r"when.$date", None),
        ("literal.$date", "no date"),
        ("deep.$float.x", 7),
    ],
)
def test_a_cell_is_what_stands_at_the_path(field, cell):
    """Through objects, escaped keys and lists of objects; a tagged value is one value."""
    assert cell_at(DOCUMENT, field_segments(field)) == cell


def test_a_field_that_is_no_path_is_refused():
    for field in ("", "x" * 600, "a\\"):
        with pytest.raises(QueryError):
            field_segments(field)


def test_a_projection_keeps_the_id_and_the_paths():
    paths = [field_segments(field) for field in ("chip", "name", "nothing", "instruments.vna.settings.power.unit")]
    assert projected(DOCUMENT, paths) == {
        "id": "x",
        "name": "T1",
        "metadata": {"chip": "C7"},
        "instruments": {"vna": {"settings": {"power": {"unit": "dBm"}}}},
    }


def kept(*fields):
    """What a projection leaves of the metadata."""
    return projected(DOCUMENT, [field_segments(field) for field in fields]).get("metadata")


def test_a_projection_enters_lists_and_keeps_positions():
    """Fields of one list stay together in their element; one that has none of them is empty."""
    assert kept("mixed.v") == {"mixed": [{"v": 1}, {}, {"v": [3]}, {}, {}]}
    assert kept("mixed.w", "mixed.v") == {"mixed": [{"v": 1}, {}, {"v": [3]}, {}, {"w": 4}]}
    assert kept("mixed.nothing", "list.x", "when.$date") is None
    arrays = projected(DOCUMENT, [field_segments(field) for field in ("arrays.attrs.units", "arrays.name")])["arrays"]
    assert arrays == [{"name": "iq", "attrs": {"units": "V"}}, {"name": "flux"}]


def test_a_projection_enters_literals_and_makes_no_tagged_values():
    """What looks like a tag is a key before and after, whether or not others are left beside it."""
    assert kept("deep.$float.x") == {"deep": {"$literal": {"$float": {"x": 7}}}}
    assert kept("literal.$date") == {"literal": DOCUMENT["metadata"]["literal"]}
    assert projected({"id": "x", "m": {"$date": 1, "b": 2}}, [["m", "$date"]])["m"] == {"$literal": {"$date": 1}}


def test_the_shorter_of_two_paths_asks_for_all():
    for fields in (("mixed", "mixed.v"), ("mixed.v", "mixed")):
        assert kept(*fields) == {"mixed": DOCUMENT["metadata"]["mixed"]}
    assert projected(DOCUMENT, [["id", "x"]]) == {"id": "x"}


KEYS = st.sampled_from(["a", "b", "$date", "$literal"])
VALUES = st.recursive(
    st.sampled_from([None, 0, "", "x", math.nan, b"1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=3), st.lists(st.lists(KEYS, min_size=1, max_size=4), max_size=4))
def test_a_projection_has_what_the_document_has(value, fields):
    """Of any document, at every path asked for; and projected again it stays as it is."""
    paths = [["m", *field] for field in fields]
    document = {"id": "x", "other": 1, "m": to_tagged(value)}
    pruned = projected(document, paths)
    assert [cell_at(pruned, path) for path in paths] == [cell_at(document, path) for path in paths]
    assert projected(pruned, paths) == pruned
    assert pruned.keys() <= {"id", "m"}
    check_value(pruned, "pruned")


@pytest.mark.parametrize(
    ("cells", "type"),
    [
        ([None, None], "empty"),
        ([], "empty"),
        ([1, None], "integer"),
        ([1, 2**63 - 1, -(2**63)], "integer"),
        ([1, 2.5], "float"),
        ([{"$float": "NaN"}, 1], "float"),
        ([2**53 + 1, 2.5], "json"),
        ([2**63], "json"),
        ([True, False], "bool"),
        ([True, 1], "json"),
        (["a"], "text"),
        (["a", 1], "json"),
        ([{"$date": "2026-01-01"}], "instant"),
        ([{"$date": "2026-01-01"}, "2026-01-01"], "json"),
        ([{"$complex": [1, 2]}], "json"),
        ([[1]], "json"),
        ([{}], "json"),
    ],
)
def test_a_column_has_the_one_type_that_holds_all(cells, type):
    """Numbers of one column are not rounded, and a boolean is no number."""
    assert column_type(kinds(cells, ["metadata", "x"])) == type


def test_typed_dates_are_instants_by_their_path():
    cells = ["2026-01-01T00:00:00.000000Z", None]
    assert column_type(kinds(cells, ["measured_at"])) == "instant"
    assert column_type(kinds(cells, ["metadata", "measured_at"])) == "text"


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([{"$float": "NaN"}, {"$float": "-Infinity"}, {"$date": "2026-01-31T08:00:00Z"}, {"$complex": [1.0, 2]}]),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)


@given(st.lists(SCALARS, max_size=6), st.lists(SCALARS, max_size=6))
def test_no_column_loses_a_value(one, two):
    """Whatever stands in it, over two pages: every cell comes back from its column as it was."""
    type = column_type(kinds(one, ["metadata", "x"]) | kinds(two, ["metadata", "x"]))
    for cell, value in zip([*one, *two], typed_values([*one, *two], type), strict=True):
        assert (cell is None) == (value is None)
        if cell is not None:
            back = from_tagged(msgspec.json.decode(value)) if type == "json" else value
            expected = from_tagged(cell)
            assert back == expected or (math.isnan(back) and math.isnan(expected))
