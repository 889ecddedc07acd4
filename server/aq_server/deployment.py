"""Where a deployment keeps its data, from its configuration: the metadata store and the array stores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import msgspec

from aq_data.errors import ConfigError, ValidationError
from aq_data.models.paths import parse_sort
from aq_data.models.stores import (
    DEFAULT_STORE,
    MEMORY,
    check_store_name,
    kind_of_root,
    normal_allowance,
    normal_root,
    overlap,
)
from aq_data.storage.arrays.bucket import BucketOptions
from aq_data.storage.arrays.stores import ArrayStores, Place
from aq_data.storage.metadata.migration import Migration, migrate
from aq_data.storage.metadata.sqlite import SqliteStore
from aq_data.storage.metadata.store import MetadataStore
from aq_server.config import ServerConfig
from aq_server.service.maintenance import Maintenance
from aq_server.service.reindexing import Reindexing
from aq_server.service.stores import lying_in
from aq_server.service.tokens import Tokens

__all__ = ["DATABASE", "Stores", "migrate_metadata", "open_stores"]

T = TypeVar("T")

DATABASE = "metadata.sqlite"
"""Name of the database in the data folder."""


@dataclass(frozen=True, slots=True)
class Stores:
    """The stores and what works on them directly."""

    metadata: MetadataStore
    arrays: ArrayStores

    @property
    def maintenance(self) -> Maintenance:
        return Maintenance(self.metadata, self.arrays)

    @property
    def reindexing(self) -> Reindexing:
        return Reindexing(self.metadata, self.arrays)

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.metadata)

    async def close(self) -> None:
        """Finish what was begun."""
        await self.metadata.close()
        await self.arrays.close()


def open_stores(config: ServerConfig) -> Stores:
    """`data/metadata.sqlite`, or MongoDB, and `data/blobs/`, made when absent, or all in memory; and the named stores."""
    address = _mongo_address(config)
    if config.memory and (address is not None or DEFAULT_STORE in config.stores):
        raise ConfigError("memory excludes mongo and stores.default: name one or the other")
    folder = Path(config.data).expanduser().absolute()
    places = _places(config, MEMORY if config.memory else str(folder / "blobs"))
    arrays = ArrayStores(
        places,
        added=lambda: metadata.added_stores(),
        holds=lambda name: _holds(metadata, name),
        roots={_parsed("store_roots", normal_allowance, entry): options for entry, options in config.store_roots.items()},
        default=config.default_store,
        of_kind={str(kind): name for kind, name in config.store_of_kind.items()},
        fallbacks=_fallbacks(config, places),
        scratch=None if config.memory else folder / "scratch",
    )
    for name, place in places.items():
        # Another folder may be one of a network that is away, which hinders no start.
        if name == DEFAULT_STORE or kind_of_root(place.root) != "folder":
            arrays.open(name)
    metadata = SqliteStore(None) if config.memory else _open_metadata(folder, address, config)
    return Stores(metadata, arrays)


async def _holds(metadata: MetadataStore, name: str) -> bool:
    return bool((await metadata.search(lying_in(name), parse_sort("id"), 1, None)).documents)


def _places(config: ServerConfig, default: str) -> dict[str, Place]:
    """Where the stores of the configuration lie; ConfigError naming what is wrong."""
    places = {DEFAULT_STORE: Place(default)}
    for name, store in config.stores.items():
        _parsed(f"stores.{name}", check_store_name, name)
        url = str(Path(store.url).expanduser()) if store.url.startswith("~") else store.url
        options = {field.name: getattr(store, field.name) for field in msgspec.structs.fields(BucketOptions)}
        places[name] = Place(_parsed(f"stores.{name}.url", normal_root, url), BucketOptions(**options))
    for (name, one), (other, two) in combinations(places.items(), 2):
        if overlap(one.root, two.root):
            raise ConfigError(f"the stores {name!r} ({one.root}) and {other!r} ({two.root}) overlap; keep them apart")
    for name in (config.default_store, *config.store_of_kind.values()):
        if name not in places and not config.store_roots:
            raise ConfigError(f"there is no store {name!r} to be a default; there are {', '.join(places)}")
    return places


def _fallbacks(config: ServerConfig, places: dict[str, Place]) -> dict[str, str]:
    """Which store stands in for which; ConfigError for one that is not there, or has a fallback itself."""
    fallbacks = {name: store.fallback for name, store in config.stores.items() if store.fallback is not None}
    for name, fallback in fallbacks.items():
        others = [other for other in places if other not in fallbacks]
        if fallback not in others:
            there = ", ".join(others) or "none"
            raise ConfigError(f"server.stores.{name}.fallback names a store without a fallback (there are {there})")
    return fallbacks


def _parsed(key: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValidationError as exc:
        raise ConfigError(f"server.{key}: {exc}") from exc


def _open_metadata(folder: Path, address: str | None, config: ServerConfig) -> MetadataStore:
    try:
        (folder / "scratch").mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"data {folder} cannot be used: {exc.strerror}") from exc
    if address is None:
        return SqliteStore(folder / DATABASE)
    from aq_data.storage.metadata.mongo import MongoStore  # the driver costs 40 ms and 10 MB, which SQLite needs not pay

    return MongoStore(address, config.mongo_database)


def migrate_metadata(config: ServerConfig, *, dry_run: bool, told: Callable[[int, int], None]) -> Migration:
    """`storage.metadata.migration.migrate` for the metadata of this configuration; MongoDB tells nothing on the way."""
    address = _mongo_address(config)
    if address is None:
        return migrate(Path(config.data).expanduser() / DATABASE, dry_run=dry_run, told=told)
    from aq_data.storage.metadata.mongo_migration import migrate_mongo

    return asyncio.run(migrate_mongo(address, config.mongo_database, dry_run=dry_run))


def _mongo_address(config: ServerConfig) -> str | None:
    if config.mongo_file is None:
        return config.mongo
    if config.mongo is not None:
        raise ConfigError("mongo and mongo_file both name the address of MongoDB: keep one of them")
    try:
        return Path(config.mongo_file).expanduser().read_text().strip()
    except OSError as exc:
        raise ConfigError(f"mongo_file {config.mongo_file} cannot be read: {exc.strerror}") from exc
