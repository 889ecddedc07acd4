"""The rules of a sweep beside a plain model of them: what is opened, numbered, placed, ended; a refusal changes nothing."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aq_data.errors import AqDataError, ConflictError, ValidationError
from aq_data.models import sweep as sweeps
from aq_data.models.arrays import ArrayInfo
from aq_data.models.sweep import (
    Block,
    Ending,
    NewSweep,
    NewSweepArray,
    Piece,
    Placed,
    Plan,
    Region,
    Seal,
    State,
    check_new_sweep,
    chunks_of,
    grown_arrays,
    piece_bytes,
    place,
    seal,
)

NOW = "2026-01-31T08:00:00.000000Z"
SIZES: dict[str, int | None] = {"x": None, "y": None, "k": 3, "m": 1}
DIMS = {"a": ("x",), "b": ("x", "k"), "c": ("y", "m", "x"), "s": (), "t": ("k",), "v": ("y",), "x": ("x",)}
DTYPES = {"a": "<f8", "b": "<i4", "c": "<c16", "s": "|b1", "t": "<U4", "v": "string", "x": "<M8[us]"}
ITEMSIZES = {"<f8": 8, "<i4": 4, "<c16": 16, "|b1": 1, "<U4": 16, "<M8[us]": 8}


def info(name: str, dtype: str, dims: tuple[str, ...], chunks: int = 2) -> ArrayInfo:
    shape = tuple(SIZES[dim] or 0 for dim in dims)
    return ArrayInfo(name, dtype, shape, dims, (chunks,) * len(dims), 0, is_partial=True)


PLAN = Plan("0197-id", "attempt", tuple(info(name, DTYPES[name], dims) for name, dims in DIMS.items()), ("x", "y"))
START = State(extents={"x": 0, "y": 0})


def frozen(state: State) -> bytes:
    """Everything a state says, its dicts included."""
    return msgspec.json.encode(state)


def new_array(**fields: Any) -> NewSweepArray:
    return NewSweepArray(**{"name": "y", "dtype": "<f8", "shape": (None,), "dims": ("x",), **fields})


def sweep(*arrays: NewSweepArray, **fields: Any) -> NewSweep:
    return NewSweep(arrays=arrays, **fields)


def block(writer: str = "w", n: int = 1, *pieces: Piece, count: int = 1) -> Block:
    return Block(writer, n, pieces or (Piece("s", (), "|b1"),), count)


def placed_by(state: State, *blocks: Block) -> State:
    for one in blocks:
        found = place(PLAN, state, one, NOW)
        assert found is not None
        state = found[0]
    return state


# --- opening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "told"),
    [
        (sweep(), "at least one array"),
        (sweep(new_array(dims=("x", "z"))), "2 dims were named for 1 axes"),
        (sweep(new_array(dims=("x", "x"), shape=(None, None))), "each dim once"),
        (sweep(new_array(), new_array(name="z", shape=(3,))), "'x' grows in one array and has a fixed length"),
        (sweep(new_array(shape=(3,)), new_array(name="z")), "'x' grows in one array and has a fixed length"),
        (sweep(new_array(shape=(3,)), new_array(name="z", shape=(4,))), "size 3"),
        (sweep(new_array(), new_array()), "two arrays are named 'y'"),
        (sweep(new_array(name="a/b")), "slash"),
        (sweep(new_array(name="..")), "reserved"),
        (sweep(new_array(dims=("",))), "empty"),
        (sweep(new_array(dims=("d" * 201,))), "over 200 bytes"),
        (sweep(new_array(shape=(-1,))), "0 or more"),
        (sweep(new_array(dtype=">f8")), "'>f8'"),
        (sweep(new_array(dtype="O")), "not supported"),
        (sweep(new_array(dtype="(2,)<f8")), "not supported"),
        (sweep(new_array(chunks=(0,))), "1 or more"),
        (sweep(new_array(chunks=(1, 1))), "each axis"),
        (sweep(new_array(chunks=(1 << 40,))), "MiB each"),
        (sweep(new_array(dims=("x",) * 1, shape=(1 << 50,))), "0 or more elements"),
        (sweep(new_array(), planned={"z": 3}), r"planned\['z'\] = 3"),
        (sweep(new_array(shape=(3,)), planned={"x": 3}), r"planned\['x'\] = 3"),
        (sweep(new_array(), planned={"x": 0}), "1 or more"),
        (sweep(new_array(), planned={"x": -1}), "1 or more"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_at_the_opening_by_name(new, told):
    """Each row is one wrong declaration and a part of what is said about it."""
    with pytest.raises(ValidationError, match=told):
        check_new_sweep(new)


def test_growing_dims_have_length_zero_in_the_document_and_are_named_in_order():
    """What is fixed keeps its length, also 0; arrays keep dtype, attrs, role, chunks and codec."""
    new = sweep(
        new_array(name="k", shape=(0,), dims=("k",), role="coordinate"),
        new_array(name="iq", dtype="<c16", dims=("y", "k", "x"), shape=(None, 0, None), chunks=(1, 2, 3), codec="lz4"),
        new_array(name="s", dims=(), shape=(), attrs={"units": "V"}),
        name="T1",
        planned={"x": 7},
    )
    document, growing = check_new_sweep(new)
    assert growing == ("y", "x")
    assert [array.shape for array in document.arrays] == [(0,), (0, 0, 0), ()]
    for array, declared in zip(document.arrays, new.arrays, strict=True):
        for field in ("name", "dtype", "dims", "attrs", "role", "chunks", "codec"):
            assert getattr(array, field) == getattr(declared, field)
    assert document.name == "T1"


# --- numbers -------------------------------------------------------------------------------------------------------

numbered = st.tuples(st.sampled_from(["v", "w"]), st.integers(-1, 8), st.integers(-1, 4))


@given(st.lists(numbered, max_size=25))
def test_numbers_of_each_writer_are_taken_once_without_gaps_whatever_comes(calls):
    """A repeat changes nothing, a gap is refused naming what is missing, one writer's numbers never touch another's."""
    state, known = START, {"v": 0, "w": 0}
    for writer, n, count in calls:
        before = frozen(state)
        if not 1 <= count <= n:
            with pytest.raises(ValidationError, match="count from 1"):
                place(PLAN, state, block(writer, n, count=count), NOW)
        elif n <= known[writer]:
            assert place(PLAN, state, block(writer, n, count=count), NOW) is None
        elif n - count + 1 != known[writer] + 1:
            with pytest.raises(ConflictError) as failure:
                place(PLAN, state, block(writer, n, count=count), NOW)
            assert failure.value.code == "missing_blocks"
            assert (failure.value.details["writer"], failure.value.details["known"]) == (writer, known[writer])
            assert f"send from {known[writer] + 1}" in str(failure.value)
            if n - count > known[writer]:
                assert f"missing {known[writer] + 1}..{n - count}" in str(failure.value)
        else:
            after = placed_by(state, block(writer, n, count=count))
            known[writer] = n
            assert after.head == state.head + 1
            assert after.writers == {w: k for w, k in known.items() if k}
            assert frozen(state) == before, "the old state still stands"
            state = after
            continue
        assert frozen(state) == before


@pytest.mark.parametrize("writer", ["", "w" * 65])
def test_a_writer_needs_a_name_of_1_to_64_characters(writer):
    """Neither none nor an endless one."""
    with pytest.raises(ValidationError, match="1 to 64"):
        place(PLAN, START, block(writer), NOW)
    assert place(PLAN, START, block("w" * 64), NOW) is not None


def test_writers_are_limited_but_those_there_are_go_on(monkeypatch):
    """The state holds each writer, so their number has an end."""
    monkeypatch.setattr(sweeps, "MAX_WRITERS", 2)
    state = placed_by(START, block("a"), block("b"))
    with pytest.raises(ValidationError, match="2 writers"):
        place(PLAN, state, block("c"), NOW)
    assert placed_by(state, block("a", 2)).writers == {"a": 2, "b": 1}


# --- places --------------------------------------------------------------------------------------------------------


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    """Mostly right, sometimes wrong in one way."""
    name = draw(st.sampled_from(sorted(DIMS)))
    dims = DIMS[name]
    shape = tuple(draw(st.integers(0, SIZES[dim] or 4)) for dim in dims)
    start = None
    if draw(st.booleans()):
        start = tuple(
            draw(st.integers(0, 6) if SIZES[d] is None else st.integers(0, SIZES[d] - n))
            for d, n in zip(dims, shape, strict=True)
        )
    growing = [dim for dim in dims if SIZES[dim] is None]
    append = draw(st.none() | st.sampled_from(growing)) if growing else None
    dtype, nbytes = DTYPES[name], 5 if name == "v" else None
    match draw(st.integers(0, 40)):
        case 0:
            dtype = draw(st.sampled_from(["<f4", ">f8", "nonsense", "O"]))
        case 1:
            shape = (*shape, 1)
        case 2:
            start = (0,) * (len(dims) + 1)
        case 3:
            append = draw(st.sampled_from(["k", "m", "y", "x", "q"]))
        case 4:
            name = "nobody"
        case 5 if dims:
            start = (-1,) * len(dims)
        case 6 if dims:
            shape = (-1,) * len(dims)
        case 7:
            start, shape = tuple(5 for _ in dims), tuple(9 for _ in dims)
        case 8:
            nbytes = None
    return Piece(name, shape, dtype, start, append, nbytes)


def expected_region(piece: Piece, extents: dict[str, int]) -> Region | None:
    """Where a piece belongs by the rules; None when it is to be refused."""
    dims = DIMS.get(piece.name)
    if dims is None or piece.dtype != DTYPES[piece.name] or len(piece.shape) != len(dims):
        return None
    start = list(piece.start if piece.start is not None else [0] * len(dims))
    if len(start) != len(dims):
        return None
    if piece.append is not None:
        if piece.append not in dims or SIZES[piece.append] is not None:
            return None
        start[dims.index(piece.append)] = extents[piece.append]
    for dim, first, length in zip(dims, start, piece.shape, strict=True):
        size = SIZES[dim]
        if first < 0 or length < 0 or (size is not None and first + length > size):
            return None
    if piece.dtype == "string":
        return None if piece.nbytes is None else Region(piece.name, tuple(start), piece.shape, piece.nbytes)
    return Region(piece.name, tuple(start), piece.shape, math.prod(piece.shape) * ITEMSIZES[piece.dtype])


@given(st.lists(st.lists(pieces(), max_size=3), max_size=12))
def test_every_block_lands_where_the_rules_say_or_changes_nothing(blocks):
    """Appended pieces begin at the old end; extents are the ends of all non-empty regions and never shrink."""
    state, n, written, touched, size = START, 0, [], set(), 0
    for contents in blocks:
        before = frozen(state)
        regions = [expected_region(piece, state.extents) for piece in contents]
        is_good = contents and len({p.name for p in contents}) == len(contents) and all(regions)
        if not is_good:
            with pytest.raises(ValidationError):
                place(PLAN, state, Block("w", n + 1, tuple(contents)), NOW)
            assert frozen(state) == before
            continue
        found = place(PLAN, state, Block("w", n + 1, tuple(contents)), NOW)
        assert found is not None
        after, placed = found
        assert frozen(state) == before
        n += 1
        assert placed == Placed(n, "w", n, NOW, tuple(regions))
        written += [region for region in regions if 0 not in region.shape]
        touched |= {region.name for region in regions if 0 not in region.shape}
        size += sum(region.nbytes for region in regions)
        expected = {
            dim: max(
                (
                    r.start[DIMS[r.name].index(dim)] + r.shape[DIMS[r.name].index(dim)]
                    for r in written
                    if dim in DIMS[r.name]
                ),
                default=0,
            )
            for dim in ("x", "y")
        }
        assert after.extents == expected
        assert all(after.extents[dim] >= state.extents[dim] for dim in expected)
        assert (after.head, after.unfolded_bytes, after.last_block_at) == (n, size, NOW)
        assert set(after.touched) == touched
        assert len(after.touched) == len(touched)
        state = after
    assert msgspec.json.decode(frozen(state), type=State) == state


def test_two_pieces_that_append_in_one_block_begin_at_the_same_place():
    """They are one moment: the longer one makes the extent, whatever their order."""
    one, two = Piece("a", (1,), "<f8", append="x"), Piece("x", (3,), "<M8[us]", append="x")
    state = placed_by(START, block("w", 1, Piece("a", (2,), "<f8")))
    for pair in ((one, two), (two, one)):
        after, placed = place(PLAN, state, block("w", 2, *pair), NOW)
        assert [region.start for region in placed.variables] == [(2,), (2,)]
        assert after.extents["x"] == 5


def test_the_place_along_the_appended_dim_is_the_stores_whatever_the_client_says():
    """A start given there is not looked at."""
    state = placed_by(START, block("w", 1, Piece("a", (2,), "<f8")))
    for start in (None, (0,), (77,), (-3,)):
        _, placed = place(PLAN, state, block("w", 2, Piece("a", (1,), "<f8", start, "x")), NOW)
        assert placed.variables[0].start == (2,)


def test_a_sweep_keeps_track_of_a_limited_number_of_chunks(monkeypatch):
    """One far write would otherwise make a map that fills the memory."""
    monkeypatch.setattr(sweeps, "MAX_CHUNKS", 8)
    assert place(PLAN, START, block("w", 1, Piece("a", (1,), "<f8", (7,))), NOW) is not None
    with pytest.raises(ValidationError, match="8: choose larger chunks"):
        place(PLAN, START, block("w", 1, Piece("a", (1,), "<f8", (8,))), NOW)
    with pytest.raises(ValidationError, match="no position"):
        place(PLAN, START, block("w", 1, Piece("a", (1,), "<f8", (1 << 70,))), NOW)


def test_the_limit_of_chunks_holds_for_arrays_that_only_share_the_dim(monkeypatch):
    """What one variable grows, all that have the dim grow; two pieces of a block grow a third array together."""
    monkeypatch.setattr(sweeps, "MAX_CHUNKS", 8)
    fits = Piece("a", (1,), "<f8", (7,))  # `a` has 4 chunks of 2 then, `b` (x, k) has 4 x 2
    assert place(PLAN, START, block("w", 1, fits), NOW) is not None
    with pytest.raises(ValidationError, match="'b'"):
        place(PLAN, START, block("w", 1, Piece("a", (1,), "<f8", (8,))), NOW)
    with pytest.raises(ValidationError, match="'c'"):
        place(PLAN, START, block("w", 1, fits, Piece("v", (1,), "string", (4,), nbytes=5)), NOW)


# --- hostile headers -----------------------------------------------------------------------------------------------

numbers = st.sampled_from([-(2**70), -1, 0, 1, 2, 3, 2**31, 2**53, 2**63, 2**64, 2**70])
hostile_pieces = st.fixed_dictionaries(
    {
        "name": st.sampled_from([*DIMS, "", "../x", "\x00", "a" * 5000]),
        "shape": st.lists(numbers, max_size=3) | st.just([1] * 40),
        "dtype": st.sampled_from([*set(DTYPES.values()), "V8", "<f8,<f8", "|O", "", "M8", "(9999999,)f8", "\x00"]),
    },
    optional={
        "start": st.lists(numbers, max_size=3) | st.none(),
        "append": st.sampled_from(["x", "k", "", "nobody" * 1000]),
        "nbytes": numbers,
    },
)
hostile_blocks = st.fixed_dictionaries(
    {
        "writer": st.sampled_from(["w", "", "w" * 100, "\x00", "💥"]),
        "n": numbers,
        "variables": st.lists(hostile_pieces, max_size=3),
    },
    optional={"count": numbers},
)


@given(hostile_blocks)
@example({"writer": "w", "n": 1, "variables": [{"name": "b", "shape": [0, 3], "dtype": "<i4", "start": [2**70, 0]}]})
def test_a_hostile_header_is_refused_in_words_or_placed_within_bounds(header):
    """No other error comes out, messages stay short, and what is placed survives being written down."""
    one = msgspec.json.decode(json.dumps(header).encode(), type=Block)
    before = frozen(START)
    try:
        sizes = [piece_bytes(piece) for piece in one.variables]
        found = place(PLAN, START, one, NOW)
    except AqDataError as refusal:
        assert isinstance(refusal, (ValidationError, ConflictError))  # noqa: PT017
        assert len(str(refusal)) < 1000  # noqa: PT017
    else:
        assert found is not None
        state, placed = found
        assert [region.nbytes for region in placed.variables] == sizes
        assert msgspec.json.decode(msgspec.json.encode(placed), type=Placed) == placed
        assert msgspec.json.decode(frozen(state), type=State) == state
        assert all(extent <= 2**48 for extent in state.extents.values())
    assert frozen(START) == before


@pytest.mark.parametrize(
    ("piece", "size"),
    [
        (Piece("a", (2, 3), "<f8"), 48),
        (Piece("a", (), "<c16"), 16),
        (Piece("a", (0, 5), "<c16"), 0),
        (Piece("a", (2,), "<U4"), 32),
        (Piece("a", (2,), "|S3"), 6),
        (Piece("a", (2,), "<M8[us]"), 16),
        (Piece("a", (2,), "string", nbytes=17), 17),
        (Piece("a", (2,), "|T16", nbytes=0), 0),
        (Piece("a", (2,), "<f8", nbytes=99), 16),
        (Piece("a", (2,), "string"), None),
        (Piece("a", (2,), "string", nbytes=-1), None),
        (Piece("a", (-1,), "<f8"), None),
        (Piece("a", (1 << 49,), "<f8"), None),
        (Piece("a", (0, 1 << 49), "<f8"), None),
        (Piece("a", (1,), ">f8"), None),
        (Piece("a", (1,), "O"), None),
    ],
)
def test_the_bytes_of_a_piece_follow_from_its_dtype_and_shape_alone(piece, size):
    """Text of variable length says its own size; None stands for a refusal."""
    if size is None:
        with pytest.raises(ValidationError):
            piece_bytes(piece)
    else:
        assert piece_bytes(piece) == size


# --- the end -------------------------------------------------------------------------------------------------------


def test_the_first_seal_wins_and_nothing_is_accepted_after_it_but_repeats():
    """The same end again is harmless, the other one is refused, a new block too; a repeat is still acknowledged."""
    state = placed_by(START, block("w", 1), block("w", 2))
    for outcome, other in (("complete", "abandoned"), ("abandoned", "complete")):
        sealed = seal(PLAN, state, outcome, Ending({"w": 2}, "why"), NOW)
        assert sealed is not None
        assert sealed.seal == Seal(outcome, "why", NOW)
        assert msgspec.structs.replace(sealed, seal=None) == state
        assert seal(PLAN, sealed, outcome, Ending({"w": 2}, "another reason"), "later") is None
        with pytest.raises(ConflictError) as failure:
            seal(PLAN, sealed, other, Ending(), NOW)
        assert failure.value.code == "illegal_state"
        assert outcome in str(failure.value)
        for writer in ("w", "new"):
            with pytest.raises(ConflictError) as failure:
                place(PLAN, sealed, block(writer, sealed.writers.get(writer, 0) + 1), NOW)
            assert failure.value.code == "finished"
        assert place(PLAN, sealed, block("w", 2), NOW) is None
        assert place(PLAN, sealed, block("w", 1), NOW) is None


@given(
    st.dictionaries(st.sampled_from("vwz"), st.integers(1, 4)), st.dictionaries(st.sampled_from("vwz"), st.integers(-1, 5))
)
def test_an_end_is_refused_exactly_while_a_named_number_has_not_come(arrived, named):
    """Writers that are not named do not hold it up."""
    state = placed_by(START, *(block(w, n, count=n) for w, n in arrived.items()))
    missing = {writer for writer, n in named.items() if n > arrived.get(writer, 0)}
    if missing:
        with pytest.raises(ConflictError) as failure:
            seal(PLAN, state, "complete", Ending(named), NOW)
        writer = failure.value.details["writer"]
        assert failure.value.code == "missing_blocks"
        assert writer in missing
        assert f"missing {arrived.get(writer, 0) + 1}..{named[writer]}" in str(failure.value)
    else:
        assert seal(PLAN, state, "complete", Ending(named), NOW) is not None


def test_an_end_that_comes_again_with_numbers_that_never_came_is_not_answered_as_if_they_had():
    """A writer whose blocks are missing must not take another's end for the receipt of its own."""
    sealed = seal(PLAN, placed_by(START, block("w", 1)), "complete", Ending(), NOW)
    assert sealed is not None
    with pytest.raises(ConflictError):
        seal(PLAN, sealed, "complete", Ending({"late": 3}), NOW)


