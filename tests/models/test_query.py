"""The filter language: what is refused, how values compare, and the keys that pages are ordered by."""

from __future__ import annotations

import math
import random
import struct
import time
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aq_data.errors import QueryError
from aq_data.models.datafile import DataFile, FileInfo
from aq_data.models.matching import Facts, matches
from aq_data.models.paths import MAX_PATH, SortKey, parse_path, parse_sort
from aq_data.models.query import MAX_CLAUSES, MAX_DEPTH, parse_filter
from aq_data.models.terms import Term, pack_key, sort_key, unpack_key

NAN = {"$float": "NaN"}
INFINITY = {"$float": "Infinity"}
LONG = "x" * 150
SLOW = {"$regex": "(?s)[a-q][^u-z]{300}x"}
"""Takes a tenth of a second on 75 kB."""


def facts_of(**fields: Any) -> Facts:
    """What a DataFile with these fields is found by."""
    document = DataFile(
        **{"id": "0", "state": "complete", "revision": 1, "created_at": "2026-01-31T08:00:00.000000Z",
           "updated_at": "2026-01-31T08:00:00.000000Z", **fields}
    )  # fmt: skip
    return Facts(msgspec.json.decode(msgspec.json.encode(document)))


def found_terms(**fields: Any) -> frozenset[Term]:
    return facts_of(**fields).terms


def is_match(query: dict[str, Any], **fields: Any) -> bool:
    return matches(parse_filter(query), facts_of(**fields))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [None, 1, "name", [], [{}], True])
def test_a_filter_is_an_object(query):
    with pytest.raises(QueryError):
        parse_filter(query)


@pytest.mark.parametrize(
    ("query", "operator"),
    [({"$where": "1"}, "$where"), ({"$expr": {}}, "$expr"), ({"a": {"$text": "a"}}, "$text"), ({"$eq": 1}, "$eq"), ({"$": 1}, "$"),
     ({"a": {"$near": 1}}, "$near"), ({"a": {"$eq": 1, "$bogus": 2}}, "$bogus"), ({"a": {"$not": {"$bogus": 1}}}, "$bogus"),
     ({"a": {"$GT": 1}}, "$GT"), ({"$or": [{"a": {"$mod": [2, 0]}}]}, "$mod"), ({"a": {"$and": []}}, "$and"),
     ({"$function": {}}, "$function"), ({"a": {"$set": 1}}, "$set")],
)  # fmt: skip
def test_an_unknown_operator_is_refused_by_name(query, operator):
    with pytest.raises(QueryError) as caught:
        parse_filter(query)
    assert operator in str(caught.value)
    assert caught.value.details["operator"] == operator


@pytest.mark.parametrize(
    "query",
    [{"a": {"$in": 1}}, {"a": {"$in": {"b": 1}}}, {"a": {"$in": "abc"}}, {"a": {"$nin": None}}, {"a": {"$exists": 1}},
     {"a": {"$exists": "true"}}, {"a": {"$exists": None}}, {"a": {"$not": 1}}, {"a": {"$not": "x"}}, {"a": {"$not": [1]}},
     {"a": {"$gt": None}}, {"a": {"$gt": True}}, {"a": {"$gt": [1]}}, {"a": {"$gt": {"b": 1}}},
      {"a": {"$lt": {"$bytes": "YQ=="}}},
     {"a": {"$lte": {"$complex": [1, 2]}}}, {"a": {"$gte": LONG}}, {"$and": {}}, {"$and": []}, {"$or": []}, {"$nor": []},
     {"$or": [1]}, {"$or": None}, {"$nor": ["a"]}, {"$not": 1}, {"$not": [{}]}, {"a": {"$gt": 1, "b": 2}},
      {"a": {"b": 1, "$gt": 1}},
     {"a": {"$float": "x"}}, {"a": {"$in": [{"$date": "x"}]}}, {"a": {"$eq": {"$complex": [1]}}},
      {"measured_at": "yesterday"},
     {"measured_at": {"$gt": "2026-13-01"}}, {"created_at": {"$in": ["x"]}}, {"created_at": {"$regex": "^2026"}},
     {"cooldown": {"$not": {"$regex": "2026"}}}, {"a": {"$complex": [10**400, 0]}}],
    ids=lambda query: ascii(query)[:60],
)  # fmt: skip
def test_an_operand_of_the_wrong_type_is_refused(query):
    with pytest.raises(QueryError) as caught:
        parse_filter(query)
    assert caught.value.code == "bad_query"
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("query", [{"measured_at": "yesterday"}, {"measured_at": {"$in": [{"$date": "yesterday"}]}}])
def test_a_bad_date_is_named_once(query):
    with pytest.raises(QueryError, match=r"^measured_at(\.\$in\[0\])?: 'yesterday' is not an ISO 8601 date"):
        parse_filter(query)


