"""The sweep log on MongoDB: plan and state in the document of the DataFile, blocks in a collection of their own.

Each step reads the state, changes it with a pure function and writes it back by compare-and-set of `sweep.version`, one
document at a time. The record, its deletion and what is barred are in the same document, so opening, ending, deleting and
barring are one step each and order themselves among the others.

A block is put under (attempt of the opening, position) first and becomes real when the state's `head` reaches it; only
positions up to `head` are ever read, so what a crash leaves is never seen. Why that holds for each step:

- `append`: positions follow from the state that was read. Two who place the same position meet at its `_id`; whoever comes
  second waits, and if nothing moves raises `version` first. After that no state can be written which counts on blocks that
  were there before, so those beyond `head` are removed, by the marks they were seen with, and the place is free. A block up
  to `head` is never replaced.
- An `append` that got no answer is known by its mark, or by its writers' numbers when it is tried again; its blocks are
  removed only after `version` has moved on.
- `record_fold`, `lease`, `renew`, `seal`, `tell` change the state alone; the same again has the same effect.
- `drop` removes blocks up to `folded`, which no reader asks for. `end` writes record and state at once, then removes blocks.
- Reading: the state, then the blocks up to its `head`. They never change; those that are gone meanwhile were folded, so the
  state is read again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar
from weakref import WeakValueDictionary

import msgspec
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import ConnectionFailure, ServerSelectionTimeoutError

from aq_data.errors import AqDataError, CorruptionError, NotFoundError, TooLargeError, UnavailableError
from aq_data.models.datafile import DataFileId
from aq_data.models.sweep import Ending, Placed, Plan, State, place, seal
from aq_data.storage.metadata._mongo_blocks import Blocks, Fields, position_of
from aq_data.storage.metadata._mongo_border import border
from aq_data.storage.metadata._mongo_parts import APART_BYTES
from aq_data.storage.metadata._mongo_records import Stored, make_mark
from aq_data.storage.metadata._mongo_tries import again
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.sweeplog import Appended, Incoming, Row, SweepLog, Tail, is_pending

__all__ = ["MongoSweeps"]

T = TypeVar("T")

replace = msgspec.structs.replace

TRIES = 100
"""How often a step starts over when others were faster; servers that fold and append at once meet a few times a second."""
STATE_BYTES = 4 << 20
FEW = 1000
"""Of so many names and numbers a state is small."""
PATIENCE = 0.02
"""Seconds that whoever holds a position is given to finish, the first time."""
FOUND = {"sweep": 1, "deleted": 1, "revision": 1, "barred": 1, "by": 1}


class Database(Protocol):
    """What the log needs of the store it is part of."""

    async def collection(self, name: str) -> AsyncCollection[Fields]: ...

    async def publish(self, record: Record, more: Fields, keys: tuple[str, ...] = ()) -> Record | None: ...

    async def kept(self, record: Record, replaced: int | None = None) -> Stored: ...

    async def claim(self, id: DataFileId, kept: Stored) -> None: ...

    async def replaced(self, kept: Stored) -> None: ...

    async def put_apart(self, id: DataFileId, name: str, value: bytes) -> tuple[Fields, str]: ...

    async def read_apart(self, id: DataFileId, apart: Fields, name: str) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """A sweep as it was read: what a step counts on."""

    plan: Plan
    state: State
    version: int
    revision: int
    barred: frozenset[str]
    by: bytes


class MongoSweeps(SweepLog):
    """Steps of one process on one sweep take turns, so that they meet only those of other processes."""

    def __init__(self, database: Database) -> None:
        self._database, self._blocks = database, Blocks(database)
        self._locks: WeakValueDictionary[DataFileId, asyncio.Lock] = WeakValueDictionary()
        self._plans: dict[bytes | str, Plan] = {}

    # --- the document ----------------------------------------------------------------------------------------------

    async def _load(self, id: DataFileId) -> Seen:
        datafiles = await self._database.collection("datafiles")
        row = await datafiles.find_one({"_id": id}, FOUND)
        if row is None or "sweep" not in row:
            raise NotFoundError(f"there is no sweep {id[:60]!r}")
        if row["deleted"]:
            raise NotFoundError(f"DataFile {id} was deleted", code="deleted")
        kept = row["sweep"]
        state = msgspec.json.decode(kept["state"], type=State)
        return Seen(
            await self._plan(id, kept), state, kept["version"], row["revision"], frozenset(row.get("barred", ())), row["by"]
        )

    async def _plan(self, id: DataFileId, kept: Fields) -> Plan:
        # Plans never change. A sweep that is written to is asked for its plan with every block.
        known = kept["plan"] if "plan" in kept else kept["apart"]["key"]
        plan = self._plans.get(known)
        if plan is None:
            encoded = kept["plan"] if "plan" in kept else await self._database.read_apart(id, kept["apart"], "plan")
            plan = msgspec.json.decode(encoded, type=Plan)
            if len(self._plans) > 1000:
                self._plans.clear()
            self._plans[known] = plan
        return plan

    async def _commit(self, seen: Seen, state: State, more: Fields | None = None, **wanted: Any) -> bool:
        """Write the state over the one that was seen; False, changing nothing, when another was faster.

        `more` goes with it, `wanted` must hold too. False also when that cannot be told: a step may be done again.
        """
        datafiles = await self._database.collection("datafiles")
        mark = make_mark()
        where = {"_id": seen.plan.id, "sweep.version": seen.version, "deleted": False, **wanted}
        sweep = {
            "sweep.state": msgspec.json.encode(state),
            "sweep.version": seen.version + 1,
            "sweep.pending": is_pending(seen.plan, state),
            "sweep.by": mark,
        }
        change = {**(more or {}), "$set": {**(more or {}).get("$set", {}), **sweep}}
        was_cut_off = False

        async def attempt() -> bool:
            nonlocal was_cut_off
            try:
                if (await datafiles.update_one(where, change)).matched_count:
                    return True
                if not was_cut_off:
                    return False
                return await datafiles.find_one({"_id": seen.plan.id, "sweep.by": mark}, {"_id": 1}) is not None
            except ServerSelectionTimeoutError:
                raise
            except ConnectionFailure:
                was_cut_off = True
                raise

        return await again(attempt)

    def _turn(self, id: DataFileId) -> asyncio.Lock:
        return self._locks.setdefault(id, asyncio.Lock())

    async def _step(self, id: DataFileId, step: Callable[[Seen], Awaitable[tuple[State, T]]]) -> T:
        """Read the state, change it by `step`, write it back; from the beginning when another was faster."""
        with border():
            async with self._turn(id):
                for _ in range(TRIES):
                    seen = await self._load(id)
                    state, result = await step(seen)
                    if state is seen.state or await self._commit(seen, state):
                        return result
        raise _busy(id)

    # --- opening and changing the record -----------------------------------------------------------------------------

    async def open(self, record: Record, plan: Plan, state: State, first: Sequence[Row]) -> Record | None:
        mark, encoded = make_mark(), msgspec.json.encode(plan)
        check_size(plan.id, state)
        sweep: Fields = {"plan": encoded}
        keys = [row.ref for row in first if row.ref]
        if len(encoded) > APART_BYTES:
            apart, key = await self._database.put_apart(plan.id, "plan", encoded)
            sweep = {"apart": apart}
            keys.append(key)
        sweep |= {
            "state": msgspec.json.encode(state),
            "version": 1,
            "pending": is_pending(plan, state),
            "by": mark,
        }
        with border():
            if first:
                await self._blocks.put(plan, first, mark)  # the attempt is this opening's own, so no other is in the way
            existing = await self._database.publish(record, {"sweep": sweep}, tuple(keys))
            if existing is not None and existing.attempt != plan.attempt:
                await self._blocks.remove(plan, 0)
        return existing

    async def replace(self, record: Record, expected_revision: int, publishes: str) -> bool:
        """`MetadataStore.replace` of the document of an open sweep: the log notes after which block it was."""
        id, revision = record.document.id, record.document.revision
        kept, mark = await self._database.kept(record, expected_revision), make_mark()
        with border():
            async with self._turn(id):
                for _ in range(TRIES):
                    seen = await self._load(id)
                    if seen.by == mark:
                        await self._database.replaced(kept)
                        return True
                    if seen.revision != expected_revision:
                        return False
                    barring = [publishes, *kept.keys]
                    if not seen.barred.isdisjoint(barring):
                        raise _orphan()
                    await self._database.claim(id, kept)
                    state = replace(seen.state, revisions=(*seen.state.revisions, (revision, seen.state.head)))
                    check_size(id, state)
                    more = {"$set": {**kept.fields, "by": mark}, "$unset": kept.removed}
                    wanted = {"revision": expected_revision, "barred": {"$nin": barring}, **kept.wanted}
                    if await self._commit(seen, state, more, **wanted):
                        await self._database.replaced(kept)
                        return True
        raise _busy(id)

    async def get(self, id: DataFileId) -> tuple[Plan, State]:
        with border():
            seen = await self._load(id)
        return seen.plan, seen.state

    # --- blocks ------------------------------------------------------------------------------------------------------

    async def append(self, id: DataFileId, blocks: Sequence[Incoming], at: str) -> Appended:
        with border():
            async with self._turn(id):
                for tried in range(TRIES):
                    seen = await self._load(id)
                    appended, rows = _placed(seen, blocks, at)
                    if not rows:
                        return appended
                    check_size(id, appended.state)
                    refs = [row.ref for row in rows if row.ref]
                    if not seen.barred.isdisjoint(refs):
                        raise _orphan()
                    mark = make_mark()
                    if not await self._blocks.put(seen.plan, rows, mark):
                        await self._clear_the_way(seen, PATIENCE * 2 ** min(tried, 6))
                        continue
                    if await self._commit(seen, appended.state, **({"barred": {"$nin": refs}} if refs else {})):
                        return appended
                    await self._withdraw(seen, mark)
        raise _busy(id)

    async def _withdraw(self, seen: Seen, mark: bytes) -> None:
        """Remove blocks whose state was not written, once it cannot be any more."""
        now = await self._load(seen.plan.id)
        if now.version != seen.version:
            await self._blocks.remove(seen.plan, now.state.head, marks=[mark])

    async def _clear_the_way(self, seen: Seen, patience: float) -> None:
        """Blocks stand beyond the head: let their writer finish, or, when it does not, see to it that it cannot."""
        await asyncio.sleep(patience * (1 + random.random()))  # noqa: S311
        left = await self._blocks.marks(seen.plan, seen.state.head)
        if left and await self._commit(seen, seen.state):
            await self._blocks.remove(seen.plan, seen.state.head, marks=left)

    async def seal(
        self, id: DataFileId, outcome: Literal["complete", "abandoned"], ending: Ending, at: str, actor: str = ""
    ) -> State:
        async def step(seen: Seen) -> tuple[State, State]:
            sealed = seal(seen.plan, seen.state, outcome, ending, at, actor)
            return (seen.state, seen.state) if sealed is None else (sealed, sealed)

        return await self._step(id, step)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def tail(self, id: DataFileId, after: int = 0, limit_bytes: int | None = None) -> Tail:
        seen, found = await self._looked(id, after, limit_bytes, None, ("header", "size", "payload", "ref"))
        rows = [Row(msgspec.json.decode(row["header"], type=Placed), row["payload"], row["ref"]) for row in found]
        return Tail(seen.plan, seen.state, tuple(rows))

    async def headers(self, id: DataFileId, after: int, limit: int) -> tuple[State, list[tuple[int, bytes]]]:
        seen, found = await self._looked(id, after, None, limit, ("header",))
        return seen.state, [(position_of(row), row["header"]) for row in found]

    async def _looked(
        self, id: DataFileId, after: int, limit_bytes: int | None, limit: int | None, fields: Sequence[str]
    ) -> tuple[Seen, list[Fields]]:
        """A sweep and its blocks beyond max(`after`, what is folded), as of one moment."""
        folded = -1
        with border():
            for _ in range(TRIES):
                seen = await self._load(id)
                start, head = max(after, seen.state.folded), seen.state.head
                through = head if limit is None else min(head, start + limit)
                found = await self._blocks.read(seen.plan, start, through, limit_bytes, fields)
                is_cut = limit_bytes is not None and bool(found)
                wanted = range(start + 1, start + 1 + len(found) if is_cut else through + 1)
                if [position_of(row) for row in found] == list(wanted):
                    return seen, found
                if folded == seen.state.folded:
                    raise CorruptionError(f"blocks of the sweep {id} beyond {start} are missing from the database")
                folded = seen.state.folded
        raise _busy(id)

    # --- leases and folds ----------------------------------------------------------------------------------------------

    async def lease(self, id: DataFileId, now: float, until: float) -> State | None:
        async def step(seen: Seen) -> tuple[State, State | None]:
            if seen.state.leased_until > now:
                return seen.state, None
            taken = replace(seen.state, token=seen.state.token + 1, leased_until=until)
            return taken, taken

        return await self._step(id, step)

    async def renew(self, id: DataFileId, token: int, until: float) -> bool:
        async def step(seen: Seen) -> tuple[State, bool]:
            return (replace(seen.state, leased_until=until), True) if seen.state.token == token else (seen.state, False)

        return await self._step(id, step)

    async def record_fold(self, id: DataFileId, token: int, folded: int, manifest: str, at: float) -> bool:
        async def step(seen: Seen) -> tuple[State, bool]:
            state = seen.state
            if state.token != token or folded < state.folded:
                return state, False
            left = await self._blocks.size(seen.plan, folded, state.head)
            return replace(state, folded=folded, manifest=manifest, unfolded_bytes=left, folded_at=at), True

        return await self._step(id, step)

    async def drop(self, id: DataFileId, through: int) -> None:
        with border():
            seen = await self._load(id)
            last = min(through, seen.state.folded)
            if last > 0:
                await self._blocks.remove(seen.plan, 0, last)

    # --- the end -------------------------------------------------------------------------------------------------------

    async def end(
        self, id: DataFileId, token: int, record: Record, expected_revision: int
    ) -> Literal["ended", "stale", "fenced"]:
        kept, mark = await self._database.kept(record, expected_revision), make_mark()
        with border():
            async with self._turn(id):
                for _ in range(TRIES):
                    seen = await self._load(id)
                    state = seen.state
                    if seen.by != mark:
                        if state.token != token or state.seal is None or state.folded != state.head or state.ended_revision:
                            return "fenced"
                        if seen.revision != expected_revision:
                            return "stale"
                        if not seen.barred.isdisjoint(kept.keys):
                            raise _orphan()
                        await self._database.claim(id, kept)
                        ended = replace(state, ended_revision=record.document.revision, leased_until=0.0)
                        more = {"$set": {**kept.fields, "by": mark}, "$unset": kept.removed}
                        wanted = {"revision": expected_revision, "barred": {"$nin": list(kept.keys)}, **kept.wanted}
                        if not await self._commit(seen, ended, more, **wanted):
                            continue
                    await self._database.replaced(kept)
                    await self._blocks.remove_all(id)  # what a crash after the last fold left, or one before its commit
                    return "ended"
        raise _busy(id)

    async def tell(self, id: DataFileId, address: str) -> None:
        async def step(seen: Seen) -> tuple[State, None]:
            told = seen.state.told
            return (seen.state if address in told else replace(seen.state, told=(*told, address))), None

        await self._step(id, step)

    async def unfinished(self) -> list[tuple[Plan, State]]:
        datafiles = await self._database.collection("datafiles")
        with border():
            rows = await datafiles.find({"sweep.pending": True, "deleted": False}, {"sweep": 1}).to_list()
            kept = [(await self._plan(row["_id"], row["sweep"]), row["sweep"]["state"]) for row in rows]
        return [(plan, msgspec.json.decode(state, type=State)) for plan, state in kept]

    async def forget(self, id: DataFileId) -> None:
        datafiles = await self._database.collection("datafiles")
        with border():
            # The state first: blocks without one are never read.
            await again(lambda: datafiles.update_one({"_id": id}, {"$unset": {"sweep": ""}}))
            await self._blocks.remove_all(id)


def _placed(seen: Seen, blocks: Sequence[Incoming], at: str) -> tuple[Appended, list[Row]]:
    """What becomes of the blocks over the state that was seen."""
    state, rows, stored = seen.state, [], 0
    refused: AqDataError | None = None
    for block in blocks:
        try:
            placed = place(seen.plan, state, block.header, at)
        except AqDataError as exc:
            refused = exc
            break
        if placed is not None:
            state = placed[0]
            rows.append(Row(placed[1], block.payload, block.ref))
        stored += 1
    return Appended(seen.plan, state, stored, refused), rows


def check_size(id: DataFileId, state: State) -> None:
    """TooLargeError when a state has grown so large that no more may be added to it; it can still be finished."""
    if len(state.writers) + len(state.revisions) + len(state.extents) + len(state.touched) > FEW:
        size = len(msgspec.json.encode(state))
        if size > STATE_BYTES:
            raise TooLargeError(
                f"the sweep {id} has {len(state.writers)} writers, {len(state.extents)} dims that grow, "
                f"{len(state.touched)} variables and {len(state.revisions)} changes of its document: to keep track of them "
                f"takes {size} bytes, the limit is {STATE_BYTES}; finish it and open another",
                limit=STATE_BYTES,
            )


def _busy(id: DataFileId) -> UnavailableError:
    return UnavailableError(f"the sweep {id} is changed by many at once; try again")


def _orphan() -> UnavailableError:
    return UnavailableError("what was sent was collected as an orphan before it was recorded; send it again")
