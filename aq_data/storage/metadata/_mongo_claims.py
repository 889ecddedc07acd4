"""What a record claims outside of its own document before it is published: its pid, and its snapshot.

A claim is a key in the `holds` of the document under the DataFile's id, which may stand there before the record does. The
record is published only while its claims stand, by the same change of one document. So whoever finds a claim of what is not
published takes it away, and knows that nothing will be published with it unless it is claimed anew.

`pids` has a document for each pid, `_id` the pid, which names the DataFile that claimed it last. It is never released:
whoever wants a pid that another does not have, or no longer, takes it over. `by` changes with every claim, so that of two
who take it over at once, or of one who takes and one who claims anew, one starts over. No step needs more than one document,
and each names its shard key.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import DuplicateKeyError

from aq_data.errors import ConflictError, UnavailableError
from aq_data.models.datafile import DataFileId
from aq_data.storage.metadata._mongo_records import Stored, make_mark, pid_key
from aq_data.storage.metadata._mongo_snapshots import Snapshots
from aq_data.storage.metadata._mongo_tries import again

__all__ = ["Claims"]

T = TypeVar("T")
Row = dict[str, Any]

TRIES = 20


class Database(Protocol):
    """What the claims need of the store."""

    async def collection(self, name: str) -> AsyncCollection[Row]: ...

    async def mark(self, id: DataFileId, change: Row) -> None: ...


class Claims:
    """Claims for records that are about to be published."""

    def __init__(self, database: Database, snapshots: Snapshots) -> None:
        self._database, self._snapshots = database, snapshots

    async def claim(self, id: DataFileId, kept: Stored) -> None:
        """Claim what a record needs, and see to it that it is there. ConflictError when another record has the pid."""
        if not kept.needs:
            return
        await self._database.mark(id, {"$addToSet": {"holds": {"$each": list(kept.needs)}}})
        if kept.snapshot is not None and kept.snapshot.hash in kept.needs:
            await self._snapshots.put(kept.snapshot)
        pid = kept.fields.get("pid")
        if pid is not None and pid_key(pid) in kept.needs:
            await self._take(id, pid)

    async def _take(self, id: DataFileId, pid: str) -> None:
        pids, datafiles = await self._database.collection("pids"), await self._database.collection("datafiles")
        key, mark = pid_key(pid), make_mark()
        claim = {"$set": {"by": mark}}
        for _ in range(TRIES):
            try:
                # Its own, or nobody's: now it is known to be claimed anew.
                await again(lambda: pids.update_one({"_id": key, "id": id}, claim, upsert=True))
                return
            except DuplicateKeyError:
                found = await pids.find_one({"_id": key})
            if found is None or found["id"] == id:
                continue
            other = found["id"]
            await datafiles.update_one({"_id": other, "pid": {"$ne": pid}}, {"$pull": {"holds": key}})
            if await datafiles.find_one({"_id": other, "pid": pid}, {"_id": 1}) is not None:
                raise ConflictError(f"the pid {pid[:80]!r} is that of another DataFile; choose another", code="id_taken")
            taken = {"$set": {"id": id, "by": mark}}
            seen = {"_id": key, "by": found["by"]}
            if (await again(lambda: pids.update_one(seen, taken))).matched_count:  # noqa: B023
                return
        raise UnavailableError(f"the pid {pid[:80]!r} is claimed by many at once; try again")
