"""What differs is told path by path, in filter language, with units; exact differences can be undone."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_data.errors import TooLargeError
from aq_data.models import variation
from aq_data.models.arrays import ArrayInfo
from aq_data.models.datafile import DataFile, FileInfo
from aq_data.models.difference import (
    LEFT_OUT,
    MISSING,
    Difference,
    compared,
    differences,
    exact_differences,
    place_text,
    undo,
)
from aq_data.models.matching import Facts, matches
from aq_data.models.query import parse_filter
from aq_data.models.terms import comparable
from aq_data.models.values import tag_of
from aq_data.models.variation import Comparison, Reading

NAN = {"$float": "NaN"}
numbers = [0, 1, 2, 1.0, 0.0, -0.0, 2.5, 2**53, 2**53 + 1, float(2**53), 2**70, NAN, {"$float": "Infinity"}]
others = [
    None,
    True,
    False,
    "",
    "1",
    "20 mK",
    "a",
    "x" * 120,
    {"$complex": [1, 2]},
    {"$complex": [1.0, 2]},
    {"$bytes": "YQ=="},
]
dates = [{"$date": text} for text in ("2026-01-01", "2026-01-01T00:00:00.000000Z", "2026-01-01T01:00:00+01:00")]
scalars = st.sampled_from([*numbers, *others, *dates])
plain_keys = st.sampled_from(["a", "b", "a.b", "c\\", "", "é x", "$x", "value", "unit"])
keys = plain_keys | st.sampled_from(["$literal", "$float", "$gt"])


def valid(value: dict) -> dict:
    """An object as tagged JSON has it: one that looks like a tag is escaped."""
    return {"$literal": value} if tag_of(value) is not None else value


def trees(names: st.SearchStrategy[str], *, lookalikes: bool) -> st.SearchStrategy:
    def containers(inner: st.SearchStrategy) -> st.SearchStrategy:
        objects = st.dictionaries(names, inner, max_size=3).map(valid)
        settings = st.fixed_dictionaries(
            {"value": inner}, optional={"unit": st.sampled_from(["V", "mV", None, 5]), "name": inner}
        )
        each = [st.lists(inner, max_size=3), st.lists(objects, min_size=1, max_size=3), objects, settings]
        if lookalikes:
            each.append(st.builds(lambda value: {"$literal": value}, st.dictionaries(names, inner, max_size=3)))
        return st.one_of(each)

    return st.recursive(scalars, containers, max_leaves=10)


documents = st.builds(
    lambda free: {"metadata": free}, st.dictionaries(keys, trees(keys, lookalikes=True), max_size=4).map(valid)
)
searchable = st.builds(
    lambda free: {"metadata": free}, st.dictionaries(plain_keys, trees(plain_keys, lookalikes=False), max_size=4)
)


@st.composite
def related(draw, made: st.SearchStrategy) -> tuple[dict, dict]:
    """Two documents that have most in common."""

    def edited(value, depth=0):
        choice = draw(st.integers(0, 5)) if depth else 1
        if choice == 0:
            return draw(scalars)
        if isinstance(value, list):
            return [edited(item, depth + 1) for item in value]
        if tag_of(value) == "$literal":
            return {"$literal": members(value["$literal"], depth)}
        return valid(members(value, depth)) if isinstance(value, dict) and tag_of(value) is None else value

    def members(value, depth):
        kept = {key: edited(item, depth + 1) for key, item in value.items() if not depth or draw(st.integers(0, 7))}
        return {**kept, "a": draw(scalars)} if depth and draw(st.booleans()) else kept

    before = draw(made)
    return before, edited(before)


pairs = related(documents) | st.tuples(documents, documents)


def form(document: object) -> bytes:
    """Equal for documents that differ in nothing but the order of keys."""
    return msgspec.json.encode(document, order="deterministic")


def setting(value: object, unit: object = "V", **more: object) -> dict:
    return {"power": {"value": value, "unit": unit, **more}}


# --- meaning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1, 1.0),
        (0.0, -0.0),
        (NAN, {"$float": "NaN"}),
        ({"$complex": [1, 2]}, {"$complex": [1.0, 2.0]}),
        ({"$date": "2026-01-01"}, {"$date": "2026-01-01T01:00:00+01:00"}),
        ({"x": 1, "y": {"p": 1, "q": 2}}, {"y": {"q": 2.0, "p": 1}, "x": 1}),
        ([1, 2], [1.0, 2]),
        ([{"x": 1}], [{"x": 1.0}]),
        (setting(1), setting(1.0)),
        ({"a": 1}, {"$literal": {"a": 1}}),
    ],
)
def test_what_means_the_same_is_no_difference(before, after):
    assert differences({"metadata": before}, {"metadata": after}) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, True), (0, False), (1, "1"), (None, 0), ([], None), ({}, None), (2**53 + 1, float(2**53)), ([1, 2], [2, 1]),
     ("a", "A"), ({"$bytes": "YQ=="}, "YQ=="), ({"$literal": {"$float": "NaN"}}, NAN)],
)  # fmt: skip
def test_what_means_something_else_is_one_difference(before, after):
    """Also where Python finds them equal."""
    assert differences({"k": before}, {"k": after}) == [Difference("k", before=before, after=after)]


def test_nothing_there_is_told_from_null():
    """Also in JSON, where the field is absent then."""
    found = differences({"gone": 1, "null": None}, {"null": 1, "new": None})
    assert found == [
        Difference("gone", before=1, after=MISSING),
        Difference("new", before=MISSING, after=None),
        Difference("null", before=None, after=1),
    ]
    encoded = msgspec.json.encode(found)
    assert msgspec.json.decode(encoded)[1] == {"path": "new", "after": None}
    assert msgspec.json.decode(encoded, type=list[Difference]) == found


def test_what_only_one_side_has_is_one_difference():
    vna = {"settings": setting(1)}
    found = differences({"instruments": {}}, {"instruments": {"vna": vna}})
    assert found == [Difference("instruments.vna", after=vna)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (setting(-30, "dBm"), setting(-20, "dBm"), (-30, -20, "dBm", "dBm")),
        (setting(1, "V"), setting(1000, "mV"), (1, 1000, "V", "mV")),
        (setting(1, "V"), setting(1, "mV"), (1, 1, "V", "mV")),
        (setting(1, "V"), {"power": {"value": 1}}, (1, 1, "V", MISSING)),
        (setting(1, None), setting(1, ""), (1, 1, None, "")),
        (setting(NAN, "K"), setting([1, 2], "K"), (NAN, [1, 2], "K", "K")),
    ],
)
def test_a_setting_is_one_difference_with_both_units(before, after, expected):
    """Whether its value changed or its unit; equal physical values were set anew all the same."""
    assert differences(before, after) == [Difference("power.value", (), *expected)]


def test_the_rest_of_a_setting_is_compared_on_its_own():
    found = differences(setting(1, dtype="float", label="p"), setting(2, dtype="int", label="p"))
    assert [(each.path, each.before, each.after) for each in found] == [
        ("power.dtype", "float", "int"),
        ("power.value", 1, 2),
    ]


def test_lists_of_objects_are_compared_by_position_and_other_lists_whole():
    before = {"channels": [{"gain": 1, "ranges": [{"stop": 1}, {"stop": 2}]}, {"gain": 2}], "axes": [1, 2], "n": [{"x": 1}]}
    after = {
        "channels": [{"gain": 1, "ranges": [{"stop": 1}, {"stop": 3}]}, {"gain": 5}],
        "axes": [1, 3],
        "n": [{"x": 1}] * 2,
    }
    found = differences(before, after)
    assert [(place_text(each.path, each.at), each.before, each.after) for each in found] == [
        ("axes", [1, 2], [1, 3]),
        ("channels[0].ranges[1].stop", 2, 3),
        ("channels[1].gain", 2, 5),
        ("n", [{"x": 1}], [{"x": 1}] * 2),
    ]
    assert [each.path for each in found] == ["axes", "channels.ranges.stop", "channels.gain", "n"]


@given(pairs)
def test_there_is_a_difference_exactly_when_documents_are_unequal(pair):
    """Equality is that of filters: what a filter cannot tell apart is no difference."""
    before, after = pair
    assert (differences(before, after) == []) == (comparable({"d": before}, "") == comparable({"d": after}, ""))


@given(pairs)
def test_the_way_back_has_the_same_differences_with_sides_changed(pair):
    before, after = pair
    there, back = differences(before, after), differences(after, before)
    assert [(d.path, d.at, d.before, d.after, d.before_unit, d.after_unit) for d in there] == [
        (d.path, d.at, d.after, d.before, d.after_unit, d.before_unit) for d in back
    ]


@given(related(searchable) | st.tuples(searchable, searchable))
def test_a_difference_pasted_into_a_filter_finds_its_document(pair):
    """`{path: before}` matches the first, `{path: after}` the second, through keys with dots, backslashes and lists."""
    for document, side in zip(pair, ("before", "after"), strict=True):
        facts = Facts(document)
        for difference in differences(*pair):
            value = getattr(difference, side)
            if value is not MISSING:
                assert matches(parse_filter({difference.path: {"$eq": value}}), facts), difference


# --- undoing -------------------------------------------------------------------------------------------------------------


@given(pairs)
def test_exact_differences_undone_give_the_document_before(pair):
    """Exactly: 1 stays 1 and 1.0 stays 1.0, whatever looks like a tag; the document at hand is not changed."""
    before, after = pair
    kept = form(after)
    found = exact_differences(before, after)
    assert form(undo(after, found)) == form(before)
    assert form(after) == kept
    # As a store keeps them.
    again = msgspec.json.decode(msgspec.json.encode(found), type=list[Difference])
    assert form(undo(after, again)) == form(before)


def test_exact_differences_tell_what_means_the_same_apart():
    found = exact_differences({"a": 1, "b": {"x": 1, "y": 2}}, {"a": 1.0, "b": {"y": 2, "x": 1}})
    assert [(each.path, repr(each.before), repr(each.after)) for each in found] == [("a", "1", "1.0")]


def test_an_object_that_comes_to_look_like_a_tag_is_undone():
    """Of {"$literal": …, "a": 1} one key is taken away: what is left looks like an escape, and is none."""
    before, after = {"m": {"$literal": {"x": 1}, "a": 1}}, {"m": {"$literal": {"x": 2}, "b": 2}}
    assert undo(after, exact_differences(before, after)) == before


# --- whole documents -----------------------------------------------------------------------------------------------------


def datafile(number: int, **fields: object) -> DataFile:
    stored = {"id": f"id {number}", "state": "complete", "revision": number, "created_at": f"{number}", "updated_at": "x"}
    return DataFile(**{**stored, "size": number, "path": f"/{number}", "finished_at": f"{number}", **fields})


def test_what_the_server_sets_is_left_out():
    """Id, revision, times, size, path and stores differ nearly always; how arrays are stored is nobody's setting."""
    arrays = [
        (ArrayInfo("iq", "<c16", (4,), ("x",), chunks, 64, {"units": "V"}, codec=codec),)
        for chunks, codec in (((4,), "zstd"), ((2,), "none"))
    ]
    files = [(FileInfo("n.txt", 3, "text/plain", "ab", key),) for key in ("k1", "k2")]
    one, other = (datafile(i, arrays=arrays[i], files=files[i]) for i in range(2))
    assert differences(compared(one), compared(other)) == []
    assert {
        "id",
        "revision",
        "created_at",
        "updated_at",
        "finished_at",
        "size",
        "path",
        "store",
        "intended_store",
        "format",
        "sweep",
    } == LEFT_OUT


