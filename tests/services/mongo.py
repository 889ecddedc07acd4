"""MongoDB for tests: its own engine as a local process, or `mongo:8` in a container with `AQ_DATA_MONGO=docker`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.fetch import LIBC, MONGO, libc_is_old, missing

__all__ = ["Engine", "Room", "is_there", "running"]

IN_DOCKER = os.environ.get("AQ_DATA_MONGO") == "docker"
FRONT = Path(__file__).parent / "mongo" / "front.js"


def is_there() -> bool:
    """Whether `running` has something to run."""
    return IN_DOCKER or not missing("mongo")


class Engine:
    """The engine on a folder, in a process of its own that a test may kill; several may run, each on its folder."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        """Returns once it answers; `port` 0 takes any free one."""
        command = [_node(), str(FRONT), str(folder), str(port)]
        if libc_is_old():
            [loader] = LIBC.glob("usr/lib/*/ld-linux-*.so.*")
            command = [str(loader), "--library-path", str(loader.parent), *command]
        environment = {**os.environ, "ENGINE_MODULES": str(MONGO)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip().isdigit():
            self._process.kill()
            raise AssertionError(f"MongoDB's engine did not start: {line}{self._process.communicate()[1]}")
        self.port = int(line)
        # It has neither sessions nor other members: nothing to discover, no retries by the driver. It waits for its
        # journal when `w` is 1; with "majority", which of one is one, it does not, and loses milliseconds when killed.
        self.url = f"mongodb://127.0.0.1:{self.port}/?directConnection=true&retryWrites=false&w=1&journal=true"

    def pause(self) -> None:
        """Stop it where it stands: its connections stay open, and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As power loss would: no handler runs, and what was acknowledged is on disk."""
        self._process.kill()
        self._process.communicate()


class Room:
    """A database for one test after another: emptying it costs a hundredth of making one with its indexes."""

    def __init__(self, url: str) -> None:
        import pymongo

        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self._client: pymongo.MongoClient[dict[str, object]] = pymongo.MongoClient(url)

    def close(self) -> None:
        self._client.close()

    def count(self, collection: str) -> int:
        """How many documents there are."""
        return self._client[self.name][collection].count_documents({})

    def remove(self, collection: str, pattern: str) -> None:
        """Forget the documents whose ids match."""
        self._client[self.name][collection].delete_many({"_id": {"$regex": pattern}})

    def dump(self) -> Iterator[bytes]:
        """Every document, as BSON."""
        from bson.raw_bson import RawBSONDocument

        database = self._client.get_database(
            self.name, self._client.codec_options.with_options(document_class=RawBSONDocument)
        )
        for name in database.list_collection_names():
            yield from (document.raw for document in database[name].find())

    def clear(self) -> None:
        """Forget every document."""
        database = self._client[self.name]
        for name in database.list_collection_names():
            database[name].delete_many({})


def _node() -> str:
    found = shutil.which("node")
    assert found, "Node 20 or later is not installed; install it, or with Docker set AQ_DATA_MONGO=docker"
    return found


@contextmanager
def running() -> Iterator[str]:
    """The address of a fresh MongoDB, which goes with the block."""
    if IN_DOCKER:
        from testcontainers.community.mongodb import MongoDbContainer

        with MongoDbContainer("mongo:8") as container:
            yield container.get_connection_url()
        return
    if missing("mongo"):
        raise AssertionError(f"{', '.join(missing('mongo'))} is not there: run `make services`")
    # Not pytest's folder: that keeps the last three runs, and a database is preallocated megabytes.
    with tempfile.TemporaryDirectory(prefix="aq-data-mongo-", ignore_cleanup_errors=True) as folder:
        engine = Engine(Path(folder))
        try:
            yield engine.url
        finally:
            engine.kill()
