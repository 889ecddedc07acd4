"""Calls that continue one another are sent as one block: what becomes of them is the same as one by one."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aq_data.client import delivery as delivering
from aq_data.client.delivery import Delivery
from aq_data.client.regions import Variables
from aq_data.client.spool import Spool, SpoolTarget
from aq_data.models.arrays import ArrayInfo, fill_of, parse_dtype
from aq_data.models.sweep import Block, NewSweepArray, Plan, State, place
from aq_data.storage.arrays.format import text_from_wire

SIZES: dict[str, int | None] = {"x": None, "y": None, "k": 3}
DIMS = {"a": ("x",), "b": ("k", "x"), "c": ("x", "y"), "s": (), "t": ("x",), "u": ("y", "k", "x")}
DTYPES = {"a": "<M8[us]", "b": "<f8", "c": "<U3", "s": "|b1", "t": "string", "u": "<c8"}
DECLARED = tuple(NewSweepArray(name, DTYPES[name], tuple(SIZES[dim] for dim in dims), dims) for name, dims in DIMS.items())
PLAN = Plan(
    "sweep",
    "attempt",
    tuple(ArrayInfo(a.name, a.dtype, tuple(n or 0 for n in a.shape), a.dims, (4,) * len(a.dims), 0) for a in DECLARED),
    ("x", "y"),
)

names = itertools.count()


@pytest.fixture(scope="module")
def root():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def values_of(name: str, shape: tuple[int, ...], number: int) -> Any:
    numbers = np.arange(number * 100, number * 100 + math.prod(shape)).reshape(shape)
    if DTYPES[name] == "string":
        return np.array([f"{n}" * (n % 3) for n in numbers.reshape(-1)], object).reshape(shape)
    if DTYPES[name] == "<U3":
        return (numbers % 1000).astype("<U3")
    return numbers.astype("<i8").astype(DTYPES[name])


class Written:
    """What a store holds that places blocks as they come."""

    def __init__(self) -> None:
        self.state = State(extents={"x": 0, "y": 0})
        self.arrays = {
            name: np.full((3,) * len(d), fill_of(self._dtype(name)), self._dtype(name)) for name, d in DIMS.items()
        }
        self.blocks = 0

    def _dtype(self, name: str) -> np.dtype:
        return parse_dtype(DTYPES[name], name)

    def take(self, block: Block, payload: bytes) -> None:
        found = place(PLAN, self.state, block, "now")
        assert found is not None
        self.state, placed = found
        self.blocks += 1
        at = 0
        for region in placed.variables:
            data, dtype = payload[at : at + region.nbytes], self._dtype(region.name)
            at += region.nbytes
            part = text_from_wire(data, math.prod(region.shape)) if dtype.kind == "O" else np.frombuffer(data, dtype)
            self._grow(region.name, tuple(s + n for s, n in zip(region.start, region.shape, strict=True)))
            where = tuple(slice(s, s + n) for s, n in zip(region.start, region.shape, strict=True))
            self.arrays[region.name][where] = part.reshape(region.shape)
        assert at == len(payload)

    def _grow(self, name: str, shape: tuple[int, ...]) -> None:
        old = self.arrays[name]
        grown = np.full(np.maximum(old.shape, shape) if shape else (), fill_of(old.dtype), old.dtype)
        grown[tuple(slice(0, n) for n in old.shape)] = old
        self.arrays[name] = grown

    def content(self) -> dict[str, Any]:
        dims = {"k": 3, **self.state.extents}
        shapes = {name: tuple(dims[dim] for dim in DIMS[name]) for name in DIMS}
        for name, shape in shapes.items():
            self._grow(name, shape)
        return {name: self.arrays[name][tuple(map(slice, shape))] for name, shape in shapes.items()}


Call = tuple[dict[str, Any], dict[str, Any] | None, str | None]


def sent_and_wanted(root: Path, calls: list[Call]) -> tuple[Written, Written, list[Block]]:
    """What the calls make when they are sent, and one by one; and what was sent."""
    spool = Spool.create(root, SpoolTarget("nowhere", f"sweep{next(names)}", "w"))
    variables, wanted, sent = Variables(DECLARED), Written(), Written()
    try:
        for n, (values, at, dim) in enumerate(calls, 1):
            pieces, buffers = variables.pieces(values, at, dim)
            block = Block("w", n, pieces)
            spool.append("block", msgspec.json.encode(block), buffers, n)
            wanted.take(block, b"".join(buffers))
        delivery = Delivery(None, spool, is_live=True)  # type: ignore[arg-type]  # what is asked of it needs no server
        delivery._dims = dict(DIMS)
        batch = delivery._gather()
        blocks = []
        for outgoing in delivery._merged(batch):
            payload = b"".join(delivery._values(outgoing)())
            assert len(payload) == outgoing.size
            sent.take(outgoing.header, payload)
            blocks.append(outgoing.header)
    finally:
        spool.remove()
    return sent, wanted, blocks


def check_same(sent: Written, wanted: Written) -> None:
    assert sent.state.extents == wanted.state.extents
    assert sent.state.writers == wanted.state.writers
    assert set(sent.state.touched) == set(wanted.state.touched)
    assert sent.state.unfolded_bytes == wanted.state.unfolded_bytes
    for name, values in wanted.content().items():
        found = sent.content()[name]
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[tuple[str, ...], str | None, str, list[tuple[dict[str, int], int]]]]:
    """Runs of calls that name the same variables; most go on where the one before ended."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        chosen = tuple(draw(st.lists(st.sampled_from(sorted(DIMS)), min_size=1, max_size=3, unique=True)))
        append = draw(st.sampled_from([None, "x", "y"]))
        if append is not None and not any(append in DIMS[name] for name in chosen):
            append = None
        along = draw(st.sampled_from(["x", "y", "k"]))
        start = {dim: draw(st.integers(0, 1)) for dim in ("x", "y", "k")}
        steps = []
        for _ in range(draw(st.integers(1, 5))):
            count = draw(st.integers(0, 2))
            if along == "k":
                count = min(count, 3 - start["k"])
            steps.append((dict(start), count))
            goes = draw(st.sampled_from(["on", "on", "on", "again", "gap"]))
            start[along] += {"on": count, "again": 0, "gap": 1}[goes]
            start["k"] = min(start["k"], 2)
        found.append((chosen, append, along, steps))
    return found


