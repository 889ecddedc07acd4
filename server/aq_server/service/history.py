"""What became of a DataFile: its changes, its old revisions, and going back to one."""

from __future__ import annotations

import asyncio

from aq_data.errors import NotFoundError, QueryError
from aq_data.models.datafile import DataFile
from aq_data.models.history import Change, rebuilt, reverted, shown
from aq_server.service.datafiles import DataFiles
from aq_server.service.growing import Growing

__all__ = ["MAX_CHANGES", "History"]

MAX_CHANGES = 1000
"""Changes on one page."""
UNDONE_AT_ONCE = 100


class History:
    """Reads the changes that the metadata store keeps with every revision."""

    def __init__(self, datafiles: DataFiles, growing: Growing) -> None:
        self._datafiles, self._growing = datafiles, growing

    async def changes(self, id: str, limit: int, before: int | None) -> list[Change]:
        """Up to `limit` changes of revisions below `before`, newest first; also those of a tombstone."""
        if not 1 <= limit <= MAX_CHANGES:
            raise QueryError(f"limit is 1 to {MAX_CHANGES}, not {limit}; page with `before` for more")
        if before is not None and not 1 <= before < 1 << 63:
            raise QueryError(f"before is a revision, not {before}")
        record = await self._datafiles.get(id, include_deleted=True)
        return [shown(change) for change in await self._datafiles.metadata.changes(record.document.id, limit, before)]

    async def document(self, id: str, revision: int, include_deleted: bool = False) -> DataFile:
        """The document as it was at a revision: costs as much as there were changes since.

        NotFoundError for one that never was, or that was lost with a database.
        """
        document = (await self._datafiles.get(id, include_deleted)).document
        if not 1 <= revision <= document.revision:
            raise NotFoundError(f"DataFile {id} has no revision {revision}; the newest is {document.revision}")
        if revision == document.revision:
            return await self._growing.present(document)
        while document.revision > revision:
            limit = min(UNDONE_AT_ONCE, document.revision - revision)
            changes = await self._datafiles.metadata.changes(document.id, limit, document.revision + 1)
            if not changes or changes[0].revision != document.revision:
                raise NotFoundError(
                    f"revision {revision} of DataFile {id} is lost: its history begins at {document.revision}, when the "
                    "database was rebuilt or began to keep it"
                )
            document = await asyncio.to_thread(rebuilt, document, changes)
        return await self._datafiles.stores.placed(document)

    async def revert(self, id: str, revision: int, if_match: int | None, user: str | None) -> DataFile:
        """A new revision with the typed fields and the metadata of an old one; no change when they are the same.

        Where tokens tell who the user is (`user` is set), the field `user` stays.
        """
        old = await self.document(id, revision)
        keeps = frozenset({"user"} if user is not None else ())
        return await self._datafiles.change(id, lambda current, now: reverted(current, old, now, keeps), if_match, user)
