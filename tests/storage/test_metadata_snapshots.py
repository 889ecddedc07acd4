"""Snapshots of instruments are stored and indexed once, and nobody who asks can tell."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_suite import (
    EVERYTHING,
    PATHS,
    DurableMetadataStoreTests,
    changed,
    documents,
    filters,
    insert_all,
    of_instruments,
    record,
    within,
)
from test_metadata_sqlite import plan_of

from aq_data.errors import QueryError
from aq_data.models import snapshots
from aq_data.models.paths import parse_path, parse_sort
from aq_data.models.query import parse_filter
from aq_data.storage.metadata.sqlite import SqliteStore


class TestEverythingShared(DurableMetadataStoreTests):
    """The whole contract where also the smallest instruments are snapshots."""

    @pytest.fixture
    def open_store(self, tmp_path, monkeypatch):
        monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 1)
        return lambda name: SqliteStore(tmp_path / f"{name}.sqlite")

    @pytest.fixture(params=["sort", "in turns"])
    def plan(self, request, monkeypatch):
        return plan_of(request.param, monkeypatch)


# --- the same answers ------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(listed=st.lists(documents, min_size=1, max_size=8), query=of_instruments | filters)
def test_whether_snapshots_are_shared_changes_no_answer(tmp_path, listed, query):
    """Pages with tombstones, counts and distinct values are those of a store where every document is whole."""
    records = [record(**fields) for fields in listed]

    async def ask(store):
        await insert_all(store, records)
        answers = []
        for path in PATHS:
            answers.append(await store.distinct(parse_path(path), EVERYTHING, 50))
            try:
                answers.append(await store.distinct(parse_path(path), parse_filter(query), 50))
                for sign in ("", "-"):
                    page = await store.search(parse_filter(query), parse_sort(sign + path), 50, None, include_deleted=True)
                    answers.append([bytes(document) for document in page.documents])
            except QueryError as exc:
                answers.append(str(exc))
        return answers

    found = []
    for least in (1, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshots, "SNAPSHOT_BYTES", least)
            found.append(within(lambda _: SqliteStore(None), ask))
    assert found[0] == found[1]


# --- what it costs ---------------------------------------------------------------------------------------------------


def rows(path, question):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(question).fetchall()


def large(size=40_000, **changes):
    """Instruments of about `size` bytes of JSON."""
    settings = {f"setting_{i}": {"value": i / 7, "unit": "mV"} for i in range(size // 50)}
    return {"vna": {"model": "ZNB20", "settings": {**settings, **changes}}}


def test_a_snapshot_is_stored_and_indexed_once_and_gone_with_its_last_record(open_store, tmp_path):
    """Nothing of it is left: neither rows nor terms nor words."""
    shared, other = large(), large(power={"value": -30, "unit": "dBm"})
    records = [record(name=f"n{i}", instruments=shared) for i in range(5)]
    path = tmp_path / "one.sqlite"

    async def save(store):
        await insert_all(store, records)
        assert await store.count(parse_filter({"instruments.vna.model": "ZNB20", "$text": "n3 znb20"})) == 1
        assert await store.snapshots() == {hashlib.sha256(msgspec.json.encode(shared)).hexdigest()}

    async def change(store):
        for one in records:
            assert await store.replace(changed(one, instruments=other), 1)
            assert await store.get(one.document.id) == changed(one, instruments=other)
        assert await store.count(parse_filter({"instruments.vna.settings.power.value": -30})) == 5
        assert await store.snapshots() == {hashlib.sha256(msgspec.json.encode(other)).hexdigest()}

    async def empty(store):
        for one in records:
            assert await store.replace(changed(changed(one, instruments={}), instruments={}), 2)
        assert await store.count(parse_filter({"instruments.vna.model": {"$exists": True}})) == 0
        assert await store.count(parse_filter({"$text": "znb20"})) == 0
        assert await store.snapshots() == set()

    within(open_store, save)
    assert rows(path, "SELECT count(*) FROM snapshots") == [(1,)]
    assert rows(path, "SELECT count(DISTINCT d) FROM terms WHERE d<0") == [(1,)]
    assert rows(path, "SELECT count(*) FROM terms WHERE d>0")[0][0] < 5 * 60
    within(open_store, change)
    assert rows(path, "SELECT count(*) FROM snapshots") == [(1,)]
    within(open_store, empty)
    for table in ("snapshots", "terms WHERE d<0", "facts WHERE d<0", "words WHERE words MATCH 'znb20'"):
        assert rows(path, f"SELECT count(*) FROM {table}") == [(0,)], table


def test_small_instruments_stay_in_their_document(open_store, tmp_path):
    """No row, no look-up, no shared path is made for them."""

    async def body(store):
        await insert_all(store, [record(instruments=large(8_000)) for _ in range(3)])
        assert await store.count(parse_filter({"instruments.vna.model": "ZNB20"})) == 3

    within(open_store, body)
    found = rows(tmp_path / "one.sqlite", "SELECT (SELECT count(*) FROM snapshots), (SELECT sum(shared) FROM paths)")
    assert found == [(0, 0)]


def test_a_snapshot_read_by_another_store_of_the_database_is_indexed_once(open_store):
    """Stores that index at once, one of them what the other saved, agree."""
    shared = large()
    records = [record(name=f"n{i}", instruments=shared) for i in range(20)]

    async def body(one):
        other = open_store("one")
        try:
            stores = (one, other)
            await asyncio.gather(*(stores[i % 2].insert(each) for i, each in enumerate(records)))
            counted = await asyncio.gather(
                *(s.count(parse_filter({"instruments.vna.settings.setting_7.value": 1})) for s in stores)
            )
            assert counted == [20, 20]
        finally:
            await other.close()

    within(open_store, body)


@pytest.fixture
def open_store(tmp_path):
    return lambda name: SqliteStore(tmp_path / f"{name}.sqlite")
