"""Rows of the index on their way into SQLite: collected column by column, inserted many at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from aq_data.storage.metadata._entries import Entry

__all__ = ["Postings", "Rows", "insert_rows", "table_of_words"]

TOGETHER = 40
"""Rows that one statement inserts: half the work of one statement for each."""


class Postings(dict[int, tuple[list[Any], list[int]]]):
    """By the number of a path, negative where documents are deleted: its values, and beside them whose they are.

    Columns and not tuples: a batch has half a million, which Python's collector would look at again and again.
    """

    def __missing__(self, p: int) -> tuple[list[Any], list[int]]:
        found = self[p] = ([], [])
        return found

    def add(self, position: int, terms: Iterable[tuple[int, Any]]) -> None:
        """The document at `position` has these terms."""
        for p, v in terms:
            values, positions = self[p]
            values.append(v)
            positions.append(position)


class Rows:
    """Those of many documents, in order of their positions."""

    def __init__(self) -> None:
        self.terms = Postings()
        self.facts: list[Any] = []
        """Cells, row after row."""
        self.words: dict[str, list[tuple[int, str]]] = {"words": [], "buried_words": []}
        self.created: list[int | None] = []
        self.alive = 0

    def add(self, position: int, entry: Entry) -> None:
        """What the index holds of the next document, or of a snapshot."""
        self.terms.add(position, entry.terms)
        for p, v in entry.facts:
            self.facts += (position, p, v)
        if entry.words:
            self.words[table_of_words(entry)].append((position, entry.words))
        self.created.append(entry.created_at)
        self.alive += not entry.is_deleted


def table_of_words(entry: Entry) -> str:
    """Where the words of a document stand."""
    return "buried_words" if entry.is_deleted else "words"


def insert_rows(connection: sqlite3.Connection, table: str, cells: list[Any]) -> int:
    """Insert those rows of three columns that are not there, given cell after cell; how many they are."""
    step = 3 * TOGETHER
    whole = len(cells) - len(cells) % step
    many = connection.executemany(_statement(table, TOGETHER), (cells[i : i + step] for i in range(0, whole, step)))
    rest = connection.executemany(_statement(table, 1), (cells[i : i + 3] for i in range(whole, len(cells), 3)))
    return max(many.rowcount, 0) + max(rest.rowcount, 0)


@lru_cache
def _statement(table: str, rows: int) -> str:
    return f"INSERT OR IGNORE INTO {table} VALUES " + ", ".join(["(?, ?, ?)"] * rows)
