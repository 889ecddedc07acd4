"""The only wiring: use cases, routes and the layers around them, from one configuration."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from litestar import Litestar
from litestar.di import Provide
from litestar.enums import ScopeType
from litestar.middleware.rate_limit import RateLimitConfig
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.routes import HTTPRoute
from litestar.types import ASGIApp, Receive, Scope, Send
from prometheus_client import CollectorRegistry, Gauge, GCCollector, PlatformCollector, ProcessCollector

from aq_data.errors import ConfigError
from aq_server.auth import Guard
from aq_server.config import ServerConfig
from aq_server.deployment import Stores, open_stores
from aq_server.observe import Observer
from aq_server.problems import handle
from aq_server.routes.arrays import ArrayRoutes, ZarrRoutes
from aq_server.routes.bulk import BulkRoutes
from aq_server.routes.datafiles import DataFileRoutes, FileRoutes
from aq_server.routes.docs import ReferencePage
from aq_server.routes.history import ComparisonRoutes, HistoryRoutes
from aq_server.routes.operation import OperationRoutes
from aq_server.routes.search import SearchRoutes
from aq_server.routes.stores import StoreRoutes
from aq_server.routes.sweeps import EventRoutes, SweepRoutes
from aq_server.service.bulk import Bulk
from aq_server.service.columns import Columns
from aq_server.service.comparing import Comparing
from aq_server.service.datafiles import DataFiles
from aq_server.service.draining import Draining
from aq_server.service.folding import Folding
from aq_server.service.following import Following
from aq_server.service.growing import Growing
from aq_server.service.health import Health
from aq_server.service.history import History
from aq_server.service.notices import Notices, parse_secret
from aq_server.service.reading import Reading
from aq_server.service.searching import Searching
from aq_server.service.signals import Signals
from aq_server.service.stores import StoreAdmin
from aq_server.service.sweep_parts import SweepParts
from aq_server.service.sweeps import Sweeps
from aq_server.service.tasks import stop

__all__ = ["Application", "Stores", "build_app", "open_stores"]

_ROUTES = [
    DataFileRoutes,
    BulkRoutes,
    FileRoutes,
    HistoryRoutes,
    ComparisonRoutes,
    ArrayRoutes,
    SearchRoutes,
    ZarrRoutes,
    SweepRoutes,
    EventRoutes,
    StoreRoutes,
    OperationRoutes,
]


@dataclass(frozen=True, slots=True)
class Application:
    """The ASGI application. Opens nothing until its lifespan begins, closes what it opened at its end."""

    asgi: ASGIApp
    litestar: Litestar
    end_streams: Callable[[], None]
    """Ends the streams of those who follow, which would never end by themselves; to be called before a stop."""


def build_app(config: ServerConfig, stores: Stores, *, ask_for_tokens: bool) -> Application:
    """The application over open stores, which it closes when its lifespan ends."""
    registry = CollectorRegistry()
    for collector in (GCCollector, PlatformCollector, ProcessCollector):
        collector(registry=registry)
    signals = Signals()
    growing = Growing(stores.metadata, stores.arrays, config.stale_after)
    folding = Folding(stores.metadata, stores.arrays, signals, Notices(stores.metadata, _webhook_secret(config)))
    datafiles = DataFiles(stores.metadata, stores.arrays, signals)
    reading, searching = Reading(datafiles, growing), Searching(stores.metadata, growing)
    webhooks = frozenset(config.webhooks)
    health = Health(stores.metadata, stores.arrays)
    waiting = Gauge("aq_data_waiting_datafiles", "Lie elsewhere until brought to this store.", ["store"], registry=registry)
    for name in stores.arrays.fallbacks:
        waiting.labels(name).set_function(lambda name=name: health.waiting[name])  # type: ignore[misc]
    draining = Draining(stores.metadata, stores.arrays, health, signals)
    limit = config.max_save_bytes
    sweeps = Sweeps(SweepParts(stores.metadata, stores.arrays, growing, folding, signals, webhooks, limit))
    provided: dict[str, Any] = {
        "growing": growing,
        "sweeps": sweeps,
        "following": Following(stores.metadata, stores.arrays, signals),
        "datafiles": datafiles,
        "history": History(datafiles, growing),
        "comparing": Comparing(datafiles, growing),
        "reading": reading,
        "bulk": Bulk(datafiles, growing),
        "searching": searching,
        "columns": Columns(searching),
        "health": health,
        "stores": StoreAdmin(stores.metadata, stores.arrays, health),
        "config": config,
        "registry": registry,
    }

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        background = [asyncio.create_task(work.run()) for work in (folding, draining)]
        try:
            yield
        finally:
            signals.stop()
            await stop(background)
            await folding.close()
            await draining.close()
            await health.close()
            await stores.close()

    app = Litestar(
        route_handlers=_ROUTES,
        dependencies={name: Provide(_constant(value), sync_to_thread=False) for name, value in provided.items()},
        exception_handlers={Exception: handle},
        lifespan=[lifespan],
        middleware=[RateLimitConfig(rate_limit=("second", config.rate_limit)).middleware] if config.rate_limit else [],
        openapi_config=_openapi(),
        logging_config=None,
        request_max_body_size=1 << 20,  # of routes that read no body; the others limit their own
    )
    guarded = Guard(
        _answering_options(app), stores.tokens.check if ask_for_tokens else None, (config.host, *config.allowed_hosts)
    )
    return Application(Observer(guarded, registry), app, signals.stop)


def _answering_options(app: Litestar) -> ASGIApp:
    """`app`, with OPTIONS answered from all handlers of an address; Litestar's own answer names only the first of them."""
    methods: dict[str, set[str]] = {}
    for route in app.routes:
        if isinstance(route, HTTPRoute):
            methods.setdefault(route.path_format, set()).update(map(str, route.methods))
    # A key of the Zarr view has slashes, every other part of an address has none. What is spelt out goes first: `bulk` is
    # no id.
    patterns = [
        (re.compile(re.sub(r"\{key\}", ".+", re.sub(r"\{(?!key\})[^}]+\}", "[^/]+", path))), allowed | {"OPTIONS"})
        for path, allowed in sorted(methods.items(), key=lambda item: item[0].count("{"))
    ]

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        allowed: set[str] = set()
        if scope["type"] == ScopeType.HTTP and scope.get("method") == "OPTIONS":
            allowed = next((names for pattern, names in patterns if pattern.fullmatch(scope["path"])), set())
        if not allowed:
            await app(scope, receive, send)
            return
        if "GET" in allowed:
            allowed = allowed | {"HEAD"}
        headers = [(b"allow", ", ".join(sorted(allowed)).encode("ascii"))]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return answer


def _webhook_secret(config: ServerConfig) -> bytes | None:
    for address in config.webhooks:
        if not re.match(r"https?://[^/]", address):
            raise ConfigError(f"webhooks takes http and https addresses, not {address!r}")
    if not config.webhooks:
        return None
    if config.webhook_secret_file is None:
        raise ConfigError("webhooks needs webhook_secret_file, a file with the secret that signs them")
    try:
        return parse_secret(Path(config.webhook_secret_file).expanduser().read_text())
    except OSError as exc:
        raise ConfigError(f"webhook_secret_file {config.webhook_secret_file} cannot be read: {exc.strerror}") from exc


def _constant(value: Any) -> Any:
    def provide() -> Any:
        return value

    return provide


def _openapi() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="aq-data",
        version=version("aq-data"),
        description="The data server of a measurement lab: save DataFiles, find them by any setting, read slices.",
        path="/docs",
        render_plugins=[ReferencePage(path="/"), JsonRenderPlugin(path="/openapi.json")],
    )
