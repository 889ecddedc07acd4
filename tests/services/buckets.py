"""Buckets for tests: servers that speak as Google Cloud Storage and S3 do, as local processes or in containers.

fake-gcs-server and versitygw; `AQ_DATA_GCS=docker` and `AQ_DATA_S3=docker` take them from their images.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from aq_server.config import StoreConfig
from services.fetch import GCS, S3, missing
from services.proxying import HttpProxy

from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.bucket import BucketOptions, open_bucket

__all__ = ["ACCESS_KEY", "SECRET_KEY", "Bucket", "are_there", "gcs_running", "s3_running"]

ACCESS_KEY, SECRET_KEY = "laboratory", "not-a-secret-of-anybody"
NAME = "test-bucket"
DEADLINE = 60.0


@dataclass(frozen=True)
class Bucket:
    """Where a bucket is: its address, how it is reached, and the folder in which its server keeps it."""

    url: str
    options: BucketOptions
    folder: Path

    def place(self) -> Bucket:
        """An empty place in it."""
        name = uuid.uuid4().hex
        return replace(self, url=f"{self.url}/{name}", folder=self.folder / name)

    @contextmanager
    def behind_proxy(self) -> Iterator[tuple[Bucket, HttpProxy]]:
        """The same bucket through a proxy, which ends with the block."""
        assert self.options.endpoint is not None
        with contextlib.closing(HttpProxy(self.options.endpoint)) as proxy:
            yield replace(self, options=msgspec.structs.replace(self.options, endpoint=proxy.url)), proxy

    def open(self) -> BlobStore:
        """The blobs there."""
        return open_bucket(self.url, self.options)

    def as_default(self) -> dict[str, StoreConfig]:
        """The named stores of a server that keeps its blobs there."""
        return {"default": StoreConfig(url=self.url, **msgspec.structs.asdict(self.options))}

    @property
    def storage_options(self) -> dict[str, object]:
        """What other programs need to be told to find it with fsspec."""
        if self.url.startswith("gs:"):
            return {"endpoint_url": self.options.endpoint, "token": "anon"}
        return {"endpoint_url": self.options.endpoint, "key": ACCESS_KEY, "secret": SECRET_KEY}


def are_there() -> bool:
    """Whether both can be run."""
    return not any(missing(name) for name in ("gcs", "s3") if os.environ.get(f"AQ_DATA_{name.upper()}") != "docker")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _process(command: Sequence[str], port: int, environment: dict[str, str]) -> Iterator[None]:
    """A server that listens on its port, and ends with the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})
        try:
            until = time.monotonic() + DEADLINE
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > until:
                        log.seek(0)
                        raise AssertionError(f"{command[0]} did not start: {log.read().decode()}") from None
                    time.sleep(0.01)
            yield
        finally:
            process.kill()
            process.wait()


@contextmanager
def gcs_running() -> Iterator[Bucket]:
    """An empty bucket of a fresh fake-gcs-server, which goes with the block."""
    with tempfile.TemporaryDirectory(prefix="aq-data-gcs-", ignore_cleanup_errors=True) as folder:
        Path(folder, NAME).mkdir()
        if os.environ.get("AQ_DATA_GCS") == "docker":
            from testcontainers.core.container import DockerContainer

            port = _free_port()  # the address is part of what it answers
            options = f"-scheme http -port 4443 -filesystem-root /data -external-url http://127.0.0.1:{port}"
            container = DockerContainer(f"fsouza/fake-gcs-server:{GCS.name.rpartition('-')[2]}").with_command(options)
            with container.with_bind_ports(4443, port).with_volume_mapping(folder, "/data", "rw"):
                _wait_for(port)
                yield _gcs_bucket(port, folder)
            return
        _demand("gcs")
        port = _free_port()
        address = f"http://127.0.0.1:{port}"
        command = [
            str(GCS / "fake-gcs-server"),
            "-scheme",
            "http",
            "-host",
            "127.0.0.1",
            "-port",
            str(port),
            "-external-url",
        ]
        command += [address, "-filesystem-root", folder, "-log-level", "warn"]
        with _process(command, port, {}):
            yield _gcs_bucket(port, folder)


@contextmanager
def s3_running() -> Iterator[Bucket]:
    """An empty bucket of a fresh versitygw, which goes with the block."""
    keys = {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    with tempfile.TemporaryDirectory(prefix="aq-data-s3-", ignore_cleanup_errors=True) as folder:
        Path(folder, "buckets", NAME).mkdir(parents=True)
        if os.environ.get("AQ_DATA_S3") == "docker":
            from testcontainers.core.container import DockerContainer

            container = DockerContainer(f"versity/versitygw:v{S3.name.rpartition('-')[2]}").with_exposed_ports(7070)
            container = container.with_volume_mapping(f"{folder}/buckets", "/data", "rw").with_envs(**keys)
            with container.with_command("--keep-alive posix /data") as running:
                port = int(running.get_exposed_port(7070))
                _wait_for(port)
                yield _s3_bucket(port, folder)
            return
        _demand("s3")
        port = _free_port()
        command = [
            str(S3 / "versitygw"),
            "--port",
            f"127.0.0.1:{port}",
            "--quiet",
            "--keep-alive",
            "posix",
            f"{folder}/buckets",
        ]
        with _process(command, port, keys):
            yield _s3_bucket(port, folder)


def _demand(service: str) -> None:
    absent = missing(service)
    assert not absent, f"{', '.join(absent)} is not there: run `make services`"


def _wait_for(port: int) -> None:
    """Until what is in a container accepts connections there, and does not drop them at once."""
    until = time.monotonic() + DEADLINE
    while time.monotonic() < until:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                if connection.recv(1):
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"nothing answers at port {port}")


def _gcs_bucket(port: int, folder: str) -> Bucket:
    options = BucketOptions(endpoint=f"http://127.0.0.1:{port}", anonymous=True)
    return Bucket(f"gs://{NAME}", options, Path(folder, NAME))


def _s3_bucket(port: int, folder: str) -> Bucket:
    credentials = Path(folder, "credentials")
    credentials.write_text(f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    credentials.chmod(0o600)
    options = BucketOptions(endpoint=f"http://127.0.0.1:{port}", region="us-east-1", credentials_file=str(credentials))
    return Bucket(f"s3://{NAME}", options, Path(folder, "buckets", NAME))
