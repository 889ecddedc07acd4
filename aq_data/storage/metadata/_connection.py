"""SQLite connections, the one thread that writes, and the border where SQLite's errors become ours."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from aq_data.errors import AqDataError, QueryError, StorageError, UnavailableError
from aq_data.storage.metadata._schema import PRAGMAS

__all__ = ["Writer", "border", "open_connection", "translate"]

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], Any]
_Waiting = tuple[Operation, "asyncio.Future[Any]"]
_Outcome = tuple[Any, Exception | None]

GROUP = 64
"""Writes that may share one commit, and so one flush to disk."""
IDLE_SECONDS = 0.05
"""Without a write for so long, the writer does its work in the background."""


_TOO_LARGE = ("parser stack overflow", "Expression tree is too large", "too many SQL variables")


def translate(exc: sqlite3.Error | sqlite3.Warning) -> AqDataError:
    """Our error for SQLite's: what a wait may mend is UnavailableError, everything else StorageError."""
    name = getattr(exc, "sqlite_errorname", None) or type(exc).__name__
    if any(sign in str(exc) for sign in _TOO_LARGE):
        return QueryError(f"the filter is too large for the database: {exc}")
    message = f"the metadata database failed ({name}): {exc}"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR")):
        return UnavailableError(message)
    return StorageError(message)


@contextmanager
def border() -> Iterator[None]:
    """Nothing of `sqlite3` leaves this block."""
    try:
        yield
    except (sqlite3.Error, sqlite3.Warning) as exc:
        raise translate(exc) from exc


def open_connection(path: Path | None) -> sqlite3.Connection:
    """A connection in autocommit mode with our settings; None is a database in memory."""
    connection = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False, cached_statements=256)
    for pragma in PRAGMAS:
        connection.execute(pragma)
    return connection


class Writer:
    """A thread that runs operations on one connection; those that wait together share a transaction.

    Each has a savepoint of its own: one that fails is undone alone and tells its own caller. When nothing was written for
    `IDLE_SECONDS`, `background` runs, in a transaction of its own, until it returns False.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        lock: threading.RLock | threading.Lock,
        background: Callable[[sqlite3.Connection], bool],
        rolled_back: Callable[[], None],
    ) -> None:
        """`lock` is held while the connection is used; `rolled_back` is told when something was undone."""
        self._connection, self._lock = connection, lock
        self._background, self._rolled_back = background, rolled_back
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sqlite-write", daemon=True)
        self._thread.start()

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """The operation's result, once it is committed and on disk."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        # A caller that goes away does not undo what stands in a shared transaction.
        self._queue.put((operation, future))
        return await future

    def close(self) -> None:
        """Finish what waits."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        behind = True  # an earlier process may have left work
        while True:
            try:
                item = self._queue.get(timeout=IDLE_SECONDS if behind else None)
            except queue.Empty:
                behind = self._run_background()
                continue
            if item is None:
                return
            behind = True
            batch = self._batch(item)
            _tell([future for _, future in batch], self._commit([operation for operation, _ in batch]))

    def _batch(self, first: _Waiting) -> list[_Waiting]:
        batch = [first]
        while len(batch) < GROUP and not self._queue.empty():
            following = self._queue.get()
            if following is None:
                self._queue.put(None)
                break
            batch.append(following)
        return batch

    def _run_background(self) -> bool:
        ((is_behind, error),) = self._commit([self._background])
        # A failure loses nothing: whoever needs the work done asks for it and is told.
        return error is None and bool(is_behind)

    def _commit(self, operations: list[Operation]) -> list[_Outcome]:
        connection = self._connection
        with self._lock:
            try:
                with border():
                    connection.execute("BEGIN IMMEDIATE")
                    attempt = self._attempt if len(operations) > 1 else self._run_alone
                    outcomes = [attempt(operation) for operation in operations]
                    connection.execute("COMMIT")
            except Exception as exc:  # noqa: BLE001  (handed to every caller of the batch)
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                self._rolled_back()
                return [(None, exc)] * len(operations)
        return outcomes

    def _run_alone(self, operation: Operation) -> _Outcome:
        """Without a savepoint, for which SQLite copies each page that is changed: what fails takes nobody with it."""
        return operation(self._connection), None

    def _attempt(self, operation: Operation) -> _Outcome:
        self._connection.execute("SAVEPOINT one")
        try:
            with border():
                result, error = operation(self._connection), None
        except Exception as exc:
            if not self._connection.in_transaction:
                raise  # SQLite gave up the whole transaction (a full disk): nobody's write is there
            result, error = None, exc
            self._connection.execute("ROLLBACK TO one")
            self._rolled_back()
        self._connection.execute("RELEASE one")
        return result, error


def _tell(futures: list[asyncio.Future[Any]], outcomes: list[_Outcome]) -> None:
    """Wake each event loop once, however many of its callers have an answer."""
    waiting: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], _Outcome]]] = {}
    for future, outcome in zip(futures, outcomes, strict=True):
        waiting.setdefault(future.get_loop(), []).append((future, outcome))
    for loop, answers in waiting.items():
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_answer, answers)


def _answer(answers: list[tuple[asyncio.Future[Any], _Outcome]]) -> None:
    for future, (result, error) in answers:
        if future.done():  # the caller went away
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
