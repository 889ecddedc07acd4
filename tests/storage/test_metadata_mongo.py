"""MongoDB keeps the contract of a metadata store, lets no error of its own out, and answers by its indexes."""

from __future__ import annotations

import asyncio
import inspect
import random
import time
import uuid
from contextlib import contextmanager

import bson.errors
import pymongo
import pymongo.errors
import pymongo.monitoring
import pytest
from metadata_suite import (
    EVERYTHING,
    DurableMetadataStoreTests,
    changed,
    expected_ids,
    ids_of,
    insert_all,
    pages,
    record,
    within,
)
from pymongo.asynchronous.collection import AsyncCollection

from aq_data.errors import AqDataError, ConfigError, QueryError, StorageError, TooLargeError, UnavailableError
from aq_data.models.paths import parse_sort
from aq_data.models.query import parse_filter
from aq_data.storage.metadata import _mongo_border, _mongo_questions, _mongo_records, _mongo_schema, _mongo_times, _mql
from aq_data.storage.metadata import mongo as mongo_module
from aq_data.storage.metadata._mongo_border import border, translate
from aq_data.storage.metadata._mongo_records import DAYS_INDEX, SCHEMA_VERSION, TERMS_INDEX, TIME_INDEX, created_of
from aq_data.storage.metadata.mongo import MongoStore


@pytest.mark.services
class TestMongo(DurableMetadataStoreTests):
    """One database, to which any number of stores may be open."""

    @pytest.fixture
    def open_store(self, mongo, mongo_room):
        opened = ["one"]

        def open_store(name):
            if name != opened[-1]:  # the next example of many
                mongo_room.clear()
                opened.append(name)
            return MongoStore(mongo, mongo_room.name)

        return open_store

    @pytest.fixture(params=["sort", "walk", "days"])
    def plan(self, request, monkeypatch):
        if request.param == "walk":
            monkeypatch.setattr(_mongo_questions.Questions, "_is_near", _never)
        if request.param == "days":
            monkeypatch.setattr(_mongo_questions, "MOMENTS", 0)
        return lambda: None


async def _never(*_):
    return False


async def _out_of_time(*_):
    raise pymongo.errors.ExecutionTimeout("as if it took long", 50)


# --- order, totals, size ---------------------------------------------------------------------------------------------------


@pytest.mark.services
@pytest.mark.parametrize("text", ["name", "-created_at", "absent"])
def test_equals_are_ordered_by_time_of_saving_and_then_by_id(open_store, text):
    """Whatever the order in which they came, as several servers may send them."""
    times = ["2026-01-31T08:00:00.000002Z", "2026-01-31T08:00:00.000001Z", "2026-01-31T08:00:00.000001Z"]
    records = [record(900 - i, name="x", created_at=created) for i, created in enumerate(times)]
    expected = [records[2], records[1], records[0]]

    async def body(store):
        await insert_all(store, records)
        found = await pages(store, {}, parse_sort(text), 1)
        assert found == [one.document.id for one in (expected[::-1] if text.startswith("-") else expected)]
        assert [one async for one in store.scan()] == expected

    within(open_store, body)


@pytest.mark.services
def test_totals_are_exact_up_to_the_limit_and_said_to_be_inexact_beyond(open_store, monkeypatch):
    """Counting goes no further, `count` does."""
    monkeypatch.setattr(_mongo_questions, "EXACT_TOTAL", 10)

    async def body(store):
        for count, total, is_exact in [(9, 9, True), (10, 10, True), (11, 10, False), (12, 10, False)]:
            await insert_all(store, [record(name="x") for _ in range(count - await store.count(EVERYTHING))])
            for query in ({"name": "x"}, {}, {"tags": {"$not": {"$elemMatch": {"$eq": "x"}}}}):
                page = await store.search(parse_filter(query), parse_sort("id"), 3, None)
                assert (page.total, page.total_is_exact) == (total, is_exact), query
                assert await store.count(parse_filter(query)) == count

    within(open_store, body)


