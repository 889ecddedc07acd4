"""No document in MongoDB comes near 16 MB, whatever is saved; what it cannot hold is refused in words that help."""

from __future__ import annotations

import base64
import random

import msgspec
import pytest
from changes_suite import listed, next_of
from metadata_suite import changed, record, within
from sweep_suite import append, new_sweep, opened, step

from aq_data.errors import CorruptionError, TooLargeError, UnavailableError
from aq_data.models.arrays import ArrayInfo
from aq_data.models.datafile import FileInfo, SweepInfo
from aq_data.models.paths import parse_sort
from aq_data.models.query import parse_filter
from aq_data.models.sweep import Ending
from aq_data.storage.metadata import _mongo_parts, _mongo_records, _mongo_sweeps
from aq_data.storage.metadata import mongo as mongo_store

pytestmark = pytest.mark.services

LIMIT = 16 << 20


def largest(behind):
    """The size of the largest document in each collection."""
    size = [{"$group": {"_id": None, "size": {"$max": {"$bsonSize": "$$ROOT"}}}}]
    found = {name: list(behind[name].aggregate(size)) for name in behind.list_collection_names()}
    return {name: rows[0]["size"] for name, rows in found.items() if rows}


def noise(size, seed=1):
    """Tagged bytes that nothing compresses."""
    return {"$bytes": base64.b64encode(random.Random(seed).randbytes(size * 3 // 4)).decode()}


def array(number):
    attrs = {"long_name": f"variable {number}", "units": "V", "note": "n" * 300}
    return ArrayInfo(
        name=f"array_{number:05}",
        dtype="<f8",
        shape=(100,),
        dims=("x",),
        attrs=attrs,
        role="data",
        chunks=(100,),
        codec="zstd",
        nbytes=800,
    )


def attached(number):
    return FileInfo(
        f"file {number} of the fridge.dat", number, "application/octet-stream", f"{number:064x}", f"{number:016x}"
    )


# --- what is kept --------------------------------------------------------------------------------------------------------


def test_documents_as_large_as_a_server_takes_are_saved_found_changed_and_listed(open_store, behind):
    """Sixteen MiB of JSON, their changes of twice that; what was replaced leaves nothing behind."""

    async def body(store):
        one = record(name="large", metadata={"image": noise((15 << 20), 1), "chip": "C7"})
        assert len(msgspec.json.encode(one.document)) > 15 << 20
        assert await store.insert(one) is None
        assert await store.insert(one) == one
        other = next_of(one, metadata={"image": noise((15 << 20), 2), "chip": "C8"})
        assert await store.replace(other, 1)
        third = next_of(other, comment="good")
        assert await store.replace(third, 2)
        current = msgspec.structs.replace(third, change=None)
        assert await store.get(one.document.id) == current
        [document] = (await store.search(parse_filter({"chip": "C8"}), parse_sort("name"), 9, None)).documents
        assert bytes(document) == msgspec.json.encode(current.document)
        found = await store.changes(one.document.id, 100)
        found += await store.changes(one.document.id, 100, found[-1].revision)
        assert found == listed([one, other, third])
        assert [one async for one in store.scan()] == [current]
        assert [left.key async for left in store.leftovers(0.0, False)] == []

    within(open_store, body)
    assert max(largest(behind).values()) < LIMIT // 2
    assert behind["parts"].count_documents({"_id": {"$regex": "/document/"}}) == 4


def test_ten_thousand_arrays_and_twenty_thousand_files_are_kept(open_store, behind):
    """Each is found by its name, and the next is attached."""

    async def body(store):
        one = record(arrays=tuple(map(array, range(10_000))), files=tuple(map(attached, range(20_000))))
        assert len(msgspec.json.encode(one.document)) > 6 << 20
        assert await store.insert(one) is None
        assert await store.count(parse_filter({"arrays.name": "array_09999"})) == 1
        more = changed(one, files=(*one.document.files, attached(20_000)))
        assert await store.replace(more, 1, publishes="key")
        assert await store.count(parse_filter({"files.name": {"$regex": "^file 20000 "}})) == 1
        assert await store.get(one.document.id) == more

    within(open_store, body)
    assert max(largest(behind).values()) < LIMIT


def test_a_sweep_of_ten_thousand_arrays_is_opened_changed_written_and_ended(open_store, behind):
    """Its plan is as large as its document; what every block rewrites stays small."""

    async def body(store):
        one, plan, state = new_sweep()
        arrays = tuple(map(array, range(10_000)))
        plan = msgspec.structs.replace(plan, arrays=(*plan.arrays, *arrays))
        one = changed(one, arrays=arrays, sweep=SweepInfo())
        assert await store.sweeps.open(one, plan, state, []) is None
        await append(store, plan, step("w", 1))
        assert behind["datafiles"].aggregate([{"$project": {"size": {"$bsonSize": "$sweep"}}}]).next()["size"] < 4096
        assert await store.sweeps.get(plan.id) == (plan, (await store.sweeps.tail(plan.id)).state)
        again = changed(one, comment="good")
        assert await store.replace(again, 2)
        state = await store.sweeps.seal(plan.id, "complete", Ending({"w": 1}), "2026-01-01T00:00:00Z")
        assert [found for found, _ in await store.sweeps.unfinished()] == [plan]
        leased = await store.sweeps.lease(plan.id, 1.0, 9.0)
        await store.sweeps.record_fold(plan.id, leased.token, state.head, "1-1", 1.0)
        ended = changed(again, state="complete")
        assert await store.sweeps.end(plan.id, leased.token, ended, 3) == "ended"
        assert await store.get(plan.id) == ended
        assert [left.key async for left in store.leftovers(0.0, False)] == []
        await store.sweeps.forget(plan.id)
        assert [left.key.split("/")[2] async for left in store.leftovers(0.0, True)] == ["plan"]

    within(open_store, body)
    assert max(largest(behind).values()) < LIMIT // 2


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [{"log": "x" * (10 << 20)}, {"list": list(range(90_000))}, {f"k{i}": i for i in range(90_000)}],
    ids=["a long text", "a long list", "many settings"],
)
def test_what_cannot_be_found_by_is_refused_at_the_border_and_nothing_is_left(open_store, behind, metadata):
    """Two thirds of it are kept, or a third, for a number stands twice; the limit and the way out are named, also for a change."""
    [(key, value)] = metadata.items() if len(metadata) == 1 else [("", metadata)]
    less = dict(list(value.items())[: len(value) // 3]) if not key else {key: value[: len(value) * 2 // 3]}

    async def body(store):
        one = record(metadata=less)
        assert await store.insert(one) is None
        for attempt in (
            lambda: store.insert(record(metadata=metadata)),
            lambda: store.replace(changed(one, metadata=metadata), 1),
        ):
            with pytest.raises(TooLargeError, match=f"MongoDB takes {_mongo_records.INDEXED_KEYS} values and .* as arrays"):
                await attempt()
        assert await store.get(one.document.id) == one
        assert await store.count(parse_filter({})) == 1
        assert [left async for left in store.leftovers(0.0, False)] == []

    within(open_store, body)
    assert max(largest(behind).values()) < LIMIT


def test_a_sweep_whose_state_has_grown_too_large_takes_no_more_and_can_be_finished(open_store, behind):
    """Its document was changed a quarter of a million times; no block of it is lost."""
    room = _mongo_sweeps.STATE_BYTES

    async def body(store):
        one, plan, state = new_sweep()
        revisions = tuple((i, i) for i in range(100_000, 100_000 + (room - 1200) // 16))
        state = msgspec.structs.replace(state, revisions=revisions)
        assert await store.sweeps.open(one, plan, state, []) is None
        number = 0
        with pytest.raises(TooLargeError, match="finish it and open another"):
            for number in range(20):
                await append(store, plan, step(f"{number:02}" + "\x02" * 60, 1))
        assert number
        with pytest.raises(TooLargeError):
            fuller = msgspec.structs.replace(state, revisions=(*revisions, *revisions))
            await store.sweeps.open(*new_sweep()[:2], fuller, [])
        sealed = await store.sweeps.seal(plan.id, "complete", Ending(reason="full"), "2026-01-01T00:00:00Z")
        assert (sealed.head, len((await store.sweeps.tail(plan.id)).rows)) == (number, number)

    within(open_store, body)
    assert max(largest(behind).values()) < LIMIT // 2


# --- what lies apart -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Everything is apart, in pieces."""
    for module in (mongo_store, _mongo_sweeps):
        monkeypatch.setattr(module, "APART_BYTES", 0)
    monkeypatch.setattr(_mongo_parts, "PIECE_BYTES", 100)


@pytest.mark.usefixtures("small")
def test_what_a_save_that_died_put_apart_is_collected_and_nothing_else(open_store, behind, monkeypatch):
    """The parts of records, of their histories and plans stay; so do those that are too young."""

    async def keys(store, older_than=0.0, delete=True):
        return [left.key async for left in store.leftovers(older_than, delete)]

    async def body(store):
        one = record(name="one")
        await store.insert(one)
        revisions = [one]
        for n in range(1, 4):
            revisions.append(next_of(revisions[-1], comment=f"c{n}"))
            assert await store.replace(revisions[-1], n)
        plan = await opened(store)
        await append(store, plan, step("w", 1))
        assert await keys(store) == []

        async def die(*_):
            raise UnavailableError("as if the server had died")

        with monkeypatch.context() as patch:
            patch.setattr(type(store), "claim", die)
            with pytest.raises(UnavailableError):
                await store.insert(record(5, name="dead"))
            with pytest.raises(UnavailableError):
                await store.replace(next_of(revisions[-1], comment="dead"), 4)
        assert await keys(store, older_than=60.0) == []
        names = sorted(key.split("/")[2] for key in await keys(store))
        assert names == ["change", "document", "document"]
        assert await keys(store) == []
        assert (await store.get(one.document.id)).document == revisions[-1].document
        assert await store.changes(one.document.id, 10) == listed(revisions)
        assert (await store.sweeps.get(plan.id))[0] == plan
        assert await store.insert(record(5, name="sent again")) is None

    within(open_store, body)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["insert", "replace", "sweep", "open"])
def test_a_save_whose_parts_were_collected_under_it_publishes_nothing(open_store, monkeypatch, way):
    """It is told to send them again, and that works."""

    async def body(store):
        one = record(name="old")
        sweep, plan, state = new_sweep()
        sweep = changed(sweep, sweep=SweepInfo())
        if way == "replace":
            await store.insert(one)
        if way == "sweep":
            await store.sweeps.open(sweep, plan, state, [])
        act = {
            "insert": lambda: store.insert(one),
            "replace": lambda: store.replace(changed(one, name="new"), 1),
            "sweep": lambda: store.replace(changed(sweep, name="new"), 2),
            "open": lambda: store.sweeps.open(sweep, plan, state, []),
        }[way]
        claim = type(store).claim

        async def collect(self, id, kept):
            await claim(self, id, kept)
            assert [left async for left in store.leftovers(0.0, True)]

        with monkeypatch.context() as patch:
            patch.setattr(type(store), "claim", collect)
            with pytest.raises(UnavailableError, match="send it again"):
                await act()
        assert await act() in (None, True)
        found = await store.get(plan.id if way in ("sweep", "open") else one.document.id)
        assert found.document.name == ("new" if way in ("replace", "sweep") else found.document.name)
        assert [left async for left in store.leftovers(0.0, False)] == []

    within(open_store, body)


@pytest.mark.usefixtures("small")
def test_a_record_that_is_changed_while_it_is_read_is_read_again(open_store, monkeypatch):
    """Its document was gone when it was looked for."""

    async def body(store):
        one = record(name="old")
        await store.insert(one)
        new = changed(one, name="new")
        read, done = _mongo_parts.Parts.read, []

        async def late(self, id, apart, name):
            if not done:
                done.append(True)
                assert await store.replace(new, 1)
            return await read(self, id, apart, name)

        for ask in (lambda: store.get(one.document.id), lambda: _named(store), lambda: _first(store.scan())):
            with monkeypatch.context() as patch:
                patch.setattr(_mongo_parts.Parts, "read", late)
                assert await ask() == new
            assert done
            done.clear()
            assert await store.replace(msgspec.structs.replace(one, document=msgspec.structs.replace(one.document)), 2)

    within(open_store, body)


async def _named(store):
    page = await store.search(parse_filter({}), parse_sort("id"), 9, None)
    return await store.get(msgspec.json.decode(page.documents[0])["id"])


async def _first(found):
    return await anext(found)


@pytest.mark.usefixtures("small")
def test_a_record_that_lacks_a_part_is_corrupt_and_says_which(open_store, behind):
    """Somebody deleted it by hand."""

    async def body(store):
        one = record(name="one")
        await store.insert(one)
        behind["parts"].delete_one({"_id": {"$regex": "/document/0001"}})
        with pytest.raises(CorruptionError, match=f"{one.document.id}/[0-9a-f]+/document is missing"):
            await store.get(one.document.id)

    within(open_store, body)
