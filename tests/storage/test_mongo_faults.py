"""What MongoDB acknowledged is kept when its engine is killed, and a write whose answer is lost counts once."""

from __future__ import annotations

import asyncio

import pytest
from metadata_suite import EVERYTHING, NOW, changed, record, within
from services.cutting import CuttingProxy
from services.mongo import IN_DOCKER, Engine
from sweep_suite import append, everything, new_sweep, opened, seqs, step, steps

from aq_data.errors import AqDataError, ConflictError, CorruptionError, NotFoundError, UnavailableError
from aq_data.models.datafile import SweepInfo
from aq_data.models.query import parse_filter
from aq_data.models.sweep import Block, Ending, Piece, place
from aq_data.storage.metadata import _mongo_tries
from aq_data.storage.metadata.mongo import MongoStore
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import Token
from aq_data.storage.metadata.sweeplog import Row

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(_mongo_tries, "PAUSE", 0.01)


@pytest.fixture
def proxy(mongo):
    proxy = CuttingProxy(mongo)
    yield proxy
    proxy.close()


@pytest.fixture
def open_store(proxy, mongo_database):
    return lambda name: MongoStore(proxy.url, mongo_database)


# --- lost answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_request", [False, True], ids=["answer lost", "request lost"])
def test_an_insert_without_an_answer_is_new_once(open_store, proxy, is_request):
    """It is not taken for somebody else's: the caller would remove the blobs that it has published."""

    async def body(store):
        one = record()
        await store.count(EVERYTHING)
        proxy.lose("update", "datafiles", request=is_request)
        assert await store.insert(one) is None
        assert not proxy.waits
        assert await store.insert(Record(one.document, "other", "d")) == one
        assert await store.count(EVERYTHING) == 1

    within(open_store, body)


def test_an_insert_that_lost_a_race_and_an_answer_is_told_of_the_winner(open_store, proxy):
    """The mark is the attempt, which no other has."""

    async def body(store):
        one = record()
        await store.insert(one)
        proxy.lose("update", "datafiles")
        assert await store.insert(Record(one.document, "other", "d")) == one

    within(open_store, body)


@pytest.mark.parametrize("is_request", [False, True], ids=["answer lost", "request lost"])
def test_a_replace_without_an_answer_takes_effect_once(open_store, proxy, is_request):
    """And the caller is told that it did."""

    async def body(store):
        one = record()
        await store.insert(one)
        proxy.lose("update", "datafiles", request=is_request)
        assert await store.replace(changed(one, name="new"), 1)
        assert not proxy.waits
        assert (await store.get(one.document.id)).document.revision == 2
        proxy.lose("update", "datafiles")
        assert not await store.replace(changed(one, name="other"), 1), "an older revision stays refused"

    within(open_store, body)


def test_a_replace_whose_effect_cannot_be_told_says_so(open_store, proxy, behind, monkeypatch):
    """Somebody went on over it meanwhile: neither yes nor no would be true for certain."""
    monkeypatch.setattr(_mongo_tries, "PAUSE", 0.3)

    async def body(store):
        one = record()
        await store.insert(one)
        proxy.lose("update", "datafiles")
        task = asyncio.create_task(store.replace(changed(one, name="mine"), 1))
        while proxy.waits:
            await asyncio.sleep(0)
        behind["datafiles"].update_one({"_id": one.document.id}, {"$set": {"revision": 3, "by": b"another"}})
        with pytest.raises(UnavailableError, match="cannot be told"):
            await task

    within(open_store, body)


@pytest.mark.parametrize(("command", "collection"), [("insert", "blocks"), ("update", "datafiles")])
@pytest.mark.parametrize("is_request", [False, True], ids=["answer lost", "request lost"])
def test_an_append_without_an_answer_is_in_the_log_once(open_store, proxy, command, collection, is_request):
    """Whichever of its two steps it was."""

    async def body(store):
        plan = await opened(store)
        await append(store, plan, *steps("w", 1, 2))
        proxy.lose(command, collection, request=is_request)
        state = await append(store, plan, *steps("w", 3, 5))
        assert not proxy.waits
        assert (state.head, state.writers) == (5, {"w": 5})
        assert await seqs(store, plan) == [1, 2, 3, 4, 5]
        assert state == (await store.sweeps.get(plan.id))[1]

    within(open_store, body)


