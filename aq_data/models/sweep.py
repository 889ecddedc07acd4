"""What a sweep is: declared arrays whose dims may grow, blocks that are numbered and placed, and its end. Pure.

A block is one atomic write: a region of each of several variables. Its writer numbers it, which only makes repeats harmless;
the store gives it its position in the order (`seq`), and along a dim that it appends to. The rules are docs/decisions/0007.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import numpy as np

from aq_data.errors import ConflictError, ValidationError
from aq_data.models.arrays import MAX_ELEMENTS, ArrayInfo, NewArray, check_arrays, is_text, parse_dtype
from aq_data.models.datafile import NewDataFile, Typed, check_new
from aq_data.models.stores import DEFAULT_STORE
from aq_data.models.structs import resolve

__all__ = [
    "Block",
    "Ending",
    "NewSweep",
    "NewSweepArray",
    "Piece",
    "Placed",
    "Plan",
    "Region",
    "Seal",
    "State",
    "check_chunks",
    "check_new_sweep",
    "chunks_of",
    "grown_arrays",
    "piece_bytes",
    "place",
    "seal",
]

MAX_CHUNKS = 1 << 20
"""Chunks one array of a sweep may have: the map of them is kept whole in memory while it is open."""
MAX_WRITERS = 10_000
MAX_REASON = 2000

Outcome = Literal["complete", "abandoned"]


class NewSweepArray(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As `NewArray`, with null in `shape` where the dim grows; `dims` must be named."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    dims: tuple[str, ...]
    attrs: dict[str, Any] = {}
    role: Literal["data", "coordinate"] = "data"
    chunks: tuple[int, ...] | None = None
    codec: Literal["zstd", "lz4", "none"] = "zstd"


class NewSweep(Typed, kw_only=True, forbid_unknown_fields=True):
    """What a client sends to open a sweep. `planned` are expected lengths of growing dims, `notify` addresses to tell.

    `store` is as in `NewDataFile`.
    """

    id: str | None = None
    store: str | msgspec.UnsetType = msgspec.UNSET
    arrays: tuple[NewSweepArray, ...] = ()
    planned: dict[str, int] = {}
    notify: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True):
    """What never changes after the opening. `arrays` have length 0 along the dims that grow."""

    id: str
    attempt: str
    arrays: tuple[ArrayInfo, ...]
    growing: tuple[str, ...]
    notify: tuple[str, ...] = ()
    store: str = DEFAULT_STORE

    def array(self, name: str) -> ArrayInfo:
        """ValidationError naming those there are when it is none of them."""
        found = next((array for array in self.arrays if array.name == name), None)
        if found is None:
            known = ", ".join(repr(array.name) for array in self.arrays)
            raise ValidationError(f"the sweep has no variable {name[:80]!r}; it has {known}")
        return found


class Seal(msgspec.Struct, frozen=True):
    """The end of the log: nothing is accepted after it. `actor` is the user of the token that asked for it."""

    outcome: Outcome
    reason: str
    at: str
    actor: str = ""


class State(msgspec.Struct, frozen=True):
    """What changes. `head` is the last position in the order, `folded` the last one that is in chunks.

    `writers` holds the last number of each writer, `extents` the length of each growing dim, `touched` the variables
    written so far, `manifest` names the map of chunks (`<cut>-<token>`, empty before the first fold). `token` counts
    leases; `leased_until` is when the last one may be taken over. `revisions` are those of the document while it is open,
    each with the `head` it came after. `told` lists the addresses told of the end.
    """

    extents: dict[str, int]
    head: int = 0
    folded: int = 0
    writers: dict[str, int] = {}
    touched: tuple[str, ...] = ()
    manifest: str = ""
    token: int = 0
    leased_until: float = 0.0
    unfolded_bytes: int = 0
    last_block_at: str | None = None
    folded_at: float = 0.0
    seal: Seal | None = None
    ended_revision: int = 0
    revisions: tuple[tuple[int, int], ...] = ()
    told: tuple[str, ...] = ()


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A region of one variable in a block, as a client sends it.

    `start` has one position per dim (left out: zeros); along the dim named by `append` the store decides it. `nbytes` is
    needed for text of variable length alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: tuple[int, ...] | None = None
    append: str | None = None
    nbytes: int | None = None


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The header of a block. It stands for the writer's numbers n-count+1 to n: a writer may send several as one."""

    writer: str
    n: int
    variables: tuple[Piece, ...]
    count: int = 1


