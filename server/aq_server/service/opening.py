"""Opening a sweep."""

from __future__ import annotations

import os
import secrets
import time

import msgspec
from blake3 import blake3

from aq_data.errors import AqDataError, ConflictError, ForbiddenError, TooLargeError, ValidationError
from aq_data.models.arrays import is_text, parse_dtype
from aq_data.models.datafile import TYPED_FIELDS, DataFile, SweepInfo, make_id
from aq_data.models.sweep import (
    Block,
    NewSweep,
    Piece,
    Plan,
    State,
    check_chunks,
    check_new_sweep,
    grown_arrays,
    piece_bytes,
    place,
)
from aq_data.models.values import format_instant
from aq_data.storage.arrays.manifest import plan_key
from aq_data.storage.arrays.store import group_prefix
from aq_data.storage.arrays.writing import plan_growing_array
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.sweeplog import Row
from aq_server.service.saving import now
from aq_server.service.sweep_parts import LARGE_BYTES, SweepParts, check_text

__all__ = ["OPENING_WRITER", "Opening"]

MAX_GIVEN_BYTES = 256 << 20
OPENING_WRITER = ":open"
"""Who wrote the values that came with the opening; no client may call itself so."""


class Opening:
    """One attempt to open a sweep: values of declared arrays may come with it, then `commit`."""

    def __init__(self, parts: SweepParts, new: NewSweep, user: str | None) -> None:
        if user is not None:
            new = msgspec.structs.replace(new, user=user)
        self._parts, self._new = parts, new
        self._document, self._growing = check_new_sweep(new)
        self._given: dict[int, bytearray] = {}
        self._current: bytearray | None = None
        refused = sorted(set(new.notify) - parts.webhooks)
        if refused:
            raise ForbiddenError(f"{refused[0][:200]!r} is not among this server's webhook addresses (`webhooks`)")

    async def begin_array(self, index: int) -> None:
        """The bytes that follow are all values of the declared array `index`, none of whose dims grows."""
        if not 0 <= index < len(self._new.arrays) or index in self._given:
            raise ValidationError(f"part array:{index} is not declared in the document, or came twice")
        if None in self._new.arrays[index].shape:
            raise ValidationError(f"array {self._new.arrays[index].name!r} grows; its values come in blocks")
        self._current = self._given[index] = bytearray()

    async def write(self, data: memoryview) -> None:
        """The next bytes of the array begun last."""
        assert self._current is not None
        self._current += data
        if sum(map(len, self._given.values())) > MAX_GIVEN_BYTES:
            raise TooLargeError(f"over {MAX_GIVEN_BYTES >> 20} MiB came with the opening; write them as blocks")

    def _plan(self, id: str, attempt: str) -> Plan:
        planned = {dim: self._new.planned.get(dim, 0) for dim in self._growing}
        arrays = []
        for new in self._document.arrays:
            assert new.dims is not None
            info = plan_growing_array(new, tuple(planned.get(dim) for dim in new.dims))
            check_chunks(info.name, info.shape, info.chunks)
            arrays.append(msgspec.structs.replace(info, is_partial=True))
        return Plan(id, attempt, tuple(arrays), self._growing, self._new.notify)

    def _first(self, plan: Plan) -> Block | None:
        """The given values as the first block."""
        pieces = []
        for index, values in self._given.items():
            info = plan.arrays[index]
            text = is_text(parse_dtype(info.dtype, info.name))
            piece = Piece(info.name, info.shape, info.dtype, nbytes=len(values) if text else None)
            if piece_bytes(piece) != len(values):
                needed = f"{piece_bytes(piece)} bytes of {info.dtype} {info.shape}"
                raise ValidationError(f"array {info.name!r}: {len(values)} bytes came, not the {needed}")
            pieces.append(piece)
        return Block(OPENING_WRITER, 1, tuple(pieces)) if pieces else None

    async def commit(self) -> tuple[DataFile, bool]:
        """Publish the open sweep. The document and whether it is new; ConflictError (`id_taken`) for other content."""
        at = format_instant(now())
        id = self._document.id or make_id(time.time_ns() // 1_000_000, os.urandom(10))
        plan = self._plan(id, secrets.token_hex(8))
        first = self._first(plan)
        payload = b"".join(self._given.values())
        total = blake3(
            msgspec.json.encode(msgspec.structs.replace(self._new, id=None, store=msgspec.UNSET), order="deterministic")
        )
        total.update(payload)
        state = State(extents=dict.fromkeys(self._growing, 0), folded_at=time.time())
        rows: list[Row] = []
        metadata = self._parts.metadata
        existing = await metadata.get(id)
        if existing is None:
            target = await self._parts.stores.target(self._new.store, self._new.kind)
            plan, arrays = msgspec.structs.replace(plan, store=target.name), target.arrays
            if first is not None:
                check_text(plan, first, payload)
                placed = place(plan, state, first, at)
                assert placed is not None
                state = placed[0]
                ref = ""
                if len(payload) > LARGE_BYTES:
                    ref, payload = await self._parts.store_large(plan, payload), b""
                rows.append(Row(placed[1], payload, ref))
            record = Record(self._datafile(plan, state, at), plan.attempt, total.hexdigest())
            await arrays.blobs.put_many([(plan_key(id, plan.attempt), lambda: msgspec.json.encode(plan))])
            snapshot = await arrays.publish_group(record.document, plan.attempt, record.digest, [])
            try:
                await target.confirm()
            except AqDataError:
                await arrays.blobs.remove(f"{id}/{plan.attempt}")
                raise
            existing = await metadata.sweeps.open(record, plan, state, rows)
            if existing is None:
                if snapshot is not None:
                    await arrays.keep_snapshot(snapshot)
                self._parts.signals.tell(id)
                return self._parts.growing.shown(record.document, plan, state), True
            await arrays.blobs.remove(f"{id}/{plan.attempt}")
        if existing.document.state == "deleted":
            raise ConflictError(f"the id {id} belonged to a DataFile that was deleted; open under a new id")
        if existing.digest != total.hexdigest():
            raise ConflictError(f"the id {id} already holds other content; open under a new id")
        return await self._parts.growing.present(existing.document), False

    def _datafile(self, plan: Plan, state: State, at: str) -> DataFile:
        return DataFile(
            **{field: getattr(self._document, field) for field in TYPED_FIELDS},
            id=plan.id,
            state="open",
            revision=1,
            created_at=at,
            updated_at=at,
            arrays=grown_arrays(plan, state),
            sweep=SweepInfo(planned=self._new.planned, notify=self._new.notify),
            path=group_prefix(plan.id, plan.attempt),
            store=plan.store,
        )