@pytest.mark.parametrize(
    ("query", "place", "said"),
    [
        ({"a": {"$in": 5}}, "a", "$in takes a list, not 5"),
        ({"metadata.a": {"$near": 1}}, "metadata.a", "unknown operator '$near'"),
        ({"$or": [5]}, "$or[0]", "a filter is an object, not 5"),
        ({"$or": [{"b": 1}, {"a": 1, "$where": 1}]}, "$or[1]", "unknown operator '$where'"),
        ({"$and": [{"a": 1}, {"$or": 5}]}, "$and[1]", "$or takes a list of filters, not 5"),
        ({"$or": [{"a": {"$in": 5}}, {"a": {"$in": [1]}}]}, "$or[0].a", "$in takes a list, not 5"),
        ({"$or": [{"a": {"$in": [1]}}, {"a": {"$in": 5}}]}, "$or[1].a", "$in takes a list, not 5"),
        ({"$or": [{"a": {"$in": [1]}}, 5]}, "$or[1]", "a filter is an object, not 5"),
        ({"$not": {"$nor": [{"a": {"$not": {"$size": "x"}}}]}}, "$not.$nor[0].a.$not", "$size takes a number"),
        ({"$not": 5}, "$not", "a filter is an object, not 5"),
        ({"$and": [{"$text": 5}]}, "$and[0]", "$text takes a text, not 5"),
        ({"$and": [{"$text": "-"}]}, "$and[0]", "the text '-' has no letters"),
        ({"$and": [{"a\\": 1}]}, "$and[0]", "path 'a\\\\' ends in a backslash"),
        ({"$or": [{"a.b": {"$regex": "("}}]}, "$or[0].a.b", "$regex '(' is no RE2 pattern"),
        ({"$or": [{"a": {"$regex": r"\B"}}]}, "$or[0].a", "$regex has the escape"),
        ({"l": {"$elemMatch": {"$or": [{"v": {"$gt": None}}]}}}, "l.$elemMatch.$or[0].v", "$gt takes a number"),
        ({"l": {"$elemMatch": {"$gt": [1]}}}, "l.$elemMatch", "$gt takes a number"),
        ({"$or": [{"a": {"$float": "x"}}]}, "$or[0].a", '$float takes "NaN"'),
        ({"$or": [{"a": {"b": [1, {"$date": "x"}]}}]}, "$or[0].a.b[1]", "'x' is not an ISO 8601 date"),
        ({"a": {"$in": [1, {"$date": "x"}]}}, "a.$in[1]", "'x' is not an ISO 8601 date"),
        ({"a": {"b: c": {"$date": "x"}}}, "a.b", "c: 'x' is not an ISO 8601 date"),
        ({"$or": [{"measured_at": {"$gt": "x"}}]}, "$or[0].measured_at", ""),
    ],
    ids=lambda value: ascii(value)[:60],
)  # fmt: skip
def test_a_refusal_tells_the_place_in_the_filter(query, place, said):
    """First, and as `path`; also of the second of two that are alike."""
    with pytest.raises(QueryError) as caught:
        parse_filter(query)
    assert str(caught.value).startswith(f"{place}: {said}")
    assert caught.value.details["path"] == place


