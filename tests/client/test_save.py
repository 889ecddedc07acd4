"""What `save` promises: values and metadata come back exactly as they were given, or are refused by name and not at all."""

from __future__ import annotations

import enum
import json
import math
import pathlib
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from aq_server.commands.serving import running
from hypothesis import given
from hypothesis import strategies as st
from services.deployment import WAYS, at, blobs, deployed, opened, storage_options

import aq_data
from aq_data.client.arrays import RemoteArray
from aq_data.errors import AqDataError, ConflictError, NotFoundError, ValidationError

FIXED = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
UNITS = ["Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as"]
MULTIPLES = ["2Y", "3M", "2W", "7D", "6h", "15m", "30s", "25s", "10ms", "100us", "20ns", "5ps", "2fs", "4as"]
STRING = np.dtypes.StringDType()

random = np.random.default_rng(20260131)


@pytest.fixture(scope="module", params=WAYS)
def lab(request, tmp_path_factory) -> Iterator[aq_data.Client]:
    """One client for the whole module: saves do not touch each other."""
    data = tmp_path_factory.mktemp("lab")
    with opened(data, request.param) as client:
        yield client


def fill(dtype: str | np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Every bit pattern may occur, but for booleans, of which there are two."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype("?")
    count = math.prod(shape) * dtype.itemsize
    return np.frombuffer(random.bytes(count), "u1").view(dtype).reshape(shape) if count else np.empty(shape, dtype)


def differences(sent: np.ndarray, stored: RemoteArray) -> list[str]:
    """What is not as it was sent; byte order is the one thing that may change."""
    dtype = sent.dtype if sent.dtype.kind == "T" else sent.dtype.newbyteorder("<")
    got = stored[...]
    # A NumPy scalar of text is as wide as its text, whatever the array was; the array's own dtype counts.
    got = np.asarray(got, dtype=dtype if sent.ndim == 0 and dtype.kind in "OTUS" else None)
    if (stored.dtype, got.dtype, got.shape) != (dtype, dtype, sent.shape):
        return [f"{stored.name}: {sent.dtype} {sent.shape} came back as {stored.dtype}, {got.dtype} {got.shape}"]
    if dtype.kind in "OT":
        return [] if got.tolist() == sent.tolist() else [f"{stored.name}: texts differ"]
    return [] if got.tobytes() == sent.astype(dtype).tobytes() else [f"{stored.name}: bytes differ"]


def assert_kept(client: aq_data.Client, arrays: dict[str, np.ndarray], **options: Any) -> aq_data.DataFile:
    """Save, fetch the document anew, and compare every array bit for bit."""
    file = client.get(client.save(arrays, **options).id)
    assert sorted(file) == sorted(arrays)
    wrong = [line for name, sent in arrays.items() for line in differences(np.asarray(sent), file[name])]
    assert not wrong, wrong
    return file


# --- dtypes --------------------------------------------------------------------------------------------------------


def test_numbers_of_every_dtype_are_kept_bit_for_bit(lab):
    """bool, int8-64, uint8-64, float16-64, complex64-128, whatever their bits, so NaN payloads too."""
    assert_kept(lab, {dtype.replace("?", "bool"): fill(dtype, (7, 5)) for dtype in FIXED})


def test_nan_payloads_signs_of_zero_and_infinities_are_kept(lab):
    """A float is its bits: quiet and signalling NaN with payloads, -0.0, infinities, subnormals; in complex parts too."""
    doubles = np.array(
        [0x7FF8000000000001, 0xFFF8DEADBEEF0001, 0x7FF0000000000001, 0x8000000000000000, 0x7FF0000000000000, 1], "u8"
    ).view("f8")
    singles = np.array([0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0xFF800000, 1], "u4").view("f4")
    halves = np.array([0x7E01, 0xFE55, 0x7C01, 0x8000, 0x7C00, 1], "u2").view("f2")
    arrays = {"f8": doubles, "f4": singles, "f2": halves, "c16": doubles.view("c16"), "c8": singles.view("c8")}
    assert_kept(
        lab, arrays | {f"{name} big": values.astype(values.dtype.newbyteorder(">")) for name, values in arrays.items()}
    )


@pytest.mark.parametrize("kind", ["M8", "m8"])
def test_times_of_every_unit_and_multiple_are_kept(lab, kind):
    """From years to attoseconds and multiples such as 25 s, NaT and the extreme ticks included."""
    ticks = np.array([0, 1, -1, 17, np.iinfo("i8").max, np.iinfo("i8").min, np.iinfo("i8").min + 1])
    assert_kept(lab, {unit: ticks.view(f"{kind}[{unit}]") for unit in UNITS + MULTIPLES})


def test_durations_without_a_unit_are_kept(lab):
    """`np.timedelta64(3)` has NumPy's generic unit; it is a dtype like any other."""
    assert_kept(lab, {"plain": np.array([3, -1], "i8").view("m8")})


def test_fixed_strings_are_kept(lab):
    """U and S of several widths: unicode beyond the basic plane, bytes that are no text, inner NULs, empty strings."""
    assert_kept(
        lab,
        {
            "U1": np.array(["a", "", "ü"]),
            "U12": np.array([["Γ₁", "日本語"], ["🜚 gold", "in\0side"]], "U12"),
            "S1": np.array([b"a", b"", b"\xff"]),
            "S9": np.array([b"\x01\x00\xff", b"nine byte"], "S9"),
            "U empty": np.empty((0, 3), "U4"),
        },
    )


TEXTS = ["", "a", "Übergang |0⟩→|1⟩", "🜚", "in\0side", " spaces ", "line\nbreak", "x" * 5000]


@pytest.mark.parametrize("dtype", [np.dtype(object), STRING], ids=["object", "StringDType"])
def test_variable_strings_are_kept(lab, dtype):
    """Object arrays of str come back as objects, StringDType as StringDType, in every shape."""
    arrays = {
        "flat": np.array(TEXTS, dtype),
        "grid": np.array(TEXTS, dtype).reshape(2, 4),
        "fortran": np.asfortranarray(np.array(TEXTS, dtype).reshape(4, 2)),
        "strided": np.array(TEXTS, dtype)[::-2],
        "empty": np.empty((0,), dtype),
        "empty grid": np.empty((3, 0), dtype),
        "one": np.array(["x"], dtype),
    }
    file = assert_kept(lab, arrays)
    part = file["grid"][1, ::-2]
    assert part.tolist() == arrays["grid"][1, ::-2].tolist()
    assert file["grid"][0, 2] == TEXTS[2]


@pytest.mark.parametrize("dtype", [np.dtype(object), STRING], ids=["object", "StringDType"])
def test_a_single_variable_string_is_kept(lab, dtype):
    """A 0-d array of text, read as an array and as a dataset."""
    file = lab.save({"who": ((), np.array("Ada 🜚", dtype))})
    assert file["who"].shape == ()
    assert str(file["who"][()]) == str(file["who"][...]) == "Ada 🜚"
    loaded = file.load()["who"].variable
    assert (loaded.shape, str(loaded.values)) == ((), "Ada 🜚")


def test_many_variable_strings_in_many_chunks_are_kept(lab):
    """Text over several chunks: every border is where it should be."""
    texts = np.array([f"point {i}" * (i % 7) for i in range(5000)], object).reshape(50, 100)
    file = assert_kept(lab, {"t": texts}, chunks={"t": (7, 33)})
    assert file["t"][3:45:5, [99, 0, 34]].tolist() == texts[3:45:5][:, [99, 0, 34]].tolist()


@pytest.mark.parametrize("dtype", [np.dtype(object), STRING], ids=["object", "StringDType"])
def test_more_texts_than_one_answer_holds_come_back(lab, dtype):
    """Half a million short ones, along the second axis; some that are long; and one that is longer than any answer."""
    short = np.array([f"q{i}" for i in range(530_000)], dtype).reshape(1, -1)
    long = np.array([f"{i}" * 600_000 for i in range(12)], dtype).reshape(6, 2)
    file = assert_kept(
        lab, {"short": short, "long": long, "one": np.array(["x" * (5 << 20)], dtype)}, chunks={"long": (2, 1)}
    )
    assert file["long"][::-2, 1].tolist() == long[::-2, 1].tolist()
    assert file["one"][0] == "x" * (5 << 20)
    lazy = file.open()
    assert lazy["long"].load().values.tolist() == long.tolist()
    assert lazy["short"][0, ::-1].values.tolist() == short[0, ::-1].tolist()


# --- shapes and memory layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["?", "i2", "u8", "f2", "f8", "c16", "M8[us]", "m8[3s]", "U5", "S3"])
def test_scalars_and_empty_arrays_are_kept(lab, dtype):
    """0-d, and lengths of 0 in every place."""
    shapes = {"scalar": (), "one": (1,), "none": (0,), "none inside": (3, 0, 2), "none last": (2, 3, 0)}
    make = (lambda shape: np.full(shape, "αβ"[:2], dtype)) if dtype[0] == "U" else (lambda shape: fill(dtype, shape).copy())
    assert_kept(lab, {name: make(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("dtype", ["?", "i1", "f4", "c16", "M8[ns]", "S3"])
def test_every_memory_layout_is_kept(lab, dtype):
    """Fortran order, strides, negative strides, transposes, broadcasts, read-only: the values count, not how they lie."""
    base = fill(dtype, (6, 8, 4)).copy()
    frozen = base.copy()
    frozen.flags.writeable = False
    assert_kept(
        lab,
        {
            "c": base,
            "fortran": np.asfortranarray(base),
            "transposed": base.transpose(2, 0, 1),
            "strided": base[::2, 1::3, ::2],
            "reversed": base[::-1, ::-2, ::-1],
            "column": base[:, 3, 1],
            "broadcast": np.broadcast_to(base[0, 0], (5, 3, 4)),
            "broadcast scalar": np.broadcast_to(base[0, 0, 0], (4, 3)),
            "frozen": frozen,
            "window": np.lib.stride_tricks.sliding_window_view(base[:, 0, 0], 3),
        },
    )


def test_big_endian_values_come_back_little_endian(lab):
    """The values are the same, the byte order is normalised."""
    arrays = {
        "i4": np.arange(-4, 4, dtype=">i4"),
        "u2": np.arange(8, dtype=">u2").reshape(2, 4),
        "f8": np.linspace(-1, 1, 5).astype(">f8"),
        "c8": (np.arange(3) + 1j).astype(">c8"),
        "M": np.array(["2026-01-31T08:00", "NaT"], ">M8[ms]"),
        "m": np.array([5, -5], ">m8[25s]"),
        "U": np.array(["Δ", "δδ"], ">U2"),
        "scalar": np.array(1.5, ">f4"),
        "strided": np.arange(20, dtype=">i8")[::-3],
    }
    file = assert_kept(lab, arrays)
    assert all(file[name].dtype.byteorder in "=<|" for name in arrays)


def test_large_arrays_of_any_layout_are_kept(lab):
    """Several chunks and several pieces on the wire: 6 MB in C order, in Fortran order, backwards, one long row."""
    base = random.random((600, 1250))
    arrays = {
        "c": base,
        "fortran": np.asfortranarray(base),
        "backwards": base[::-1, ::-1],
        "row": base.reshape(1, -1)[:, ::-1],
    }
    assert_kept(lab, arrays)


DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    hnp.datetime64_dtypes(endianness="?"),
    hnp.timedelta64_dtypes(endianness="?"),
    hnp.byte_string_dtypes(min_len=1, max_len=9),
    hnp.unicode_string_dtypes(endianness="?", min_len=1, max_len=9),
)
NAMES = (
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1, max_size=40)
    .filter(lambda name: name not in (".", "..", "zarr.json") and not name.startswith("__"))
    .filter(lambda name: len(name.encode()) <= 200)
)


@given(
    arrays=st.dictionaries(
        NAMES, DTYPES.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, min_side=0, max_side=6))), max_size=4
    )
)
def test_any_arrays_under_any_allowed_names_are_kept(lab, arrays):
    """Whatever NumPy can make of the kept dtypes comes back, under whatever name passes the rules."""
    assert_kept(lab, arrays)


