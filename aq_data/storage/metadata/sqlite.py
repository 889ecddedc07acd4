"""The metadata store on SQLite: one file, any number of processes, every acknowledged commit on disk.

A record is one row and its commit one flush. Its terms, some hundred rows all over the index, follow in batches, in order of
saving, as soon as nothing else is to be written; a search first indexes what is not yet. So saving costs no more the more
settings a measurement has, and a search still finds every acknowledged save.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from aq_data.errors import ConfigError, ConflictError, QueryError, UnavailableError
from aq_data.models.datafile import FORMAT, DataFile, DataFileId
from aq_data.models.history import Change
from aq_data.models.paths import SortKey
from aq_data.models.query import Node
from aq_data.models.snapshots import joined
from aq_data.models.stores import DEFAULT_STORE, AddedStore
from aq_data.models.values import format_instant
from aq_data.storage.metadata._changes import add_change, changes_before
from aq_data.storage.metadata._connection import Writer, border, open_connection
from aq_data.storage.metadata._entries import Stored
from aq_data.storage.metadata._functions import handing, install
from aq_data.storage.metadata._index import BACKLOG, TermIndex
from aq_data.storage.metadata._plan import Question
from aq_data.storage.metadata._schema import LATER, SCHEMA, SCHEMA_VERSION
from aq_data.storage.metadata._snapshots import put_apart
from aq_data.storage.metadata._stores import change_store, take_lease
from aq_data.storage.metadata._sweeps import SqliteSweeps
from aq_data.storage.metadata._tokens import add_token, find_token, read_tokens, revoke_token
from aq_data.storage.metadata.cursors import Cursor, mark_of
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore, Page, Token
from aq_data.storage.metadata.sweeplog import SweepLog

__all__ = ["SqliteStore"]

T = TypeVar("T")

_FROM = "FROM datafiles LEFT JOIN snapshots USING (snapshot)"
_RECORDS = f"SELECT document, content, attempt, digest {_FROM}"
_RECORDS_AFTER = f"SELECT document, content, attempt, digest, seq {_FROM}"
_HASHES = (
    "SELECT DISTINCT hash FROM datafiles JOIN snapshots USING (snapshot) "
    f"WHERE coalesce(json_extract(CAST(document AS TEXT), '$.store'), '{DEFAULT_STORE}')=?"
)

CACHED_BYTES = 32 << 20
"""Encoded size of the records kept in memory; one over a hundredth of it is read anew each time."""
WRITTEN_KIB = 128_000
"""Memory for the pages that a large batch of the index changes; with less SQLite writes them several times."""
SCANNED = 200
SCANNED_BYTES = 32 << 20
QUERY_SECONDS = 10.0
"""How long one question may take."""


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
            self._written.execute(f"PRAGMA cache_size=-{WRITTEN_KIB}")
            self._prepare(self._written)
        self._sweeps = SqliteSweeps(self)
        self._writer = Writer(self._written, self._memory_lock, self._index_next, self._index.forget)

    def _connect(self) -> sqlite3.Connection:
        connection = open_connection(self._path)
        install(connection)
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
        if 0 < version < SCHEMA_VERSION:
            connection.execute("ROLLBACK")
            raise ConfigError(
                f"{self._path} has schema version {version}, this aq-data needs {SCHEMA_VERSION}: run `aq-data migrate` "
                f"with `--data {self._path.parent if self._path else ''}`; it makes a backup first"
            )
        if version < SCHEMA_VERSION:
            for statement in SCHEMA:
                connection.execute(statement)
        for statement in LATER:
            connection.execute(statement)
        newest = connection.execute("SELECT value FROM progress WHERE name='format'").fetchone()[0]
        connection.execute("COMMIT")
        if newest > FORMAT:
            raise ConfigError(f"{self._path} has documents of form {newest}, this aq-data reads {FORMAT}; use a newer one")

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
        if self._index.through(connection) != self._index.advance(connection):
            return True
        connection.execute("PRAGMA shrink_memory")  # of what large batches took
        return False

    async def _catch_up(self) -> None:
        """Return when every record acknowledged by now is in the index."""
        newest, indexed = await self.read(
            lambda connection: connection.execute(
                "SELECT (SELECT max(seq) FROM datafiles), value FROM progress WHERE name='indexed'"
            ).fetchone()
        )
        while indexed < (newest or 0):
            indexed = await self._writer.write(lambda connection: self._index.advance(connection, BACKLOG))

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
        _check_pid(connection, document)
        encoded, snapshot = put_apart(connection, document)
        row = (document.id, document.revision, document.state == "deleted", record.attempt, record.digest, document.pid)
        connection.execute(
            "INSERT INTO datafiles (id, revision, deleted, attempt, digest, pid, snapshot, document) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, snapshot, encoded),
        )
        return None

    async def replace(self, record: Record, expected_revision: int, publishes: str = "") -> bool:
        return await self.write(lambda connection: self.replace_record(connection, record, expected_revision, publishes))

    def replace_record(
        self, connection: sqlite3.Connection, record: Record, expected_revision: int, publishes: str = ""
    ) -> bool:
        """`replace` inside a transaction."""
        document = record.document
        question = "SELECT seq, deleted, document, snapshot FROM datafiles WHERE id=? AND revision=?"
        row = connection.execute(question, (document.id, expected_revision)).fetchone()
        if row is None:
            return False
        _check_not_barred(connection, document.id, publishes)
        _check_pid(connection, document)
        seq, before, is_deleted = row[0], Stored(*row[1:]), document.state == "deleted"
        after = Stored(is_deleted, *put_apart(connection, document))
        connection.execute(
            "UPDATE datafiles SET revision=?, deleted=?, attempt=?, digest=?, pid=?, snapshot=?, document=? WHERE seq=?",
            (
                document.revision,
                is_deleted,
                record.attempt,
                record.digest,
                document.pid,
                after.snapshot,
                after.document,
                seq,
            ),
        )
        self._index.replace(connection, seq, before, after)
        if before.snapshot is not None and before.snapshot != after.snapshot:
            self._drop_unused(connection, before.snapshot)
        if record.change is not None:
            add_change(connection, seq, record.change)
        if document.sweep is not None and document.state == "open":
            self._sweeps.note_revision(connection, document.id, document.revision)
        return True

    def _drop_unused(self, connection: sqlite3.Connection, snapshot: int) -> None:
        if connection.execute("SELECT 1 FROM datafiles WHERE snapshot=? LIMIT 1", (snapshot,)).fetchone() is None:
            content = connection.execute("SELECT content FROM snapshots WHERE snapshot=?", (snapshot,)).fetchone()[0]
            self._index.remove_snapshot(connection, snapshot, content)
            connection.execute("DELETE FROM snapshots WHERE snapshot=?", (snapshot,))

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
            found = connection.execute(f"{_RECORDS} WHERE id=?", (id,)).fetchone()
        record = _record(found)
        self._keep(record, len(found[0]) + len(found[1] or b""))
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
        start = Cursor.decode(cursor, sort, mark_of(node, include_deleted), int) if cursor is not None else None
        return await self._ask(node, lambda question: question.page(sort, limit, start), include_deleted)

    async def count(self, node: Node) -> int:
        return await self._ask(node, Question.count)

    async def distinct(self, path: str, node: Node, limit: int) -> list[tuple[object, int]]:
        rows = await self._ask(node, lambda question: question.distinct(path, limit))
        return [(_value(kind, value), count) for kind, value, count in rows]

    async def _ask(self, node: Node, ask: Callable[[Question], T], include_deleted: bool = False) -> T:
        """The answer in one snapshot that has everything acknowledged by now; QueryError when it takes too long."""

        def operation(connection: sqlite3.Connection) -> T:
            with _limited(connection) as end, handing(end) as hand:
                connection.execute("BEGIN")
                try:
                    return ask(Question(connection, node, hand, include_deleted))
                finally:
                    connection.execute("COMMIT")

        await self._catch_up()
        return await self.read(operation)

    async def scan(self) -> AsyncIterator[Record]:
        last = 0
        while True:
            rows = await self.read(partial(_scan_after, last))
            for row in rows:
                yield _record(row[:-1])
            if not rows:
                return
            last = rows[-1][-1]

    async def snapshots(self, store: str) -> set[str]:
        return {row[0] for row in await self.read(lambda connection: connection.execute(_HASHES, (store,)).fetchall())}

    async def needs_snapshot(self, store: str, hash: str) -> bool:
        question = f"{_HASHES} AND hash=? LIMIT 1"  # of a common snapshot many documents, of any other few are looked at
        rows = await self.read(lambda connection: connection.execute(question, (store, hash)).fetchall())
        return bool(rows)

    # --- tokens ----------------------------------------------------------------------------------------------------

    async def add_token(self, token: Token) -> None:
        await self.write(lambda connection: add_token(connection, token))

    async def find_token(self, hash: str) -> Token | None:
        with self._reader() as connection:
            return find_token(connection, hash)

    async def tokens(self) -> list[Token]:
        return await self.read(read_tokens)

    async def revoke_token(self, id: str, revoked_at: str) -> bool:
        return await self.write(lambda connection: revoke_token(connection, id, revoked_at))

    # --- stores ----------------------------------------------------------------------------------------------------

    async def added_stores(self) -> list[AddedStore]:
        with self._reader() as connection:
            rows = connection.execute("SELECT store FROM stores ORDER BY name").fetchall()
        return [msgspec.json.decode(row[0], type=AddedStore) for row in rows]

    async def change_store(self, before: AddedStore | None, after: AddedStore | None) -> bool:
        return await self.write(lambda connection: change_store(connection, before, after))

    async def lease(self, name: str, owner: str, now: float, until: float) -> bool:
        return await self.write(lambda connection: take_lease(connection, name, owner, now, until))

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
    document, content, attempt, digest = row
    return Record(joined(msgspec.json.decode(document, type=DataFile), content), attempt, digest)


def _load(connection: sqlite3.Connection, id: DataFileId) -> Record | None:
    row = connection.execute(f"{_RECORDS} WHERE id=?", (id,)).fetchone()
    return None if row is None else _record(row)


def _scan_after(seq: int, connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """The next rows, with their positions: at most `SCANNED`, fewer where they are large."""
    rows: list[tuple[Any, ...]] = []
    size = 0
    for row in connection.execute(f"{_RECORDS_AFTER} WHERE seq>? ORDER BY seq LIMIT {SCANNED}", (seq,)):
        rows.append(row)
        size += len(row[0]) + len(row[1] or b"")
        if size > SCANNED_BYTES:
            break
    return rows


def _check_not_barred(connection: sqlite3.Connection, id: DataFileId, key: str) -> None:
    if connection.execute("SELECT 1 FROM barred WHERE id=? AND key=?", (id, key)).fetchone():
        raise UnavailableError("this attempt to save was collected as an orphan before it finished; send it again")


def _check_pid(connection: sqlite3.Connection, document: DataFile) -> None:
    if document.pid is None or document.state == "deleted":
        return
    row = connection.execute(
        "SELECT id FROM datafiles WHERE pid=? AND deleted=0 AND id<>?", (document.pid, document.id)
    ).fetchone()
    if row is not None:
        raise ConflictError(f"the pid {document.pid[:80]!r} is that of DataFile {row[0]}; choose another", code="id_taken")


@contextmanager
def _limited(connection: sqlite3.Connection) -> Iterator[float]:
    """What is asked in this block ends after QUERY_SECONDS; when that is."""
    end = time.monotonic() + QUERY_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > end, 50_000)
    try:
        yield end
    except sqlite3.OperationalError as exc:
        if time.monotonic() > end:
            raise QueryError(
                f"the query took longer than {QUERY_SECONDS:g} s; narrow it with an equality, a range or ^ in a pattern"
            ) from exc
        raise
    finally:
        connection.set_progress_handler(None, 0)


def _value(kind: str, value: Any) -> object:
    if kind == "bool":
        return bool(value)
    if kind == "date":
        return {"$date": format_instant(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=value))}
    if value in (math.inf, -math.inf):
        return {"$float": "Infinity" if value > 0 else "-Infinity"}
    return value
