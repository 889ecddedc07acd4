"""From an address or a folder to a client."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import httpx

from aq_data.client.client import Client
from aq_data.client.connections import Source, open_server, request_headers
from aq_data.client.http import TIMEOUT, Http
from aq_data.client.inprocess import AppTransport
from aq_data.configfile import ClientConfig, client_config
from aq_data.errors import ConfigError

__all__ = ["DEFAULT_URL", "connect", "open_client", "target_of"]

DEFAULT_URL = "http://127.0.0.1:5000"


def connect(target: str | os.PathLike[str] | None = None, *, token: str | None = None) -> Client:
    """A client of the server at an address, or of a folder, which needs no server (the embedded mode).

    Without `target`: the environment variable AQ_DATA_URL, else `client.url` of the configuration file, else
    http://127.0.0.1:5000. `token`: else AQ_DATA_TOKEN, else the configured `token_file`. Raises UnavailableError when
    nothing answers, or something that is not aq-data; ConfigError when the embedded mode lacks the [server] extra.
    What processes that died left in the spool for this target is delivered in the background.
    """
    configured = client_config()
    chosen = _chosen(target, configured)
    secret = token or os.environ.get("AQ_DATA_TOKEN")
    if secret is None and chosen == configured.url:
        secret = _token_from(configured.token_file)  # only to whom it was meant for
    client = open_client(_normal(chosen), secret)
    client.deliver_in_background()
    return client


def target_of(target: str | os.PathLike[str] | None) -> str:
    """The address or the absolute folder that `connect` would take."""
    return _normal(_chosen(target, client_config()))


def open_client(target: str, token: str | None) -> Client:
    """A client of an address or an absolute folder, that leaves the spool alone."""
    source = Source(target, token, open_server if "://" in target else open_folder)
    return Client(source.http(hold=True), source)


def _chosen(target: str | os.PathLike[str] | None, configured: ClientConfig) -> str:
    if target is not None:
        return os.fspath(target)
    return os.environ.get("AQ_DATA_URL") or configured.url or DEFAULT_URL


def _normal(target: str) -> str:
    if "://" in target:
        return re.sub(r"(?<=[^/:])/+$", "", target)
    if re.fullmatch(r"[\w.-]+:\d{1,5}", target):
        raise ConfigError(f"{target!r} is neither an address nor a folder; write http://{target}")
    if Path(target).expanduser().is_file():
        raise ConfigError(f"{target!r} is a file; connect to a folder or to an address such as {DEFAULT_URL}")
    return str(Path(target).expanduser().absolute())


def _token_from(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text().strip()
    except OSError as exc:
        raise ConfigError(f"the token file {path} cannot be read: {exc.strerror}") from exc


def open_folder(target: str, token: str | None) -> Http:
    """The embedded mode: a connection to a server of this process's own, over the folder."""
    transport = AppTransport(lambda: _embedded_app(target))
    client = httpx.Client(base_url="http://localhost", headers=request_headers(token), transport=transport, timeout=TIMEOUT)
    return Http(client)


def _embedded_app(folder: str) -> Any:
    try:
        from aq_server.app import build_app, open_stores
        from aq_server.config import ServerConfig
    except ImportError as exc:
        raise ConfigError(
            f"opening a folder without a server needs the extra: pip install 'aq-data[server]' ({exc.name} is missing)"
        ) from exc
    # Whoever embeds decides where the log goes; without a word of theirs it goes nowhere.
    logging.getLogger("aq_data").addHandler(logging.NullHandler())
    config = ServerConfig(data=folder)
    return build_app(config, open_stores(config), ask_for_tokens=False).asgi
