"""A sweep in storage beside NumPy arrays with a written mask: folded at any cut, read by any selection, published, read again."""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from aq_data.errors import CorruptionError, NotFoundError
from aq_data.models.arrays import ArrayInfo, fill_of, is_text, parse_dtype
from aq_data.models.datafile import DataFile
from aq_data.models.selection import select, whole
from aq_data.models.sweep import Block, Piece, Plan, State, grown_arrays, place
from aq_data.storage.arrays import folding, payload
from aq_data.storage.arrays.chunking import chunk_grid
from aq_data.storage.arrays.folder import FolderBlobs
from aq_data.storage.arrays.folding import Folder
from aq_data.storage.arrays.format import decode_chunk
from aq_data.storage.arrays.growing import GrowingArray, View
from aq_data.storage.arrays.manifest import Manifest, block_key, is_paged, make_ref
from aq_data.storage.arrays.memory import MemoryBlobs
from aq_data.storage.arrays.pages import PAGE_BYTES, PageWriter
from aq_data.storage.arrays.store import ArrayStore
from aq_data.storage.metadata.sweeplog import Row
from aq_data.wire.codec import raw_view, text_bytes

ID, NOW = "0197f000-0000-7000-8000-000000000000", "2026-01-31T08:00:00.000000Z"
SIZES: dict[str, int | None] = {"x": None, "y": None, "k": 5, "m": 1}
DIM_SETS = [("x",), ("x", "k"), ("k", "x"), ("y", "x"), ("k",), (), ("k", "m"), ("x", "m", "y"), ("k", "y", "x")]
DTYPES = ["<f8", "|b1", "<c16", "<M8[us]", "<U4", "string", "|T16", "<i4", "|S3", "<m8[ns]", "<f4"]

runs = itertools.count()


