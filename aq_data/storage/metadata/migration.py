"""Bringing a database of an older version up to this one: with a backup, in one transaction, or not at all.

    1 -> 2   the tables of sweeps
    2 -> 3   the index anew (terms, facts, facets, words), pids, the history of changes, large instruments once
    3 -> 5   the index anew (terms in two generations, without the digests of objects)

Documents carry the version of their own form (`format`); so far there is one.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from aq_data.errors import ConfigError, ConflictError
from aq_data.models.datafile import DataFile
from aq_data.models.snapshots import SNAPSHOT_BYTES
from aq_data.storage.metadata._connection import border
from aq_data.storage.metadata._functions import install
from aq_data.storage.metadata._index import BACKLOG, TermIndex
from aq_data.storage.metadata._schema import SCHEMA, SCHEMA_VERSION
from aq_data.storage.metadata._snapshots import put_apart

__all__ = ["Migration", "migrate"]

_INDEX = ("facets", "facts", "paths", "recent_terms", "settled_terms", "terms", "vocabulary", "words", "buried_words")
"""Tables and views that are made anew from the documents."""


@dataclass(frozen=True, slots=True)
class Migration:
    """What was done, or would be: `steps` in words, none when the database is of this version already.

    `backup` is the path of a file, or the name of a collection; `way_back` tells in words how it becomes the database again.
    """

    version: int
    target: int
    records: int
    steps: tuple[str, ...]
    backup: str | None = None
    way_back: str | None = None


def migrate(database: Path, *, dry_run: bool, told: Callable[[int, int], None] | None = None) -> Migration:
    """Bring a database to `SCHEMA_VERSION`. With `dry_run` nothing changes; what would stand in the way is found.

    No server may have it open: ConfigError says so. The backup, a copy of the file beside it, is complete before anything is
    changed; putting it back in place is the way back. `told` hears how many records are indexed, and of how many.
    """
    if not database.exists():
        raise ConfigError(f"there is no database {database}; name the folder that holds it with --data")
    with border():
        connection = sqlite3.connect(database, isolation_level=None, timeout=2)
        try:
            return _migrate(connection, database, dry_run, told)
        finally:
            connection.close()


def _migrate(
    connection: sqlite3.Connection, path: Path, dry_run: bool, told: Callable[[int, int], None] | None
) -> Migration:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema version {version}, this aq-data reads {SCHEMA_VERSION}; use the one that made it"
        )
    records = connection.execute("SELECT count(*) FROM datafiles").fetchone()[0] if version else 0
    steps = _steps(version)
    if steps:
        _check_pids(connection)
    if not steps or dry_run:
        return Migration(version, SCHEMA_VERSION, records, steps)
    backup = _back_up(connection, path, version)
    install(connection)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA cache_size=-256000")
    connection.execute("BEGIN IMMEDIATE")
    _rebuild(connection)
    index, done = TermIndex(), 0
    while done < (following := index.advance(connection, BACKLOG)):
        done = following
        if told is not None:
            told(connection.execute("SELECT count(*) FROM datafiles WHERE seq<=?", (done,)).fetchone()[0], records)
    connection.execute("COMMIT")
    connection.execute("PRAGMA journal_mode=WAL")
    return Migration(version, SCHEMA_VERSION, records, steps, str(backup), "moved back in place it is the way back")


def _steps(version: int) -> tuple[str, ...]:
    steps = []
    if version < 2:
        steps.append("add the tables of sweeps")
    if version < 3:
        steps += [
            "add pids, each of one DataFile, and the history of changes",
            "store large instruments that are the same once",
        ]
    if version < SCHEMA_VERSION:
        steps.append("index every document anew")
    return tuple(steps)


def _check_pids(connection: sqlite3.Connection) -> None:
    """Two DataFiles with one pid were possible; which of them keeps it is not ours to say."""
    pid = "json_extract(CAST(document AS TEXT), '$.pid')"
    rows = connection.execute(
        f"SELECT {pid} AS pid, group_concat(id, ', ') FROM datafiles WHERE deleted=0 AND {pid} IS NOT NULL "
        "GROUP BY pid HAVING count(*)>1 LIMIT 5"
    ).fetchall()
    if rows:
        shared = "; ".join(f"{pid!r} of {ids}" for pid, ids in rows)
        raise ConflictError(f"a pid belongs to one DataFile; change all but one with the version that made them: {shared}")


def _back_up(connection: sqlite3.Connection, path: Path, version: int) -> Path:
    try:
        # Leaving WAL mode takes the whole database for us and makes it one file.
        mode = connection.execute("PRAGMA journal_mode=DELETE").fetchone()[0]
    except sqlite3.OperationalError as exc:
        raise ConfigError(f"{path} is in use; stop the server first: {exc}") from exc
    if mode != "delete":
        raise ConfigError(f"{path} is in use; stop the server first")
    backup = path.with_name(f"{path.name}.version-{version}.{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    shutil.copyfile(path, backup)
    with backup.open("rb+") as file:
        os.fsync(file.fileno())
    return backup


def _rebuild(connection: sqlite3.Connection) -> None:
    columns = {row[1] for row in connection.execute("PRAGMA table_info(datafiles)")}
    if "pid" not in columns:
        connection.execute("ALTER TABLE datafiles ADD COLUMN pid TEXT")
        connection.execute("UPDATE datafiles SET pid=json_extract(CAST(document AS TEXT), '$.pid')")
        connection.execute("ALTER TABLE datafiles ADD COLUMN snapshot INTEGER REFERENCES snapshots")
    for kind, name in connection.execute("SELECT type, name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall():
        if name in _INDEX:
            connection.execute(f"DROP {kind} {name}")
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute("UPDATE progress SET value=0 WHERE name<>'format'")
    _share_snapshots(connection)


def _share_snapshots(connection: sqlite3.Connection) -> None:
    question = "SELECT seq FROM datafiles WHERE snapshot IS NULL AND length(document)>=?"
    large = connection.execute(question, (SNAPSHOT_BYTES,)).fetchall()
    for (seq,) in large:
        row = connection.execute("SELECT document FROM datafiles WHERE seq=?", (seq,)).fetchone()
        encoded, snapshot = put_apart(connection, msgspec.json.decode(row[0], type=DataFile))
        if snapshot is not None:
            connection.execute("UPDATE datafiles SET document=?, snapshot=? WHERE seq=?", (encoded, snapshot, seq))
