"""What lies in a store, attempt by attempt, from one listing of it: a thousand blobs for each request to a bucket."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aq_data.models.datafile import is_id
from aq_data.storage.arrays.blobs import BlobEntry, BlobStore
from aq_data.storage.arrays.store import group_prefix

__all__ = ["Attempt", "attempts"]

_ATTEMPT = re.compile(r"[0-9a-f]{16}")


@dataclass(slots=True)
class Attempt:
    """Of one try to save a DataFile: bytes, when the last blob was written, and which lie beside its arrays.

    An attempt may have no blobs, only folders in which nothing lies.
    """

    id: str
    key: str
    size: int = 0
    newest: float = 0.0
    beside: list[BlobEntry] = field(default_factory=list)
    unfinished: list[BlobEntry] = field(default_factory=list)
    """What was to be put in the place of something else."""

    def add(self, entry: BlobEntry) -> None:
        self.size += entry.size
        self.newest = max(self.newest, entry.modified)
        if entry.key.endswith(".tmp"):
            self.unfinished.append(entry)
        elif not entry.key.endswith("/") and not entry.key.startswith(f"{group_prefix(self.id, self.key)}/"):
            self.beside.append(entry)

    def below(self, name: str) -> list[BlobEntry]:
        """The blobs beside the arrays that lie under `name`."""
        return [entry for entry in self.beside if entry.key.startswith(f"{self.id}/{self.key}/{name}/")]


async def attempts(blobs: BlobStore) -> AsyncIterator[Attempt]:
    """Everything that was ever begun to be saved in a store and has left something; what is not ours is passed over."""
    current: Attempt | None = None
    async for entry in blobs.walk("", folders=True):
        id, key, *_ = f"{entry.key}//".split("/", 2)
        if not _ATTEMPT.fullmatch(key) or not is_id(id):
            continue
        if current is None or (current.id, current.key) != (id, key):
            if current is not None:
                yield current
            current = Attempt(id, key)
        current.add(entry)
    if current is not None:
        yield current