# --- ways to say it ------------------------------------------------------------------------------------------------


def test_arrays_with_dims_and_attributes_are_kept(lab):
    """`(dims, array)`, `(dims, array, attrs)`, a DataArray and a plain array side by side."""
    file = lab.save(
        {
            "iq": (("flux", "f"), np.ones((3, 4)) + 1j, {"units": "V", "long_name": "signal"}),
            "flux": ("flux", np.arange(3.0)),
            "plain": np.zeros((2, 2)),
            "labelled": xr.DataArray([1, 2], dims="side", attrs={"units": "mm"}),
            "listed": [1.5, 2.5],
        }
    )
    assert {name: file[name].dims for name in file} == {
        "iq": ("flux", "f"),
        "flux": ("flux",),
        "plain": ("plain_0", "plain_1"),
        "labelled": ("side",),
        "listed": ("listed_0",),
    }
    assert file["iq"].attrs == {"units": "V", "long_name": "signal"}
    assert file["labelled"].attrs == {"units": "mm"}
    assert file["plain"].attrs == {}
    assert file["listed"][...].tolist() == [1.5, 2.5]


def test_metadata_alone_makes_a_data_file(lab):
    """No arrays, no files: it is found, it has a group that any Zarr reader opens, its dataset is empty."""
    file = lab.save(name="note", metadata={"why": "cooldown"})
    assert list(file) == []
    assert file.size == 0
    assert lab.get(file.id).metadata == {"why": "cooldown"}
    assert file.load().sizes == {}
    assert list(zarr.open_group(file.path, mode="r", storage_options=storage_options(file.path)).array_keys()) == []


