"""The background of stores with a fallback: which of them answer, and what waits elsewhere brought to where it belongs.

A DataFile that was saved into the fallback says so (`intended_store`). It is copied under an attempt of its own, compared
byte by byte, and the record is switched by compare-and-set; the old blobs go once nobody reads them any more. A crash leaves
an attempt that no record names, which `gc` finds. Whoever drains holds a lease; it saves work alone, for of two who bring
one DataFile home at once only one switches its record, and each has an attempt of its own.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from contextlib import suppress

import msgspec

from aq_data.errors import AqDataError, CorruptionError, NotFoundError
from aq_data.models.history import change_between
from aq_data.models.paths import parse_sort
from aq_data.models.query import parse_filter
from aq_data.models.structs import resolve
from aq_data.models.values import format_instant
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.store import group_prefix
from aq_data.storage.arrays.stores import ArrayStores
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.datafiles import write_newest_copy
from aq_server.service.health import OK, Health
from aq_server.service.saving import DISCARD_SECONDS, now
from aq_server.service.signals import Signals
from aq_server.service.tasks import stop

__all__ = ["Draining"]

log = logging.getLogger("aq_data")

LOOK_SECONDS = 1.0
"""How often each server asks whether a store answers."""
LEASE_SECONDS = 60.0
BATCH = 100
READERS_SECONDS = 60.0
"""The old blobs stay so long for those who read them; who comes later reads the record again."""
AT_ONCE = 8
PIECE = 4 << 20
COPY = "arrays.zarr/zarr.json"


class _Id(msgspec.Struct):
    id: str


class Draining:
    """One instance per process; `run` is its task."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores, health: Health, signals: Signals) -> None:
        self._metadata, self._stores, self._health, self._signals = metadata, stores, health, signals
        self._owner = secrets.token_hex(8)
        self._leftovers: list[tuple[float, str, str]] = []
        self._draining: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Look after every store with a fallback, for ever; at once when there is none."""
        while self._stores.fallbacks:
            await asyncio.gather(*map(self._look, self._stores.fallbacks))
            await self._remove_leftovers(time.time() - READERS_SECONDS)
            await asyncio.sleep(LOOK_SECONDS)

    async def close(self) -> None:
        """Stop, and remove what was left for readers; there are none any more."""
        await stop(self._draining.values())
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                await self._remove_leftovers(float("inf"))

    async def _look(self, name: str) -> None:
        state = (await self._health.stores([name]))[name]
        self._stores.mark(name, is_down=state != OK)
        try:
            waiting = await self._metadata.count(parse_filter({"intended_store": name}))
        except AqDataError as exc:
            log.warning("what waits cannot be counted", extra={"fields": {"store": name, "error": str(exc)}})
            return
        self._health.waiting[name] = waiting
        if waiting and state == OK and name not in self._draining:
            self._draining[name] = asyncio.create_task(self._drain_quietly(name))

    async def _remove_leftovers(self, before: float) -> None:
        for entry in [entry for entry in self._leftovers if entry[0] <= before]:
            self._leftovers.remove(entry)
            with suppress(AqDataError):  # gc finds it
                await (await self._stores.at(entry[1])).blobs.remove(entry[2])

    # --- bringing home -----------------------------------------------------------------------------------------------

    async def _drain_quietly(self, name: str) -> None:
        lease = f"drain {name}"
        try:
            if await self._metadata.lease(lease, self._owner, time.time(), time.time() + LEASE_SECONDS):
                await self._drain(name, lease)
                await self._metadata.lease(lease, self._owner, time.time(), 0.0)
        except AqDataError as exc:
            log.warning("a store cannot be drained into now", extra={"fields": {"store": name, "error": str(exc)}})
        except Exception:
            log.exception("draining failed", extra={"fields": {"store": name}})
        finally:
            del self._draining[name]

    async def _drain(self, name: str, lease: str) -> None:
        """Everything that waits; what cannot be brought now, as this server does not see it, hinders no other."""
        waiting, cursor = parse_filter({"intended_store": name}), None
        while True:
            page = await self._metadata.search(waiting, parse_sort("created_at"), BATCH, cursor)
            for document in page.documents:
                id = msgspec.json.decode(document, type=_Id).id
                try:
                    await self._bring(id, name)
                except AqDataError as exc:
                    log.warning("a DataFile waits on", extra={"fields": {"id": id, "store": name, "error": str(exc)}})
                    if self._stores.is_down(name):
                        return
                if not await self._metadata.lease(lease, self._owner, time.time(), time.time() + LEASE_SECONDS):
                    return
            cursor = page.cursor
            if cursor is None:
                return

    async def _bring(self, id: str, name: str) -> None:
        """Copy, compare, switch."""
        first = await self._metadata.get(id)
        attempt, copied = secrets.token_hex(8), set[str]()
        record = first
        while record is not None and first is not None and _waits(record, first, name):
            source, target = await self._stores.at(record.document.store), await self._stores.at(name)
            # Files may be attached meanwhile; then the record is another, and they are copied in the next turn.
            await self._copy(source.blobs, target.blobs, record, attempt, copied)
            document = msgspec.structs.replace(
                record.document,
                store=name,
                intended_store=None,
                path=group_prefix(id, attempt),
                revision=record.document.revision + 1,
                updated_at=format_instant(now()),
            )
            moved = Record(document, attempt, record.digest, change_between(record.document, document, ""))
            await target.write_copy(document, attempt, record.digest)
            await target.blobs.settle(f"{id}/{attempt}")
            # `gc` may have taken the attempt for an orphan: then it is barred. Without an answer it may be published.
            if await self._metadata.replace(moved, record.document.revision, publishes=attempt):
                self._leftovers.append((time.time(), record.document.store, f"{id}/{record.attempt}"))
                self._signals.tell(id)
                await write_newest_copy(self._metadata, self._stores, moved)
                return
            record = await self._metadata.get(id)
        if copied:
            await (await self._stores.at(name)).blobs.remove(f"{id}/{attempt}")

    async def _copy(self, source: BlobStore, target: BlobStore, record: Record, attempt: str, copied: set[str]) -> None:
        """All of a record that is not among `copied`, but the metadata copy, which is written anew."""
        old, new = f"{record.document.id}/{record.attempt}", f"{record.document.id}/{attempt}"
        found = {entry.key.removeprefix(f"{old}/") async for entry in source.walk(old)}
        needed = {COPY, *(f"files/{info.key}" for info in record.document.files)}
        if not needed <= found:
            raise NotFoundError(f"not all of {old} is seen by this server; all servers need the same fallback")
        arrays = {key for key in found if not key.startswith("files/") and not key.endswith(".tmp")}
        keys = iter(sorted((arrays | needed) - copied - {COPY}))

        async def copy() -> None:
            for key in keys:
                await _copy_blob(source, target, f"{old}/{key}", f"{new}/{key}")
                copied.add(key)

        lanes = [asyncio.create_task(copy()) for _ in range(AT_ONCE)]
        try:
            await asyncio.gather(*lanes)
        finally:
            await stop(lanes)


def _waits(record: Record, first: Record, name: str) -> bool:
    document = record.document
    return document.intended_store == name and document.state != "deleted" and record.attempt == first.attempt


async def _copy_blob(source: BlobStore, target: BlobStore, old: str, new: str) -> None:
    """CorruptionError when what was written does not read back as what was to be written."""
    size = await source.size(old)
    upload = await target.upload(new)
    try:
        for start in range(0, size, PIECE):
            await upload.write(await source.get(old, start, min(start + PIECE, size)))
        await upload.finish()
    except BaseException:
        await upload.discard()
        raise
    for start in range(0, size, PIECE):
        stop = min(start + PIECE, size)
        if await source.get(old, start, stop) != await target.get(new, start, stop):
            raise CorruptionError(f"the copy of {old} differs from it")
    if await target.size(new) != size:
        raise CorruptionError(f"the copy of {old} is not as long as it is")


resolve(_Id)
