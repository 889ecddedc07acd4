"""The index of terms inside the database, filled in batches behind the commits (docs/decisions/0002)."""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from typing import Any

import msgspec

from aq_data.errors import AqDataError
from aq_data.models.terms import KIND_ORDER, Term, terms

__all__ = ["TermIndex"]

log = logging.getLogger("aq_data")

BATCH = 32
"""Records indexed in one transaction: many enough to share pages, few enough to let a save in between."""


class TermIndex:
    """What one writer knows of the index; used in its thread only, always inside a transaction of its connection."""

    def __init__(self) -> None:
        self._path_ids: dict[tuple[str, str], int] = {}
        self._multi: set[str] = set()

    def forget(self) -> None:
        """After a rollback: what it numbered is not there."""
        self._path_ids.clear()
        self._multi.clear()

    def advance(self, connection: sqlite3.Connection) -> int:
        """Index the next batch of records in order of saving; the position up to which all are indexed then."""
        through = self.through(connection)
        rows = connection.execute(
            f"SELECT seq, document FROM datafiles WHERE seq>? ORDER BY seq LIMIT {BATCH}", (through,)
        ).fetchall()
        if not rows:
            return through
        self._put(connection, [(seq, _terms_of(seq, document)) for seq, document in rows])
        connection.execute("UPDATE progress SET value=? WHERE name='indexed'", (rows[-1][0],))
        return int(rows[-1][0])

    def through(self, connection: sqlite3.Connection) -> int:
        """The position up to which all records are indexed."""
        return int(connection.execute("SELECT value FROM progress WHERE name='indexed'").fetchone()[0])

    def replace(self, connection: sqlite3.Connection, seq: int, before: bytes, after: bytes) -> None:
        """Change the terms of a record to those of its new document; nothing to do when it is not indexed yet."""
        if seq > self.through(connection):
            return
        old, new = _terms_of(seq, before), _terms_of(seq, after)
        gone = [(self._path_id(connection, t.path, t.kind), t.value, seq) for t in old - new]
        connection.executemany("DELETE FROM terms WHERE p=? AND v=? AND d=?", gone)
        self._put(connection, [(seq, new)])

    def _path_id(self, connection: sqlite3.Connection, path: str, kind: str) -> int:
        known = self._path_ids.get((path, kind))
        if known is None:
            connection.execute("INSERT OR IGNORE INTO paths (path, kind) VALUES (?, ?)", (path, kind))
            row = connection.execute("SELECT p FROM paths WHERE path=? AND kind=?", (path, kind)).fetchone()
            known = self._path_ids[path, kind] = int(row[0])
        return known

    def _put(self, connection: sqlite3.Connection, found: list[tuple[int, frozenset[Term]]]) -> None:
        rows = [(self._path_id(connection, t.path, t.kind), t.value, seq) for seq, new in found for t in new]
        rows.sort(key=_first)  # pages in turn
        connection.executemany("INSERT OR IGNORE INTO terms (p, v, d) VALUES (?, ?, ?)", rows)
        for _, new in found:
            counts = Counter(term.path for term in new if term.kind in KIND_ORDER)
            for path in (path for path, count in counts.items() if count > 1 and path not in self._multi):
                connection.execute("UPDATE paths SET multi=1 WHERE path=?", (path,))
                self._multi.add(path)


def _terms_of(seq: int, document: bytes) -> frozenset[Term]:
    """The terms of a stored document; none, loudly, if they cannot be made: one document must not stop every search."""
    try:
        return frozenset(terms(msgspec.json.decode(document)))
    except (ArithmeticError, AqDataError, LookupError, TypeError, ValueError) as exc:
        log.error("a document cannot be indexed and will not be found", exc_info=exc, extra={"fields": {"seq": seq}})
        return frozenset()


def _first(row: tuple[int, Any, int]) -> int:
    return row[0]