def test_arrays_and_files_are_compared_by_name():
    one = datafile(1, arrays=(ArrayInfo("iq", "<c16", (4,), ("x",), (4,), 64, {"units": "V"}),), state="abandoned")
    two = datafile(
        2,
        arrays=(
            ArrayInfo("z", "<f8", (), (), (), 8),
            ArrayInfo("iq", "<c16", (5,), ("x",), (5,), 80, {"units": "mV"}),
        ),
        files=(FileInfo("n.txt", 3, "text/plain", "ab", "k"),),
    )
    found = {each.path: (each.before, each.after) for each in differences(compared(one), compared(two))}
    assert found == {
        "arrays.iq.attrs.units": ("V", "mV"),
        "arrays.iq.shape": ([4], [5]),
        "arrays.z": (MISSING, {"dtype": "<f8", "shape": [], "dims": []}),
        r"files.n\.txt": (MISSING, {"size": 3, "content_type": "text/plain", "sha256": "ab"}),
        "state": ("abandoned", "complete"),
    }


# --- many documents ------------------------------------------------------------------------------------------------------


def compared_all(*each: dict) -> list[tuple]:
    comparison = Comparison()
    for document in each:
        comparison.add(document)
    return [
        (place_text(found.path, found.at), *(r if r.unit is not MISSING else r.value for r in found.values))
        for found in comparison.variations()
    ]


