"""What the index holds of one document, or snapshot: rows of numbered paths and values, and words."""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from aq_data.errors import AqDataError
from aq_data.models.snapshots import snapshot_document
from aq_data.models.terms import KIND_ORDER, Term, terms
from aq_data.models.words import document_words
from aq_data.storage.metadata._schema import SNAPSHOT

__all__ = ["Entries", "Entry", "Stored"]

log = logging.getLogger("aq_data")

_NOT_UNDERSTOOD = (ArithmeticError, AqDataError, LookupError, TypeError, ValueError)
_COUNTED = {"number", "text", "bool", "date", "snapshot"}
_FEW_VALUES = {"null", "nan", "size", "object"}


class Stored(NamedTuple):
    """What a record's row says to the index: the document is without the instruments that are in its snapshot."""

    is_deleted: bool
    document: bytes
    snapshot: int | None


@dataclass(frozen=True, slots=True)
class Entry:
    """Rows of `terms` and, in order, of `facts`, with the number of the path and without a position."""

    terms: list[tuple[int, Any]]
    facts: list[tuple[int, Any]]
    words: str
    is_deleted: bool
    created_at: int | None = None

    def beyond(self, other: Entry) -> Entry:
        """What this has and the other has not; words are one whole, and stand elsewhere when they are deleted."""
        terms, facts = set(self.terms) - set(other.terms), set(self.facts) - set(other.facts)
        is_same = (self.words, self.is_deleted) == (other.words, other.is_deleted)
        return Entry([*terms], sorted(facts), "" if is_same else self.words, self.is_deleted)


class Entries:
    """Makes entries for one writer, numbering paths in its transaction.

    `counted`: numbers of paths whose values are counted one by one, unless they are `varied`: with many, as far as known.
    """

    def __init__(self) -> None:
        self.varied: set[int] = set()
        self.counted: set[int] = set()
        self._numbers: dict[tuple[str, str], int] = {}
        self._wholes: set[int] = set()
        self._objects: set[int] = set()
        self._ordered: dict[int, str] = {}
        self._multi: set[str] = set()
        self._shared: set[int] = set()

    def of_document(self, connection: sqlite3.Connection, seq: int, stored: Stored) -> Entry:
        """Of a document that cannot be understood nothing, loudly: one must not stop every search."""
        is_deleted = bool(stored.is_deleted)
        try:
            document = msgspec.json.decode(stored.document)
            extra: list[tuple[str, str, Any]] = []
            if stored.snapshot is not None:
                del document["instruments"]
                extra.append((*SNAPSHOT, stored.snapshot))
            found, words = [*terms(document), *extra], " ".join(document_words(document))
        except _NOT_UNDERSTOOD as exc:
            log.error("a document cannot be indexed and will not be found", exc_info=exc, extra={"fields": {"seq": seq}})
            return Entry([], [], "", is_deleted)
        return self._entry(connection, found, words, is_deleted)

    def of_snapshot(self, connection: sqlite3.Connection, snapshot: int, content: bytes) -> Entry:
        """The same of a snapshot."""
        try:
            document = snapshot_document(content)
            found, words = terms(document), " ".join(document_words(document))
        except _NOT_UNDERSTOOD as exc:
            fields = {"snapshot": snapshot}
            log.error("a snapshot cannot be indexed and will not be found", exc_info=exc, extra={"fields": fields})
            return Entry([], [], "", False)
        entry = self._entry(connection, found, words, False)
        fresh = {p for p, _ in entry.facts} - self._shared
        connection.executemany("UPDATE paths SET shared=1 WHERE p=? AND NOT shared", [(p,) for p in fresh])
        self._shared |= fresh
        return entry

    def _entry(
        self, connection: sqlite3.Connection, found: Iterable[Term | tuple[str, str, Any]], words: str, is_deleted: bool
    ) -> Entry:
        numbers = self._numbers
        try:
            rows = sorted({(numbers[path, kind], value) for path, kind, value in found})
        except KeyError:
            for path, kind, _ in found:
                if (path, kind) not in numbers:
                    self._number(connection, path, kind)
            rows = sorted({(numbers[path, kind], value) for path, kind, value in found})
        ordered = [self._ordered[p] for p, _ in rows if p in self._ordered]
        if len(set(ordered)) < len(ordered):
            self._note_multi(connection, Counter(ordered))
        by_path: dict[int | None, Any] = dict(rows)
        objects = self._objects & by_path.keys()
        listed = [row for row in rows if row[0] not in objects] + [(p, 0) for p in objects]
        if is_deleted:
            listed = [(-p, v) for p, v in listed]
        facts = [(p, 0) if p in self._wholes else (p, v) for p, v in rows]
        return Entry(listed, facts, words, is_deleted, by_path.get(numbers.get(("created_at", "date"))))

    def _number(self, connection: sqlite3.Connection, path: str, kind: str) -> None:
        inherited = "(SELECT coalesce(max(multi), 0) FROM paths WHERE path=?)"
        connection.execute(f"INSERT OR IGNORE INTO paths (path, kind, multi) VALUES (?, ?, {inherited})", (path, kind, path))
        p, many = connection.execute("SELECT p, many FROM paths WHERE path=? AND kind=?", (path, kind)).fetchone()
        self._numbers[path, kind] = p
        if kind in KIND_ORDER:
            self._ordered[p] = path
        if kind == "whole":
            self._wholes.add(p)
        if kind == "object":
            self._objects.add(p)
        if kind in _COUNTED:
            self.counted.add(p)
        if many or (kind not in _COUNTED and kind not in _FEW_VALUES):
            self.varied.add(p)

    def _note_multi(self, connection: sqlite3.Connection, counts: Counter[str]) -> None:
        for path in [path for path, count in counts.items() if count > 1 and path not in self._multi]:
            connection.execute("UPDATE paths SET multi=1 WHERE path=?", (path,))
            self._multi.add(path)
