"""The sides of W7, each over the catalogue it keeps in the cache."""

import asyncio
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import pymongo

from aq_data.storage.metadata._mongo_records import SCHEMA_VERSION as MONGO_SCHEMA
from aq_data.storage.metadata.mongo import MongoStore
from aq_data.storage.metadata.sqlite import SqliteStore
from benchmarks.aq_askers import ClientAsker, StoreAsker
from benchmarks.asking import Asker, Finding, ask_family
from benchmarks.catalogue import GENERATOR_VERSION
from benchmarks.catalogue_store import database_of, ensure_sqlite, fill, fill_mongo, told
from benchmarks.driver_process import DriverProcess
from benchmarks.questions import Truth
from benchmarks.server_process import ServerProcess
from benchmarks.sides import AQ_SERVER, TILED_KEY, tiled_server
from benchmarks.tiled_environment import TILED, ensure_tiled

__all__ = ["SIDES", "Ask", "open_sides"]

SIDES = ("store", "http", "mongo", "tiled")
Ask: TypeAlias = Callable[[str, int, int], Finding]
"""Ask one family so many questions, each so many times."""
_TOLD = 1000
"""Documents that Tiled loads between two messages."""
_LOG = logging.getLogger(__name__)


def open_sides(names: list[str], documents: int, cache: Path, stack: ExitStack) -> dict[str, Ask]:
    """`stack` ends what they start. What a side's catalogue lacks is filled in first, which may take long."""
    truth = Truth(documents)
    sides: dict[str, Ask] = {}
    for name in names:
        if name == "tiled":
            sides[name] = stack.enter_context(_tiled(documents, cache))
            continue
        if name == "mongo":
            sides[name] = _in_this_process(stack.enter_context(_mongo(documents, cache)), name, truth)
            continue
        folder = ensure_sqlite(documents, cache)
        asker = stack.enter_context(_store(folder) if name == "store" else _server(folder))
        sides[name] = _in_this_process(asker, name, truth)
    return sides


def _in_this_process(asker: Asker, side: str, truth: Truth) -> Ask:
    return lambda family, values, repeats: ask_family(asker, side, family, truth, values, repeats)


@contextmanager
def _store(folder: Path) -> Iterator[Asker]:
    with asyncio.Runner() as loop:
        store = SqliteStore(database_of(folder))
        try:
            yield StoreAsker(store, loop)
        finally:
            loop.run(store.close())


@contextmanager
def _server(folder: Path) -> Iterator[Asker]:
    server = ServerProcess(AQ_SERVER, folder)
    server.start()
    try:
        yield ClientAsker(server.url)
    finally:
        server.stop()


@contextmanager
def _mongo(documents: int, cache: Path) -> Iterator[Asker]:
    """MongoDB's own engine, as the tests run it (`make services` first), on a folder in the cache."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from services.mongo import Engine  # type: ignore[import-not-found]  # beside the tests

    folder = cache / f"catalogue-{GENERATOR_VERSION}-mongo-{MONGO_SCHEMA}" / str(documents)
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(folder.absolute())
    try:
        _give_memory(engine.url)
        fill_mongo(engine.url, "catalogue", documents)
        with asyncio.Runner() as loop:
            store = MongoStore(engine.url, "catalogue")
            try:
                loop.run(fill(store, documents, told))
                yield StoreAsker(store, loop)
            finally:
                loop.run(store.close())
    finally:
        engine.kill()


def _give_memory(url: str) -> None:
    """As much of this machine's as a server of MongoDB takes by itself; the engine of the tests begins with 256 MB."""
    with pymongo.MongoClient(url) as client:
        client.admin.command("setParameter", 1, wiredTigerEngineRuntimeConfig="cache_size=10G")
        client.admin.command("setParameter", 1, maxIndexBuildMemoryUsageMegabytes=2000)


@contextmanager
def _tiled(documents: int, cache: Path) -> Iterator[Ask]:
    python = ensure_tiled((cache / "tiled-venv").absolute())
    folder = cache / f"catalogue-{GENERATOR_VERSION}-{TILED.partition('==')[2]}-tiled" / str(documents)
    server = ServerProcess(tiled_server(python), folder.absolute())
    with ExitStack() as stack:
        server.start()
        stack.callback(server.stop)
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "driver.log"
        driver = DriverProcess(str(python), "tiled-catalogue", {"url": server.url, "api_key": TILED_KEY}, log)
        stack.callback(driver.stop)
        for count in range(_TOLD, documents + _TOLD, _TOLD):
            driver.ask("load_catalogue", count=count)
            _LOG.info("Tiled has %d documents", count)

        def ask(family: str, values: int, repeats: int) -> Finding:
            how = {"count": documents, "values": values, "repeats": repeats}
            return Finding(**driver.ask("ask_family", side="tiled", name=family, **how))

        yield ask
