"""Configuration: file, then environment, then flags, each stronger than the one before. Built once, in `__main__`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from aq_data.configfile import ClientConfig, config_path, read_tables
from aq_data.errors import ConfigError
from aq_data.models.datafile import Kind
from aq_data.models.stores import DEFAULT_STORE
from aq_data.models.structs import resolve
from aq_data.storage.arrays.bucket import BucketOptions

__all__ = ["ClientConfig", "Config", "ServerConfig", "StoreConfig", "load_config"]

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class StoreConfig(BucketOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table `server.stores.<name>`: a store, and how its bucket is reached."""

    url: str
    """A folder (`~` is the home folder), `gs://bucket/prefix`, `s3://bucket/prefix`, or `memory:`."""
    fallback: str | None = None
    """Store of the configuration that takes new DataFiles while this one does not answer; None refuses them (503)."""


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `server`."""

    host: str = "127.0.0.1"
    """Address to bind. Loopback may run open; any other starts only when a token exists."""
    port: Port = 5000
    """TCP port; 0 takes any free one."""
    data: str = "aq-data"
    """Folder of the database and the blobs; `~` is the home folder. Made when absent."""
    mongo: str | None = None
    """Address of MongoDB (`mongodb://…`), which then has the metadata. A secret: it may hold a password."""
    mongo_file: str | None = None
    """File that holds the address of MongoDB, readable by its owner only; instead of `mongo`."""
    mongo_database: str = "aq_data"
    """Database there."""
    memory: bool = False
    """Keep everything in memory and forget it at the end."""
    require_token: bool = False
    """Ask for tokens on loopback too."""
    allowed_hosts: tuple[str, ...] = ()
    """Further host names an open server answers to, beyond localhost."""
    max_save_bytes: Positive = 1 << 40
    """Largest body of one save or attached file, in bytes."""
    max_document_bytes: Positive = 16 << 20
    """Largest JSON document, filter or patch, in bytes."""
    rate_limit: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Requests per second of one client address; 0 is no limit."""
    stale_after: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    """Seconds of silence after which an open sweep is called stale."""
    webhooks: tuple[str, ...] = ()
    """Addresses that may be told when a sweep ends; a sweep names those it wants in `notify`."""
    webhook_secret_file: str | None = None
    """File with the secret that signs webhooks (`whsec_` and base64, or any text); needed when `webhooks` has any."""
    stores: dict[str, StoreConfig] = {}
    """Named stores besides `default`, which lies in `data` unless it is among them."""
    default_store: str = DEFAULT_STORE
    """Where new DataFiles go that name no store."""
    store_of_kind: dict[Kind, str] = {}
    """The same for one kind of DataFile: `{measurement = "bucket-2026"}`."""
    store_roots: dict[str, BucketOptions] = {}
    """Where admins may add stores over HTTP, and how these are reached: `/data/stores` and all below, `gs://lab-*`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged, as JSON lines on standard error."""

    def __repr__(self) -> str:
        shown = {field: getattr(self, field) for field in self.__struct_fields__ if field != "mongo"}
        return f"ServerConfig({', '.join(f'{field}={value!r}' for field, value in shown.items())})"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole configuration file."""

    server: ServerConfig = ServerConfig()
    client: ClientConfig = ClientConfig()


def _from_environment(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """`AQ_DATA_SERVER__PORT=8000` as `{"server": {"port": 8000}}`; lists and tables are written as JSON."""
    tables: dict[str, dict[str, Any]] = {}
    for name, text in environ.items():
        if name.startswith("AQ_DATA_") and "__" in name:
            table, _, key = name.removeprefix("AQ_DATA_").lower().partition("__")
            tables.setdefault(table, {})[key] = _decoded(name, text) if text[:1] in ("[", "{") else text
    where = "in the environment (AQ_DATA_<TABLE>__<KEY>)"
    # Text is all an environment has: here, and only here, "8000" may stand for a number.
    typed: dict[str, dict[str, Any]] = msgspec.to_builtins(_convert(tables, where, strict=False))
    return {table: {key: typed[table][key] for key in values} for table, values in tables.items()}


def _decoded(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"{name} in the environment is not JSON: {exc}") from exc


def load_config(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> Config:
    """Merge file, environment and `flags` (keys of `server`; None is "not given"). ConfigError names the key at fault.

    `path` None takes the default file, which may be absent; a named one may not.
    """
    merged: dict[str, Any] = {}
    chosen = path or config_path()
    if chosen is not None:
        merged = read_tables(chosen)
        _convert(merged, f"in {chosen}")
    environment = _from_environment(environ)
    given = {"server": {key: value for key, value in flags.items() if value is not None}}
    for source in (environment, given):
        for table, values in source.items():
            merged[table] = {**merged.get(table, {}), **values}
    return _convert(merged, "from file, environment and flags")


def _convert(tables: dict[str, Any], where: str, strict: bool = True) -> Config:
    try:
        return msgspec.convert(tables, Config, strict=strict)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"the configuration {where} is wrong: {exc}") from exc


resolve(StoreConfig, ServerConfig, Config)