def test_the_paths_that_vary_have_the_value_of_each_document():
    one = {"chip": "C7", "i": {"vna": {**setting(-30, "dBm"), "on": True}}, "n": [{"x": 1}, {"x": 2}], "m": None}
    two = {"chip": "C7", "i": {}, "n": [{"x": 1}], "m": None}
    three = {"i": {"vna": {**setting(-30.0, "W"), "on": True}}, "chip": "C8", "n": [], "m": 1}
    assert compared_all(one, two, one, three) == [
        ("chip", "C7", "C7", "C7", "C8"),
        ("i.vna.on", True, MISSING, True, True),
        ("i.vna.power.value", Reading(-30, "dBm"), MISSING, Reading(-30, "dBm"), Reading(-30.0, "W")),
        ("m", None, None, None, 1),
        ("n[0].x", 1, 1, 1, MISSING),
        ("n[1].x", 2, MISSING, 2, MISSING),
    ]


def test_nothing_varies_in_one_document_or_in_none():
    assert compared_all() == []
    assert compared_all({"a": 1}) == []
    assert compared_all({"a": 1}, {"a": 1.0}, {"a": 1}) == []


@given(st.lists(documents, min_size=2, max_size=4) | pairs.map(list))
def test_something_varies_exactly_when_documents_are_unequal(each):
    """The same equality as that of two; and no row is the same throughout."""
    found = compared_all(*each)
    keys = [comparable({"d": document}, "") for document in each]
    assert (found == []) == (len(set(keys)) == 1)
    for _, *values in found:
        assert any(value is MISSING for value in values) or len({repr(value) for value in values}) > 1


def test_more_than_an_answer_holds_is_refused_while_it_is_read(monkeypatch):
    """Neither many paths nor large values fill the memory."""
    monkeypatch.setattr(variation, "MAX_CELLS", 100)
    monkeypatch.setattr(variation, "MAX_BYTES", 10_000)
    with pytest.raises(TooLargeError, match="fewer"):
        compared_all({}, *({f"k{i}.{n}": n for n in range(10)} for i in range(10)))
    with pytest.raises(TooLargeError, match="fewer"):
        compared_all({}, {"k": "x" * 20_000})
    assert compared_all(*[{"k": "x" * 20_000}] * 5) == []
