"""The spool: what the experiment wrote, on the measuring computer's own disk, until the server has it.

One folder per writer, `<root>/<sweep id>.<writer>/`, with `target` (where it is to go), numbered segments of frames, `lock`
(held while the writer's process lives) and `acknowledged` (the last number the server is known to have; the server knows
better). A frame is u64 length and CRC-32 of its body, then the body: u8 kind, u32 header length, JSON header, values. Frames
are appended and never changed, so what a crash leaves is whole up to its last frame.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import filelock
import msgspec

from aq_data.errors import CorruptionError, StorageError, ValidationError
from aq_data.models.arrays import parse_dtype
from aq_data.models.structs import resolve
from aq_data.models.sweep import Block, NewSweep

__all__ = [
    "End",
    "Frame",
    "Open",
    "Position",
    "Spool",
    "SpoolTarget",
    "read_target",
]

SEGMENT_BYTES = 64 << 20
"""A segment beyond this is followed by another; one whose blocks have all arrived is deleted."""
READ_BYTES = 1 << 20
"""Frames are read so much at a time; one that is longer is left on the disk, to be read in parts."""

_HEAD = struct.Struct("<QI")
_BODY = struct.Struct("<BI")

Kind = Literal["open", "block", "end"]
_KINDS: tuple[Kind, ...] = ("open", "block", "end")
Buffer = bytes | memoryview


class Open(msgspec.Struct, frozen=True):
    """The header of the first frame: what opens the sweep. `given` has index and bytes of each array's values."""

    document: NewSweep
    given: tuple[tuple[int, int], ...]


class End(msgspec.Struct, frozen=True):
    """The header of the last frame: how the sweep is to end, after block `n`."""

    step: Literal["finish", "abandon"]
    n: int
    reason: str = ""


