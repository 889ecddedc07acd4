"""Tokens in MongoDB: a document each, `{_id, hash, token: JSON, revoked_at}`."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from pymongo.asynchronous.collection import AsyncCollection

from aq_data.storage.metadata._mongo_border import border
from aq_data.storage.metadata._mongo_tries import again
from aq_data.storage.metadata.store import Token

__all__ = ["Tokens"]

Row = dict[str, Any]


class Database(Protocol):
    """What the tokens need of the store."""

    async def collection(self, name: str) -> AsyncCollection[Row]: ...


class Tokens:
    """What `MetadataStore` promises of tokens."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, token: Token) -> None:
        tokens = await self._database.collection("tokens")
        row = {"hash": token.hash, "token": msgspec.json.encode(token), "revoked_at": token.revoked_at}
        with border():
            await again(lambda: tokens.update_one({"_id": token.id}, {"$setOnInsert": row}, upsert=True))

    async def find(self, hash: str) -> Token | None:
        tokens = await self._database.collection("tokens")
        with border():
            row = await tokens.find_one({"hash": hash})
        return None if row is None else _token(row)

    async def all(self) -> list[Token]:
        tokens = await self._database.collection("tokens")
        with border():
            return [_token(row) async for row in tokens.find().sort("_id", 1)]

    async def revoke(self, id: str, revoked_at: str) -> bool:
        tokens = await self._database.collection("tokens")
        with border():
            change = {"$set": {"revoked_at": revoked_at}}
            await again(lambda: tokens.update_one({"_id": id, "revoked_at": None}, change))
            return await tokens.find_one({"_id": id}, {"_id": 1}) is not None


def _token(row: Row) -> Token:
    return msgspec.structs.replace(msgspec.json.decode(row["token"], type=Token), revoked_at=row["revoked_at"])