@pytest.mark.services
@pytest.mark.parametrize(("buried", "total"), [(0, (10, False)), (9, (10, False)), (25, (6, True)), (21, (10, True))])
def test_the_total_of_everything_is_right_whether_it_is_counted_or_not(open_store, monkeypatch, buried, total):
    """Also where many are deleted, or where ids were barred before there was a record."""
    monkeypatch.setattr(_mongo_questions, "EXACT_TOTAL", 10)

    async def body(store):
        records = [record(name="x") for _ in range(31)]
        await insert_all(store, records)
        for one in records[:buried]:
            assert await store.replace(changed(one, state="deleted"), 1)
        await store.bar(record().document.id, "key")
        page = await store.search(EVERYTHING, parse_sort("-created_at"), 3, None)
        assert (page.total, page.total_is_exact) == total
        assert len(page.documents) == 3
        everything = await store.search(EVERYTHING, parse_sort("-created_at"), 3, None, include_deleted=True)
        assert everything.total == 10

    within(open_store, body)


@pytest.mark.services
def test_a_walk_that_finds_nothing_near_sorts_what_matches(open_store, monkeypatch):
    """Those that match stand at the far end: the answer is the same, and the walk ends at its time."""
    monkeypatch.setattr(_mongo_questions, "SORTED_ANYWAY", 0)
    walks = []

    async def first(self, asked, pipeline, limit, seconds=None, index=None):
        if index is not None:
            walks.append(index)
            raise pymongo.errors.ExecutionTimeout("as if it took too long", 50)
        async for row in original(self, asked, pipeline, limit, seconds, index):
            yield row

    original = _mongo_questions.Questions._first
    monkeypatch.setattr(_mongo_questions.Questions, "_first", first)
    records = [record(name=f"n{i}", metadata={"chip": "C1" if i < 20 else "C2"}) for i in range(40)]

    async def body(store):
        await insert_all(store, records)
        sort = parse_sort("-name")
        page = await store.search(parse_filter({"chip": "C1"}), sort, 3, None)
        assert ids_of(page) == expected_ids(records, {"chip": "C1"}, sort)[:3]
        assert walks == ["name"]

    within(open_store, body)


@pytest.mark.services
def test_a_question_that_takes_too_long_is_the_questions_fault(open_store, monkeypatch):
    """It is a 400 that says how to narrow it, not a failure of the database."""
    monkeypatch.setattr(_mongo_questions, "QUERY_SECONDS", 0.001)

    async def body(store):
        await insert_all(store, [record(metadata={"text": "a" * 90, "n": i}) for i in range(300)])
        with pytest.raises(QueryError, match="took longer"):
            for _ in range(50):
                await store.count(parse_filter({"$nor": [{"text": {"$regex": "(a?){60}b"}}]}))

    within(open_store, body)


@pytest.mark.services
def test_one_document_with_many_texts_ends_with_its_time(open_store, monkeypatch):
    """It would take ten seconds and more to judge it. Others are answered meanwhile."""
    text = "".join(random.Random(1).choices("abcdefghijklmnopqrst", k=75_000))
    slow = {"a": {"$not": {"$elemMatch": {"$regex": "(?s)[a-q][^u-z]{300}x"}}}}

    async def body(store):
        await store.insert(record(metadata={"a": [f"{text}{i}" for i in range(100)]}))
        monkeypatch.setattr(_mongo_questions, "QUERY_SECONDS", 1.0)
        began = time.monotonic()
        asked = asyncio.create_task(store.count(parse_filter(slow)))
        answered = 0
        while not asked.done():
            assert await store.count(parse_filter({"name": "absent"})) == 0
            answered += 1
        with pytest.raises(QueryError, match="took longer than 1 s"):
            await asked
        assert time.monotonic() - began < 5
        assert answered > 1

    within(open_store, body)


@pytest.mark.services
def test_a_document_that_mongodb_cannot_hold_is_too_large_and_harms_nothing(open_store):
    """The client is told what to do with it."""

    async def body(store):
        with pytest.raises(TooLargeError, match="as attached files"):
            await store.insert(record(metadata={"program": "x" * (17 << 20)}))
        one = record()
        await store.insert(one)
        with pytest.raises(TooLargeError):
            await store.replace(changed(one, metadata={"program": "x" * (17 << 20)}), 1)
        assert await store.get(one.document.id) == one

    within(open_store, body)


@pytest.mark.services
@pytest.mark.parametrize("versions", [{"version": 99, "format": 1}, {"version": 1, "format": 99}], ids=str)
def test_a_database_of_a_newer_version_is_refused(open_store, behind, versions):
    """Whoever made it knows how to read it."""
    behind["meta"].insert_one({"_id": "schema", **versions})
    with pytest.raises(ConfigError, match="99"):
        within(open_store, lambda store: store.count(EVERYTHING))


