"""Use cases of measuring: open a sweep, append blocks, end it."""

from __future__ import annotations

import os
import secrets
import time
from typing import Literal

import msgspec
from blake3 import blake3

from aq_data.errors import AqDataError, ConflictError, ForbiddenError, NotFoundError, TooLargeError, ValidationError
from aq_data.models.arrays import ArrayInfo, is_text, parse_dtype
from aq_data.models.datafile import TYPED_FIELDS, DataFile, SweepInfo, make_id
from aq_data.models.structs import resolve
from aq_data.models.sweep import (
    Block,
    Ending,
    NewSweep,
    NewSweepArray,
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
from aq_data.storage.arrays.blobs import Upload
from aq_data.storage.arrays.manifest import block_key, plan_key
from aq_data.storage.arrays.payload import decode_text
from aq_data.storage.arrays.store import ArrayStore, group_prefix
from aq_data.storage.arrays.writing import plan_growing_array
from aq_data.storage.metadata.store import MetadataStore, Record
from aq_data.storage.metadata.sweeplog import Incoming, Row
from aq_server.service.folding import Folding
from aq_server.service.growing import Growing
from aq_server.service.saving import now
from aq_server.service.signals import Signals

__all__ = ["Appending", "Opening", "SweepStatus", "Sweeps"]

LARGE_BYTES = 4 << 20
"""A block over this lies in a blob of its own; the log row points at it."""
UPLOAD_BYTES = 1 << 20
GATHERED_BYTES = 4 << 20
GATHERED_BLOCKS = 1000
"""Blocks of one request are committed together up to so many."""
HEADER_BYTES = 500
"""What the header of one variable is taken to weigh while it waits."""
MAX_GIVEN_BYTES = 256 << 20
OPENING_WRITER = ":open"
"""Who wrote the values that came with the opening; no client may call itself so."""
MAX_TEXT_BYTES = 64 << 20
"""A block of variable-length text is checked whole before it is stored."""


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


class Opening:
    """One attempt to open a sweep: values of declared arrays may come with it, then `commit`."""

    def __init__(self, sweeps: Sweeps, new: NewSweep, user: str | None) -> None:
        if user is not None:
            new = msgspec.structs.replace(new, user=user)
        self._sweeps, self._new = sweeps, new
        self._document, self._growing = check_new_sweep(new)
        self._given: dict[int, bytearray] = {}
        self._current: bytearray | None = None
        refused = sorted(set(new.notify) - sweeps.webhooks)
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
        total = blake3(msgspec.json.encode(msgspec.structs.replace(self._new, id=None), order="deterministic"))
        total.update(payload)
        state = State(extents=dict.fromkeys(self._growing, 0), folded_at=time.time())
        rows: list[Row] = []
        metadata, arrays = self._sweeps.metadata, self._sweeps.arrays
        existing = await metadata.get(id)
        if existing is None:
            if first is not None:
                _check_text(plan, first, payload)
                placed = place(plan, state, first, at)
                assert placed is not None
                state = placed[0]
                ref = ""
                if len(payload) > LARGE_BYTES:
                    ref, payload = await self._sweeps.store_large(plan, payload), b""
                rows.append(Row(placed[1], payload, ref))
            record = Record(self._datafile(plan, state, at), plan.attempt, total.hexdigest())
            await arrays.blobs.put_many([(plan_key(id, plan.attempt), lambda: msgspec.json.encode(plan))])
            await arrays.publish_group(record.document, plan.attempt, record.digest, [])
            existing = await metadata.sweeps.open(record, plan, state, rows)
            if existing is None:
                self._sweeps.signals.tell(id)
                return self._sweeps.growing.shown(record.document, plan, state), True
            await arrays.blobs.remove(f"{id}/{plan.attempt}")
        if existing.document.state == "deleted":
            raise ConflictError(f"the id {id} belonged to a DataFile that was deleted; open under a new id")
        if existing.digest != total.hexdigest():
            raise ConflictError(f"the id {id} already holds other content; open under a new id")
        return await self._sweeps.growing.present(existing.document), False

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
            path=self._sweeps.arrays.blobs.location(group_prefix(plan.id, plan.attempt)),
        )


