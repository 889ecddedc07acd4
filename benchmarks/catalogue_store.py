"""Metadata stores that hold a catalogue: filled through the store's own contract, kept in the cache between runs."""

import asyncio
import hashlib
import json
import logging
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pymongo

from aq_data.models.datafile import DataFile, make_id
from aq_data.models.query import All, Exists
from aq_data.storage.metadata._mongo_records import INDEXES, TERMS_INDEX, make_mark, stored
from aq_data.storage.metadata._schema import PRAGMAS, SCHEMA, SCHEMA_VERSION
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.sqlite import SqliteStore
from aq_data.storage.metadata.store import MetadataStore
from benchmarks.catalogue import GENERATOR_VERSION, documents, times_at
from benchmarks.machine import describe

__all__ = ["database_of", "ensure_sqlite", "fill", "fill_mongo", "filling_of", "record_of", "table_sizes", "told"]

_LOG = logging.getLogger(__name__)
_TOGETHER = 1000
"""Records that are inserted at the same time."""
_INDEX_TABLES = ("settled", "recent", "facts", "facets", "words", "vocabulary", "paths")
_SLICE = 20_000
"""Records after which the index is waited for, and the rate told."""
_HASTY = {
    "aq_data.storage.metadata._index.LARGE_BACKLOG": _SLICE,
    "aq_data.storage.metadata.sqlite.WRITTEN_KIB": 2_000_000,
    "aq_data.storage.metadata._connection.PRAGMAS": (
        *PRAGMAS,
        "PRAGMA synchronous=OFF",
        "PRAGMA wal_autocheckpoint=100000",
    ),
}
"""How all but the last documents go in: the same rows in half the time, with memory and without a care for power cuts."""


def record_of(number: int, document: dict[str, Any]) -> Record:
    """The record a server would have made of it."""
    milliseconds = int(times_at(np.array([number]))[0].astype("datetime64[ms]").astype(int))
    id = make_id(milliseconds, number.to_bytes(10, "big"))
    added = {"id": id, "state": "complete", "revision": 1, "path": f"blobs/{id}/1/arrays.zarr"}
    return Record(msgspec.convert(document | added, DataFile), f"{id}/1", f"catalogue-{GENERATOR_VERSION}-{number}")


async def fill(store: MetadataStore, count: int, told: Callable[[int, float], None]) -> None:
    """Insert what is missing of the first `count` documents.

    `told` (documents so far, documents/s) after each 20,000 of them, the time to index them included.
    """
    done = await store.count(All(()))
    for first in range(done // _SLICE * _SLICE, count, _SLICE) if done < count else ():
        last = min(first + _SLICE, count)
        records = [record_of(number, document) for number, document in enumerate(documents(first, last), first)]
        start = perf_counter()
        for begin in range(0, len(records), _TOGETHER):
            await asyncio.gather(*(store.insert(record) for record in records[begin : begin + _TOGETHER]))
        await store.count(Exists("metadata.nothing"))  # a search waits for the index
        told(last, len(records) / (perf_counter() - start))


def database_of(folder: Path) -> Path:
    """Where a server with `folder` as its data folder has its database."""
    return folder / "metadata.sqlite"


def ensure_sqlite(count: int, cache: Path) -> Path:
    """The data folder of a server with so many documents, filled if it is not there; what was half filled is gone on with.

    Its name holds the versions of the generator and of the database's schema, and a digest of that, as it may change before
    its version is released: a store of another is never measured. How fast documents went in and how large it became
    is kept beside it, in `built.json`.
    """
    schema = f"{SCHEMA_VERSION}-{hashlib.sha256(repr(SCHEMA).encode()).hexdigest()[:8]}"
    folder = cache / f"catalogue-{GENERATOR_VERSION}-sqlite-{schema}" / str(count)
    built = folder / "built.json"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _LOG.info("filling %s", folder)
        rates: dict[str, float] = {}
        asyncio.run(_fill_sqlite(database_of(folder), count, rates))
        told = {"documents_per_s": rates, "bytes": table_sizes(database_of(folder)), "machine": describe()}
        built.write_text(json.dumps(told, indent=1))
    return folder


def filling_of(folder: Path) -> str:
    """In words, how fast the last documents went into a catalogue of `ensure_sqlite`, and how large its index is."""
    built = json.loads((folder / "built.json").read_text())
    *_, (count, rate) = built["documents_per_s"].items()
    sizes = built["bytes"]
    index = sum(size for table, size in sizes.items() if table.partition("_")[0] in _INDEX_TABLES)
    return (
        f"{int(count):,} documents; the last {min(int(count), _SLICE):,} went in at {rate:.0f}/s, indexed and on disk, "
        f"when the load was {built['machine']['load'][0]:.0f}; the index is {index / sizes['datafiles']:.2f} times the data"
    )


async def _fill_sqlite(path: Path, count: int, rates: dict[str, float]) -> None:
    """The last 20,000 as the product inserts them: their rate is what counts."""

    def kept(documents: int, rate: float) -> None:
        rates[str(documents)] = rate
        told(documents, rate)

    with ExitStack() as stack:
        for name, value in _HASTY.items():
            stack.enter_context(patch(name, value))
        await _fill_to(path, max(0, count - _SLICE), kept)
    await _fill_to(path, count, kept)


def told(documents: int, rate: float) -> None:
    """Say how filling goes on."""
    _LOG.info("%9d documents, the last %d at %.0f/s", documents, min(documents, _SLICE), rate)


def fill_mongo(url: str, database: str, count: int) -> None:
    """Insert what is missing of the first `count` documents but the last 20,000, before the index of terms is there.

    The rows are those that the store writes. An index over all of them at once is built in a fiftieth of the time that it
    takes to keep one up to date.
    """
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(url)
    datafiles, kinds = client[database]["datafiles"], client[database]["kinds"]
    done = datafiles.count_documents({})
    if done < count - _SLICE and TERMS_INDEX in datafiles.index_information():
        datafiles.drop_index(TERMS_INDEX)
    seen: set[tuple[str, str]] = set()
    for first in range(done // _TOGETHER * _TOGETHER, count - _SLICE, _TOGETHER):
        start = perf_counter()
        rows = []
        for number, document in enumerate(documents(first, first + _TOGETHER), first):
            record = record_of(number, document)
            kept = stored(record, msgspec.json.encode(record.document), None)
            seen |= kept.quantities
            rows.append({"_id": record.document.id, **kept.fields, "by": make_mark()})
        datafiles.delete_many({"_id": {"$gte": rows[0]["_id"]}})  # a batch that was cut off
        datafiles.insert_many(rows, ordered=False)
        if not first % _SLICE:
            told(first + _TOGETHER, len(rows) / (perf_counter() - start))
    _LOG.info("indexing")
    datafiles.create_indexes([pymongo.IndexModel(keys, name=name, **how) for name, keys, how in INDEXES])
    for path, kind in seen:
        kinds.update_one({"_id": f"{path}\0{kind}"}, {"$set": {"path": path, "kind": kind}}, upsert=True)
    client.close()


async def _fill_to(path: Path, count: int, told: Callable[[int, float], None]) -> None:
    store = SqliteStore(path)
    try:
        await fill(store, count, told)
    finally:
        await store.close()


def table_sizes(path: Path) -> dict[str, int]:
    """Bytes of each table with its indexes' automatic ones, and of the file."""
    connection = sqlite3.connect(path)
    try:
        rows = connection.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY name ORDER BY 2 DESC").fetchall()
    finally:
        connection.close()
    return {"file": path.stat().st_size, **{name: int(size) for name, size in rows if size > 1 << 16}}
