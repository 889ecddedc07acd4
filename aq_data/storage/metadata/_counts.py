"""What the index counts, so that questions need not: documents at each path and of each value, alive, in which order."""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import Any

from aq_data.storage.metadata._entries import Entries
from aq_data.storage.metadata._rows import Postings

__all__ = ["Counts"]

FACETS = 1000
"""Distinct values of a path that are counted one by one; a path with more is counted by walking it."""
VARIED = 100
"""Distinct values, from which on a path is one of those that vary; of few values each row stands beside the last one."""
ENDLESS = 1 << 62
"""A disorder in which the order of saving says nothing."""


class Counts:
    """What one writer knows of the counts; always inside a transaction of its connection."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self._facets: dict[int, set[Any] | None] = {}
        self._data_version = 0

    def refresh(self, connection: sqlite3.Connection) -> None:
        """Forget what another process may have changed."""
        version = connection.execute("PRAGMA data_version").fetchone()[0]
        if version != self._data_version:
            self._data_version = version
            self._facets.clear()

    def add(self, connection: sqlite3.Connection, postings: Postings, sign: int = 1) -> None:
        """Documents have these terms, or have them no more where `sign` is -1; those of deleted ones do not count."""
        alive = {p: values for p, (values, _) in postings.items() if p > 0}
        connection.executemany("UPDATE paths SET n=n+? WHERE p=?", [(sign * len(values), p) for p, values in alive.items()])
        facets: list[tuple[int, int, Any]] = []
        for p in self._entries.counted & alive.keys():
            known = self._known(connection, p)
            if known is not None:
                counts = Counter(alive[p])
                known.update(counts)
                if self._are_counted(connection, p, len(known)):
                    facets += [(sign * n, p, v) for v, n in counts.items()]
        if sign > 0:
            connection.executemany(
                "INSERT INTO facets (n, p, v) VALUES (?, ?, ?) ON CONFLICT (p, v) DO UPDATE SET n=n+excluded.n", facets
            )
        else:
            connection.executemany("UPDATE facets SET n=n+? WHERE p=? AND v=?", facets)
            connection.executemany("DELETE FROM facets WHERE p=? AND v=? AND n<=0", [(p, v) for _, p, v in facets])

    def _known(self, connection: sqlite3.Connection, p: int) -> set[Any] | None:
        """The values of this path, which are counted one by one; None when there are too many."""
        if p not in self._facets:
            many = connection.execute("SELECT many FROM paths WHERE p=?", (p,)).fetchone()[0]
            rows = () if many else connection.execute("SELECT v FROM facets WHERE p=?", (p,)).fetchall()
            self._facets[p] = None if many else {row[0] for row in rows}
            if many:
                self._entries.varied.add(p)
        return self._facets[p]

    def _are_counted(self, connection: sqlite3.Connection, p: int, values: int) -> bool:
        """Whether so many values of a path are counted one by one."""
        if values > VARIED:
            self._entries.varied.add(p)
        if values > FACETS:
            connection.execute("UPDATE paths SET many=1 WHERE p=?", (p,))
            connection.execute("DELETE FROM facets WHERE p=?", (p,))
            self._facets[p] = None
        return values <= FACETS

    def add_alive(self, connection: sqlite3.Connection, more: int) -> None:
        """So many documents more that are not deleted."""
        connection.execute("UPDATE progress SET value=value+? WHERE name='alive'", (more,))

    def note_order(self, connection: sqlite3.Connection, created: list[int | None]) -> None:
        """How far the order of saving is from that of `created_at`: clocks of several servers, catalogues rebuilt."""
        known = dict(connection.execute("SELECT name, value FROM progress WHERE name IN ('newest', 'disorder')").fetchall())
        newest, disorder = known["newest"], known["disorder"]
        for instant in created:
            disorder = max(disorder, ENDLESS if instant is None else newest - instant)
            newest = max(newest, instant or newest)
        if (newest, disorder) != (known["newest"], known["disorder"]):
            rows = [(newest, "newest"), (disorder, "disorder")]
            connection.executemany("UPDATE progress SET value=? WHERE name=?", rows)

    def note_disorder(self, connection: sqlite3.Connection) -> None:
        """A document's time was changed: the order of saving says nothing any more."""
        connection.execute("UPDATE progress SET value=? WHERE name='disorder'", (ENDLESS,))