def _check_text(plan: Plan, block: Block, payload: bytes) -> None:
    """Text that cannot be decoded is refused at the door: later nobody could tell its writer."""
    at = 0
    for piece in block.variables:
        info, size = plan.array(piece.name), piece_bytes(piece)
        if is_text(parse_dtype(info.dtype, info.name)):
            try:
                decode_text(payload[at : at + size], info, piece.shape)
            except (ValueError, RuntimeError) as exc:
                raise ValidationError(f"variable {info.name!r}: {exc}") from exc
        at += size


class Appending:
    """The blocks of one request as they arrive: `begin`, `write`, `end` for each, then `commit`.

    Blocks are stored in order up to the first that is refused; those before it stay, and the error's details say which
    was the last.
    """

    def __init__(self, sweeps: Sweeps, plan: Plan) -> None:
        self._sweeps, self._plan = sweeps, plan
        self._waiting: list[Incoming] = []
        self._waiting_bytes = 0
        self._block: Block | None = None
        self._left = 0
        self._buffer = bytearray()
        self._upload: Upload | None = None
        self._ref = ""
        self._skipping = False
        self.acknowledged: dict[str, int] = {}
        self.head = 0

    async def begin(self, block: Block) -> int:
        """A block begins; how many bytes of values belong to it."""
        try:
            size = sum(piece_bytes(piece) for piece in block.variables)
            if size > self._sweeps.max_block_bytes:
                limit = self._sweeps.max_block_bytes
                raise TooLargeError(f"the block has {size} bytes; the limit here is {limit}", limit=limit)
            if len(block.variables) > len(self._plan.arrays):
                raise ValidationError("a block names each of its variables once")
            if block.writer.startswith(":"):
                raise ValidationError(f"the writer {block.writer[:64]!r} is reserved; names do not begin with a colon")
            self._block, self._left = block, size
            self._buffer = bytearray()
            if size > LARGE_BYTES and not self._has_text(block):
                await self._begin_large(block)
            elif size > MAX_TEXT_BYTES:
                raise TooLargeError(f"a block with text has at most {MAX_TEXT_BYTES >> 20} MiB; write it in several")
        except AqDataError as exc:
            await self._store()
            raise self._with_acknowledged(exc) from exc
        return size

    def _has_text(self, block: Block) -> bool:
        arrays = (self._plan.array(piece.name) for piece in block.variables)
        return any(is_text(parse_dtype(array.dtype, array.name)) for array in arrays)

    async def _begin_large(self, block: Block) -> None:
        """Refuse before hundreds of MB are stored for nothing; a repeat is read and forgotten."""
        await self._store()
        state = (await self._sweeps.metadata.sweeps.get(self._plan.id))[1]
        await self._sweeps.folding.make_room(self._plan.id, state)
        self._skipping = place(self._plan, state, block, "") is None
        if not self._skipping:
            self._ref = secrets.token_hex(8)
            key = block_key(self._plan.id, self._plan.attempt, self._ref)
            self._upload = await self._sweeps.arrays.blobs.upload(key)

    async def write(self, data: memoryview) -> None:
        """The next bytes of the block."""
        self._left -= len(data)
        if not self._skipping:
            self._buffer += data
        if self._upload is not None and (len(self._buffer) >= UPLOAD_BYTES or not self._left):
            # In larger pieces than the socket's: each is handed to a thread.
            pieces, self._buffer = self._buffer, bytearray()
            await self._upload.write(pieces)

    async def end(self) -> None:
        """All bytes of the block have come."""
        assert self._block is not None
        block, self._block = self._block, None
        ref = ""
        if self._upload is not None:
            await self._upload.finish()
            self._upload, ref = None, self._ref
            await self._sweeps.arrays.blobs.settle(f"{self._plan.id}/{self._plan.attempt}/blocks")
        elif not self._skipping:
            try:
                _check_text(self._plan, block, bytes(self._buffer))
            except AqDataError as exc:
                await self._store()
                raise self._with_acknowledged(exc) from exc
        payload = bytes(self._buffer)
        if len(payload) > LARGE_BYTES:
            ref, payload = await self._sweeps.store_large(self._plan, payload), b""
        self._waiting.append(Incoming(block, payload, ref))
        self._waiting_bytes += len(payload) + HEADER_BYTES * len(block.variables)
        self._skipping = False
        if ref or self._waiting_bytes >= GATHERED_BYTES or len(self._waiting) >= GATHERED_BLOCKS:
            await self._store()

    async def commit(self) -> None:
        """Store what waits: everything that came is on disk when this returns."""
        await self._store()

    async def _store(self) -> None:
        blocks, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if not blocks:
            return
        appended = await self._sweeps.metadata.sweeps.append(self._plan.id, blocks, format_instant(now()))
        for block in blocks[: appended.stored]:
            self.acknowledged[block.header.writer] = max(block.header.n, self.acknowledged.get(block.header.writer, 0))
        self.head = appended.state.head
        self._sweeps.signals.tell(self._plan.id)
        self._sweeps.folding.grown(appended.state)
        if appended.refused is not None:
            raise self._with_acknowledged(appended.refused)
        await self._sweeps.folding.make_room(self._plan.id, appended.state)

    def _with_acknowledged(self, exc: AqDataError) -> AqDataError:
        exc.details.setdefault("acknowledged", dict(self.acknowledged))
        return exc

    async def discard(self) -> None:
        """The request broke off: forget the block that was coming, keep those before it."""
        if self._upload is not None:
            await self._upload.discard()
            self._upload = None


