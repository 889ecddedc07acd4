"""Tokens in SQLite, inside a transaction of its store."""

from __future__ import annotations

import sqlite3

import msgspec

from aq_data.storage.metadata.store import Token

__all__ = ["add_token", "find_token", "read_tokens", "revoke_token"]


def add_token(connection: sqlite3.Connection, token: Token) -> None:
    """`MetadataStore.add_token`."""
    connection.execute("INSERT INTO tokens VALUES (?, ?, ?)", (token.id, token.hash, msgspec.json.encode(token)))


def find_token(connection: sqlite3.Connection, hash: str) -> Token | None:
    """`MetadataStore.find_token`."""
    row = connection.execute("SELECT token FROM tokens WHERE hash=?", (hash,)).fetchone()
    return None if row is None else msgspec.json.decode(row[0], type=Token)


def read_tokens(connection: sqlite3.Connection) -> list[Token]:
    """All of them, in order of ids."""
    rows = connection.execute("SELECT token FROM tokens ORDER BY id").fetchall()
    return [msgspec.json.decode(row[0], type=Token) for row in rows]


def revoke_token(connection: sqlite3.Connection, id: str, revoked_at: str) -> bool:
    """`MetadataStore.revoke_token`."""
    row = connection.execute("SELECT token FROM tokens WHERE id=?", (id,)).fetchone()
    if row is None:
        return False
    token = msgspec.json.decode(row[0], type=Token)
    if token.revoked_at is None:
        token = msgspec.structs.replace(token, revoked_at=revoked_at)
    connection.execute("UPDATE tokens SET token=? WHERE id=?", (msgspec.json.encode(token), id))
    return True
