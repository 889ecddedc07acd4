"""The background of sweeps: blocks into chunks, sealed sweeps into finished DataFiles; any process may do it for any sweep.

Who folds holds a lease. A lease only saves work: two that fold at once make objects of different names, and the store
switches to those of the newest token alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from weakref import WeakValueDictionary

import msgspec

from aq_data.errors import AqDataError, CorruptionError, NotFoundError, UnavailableError
from aq_data.models.datafile import DataFile, SweepInfo, next_state
from aq_data.models.history import change_between
from aq_data.models.sweep import Plan, State
from aq_data.models.values import format_instant
from aq_data.storage.arrays.folding import RETIRED_SECONDS
from aq_data.storage.arrays.growing import View
from aq_data.storage.arrays.manifest import open_prefix
from aq_data.storage.arrays.stores import ArrayStores
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.datafiles import write_newest_copy
from aq_server.service.notices import Notices
from aq_server.service.saving import now
from aq_server.service.signals import Signals
from aq_server.service.tasks import stop

__all__ = ["Folding"]

log = logging.getLogger("aq_data")

FOLD_BLOCKS = 512
FOLD_BYTES = 8 << 20
FOLD_SECONDS = 10.0
"""A sweep is folded once so many blocks, or bytes of them, are in its log, or the oldest fold was so long ago."""
MOST_BLOCKS = 20_000
MOST_BYTES = 128 << 20
"""With more in the log the next append waits: the log stays bounded however fast a writer is."""
BATCH_BYTES = 64 << 20
"""One fold takes about so much of the log."""
WAIT_SECONDS = 30.0
LEASE_SECONDS = 5.0
LOOK_SECONDS = 1.0
"""How often sweeps of other processes are looked at."""
AT_ONCE = 2
"""Sweeps folded at a time, of each store: one that hangs must not hold up the others."""


class Folding:
    """One instance per process; `run` is its task."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores, signals: Signals, notices: Notices) -> None:
        self._metadata, self._stores, self._signals = metadata, stores, signals
        self._notices = notices
        self._wake = asyncio.Event()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._leftovers: list[tuple[float, str, str]] = []
        self._limits: dict[str, asyncio.Semaphore] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    # --- when ------------------------------------------------------------------------------------------------------

    def grown(self, state: State) -> None:
        """A block was stored: fold soon if the log is long."""
        if _is_long(state):
            self._wake.set()

    async def make_room(self, id: str, state: State) -> None:
        """Return when the log of a sweep is short enough for more; UnavailableError when folding does not get on."""
        until = time.monotonic() + WAIT_SECONDS
        while state.unfolded_bytes > MOST_BYTES or state.head - state.folded > MOST_BLOCKS:
            self._wake.set()
            if time.monotonic() > until:
                raise UnavailableError(f"the log of sweep {id} is full and its blocks are not being folded; try again")
            await asyncio.sleep(0.05)
            state = (await self._metadata.sweeps.get(id))[1]

    async def run(self) -> None:
        """Fold what is due, for ever. A sweep that cannot be folded now is tried again; the others go on."""
        while True:
            # Not `wait_for`: in Python 3.11 it loses the cancellation that ends this when it comes with the timeout.
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            await self._remove_leftovers(time.time() - RETIRED_SECONDS)
            try:
                pending = await self._metadata.sweeps.unfinished()
            except AqDataError as exc:
                log.warning("sweeps cannot be looked at", extra={"fields": {"error": str(exc)}})
                continue
            for plan, state in pending:
                if state.ended_revision:
                    self._notices.begin(plan, state)
                elif plan.id not in self._running and _is_due(state):
                    # Not waited for: a slow one must not hold up the others.
                    self._running[plan.id] = asyncio.create_task(self._advance_quietly(plan))

    async def _advance_quietly(self, plan: Plan) -> None:
        async with self._limits.setdefault(plan.store, asyncio.Semaphore(AT_ONCE)):
            try:
                await self._advance(plan)
            except NotFoundError:
                pass  # deleted meanwhile
            except AqDataError as exc:
                log.warning("a sweep cannot be folded now", extra={"fields": {"id": plan.id, "error": str(exc)}})
            except Exception:
                log.exception("folding failed", extra={"fields": {"id": plan.id}})
            finally:
                del self._running[plan.id]

    async def finish(self, plan: Plan) -> DataFile:
        """Return when a sealed sweep has ended, here or elsewhere."""
        while True:
            await self._advance(plan)
            record = await self._metadata.get(plan.id)
            if record is None or record.document.state != "open":
                break
            await asyncio.sleep(0.05)  # another process holds the lease
        if record is None or record.document.state == "deleted":
            raise NotFoundError(f"DataFile {plan.id} was deleted", code="deleted")
        return record.document

    async def close(self) -> None:
        """Remove what was left for readers; there are none any more."""
        await stop(self._running.values())
        await self._notices.close()
        with suppress(AqDataError):
            await self._remove_leftovers(float("inf"))

    async def _remove_leftovers(self, before: float) -> None:
        for entry in [entry for entry in self._leftovers if entry[0] <= before]:
            self._leftovers.remove(entry)
            with suppress(AqDataError):  # gc finds it
                await (await self._stores.at(entry[1])).blobs.remove(entry[2])

    # --- how -------------------------------------------------------------------------------------------------------

    async def _advance(self, plan: Plan) -> None:
        """Fold everything there is; end the sweep if it is sealed. Nothing when another process holds the lease."""
        lock = self._locks.setdefault(plan.id, asyncio.Lock())
        async with lock, self._leased(plan.id) as leased:
            state = leased
            try:
                # Not down to the last block while it grows: that would fold each as it comes.
                while state is not None and state.folded < state.head and _is_due(state):
                    state = await self._fold(plan, state)
                if state is not None and state.seal is not None and not state.ended_revision:
                    await self._end(plan, state)
            except (NotFoundError, CorruptionError):
                # What we read may have been replaced by whoever took the lease while this process slept.
                now_ = (await self._metadata.sweeps.get(plan.id))[1]
                if leased is None or (now_.token == leased.token and not now_.ended_revision):
                    raise

    @asynccontextmanager
    async def _leased(self, id: str) -> AsyncIterator[State | None]:
        """The state under a lease of ours, renewed until the block ends; None when it is another's."""
        log_, instant = self._metadata.sweeps, time.time()
        state = await log_.lease(id, instant, instant + LEASE_SECONDS)
        if state is None or state.ended_revision:
            yield None
            return

        async def renew() -> None:
            while True:
                await asyncio.sleep(LEASE_SECONDS / 3)
                if not await log_.renew(id, state.token, time.time() + LEASE_SECONDS):
                    return

        renewing = asyncio.create_task(renew())
        try:
            yield state
        finally:
            await stop([renewing])
            with suppress(AqDataError):
                await log_.renew(id, state.token, 0.0)

    async def _fold(self, plan: Plan, leased: State) -> State | None:
        """Move the oldest blocks into chunks; the state after it, None when the lease was lost."""
        sweeps = self._metadata.sweeps
        tail = await sweeps.tail(plan.id, 0, BATCH_BYTES)
        if tail.state.token != leased.token:
            return None
        if not tail.rows:
            return tail.state
        folder = await self._stores.folder(plan.store)
        generation, gone = await folder.fold(plan, tail.state, tail.rows)
        cut = tail.rows[-1].placed.seq
        if not await sweeps.record_fold(plan.id, leased.token, cut, generation, time.time()):
            # Nothing is removed: "no" may come late, from a store that could not tell, after another went on from this fold.
            return None
        await sweeps.drop(plan.id, cut)
        await (await self._stores.at(plan.store)).blobs.remove_many(gone)
        # This process may have slept: a state with another's token is not ours to go on with.
        after = (await sweeps.get(plan.id))[1]
        return after if after.token == leased.token else None

    async def _end(self, plan: Plan, state: State) -> None:
        """Publish the plain group and turn the sweep into a finished DataFile."""
        seal = state.seal
        assert seal is not None
        arrays, folder = await self._stores.at(plan.store), await self._stores.folder(plan.store)
        finals = await folder.publish(View(plan, state, await folder.manifest(plan, state), ()))
        outcome = "stale"
        while outcome == "stale":
            current = await self._metadata.get(plan.id)
            if current is None or current.document.state != "open":
                return
            before = current.document
            info = msgspec.structs.replace(
                before.sweep or SweepInfo(), reason=seal.reason, head=state.head, last_block_at=state.last_block_at
            )
            document = msgspec.structs.replace(
                before,
                state=next_state(before.state, "finish" if seal.outcome == "complete" else "abandon"),
                revision=before.revision + 1,
                updated_at=format_instant(now()),
                finished_at=seal.at,
                arrays=finals,
                size=sum(array.nbytes for array in finals) + sum(file.size for file in before.files),
                sweep=info,
            )
            change = change_between(before, document, seal.actor)
            record = msgspec.structs.replace(current, document=document, change=change)
            await arrays.write_copy(document, record.attempt, record.digest)
            await arrays.blobs.settle(f"{plan.id}/{plan.attempt}")
            outcome = await self._metadata.sweeps.end(plan.id, state.token, record, before.revision)
        if outcome == "fenced":
            # The copy just written may lie over that of another's end, or of a change after it.
            current = await self._metadata.get(plan.id)
            if current is not None and current.document.state not in ("open", "deleted"):
                await write_newest_copy(self._metadata, self._stores, current)
            return
        await write_newest_copy(self._metadata, self._stores, record)
        for prefix in (open_prefix(plan.id, plan.attempt), f"{plan.id}/{plan.attempt}/blocks"):
            self._leftovers.append((time.time(), plan.store, prefix))
        self._signals.tell(plan.id)
        self._wake.set()


def _is_long(state: State) -> bool:
    return state.head - state.folded >= FOLD_BLOCKS or state.unfolded_bytes >= FOLD_BYTES


def _is_due(state: State) -> bool:
    return state.seal is not None or _is_long(state) or time.time() - state.folded_at >= FOLD_SECONDS
