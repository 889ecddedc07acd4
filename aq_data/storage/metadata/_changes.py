"""Changes of records on SQLite: one row each, put in by the transaction that changes the record."""

from __future__ import annotations

import sqlite3

import msgspec

from aq_data.models.datafile import DataFileId
from aq_data.models.history import Change
from aq_data.storage.metadata.store import CHANGES_BYTES

__all__ = ["add_change", "changes_before"]

_INSERT = "INSERT INTO changes (datafile, revision, change) VALUES (?, ?, ?)"
_SELECT = (
    "SELECT change FROM changes WHERE datafile=(SELECT seq FROM datafiles WHERE id=?) AND revision<? "
    "ORDER BY revision DESC LIMIT ?"
)
_NEWEST = (1 << 63) - 1


def add_change(connection: sqlite3.Connection, seq: int, change: Change) -> None:
    """Keep a change of the record at position `seq`, inside the transaction that replaces it."""
    connection.execute(_INSERT, (seq, change.revision, msgspec.json.encode(change)))


def changes_before(connection: sqlite3.Connection, id: DataFileId, before: int | None, limit: int) -> list[Change]:
    """As `MetadataStore.changes`."""
    found: list[Change] = []
    size = 0
    for (encoded,) in connection.execute(_SELECT, (id, _NEWEST if before is None else before, limit)):
        size += len(encoded)
        if found and size > CHANGES_BYTES:
            break
        found.append(msgspec.json.decode(encoded, type=Change))
    return found
