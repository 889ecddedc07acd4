"""The index of terms, words and facets inside the database, filled in batches behind the commits (docs/decisions/0002)."""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from aq_data.errors import AqDataError
from aq_data.models.matching import Facts
from aq_data.models.snapshots import snapshot_document
from aq_data.models.terms import KIND_ORDER
from aq_data.storage.metadata._schema import SNAPSHOT

__all__ = ["Stored", "TermIndex"]

log = logging.getLogger("aq_data")

BATCH = 32
"""Records indexed in one transaction: many enough to share pages, few enough to let a save in between."""
BACKLOG = 512
"""Records indexed in one transaction while a search waits."""
LARGE_BACKLOG = 2048
"""Records indexed in one transaction when several times as many wait: someone imports. Each batch touches nearly every page
of varied values, so that large batches write a third as much; nobody's save waits longer than one batch."""
FACETS = 1000
"""Distinct values of a path that are counted one by one; a path with more is counted by walking it."""

KNOWN_WORDS = 100_000
"""Words that are remembered as being in the vocabulary."""

ENDLESS = 1 << 62
"""A disorder in which the order of saving says nothing."""

_NOT_UNDERSTOOD = (ArithmeticError, AqDataError, LookupError, TypeError, ValueError)
_FACET_KINDS = {"number", "text", "bool", "date", "snapshot"}


class Stored(NamedTuple):
    """What a record's row says to the index: the document is without the instruments that are in its snapshot."""

    is_deleted: bool
    document: bytes
    snapshot: int | None


@dataclass(frozen=True, slots=True)
class Entry:
    """What the index holds of one document, or snapshot: its words, its rows without its position, perhaps with repeats."""

    terms: Collection[tuple[int, Any]]
    facts: Collection[tuple[int, Any]]
    facets: Collection[tuple[int, Any]]
    words: str
    is_deleted: bool
    created_at: int | None = None


