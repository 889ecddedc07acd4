"""What the index knows of paths and words before a question is compiled."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from aq_data.storage.metadata._schema import SNAPSHOT

__all__ = ["Catalog", "Path", "matching"]


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
            found = self._connection.execute(question, (matching((word,)),)).fetchone()
            self._in_snapshots[word] = found is not None
        return self._in_snapshots[word]


def matching(words: Iterable[str]) -> str:
    """What FTS5 is asked for documents with all words, each perhaps only the beginning of one."""
    return " AND ".join(f'"{word}"*' for word in words)
