"""Malformed and hostile questions to a real server: each is answered or refused by name, at once, and nothing breaks."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aq_server.commands.serving import running
from hypothesis import given, settings
from hypothesis import strategies as st
from services.deployment import PATIENCE, deployed

from aq_data.storage.metadata import _mongo_questions, sqlite

API = "/api/v1"
ROUTES = {"search": f"{API}/search", "count": f"{API}/search/count", "distinct": f"{API}/search/distinct"}
CORPUS = [json.loads(line) for line in (Path(__file__).parent / "hostile_queries.jsonl").read_text().splitlines()]
DOCUMENTS: list[dict[str, Any]] = [
    *[{"name": f"n{i}", "metadata": {"a": [i, f"x{i}"], "fridge": {"t": {"value": i, "unit": "mK"}}}} for i in range(1, 6)],
    {"name": "wide", "metadata": {f"k{i}": i for i in range(500)}},
    {
        "name": "long",
        "comment": "a long text " * 100,
        "metadata": {"l": ["y" * 200, {"b": [{"c": 1}]}], "s": list(range(2000))},
    },
    {
        "name": "odd",
        "metadata": {"": 5, "nul\x00": "\x00", "f": {"$float": "NaN"}, "d": {"$date": "2026-01-31"}, "big": 10**400},
    },
]
AT_ONCE = 3.0 * PATIENCE
"""Seconds in which anything is answered over these few documents, on a busy machine."""


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with a few documents, and HTTP to it."""
    data = tmp_path_factory.mktemp("hostile") / "data"
    with (
        running(deployed(data)) as url,
        httpx.Client(base_url=url, timeout=60, verify=False) as client,
    ):
        for document in DOCUMENTS:
            assert client.post(f"{API}/datafiles", json=document).status_code == 201
        yield client


