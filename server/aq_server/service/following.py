"""Following a DataFile: every event once, from any point on, out of what is stored.

Nothing is queued for a follower. It reads the log at its own pace, from the position it was at: a slow one costs the writer
nothing and misses nothing. An event's id is that position, `<blocks>-<revision>`, the same for every follower: the log knows
after which block each revision came.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import suppress

import msgspec

from aq_data.errors import NotFoundError, UnavailableError, ValidationError
from aq_data.models.structs import resolve
from aq_data.models.sweep import Plan, State
from aq_data.storage.arrays.manifest import Segment
from aq_data.storage.arrays.stores import ArrayStores
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.signals import Signals

__all__ = ["Event", "Following"]

PAGE = 1000
"""Blocks looked up at a time."""
LOOK_SECONDS = 0.1
"""Changes made by other processes are found after at most so long."""
TRIES = 10

_POSITION = re.compile(r"(\d{1,18})-(\d{1,18})", re.ASCII)


class Event(msgspec.Struct, frozen=True):
    """`event` is block, metadata, finished or abandoned; `data` is JSON."""

    id: str
    event: str
    data: bytes


class Following:
    """Reads what happened to DataFiles from the log, from folded segments, and from the documents."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores, signals: Signals) -> None:
        self._metadata, self._stores, self._signals = metadata, stores, signals
        self._segment: tuple[Segment, list[bytes]] | None = None

    async def follow(self, id: str, last: str = "") -> AsyncGenerator[list[Event], None]:
        """Events after the position `last` (from the beginning when empty) as they happen; an empty list when none came.

        Ends when the DataFile is deleted or the server stops. NotFoundError when there is none.
        """
        id = id.lower()
        seq, revision = self._position(last)
        await self._record(id)
        while not self._signals.stopping.is_set():
            changed = self._signals.listen(id)
            try:
                events, seq, revision, more = await self._next(id, seq, revision)
            except NotFoundError:
                return
            yield events
            if not more:
                with suppress(asyncio.TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await changed.wait()

    def _position(self, last: str) -> tuple[int, int]:
        match = _POSITION.fullmatch(last.strip() or "0-0")
        if match is None:
            raise ValidationError(f"Last-Event-ID takes an id this server gave, as in 12-3, not {last[:40]!r}")
        return int(match[1]), int(match[2])

    async def _record(self, id: str) -> Record:
        record = await self._metadata.get(id)
        if record is None:
            raise NotFoundError(f"there is no DataFile {id[:60]!r}")
        if record.document.state == "deleted":
            raise NotFoundError(f"DataFile {id} was deleted", code="deleted")
        return record

    async def _next(self, id: str, seq: int, revision: int) -> tuple[list[Event], int, int, bool]:
        """Events after a position, the position after them, and whether there are more at once."""
        record = await self._record(id)
        if record.document.sweep is None:
            numbers = range(revision + 1, record.document.revision + 1)
            events = [self._changed(record, number, 1, 0) for number in numbers]
            return events, 0, max(revision, record.document.revision), False
        plan, state = await self._metadata.sweeps.get(id)
        revision, changes = max(revision, 1), list(state.revisions)
        if state.ended_revision:
            # Read after the state: what came since the end comes after every block.
            record = await self._record(id)
            last = changes[-1][0] if changes else 1
            changes += [(number, state.head) for number in range(last + 1, record.document.revision + 1)]
        changes = [change for change in changes if change[0] > revision]
        events = []
        for position, header in await self._blocks(plan, state, seq):
            if position > state.head:
                break  # newer than the changes we know of
            while changes and changes[0][1] < position:
                revision = changes.pop(0)[0]
                events.append(self._changed(record, revision, state.ended_revision, seq))
            seq = position
            events.append(Event(f"{seq}-{revision}", "block", header))
        if seq < state.head:  # a page ends with its segment
            return events, seq, revision, True
        for revision, _ in changes:
            events.append(self._changed(record, revision, state.ended_revision, seq))
        return events, seq, revision, False

    def _changed(self, record: Record, revision: int, ended: int, seq: int) -> Event:
        """The event of a revision: the end, or a change of the metadata."""
        if revision == ended:
            return self._end(record, f"{seq}-{revision}")
        return Event(f"{seq}-{revision}", "metadata", msgspec.json.encode({"revision": revision}))

    def _end(self, record: Record, position: str) -> Event:
        document = record.document
        sweep = document.sweep
        is_abandoned = document.state == "abandoned"
        data = {
            "id": document.id,
            "state": "abandoned" if is_abandoned else "complete",
            "reason": sweep.reason if sweep is not None else "",
            "head": sweep.head if sweep is not None else 0,
        }
        return Event(position, "abandoned" if is_abandoned else "finished", msgspec.json.encode(data))

    async def _blocks(self, plan: Plan, state: State, after: int) -> list[tuple[int, bytes]]:
        """Position and header of up to `PAGE` blocks beyond `after`."""
        for _ in range(TRIES):
            if after >= state.head:
                return []
            if after >= state.folded:
                state, found = await self._metadata.sweeps.headers(plan.id, after, PAGE)
                if state.folded <= after:
                    return found
            with suppress(NotFoundError):  # folded again meanwhile: look again
                return await self._folded_blocks(plan, state, after)
            state = (await self._metadata.sweeps.get(plan.id))[1]
        raise UnavailableError(f"sweep {plan.id} is folded faster than it can be followed; connect again")

    async def _folded_blocks(self, plan: Plan, state: State, after: int) -> list[tuple[int, bytes]]:
        folder = await self._stores.folder(plan.store)
        if state.ended_revision:
            segments = await folder.published_segments(plan)
        else:
            segments = list((await folder.manifest(plan, state)).segments)
        segment = next(s for s in segments if s.last > after)
        if self._segment is None or self._segment[0] != segment:
            self._segment = (segment, await folder.events(segment))
        headers = self._segment[1]
        first = max(0, after + 1 - segment.first)
        return [(segment.first + i, headers[i]) for i in range(first, min(first + PAGE, len(headers)))]


resolve(Event)
