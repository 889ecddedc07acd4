"""MongoDB stores large instruments once, and nobody who asks can tell; what no record has goes, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import zlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_suite import (
    DurableMetadataStoreTests,
    changed,
    expected_ids,
    insert_all,
    pages,
    record,
    within,
)
from test_metadata_mongo import _never
from test_metadata_snapshots import answers, dense, large, questions

from aq_data.errors import CorruptionError, QueryError, TooLargeError
from aq_data.models import snapshots
from aq_data.models.paths import parse_sort
from aq_data.models.query import parse_filter
from aq_data.models.stores import DEFAULT_STORE
from aq_data.storage.metadata import _mongo_lookups, _mongo_questions, _mongo_snapshots
from aq_data.storage.metadata._mongo_records import SCHEMA_VERSION
from aq_data.storage.metadata.cursors import Cursor, mark_of
from aq_data.storage.metadata.mongo import MongoStore
from aq_data.storage.metadata.sqlite import SqliteStore

pytestmark = pytest.mark.services

BY_TIME = parse_sort("-created_at")


class TestEverythingShared(DurableMetadataStoreTests):
    """The whole contract where also the smallest instruments are snapshots; once with more of them than a filter names."""

    @pytest.fixture
    def open_store(self, mongo, mongo_room, monkeypatch):
        monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 1)
        opened = ["one"]

        def open_store(name):
            if name != opened[-1]:
                mongo_room.clear()
                opened.append(name)
            return MongoStore(mongo, mongo_room.name)

        return open_store

    @pytest.fixture(params=["sort", "walk", "judge"])
    def plan(self, request, monkeypatch):
        if request.param == "walk":
            monkeypatch.setattr(_mongo_questions.Questions, "_is_near", _never)
        if request.param == "judge":
            monkeypatch.setattr(_mongo_lookups, "MANY", 0)
        return lambda: None


# --- the same answers ----------------------------------------------------------------------------------------------------


@settings(max_examples=max(2, settings().max_examples // 30))
@given(
    many=st.sampled_from([5000, 1, 0]),
    listed=st.lists(dense, min_size=6, max_size=10),
    asked=st.lists(questions, min_size=2, max_size=3),
)
def test_whether_mongodb_shares_snapshots_changes_no_answer(mongo, mongo_room, many, listed, asked):
    """All, some or none: pages with tombstones, counts and distinct values are those of SQLite, also after changes."""
    found = []
    for least in (1, 60, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshots, "SNAPSHOT_BYTES", least)
            patch.setattr(_mongo_lookups, "MANY", many)
            mongo_room.clear()
            found.append(within(lambda _: MongoStore(mongo, mongo_room.name), lambda store: answers(store, listed, asked)))
    sqlite = within(lambda _: SqliteStore(None), lambda store: answers(store, listed, asked))
    assert found[0] == sqlite
    assert found[1] == sqlite
    assert found[2] == sqlite


def test_records_of_an_older_version_are_found_beside_those_that_refer_to_a_snapshot(open_store, behind, monkeypatch):
    """They are whole until they are changed; every question sees both."""
    before = [record(name=f"n{i}", instruments=large(power={"value": i, "unit": "mK"})) for i in range(4)]
    after = [record(name=f"n{i}", instruments=large(power={"value": i, "unit": "mK"})) for i in range(4)]
    path = "instruments.vna.settings.power.value"

    async def save_old(store):
        monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 1 << 30)
        await insert_all(store, before)

    async def body(store):
        monkeypatch.undo()
        await insert_all(store, after)
        everything = [*before, *after]
        assert [one async for one in store.scan()] == sorted(everything, key=lambda one: one.document.id)
        for query in ({path: {"$gte": 2}}, {path: {"$lt": "2 mK"}}, {"$text": "znb20 n3"}, {path: {"$ne": 1}}, {}):
            for text in ("name", f"-{path}"):
                sort = parse_sort(text)
                assert await pages(store, query, sort, 3) == expected_ids(everything, query, sort), (query, text)
        assert dict(await store.distinct(path, parse_filter({}), 9)) == dict.fromkeys(range(4), 2)
        assert len(await store.snapshots(DEFAULT_STORE)) == 4
        again = changed(before[0], comment="good")
        assert await store.replace(again, 1)
        assert await store.get(again.document.id) == again

    within(open_store, save_old)
    behind["meta"].update_one({"_id": "schema"}, {"$set": {"version": 1}})
    assert behind["snapshots"].estimated_document_count() == 0
    within(open_store, body)
    assert behind["snapshots"].count_documents({}) == 4
    assert behind["datafiles"].count_documents({"snapshot": {"$exists": True}}) == 5
    assert behind["meta"].find_one({"_id": "schema"})["version"] == SCHEMA_VERSION


@pytest.mark.parametrize("times", [1, 100])
def test_a_snapshot_that_came_after_it_was_asked_for_does_not_make_its_record_match(open_store, monkeypatch, times):
    """A record may be found because its snapshot does not match: that is asked again when one came meanwhile."""
    path = "instruments.vna.settings.power.value"
    original = _mongo_lookups.Lookups._found
    arriving = itertools.count(1)

    async def body(store):
        await store.insert(record(name=f"{times}", instruments=large(power={"value": 0, "unit": "mK"})))

        async def found(self, parts, seconds):
            shared = await original(self, parts, seconds)
            if (number := next(arriving)) <= times:
                await store.insert(
                    record(name=f"{times}", instruments=large(power={"value": 1, "unit": "mK"}, number=number))
                )
            return shared

        monkeypatch.setattr(_mongo_lookups.Lookups, "_found", found)
        page = await store.search(parse_filter({path: {"$ne": 1}, "name": f"{times}"}), BY_TIME, 100, None)
        monkeypatch.undo()
        assert (page.total, len(page.documents)) == (1, 1)

    within(open_store, body)


def test_a_forged_cursor_of_a_path_in_snapshots_is_refused(open_store):
    """Its value is of another kind than its rank says."""
    sort = parse_sort("instruments.vna.settings.power.value")

    async def body(store):
        await insert_all(store, [record(instruments=large(power={"value": i})) for i in range(4)])
        page = await store.search(parse_filter({}), sort, 2, None)
        mark = mark_of(parse_filter({}), False)
        good = Cursor.decode(page.cursor, sort, mark, str)
        forged = Cursor((good.key[0], "text"), good.tie, good.total, good.total_is_exact).encode(sort, mark)
        with pytest.raises(QueryError) as caught:
            await store.search(parse_filter({}), sort, 2, forged)
        assert caught.value.code == "bad_cursor"

    within(open_store, body)


def test_a_question_that_judges_for_too_long_is_refused(open_store, monkeypatch):
    """More snapshots match than a filter names, and their records are looked at one by one until the time is over."""
    monkeypatch.setattr(_mongo_lookups, "MANY", 0)
    monkeypatch.setattr(_mongo_questions, "QUERY_SECONDS", 0.0011)

    async def body(store):
        await insert_all(store, [record(instruments=large()) for _ in range(3)])
        with pytest.raises(QueryError, match="took longer"):
            for _ in range(50):
                await store.count(parse_filter({"instruments.vna.model": "ZNB20"}))

    within(open_store, body)


# --- what it costs, and what goes ----------------------------------------------------------------------------------------


def test_a_snapshot_is_stored_once_and_goes_when_no_record_has_it(open_store, behind):
    """Tombstones have it too; what is collected is what no record refers to."""
    shared, other = large(), large(power={"value": -30, "unit": "dBm"})
    records = [record(name=f"n{i}", instruments=shared) for i in range(5)]
    digest = hashlib.sha256(msgspec.json.encode(shared)).hexdigest()

    async def body(store):
        async def collected(older_than=0.0, delete=True):
            return [left.key async for left in store.leftovers(older_than, delete)]

        await insert_all(store, records)
        assert await store.count(parse_filter({"instruments.vna.model": "ZNB20", "$text": "n3 znb20"})) == 1
        assert await store.snapshots(DEFAULT_STORE) == {digest}
        [row] = behind["snapshots"].find()
        assert (row["_id"], zlib.decompress(row["content"])) == (digest, msgspec.json.encode(shared))
        assert all(len(row["t"]) < 60 for row in behind["datafiles"].find())
        for one in records[:4]:
            assert await store.replace(changed(one, instruments=other), 1)
        assert await store.replace(changed(records[4], state="deleted"), 1)
        assert await collected() == []
        assert await store.replace(changed(changed(records[4]), instruments={}), 2)
        assert await collected(older_than=60.0) == []
        assert await collected(delete=False) == [f"snapshots/{digest}"]
        assert await collected() == [f"snapshots/{digest}"]
        assert await store.count(parse_filter({"instruments.vna.settings.power.value": -30})) == 4
        assert [await store.get(one.document.id) for one in records[:4]] == [
            changed(o, instruments=other) for o in records[:4]
        ]

    within(open_store, body)
    assert behind["snapshots"].count_documents({}) == 1


def test_a_change_of_something_else_neither_claims_nor_puts_the_snapshot_again(open_store, behind, monkeypatch):
    """Its record has it, so it stays."""

    async def body(store):
        one = record(instruments=large(), pid="lab/1")
        await store.insert(one)
        monkeypatch.setattr(_mongo_snapshots.Snapshots, "put", None)
        monkeypatch.setattr(type(store), "mark", None)
        for number in range(3):
            new = changed(one, comment=f"look {number}")
            assert await store.replace(new, one.document.revision)
            one = new
        assert await store.get(one.document.id) == one

    within(open_store, body)


async def _about_to_have(store, shared, way):
    """A record, to be inserted or to replace a small one, with a snapshot that no record has any more."""
    first, small = record(instruments=shared), record()
    await insert_all(store, [first, small])
    await store.replace(changed(first, instruments={}), 1)
    return record(instruments=shared) if way == "insert" else changed(small, instruments=shared)


async def _left(store):
    return [left async for left in store.leftovers(0.0, True)]


@pytest.mark.parametrize("step", ["find", "mark", "holders", "delete"])
@pytest.mark.parametrize("way", ["insert", "replace"])
def test_a_snapshot_that_a_record_comes_to_have_while_it_is_collected_stays(open_store, monkeypatch, step, way):
    """The record is saved whole between any two steps of `gc`."""
    shared = large()

    async def body(store):
        other = open_store("one")
        fresh = await _about_to_have(store, shared, way)

        async def save():
            assert await (other.insert(fresh) if way == "insert" else other.replace(fresh, 1)) in (None, True)

        names = {"find": "find", "mark": "update_one", "holders": "find", "delete": "find_one_and_delete"}
        collection = await store.collection("datafiles" if step == "holders" else "snapshots")
        method = getattr(type(collection), names[step])
        done = []

        def between(self, *arguments, **options):
            if done or self.name != collection.name or self.database.client is not collection.database.client:
                return method(self, *arguments, **options)
            done.append(True)
            if step in ("find", "holders"):
                return _After(save, lambda: method(self, *arguments, **options))

            async def then():
                await save()
                return await method(self, *arguments, **options)

            return then()

        monkeypatch.setattr(type(collection), names[step], between)
        await _left(store)
        assert done
        assert await other.get(fresh.document.id) == fresh
        assert await store.count(parse_filter({"instruments.vna.model": "ZNB20"})) == 1
        await other.close()

    within(open_store, body)


class _After:
    """A cursor that is made after something was done."""

    def __init__(self, act, make):
        self._act, self._make = act, make

    async def to_list(self):
        await self._act()
        return await self._make().to_list()

    async def __aiter__(self):
        await self._act()
        async for row in self._make():
            yield row


@pytest.mark.parametrize("way", ["insert", "replace"])
@pytest.mark.parametrize("step", ["put", "update_one"])
def test_a_save_whose_snapshot_is_collected_under_it_puts_it_again(open_store, monkeypatch, way, step):
    """`gc` runs whole between any two steps of the save; with what the save left when it is not published."""
    shared = large()

    async def body(store):
        other = open_store("one")
        fresh = await _about_to_have(store, shared, way)
        ran = []
        original = _mongo_snapshots.Snapshots.put

        async def put(self, snapshot):
            is_mine = self is store._snapshots and not ran
            if is_mine and step == "put":
                ran.append(True)
                await _left(other)
            await original(self, snapshot)
            if is_mine and not ran:
                ran.append(True)
                assert [left.key for left in await _left(other)] == [f"snapshots/{snapshot.hash}"]

        monkeypatch.setattr(_mongo_snapshots.Snapshots, "put", put)
        assert await (store.insert(fresh) if way == "insert" else store.replace(fresh, 1)) in (None, True)
        assert ran
        assert await other.get(fresh.document.id) == fresh
        assert await _left(other) == []
        await other.close()

    within(open_store, body)


def test_saves_and_collections_at_once_lose_no_snapshot(open_store):
    """Whatever is acknowledged can be read, however often what nobody has is removed meanwhile."""

    async def body(store):
        other = open_store("one")
        stop = False

        async def collect():
            while not stop:
                await _left(other)

        async def save(mark):
            for number in range(12):
                one = record(instruments=large(20_000, number=number % 3))
                assert await store.insert(one) is None
                assert await store.get(one.document.id) == one
                assert await store.replace(changed(one, instruments={}), 1)

        collecting = asyncio.create_task(collect())
        try:
            await asyncio.gather(*(save(mark) for mark in "abc"))
        finally:
            stop = True
            await collecting
            await _left(other)
            used = await store.snapshots(DEFAULT_STORE)
            await other.close()
        assert used == set()
        assert await store.count(parse_filter({"instruments.vna.model": {"$exists": True}})) == 0

    within(open_store, body)


def test_a_record_without_its_snapshot_is_corrupt_and_says_which(open_store, behind):
    """Somebody deleted it by hand; half a document is not passed off as the whole."""

    async def save(store):
        one = record(name="n", instruments=large())
        await store.insert(one)
        return one.document.id

    async def body(store):
        with pytest.raises(CorruptionError, match=r"snapshot [0-9a-f]{64}"):
            await store.get(id)
        with pytest.raises(CorruptionError):
            await store.search(parse_filter({"name": "n"}), BY_TIME, 1, None)

    id = within(open_store, save)
    behind["snapshots"].delete_many({})
    within(open_store, body)


def test_instruments_that_mongodb_cannot_hold_are_too_large_and_nothing_is_left(open_store, behind):
    """The client is told how much it takes, and what to do."""

    async def body(store):
        with pytest.raises(TooLargeError, match="the instruments have"):
            await store.insert(record(instruments={"vna": {"program": "x" * (17 << 20)}}))
        assert await store.count(parse_filter({})) == 0
        assert await store.snapshots(DEFAULT_STORE) == set()

    within(open_store, body)
    assert behind["snapshots"].count_documents({}) == 0
