"""Rows of the index on their way into SQLite: collected by path, inserted many at a time."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

__all__ = ["Postings", "insert_rows", "postings"]

Postings = dict[int, list[tuple[Any, int]]]
"""For each number of a path, negative where documents are deleted, its values and the positions of the documents."""

TOGETHER = 40
"""Rows that one statement inserts: half the work of one statement for each."""


def postings(entries: Iterable[tuple[int, Iterable[tuple[int, Any]]]]) -> Postings:
    """Of positions, each with the terms of its document."""
    found: Postings = defaultdict(list)
    for d, terms in entries:
        for p, v in terms:
            found[p].append((v, d))
    return found


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
