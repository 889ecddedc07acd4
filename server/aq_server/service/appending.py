"""The blocks of one request, as they arrive."""

from __future__ import annotations

from aq_data.errors import AqDataError, TooLargeError, ValidationError
from aq_data.models.arrays import is_text, parse_dtype
from aq_data.models.sweep import (
    Block,
    Plan,
    piece_bytes,
    place,
)
from aq_data.models.values import format_instant
from aq_data.storage.arrays.blobs import Upload
from aq_data.storage.arrays.manifest import block_key, make_ref
from aq_data.storage.arrays.pages import PageWriter
from aq_data.storage.metadata.sweeplog import Incoming
from aq_server.service.saving import now
from aq_server.service.sweep_parts import LARGE_BYTES, SweepParts, check_text

__all__ = ["Appending"]

UPLOAD_BYTES = 1 << 20
"""Values of a large block are handed to a thread in pieces of about so many bytes, larger than a socket's."""
GATHERED_BYTES = 4 << 20
GATHERED_BLOCKS = 1000
"""Blocks of one request are committed together up to so many."""
HEADER_BYTES = 500
"""What the header of one variable is taken to weigh while it waits."""
MAX_TEXT_BYTES = 64 << 20
"""A block of variable-length text is checked whole before it is stored."""


class Appending:
    """The blocks of one request as they arrive: `begin`, `write`, `end` for each, then `commit`.

    Blocks are stored in order up to the first that is refused; those before it stay, and the error's details say which
    was the last.
    """

    def __init__(self, parts: SweepParts, plan: Plan) -> None:
        self._parts, self._plan = parts, plan
        self._waiting: list[Incoming] = []
        self._waiting_bytes = 0
        self._block: Block | None = None
        self._left = 0
        self._buffer = bytearray()
        self._upload: Upload | None = None
        self._pages = PageWriter()
        self._ref = ""
        self._skipping = False
        self.acknowledged: dict[str, int] = {}
        self.head = 0

    async def begin(self, block: Block) -> int:
        """A block begins; how many bytes of values belong to it."""
        try:
            size = sum(piece_bytes(piece) for piece in block.variables)
            if size > self._parts.max_block_bytes:
                limit = self._parts.max_block_bytes
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
        state = (await self._parts.metadata.sweeps.get(self._plan.id))[1]
        await self._parts.folding.make_room(self._plan.id, state)
        self._skipping = place(self._plan, state, block, "") is None
        if not self._skipping:
            self._ref, self._pages = make_ref(), PageWriter()
            key = block_key(self._plan.id, self._plan.attempt, self._ref)
            self._upload = await (await self._parts.stores.at(self._plan.store)).blobs.upload(key)

    async def write(self, data: memoryview) -> None:
        """The next bytes of the block."""
        self._left -= len(data)
        if not self._skipping:
            self._buffer += data
        if self._upload is not None and (len(self._buffer) >= UPLOAD_BYTES or not self._left):
            # In larger pieces than the socket's: each is handed to a thread.
            content, self._buffer = self._buffer, bytearray()
            pages = self._pages.write(content)
            await self._upload.write(pages if self._left else pages + self._pages.finish())

    async def end(self) -> None:
        """All bytes of the block have come."""
        assert self._block is not None
        block, self._block = self._block, None
        ref = ""
        if self._upload is not None:
            await self._upload.finish()
            self._upload, ref = None, self._ref
            blobs = (await self._parts.stores.at(self._plan.store)).blobs
            await blobs.settle(f"{self._plan.id}/{self._plan.attempt}/blocks")
        elif not self._skipping:
            try:
                check_text(self._plan, block, bytes(self._buffer))
            except AqDataError as exc:
                await self._store()
                raise self._with_acknowledged(exc) from exc
        payload = bytes(self._buffer)
        if len(payload) > LARGE_BYTES:
            ref, payload = await self._parts.store_large(self._plan, payload), b""
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
        appended = await self._parts.metadata.sweeps.append(self._plan.id, blocks, format_instant(now()))
        for block in blocks[: appended.stored]:
            self.acknowledged[block.header.writer] = max(block.header.n, self.acknowledged.get(block.header.writer, 0))
        self.head = appended.state.head
        self._parts.signals.tell(self._plan.id)
        self._parts.folding.grown(appended.state)
        if appended.refused is not None:
            raise self._with_acknowledged(appended.refused)
        await self._parts.folding.make_room(self._plan.id, appended.state)

    def _with_acknowledged(self, exc: AqDataError) -> AqDataError:
        exc.details.setdefault("acknowledged", dict(self.acknowledged))
        return exc

    async def discard(self) -> None:
        """The request broke off: forget the block that was coming, keep those before it."""
        if self._upload is not None:
            await self._upload.discard()
            self._upload = None
