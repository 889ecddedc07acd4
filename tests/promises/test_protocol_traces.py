"""The shortest traces that break simpler protocols, run on the real classes: a process stands still at exactly that step.

Each process has its own stores over one database file and one folder, as servers have. What stands still does so before a call
of a store, and so does everything else of that process, as a stopped one would; a killed one never makes another call.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aq_server.app import open_stores
from aq_server.service import folding as folding_module
from aq_server.service.datafiles import DataFiles
from aq_server.service.folding import Folding
from aq_server.service.growing import Growing
from aq_server.service.maintenance import Maintenance
from aq_server.service.notices import Notices
from aq_server.service.reading import Reading
from aq_server.service.signals import Signals
from aq_server.service.sweep_parts import SweepParts
from aq_server.service.sweeps import Sweeps
from services.deployment import at, deployed, drop_row_of_sweeps, rows_of_sweeps

from aq_data.errors import ConflictError, UnavailableError
from aq_data.models.arrays import NewArray
from aq_data.models.datafile import NewDataFile, make_id
from aq_data.models.selection import parse_selection
from aq_data.models.sweep import Block, Ending, NewSweep, NewSweepArray, Piece, Plan, State
from aq_data.storage.arrays import folding as objects_module
from aq_data.storage.arrays.stores import ArrayStores, Place

DEADLINE = 20.0
EMPTY = float("nan")


class KilledError(Exception):
    """The process is gone."""


class Step:
    """Where a process is told to stand still or to die: the `nth` call from now on whose label holds all of `words`."""

    def __init__(self) -> None:
        self._words: tuple[str, ...] = ()
        self._nth = self._calls = 0
        self._kills = self._killed = False
        self._running = asyncio.Event()
        self._running.set()
        self.reached = asyncio.Event()
        self.log: list[str] = []

    def stop_before(self, *words: str, nth: int = 1) -> None:
        self._words, self._nth, self._kills = words, nth, False
        self.reached.clear()

    def kill_before_call(self, number: int) -> None:
        """The process dies before its call `number`, counted from 0 and from now on."""
        self._kills, self._calls, self._words = True, number, ()

    async def arrived(self) -> None:
        await asyncio.wait_for(self.reached.wait(), DEADLINE)

    def go_on(self) -> None:
        self._running.set()

    async def __call__(self, label: str) -> None:
        if self._kills and not self._killed:
            self._killed = self._calls == 0
            self._calls -= 1
        if self._killed:
            raise KilledError(label)
        if self._words and all(word in label for word in self._words):
            self._nth -= 1
            if self._nth == 0:
                self._words = ()
                self._running.clear()
                self.reached.set()
        await self._running.wait()
        self.log.append(label)


class Watched:
    """A store or a sweep log whose calls pass `step` first."""

    def __init__(self, inner: Any, step: Step) -> None:
        self._inner, self._step = inner, step

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name == "sweeps":
            return Watched(found, self._step)
        if not asyncio.iscoroutinefunction(found):
            return found

        @wraps(found)
        async def call(*args: Any, **named: Any) -> Any:
            await self._step(f"{name} {args[0] if args and isinstance(args[0], str) else ''}")
            return await found(*args, **named)

        return call

    async def put_many(self, items: Any) -> None:
        for item in items:
            await self._step(f"put {item[0]}")
            await self._inner.put_many([item])

    async def get_many(self, keys: Any, consume: Callable[[int, bytes], None]) -> None:
        for i, key in enumerate(keys):
            await self._step(f"get {key}")
            consume(i, await self._inner.get(key))

    async def copy_many(self, pairs: Any) -> None:
        for pair in pairs:
            await self._step(f"copy {pair[1]}")
            await self._inner.copy_many([pair])


class Server:
    """What one server process is made of."""

    def __init__(self, root: Path) -> None:
        self.step = Step()
        self.root, stores = root, open_stores(deployed(root))
        self._metadata, self._blobs = stores.metadata, stores.arrays.open("default").blobs
        self.metadata: Any = Watched(self._metadata, self.step)
        self.blobs: Any = Watched(self._blobs, self.step)
        signals, self.stores = (
            Signals(),
            ArrayStores({"default": Place(self._blobs.location("").rstrip("/"))}, open=lambda _: self.blobs),
        )
        self.growing = Growing(self.metadata, self.stores, 60.0)
        self.folding = Folding(self.metadata, self.stores, signals, Notices(self.metadata, None))
        parts = SweepParts(self.metadata, self.stores, self.growing, self.folding, signals, frozenset(), 1 << 30)
        self.sweeps = Sweeps(parts)
        self.datafiles = DataFiles(self.metadata, self.stores, signals)
        self.reading = Reading(self.datafiles, self.growing)

    async def open(self, shape: int | None = None, chunk: int = 2) -> Plan:
        """A sweep with the variable y along x."""
        array = NewSweepArray("y", "<f8", (shape,), ("x",), chunks=(chunk,))
        document, _ = await self.sweeps.begin_open(NewSweep(name="trace", arrays=(array,)), None).commit()
        return (await self.metadata.sweeps.get(document.id))[0]

    async def write(self, plan: Plan, n: int, values: list[float], start: int | None = 0, writer: str = "w") -> None:
        """A block; appended when `start` is None."""
        place = {"append": "x"} if start is None else {"start": (start,)}
        appending = await self.sweeps.begin_append(plan.id)
        await appending.begin(Block(writer, n, (Piece("y", (len(values),), "<f8", **place),)))
        await appending.write(memoryview(np.array(values, "<f8").tobytes()))
        await appending.end()
        await appending.commit()

    async def fold(self, plan: Plan) -> None:
        """What the background does when the sweep is due."""
        await self.folding._advance(plan)

    async def read(self, plan: Plan) -> list[float]:
        source = await self.reading.source(plan.id, "y")
        return (await source.read(parse_selection("", source.array.shape, "y"))).tolist()

    async def state(self, plan: Plan) -> State:
        return (await self.metadata.sweeps.get(plan.id))[1]

    async def expire(self, plan: Plan) -> None:
        """The time of whoever holds the lease has run out."""
        await self._metadata.sweeps.renew(plan.id, (await self._metadata.sweeps.get(plan.id))[1].token, 0.0)

    async def close(self) -> None:
        await self._blobs.close()
        await self._metadata.close()


def traced(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test with as many servers over one deployment as it has parameters; every stored block is due to be folded."""

    @wraps(test)
    def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folding_module, "FOLD_BLOCKS", 1)

        async def body() -> None:
            servers = [Server(tmp_path) for _ in range(test.__code__.co_argcount)]
            try:
                await asyncio.wait_for(test(*servers), 2 * DEADLINE)
            finally:
                for server in servers:
                    await server.close()

        asyncio.run(body())

    del run.__wrapped__  # its parameters are no fixtures
    return run


