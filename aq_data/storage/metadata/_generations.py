"""The rows of terms in two generations, so that a batch of documents does not touch every page of a large index.

A value that varies puts each of its rows on a page of its own: among a million documents a batch rewrites half a gigabyte
for a few megabytes of rows. Such rows are put into `recent_terms`, small enough to be rewritten by each batch; what exceeds
its size moves on into `settled_terms`, a stretch of neighbours at a time, which share pages there. Rows of paths with few
values stand at the ends of few stretches, and are put into `settled_terms` at once. The view `terms` is both. A row moves in
one transaction, so that every snapshot has it once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from operator import itemgetter
from typing import Any

from aq_data.storage.metadata._rows import Postings, insert_rows

__all__ = ["Generations"]

RECENT = 1_000_000
"""Rows that `recent_terms` keeps, some 25 MB. A batch rewrites them all, which is why they are not more; what moves on meets
the more neighbours the more there are."""

Row = tuple[int, Any, int]
"""Number of the path, negative where the document is deleted; value; position."""

_VALUE = itemgetter(0)
_BEGINNING: Row = (-(1 << 63), 0, 0)
_ENDING: Row = ((1 << 63) - 1, 0, 0)
_SIZE = "SELECT value FROM progress WHERE name='recent'"
_RESIZE = "UPDATE progress SET value=value+? WHERE name='recent'"
_WITHIN = "WHERE (p, v, d) > (?, ?, ?) AND (p, v, d) <= (?, ?, ?)"


class Generations:
    """What one writer does to the rows of terms; always inside a transaction of its connection."""

    def __init__(self) -> None:
        # Where the last stretch ended: all rows get their turn. Lost at no cost, hence not in the database.
        self._end: Row | None = None

    def insert(self, connection: sqlite3.Connection, postings: Postings, varied: Collection[int]) -> None:
        """Add rows that are not there. `varied`: numbers of paths with many values."""
        recent: list[Any] = []
        settled: list[Any] = []
        for p in sorted(postings):  # pages in turn
            cells = recent if abs(p) in varied else settled
            for v, d in sorted(zip(*postings[p], strict=True), key=_VALUE):
                cells += (p, v, d)
        insert_rows(connection, "settled_terms", settled)
        connection.execute(_RESIZE, (insert_rows(connection, "recent_terms", recent),))

    def delete(self, connection: sqlite3.Connection, rows: Collection[Row]) -> None:
        """Remove rows, wherever they are."""
        connection.executemany("DELETE FROM settled_terms WHERE p=? AND v=? AND d=?", rows)
        done = connection.executemany("DELETE FROM recent_terms WHERE p=? AND v=? AND d=?", rows)
        if done.rowcount > 0:
            connection.execute(_RESIZE, (-done.rowcount,))

    def settle(self, connection: sqlite3.Connection) -> None:
        """Move on what `recent_terms` has too much; a batch followed by this moves as many rows as it put in."""
        excess = connection.execute(_SIZE).fetchone()[0] - RECENT
        if excess <= 0:
            return
        start = self._end or _BEGINNING
        last = "SELECT p, v, d FROM recent_terms WHERE (p, v, d) > (?, ?, ?) ORDER BY p, v, d LIMIT 1 OFFSET ?"
        self._end = connection.execute(last, (*start, excess - 1)).fetchone()  # None beyond the last: begin anew
        stretch = (*start, *(self._end or _ENDING))
        connection.execute(f"INSERT OR IGNORE INTO settled_terms SELECT p, v, d FROM recent_terms {_WITHIN}", stretch)
        moved = connection.execute(f"DELETE FROM recent_terms {_WITHIN}", stretch).rowcount
        connection.execute(_RESIZE, (-moved,))