def test_the_place_of_a_refusal_is_shown_short():
    """Its beginning and its end, however long the keys are on the way."""
    with pytest.raises(QueryError) as caught:
        parse_filter({"$or": [{"x" * MAX_PATH: {"$elemMatch": {"y" * MAX_PATH: {"z" * 10_000: {"$float": 1}}}}}]})
    assert str(caught.value).startswith("$or[0].xxx")
    assert 'zzz: $float takes "NaN"' in str(caught.value)
    assert len(str(caught.value)) < 700
    assert len(caught.value.details["path"]) <= 200


def test_a_filter_that_is_wrong_as_a_whole_has_no_place():
    for query in (5, {"$or": 5}, {"$where": 1}, {"": 1}):
        with pytest.raises(QueryError) as caught:
            parse_filter(query)
        assert "path" not in caught.value.details


def nested(levels: int, kind: str) -> dict[str, Any]:
    query: dict[str, Any] = {"a": 1}
    for _ in range(levels):
        query = {"$not": query} if kind == "$not" else {kind: [query]}
    return query


@pytest.mark.parametrize("kind", ["$and", "$or", "$nor", "$not"])
def test_nesting_is_limited(kind):
    parse_filter(nested(MAX_DEPTH - 2, kind))
    for levels in (MAX_DEPTH + 1, 50_000):
        query = nested(levels, kind)
        with pytest.raises(QueryError, match=str(MAX_DEPTH)):
            parse_filter(query)
        while query:  # freed level by level
            _, inner = query.popitem()
            query = inner[0] if isinstance(inner, list) else inner if isinstance(inner, dict) else {}


def test_nested_conditions_are_limited():
    condition: dict[str, Any] = {"$gt": 1}
    for _ in range(MAX_DEPTH + 1):
        condition = {"$not": condition}
    with pytest.raises(QueryError, match=str(MAX_DEPTH)):
        parse_filter({"a": condition})


@pytest.mark.parametrize(
    "query",
    [{"$or": [{"a": i} for i in range(MAX_CLAUSES)]}, {f"k{i}": i for i in range(MAX_CLAUSES + 1)},
     {"a": {"$in": list(range(100_000))}}, {"a": {"$nin": list(range(100_000))}}, {"a": {"$all": list(range(MAX_CLAUSES))}}],
    ids=["$or", "keys", "$in", "$nin", "$all"],
)  # fmt: skip
def test_the_number_of_clauses_is_limited(query):
    with pytest.raises(QueryError, match=str(MAX_CLAUSES)):
        parse_filter(query)


def test_a_list_of_a_thousand_values_is_allowed():
    assert is_match({"a": {"$in": list(range(1000))}}, metadata={"a": 999})


# --- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [("name", "name"), ("chip", "metadata.chip"), ("metadata.chip", "metadata.chip"), ("metadata", "metadata"),
     ("device.device_info.chip", "device.device_info.chip"), ("a.b", "metadata.a.b"), (r"a\.b", r"metadata.a\.b"),
     (r"metadata.a\.b.c", r"metadata.a\.b.c"), (r"a\\b", r"metadata.a\\b"), (r"na\me", "name"), (r"name\.x",
      r"metadata.name\.x"),
     ("created_at", "created_at"), ("arrays.name", "arrays.name"), (".", "metadata.."), ("a..b", "metadata.a..b"),
      ("0", "metadata.0")],
)  # fmt: skip
def test_a_path_has_one_canonical_form(text, path):
    assert parse_path(text) == path
    assert parse_path(path) == path


@pytest.mark.parametrize("text", ["", "a\\", "x" * (MAX_PATH + 1), "attrs", "attrs.units", "path", "format"])
def test_a_path_that_leads_nowhere_is_refused(text):
    for ask in (lambda: parse_path(text), lambda: parse_filter({text: 1}), lambda: parse_sort(text)):
        with pytest.raises(QueryError):
            ask()