def task(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(coroutine)


# --- 1: a block over two chunks is folded between a reader's two chunk reads -------------------------------------------------


@traced
async def test_1_a_fold_between_two_chunk_reads_shows_no_half_block(a, r):
    """The reader keeps to his moment: all of the block that lay in the log, or none of the one that came later."""
    plan = await a.open()
    await a.write(plan, 1, [1, 1, 1, 1])
    await a.fold(plan)
    await a.write(plan, 2, [2, 2, 2, 2])
    for expected in (2.0, 2.0):
        r.step.stop_before("get", "0.1")
        reading = task(r.read(plan))
        await r.step.arrived()
        if (await a.state(plan)).folded == 1:
            await a.fold(plan)  # what the reader laid over is in chunks now, and its rows are gone
        else:
            await a.write(plan, 3, [3, 3, 3, 3])
            await a.fold(plan)
        r.step.go_on()
        assert await reading == [expected] * 4
    assert await r.read(plan) == [3.0] * 4


@traced
async def test_1_a_reader_whose_objects_are_gone_starts_over(a, r):
    """Half read, then the objects of his moment are removed: he gets a later moment whole."""
    plan = await a.open()
    await a.write(plan, 1, [1, 1, 1, 1])
    await a.fold(plan)
    r.step.stop_before("get", "0.1")
    reading = task(r.read(plan))
    await r.step.arrived()
    first = (await a.state(plan)).manifest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects_module, "RETIRED_SECONDS", 0.0)
        for n in (2, 3):
            await a.write(plan, n, [float(n)] * 4)
            await a.fold(plan)
    assert not any(first in name for name in await a.blobs.children(f"{plan.id}/{plan.attempt}/open"))
    r.step.go_on()
    assert await reading == [3.0] * 4


