"""The metadata store on SQLite: one file, any number of processes, every acknowledged commit on disk.

A record is one row and its commit one flush. Its terms, some hundred rows all over the index, follow in batches, in order of
saving, as soon as nothing else is to be written; a search first indexes what is not yet. So saving costs no more the more
settings a measurement has, and a search still finds every acknowledged save.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from aq_data.errors import AqDataError, ConfigError, StorageError, UnavailableError
from aq_data.models.datafile import DataFile, DataFileId
from aq_data.models.query import KIND_ORDER, Node, SortKey, Term, sort_key, terms
from aq_data.models.values import format_instant
from aq_data.storage.metadata._sql import (
    PRAGMAS,
    SCHEMA,
    SCHEMA_VERSION,
    Cursor,
    Statement,
    compile_filter,
    page_statement,
)
from aq_data.storage.metadata.store import MetadataStore, Page, Record, Token

__all__ = ["SqliteStore"]

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], Any]

EXACT_TOTAL = 10_000
"""Totals are counted exactly up to here; `count` is always exact."""
COLLECT = 500
"""Up to this many matches are fetched and sorted here; more are walked in the order of the term index."""
GROUP = 64
"""Writes that may share one commit, and so one flush to disk."""
CACHED_RECORDS = 2048
INDEX_BATCH = 32
"""Records indexed in one transaction: many enough to share pages, few enough to let a save in between."""
IDLE_SECONDS = 0.05
"""Without a write for so long, what is not indexed yet is."""
SCANNED = 200


def translate(exc: sqlite3.Error) -> AqDataError:
    """Our error for SQLite's: what a wait may mend is UnavailableError, everything else StorageError."""
    name = getattr(exc, "sqlite_errorname", None) or type(exc).__name__
    message = f"the metadata database failed ({name}): {exc}"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR")):
        return UnavailableError(message)
    return StorageError(message)


