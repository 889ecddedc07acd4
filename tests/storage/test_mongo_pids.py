"""On MongoDB a pid is that of one living record: kept by claims, not by an index, so on a sharded cluster as well."""

from __future__ import annotations

import asyncio

import pytest
from metadata_suite import EVERYTHING, changed, record, within

from aq_data.errors import ConflictError, UnavailableError
from aq_data.models.query import parse_filter
from aq_data.storage.metadata import _mongo_claims
from aq_data.storage.metadata._mongo_records import SCHEMA_VERSION

pytestmark = pytest.mark.services


def holders(behind, pid):
    return [row["_id"] for row in behind["datafiles"].find({"pid": pid})]


def test_no_index_but_that_of_ids_is_unique_where_records_and_blocks_lie(open_store, behind):
    """A cluster sharded by `_id` could keep no other."""
    within(open_store, lambda store: store.count(EVERYTHING))
    for name in ("datafiles", "blocks", "changes", "snapshots", "pids"):
        assert not any(index.get("unique") for index in behind[name].index_information().values()), name


def test_of_many_that_want_a_pid_at_once_one_has_it(open_store, behind):
    """By inserts and by changes, from several servers; the others are told, and nothing of them is published."""

    async def body(one):
        other = open_store("one")
        stores = [one, other]
        for turn in range(5):
            pid = f"lab/{turn}"
            old = [record() for _ in range(4)]
            for each in old:
                await one.insert(each)
            wanting = [stores[i % 2].replace(changed(each, pid=pid), 1) for i, each in enumerate(old)]
            wanting += [stores[i % 2].insert(record(pid=pid)) for i in range(4)]
            answers = await asyncio.gather(*wanting, return_exceptions=True)
            won = [answer for answer in answers if answer is None or answer is True]
            assert len(won) <= 1
            assert all(isinstance(answer, (ConflictError, UnavailableError)) for answer in answers if answer not in won)
            assert len(holders(behind, pid)) == len(won)
            if not won:  # each stood in another's way
                assert await one.insert(record(pid=pid)) is None
            assert await one.count(parse_filter({"pid": pid})) == 1
        await other.close()

    within(open_store, body)


def test_a_pid_claimed_by_a_server_that_died_is_free_for_the_next(open_store, behind, monkeypatch):
    """It had claimed and never published."""

    async def body(store):
        dead = record(pid="lab/1")
        claim = _mongo_claims.Claims.claim

        async def die(self, id, kept):
            await claim(self, id, kept)
            raise asyncio.CancelledError

        with monkeypatch.context() as patch:
            patch.setattr(_mongo_claims.Claims, "claim", die)
            with pytest.raises(asyncio.CancelledError):
                await store.insert(dead)
        assert await store.get(dead.document.id) is None
        alive = record(pid="lab/1")
        assert await store.insert(alive) is None
        with pytest.raises(ConflictError):
            await store.insert(dead)
        assert holders(behind, "lab/1") == [alive.document.id]

    within(open_store, body)


@pytest.mark.parametrize("way", ["insert", "replace"])
def test_a_server_that_wakes_up_after_its_pid_was_taken_over_does_not_publish_it(open_store, behind, monkeypatch, way):
    """Its claim is gone, so it claims anew, and is told."""

    async def body(store):
        other = open_store("one")
        slow, fast = record(pid="lab/1"), record(pid="lab/1")
        if way == "replace":
            slow = changed(slow, pid=None)
            await store.insert(slow)
            slow = changed(slow, pid="lab/1")
        claim, slept = _mongo_claims.Claims.claim, []

        async def sleep(self, id, kept):
            await claim(self, id, kept)
            if self is store._claims and not slept:
                slept.append(True)
                assert await other.insert(fast) is None

        monkeypatch.setattr(_mongo_claims.Claims, "claim", sleep)
        with pytest.raises(ConflictError, match="lab/1"):
            await (store.insert(slow) if way == "insert" else store.replace(slow, slow.document.revision - 1))
        assert slept
        assert holders(behind, "lab/1") == [fast.document.id]
        await other.close()

    within(open_store, body)


def test_the_pids_of_a_database_of_version_1_are_claimed_when_it_is_opened(open_store, behind):
    """There a unique index kept them; it goes, and they are kept."""

    async def save(store):
        one = record(pid="lab/1")
        await store.insert(one)
        return one

    async def look(store):
        with pytest.raises(ConflictError):
            await store.insert(record(pid="lab/1"))
        assert await store.replace(changed(one, pid=None), 1)
        assert await store.insert(record(pid="lab/1")) is None

    one = within(open_store, save)
    behind["pids"].delete_many({})
    behind["datafiles"].update_many({}, {"$unset": {"holds": ""}})
    behind["datafiles"].create_index(
        [("pid", 1)], name="pids", unique=True, partialFilterExpression={"pid": {"$type": "string"}}
    )
    behind["meta"].update_one({"_id": "schema"}, {"$set": {"version": 1}})
    within(open_store, look)
    assert "pids" not in behind["datafiles"].index_information()
    assert behind["meta"].find_one({"_id": "schema"})["version"] == SCHEMA_VERSION


def test_a_pid_of_any_length_is_kept(open_store):
    """A very long one is claimed by its hash."""

    async def body(store):
        for pid in ("é" * 499, "x" * 5000, "x" * 4999 + "y"):
            one = record(pid=pid)
            assert await store.insert(one) is None
            assert await store.get(one.document.id) == one
            with pytest.raises(ConflictError):
                await store.insert(record(pid=pid))

    within(open_store, body)