# --- 2: a row that is folded already is laid over a later one -----------------------------------------------------------------


@traced
async def test_2_an_old_row_that_was_left_behind_is_not_laid_over(a, r):
    """The folder died while it dropped rows: the older one stays in the log, readers see the later block."""
    plan = await a.open()
    await a.write(plan, 1, [1, 1, 1, 1])
    await a.write(plan, 2, [2, 2], start=1)
    a.step.stop_before("drop")
    folding = task(a.fold(plan))
    await a.step.arrived()
    folding.cancel()
    assert drop_row_of_sweeps(r.root, 2) == 1
    assert await r.read(plan) == [1, 2, 2, 1]
    await r.expire(plan)
    await r.write(plan, 3, [3], start=3)
    assert await r.read(plan) == [1, 2, 2, 3]
    await r.fold(plan)
    assert await r.read(plan) == [1, 2, 2, 3]
    a.step.go_on()


# --- 3: rows deleted before the fold is recorded; an older fold recorded over a newer one ---------------------------------------


@traced
async def test_3_a_folder_may_die_before_any_of_its_calls(a, r):
    """Wherever it dies, readers see every block at once, and the next folder goes on from there."""
    plan = await a.open()
    values, n, died = [EMPTY] * 4, 0, 0
    for call in range(200):
        for start in (0, 1):
            n += 1
            await r.write(plan, n, [float(n)] * 3, start=start)
            values[start : start + 3] = [float(n)] * 3
        victim = Step()
        a.step = a.metadata._step = a.blobs._step = victim
        victim.kill_before_call(call)
        with contextlib.suppress(KilledError):
            await a.fold(plan)
        died += victim._killed
        assert await r.read(plan) == values, f"after a death before call {call}: {victim.log}"
        await r.expire(plan)
        if call % 2:
            await r.fold(plan)
            assert await r.read(plan) == values
        if not victim._killed:
            break
    assert died > 10
    assert "record_fold" in " ".join(victim.log)
    assert (await r.sweeps.end(plan.id, "complete", Ending({"w": n}))).state == "complete"
    assert await r.read(plan) == values


@traced
async def test_3_a_fold_of_an_older_moment_is_not_recorded_over_a_newer_one(a, b, r):
    """The slower folder is refused, whether it folded less or more than the one that took its lease."""
    for first, then in ((1, 2), (2, 1)):
        plan = await a.open()
        await a.write(plan, 1, [1, 1, 1, 1])
        if first == 2:
            await a.write(plan, 2, [2, 2], start=1)
        a.step.stop_before("record_fold")
        folding = task(a.fold(plan))
        await a.step.arrived()
        await b.expire(plan)
        if first == 1:
            await b.write(plan, 2, [2, 2], start=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folding_module, "BATCH_BYTES", 1 if then == 1 else 1 << 20)
            await b.fold(plan)
        before = await b.state(plan)
        a.step.go_on()
        await folding
        after = await b.state(plan)
        assert (after.folded, after.manifest) == (before.folded, before.manifest)
        assert await r.read(plan) == [1, 2, 2, 1]


# --- 4: a folder that slept ------------------------------------------------------------------------------------------------------