def values_of(dtype: np.dtype, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values of which about one in seven is what stands for "not measured"."""
    numbers = (np.arange(math.prod(shape)) * 7919 + seed * 104729) % 997
    fill = fill_of(dtype)
    if dtype.kind in "OTUS":
        made = [fill if n % 7 == 0 else (f"é{n}" if dtype.kind in "OTU" else b"%d" % n) for n in numbers.tolist()]
        flat = np.array(made, object).astype(dtype) if made else np.empty(0, dtype)
    elif dtype.kind in "mM":
        flat = numbers.astype("<i8").astype(dtype)
    else:
        flat = (numbers % 2).astype(dtype) if dtype.kind == "b" else numbers.astype(dtype)
    if dtype.kind in "fcmM":
        flat[numbers % 7 == 0] = fill
    return flat.reshape(shape)


def wire(values: np.ndarray) -> bytes:
    return text_bytes(values) if values.dtype.kind in "OT" else bytes(raw_view(np.ascontiguousarray(values)))


@dataclass
class Model:
    """What is in storage, and what should be."""

    blobs: Any
    plan: Plan
    state: State
    rows: list[Row] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, blobs: Any, arrays: list[tuple[str, tuple[str, ...], tuple[int, ...]]], codec: str = "zstd") -> Model:
        infos = tuple(
            ArrayInfo(f"a{i}", dtype, tuple(SIZES[d] or 0 for d in dims), dims, chunks, 0, codec=codec, is_partial=True)
            for i, (dtype, dims, chunks) in enumerate(arrays)
        )
        growing = tuple(d for d in ("x", "y") if any(d in info.dims for info in infos))
        plan = Plan(ID, f"attempt{next(runs)}", infos, growing)
        model = cls(blobs, plan, State(extents=dict.fromkeys(growing, 0)))
        for info in infos:
            dtype = parse_dtype(info.dtype, info.name)
            model.values[info.name] = np.full(info.shape, fill_of(dtype), dtype)
            model.masks[info.name] = np.zeros(info.shape, bool)
        return model

    async def write(self, parts: list[tuple[str, tuple[int, ...], tuple[int, ...]]], *, large: bool = False) -> None:
        """One block; each part has name, start and shape."""
        n = self.state.head + 1
        pieces, contents = [], []
        for name, start, shape in parts:
            info = self.plan.array(name)
            values = values_of(parse_dtype(info.dtype, name), shape, n)
            encoded = wire(values)
            size = len(encoded) if is_text(values.dtype) else None
            pieces.append(Piece(name, shape, info.dtype, start, nbytes=size))
            contents.append((name, start, values, encoded))
        found = place(self.plan, self.state, Block("w", n, tuple(pieces)), NOW)
        assert found is not None
        self.state, placed = found
        data, ref = b"".join(encoded for *_, encoded in contents), ""
        if large:
            # Every other one as older versions stored them, without checksums.
            ref = make_ref() if n % 2 else f"ref{n}"
            data = await self._stored(data, ref)
        self.rows.append(Row(placed, data, ref))
        for info in grown_arrays(self.plan, self.state):
            grown = np.full(info.shape, fill_of(self.values[info.name].dtype), self.values[info.name].dtype)
            mask = np.zeros(info.shape, bool)
            inside = tuple(slice(0, size) for size in self.values[info.name].shape)
            grown[inside], mask[inside] = self.values[info.name], self.masks[info.name]
            self.values[info.name], self.masks[info.name] = grown, mask
        for name, start, values, _ in contents:
            if 0 not in values.shape:
                where = tuple(slice(s, s + size) for s, size in zip(start, values.shape, strict=True))
                self.values[name][where], self.masks[name][where] = values, True

    async def _stored(self, data: bytes, ref: str) -> bytes:
        pages = PageWriter()
        stored = pages.write(data) + pages.finish() if is_paged(ref) else data
        await self.blobs.put_many([(block_key(ID, self.plan.attempt, ref), lambda: stored)])
        return b""

    async def fold(self, folder: Folder, count: int) -> list[str]:
        """The oldest `count` unfolded blocks into chunks."""
        if not self.rows or not count:
            return []
        self.state = msgspec.structs.replace(self.state, token=self.state.token + 1)
        taken, rest = tuple(self.rows[:count]), self.rows[count:]
        generation, gone = await folder.fold(self.plan, self.state, taken)
        self.state = msgspec.structs.replace(self.state, folded=taken[-1].placed.seq, manifest=generation)
        self.rows = rest
        return gone

    async def view(self, folder: Folder) -> View:
        return View(self.plan, self.state, await folder.manifest(self.plan, self.state), tuple(self.rows))

    def names(self) -> list[str]:
        return [info.name for info in grown_arrays(self.plan, self.state)]


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found, expected)


def taken(array: np.ndarray, key: tuple[Any, ...]) -> np.ndarray:
    """Each axis indexed in turn."""
    for axis in reversed(range(len(key))):
        entry = np.array(key[axis], int) if isinstance(key[axis], list) else key[axis]
        array = array[(slice(None),) * axis + (entry, ...)]
    return array


async def check_view(model: Model, folder: Folder, key_of: Any = None) -> None:
    """Whole arrays and written maps, a selection of each, and every chunk, of the newest moment."""
    view = await model.view(folder)
    assert [array.name for array in view.arrays()] == model.names()
    for array in view.arrays():
        growing, expected, mask = GrowingArray(model.blobs, view, array), model.values[array.name], model.masks[array.name]
        assert array.shape == expected.shape
        same(await growing.read(whole(array.shape)), expected)
        same(await growing.written(whole(array.shape)), mask)
        if key_of is not None:
            key = key_of(array.shape)
            selection = select(key, array.shape)
            same(await growing.read(selection), taken(expected, key))
            same(await growing.written(selection), taken(mask, key))
            pieces = [piece.reshape(-1) async for piece in growing.stream(selection, 64)]
            if pieces:
                np.testing.assert_array_equal(np.concatenate(pieces), taken(expected, key).reshape(-1))
        await check_chunks(model, growing, array, expected, mask)


async def check_chunks(
    model: Model, growing: GrowingArray, array: ArrayInfo, expected: np.ndarray, mask: np.ndarray
) -> None:
    """What the Zarr view gives of each chunk: nothing only where nothing was measured."""
    for index in np.ndindex(*chunk_grid(array.shape, array.chunks)):
        where = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, array.chunks, strict=True))
        stored, is_covered = growing.stored_chunk(index)
        chunk = await growing.read_chunk(index)
        assert chunk.shape == array.chunks
        wanted = expected[(*where, ...)]  # an array also of a scalar
        inside = (*(slice(0, n) for n in wanted.shape), ...)
        same(chunk[inside], wanted)
        assert bool(stored or is_covered) == bool(mask[where].any())
        if stored and not is_covered:
            raw = decode_chunk(await model.blobs.get(stored), array, expected.dtype, stored)
            same(raw[inside], wanted)


async def check_published(model: Model, folder: Folder) -> None:
    """As the document then has it: by the array store, by zarr, by xarray."""
    before = model.blobs
    finals = await folder.publish(await model.view(folder))
    again = await Folder(before).publish(await model.view(folder))
    assert finals == again, "a repeat makes the same"
    document = DataFile(id=ID, state="complete", revision=2, created_at=NOW, updated_at=NOW, arrays=finals)
    store = ArrayStore(before)
    await store.write_copy(document, model.plan.attempt, "digest")
    await before.remove(f"{ID}/{model.plan.attempt}/open")
    await before.remove(f"{ID}/{model.plan.attempt}/blocks")
    for array in finals:
        expected, mask = model.values[array.name], model.masks[array.name]
        assert array.shape == expected.shape
        assert array.is_partial == (not mask.all())
        same(await store.read(ID, model.plan.attempt, array, whole(array.shape)), expected)
        same(await store.written(ID, model.plan.attempt, array, whole(array.shape)), mask)
        backwards = select(tuple(slice(None, None, -2) for _ in array.shape), array.shape)
        same(
            await store.read(ID, model.plan.attempt, array, backwards), taken(expected, (slice(None, None, -2),) * mask.ndim)
        )
        same(
            await store.written(ID, model.plan.attempt, array, backwards), taken(mask, (slice(None, None, -2),) * mask.ndim)
        )
    path = before.location(f"{ID}/{model.plan.attempt}/arrays.zarr")
    if path:
        group = zarr.open_group(path, mode="r", zarr_format=3, use_consolidated=False)
        for array in finals:
            expected = model.values[array.name]
            plain = np.asarray(group[array.name][...])
            np.testing.assert_array_equal(plain.astype(expected.dtype), expected)
        with xr.open_zarr(path, consolidated=True, decode_cf=False) as dataset:
            for array in finals:
                found, expected = dataset[array.name], model.values[array.name]
                assert (found.dims, found.shape) == (array.dims, expected.shape)
                np.testing.assert_array_equal(found.values.astype(expected.dtype), expected)


# --- generated sweeps ----------------------------------------------------------------------------------------------

declared = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.sampled_from(DIM_SETS)).flatmap(
        lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.tuples(*[st.integers(1, 4)] * len(pair[1])))
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def parts(draw: st.DrawFn, plan: Plan) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    found = []
    for array in draw(st.lists(st.sampled_from(plan.arrays), min_size=1, max_size=3, unique_by=lambda a: a.name)):
        shape, start = [], []
        for dim in array.dims:
            length = draw(st.integers(0, SIZES[dim] or 6))
            start.append(draw(st.integers(0, SIZES[dim] - length if SIZES[dim] is not None else 9)))
            shape.append(length)
        found.append((array.name, tuple(start), tuple(shape)))
    return found


def entries(draw: Any, size: int) -> Any:
    if size and draw(st.booleans()):
        return draw(st.integers(-size, size - 1) | st.lists(st.integers(-size, size - 1), max_size=4))
    return draw(st.slices(size))


@pytest.mark.parametrize("kind", ["folder", "memory"])
@settings(max_examples=max(20, settings().max_examples // 3))
@given(data=st.data())
def test_a_sweep_reads_as_numpy_arrays_with_a_mask_whenever_and_however_it_is_folded(tmp_path_factory, kind, data):
    """Any dtypes, chunks, blocks over one another, large blocks in blobs of their own, folds at any cut; then published."""
    arrays, codec = data.draw(declared), data.draw(st.sampled_from(["zstd", "lz4", "none"]))

    async def body():
        blobs = FolderBlobs(tmp_path_factory.mktemp("blobs")) if kind == "folder" else MemoryBlobs()
        try:
            model, folder = Model.of(blobs, arrays, codec), Folder(blobs)
            for _ in range(data.draw(st.integers(1, 6), "turns")):
                for _ in range(data.draw(st.integers(0, 3), "blocks")):
                    await model.write(data.draw(parts(model.plan)), large=data.draw(st.booleans(), "large"))
                for key in await model.fold(folder, data.draw(st.integers(0, 4), "cut")):
                    await blobs.remove(key)
                if data.draw(st.booleans(), "restart"):
                    folder = Folder(blobs)
                await check_view(model, folder, lambda shape: tuple(entries(data.draw, n) for n in shape))
            await model.fold(folder, len(model.rows))
            await check_view(model, folder)
            await check_published(model, folder)
        finally:
            await blobs.close()

    asyncio.run(body())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_from_log_and_chunks_and_the_finished_group(tmp_path, dtype):
    """A scalar, a trace and a map: partly measured, folded in two steps, small blocks and large ones."""

    async def body():
        blobs = FolderBlobs(tmp_path / "blobs")
        try:
            model, folder = (
                Model.of(blobs, [(dtype, (), ()), (dtype, ("x",), (3,)), (dtype, ("k", "x"), (2, 3))]),
                Folder(blobs),
            )
            await check_view(model, folder)
            await model.write([("a0", (), ()), ("a1", (1,), (4,)), ("a2", (0, 2), (3, 2))])
            await check_view(model, folder)
            await model.fold(folder, 1)
            await model.write([("a1", (3,), (4,)), ("a2", (1, 0), (4, 4))], large=True)
            await model.write([("a0", (), ())], large=True)
            await check_view(model, folder)
            await model.fold(folder, 1)
            await check_view(model, folder)
            await model.fold(folder, 1)
            await check_published(model, folder)
        finally:
            await blobs.close()

    asyncio.run(body())


def test_a_sweep_without_a_block_is_published_empty(tmp_path):
    """Arrays of length 0, and of a fixed shape that nobody measured: all fill, nothing written."""

    async def body():
        blobs = FolderBlobs(tmp_path / "blobs")
        try:
            model, folder = (
                Model.of(blobs, [("<f8", ("x",), (3,)), ("<i4", ("k",), (2,)), ("string", (), ())]),
                Folder(blobs),
            )
            await check_view(model, folder)
            await check_published(model, folder)
        finally:
            await blobs.close()

    asyncio.run(body())


def test_an_array_measured_to_its_end_is_not_partial_though_its_last_chunks_reach_beyond():
    """Only one with a gap keeps written maps after the end."""

    async def body():
        blobs = MemoryBlobs()
        model, folder = Model.of(blobs, [("<f8", ("k", "x"), (2, 4)), ("<f8", ("x",), (4,))]), Folder(blobs)
        await model.write([("a0", (0, 0), (5, 6)), ("a1", (0,), (5,))])
        await model.fold(folder, 1)
        await check_published(model, folder)
        left = {entry.key.split("/")[3] async for entry in blobs.walk(f"{ID}/{model.plan.attempt}/written")}
        assert left == {"a1"}
        await blobs.close()

    asyncio.run(body())


def test_a_large_block_is_read_in_parts_that_bound_memory(monkeypatch):
    """Along any axis, in halves where a part is over the limit; the parts together are the block."""
    monkeypatch.setattr(payload, "SLAB_BYTES", 100)

    async def body():
        blobs = MemoryBlobs()
        for dims, start, shape in (
            (("x",), (2,), (70,)),
            (("k", "x"), (1, 3), (4, 33)),
            (("m", "x"), (0, 1), (1, 40)),
            (("x", "k"), (5, 0), (30, 5)),
            (("y", "m", "x"), (0, 0, 0), (3, 1, 30)),
        ):
            model, folder = (
                Model.of(blobs, [("<f8", dims, (4,) * len(dims)), ("<U4", dims, (3,) * len(dims))]),
                Folder(blobs),
            )
            await model.write([("a0", start, shape), ("a1", start, shape)], large=True)
            await check_view(model, folder, lambda shape: tuple(slice(None, None, -3) for _ in shape))
            await model.fold(folder, 1)
            await check_view(model, folder)
        await blobs.close()

    asyncio.run(body())


def test_folding_in_groups_makes_the_same_as_at_once(monkeypatch):
    """Few chunks are in memory at a time, however many a fold touches."""

    async def manifest_of(limit: int) -> tuple[Any, ...]:
        monkeypatch.setattr(folding, "GROUP_BYTES", limit)
        blobs = MemoryBlobs()
        model, folder = Model.of(blobs, [("<f8", ("k", "x"), (2, 3)), ("<i4", ("x",), (2,))]), Folder(blobs)
        for i in range(5):
            await model.write([("a0", (0, 2 * i), (5, 3)), ("a1", (i,), (7,))])
        await model.fold(folder, 3)
        await model.fold(folder, 2)
        await check_view(model, folder)
        found = {e.key.split("/open/")[1]: await blobs.get(e.key) async for e in blobs.walk(ID) if "/open/" in e.key}
        await blobs.close()
        return tuple(sorted((key, content) for key, content in found.items() if not key.endswith("manifest")))

    assert asyncio.run(manifest_of(1)) == asyncio.run(manifest_of(1 << 30))


# --- what is touched -----------------------------------------------------------------------------------------------


class CountingBlobs(MemoryBlobs):
    """Tells which blobs were read, and how many bytes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, int] = {}

    async def get_many(self, keys: Any, consume: Any) -> None:
        for key in keys:
            self.read[key] = self.read.get(key, 0) + await self.size(key)
        await super().get_many(keys, consume)

    async def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        data = await super().get(key, start, stop)
        self.read[key] = self.read.get(key, 0) + len(data)
        return data


