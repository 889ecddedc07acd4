"""The conformance suite of `MetadataStore`: what every backend promises, backend by backend in a few lines.

A backend supplies `open_store`: called with a name it opens a store on the database of that name, empty at first. Its
`plan` is called before each question, for backends that have several ways to answer one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aq_data.errors import ConflictError, QueryError, UnavailableError
from aq_data.models.datafile import DataFile, make_id
from aq_data.models.matching import Facts, matches
from aq_data.models.paths import SortKey, parse_path, parse_sort
from aq_data.models.query import check_dimension, parse_filter, quantities_of
from aq_data.models.snapshots import separated
from aq_data.models.stores import AddedStore
from aq_data.models.terms import comparable, sort_key
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore, Page, Token

T = TypeVar("T")
OpenStore = Callable[[str], MetadataStore]

NOW = "2026-01-31T08:00:00.000000Z"
EVERYTHING = parse_filter({})
BY_SAVING = parse_sort("nothing.stands.here")

counter = itertools.count(10_000)  # above the numbers that tests give themselves


def record(number: int | None = None, **fields: Any) -> Record:
    """A record of its own: ids of one number are equal, and sort as their numbers do."""
    number = next(counter) if number is None else number
    document = DataFile(
        **{"id": make_id(number, number.to_bytes(10, "big")), "state": "complete", "revision": 1, "created_at": NOW,
           "updated_at": NOW, **fields}
    )  # fmt: skip
    return Record(document, f"attempt-{number}", f"digest-{number}")


def changed(old: Record, **fields: Any) -> Record:
    document = msgspec.structs.replace(old.document, revision=old.document.revision + 1, **fields)
    return Record(document, old.attempt, old.digest)


def within(open_store: OpenStore, body: Callable[[MetadataStore], Awaitable[T]], name: str = "one") -> T:
    """What `body` returns for a store that is closed afterwards."""

    async def run() -> T:
        store = open_store(name)
        try:
            return await body(store)
        finally:
            await store.close()

    return asyncio.run(run())


async def insert_all(store: MetadataStore, records: list[Record]) -> None:
    for one in records:
        assert await store.insert(one) is None


def ids_of(page: Page) -> list[str]:
    return [msgspec.json.decode(document, type=DataFile).id for document in page.documents]


async def pages(
    store: MetadataStore, query: Any, sort: SortKey, limit: int, between: Callable[[], Awaitable[None] | None] = lambda: None
) -> list[str]:
    """The ids on all pages of a search, one after the other; `between` is called before each page."""
    found: list[str] = []
    cursor = None
    while True:
        waiting = between()
        if waiting is not None:
            await waiting
        page = await store.search(parse_filter(query), sort, limit, cursor)
        assert len(page.documents) <= limit
        found += ids_of(page)
        if page.cursor is None:
            return found
        assert len(page.documents) == limit, "only the last page may be short"
        cursor = page.cursor


def facts_of(one: Record) -> Facts:
    return Facts(msgspec.json.decode(msgspec.json.encode(one.document)))


def is_refused(records: list[Record], query: Any) -> bool:
    """Whether quantities are asked for in a dimension that no record has, where some have another."""
    kinds = {(term.path, term.kind) for one in records for term in facts_of(one).terms}
    try:
        for node in quantities_of(parse_filter(query)):
            check_dimension(node, [kind for path, kind in kinds if path == node.path])
    except QueryError:
        return True
    return False


async def assert_refused(store: MetadataStore, query: Any) -> None:
    """Each question about it is."""
    node = parse_filter(query)
    with pytest.raises(QueryError, match="is measured in"):
        await store.search(node, BY_SAVING, 10, None)
    with pytest.raises(QueryError, match="is measured in"):
        await store.count(node)


def expected_ids(records: list[Record], query: Any, sort: SortKey, include_deleted: bool = False) -> list[str]:
    """What the evaluator answers: matching records by sort key, ties by position."""
    node = parse_filter(query)
    keyed = [
        (sort_key(found.terms, sort), position, one.document.id)
        for position, one in enumerate(records)
        if (include_deleted or one.document.state != "deleted") and matches(node, found := facts_of(one))
    ]
    return [id for _, _, id in sorted(keyed, reverse=sort.descending)]


def expected_values(records: list[Record], query: Any, path: str) -> dict[tuple[str, Any], int]:
    """How many documents have each value at the path."""
    node = parse_filter(query)
    return Counter(
        (term.kind, term.value)
        for one in records
        if one.document.state != "deleted" and matches(node, found := facts_of(one))
        for term in found.terms
        if term.path == path and term.kind in ("number", "text", "bool", "date")
    )


def known_as(value: Any) -> tuple[str, Any]:
    """A value of `distinct` as a term has it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number", value
    return ("text", value) if isinstance(value, str) else comparable(value, "")


# --- generated documents and filters -------------------------------------------------------------------------------

TEXTS = [
    "",
    "a",
    "A",
    "b",
    "é",
    "\uffff",
    "\U0001f600",
    "a\x00b",
    "x" * 99,
    "x" * 100,
    "x" * 101,
    "x" * 100 + "a",
    "1",
    "2026-01-01",
]
PROSE = [
    "T1 vs flux of résonator q3", "Resonator_Q3: FLUX", "q33 e\u0301t\u00e9 stra\u00dfe", "\u212b \u00bd \uff21", "x" * 120 + " flux",
    "first line\nlast line", "tail\n",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 1.0, 1.5, -0.0, 2**53, 2**53 + 1, float(2**53), 2**63 - 1, -(2**63), 2**63, 2**70, -(2**70),
1e300, 5e-324,
           {"$float": "Infinity"}, {"$float": "-Infinity"}]  # fmt: skip
DATES = [
    {"$date": text}
    for text in ("2026-01-01", "2026-01-01T00:00:00Z", "1969-12-31T23:59:59.999999Z", "9999-12-31", "0001-01-01")
]
OTHERS = [None, True, False, {"$float": "NaN"}, {"$complex": [1, 2]}, {"$complex": [2.0, {"$float": "NaN"}]},
{"$bytes": "YQ=="},
          {"$literal": {"$float": 1}}, {}, []]  # fmt: skip
KEYS = ["a", "b", "a.b", "c\\d", "value", "unit"]
UNITS = ["mK", "K", "V", "dBm", "furlong", "a.u.", "", "m**9**9**9**9"]