@traced
async def test_4_a_folder_that_wakes_late_puts_nothing_over_the_newer_chunk(a, b, r):
    """It read the first block and slept; another folded both; it wakes and puts: under keys that nobody reads."""
    plan = await a.open()
    await a.write(plan, 1, [1, 1, 1, 1])
    a.step.stop_before("put", "0.0")
    folding = task(a.fold(plan))
    await a.step.arrived()
    await b.expire(plan)
    await b.write(plan, 2, [2, 2], start=1)
    await b.fold(plan)
    assert (await b.state(plan)).folded == 2
    a.step.stop_before("record_fold")
    a.step.go_on()
    await a.step.arrived()
    assert await r.read(plan) == [1, 2, 2, 1]
    a.step.go_on()
    await folding
    assert await r.read(plan) == [1, 2, 2, 1]
    assert len(await r.blobs.children(f"{plan.id}/{plan.attempt}/open")) == 2, "it may be in force for all that is known"
    _ = [orphan async for orphan in Maintenance(r.metadata, r.stores).gc(0.0, delete=True)]
    made = await r.blobs.children(f"{plan.id}/{plan.attempt}/open")
    assert made == [(await r.state(plan)).manifest], "what a refused fold made is collected, and nothing else"


@traced
async def test_4_a_folder_that_slept_between_two_folds_does_not_go_on_with_anothers_token(a, b, r):
    """It wakes after its first fold, finds another's lease, and leaves that one's objects alone."""
    plan = await a.open()
    for n in (1, 2, 3):
        await b.write(plan, n, [float(n), float(n)], start=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding_module, "BATCH_BYTES", 1)  # one block at a time
        a.step.stop_before("drop")
        sleeper = task(a.fold(plan))
        await a.step.arrived()
        await b.expire(plan)
        b.step.stop_before("record_fold")
        other = task(b.fold(plan))
        await b.step.arrived()
        a.step.stop_before("record_fold")
        a.step.go_on()
        waiting = task(a.step.arrived())
        await asyncio.wait([waiting, sleeper], return_when=asyncio.FIRST_COMPLETED)
        b.step.go_on()
        await other
        a.step.go_on()
        await sleeper
        waiting.cancel()
    assert (await r.state(plan)).folded == 3
    assert await r.read(plan) == [1, 1, 2, 2, 3, 3]


# --- 5: deleting what no manifest names; absence taken for fill -----------------------------------------------------------------------


@traced
async def test_5_gc_beside_a_folder_takes_nothing_that_comes_into_force(a, g):
    """Collecting at every step of a fold, also of the youngest, loses no block."""
    plan = await a.open()
    values = [EMPTY] * 4
    for n, label in enumerate(("put", "settle", "record_fold", "drop"), 1):
        values[n - 1 :] = [float(n)] * (5 - n)
        await g.write(plan, n, [float(n)] * (5 - n), start=n - 1)
        a.step.stop_before(label, nth=2 if label == "put" else 1)
        folding = task(a.fold(plan))
        await a.step.arrived()
        _ = [orphan async for orphan in Maintenance(g.metadata, g.stores).gc(0.0, delete=True)]
        a.step.go_on()
        with contextlib.suppress(UnavailableError):
            await folding
        assert await g.read(plan) == values, f"gc while a folder stood before {label}"
        await g.expire(plan)
        await g.fold(plan)
        assert await g.read(plan) == values
    assert (await g.sweeps.end(plan.id, "complete", Ending({"w": 4}))).state == "complete"
    assert await g.read(plan) == values


@traced
async def test_5_a_fold_that_is_told_no_takes_nothing_away(a, b, r):
    """It was recorded, the answer was lost, and the next folder's lease hid whose write it was: its chunks are in force."""
    plan = await a.open()
    await a.write(plan, 1, [1, 1, 1, 1])
    log = type(a._metadata.sweeps)
    real = log.record_fold

    async def unanswered(self: Any, *arguments: Any) -> bool:
        assert await real(self, *arguments)
        await a.expire(plan)
        instant = time.time()
        assert await b._metadata.sweeps.lease(plan.id, instant, instant + 0.1) is not None
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "record_fold", unanswered)
        await a.fold(plan)
    assert (await r.state(plan)).folded == 1
    assert await r.read(plan) == [1.0] * 4
    await b.write(plan, 2, [2, 2], start=0)
    await b.expire(plan)
    await b.fold(plan)
    assert await r.read(plan) == [2.0, 2.0, 1.0, 1.0]
    assert [finding async for finding in Maintenance(r.metadata, r.stores).verify() if finding.kind != "orphan"] == []


