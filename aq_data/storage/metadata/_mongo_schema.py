"""What a MongoDB database is made ready with: its version is checked, its indexes are there.

    1 -> 2   pids are claimed in a collection of their own, not by a unique index, which a sharded cluster cannot keep; large
             instruments are snapshots. Records stay as they are: those of version 1 are whole, and found as ever.

A server of version 1 must not write beside one of version 2: stop it first.
"""

from __future__ import annotations

from typing import Any

from pymongo import IndexModel
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from aq_data.errors import ConfigError
from aq_data.models.datafile import FORMAT
from aq_data.storage.metadata._mongo_records import INDEXES, SCHEMA_VERSION, TERMS_INDEX, make_mark, pid_key

__all__ = ["prepare"]

NO_INDEX = 27


async def prepare(database: AsyncDatabase[dict[str, Any]]) -> None:
    """Make a database ready. ConfigError for one of a newer version, which is left as it is."""
    versions = {"version": SCHEMA_VERSION, "format": FORMAT}
    await database["meta"].update_one({"_id": "schema"}, {"$setOnInsert": versions}, upsert=True)
    found = await database["meta"].find_one({"_id": "schema"}) or {}
    for key, known in versions.items():
        if found[key] > known:
            raise ConfigError(
                f"the database {database.name!r} is of {key} {found[key]}, this aq-data reads {known}; use the one that "
                "made it"
            )
    models = [IndexModel(keys, name=name, **options) for name, keys, options in INDEXES]
    await database["datafiles"].create_indexes(models)
    await database["snapshot_terms"].create_index([("t.$**", 1)], name=TERMS_INDEX)
    await database["snapshot_terms"].create_index([("snapshot", 1)], name="snapshot")
    await database["tokens"].create_index([("hash", 1)], name="hash", unique=True)
    await database["kinds"].create_index([("path", 1)], name="path")
    if found["version"] < SCHEMA_VERSION:
        await _claim_pids(database)
        await database["meta"].update_one({"_id": "schema"}, {"$max": versions})


async def _claim_pids(database: AsyncDatabase[dict[str, Any]]) -> None:
    """Repeated from the beginning when it is interrupted, and harmless when several servers do it at once."""
    async for row in database["datafiles"].find({"pid": {"$type": "string"}}, {"pid": 1}):
        claim = {"$setOnInsert": {"id": row["_id"], "by": make_mark()}}
        await database["pids"].update_one({"_id": pid_key(row["pid"])}, claim, upsert=True)
    try:
        await database["datafiles"].drop_index("pids")
    except OperationFailure as exc:
        if exc.code != NO_INDEX:
            raise
