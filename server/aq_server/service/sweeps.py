"""Use cases of measuring: open a sweep, append blocks, end it."""

from __future__ import annotations

from typing import Literal

import msgspec

from aq_data.errors import NotFoundError
from aq_data.models.arrays import ArrayInfo
from aq_data.models.datafile import DataFile, SweepInfo
from aq_data.models.structs import resolve
from aq_data.models.sweep import (
    Ending,
    NewSweep,
    NewSweepArray,
    Plan,
)
from aq_data.models.values import format_instant
from aq_server.service.appending import Appending
from aq_server.service.opening import OPENING_WRITER, Opening
from aq_server.service.saving import now
from aq_server.service.sweep_parts import SweepParts

__all__ = ["SweepStatus", "Sweeps"]


KEPT_PLANS = 1000


class SweepStatus(msgspec.Struct, frozen=True):
    """What `GET /sweeps/{id}` answers. `writers` has the last stored number of each writer, `arrays` are as declared."""

    id: str
    name: str
    state: str
    arrays: tuple[NewSweepArray, ...]
    head: int
    folded: int
    writers: dict[str, int]
    extents: dict[str, int]
    planned: dict[str, int]
    last_block_at: str | None
    stale: bool
    reason: str


class Sweeps:
    """The use cases; nothing of value lives in an instance."""

    def __init__(self, parts: SweepParts) -> None:
        self._parts = parts
        self._plans: dict[str, Plan] = {}

    def begin_open(self, new: NewSweep, user: str | None) -> Opening:
        """Check a declaration and begin to open; `user` (from a token) takes the place of the client's word."""
        return Opening(self._parts, new, user)

    async def begin_append(self, id: str) -> Appending:
        """Begin to take blocks; NotFoundError when there is no such sweep. A full log makes this wait."""
        id = id.lower()
        plan = self._plans.get(id)
        if plan is None:
            # Plans never change; what has changed since is found when the blocks are stored.
            plan, state = await self._parts.metadata.sweeps.get(id)
            await self._parts.folding.make_room(plan.id, state)
            if len(self._plans) >= KEPT_PLANS:
                self._plans.clear()
            self._plans[id] = plan
        return Appending(self._parts, plan)

    async def end(
        self, id: str, outcome: Literal["complete", "abandoned"], ending: Ending, user: str | None = None
    ) -> DataFile:
        """Seal the log, fold the rest, publish the plain group; the finished document. A repeat gives the same answer."""
        plan, _ = await self._parts.metadata.sweeps.get(id.lower())
        await self._parts.metadata.sweeps.seal(plan.id, outcome, ending, format_instant(now()), user or "")
        return await self._parts.growing.present(await self._parts.folding.finish(plan))

    async def status(self, id: str) -> SweepStatus:
        """The state of a sweep, also of one that has ended."""
        plan, state = await self._parts.metadata.sweeps.get(id.lower())
        record = await self._parts.metadata.get(plan.id)
        if record is None:
            raise NotFoundError(f"there is no DataFile {id[:60]!r}")
        document = record.document
        info = document.sweep or SweepInfo()
        return SweepStatus(
            id=plan.id,
            name=document.name,
            state=document.state,
            arrays=tuple(_declared(array, plan) for array in plan.arrays),
            head=state.head,
            folded=state.folded,
            writers={writer: n for writer, n in state.writers.items() if writer != OPENING_WRITER},
            extents=state.extents,
            planned=info.planned,
            last_block_at=state.last_block_at,
            stale=self._parts.growing.is_stale(document, state),
            reason=state.seal.reason if state.seal is not None else "",
        )


def _declared(array: ArrayInfo, plan: Plan) -> NewSweepArray:
    """An array as it was declared, so that another writer knows what to write."""
    shape = tuple(None if dim in plan.growing else n for dim, n in zip(array.dims, array.shape, strict=True))
    return NewSweepArray(
        array.name, array.dtype, shape, array.dims, array.attrs, array.role, chunks=array.chunks, codec=array.codec
    )


resolve(SweepStatus)