def test_a_reason_is_cut_to_its_limit():
    """An exception's text may be endless."""
    sealed = seal(PLAN, START, "abandoned", Ending(reason="x" * 10_000), NOW)
    assert sealed is not None
    assert sealed.seal is not None
    assert sealed.seal.reason == "x" * 2000


# --- extents -------------------------------------------------------------------------------------------------------


def test_arrays_grow_with_their_dims_and_an_unwritten_own_coordinate_is_left_out():
    """An index of NaN that nobody measured would be in everybody's way; before its dim grows, and any other array, is shown."""
    assert [array.name for array in grown_arrays(PLAN, START)] == [array.name for array in PLAN.arrays]
    state = placed_by(START, block("w", 1, Piece("a", (2,), "<f8"), Piece("v", (3,), "string", nbytes=9)))
    shown = {array.name: array for array in grown_arrays(PLAN, state)}
    assert {name: array.shape for name, array in shown.items()} == {
        "a": (2,), "b": (2, 3), "c": (3, 1, 2), "s": (), "t": (3,), "v": (3,)}  # fmt: skip
    assert (shown["b"].nbytes, shown["v"].nbytes, shown["t"].nbytes) == (24, 0, 48)
    assert all(array.is_partial for array in shown.values())
    empty = placed_by(state, block("w", 2, Piece("x", (0,), "<M8[us]", append="x")))
    assert "x" not in {array.name for array in grown_arrays(PLAN, empty)}
    touched = placed_by(state, block("w", 2, Piece("x", (1,), "<M8[us]", append="x")))
    finals = {array.name: array for array in grown_arrays(PLAN, touched, is_partial=False)}
    assert finals["x"].shape == (3,)
    assert not any(array.is_partial for array in finals.values())


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(1, 4)), max_size=3))
def test_the_chunks_of_a_region_are_those_that_hold_its_elements(axes):
    """Each once; an empty region has none, a scalar the one there is."""
    start, shape, chunks = (tuple(axis[i] for axis in axes) for i in range(3))
    found = list(chunks_of(Region("a", start, shape, 0), chunks))
    inside = {tuple(int(i + s) // c for i, s, c in zip(index, start, chunks, strict=True)) for index in np.ndindex(*shape)}
    assert set(found) == inside
    assert len(found) == len(inside)