BY_TIME = ["created_at", "-created_at"]


DAYS = ["1969-12-30", "1969-12-31", "1970-01-01", "2026-01-31", "2026-02-03"]


@pytest.mark.services
@pytest.mark.parametrize("are_many", [False, True, "dense", "far away"], ids=["few", "many", "dense", "far away"])
@pytest.mark.parametrize("text", BY_TIME)
@pytest.mark.parametrize(
    "query",
    [
        {"chip": "C1"},
        {"chip": {"$in": ["C1", "C2"]}},
        {"power": {"$gte": 7}},
        {"power": {"$gt": 7, "$lte": 41.5}},
        {"log": 3},
        {"log": {"$gt": 3}},
        {"log": {"$gte": 3, "$lt": 2}},
        {"at": {"$lt": {"$date": "2026-02-01"}}},
        {"bath.value": {"$lt": "40 mK"}},
        {"$text": "n1"},
        {"chip": "C1", "power": {"$lt": 50}},
        {"chip": "C2", "power": {"$gte": 9}},
    ],
    ids=str,
)
def test_pages_by_time_are_whole_where_many_are_of_one_moment(open_store, monkeypatch, query, text, are_many):
    """The index has the time, and what is of the same microsecond in no order: of one value, of several, of a range.

    Of many in a range it has the days, of which some have several moments, unless one has very many or is far away.
    """
    monkeypatch.setattr(_mongo_questions, "SORTED_ANYWAY", 1_000)
    if are_many:
        monkeypatch.setattr(_mongo_questions, "MOMENTS", 5)
    if are_many == "dense":
        monkeypatch.setattr(_mongo_times, "DENSE", 5)
    if are_many == "far away":
        monkeypatch.setattr(_mongo_times.ByTime, "_keys", _out_of_time)
    records = [
        record(
            number,
            name=f"n{number}",
            created_at=f"{DAYS[number % 5]}T{number % 2:02}:00:00.00000{number * 7 % 5}Z",
            metadata={
                "chip": f"C{number % 3}",
                "power": number,
                "log": [number % 9, number % 4],
                "at": {"$date": f"2026-{number % 4 + 1:02}-01"},
                "bath": {"value": number, "unit": "mK"},
            },
        )
        for number in range(60)
    ]

    async def body(store):
        await insert_all(store, records)
        sort = parse_sort(text)
        expected = expected_ids(records, query, sort)
        assert len(expected) > 9
        for limit in (1, 4, 7, 100):
            assert await pages(store, query, sort, limit) == expected

    within(open_store, body)


@pytest.mark.services
@pytest.mark.parametrize("text", BY_TIME)
def test_every_page_of_a_range_is_read_by_the_days_it_is_of(open_store, monkeypatch, text):
    """Not the first one alone: what the others fall back to would answer the same, and take long."""
    monkeypatch.setattr(_mongo_questions, "MOMENTS", 5)
    real, answers = _mongo_times.ByTime.of_range, []

    async def of_range(*more):
        answers.append(await real(*more))
        return answers[-1]

    monkeypatch.setattr(_mongo_times.ByTime, "of_range", of_range)
    records = [
        record(number, created_at=f"{DAYS[number % 5]}T08:00:00.{number // 3:06}Z", metadata={"power": number})
        for number in range(60)
    ]

    async def body(store):
        await insert_all(store, records)
        query, sort = {"power": {"$gte": 7}}, parse_sort(text)
        assert await pages(store, query, sort, 7) == expected_ids(records, query, sort)

    within(open_store, body)
    assert [len(rows) for rows in answers] == [8] * 7 + [4]


@pytest.mark.services
def test_what_is_found_by_too_many_numbers_can_still_be_deleted(open_store, behind):
    """A document that an older version took: a tombstone is found by none of them."""
    monkey = pytest.MonkeyPatch()
    one = record(metadata={f"k{i}": i for i in range(20_000)})

    async def body(store):
        await store.insert(one)
        with monkey.context() as patched:
            patched.setattr(_mongo_records, "INDEXED_KEYS", 30_000)
            with pytest.raises(TooLargeError):
                await store.replace(changed(one, starred=True), 1)
            assert await store.replace(changed(one, state="deleted"), 1)

    within(open_store, body)
    assert not {"t", "n", "d"} & behind["datafiles"].find_one().keys()