def test_every_other_step_of_a_sweep_counts_once_when_its_answer_is_lost(open_store, proxy):
    """Opening, lease, renewal, fold, drop, seal, changes of the document, end, notice, removal."""

    async def body(store):
        async def lossy(command, collection, awaitable):
            proxy.lose(command, collection)
            result = await awaitable
            assert not proxy.waits
            return result

        log = store.sweeps
        await store.count(EVERYTHING)
        one, plan, state = new_sweep(notify=("http://x",))
        state, placed = place(plan, state, Block("open", 1, (Piece("k", (3,), "|u1"),)), NOW)
        proxy.lose("insert", "blocks")
        assert await lossy("update", "datafiles", log.open(one, plan, state, [Row(placed, b"abc", "")])) is None
        await append(store, plan, *steps("w", 1, 3))
        leased = await lossy("update", "datafiles", log.lease(plan.id, 1.0, 9.0))
        assert (leased.token, leased.leased_until) == (1, 9.0)
        assert await lossy("update", "datafiles", log.renew(plan.id, 1, 19.0))
        sealed = await lossy("update", "datafiles", log.seal(plan.id, "complete", Ending({"w": 3}), NOW))
        assert sealed.seal.outcome == "complete"
        assert await lossy("update", "datafiles", log.record_fold(plan.id, 1, 4, "4-1", 5.0))
        await lossy("delete", "blocks", log.drop(plan.id, 3))
        assert await seqs(store, plan) == []
        assert await lossy("update", "datafiles", log.end(plan.id, 1, changed(one, state="complete"), 1)) == "ended"
        await lossy("update", "datafiles", log.tell(plan.id, "http://x"))
        assert (await log.get(plan.id))[1].told == ("http://x",)
        await lossy("update", "datafiles", store.bar(plan.id, "key"))
        await lossy("update", "tokens", store.add_token(Token("t", "n", "h", ("read",), NOW)))
        assert await lossy("update", "tokens", store.revoke_token("t", NOW))
        await lossy("delete", "blocks", log.forget(plan.id))
        with pytest.raises(NotFoundError):
            await log.get(plan.id)

    within(open_store, body)


def test_a_change_of_an_open_sweep_without_an_answer_is_noted_once(open_store, proxy):
    """Its revision stands once in the log of events."""

    async def body(store):
        one, plan, state = new_sweep()
        one = changed(one, sweep=SweepInfo())
        await store.sweeps.open(one, plan, state, [])
        await append(store, plan, step("w", 1))
        proxy.lose("update", "datafiles")
        assert await store.replace(changed(one, comment="good"), 2)
        assert not proxy.waits
        assert (await store.sweeps.get(plan.id))[1].revisions == ((3, 1),)

    within(open_store, body)


def test_a_pid_that_another_has_is_a_conflict_for_an_open_sweep_too(open_store):
    """Its document is changed on a way of its own."""

    async def body(store):
        await store.insert(record(pid="lab/1"))
        one, plan, state = new_sweep()
        one = changed(one, sweep=SweepInfo())
        await store.sweeps.open(one, plan, state, [])
        with pytest.raises(ConflictError, match="lab/1"):
            await store.replace(changed(one, pid="lab/1"), 2)
        assert await store.get(plan.id) == one

    within(open_store, body)


def test_a_database_that_stays_away_is_unavailable(open_store, proxy):
    """After a few tries; nothing is said to be done that may not be."""

    async def body(store):
        one = record()
        await store.count(EVERYTHING)
        proxy.lose("update", "datafiles", times=9, request=True)
        with pytest.raises(UnavailableError):
            await store.insert(one)
        assert await store.get(one.document.id) is None

    within(open_store, body)


# --- what a crash leaves ---------------------------------------------------------------------------------------------------


def test_blocks_of_a_writer_that_died_before_its_commit_are_never_seen_and_in_nobodys_way(open_store, behind):
    """They stand where the next ones belong; those take the places."""

    async def body(store):
        plan = await opened(store)
        await append(store, plan, step("w", 1))
        for seq in (2, 3):
            leftover = behind["blocks"].find_one()
            leftover |= {"_id": leftover["_id"][:-16] + f"{seq:016}", "payload": b"leftover", "by": b"the dead"}
            behind["blocks"].insert_one(leftover)
        before = await everything(store, plan)
        assert [row.placed.seq for row in before[1].rows] == [1]
        await append(store, plan, *steps("v", 1, 4))
        tail = await store.sweeps.tail(plan.id)
        assert [row.placed.seq for row in tail.rows] == [1, 2, 3, 4, 5]
        assert [row.payload for row in tail.rows[1:]] == [one.payload for one in steps("v", 1, 4)]

    within(open_store, body)


