"""Snapshots of instruments are stored and indexed once, and nobody who asks can tell."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import sqlite3

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_suite import (
    SETTINGS,
    DurableMetadataStoreTests,
    changed,
    expected_ids,
    insert_all,
    of_instruments,
    pages,
    record,
    within,
)
from test_metadata_sqlite import plan_of

from aq_data.errors import QueryError
from aq_data.models import snapshots
from aq_data.models.paths import parse_path, parse_sort
from aq_data.models.query import parse_filter
from aq_data.storage.metadata import _order
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


VNA = [{}, {"a": 1}, {"a": "q3"}, *({"settings": one, "model": "T1"} for one in SETTINGS)]
dense = st.fixed_dictionaries(
    {
        "instruments": st.fixed_dictionaries({"vna": st.sampled_from(VNA)}, optional={"é": st.just({"a": [1, 2]})}),
        "comment": st.sampled_from(["", "flux", "vna power", "T1 of q3"]),
        "tags": st.sampled_from([[], ["q1"], ["q1", "q2"]]),
        "state": st.sampled_from(["complete", "deleted", "complete"]),
    }
)
"""Documents of which most have an instrument in common."""
texts = st.sampled_from(
    [{"$text": text} for text in ("vna", "flux", "vna flux", "t1 model", "power q3", "note absent", "t1 q3")]
)
likely = st.sampled_from(
    [
        {f"instruments.vna{path}": condition}
        for path, condition in [
            ("", {"a": 1}), (".a", 1), (".a", {"$gt": 0}), (".a", {"$exists": True}), (".a", {"$in": [1, "q3"]}), (".model", "T1"),
            (".model", {"$regex": "^T"}), (".settings.note", {"$regex": "x{110}"}), (".settings.list", {"$size": 3}),
            (".settings.power.value", {"$lt": "25 mK"}), (".settings.power.value", {"$gte": -30, "$lt": 20}),
            (".settings.power.value", {"$all": [1, 2]}), (".settings.list", {"$elemMatch": {"a": 1}}),
            (".settings.list", {"$elemMatch": {"$gte": 2}}), (".settings.power.value", {"$ne": -30}),
        ]
    ]
)  # fmt: skip
plain = st.sampled_from([{}, {"tags": "q1"}, {"tags": {"$ne": "q2"}}, {"comment": {"$regex": "^[Tv]"}}])
questions = st.recursive(
    likely | likely | of_instruments | texts | plain,
    lambda inner: (
        st.builds(lambda op, one, other: {op: [one, other]}, st.sampled_from(["$and", "$or", "$nor"]), inner, inner)
        | st.builds(lambda query: {"$not": query}, inner)
    ),
    max_leaves=3,
)
ASKED = ["tags", "instruments.vna.a", "instruments.vna.model", "instruments.vna.settings.power.value",
         "instruments.vna.settings.list.a", "created_at"]  # fmt: skip


async def answers(store, listed, asked):
    """Everything that can be asked of a store that has these records, before and after some are changed."""
    records = [record(number, **fields) for number, fields in enumerate(listed, 1)]
    await insert_all(store, records)
    found = []
    for turn in range(2):
        for query in asked:
            node = parse_filter(query)
            try:
                found.append((query, await store.count(node)))
                for path in ASKED:
                    found.append((path, await store.distinct(parse_path(path), node, 50)))
                    for sort, include_deleted in itertools.product((path, f"-{path}"), (False, True)):
                        page = await store.search(node, parse_sort(sort), 3, None, include_deleted)
                        found.append((query, sort, include_deleted, page.total, list(map(bytes, page.documents))))
                        if page.cursor:
                            page = await store.search(node, parse_sort(sort), 50, page.cursor, include_deleted)
                            found.append((query, sort, include_deleted, list(map(bytes, page.documents))))
            except QueryError as exc:
                found.append(str(exc))
        if turn == 0:
            for old, other in zip(records[::2], records[1::2], strict=False):
                fresh = changed(old, instruments=other.document.instruments, state=other.document.state)
                assert await store.replace(fresh, 1)
    return found


@pytest.mark.parametrize("planned", ["sort", "walk", "saving"])
@settings(max_examples=settings().max_examples // 4)
@given(listed=st.lists(dense, min_size=6, max_size=10), asked=st.lists(questions, min_size=5, max_size=7))
def test_whether_snapshots_are_shared_changes_no_answer(planned, listed, asked):
    """All, some or none: pages with tombstones, counts and distinct values are the same, also after changes."""
    found = []
    for least in (1, 60, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshots, "SNAPSHOT_BYTES", least)
            if planned == "saving":
                patch.setattr(_order, "EASY", 0)
            else:
                plan_of(planned, patch)()
            found.append(within(lambda _: SqliteStore(None), lambda store: answers(store, listed, asked)))
    assert found[0] == found[2]
    assert found[1] == found[2]


@pytest.mark.parametrize("query", [{"instruments.vna.a": 1}, {"$text": "found"}])
@pytest.mark.parametrize("text", ["created_at", "-created_at"])
def test_documents_and_snapshots_that_match_come_in_one_order(monkeypatch, query, text):
    """Also where the store would follow the order in which documents were saved."""
    monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 60)
    monkeypatch.setattr(_order, "EASY", 0)
    small, big = {"vna": {"a": 1}}, {"vna": {"a": 1, "note": "found " * 20}}
    records = [record(i, comment="found", instruments=big if i % 3 == 0 else small) for i in range(1, 40)]

    async def body(store):
        await insert_all(store, records)
        return await pages(store, query, parse_sort(text), 2)

    assert within(lambda _: SqliteStore(None), body) == expected_ids(records, query, parse_sort(text))


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
        assert await store.snapshots("default") == {hashlib.sha256(msgspec.json.encode(shared)).hexdigest()}

    async def change(store):
        for one in records:
            assert await store.replace(changed(one, instruments=other), 1)
            assert await store.get(one.document.id) == changed(one, instruments=other)
        assert await store.count(parse_filter({"instruments.vna.settings.power.value": -30})) == 5
        assert await store.snapshots("default") == {hashlib.sha256(msgspec.json.encode(other)).hexdigest()}

    async def empty(store):
        for one in records:
            assert await store.replace(changed(changed(one, instruments={}), instruments={}), 2)
        assert await store.count(parse_filter({"instruments.vna.model": {"$exists": True}})) == 0
        assert await store.count(parse_filter({"$text": "znb20"})) == 0
        assert await store.snapshots("default") == set()

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