def _as_version_3(behind):
    """What an older aq-data left: no days, and numbers once."""
    behind["datafiles"].update_many({}, {"$unset": {"d": "", "n": ""}})
    behind["datafiles"].drop_index(DAYS_INDEX)
    behind["meta"].update_one({"_id": "schema"}, {"$set": {"version": 3}})


def _as_version_2(behind):
    """What a still older one left: no time but that in the order of saving, and other indexes."""
    _as_version_3(behind)
    datafiles = behind["datafiles"]
    datafiles.update_many({}, {"$unset": {"c": ""}})
    for name in (TERMS_INDEX, TIME_INDEX):
        datafiles.drop_index(name)
    datafiles.create_index([("t.$**", 1)], name="terms")
    datafiles.create_index([("deleted", 1), ("o", 1)], name="created_at")
    behind["meta"].update_one({"_id": "schema"}, {"$set": {"version": 2}})


@pytest.mark.services
def test_a_database_of_version_2_is_dated_when_it_is_opened(open_store, behind, monkeypatch):
    """Also one that a server left in the middle of it; tombstones, and documents of nothing but what is barred, too."""
    monkeypatch.setattr(_mongo_schema, "BATCH", 7)
    records = [record(metadata={"chip": "C1"}) for _ in range(30)]

    async def save(store):
        await insert_all(store, records)
        assert await store.replace(changed(records[0], state="deleted"), 1)
        await store.bar(record().document.id, "key")

    async def look(store):
        sort = parse_sort("-created_at")
        assert await pages(store, {"chip": "C1"}, sort, 7) == expected_ids(records[1:], {"chip": "C1"}, sort)
        assert len([one async for one in store.scan()]) == 30

    within(open_store, save)
    _as_version_2(behind)
    last = behind["datafiles"].find_one({"_id": records[5].document.id})
    behind["datafiles"].update_one({"_id": last["_id"]}, {"$set": {"c": created_of(last["o"])}})
    within(open_store, look)
    assert behind["datafiles"].count_documents({"c": {"$exists": True}}) == 30
    assert {TERMS_INDEX, TIME_INDEX} <= set(behind["datafiles"].index_information())
    assert not {"terms", "created_at"} & set(behind["datafiles"].index_information())
    assert behind["meta"].find_one({"_id": "schema"})["version"] == SCHEMA_VERSION


@pytest.mark.services
def test_a_database_of_version_3_is_given_its_days_and_numbers_when_it_is_opened(open_store, behind, monkeypatch):
    """As a save gives them, and also where a server left in the middle of it."""
    monkeypatch.setattr(_mongo_schema, "BATCH", 7)
    monkeypatch.setattr(_mongo_questions, "MOMENTS", 0)
    records = [
        record(
            number,
            created_at=f"{[*DAYS, '9999-12-31'][number % 6]}T23:59:59.99999{number % 10}Z",
            metadata={
                "a": number,
                "log": [number, 2.5, -number],
                "ok": True,
                "bath": {"value": number, "unit": "mK"},
                "gain": [{"value": 0, "unit": "Ym**12/ym**12"}, {"value": number, "unit": "percent"}],  # 0 times infinity
            },
        )
        for number in range(30)
    ]

    async def save(store):
        await insert_all(store, records)
        assert await store.replace(changed(records[0], state="deleted"), 1)
        await store.bar(record().document.id, "key")

    async def look(store):
        sort = parse_sort("-created_at")
        for query in (
            {"a": {"$gt": 3}},
            {"log": {"$lt": -4}},
            {"bath.value": {"$gte": "11 mK"}},
            {"gain.value": {"$lt": "20 percent"}},
        ):
            assert await pages(store, query, sort, 7) == expected_ids(records[1:], query, sort)

    def kept():
        return {row["_id"]: row for row in behind["datafiles"].find()}

    within(open_store, save)
    saved = kept()
    _as_version_3(behind)
    one = records[5].document.id
    behind["datafiles"].update_one({"_id": one}, {"$set": {"d": saved[one]["d"], "n": saved[one]["n"]}})
    within(open_store, look)
    for id, row in kept().items():
        assert row.get("d") == saved[id].get("d")
        assert row.get("n", {}).items() >= saved[id].get("n", {}).items()
    assert DAYS_INDEX in behind["datafiles"].index_information()
    assert behind["meta"].find_one({"_id": "schema"})["version"] == SCHEMA_VERSION


