"""SQLite keeps the contract of a metadata store, in a file and in memory, and lets no error of its own out."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import random
import sqlite3
import time
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_suite import (
    EVERYTHING,
    DurableMetadataStoreTests,
    MetadataStoreTests,
    changed,
    documents,
    expected_ids,
    facts_of,
    ids_of,
    insert_all,
    pages,
    record,
    within,
)

from aq_data.errors import AqDataError, ConfigError, QueryError, StorageError, UnavailableError
from aq_data.models.paths import parse_sort
from aq_data.models.query import parse_filter
from aq_data.models.terms import KIND_ORDER
from aq_data.storage.metadata import _connection, _counts, _generations, _order, _plan, sqlite
from aq_data.storage.metadata._connection import translate
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.sqlite import SqliteStore

SLOW = "(?s)[a-q][^u-z]{300}x"
"""Takes a tenth of a second on 75 kB."""


def plan_of(name, monkeypatch):
    """Makes the store sort what matches, walk the index in order, or begin to walk and give up, one after the other.

    When it walks, terms are in both generations.
    """
    if name == "sort":
        return lambda: None
    monkeypatch.setattr(_counts, "FACETS", 4)
    monkeypatch.setattr(_counts, "VARIED", 1)
    monkeypatch.setattr(_generations, "RECENT", 40)
    monkeypatch.setattr(_order, "SORTED", 0)
    monkeypatch.setattr(_order, "FAR", _order.ENDLESS)
    budgets = itertools.cycle([_order.BUDGET] if name == "walk" else [_order.BUDGET, 1, 3])
    return lambda: monkeypatch.setattr(_order, "BUDGET", next(budgets))


class TestFile(DurableMetadataStoreTests):
    """A database in a file, to which any number of stores may be open."""

    @pytest.fixture
    def open_store(self, tmp_path):
        return lambda name: SqliteStore(tmp_path / f"{name}.sqlite")

    @pytest.fixture(params=["sort", "walk", "in turns"])
    def plan(self, request, monkeypatch):
        return plan_of(request.param, monkeypatch)


class TestMemory(MetadataStoreTests):
    """A database that goes with its store."""

    @pytest.fixture
    def open_store(self):
        return lambda name: SqliteStore(None)

    @pytest.fixture
    def plan(self, monkeypatch):
        return plan_of("in turns", monkeypatch)


@pytest.fixture
def open_store(tmp_path):
    return lambda name: SqliteStore(tmp_path / f"{name}.sqlite")


# --- in order of saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gives_up", [False, True])
@given(
    seconds=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    chips=st.lists(st.sampled_from("ab"), min_size=40, max_size=40),
    changed_at=st.none() | st.integers(0, 39),
    query=st.sampled_from(
        [{"chip": "a"}, {"$text": "fl"}, {"$text": "flux t1", "chip": "b"}, {"chip": "a", "n": {"$gte": 3}}, {"chip": "c"},
         {"tags": "x"}, {"$text": "gone"}]
    ),
    sign=st.sampled_from(["", "-"]),
    limit=st.integers(1, 5),
)  # fmt: skip
def test_pages_by_time_are_in_order_however_far_saving_was_from_it(
    tmp_path_factory, gives_up, seconds, chips, changed_at, query, sign, limit
):
    """Clocks that differ, catalogues rebuilt: what is found in order of saving is still sorted by `created_at`."""
    records = [
        record(
            name=f"flux {'t1' if i % 3 else 't2'}",
            created_at=f"2026-01-31T08:00:{second:02}.000000Z",
            tags=["x"] * (i % 4 == 0),
            metadata={"chip": chip, "n": i},
        )
        for i, (second, chip) in enumerate(zip(seconds, chips, strict=False))
    ]
    sort = parse_sort(f"{sign}created_at")

    async def body(store):
        await insert_all(store, records)
        if changed_at is not None and changed_at < len(records):
            old = records[changed_at]
            records[changed_at] = changed(old, name="gone", state="deleted" if changed_at % 2 else "complete")
            assert await store.replace(records[changed_at], 1)
        assert await pages(store, query, sort, limit) == expected_ids(records, query, sort)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_order, "EASY", -1)
        if gives_up:
            patch.setattr(_order, "BUDGET", 4)
        folder = tmp_path_factory.mktemp("saving")
        within(lambda name: SqliteStore(folder / f"{name}.sqlite"), body)


# --- totals --------------------------------------------------------------------------------------------------------


def test_totals_are_exact_up_to_the_limit_and_said_to_be_inexact_beyond(open_store, monkeypatch):
    for module in (_order, _plan):
        monkeypatch.setattr(module, "EXACT_TOTAL", 10)
    monkeypatch.setattr(_order, "SORTED", 0)

    async def body(store):
        for count, total, is_exact in [(9, 9, True), (10, 10, True), (11, 10, False), (12, 10, False)]:
            await insert_all(store, [record(name="x") for _ in range(count - await store.count(EVERYTHING))])
            page = await store.search(parse_filter({"name": "x"}), parse_sort("id"), 3, None)
            assert (page.total, page.total_is_exact) == (total, is_exact)
            assert await store.count(EVERYTHING) == count

    within(open_store, body)


# --- the index -----------------------------------------------------------------------------------------------------


def check_index(connection: sqlite3.Connection, records: list) -> None:
    """What the index holds is what it would hold had each document been saved once, as it is now."""

    def rows(sql: str, *parameters: object) -> list[tuple]:
        return connection.execute(sql, parameters).fetchall()

    facts = [facts_of(one) for one in records]
    is_deleted = [one.document.state == "deleted" for one in records]
    seqs = [rows("SELECT seq FROM datafiles WHERE id=?", one.document.id)[0][0] for one in records]
    numbers = {(path, kind): p for p, path, kind in rows("SELECT p, path, kind FROM paths")}
    found_terms = [
        (numbers[t.path, t.kind], t.kind, t.value, seq, dead)
        for found, dead, seq in zip(facts, is_deleted, seqs, strict=True)
        for t in found.terms
    ]
    terms = {(-p if dead else p, 0 if kind == "object" else value, d) for p, kind, value, d, dead in found_terms}
    assert sorted(rows("SELECT p, v, d FROM terms")) == sorted(terms)
    assert rows("SELECT count(*) FROM recent_terms") == rows("SELECT value FROM progress WHERE name='recent'")
    assert set(rows("SELECT d, p, v FROM facts")) == {
        (d, p, 0 if kind == "whole" else value) for p, kind, value, d, _ in found_terms
    }
    assert dict(rows("SELECT p, n FROM paths WHERE n")) == Counter(p for p, _, _ in terms if p > 0)
    counted = {p for (_, kind), p in numbers.items() if kind in ("number", "text", "bool", "date")}
    many = {p for (p,) in rows("SELECT p FROM paths WHERE many")}
    facets = Counter((p, v) for p, v, _ in terms if p in counted - many)
    assert {(p, v): n for p, v, n in rows("SELECT p, v, n FROM facets")} == facets
    several = {
        path for found in facts for path, n in Counter(t.path for t in found.terms if t.kind in KIND_ORDER).items() if n > 1
    }
    multi = {p for (p,) in rows("SELECT p FROM paths WHERE multi")}
    assert {p for (path, kind), p in numbers.items() if path in several and kind in KIND_ORDER} <= multi
    assert rows("SELECT value FROM progress WHERE name='alive'") == [(is_deleted.count(False),)]
    assert rows("SELECT value FROM progress WHERE name='indexed'") == [(max(seqs),)]
    for word in sorted({word for found in facts for word in found.words} | {"absent"}):
        for table, buried in (("words", False), ("buried_words", True)):
            expected = [
                seq
                for found, dead, seq in zip(facts, is_deleted, seqs, strict=True)
                if word in found.words and dead is buried
            ]
            assert rows(f"SELECT rowid FROM {table} WHERE {table} MATCH ?", f'"{word}"') == [
                (seq,) for seq in sorted(expected)
            ]


@pytest.mark.parametrize(("facets", "recent"), [(1, 0), (1, 11), (3, 11), (1000, 1000)])
@settings(max_examples=settings().max_examples * 2 // 3)
@given(
    listed=st.lists(documents, min_size=1, max_size=6),
    later=st.lists(st.tuples(st.integers(0, 5), documents, st.booleans()), max_size=8),
)
def test_the_index_is_that_of_the_documents_as_they_are(monkeypatch, facets, recent, listed, later):
    """After any saves, changes, deletes and revivals, in and before the index, with paths of too many values to count, and
    with terms that move from one generation to the next."""
    monkeypatch.setattr(_generations, "RECENT", recent)
    monkeypatch.setattr(_counts, "FACETS", facets)
    monkeypatch.setattr(_counts, "VARIED", facets // 2)
    records = [record(**fields) for fields in listed]

    async def body(store):
        for each in records:
            await store.insert(each)
        for position, fields, indexes in later:
            position %= len(records)
            old = records[position]
            document = msgspec.structs.replace(
                record(**fields).document, id=old.document.id, revision=old.document.revision + 1
            )
            records[position] = Record(document, old.attempt, old.digest)
            assert await store.replace(records[position], old.document.revision)
            if indexes:
                await store.count(EVERYTHING)
        await store.count(EVERYTHING)
        await store.read(lambda connection: check_index(connection, records))

    within(lambda _: SqliteStore(None), body)


# --- errors --------------------------------------------------------------------------------------------------------


def sqlite_error(cls: type[sqlite3.Error], name: str) -> sqlite3.Error:
    error = cls("said SQLite")
    error.sqlite_errorname = name
    error.sqlite_errorcode = getattr(sqlite3, name, 1)
    return error


ERRORS = [cls for _, cls in inspect.getmembers(sqlite3, inspect.isclass) if issubclass(cls, sqlite3.Error | sqlite3.Warning)]
NAMES = sorted(name for name, value in vars(sqlite3).items() if name.startswith("SQLITE_") and isinstance(value, int))
PASSING = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR")


def test_the_standard_library_names_its_errors():
    """A guard: the walk below is over something."""
    assert {sqlite3.OperationalError, sqlite3.IntegrityError, sqlite3.ProgrammingError} <= set(ERRORS)
    assert {"SQLITE_BUSY_SNAPSHOT", "SQLITE_IOERR_FSYNC", "SQLITE_CORRUPT"} <= set(NAMES)


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_every_error_class_of_sqlite_has_an_error_of_ours(cls):
    assert isinstance(translate(cls("said SQLite")), StorageError)
    assert "said SQLite" in str(translate(cls("said SQLite")))


@pytest.mark.parametrize("name", NAMES)
def test_what_waiting_may_mend_is_unavailable_and_everything_else_is_a_storage_error(name):
    ours = translate(sqlite_error(sqlite3.OperationalError, name))
    assert type(ours) is (UnavailableError if name.startswith(PASSING) else StorageError)
    assert name in str(ours)


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_no_error_of_sqlite_comes_out_of_an_operation(cls):
    """Whatever the library raises inside the border leaves it as ours."""
    with pytest.raises(AqDataError), _connection.border():
        raise cls("said SQLite")


def test_a_file_that_is_no_database_is_a_storage_error(tmp_path):
    path = tmp_path / "one.sqlite"
    path.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    before = path.read_bytes()
    with pytest.raises(StorageError):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_a_folder_is_no_database(tmp_path):
    with pytest.raises((StorageError, UnavailableError)):
        SqliteStore(tmp_path)


def test_a_database_of_another_version_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "one.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(ConfigError, match="99"):
        SqliteStore(path)


def test_a_database_that_another_program_locks_is_unavailable_and_then_goes_on(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(_connection, "PRAGMAS", (*_connection.PRAGMAS, "PRAGMA busy_timeout=0"))
    one, two = record(), record()

    async def body(store):
        await store.insert(one)
        blocker = sqlite3.connect(tmp_path / "one.sqlite", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError):
            await store.insert(two)
        with pytest.raises(UnavailableError):
            await store.check()
        assert await store.get(one.document.id) == one, "reading goes on"
        blocker.execute("ROLLBACK")
        blocker.close()
        assert await store.insert(two) is None

    within(open_store, body)


def test_a_full_disk_is_unavailable_and_loses_nothing_that_was_acknowledged(open_store, monkeypatch):
    monkeypatch.setattr(_connection, "PRAGMAS", (*_connection.PRAGMAS, "PRAGMA max_page_count=60"))

    async def body(store):
        kept, failures = [], []
        for _ in range(40):
            each = record(comment="x" * 10_000)
            try:
                await store.insert(each)
                kept.append(each)
            except AqDataError as exc:
                failures.append(exc)
        assert failures
        assert [str(exc) for exc in failures if not isinstance(exc, UnavailableError)] == []
        for each in kept:
            assert await store.get(each.document.id) == each
        assert [each async for each in store.scan()] == kept
        return kept

    kept = within(open_store, body)
    monkeypatch.undo()
    within(open_store, lambda store: _holds(store, len(kept)))


async def _holds(store, expected):
    assert await store.count(EVERYTHING) == expected
    assert len(ids_of(await store.search(EVERYTHING, parse_sort("id"), 1000, None))) == expected


def test_a_failed_insert_in_a_shared_commit_harms_no_other(open_store):
    """Each caller gets the outcome of its own operation, though one transaction holds many."""
    barred = record()
    others = [record(name=f"n{i}", metadata={f"only{i}": i}) for i in range(30)]

    async def body(store):
        await store.bar(barred.document.id, barred.attempt)
        mixed = [each for other in others for each in (other, barred)]
        answers = await asyncio.gather(*(store.insert(each) for each in mixed), return_exceptions=True)
        assert answers[::2] == [None] * len(others)
        assert all(isinstance(answer, UnavailableError) for answer in answers[1::2])
        for i in range(30):
            assert await store.count(parse_filter({f"only{i}": i})) == 1

    within(open_store, body)


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [{"$regex": SLOW}, {"$elemMatch": {"$regex": SLOW}}])
def test_one_document_with_many_texts_ends_with_its_time(open_store, monkeypatch, condition):
    """It would take ten seconds and more."""
    monkeypatch.setattr(sqlite, "QUERY_SECONDS", 0.3)
    text = "".join(random.Random(1).choices("abcdefghijklmnopqrst", k=75_000))

    async def body(store):
        await store.insert(record(metadata={"a": [f"{text}{i}" for i in range(100)]}))
        began = time.monotonic()
        with pytest.raises(QueryError, match=r"took longer than 0\.3 s"):
            await store.count(parse_filter({"a": condition}))
        assert time.monotonic() - began < 5

    within(open_store, body)


@pytest.mark.parametrize("metadata", [{"a": "a" * 500_000}, {"a": ["b", "a" * 500_000]}])
def test_a_text_that_is_too_long_for_its_pattern_is_refused_by_every_question(open_store, metadata):
    """Not as a failure of the database, and not as one that does not match; other patterns are looked for."""
    records = [record(name="n0"), record(metadata=metadata), record(metadata={"a": "c"})]

    async def body(store):
        await insert_all(store, records)
        for refused in ({"a": {"$regex": SLOW}}, {"a": {"$not": {"$regex": SLOW}}}):
            for question in (
                store.count(parse_filter(refused)),
                store.search(parse_filter(refused), parse_sort("a"), 10, None),
                store.distinct("metadata.a", parse_filter(refused), 10),
            ):
                with pytest.raises(QueryError, match="might take too long on a text of 500000 bytes"):
                    await question
        assert await store.count(parse_filter({"a": {"$regex": "a+$"}})) == 1
        assert await store.count(parse_filter({"a": {"$regex": SLOW}, "name": "n0"})) == 0

    within(open_store, body)


# --- generations -----------------------------------------------------------------------------------------------------


def test_recent_terms_stay_few_and_every_path_gets_its_turn(tmp_path, monkeypatch):
    """Each batch moves on about as much as it puts in, whichever process does; what moved is found as before."""
    monkeypatch.setattr(_counts, "VARIED", 3)
    monkeypatch.setattr(_generations, "RECENT", 200)
    records = [record(name=f"n{i}", metadata={f"k{j}": i * 7 % 61 + j / 10 for j in range(8)}) for i in range(240)]

    async def fill(store, records):
        await insert_all(store, records)
        assert await store.count(EVERYTHING)
        return await store.read(
            lambda connection: (
                connection.execute("SELECT count(*) FROM recent_terms").fetchone()[0],
                connection.execute("SELECT count(DISTINCT p) FROM settled_terms JOIN paths USING (p) WHERE path LIKE 'm%.k%'"
                                   " AND d>80").fetchone()[0],
            )
        )  # fmt: skip

    for begin in range(0, 240, 20):
        recent, paths = within(
            lambda _: SqliteStore(tmp_path / "one.sqlite"), lambda s, b=begin: fill(s, records[b : b + 20])
        )
        assert recent <= 200 + 20 * 14
    assert paths == 8
    query = {"k3": {"$gte": 20, "$lt": 40}}
    within(
        lambda _: SqliteStore(tmp_path / "one.sqlite"),
        lambda store: _finds(store, query, parse_sort("k5"), expected_ids(records, query, parse_sort("k5"))),
    )


async def _finds(store, query, sort, expected):
    assert await pages(store, query, sort, 7) == expected