def test_chunks_are_stored_as_asked(lab):
    """`chunks=` decides the stored layout, borders included; other arrays keep the default."""
    values = random.random((25, 31))
    file = assert_kept(lab, {"x": values, "y": values}, chunks={"x": (10, 7)})
    stored = zarr.open_group(file.path, mode="r", storage_options=storage_options(file.path))
    assert file["x"].chunks == stored["x"].chunks == (10, 7)
    assert file["y"].chunks == stored["y"].chunks == (25, 31)
    assert stored["x"][...].tobytes() == values.tobytes()
    assert lab.save({"x": values}, chunks={"x": (100, 100)})["x"].chunks == (25, 31)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
def test_the_codec_is_stored_as_asked(lab, codec):
    """`codec=` is recorded in the document and is what Zarr finds; every codec keeps every bit."""
    arrays = {dtype.replace("?", "bool"): fill(dtype, (64, 33)) for dtype in FIXED} | {"text": np.array(TEXTS, object)}
    file = assert_kept(lab, arrays, codec=codec, chunks={"f8": (10, 10), "c16": (64, 5)})
    assert [info.get("codec", "zstd") for info in file.to_json()["arrays"]] == [codec] * len(arrays)
    description = json.loads((at(file.path) / "f8" / "zarr.json").read_text())
    blosc = [entry["configuration"]["cname"] for entry in description["codecs"] if entry["name"] == "blosc"]
    assert blosc == ([] if codec == "none" else [codec])
    assert description["codecs"][-1]["name"] == "crc32c"


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"chunks": {"y": (2,)}}, "'y'"),
        ({"chunks": {"x": (2, 2)}}, "'x'"),
        ({"chunks": {"x": (0,)}}, "'x'"),
        ({"codec": "gzip"}, "codec"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(lab, options, phrase):
    """Chunks of an unknown array, of another number of axes, of nothing; a codec nobody knows."""
    with pytest.raises(ValidationError, match=phrase):
        lab.save({"x": np.arange(4)}, **options)


def test_typed_fields_are_kept(lab):
    """Each typed field comes back as it was set; times as UTC."""
    parent = lab.save(name="parent")
    fields: dict[str, Any] = {
        "kind": "em_simulation",
        "name": "Γ₁ <b>",
        "description": "d",
        "user": "ada",
        "project": "p",
        "station": "BlueFors 2",
        "device": {"device_info": {"chip": "C7"}},
        "instruments": {"vna": {"model": "ZNB", "settings": {"power": {"value": -30.5, "unit": "dBm"}}}},
        "tags": ["q3", "gut", "größe"],
        "flag": "orange",
        "starred": True,
        "comment": "c",
        "derived_from": [parent.id],
        "identifiers": {"sample": "S-1"},
        "pid": "hdl:20.500/1",
    }
    file = lab.get(lab.save(**fields, measured_at=datetime(2026, 1, 31, 9, tzinfo=timezone(timedelta(hours=1)))).id)
    assert {name: getattr(file, name) for name in fields} == fields
    assert file.measured_at == "2026-01-31T08:00:00.000000Z"
    assert lab.save(cooldown="2026-01-31").cooldown == "2026-01-31T00:00:00.000000Z"


# --- files ---------------------------------------------------------------------------------------------------------

FILE_NAMES = [
    "notes.txt",
    "Messung ü 日本 🜚.log",
    "two words.dat",
    "100%.txt",
    "a%22b%2Fc.txt",
    'quo"ted.txt',
    "it's; here=1.txt",
    "a?b#c&d+e.txt",
    "...",
    ".hidden",
    "n" * 251 + ".bin",
]


def test_files_are_kept_under_any_name(lab):
    """Bytes in memory under unicode names, names that URLs and form data give a meaning to, and zero bytes."""
    files = {name: name.encode() * 3 for name in FILE_NAMES} | {"empty": b"", "binary": random.bytes(3 << 20)}
    file = lab.get(lab.save(name="files", files=files).id)
    assert sorted(file.files) == sorted(files)
    assert {name: file.read_file(name) for name in files} == files
    assert file.size == sum(map(len, files.values()))


def test_files_are_taken_from_disk(lab, tmp_path):
    """A list of paths, and a dict of name to path; beside arrays."""
    (tmp_path / "plot ü.svg").write_text("<svg/>")
    (tmp_path / "empty").write_bytes(b"")
    file = lab.save({"x": np.arange(3)}, files=[str(tmp_path / "plot ü.svg"), tmp_path / "empty"])
    assert file.read_file("plot ü.svg") == b"<svg/>"
    assert file.read_file("empty") == b""
    assert lab.save(files={"as.svg": tmp_path / "plot ü.svg"}).read_file("as.svg") == b"<svg/>"
    assert file["x"][...].tolist() == [0, 1, 2]


# --- metadata ------------------------------------------------------------------------------------------------------


class Mode(enum.Enum):
    FAST = "fast"


def same(left: Any, right: Any) -> bool:
    """Equal, of equal type, NaN equal to NaN, -0.0 not equal to 0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (
            left == right and math.copysign(1, left) == math.copysign(1, right)
        )
    return bool(left == right)


EXACT = {
    "nan": math.nan,
    "infinities": [math.inf, -math.inf],
    "zero": -0.0,
    "tiny": 5e-324,
    "pi": math.pi,
    "complex": [1 - 2j, complex(math.nan, -math.inf), complex(-0.0, 0.0)],
    "when": datetime(2026, 1, 31, 8, 0, 0, 123456, UTC),
    "long ago": datetime(1, 1, 1, tzinfo=UTC),
    "bytes": b"\x00\xff",
    "whole": [0, -1, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1],
    "nothing": None,
    "yes": True,
    "text": "Γ₁ \u0000 🜚 </script>",
    "": "empty key",
    "a.b": {"c.d": {"$gt": 3}},
    "$float": "NaN",
    "looks tagged": [{"$float": "NaN"}, {"$date": "2026"}, {"$literal": {"$literal": 1}}, {"$bytes": "!"}, {"$other": 1}],
    "empty": [[], {}, [[]], [{}]],
}


def test_metadata_comes_back_exactly(lab):
    """NaN, complex, instants, bytes, nesting, and a user's own dicts that look like our tags."""
    got = lab.get(lab.save(metadata=EXACT).id).metadata
    wrong = [key for key in EXACT if key not in got or not same(EXACT[key], got[key])]
    assert not wrong, {key: got.get(key) for key in wrong}
    assert same(EXACT, got)


def test_python_and_numpy_objects_become_plain_metadata(lab):
    """NumPy scalars are numbers, arrays nested lists, tuples lists, dates instants, keys text: all searchable."""
    id = uuid.uuid4()
    file = lab.save(
        metadata={
            "f4": np.float32(0.5),
            "f8": np.float64(-0.25),
            "i8": np.int64(7),
            "u1": np.uint8(255),
            "bool": np.bool_(True),
            "c8": np.complex64(1 + 2j),
            "str": np.str_("x"),
            "nan": np.float32("nan"),
            "array": np.arange(6, dtype="i2").reshape(2, 3),
            "instant": np.datetime64("2026-01-31T08:00", "m"),
            "tuple": (1, (2, 3)),
            "day": date(2026, 1, 31),
            "mode": Mode.FAST,
            "path": pathlib.PurePosixPath("/a/b"),
            "uuid": id,
            3: "three",
        }
    )
    expected = {
        "f4": 0.5,
        "f8": -0.25,
        "i8": 7,
        "u1": 255,
        "bool": True,
        "c8": 1 + 2j,
        "str": "x",
        "nan": math.nan,
        "array": [[0, 1, 2], [3, 4, 5]],
        "instant": datetime(2026, 1, 31, 8, tzinfo=UTC),
        "tuple": [1, [2, 3]],
        "day": datetime(2026, 1, 31, tzinfo=UTC),
        "mode": "fast",
        "path": "/a/b",
        "uuid": str(id),
        "3": "three",
    }
    got = lab.get(file.id).metadata
    wrong = [key for key in expected if key not in got or not same(expected[key], got[key])]
    assert not wrong, {key: got.get(key) for key in wrong}
    assert lab.count({"f4": 0.5, "i8": {"$gte": 7}, "array": [[0, 1, 2], [3, 4, 5]], "id": file.id}) == 1


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.datetimes(timezones=st.just(UTC)),
)
KEYS = st.one_of(st.text(max_size=10), st.sampled_from(["$float", "$date", "$literal", "$ndarray", "$set", "a.b", "_id"]))