@pytest.mark.services
def test_whoever_asks_while_indexes_are_built_is_told_to_come_again(open_store, monkeypatch):
    """Over many records they take minutes: they are asked for until they are there, and nobody waits for ever."""
    real, timeouts, ready = AsyncCollection.create_indexes, 2, asyncio.Event()

    async def create(self, models, *more, **options):
        nonlocal timeouts
        if self.name == "datafiles" and timeouts:
            timeouts -= 1
            raise pymongo.errors.NetworkTimeout("as if it took long")
        await ready.wait()
        return await real(self, models, *more, **options)

    monkeypatch.setattr(AsyncCollection, "create_indexes", create)
    monkeypatch.setattr(mongo_module, "OPEN_SECONDS", 0.05)

    async def body(store):
        for _ in range(2):
            with pytest.raises(UnavailableError, match="made ready"):
                await store.count(EVERYTHING)
        ready.set()
        monkeypatch.setattr(mongo_module, "OPEN_SECONDS", 20.0)
        assert await store.count(EVERYTHING) == 0
        assert timeouts == 0

    within(open_store, body)


# --- indexes ---------------------------------------------------------------------------------------------------------------


def stages(plan):
    """Names of the stages of an explained plan, with the index of each scan."""
    found = [(plan["stage"], plan.get("indexName"))] if "stage" in plan else []
    for key in ("inputStage", "queryPlan", "winningPlan", "queryPlanner", "$cursor"):
        found += stages(plan[key]) if isinstance(plan.get(key), dict) else []
    for key in ("inputStages", "stages"):
        found += [stage for one in plan.get(key, ()) for stage in stages(one)]
    return found


class _Commands(pymongo.monitoring.CommandListener):
    """Hears every command of clients that are made after it was registered, which is for good."""

    heard: list[dict[str, object]] | None = None

    def started(self, event):
        if self.heard is not None:
            self.heard.append(dict(event.command))

    def succeeded(self, event): ...

    def failed(self, event): ...


_COMMANDS = _Commands()
pymongo.monitoring.register(_COMMANDS)


@contextmanager
def commands_to(heard):
    """What is sent meanwhile."""
    _COMMANDS.heard = heard
    try:
        yield
    finally:
        _COMMANDS.heard = None


@pytest.fixture(scope="module")
def filled(mongo):
    name = f"test-{uuid.uuid4().hex[:12]}"
    rows = [
        record(
            name=f"n{i:03}",
            created_at=f"2026-{1 + i // 50:02}-{1 + i % 25:02}T08:00:00.000000Z",
            measured_at=f"2026-{1 + i // 50:02}-{1 + i % 25:02}",
            metadata={
                "chip": f"C{i % 50}",
                "power": i - 30,
                "odd": i % 2,
                "log": [i, i + 1],
                "at": {"$date": f"2026-{1 + i % 12:02}-01"},
                "bath": {"value": i, "unit": "mK"},
            },
        )
        for i in range(600)
    ]

    async def body(store):
        await asyncio.gather(*(store.insert(one) for one in rows))

    within(lambda _: MongoStore(mongo, name), body)
    with pymongo.MongoClient(mongo) as client:
        yield client[name]


