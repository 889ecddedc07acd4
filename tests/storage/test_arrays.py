"""Arrays come back bit for bit, other Zarr readers agree, reads cost what they must, and damage is never a fill value."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from aq_data.errors import CorruptionError, UnavailableError, ValidationError
from aq_data.models.arrays import ArrayInfo, NewArray, parse_dtype
from aq_data.models.datafile import DataFile, make_id
from aq_data.models.selection import Selection, select, whole
from aq_data.storage.arrays import writing as writing_module
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.chunking import chunk_grid
from aq_data.storage.arrays.folder import FolderBlobs
from aq_data.storage.arrays.memory import MemoryBlobs
from aq_data.storage.arrays.store import ArrayStore, group_prefix
from aq_data.wire.codec import text_bytes

ID = make_id(1, bytes(10))
NOW = "2026-01-31T08:00:00.000000Z"
PREFIX = group_prefix(ID, "1")

UNITS = ["Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as"]
TIMES = [f"<{kind}8[{unit}]" for kind in "Mm" for unit in [*UNITS, "10us", "25s", "3D"]] + ["<M8", "<m8"]
NUMBERS = ["|b1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16"]
TEXTS = ["<U1", "<U7", "|S1", "|S5", "string", "|T16"]
DTYPES = [*NUMBERS, *TIMES, *TEXTS]
WORDS = ["", "a", "é", "\U0001f600", "a\x00b", "x" * 300, "line\nbreak", "\uffff", " "]


def make_values(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values of any bit pattern the dtype can have: NaN payloads, -0.0, infinities, NaT, embedded zeros."""
    random = np.random.default_rng(seed)
    count = math.prod(shape)
    numpy_dtype = parse_dtype(dtype, "x")
    if numpy_dtype.kind in "OT":
        values = np.array([WORDS[i] for i in random.integers(len(WORDS), size=count)], dtype=object)
        return values.astype(numpy_dtype).reshape(shape)
    if numpy_dtype.kind == "b":
        return random.integers(2, size=shape).astype(bool)
    if numpy_dtype.kind == "U":
        codes = random.choice(
            np.array([0, 65, 233, 0xFFFF, 0x1F600, 0x10FFFF], dtype="<u4"), count * numpy_dtype.itemsize // 4
        )
        return codes.view(numpy_dtype).reshape(shape)
    values = np.frombuffer(random.bytes(count * numpy_dtype.itemsize), dtype=numpy_dtype).reshape(shape).copy()
    if numpy_dtype.kind in "fc" and count:
        special = np.array([-0.0, math.inf, -math.inf, math.nan, 0.0], dtype="<f8")
        values.reshape(-1)[:: 1 + seed % 3] = random.choice(special, len(values.reshape(-1)[:: 1 + seed % 3]))
    return values


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether dtype, shape and every bit agree."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.tolist() == other.tolist() if one.dtype.kind in "OT" else one.tobytes() == other.tobytes()


def wire_bytes(values: np.ndarray) -> bytes:
    return text_bytes(values) if values.dtype.kind in "OT" else values.tobytes()


def document(arrays: Sequence[ArrayInfo], **fields: Any) -> DataFile:
    return DataFile(
        **{
            "id": ID,
            "state": "complete",
            "revision": 1,
            "created_at": NOW,
            "updated_at": NOW,
            "arrays": tuple(arrays),
            **fields,
        }
    )


async def save(
    arrays: ArrayStore, news: list[tuple[NewArray, np.ndarray]], cut: Callable[[int], int] = lambda left: left, **fields: Any
):
    """Write arrays in pieces of `cut(bytes left)` bytes and publish them; what is stored of each."""
    writers = []
    for new, values in news:
        writer = arrays.writer(ID, "1", new)
        data = memoryview(wire_bytes(values))
        while data:
            size = cut(len(data))
            await writer.write(data[:size])
            data = data[size:]
        await writer.finish()
        writers.append(writer)
    infos = [writer.info for writer in writers]
    await arrays.publish_group(document(infos, **fields), "1", "digest", writers)
    return infos