@given(metadata=st.dictionaries(KEYS, st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(KEYS, x), max_leaves=12)))
def test_any_metadata_comes_back_exactly(lab, metadata):
    """Whatever JSON with dates, bytes and complex numbers can say."""
    assert same(metadata, lab.get(lab.save(metadata=metadata).id).metadata)


def test_whole_numbers_beyond_64_bits_are_kept_or_refused_by_name(lab):
    """Never a rounded number, never an error without a name."""
    refused, kept = "", None
    try:
        kept = lab.get(lab.save(metadata={"serial": 2**80 + 1}).id).metadata
    except ValidationError as exc:
        refused = str(exc)
    assert kept == {"serial": 2**80 + 1} or "serial" in refused


def test_attributes_keep_their_numpy_dtypes(lab):
    """Attributes of arrays keep arrays and scalars with dtype and shape, which metadata turns into plain JSON."""
    attrs = {"range": np.array([0, 5], "i2"), "gain": np.float32(1.5), "z": 50 + 1j, "nan": math.nan, "on": np.bool_(True)}
    got = lab.get(lab.save({"x": ("t", np.arange(2), attrs)}).id)["x"].attrs
    assert got["range"].dtype == "i2"
    assert got["range"].tolist() == [0, 5]
    assert (type(got["gain"]), got["gain"]) == (np.float32, 1.5)
    assert got["z"] == 50 + 1j
    assert math.isnan(got["nan"])
    assert bool(got["on"]) is True


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[tuple[aq_data.Client, pathlib.Path]]:
    """A folder into which nothing may ever come."""
    data = tmp_path_factory.mktemp("guarded")
    with running(deployed(data)) as url, aq_data.connect(url) as client:
        yield client, blobs(data)


