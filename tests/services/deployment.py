"""The deployment that tests of a server run on: embedded (SQLite and a folder), or production (MongoDB and a bucket).

A deployment is known by its folder: whoever names the same folder, in this process or another, gets the same database and
the same place in the same bucket, of Google's kind or of S3's, as the name of the folder decides.
`AQ_DATA_DEPLOYMENT=production` chooses; `make test-production` runs the tests of servers, clients and promises on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sqlite3
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import xarray as xr
from aq_server.app import Stores, open_stores
from aq_server.commands.serving import running
from aq_server.config import ServerConfig, StoreConfig
from services.buckets import Bucket
from services.mongo import Room

import aq_data

__all__ = [
    "PATIENCE",
    "PRODUCTION",
    "SOAK",
    "WAYS",
    "Production",
    "blobs",
    "deployed",
    "drop_row_of_sweeps",
    "environment",
    "left",
    "listed",
    "lose_database",
    "opened",
    "overwrite",
    "rows_of_sweeps",
    "storage_options",
    "stored",
    "with_stores",
]

T = TypeVar("T")

SOAK = bool(os.environ.get("AQ_DATA_SOAK"))
PRODUCTION = os.environ.get("AQ_DATA_DEPLOYMENT", "embedded") == "production"
WAYS = ("http",) if PRODUCTION else ("http", "embedded")
"""How a client gets to a deployment: through a server over a socket, and in embedded mode through the folder itself."""
PATIENCE = 3 if PRODUCTION else 1
"""How much longer than over SQLite and a folder anything may take that a test waits for."""


@dataclass(frozen=True)
class Part:
    """What one deployment has of the services of a run."""

    room: Room
    place: Bucket


class Production:
    """The services of a run, and which part of them each folder has. A database given back is emptied and lent again."""

    current: Production | None = None

    def __init__(self, mongo: str, buckets: Sequence[Bucket]) -> None:
        self.mongo, self.buckets = mongo, buckets
        self._lent: dict[Path, Part] = {}
        self._idle: list[Room] = []

    def __enter__(self) -> Production:
        Production.current = self
        # Readers without aq-data: else gcsfs asks each bucket its kind over gRPC, which an emulator does not speak, for 60 s.
        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
        return self

    def __exit__(self, *_: object) -> None:
        Production.current = None
        self.give_back()
        for room in self._idle:
            room.close()

    def part(self, folder: Path) -> Part:
        """That of a folder."""
        if folder not in self._lent:
            room = self._idle.pop() if self._idle else Room(self.mongo)
            room.clear()
            names = re.sub(r"\d+", "", "/".join(folder.parts[-2:]))
            self._lent[folder] = Part(room, self.buckets[zlib.crc32(names.encode()) % len(self.buckets)].place())
        return self._lent[folder]

    def give_back(self, below: Path = Path("/")) -> None:
        """The tests that had folders there have ended."""
        for folder in [folder for folder in self._lent if folder.is_relative_to(below)]:
            self._idle.append(self._lent.pop(folder).room)

    def bucket_of(self, path: str) -> Bucket:
        """That in which an address lies."""
        return next(bucket for bucket in self.buckets if path.startswith(bucket.url))


def _settings(data: Path) -> dict[str, Any]:
    """What the configuration says about where the deployment of a folder keeps things."""
    if Production.current is None:
        return {"data": str(data)}
    part = Production.current.part(data)
    store = StoreConfig(url=part.place.url, **msgspec.structs.asdict(part.place.options))
    return {
        "data": str(data),
        "mongo": Production.current.mongo,
        "mongo_database": part.room.name,
        "stores": {"default": store},
    }


def deployed(data: Path, **options: Any) -> ServerConfig:
    """The configuration of one more server of the deployment at a folder, on any free port."""
    return ServerConfig(**{"port": 0, **_settings(data), **options})


def environment(data: Path) -> dict[str, str]:
    """The same for a command that is given `--data`."""
    return {
        f"AQ_DATA_SERVER__{key.upper()}": value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for key, value in _settings(data).items()
    }


@contextlib.contextmanager
def opened(data: Path, way: str = WAYS[-1]) -> Iterator[aq_data.Client]:
    """A client of the deployment at a folder."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(running(deployed(data))) if way == "http" else data
        yield stack.enter_context(aq_data.connect(target))


