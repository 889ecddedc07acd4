"""Measuring: a sweep as the experiment writes it, kept on its own disk at once and at the server soon."""

from __future__ import annotations

import atexit
import logging
import random
import secrets
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import msgspec

from aq_data.client.delivery import Delivery, SpoolDamagedError
from aq_data.client.http import Http
from aq_data.client.regions import Buffer, Variables
from aq_data.client.spool import End, Open, Spool, SpoolTarget
from aq_data.errors import AqDataError, ConflictError, RateLimitError, UnavailableError, ValidationError
from aq_data.models.sweep import Block, NewSweep, NewSweepArray

__all__ = ["Lag", "Sweep", "new_spool", "spool_opening"]

log = logging.getLogger("aq_data")

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
"""Seconds between two tries while the server is away."""
AGE_SECONDS, AGES = 0.1, 10_000
"""How finely the age of what waits is told, and of how many moments."""
SERVER_FAULT = 500
CLOSE_SECONDS = 30.0
"""How long the end of a `with` block waits for a server that is away, before it leaves the rest to the spool."""


EXIT_SECONDS = 5.0
"""How long the end of a script waits for the delivery of all sweeps that it did not end."""

_open_sweeps: weakref.WeakSet[Sweep] = weakref.WeakSet()


class Lag(NamedTuple):
    """How far the server is behind the experiment: blocks, bytes of values, and the age of the oldest in seconds."""

    blocks: int
    bytes: int
    seconds: float


# --- writing ---------------------------------------------------------------------------------------------------------------