class Sweeps:
    """The use cases; nothing of value lives in an instance."""

    def __init__(
        self,
        metadata: MetadataStore,
        arrays: ArrayStore,
        growing: Growing,
        folding: Folding,
        signals: Signals,
        webhooks: frozenset[str],
        max_block_bytes: int,
    ) -> None:
        self.metadata, self.arrays, self.growing, self.folding, self.signals = metadata, arrays, growing, folding, signals
        self.webhooks, self.max_block_bytes = webhooks, max_block_bytes

    async def begin_append(self, id: str) -> Appending:
        """Begin to take blocks; NotFoundError when there is no such sweep. A full log makes this wait."""
        plan, state = await self.metadata.sweeps.get(id.lower())
        await self.folding.make_room(plan.id, state)
        return Appending(self, plan)

    async def store_large(self, plan: Plan, payload: bytes) -> str:
        """Put the values of a block into a blob of its own; its `ref`."""
        ref = secrets.token_hex(8)
        await self.arrays.blobs.put_many([(block_key(plan.id, plan.attempt, ref), lambda: payload)])
        await self.arrays.blobs.settle(f"{plan.id}/{plan.attempt}/blocks")
        return ref

    async def end(self, id: str, outcome: Literal["complete", "abandoned"], ending: Ending) -> DataFile:
        """Seal the log, fold the rest, publish the plain group; the finished document. A repeat gives the same answer."""
        plan, _ = await self.metadata.sweeps.get(id.lower())
        await self.metadata.sweeps.seal(plan.id, outcome, ending, format_instant(now()))
        return await self.folding.finish(plan)

    async def status(self, id: str) -> SweepStatus:
        """The state of a sweep, also of one that has ended."""
        plan, state = await self.metadata.sweeps.get(id.lower())
        record = await self.metadata.get(plan.id)
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
            stale=self.growing.is_stale(document, state),
            reason=state.seal.reason if state.seal is not None else "",
        )


def _declared(array: ArrayInfo, plan: Plan) -> NewSweepArray:
    """An array as it was declared, so that another writer knows what to write."""
    shape = tuple(None if dim in plan.growing else n for dim, n in zip(array.dims, array.shape, strict=True))
    return NewSweepArray(
        array.name, array.dtype, shape, array.dims, array.attrs, array.role, chunks=array.chunks, codec=array.codec
    )


resolve(SweepStatus)