@given(st.data())
def test_a_slice_reads_only_chunks_that_hold_selected_elements_and_each_once(data):
    """Chunks that were never measured are not asked for; the written map reads maps of chunks measured in part alone."""

    async def body():
        blobs = CountingBlobs()
        model, folder = Model.of(blobs, [("<f8", ("k", "x"), (2, 4)), ("<f8", ("x",), (2,))]), Folder(blobs)
        for _ in range(3):
            start, length = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 9))
            low = data.draw(st.integers(0, 4))
            await model.write([("a0", (low, start), (5 - low, length))])
        await model.fold(folder, 3)
        view = await model.view(folder)
        array = next(a for a in view.arrays() if a.name == "a0")
        growing, mask = GrowingArray(blobs, view, array), model.masks["a0"]
        key = tuple(entries(data.draw, n) for n in array.shape)
        touched = np.zeros(array.shape, bool)
        touched[np.ix_(*(axis.positions() for axis in select(key, array.shape).axes))] = True
        chunks = {}
        for index in np.ndindex(*chunk_grid(array.shape, array.chunks)):
            where = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, array.chunks, strict=True))
            if touched[where].any() and mask[where].any():
                key_, _ = growing.stored_chunk(index)
                full = mask[where].all() and where[1].stop <= array.shape[1]
                chunks[key_] = full
        blobs.read.clear()
        await growing.read(select(key, array.shape))
        assert blobs.read == {key_: await blobs.size(key_) for key_ in chunks}
        blobs.read.clear()
        await growing.written(select(key, array.shape))
        wanted = [f"{key_}.w" for key_, full in chunks.items() if not full]
        assert blobs.read == {key_: await blobs.size(key_) for key_ in wanted}
        await blobs.close()

    asyncio.run(body())