# --- 6: a lost answer -------------------------------------------------------------------------------------------------------------------


@traced
async def test_6_a_retry_never_takes_a_second_place(a, b):
    """The block stands in the log, or was folded and dropped since: sent again, at another server, it changes nothing."""
    plan = await a.open()
    await a.write(plan, 1, [1, 1], start=None)
    await b.write(plan, 1, [1, 1], start=None)
    assert (await b.state(plan)).head == 1
    await b.write(plan, 1, [5, 5], start=None, writer="v")
    await a.fold(plan)
    for server in (a, b):
        await server.write(plan, 1, [1, 1], start=None)
        await server.write(plan, 1, [5, 5], start=None, writer="v")
    state = await a.state(plan)
    assert (state.head, state.folded, state.extents) == (2, 2, {"x": 4})
    assert await b.read(plan) == [1, 1, 5, 5]


@traced
async def test_6_two_tries_of_one_block_at_the_same_time_are_one(a, b):
    """The writer gave up waiting and sent again while the first request was still on its way to the log."""
    plan = await a.open()
    a.step.stop_before("append")
    first = task(a.write(plan, 1, [1, 1], start=None))
    await a.step.arrived()
    await b.write(plan, 1, [1, 1], start=None)
    await b.write(plan, 2, [2, 2], start=None)
    await b.fold(plan)
    a.step.go_on()
    await first
    assert (await b.state(plan)).head == 2
    assert await a.read(plan) == [1, 1, 2, 2]


# --- 7: a place in the order that became free --------------------------------------------------------------------------------------------


@traced
async def test_7_a_block_never_lands_below_what_is_folded(a, b, r):
    """A writer stands before the log while everything in it is folded and dropped: its block comes behind all that."""
    plan = await a.open()
    await b.write(plan, 1, [1, 1], start=None)
    a.step.stop_before("append")
    late = task(a.write(plan, 1, [9, 9], start=None, writer="v"))
    await a.step.arrived()
    await b.write(plan, 2, [2, 2], start=None)
    await b.fold(plan)
    assert rows_of_sweeps(r.root) == 0
    a.step.go_on()
    await late
    assert (await r.state(plan)).head == 3
    assert await r.read(plan) == [1, 1, 2, 2, 9, 9]
    await b.fold(plan)
    assert await r.read(plan) == [1, 1, 2, 2, 9, 9]


# --- 8: a block acknowledged while the sweep ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["seal", "lease", "record_fold", "copy", "replace", "end"])
def test_8_what_is_acknowledged_while_a_sweep_ends_is_in_it(tmp_path, monkeypatch, label):
    """A block that comes at any step of the end is refused, or is there afterwards."""

    @traced
    async def test(a, b):
        plan = await a.open()
        await b.write(plan, 1, [1, 1], start=None)
        a.step.stop_before(f"{label} ")
        ending = task(a.sweeps.end(plan.id, "complete", Ending({"w": 1})))
        await a.step.arrived()
        values, refused = [1.0, 1.0], ""
        try:
            await b.write(plan, 2, [2, 2], start=None)
            values += [2.0, 2.0]
        except ConflictError as exc:
            refused = exc.code
        a.step.go_on()
        assert (await ending).state == "complete"
        assert await b.read(plan) == values
        assert (len(values), refused) == ((4, "") if label == "seal" else (2, "finished"))

    test(tmp_path, monkeypatch)


