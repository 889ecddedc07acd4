"""The SQL that a question becomes, each statement timed alone, with SQLite's plan for it."""

import asyncio
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

from aq_data.storage.metadata.sqlite import SqliteStore
from benchmarks.aq_askers import StoreAsker
from benchmarks.questions import Question

__all__ = ["Explained", "statements_of"]


@dataclass(frozen=True)
class Explained:
    sql: str
    """With its parameters written in."""
    milliseconds: float
    """The better of two runs, all rows fetched."""
    rows: int
    plan: str


def statements_of(path: Path, question: Question) -> list[Explained]:
    """Every SELECT that SQLite runs for the question on this database, in order."""
    traced: list[str] = []
    connect = sqlite3.connect

    def tracing(*where: Any, **how: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*where, **how)
        connection.set_trace_callback(traced.append)
        return connection

    with patch("sqlite3.connect", tracing), asyncio.Runner() as loop:
        store = SqliteStore(path)
        try:
            StoreAsker(store, loop).ask(question)
            traced.clear()
            StoreAsker(store, loop).ask(question)
            found = list(traced)
        finally:
            loop.run(store.close())
    connection = connect(path)
    try:
        return [_explained(connection, sql) for sql in found if sql.lstrip().startswith(("SELECT", "WITH"))]
    finally:
        connection.close()


def _explained(connection: sqlite3.Connection, sql: str) -> Explained:
    # Our functions know their patterns only inside the store: here they say yes at once, and their own time is missing.
    for name in re.findall(r"\baq_\w+", sql):
        connection.create_function(name, -1, lambda *_: 1)
    seconds, rows = [], 0
    for _ in range(2):
        start = perf_counter()
        rows = len(connection.execute(sql).fetchall())
        seconds.append(perf_counter() - start)
    return Explained(sql, min(seconds) * 1e3, rows, _plan(connection, sql))


def _plan(connection: sqlite3.Connection, sql: str) -> str:
    depth = {0: 0}
    lines = []
    for number, parent, _, detail in connection.execute(f"EXPLAIN QUERY PLAN {sql}"):
        depth[number] = depth[parent] + 1
        lines.append("  " * depth[number] + detail)
    return "\n".join(lines)