def ask(wire: httpx.Client, body: Any, route: str = "search") -> httpx.Response:
    """The answer, which is there at once, and a success or a whole problem document of a client's mistake."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    began = time.perf_counter()
    answer = wire.post(ROUTES[route], content=content, headers={"Content-Type": "application/json"})
    assert time.perf_counter() - began < AT_ONCE, content[:300]
    assert answer.status_code in (200, 400, 413, 422), (answer.status_code, content[:500], answer.text[:500])
    answer.json()
    if answer.status_code != 200:
        problem = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert problem["code"] in ("bad_query", "bad_cursor", "invalid", "too_large"), problem
        assert 0 < len(problem["detail"]) < 2000
    return answer


def works(wire: httpx.Client) -> None:
    """The same connection answers the next question, and nothing was changed."""
    assert ask(wire, {}, "count").json() == {"count": len(DOCUMENTS)}
    assert ask(wire, {"filter": {"name": "n1"}, "fields": ["name"]}).json()["total"] == 1


def test_the_corpus_is_here():
    """A guard: hundreds of questions of each kind."""
    assert len(CORPUS) > 500
    assert {case["status"] for case in CORPUS} == {200, 400, 422}


@pytest.mark.parametrize("status", [200, 400, 422])
def test_the_corpus_is_answered_as_it_says(wire, status):
    """A mistake by a refusal that names the path, the operator or the part of the request; what only looks like an attack by an answer."""
    wrong = []
    for case in CORPUS:
        if case["status"] == status:
            route = case["route"]
            answer = ask(wire, case["raw"].encode("utf-8", "surrogatepass") if "raw" in case else case["body"], route)
            named = status == 200 or case["names"] in answer.json()["detail"]
            total = answer.json().get("total", 0) if status == 200 else 0
            if answer.status_code != status or not named or ("total" in case and total != case["total"]):
                wrong.append((case, answer.status_code, answer.text[:200]))
    assert wrong == []
    works(wire)


@pytest.mark.parametrize("case", [case for case in CORPUS if "body" in case and "filter" in case["body"]][::7], ids=str)
def test_count_and_distinct_judge_a_filter_as_search_does(wire, case):
    """A seventh of the corpus by the other routes."""
    filter = case["body"]["filter"]
    assert ask(wire, {"filter": filter}, "count").status_code == case["status"]
    assert ask(wire, {"filter": filter, "field": "name"}, "distinct").status_code == case["status"]


def nested(operator: str, depth: int) -> bytes:
    start, end = {"list": (f'{{"{operator}":[', "]}"), "object": (f'{{"{operator}":', "}")}[
        "list" if operator in ("$and", "$or", "$nor") else "object"
    ]
    return b'{"filter":' + start.encode() * depth + b'{"a":1}' + end.encode() * depth + b"}"


EACH = {"$gt": -1, "$lt": 10**9, "$ne": 3.5, "$size": 0, "$exists": True, "$regex": "a"}
LARGE: dict[str, Any] = {
    "a long $in": {"filter": {"a": {"$in": list(range(100_000))}}},
    "a long $in of texts": {"filter": {"a": {"$in": [f"'{i}\"%" for i in range(4900)]}}},
    "a long $nin of objects": {"filter": {"a": {"$nin": [{"k": [i]} for i in range(4900)]}}},
    "a long $in of quantities": {"filter": {"fridge.t.value": {"$in": [f"{i} mK" for i in range(4900)]}}},
    "a long $all": {"filter": {"s": {"$all": list(range(2000))}}},
    "a long $all that is not there": {"filter": {"zzz": {"$all": list(range(4900))}}},
    "$elemMatch with a long $in": {"filter": {"s": {"$elemMatch": {"$in": list(range(4900)), "$gt": 5}}}},
    "many keys": {"filter": {f"k{i}": i for i in range(490)}},
    "too many keys": {"filter": {f"k{i}": i for i in range(100_000)}},
    "many keys with every operator": {"filter": {f"k{i}": EACH for i in range(490)}},
    "many negated keys with every operator": {"filter": {"$nor": [{f"k{i}": EACH} for i in range(160)]}},
    "many alternatives with every operator": {"filter": {"$or": [{f"k{i}": EACH} for i in range(160)]}},
    "many negations in alternatives": {"filter": {"$or": [{f"k{i}": {"$not": EACH}} for i in range(120)]}},
    "many words": {"filter": {"$or": [{"$text": " ".join(f"w{i}x{j}" for j in range(20))} for i in range(20)]}},
    "a long word": {"filter": {"$text": "x" * 1_000_000}},
    "a text of blanks": {"filter": {"$text": " " * 1_000_000}},
    "a text of marks": {"filter": {"$text": "\u0301" * 300_000}},
    "a long text": {"filter": {"name": "x" * 1_000_000}},
    "a long path": {"filter": {"a" * 500: 1}},
    "a path that is too long": {"filter": {"a" * 501: 1}},
    "a path of dots": {"filter": {"." * 500: 1}},
    "a path of backslashes": {"filter": {"\\" * 500: 1}},
    "a sort by dots": {"sort": "." * 500},
    "a deep value": {"filter": {"a": json.loads("[" * 60 + "]" * 60)}},
    "a value that is too deep": {"filter": {"a": json.loads("[" * 400 + "]" * 400)}},
    "a wide value": {"filter": {"a": {f"k{i}": [i] for i in range(10_000)}}},
    "many fields": {"fields": [f"f{i}" for i in range(100_000)]},
    "fields that overlap": {"fields": ["metadata", "metadata.a", "metadata.fridge.t", "metadata.fridge", "name", "name.x", "id"]},
    "a long cursor": {"cursor": "A" * 1_000_000},
    "a hostile unit": {"filter": {"fridge.t.value": {"$lt": "1 ((min**999)**999)**99"}}},
    "a long number with a unit": {"filter": {"fridge.t.value": {"$lt": "1" * 60 + "e99999 mK"}}},
    "hostile patterns": {"filter": {"$and": [{"comment": {"$regex": "(.*)(.*)(.*)(.*)(.*)$"}}, {"l": {"$regex": "(y+)+z$"}}]}},
    "nested elements": {"filter": {"s": {"$elemMatch": {"$not": {"$elemMatch": {"$not": {"$elemMatch": {"$gt": 1}}}}}}}},
    **{f"{operator} {depth} deep": nested(operator, depth) for operator in ("$and", "$or", "$nor", "$not", "$elemMatch") for depth in (11, 13, 900, 100_000)},
    **{f"conditions nested by {operator}": b'{"filter":{"a":' + b'{"%s":' % operator.encode() * 900 + b"1" + b"}" * 901 + b"}" for operator in ("$not", "$elemMatch")},
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_large_question_is_answered_or_refused(wire, name):
    """At the limits and far beyond: depth, width, length."""
    ask(wire, LARGE[name])
    if isinstance(LARGE[name], dict) and "filter" in LARGE[name]:
        ask(wire, {"filter": LARGE[name]["filter"]}, "count")
        ask(wire, {"filter": LARGE[name]["filter"], "field": "a"}, "distinct")
    works(wire)


# --- fuzzing -------------------------------------------------------------------------------------------------------

OPERATORS = ["$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$all", "$exists", "$regex", "$size", "$elemMatch", "$not", "$and", "$or", "$nor", "$text",
             "$where", "$float", "$date", "$complex", "$bytes", "$literal", "$ndarray", "$"]  # fmt: skip
KEYS = ["a", "name", "metadata", "s", "l", "l.b.c", "fridge.t.value", "fridge.t", "tags", "measured_at", "state", "instruments", "arrays.name", "files", "size", "",
        "id", ".", "\\", "attrs", "@", "@.a", "$a", "\\$a", "k1", "f", "d", "big", "nul\x00"]  # fmt: skip
texts = st.sampled_from(
    [
        "",
        "a",
        "x1",
        "n1",
        "20 mK",
        "1 V",
        "2026-01-31",
        "^x",
        "(a|b)*",
        "(",
        "\x00",
        "\U0010ffff",
        '"',
        "'",
        "%",
        "*",
        "AND",
        "NaN",
    ]
) | st.text(max_size=5)
atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([2**53, 2**63, -(2**63) - 1, 10**400, 1e308, 0.5, -0.0]),
    texts,
)
shapes = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(OPERATORS + KEYS) | st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=12,
)
valid_values = st.one_of(
    st.integers(-1, 5),
    st.sampled_from(["x1", "20 mK", {"$float": "NaN"}, {"$date": "2026-01-31"}, None, [1, "x1"], {"b": [{"c": 1}]}]),
)
valid_conditions = st.one_of(
    valid_values,
    st.builds(lambda op, v: {op: v}, st.sampled_from(["$gt", "$lte", "$ne", "$eq"]), st.integers(0, 5) | st.just("2 mK")),
    st.builds(lambda op, v: {op: v}, st.sampled_from(["$in", "$nin", "$all"]), st.lists(valid_values, max_size=3)),
    st.sampled_from(
        [
            {"$exists": True},
            {"$size": 2},
            {"$regex": "^x[0-9]$"},
            {"$elemMatch": {"$gt": 3, "$lt": 9}},
            {"$elemMatch": {"b.c": 1}},
            {"$not": {"$gt": 2}},
        ]
    ),
)
valid_filters = st.recursive(
    st.dictionaries(
        st.sampled_from(["a", "name", "s", "l", "fridge.t.value", "big", "d", "metadata.k1"]),
        valid_conditions,
        min_size=1,
        max_size=2,
    )
    | st.builds(lambda t: {"$text": t}, st.sampled_from(["n1", "long text", "x"])),
    lambda inner: (
        st.builds(
            lambda op, listed: {op: listed},
            st.sampled_from(["$and", "$or", "$nor"]),
            st.lists(inner, min_size=1, max_size=3),
        )
        | st.builds(lambda f: {"$not": f}, inner)
    ),
    max_leaves=5,
)
EXAMPLES = 2 * settings().max_examples


@settings(max_examples=EXAMPLES)
@given(st.dictionaries(st.sampled_from(OPERATORS + KEYS), shapes, max_size=3), st.sampled_from(KEYS), st.booleans())
def test_json_of_any_shape_is_answered_or_refused(wire, filter, sort, descending):
    """Operators, tags and keys put together in any way; the three routes agree whether it is a filter."""
    answer = ask(wire, {"filter": filter, "limit": 5})
    assert ask(wire, {"filter": filter}, "count").status_code == answer.status_code
    if answer.status_code == 200:
        assert ask(wire, {"filter": filter}, "count").json()["count"] == answer.json()["total"]
        ask(wire, {"filter": filter, "sort": "-" * descending + sort, "limit": 2, "fields": [sort]})
        ask(wire, {"filter": filter, "field": sort}, "distinct")


def mutations(draw: Any, value: Any) -> Any:
    """The value with one place in it changed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.booleans()):
            return {**value, key: mutations(draw, value[key])}
        rest = {k: v for k, v in value.items() if k != key}
        return {**rest, draw(st.sampled_from(OPERATORS + KEYS)): value[key]}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], mutations(draw, value[i]), *value[i + 1 :]]
    return draw(st.one_of(shapes, st.just([value]), st.just({"a": value}), st.just({"$not": value}), st.just(str(value))))


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_valid_filter_is_answered_and_with_one_place_changed_answered_or_refused(wire, data):
    """The neighbours of what is right, where a slip of a check would be."""
    filter = data.draw(valid_filters)
    answer = ask(wire, {"filter": filter})
    assert answer.status_code == 200 or "is measured in" in answer.json()["detail"], (filter, answer.text)
    changed = mutations(data.draw, filter)
    if isinstance(changed, dict):
        ask(wire, {"filter": changed, "sort": data.draw(st.sampled_from(["-created_at", "a", "-s", "metadata.f"]))})


