"""The sides of a run: which server, which driver, and what each has stored so far."""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bucket_requests import count_requests
from benchmarks.clusters import Cluster, running
from benchmarks.driver_process import DriverProcess
from benchmarks.measurements import Figures
from benchmarks.peer import Options
from benchmarks.server_process import ServerKind, ServerProcess
from benchmarks.workloads import Scale, Stored

__all__ = ["AQ_SERVER", "SIDES", "TILED_KEY", "Side", "open_sides", "tiled_server"]

SIDES = ("aq", "aq-gcs", "aq-gcs-two", "aq-s3", "tiled", "tiled-tuned", "zarr", "route")
TILED_KEY = "benchmark"
"""The single-user key of a server that lives for minutes, on loopback."""


@dataclass(frozen=True)
class Contestant:
    """What distinguishes one side: its server, the interpreter of its client, what that client connects with."""

    peer: str
    python: str
    server: ServerKind | None
    options: Options
    deployment: str
    """Name of the folder of its servers: sides of one deployment share them."""
    servers: int = 1
    cluster: Cluster | None = None


class Side:
    """One contestant at work. Arrays are stored when a workload first needs them, and kept for the next one."""

    def __init__(self, contestant: Contestant, folder: Path, scale: Scale, servers: list[ServerProcess]) -> None:
        self.scale = scale
        self.name = folder.name
        self._contestant = contestant
        self._folder = folder
        self._servers = servers
        self._drivers: list[DriverProcess] = []
        self._small: list[Stored] = []
        self._large: Stored | None = None
        self._servers_tried = 0

    @property
    def server(self) -> ServerProcess:
        assert self._servers, "a floor in one process has no server"
        return self._servers[0]

    def driver(self, number: int = 0) -> DriverProcess:
        """The side's first driver, or its second (a client that works while the first one does)."""
        while len(self._drivers) <= number:
            self._drivers.append(self.new_driver())
        return self._drivers[number]

    def new_driver(self) -> DriverProcess:
        """One that belongs to the caller, connected to wherever the server listens now, and warm."""
        urls = [server.url for server in self._servers] or [str(self._folder)]
        options = self._contestant.options | {"url": urls[0]}
        if len(urls) > 1:
            options["urls"] = urls
        log = self._folder.with_name(f"{self._folder.name}-driver.log")
        driver = DriverProcess(self._contestant.python, self._contestant.peer, options, log)
        try:
            driver.ask("warm_up")
        except BaseException:
            driver.stop()
            raise
        return driver

    def new_server(self) -> ServerProcess:
        """Another of the same kind over an empty folder, not started; it belongs to the caller."""
        assert self._contestant.server is not None
        self._servers_tried += 1
        folder = self._folder.with_name(f"{self._folder.name}-empty-{self._servers_tried}")
        return ServerProcess(self._contestant.server, folder)

    def count_requests(self) -> Figures:
        """To the bucket, of a server of its own."""
        assert self._contestant.cluster is not None, "an embedded server has no bucket"
        folder = self._folder.with_name(f"{self._folder.name}-counted")
        return count_requests(self._contestant.cluster, folder, self.scale.points, self.scale.rows)

    def save_files(self, seed: int) -> Figures:
        answer = self.driver().ask("save_files", count=self.scale.files, points=self.scale.points, seed=seed)
        self._small = [Stored.from_json(array) for array in answer["stored"]]
        figures: Figures = answer["figures"]
        return figures

    def save_array(self, seed: int) -> Figures:
        """Save the large array anew, then discard the one before it."""
        answer = self.driver().ask("save_array", shape=self.scale.cube, seed=seed)
        if self._large is not None:
            self.driver().ask("discard_array", path=self._large.path)
        self._large = Stored.from_json(answer["stored"])
        figures: Figures = answer["figures"]
        return figures

    def small_arrays(self) -> list[dict[str, Any]]:
        """Some small arrays, one of a file each, as JSON for a driver."""
        if not self._small:
            self.save_files(seed=0)
        return [array.to_json() for array in self._small[:20]]

    def large_array(self) -> dict[str, Any]:
        if self._contestant.peer == "route":
            return Stored("box", self.scale.cube, None).to_json()
        if self._large is None:
            self.save_array(seed=0)
        assert self._large is not None
        return self._large.to_json()

    def stop_drivers(self) -> None:
        """They start again when next needed."""
        for driver in self._drivers:
            driver.stop()
        self._drivers.clear()


def open_sides(names: list[str], folder: Path, scale: Scale, tiled: Path | None, stack: ExitStack) -> dict[str, Side]:
    """Start the servers of these sides, one each but for Tiled's two; `stack` ends all they start.

    `tiled` is the interpreter of Tiled's environment; it may be None when no side is Tiled's.
    """
    servers: dict[tuple[str, int], ServerProcess] = {}
    clusters: dict[str, Cluster] = {}
    sides = {}
    for name in names:
        contestant = _contestant(name, scale, tiled, clusters, stack)
        used = []
        for number in range(contestant.servers if contestant.server else 0):
            key = (contestant.deployment, number)
            if key not in servers:
                assert contestant.server is not None
                servers[key] = ServerProcess(contestant.server, folder / contestant.deployment)
                stack.callback(servers[key].stop)
                servers[key].start()
            used.append(servers[key])
        sides[name] = Side(contestant, folder / name, scale, used)
        stack.callback(sides[name].stop_drivers)
    return sides


def _contestant(name: str, scale: Scale, tiled: Path | None, clusters: dict[str, Cluster], stack: ExitStack) -> Contestant:
    match name:
        case "aq":
            return Contestant("aq", sys.executable, AQ_SERVER, {}, "aq")
        case "aq-gcs" | "aq-gcs-two" | "aq-s3":
            services = name.removesuffix("-two")
            if services not in clusters:
                clusters[services] = stack.enter_context(running(services))
            cluster, servers = clusters[services], 1 if name == services else 2
            return Contestant("aq", sys.executable, cluster.server, {}, services, servers, cluster)
        case "route":
            return Contestant("route", sys.executable, ServerKind(_route_command, "/box"), {}, "route")
        case "zarr":
            return Contestant("zarr", sys.executable, None, {}, "zarr")
        case "tiled" | "tiled-tuned":
            assert tiled is not None
            chunks = scale.tuned_chunks if name == "tiled-tuned" else None
            return Contestant("tiled", str(tiled), tiled_server(tiled), {"api_key": TILED_KEY, "chunks": chunks}, "tiled")
    raise ValueError(f"no side is called {name!r}; there are {', '.join(SIDES)}")


def _aq_command(port: int, folder: Path) -> list[str]:
    return [sys.executable, "-m", "aq_server", "serve", *_address(port), "--data", str(folder)]


AQ_SERVER = ServerKind(_aq_command, "/healthz")


def _route_command(port: int, _folder: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.route_floor", str(port)]


def tiled_server(python: Path) -> ServerKind:
    """As its documentation starts one: SQLite catalogue and local files; no streaming cache, which would only cost."""

    def command(port: int, folder: Path) -> list[str]:
        storage = [str(folder / "catalog.db"), "--init", "--write", str(folder / "data")]
        return [str(python.with_name("tiled")), "serve", "catalog", *storage, *_address(port)]

    return ServerKind(command, "/healthz", {"TILED_SINGLE_USER_API_KEY": TILED_KEY})


def _address(port: int) -> list[str]:
    return ["--host", "127.0.0.1", "--port", str(port)]