def run_with(blobs: BlobStore, body) -> Any:
    async def run():
        try:
            return await body(ArrayStore(blobs))
        finally:
            await blobs.close()

    return asyncio.run(run())


@st.composite
def array_cases(draw) -> tuple[NewArray, np.ndarray]:
    """An array and its values: any dtype, up to three axes, chunks that divide it or do not."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    chunks = draw(st.none() | st.tuples(*(st.integers(1, n + 2) for n in shape)))
    new = NewArray(
        "x",
        draw(st.sampled_from(DTYPES)),
        shape,
        chunks=chunks or None,
        codec=draw(st.sampled_from(["zstd", "lz4", "none"])),
    )
    return new, make_values(new.dtype, shape, draw(st.integers(0, 1000)))


def entries(size: int) -> st.SearchStrategy[Any]:
    bounds = st.none() | st.integers(-size - 1, size + 1)
    kinds = [st.builds(slice, bounds, bounds, st.none() | st.integers(-3, 3).filter(bool)), st.just(slice(None))]
    if size:
        kinds += [st.integers(-size, size - 1), st.lists(st.integers(-size, size - 1), max_size=4)]
    return st.one_of(kinds)


def taken(values: np.ndarray, selection: Selection) -> np.ndarray:
    """What NumPy gives for the selection, axis by axis."""
    if selection.axes:
        values = values[np.ix_(*(axis.positions() for axis in selection.axes))]
    return values.reshape(selection.shape)


# --- values --------------------------------------------------------------------------------------------------------


@settings(max_examples=settings().max_examples * 5 // 2)
@given(array_cases(), st.data())
def test_any_selection_of_any_array_comes_back_bit_for_bit(case, data):
    new, values = case
    selection = select(tuple(data.draw(entries(n)) for n in new.shape), new.shape)
    limit = data.draw(st.sampled_from([1, 50, 1000]))

    async def body(arrays):
        [info] = await save(arrays, [case], lambda left: data.draw(st.integers(1, left)))
        assert info.shape == new.shape
        found = await arrays.read(ID, "1", info, whole(new.shape))
        assert same_bits(found, values)
        found = await arrays.read(ID, "1", info, selection)
        expected = taken(values, selection)
        assert same_bits(found, expected)
        assert found.flags.c_contiguous
        assert found.flags.writeable
        pieces = [piece.reshape(-1) async for piece in arrays.stream(ID, "1", info, selection, limit)]
        assert same_bits(np.concatenate(pieces), expected.reshape(-1))

    run_with(MemoryBlobs(), body)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit_from_several_chunks(dtype):
    values = make_values(dtype, (5, 7), 1)

    async def body(arrays):
        [info] = await save(arrays, [(NewArray("x", dtype, (5, 7), chunks=(2, 3)), values)])
        assert same_bits(await arrays.read(ID, "1", info, whole((5, 7))), values)
        assert info.nbytes == len(wire_bytes(values))

    run_with(MemoryBlobs(), body)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_a_scalar_of_every_dtype_comes_back_bit_for_bit(dtype, codec):
    """Among them texts shorter than their dtype, as one entry of a text coordinate is."""

    async def body(arrays):
        candidates = [make_values(dtype, (), seed) for seed in range(3)]
        if parse_dtype(dtype, "x").kind in "US":
            candidates += [np.array(text, dtype=dtype) for text in ("", "a")]
        for values in candidates:
            [info] = await save(arrays, [(NewArray("x", dtype, (), codec=codec), values)])
            assert same_bits(await arrays.read(ID, "1", info, whole(())), values)

    run_with(MemoryBlobs(), body)


@settings(max_examples=settings().max_examples * 2 // 3)
@given(array_cases(), st.data())
def test_arrays_buffered_in_files_come_back_equal(case, data):
    new, values = case

    async def body(arrays):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing_module, "SLAB_BYTES", data.draw(st.sampled_from([1, 16, 100])))
            [info] = await save(arrays, [case], lambda left: data.draw(st.integers(1, left)))
        assert same_bits(await arrays.read(ID, "1", info, whole(new.shape)), values)

    run_with(MemoryBlobs(), body)


def test_a_large_array_is_stored_while_it_arrives():
    """Its chunks do not wait for the end, and memory is bounded by the buffer."""
    values = np.arange(100_000, dtype="<f8").reshape(1000, 100)
    blobs = MemoryBlobs()

    async def body(arrays):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing_module, "SLAB_BYTES", 20_000)
            writer = arrays.writer(ID, "1", NewArray("x", "<f8", values.shape, chunks=(10, 100)))
            await writer.write(memoryview(values[:900].tobytes()))
            stored = [entry.key async for entry in blobs.walk(PREFIX)]
            assert len(stored) > 50
            await writer.write(memoryview(values[900:].tobytes()))
            await writer.finish()
        await arrays.publish_group(document([writer.info]), "1", "digest", [writer])
        assert same_bits(await arrays.read(ID, "1", writer.info, whole(values.shape)), values)

    run_with(blobs, body)


def test_a_stream_that_is_left_early_leaves_nothing_running():
    values = np.arange(1000, dtype="<f8")

    async def body(arrays):
        [info] = await save(arrays, [(NewArray("x", "<f8", (1000,), chunks=(10,)), values)])
        stream = arrays.stream(ID, "1", info, whole((1000,)), 80)
        assert (await anext(stream)).tolist() == values[:10].tolist()
        await stream.aclose()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    run_with(MemoryBlobs(), body)


# --- other readers -------------------------------------------------------------------------------------------------


@given(st.lists(array_cases(), min_size=1, max_size=3))
def test_zarr_python_reads_the_same_values_dims_and_attributes(cases):
    named = [
        (msgspec.structs.replace(new, name=f"n{i}", dims=tuple(f"d{i}_{j}" for j in range(len(new.shape))),
         attrs={"units": "V", "n": i}), values)
        for i, (new, values) in enumerate(cases)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:

        async def body(arrays):
            return await save(arrays, named, attrs={"title": "T1"}, metadata={"chip": "C7"})

        run_with(FolderBlobs(Path(folder)), body)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr-python announces that some data types have no final specification
            for consolidated in (True, False):
                group = zarr.open_group(f"{folder}/{PREFIX}", mode="r", use_consolidated=consolidated)
                assert group.attrs["title"] == "T1"
                assert group.attrs["aq_data"]["id"] == ID
                assert group.attrs["aq_data"]["document"]["metadata"] == {"chip": "C7"}
                assert sorted(group.array_keys()) == sorted(new.name for new, _ in named)
                for new, values in named:
                    array = group[new.name]
                    assert (array.shape, array.metadata.dimension_names or ()) == (new.shape, new.dims)
                    assert dict(array.attrs) == new.attrs
                    found = np.asarray(array[...])
                    if not new.shape and values.dtype.kind in "US":
                        found = found.astype(values.dtype)  # a scalar of text comes without its trailing nulls
                    if values.dtype.kind in "OT":
                        assert found.astype(object).tolist() == values.astype(object).tolist()
                    else:
                        assert same_bits(found, values)


def test_a_group_without_arrays_is_a_group():
    with tempfile.TemporaryDirectory() as folder:
        run_with(FolderBlobs(Path(folder)), lambda arrays: save(arrays, [], metadata={"a": {"$float": "NaN"}}))
        group = zarr.open_group(f"{folder}/{PREFIX}", mode="r")
        assert list(group.keys()) == []
        text = Path(folder, PREFIX, "zarr.json").read_text(encoding="utf-8")
        assert "NaN" not in text.replace('"NaN"', ""), "no bare NaN ever stands in a zarr.json"


def test_the_copy_of_a_changed_document_takes_the_place_of_the_old():
    values = np.arange(3.0)
    with tempfile.TemporaryDirectory() as folder:

        async def body(arrays):
            infos = await save(arrays, [(NewArray("x", "<f8", (3,)), values)], comment="old")
            await arrays.write_copy(document(infos, comment="new", revision=2), "1", "digest")

        run_with(FolderBlobs(Path(folder)), body)
        group = zarr.open_group(f"{folder}/{PREFIX}", mode="r")
        assert group.attrs["aq_data"]["document"]["comment"] == "new"
        assert group.attrs["aq_data"]["revision"] == 2
        assert group["x"][...].tolist() == values.tolist()


# --- cost ----------------------------------------------------------------------------------------------------------


class CountingBlobs(MemoryBlobs):
    """Remembers which blobs were fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    async def get_many(self, keys, consume):
        self.fetched += keys
        await super().get_many(keys, consume)

    async def get(self, key, start=0, stop=None):
        self.fetched.append(key)
        return await super().get(key, start, stop)


