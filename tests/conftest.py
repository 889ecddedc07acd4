"""Fixtures that many tests share: a client of each deployment, and a real server process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aq_server.commands.serving import running
from hypothesis import HealthCheck, settings
from services import buckets as bucket_service
from services import mongo as mongo_service
from services.deployment import PATIENCE, PRODUCTION, SOAK, WAYS, Production, deployed, environment, opened
from services.proxying import HttpProxy

import aq_data

SERVICES = os.environ.get("AQ_DATA_SERVICES", "")
"""Any value runs the tests that need a service if it is there; with "required" one that is not there is a failure."""

OWN_VARIABLES = {f"AQ_DATA_{word}" for word in ("SOAK", "SERVICES", "MONGO", "GCS", "S3")}

settings.register_profile(
    "default", max_examples=60, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
# The same walks over services take longer; their breadth is that of the embedded run.
settings.register_profile("production", settings.get_profile("default"), max_examples=15)
settings.register_profile("soak", settings.get_profile("default"), max_examples=5000)
settings.load_profile("soak" if SOAK else "production" if PRODUCTION else "default")


def pytest_collection_modifyitems(config, items):
    lacks_services = SERVICES != "required" and not (SERVICES and mongo_service.is_there() and bucket_service.are_there())
    for item in items:
        if not SOAK and "soak" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="a long run; `make soak` has it"))
        if lacks_services and "services" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a service: `make services`, then `make test-services`"))
    if PRODUCTION:
        dropped = [item for item in items if item.get_closest_marker("embedded")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not item.get_closest_marker("embedded")]
        for item in items:
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(PATIENCE * int(config.getini("timeout"))))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No configuration or token of the machine reaches a test."""
    for name in list(os.environ):
        if name.startswith(("AQ_DATA_", "AWS_", "GOOGLE_")) and name not in OWN_VARIABLES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture(scope="session")
def mongo() -> Iterator[str]:
    """The address of a MongoDB for this run."""
    with mongo_service.running() as url:
        yield url


@pytest.fixture(scope="session")
def _mongo_room(mongo: str) -> Iterator[mongo_service.Room]:
    with contextlib.closing(mongo_service.Room(mongo)) as room:
        yield room


@pytest.fixture
def mongo_room(_mongo_room: mongo_service.Room) -> mongo_service.Room:
    """An empty database, by `name`, which `clear` empties again."""
    _mongo_room.clear()
    return _mongo_room


@pytest.fixture
def mongo_database(mongo_room: mongo_service.Room) -> str:
    """The name of an empty database."""
    return mongo_room.name


@pytest.fixture(scope="session")
def gcs() -> Iterator[bucket_service.Bucket]:
    """A bucket of a server that speaks as Google Cloud Storage does, for this run."""
    with bucket_service.gcs_running() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def s3() -> Iterator[bucket_service.Bucket]:
    """A bucket of a server that speaks S3, for this run."""
    with bucket_service.s3_running() as bucket:
        yield bucket


@pytest.fixture(params=["gcs", "s3"])
def bucket(request: pytest.FixtureRequest) -> bucket_service.Bucket:
    """An empty place in a bucket, of either kind."""
    return request.getfixturevalue(request.param).place()


@pytest.fixture(scope="session", autouse=True)
def _production(request: pytest.FixtureRequest) -> Iterator[Production | None]:
    """The services that the deployments of this run stand on; none when they are embedded."""
    if not PRODUCTION:
        yield None
        return
    mongo, buckets = request.getfixturevalue("mongo"), [request.getfixturevalue(name) for name in ("gcs", "s3")]
    with Production(mongo, buckets) as production:
        yield production


@pytest.fixture(scope="module", autouse=True)
def _lent_to_a_module(_production: Production | None) -> Iterator[None]:
    yield
    if _production is not None:
        _production.give_back()


@pytest.fixture(autouse=True)
def _lent_to_a_test(request: pytest.FixtureRequest, _production: Production | None) -> Iterator[None]:
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if _production is not None and folder is not None:
        _production.give_back(folder)


@pytest.fixture
def proxied(bucket: bucket_service.Bucket) -> Iterator[tuple[bucket_service.Bucket, HttpProxy]]:
    """The same through a proxy that counts and misbehaves."""
    with bucket.behind_proxy() as pair:
        yield pair


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a deployment of its own; commands that are given it as `--data` find the rest in the environment."""
    folder = tmp_path / "data"
    for name, text in environment(folder).items():
        monkeypatch.setenv(name, text)
    return folder


@pytest.fixture
def server(data: Path) -> Iterator[str]:
    """The address of a server in this process over `data`."""
    with running(deployed(data)) as url:
        yield url


@pytest.fixture(params=WAYS)
def client(request: pytest.FixtureRequest, data: Path) -> Iterator[aq_data.Client]:
    """A client over `data`: of a server over a socket, and of the folder itself."""
    with opened(data, request.param) as client:
        yield client


class ServerProcess:
    """`aq-data serve` as a process of its own, which a test may kill."""

    def __init__(self, data: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "aq_server", "serve", "--data", str(data), "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+?:\d+", line)
        if found is None:
            self.process.kill()
            raise AssertionError(f"the server did not start: {line}{self.process.communicate()}")
        self.url = found[0]

    def kill(self) -> None:
        """As power loss would: no handler runs."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def stop(self) -> str:
        """Ask to stop; what it logged."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=30)[1]


@pytest.fixture
def serve(data: Path):
    """Starts server processes over `data`; those still running at the end are stopped."""
    started: list[ServerProcess] = []

    def start(*flags: str, **options) -> ServerProcess:
        started.append(ServerProcess(data, *flags, **options))
        return started[-1]

    yield start
    for process in started:
        process.stop()
