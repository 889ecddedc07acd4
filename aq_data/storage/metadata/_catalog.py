"""What the index knows of paths and words before a question is compiled."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from aq_data.storage.metadata._schema import SNAPSHOT

__all__ = ["Catalog", "Path", "beyond"]

MANY_WORDS = 50
"""Words that begin alike are asked for one by one up to here."""


@dataclass(frozen=True, slots=True)
class Path:
    """A row of `paths`."""

    p: int
    kind: str
    multi: bool
    many: bool
    shared: bool
    n: int


class Catalog:
    """The numbers of paths, as of the snapshot a connection reads."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._known: dict[str, list[Path]] = {}
        self._in_snapshots: dict[str, bool] = {}

    def paths(self, path: str) -> list[Path]:
        """Every kind of value that stands at a path."""
        if path not in self._known:
            question = "SELECT p, kind, multi, many, shared, n FROM paths WHERE path=?"
            rows = self._connection.execute(question, (path,)).fetchall()
            self._known[path] = [
                Path(p, kind, bool(multi), bool(many), bool(shared), n) for p, kind, multi, many, shared, n in rows
            ]
        return self._known[path]

    def path(self, path: str, kind: str) -> Path | None:
        """That of one kind; None when no document has any."""
        return next((one for one in self.paths(path) if one.kind == kind), None)

    def words(self, beginning: str, limit: int) -> list[str]:
        """Words that were ever in some document and begin so."""
        question = "SELECT word FROM vocabulary WHERE word>=? AND word<? LIMIT ?"
        return [row[0] for row in self._connection.execute(question, (beginning, beyond(beginning), limit))]

    def matching(self, words: Iterable[str]) -> str:
        """The question to FTS5: for each beginning the words that begin so, if they are few."""
        parts = []
        for word in words:
            known = self.words(word, MANY_WORDS + 1)
            few = known or [word]
            parts.append(f'"{word}"*' if len(known) > MANY_WORDS else "(" + " OR ".join(f'"{one}"' for one in few) + ")")
        return " AND ".join(parts)

    @property
    def snapshot(self) -> Path | None:
        """The path that says which snapshot a document has; None when none has ever had one."""
        return self.path(*SNAPSHOT)

    def is_in_snapshots(self, word: str) -> bool:
        """Whether some snapshot has a word that begins so."""
        if self.snapshot is None:
            return False
        if word not in self._in_snapshots:
            question = "SELECT 1 FROM words WHERE words MATCH ? AND rowid<0 LIMIT 1"
            found = self._connection.execute(question, (self.matching((word,)),)).fetchone()
            self._in_snapshots[word] = found is not None
        return self._in_snapshots[word]


def beyond(prefix: str) -> str:
    """The least text greater than everything that begins with `prefix`."""
    while prefix and prefix[-1] == "\U0010ffff":
        prefix = prefix[:-1]
    following = ord(prefix[-1]) + 1 if prefix else 0x10FFFF
    return prefix[:-1] + chr(0xE000 if following == 0xD800 else following)  # surrogates are no characters