@given(st.lists(st.text(alphabet="ab.\\$ é", max_size=4), min_size=1, max_size=3))
def test_any_key_is_reached_by_its_escaped_path(keys):
    value: Any = 7
    for key in reversed(keys):
        value = {key: value}
    query = "metadata." + ".".join(key.replace("\\", "\\\\").replace(".", "\\.") for key in keys)
    assert is_match({query: 7}, metadata=value)
    assert not is_match({query: 8}, metadata=value)


# --- meaning -------------------------------------------------------------------------------------------------------

A = [  # metadata, filter, whether it matches
    # equality is typed
    ({"a": 1}, {"a": 1}, True),
    ({"a": 1}, {"a": 1.0}, True),
    ({"a": 1.0}, {"a": 1}, True),
    ({"a": -0.0}, {"a": 0}, True),
    ({"a": 1}, {"a": "1"}, False),
    ({"a": "1"}, {"a": 1}, False),
    ({"a": True}, {"a": 1}, False),
    ({"a": 1}, {"a": True}, False),
    ({"a": False}, {"a": 0}, False),
    ({"a": False}, {"a": None}, False),
    ({"a": True}, {"a": True}, True),
    ({"a": ""}, {"a": None}, False),
    ({"a": "A"}, {"a": "a"}, False),
    ({"a": "\u00e9"}, {"a": "e\u0301"}, False),
    ({"a": 1}, {"b": 1}, False),
    ({}, {}, True),
    # order is typed
    ({"a": 5}, {"a": {"$gt": 4}}, True),
    ({"a": 5}, {"a": {"$gt": 5}}, False),
    ({"a": 5}, {"a": {"$gte": 5.0}}, True),
    ({"a": 5.5}, {"a": {"$lt": 6}}, True),
    ({"a": 5}, {"a": {"$lte": 4.99}}, False),
    ({"a": "5"}, {"a": {"$gt": 4}}, False),
    ({"a": 5}, {"a": {"$gt": "4"}}, False),
    ({"a": True}, {"a": {"$gt": 0}}, False),
    ({"a": None}, {"a": {"$lte": 0}}, False),
    ({}, {"a": {"$lte": 0}}, False),
    ({"a": "b"}, {"a": {"$gt": "a"}}, True),
    ({"a": "B"}, {"a": {"$gt": "a"}}, False),
    ({"a": "\U0001f600"}, {"a": {"$gt": "\uffff"}}, True),
    ({"a": 5}, {"a": {"$gt": 1, "$lt": 9}}, True),
    ({"a": 5}, {"a": {"$gt": 1, "$lt": 4}}, False),
    # null and missing
    ({"a": None}, {"a": None}, True),
    ({}, {"a": None}, True),
    ({"a": 1}, {"a": None}, False),
    ({"a": [None, 1]}, {"a": None}, True),
    ({"a": []}, {"a": None}, False),
    ({"a": {}}, {"a": None}, False),
    ({"a": {"b": 1}}, {"a.c": None}, True),
    ({"a": 1}, {"a.b": None}, True),
    ({"a": None}, {"a": {"$exists": True}}, True),
    ({}, {"a": {"$exists": True}}, False),
    ({"a": []}, {"a": {"$exists": True}}, True),
    ({"a": {}}, {"a": {"$exists": True}}, True),
    ({"a": {"b": 1}}, {"a": {"$exists": True}}, True),
    ({"a": NAN}, {"a": {"$exists": True}}, True),
    ({}, {"a": {"$exists": False}}, True),
    ({"a": None}, {"a": {"$exists": False}}, False),
    ({"a": 1}, {"a": {"$ne": None}}, True),
    ({}, {"a": {"$ne": None}}, False),
    ({}, {"a": {"$ne": 1}}, True),
    ({"a": "1"}, {"a": {"$ne": 1}}, True),
    ({"a": None}, {"a": {"$in": [1, None]}}, True),
    ({}, {"a": {"$in": [None]}}, True),
    ({}, {"a": {"$nin": [None]}}, False),
    ({}, {"a": {"$in": []}}, False),
    ({}, {"a": {"$nin": []}}, True),
    # lists
    ({"a": [1, 2]}, {"a": 1}, True),
    ({"a": [1, 2]}, {"a": [1, 2]}, True),
    ({"a": [1, 2.0]}, {"a": [1.0, 2]}, True),
    ({"a": [1, 2]}, {"a": [2, 1]}, False),
    ({"a": [1, 2]}, {"a": [1]}, False),
    ({"a": [1, 2]}, {"a": [True, 2]}, False),
    ({"a": [[1, 2], 3]}, {"a": [1, 2]}, True),
    ({"a": [[1, 2], 3]}, {"a": 1}, False),
    ({"a": []}, {"a": []}, True),
    ({"a": [[]]}, {"a": []}, True),
    ({"a": [1, 9]}, {"a": {"$gt": 8}}, True),
    ({"a": [1, 9]}, {"a": {"$gt": 8, "$lt": 2}}, True),
    ({"a": [1, 9]}, {"a": {"$ne": 1}}, False),
    ({"a": [1, 9]}, {"a": {"$in": [7, 9]}}, True),
    ({"a": [1, 9]}, {"a": {"$nin": [7, 9]}}, False),
    ({"a": [{"b": 1}, {"b": 2}]}, {"a.b": 2}, True),
    ({"a": [{"b": 1}, {"b": 2}]}, {"a": {"b": 2}}, True),
    ({"a": [{"b": 1}]}, {"a.0.b": 1}, False),
    # dicts
    ({"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 1}}, True),
    ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, False),
    ({"a": {"b": 1}}, {"a": {"b": 1.0}}, True),
    ({"a": {"b": 1}}, {"a": {"b": True}}, False),
    ({"a": {"b": 1}}, {"a": {"b": "1"}}, False),
    ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 2.0}]}}, True),
    ({"a": {"b": 1}}, {"a": {"b": {}}}, False),
    ({"a": {}}, {"a": {}}, True),
    ({"a": {}}, {"a": []}, False),
    ({"a": {"b": NAN}}, {"a": {"b": NAN}}, True),
    ({"a": {"b": None}}, {"a": {}}, False),
    ({"a": {"bc": 1, "d": 2}}, {"a": {"b": 1, "cd": 2}}, False),
    ({"a": ["b", "c"]}, {"a": ["bc"]}, False),
    ({"a": ["1:number"]}, {"a": [1]}, False),
    ({"a": {"b": "2026-01-01T00:00:00Z"}}, {"a": {"b": {"$date": "2026-01-01"}}}, False),
    ({"a": {"$literal": {"$float": 1}}}, {"a": {"$literal": {"$float": 1}}}, True),
    ({"a": {"$literal": {"$float": 1}}}, {"a": {"$literal": {"$float": 2}}}, False),
    # NaN equals itself and is neither less nor greater than a number; infinities are numbers
    ({"a": NAN}, {"a": NAN}, True),
    ({"a": NAN}, {"a": 0}, False),
    ({"a": NAN}, {"a": None}, False),
    ({"a": NAN}, {"a": {"$lt": INFINITY}}, False),
    ({"a": NAN}, {"a": {"$gte": 0}}, False),
    ({"a": NAN}, {"a": {"$gte": NAN}}, True),
    ({"a": NAN}, {"a": {"$gt": NAN}}, False),
    ({"a": 1}, {"a": {"$lte": NAN}}, False),
    ({"a": 1}, {"a": {"$ne": NAN}}, True),
    ({"a": INFINITY}, {"a": INFINITY}, True),
    ({"a": INFINITY}, {"a": {"$gt": 1e308}}, True),
    ({"a": {"$float": "-Infinity"}}, {"a": {"$lt": -1e308}}, True),
    ({"a": 1}, {"a": {"$lt": INFINITY}}, True),
    # integers keep every digit
    ({"a": 2**53 + 1}, {"a": 2**53}, False),
    ({"a": 2**53 + 1}, {"a": float(2**53)}, False),
    ({"a": 2**53 + 1}, {"a": {"$gt": float(2**53)}}, True),
    ({"a": 2**63 - 1}, {"a": 2**63 - 1}, True),
    ({"a": 2**63 - 1}, {"a": {"$lt": float(2**63)}}, True),
    ({"a": -(2**63)}, {"a": -(2**63)}, True),
    ({"a": 2**63}, {"a": 2**63}, True),
    ({"a": 2**63}, {"a": 2**63 + 1}, False),
    ({"a": 2**70}, {"a": 2**70}, True),
    ({"a": 2**70}, {"a": 2**70 + 1}, False),
    ({"a": 2**70}, {"a": {"$gt": 0}}, True),
    ({"a": -(2**70)}, {"a": {"$lt": 0}}, True),
    ({"a": 1}, {"a": {"$lt": 2**70}}, True),
    ({"a": 1}, {"a": {"$gt": -(2**70)}}, True),
    ({"a": 2**71}, {"a": {"$gt": 2**70}}, True),
    ({"a": 2**70}, {"a": {"$gt": 2**71}}, False),
    ({"a": 10**400}, {"a": 10**400}, True),
    ({"a": 10**400}, {"a": {"$gt": 1e300}}, True),
    ({"a": 1}, {"a": {"$lt": 10**400}}, True),
    ({"a": 1}, {"a": {"$gt": -(10**400)}}, True),
    ({"a": 2**63}, {"a": float(2**63)}, True),
    ({"a": float(2**63)}, {"a": 2**63}, True),
    ({"a": 1e300}, {"a": int(1e300)}, True),
    ({"a": [2**63]}, {"a": [float(2**63)]}, True),
    ({"a": [1e20]}, {"a": [10**20]}, True),
    ({"a": [1e300]}, {"a": [1e300]}, True),
    # dates in free metadata are dates when tagged, else text
    ({"a": {"$date": "2026-01-31T08:00:00Z"}}, {"a": {"$date": "2026-01-31T10:00:00+02:00"}}, True),
    ({"a": {"$date": "2026-01-31"}}, {"a": {"$date": "2026-01-31T00:00:00Z"}}, True),
    ({"a": {"$date": "2026-01-31"}}, {"a": "2026-01-31"}, False),
    ({"a": "2026-01-31"}, {"a": {"$date": "2026-01-31"}}, False),
    ({"a": {"$date": "2026-01-31"}}, {"a": {"$gt": {"$date": "2026-01-30"}}}, True),
    ({"a": {"$date": "1969-12-31T23:59:59.999999Z"}}, {"a": {"$lt": {"$date": "1970-01-01"}}}, True),
    ({"a": {"$date": "0001-01-01"}}, {"a": {"$lt": {"$date": "9999-12-31"}}}, True),
    ({"a": {"$date": "2026-01-31"}}, {"a": {"$gt": 0}}, False),
    # complex numbers and bytes are equal or not
    ({"a": {"$complex": [1, 2]}}, {"a": {"$complex": [1.0, 2.0]}}, True),
    ({"a": {"$complex": [1, -0.0]}}, {"a": {"$complex": [1, 0]}}, True),
    ({"a": {"$complex": [1, 2]}}, {"a": {"$complex": [2, 1]}}, False),
    ({"a": {"$complex": [NAN, 2]}}, {"a": {"$complex": [NAN, 2]}}, True),
    ({"a": {"$complex": [1, 0]}}, {"a": 1}, False),
    ({"a": {"$bytes": "YQ=="}}, {"a": {"$bytes": "YQ=="}}, True),
    ({"a": {"$bytes": "YQ=="}}, {"a": {"$bytes": "Yg=="}}, False),
    ({"a": {"$bytes": "YQ=="}}, {"a": "YQ=="}, False),
    # long texts are equal in full and ordered by their beginning
    ({"a": LONG}, {"a": LONG}, True),
    ({"a": LONG}, {"a": LONG + "y"}, False),
    ({"a": LONG}, {"a": LONG[:100]}, False),
    ({"a": LONG}, {"a": LONG[:99]}, False),
    ({"a": LONG}, {"a": {"$gt": "w"}}, True),
    ({"a": LONG}, {"a": {"$gt": LONG[:99]}}, True),
    ({"a": LONG[:100]}, {"a": LONG[:100]}, True),
    ({"a": LONG[:99]}, {"a": LONG[:99]}, True),
    # operators on filters
    ({"a": 1}, {"$not": {"a": 1}}, False),
    ({"a": 1}, {"$and": [{"a": 1}, {"b": None}]}, True),
    ({"a": 1}, {"$or": [{"a": 2}, {"a": 1}]}, True),
    ({"a": 1}, {"$nor": [{"a": 2}, {"b": 1}]}, True),
    ({"a": 1}, {"$nor": [{"a": 2}, {"a": 1}]}, False),
    ({"a": 1}, {"a": {"$not": {"$gt": 5}}}, True),
    ({"a": "x"}, {"a": {"$not": {"$gt": 5}}}, True),
    ({}, {"a": {"$not": {"$gt": 5}}}, True),
    ({"a": 1}, {"a": 1, "b": 1}, False),
    ({"a": 1}, {"$or": [{}]}, True),
]