def assert_refused(guarded, phrase: str, code: str | None, **save: Any) -> None:
    client, blobs = guarded
    before = list(blobs.rglob("*")), client.count()
    with pytest.raises(ValidationError) as caught:
        client.save(**save)
    assert phrase in str(caught.value)
    if code is not None:
        assert caught.value.code == code
    assert (list(blobs.rglob("*")), client.count()) == before


GOOD = {"good": np.arange(3)}
LOST = {
    "objects": np.array([1, "a", None], object),
    "numbers as objects": np.array([1.5, 2.5], object),
    "ragged": [[1, 2], [3]],
    "bytes as objects": np.array([b"a"], object),
    "none in text": np.array(["a", None], object),
    "nothing but none": np.array([None, None], object),
    "nan in text": np.array(["a", np.nan], object),
    "structured": np.zeros(3, [("a", "i4"), ("b", "f8")]),
    "void": np.zeros(3, "V7"),
    "longdouble": np.zeros(3, np.longdouble),
    "clongdouble": np.zeros(3, np.clongdouble),
    "masked": np.ma.masked_array([1, 2, 3], [0, 1, 0]),
    "a dict": {"x": 1},
    "nothing": None,
    "intervals": pd.IntervalIndex.from_breaks([0, 1, 2]).values,
    "zoned": pd.DatetimeIndex(["2026-01-31"], tz="Europe/Zurich"),
}