scalars = st.sampled_from([*TEXTS, *NUMBERS, *DATES, *OTHERS])
quantities = st.fixed_dictionaries(
    {
        "value": st.sampled_from([0, 1, 20, 0.02, 2e-2, -30, 20.0, "20 mK", None, [20, 0.02], 10**400]),
        "unit": st.sampled_from(UNITS),
    }
)
values = st.recursive(
    scalars | quantities,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2),
    max_leaves=4,
) | st.sampled_from([[[1, 2], [3]], [[{"a": 1}], 1], [{"a": [[1, 2], []]}], [["a"], []], [[[1]]]])
SETTINGS = [
    {"power": {"value": -30, "unit": "dBm"}, "note": "flux line"}, {"power": {"value": 20, "unit": "mK"}, "note": "x" * 120},
    {"power": {"value": [1, 2], "unit": "V"}, "list": [{"a": 1}, {"b": 2}, 3]}, {"power": None, "list": [], "a.b": True},
]  # fmt: skip
instruments = st.dictionaries(
    st.sampled_from(["vna", "résonator", "a.b"]),
    st.sampled_from([{}, {"a": 1}, {"a": "q3"}, *({"settings": one, "model": "T1"} for one in SETTINGS)]),
    max_size=2,
)
"""Of few values, so that several documents have the same."""
instants = st.sampled_from([None, "2026-01-31T08:00:00.000000Z", "2026-02-01T00:00:00.000000Z"])
documents = st.fixed_dictionaries(
    {"metadata": st.dictionaries(st.sampled_from(KEYS), values, max_size=3)},
    optional={
        "name": st.sampled_from(TEXTS + PROSE),
        "comment": st.sampled_from(PROSE),
        "tags": st.lists(st.sampled_from(["q1", "q2", "q3"]), max_size=2, unique=True),
        "starred": st.booleans(),
        "measured_at": instants,
        "instruments": instruments,
        "state": st.sampled_from(["complete", "complete", "deleted"]),
    },
)
PATHS = ["a", "b", r"a\.b", "a.b", "a.a", r"c\\d", "metadata", "metadata.a", "name", "tags", "starred", "state", "absent",
         "a.value", "b.value", "a.b.value", "comment",
         "instruments", "instruments.vna", "instruments.vna.a", "instruments.vna.model", "instruments.vna.settings.note",
         "instruments.vna.settings.power.value", "instruments.vna.settings.list", "instruments.vna.settings.list.a",
         r"instruments.a\.b.settings.a\.b"]  # fmt: skip
PATTERNS = ["", "a", "^a", "^x+$", "x{99}$", "(?i)^A", "[é\uffff]", ".", r"\d", r"\s", r"[^\s]$", r"e\z", "^(a|b)?$", "^first.*last",
            "^(?s)first.*last", "line$", r"\bflux\b", r"\x61", "\x00", r"\p{Greek}|1", "[]a]", "flux$", "^xx*"]  # fmt: skip