@pytest.mark.parametrize(("metadata", "query", "expected"), A, ids=lambda value: ascii(value)[:50])
def test_free_metadata_is_matched_by_type_and_value(metadata, query, expected):
    assert is_match(query, metadata=metadata) is expected


TYPED = [
    ({"name": "T1"}, {"name": "T1"}, True),
    ({"tags": ["q3", "q4"]}, {"tags": "q3"}, True),
    ({"tags": []}, {"tags": "q3"}, False),
    ({"starred": True}, {"starred": True}, True),
    ({"flag": "red"}, {"flag": {"$in": ["red", "blue"]}}, True),
    ({"measured_at": "2026-01-31T08:00:00.000000Z"}, {"measured_at": {"$gte": "2026-01-31"}}, True),
    ({"measured_at": "2026-01-31T08:00:00.000000Z"}, {"measured_at": "2026-01-31T10:00:00+02:00"}, True),
    ({"measured_at": "2026-01-31T08:00:00.000000Z"}, {"measured_at": {"$lt": {"$date": "2026-01-31"}}}, False),
    ({}, {"measured_at": None}, True),
    ({}, {"measured_at": {"$lt": "2026-01-31"}}, False),
    ({}, {"state": "complete"}, True),
    ({}, {"revision": 1}, True),
    (
        {"instruments": {"vna": {"settings": {"power": {"value": -30}}}}},
        {"instruments.vna.settings.power.value": {"$lt": -20}},
        True,
    ),
    ({"device": {"device_info": {"chip": "C7"}}}, {"device.device_info.chip": "C7"}, True),
    ({"metadata": {"name": "x"}}, {"name": "x"}, False),
    ({"metadata": {"name": "x"}}, {"metadata.name": "x"}, True),
    ({"metadata": {"a": 1}}, {"metadata": {"a": 1}}, True),
    ({"files": (FileInfo("n.txt", 1, "t", "s", "k"),)}, {"files.name": "n.txt"}, True),
    ({"files": (FileInfo("x" * 200, 1, "t", "s", "k"),)}, {"files.name": "x" * 200}, True),
    ({"comment": LONG}, {"comment": LONG}, True),
]