def calls_of(found: Any) -> list[Call]:
    calls: list[Call] = []
    for chosen, append, along, steps in found:
        for start, count in steps:
            values, dims_named = {}, {dim for name in chosen for dim in DIMS[name]}
            for name in chosen:
                shape = []
                for dim in DIMS[name]:
                    size = count if dim == (append or along) else 1
                    shape.append(min(size, 3 - start["k"]) if dim == "k" else size)
                values[name] = values_of(name, tuple(shape), len(calls))
            at = {dim: slice(start[dim], None) for dim in sorted(dims_named) if dim != append}
            calls.append((values, at, append))
    return calls


@given(runs())
def test_merged_blocks_make_the_same_arrays_extents_and_numbers_as_single_ones(root, found):
    """Along any axis, of several variables at once, also where only some of the calls continue one another."""
    sent, wanted, blocks = sent_and_wanted(root, calls_of(found))
    check_same(sent, wanted)
    assert sum(block.count for block in blocks) == wanted.blocks
    numbers = [(block.n - block.count + 1, block.n) for block in blocks]
    assert [first for first, _ in numbers] == [1, *(last + 1 for _, last in numbers[:-1])]


TOGETHER = [
    (dim, chosen, appended)
    for chosen in [("a",), ("b",), ("c",), ("u",), ("a", "b"), ("c", "u"), ("b", "u"), ("a", "c", "u")]
    for dim in ("x", "y", "k")
    for appended in (False, True)
    if all(dim in DIMS[name] for name in chosen) and not (appended and SIZES[dim] is not None)
]