@contextmanager
def _border() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise translate(exc) from exc


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
        self._path_ids: dict[tuple[str, str], int] = {}
        self._multi: set[str] = set()
        self._queue: queue.SimpleQueue[tuple[Operation, Future[Any]] | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="sqlite-read")
        with _border():
            self._writer_connection = self._connect()
            self._prepare(self._writer_connection)
        self._writer = threading.Thread(target=self._write_loop, name="sqlite-write", daemon=True)
        self._writer.start()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path or ":memory:", isolation_level=None, check_same_thread=False, cached_statements=256
        )
        for pragma in PRAGMAS:
            connection.execute(pragma)
        self._opened.append(connection)
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            connection.execute("ROLLBACK")
            raise ConfigError(
                f"{self._path} has schema version {version}, this aq-data reads {SCHEMA_VERSION}; use the one that made it"
            )
        if version == 0:
            for statement in SCHEMA:
                connection.execute(statement)
        connection.execute("COMMIT")

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        if self._path is None:
            with self._memory_lock, _border():
                yield self._writer_connection
            return
        with _border():
            if not hasattr(self._local, "connection"):
                self._local.connection = self._connect()
            yield self._local.connection

    # --- writing ---------------------------------------------------------------------------------------------------

    async def _write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        future: Future[T] = Future()
        self._queue.put((operation, future))
        # Shielded: a caller that goes away does not undo what stands in a shared transaction.
        return await asyncio.shield(asyncio.wrap_future(future))

    def _write_loop(self) -> None:
        behind = True  # what an earlier process left
        while True:
            try:
                item = self._queue.get(timeout=IDLE_SECONDS if behind else None)
            except queue.Empty:
                behind = self._index_in_background()
                continue
            if item is None:
                return
            behind = True
            batch = [item]
            while len(batch) < GROUP and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    self._queue.put(None)
                    break
                batch.append(following)
            with self._memory_lock:
                self._commit(batch)

    def _commit(self, batch: list[tuple[Operation, Future[Any]]]) -> None:
        connection = self._writer_connection
        outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            with _border():
                connection.execute("BEGIN IMMEDIATE")
                for operation, future in batch:
                    connection.execute("SAVEPOINT one")
                    try:
                        with _border():
                            outcomes.append((future, operation(connection), None))
                    except Exception as exc:  # noqa: BLE001  (each caller gets the failure of its own operation)
                        outcomes.append((future, None, exc))
                        connection.execute("ROLLBACK TO one")
                        self._forget_paths()
                    connection.execute("RELEASE one")
                connection.execute("COMMIT")
        except Exception as exc:  # noqa: BLE001  (handed to every caller of the batch)
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            self._forget_paths()
            outcomes = [(future, None, exc) for _, future in batch]
        for future, result, error in outcomes:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def _index_in_background(self) -> bool:
        """Index one batch; whether there may be more."""
        done: Future[Any] = Future()
        with self._memory_lock:
            self._commit([(self._index, done)])
        # A failure here loses nothing: a search tries again and tells its caller.
        return done.exception() is None and bool(done.result())

    def _index(self, connection: sqlite3.Connection) -> int:
        """Put the terms of the next records into the index; how many those were."""
        through = connection.execute("SELECT value FROM progress WHERE name='indexed'").fetchone()[0]
        rows = connection.execute(
            f"SELECT seq, document FROM datafiles WHERE seq>? ORDER BY seq LIMIT {INDEX_BATCH}", (through,)
        ).fetchall()
        if rows:
            found = [(seq, frozenset(terms(msgspec.json.decode(document)))) for seq, document in rows]
            self._put_terms(connection, found)
            connection.execute("UPDATE progress SET value=? WHERE name='indexed'", (rows[-1][0],))
        return len(rows)

    async def _catch_up(self) -> None:
        """Return when every record acknowledged by now is in the index."""
        newest, indexed = await self._read(
            lambda connection: connection.execute(
                "SELECT (SELECT max(seq) FROM datafiles), value FROM progress WHERE name='indexed'"
            ).fetchone()
        )
        while indexed < (newest or 0):
            indexed = await self._write(self._index_and_tell)

    def _index_and_tell(self, connection: sqlite3.Connection) -> int:
        self._index(connection)
        return int(connection.execute("SELECT value FROM progress WHERE name='indexed'").fetchone()[0])

    def _forget_paths(self) -> None:
        """What a rolled-back transaction numbered is not there."""
        self._path_ids.clear()
        self._multi.clear()

    def _path_id(self, connection: sqlite3.Connection, path: str, kind: str) -> int:
        known = self._path_ids.get((path, kind))
        if known is None:
            connection.execute("INSERT OR IGNORE INTO paths (path, kind) VALUES (?, ?)", (path, kind))
            row = connection.execute("SELECT p FROM paths WHERE path=? AND kind=?", (path, kind)).fetchone()
            known = self._path_ids[path, kind] = int(row[0])
        return known

    def _put_terms(self, connection: sqlite3.Connection, found: list[tuple[int, frozenset[Term]]]) -> None:
        rows = [(self._path_id(connection, t.path, t.kind), t.value, seq) for seq, new in found for t in new]
        rows.sort(key=_first)  # pages in turn
        connection.executemany("INSERT OR IGNORE INTO terms (p, v, d) VALUES (?, ?, ?)", rows)
        for _, new in found:
            counts = Counter(term.path for term in new if term.kind in KIND_ORDER)
            for path in (path for path, count in counts.items() if count > 1 and path not in self._multi):
                connection.execute("UPDATE paths SET multi=1 WHERE path=?", (path,))
                self._multi.add(path)

    async def insert(self, record: Record) -> Record | None:
        document = record.document
        encoded = msgspec.json.encode(document)

        def operation(connection: sqlite3.Connection) -> Record | None:
            existing = _load(connection, document.id)
            if existing is not None:
                return existing
            _check_not_barred(connection, document.id, record.attempt)
            connection.execute(
                "INSERT INTO datafiles (id, revision, deleted, attempt, digest, document) VALUES (?, ?, ?, ?, ?, ?)",
                (document.id, document.revision, document.state == "deleted", record.attempt, record.digest, encoded),
            )
            return None

        return await self._write(operation)

    async def replace(self, record: Record, expected_revision: int, publishes: str = "") -> bool:
        document = record.document
        encoded = msgspec.json.encode(document)
        new = frozenset(terms(msgspec.json.decode(encoded)))

        def operation(connection: sqlite3.Connection) -> bool:
            row = connection.execute(
                "SELECT seq, document FROM datafiles WHERE id=? AND revision=?", (document.id, expected_revision)
            ).fetchone()
            if row is None:
                return False
            _check_not_barred(connection, document.id, publishes)
            connection.execute(
                "UPDATE datafiles SET revision=?, deleted=?, attempt=?, digest=?, document=? WHERE seq=?",
                (document.revision, document.state == "deleted", record.attempt, record.digest, encoded, row[0]),
            )
            if row[0] <= connection.execute("SELECT value FROM progress WHERE name='indexed'").fetchone()[0]:
                old = frozenset(terms(msgspec.json.decode(row[1])))
                gone = [(self._path_id(connection, t.path, t.kind), t.value, row[0]) for t in old - new]
                connection.executemany("DELETE FROM terms WHERE p=? AND v=? AND d=?", gone)
                self._put_terms(connection, [(row[0], new)])
            return True

        return await self._write(operation)

    async def bar(self, id: DataFileId, key: str) -> None:
        await self._write(lambda connection: connection.execute("INSERT OR IGNORE INTO barred VALUES (?, ?)", (id, key)))

    # --- reading ---------------------------------------------------------------------------------------------------

    async def _read(self, operation: Callable[[sqlite3.Connection], T]) -> T:
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
            known = self._records.pop(id, None)
            if known is None or known.document.revision != row[0]:
                known = _load(connection, id)
        if known is not None:
            self._records[id] = known
            if len(self._records) > CACHED_RECORDS:
                del self._records[next(iter(self._records))]
        return known

    async def search(self, node: Node, sort: SortKey, limit: int, cursor: str | None, include_deleted: bool = False) -> Page:
        start = Cursor.decode(cursor, sort) if cursor is not None else None

        def operation(connection: sqlite3.Connection) -> Page:
            connection.execute("BEGIN")  # one snapshot for the page and its total
            try:
                return _search(connection, node, sort, limit, start, include_deleted)
            finally:
                connection.execute("COMMIT")

        await self._catch_up()
        return await self._read(operation)

    async def count(self, node: Node) -> int:
        where = _alive(compile_filter(node), False)

        def operation(connection: sqlite3.Connection) -> int:
            row = connection.execute(f"SELECT count(*) FROM datafiles f WHERE {where.sql}", where.parameters).fetchone()
            return int(row[0])

        await self._catch_up()
        return await self._read(operation)

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
        return await self._read(operation)

    async def scan(self) -> AsyncIterator[Record]:
        last = 0
        while True:
            rows = await self._read(partial(_scan_after, last))
            for row in rows:
                yield _record(row[1:])
            if len(rows) < SCANNED:
                return
            last = rows[-1][0]

    # --- tokens ----------------------------------------------------------------------------------------------------

    async def add_token(self, token: Token) -> None:
        row = (token.id, token.hash, msgspec.json.encode(token))
        await self._write(lambda connection: connection.execute("INSERT INTO tokens VALUES (?, ?, ?)", row))

    async def find_token(self, hash: str) -> Token | None:
        with self._reader() as connection:
            row = connection.execute("SELECT token FROM tokens WHERE hash=?", (hash,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Token)

    async def tokens(self) -> list[Token]:
        rows = await self._read(lambda connection: connection.execute("SELECT token FROM tokens ORDER BY id").fetchall())
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

        return await self._write(operation)

    async def check(self) -> None:
        # Taking the write lock and letting go shows that the disk, the file and the lock all work.
        await self._write(lambda connection: connection.execute("SELECT count(*) FROM tokens").fetchone())

    async def close(self) -> None:
        self._queue.put(None)
        # Waits on this thread: at the end of the interpreter no other can be started.
        self._writer.join()
        self._readers.shutdown()
        for connection in self._opened:
            connection.close()


def _first(row: tuple[int, Any, int]) -> int:
    return row[0]


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
    return where if include_deleted else Statement(f"f.deleted=0 AND ({where.sql})", where.parameters)


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


def _collected(rows: list[tuple[int, bytes]], sort: SortKey, limit: int, start: Cursor | None) -> Page:
    keyed = [
        (Cursor(sort_key(frozenset(terms(msgspec.json.decode(document))), sort), seq), document) for seq, document in rows
    ]
    keyed.sort(key=lambda row: (row[0].key, row[0].seq), reverse=sort.descending)
    if start is not None:
        keyed = [row for row in keyed if start.is_after(row[0].key, row[0].seq, sort)]
    return _page(keyed[: limit + 1], sort, limit, len(rows), True)


def _page(found: list[tuple[Cursor, bytes]], sort: SortKey, limit: int, total: int, is_exact: bool) -> Page:
    more = len(found) > limit
    cursor = found[limit - 1][0].encode(sort) if more and limit else None
    return Page([msgspec.Raw(document) for _, document in found[:limit]], total, is_exact, cursor)
