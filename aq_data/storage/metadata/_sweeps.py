"""The sweep log on SQLite: one row per sweep, one per block; each step is one transaction of the writer."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from aq_data.errors import AqDataError, NotFoundError, UnavailableError
from aq_data.models.datafile import DataFileId
from aq_data.models.sweep import Ending, Placed, Plan, State, place, seal
from aq_data.storage.metadata._schema import (
    BLOCK_HEADERS,
    BLOCK_ROWS,
    DROP_BLOCKS,
    FORGET_BLOCKS,
    FORGET_SWEEP,
    INSERT_BLOCK,
    INSERT_SWEEP,
    SWEEP,
    UNFINISHED,
    UNFOLDED_BYTES,
    UPDATE_SWEEP,
)
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.sweeplog import Appended, Incoming, Row, SweepLog, Tail, is_pending

__all__ = ["SqliteSweeps"]

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

replace = msgspec.structs.replace


class Database(Protocol):
    """What the log needs of the store it is part of."""

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T: ...

    async def read(self, operation: Callable[[sqlite3.Connection], T]) -> T: ...

    def insert_record(self, connection: sqlite3.Connection, record: Record) -> Record | None: ...

    def replace_record(
        self, connection: sqlite3.Connection, record: Record, expected_revision: int, publishes: str = ""
    ) -> bool: ...


class SqliteSweeps(SweepLog):
    """One row of plan and state per sweep, which every step reads and writes in one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Plans never change. A sweep that is written to is asked for its plan with every block.
        self._plans: dict[DataFileId, Plan] = {}

    def _load(self, connection: sqlite3.Connection, id: DataFileId) -> tuple[int, Plan, State]:
        row = connection.execute(SWEEP, (id,)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no sweep {id[:60]!r}")
        if row[3]:
            raise NotFoundError(f"DataFile {id} was deleted", code="deleted")
        plan = self._plans.get(id)
        if plan is None:
            plan = msgspec.json.decode(row[1], type=Plan)
            if len(self._plans) > 1000:
                self._plans.clear()
            self._plans[id] = plan
        return row[0], plan, msgspec.json.decode(row[2], type=State)

    async def _step(self, id: DataFileId, step: Callable[[sqlite3.Connection, int, Plan, State], tuple[State, T]]) -> T:
        """Read the state, change it by `step`, write it back, in one transaction."""

        def operation(connection: sqlite3.Connection) -> T:
            number, plan, state = self._load(connection, id)
            after, result = step(connection, number, plan, state)
            if after is not state:
                _store(connection, number, plan, after)
            return result

        return await self._database.write(operation)

    def _looked(self, id: DataFileId, look: Callable[[sqlite3.Connection, int, Plan, State], T]) -> Awaitable[T]:
        def operation(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN")  # one snapshot for the state and the blocks
            try:
                return look(connection, *self._load(connection, id))
            finally:
                connection.execute("COMMIT")

        return self._database.read(operation)

    async def open(self, record: Record, plan: Plan, state: State, first: Sequence[Row]) -> Record | None:
        def operation(connection: sqlite3.Connection) -> Record | None:
            existing = self._database.insert_record(connection, record)
            if existing is None:
                row = (plan.id, msgspec.json.encode(plan), msgspec.json.encode(state), is_pending(plan, state))
                number = connection.execute(INSERT_SWEEP, row).lastrowid
                assert number is not None
                for block in first:
                    _check_ref(connection, plan.id, block.ref)
                    _insert(connection, number, block)
            return existing

        return await self._database.write(operation)

    async def get(self, id: DataFileId) -> tuple[Plan, State]:
        return (await self._database.read(lambda connection: self._load(connection, id)))[1:]

    async def append(self, id: DataFileId, blocks: Sequence[Incoming], at: str) -> Appended:
        def step(connection: sqlite3.Connection, number: int, plan: Plan, state: State) -> tuple[State, Appended]:
            stored = 0
            refused: AqDataError | None = None
            for block in blocks:
                try:
                    placed = place(plan, state, block.header, at)
                except AqDataError as exc:
                    refused = exc
                    break
                if placed is not None:
                    _check_ref(connection, id, block.ref)
                    state = placed[0]
                    _insert(connection, number, Row(placed[1], block.payload, block.ref))
                stored += 1
            return state, Appended(plan, state, stored, refused)

        return await self._step(id, step)

    async def seal(
        self, id: DataFileId, outcome: Literal["complete", "abandoned"], ending: Ending, at: str, actor: str = ""
    ) -> State:
        def step(_: sqlite3.Connection, __: int, plan: Plan, state: State) -> tuple[State, State]:
            sealed = seal(plan, state, outcome, ending, at, actor)
            return (state, state) if sealed is None else (sealed, sealed)

        return await self._step(id, step)

    async def tail(self, id: DataFileId, after: int = 0, limit_bytes: int | None = None) -> Tail:
        def look(connection: sqlite3.Connection, number: int, plan: Plan, state: State) -> Tail:
            rows: list[Row] = []
            size = 0
            for header, payload, ref in connection.execute(BLOCK_ROWS, (number, max(after, state.folded))):
                placed = msgspec.json.decode(header, type=Placed)
                size += sum(region.nbytes for region in placed.variables)
                if rows and limit_bytes is not None and size > limit_bytes:
                    break
                rows.append(Row(placed, payload, ref))
            return Tail(plan, state, tuple(rows))

        return await self._looked(id, look)

    async def headers(self, id: DataFileId, after: int, limit: int) -> tuple[State, list[tuple[int, bytes]]]:
        def look(
            connection: sqlite3.Connection, number: int, _: Plan, state: State
        ) -> tuple[State, list[tuple[int, bytes]]]:
            return state, connection.execute(BLOCK_HEADERS, (number, max(after, state.folded), limit)).fetchall()

        return await self._looked(id, look)

    async def lease(self, id: DataFileId, now: float, until: float) -> State | None:
        def step(_: sqlite3.Connection, __: int, ___: Plan, state: State) -> tuple[State, State | None]:
            if state.leased_until > now:
                return state, None
            taken = replace(state, token=state.token + 1, leased_until=until)
            return taken, taken

        return await self._step(id, step)

    async def renew(self, id: DataFileId, token: int, until: float) -> bool:
        def step(_: sqlite3.Connection, __: int, ___: Plan, state: State) -> tuple[State, bool]:
            return (replace(state, leased_until=until), True) if state.token == token else (state, False)

        return await self._step(id, step)

    async def record_fold(self, id: DataFileId, token: int, folded: int, manifest: str, at: float) -> bool:
        def step(connection: sqlite3.Connection, number: int, _: Plan, state: State) -> tuple[State, bool]:
            if state.token != token or folded < state.folded:
                return state, False
            left = connection.execute(UNFOLDED_BYTES, (number, folded)).fetchone()[0]
            return replace(state, folded=folded, manifest=manifest, unfolded_bytes=left, folded_at=at), True

        return await self._step(id, step)

    async def drop(self, id: DataFileId, through: int) -> None:
        def step(connection: sqlite3.Connection, number: int, _: Plan, state: State) -> tuple[State, None]:
            connection.execute(DROP_BLOCKS, (number, min(through, state.folded)))
            return state, None

        await self._step(id, step)

    async def end(
        self, id: DataFileId, token: int, record: Record, expected_revision: int
    ) -> Literal["ended", "stale", "fenced"]:
        def step(
            connection: sqlite3.Connection, number: int, _: Plan, state: State
        ) -> tuple[State, Literal["ended", "stale", "fenced"]]:
            if state.token != token or state.seal is None or state.folded != state.head or state.ended_revision:
                return state, "fenced"
            if not self._database.replace_record(connection, record, expected_revision):
                return state, "stale"
            connection.execute(DROP_BLOCKS, (number, state.folded))  # what a crash after the last fold left
            return replace(state, ended_revision=record.document.revision, leased_until=0.0), "ended"

        return await self._step(id, step)

    def note_revision(self, connection: sqlite3.Connection, id: DataFileId, revision: int) -> None:
        """Inside the transaction that changes the document of an open sweep: say after which block it did."""
        number, plan, state = self._load(connection, id)
        _store(connection, number, plan, replace(state, revisions=(*state.revisions, (revision, state.head))))

    async def tell(self, id: DataFileId, address: str) -> None:
        def step(_: sqlite3.Connection, __: int, ___: Plan, state: State) -> tuple[State, None]:
            return (replace(state, told=(*state.told, address)) if address not in state.told else state), None

        await self._step(id, step)

    async def unfinished(self) -> list[tuple[Plan, State]]:
        rows = await self._database.read(lambda connection: connection.execute(UNFINISHED).fetchall())
        return [(msgspec.json.decode(plan, type=Plan), msgspec.json.decode(state, type=State)) for plan, state in rows]

    async def forget(self, id: DataFileId) -> None:
        def operation(connection: sqlite3.Connection) -> None:
            connection.execute(FORGET_BLOCKS, (id,))
            connection.execute(FORGET_SWEEP, (id,))

        await self._database.write(operation)


def _store(connection: sqlite3.Connection, number: int, plan: Plan, state: State) -> None:
    connection.execute(UPDATE_SWEEP, (msgspec.json.encode(state), is_pending(plan, state), number))


def _insert(connection: sqlite3.Connection, number: int, row: Row) -> None:
    size = sum(region.nbytes for region in row.placed.variables)
    connection.execute(INSERT_BLOCK, (number, row.placed.seq, msgspec.json.encode(row.placed), size, row.payload, row.ref))


def _check_ref(connection: sqlite3.Connection, id: DataFileId, ref: str) -> None:
    barred: Any = ref and connection.execute("SELECT 1 FROM barred WHERE id=? AND key=?", (id, ref)).fetchone()
    if barred:
        raise UnavailableError("this block was collected as an orphan before it was recorded; send it again")