class TermIndex:
    """What one writer knows of the index; used in its thread only, always inside a transaction of its connection."""

    def __init__(self) -> None:
        self._path_ids: dict[tuple[str, str], int] = {}
        self._multi: set[str] = set()
        self._shared: set[int] = set()
        self._facets: dict[int, set[Any] | None] = {}
        self._vocabulary: set[str] = set()
        self._data_version = 0

    def forget(self) -> None:
        """After a rollback: what it numbered is not there."""
        self._path_ids.clear()
        self._multi.clear()
        self._shared.clear()
        self._facets.clear()
        self._vocabulary = set()

    def advance(self, connection: sqlite3.Connection, limit: int = BATCH) -> int:
        """Index the next records in order of saving; the position up to which all are indexed then.

        `limit` of them, or more when many more wait.
        """
        through = self.through(connection)
        newest = connection.execute("SELECT max(seq) FROM datafiles").fetchone()[0] or 0
        limit = max(limit, LARGE_BACKLOG) if newest - through > 4 * LARGE_BACKLOG else limit
        question = "SELECT seq, deleted, document, snapshot FROM datafiles WHERE seq>? ORDER BY seq LIMIT ?"
        rows = connection.execute(question, (through, limit)).fetchall()
        if not rows:
            return through
        self._refresh(connection)
        for snapshot in sorted({row[3] for row in rows if row[3] is not None}):
            self._add_snapshot(connection, snapshot)
        self._put(connection, [(seq, self._entry(connection, seq, Stored(*stored))) for seq, *stored in rows])
        connection.execute("UPDATE progress SET value=? WHERE name='indexed'", (rows[-1][0],))
        return int(rows[-1][0])

    def through(self, connection: sqlite3.Connection) -> int:
        """The position up to which all records are indexed."""
        return int(connection.execute("SELECT value FROM progress WHERE name='indexed'").fetchone()[0])

    def replace(self, connection: sqlite3.Connection, seq: int, before: Stored, after: Stored) -> None:
        """Change what is known of a record; nothing to do when it is not indexed yet."""
        if seq > self.through(connection):
            return
        self._refresh(connection)
        if after.snapshot is not None:
            self._add_snapshot(connection, after.snapshot)
        old, new = self._entry(connection, seq, before), self._entry(connection, seq, after)
        if old.created_at != new.created_at:
            connection.execute("UPDATE progress SET value=? WHERE name='disorder'", (ENDLESS,))
        terms, facts = (set(old.terms), set(new.terms)), (set(old.facts), set(new.facts))
        connection.executemany("DELETE FROM terms WHERE p=? AND v=? AND d=?", [(p, v, seq) for p, v in terms[0] - terms[1]])
        connection.executemany("DELETE FROM facts WHERE d=? AND p=? AND v=?", [(seq, p, v) for p, v in facts[0] - facts[1]])
        moves = (old.words, old.is_deleted) != (new.words, new.is_deleted)
        if moves:
            self._drop_words(connection, seq, old)
        words = new.words if moves else ""
        self._insert(connection, [(seq, Entry(terms[1] - terms[0], facts[1] - facts[0], (), words, new.is_deleted))])
        facets = (set(old.facets), set(new.facets))
        self._count(connection, Counter(facets[1] - facets[0]), Counter(facets[0] - facets[1]))
        more = Counter(p for p, _ in terms[1] if p > 0)
        more.subtract(p for p, _ in terms[0] if p > 0)
        self._count_terms(connection, more)
        self._count_alive(connection, old.is_deleted - new.is_deleted)

    def _add_snapshot(self, connection: sqlite3.Connection, snapshot: int) -> None:
        """Index a snapshot unless it is. Nothing of it is counted: how many documents have it changes."""
        if not self._has_snapshot(connection, snapshot):
            content = connection.execute("SELECT content FROM snapshots WHERE snapshot=?", (snapshot,)).fetchone()[0]
            self._insert(connection, [(-snapshot, self._entry_of_snapshot(connection, snapshot, content))])

    def remove_snapshot(self, connection: sqlite3.Connection, snapshot: int, content: bytes) -> None:
        """Forget a snapshot that no record refers to any more."""
        if self._has_snapshot(connection, snapshot):
            entry = self._entry_of_snapshot(connection, snapshot, content)
            terms = [(p, v, -snapshot) for p, v in set(entry.terms)]
            connection.executemany("DELETE FROM terms WHERE p=? AND v=? AND d=?", terms)
            connection.execute("DELETE FROM facts WHERE d=?", (-snapshot,))
            self._drop_words(connection, -snapshot, entry)

    def _has_snapshot(self, connection: sqlite3.Connection, snapshot: int) -> bool:
        return connection.execute("SELECT 1 FROM facts WHERE d=? LIMIT 1", (-snapshot,)).fetchone() is not None

    def _drop_words(self, connection: sqlite3.Connection, position: int, entry: Entry) -> None:
        if entry.words:
            table = _table_of_words(entry)
            connection.execute(
                f"INSERT INTO {table} ({table}, rowid, text) VALUES ('delete', ?, ?)", (position, entry.words)
            )

    def _refresh(self, connection: sqlite3.Connection) -> None:
        """Forget what another process may have changed."""
        version = connection.execute("PRAGMA data_version").fetchone()[0]
        if version != self._data_version:
            self._data_version = version
            self._facets.clear()

    def _entry(self, connection: sqlite3.Connection, seq: int, stored: Stored) -> Entry:
        """Of a document that cannot be understood nothing, loudly: one must not stop every search."""
        is_deleted = bool(stored.is_deleted)
        try:
            document = msgspec.json.decode(stored.document)
            extra: list[tuple[str, str, Any]] = []
            if stored.snapshot is not None:
                del document["instruments"]
                extra.append((*SNAPSHOT, stored.snapshot))
            facts = Facts(document)
            found, words = [*facts.terms, *extra], " ".join(facts.words)
        except _NOT_UNDERSTOOD as exc:
            log.error("a document cannot be indexed and will not be found", exc_info=exc, extra={"fields": {"seq": seq}})
            return Entry((), (), (), "", is_deleted)
        return self._entry_of(connection, found, words, is_deleted)

    def _entry_of_snapshot(self, connection: sqlite3.Connection, snapshot: int, content: bytes) -> Entry:
        try:
            facts = Facts(snapshot_document(content))
            found, words = facts.terms, " ".join(facts.words)
        except _NOT_UNDERSTOOD as exc:
            fields = {"snapshot": snapshot}
            log.error("a snapshot cannot be indexed and will not be found", exc_info=exc, extra={"fields": fields})
            return Entry((), (), (), "", False)
        entry = self._entry_of(connection, found, words, False)
        fresh = {p for p, _ in entry.terms} - self._shared
        connection.executemany("UPDATE paths SET shared=1 WHERE p=? AND NOT shared", [(p,) for p in fresh])
        self._shared |= fresh
        return entry

    def _entry_of(
        self, connection: sqlite3.Connection, found: Iterable[tuple[str, str, Any]], words: str, is_deleted: bool
    ) -> Entry:
        rows: list[tuple[int, Any]] = []
        facts_rows: list[tuple[int, Any]] = []
        facets: list[tuple[int, Any]] = []
        ordered: list[str] = []
        created_at = None
        known = self._path_ids
        for path, kind, value in found:
            p = known.get((path, kind)) or self._path_id(connection, path, kind)
            row = (p, value)
            rows.append((-p, value) if is_deleted else row)
            facts_rows.append(row if kind != "whole" else (p, 0))
            if kind in _FACET_KINDS:
                facets.append(row)
            if kind in KIND_ORDER:
                ordered.append(path)
            if path == "created_at" and kind == "date":
                created_at = int(value)
        if len(set(ordered)) < len(ordered):
            self._note_multi(connection, Counter(ordered))
        return Entry(rows, facts_rows, () if is_deleted else facets, words, is_deleted, created_at)

    def _path_id(self, connection: sqlite3.Connection, path: str, kind: str) -> int:
        inherited = "(SELECT coalesce(max(multi), 0) FROM paths WHERE path=?)"
        connection.execute(f"INSERT OR IGNORE INTO paths (path, kind, multi) VALUES (?, ?, {inherited})", (path, kind, path))
        row = connection.execute("SELECT p FROM paths WHERE path=? AND kind=?", (path, kind)).fetchone()
        p = self._path_ids[path, kind] = int(row[0])
        return p

    def _note_multi(self, connection: sqlite3.Connection, counts: Counter[str]) -> None:
        for path in [path for path, count in counts.items() if count > 1 and path not in self._multi]:
            connection.execute("UPDATE paths SET multi=1 WHERE path=?", (path,))
            self._multi.add(path)

    def _put(self, connection: sqlite3.Connection, entries: list[tuple[int, Entry]]) -> None:
        self._insert(connection, entries)
        self._count(connection, Counter(facet for _, entry in entries for facet in set(entry.facets)), Counter())
        self._count_terms(connection, Counter(p for _, entry in entries for p, _ in entry.terms if p > 0))
        self._count_alive(connection, sum(not entry.is_deleted for _, entry in entries))
        self._note_order(connection, [entry.created_at for _, entry in entries])

    def _insert(self, connection: sqlite3.Connection, entries: Iterable[tuple[int, Entry]]) -> None:
        terms = [(p, v, seq) for seq, entry in entries for p, v in entry.terms]
        terms.sort()  # pages in turn
        connection.executemany("INSERT OR IGNORE INTO terms (p, v, d) VALUES (?, ?, ?)", terms)
        facts = [(seq, p, v) for seq, entry in entries for p, v in entry.facts]
        connection.executemany("INSERT OR IGNORE INTO facts (d, p, v) VALUES (?, ?, ?)", facts)
        for table in ("words", "buried_words"):
            words = [(seq, entry.words) for seq, entry in entries if entry.words and _table_of_words(entry) == table]
            connection.executemany(f"INSERT INTO {table} (rowid, text) VALUES (?, ?)", words)
        fresh = {word for _, entry in entries for word in entry.words.split()} - self._vocabulary
        connection.executemany("INSERT OR IGNORE INTO vocabulary VALUES (?)", [(word,) for word in fresh])
        self._vocabulary = self._vocabulary | fresh if len(self._vocabulary) < KNOWN_WORDS else fresh

    def _count(self, connection: sqlite3.Connection, more: Counter[Any], less: Counter[Any]) -> None:
        added = [(p, v, n) for (p, v), n in more.items() if self._has_facets(connection, p, v)]
        connection.executemany(
            "INSERT INTO facets (p, v, n) VALUES (?, ?, ?) ON CONFLICT (p, v) DO UPDATE SET n=n+excluded.n",
            [row for row in added if self._facets[row[0]] is not None],
        )
        removed = [(n, p, v) for (p, v), n in less.items() if self._has_facets(connection, p, v)]
        connection.executemany("UPDATE facets SET n=n-? WHERE p=? AND v=?", removed)
        connection.executemany("DELETE FROM facets WHERE p=? AND v=? AND n<=0", [(p, v) for _, p, v in removed])

    def _has_facets(self, connection: sqlite3.Connection, p: int, value: Any) -> bool:
        """Whether the values of this path are counted one by one, also with this one."""
        if p not in self._facets:
            many = connection.execute("SELECT many FROM paths WHERE p=?", (p,)).fetchone()[0]
            rows = () if many else connection.execute("SELECT v FROM facets WHERE p=?", (p,)).fetchall()
            self._facets[p] = None if many else {row[0] for row in rows}
        known = self._facets[p]
        if known is None:
            return False
        known.add(value)
        if len(known) > FACETS:
            connection.execute("UPDATE paths SET many=1 WHERE p=?", (p,))
            connection.execute("DELETE FROM facets WHERE p=?", (p,))
            self._facets[p] = None
            return False
        return True

    def _note_order(self, connection: sqlite3.Connection, created: list[int | None]) -> None:
        """How far the order of saving is from that of `created_at`: clocks of several servers, catalogues rebuilt."""
        known = dict(connection.execute("SELECT name, value FROM progress WHERE name IN ('newest', 'disorder')").fetchall())
        newest, disorder = known["newest"], known["disorder"]
        for instant in created:
            disorder = max(disorder, ENDLESS if instant is None else newest - instant)
            newest = max(newest, instant or newest)
        if (newest, disorder) != (known["newest"], known["disorder"]):
            rows = [(newest, "newest"), (disorder, "disorder")]
            connection.executemany("UPDATE progress SET value=? WHERE name=?", rows)

    def _count_terms(self, connection: sqlite3.Connection, more: Counter[int]) -> None:
        connection.executemany("UPDATE paths SET n=n+? WHERE p=?", [(n, p) for p, n in more.items() if n])

    def _count_alive(self, connection: sqlite3.Connection, more: int) -> None:
        connection.execute("UPDATE progress SET value=value+? WHERE name='alive'", (more,))


def _table_of_words(entry: Entry) -> str:
    return "buried_words" if entry.is_deleted else "words"
