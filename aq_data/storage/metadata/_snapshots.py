"""Snapshots of instruments on SQLite: a row each, put in by the transaction of the first record that has it."""

from __future__ import annotations

import sqlite3

import msgspec

from aq_data.models.datafile import DataFile
from aq_data.models.snapshots import separated

__all__ = ["put_apart"]


def put_apart(connection: sqlite3.Connection, document: DataFile) -> tuple[bytes, int | None]:
    """A document as its row has it: JSON, and the number of its snapshot, stored now unless another record has it."""
    document, snapshot = separated(document)
    encoded = msgspec.json.encode(document)
    if snapshot is None:
        return encoded, None
    connection.execute("INSERT OR IGNORE INTO snapshots (hash, content) VALUES (?, ?)", (snapshot.hash, snapshot.content))
    number = connection.execute("SELECT snapshot FROM snapshots WHERE hash=?", (snapshot.hash,)).fetchone()[0]
    return encoded, int(number)