# --- 9: a late put of the open phase -----------------------------------------------------------------------------------------------------------


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("label", ["put", "settle", "record_fold", "copy", "end"])
def test_9_a_folder_that_wakes_after_the_end_changes_nothing(tmp_path, monkeypatch, label):
    """It stood at a step of the open phase or of the end while another ended the sweep: no byte of the group changes."""

    @traced
    async def test(a, b, r):
        plan = await a.open()
        await a.write(plan, 1, [1, 1, 1, 1])
        a.step.stop_before(f"{label} ")
        late = task(a.sweeps.end(plan.id, "complete", Ending({"w": 1})) if label in ("copy", "end") else a.fold(plan))
        await a.step.arrived()
        await b.expire(plan)
        if label not in ("copy", "end"):
            await b.write(plan, 2, [2, 2], start=1)
        document = await b.sweeps.end(plan.id, "complete", Ending({"w": 1}))
        before = files_below(at(document.path))
        expected = [1, 2, 2, 1] if label not in ("copy", "end") else [1] * 4
        a.step.go_on()
        await late
        assert await r.read(plan) == expected
        assert files_below(at(document.path)) == before

    test(tmp_path, monkeypatch)


# --- 10, 11: saving ---------------------------------------------------------------------------------------------------------------------------------


def small(id: str, count: int) -> NewDataFile:
    return NewDataFile(id=id, name="saved", arrays=(NewArray("y", "<f8", (count,), ("x",)),))


async def feed(server: Server, new: NewDataFile, value: float) -> Any:
    """A save whose values came; it is not committed."""
    save = await server.datafiles.begin_save(new, None)
    await save.begin_array(0)
    await save.write(memoryview(np.full(new.arrays[0].shape, value).tobytes()))
    await save.end_part()
    return save


def new_id() -> str:
    return make_id(1_700_000_000_000, secrets.token_bytes(10))


async def saved(server: Server, id: str) -> list[float]:
    source = await server.reading.source(id, "y")
    return (await source.read(parse_selection("", source.array.shape, "y"))).tolist()


@traced
async def test_10_the_loser_of_a_race_to_one_id_leaves_the_winners_bytes_alone(a, b, r):
    """Two saves under one id with other content, both past the look at whether it is taken: each writes keys of its own."""
    id = new_id()
    x, y = await feed(a, small(id, 4), 1.0), await feed(b, small(id, 4), 2.0)
    b.step.stop_before("insert")
    losing = task(y.commit())
    await b.step.arrived()
    _, is_new = await x.commit()
    assert is_new
    assert await saved(r, id) == [1.0] * 4
    b.step.go_on()
    with pytest.raises(ConflictError):
        await losing
    assert await saved(r, id) == [1.0] * 4
    assert len(await r.blobs.children(id)) == 1
    document, is_new = await (await feed(b, small(id, 4), 1.0)).commit()
    assert (document.id, is_new) == (id, False)


@pytest.mark.parametrize("label", ["get", "bar", "remove"])
def test_11_gc_never_takes_the_blobs_of_a_save_that_was_acknowledged(tmp_path, monkeypatch, label):
    """gc saw no document and stands at any step; a save publishes: it is kept, or refused and then saved by a retry."""

    @traced
    async def test(a, g):
        id = new_id()
        await (await feed(a, small(new_id(), 4), 1.0)).commit()  # where nothing is known nothing is collected
        save = await feed(a, small(id, 4), 1.0)
        a.step.stop_before("insert")
        saving = task(save.commit())
        await a.step.arrived()

        async def collect() -> list[Any]:
            return [orphan async for orphan in Maintenance(g.metadata, g.stores).gc(0.0, delete=True)]

        g.step.stop_before(f"{label} ", id)
        collecting = task(collect())
        await g.step.arrived()
        a.step.go_on()
        try:
            await saving
            assert label != "remove"
        except UnavailableError:
            assert label == "remove"
            g.step.go_on()
            await collecting
            await (await feed(a, small(id, 4), 1.0)).commit()
        g.step.go_on()
        await collecting
        assert await saved(a, id) == [1.0] * 4

    test(tmp_path, monkeypatch)