class TestIndexes:
    """What the documentation calls fast reads what it needs from an index, and how much does not grow with the rest."""

    def explained(self, database, pipeline, **options):
        command = {"aggregate": "datafiles", "pipeline": pipeline, "cursor": {}, **options}
        return database.command({"explain": command, "verbosity": "executionStats"})

    def page(self, database, query, sort="-created_at", *, walk=False, limit=10):
        node, sort = parse_filter(query), parse_sort(sort)
        where = _mql.selection(node, False)
        options = {"hint": _mql.sort_index(sort)} if walk else {}
        where = _mql.walked(where) if walk else where
        return self.explained(database, _mql.page_pipeline(where, sort, None, limit, False), **options)

    @pytest.mark.services
    @pytest.mark.parametrize(
        ("query", "examined"),
        [
            ({"chip": "C7"}, 12),
            ({"power": {"$gte": 0, "$lt": 20}}, 20),
            ({"chip": "C7", "power": {"$lt": 100}}, 13),
            ({"chip": {"$in": ["C7", "C9"]}}, 27),
            ({"$or": [{"chip": "C7"}, {"power": 3}]}, 14),
            ({"name": {"$regex": "^n01"}}, 700),
            ({"$text": "n011"}, 3),
            ({"log": 5}, 3),
        ],
        ids=str,
    )
    def test_a_condition_is_looked_up(self, filled, query, examined):
        """Equality, range, alternatives, several together, lists, words."""
        plan = self.page(filled, query)
        found = stages(plan)
        assert ("COLLSCAN", None) not in found
        assert {index for stage, index in found if stage == "IXSCAN"} == {TERMS_INDEX}
        statistics = plan.get("executionStats") or plan["stages"][0]["$cursor"]["executionStats"]
        assert statistics["totalKeysExamined"] <= examined

    @pytest.mark.services
    @pytest.mark.parametrize("sort", ["created_at", "-created_at", "name", "-measured_at", "updated_at", "-size", "id"])
    @pytest.mark.parametrize("query", [{}, {"odd": 1}, {"chip": {"$ne": "C7"}}], ids=str)
    def test_a_page_in_order_is_walked_and_nothing_is_sorted(self, filled, query, sort):
        """It reads about as many records as it shows."""
        plan = self.page(filled, query, sort, walk=True)
        found = stages(plan)
        assert "SORT" not in {stage for stage, _ in found}
        assert [index for stage, index in found if stage == "IXSCAN"] == [_mql.sort_index(parse_sort(sort))]
        statistics = plan.get("executionStats") or plan["stages"][0]["$cursor"]["executionStats"]
        assert statistics["totalDocsExamined"] <= 21

    @pytest.mark.services
    @pytest.mark.parametrize("are_many", [False, True], ids=["few", "many"])
    @pytest.mark.parametrize(
        "query",
        [
            {"chip": "C7"}, {"chip": {"$in": ["C7", "C9"]}}, {"$text": "n011"}, {"name": {"$regex": "^n01"}}, {"log": 5},
            {"power": {"$gte": 0, "$lt": 20}}, {"at": {"$gte": {"$date": "2026-03-01"}}}, {"bath.value": {"$lt": "30 mK"}},
            {"measured_at": {"$gte": "2026-02-01", "$lt": "2026-03-01"}}, {"power": {"$lt": 100}, "chip": "C7"},
            {"odd": 1, "chip": {"$in": ["C7", "C8"]}}, {"odd": 1, "power": {"$gte": 0}}, {"chip": "C7", "odd": {"$ne": 1}},
            {"$or": [{"chip": "C7"}, {"power": 3}]}, {}, {"chip": {"$ne": "C7"}},
        ],
        ids=str,
    )  # fmt: skip
    def test_no_command_of_a_fast_question_reads_the_whole_collection(self, filled, mongo, monkeypatch, query, are_many):
        """Whatever the store sends for two pages: totals, times, documents."""
        if are_many:
            monkeypatch.setattr(_mongo_questions, "MOMENTS", 5)
        sent: list[dict[str, object]] = []
        node, sort = parse_filter(query), parse_sort("-created_at")

        async def body(store):
            page = await store.search(node, sort, 5, None)
            await store.search(node, sort, 5, page.cursor)

        with commands_to(sent):
            within(lambda _: MongoStore(mongo, filled.name), body)
        questions = [one for one in sent if {"find", "aggregate", "count"} & one.keys() and "datafiles" in one.values()]
        assert len(questions) >= 2
        for one in questions:
            asked = {key: value for key, value in one.items() if key not in ("lsid", "$db", "$clusterTime", "maxTimeMS")}
            plan = filled.command({"explain": asked, "verbosity": "queryPlanner"})
            found = stages(plan)
            assert "COLLSCAN" not in {stage for stage, _ in found}, asked
            assert {"IXSCAN", "COUNT_SCAN", "RECORD_STORE_FAST_COUNT", "EOF"} & {stage for stage, _ in found}, found

    @pytest.mark.services
    @pytest.mark.parametrize("sort", BY_TIME)
    @pytest.mark.parametrize("query", [{"odd": 1}, {"chip": {"$in": ["C7", "C9", "C11"]}}, {"log": 5}], ids=str)
    def test_a_page_of_one_value_by_time_reads_only_itself(self, filled, query, sort):
        """Though 300 match: of several values one more of each."""
        where = _mql.selection(parse_filter(query), False)
        assert _mql.is_point(where)
        plan = filled["datafiles"].find(where, hint=TERMS_INDEX, sort={"c": -1 if sort[0] == "-" else 1}, limit=5).explain()
        assert "SORT" not in {stage for stage, _ in stages(plan)}
        assert plan["executionStats"]["totalDocsExamined"] <= 8

    @pytest.mark.services
    def test_the_moments_of_a_range_are_read_from_the_index_alone(self, filled):
        where = _mql.selection(parse_filter({"power": {"$gte": 0, "$lt": 200}}), False)
        assert not _mql.is_point(where)
        found = filled["datafiles"].find(where, {"_id": 0, "c": 1}, hint=TERMS_INDEX).sort("c", -1).limit(5).explain()
        assert found["executionStats"]["totalDocsExamined"] == 0
        assert found["executionStats"]["nReturned"] == 5

    @pytest.mark.services
    @pytest.mark.parametrize("direction", [1, -1])
    def test_of_a_range_the_days_of_the_page_are_read_from_the_index_alone(self, filled, direction):
        """The first or last of 300 days, two records each."""
        asked = parse_filter({"power": {"$gte": 0, "$lt": 500}})
        assert _mql.is_range(asked)
        where = {"$and": [{"d": {"$gte": 0}}, _mql.by_day(_mql.selection(asked, False))]}
        found = filled["datafiles"].find(where, {"_id": 0, "d": 1, "c": 1}, hint=DAYS_INDEX).sort("d", direction).limit(9)
        plan = found.explain()
        assert "SORT" not in {stage for stage, _ in stages(plan)}
        assert plan["executionStats"]["totalDocsExamined"] == 0
        assert plan["executionStats"]["nReturned"] == 9
        assert plan["executionStats"]["totalKeysExamined"] < 60

    @pytest.mark.services
    @pytest.mark.parametrize(
        "query", [{}, {"chip": "C7"}, {"power": {"$gte": 0, "$lt": 200}}, {"name": {"$gte": "n1"}}], ids=str
    )
    def test_a_total_is_counted_without_reading_a_document(self, filled, query):
        """Of one condition: from the index alone."""
        where = _mql.selection(parse_filter(query), False)
        found = stages(self.explained(filled, _mql.total_pipeline(where, 10_001)))
        assert {stage for stage, _ in found} & {"FETCH", "COLLSCAN"} == set(), found