@given(array_cases(), st.data())
def test_a_read_fetches_exactly_the_chunks_that_overlap_each_once(case, data):
    new, _ = case
    selection = select(tuple(data.draw(entries(n)) for n in new.shape), new.shape)
    blobs = CountingBlobs()

    async def body(arrays):
        [info] = await save(arrays, [case])
        assert blobs.fetched == []
        await arrays.read(ID, "1", info, selection)
        return info

    info = run_with(blobs, body)
    expected = {
        "/".join([PREFIX, "x", "c", *map(str, index)])
        for index in np.ndindex(*chunk_grid(info.shape, info.chunks))
        if all((axis.positions() // c == i).any() for i, axis, c in zip(index, selection.axes, info.chunks, strict=True))
    }
    assert sorted(blobs.fetched) == sorted(expected)


def test_a_stream_of_plain_pieces_fetches_each_chunk_once():
    values = np.arange(3600, dtype="<f8").reshape(60, 60)
    blobs = CountingBlobs()

    async def body(arrays):
        [info] = await save(arrays, [(NewArray("x", "<f8", (60, 60), chunks=(7, 11)), values)])
        pieces = [piece async for piece in arrays.stream(ID, "1", info, whole((60, 60)), 7 * 60 * 8)]
        assert len(pieces) > 5

    run_with(blobs, body)
    assert len(blobs.fetched) == len(set(blobs.fetched)) == 9 * 6


# --- damage --------------------------------------------------------------------------------------------------------


@given(array_cases().filter(lambda case: case[1].size), st.data())
def test_a_damaged_chunk_is_corruption_that_names_it_and_never_a_fill_value(case, data):
    """One flipped bit anywhere, a chunk cut short or grown, or one that is gone."""
    new, values = case
    blobs = MemoryBlobs()

    async def body(arrays):
        [info] = await save(arrays, [case])
        keys = sorted([entry.key async for entry in blobs.walk(f"{PREFIX}/x/c")])
        key = data.draw(st.sampled_from(keys))
        good = await blobs.get(key)
        damage = data.draw(st.sampled_from(["flip", "cut", "grow", "empty", "missing"]))
        if damage == "flip":
            bad = bytearray(good)
            bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        elif damage == "cut":
            bad = good[: data.draw(st.integers(0, len(good) - 1))]
        else:
            bad = good + b"\x00" if damage == "grow" else b""
        if damage == "missing":
            await blobs.remove(key)
        else:
            await blobs.replace(key, bytes(bad))
        with pytest.raises(CorruptionError) as caught:
            await arrays.read(ID, "1", info, whole(new.shape))
        assert key in str(caught.value)
        with pytest.raises(CorruptionError):
            _ = [piece async for piece in arrays.stream(ID, "1", info, whole(new.shape), 40)]
        await blobs.replace(key, good)
        assert same_bits(await arrays.read(ID, "1", info, whole(new.shape)), values)

    run_with(blobs, body)


def test_damage_elsewhere_does_not_keep_whole_chunks_from_being_read():
    values = np.arange(12.0)
    blobs = MemoryBlobs()

    async def body(arrays):
        [info] = await save(arrays, [(NewArray("x", "<f8", (12,), chunks=(4,)), values)])
        await blobs.remove(f"{PREFIX}/x/c/1")
        for key, expected in [(slice(0, 4), values[:4]), (-1, values[-1]), ([0, 11], values[[0, 11]])]:
            assert (await arrays.read(ID, "1", info, select(key, (12,)))).tolist() == expected.tolist()
        with pytest.raises(CorruptionError):
            await arrays.read(ID, "1", info, select(slice(3, 5), (12,)))

    run_with(blobs, body)


@pytest.mark.parametrize("dtype", ["<f8", "string", "|T16"])
@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
def test_a_chunk_of_another_array_is_corruption_though_its_checksum_fits(dtype, codec):
    blobs = MemoryBlobs()

    async def body(arrays):
        small, large = NewArray("s", dtype, (2,), codec=codec), NewArray("x", dtype, (6,), codec=codec)
        infos = await save(arrays, [(small, make_values(dtype, (2,), 1)), (large, make_values(dtype, (6,), 2))])
        await blobs.replace(f"{PREFIX}/x/c/0", await blobs.get(f"{PREFIX}/s/c/0"))
        with pytest.raises(CorruptionError):
            await arrays.read(ID, "1", infos[1], whole((6,)))

    run_with(blobs, body)


# --- refusals ------------------------------------------------------------------------------------------------------


@given(array_cases(), st.integers(1, 40), st.booleans())
def test_more_or_fewer_bytes_than_the_shape_needs_are_refused(case, count, more):
    new, values = case
    good = wire_bytes(values)
    data = good + b"\x00" * count if more else good[: max(0, len(good) - count)]
    if data == good or (new.dtype in ("string", "|T16") and not data and not values.size):
        return

    async def body(arrays):
        writer = arrays.writer(ID, "1", new)
        with pytest.raises(ValidationError) as caught:
            for at in range(0, len(data), 7):
                await writer.write(memoryview(data)[at : at + 7])
            await writer.finish()
        assert "'x'" in str(caught.value)
        await writer.discard()

    run_with(MemoryBlobs(), body)


@pytest.mark.parametrize(
    "data",
    [b"\x01\x00\x00\x00\x01\x00\x00\x00\xff", b"\x01\x00\x00\x00\xff\xff\xff\xffa", b"\x01\x00\x00\x00", b"\x01",
     b"\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\x01\x00\x00\x00ab",
     b"\x01\x00\x00\x00\x03\x00\x00\x00\xed\xa0\x80"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["string", "|T16"])
def test_bytes_that_are_no_texts_are_refused(dtype, data):
    async def body(arrays):
        writer = arrays.writer(ID, "1", NewArray("x", dtype, (1,)))
        with pytest.raises(ValidationError):
            await writer.write(memoryview(data))
            await writer.finish()

    run_with(MemoryBlobs(), body)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_no_room_for_the_buffer_file_is_unavailable(monkeypatch, tmp_path, code):
    def full(**options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing_module, "SLAB_BYTES", 64)
    monkeypatch.setattr(writing_module.tempfile, "TemporaryFile", full)

    async def run():
        blobs = MemoryBlobs()
        writer = ArrayStore(blobs, tmp_path).writer(ID, "1", NewArray("x", "<f8", (1000,)))
        with pytest.raises(UnavailableError):
            await writer.write(memoryview(bytes(8)))
        await blobs.close()
        assert list(tmp_path.iterdir()) == []

    asyncio.run(run())


def test_a_store_that_cannot_be_written_fails_the_writer_and_not_later_ones(tmp_path):
    """What a chunk's write raises comes out of `write` or `finish`; discarding leaves nothing running."""
    values = np.arange(4000, dtype="<f8")
    (tmp_path / PREFIX).mkdir(parents=True)
    (tmp_path / PREFIX / "x").symlink_to("x")

    async def body(arrays):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing_module, "SLAB_BYTES", 800)
            writer = arrays.writer(ID, "1", NewArray("x", "<f8", (4000,), chunks=(100,)))
            with pytest.raises(Exception, match="ELOOP"):
                await writer.write(memoryview(values.tobytes()))
                await writer.finish()
            await writer.discard()
        [info] = await save(arrays, [(NewArray("y", "<f8", (4000,), chunks=(100,)), values)])
        assert same_bits(await arrays.read(ID, "1", info, whole((4000,))), values)

    run_with(FolderBlobs(tmp_path), body)