def test_a_slice_of_a_large_block_reads_only_the_rows_it_needs():
    """Not the hundreds of MB of it: the pages they lie in."""

    async def body():
        blobs = CountingBlobs()
        model, folder = Model.of(blobs, [("<f8", ("x", "k"), (4, 5))]), Folder(blobs)
        await model.write([("a0", (0, 0), (20_000, 5))], large=True)
        view = await model.view(folder)
        growing = GrowingArray(blobs, view, view.arrays()[0])
        for key, rows in (((slice(10, 12),), 2), ((slice(20, 30, 9), 3), 10), (([5, 999], 0), 995), ((7, slice(None)), 1)):
            blobs.read.clear()
            await growing.read(select(key, (20_000, 5)))
            assert sum(blobs.read.values()) <= rows * 40 + 2 * PAGE_BYTES + 8, key
        await blobs.close()

    asyncio.run(body())


def test_a_fold_reads_and_writes_only_what_its_blocks_touch():
    """A sweep of any length costs each fold the same, but for the map of its chunks."""

    async def body():
        blobs = CountingBlobs()
        model, folder = Model.of(blobs, [("<f8", ("x",), (4,)), ("<f8", ("x", "k"), (1, 5))]), Folder(blobs)
        await model.write([("a0", (0,), (400,)), ("a1", (0, 0), (100, 5))])
        await model.fold(folder, 1)
        before = {entry.key async for entry in blobs.walk(ID)}
        blobs.read.clear()
        await model.write([("a0", (10,), (1,))])
        await model.fold(folder, 1)
        assert {key.rsplit("/", 1)[1] for key in blobs.read} == {"0.2", "events"}
        made = {entry.key async for entry in blobs.walk(ID)} - before
        assert {key.rsplit("/", 1)[1] for key in made} == {"0.2", "events", "manifest"}
        assert before <= {entry.key async for entry in blobs.walk(ID)}, "a fold removes nothing by itself"
        await blobs.close()

    asyncio.run(body())


