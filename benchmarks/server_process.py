"""A server as a process: started on a free port, awaited, ended by its own id."""

import http.client
import os
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep

__all__ = ["ServerFailedError", "ServerKind", "ServerProcess", "quiet_environment"]

START_LIMIT = 60.0
"""Seconds; Tiled needs five to nine of them."""
STOP_LIMIT = 20.0
POLL = 0.005


class ServerFailedError(RuntimeError):
    """The server ended, or did not answer in time; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class ServerKind:
    """How one sort of server is started."""

    command: Callable[[int, Path], list[str]]
    """The arguments, for a port and the folder that holds its data."""
    ready: str
    """The path that answers 200 once the server is up."""
    environment: dict[str, str] = field(default_factory=dict)


class ServerProcess:
    """One server and its data folder; `start` after `stop` brings the same data back on a new port."""

    def __init__(self, kind: ServerKind, folder: Path) -> None:
        self._kind = kind
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerFailedError("the server is not running")
        return self._process.pid

    def start(self) -> float:
        """Return the seconds from the start of the process to its first 200."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._port = _free_port()
        with self._log_path.open("ab") as log:
            start = perf_counter()
            self._process = subprocess.Popen(
                self._kind.command(self._port, self._folder),
                env=quiet_environment(self._folder) | self._kind.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        while not self._answers():
            if self._process.poll() is not None or perf_counter() - start > START_LIMIT:
                self.stop()
                tail = self._log_path.read_text(errors="replace")[-2000:]
                raise ServerFailedError(f"no answer from {self._kind.ready}:\n{tail}")
            sleep(POLL)
        return perf_counter() - start

    def stop(self) -> None:
        """Ask it to end, and kill it if it does not. Harmless when it is not running."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def _log_path(self) -> Path:
        return self._folder.with_suffix(".log")

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", self._kind.ready)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def quiet_environment(home: Path) -> dict[str, str]:
    """This process's environment without anybody's settings: no configuration files, no aq-data or Tiled variables,
    no proxy between two processes of one machine.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AQ_DATA", "TILED_", "XDG_"))}
    return kept | {"HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
