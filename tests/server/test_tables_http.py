"""Search results as columns over HTTP: NDJSON, CSV, Arrow, in one request however many there are."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime

import httpx
import psutil
import pyarrow as pa
import pytest
from aq_server.commands.serving import running
from services.deployment import deployed

from aq_data.wire.routes import BULK, SEARCH

FORMS = {"ndjson": "application/x-ndjson", "csv": "text/csv", "arrow": "application/vnd.apache.arrow.stream"}

DOCUMENTS = [
    {
        "name": "one",
        "measured_at": "2026-01-01",
        "instruments": {"vna": {"settings": {"power": {"value": -30, "unit": "dBm"}}}},
        "metadata": {"t1": 31.5e-6, "n": 1, "mixed": 1, "text": 'a,"b"\r\nc', "ok": True, "l": [{"v": 1}, {}]},
    },
    {
        "name": "two",
        "metadata": {
            "t1": {"$float": "NaN"},
            "n": 2**60 + 1,
            "mixed": "x",
            "text": "",
            "ok": False,
            "z": {"$complex": [1, 2]},
        },
    },
    {"name": "=1+1", "metadata": {"t1": 3, "when": {"$date": "2026-02-03T04:05:06.789Z"}, "text": "ä\u2028🎉", "l": []}},
]
FIELDS = ["name", "measured_at", "t1", "n", "mixed", "text", "ok", "when", "z", "l.v", "l", "nothing"]
FIELDS += ["instruments.vna.settings.power.value", "arrays.name"]


@pytest.fixture(scope="module")
def filled(wire):
    """A server with three documents that differ in every column."""
    answer = wire.post(BULK, json=DOCUMENTS)
    assert {result["status"] for result in answer.json()["results"]} == {201}
    return wire


def ask(http: httpx.Client, form: str, **question) -> httpx.Response:
    answer = http.post(SEARCH, json={"sort": "created_at", **question}, headers={"Accept": FORMS[form]})
    if answer.status_code == 200:
        assert answer.headers["content-type"].startswith(FORMS[form])
        assert "accept" in answer.headers["vary"].lower()
    return answer


def test_ndjson_has_one_flat_object_a_line(filled):
    """The fields as keys, in order, what JSON lacks tagged, null for what is missing."""
    rows = [json.loads(line) for line in ask(filled, "ndjson", fields=FIELDS).content.splitlines()]
    assert [list(row) for row in rows] == [FIELDS] * 3
    assert [row["name"] for row in rows] == ["one", "two", "=1+1"]
    assert [row["t1"] for row in rows] == [31.5e-6, {"$float": "NaN"}, 3]
    assert [row["measured_at"] for row in rows] == ["2026-01-01T00:00:00.000000Z", None, None]
    assert [row["l.v"] for row in rows] == [[1, None], None, None]
    assert [row["l"] for row in rows] == [[{"v": 1}, {}], None, []]
    assert [row["instruments.vna.settings.power.value"] for row in rows] == [-30, None, None]
    assert [row["text"] for row in rows] == ['a,"b"\r\nc', "", "ä\u2028🎉"]


def test_csv_is_rfc_4180(filled):
    """A header, quotes where needed, CRLF, nothing for what is missing, JSON for what is nested."""
    text = ask(filled, "csv", fields=FIELDS).content.decode()
    assert text.endswith("\r\n")
    head, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    assert head == FIELDS
    columns = dict(zip(FIELDS, zip(*rows, strict=True), strict=True))
    assert columns["name"] == ("one", "two", "=1+1"), "text stands as it is"
    assert columns["t1"] == ("3.15e-05", "NaN", "3")
    assert columns["n"] == ("1", str(2**60 + 1), "")
    assert columns["text"] == ('a,"b"\r\nc', "", "ä\u2028🎉")
    assert columns["ok"] == ("true", "false", "")
    assert columns["when"] == ("", "", "2026-02-03T04:05:06.789Z")
    assert columns["l"] == ('[{"v":1},{}]', "", "[]")
    assert columns["z"] == ("", '{"$complex":[1,2]}', "")
    assert columns["nothing"] == ("", "", "")


def arrow(answer: httpx.Response) -> pa.Table:
    with pa.ipc.open_stream(answer.content) as stream:
        return stream.read_all()


def test_arrow_has_typed_columns(filled):
    """Each column the type that holds it; JSON text, and marked so, where no one type does."""
    table = arrow(ask(filled, "arrow", fields=FIELDS))
    types = {field.name: str(field.type) for field in table.schema}
    marked = {field.name for field in table.schema if (field.metadata or {}).get(b"aq_data") == b"json"}
    assert types == {
        **dict.fromkeys(("name", "text", "mixed", "z", "l.v", "l", "arrays.name"), "string"),
        **dict.fromkeys(("measured_at", "when"), "timestamp[us, tz=UTC]"),
        **dict.fromkeys(("n", "instruments.vna.settings.power.value"), "int64"),
        "t1": "double",
        "ok": "bool",
        "nothing": "null",
        "arrays.name": "null",
    }
    assert marked == {"mixed", "z", "l.v", "l"}
    assert table["n"].to_pylist() == [1, 2**60 + 1, None]
    assert table["when"].to_pylist() == [None, None, datetime(2026, 2, 3, 4, 5, 6, 789000, UTC)]
    assert table["mixed"].to_pylist() == ["1", '"x"', None]
    assert table["t1"].to_pylist()[0] == 31.5e-6
    assert table["ok"].to_pylist() == [True, False, None]


def test_json_is_the_answer_unless_another_is_preferred(filled):
    for accept, media in [
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("text/csv;q=0.5, application/x-ndjson", "application/x-ndjson"),
        ("text/*", "text/csv"),
        ("text/html, */*;q=0.1", "application/json"),
        ("application/json;q=0, */*", "application/x-ndjson"),
    ]:
        answer = filled.post(SEARCH, json={"fields": ["name"]}, headers={"Accept": accept})
        assert answer.headers["content-type"].startswith(media), accept
    for accept in ("image/png", "text/csv;q=0"):
        refused = filled.post(SEARCH, json={"fields": ["name"]}, headers={"Accept": accept})
        assert (refused.status_code, refused.json()["code"]) == (406, "not_acceptable")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("question", "word"),
    [
        ({}, "fields"),
        ({"fields": []}, "fields"),
        ({"fields": ["a", "b", "a"]}, "'a'"),
        ({"fields": [""]}, "path"),
        ({"fields": [f"f{i}" for i in range(1001)]}, "1000"),
        ({"fields": ["name"], "limit": 1_000_001}, "1000000"),
        ({"fields": ["name"], "limit": -1}, "limit"),
        ({"fields": ["name"], "filter": {"a": {"$near": 1}}}, "$near"),
        ({"fields": ["name"], "cursor": "x"}, "cursor"),
    ],
)
def test_a_wrong_question_is_told_before_anything_is_sent(filled, form, question, word):
    answer = ask(filled, form, **question)
    assert answer.status_code == 400
    assert word in answer.json()["detail"]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_found_is_an_empty_table(filled, form):
    answer = ask(filled, form, fields=["name", "n"], filter={"name": "nobody"})
    if form == "arrow":
        assert (arrow(answer).num_rows, arrow(answer).column_names) == (0, ["name", "n"])
    else:
        assert answer.content == (b"name,n\r\n" if form == "csv" else b"")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A server with 1500 documents, more than it gives on one page."""
    with (
        running(deployed(tmp_path_factory.mktemp("long"))) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        for first in range(0, 1500, 500):
            http.post(BULK, json=[{"metadata": {"i": i, "pad": "x" * 1000}} for i in range(first, first + 500)])
        yield http


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [None, 0, 1, 1499, 1_000_000])
def test_more_than_a_page_comes_in_one_request(long, form, limit):
    """Every match up to the limit, in order, without repeats, from after a cursor if there is one."""
    question = {"fields": ["i"], "sort": "-i"} | ({} if limit is None else {"limit": limit})
    expected = list(range(1499, -1, -1))[:limit]

    def numbers(answer: httpx.Response) -> list[int]:
        if form == "arrow":
            return arrow(answer)["i"].to_pylist()
        if form == "csv":
            return [int(line) for line in answer.text.split("\r\n")[1:-1]]
        return [json.loads(line)["i"] for line in answer.content.splitlines()]

    assert numbers(ask(long, form, **question)) == expected
    cursor = long.post(SEARCH, json={"sort": "-i", "limit": 10}).json()["cursor"]
    assert numbers(ask(long, form, **question, cursor=cursor)) == list(range(1489, -1, -1))[:limit]