@pytest.mark.parametrize(("dim", "chosen", "appended"), TOGETHER)
def test_calls_that_continue_one_another_become_one_block_along_any_axis(root, dim, chosen, appended):
    """One row in the log instead of thousands: this is what the merging is for."""
    calls: list[Call] = []
    for i in range(3):
        values = {name: values_of(name, tuple(1 if d == dim else 2 for d in DIMS[name]), i) for name in chosen}
        at = None if appended else {dim: slice(i, i + 1)}
        calls.append((values, at, dim if appended else None))
    sent, wanted, blocks = sent_and_wanted(root, calls)
    check_same(sent, wanted)
    assert [(block.n, block.count) for block in blocks] == [(3, 3)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (({"a": [1]}, None, "x"), ({"a": [1], "s": True}, None, "x")),
        (({"a": [1], "s": True}, None, "x"), ({"a": [2], "s": False}, None, "x")),
        (({"a": [1]}, {"x": slice(0, 1)}, None), ({"a": [2]}, {"x": slice(2, 3)}, None)),
        (({"a": [1]}, {"x": slice(1, 2)}, None), ({"a": [2]}, {"x": slice(0, 1)}, None)),
        (({"a": [1, 2]}, {"x": slice(0, 2)}, None), ({"a": [3]}, {"x": slice(1, 2)}, None)),
        (({"a": [1]}, {"x": slice(0, 1)}, None), ({"a": [2]}, {"x": slice(0, 1)}, None)),
        (({"a": [1]}, None, "x"), ({"a": [2]}, {"x": slice(1, 2)}, None)),
        (({"a": [1]}, {"x": slice(0, 1)}, None), ({"a": [2]}, None, "x")),
        (({"c": [["p"]]}, None, "x"), ({"c": [["q"]]}, None, "y")),
        (({"c": [["p"]]}, {"x": 0, "y": slice(0, 1)}, None), ({"c": [["q"]]}, {"x": 1, "y": slice(1, 2)}, None)),
        (({"c": [["p"]]}, None, "x"), ({"c": [["q", "r"]]}, None, "x")),
        (({"a": [1]}, {"x": slice(0, 1)}, None), ({"t": ["q"]}, {"x": slice(1, 2)}, None)),
        (({"t": ["p"]}, None, "x"), ({"t": ["q"]}, None, "x")),
        (({"s": True}, None, None), ({"s": False}, None, None)),
    ],
)
def test_calls_that_do_not_continue_one_another_stay_apart(root, first, second):
    """Elsewhere, over one another, another dim, another set of variables, text: each is a block of its own."""

    def typed(call: Call) -> Call:
        values = {name: np.array(v, object if name == "t" else None) for name, v in call[0].items()}
        values = {name: v.astype("<M8[us]") if name == "a" else v for name, v in values.items()}
        at = call[1]
        if at and any(isinstance(place, int) for place in at.values()):
            values = {name: v.reshape(v.shape[1:]) for name, v in values.items()}
        return values, at, call[2]

    sent, wanted, blocks = sent_and_wanted(root, [typed(first), typed(second)])
    check_same(sent, wanted)
    assert [block.count for block in blocks] == [1, 1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 400))
@example([10, 10, 10], 160)
def test_a_merged_block_stays_within_its_size(root, counts, limit):
    """So much is joined in memory at once; a call that is larger goes alone."""
    before = delivering.MERGED_BYTES
    delivering.MERGED_BYTES = limit
    try:
        sent, wanted, blocks = sent_and_wanted(
            root, [({"b": values_of("b", (3, n), i)}, None, "x") for i, n in enumerate(counts)]
        )
    finally:
        delivering.MERGED_BYTES = before
    check_same(sent, wanted)
    for block in blocks:
        assert block.count == 1 or math.prod(block.variables[0].shape) * 8 <= limit
    for one, two in itertools.pairwise(blocks):
        size = sum(math.prod(block.variables[0].shape) for block in (one, two)) * 8
        assert two.count > 1 or size > limit, "what fits is joined"
