"""The deployment that tests of a server run on: embedded (SQLite and a folder), or production (MongoDB).

A deployment is known by its folder: whoever names the same folder, in this process or another, gets the same database.
`AQ_DATA_DEPLOYMENT=production` chooses; `make test-services` runs the tests of servers, clients and promises on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from aq_server.app import Stores, open_stores
from aq_server.commands.serving import running
from aq_server.config import ServerConfig
from services.mongo import Room

import aq_data

__all__ = [
    "PRODUCTION",
    "WAYS",
    "Production",
    "blobs",
    "deployed",
    "environment",
    "lose_database",
    "opened",
    "rows_of_sweeps",
    "with_stores",
]

T = TypeVar("T")

PRODUCTION = os.environ.get("AQ_DATA_DEPLOYMENT", "embedded") == "production"
WAYS = ("http",) if PRODUCTION else ("http", "embedded")
"""How a client gets to a deployment: through a server over a socket, and in embedded mode through the folder itself."""


class Production:
    """The services of a run, and which part of them each folder has. One that was given back is emptied and lent again."""

    current: Production | None = None

    def __init__(self, mongo: str) -> None:
        self.mongo = mongo
        self._lent: dict[Path, Room] = {}
        self._idle: list[Room] = []

    def __enter__(self) -> Production:
        Production.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Production.current = None
        self.give_back()
        for room in self._idle:
            room.close()

    def room(self, folder: Path) -> Room:
        """The database of a folder."""
        if folder not in self._lent:
            room = self._idle.pop() if self._idle else Room(self.mongo)
            room.clear()
            self._lent[folder] = room
        return self._lent[folder]

    def give_back(self, below: Path = Path("/")) -> None:
        """The tests that had folders there have ended."""
        for folder in [folder for folder in self._lent if folder.is_relative_to(below)]:
            self._idle.append(self._lent.pop(folder))


def _settings(data: Path) -> dict[str, Any]:
    """What the configuration says about where the deployment of a folder keeps things."""
    if Production.current is None:
        return {"data": str(data)}
    room = Production.current.room(data)
    return {"data": str(data), "mongo": Production.current.mongo, "mongo_database": room.name}


def deployed(data: Path, **options: Any) -> ServerConfig:
    """The configuration of one more server of the deployment at a folder, on any free port."""
    return ServerConfig(**{"port": 0, **_settings(data), **options})


def environment(data: Path) -> dict[str, str]:
    """The same for a command that is given `--data`."""
    return {f"AQ_DATA_SERVER__{key.upper()}": value for key, value in _settings(data).items()}


@contextlib.contextmanager
def opened(data: Path, way: str = WAYS[-1]) -> Iterator[aq_data.Client]:
    """A client of the deployment at a folder."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(running(deployed(data))) if way == "http" else data
        yield stack.enter_context(aq_data.connect(target))


def blobs(data: Path) -> Path:
    """Where the deployment at a folder keeps its blobs, to look and to damage."""
    return data / "blobs"


def lose_database(data: Path) -> None:
    """The deployment at a folder, which nobody has open, keeps nothing but its blobs."""
    if Production.current is not None:
        Production.current.room(data).clear()
    for path in data.glob("metadata.sqlite*"):
        path.unlink()


def rows_of_sweeps(data: Path) -> int:
    """What the database keeps of the blocks of sweeps."""
    if Production.current is not None:
        return Production.current.room(data).count("blocks")
    with contextlib.closing(sqlite3.connect(data / "metadata.sqlite")) as connection:
        count: int = connection.execute("SELECT (SELECT count(*) FROM blocks) + (SELECT count(*) FROM sweeps)").fetchone()[0]
    return count


def with_stores(data: Path, work: Callable[[Stores], Awaitable[T]]) -> T:
    """What an operator's command does beside the servers of a deployment, or without one."""

    async def main() -> T:
        stores = open_stores(deployed(data))
        try:
            return await work(stores)
        finally:
            await stores.close()

    return asyncio.run(main())