# --- errors ----------------------------------------------------------------------------------------------------------------

ERRORS = [
    cls
    for module in (pymongo.errors, bson.errors)
    for _, cls in inspect.getmembers(module, inspect.isclass)
    if issubclass(cls, (pymongo.errors.PyMongoError, bson.errors.BSONError))
]
PASSING = (
    pymongo.errors.ConnectionFailure,
    pymongo.errors.ExecutionTimeout,
    pymongo.errors.CursorNotFound,
    pymongo.errors.WriteConcernError,
)


MADE_OF = {
    pymongo.errors.BulkWriteError: ({"writeErrors": []},),
    pymongo.errors.ClientBulkWriteException: ({"writeErrors": []}, True),
    pymongo.errors.EncryptedCollectionError: (ValueError("said MongoDB"), {}),
}


def made(cls):
    """An error of that class, as the driver makes them."""
    return cls(*MADE_OF.get(cls, ("said MongoDB",)))


def test_the_driver_names_its_errors():
    """A guard: the walks below are over something."""
    assert {pymongo.errors.AutoReconnect, pymongo.errors.DuplicateKeyError, bson.errors.InvalidDocument} <= set(ERRORS)


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_every_error_class_of_the_driver_has_an_error_of_ours(cls):
    """What waiting may mend is unavailable; too large a document is the client's to mend."""
    ours = translate(made(cls))
    expected = UnavailableError if issubclass(cls, PASSING) else StorageError
    assert type(ours) is (TooLargeError if issubclass(cls, pymongo.errors.DocumentTooLarge) else expected)


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_no_error_of_the_driver_comes_out_of_an_operation(cls):
    """Whatever the library raises inside the border leaves it as ours."""
    with pytest.raises(AqDataError), border():
        raise made(cls)


@pytest.mark.parametrize("code", sorted(_mongo_border.PASSING))
def test_a_failure_that_passes_is_unavailable(code):
    """By its code, and by the labels that the server gives."""
    assert type(translate(pymongo.errors.OperationFailure("not now", code))) is UnavailableError
    labelled = pymongo.errors.OperationFailure("not now", 1, {"errorLabels": ["RetryableWriteError"]})
    assert type(translate(labelled)) is UnavailableError
    assert type(translate(pymongo.errors.OperationFailure("never", 1))) is StorageError
