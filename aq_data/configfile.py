"""The configuration file: where it is, and its tables. Whoever reads it checks the tables that are its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from aq_data.errors import ConfigError
from aq_data.models.structs import resolve

__all__ = ["ClientConfig", "client_config", "config_path", "read_tables"]


class ClientConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `client`, read by `aq_data.connect()`."""

    url: str | None = None
    """Address of a server, or a folder for the embedded mode."""
    token_file: str | None = None
    """File that holds a token, readable by its owner only."""


def config_path() -> Path | None:
    """`AQ_DATA_CONFIG`, which has to be there, else `~/.aq_config/data_server.json` or `.toml`, if one is; else None."""
    named = os.environ.get("AQ_DATA_CONFIG")
    if named:
        return Path(named)
    folder = Path.home() / ".aq_config"
    return next((path for path in (folder / "data_server.json", folder / "data_server.toml") if path.exists()), None)


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a file; ConfigError when there are none to be had."""
    try:
        content = path.read_bytes()
        decoded = msgspec.toml.decode(content) if path.suffix == ".toml" else msgspec.json.decode(content)
    except OSError as exc:
        raise ConfigError(f"the configuration {path} cannot be read: {exc.strerror}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the configuration {path} is not valid {path.suffix[1:].upper()}: {exc}") from exc
    if not isinstance(decoded, dict):
        raise ConfigError(f"the configuration {path} must hold an object with the tables server and client")
    return decoded


def client_config() -> ClientConfig:
    """The client's settings: the file's, under those of the environment. What a server's table has is not looked at."""
    path = config_path()
    table = read_tables(path).get("client", {}) if path is not None else {}
    prefix = "AQ_DATA_CLIENT__"
    given = {name.removeprefix(prefix).lower(): text for name, text in os.environ.items() if name.startswith(prefix)}
    try:
        msgspec.convert(table, ClientConfig)
        return msgspec.convert({**table, **given}, ClientConfig)
    except msgspec.ValidationError as exc:
        where = f"in {path} or the environment" if path is not None else "in the environment"
        raise ConfigError(f"the table client {where} is wrong: {exc}") from exc


resolve(ClientConfig)
