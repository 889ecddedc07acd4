"""Connections of this process, shared by all that read from one place, and found again by other processes."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from aq_data.client.http import TIMEOUT, Http
from aq_data.errors import AqDataError, UnavailableError
from aq_data.wire.routes import SERVER_NAME, datafile_path

__all__ = ["Source", "open_server", "release"]

_lock = threading.Lock()
# By process id too: after a fork neither sockets nor an embedded server's thread may be shared.
_shared: dict[tuple[int, str, str | None], tuple[Http, int]] = {}


def request_headers(token: str | None) -> dict[str, str]:
    """Headers of every request."""
    return {"User-Agent": "aq-data-python"} | ({"Authorization": f"Bearer {token}"} if token else {})


def open_server(target: str, token: str | None) -> Http:
    """A connection to the server at an address; UnavailableError when nothing answers there that is aq-data."""
    http = Http(httpx.Client(base_url=target, headers=request_headers(token), timeout=TIMEOUT))
    try:
        answer = http.request("GET", "/healthz")
    except UnavailableError:
        http.client.close()
        raise
    except AqDataError as exc:
        http.client.close()
        raise UnavailableError(f"what answers at {target} is not an aq-data server; `aq-data serve` starts one") from exc
    if answer.headers.get("server") != SERVER_NAME:
        http.client.close()
        raise UnavailableError(f"what answers at {target} is not an aq-data server; `aq-data serve` starts one")
    return http


@dataclass(frozen=True, slots=True)
class Source:
    """Where data comes from: an address or a folder, a token, and the function that opens it.

    Pickles: another process opens its own connection, by the same function.
    """

    target: str
    token: str | None = field(default=None, repr=False)
    opener: Callable[[str, str | None], Http] = open_server

    def http(self, *, hold: bool = False) -> Http:
        """The connection of this process, opened once and shared. `hold` counts a client that will `release` it."""
        key = (os.getpid(), self.target, self.token)
        with _lock:
            known = _shared.get(key)
            http, holders = known if known is not None else (self.opener(self.target, self.token), 0)
            _shared[key] = (http, holders + hold)
            return http

    def address(self, id: str) -> str:
        """What tells a reader where one DataFile comes from."""
        return f"{self.target}{datafile_path(id)}" if "://" in self.target else f"{self.target}#{id}"


def release(http: Http) -> None:
    """One client less; the last one closes the connection."""
    with _lock:
        for key, (known, holders) in list(_shared.items()):
            if known is http:
                if holders > 1:
                    _shared[key] = (http, holders - 1)
                else:
                    del _shared[key]
                    http.client.close()


@atexit.register
def _close_all() -> None:
    for (pid, _, _), (http, _) in list(_shared.items()):
        if pid == os.getpid():
            http.client.close()
    _shared.clear()
