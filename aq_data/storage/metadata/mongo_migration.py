"""Bringing a MongoDB database up before a server does: what a server does when it opens one, with a backup first."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pymongo import ReadPreference
from pymongo.asynchronous.database import AsyncDatabase

from aq_data.errors import ConfigError
from aq_data.storage.metadata._mongo_border import border, open_client
from aq_data.storage.metadata._mongo_records import SCHEMA_VERSION
from aq_data.storage.metadata._mongo_schema import left_to_do, prepare, version_of
from aq_data.storage.metadata.migration import Migration

__all__ = ["migrate_mongo"]

PATIENT = {"socketTimeoutMS": 0, "wtimeoutMS": 0}
"""A command that copies or counts a million documents answers later than a server would wait. What is down is still told."""


async def migrate_mongo(url: str, name: str, *, dry_run: bool) -> Migration:
    """`migration.migrate` for the database `name` at `url`.

    The backup is a collection beside `datafiles`, copied by MongoDB itself and there as a whole or not at all; nothing is
    changed before. What else a migration writes no older version reads. Servers of an older version must not run; nobody
    can tell here whether they do.
    """
    async with open_client(url, **PATIENT) as client:
        database = client.get_database(name, read_preference=ReadPreference.PRIMARY)
        with border():
            version = await version_of(database)
            if not version:
                raise ConfigError(f"there is no database {name!r} in MongoDB; a server makes it when it first reaches it")
            records = await database["datafiles"].count_documents({"deleted": {"$in": [False, True]}})
            steps = await left_to_do(database, version)
            if not steps or dry_run:
                return Migration(version, SCHEMA_VERSION, records, steps)
            backup = await _back_up(database, version)
            await prepare(database)
    way_back = f"renamed to datafiles, with version {version} in the document 'schema' of meta, it is the way back"
    return Migration(version, SCHEMA_VERSION, records, steps, backup, way_back)


async def _back_up(database: AsyncDatabase[dict[str, Any]], version: int) -> str:
    # With the time: `$out` replaces what has its name, and a second try would copy what the first one changed.
    backup = f"datafiles.version-{version}.{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    await (await database["datafiles"].aggregate([{"$out": backup}])).to_list()
    return backup
