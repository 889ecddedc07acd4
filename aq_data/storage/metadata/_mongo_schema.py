"""What a MongoDB database is made ready with: its version is checked, its indexes are there.

    1 -> 2   pids are claimed in a collection of their own, not by a unique index, which a sharded cluster cannot keep; large
             instruments are snapshots. Records stay as they are: those of version 1 are whole, and found as ever.
    2 -> 3   records have their time as a number, and the index of terms has it behind every value.
    3 -> 4   records have their day, and their numbers a second time: those of a range are found by the day.

A server of an older version must not write beside one of a newer: stop it first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pymongo import IndexModel, UpdateOne
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import NetworkTimeout, OperationFailure

from aq_data.errors import ConfigError
from aq_data.models.datafile import FORMAT
from aq_data.storage.metadata._mongo_records import DAY, INDEXES, SCHEMA_VERSION, created_of, make_mark, pid_key

__all__ = ["left_to_do", "prepare", "version_of"]

log = logging.getLogger("aq_data")

NO_INDEX = 27
BATCH = 1000


VERSIONS = {"version": SCHEMA_VERSION, "format": FORMAT}
"""Of the database, and of the documents in it."""


async def prepare(database: AsyncDatabase[dict[str, Any]]) -> None:
    """Make a database ready. ConfigError for one of a newer version, which is left as it is."""
    await database["meta"].update_one({"_id": "schema"}, {"$setOnInsert": VERSIONS}, upsert=True)
    version = await version_of(database)
    for step in STEPS:
        if version < step.target:
            await step.take(database)
    await _index(database["datafiles"], [IndexModel(keys, name=name, **options) for name, keys, options in INDEXES])
    terms = [IndexModel([("t.$**", 1)], name="terms"), IndexModel([("snapshot", 1)], name="snapshot")]
    await _index(database["snapshot_terms"], terms)
    await _index(database["tokens"], [IndexModel([("hash", 1)], name="hash", unique=True)])
    await _index(database["kinds"], [IndexModel([("path", 1)], name="path")])
    if version < SCHEMA_VERSION:
        for name in ("pids", "terms", "created_at"):
            await _drop(database["datafiles"], name)
        await database["meta"].update_one({"_id": "schema"}, {"$max": VERSIONS})


async def version_of(database: AsyncDatabase[dict[str, Any]]) -> int:
    """The version of a database, 0 where there is none. ConfigError for a newer one than ours."""
    found = await database["meta"].find_one({"_id": "schema"})
    if found is None:
        return 0
    for key, known in VERSIONS.items():
        if found[key] > known:
            raise ConfigError(
                f"the database {database.name!r} is of {key} {found[key]}, this aq-data reads {known}; use the one that "
                "made it"
            )
    version: int = found["version"]
    return version


async def left_to_do(database: AsyncDatabase[dict[str, Any]], version: int) -> tuple[str, ...]:
    """What `prepare` does with a database of this version, in words, and with how many DataFiles: it reads them all."""
    steps = [step for step in STEPS if version < step.target]
    words = [f"{step.words} ({await database['datafiles'].count_documents(step.wanted)} DataFiles)" for step in steps]
    return (*words, "build the indexes of this version") if words else ()


async def _index(collection: AsyncCollection[dict[str, Any]], models: list[IndexModel]) -> None:
    """Return when the indexes are there. To build one over many records takes longer than the driver waits for an answer."""
    while True:
        try:
            await collection.create_indexes(models)
            return
        except NetworkTimeout:  # the server goes on with it, and whoever asks again waits for the same
            log.warning("an index is being built", extra={"fields": {"collection": collection.name}})


async def _drop(collection: AsyncCollection[dict[str, Any]], name: str) -> None:
    try:
        await collection.drop_index(name)
    except OperationFailure as exc:
        if exc.code != NO_INDEX:
            raise


# What follows is repeated from the beginning when it is interrupted, and harmless when several servers do it at once.

WITH_PID = {"pid": {"$type": "string"}}
UNDATED = {"c": {"$exists": False}, "o": {"$exists": True}}
UNNUMBERED = {"t": {"$exists": True}, "d": {"$exists": False}}


async def _date(database: AsyncDatabase[dict[str, Any]]) -> None:
    datafiles = database["datafiles"]
    changes: list[UpdateOne] = []
    async for row in datafiles.find(UNDATED, {"o": 1}, batch_size=BATCH):
        changes.append(UpdateOne({"_id": row["_id"], "o": row["o"]}, {"$set": {"c": created_of(row["o"])}}))
        if len(changes) == BATCH:
            await datafiles.bulk_write(changes, ordered=False)
            changes.clear()
    if changes:
        await datafiles.bulk_write(changes, ordered=False)


async def _number(database: AsyncDatabase[dict[str, Any]]) -> None:
    """Give records their day and numbers; also bools, nulls and lengths, which look alike; nobody asks for these there."""
    datafiles, batch = database["datafiles"], list[str]()
    several = {"$filter": {"input": "$$one.v", "cond": {"$ne": ["$$this", math.nan]}}}  # which is less than all for $min
    extremes = {"$cond": [{"$isArray": "$$one.v"}, [{"$min": several}, {"$max": several}], "$$one.v"]}
    is_number = {"$isNumber": {"$cond": [{"$isArray": "$$this.v"}, {"$first": "$$this.v"}, "$$this.v"]}}
    numbers = {"$filter": {"input": {"$objectToArray": "$t"}, "cond": is_number}}
    since_midnight = {"$mod": [{"$add": [{"$mod": ["$c", DAY]}, DAY]}, DAY]}  # also before 1970; and no double in between
    change = {
        "d": {"$toLong": {"$divide": [{"$subtract": ["$c", since_midnight]}, DAY]}},
        "n": {"$arrayToObject": {"$map": {"input": numbers, "as": "one", "in": {"k": "$$one.k", "v": extremes}}}},
    }

    async def give() -> None:
        await datafiles.update_many({"_id": {"$in": batch}, **UNNUMBERED}, [{"$set": change}])
        batch.clear()

    async for row in datafiles.find(UNNUMBERED, {"_id": 1}, batch_size=BATCH):
        batch.append(row["_id"])
        if len(batch) == BATCH:
            await give()
    if batch:
        await give()


async def _claim_pids(database: AsyncDatabase[dict[str, Any]]) -> None:
    async for row in database["datafiles"].find(WITH_PID, {"pid": 1}):
        claim = {"$setOnInsert": {"id": row["_id"], "by": make_mark()}}
        await database["pids"].update_one({"_id": pid_key(row["pid"])}, claim, upsert=True)


@dataclass(frozen=True, slots=True)
class Step:
    """What brings the documents of `datafiles` that are `wanted` to the version `target`."""

    target: int
    words: str
    wanted: dict[str, Any]
    take: Callable[[AsyncDatabase[dict[str, Any]]], Awaitable[None]]


STEPS = (
    Step(2, "claim pids in a collection of their own", WITH_PID, _claim_pids),
    Step(3, "store times as numbers", UNDATED, _date),
    Step(4, "store days, and numbers a second time", UNNUMBERED, _number),
)