class Sweep:
    """A DataFile being measured. `write` and `append` return once the values are in the spool; a thread delivers them.

    Leaving the `with` block finishes the sweep; an exception abandons it with the reason kept. Usable from several threads.
    A delivery that the server refuses for good is raised by the next call.
    """

    def __init__(self, http: Http, spool: Spool, arrays: Sequence[NewSweepArray], *, shared: bool = False) -> None:
        """`shared`: others write it too, and one of them ends it; leaving the `with` block leaves the sweep open."""
        self._http, self._spool = http, spool
        self._variables = Variables(arrays)
        self._delivery = Delivery(http, spool, is_live=True)
        self._write_lock = threading.Lock()
        self._wake = threading.Event()
        self._changed = threading.Condition()
        self._accepted = 0
        self._accepted_bytes = 0
        self._delivered = (0, 0)
        self._ages: deque[tuple[int, float]] = deque()
        self._failure: AqDataError | None = None
        self._away: AqDataError | None = None
        self._ending, self._ended_by = False, ""
        self._stopping = threading.Event()
        self._shared = shared
        self._thread = threading.Thread(target=self._deliver, name=f"aq-data-{self.id[-6:]}", daemon=True)

    def begin(self) -> None:
        """Open the sweep at the server: what it refuses is raised; when it is away, the thread goes on trying."""
        try:
            self._delivery.step()
            self._variables.learn_chunks(self._delivery.chunks)
        except (UnavailableError, RateLimitError) as exc:
            self._away = exc
            log.warning("sweep %s begins in its spool %s: %s", self.id, self.spool, exc)
        self._thread.start()
        _open_sweeps.add(self)

    @property
    def id(self) -> str:
        return self._spool.target.sweep

    @property
    def target(self) -> str:
        """The address or folder it goes to."""
        return self._spool.target.target

    @property
    def is_over(self) -> bool:
        """Whether this writer has ended, left or given up."""
        return self._ending or self._failure is not None

    @property
    def writer(self) -> str:
        """The name under which this writer numbers its blocks."""
        return self._spool.target.writer

    @property
    def spool(self) -> Path:
        """The folder that holds what has not arrived yet."""
        return self._spool.path

    @property
    def lag(self) -> Lag:
        """How far the server is behind."""
        blocks, size = self._delivered
        with self._write_lock:
            while self._ages and self._ages[0][0] <= blocks:
                self._ages.popleft()
            age = time.monotonic() - self._ages[0][1] if self._ages and self._accepted > blocks else 0.0
            return Lag(self._accepted - blocks, self._accepted_bytes - size, age)

    def write(
        self, values: Mapping[str, Any] | None = None, /, *, at: Mapping[str, Any] | None = None, **named: Any
    ) -> None:
        """Write regions of one or several variables, as one atomic block; the later of two writes to a place wins.

        `at`: dim to index or slice, never coordinate values; dims not named start at 0. An indexed dim is missing in the
        value's shape. Variables whose names are no Python names, or `at`, come as a dict: `sweep.write({"at": 3})`.
        Raises ValidationError, keeping nothing, when a value does not fit; StorageError when the spool's disk is full.
        """
        self._accept({**(values or {}), **named}, at, None)

    def append(
        self,
        values: Mapping[str, Any] | None = None,
        /,
        *,
        dim: str | None = None,
        at: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> None:
        """As `write`, behind everything there is along `dim`: the server decides where.

        One step (the value lacks the axis `dim`) or several. `dim` may be left out when only one dim grows.
        """
        if dim is None:
            growing = sorted(self._variables.growing)
            if len(growing) != 1:
                raise ValidationError(f"name the dim to append along, one of {growing}: sweep.append(…, dim=…)")
            dim = growing[0]
        self._accept({**(values or {}), **named}, at, dim)

    def _accept(self, values: Mapping[str, Any], at: Mapping[str, Any] | None, dim: str | None) -> None:
        pieces, buffers = self._variables.pieces(values, at, dim)
        with self._write_lock:
            if self._failure is not None:
                raise self._failure
            if self._ending:
                raise ConflictError(
                    f"this writer of sweep {self.id} has ended; client.resume_sweep goes on", code="finished"
                )
            n = self._accepted + 1
            header = msgspec.json.encode(Block(self.writer, n, pieces))
            self._spool.append("block", header, buffers, n)
            self._accepted = n
            self._accepted_bytes += sum(map(len, buffers))
            instant = time.monotonic()
            if not self._ages or instant - self._ages[-1][1] > AGE_SECONDS:
                if len(self._ages) >= AGES:
                    self._ages.pop()
                self._ages.append((n, instant))
        if not self._wake.is_set():
            self._wake.set()

    def flush(self, timeout: float | None = None) -> None:
        """Return when everything written so far is on the server's disk.

        UnavailableError after `timeout` seconds (None waits on): nothing is lost, it stays in the spool.
        """
        wanted = self._accepted
        self._wait_until(lambda: self._delivered[0] >= wanted and self._delivery.acknowledged >= wanted, timeout)

    def _wait_until(self, is_done: Any, timeout: float | None) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: is_done() or self._failure is not None or self._stopping.is_set(), timeout)
        if self._failure is not None:
            raise self._failure
        if not done or not is_done():
            reason = f": {self._away}" if self._away is not None else ""
            raise UnavailableError(f"{self.lag.blocks} blocks of sweep {self.id} wait in {self.spool}{reason}")

    def finish(self, timeout: float | None = None) -> None:
        """Deliver everything and end the sweep: it becomes a complete DataFile. Repeating it is harmless."""
        self._end("finish", "", timeout)

    def abandon(self, reason: str = "", timeout: float | None = None) -> None:
        """Deliver everything and end the sweep as abandoned; what was written stays readable."""
        self._end("abandon", reason, timeout)

    def leave(self, timeout: float | None = None) -> None:
        """Deliver everything and let go of the sweep, which stays open for other writers."""
        with self._write_lock:
            self._ending = True
        self.flush(timeout)
        self._stop()
        self._spool.remove()

    def _end(self, step: Literal["finish", "abandon"], reason: str, timeout: float | None) -> None:
        with self._write_lock:
            if self._failure is not None:
                raise self._failure
            if self._ended_by not in ("", step):
                raise ConflictError(f"sweep {self.id} was ended by {self._ended_by}()", code="illegal_state")
            if not self._ending:
                self._spool.append("end", msgspec.json.encode(End(step, self._accepted, reason)), [])
                self._ended_by = step
                self._ending = True
        self._wake.set()
        self._wait_until(lambda: self._delivery.ended is not None, timeout)
        self._stop()
        self._spool.remove()

    def close(self) -> None:
        """Let go of the sweep without ending it: what has not arrived stays in the spool, for the next `connect`."""
        with self._write_lock:
            self._ending = True
        self._stop()
        self._spool.close()

    def _stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if self._ending or self._stopping.is_set():
            return
        try:
            if self._shared:
                self.leave(CLOSE_SECONDS)
            elif exc is None:
                self.finish(CLOSE_SECONDS)
            else:
                self.abandon(f"{type(exc).__name__}: {exc}", CLOSE_SECONDS)
        except UnavailableError as late:
            # Nothing is lost and the script may go on: the rest is delivered by this process while it lives, or later.
            warnings.warn(
                f"{late}; the next aq_data.connect or `aq-data spool push` delivers the rest", RuntimeWarning, stacklevel=2
            )
        except AqDataError as refused:
            if exc is None:
                raise
            # What went wrong in the experiment is not to be hidden by what went wrong after it.
            warnings.warn(f"{refused}; what it did not take stays in {self.spool}", RuntimeWarning, stacklevel=2)

    def __repr__(self) -> str:
        lag = self.lag
        state = "ended" if self._delivery.ended is not None else f"{lag.blocks} of {self._accepted} blocks behind"
        away = f" ({self._away})" if self._away is not None else ""
        return f"<Sweep {self.id} {state}{away}, spool {self.spool}>"

    # --- the thread ------------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                while not self._stopping.is_set() and self._step():
                    pause, self._away = FIRST_PAUSE, None
            except AqDataError as exc:
                # What the server, or something before it, did wrong may be mended; what we asked for wrongly will not.
                is_ours = exc.status_hint < SERVER_FAULT and not isinstance(exc, RateLimitError)
                if is_ours or isinstance(exc, SpoolDamagedError) or self._http.client.is_closed:
                    self._fail(exc)
                    return
                if self._away is None:
                    log.warning("sweep %s goes on in its spool %s: %s", self.id, self.spool, exc)
                self._away = exc
                self._spool.sync()
                self._stopping.wait(pause * random.uniform(0.7, 1.3))  # noqa: S311  (jitter, not a secret)
                pause = min(2 * pause, LONGEST_PAUSE)
                self._wake.set()
            except Exception as exc:
                log.exception("delivering failed")
                self._fail(AqDataError(f"delivering {self.spool} failed: {exc!r}"))
                return

    def _step(self) -> bool:
        more = self._delivery.step()
        with self._changed:
            self._delivered = (self._delivery.acknowledged, self._delivery.arrived_bytes)
            self._changed.notify_all()
        return more

    def _fail(self, exc: AqDataError) -> None:
        exc.add_note(f"blocks that did not arrive are in {self.spool}; `aq-data spool ls` shows them")
        with self._write_lock, self._changed:
            self._failure = exc
            self._changed.notify_all()
            self._spool.close()  # for whoever can deliver it


def new_spool(root: Path, target: str, sweep: str, name: str) -> Spool:
    """The spool of a new writer of a sweep."""
    return Spool.create(root, SpoolTarget(target, sweep, secrets.token_hex(6), name))


def spool_opening(spool: Spool, document: NewSweep, given: list[tuple[int, Buffer]]) -> None:
    """The first frame: the sweep can be opened later if the server is away now."""
    header = msgspec.json.encode(Open(document, tuple((index, len(values)) for index, values in given)))
    spool.append("open", header, [values for _, values in given])


@atexit.register
def _let_go() -> None:
    """A script that ends without ending its sweeps: what it wrote is delivered if that is quick, and said if not."""
    until = time.monotonic() + EXIT_SECONDS
    for sweep in list(_open_sweeps):
        if sweep.is_over:
            continue
        # At the end of the interpreter the embedded server has no threads left to work with.
        if "://" in sweep.target:
            with suppress(AqDataError):
                sweep.flush(max(0.0, until - time.monotonic()))
        if sweep.lag.blocks:
            sys.stderr.write(f"aq-data: sweep {sweep.id} was not ended; {sweep.lag.blocks} blocks wait in {sweep.spool}\n")