class Region(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece in its place: half-open [start, start + shape) along each dim; `nbytes` of its values."""

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    nbytes: int


class Placed(msgspec.Struct, frozen=True, omit_defaults=True):
    """A block in its place in the order: what the log keeps, and what followers are told."""

    seq: int
    writer: str
    n: int
    at: str
    variables: tuple[Region, ...]
    count: int = 1


class Ending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request to end: `writers` are the last numbers that must have arrived, `reason` goes with `abandoned`."""

    writers: dict[str, int] = {}
    reason: str = ""


# --- opening -------------------------------------------------------------------------------------------------------------


def check_new_sweep(new: NewSweep) -> tuple[NewDataFile, tuple[str, ...]]:
    """The document normalised, with length 0 along growing dims, and those dims; ValidationError naming what is wrong."""
    growing: dict[str, bool] = {}
    for array in new.arrays:
        if len(array.shape) != len(array.dims):
            raise ValidationError(f"array {array.name!r}: {len(array.dims)} dims were named for {len(array.shape)} axes")
        if len(set(array.dims)) != len(array.dims):
            raise ValidationError(f"array {array.name!r}: a sweep's array takes each dim once, not {array.dims}")
        for dim, size in zip(array.dims, array.shape, strict=True):
            if growing.setdefault(dim, size is None) != (size is None):
                raise ValidationError(f"dimension {dim!r} grows in one array and has a fixed length in another")
    if not new.arrays:
        raise ValidationError("a sweep needs at least one array; `save` keeps metadata alone")
    for dim, length in new.planned.items():
        if not growing.get(dim) or length < 1:
            raise ValidationError(f"planned[{dim!r}] = {length}: it takes a dim that grows and a length of 1 or more")
    arrays = tuple(_at_length_zero(array) for array in new.arrays)
    typed = {field: getattr(new, field) for field in Typed.__struct_fields__}
    checked = check_new(NewDataFile(**typed, id=new.id, arrays=arrays))
    return checked, tuple(dim for dim, grows in growing.items() if grows)


def _at_length_zero(array: NewSweepArray) -> NewArray:
    if not all(array.dims):
        raise ValidationError(f"array {array.name!r}: a dimension name is empty")
    new = NewArray(
        name=array.name,
        dtype=array.dtype,
        shape=tuple(n or 0 for n in array.shape),
        dims=array.dims,
        attrs=array.attrs,
        role=array.role,
        chunks=array.chunks,
        codec=array.codec,
    )
    check_arrays((new,))
    return new


def check_chunks(name: str, shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> None:
    """Refuse a shape whose chunks could not be kept track of."""
    chunks = math.prod(-(-n // c) for n, c in zip(shape, chunk_shape, strict=True))
    if chunks > MAX_CHUNKS or math.prod(max(1, n) for n in shape) > MAX_ELEMENTS:
        raise ValidationError(
            f"array {name!r} of shape {shape} would have {chunks} chunks; a sweep keeps track of {MAX_CHUNKS}: "
            "choose larger chunks or a smaller shape"
        )


# --- blocks --------------------------------------------------------------------------------------------------------------


def piece_bytes(piece: Piece) -> int:
    """Bytes of a piece's values; ValidationError when its dtype or shape makes no sense."""
    dtype = parse_dtype(piece.dtype, piece.name)
    if any(n < 0 for n in piece.shape) or math.prod(max(1, n) for n in piece.shape) > MAX_ELEMENTS:
        raise ValidationError(f"variable {piece.name[:80]!r}: the shape {piece.shape} cannot be that of a block")
    if not is_text(dtype):
        return math.prod(piece.shape) * dtype.itemsize
    if piece.nbytes is None or piece.nbytes < 0:
        raise ValidationError(f"variable {piece.name[:80]!r}: text of variable length needs `nbytes`")
    return piece.nbytes


def place(plan: Plan, state: State, block: Block, at: str) -> tuple[State, Placed] | None:
    """The state after `block` and the block in its place; None for a repeat, which changes nothing.

    Raises ConflictError (`missing_blocks`) when earlier numbers of the writer are missing, or (`finished`) after the end;
    ValidationError for an unknown variable, another dtype or rank, or a region out of bounds.
    """
    known = state.writers.get(block.writer, 0)
    if not 1 <= block.count <= block.n <= MAX_ELEMENTS or not 1 <= len(block.writer) <= 64:
        raise ValidationError("a block needs a writer of 1 to 64 characters, and numbers that count from 1")
    if block.n <= known:
        return None
    first = block.n - block.count + 1
    if first != known + 1:
        missing = f"missing {known + 1}..{first - 1}" if first > known else f"{first}..{known} are there already"
        message = f"writer {block.writer}: {missing}; send from {known + 1}"
        raise ConflictError(message, code="missing_blocks", writer=block.writer, known=known)
    if state.seal is not None:
        raise ConflictError(f"the sweep {plan.id} is {state.seal.outcome}; open a new one", code="finished")
    if known == 0 and len(state.writers) >= MAX_WRITERS:
        raise ValidationError(f"the sweep had {MAX_WRITERS} writers; open a new one")
    if not block.variables or len({piece.name for piece in block.variables}) != len(block.variables):
        raise ValidationError("a block names each of its variables once, and at least one")
    extents = dict(state.extents)
    regions = tuple(_region(plan, state.extents, extents, piece) for piece in block.variables)
    for array in plan.arrays if extents != state.extents else ():  # a dim belongs to all that have it
        shape = tuple(extents.get(dim, n) for dim, n in zip(array.dims, array.shape, strict=True))
        check_chunks(array.name, shape, array.chunks)
    seq = state.head + 1
    placed = Placed(seq, block.writer, block.n, at, regions, block.count)
    touched = {region.name for region in regions if 0 not in region.shape} - set(state.touched)
    after = msgspec.structs.replace(
        state,
        extents=extents,
        head=seq,
        writers={**state.writers, block.writer: block.n},
        touched=(*state.touched, *sorted(touched)),
        unfolded_bytes=state.unfolded_bytes + sum(region.nbytes for region in regions),
        last_block_at=at,
    )
    return after, placed


def _region(plan: Plan, before: dict[str, int], after: dict[str, int], piece: Piece) -> Region:
    array = plan.array(piece.name)
    where = f"variable {piece.name!r}"
    if piece.dtype != array.dtype:
        raise ValidationError(f"{where} holds {array.dtype}, not {piece.dtype[:40]}", code="unsupported_dtype")
    start = piece.start if piece.start is not None else (0,) * len(array.dims)
    if len(piece.shape) != len(array.dims) or len(start) != len(array.dims):
        raise ValidationError(f"{where} has the dims {array.dims}; a block of it needs {len(array.dims)} starts and lengths")
    if piece.append is not None and (piece.append not in array.dims or piece.append not in plan.growing):
        raise ValidationError(f"{where} cannot be appended to along {piece.append[:80]!r}: that is no growing dim of it")
    at: list[int] = []
    for dim, begin, length, fixed in zip(array.dims, start, piece.shape, array.shape, strict=True):
        position = before[dim] if dim == piece.append else begin
        if not 0 <= position <= MAX_ELEMENTS:
            raise ValidationError(f"{where}: start {position} of dim {dim!r} is no position")
        if dim in plan.growing:
            if 0 not in piece.shape:
                after[dim] = max(after[dim], position + length)
        elif position + length > fixed:
            raise ValidationError(f"{where}: [{position}, {position + length}) lies outside dim {dim!r} of length {fixed}")
        at.append(position)
    return Region(piece.name, tuple(at), piece.shape, piece_bytes(piece))


# --- the end -------------------------------------------------------------------------------------------------------------


def seal(plan: Plan, state: State, outcome: Outcome, ending: Ending, at: str, actor: str = "") -> State | None:
    """The state after the end was asked for; None when it had ended so before.

    Raises ConflictError: `missing_blocks` when a writer's last number has not come, `illegal_state` when it ended otherwise.
    """
    for writer, n in ending.writers.items():
        known = state.writers.get(writer, 0)
        if n > known:
            raise ConflictError(
                f"writer {writer}: missing {known + 1}..{n}; deliver them first (`aq-data spool push`)",
                code="missing_blocks",
                writer=writer,
                known=known,
            )
    if state.seal is not None:
        if state.seal.outcome == outcome:
            return None
        raise ConflictError(
            f"the sweep {plan.id} is {state.seal.outcome} already; it cannot become {outcome}", code="illegal_state"
        )
    return msgspec.structs.replace(state, seal=Seal(outcome, ending.reason[:MAX_REASON], at, actor))


def grown_arrays(plan: Plan, state: State, is_partial: bool = True) -> tuple[ArrayInfo, ...]:
    """The arrays with their true extents. Of a dim that has grown, a coordinate nobody wrote is left out."""
    return tuple(
        _grown(array, state, is_partial)
        for array in plan.arrays
        if array.name in state.touched or array.dims != (array.name,) or not state.extents.get(array.name)
    )


def _grown(array: ArrayInfo, state: State, is_partial: bool) -> ArrayInfo:
    shape = tuple(state.extents.get(dim, n) for dim, n in zip(array.dims, array.shape, strict=True))
    dtype = parse_dtype(array.dtype, array.name)
    nbytes = 0 if is_text(dtype) else math.prod(shape) * dtype.itemsize
    return msgspec.structs.replace(array, shape=shape, nbytes=nbytes, is_partial=is_partial)


def chunks_of(region: Region, chunks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Indices of the chunks a region touches; none when it is empty."""
    if 0 in region.shape:
        return iter(())
    spans = [(s // c, (s + n - 1) // c + 1) for s, n, c in zip(region.start, region.shape, chunks, strict=True)]
    low = tuple(first for first, _ in spans)
    return (tuple(a + b for a, b in zip(low, index, strict=True)) for index in np.ndindex(*(b - a for a, b in spans)))


resolve(NewSweepArray, NewSweep, Plan, Seal, State, Piece, Block, Region, Placed, Ending)
