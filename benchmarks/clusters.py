"""The production deployment on one machine: MongoDB, a bucket, and servers over both; `make services` first."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.server_process import ServerKind

__all__ = ["CLUSTERS", "Cluster", "running"]

CLUSTERS = ("aq-gcs", "aq-s3")
"""By the bucket they keep arrays in."""


@dataclass(frozen=True)
class Cluster:
    """What any number of servers share: the address of a MongoDB, and a bucket of the tests' kind."""

    mongo: str
    bucket: Any

    @property
    def server(self) -> ServerKind:
        """Servers over one folder share a database and a place in the bucket, both named after it."""
        return ServerKind(self._command, "/healthz")

    @contextmanager
    def behind_proxy(self) -> Iterator[tuple["Cluster", Any]]:
        """The same with a proxy before the bucket that counts requests and can hold them back."""
        with self.bucket.behind_proxy() as (bucket, proxy):
            yield Cluster(self.mongo, bucket), proxy

    def _command(self, port: int, folder: Path) -> list[str]:
        options = {name: value for name in ("endpoint", "region", "credentials_file", "anonymous")
                   if (value := getattr(self.bucket.options, name))}  # fmt: skip
        store = {"url": f"{self.bucket.url}/{folder.name}", **options}
        server = {"mongo": self.mongo, "mongo_database": folder.name, "stores": {"default": store}, "data": str(folder)}
        config = folder / f"{port}.json"
        config.write_text(json.dumps({"server": server}))
        address = ["--host", "127.0.0.1", "--port", str(port)]
        return [sys.executable, "-m", "aq_server", "serve", *address, "--config", str(config)]


@contextmanager
def running(name: str) -> Iterator[Cluster]:
    """The services of one of `CLUSTERS`, as the tests start them, for as long as the block."""
    tests = str(Path(__file__).parents[1] / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    from services import buckets, mongo  # type: ignore[import-not-found]  # beside the tests

    start = {"aq-gcs": buckets.gcs_running, "aq-s3": buckets.s3_running}[name]
    with mongo.running() as url, start() as bucket:
        yield Cluster(url, bucket)