class SpoolTarget(msgspec.Struct, frozen=True):
    """Where a spool is to be delivered: the address or folder, the sweep, the writer's name there."""

    target: str
    sweep: str
    writer: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. Its values are in `data`, or, when that is None, `length` bytes from `offset` of the segment on."""

    kind: Kind
    header: bytes
    segment: int
    offset: int
    length: int
    data: memoryview | None


class Position(NamedTuple):
    """A place between two frames."""

    segment: int = 0
    offset: int = 0


class Spool:
    """One writer's folder. `append` belongs to the experiment's thread, everything else to the sender's."""

    def __init__(self, path: Path, target: SpoolTarget) -> None:
        self.path, self.target = path, target
        # Released by whichever thread ends the sweep.
        self._lock = filelock.FileLock(path / "lock", thread_local=False)
        self._out: BinaryIO | None = None
        self.end = Position()
        """Where the next frame will stand, while this process writes it."""
        self._reading: tuple[int, BinaryIO] | None = None
        self._last: dict[int, int] = {}

    # --- life ------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, root: Path, target: SpoolTarget) -> Spool:
        """A new spool, locked. StorageError, naming the place, when it cannot be made."""
        path = root / f"{target.sweep}.{target.writer}"
        try:
            path.mkdir(parents=True)
            spool = cls(path, target)
            spool._lock.acquire(blocking=False)
            spool._open_segment(0)
            partial = path / "target.part"
            partial.write_bytes(msgspec.json.encode(target))
            partial.replace(path / "target")
        except OSError as exc:
            raise _unwritable(path, exc) from exc
        return spool

    @classmethod
    def open(cls, path: Path) -> Spool | None:
        """A spool that a process left behind, locked; None while its process lives, and when it is none."""
        try:
            spool = cls(path, read_target(path))
            spool._lock.acquire(blocking=False)
        except (OSError, msgspec.DecodeError, filelock.Timeout):
            return None
        for segment in spool.segments():
            numbers = [
                msgspec.json.decode(frame.header, type=Block).n
                for frame, _ in spool.frames(segment, 0, spool.whole(segment))
                if frame.kind == "block"
            ]
            spool._last[segment] = max(numbers, default=0)
        return spool

    def close(self) -> None:
        """Let go of the files and the lock; what was not delivered stays."""
        if self._out is not None:
            self._out.close()
            self._out = None
        self._close_reading()
        self._lock.release()

    def _close_reading(self) -> None:
        if self._reading is not None:
            self._reading[1].close()
            self._reading = None

    def remove(self) -> None:
        """Everything was delivered, or is not wanted: delete the folder."""
        if self._out is not None:
            self._out.close()
            self._out = None
        self._close_reading()
        # First what makes it a spool: if this stops halfway, nobody takes the rest for one.
        with suppress(OSError):
            (self.path / "target").unlink(missing_ok=True)
        self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)

    # --- writing ---------------------------------------------------------------------------------------------------

    def append(self, kind: Kind, header: bytes, values: Sequence[Buffer], n: int = 0) -> None:
        """Add a frame; `n` is the number of a block. What it holds is safe from the end of this process on return.

        StorageError when the disk is full or broken: this frame is not there then, those before it are.
        """
        if self.end.offset > SEGMENT_BYTES:
            self._open_segment(self.end.segment + 1)
        body = _BODY.pack(_KINDS.index(kind), len(header)) + header
        checksum, size = zlib.crc32(body), len(body)
        for part in values:
            checksum = zlib.crc32(part, checksum)
            size += len(part)
        head = _HEAD.pack(size, checksum) + body
        assert self._out is not None
        try:
            if size <= READ_BYTES:
                _write(self._out, b"".join((head, *values)))
            else:
                for part in (head, *values):
                    _write(self._out, part)
        except OSError as exc:
            # What was written of it is overwritten by the next frame, even where it cannot be cut off.
            with suppress(OSError):
                self._out.seek(self.end.offset)
            with suppress(OSError):
                self._out.truncate(self.end.offset)
            raise _unwritable(self.path, exc) from exc
        # One assignment: the sender sees the old end or the new one.
        segment, offset = self.end
        self.end = Position(segment, offset + _HEAD.size + size)
        if n:
            self._last[segment] = n

    def _open_segment(self, number: int) -> None:
        try:
            opened = self._segment_path(number).open("xb", buffering=0)
        except OSError as exc:
            raise _unwritable(self.path, exc) from exc
        if self._out is not None:
            self._out.close()
        self._out, self.end = opened, Position(number, 0)

    def sync(self) -> None:
        """Flush to the disk: from here on it survives a power failure too."""
        out = self._out
        if out is not None:
            with suppress(OSError, ValueError):  # a new segment was begun meanwhile: the next call flushes that
                os.fsync(out.fileno())

    # --- reading ---------------------------------------------------------------------------------------------------

    def _segment_path(self, number: int) -> Path:
        return self.path / f"{number:08d}.segment"

    def has(self, segment: int) -> bool:
        """Whether a segment is still there: one whose blocks have arrived is deleted."""
        return self._segment_path(segment).exists()

    def segments(self) -> list[int]:
        """Numbers of the segments that are still there."""
        return sorted(int(path.stem) for path in self.path.glob("*.segment"))

    def frames(self, segment: int, start: int, stop: int) -> Iterator[tuple[Frame, int]]:
        """Whole frames in [start, stop) of a segment, each with the offset after it."""
        at, data, data_at = start, memoryview(b""), start
        while at + _HEAD.size + _BODY.size <= stop:
            inside = at - data_at
            if inside + _HEAD.size + _BODY.size > len(data):
                data, data_at, inside = memoryview(self._pread(segment, at, min(READ_BYTES, stop - at))), at, 0
            length, _ = _HEAD.unpack_from(data, inside)
            after = at + _HEAD.size + length
            if after > stop or length < _BODY.size:
                return
            if after - data_at > len(data) and inside:
                data, data_at, inside = memoryview(self._pread(segment, at, min(READ_BYTES, stop - at))), at, 0
            kind, header_length = _BODY.unpack_from(data, inside + _HEAD.size)
            first = inside + _HEAD.size + _BODY.size
            header = bytes(data[first : first + header_length])
            if len(header) < header_length:
                header = self._pread(segment, data_at + first, header_length)
            offset = data_at + first + header_length
            values = data[first + header_length : after - data_at] if after - data_at <= len(data) else None
            yield Frame(_KINDS[kind], header, segment, offset, after - offset, values), after
            at = after

    def whole(self, segment: int) -> int:
        """Bytes of a segment up to the end of its last whole frame, every checksum read: what a crash left."""
        size, at = self._segment_path(segment).stat().st_size, 0
        while at + _HEAD.size <= size:
            length, checksum = _HEAD.unpack(self._pread(segment, at, _HEAD.size))
            stop = at + _HEAD.size + length
            if length < _BODY.size or stop > size:
                return at
            found = 0
            for start in range(at + _HEAD.size, stop, READ_BYTES):
                found = zlib.crc32(self._pread(segment, start, min(READ_BYTES, stop - start)), found)
            if found != checksum:
                return at
            at = stop
        return at

    def damage(self) -> str:
        """Where frames that were accepted cannot be read, in words; "" when what cannot is no more than a crash leaves.

        That is a frame at the very end that was not written whole, or a tail of zeros.
        """
        segments = self.segments()
        for segment in segments:
            at, size = self.whole(segment), self._segment_path(segment).stat().st_size
            if at < size and not (segment == segments[-1] and self._is_cut_off(segment, at, size)):
                return f"{size - at} bytes of {self._segment_path(segment).name}, from byte {at} on"
        return ""

    def _is_cut_off(self, segment: int, at: int, size: int) -> bool:
        if size - at < _HEAD.size + _BODY.size:
            return True
        if not any(any(self._pread(segment, i, min(READ_BYTES, size - i))) for i in range(at, size, READ_BYTES)):
            return True
        length, _ = _HEAD.unpack(self._pread(segment, at, _HEAD.size))
        kind, header_length = _BODY.unpack(self._pread(segment, at + _HEAD.size, _BODY.size))
        first = at + _HEAD.size + _BODY.size
        if at + _HEAD.size + length <= size or kind >= len(_KINDS) or header_length > length - _BODY.size:
            return False
        if first + header_length > size:
            return size - at <= READ_BYTES
        try:
            values = _values_size(_KINDS[kind], self._pread(segment, first, header_length))
        except (msgspec.DecodeError, ValidationError):
            return False
        return bool(length == _BODY.size + header_length + values)

    def _pread(self, segment: int, start: int, length: int) -> bytes:
        if self._reading is None or self._reading[0] != segment:
            self._close_reading()
            self._reading = (segment, self._segment_path(segment).open("rb", buffering=0))
        assert self._reading is not None
        file = self._reading[1]
        file.seek(start)
        data = file.read(length)
        while len(data) < length:
            more = file.read(length - len(data))
            if not more:
                raise CorruptionError(f"the spool {self.path} became shorter while it was read")
            data += more
        return data

    def values(self, frame: Frame, start: int = 0, stop: int | None = None) -> bytes | memoryview:
        """Bytes [start, stop) of a frame's values."""
        stop = frame.length if stop is None else min(stop, frame.length)
        if frame.data is not None:
            return frame.data[start:stop]
        return self._pread(frame.segment, frame.offset + start, stop - start)

    # --- what arrived ----------------------------------------------------------------------------------------------

    def acknowledge(self, n: int) -> None:
        """The server has the blocks up to `n`: remember it, and delete the segments that hold nothing else."""
        with suppress(OSError):
            (self.path / "acknowledged").write_text(str(n))
        for segment, last in list(self._last.items()):
            # The first holds the opening, the newest is being written.
            if last <= n and 0 < segment < self.end.segment:
                if self._reading is not None and self._reading[0] == segment:
                    self._close_reading()
                with suppress(OSError):  # somebody looks at it just now: the next time
                    self._segment_path(segment).unlink(missing_ok=True)
                    del self._last[segment]

    def mark_refused(self, reason: str) -> bool:
        """Remember why the server did not take it, for who asks what waits; whether that is news."""
        file = self.path / "refused"
        try:
            is_news = not file.exists() or file.read_text() != reason
            file.write_text(reason)
        except OSError:
            return True
        return is_news

    def mark_delivering(self) -> None:
        """Say that a process other than its writer is delivering this spool: see `is_being_delivered`."""
        with suppress(OSError):
            (self.path / "delivering").touch()

    def acknowledged(self) -> int:
        """The last number known to have arrived; maybe more did."""
        try:
            return int((self.path / "acknowledged").read_text() or 0)
        except (OSError, ValueError):
            return 0


def _values_size(kind: Kind, header: bytes) -> int:
    """Bytes of the values that follow a header."""
    if kind == "open":
        return sum(size for _, size in msgspec.json.decode(header, type=Open).given)
    if kind == "end":
        msgspec.json.decode(header, type=End)
        return 0
    pieces = msgspec.json.decode(header, type=Block).variables
    return sum(
        math.prod(piece.shape) * parse_dtype(piece.dtype, piece.name).itemsize if piece.nbytes is None else piece.nbytes
        for piece in pieces
    )


def _write(file: BinaryIO, part: Buffer) -> None:
    view = memoryview(part)
    while view:
        view = view[file.write(view) :]


def _unwritable(path: Path, exc: OSError) -> StorageError:
    return StorageError(
        f"the spool {path} cannot be written ({exc.strerror or exc}): the values of this call are NOT kept, those of "
        "earlier calls are; make room, or set AQ_DATA_SPOOL to another disk",
        path=str(path),
    )


def read_target(path: Path) -> SpoolTarget:
    """Where the spool in a folder is to go."""
    return msgspec.json.decode((path / "target").read_bytes(), type=SpoolTarget)


resolve(Open, End, SpoolTarget)