def test_a_writer_that_wakes_up_after_others_took_its_places_changes_nothing_of_theirs(open_store, monkeypatch):
    """It had put its blocks and slept; now it places them again behind the others."""

    async def body(store):
        other = open_store("one")
        plan = await opened(store)
        await append(store, plan, step("w", 1))
        slept, woken = asyncio.Event(), asyncio.Event()
        commit = type(store.sweeps)._commit

        async def sleepy(self, *arguments, **wanted):
            if self is store.sweeps and not slept.is_set():
                slept.set()
                await woken.wait()
            return await commit(self, *arguments, **wanted)

        monkeypatch.setattr(type(store.sweeps), "_commit", sleepy)
        sleeper = asyncio.create_task(append(store, plan, *steps("w", 2, 4)))
        await slept.wait()
        await append(other, plan, *steps("v", 1, 2))
        theirs = (await other.sweeps.tail(plan.id)).rows
        woken.set()
        await sleeper
        rows = (await other.sweeps.tail(plan.id)).rows
        assert rows[:3] == theirs
        assert [(row.placed.seq, row.placed.writer, row.placed.n) for row in rows[3:]] == [
            (4, "w", 2),
            (5, "w", 3),
            (6, "w", 4),
        ]
        await other.close()

    within(open_store, body)


def test_a_log_that_lacks_a_block_is_corrupt_and_not_silently_shorter(open_store, behind):
    """Somebody deleted it by hand."""

    async def body(store):
        plan = await opened(store)
        await append(store, plan, *steps("w", 1, 3))
        behind["blocks"].delete_one({"_id": {"$regex": "2$"}})
        with pytest.raises(CorruptionError):
            await store.sweeps.tail(plan.id)

    within(open_store, body)


@pytest.mark.skipif(IN_DOCKER, reason="the container's engine is not this test's to kill")
def test_nothing_that_was_acknowledged_is_lost_when_the_engine_is_killed(tmp_path):
    """Under several writers of records and of a sweep; they go on when it is back."""

    async def body(store):
        nonlocal engine
        plan = await opened(store)
        saved, stored = [], {}
        stop = False

        async def save(mark):
            number = 0
            while not stop:
                number += 1
                one = record(metadata={"mark": f"{mark}-{number}"})
                try:
                    await store.insert(one)
                    saved.append(one)
                except AqDataError:
                    await asyncio.sleep(0.02)

        async def write(writer):
            n = 1
            while not stop:
                try:
                    appended = await store.sweeps.append(plan.id, [step(writer, n)], NOW)
                    assert appended.refused is None or isinstance(appended.refused, ConflictError)
                    stored[writer], n = n, n + 1
                except UnavailableError:
                    await asyncio.sleep(0.02)

        tasks = [asyncio.create_task(one) for one in (save("a"), save("b"), write("v"), write("w"))]
        for _ in range(2):
            await asyncio.sleep(0.3)
            engine.kill()
            engine = Engine(tmp_path, engine.port)
            before = len(saved), dict(stored)
            while len(saved) <= before[0] + 3 or any(stored.get(w, 0) <= before[1].get(w, 0) for w in "vw"):
                await asyncio.sleep(0.01)
        stop = True
        await asyncio.gather(*tasks)
        for one in saved:
            assert await store.get(one.document.id) == one
            assert await store.count(parse_filter({"mark": one.document.metadata["mark"]})) == 1
        tail = await store.sweeps.tail(plan.id)
        assert tail.state.writers == stored
        assert [row.placed.seq for row in tail.rows] == list(range(1, tail.state.head + 1))
        for writer, last in stored.items():
            assert [row.placed.n for row in tail.rows if row.placed.writer == writer] == list(range(1, last + 1))

    engine = Engine(tmp_path)
    try:
        within(lambda name: MongoStore(engine.url, name), body)
    finally:
        engine.kill()