# --- old and new objects -------------------------------------------------------------------------------------------


def test_a_view_taken_before_a_fold_reads_the_same_after_it(monkeypatch):
    """Objects never change and stay while their readers may be reading; what a later fold names as gone is nobody's."""

    async def body():
        blobs = MemoryBlobs()
        model, folder, now = Model.of(blobs, [("<f8", ("x",), (4,)), ("string", ("x",), (3,))]), Folder(blobs), 1000.0
        moments, manifests = [], []
        for i in range(8):
            await model.write([("a0", (i * 2,), (5,)), ("a1", (i,), (3,))], large=i % 2 == 1)
            view = await model.view(folder)
            moments.append((now, view, {n: v.copy() for n, v in model.values.items()}))
            monkeypatch.setattr(folding.time, "time", lambda now=now: now)
            for key in await model.fold(folder, 1):
                await blobs.remove(key)
            manifests.append(model.state.manifest)
            for at, old, expected in moments:
                if now - at < folding.RETIRED_SECONDS:
                    for array in old.arrays():
                        same(await GrowingArray(blobs, old, array).read(whole(array.shape)), expected[array.name])
            await check_view(model, folder)
            now += folding.RETIRED_SECONDS / 3
        left = {entry.key.split("/")[3] async for entry in blobs.walk(f"{ID}/{model.plan.attempt}/open")}
        assert manifests[0] not in left, "what is no longer needed goes"
        await blobs.close()

    asyncio.run(body())