@settings(max_examples=EXAMPLES)
@given(st.data(), st.sampled_from(["-created_at", "name", "a", "-s", "metadata.f", "fridge.t.value", "absent"]))
def test_a_changed_cursor_is_answered_or_refused(wire, data, sort):
    """Bits flipped in the text, and any JSON in the place of its parts."""
    good = ask(wire, {"sort": sort, "limit": 2}).json()["cursor"]
    raw = bytearray(base64.urlsafe_b64decode(good + "=" * (-len(good) % 4)))
    parts = json.loads(raw)
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        keys = st.builds(str.__add__, st.sampled_from(["0i", "1i", "2i", "2f", "3s", "4s", "5i", "6i", "6f", "7i", "2s", "3i", "9", ""]),
                         st.sampled_from(["", "0", "-1", "9" * 20, "7ff8000000000000", "7ff0000000000000", "00  00  00  00  ", "\x00", "é", "'", " 1", "1_0", "٣"]))  # fmt: skip
        place = data.draw(st.integers(0, len(parts) - 1))
        parts[place] = (
            data.draw(keys)
            if place == 2
            else data.draw(st.sampled_from([0, -1, 10**18, 10**30, "x", "", None, True, 1.5, [], {}, "\x00"]))
        )
        raw = bytearray(json.dumps(parts).encode())
    changed = base64.urlsafe_b64encode(bytes(raw)).decode().rstrip("=")
    answer = ask(wire, {"sort": sort, "limit": 2, "cursor": changed})
    assert answer.status_code == 200 or answer.json()["code"] == "bad_cursor"


