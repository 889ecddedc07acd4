"""Stores that admins added, on SQLite: a row each; and leases."""

from __future__ import annotations

import sqlite3

import msgspec

from aq_data.models.stores import AddedStore

__all__ = ["change_store", "take_lease"]


def change_store(connection: sqlite3.Connection, before: AddedStore | None, after: AddedStore | None) -> bool:
    """`MetadataStore.change_store` inside a transaction."""
    known = before or after
    if known is None:
        return True
    row = connection.execute("SELECT store FROM stores WHERE name=?", (known.name,)).fetchone()
    if (None if row is None else msgspec.json.decode(row[0], type=AddedStore)) != before:
        return False
    if after is None:
        connection.execute("DELETE FROM stores WHERE name=?", (known.name,))
    else:
        connection.execute("INSERT OR REPLACE INTO stores VALUES (?, ?)", (known.name, msgspec.json.encode(after)))
    return True


def take_lease(connection: sqlite3.Connection, name: str, owner: str, now: float, until: float) -> bool:
    """`MetadataStore.lease` inside a transaction."""
    done = connection.execute(
        "INSERT INTO leases VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET owner=excluded.owner, until=excluded.until "
        "WHERE until < ? OR owner = excluded.owner",
        (name, owner, until, now),
    )
    return done.rowcount == 1
