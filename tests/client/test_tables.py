"""Search results as pandas tables: every match in one request, the same by Arrow and by NDJSON."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pandas as pd
import pytest
from aq_server.service.searching import Searching
from hypothesis import given
from hypothesis import strategies as st
from services.deployment import opened

import aq_data
from aq_data.errors import QueryError, StorageError, UnavailableError, ValidationError
from aq_data.wire.routes import SEARCH

WHEN = datetime(2026, 1, 1, 8, tzinfo=UTC)


@pytest.fixture
def plain(monkeypatch):
    """As if pyarrow were not installed in the client."""
    monkeypatch.setattr("aq_data.client.tables.importlib.util.find_spec", lambda name: None)


@pytest.fixture(scope="module")
def year(tmp_path_factory):
    """A year of T1, one a day, with what goes wrong in a year."""
    with opened(tmp_path_factory.mktemp("year")) as client:
        client.save_many(
            {
                "name": "T1",
                "measured_at": WHEN + timedelta(days=day),
                "instruments": {"vna": {"settings": {"power": {"value": -30.5 if day % 2 else -30, "unit": "dBm"}}}},
                "metadata": {
                    "t1": math.nan if day == 7 else 30e-6 + day * 1e-8,
                    "count": day,
                    "ok": day % 2 == 0,
                    "fits": [{"f0": day}, {"f0": day + 0.5}],
                    **({"operator": "Ada"} if day % 3 else {"operator": 7 if day == 9 else None}),
                    **({"note": "warm", "attempts": 2, "at": WHEN, "good": True} if day % 10 == 0 else {}),
                },
            }
            for day in range(365)
        )
        yield client


@pytest.mark.parametrize("form", ["arrow", "ndjson"])
def test_t1_against_date_over_a_year_is_one_call(year, form, request):
    """All 365 rows, not the first 100, with the types one plots with."""
    if form == "ndjson":
        request.getfixturevalue("plain")
    table = year.search({"name": "T1"}, sort="measured_at").table(["measured_at", "t1", "count", "ok", "name"])
    assert table.dtypes.astype(str).to_dict() == {
        "measured_at": "datetime64[us, UTC]",
        "t1": "float64",
        "count": "int64",
        "ok": "bool",
        "name": "str",
    }
    assert len(table) == 365
    assert table["measured_at"].iloc[3] == pd.Timestamp("2026-01-04T08:00:00Z")
    assert table["t1"].isna().sum() == 1
    np.testing.assert_array_equal(table["count"], np.arange(365))
    assert table.index.name == "id"
    assert year.get(table.index[5]).metadata["count"] == 5


@pytest.mark.parametrize("form", ["arrow", "ndjson"])
def test_what_is_missing_is_missing_as_pandas_has_it(year, form, request):
    """NaN among numbers and text, NaT among instants, None among booleans and objects; lists from lists of objects."""
    if form == "ndjson":
        request.getfixturevalue("plain")
    columns = ["note", "attempts", "at", "good", "operator", "fits.f0", "nothing", "instruments.vna.settings.power.value"]
    table = year.search(sort="measured_at").table(columns)
    assert list(table.columns) == columns
    assert table["note"].dtype == "str"
    assert (table["note"].iloc[10], table["note"].notna().sum()) == ("warm", 37)
    assert table["attempts"].dtype == "float64"
    assert table["at"].iloc[1] is pd.NaT
    assert table["at"].iloc[0] == WHEN
    assert table["good"].iloc[:2].tolist() == [True, None]
    assert table["operator"].iloc[[0, 1, 9]].tolist() == [None, "Ada", 7]
    assert table["fits.f0"].iloc[3] == [3, 3.5]
    assert table["nothing"].tolist() == [None] * 365
    assert table["instruments.vna.settings.power.value"].iloc[:2].tolist() == [-30.0, -30.5]


def test_a_limit_and_a_cursor_hold_for_the_table_too(year):
    """Without one a table has every match; with one it has the hits."""
    hits = year.search(sort="measured_at", limit=30)
    assert hits.table(["count"])["count"].tolist() == list(range(30))
    assert list(hits.table([]).index) == [file.id for file in hits]
    after = year.search(sort="measured_at", limit=30, cursor=hits.cursor)
    assert after.table(["count"])["count"].tolist() == list(range(30, 60))
    assert len(year.search(sort="measured_at", cursor=hits.cursor).table(["count"])) == 335
    assert len(year.search(limit=None).table(["id"])) == 365
    assert year.search(limit=0).table(["count"]).shape == (0, 1)


def test_wrong_columns_are_query_errors(year):
    for columns in (["a", "a"], [""], ["x" * 600]):
        with pytest.raises(QueryError):
            year.search().table(columns)


def test_lines_are_the_table_as_text(year):
    lines = b"".join(year.search(sort="measured_at").lines(["count", "note"])).split(b"\r\n")
    assert lines[:3] == [b"count,note", b"0,warm", b"1,"]
    assert len(lines) == 365 + 2
    rows = b"".join(year.search(sort="measured_at", limit=2).lines(["count", "note"], "ndjson")).splitlines()
    assert rows == [b'{"count":0,"note":"warm"}', b'{"count":1,"note":null}']


def test_a_table_is_one_request_and_fetches_no_documents(server, monkeypatch):
    """Of 25 matches in pages of 10: one request for the first hits, one for the table."""
    monkeypatch.setattr("aq_data.client.datafile.PAGE", 10)
    with aq_data.connect(server) as client:
        client.save_many([{"metadata": {"i": i}} for i in range(25)])
        asked: list[httpx.Request] = []
        client._http.client.event_hooks["request"].append(asked.append)
        assert len(client.search(limit=None).table(["i"])) == 25
        assert [request.url.path for request in asked] == [SEARCH, SEARCH]
        hits = client.search(limit=None, sort="i")
        assert hits[12].metadata["i"] == 12
        assert len(asked) == 4, "two pages of three"
        assert (len(hits), len(asked)) == (25, 5)


def test_a_table_that_breaks_off_is_an_error_not_a_shorter_table(client, monkeypatch):
    """The database fails after the first page: by CSV, NDJSON and Arrow alike nobody takes the rest for everything."""
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.001)
    client.save_many([{"metadata": {"i": i}} for i in range(60)])
    search = Searching.search

    async def failing(self, request):
        if request.cursor is not None:
            raise StorageError("the disk is gone")
        return await search(self, request)

    hits = client.search()
    monkeypatch.setattr(Searching, "search", failing)
    for format in ("csv", "ndjson"):
        with pytest.raises(UnavailableError, match="broke"):
            list(hits.lines(["i"], format))
    with pytest.raises(StorageError, match="the disk is gone"):
        hits.table(["i"])
    monkeypatch.setattr("aq_data.client.tables.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="broke"):
        hits.table(["i"])


CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.floats(),
    st.complex_numbers(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8"), max_size=5),
    st.datetimes(timezones=st.just(UTC)),
    st.lists(st.integers(0, 9), max_size=2),
)
COLUMNS = st.one_of(*(st.lists(kind | st.none(), min_size=3, max_size=3) for kind in (st.booleans(), st.floats(), CELLS)))
COLUMNS |= st.lists(st.integers(-(2**63), 2**63 - 1) | st.none(), min_size=3, max_size=3)
COLUMNS |= st.lists(st.datetimes(timezones=st.just(UTC)) | st.none(), min_size=3, max_size=3)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("scratch")) as client:
        yield client


@given(columns=st.lists(COLUMNS, min_size=1, max_size=4))
def test_arrow_and_ndjson_give_the_same_table(scratch, columns):
    """Whatever the values: the same dtypes, values and missing ones; and what was saved is what stands in it."""
    chip = str(np.random.default_rng().integers(2**62))
    rows = [{f"c{k}": column[i] for k, column in enumerate(columns)} for i in range(3)]
    scratch.save_many([{"project": chip, "metadata": row} for row in rows])
    hits = scratch.search({"project": chip}, sort="created_at")
    names = list(rows[0])
    by_arrow = hits.table(names)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("aq_data.client.tables.importlib.util.find_spec", lambda name: None)
        by_lines = hits.table(names)
    pd.testing.assert_frame_equal(by_arrow, by_lines)
    for name in names:
        for row, cell in zip(rows, by_arrow[name], strict=True):
            saved = row[name]
            is_missing = saved is None or (isinstance(saved, float) and math.isnan(saved))
            assert (cell is None or cell is pd.NaT or cell is pd.NA or cell != cell) if is_missing else cell == saved


def test_a_text_in_place_of_columns_is_refused(client):
    """It would be a column for each of its letters."""
    hits = client.search()
    for ask in (lambda: hits.table("name"), lambda: list(hits.lines("name"))):
        with pytest.raises(ValidationError, match=r"\['name'\]"):
            ask()


def test_lines_left_half_read_keep_no_client_open(client, monkeypatch):
    """Long tables and short ones, held or closed: `close` waits for nobody who has stopped reading."""
    monkeypatch.setattr("aq_server.service.columns.FIRST_PAGE", 1)
    monkeypatch.setattr("aq_server.service.columns.PAGE_BYTES", 1)
    client.save_many([{"name": f"n{i}"} for i in range(40)])
    held = [client.search({}, limit=limit).lines(["name"]) for limit in (2, 40)]
    assert [next(lines) for lines in held] == [b"name\r\nn39\r\n"] * 2
    begun = time.monotonic()
    client.close()
    assert time.monotonic() - begun < 20
    for lines in held:
        lines.close()
