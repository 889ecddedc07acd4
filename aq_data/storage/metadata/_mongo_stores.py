"""Stores that admins added, in MongoDB: a document each, `{_id: name, store: JSON}`."""

from __future__ import annotations

from typing import Any

import msgspec
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import DuplicateKeyError

from aq_data.models.stores import AddedStore
from aq_data.storage.metadata._mongo_tries import again

__all__ = ["change_store", "read_stores"]

Stores = AsyncCollection[dict[str, Any]]


async def read_stores(stores: Stores) -> list[AddedStore]:
    """All of them, in order of names."""
    return [msgspec.json.decode(row["store"], type=AddedStore) async for row in stores.find().sort("_id", 1)]


async def change_store(stores: Stores, before: AddedStore | None, after: AddedStore | None) -> bool:
    """`MetadataStore.change_store`."""
    tries = 0

    async def attempt() -> bool:
        nonlocal tries
        tries += 1
        # An earlier try that got no answer may have been the one that changed it.
        return await _change(stores, before, after) or (tries > 1 and await _is_stored(stores, before, after))

    return await again(attempt)


async def _change(stores: Stores, before: AddedStore | None, after: AddedStore | None) -> bool:
    if before is None:
        try:
            await stores.insert_one(_row(after)) if after is not None else None
        except DuplicateKeyError:
            return False
        return True
    if after is None:
        return (await stores.delete_one(_row(before))).deleted_count == 1
    return (await stores.update_one(_row(before), {"$set": _row(after)})).matched_count == 1


async def _is_stored(stores: Stores, before: AddedStore | None, after: AddedStore | None) -> bool:
    """Whether what is there now is what a change was to make."""
    found = {store.name: store for store in await read_stores(stores)}
    return all(found.get(store.name) == after for store in (before, after) if store is not None)


def _row(store: AddedStore) -> dict[str, Any]:
    return {"_id": store.name, "store": msgspec.json.encode(store)}