@pytest.mark.parametrize("name", LOST)
def test_values_that_cannot_be_kept_are_refused_by_name(guarded, name):
    """Named with the array, beside a good one, and nothing is stored."""
    assert_refused(guarded, repr(name), "unsupported_dtype", dataset={**GOOD, name: LOST[name]})


def test_missing_texts_are_refused_by_name(guarded):
    """A StringDType with a missing value: it must not come back as the text 'nan'."""
    values = np.array(["a", np.nan], np.dtypes.StringDType(na_object=np.nan))
    assert_refused(guarded, "'labels'", "unsupported_dtype", dataset={"labels": values})


def test_a_multiindex_is_refused_by_name(guarded):
    """With the way out."""
    index = pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["one", "two"])
    dataset = xr.Dataset({"v": ("point", np.arange(4))}, coords=xr.Coordinates.from_pandas_multiindex(index, "point"))
    assert_refused(guarded, "reset_index", None, dataset=dataset)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "a\\b", "a\nb", "\0", "\x7f", "zarr.json", "__init__", "ü" * 101, "\ud800"],
    ids=lambda name: ascii(name)[:20],
)
def test_array_names_that_are_no_path_segment_are_refused(guarded, name):
    """Empty, `.`, `..`, slashes, control characters, `zarr.json`, a leading `__`, over 200 bytes, a lone surrogate."""
    assert_refused(guarded, repr(name[:80]), "bad_name", dataset={**GOOD, name: np.arange(3)})


