"""The index of terms, words and facets inside the database, filled in batches behind the commits (docs/decisions/0002)."""

from __future__ import annotations

import sqlite3

from aq_data.storage.metadata._counts import Counts
from aq_data.storage.metadata._entries import Entries, Entry, Stored
from aq_data.storage.metadata._generations import Generations
from aq_data.storage.metadata._rows import Postings, Rows, insert_rows, table_of_words

__all__ = ["BACKLOG", "TermIndex"]

BATCH = 32
"""Records indexed in one transaction: many enough to share pages, few enough to let a save in between."""
BACKLOG = 512
"""Records indexed in one transaction while a search waits."""
LARGE_BACKLOG = 4096
"""Records indexed in one transaction at most, where more than `BACKLOG` wait: someone imports. Each batch rewrites nearly
every page of `recent_terms`, so that large batches write less; nobody's save waits longer than one batch."""
KNOWN_WORDS = 100_000
"""Words that are remembered as being in the vocabulary."""


class TermIndex:
    """What one writer knows of the index; used in its thread only, always inside a transaction of its connection."""

    def __init__(self) -> None:
        self._generations = Generations()
        self.forget()

    def forget(self) -> None:
        """After a rollback: what it numbered is not there."""
        self._entries = Entries()
        self._counts = Counts(self._entries)
        self._vocabulary: set[str] = set()

    def advance(self, connection: sqlite3.Connection, limit: int = BATCH) -> int:
        """Index the next records in order of saving; the position up to which all are indexed then.

        `limit` of them, or all that wait, up to `LARGE_BACKLOG`, when they are many.
        """
        through = self.through(connection)
        waiting = (connection.execute("SELECT max(seq) FROM datafiles").fetchone()[0] or 0) - through
        limit = min(waiting, LARGE_BACKLOG) if waiting > BACKLOG else limit
        question = "SELECT seq, deleted, document, snapshot FROM datafiles WHERE seq>? ORDER BY seq LIMIT ?"
        records = connection.execute(question, (through, limit)).fetchall()
        if not records:
            return through
        self._counts.refresh(connection)
        for snapshot in sorted({record[3] for record in records if record[3] is not None}):
            self._add_snapshot(connection, snapshot)
        rows = Rows()
        for seq, *stored in records:
            rows.add(seq, self._entries.of_document(connection, seq, Stored(*stored)))
        self._insert(connection, rows)
        self._counts.add(connection, rows.terms)
        self._counts.add_alive(connection, rows.alive)
        self._counts.note_order(connection, rows.created)
        self._generations.settle(connection)
        connection.execute("UPDATE progress SET value=? WHERE name='indexed'", (records[-1][0],))
        return int(records[-1][0])

    def through(self, connection: sqlite3.Connection) -> int:
        """The position up to which all records are indexed."""
        return int(connection.execute("SELECT value FROM progress WHERE name='indexed'").fetchone()[0])

    def replace(self, connection: sqlite3.Connection, seq: int, before: Stored, after: Stored) -> None:
        """Change what is known of a record; nothing to do when it is not indexed yet."""
        if seq > self.through(connection):
            return
        self._counts.refresh(connection)
        if after.snapshot is not None:
            self._add_snapshot(connection, after.snapshot)
        old = self._entries.of_document(connection, seq, before)
        new = self._entries.of_document(connection, seq, after)
        if old.created_at != new.created_at:
            self._counts.note_disorder(connection)
        gone, come = old.beyond(new), new.beyond(old)
        self._generations.delete(connection, [(p, v, seq) for p, v in gone.terms])
        connection.executemany("DELETE FROM facts WHERE d=? AND p=? AND v=?", [(seq, *row) for row in gone.facts])
        self._drop_words(connection, seq, gone)
        rows = Rows()
        rows.add(seq, come)
        self._insert(connection, rows)
        self._counts.add(connection, rows.terms)
        lost = Postings()
        lost.add(seq, gone.terms)
        self._counts.add(connection, lost, -1)
        self._counts.add_alive(connection, old.is_deleted - new.is_deleted)

    # --- snapshots -----------------------------------------------------------------------------------------------------

    def _add_snapshot(self, connection: sqlite3.Connection, snapshot: int) -> None:
        """Index a snapshot unless it is. Nothing of it is counted: how many documents have it changes."""
        if not self._has_snapshot(connection, snapshot):
            content = connection.execute("SELECT content FROM snapshots WHERE snapshot=?", (snapshot,)).fetchone()[0]
            rows = Rows()
            rows.add(-snapshot, self._entries.of_snapshot(connection, snapshot, content))
            self._insert(connection, rows)

    def remove_snapshot(self, connection: sqlite3.Connection, snapshot: int, content: bytes) -> None:
        """Forget a snapshot that no record refers to any more."""
        if self._has_snapshot(connection, snapshot):
            entry = self._entries.of_snapshot(connection, snapshot, content)
            self._generations.delete(connection, [(p, v, -snapshot) for p, v in entry.terms])
            connection.execute("DELETE FROM facts WHERE d=?", (-snapshot,))
            self._drop_words(connection, -snapshot, entry)

    def _has_snapshot(self, connection: sqlite3.Connection, snapshot: int) -> bool:
        return connection.execute("SELECT 1 FROM facts WHERE d=? LIMIT 1", (-snapshot,)).fetchone() is not None

    # --- rows ------------------------------------------------------------------------------------------------------------

    def _insert(self, connection: sqlite3.Connection, rows: Rows) -> None:
        """Everything of documents that are not there."""
        self._generations.insert(connection, rows.terms, self._entries.varied)
        insert_rows(connection, "facts", rows.facts)
        self._insert_words(connection, rows)

    def _insert_words(self, connection: sqlite3.Connection, rows: Rows) -> None:
        fresh: set[str] = set()
        for table, listed in rows.words.items():
            connection.executemany(f"INSERT INTO {table} (rowid, text) VALUES (?, ?)", listed)
            fresh.update(word for _, words in listed for word in words.split())
        fresh -= self._vocabulary
        connection.executemany("INSERT OR IGNORE INTO vocabulary VALUES (?)", [(word,) for word in sorted(fresh)])
        self._vocabulary = self._vocabulary | fresh if len(self._vocabulary) < KNOWN_WORDS else fresh

    def _drop_words(self, connection: sqlite3.Connection, position: int, entry: Entry) -> None:
        if entry.words:
            table = table_of_words(entry)
            connection.execute(
                f"INSERT INTO {table} ({table}, rowid, text) VALUES ('delete', ?, ?)", (position, entry.words)
            )
