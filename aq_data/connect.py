"""From an address or a folder to a client."""

from __future__ import annotations

import atexit
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import msgspec

from aq_data.client.client import Client
from aq_data.client.http import TIMEOUT, Http
from aq_data.client.inprocess import AppTransport
from aq_data.client.source import Source
from aq_data.errors import ConfigError, UnavailableError
from aq_data.wire.routes import SERVER_NAME

__all__ = ["connect"]

DEFAULT_URL = "http://127.0.0.1:5000"

_lock = threading.Lock()
# Connections of this process, by process id too: after a fork neither sockets nor the embedded thread may be shared.
_shared: dict[tuple[int, str, str | None], tuple[Http, int]] = {}


def connect(target: str | os.PathLike[str] | None = None, *, token: str | None = None) -> Client:
    """A client of the server at an address, or of a folder, which needs no server (the embedded mode).

    Without `target`: the environment variable AQ_DATA_URL, else `client.url` of the configuration file, else
    http://127.0.0.1:5000. `token`: else AQ_DATA_TOKEN, else the configured `token_file`. Raises UnavailableError when
    nothing answers, or something that is not aq-data; ConfigError when the embedded mode lacks the [server] extra.
    """
    configured = {} if target is not None and token is not None else _client_table()
    chosen = os.fspath(target) if target is not None else os.environ.get("AQ_DATA_URL") or configured.get("url") or DEFAULT_URL
    secret = token or os.environ.get("AQ_DATA_TOKEN") or _token_from(configured.get("token_file"))
    source = Source(_normal(chosen), secret)
    return Client(shared_http(source.target, source.token, hold=True), source)


def _normal(target: str) -> str:
    if "://" in target:
        return target.rstrip("/")
    return str(Path(target).expanduser().absolute())


def _client_table() -> dict[str, Any]:
    named = os.environ.get("AQ_DATA_CONFIG")
    folder = Path.home() / ".aq_config"
    for path in [Path(named)] if named else [folder / "data_server.json", folder / "data_server.toml"]:
        if path.is_file():
            try:
                content = path.read_bytes()
                decoded = msgspec.toml.decode(content) if path.suffix == ".toml" else msgspec.json.decode(content)
                return dict(decoded.get("client", {}))
            except (msgspec.DecodeError, AttributeError, TypeError, ValueError) as exc:
                raise ConfigError(f"the configuration {path} cannot be used: {exc}") from exc
    return {}


def _token_from(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text().strip()
    except OSError as exc:
        raise ConfigError(f"the token file {path} cannot be read: {exc.strerror}") from exc


def shared_http(target: str, token: str | None, *, hold: bool = False) -> Http:
    """This process's connection to a target, made once. `hold` counts a client that will `release` it."""
    key = (os.getpid(), target, token)
    with _lock:
        known = _shared.get(key)
        http, holders = known if known is not None else (_open(target, token), 0)
        _shared[key] = (http, holders + hold)
        return http


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


def _open(target: str, token: str | None) -> Http:
    headers = {"User-Agent": "aq-data-python"} | ({"Authorization": f"Bearer {token}"} if token else {})
    if "://" in target:
        http = Http(httpx.Client(base_url=target, headers=headers, timeout=TIMEOUT, follow_redirects=False))
        _check_server(http, target)
        return http
    transport = AppTransport(lambda: _embedded_app(target))
    return Http(httpx.Client(base_url="http://localhost", headers=headers, transport=transport, timeout=TIMEOUT))


def _check_server(http: Http, target: str) -> None:
    try:
        answer = http.request("GET", "/healthz")
    except BaseException:
        http.client.close()
        raise
    if answer.headers.get("server") != SERVER_NAME:
        http.client.close()
        raise UnavailableError(f"what answers at {target} is not an aq-data server; `aq-data serve` starts one")


def _embedded_app(folder: str) -> Any:
    try:
        from aq_server.app import build_app, open_stores
        from aq_server.config import ServerConfig
    except ImportError as exc:
        raise ConfigError(
            f"opening a folder without a server needs the extra: pip install 'aq-data[server]' ({exc.name} is missing)"
        ) from exc
    config = ServerConfig(data=folder)
    return build_app(config, open_stores(config), ask_for_tokens=False).asgi