def test_array_names_that_are_no_text_are_refused(guarded):
    """Also in a dataset, where xarray allows any hashable."""
    assert_refused(guarded, "3", "bad_name", dataset={3: np.arange(3)})
    assert_refused(guarded, "('a', 1)", "bad_name", dataset=xr.Dataset({("a", 1): ("t", [1, 2])}))


def test_array_names_of_200_bytes_are_kept(lab):
    """The limit counts UTF-8 bytes and is inclusive."""
    assert_kept(lab, {"ü" * 100: np.arange(3), "n" * 200: np.arange(2)})


def test_dimensions_of_two_sizes_are_refused_by_name(guarded):
    """`t` cannot be 2 and 3 long."""
    assert_refused(guarded, "'t'", None, dataset={"a": ("t", np.arange(2)), "b": ("t", np.arange(3))})
    assert_refused(guarded, "'a'", None, dataset={"a": (("t", "u"), np.arange(2))})
    assert_refused(guarded, "'a_0'", None, dataset={"a": np.arange(3), "b": ("a_0", np.arange(5))})


def test_a_single_value_with_the_name_of_a_dimension_is_refused(guarded):
    """xarray could not open it again."""
    assert_refused(guarded, "'t'", None, dataset={"a": ("t", np.arange(2)), "t": ((), 5.0)})
    assert_refused(guarded, "'a_0'", None, dataset={"a": np.arange(3), "a_0": ((), 5.0)})