def blobs(data: Path) -> Path:
    """Where the deployment at a folder, or the server of its bucket, keeps its blobs, to look and to damage."""
    return data / "blobs" if Production.current is None else Production.current.part(data).place.folder


def at(path: str) -> Path:
    """The same of one address, such as `file.path`."""
    if Production.current is None:
        return Path(path)
    bucket = Production.current.bucket_of(path)
    return bucket.folder / path.removeprefix(f"{bucket.url}/")


def overwrite(path: Path, content: bytes) -> None:
    """Let a blob have other bytes from now on, or be there. In a bucket they are put, or its server would find them out."""
    if Production.current is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return
    bucket = next(bucket for bucket in Production.current.buckets if path.is_relative_to(bucket.folder))

    async def put() -> None:
        async with contextlib.AsyncExitStack() as stack:
            store = bucket.open()
            stack.push_async_callback(store.close)
            await store.replace(str(path.relative_to(bucket.folder)), content)

    asyncio.run(put())


def left(data: Path, pattern: str) -> list[Path]:
    """What there is under a pattern below the blobs: blobs, and folders, which of a bucket count only with blobs in them."""
    found = list(blobs(data).glob(pattern))
    return [path for path in found if not PRODUCTION or any(one.is_file() for one in (path, *path.rglob("*")))]


def storage_options(path: str) -> dict[str, Any] | None:
    """What another program must be told to open an address: how to reach the bucket, when it is in one."""
    return None if Production.current is None else Production.current.bucket_of(path).storage_options


def open_zarr(path: str, **options: Any) -> xr.Dataset:
    """`xarray.open_zarr(file.path)`, of a folder or of a bucket."""
    return xr.open_zarr(path, storage_options=storage_options(path), **options)


def stored(data: Path) -> Iterator[tuple[str, bytes]]:
    """Everything that the deployment at a folder keeps: each file and document, with words for where it is."""
    for path in {*data.rglob("*"), *blobs(data).rglob("*")}:
        if path.is_file():
            yield str(path), path.read_bytes()
    if Production.current is not None:
        yield from (("database", document) for document in Production.current.part(data).room.dump())


def lose_database(data: Path) -> None:
    """The deployment at a folder, which nobody has open, keeps nothing but its blobs."""
    if Production.current is not None:
        Production.current.part(data).room.clear()
    for path in data.glob("metadata.sqlite*"):
        path.unlink()


def rows_of_sweeps(data: Path) -> int:
    """What the database keeps of the blocks of sweeps."""
    if Production.current is not None:
        return Production.current.part(data).room.count("blocks")
    with contextlib.closing(sqlite3.connect(data / "metadata.sqlite")) as connection:
        count: int = connection.execute("SELECT count(*) FROM blocks").fetchone()[0]
    return count


def drop_row_of_sweeps(data: Path, seq: int) -> int:
    """Take the block at a place in the order out of the log, as one who drops rows and dies would; how many are left."""
    if Production.current is not None:
        Production.current.part(data).room.remove("blocks", f"{seq:016}$")
    else:
        with contextlib.closing(sqlite3.connect(data / "metadata.sqlite", isolation_level=None)) as connection:
            connection.execute("DELETE FROM blocks WHERE seq=?", (seq,))
    return rows_of_sweeps(data)


async def listed(found: AsyncIterator[T]) -> list[T]:
    """All of it."""
    return [each async for each in found]


def with_stores(at: Path | ServerConfig, work: Callable[[Stores], Awaitable[T]]) -> T:
    """What an operator's command does beside the servers of a deployment, or without one."""

    async def main() -> T:
        stores = open_stores(at if isinstance(at, ServerConfig) else deployed(at))
        try:
            return await work(stores)
        finally:
            await stores.close()

    return asyncio.run(main())
