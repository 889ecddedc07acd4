"""Delivering a spool: its frames to the server, in order, in as few requests as may be, each until it is acknowledged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import numpy as np

from aq_data.client.http import Body, Http, decoded
from aq_data.client.spool import End, Frame, Open, Position, Spool
from aq_data.errors import ConflictError, CorruptionError
from aq_data.models.arrays import parse_dtype
from aq_data.models.sweep import Block, NewSweepArray, Piece
from aq_data.wire.blocks import block_head
from aq_data.wire.codec import JSON, PIECE, RAW, MultipartBody, Part, in_pieces
from aq_data.wire.routes import SWEEPS, blocks_path, sweep_path

__all__ = ["Delivery", "SpoolDamagedError"]

BATCH_BYTES = 4 << 20
BATCH_BLOCKS = 5000
"""One request carries about so much; what is larger goes alone and streams from the disk."""
PATIENCE = httpx.Timeout(120.0, connect=5.0)
"""A server whose log is full answers late; one that says nothing for so long is gone, and is tried again."""
MERGED_BYTES = 1 << 20
"""Calls that continue one another become one block up to so many bytes: the server then keeps one row of them."""
TRIES = 3


START = Position()


@dataclass(slots=True)
class _Outgoing:
    """One block to send: the calls it stands for, which continue one another along one dim."""

    header: Block
    frames: list[Frame]
    dim: str | None = None
    size: int = 0


@dataclass(slots=True)
class _Batch:
    frames: list[tuple[Frame, Block]] = field(default_factory=list)
    size: int = 0
    after: Position = START
    end: End | None = None


class SpoolDamagedError(CorruptionError):
    """The spool on this computer lacks something: no retry mends that."""


class Delivery:
    """Where one spool stands. `step` sends the next request; used by one thread at a time."""

    def __init__(self, http: Http, spool: Spool, *, is_live: bool) -> None:
        """`is_live`: this process still writes the spool; otherwise it was left behind, perhaps with half a frame."""
        self._http, self._spool, self._is_live = http, spool, is_live
        self._position = START
        self._limits: dict[int, int] = {}
        self._dims: dict[str, tuple[str, ...]] = {}
        self._is_open = self._is_synced = False
        self._failures = 0
        self.chunks: dict[str, tuple[int, ...]] = {}
        """The chunk shapes that the server chose, as far as its answers told."""
        self.acknowledged = 0
        self.sent = 0
        """Blocks of the spool that this delivery sent."""
        self.arrived_bytes = self._counted = 0
        """Bytes of the values known to have arrived."""
        self.ended: dict[str, Any] | None = None
        """The finished document once the end was delivered."""

    @property
    def position(self) -> Position:
        """Everything before it has arrived."""
        return self._position

    def step(self) -> bool:
        """Send one request; whether there may be more to send. Errors come out as the server raised them."""
        if self.ended is not None:
            return False
        if not self._is_open:
            self._open()
            return True
        if not self._is_synced:
            self._sync()
        batch = self._gather()
        try:
            if batch.frames:
                self._send(batch)
            elif batch.end is not None:
                self._end(batch.end)
            else:
                return False
        except ConflictError as exc:
            # A try before was stored though its answer was lost, or another process delivered: ask where we are.
            if exc.code != "missing_blocks" or self._failures >= TRIES:
                raise
            self._failures += 1
            self._is_synced = False
            return True
        self._failures = 0
        return True

    # --- opening ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        first = next(self._spool.frames(0, 0, self._limit(0)), None)
        if first is not None and first[0].kind == "open":
            frame, after = first
            opening = msgspec.json.decode(frame.header, type=Open)
            document = msgspec.json.encode(opening.document)
            if opening.given:
                response = self._http.request("POST", SWEEPS, self._form(document, opening, frame))
            else:
                response = self._http.request("POST", SWEEPS, Body(lambda: iter((document,)), len(document), JSON))
            self._dims = {array.name: array.dims for array in opening.document.arrays}
            self._position = Position(0, after)
            self.chunks = {array["name"]: tuple(array["chunks"]) for array in decoded(response)["arrays"]}
        self._is_open = True

    def _form(self, document: bytes, opening: Open, frame: Frame) -> Body:
        parts, at = [Part("document", JSON, len(document), document)], 0
        for index, size in opening.given:
            parts.append(Part(f"array:{index}", RAW, size, bytes(self._spool.values(frame, at, at + size))))
            at += size
        body = MultipartBody(parts)
        return Body(lambda: iter(body.again(parts)), body.length, body.content_type)

    def _sync(self) -> None:
        """Ask what has arrived: the server knows best."""
        status = self._http.json("GET", sweep_path(self._spool.target.sweep))
        self.acknowledged = max(self.acknowledged, status["writers"].get(self._spool.target.writer, 0))
        arrays = msgspec.convert(status["arrays"], tuple[NewSweepArray, ...])
        self._dims = {array.name: array.dims for array in arrays}
        self._spool.acknowledge(self.acknowledged)
        self._is_synced = True

    # --- blocks ----------------------------------------------------------------------------------------------------

    def _limit(self, segment: int) -> int:
        """The end of a segment's whole frames."""
        if self._is_live and segment == self._spool.end.segment:
            return self._spool.end.offset
        if segment not in self._limits:
            self._limits[segment] = self._spool.whole(segment)
        return self._limits[segment]

    def _gather(self) -> _Batch:
        """The next frames that have not arrived, up to a batch."""
        batch = _Batch(after=self._position)
        for segment in self._segments():
            start = self._position.offset if segment == self._position.segment else 0
            for frame, after in self._spool.frames(segment, start, self._limit(segment)):
                if frame.kind == "end":
                    batch.end = msgspec.json.decode(frame.header, type=End)
                    return batch
                if frame.kind == "block":
                    block = msgspec.json.decode(frame.header, type=Block)
                    if block.n <= self.acknowledged:
                        self._count(block.n, frame.length)
                    else:
                        if batch.frames and batch.size + frame.length > BATCH_BYTES:
                            return batch
                        batch.frames.append((frame, block))
                        batch.size += frame.length
                batch.after = Position(segment, after)
                if len(batch.frames) >= BATCH_BLOCKS:
                    return batch
        if not batch.frames:
            self._position = batch.after
        return batch

    def _count(self, n: int, size: int) -> None:
        if n > self._counted:
            self._counted = n
            self.arrived_bytes += size

    def _segments(self) -> list[int]:
        if self._is_live:
            newest = self._spool.end.segment
            return [*filter(self._spool.has, range(self._position.segment, newest)), newest]
        return [segment for segment in self._spool.segments() if segment >= self._position.segment]

    def _send(self, batch: _Batch) -> None:
        first = batch.frames[0][1].n
        if first != self.acknowledged + 1:
            raise SpoolDamagedError(
                f"the spool {self._spool.path} lacks blocks {self.acknowledged + 1}..{first - 1} of its writer; "
                "they were neither delivered nor kept"
            )
        parts: list[Callable[[], Iterator[bytes | memoryview]]] = []
        size = 0
        for outgoing in self._merged(batch):
            head = block_head(outgoing.header)
            parts += [_once(head), self._values(outgoing)]
            size += len(head) + outgoing.size

        def pieces() -> Iterator[bytes]:
            return in_pieces(piece for part in parts for piece in part())

        body = Body(pieces, size, RAW)
        answer = decoded(self._http.request("POST", blocks_path(self._spool.target.sweep), body, timeout=PATIENCE))
        last = batch.frames[-1][1].n
        if answer["acknowledged"].get(self._spool.target.writer, 0) < last:
            raise CorruptionError(f"the server acknowledged {answer['acknowledged']} of blocks up to {last}")
        self.acknowledged, self._position = last, batch.after
        self.sent += len(batch.frames)
        for frame, block in batch.frames:
            self._count(block.n, frame.length)
        self._spool.acknowledge(last)

    def _merged(self, batch: _Batch) -> Iterator[_Outgoing]:
        current: _Outgoing | None = None
        for frame, block in batch.frames:
            if current is not None:
                longer = self._continued(current, block, frame.length)
                if longer is not None:
                    current.header, current.dim = longer
                    current.frames.append(frame)
                    current.size += frame.length
                    continue
                yield current
            current = _Outgoing(block, [frame], None, frame.length)
        if current is not None:
            yield current

    def _continued(self, before: _Outgoing, block: Block, size: int) -> tuple[Block, str] | None:
        """`before` and `block` as one block, if the second goes on where the first ends, along one dim of all variables."""
        if before.size + size > MERGED_BYTES or len(block.variables) != len(before.header.variables):
            return None
        pieces: list[Piece] = []
        dim = before.dim
        for a, b in zip(before.header.variables, block.variables, strict=True):
            if a.name != b.name or a.append != b.append or a.nbytes is not None or b.nbytes is not None:
                return None
            dims = self._dims[a.name]
            if dim is None:
                dim = a.append or _advance(a, b, dims)
            if dim is None or dim not in dims or (a.append is not None and a.append != dim):
                return None
            axis = dims.index(dim)
            if not _continues(a, b, axis):
                return None
            shape = (*a.shape[:axis], a.shape[axis] + b.shape[axis], *a.shape[axis + 1 :])
            pieces.append(Piece(a.name, shape, a.dtype, a.start, a.append))
        assert dim is not None
        return Block(block.writer, block.n, tuple(pieces), before.header.count + block.count), dim

    def _values(self, outgoing: _Outgoing) -> Callable[[], Iterator[bytes | memoryview]]:
        if len(outgoing.frames) == 1:
            frame = outgoing.frames[0]
            return lambda: (self._spool.values(frame, at, at + PIECE) for at in range(0, frame.length, PIECE))
        return lambda: self._joined(outgoing)

    def _joined(self, outgoing: _Outgoing) -> Iterator[bytes | memoryview]:
        """The values of several calls as those of one block: variable after variable, joined along the dim."""
        blocks = [msgspec.json.decode(frame.header, type=Block) for frame in outgoing.frames]
        values = [self._spool.values(frame) for frame in outgoing.frames]
        starts = [0] * len(blocks)
        for k, whole in enumerate(outgoing.header.variables):
            dtype = parse_dtype(whole.dtype, whole.name)
            parts: list[bytes | memoryview] = []
            shapes = []
            for i, block in enumerate(blocks):
                size = math.prod(block.variables[k].shape) * dtype.itemsize
                parts.append(values[i][starts[i] : starts[i] + size])
                starts[i] += size
                shapes.append(block.variables[k].shape)
            assert outgoing.dim is not None
            axis = self._dims[whole.name].index(outgoing.dim)
            if math.prod(whole.shape[:axis]) == 1:
                yield b"".join(parts)
            else:
                arrays = [np.frombuffer(part, dtype).reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
                yield np.concatenate(arrays, axis=axis).tobytes()

    def _end(self, end: End) -> None:
        request = {"writers": {self._spool.target.writer: end.n} if end.n else {}, "reason": end.reason}
        self.ended = self._http.json("POST", sweep_path(self._spool.target.sweep, end.step), request)


def _once(data: bytes) -> Callable[[], Iterator[bytes | memoryview]]:
    return lambda: iter((data,))


def _advance(a: Piece, b: Piece, dims: tuple[str, ...]) -> str | None:
    """The one dim along which `b` starts elsewhere than `a`."""
    moved = [dim for dim, x, y in zip(dims, a.start or (), b.start or (), strict=True) if x != y]
    return moved[0] if len(moved) == 1 else None


def _continues(a: Piece, b: Piece, axis: int) -> bool:
    """Whether `b` begins where `a` ends along `axis` and agrees with it along the others."""
    assert a.start is not None
    assert b.start is not None
    others = all(i == axis or (a.start[i] == b.start[i] and a.shape[i] == b.shape[i]) for i in range(len(a.shape)))
    return others and (a.append is not None or b.start[axis] == a.start[axis] + a.shape[axis])