# --- time ----------------------------------------------------------------------------------------------------------

SLOW = [
    {"t": {"$regex": "zzz$"}},
    {"t": {"$not": {"$regex": "z{20}y"}}},
    {"o": {"$elemMatch": {"n": {"$gte": 0}, "m": {"$not": {"$gte": 0}}}}},
    {"o": {"$elemMatch": {"n": {"$in": list(range(30))}, "m": {"$exists": False}}}},
    {"$nor": [{"t": {"$regex": "y+x"}}, {"o": {"$elemMatch": {"m": {"$not": {"$gte": 0}}}}}]},
    {"$and": [{"t": {"$regex": f"z{i}$"}} for i in range(50)]},
]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with a few documents that take a while to look into."""
    data = tmp_path_factory.mktemp("slow") / "data"
    text = "y" * 2000 * PATIENCE  # MongoDB looks at its clock only between documents
    big = {"t": [f"{text}{i}" for i in range(200)], "o": [{"n": i, "m": i} for i in range(500)]}
    with (
        running(deployed(data)) as url,
        httpx.Client(base_url=url, timeout=60, verify=False) as client,
    ):
        for i in range(40):
            assert client.post(f"{API}/datafiles", json={"name": f"n{i}", "metadata": big}).status_code == 201
        assert client.post(ROUTES["count"], json={}).json() == {"count": 40}
        yield client


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("filter", SLOW, ids=lambda value: str(value)[:40])
def test_a_query_over_its_time_is_refused_as_that_and_the_next_one_works(slow, monkeypatch, filter, route):
    """However few documents there are: the limit is one of time, not of steps; and nothing of it stays behind."""
    body = {"filter": filter, **({"field": "name"} if route == "distinct" else {})}
    for store in (sqlite, _mongo_questions):
        monkeypatch.setattr(store, "QUERY_SECONDS", 0.002)
    began = time.perf_counter()
    answer = ask(slow, body, route)
    assert time.perf_counter() - began < 0.5 * PATIENCE
    assert (answer.status_code, answer.json().get("code")) == (400, "bad_query")
    assert "took longer than 0.002 s" in answer.json()["detail"]
    monkeypatch.undo()
    assert ask(slow, {"filter": {"name": "n1"}}, "count").json() == {"count": 1}
    assert slow.post(ROUTES[route], json=body).status_code == 200, "given its time, it is answered"
