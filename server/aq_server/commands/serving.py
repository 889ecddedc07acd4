"""`serve` and `demo`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

import aq_data
from aq_data.errors import ConfigError, UnavailableError
from aq_server.app import build_app, open_stores
from aq_server.commands.demonstration import demonstrate
from aq_server.config import ServerConfig, load_config
from aq_server.observe import configure_logging

__all__ = ["run_demo", "run_serve", "running"]

log = logging.getLogger("aq_data")

GRACE_SECONDS = 60
"""What was accepted is finished within this time of a request to stop."""


def is_loopback(host: str) -> bool:
    """Whether only this computer can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
        bound.listen(2048)  # from here on nobody is refused, also before the application is ready
    except OSError as exc:
        bound.close()
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {config.port} of {config.host} is taken, maybe by another aq-data; choose one with --port, 0 for any"
            ) from exc
        raise ConfigError(f"cannot listen on {config.host} port {config.port}: {exc.strerror}") from exc
    return bound


class _Server(uvicorn.Server):
    """Ends endless answers before it waits for the others."""

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_streams = end_streams

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_streams()
        await super().shutdown(sockets)


def _server(config: ServerConfig, needs_token: bool) -> uvicorn.Server:
    app = build_app(config, open_stores(config), ask_for_tokens=needs_token)
    return _Server(
        uvicorn.Config(
            app.asgi,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            timeout_keep_alive=75,
        ),
        app.end_streams,
    )


async def _has_token(config: ServerConfig) -> bool:
    stores = open_stores(config)
    try:
        return await stores.tokens.any_active()
    finally:
        await stores.close()


def _needs_token(config: ServerConfig) -> bool:
    """Whether requests must bring tokens; ConfigError when they must and none exists."""
    needed = config.require_token or not is_loopback(config.host)
    try:
        has_none = needed and (config.memory or not asyncio.run(_has_token(config)))
    except UnavailableError as exc:
        # The parts of a cluster start in any order: until the database answers it is not ready, and lets nobody in.
        log.warning("the database does not answer yet; /readyz tells when it does", extra={"fields": {"error": exc.message}})
        return True
    if has_none:
        raise ConfigError(
            f"bound to {config.host} the server needs a token: `aq-data token create NAME --data {config.data}` makes one "
            "(only on loopback may it run open)"
        )
    return needed


def _address(config: ServerConfig, bound: socket.socket) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{bound.getsockname()[1]}"


def run_serve(options: argparse.Namespace) -> int:
    flags = {"host": options.host, "port": options.port, "data": options.data, "memory": options.memory}
    path = Path(options.config) if options.config else None
    config = load_config(path, os.environ, flags).server
    configure_logging(config.log_level)
    needs_token = _needs_token(config)
    # A worker thread gives up the interpreter after this long, not after 5 ms, the tail of small reads beside large ones.
    sys.setswitchinterval(0.0005)
    with contextlib.closing(_bind(config)) as bound:
        server = _server(config, needs_token)
        url = _address(config, bound)
        where = "memory, to be forgotten" if config.memory else str(Path(config.data).expanduser().absolute())
        access = "with tokens" if needs_token else "open to this computer"
        print(f"aq-data serves {where} at {url} ({access}); documentation at {url}/docs; Ctrl-C stops", flush=True)
        server.run(sockets=[bound])
    return 0


@contextlib.contextmanager
def running(config: ServerConfig) -> Iterator[str]:
    """A server in a thread of this process; its address, until the block ends."""
    with contextlib.closing(_bind(config)) as bound:
        server = _server(config, needs_token=False)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="aq-data-server")
        thread.start()
        try:
            yield _address(config, bound)
        finally:
            server.should_exit = True
            thread.join()


def _free_config(data: str, port: int) -> ServerConfig:
    """The first port from `port` on that nobody listens on."""
    for candidate in range(port, port + 100):
        config = ServerConfig(data=data, port=candidate)
        with contextlib.suppress(ConfigError):
            _bind(config).close()
            return config
    raise ConfigError(f"no free port from {port} to {port + 99}")


def run_demo(options: argparse.Namespace) -> int:
    """Stays and serves when a person watches; ends by itself when its output goes elsewhere."""
    config = _free_config(options.data, options.port)
    configure_logging("warning")
    with running(config) as url, aq_data.connect(url) as client:
        stays = sys.stdin.isatty() and sys.stdout.isatty()
        demonstrate(client, url, target=url if stays else options.data)
        if stays:
            print("\nThe server goes on until you press Ctrl-C.", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        else:
            print("\nThe server of the demo has stopped; `aq-data serve` starts one that stays.")
    return 0
