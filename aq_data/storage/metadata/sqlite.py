"""The metadata store on SQLite: one file, any number of processes, every acknowledged commit on disk.

A record is one row and its commit one flush. Its terms, some hundred rows all over the index, follow in batches, in order of
saving, as soon as nothing else is to be written; a search first indexes what is not yet. So saving costs no more the more
settings a measurement has, and a search still finds every acknowledged save.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from aq_data.errors import AqDataError, ConfigError, UnavailableError
from aq_data.models.datafile import DataFile, DataFileId
from aq_data.models.history import Change
from aq_data.models.query import Node
from aq_data.models.terms import SortKey, sort_key, terms_at
from aq_data.models.values import format_instant
from aq_data.storage.metadata._changes import add_change, changes_before
from aq_data.storage.metadata._connection import Writer, border, open_connection
from aq_data.storage.metadata._index import TermIndex
from aq_data.storage.metadata._sql import (
    SCHEMA,
    SCHEMA_VERSION,
    Cursor,
    Statement,
    compile_filter,
    page_statement,
)
from aq_data.storage.metadata._sweeps import SqliteSweeps
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore, Page, Token
from aq_data.storage.metadata.sweeplog import SweepLog

__all__ = ["SqliteStore"]

T = TypeVar("T")

EXACT_TOTAL = 10_000
"""Totals are counted exactly up to here; `count` is always exact."""
COLLECT = 200
"""Up to this many matches are fetched and sorted here; more are walked in the order of the term index."""
CACHED_BYTES = 32 << 20
"""Encoded size of the records kept in memory; one over a hundredth of it is read anew each time."""
SCANNED = 200


class SqliteStore(MetadataStore):
    """All writes go through one thread, which commits those that wait together in one transaction.

    `path` None keeps the database in memory: it goes with the store.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._local = threading.local()
        self._opened: list[sqlite3.Connection] = []
        # In memory there is one connection, which readers and the writer take in turns.
        self._memory_lock = threading.RLock()
        self._records: dict[DataFileId, Record] = {}
        self._sizes: dict[DataFileId, int] = {}
        self._cached_bytes = 0
        self._index = TermIndex()
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="sqlite-read")
        with border():
            self._written = self._connect()
            self._prepare(self._written)
        self._sweeps = SqliteSweeps(self)
        self._writer = Writer(self._written, self._memory_lock, self._index_next, self._index.forget)

    def _connect(self) -> sqlite3.Connection:
        connection = open_connection(self._path)
        self._opened.append(connection)
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            connection.execute("ROLLBACK")
            raise ConfigError(
                f"{self._path} has schema version {version}, this aq-data reads {SCHEMA_VERSION}; use the one that made it"
            )
        if version < SCHEMA_VERSION:
            for statement in SCHEMA:
                connection.execute(statement)
        connection.execute("COMMIT")

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        if self._path is None:
            with self._memory_lock, border():
                yield self._written
            return
        with border():
            if not hasattr(self._local, "connection"):
                self._local.connection = self._connect()
            yield self._local.connection

    # --- writing ---------------------------------------------------------------------------------------------------

    def _index_next(self, connection: sqlite3.Connection) -> bool:
        return self._index.through(connection) != self._index.advance(connection)

    async def _catch_up(self) -> None:
        """Return when every record acknowledged by now is in the index."""
        newest, indexed = await self.read(
            lambda connection: connection.execute(
                "SELECT (SELECT max(seq) FROM datafiles), value FROM progress WHERE name='indexed'"
            ).fetchone()
        )
        while indexed < (newest or 0):
            indexed = await self._writer.write(self._index.advance)

    @property
    def sweeps(self) -> SweepLog:
        return self._sweeps

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """The operation's result once it is committed; for the parts of this store."""
        return await self._writer.write(operation)

    async def insert(self, record: Record) -> Record | None:
        return await self.write(lambda connection: self.insert_record(connection, record))

    def insert_record(self, connection: sqlite3.Connection, record: Record) -> Record | None:
        """`insert` inside a transaction."""
        document = record.document
        existing = _load(connection, document.id)
        if existing is not None:
            return existing
        _check_not_barred(connection, document.id, record.attempt)
        encoded = msgspec.json.encode(document)
        connection.execute(
            "INSERT INTO datafiles (id, revision, deleted, attempt, digest, document) VALUES (?, ?, ?, ?, ?, ?)",
            (document.id, document.revision, document.state == "deleted", record.attempt, record.digest, encoded),
        )
        return None

    async def replace(self, record: Record, expected_revision: int, publishes: str = "") -> bool:
        return await self.write(lambda connection: self.replace_record(connection, record, expected_revision, publishes))

    def replace_record(
        self, connection: sqlite3.Connection, record: Record, expected_revision: int, publishes: str = ""
    ) -> bool:
        """`replace` inside a transaction."""
        document = record.document
        row = connection.execute(
            "SELECT seq, document FROM datafiles WHERE id=? AND revision=?", (document.id, expected_revision)
        ).fetchone()
        if row is None:
            return False
        _check_not_barred(connection, document.id, publishes)
        encoded = msgspec.json.encode(document)
        connection.execute(
            "UPDATE datafiles SET revision=?, deleted=?, attempt=?, digest=?, document=? WHERE seq=?",
            (document.revision, document.state == "deleted", record.attempt, record.digest, encoded, row[0]),
        )
        self._index.replace(connection, row[0], row[1], encoded)
        if record.change is not None:
            add_change(connection, row[0], record.change)
        if document.sweep is not None and document.state == "open":
            self._sweeps.note_revision(connection, document.id, document.revision)
        return True

    async def bar(self, id: DataFileId, key: str) -> None:
        await self._writer.write(
            lambda connection: connection.execute("INSERT OR IGNORE INTO barred VALUES (?, ?)", (id, key))
        )

    # --- reading ---------------------------------------------------------------------------------------------------

    async def read(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """The operation's result, from a thread and a connection that reads; for the parts of this store."""

        def run() -> T:
            with self._reader() as connection:
                return operation(connection)

        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    async def get(self, id: DataFileId) -> Record | None:
        # A primary-key look-up costs less than handing it to a thread would; only a changed record is decoded again.
        with self._reader() as connection:
            row = connection.execute("SELECT revision FROM datafiles WHERE id=?", (id,)).fetchone()
            if row is None:
                return None
            known = self._records.get(id)
            if known is not None and known.document.revision == row[0]:
                self._records[id] = self._records.pop(id)  # the most recently used is the last to go
                return known
            found = connection.execute("SELECT document, attempt, digest FROM datafiles WHERE id=?", (id,)).fetchone()
        record = _record(found)
        self._keep(record, len(found[0]))
        return record

    def _keep(self, record: Record, size: int) -> None:
        id = record.document.id
        if id in self._records:
            del self._records[id]
            self._cached_bytes -= self._sizes.pop(id)
        if size <= CACHED_BYTES // 100:
            self._records[id], self._sizes[id] = record, size
            self._cached_bytes += size
        while self._cached_bytes > CACHED_BYTES:
            oldest = next(iter(self._records))
            del self._records[oldest]
            self._cached_bytes -= self._sizes.pop(oldest)

    async def changes(self, id: DataFileId, limit: int, before: int | None = None) -> list[Change]:
        return await self.read(lambda connection: changes_before(connection, id, before, limit))

    async def search(self, node: Node, sort: SortKey, limit: int, cursor: str | None, include_deleted: bool = False) -> Page:
        start = Cursor.decode(cursor, sort) if cursor is not None else None

        def operation(connection: sqlite3.Connection) -> Page:
            connection.execute("BEGIN")  # one snapshot for the page and its total
            try:
                return _search(connection, node, sort, limit, start, include_deleted)
            finally:
                connection.execute("COMMIT")

        await self._catch_up()
        return await self.read(operation)

    async def count(self, node: Node) -> int:
        where = _alive(compile_filter(node), False)

        def operation(connection: sqlite3.Connection) -> int:
            row = connection.execute(f"SELECT count(*) FROM datafiles f WHERE {where.sql}", where.parameters).fetchone()
            return int(row[0])

        await self._catch_up()
        return await self.read(operation)

    async def distinct(self, path: str, node: Node, limit: int) -> list[tuple[object, int]]:
        where = _alive(compile_filter(node, probe=True), False)

        def operation(connection: sqlite3.Connection) -> list[tuple[object, int]]:
            rows = connection.execute(
                "SELECT k.kind, t.v, count(*) AS n FROM paths k JOIN terms t ON t.p=k.p JOIN datafiles f ON f.seq=t.d "
                f"WHERE k.path=? AND k.kind NOT IN ('whole', 'nan', 'null', 'complex') AND {where.sql} "
                "GROUP BY k.kind, t.v ORDER BY n DESC, k.kind, t.v LIMIT ?",
                (path, *where.parameters, limit),
            ).fetchall()
            return [(_value(kind, value), count) for kind, value, count in rows]

        await self._catch_up()
        return await self.read(operation)

    async def scan(self) -> AsyncIterator[Record]:
        last = 0
        while True:
            rows = await self.read(partial(_scan_after, last))
            for row in rows:
                yield _record(row[1:])
            if len(rows) < SCANNED:
                return
            last = rows[-1][0]

    # --- tokens ----------------------------------------------------------------------------------------------------

    async def add_token(self, token: Token) -> None:
        row = (token.id, token.hash, msgspec.json.encode(token))
        await self._writer.write(lambda connection: connection.execute("INSERT INTO tokens VALUES (?, ?, ?)", row))

    async def find_token(self, hash: str) -> Token | None:
        with self._reader() as connection:
            row = connection.execute("SELECT token FROM tokens WHERE hash=?", (hash,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Token)

    async def tokens(self) -> list[Token]:
        rows = await self.read(lambda connection: connection.execute("SELECT token FROM tokens ORDER BY id").fetchall())
        return [msgspec.json.decode(row[0], type=Token) for row in rows]

    async def revoke_token(self, id: str, revoked_at: str) -> bool:
        def operation(connection: sqlite3.Connection) -> bool:
            row = connection.execute("SELECT token FROM tokens WHERE id=?", (id,)).fetchone()
            if row is None:
                return False
            token = msgspec.json.decode(row[0], type=Token)
            if token.revoked_at is None:
                token = msgspec.structs.replace(token, revoked_at=revoked_at)
            connection.execute("UPDATE tokens SET token=? WHERE id=?", (msgspec.json.encode(token), id))
            return True

        return await self._writer.write(operation)

    async def check(self) -> None:
        # Taking the write lock and letting go shows that the disk, the file and the lock all work.
        await self._writer.write(lambda connection: connection.execute("SELECT count(*) FROM tokens").fetchone())

    async def close(self) -> None:
        # Waits on this thread: at the end of the interpreter no other can be started.
        self._writer.close()
        self._readers.shutdown()
        for connection in self._opened:
            connection.close()


def _record(row: tuple[Any, ...]) -> Record:
    return Record(msgspec.json.decode(row[0], type=DataFile), row[1], row[2])


def _load(connection: sqlite3.Connection, id: DataFileId) -> Record | None:
    row = connection.execute("SELECT document, attempt, digest FROM datafiles WHERE id=?", (id,)).fetchone()
    return None if row is None else _record(row)


def _scan_after(seq: int, connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    question = f"SELECT seq, document, attempt, digest FROM datafiles WHERE seq>? ORDER BY seq LIMIT {SCANNED}"
    return connection.execute(question, (seq,)).fetchall()


def _check_not_barred(connection: sqlite3.Connection, id: DataFileId, key: str) -> None:
    if connection.execute("SELECT 1 FROM barred WHERE id=? AND key=?", (id, key)).fetchone():
        raise UnavailableError("this attempt to save was collected as an orphan before it finished; send it again")


def _alive(where: Statement, include_deleted: bool) -> Statement:
    """Of what is indexed in this snapshot: a record that came since `_catch_up` has no terms yet to be judged by."""
    alive = "" if include_deleted else "f.deleted=0 AND "
    indexed = "f.seq<=(SELECT value FROM progress WHERE name='indexed')"
    return Statement(f"{alive}{indexed} AND ({where.sql})", where.parameters)


def _value(kind: str, value: Any) -> object:
    if kind == "bool":
        return bool(value)
    if kind == "date":
        return {"$date": format_instant(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=value))}
    return value


def _search(
    connection: sqlite3.Connection, node: Node, sort: SortKey, limit: int, start: Cursor | None, include_deleted: bool
) -> Page:
    where = _alive(compile_filter(node), include_deleted)
    rows = connection.execute(
        f"SELECT f.seq, f.document FROM datafiles f WHERE {where.sql} LIMIT {COLLECT + 1}", where.parameters
    ).fetchall()
    if len(rows) <= COLLECT:
        return _collected(rows, sort, limit, start)
    total = connection.execute(
        f"SELECT count(*) FROM (SELECT 1 FROM datafiles f WHERE {where.sql} LIMIT {EXACT_TOTAL + 1})", where.parameters
    ).fetchone()[0]
    probing = _alive(compile_filter(node, probe=True), include_deleted)
    paths = connection.execute("SELECT p, kind, multi FROM paths WHERE path=?", (sort.path,)).fetchall()
    statement = page_statement(probing, sort, paths, limit + 1, start)
    found = [
        (Cursor((rank, value), seq), document)
        for rank, value, seq, document in connection.execute(statement.sql, statement.parameters)
    ]
    return _page(found, sort, limit, min(total, EXACT_TOTAL), total <= EXACT_TOTAL)


def _sort_key(document: bytes, sort: SortKey) -> tuple[int, Any]:
    try:
        return sort_key(frozenset(terms_at(msgspec.json.decode(document), sort.path)), sort)
    except (ArithmeticError, AqDataError, LookupError, TypeError, ValueError):
        return (0, 0)  # as one without a value: it could not be indexed either


def _collected(rows: list[tuple[int, bytes]], sort: SortKey, limit: int, start: Cursor | None) -> Page:
    keyed = [(Cursor(_sort_key(document, sort), seq), document) for seq, document in rows]
    keyed.sort(key=lambda row: (row[0].key, row[0].seq), reverse=sort.descending)
    if start is not None:
        keyed = [row for row in keyed if start.is_after(row[0].key, row[0].seq, sort)]
    return _page(keyed[: limit + 1], sort, limit, len(rows), True)


def _page(found: list[tuple[Cursor, bytes]], sort: SortKey, limit: int, total: int, is_exact: bool) -> Page:
    more = len(found) > limit
    cursor = found[limit - 1][0].encode(sort) if more and limit else None
    return Page([msgspec.Raw(document) for _, document in found[:limit]], total, is_exact, cursor)
