"""Following a DataFile while it is measured, and delivering what other processes left in the spool."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from aq_data.client.delivery import Delivery, SpoolDamagedError
from aq_data.client.http import Http
from aq_data.client.spool import Spool
from aq_data.client.spools import spool_paths
from aq_data.errors import AqDataError, RateLimitError, StorageError, UnavailableError
from aq_data.wire.routes import events_path

__all__ = ["Delivered", "Event", "deliver_in_background", "deliver_left_behind", "follow", "push"]

log = logging.getLogger("aq_data")

SILENCE = httpx.Timeout(45.0, connect=5.0)
"""The server says something every 15 seconds; after three times that the connection is dead."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a DataFile: `kind` is block, metadata, finished or abandoned; go on after it with its `id`.

    `data` of a block: seq, writer, n, at, and `variables` with name, start and shape of what was written.
    """

    id: str
    kind: str
    data: dict[str, Any]


def follow(http: Http, id: str, after: str, wait: Callable[[float], None]) -> Iterator[Event]:
    """Events behind the id `after`, each once, until the DataFile is finished or abandoned; reconnects after any gap."""
    pause = FIRST_PAUSE
    while True:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        try:
            with http.stream("GET", events_path(id), headers=headers, timeout=SILENCE) as response:
                for event in _parsed(response.iter_bytes()):
                    after, pause = event.id, FIRST_PAUSE
                    yield event
                    if event.kind in ("finished", "abandoned"):
                        return
        except (UnavailableError, RateLimitError, httpx.HTTPError):
            if http.client.is_closed:
                raise UnavailableError("this client was closed; connect again") from None
        wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _parsed(pieces: Iterator[bytes]) -> Iterator[Event]:
    """Server-sent events (WHATWG HTML, section 9.2), of those fields and line ends that aq-data sends."""
    fields: dict[bytes, bytes] = {}
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line:
                name, _, value = line.partition(b":")
                fields[name] = value.removeprefix(b" ")
                continue
            if b"data" in fields:
                id, kind = fields.get(b"id", b"").decode(), fields.get(b"event", b"").decode()
                yield Event(id, kind, msgspec.json.decode(fields[b"data"]))
            fields = {}


def push(http: Http, spool: Spool) -> int:
    """Deliver a spool that was left behind, and delete it; how many blocks it held that had not arrived.

    What it raises leaves the spool as it was. The lock is let go of either way. SpoolDamagedError when something of it
    cannot be read: what stands before that was delivered.
    """
    delivery = Delivery(http, spool, is_live=False)
    try:
        spool.mark_delivering()
        if spool.whole(0):  # else its process was killed before anything was accepted, or it is damaged from its beginning
            while delivery.step():
                pass
        damage = spool.damage()
        if damage:
            raise SpoolDamagedError(
                f"something in the spool {spool.path} of sweep {spool.target.sweep} cannot be read: {damage}. "
                f"Of what stands before it {delivery.sent} blocks were delivered now. Put back what is damaged, or delete "
                "the folder to give up the rest"
            )
    except BaseException:
        spool.close()
        raise
    spool.remove()
    return delivery.sent


@dataclass(frozen=True, slots=True)
class Delivered:
    """What became of one spool: `blocks` were sent, or `error` says why it is still there."""

    path: Path
    sweep: str
    blocks: int
    error: AqDataError | None = None


def deliver_left_behind(http: Http, target: str, root: Path, sweep: str | None = None) -> list[Delivered]:
    """Deliver every spool for `target` (of one sweep) whose process is gone; what became of each."""
    outcomes: list[Delivered] = []
    for path in spool_paths(root):
        spool = Spool.open(path)
        if spool is None:
            continue
        if spool.target.target != target or sweep not in (None, spool.target.sweep):
            spool.close()
            continue
        try:
            outcomes.append(Delivered(path, spool.target.sweep, push(http, spool)))
        except (AqDataError, OSError) as exc:
            error = exc if isinstance(exc, AqDataError) else StorageError(f"the spool {path} cannot be read: {exc}")
            is_news = error.retryable or spool.mark_refused(str(error))
            text = "the spool %s of sweep %s could not be delivered: %s"
            log.log(logging.WARNING if is_news else logging.DEBUG, text, path, spool.target.sweep, error)
            outcomes.append(Delivered(path, spool.target.sweep, 0, error))
            if isinstance(error, UnavailableError):
                break
    return outcomes


def deliver_in_background(http: Http, target: str, root: Path) -> threading.Thread | None:
    """A thread that delivers what earlier processes left for `target`; None when there is nothing."""
    try:
        paths = spool_paths(root)
    except OSError:
        return None
    if not paths:
        return None
    thread = threading.Thread(target=deliver_left_behind, args=(http, target, root), name="aq-data-spool", daemon=True)
    thread.start()
    return thread