@pytest.mark.parametrize(("fields", "query", "expected"), TYPED, ids=lambda value: ascii(value)[:50])
def test_typed_fields_are_matched_by_type_and_value(fields, query, expected):
    assert is_match(query, **fields) is expected


# --- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [{"t": SLOW}, {"t": {"$not": SLOW}}, {"t": {"$elemMatch": SLOW}}, {"o": {"$elemMatch": {"t": SLOW}}},
     {"$nor": [{"o": {"$elemMatch": {"t": {"$elemMatch": SLOW}}}}]}],
    ids=ascii,
)  # fmt: skip
def test_a_document_that_takes_too_long_is_given_up_between_its_texts(query):
    """All of them would take ten seconds and more."""
    texts = ["".join(random.Random(1).choices("abcdefghijklmnopqrst", k=75_000))] * 100
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        matches(parse_filter(query), facts_of(metadata={"t": texts, "o": [{"t": texts}]}), began + 0.3)
    assert time.monotonic() - began < 5


def test_a_sort_names_one_path_and_its_direction():
    assert parse_sort("name") == SortKey("name", False)
    assert parse_sort("-created_at") == SortKey("created_at", True)
    assert parse_sort("-chip") == SortKey("metadata.chip", True)
    with pytest.raises(QueryError):
        parse_sort("-")


