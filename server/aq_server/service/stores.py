"""Use cases of stores: see them, add one, give one another root, take one away.

A DataFile must never be acknowledged into a store that is gone. Who saves writes the blobs first and then looks whether the
store is still there and open (`Target.confirm`), then publishes. Who takes a root away closes the store first and then looks
whether anything lies there, then lets go of it. Whichever comes second sees the other, so at least one of them gives up.
Between the two looks lies more than `KNOWN_SECONDS`: by then no server still takes the name for the old root.
"""

from __future__ import annotations

import asyncio
import secrets

import msgspec

from aq_data.errors import ConflictError, NotFoundError
from aq_data.models.paths import parse_sort
from aq_data.models.query import Node, parse_filter
from aq_data.models.stores import DEFAULT_STORE, AddedStore, StoreStatus, check_store_name, kind_of_root, overlap
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.store import SNAPSHOTS
from aq_data.storage.arrays.stores import KNOWN_SECONDS, ArrayStores, Place, StoreInfo, real_root
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.datafiles import TOMBSTONE
from aq_server.service.health import Health

__all__ = ["StoreAdmin", "lying_in"]

FORGET_SECONDS = 1.5 * KNOWN_SECONDS


class StoreAdmin:
    """The use cases; nothing of value lives in an instance."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores, health: Health) -> None:
        self._metadata, self._stores, self._health = metadata, stores, health

    async def list(self) -> list[StoreStatus]:
        """Every store with its state and use."""
        infos = await self._stores.infos()
        states = await self._health.stores([info.name for info in infos])
        return [await self._status(info, states[info.name]) for info in infos]

    async def _status(self, info: StoreInfo, state: str) -> StoreStatus:
        page = await self._metadata.search(lying_in(info.name), parse_sort("id"), 0, None)
        return StoreStatus(
            name=info.name,
            kind=kind_of_root(info.place.root),
            root=info.place.root,
            origin=info.origin,
            default_for=self._stores.default_for(info.name),
            datafiles=page.total,
            datafiles_is_exact=page.total_is_exact,
            state="closing" if info.closing and state == "ok" else state,
            fallback=self._stores.fallbacks.get(info.name, ""),
            waiting=self._health.waiting.get(info.name, 0),
        )

    async def put(self, name: str, root: str) -> tuple[StoreStatus, bool]:
        """Add a store, or give one another root while nothing lies in it; its status and whether it is new.

        ForbiddenError when no entry of `store_roots` allows the root; ConflictError when it overlaps with that of another
        store, or something lies in the old one; what is wrong with it when nothing can be written there.
        """
        check_store_name(name)
        place = await asyncio.to_thread(self._stores.allowed, root)
        before = await self._added(name)
        if before is None or before.root != place.root:
            await self._check_apart(name, place)
            await self._stores.probe(place)
            await self._give(name, place, before)
        elif before.closing:
            await self._change(before, msgspec.structs.replace(before, closing=""))
        state = await self._health.stores([name])
        return await self._status(StoreInfo(name, place, "added"), state[name]), before is None

    async def _give(self, name: str, place: Place, before: AddedStore | None) -> None:
        """It stays closed until it is sure that no other with this root was added at the same time."""
        if before is not None:
            before = await self._vacated(before)
        closed = AddedStore(name, place.root, secrets.token_hex(8))
        await self._change(before, closed)
        try:
            await self._check_apart(name, place)
        except BaseException:
            undone = None if before is None else msgspec.structs.replace(before, closing="")
            await asyncio.shield(self._metadata.change_store(closed, undone))
            raise
        await self._change(closed, msgspec.structs.replace(closed, closing=""))

    async def remove(self, name: str) -> None:
        """Take away a store in which nothing lies. ConflictError when something does, or it is a default."""
        before = await self._added(name)
        if before is None:
            raise NotFoundError(f"there is no store {name[:80]!r}")
        kinds = self._stores.default_for(name)
        if kinds:
            raise _in_use(f"the store {name!r} is the default (of {', '.join(kinds)}); change the configuration first")
        await self._change(await self._vacated(before), None)

    async def _added(self, name: str) -> AddedStore | None:
        for info in await self._stores.infos():
            if info.name == name and info.origin == "configured":
                raise _in_use(f"the store {name!r} comes from the configuration; change it there")
            if info.name == name:
                return AddedStore(name, info.place.root, info.closing)
        return None

    async def _check_apart(self, name: str, place: Place) -> None:
        """Two stores in one place would take each other's blobs for orphans."""
        for info in await self._stores.infos():
            if info.name != name and overlap(await asyncio.to_thread(real_root, info.place.root), place.root):
                raise _in_use(f"{place.root} and the root of the store {info.name!r}, {info.place.root}, overlap")

    async def _vacated(self, before: AddedStore) -> AddedStore:
        """The store, closed, once it is sure that nothing lies in it and nothing will; else it is open again."""
        await self._check_unused(before.name)
        closed = msgspec.structs.replace(before, closing=secrets.token_hex(8))
        await self._change(before, closed)
        try:
            await asyncio.sleep(FORGET_SECONDS)
            if await _holds_anything((await self._stores.at(before.name)).blobs):
                raise _in_use(
                    f"something lies in the store {before.name!r}; `aq-data gc --delete` removes what nobody needs"
                )
            await self._check_unused(before.name)
        except BaseException:
            await asyncio.shield(self._metadata.change_store(closed, msgspec.structs.replace(before, closing="")))
            raise
        return closed

    async def _check_unused(self, name: str) -> None:
        count = await self._metadata.count(lying_in(name))
        if count:
            raise _in_use(f"{count} DataFiles lie in the store {name!r}", datafiles=count)

    async def _change(self, before: AddedStore | None, after: AddedStore | None) -> None:
        if not await self._metadata.change_store(before, after):
            raise _in_use("the store is being changed by somebody else; look again")


def _in_use(message: str, **details: object) -> ConflictError:
    return ConflictError(message, code="in_use", **details)


def lying_in(name: str) -> Node:
    """The filter for the DataFiles of one store."""
    # What is older than named stores says nothing and lies in the default one.
    return parse_filter({"store": {"$in": [name, None]} if name == DEFAULT_STORE else name})


async def _holds_anything(blobs: BlobStore) -> bool:
    """Whether there is more than marks of deletions whose blobs are gone."""
    for name in await blobs.children(""):
        if name == SNAPSHOTS:
            return True
        if not name.startswith(".") and any(not child.startswith(TOMBSTONE) for child in await blobs.children(name)):
            return True
    return False