def test_a_column_whose_type_shows_late_is_typed_all_the_same(long):
    """The last of 1500 rows decides: text among numbers makes every cell JSON text."""
    id = long.post("/api/v1/datafiles", json={"metadata": {"i": "last"}}).json()["id"]
    try:
        values = arrow(ask(long, "arrow", fields=["i"], sort="created_at"))["i"].to_pylist()
        assert sorted(values[:-1]) == sorted(str(i) for i in range(1500))
        assert values[-1] == '"last"'
    finally:
        long.delete(f"/api/v1/datafiles/{id}")


@pytest.mark.soak
def test_a_large_answer_does_not_fill_the_memory(serve):
    """A table of 240 MB grows the server by less than half of it: a page at a time is in memory, Arrow waits on disk."""
    server = serve()
    process = psutil.Process(server.process.pid)

    def size_and_peak(media: str, *fields: str) -> tuple[int, int]:
        size = peak = 0
        with http.stream("POST", SEARCH, json={"fields": fields}, headers={"Accept": media}) as answer:
            for piece in answer.iter_raw():
                size += len(piece)
                memory = process.memory_info()
                peak = max(peak, memory.rss - memory.shared)  # the database's file is mapped
        return size, peak

    with httpx.Client(base_url=server.url, timeout=60) as http:
        for _ in range(8):
            answer = http.post(BULK, json=[{"metadata": {"pad": "x" * 100_000}}] * 100)
            assert {result["status"] for result in answer.json()["results"]} == {201}
        before = size_and_peak(FORMS["csv"], "name")[1]  # the database's caches are full now
        for form in ("csv", "arrow"):
            size, peak = size_and_peak(FORMS[form], "pad", "metadata.pad", "metadata")
            assert size > 240_000_000
            assert peak - before < 120_000_000, form