def test_a_fold_that_did_not_come_into_force_leaves_everything_as_it_was():
    """Its objects have names of their own."""

    async def body():
        blobs = MemoryBlobs()
        model, folder = Model.of(blobs, [("<f8", ("x",), (4,))]), Folder(blobs)
        await model.write([("a0", (0,), (6,))])
        await model.fold(folder, 1)
        await model.write([("a0", (3,), (6,))])
        before = {entry.key: await blobs.get(entry.key) async for entry in blobs.walk(ID)}
        late = msgspec.structs.replace(model.state, token=model.state.token + 7)
        await folder.fold(model.plan, late, tuple(model.rows))
        assert {key: await blobs.get(key) for key in before} == before
        await check_view(model, folder)
        await model.fold(folder, 1)
        await check_view(model, folder)
        await blobs.close()

    asyncio.run(body())


def test_events_are_the_headers_of_all_blocks_in_order_whatever_the_segments(monkeypatch):
    """While it grows from the manifest, after the end from their own prefix."""
    monkeypatch.setattr(folding, "SEGMENT_BYTES", 200)

    async def body():
        blobs = MemoryBlobs()
        model, folder, headers = Model.of(blobs, [("<f8", ("x",), (4,))]), Folder(blobs), []
        for cut in (1, 2, 5, 1, 1, 3):
            for _ in range(cut):
                await model.write([("a0", (0,), (1,))])
                headers.append(msgspec.json.encode(model.rows[-1].placed))
            await model.fold(folder, cut)
            segments = (await folder.manifest(model.plan, model.state)).segments
            assert [line for segment in segments for line in await folder.events(segment)] == headers
            assert [(a.last + 1) for a in segments[:-1]] == [b.first for b in segments[1:]]
        assert len(segments) > 1
        await folder.publish(await model.view(folder))
        await blobs.remove(f"{ID}/{model.plan.attempt}/open")
        found = await folder.published_segments(model.plan)
        assert [(s.first, s.last) for s in found] == [(s.first, s.last) for s in segments]
        assert [line for segment in found for line in await folder.events(segment)] == headers
        await blobs.close()

    asyncio.run(body())


