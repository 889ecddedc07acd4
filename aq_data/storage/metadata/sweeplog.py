"""The contract of a sweep log: what a metadata store keeps of a sweep while it grows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aq_data.errors import AqDataError
from aq_data.models.datafile import DataFileId
from aq_data.models.sweep import Block, Ending, Placed, Plan, State
from aq_data.storage.metadata.record import Record

__all__ = ["Appended", "Incoming", "Row", "SweepLog", "Tail", "is_pending"]


@dataclass(frozen=True, slots=True)
class Incoming:
    """A block as it came: its values one variable after the other, or the blob key (`ref`) under which they lie."""

    header: Block
    payload: bytes = b""
    ref: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A block in the log."""

    placed: Placed
    payload: bytes
    ref: str


@dataclass(frozen=True, slots=True)
class Tail:
    """A sweep as of one moment: its plan, its state, and blocks of the log in order."""

    plan: Plan
    state: State
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of an `append`: the state after it, how many blocks are stored now, and why the next one was refused."""

    plan: Plan
    state: State
    stored: int
    refused: AqDataError | None


class SweepLog(ABC):
    """Sweeps, their blocks in order and their leases; every method is one atomic step that is on disk when it returns.

    Callable from any task of one event loop, several processes at once. A sweep that does not exist, or whose DataFile was
    deleted, raises NotFoundError (code `deleted` for the latter). Errors of the database as in `MetadataStore`.
    """

    @abstractmethod
    async def open(self, record: Record, plan: Plan, state: State, first: Sequence[Row]) -> Record | None:
        """Publish the record of an open sweep with its first blocks, already placed; as `MetadataStore.insert` does."""

    @abstractmethod
    async def get(self, id: DataFileId) -> tuple[Plan, State]:
        """The plan and the newest state, also of a sweep that has ended."""

    @abstractmethod
    async def append(self, id: DataFileId, blocks: Sequence[Incoming], at: str) -> Appended:
        """Place the blocks in turn (`models.sweep.place`), up to the first that is refused: those before it stay.

        UnavailableError, with nothing stored, when a `ref` was barred.
        """

    @abstractmethod
    async def seal(
        self, id: DataFileId, outcome: Literal["complete", "abandoned"], ending: Ending, at: str, actor: str = ""
    ) -> State:
        """End the log (`models.sweep.seal`). The first seal wins."""

    @abstractmethod
    async def tail(self, id: DataFileId, after: int = 0, limit_bytes: int | None = None) -> Tail:
        """The state and every block beyond max(`after`, what is folded), as of one moment.

        With `limit_bytes` the first of them, at least one, up to about so many bytes.
        """

    @abstractmethod
    async def headers(self, id: DataFileId, after: int, limit: int) -> tuple[State, list[tuple[int, bytes]]]:
        """The state, and position and JSON header of up to `limit` blocks beyond max(`after`, what is folded)."""

    @abstractmethod
    async def lease(self, id: DataFileId, now: float, until: float) -> State | None:
        """Take the lease to fold until the instant `until` (seconds since 1970), with a token of its own.

        None while somebody else has it: its instant has not passed. Letting go of it early is `until` = 0 by `renew`.
        """

    @abstractmethod
    async def renew(self, id: DataFileId, token: int, until: float) -> bool:
        """Keep the lease of `token` until another instant; False when somebody took it."""

    @abstractmethod
    async def record_fold(self, id: DataFileId, token: int, folded: int, manifest: str, at: float) -> bool:
        """Switch to a manifest, with everything up to `folded` in its chunks. False, changing nothing, for an old token."""

    @abstractmethod
    async def drop(self, id: DataFileId, through: int) -> None:
        """Delete the blocks up to `through` that are folded; those that are not stay."""

    @abstractmethod
    async def end(
        self, id: DataFileId, token: int, record: Record, expected_revision: int
    ) -> Literal["ended", "stale", "fenced"]:
        """Put the record of the finished sweep in place and mark it ended, if `token` holds the lease and all is folded.

        "stale" when the record has another revision now, "fenced" when the lease is another's; nothing changes then.
        The record's `change` is kept as by `MetadataStore.replace`.
        """

    @abstractmethod
    async def tell(self, id: DataFileId, address: str) -> None:
        """Remember that an address was told of the end."""

    @abstractmethod
    async def unfinished(self) -> list[tuple[Plan, State]]:
        """Sweeps with work to do: blocks to fold, an end to publish, or an address to tell of it."""

    @abstractmethod
    async def forget(self, id: DataFileId) -> None:
        """Delete the log of a sweep whose DataFile was deleted; a no-op when there is none."""


def is_pending(plan: Plan, state: State) -> bool:
    """Whether something is left to be done in the background: what `SweepLog.unfinished` lists."""
    if state.ended_revision:
        return bool(set(plan.notify) - set(state.told))
    return state.seal is not None or state.head > state.folded
