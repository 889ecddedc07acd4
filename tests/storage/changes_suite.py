"""The conformance suite of the history in a `MetadataStore`: what every backend promises of changes.

A backend supplies `open_store`, as for the suites of records and of sweeps.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from metadata_suite import changed, record
from sweep_suite import NOW, OpenStore, append, folded, new_sweep, steps, within

from aq_data.errors import UnavailableError
from aq_data.models.datafile import DataFile
from aq_data.models.difference import json_of
from aq_data.models.history import Change, change_between, rebuilt
from aq_data.models.sweep import Ending
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import CHANGES_BYTES, MetadataStore

NUMBERS = {"int": 1, "float": 1.0, "big": 2**70, "nan": {"$float": "NaN"}, "a.b": {"$literal": {"$float": 1}}, "none": None}


def next_of(old: Record, actor: str = "anna", **fields: Any) -> Record:
    """The record of a change, with the change."""
    new = changed(old, updated_at=f"2026-02-01T00:00:00.{old.document.revision:06}Z", **fields)
    return msgspec.structs.replace(new, change=change_between(old.document, new.document, actor))


def without_change(one: Record) -> Record:
    return msgspec.structs.replace(one, change=None)


async def made(store: MetadataStore, number: int) -> list[Record]:
    """A record and so many changes of it, in order."""
    revisions = [record(metadata={"n": 0, **NUMBERS})]
    assert await store.insert(revisions[0]) is None
    for n in range(1, number + 1):
        revisions.append(next_of(revisions[-1], actor=f"user {n}", metadata={"n": n, "list": [{"x": n}, {"x": 0}]}))
        assert await store.replace(revisions[-1], n)
    return revisions


def listed(revisions: list[Record]) -> list[Change]:
    return [one.change for one in reversed(revisions) if one.change is not None]


class ChangesTests:
    """What a metadata store promises of the changes of its records."""

    holds_larger_ones = True
    """Than a whole list may take."""

    def test_changes_are_listed_newest_first_as_they_were_given(self, open_store):
        async def body(store):
            revisions = await made(store, 5)
            assert await store.changes(revisions[0].document.id, 100) == listed(revisions)

        within(open_store, body)

    def test_a_page_ends_at_its_limit_and_the_next_begins_below(self, open_store):
        """Page by page it is the whole list, of any length of pages."""

        async def body(store):
            revisions = await made(store, 7)
            id = revisions[0].document.id
            for limit in (1, 2, 3, 7, 8):
                found, before = [], None
                while page := await store.changes(id, limit, before):
                    assert len(page) <= limit
                    found += page
                    before = page[-1].revision
                assert found == listed(revisions)
            assert await store.changes(id, 10, 1) == []

        within(open_store, body)

    def test_large_changes_come_a_few_at_a_time(self, open_store):
        """No list of them fills the memory, and none is left out."""

        async def body(store):
            revisions = [record()]
            assert await store.insert(revisions[0]) is None
            for n in range(1, 9):
                revisions.append(next_of(revisions[-1], comment=str(n) * (CHANGES_BYTES // 6)))
                assert await store.replace(revisions[-1], n)
            found = []
            while page := await store.changes(revisions[0].document.id, 100, found[-1].revision if found else None):
                assert len(page) <= 6
                found += page
            assert found == listed(revisions)
            if not self.holds_larger_ones:
                return
            # One that is larger than all may be is given alone.
            revisions.append(next_of(revisions[-1], comment="x" * (CHANGES_BYTES + 1)))
            assert await store.replace(revisions[-1], 9)
            assert await store.changes(revisions[0].document.id, 100) == listed(revisions)[:1]

        within(open_store, body)

    def test_what_was_never_changed_or_never_was_has_no_changes(self, open_store):
        async def body(store):
            revisions = await made(store, 0)
            await made(store, 2)
            assert await store.changes(revisions[0].document.id, 10) == []
            assert await store.changes(record().document.id, 10) == []

        within(open_store, body)

    def test_every_revision_is_rebuilt_from_the_record_and_its_changes(self, open_store):
        """Integers, floats, big numbers and tags come back as they were."""

        async def body(store):
            revisions = await made(store, 6)
            newest = await store.get(revisions[0].document.id)
            changes = await store.changes(newest.document.id, 10)
            for back, old in enumerate(reversed(revisions)):
                document = rebuilt(newest.document, changes[:back])
                assert form(document) == form(old.document)

        within(open_store, body)

    def test_a_record_is_read_without_its_change(self, open_store):
        """It is the record that was given, but for that."""

        async def body(store):
            revisions = await made(store, 2)
            assert await store.get(revisions[0].document.id) == without_change(revisions[-1])
            assert [one async for one in store.scan()] == [without_change(revisions[-1])]

        within(open_store, body)

    def test_a_refused_replace_leaves_no_change(self, open_store):
        """That of another revision, of an absent record, and one whose file was barred."""

        async def body(store):
            revisions = await made(store, 2)
            id = revisions[0].document.id
            assert not await store.replace(next_of(revisions[0], name="late"), 1)
            absent = record()
            assert not await store.replace(next_of(absent), 1)
            await store.bar(id, "file")
            with pytest.raises(UnavailableError):
                await store.replace(next_of(revisions[-1], name="barred"), 3, publishes="file")
            assert await store.changes(id, 10) == listed(revisions)
            assert await store.changes(absent.document.id, 10) == []
            assert await store.replace(next_of(revisions[-1], name="good"), 3)
            assert [change.revision for change in await store.changes(id, 10)] == [4, 3, 2]

        within(open_store, body)

    def test_a_tombstone_keeps_its_changes(self, open_store):
        async def body(store):
            revisions = await made(store, 1)
            revisions.append(next_of(revisions[-1], actor="bob", state="deleted"))
            assert await store.replace(revisions[-1], 2)
            found = await store.changes(revisions[0].document.id, 10)
            assert found == listed(revisions)
            assert found[0].actor == "bob"

        within(open_store, body)

    def test_the_end_of_a_sweep_is_a_change_and_one_that_fails_is_none(self, open_store):
        """As are changes while it is open; `seal` remembers who asked for the end."""

        async def body(store):
            one, plan, state = new_sweep()
            await store.sweeps.open(one, plan, state, [])
            await append(store, plan, *steps("w", 1, 3))
            patched = next_of(one, comment="good")
            assert await store.replace(patched, 1)
            sealed = await store.sweeps.seal(plan.id, "complete", Ending({"w": 3}), NOW, "carla")
            assert sealed.seal.actor == "carla"
            assert (await store.sweeps.seal(plan.id, "complete", Ending(), NOW, "dora")).seal.actor == "carla"
            await folded(store, plan, 3)
            token = (await store.sweeps.lease(plan.id, 10.0, 19.0)).token
            assert await store.sweeps.end(plan.id, token, next_of(one, state="complete"), 1) == "stale"
            final = next_of(patched, actor="carla", state="complete")
            assert await store.sweeps.end(plan.id, token - 1, final, 2) == "fenced"
            assert await store.changes(plan.id, 10) == [patched.change]
            assert await store.sweeps.end(plan.id, token, final, 2) == "ended"
            assert await store.changes(plan.id, 10) == [final.change, patched.change]
            assert await store.get(plan.id) == without_change(final)

        within(open_store, body)

    def check_contended(self, open_store: OpenStore, stores: int) -> None:
        async def raise_one(store: MetadataStore, id: str, actor: str) -> None:
            while True:
                old = await store.get(id)
                new = next_of(old, actor, metadata={"n": old.document.metadata["n"] + 1})
                if await store.replace(new, old.document.revision):
                    # Once acknowledged it is listed.
                    assert new.change in await store.changes(id, 100)
                    return

        async def body(*opened: MetadataStore) -> None:
            first = record(metadata={"n": 0})
            id = first.document.id
            await opened[0].insert(first)
            await asyncio.gather(*(raise_one(opened[i % stores], id, f"user {i}") for i in range(12)))
            for store in opened:
                changes = await store.changes(id, 100)
                assert [change.revision for change in changes] == list(range(13, 1, -1))
                assert sorted(change.actor for change in changes) == sorted(f"user {i}" for i in range(12))
                newest = await store.get(id)
                for back in range(13):
                    assert rebuilt(newest.document, changes[:back]).metadata == {"n": 12 - back}

        within(open_store, body, stores)

    def test_of_changes_at_once_each_is_kept_with_its_revision(self, open_store):
        """No gap, none twice, nobody else's."""
        self.check_contended(open_store, 1)


class DurableChangesTests(ChangesTests):
    """What is promised in addition by a store that several processes open."""

    def test_of_changes_by_two_processes_each_is_kept_with_its_revision(self, open_store):
        self.check_contended(open_store, 2)

    def test_changes_are_there_after_reopening(self, open_store):
        revisions = within(open_store, lambda store: made(store, 4))
        assert within(open_store, lambda store: store.changes(revisions[0].document.id, 10)) == listed(revisions)


def form(document: DataFile) -> bytes:
    return msgspec.json.encode(json_of(document), order="deterministic")