def test_values_sort_by_kind_and_then_by_value():
    ascending = [
        [None], [NAN], [{"$float": "-Infinity"}], [-(2**70)], [-1.5], [0], [1], [2**53], [2**53 + 1], [2**70],
         [INFINITY], [""], ["A"],
        ["a"], ["é"], ["\uffff"], ["\U0001f600"], [False], [True], [{"$date": "1969-01-01"}], [{"$date": "2026-01-01"}],
    ]  # fmt: skip
    key = parse_sort("a")
    keys = [sort_key(found_terms(metadata={"a": value}), key) for [value] in ascending]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


def test_missing_and_null_sort_together_and_first():
    for key in (parse_sort("a"), parse_sort("-a")):
        missing = sort_key(found_terms(), key)
        assert missing == sort_key(found_terms(metadata={"a": None}), key)
        assert missing < sort_key(found_terms(metadata={"a": NAN}), key)


def test_of_several_values_the_least_counts_and_the_greatest_when_descending():
    found = found_terms(metadata={"a": [5, 1, 9]})
    one, nine = found_terms(metadata={"a": 1}), found_terms(metadata={"a": 9})
    assert sort_key(found, parse_sort("a")) == sort_key(one, parse_sort("a"))
    assert sort_key(found, parse_sort("-a")) == sort_key(nine, parse_sort("-a"))


