"""The contract of a metadata store: records, their terms, tokens, stores that were added."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

import msgspec

from aq_data.models.datafile import DataFileId
from aq_data.models.history import Change
from aq_data.models.paths import SortKey
from aq_data.models.query import Node
from aq_data.models.snapshots import separated
from aq_data.models.stores import AddedStore
from aq_data.models.structs import resolve
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.sweeplog import SweepLog

__all__ = ["CHANGES_BYTES", "Leftover", "MetadataStore", "Page", "Token"]

CHANGES_BYTES = 16 << 20
"""What one list of changes may take, as JSON."""


class Page(msgspec.Struct, frozen=True):
    """One page of a search: documents as JSON. `total` is exact up to 10,000; `cursor` continues, None at the end."""

    documents: list[msgspec.Raw]
    total: int
    total_is_exact: bool
    cursor: str | None


class Token(msgspec.Struct, frozen=True):
    """An access token: `hash` is the SHA-256 of the secret, which is stored nowhere. Times are RFC 3339 UTC."""

    id: str
    name: str
    hash: str
    scopes: tuple[str, ...]
    created_at: str
    expires_at: str | None = None
    revoked_at: str | None = None


class Leftover(msgspec.Struct, frozen=True):
    """Something in the database that no record has. `age` is seconds since it was stored."""

    key: str
    size: int
    age: float


class MetadataStore(ABC):
    """Records that survive the process once a call returns; callable from any task of one event loop.

    Several processes may hold stores on the same database. Each method is one atomic step. Raises UnavailableError when
    the database cannot be reached or is busy too long, StorageError when it fails otherwise; never a driver's own error.
    """

    @property
    @abstractmethod
    def sweeps(self) -> SweepLog:
        """The sweeps among the records."""

    @abstractmethod
    async def insert(self, record: Record) -> Record | None:
        """Publish a record. None when it is new; the record already there (also a tombstone) when the id is taken.

        Raises UnavailableError, publishing nothing, when its attempt was barred: the caller's blobs may be gone.
        """

    @abstractmethod
    async def get(self, id: DataFileId) -> Record | None:
        """The newest committed record, tombstones included, or None."""

    @abstractmethod
    async def replace(self, record: Record, expected_revision: int, publishes: str = "") -> bool:
        """Put `record` in place of the one with its id if that has `expected_revision`; False, changing nothing, if not.

        `publishes` names an attached-file key that becomes visible with it; UnavailableError when that was barred. Of an
        open sweep it is noted in the same step after which block the revision came (`State.revisions`).

        The record's `change` is kept for `changes`, never without the record, nor the record without it.
        """

    @abstractmethod
    async def changes(self, id: DataFileId, limit: int, before: int | None = None) -> list[Change]:
        """Up to `limit` changes of a record, newest first, of revisions below `before`; none for an unknown id.

        Fewer, but at least one where there is any, once they take about `CHANGES_BYTES`: a change may be as large as two
        documents.
        Once `replace` or `SweepLog.end` has returned, its change is listed; one made meanwhile may or may not be.
        """

    @abstractmethod
    async def search(self, node: Node, sort: SortKey, limit: int, cursor: str | None, include_deleted: bool = False) -> Page:
        """Up to `limit` documents that match, from after `cursor`. QueryError (`bad_cursor`) for a foreign cursor."""

    @abstractmethod
    async def count(self, node: Node) -> int:
        """How many documents match, tombstones left out; exact at any number."""

    @abstractmethod
    async def distinct(self, path: str, node: Node, limit: int) -> list[tuple[object, int]]:
        """The values at `path` among matching documents with the number of documents of each, most frequent first.

        Numbers, booleans, dates (as tagged JSON) and texts, of which only the first 100 characters count.
        """

    @abstractmethod
    async def bar(self, id: DataFileId, key: str) -> None:
        """Make sure that the attempt or attached-file key can never be published under `id` from now on.

        Who wants to delete blobs bars them first and then reads the record: what it does not name now, it never will.
        """

    @abstractmethod
    def scan(self) -> AsyncIterator[Record]:
        """Every record, tombstones included, in order of saving; records saved meanwhile may or may not appear.

        The order of saving is that of `created_at`, then of the id, where several servers save into one database.
        """

    async def snapshots(self, store: str) -> set[str]:
        """The hashes of the snapshots (models.snapshots) that records of DataFiles in a store have, tombstones included.

        Reads every record here; a database that knows them says so at once.
        """
        found = [separated(record.document)[1] async for record in self.scan() if record.document.store == store]
        return {snapshot.hash for snapshot in found if snapshot is not None}

    async def needs_snapshot(self, store: str, hash: str) -> bool:
        """Whether a snapshot is among them."""
        return hash in await self.snapshots(store)

    def leftovers(self, older_than: float, delete: bool) -> AsyncIterator[Leftover]:  # noqa: ARG002
        """What lies in the database that no record has, at least `older_than` seconds old; removed when `delete`.

        Nothing is removed that a record could still come to have. A store that removes with the last record leaves nothing.
        """
        return _nothing()

    @abstractmethod
    async def add_token(self, token: Token) -> None:
        """Store a token."""

    @abstractmethod
    async def find_token(self, hash: str) -> Token | None:
        """The token with this hash, revoked and expired ones included."""

    @abstractmethod
    async def tokens(self) -> list[Token]:
        """Every token ever made, revoked and expired ones included."""

    @abstractmethod
    async def revoke_token(self, id: str, revoked_at: str) -> bool:
        """Mark a token revoked; False when there is none of that id."""

    @abstractmethod
    async def added_stores(self) -> list[AddedStore]:
        """The stores that admins added, in order of their names."""

    @abstractmethod
    async def change_store(self, before: AddedStore | None, after: AddedStore | None) -> bool:
        """Put `after` in place of `before`, which are of one name; None stands for there being none.

        False, changing nothing, when what is there is not `before`.
        """

    @abstractmethod
    async def lease(self, name: str, owner: str, now: float, until: float) -> bool:
        """Take the named lease, or keep it, until the instant `until` (seconds since 1970); False while it is another's.

        Letting go of it early is `until` = 0. As everywhere here a lease saves work, and protects nothing.
        """

    @abstractmethod
    async def check(self) -> None:
        """Return when the database answers and takes writes; raise otherwise."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what was begun and let go of the database. No other call may follow."""


async def _nothing() -> AsyncIterator[Leftover]:
    nothing: tuple[Leftover, ...] = ()
    for leftover in nothing:
        yield leftover


resolve(Page, Token, Leftover)