# --- damage --------------------------------------------------------------------------------------------------------


def test_damaged_or_missing_objects_are_told_never_read_as_not_measured():
    """A manifest, a chunk, a written map, the values of a large block; in folding and after the end too."""

    async def body():
        blobs = MemoryBlobs()
        model, folder = Model.of(blobs, [("<f8", ("x",), (4,))]), Folder(blobs)
        await model.write([("a0", (0,), (6,))])
        await model.fold(folder, 1)
        await model.write([("a0", (5,), (6,))])
        attempt = f"{ID}/{model.plan.attempt}"
        kept = {entry.key: await blobs.get(entry.key) async for entry in blobs.walk(attempt)}
        for key, content in kept.items():
            if key.endswith("events"):
                continue
            for damage in (content[:-1], content[:9] + bytes([content[9] ^ 1]) + content[10:], b""):
                await blobs.replace(key, damage)
                with pytest.raises(CorruptionError, match=key.rsplit("/", 1)[1]):
                    await check_view(model, Folder(blobs))
                if not key.endswith("0.0"):  # which it does not touch
                    with pytest.raises(CorruptionError):
                        await Folder(blobs).fold(model.plan, model.state, tuple(model.rows))
            await blobs.replace(key, content)
        await check_view(model, Folder(blobs))
        for key in [key for key in kept if key.endswith("0.1")]:
            await blobs.remove(key)
            with pytest.raises(CorruptionError):
                await Folder(blobs).fold(model.plan, model.state, tuple(model.rows))
            await blobs.replace(key, kept[key])
        await model.fold(folder, 1)
        finals = await folder.publish(await model.view(folder))
        store = ArrayStore(blobs)
        [array] = finals
        for key in ("written/a0/grid", "written/a0/c/2", "arrays.zarr/a0/c/2"):
            content = None
            try:
                content = await blobs.get(f"{attempt}/{key}")
            except NotFoundError:
                continue
            await blobs.remove(f"{attempt}/{key}")
            with pytest.raises(CorruptionError):
                await ArrayStore(blobs).read(ID, model.plan.attempt, array, whole(array.shape))
                await ArrayStore(blobs).written(ID, model.plan.attempt, array, whole(array.shape))
            await blobs.replace(f"{attempt}/{key}", content)
        same(await store.read(ID, model.plan.attempt, array, whole(array.shape)), model.values["a0"])
        await blobs.close()

    asyncio.run(body())


def test_a_damaged_value_of_a_large_block_is_told_before_it_is_folded():
    """In reading and in folding; a block of an older version has no checksum to tell it by."""

    async def body():
        blobs = MemoryBlobs()
        model = Model.of(blobs, [("<f8", ("x",), (4,))])
        await model.write([("a0", (0,), (30_000,))], large=True)
        [row] = model.rows
        key = block_key(ID, model.plan.attempt, row.ref)
        content = await blobs.get(key)
        for at in (0, 100_000, len(content) - 1):
            await blobs.replace(key, content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            with pytest.raises(CorruptionError, match=r"block 1 .* checksum"):
                await check_view(model, Folder(blobs))
            with pytest.raises(CorruptionError, match="checksum"):
                await Folder(blobs).fold(model.plan, model.state, tuple(model.rows))
        await blobs.replace(key, content)
        await check_view(model, Folder(blobs))
        await blobs.close()

    asyncio.run(body())


@given(st.binary(max_size=40).filter(lambda junk: junk != bytes(4)))
def test_bytes_that_are_no_manifest_are_told(junk):
    """Never another error, which nobody would understand."""
    with pytest.raises(CorruptionError):
        Manifest.decode(junk, "key")