values = (
    st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from([0, -0.0, 0.0, math.inf, -math.inf, "", "i1", "f", "0s"])
)


@given(st.integers(0, 6), values)
@example(2, -0.0)
@example(3, "s\x00")
def test_a_packed_key_is_read_back_exactly(rank, value):
    rank_again, again = unpack_key(pack_key((rank, value)))
    assert (rank_again, type(again)) == (rank, type(value))
    assert struct.pack("<d", again) == struct.pack("<d", value) if isinstance(value, float) else again == value


@pytest.mark.parametrize("text", ["", "2", "2x1", "xi1", "2i", "2ix", "2i1.5", "2f", "2f00", "2fzz", "i", "2i" + "9" * 5000])
def test_what_is_no_packed_key_is_a_value_error(text):
    with pytest.raises((ValueError, IndexError, struct.error)) as caught:
        unpack_key(text)
    assert isinstance(caught.value, ValueError), "as its docstring says"


_members = st.recursive(
    st.sampled_from([None, True, 1, 1.0, 0, -0.0, 2**70, float(2**70), 1.5, "a", LONG, "20 mK", "mK", NAN, INFINITY])
    | st.just({"$date": "2026-01-01T00:00:00Z"}) | st.just({"$date": "2026-01-01"}) | st.just({"$literal": {"$float": 1}}),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b.c", "value", "unit"]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(value=st.dictionaries(st.sampled_from(["a", "b.c", "value", "unit"]), _members, max_size=3), other=_members)
def test_the_members_of_an_object_that_is_asked_for_exclude_none_that_is_equal(value, other):
    """An object is asked for together with some of its members: wherever it stands, and however it is written, it is found."""
    narrowed, plain = parse_filter({"x": {"$eq": value}}), parse_filter({"x": {"$in": [value]}})
    again = dict(reversed(value.items()))
    for stored in (value, again, [value], [other, value], [[value]], {"a": value}, other, [other, [other]]):
        facts = facts_of(metadata={"x": stored})
        assert matches(narrowed, facts) == matches(plain, facts)
    assert matches(narrowed, facts_of(metadata={"x": [other, again]}))