SEARCHED = [
    "power",
    "vna flux",
    "model t1",
    "vna power q3",
    "resonator note",
    "flux line t1",
    "flux",
    "Flux Q3",
    "t1 reson",
    "é",
    "ete",
    "strasse",
    "x",
    "a b",
    "1",
    "½",
    "å",
    "furlong",
    "q3 flux absent",
]
WITHIN = [
    {"$elemMatch": {"$elemMatch": {"$gte": 1}}}, {"$elemMatch": {"$elemMatch": {"a": 1}}}, {"$elemMatch": {"$size": 1}},
    {"$not": {"$elemMatch": {"$size": 1}}}, {"$elemMatch": {"$elemMatch": {"$elemMatch": {"$exists": True}}}},
    {"$elemMatch": {"a": {"$elemMatch": {"$elemMatch": {"$gt": 0}}}}}, {"$elemMatch": {"a": {"$size": 2}}},
    {"$elemMatch": {"$eq": [1, 2]}}, {"$elemMatch": {"$regex": "a"}}, {"$elemMatch": {"$exists": True}},
]  # fmt: skip
"""Of lists within lists."""
operands = st.sampled_from([*NUMBERS, *(text for text in TEXTS if len(text) < 100), *DATES, {"$float": "NaN"}])
plain_conditions = st.one_of(
    values,
    st.builds(lambda op, value: {op: value}, st.sampled_from(["$eq", "$ne"]), values),
    st.builds(lambda op, value: {op: value}, st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), operands),
    st.builds(lambda low, high: {"$gt": low, "$lte": high}, operands, operands),
    st.builds(lambda op, listed: {op: listed}, st.sampled_from(["$in", "$nin"]), st.lists(values, max_size=4)),
    st.builds(lambda is_there: {"$exists": is_there}, st.booleans()),
    st.builds(lambda value: {"$not": {"$gte": value}}, operands),
    st.builds(lambda pattern: {"$regex": pattern}, st.sampled_from(PATTERNS)),
    st.builds(lambda length: {"$size": length}, st.integers(0, 3)),
    st.builds(lambda listed: {"$all": listed}, st.lists(values, max_size=3)),
    st.builds(lambda low, high: {"$elemMatch": {"$gte": low, "$ne": high}}, operands, values),
    st.sampled_from(WITHIN),
    st.builds(
        lambda key, value: {"$elemMatch": {key: value}}, st.sampled_from(["a", "b", r"a\.b", "value", "$nor"]), values
    ).map(
        lambda query: (
            {"$elemMatch": {"$nor": [{"a": query["$elemMatch"]["$nor"]}]}} if "$nor" in query["$elemMatch"] else query
        )
    ),
    st.builds(
        lambda op, amount: {op: amount},
        st.sampled_from(["$eq", "$ne", "$lt", "$gte"]),
        st.sampled_from(["20 mK", "0.02 K", "19.9 mK", "1 uW"]),
    ),
    st.builds(
        lambda op, amounts: {op: amounts},
        st.sampled_from(["$in", "$nin", "$all"]),
        st.lists(st.sampled_from(["20 mK", "0.02 K", "a", None, 20]), max_size=3),
    ),
)
elements = st.builds(
    lambda key, condition, others: {"$elemMatch": {key: condition, **others}},
    st.sampled_from(["a", "b", "a.b", "value"]),
    st.deferred(lambda: plain_conditions),
    st.sampled_from([{}, {"b": {"$exists": True}}, {"$nor": [{"a": 1}]}, {"a": {"$elemMatch": {"$gte": 0}}}]),
) | st.builds(
    lambda condition: {"$elemMatch": {"$not": condition}}, st.sampled_from([{"$gte": 1}, {"$in": [1, "a"]}, {"$size": 1}])
)
conditions = st.deferred(lambda: some_conditions)
some_conditions = st.one_of(
    plain_conditions,
    elements,
    st.builds(lambda condition: {"$not": condition}, elements),
    st.builds(lambda inner: {"$not": {"$not": inner}}, elements),
    st.builds(lambda low, high, other: {"$gt": low, "$lt": high, "$ne": other}, operands, operands, operands),
)
clauses = st.builds(lambda path, condition: {path: condition}, st.sampled_from(PATHS), conditions) | st.builds(
    lambda op, instant: {"measured_at": {op: instant}}, st.sampled_from(["$eq", "$ne", "$gt", "$lte"]), instants.filter(bool)
)
of_instruments = st.builds(
    lambda path, condition: {f"instruments.vna.{path}": condition},
    st.sampled_from(["a", "model", "settings.note", "settings.power.value", "settings.list", "settings.list.a", "settings"]),
    st.sampled_from(
        [1, "q3", "T1", None, -30, [1, 2], [], {}, {"$gt": 1}, {"$lt": 2}, {"$gte": -30, "$lt": 20}, {"$ne": 1}, {"$exists": True},
         {"$exists": False}, {"$regex": "x{110}"}, {"$regex": "^(T|f)"}, {"$lt": "25 mK"}, {"$in": [1, "T1", -30]}, {"$size": 3},
         {"$elemMatch": {"a": 1}}, {"$elemMatch": {"$gte": 2}}, {"$elemMatch": {"b": {"$ne": 1}}}, {"$nin": [1, 2]},
         {"$all": [1, 2]}, {"$not": {"$gte": 0}}, SETTINGS[3]]
    ),
)  # fmt: skip
filters = st.recursive(
    clauses | of_instruments | st.just({}) | st.builds(lambda text: {"$text": text}, st.sampled_from(SEARCHED)),
    lambda inner: st.one_of(
        st.builds(
            lambda op, listed: {op: listed},
            st.sampled_from(["$and", "$or", "$nor"]),
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(lambda query: {"$not": query}, inner),
        st.builds(lambda one, other: {**one, **other}, inner, inner),
    ),
    max_leaves=5,
)
sorts = st.builds(
    lambda sign, path: parse_sort(sign + path),
    st.sampled_from(["", "-"]),
    st.sampled_from([*PATHS, "measured_at", "created_at", "id"]),
)


class MetadataStoreTests:
    """What a metadata store promises, whether or not it outlives its process."""

    @pytest.fixture
    def plan(self) -> Callable[[], None]:
        """Chooses how the store answers the next question."""
        return lambda: None

    # --- records ---------------------------------------------------------------------------------------------------

    def test_what_is_inserted_is_got_again_identical(self, open_store):
        one = record(
            name="T1", metadata={"a": [1, {"b": {"$float": "NaN"}}], "big": 2**70, "text": "é\x00\U0001f600"}, tags=["x"]
        )

        async def body(store):
            assert await store.insert(one) is None
            assert await store.get(one.document.id) == one

        within(open_store, body)

    def test_an_absent_record_is_none(self, open_store):
        within(open_store, lambda store: _is(store.get(record().document.id), None))

    def test_an_insert_with_a_taken_id_changes_nothing_and_returns_what_is_there(self, open_store):
        first = record(7, name="winner")
        second = Record(record(7, name="loser").document, "other-attempt", "other-digest")

        async def body(store):
            assert await store.insert(first) is None
            assert await store.insert(second) == first
            assert await store.get(first.document.id) == first
            assert await store.count(EVERYTHING) == 1
            assert await store.count(parse_filter({"name": "loser"})) == 0

        within(open_store, body)

    def test_a_tombstone_still_takes_its_id_and_is_got(self, open_store):
        one = record()

        async def body(store):
            await store.insert(one)
            tombstone = changed(one, state="deleted")
            assert await store.replace(tombstone, 1)
            assert await store.get(one.document.id) == tombstone
            assert await store.insert(one) == tombstone

        within(open_store, body)

    def test_of_very_many_conditions_every_one_counts(self, open_store):
        """Also of those that a store may not want to ask its database: all must hold, at any place, and negated."""
        matching, other = (record(metadata={f"k{i}": i for i in range(n)}) for n in (120, 119))
        each = {"$gte": 0, "$lt": 1000, "$exists": True, "$ne": -1}

        async def body(store):
            for one in (matching, other):
                await store.insert(one)
            for condition in (None, each):
                wide = {f"k{i}": i if condition is None else condition for i in range(120)}
                for query, found in [
                    (wide, [matching]),
                    ({"$nor": [wide]}, [other]),
                    ({"$or": [wide, {"k0": 7}]}, [matching]),
                    ({"$and": [{f"k{i}": {"$ne": -1}} for i in range(100)] + [wide]}, [matching]),
                    ({**wide, "k119": 7}, []),
                ]:
                    node = parse_filter(query)
                    assert await store.count(node) == len(found), query
                    page = await store.search(node, BY_SAVING, 10, None)
                    ids = {msgspec.json.decode(document)["id"] for document in page.documents}
                    assert ids == {one.document.id for one in found}, query

        within(open_store, body)

    def test_a_replace_of_the_expected_revision_takes_effect_everywhere(self, open_store):
        one = record(name="old", metadata={"a": 1, "b": 2})

        async def body(store):
            await store.insert(one)
            assert await store.count(parse_filter({"a": 1})) == 1
            two = changed(one, name="new", metadata={"a": [5, 6]})
            assert await store.replace(two, 1)
            assert await store.get(one.document.id) == two
            for query, count in [
                ({"a": 1}, 0),
                ({"b": 2}, 0),
                ({"b": None}, 1),
                ({"a": 6}, 1),
                ({"name": "new"}, 1),
                ({"name": "old"}, 0),
            ]:
                assert await store.count(parse_filter(query)) == count, query

        within(open_store, body)

    def test_a_replace_of_another_revision_changes_nothing(self, open_store):
        one = record(name="old")

        async def body(store):
            await store.insert(one)
            assert not await store.replace(changed(one, name="new"), 2)
            assert not await store.replace(changed(one, name="new"), 0)
            assert not await store.replace(changed(record(), name="new"), 1), "nor is an absent record made"
            assert await store.get(one.document.id) == one
            assert await store.count(parse_filter({"name": "new"})) == 0

        within(open_store, body)

    def test_of_replaces_at_once_exactly_one_wins(self, open_store):
        one = record()

        async def body(store):
            await store.insert(one)
            tries = [changed(one, name=f"n{i}") for i in range(20)]
            won = await asyncio.gather(*(store.replace(each, 1) for each in tries))
            assert won.count(True) == 1
            assert await store.get(one.document.id) == tries[won.index(True)]
            assert await store.count(parse_filter({"name": tries[won.index(True)].document.name})) == 1

        within(open_store, body)

    def test_changes_by_compare_and_set_lose_none(self, open_store):
        one = record(metadata={"n": 0})

        async def increase(store):
            while True:
                old = await store.get(one.document.id)
                if await store.replace(changed(old, metadata={"n": old.document.metadata["n"] + 1}), old.document.revision):
                    return

        async def body(store):
            await store.insert(one)
            await asyncio.gather(*(increase(store) for _ in range(12)))
            assert (await store.get(one.document.id)).document.metadata == {"n": 12}
            assert await store.count(parse_filter({"n": 12})) == 1

        within(open_store, body)

    def test_inserts_from_many_tasks_are_all_kept_and_a_race_has_one_winner(self, open_store):
        records = [record(name=f"n{i}", metadata={f"k{i % 7}": i}) for i in range(150)]
        rivals = [Record(record(3, name=f"rival {i}").document, f"rival-{i}", "d") for i in range(20)]

        async def body(store):
            answers = await asyncio.gather(*(store.insert(each) for each in [*records, *rivals]))
            assert answers[: len(records)] == [None] * len(records)
            raced = answers[len(records) :]
            assert raced.count(None) == 1
            winner = rivals[raced.index(None)]
            assert all(answer in (None, winner) for answer in raced)
            assert await store.get(winner.document.id) == winner
            assert await store.count(EVERYTHING) == len(records) + 1
            for each in records:
                assert await store.get(each.document.id) == each

        within(open_store, body)

    def test_scan_gives_every_record_once_in_order_of_saving(self, open_store):
        numbers = range(600, 350, -1)
        records = [record(n, created_at=f"2026-01-31T08:00:00.{600 - n:06}Z") for n in numbers]

        async def body(store):
            await insert_all(store, records)
            tombstone = changed(records[3], state="deleted")
            await store.replace(tombstone, 1)
            found = [each async for each in store.scan()]
            assert found == [*records[:3], tombstone, *records[4:]]

        within(open_store, body)

    def test_a_pid_is_that_of_one_record_as_long_as_that_is_alive(self, open_store):
        """Refused with a conflict, by an insert and by a replace; free when it is given up or its record deleted."""

        async def body(store):
            first, second, third = record(pid="lab/1"), record(), record(pid="lab/1")
            await insert_all(store, [first, second])
            for attempt in (lambda: store.insert(third), lambda: store.replace(changed(second, pid="lab/1"), 1)):
                with pytest.raises(ConflictError, match="lab/1") as failure:
                    await attempt()
                assert failure.value.code == "id_taken"
            assert await store.get(third.document.id) is None
            assert await store.get(second.document.id) == second
            assert await store.replace(changed(first, comment="still mine"), 1)
            assert await store.insert(first) == changed(first, comment="still mine")
            await store.replace(changed(changed(first), pid=None), 2)
            assert await store.insert(third) is None
            await store.replace(changed(third, state="deleted"), 1)
            assert await store.replace(changed(second, pid="lab/1"), 1)

        within(open_store, body)

    # --- barring ---------------------------------------------------------------------------------------------------

    def test_a_barred_attempt_is_never_published_and_others_are(self, open_store):
        one = record()
        other = Record(one.document, "second attempt", one.digest)

        async def body(store):
            await store.bar(one.document.id, one.attempt)
            await store.bar(one.document.id, one.attempt)
            for _ in range(2):
                with pytest.raises(UnavailableError):
                    await store.insert(one)
            assert await store.get(one.document.id) is None
            assert await store.count(EVERYTHING) == 0
            assert await store.insert(other) is None

        within(open_store, body)

    def test_barring_one_id_bars_no_other_and_takes_nothing_back(self, open_store):
        published, other = record(), record()

        async def body(store):
            await store.insert(published)
            await store.bar(published.document.id, published.attempt)
            assert await store.get(published.document.id) == published
            assert await store.insert(Record(other.document, published.attempt, "d")) is None

        within(open_store, body)

    def test_a_barred_file_key_is_never_published(self, open_store):
        one = record()

        async def body(store):
            await store.insert(one)
            await store.bar(one.document.id, "key-1")
            with pytest.raises(UnavailableError):
                await store.replace(changed(one, comment="with a file"), 1, publishes="key-1")
            assert await store.get(one.document.id) == one
            assert await store.replace(changed(one, comment="with a file"), 1, publishes="key-2")

        within(open_store, body)

    def test_either_the_bar_comes_first_or_the_record_is_there(self, open_store):
        """After `bar` returns, a record that is not there never will be."""

        async def attempt(store, each):
            try:
                await store.insert(each)
            except UnavailableError:
                return False
            return True

        async def collect(store, each):
            await store.bar(each.document.id, each.attempt)
            return await store.get(each.document.id) is not None

        async def body(store):
            for each in [record() for _ in range(30)]:
                published, seen = await asyncio.gather(attempt(store, each), collect(store, each))
                assert published == seen

        within(open_store, body)

    # --- questions -------------------------------------------------------------------------------------------------

    @settings(max_examples=settings().max_examples * 5 // 6)
    @given(listed=st.lists(documents, max_size=9), query=filters, sort=sorts, limit=st.integers(1, 4))
    def test_search_answers_as_the_evaluator_does(self, open_store, plan, listed, query, sort, limit):
        """The same documents in the same order, whatever the page size and however the store answers."""
        records = [record(**fields) for fields in listed]
        expected = expected_ids(records, query, sort)

        async def body(store):
            await asyncio.gather(*(store.insert(each) for each in records))
            saved = [each async for each in store.scan()]
            assert saved == records, "tasks started in order are saved in order"
            plan()
            if is_refused(records, query):
                await assert_refused(store, query)
                return
            page = await store.search(parse_filter(query), sort, 100, None)
            assert ids_of(page) == expected
            assert (page.total, page.total_is_exact, page.cursor) == (len(expected), True, None)
            assert await pages(store, query, sort, limit, plan) == expected
            assert await store.count(parse_filter(query)) == len(expected)
            buried = expected_ids(records, query, sort, include_deleted=True)
            page = await store.search(parse_filter(query), sort, 100, None, include_deleted=True)
            assert (ids_of(page), page.total) == (buried, len(buried))

        within(open_store, body, f"example {next(counter)}")

    @example(
        listed=[{"metadata": {}}],
        later=[],
        query={"$text": "power", "$or": [{"$text": "power"}, {"$text": "å"}]},
        sort=SortKey("metadata.a", descending=False),
    )
    @settings(max_examples=settings().max_examples * 5 // 12)
    @given(
        listed=st.lists(documents, min_size=1, max_size=6), later=st.lists(documents, max_size=6), query=filters, sort=sorts
    )
    def test_search_follows_every_change(self, open_store, plan, listed, later, query, sort):
        """After replaces, in and before the index, answers are those for the new documents alone."""
        records = [record(**fields) for fields in listed]

        async def body(store):
            await asyncio.gather(*(store.insert(each) for each in records))
            ever = list(records)
            for position, fields in enumerate(later):
                position %= len(records)
                fresh = record(**fields).document
                old = records[position]
                document = msgspec.structs.replace(fresh, id=old.document.id, revision=old.document.revision + 1)
                records[position] = Record(document, old.attempt, old.digest)
                ever.append(records[position])
                assert await store.replace(records[position], old.document.revision)
                if position % 2:
                    await store.count(EVERYTHING)
            plan()
            if is_refused(records, query):
                if is_refused(ever, query):  # else the store may still know the dimension of what was replaced
                    await assert_refused(store, query)
                return
            assert await pages(store, query, sort, 3, plan) == expected_ids(records, query, sort)
            page = await store.search(parse_filter(query), sort, 100, None, include_deleted=True)
            assert ids_of(page) == expected_ids(records, query, sort, include_deleted=True)

        within(open_store, body, f"example {next(counter)}")

    @settings(max_examples=settings().max_examples * 5 // 12)
    @given(
        listed=st.lists(documents, min_size=1, max_size=8), later=st.lists(documents, max_size=4), query=filters,
        path=st.sampled_from(PATHS),
    )  # fmt: skip
    def test_counts_and_distinct_values_follow_every_change(self, open_store, plan, listed, later, query, path):
        """After replaces and deletes both are those of the documents as they are, with and without a filter."""
        records = [record(**fields) for fields in listed]

        async def body(store):
            await asyncio.gather(*(store.insert(each) for each in records))
            await store.count(EVERYTHING)
            ever = list(records)
            for position, fields in enumerate(later):
                position %= len(records)
                old = records[position]
                document = msgspec.structs.replace(
                    record(**fields).document, id=old.document.id, revision=old.document.revision + 1
                )
                records[position] = Record(document, old.attempt, old.digest)
                ever.append(records[position])
                assert await store.replace(records[position], old.document.revision)
            plan()
            for asked in ({}, query):
                if is_refused(ever, asked) or is_refused(records, asked):
                    continue
                node, canonical = parse_filter(asked), parse_path(path)
                assert await store.count(node) == len(expected_ids(records, asked, BY_SAVING))
                found = await store.distinct(canonical, node, 1000)
                assert {known_as(value): count for value, count in found} == expected_values(records, asked, canonical)
                assert [count for _, count in found] == sorted((count for _, count in found), reverse=True)
                assert await store.distinct(canonical, node, 2) == found[:2]

        within(open_store, body, f"example {next(counter)}")

    def test_a_document_with_several_values_is_found_once(self, open_store, plan):
        """Whatever several of them match, and whatever kinds of value its path had before."""
        records = [
            record(metadata={"a": value})
            for value in ([1, 2], ["b", "x"], ["b", "c"], [True, False], "b", [[1], [2]], [{"$date": "2026-01-01"}, 5], [{"b": 1}, {"b": 2}])
        ]  # fmt: skip
        queries: list[Any] = [
            {"a": {"$in": [1, 2]}}, {"a": {"$in": ["b", "x"]}}, {"a": {"$in": ["b", 1, 2, True, False, [1], [2]]}}, {"a": {"$in": [[1], [2]]}}, {"a": {"$gte": "b"}},
            {"a": {"$gt": "w", "$lt": "c"}}, {"a": {"$gt": 0}}, {"$or": [{"a": {"$gt": 0}}]}, {"$or": [{"b": {"$ne": 3}, "a": {"$gt": 0}}]},
            {"$or": [{"a": {"$gt": 0}}, {"a": {"$lt": 9}}]}, {"a": {"$regex": "[bcx]"}}, {"a": {"$exists": True}}, {"a": {"$elemMatch": {"b": {"$gt": 0}}}},
            {"a": {"$elemMatch": {"$elemMatch": {"$gt": 1}}}}, {"a": {"$elemMatch": {"$size": 1}}}, {"a": {"$not": {"$elemMatch": {"$size": 1}}}},
            {"a.b": {"$in": [1, 2]}}, {"a.b": {"$gte": 1}}, {"$and": [{"a": {"$in": [1, 2]}}, {"a": {"$gt": 0}}]}, {"$nor": [{"a": {"$in": [1, 2]}}]},
        ]  # fmt: skip

        async def body(store):
            for each in records:
                await store.insert(each)
                await store.count(EVERYTHING)
            for query in queries:
                for text in ("a", "-a", "id"):
                    plan()
                    expected = expected_ids(records, query, parse_sort(text))
                    page = await store.search(parse_filter(query), parse_sort(text), 100, None)
                    assert (ids_of(page), page.total) == (expected, len(expected)), query
                    assert await pages(store, query, parse_sort(text), 1, plan) == expected, query
                    assert await store.count(parse_filter(query)) == len(expected), query

        within(open_store, body)

    def test_another_dimension_is_refused_inside_of_elements_too(self, open_store):
        """As at the same path outside; but in a list within a list, whose values have no path, nothing is known of it."""
        volts, kelvins = {"value": 1, "unit": "V"}, {"value": 1, "unit": "mK"}
        listed = [{"ch": [volts, {"sub": [volts]}, [kelvins]]}, {"ch": []}]
        records = [record(metadata=metadata) for metadata in listed]
        cold, low = {"value": {"$lt": "2 mK"}}, {"value": {"$lt": "2 V"}}

        async def body(store):
            await insert_all(store, records)
            for refused in (cold, {"$nor": [cold]}, {"value": {"$not": cold["value"]}}, {"sub": {"$elemMatch": cold}}):
                assert is_refused(records, {"ch": {"$elemMatch": refused}})
                await assert_refused(store, {"ch": {"$elemMatch": refused}})
            for taken in (low, {"sub": {"$elemMatch": low}}, {"$elemMatch": cold}, {"$elemMatch": low}):
                query = {"ch": {"$elemMatch": taken}}
                page = await store.search(parse_filter(query), BY_SAVING, 10, None)
                assert ids_of(page) == expected_ids(records, query, BY_SAVING), query
                assert bool(ids_of(page)) == (taken != {"$elemMatch": low}), query

        within(open_store, body)

    def test_an_element_that_is_too_long_for_its_pattern_is_refused_and_others_are_found(self, open_store):
        """Never answered as one that does not match. MongoDB itself finds it here, so that it has to be judged."""
        notes = ["b", "a" * 301 + "x" + "a" * 500_000]
        large = {"vna": {"settings": {"notes": notes}}}
        records = [record(metadata={"a": notes}), record(metadata={"a": ["b"]}), record(instruments=large)]
        costly, simple = {"$elemMatch": {"$regex": "(?s)[a-q][^u-z]{300}x"}}, {"$elemMatch": {"$regex": "^a+x"}}

        async def body(store):
            await insert_all(store, records)
            for path in ("a", "instruments.vna.settings.notes"):
                for refused in ({path: costly}, {path: {"$not": costly}}):
                    with pytest.raises(QueryError, match="might take too long on a text of 500302 bytes"):
                        await store.count(parse_filter(refused))
                assert await store.count(parse_filter({path: simple})) == 1

        within(open_store, body)

    @pytest.mark.parametrize("text", ["-id", "name", "a", "-a", "-created_at", "tags", "absent"])
    def test_pages_visit_every_document_once_in_order_while_documents_arrive(self, open_store, plan, text):
        """Those that were there at the start; those that arrive are seen at most once, in their place."""
        sort = parse_sort(text)
        several = [1, "x", None, [3, 1], True, {"$float": "NaN"}, {"b": 1}, "y", 2.5, {"$date": "2026-01-01"}]

        def make(i: int) -> Record:
            return record(
                name=f"n{i % 4}", tags=[f"t{i % 3}", f"t{i % 5}"][: i % 3], metadata={"a": several[i % 10]} if i % 4 else {}
            )

        early = [make(i) for i in range(25)]
        late: list[Record] = []

        async def body(store):
            await insert_all(store, early)

            async def arrive():
                plan()
                late.extend(make(len(late) + j) for j in range(3))
                await insert_all(store, late[-3:])

            found = await pages(store, {}, sort, 4, arrive)
            assert len(set(found)) == len(found)
            order = expected_ids([*early, *late], {}, sort)
            assert found == [id for id in order if id in set(found)]
            assert {each.document.id for each in early} <= set(found)

        within(open_store, body)

    def test_a_search_never_shows_a_document_that_does_not_match_while_documents_arrive(self, open_store, plan):
        async def body(store):
            arriving = True

            async def insert(first):
                for i in range(first, first + 60):
                    await store.insert(record(name="same", metadata={"a": 1, "n": i}))

            async def ask():
                while arriving:
                    plan()
                    page = await store.search(parse_filter({"a": {"$ne": 1}}), parse_sort("n"), 10, None)
                    assert page.documents == []
                    assert await store.count(parse_filter({"$nor": [{"name": "same"}]})) == 0
                    assert await store.distinct("name", parse_filter({"n": None}), 10) == []

            asking = asyncio.create_task(ask())
            await asyncio.gather(*(insert(first) for first in range(0, 300, 60)))
            arriving = False
            await asking

        within(open_store, body)

    def test_a_page_can_be_asked_for_again_by_its_cursor(self, open_store, plan):
        async def body(store):
            await insert_all(store, [record(name=f"n{i}") for i in range(6)])
            plan()
            cursor = (await store.search(EVERYTHING, parse_sort("name"), 2, None)).cursor
            first = ids_of(await store.search(EVERYTHING, parse_sort("name"), 2, cursor))
            assert first == ids_of(await store.search(EVERYTHING, parse_sort("name"), 2, cursor))

        within(open_store, body)

    @pytest.mark.parametrize(
        "cursor",
        ["", "x", "é", "!!!!", "AAAA", "bnVsbA", "W10", "WyJuYW1lIiwgZmFsc2UsICIiLCAxXQ", "=" * 100, "A" * 100_000,
         "WzEsMiwzLDRd",
         "WyJuYW1lIixmYWxzZSwiMmYiLDFd",  # ["name",false,"2f",1]
         "WyJuYW1lIixmYWxzZSwiMmYwMCIsMV0",  # ["name",false,"2f00",1]
         "WyJuYW1lIixmYWxzZSwiM3NhIiwxMDAwMDAwMDAwMDAwMDAwMDAwMDAwXQ",  # ["name",false,"3sa",10**24]
         "WyJuYW1lIixmYWxzZSwiMmk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5OSIsMV0",  # ["name",false,"2i" + "9" * 24,1]
        ],
        ids=lambda text: ascii(text[:40]),
    )  # fmt: skip
    def test_a_cursor_that_no_server_gave_is_refused(self, open_store, plan, cursor):
        async def body(store):
            await insert_all(store, [record(name=f"n{i}") for i in range(3)])
            plan()
            with pytest.raises(QueryError) as caught:
                await store.search(EVERYTHING, parse_sort("name"), 2, cursor)
            assert caught.value.code == "bad_cursor"

        within(open_store, body)

    @pytest.mark.parametrize("other", ["-name", "id", "metadata.name"])
    def test_the_cursor_of_another_sort_is_refused(self, open_store, plan, other):
        async def body(store):
            await insert_all(store, [record(name=f"n{i}") for i in range(3)])
            plan()
            cursor = (await store.search(EVERYTHING, parse_sort("name"), 1, None)).cursor
            with pytest.raises(QueryError) as caught:
                await store.search(EVERYTHING, parse_sort(other), 1, cursor)
            assert caught.value.code == "bad_cursor"

        within(open_store, body)

    @pytest.mark.parametrize("other", [{"name": "n1"}, {"comment": ""}, {"$text": "n1"}, {"name": {"$gte": "n0"}}], ids=str)
    def test_the_cursor_of_another_filter_is_refused(self, open_store, plan, other):
        """It has the total of that one; the filter it came from may be asked again, in words that mean the same tree."""

        async def body(store):
            await insert_all(store, [record(name=f"n{i}") for i in range(3)])
            plan()
            sort = parse_sort("name")
            cursor = (await store.search(parse_filter({"name": {"$gte": "n"}}), sort, 1, None)).cursor
            assert len((await store.search(parse_filter({"name": {"$gte": "n"}}), sort, 1, cursor)).documents) == 1
            for node, include_deleted in ((parse_filter(other), False), (parse_filter({"name": {"$gte": "n"}}), True)):
                with pytest.raises(QueryError, match="another filter") as caught:
                    await store.search(node, sort, 1, cursor, include_deleted)
                assert caught.value.code == "bad_cursor"

        within(open_store, body)

    def test_tombstones_are_found_only_when_asked_for(self, open_store, plan):
        alive, dead = record(name="same"), record(name="same")

        async def body(store):
            await insert_all(store, [alive, dead])
            await store.replace(changed(dead, state="deleted"), 1)
            node, sort = parse_filter({"name": "same"}), parse_sort("name")
            plan()
            assert ids_of(await store.search(node, sort, 9, None)) == [alive.document.id]
            assert ids_of(await store.search(node, sort, 9, None, include_deleted=True)) == [
                alive.document.id,
                dead.document.id,
            ]
            assert await store.count(node) == 1
            assert await store.distinct("name", node, 9) == [("same", 1)]

        within(open_store, body)

    def test_search_returns_documents_as_they_were_saved(self, open_store, plan):
        one = record(name="T1", metadata={"a": [1.5, {"$complex": [1, 2]}], "big": 2**70})

        async def body(store):
            await store.insert(one)
            plan()
            page = await store.search(parse_filter({"name": "T1"}), parse_sort("name"), 1, None)
            assert msgspec.json.decode(page.documents[0], type=DataFile) == one.document

        within(open_store, body)

    @pytest.mark.parametrize(
        "query",
        [
            {"a": {"$in": list(range(4000))}},
            {"a": {"$nin": list(range(1, 4000))}},
            {"a": {"$in": [f"text {i}" for i in range(4000)] + [0]}},
            {"a": {"$in": [None] * 4000 + [0]}},
            {"a": {"$in": [[i] for i in range(4000)] + [0]}},
            {"$or": [{"a": {"$gte": i, "$lt": i + 1}} for i in range(100)]},
            {"$or": [{f"k{i}": i} for i in range(200)] + [{"a": 0}]},
            {"$and": [{"a": {"$ne": i}} for i in range(1, 200)]},
            {f"k{i}": None for i in range(60)},
            {"$nor": [{f"k{i}": {"$exists": True}} for i in range(60)]},
        ],
        ids=lambda query: ascii(query)[:40],
    )
    def test_the_largest_filters_that_are_accepted_are_answered(self, open_store, plan, query):
        """Also when the sort path has values of every kind."""
        kinds = [0, "a", None, True, {"$float": "NaN"}, {"$complex": [1, 2]}, {"$date": "2026-01-01"}]
        records = [record(metadata={"a": i % 2 * 5000, "s": kind}) for i, kind in enumerate(kinds)]
        sort = parse_sort("s")

        async def body(store):
            await insert_all(store, records)
            plan()
            assert await pages(store, query, sort, 2, plan) == expected_ids(records, query, sort)
            assert await store.count(parse_filter(query)) == len(expected_ids(records, query, sort))
            await store.distinct(parse_path("s"), parse_filter(query), 10)

        within(open_store, body)

    @pytest.mark.parametrize(
        "value", [10**400, -(10**400), 2**1023, 10**4000], ids=["huge", "huge negative", "2**1023", "vast"]
    )
    def test_no_value_that_was_saved_keeps_others_from_being_found(self, open_store, plan, value):
        """Whatever JSON number a document holds, the store goes on answering."""

        async def body(store):
            await insert_all(store, [record(name="first"), record(metadata={"a": value}), record(name="last")])
            plan()
            assert await store.count(parse_filter({"name": {"$in": ["first", "last"]}})) == 2

        within(open_store, body)

    def test_distinct_counts_the_documents_of_each_value_most_frequent_first(self, open_store):
        many = [
            ["C7", "C7"],
            "C7",
            "C8",
            5,
            5.0,
            6,
            True,
            None,
            {"$date": "2026-01-31"},
            {"b": 1},
            {"$float": "NaN"},
            "x" * 150,
            [],
        ]

        async def body(store):
            await insert_all(store, [record(name=f"n{i}", metadata={"chip": chip}) for i, chip in enumerate(many)])
            await store.insert(record(state="deleted", metadata={"chip": "C8"}))
            path = parse_path("chip")
            found = await store.distinct(path, EVERYTHING, 100)
            assert found[:2] == [(5, 2), ("C7", 2)]
            rest = {str(value): (value, count) for value, count in found[2:]}
            assert rest == {
                "C8": ("C8", 1), "6": (6, 1), "True": (True, 1), "x" * 100: ("x" * 100, 1),
                "{'$date': '2026-01-31T00:00:00.000000Z'}": ({"$date": "2026-01-31T00:00:00.000000Z"}, 1),
            }  # fmt: skip
            assert await store.distinct(path, EVERYTHING, 1) == found[:1]
            assert await store.distinct(path, parse_filter({"name": {"$in": ["n1", "n2"]}}), 9) == [("C7", 1), ("C8", 1)]
            assert await store.distinct(parse_path("absent"), EVERYTHING, 9) == []

        within(open_store, body)

    # --- tokens ----------------------------------------------------------------------------------------------------

    def test_tokens_are_found_by_hash_listed_and_revoked_once(self, open_store):
        one = Token("t1", "lab", "hash-1", ("read", "write"), NOW)
        two = Token("t2", "guest", "hash-2", ("read",), NOW, expires_at=NOW)

        async def body(store):
            assert await store.tokens() == []
            await store.add_token(one)
            await store.add_token(two)
            assert await store.find_token("hash-1") == one
            assert await store.find_token("hash-2") == two
            assert await store.find_token("hash-3") is None
            assert await store.find_token("t1") is None
            assert await store.revoke_token("t1", "2026-02-01T00:00:00.000000Z")
            assert await store.revoke_token("t1", "2027-02-01T00:00:00.000000Z")
            assert not await store.revoke_token("t9", NOW)
            revoked = msgspec.structs.replace(one, revoked_at="2026-02-01T00:00:00.000000Z")
            assert await store.find_token("hash-1") == revoked, "the first revocation is the one that counts"
            assert await store.tokens() == [revoked, two]

        within(open_store, body)

    def test_a_store_is_added_changed_and_taken_away_only_as_it_was_known(self, open_store):
        """Each change names what it takes the place of, and changes nothing when that is not what is there."""
        old, other = AddedStore("archive", "/data/archive"), AddedStore("bucket", "gs://lab")
        new = AddedStore("archive", "/data/elsewhere", closing="1")

        async def body(store):
            assert await store.added_stores() == []
            assert await store.change_store(None, other)
            assert await store.change_store(None, old)
            assert not await store.change_store(None, old), "it is there already"
            assert not await store.change_store(new, old)
            assert not await store.change_store(new, None)
            assert await store.added_stores() == [old, other]
            assert await store.change_store(old, new)
            assert not await store.change_store(old, None)
            assert await store.added_stores() == [new, other]
            assert await store.change_store(new, None)
            assert not await store.change_store(new, None)
            assert await store.added_stores() == [other]

        within(open_store, body)

    def test_of_those_who_change_a_store_at_once_one_succeeds(self, open_store):
        old = AddedStore("archive", "/data/archive")
        wanted = [msgspec.structs.replace(old, closing=str(i)) for i in range(8)]

        async def body(store):
            added = await asyncio.gather(*(store.change_store(None, each) for each in wanted))
            assert added.count(True) == 1
            before = wanted[added.index(True)]
            changed = await asyncio.gather(*(store.change_store(before, each) for each in (old, None, old, None)))
            assert changed.count(True) == 1
            assert await store.added_stores() == ([] if changed.index(True) % 2 else [old])

        within(open_store, body)

    def test_a_lease_is_of_one_at_a_time(self, open_store):
        """Kept by who has it, let go of by an instant that has passed, taken once it is over."""

        async def body(store):
            got = await asyncio.gather(*(store.lease("drain", f"owner {i}", 100.0, 110.0) for i in range(8)))
            assert got.count(True) == 1
            mine, other = f"owner {got.index(True)}", f"owner {(got.index(True) + 1) % 8}"
            assert await store.lease("another", other, 100.0, 110.0)
            assert await store.lease("drain", mine, 105.0, 120.0)
            assert not await store.lease("drain", other, 119.0, 130.0)
            assert await store.lease("drain", other, 121.0, 130.0)
            assert not await store.lease("drain", mine, 122.0, 140.0)
            assert await store.lease("drain", other, 123.0, 0.0)
            assert await store.lease("drain", mine, 123.0, 140.0)

        within(open_store, body)

    def test_snapshots_are_those_of_the_records_in_a_store(self, open_store):
        """Each store has its own copies of the snapshots that its records refer to."""
        settings = [{"vna": {"settings": {f"s{i}": [f"{k}"] * 10 for i in range(1000)}}} for k in range(3)]
        hashes = [separated(record(instruments=each).document)[1].hash for each in settings]

        async def body(store):
            await insert_all(store, [record(instruments=settings[0]), record(instruments=settings[1], store="archive")])
            await insert_all(store, [record(instruments=settings[i], store=s) for i, s in ((0, "archive"), (2, "other"))])
            assert await store.snapshots("default") == {hashes[0]}
            assert await store.snapshots("archive") == {hashes[0], hashes[1]}
            assert await store.snapshots("other") == {hashes[2]}
            assert await store.snapshots("nowhere") == set()
            for name in ("default", "archive", "other", "nowhere"):
                needed = {hash for hash in hashes if await store.needs_snapshot(name, hash)}
                assert needed == await store.snapshots(name)

        within(open_store, body)

    def test_the_store_of_a_datafile_is_found_counted_and_sorted_by(self, open_store):
        async def body(store):
            await insert_all(store, [record(name=f"n{i}", store=f"s{i % 3}") for i in range(9)])
            assert await store.count(parse_filter({"store": "s1"})) == 3
            assert dict(await store.distinct("store", EVERYTHING, 10)) == {"s0": 3, "s1": 3, "s2": 3}
            page = await store.search(EVERYTHING, parse_sort("-store"), 3, None)
            assert {msgspec.json.decode(document)["store"] for document in page.documents} == {"s2"}

        within(open_store, body)

    def test_a_healthy_store_says_so(self, open_store):
        within(open_store, lambda store: _is(store.check(), None))

    def test_a_caller_that_goes_away_undoes_nothing_of_the_others(self, open_store):
        records = [record() for _ in range(40)]

        async def body(store):
            tasks = [asyncio.create_task(store.insert(each)) for each in records]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for each in records[1::2]:
                assert await store.get(each.document.id) == each

        within(open_store, body)


class DurableMetadataStoreTests(MetadataStoreTests):
    """What a store promises in addition when its database outlives it and may be shared."""

    def test_what_was_acknowledged_is_there_after_reopening(self, open_store):
        records = [record(name=f"n{i}", metadata={"a": i}) for i in range(40)]
        token = Token("t1", "lab", "hash-1", ("read",), NOW)
        added = AddedStore("archive", "/data/archive")

        async def save(store):
            await asyncio.gather(*(store.insert(each) for each in records))
            await store.replace(changed(records[0], name="changed"), 1)
            await store.bar("id", "key")
            await store.add_token(token)
            await store.change_store(None, added)

        async def look(store):
            assert await store.get(records[0].document.id) == changed(records[0], name="changed")
            for each in records[1:]:
                assert await store.get(each.document.id) == each
            assert await store.count(EVERYTHING) == len(records)
            assert await store.count(parse_filter({"a": {"$gte": 20}})) == 20
            assert await store.find_token("hash-1") == token
            assert await store.added_stores() == [added]
            with pytest.raises(UnavailableError):
                await store.insert(Record(msgspec.structs.replace(record().document, id="id"), "key", "d"))

        within(open_store, save)
        within(open_store, look)

    def test_an_acknowledged_insert_is_seen_by_another_store_at_once(self, open_store):
        async def body(one):
            other = open_store("one")
            try:
                for i in range(20):
                    each = record(name=f"n{i}", metadata={"a": [i, i + 1]})
                    await one.insert(each)
                    assert await other.get(each.document.id) == each
                    assert await other.count(parse_filter({"a": i + 1})) == 1
                    new = changed(each, name="new", metadata={"a": -i})
                    assert await other.replace(new, 1)
                    assert await one.get(each.document.id) == new, "a store never answers from what it remembers"
                    assert not await one.replace(changed(each), 1)
                    assert await one.count(parse_filter({"name": "new"})) == i + 1
            finally:
                await other.close()

        within(open_store, body)

    def test_two_stores_insert_and_index_the_same_paths_at_once(self, open_store, plan):
        records = [record(name=f"n{i % 5}", metadata={f"k{i % 9}": [i, f"v{i}"][: 1 + i % 2]}) for i in range(120)]
        rivals = [Record(record(5).document, f"rival-{i}", "d") for i in range(10)]

        async def body(one):
            other = open_store("one")
            try:
                stores = [one, other]
                answers = await asyncio.gather(*(stores[i % 2].insert(each) for i, each in enumerate([*records, *rivals])))
                assert answers.count(None) == len(records) + 1
                saved = [each async for each in other.scan()]
                assert {each.document.id for each in saved} == {each.document.id for each in [*records, rivals[0]]}
                for query in ({"k3": {"$gte": 40}}, {"name": "n2"}, {"k8": {"$exists": True}}, {"k0": None}, {}):
                    for text in ("k3", "-k3", "name"):
                        plan()
                        for store in stores:
                            assert await pages(store, query, parse_sort(text), 50) == expected_ids(
                                saved, query, parse_sort(text)
                            )
            finally:
                await other.close()

        within(open_store, body)


async def _is(awaitable: Awaitable[Any], expected: Any) -> None:
    assert await awaitable == expected