@pytest.mark.parametrize(
    ("save", "phrase"),
    [
        ({"dataset": xr.Dataset({"x": ("t", [1])}, attrs={"aq_data": 1})}, "aq_data"),
        ({"dataset": xr.Dataset({"x": ("t", [1], {"bad": object()})})}, "'x'"),
        ({"dataset": 5}, "int"),
        ({"dataset": {"t": np.array(["a", "\ud800"], object)}}, "'t'"),
        ({"dataset": {"t": ("\ud800", np.arange(3))}}, "'t'"),
        ({"dataset": GOOD, "chunks": {"good": ("x",)}}, "'good'"),
        ({"dataset": GOOD, "chip": "C7"}, "'chip'"),
        ({"dataset": GOOD, "state": "complete"}, "'state'"),
        ({"dataset": GOOD, "id": "7"}, "UUIDv7"),
        ({"dataset": GOOD, "id": str(uuid.UUID(int=5, version=4))}, "UUIDv7"),
        ({"dataset": GOOD, "derived_from": ["nobody"]}, "UUIDv7"),
        ({"dataset": GOOD, "metadata": {"a": {"b": [1, object()]}}}, "metadata.a.b[1]"),
        ({"dataset": GOOD, "metadata": {"a": {"b": np.timedelta64(3, "s")}}}, "metadata.a.b"),
        ({"dataset": GOOD, "metadata": {"deep": "\ud800"}}, "metadata.deep"),
        ({"dataset": GOOD, "metadata": {"a": {1.5: 2}}}, "metadata.a"),
        ({"dataset": GOOD, "metadata": {1: 2, "1": 3}}, "'1'"),
        ({"dataset": GOOD, "measured_at": "yesterday"}, "measured_at"),
        ({"dataset": GOOD, "flag": "pink"}, "flag"),
        ({"dataset": GOOD, "tags": "q3"}, "tags"),
        ({"dataset": GOOD, "name": 5}, "name"),
        ({"dataset": GOOD, "files": {"a/b": b""}}, "'a/b'"),
        ({"dataset": GOOD, "files": {"..": b""}}, "'..'"),
        ({"dataset": GOOD, "files": {"": b""}}, "''"),
        ({"dataset": GOOD, "files": ["/no/such/file"]}, "/no/such/file"),
    ],
    ids=lambda value: None if isinstance(value, dict) else ascii(value),
)
def test_documents_that_cannot_be_kept_are_refused_by_name(guarded, save, phrase):
    """The reserved attribute, unknown fields, bad ids, unkeepable metadata, file names: each names the place."""
    assert_refused(guarded, phrase, None, **save)


def test_nesting_without_end_is_refused(guarded):
    """64 levels are kept, more are refused with the place, not with a RecursionError."""
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"a": deep}
    assert_refused(guarded, "64", None, metadata=deep)


# --- finished means finished ---------------------------------------------------------------------------------------


def test_finished_arrays_cannot_be_assigned(lab):
    """Neither in Python nor by a patch nor by a put; the values stay."""
    file = lab.save({"x": np.arange(3)})
    with pytest.raises(ConflictError, match="derived_from") as caught:
        file["x"][0] = 9
    assert caught.value.code == "finished"
    with pytest.raises(ConflictError) as caught:
        lab.update(file.id, {"arrays": []})
    assert caught.value.code == "finished"
    with pytest.raises(ConflictError):
        lab._http.request("PUT", f"/api/v1/datafiles/{file.id}/arrays/x", content=b"1")
    assert lab.get(file.id)["x"][...].tolist() == [0, 1, 2]


def test_saving_again_under_the_same_id_is_harmless(lab):
    """Same content, same answer, also after a change to the document; other content is a conflict and changes nothing."""
    id = "0197aaaa-bbbb-7ccc-8ddd-" + uuid.uuid4().hex[:12]
    first = lab.save({"x": np.arange(3)}, id=id.upper(), name="one", files={"a": b"1"})
    assert first.id == id
    lab.update(id, {"comment": "good"})
    again = lab.save({"x": np.arange(3)}, id=id, name="one", files={"a": b"1"})
    assert (again.created_at, again.comment) == (first.created_at, "good")
    for other in [
        {"dataset": {"x": np.arange(1, 4)}, "name": "one", "files": {"a": b"1"}},
        {"dataset": {"x": np.arange(3)}, "name": "two", "files": {"a": b"1"}},
        {"dataset": {"x": np.arange(3)}, "name": "one", "files": {"a": b"2"}},
        {"dataset": {"x": np.arange(3)}, "name": "one", "files": {}},
        {"dataset": {"x": np.arange(3, dtype="u8")}, "name": "one", "files": {"a": b"1"}},
    ]:
        with pytest.raises(ConflictError) as caught:
            lab.save(id=id, **other)
        assert caught.value.code == "id_taken"
    assert lab.get(id)["x"][...].tolist() == [0, 1, 2]
    assert lab.get(id).read_file("a") == b"1"


def test_what_is_not_there_is_named(lab):
    """An unknown array or file names those there are; an unknown id is NotFoundError, which is a KeyError."""
    file = lab.save({"x": np.arange(3)}, files={"a.txt": b"1"})
    with pytest.raises(NotFoundError, match=r"'y'.*x"):
        file["y"]
    with pytest.raises(NotFoundError, match=r"a\.txt"):
        file.read_file("b.txt")
    with pytest.raises(KeyError):
        lab.get("0197aaaa-bbbb-7ccc-8ddd-000000000000")
    assert issubclass(NotFoundError, AqDataError)
