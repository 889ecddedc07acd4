"""The real server, with folding made eager and slow; it may kill itself at a step of folding.

    python sweep_server.py '{"folding": {"FOLD_BLOCKS": 8}, "slow": 0.02, "die_at": 17, "seed": 1, "steps": "<file>"}' serve …

Everything after the first argument is the command line of `aq-data`. `steps` is told the step at which it died, or, with
`stop_at`, at which it stopped itself (SIGSTOP).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import aq_server.deployment
import aq_server.service.folding
from aq_server.__main__ import main

import aq_data.storage.arrays.folding
from aq_data.storage.arrays._bucket_blobs import BucketBlobs
from aq_data.storage.arrays.folder import FolderBlobs
from aq_data.storage.metadata._mongo_sweeps import MongoSweeps
from aq_data.storage.metadata._sweeps import SqliteSweeps
from aq_data.storage.metadata.sqlite import SqliteStore

STEPS = [
    *(
        (kind, name)
        for kind in (FolderBlobs, BucketBlobs)
        for name in ("put_many", "settle", "copy_many", "replace", "remove")
    ),
    *((kind, name) for kind in (SqliteSweeps, MongoSweeps) for name in ("lease", "record_fold", "drop", "end")),
]

STORES: list[SqliteStore] = []


class KnownStore(SqliteStore):
    """A store that this launcher can find again."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path)
        STORES.append(self)


class Steps:
    """Counts steps from the first lease on, which begins the first fold."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._die_at, self._stop_at = settings.get("die_at", 0), settings.get("stop_at", 0)
        self._only = settings.get("only", "")
        self._slow, self._file = settings.get("slow", 0.0), settings.get("steps", os.devnull)
        self._chance = random.Random(settings.get("seed", 0))
        self._count = -1

    def wrap(self, owner: type, name: str) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        async def step(*arguments: Any) -> Any:
            if name == "lease" and self._count < 0:
                self._count = 0
            self._pass(f"before {name}")
            if self._slow and self._count >= 0:
                await asyncio.sleep(self._slow * self._chance.random())
            result = await real(*arguments)
            self._pass(f"after {name}")
            return result

        setattr(owner, name, step)

    def _pass(self, where: str) -> None:
        if self._count < 0 or self._only not in where:
            return
        self._count += 1
        if self._count in (self._die_at, self._stop_at):
            Path(self._file).write_text(f"{where}, step {self._count}")
            with contextlib.ExitStack() as stack:
                if self._count == self._stop_at:
                    # Not in the middle of a transaction: SQLite lets nobody write while its writer sleeps.
                    for store in STORES:
                        stack.enter_context(store._memory_lock)
                os.kill(os.getpid(), signal.SIGKILL if self._count == self._die_at else signal.SIGSTOP)


def run() -> int:
    settings = json.loads(sys.argv.pop(1))
    assert aq_server.deployment.SqliteStore is SqliteStore, "the store is opened elsewhere now"
    aq_server.deployment.SqliteStore = KnownStore
    modules = (aq_server.service.folding, aq_data.storage.arrays.folding)
    for name, value in settings.get("folding", {}).items():
        having = [module for module in modules if hasattr(module, name)]
        assert having, f"{name} is no constant of folding any more"
        for module in having:
            setattr(module, name, value)
    steps = Steps(settings)
    for owner, name in STEPS:
        steps.wrap(owner, name)
    return main()


if __name__ == "__main__":
    sys.exit(run())
