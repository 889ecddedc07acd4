"""What xarray is promised: the same dataset back, lazily where asked, through our client and through any Zarr reader."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import operator
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import httpx
import hypothesis.extra.numpy as hnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from aq_server.commands.serving import running
from hypothesis import example, given, settings
from hypothesis import strategies as st
from services.deployment import WAYS, deployed, open_zarr, opened, storage_options
from xarray.testing.strategies import variables

import aq_data
from aq_data.client.xarray import AqDataEntrypoint
from aq_data.errors import AqDataError, NotFoundError, SelectionError, UnavailableError, ValidationError
from aq_data.models.values import is_unicode

random = np.random.default_rng(4)


@pytest.fixture(scope="module", params=WAYS)
def lab(request, tmp_path_factory) -> Iterator[aq_data.Client]:
    """One client for the whole module: saves do not touch each other."""
    data = tmp_path_factory.mktemp("lab")
    with opened(data, request.param) as client:
        yield client


def assert_same(got: xr.Dataset, sent: xr.Dataset) -> None:
    """Identical, of the same dtypes (but for byte order), with the same indexes."""
    xr.testing.assert_identical(got, sent)
    dtypes = {name: variable.dtype for name, variable in sent.variables.items()}
    assert {name: variable.dtype for name, variable in got.variables.items()} == {
        name: dtype if dtype.kind in "OT" else dtype.newbyteorder("<") for name, dtype in dtypes.items()
    }
    assert set(got.xindexes) == set(sent.xindexes)


def assert_round_trip(client: aq_data.Client, dataset: xr.Dataset) -> aq_data.DataFile:
    """Through `load`, through `open`, and for a reader that fetches the document anew."""
    file = client.save(dataset)
    assert_same(file.load(), dataset)
    assert_same(client.get(file.id).open().load(), dataset)
    return file


def open_plain(path: str, **options: Any) -> xr.Dataset:
    """As a program without aq-data would, without the one attribute that is ours."""
    with warnings.catch_warnings():
        # Zarr warns of what version 3 of its specification does not name yet: consolidated metadata, text and times.
        warnings.filterwarnings("ignore", category=UserWarning, module="zarr")
        warnings.filterwarnings("ignore", message=".*Zarr V3 specification.*")
        dataset = open_zarr(path, chunks=None, **options).load()
    assert dataset.attrs.pop("aq_data")["id"] in path
    return dataset


# --- generated datasets --------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from(
        [
            "iq",
            "flux",
            "f",
            "time",
            "c",
            "x y",
            "Δf",
            "signal (mV)",
            "a.b",
            "100%",
            "q?",
            "#1",
            "über mäßig",
            "c/".strip("/"),
        ]
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1, max_size=12).filter(
        lambda name: name not in (".", "..", "zarr.json") and not name.startswith("__")
    ),
)
VALUES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(sizes=(64, 128)),
    hnp.unicode_string_dtypes(min_len=1, max_len=6),
    hnp.byte_string_dtypes(min_len=2, max_len=6),  # S1 is what CF calls characters: xarray joins them to words
    st.sampled_from([np.dtype(f"{kind}8[{unit}]") for kind in "Mm" for unit in ("s", "ms", "us", "ns")]),
)
INDEXES = st.sampled_from([np.dtype(d) for d in ("i4", "i8", "u2", "f4", "f8", "?", "U4", "M8[ns]", "M8[s]", "m8[ms]")])
# Of what JSON can hold; a plain reader sees it as it is.
PLAIN = st.one_of(
    st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)
LOCAL = st.one_of(
    PLAIN,
    st.floats(),
    st.complex_numbers(),
    st.lists(st.integers(0, 9), max_size=3),
    hnp.arrays(
        st.sampled_from([np.dtype(d) for d in ("i2", "u8", "f4", "f8", "c8")]), hnp.array_shapes(max_dims=2, max_side=3)
    ),
    st.sampled_from([np.float32(1.5), np.int64(-3), np.uint8(255), np.complex64(1j), np.float64("nan"), np.bool_(True)]),
)
# What CF gives a meaning to, in any of xarray's decoders.
RESERVED = {
    "scale_factor",
    "add_offset",
    "_FillValue",
    "missing_value",
    "units",
    "calendar",
    "dtype",
    "_Unsigned",
    "coordinates",
}


def attributes(values: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    keys = st.one_of(st.sampled_from(["long_name", "gain", "standard_name", "$float", "a b"]), st.text(max_size=6))
    return st.dictionaries(keys.filter(lambda key: key not in RESERVED | {"aq_data"}), values, max_size=3)


@st.composite
def datasets(draw: Any, attrs: st.SearchStrategy[dict[str, Any]]) -> xr.Dataset:
    """Up to three dims of 0 to 4, index and other coordinates, variables on any of them."""
    sizes = draw(st.dictionaries(NAMES, st.integers(0, 4), max_size=3))
    dataset = xr.Dataset(attrs=draw(attrs))
    for dim, size in sizes.items():
        if draw(st.booleans()):
            values = draw(hnp.arrays(draw(INDEXES), (size,)))
            dataset = dataset.assign_coords({dim: (dim, values, draw(attrs))})
    for name in draw(st.lists(NAMES.filter(lambda name: name not in sizes), max_size=4, unique=True)):
        dims = draw(
            st.permutations(list(sizes)).flatmap(lambda order: st.sampled_from([order[:n] for n in range(len(order) + 1)]))
        )
        values = draw(hnp.arrays(draw(VALUES), tuple(sizes[dim] for dim in dims)))
        dataset[name] = (tuple(dims), values, draw(attrs))
        if draw(st.booleans()):
            dataset = dataset.set_coords(name)
    return dataset


@given(dataset=datasets(attributes(LOCAL)))
def test_any_dataset_comes_back_identical(lab, dataset):
    """Whatever the dims, dtypes, coordinates, names and attributes."""
    assert_round_trip(lab, dataset)


@given(dataset=datasets(attributes(PLAIN)))
def test_any_dataset_opens_identical_in_plain_zarr(lab, dataset):
    """`xarray.open_zarr(file.path)` sees what was saved; only coordinates whose name holds a space become variables."""
    file = lab.save(dataset)
    spaced = [name for name in dataset.coords if name not in dataset.dims and any(ch.isspace() for ch in name)]
    xr.testing.assert_identical(open_plain(file.path), dataset.reset_coords(spaced))


def same(left: Any, right: Any) -> bool:
    """Equal, arrays with their dtype, NaN equal to NaN; xarray's own comparison knows no arrays inside dicts."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        left, right = (a.astype(a.dtype.newbyteorder("<")) for a in (np.asarray(left), np.asarray(right)))
        return bool(left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes())
    return bool(left == right) or (left != left and right != right)


def holds_surrogates(value: Any) -> bool:
    """Whether some array of texts within has one that UTF-8 cannot carry: those are refused."""
    if isinstance(value, dict):
        return any(map(holds_surrogates, value.values()))
    return isinstance(value, np.ndarray) and value.dtype.kind == "U" and not is_unicode(value)


@settings(max_examples=settings.default.max_examples // 2)
@given(variable=variables(dtype=VALUES))
@example(variable=xr.Variable("x", [1], {"note": np.array(["\ud800"])}))
def test_any_variable_of_xarrays_own_strategies_comes_back_identical(lab, variable):
    """xarray's generator of variables, with its own ideas of names, times without values, and nested attributes."""
    if holds_surrogates(dict(variable.attrs)):
        with pytest.raises(ValidationError, match="surrogate"):
            lab.save({"v": variable})
        return
    got = lab.save({"v": variable}).load()["v"].variable
    xr.testing.assert_equal(got, variable)
    assert got.dtype == variable.dtype.newbyteorder("<")
    assert same(got.attrs, variable.attrs)


# --- hard cases ----------------------------------------------------------------------------------------------------

TIMES = np.array(["2026-01-31T08:00:00.123456789", "NaT", "1900-01-01"], "M8[ns]")
YX = (("y", "x"), np.arange(6.0).reshape(2, 3))

PLAIN_CASES: dict[str, xr.Dataset] = {
    "empty": xr.Dataset(),
    "attributes alone": xr.Dataset(attrs={"title": "nothing yet", "n": 3}),
    "no coordinates": xr.Dataset({"a": YX, "b": ("x", [1, 2, 3])}),
    "square grid": xr.Dataset(
        {"z": (("a", "b"), np.arange(16.0).reshape(4, 4))}, coords={"a": np.arange(4), "b": -np.arange(4)}
    ),
    "square grid without coordinates": xr.Dataset({"z": (("a", "b"), np.eye(3)), "w": (("b", "a"), np.eye(3) * 2)}),
    "square grid with one coordinate": xr.Dataset({"z": (("a", "b"), np.eye(3))}, coords={"b": [7, 8, 9]}),
    "scalar variable": xr.Dataset({"t1": ((), 3.5e-6, {"long_name": "T1"})}),
    "scalar coordinates": xr.Dataset(
        {"a": ("x", [1, 2])}, coords={"temperature": 0.01, "label": "q3", "when": np.datetime64("2026-01-31", "ns")}
    ),
    "string index": xr.Dataset({"a": ("qubit", [1, 2])}, coords={"qubit": ["q0", "q1 long"]}),
    "string object index": xr.Dataset({"a": ("qubit", [1, 2])}, coords={"qubit": np.array(["q0", "q1 long"], object)}),
    "bytes index": xr.Dataset({"a": ("x", [1, 2])}, coords={"x": np.array([b"a", b"bc"])}),
    "text variable": xr.Dataset({"note": ("x", np.array(["", "Γ₁", "long " * 50], object))}),
    "datetime index": xr.Dataset({"a": ("t", [1.0, 2.0, 3.0])}, coords={"t": TIMES}),
    "coarse times": xr.Dataset({"a": ("t", np.array(["0001-01-01", "9999-12-31"], "M8[s]"))}),
    "timedelta index": xr.Dataset({"a": ("t", [1, 2])}, coords={"t": np.array([10, 20], "m8[ns]")}),
    "timedelta variable": xr.Dataset({"a": ("t", np.array([10, -20], "m8[us]"))}),
    "boolean index": xr.Dataset({"a": ("b", [1, 2])}, coords={"b": [False, True]}),
    "descending index": xr.Dataset({"a": ("f", np.arange(4))}, coords={"f": [4.0, 3.0, 2.0, 1.0]}),
    "repeated index values": xr.Dataset({"a": ("f", np.arange(3))}, coords={"f": [1.0, 1.0, np.nan]}),
    "coordinate beside the dimension": xr.Dataset(
        {"a": ("x", [1, 2])}, coords={"x": [0, 1], "power": ("x", [-30.0, -20.0])}
    ),
    "coordinate without index": xr.Dataset({"a": ("x", [1, 2])}, coords={"power": ("x", [-30.0, -20.0])}),
    "coordinates in two dims": xr.Dataset({"z": YX}, coords={"lon": (("y", "x"), np.ones((2, 3))), "lat": YX}),
    "transposed variables": xr.Dataset({"z": YX, "w": (("x", "y"), np.arange(6).reshape(3, 2))}),
    "no length": xr.Dataset({"z": (("y", "x"), np.empty((0, 3)))}, coords={"y": np.empty(0), "x": [1, 2, 3]}),
    "unicode and spaces": xr.Dataset(
        {"Signal |S₂₁| (dB)": ("Frequenz δf", [1.0, 2.0], {"long name": "Übertragung 🜚"})},
        coords={"Frequenz δf": [4.0, 5.0]},
        attrs={"größe": "ä\u0000b"},
    ),
    "names that URLs know": xr.Dataset(
        {"a?b#c": ("x%20y", [1, 2]), "%2F": ((), 1), "...": ((), 2), "c": ((), 3), "+&=": ((), 4)}
    ),
    "integers, halves, complex": xr.Dataset(
        {
            "u1": ("x", np.array([0, 255], "u1")),
            "i8": ("x", np.array([2**63 - 1, -(2**63)], "i8")),
            "f2": ("x", np.array([np.nan, -0.0], "f2")),
            "c8": ("x", np.array([1j, np.nan], "c8")),
            "c16": ("x", np.array([complex(np.inf, np.nan), -0.0])),
            "bool": ("x", [True, False]),
        }
    ),
    "nested attributes": xr.Dataset(
        {"a": ((), 1, {"fit": {"a": [1, {"b": None}], "ok": True}})}, attrs={"list": [[1, 2], [3]]}
    ),
    "array attributes": xr.Dataset({"a": ((), 1, {"range": np.array([0, 5]), "i": np.int64(3), "f": np.float32(0.5)})}),
    "many chunks": xr.Dataset(
        {"z": (("a", "b"), random.random((700, 450)))}, coords={"a": np.arange(700), "b": np.arange(450)}
    ),
}
CLIENT_CASES: dict[str, xr.Dataset] = {
    "packed": xr.Dataset(
        {"a": ("x", np.array([1, -999], "i2"), {"scale_factor": 0.1, "add_offset": 5.0, "_FillValue": np.int16(-999)})}
    ),
    "NaN as fill value": xr.Dataset({"a": ("x", [1.0, 2.0], {"_FillValue": np.nan, "missing_value": np.float32(-1)})}),
    "NaN as fill value of integers": xr.Dataset(
        {"a": ("x", np.array([1, 2], "i2"), {"_FillValue": np.nan}), "b": ("x", [True, False], {"_FillValue": np.inf})}
    ),
    "fill values of other kinds": xr.Dataset(
        {
            "u": ("x", np.array(["a", "b"]), {"_FillValue": ""}),
            "c": ("x", np.array([1j, 2]), {"_FillValue": 1j}),
            "t": ("x", np.array([1, 2], "M8[ns]"), {"_FillValue": -1}),
            "i": ("x", np.array([1, 2], "i4"), {"_FillValue": "none"}),
            "f": ("x", np.array([1.0, 2.0], "f4"), {"_FillValue": np.array([np.nan], "f4")}),
        }
    ),
    "CF times": xr.Dataset({"t": ("x", [0, 1], {"units": "seconds since 2026-01-31", "calendar": "standard"})}),
    "durations by unit": xr.Dataset(
        {"t": ("x", [0.0, 1.0], {"units": "seconds"})}, coords={"x": ("x", [1, 2], {"units": "ns"})}
    ),
    "unsigned by attribute": xr.Dataset({"a": ("x", np.array([-1], "i1"), {"_Unsigned": "true"})}),
    "attributes about coordinates": xr.Dataset(
        {"a": ("x", [1], {"coordinates": "b"}), "b": ("x", [2])}, attrs={"coordinates": "b"}
    ),
    "attributes beyond JSON": xr.Dataset(
        {"a": ((), 1, {"nan": np.nan, "inf": -np.inf, "z0": 50 + 1j, "c8": np.complex64(1j), "raw": b"\x00\xff"})},
        attrs={"nans": np.array([1, np.nan], "f4"), "when": np.datetime64("2026-01-31", "D"), "z": np.array([[1j]])},
    ),
    "attributes like our tags": xr.Dataset(attrs={"a": {"$float": "NaN"}, "$date": "2026", "b": {"$literal": {}}}),
    "coordinates with spaces": xr.Dataset({"a": ("x", [1, 2])}, coords={"drive power": ("x", [1.0, 2.0]), "two words": 3}),
    "other byte order": xr.Dataset({"a": ("x", np.arange(3, dtype=">f4"))}, coords={"b": ("x", np.arange(3, dtype=">i2"))}),
    "pandas text index": xr.Dataset({"a": ("q", [1, 2])}, coords={"q": pd.Index(["q0", "q1"])}),
    "StringDType": xr.Dataset({"a": ("x", np.array(["a", "Γ₁"], np.dtypes.StringDType()))}),
}


@pytest.mark.parametrize("case", [*PLAIN_CASES, *CLIENT_CASES])
def test_hard_cases_come_back_identical(lab, case):
    """Each is a shape of dataset that some store has mangled."""
    assert_round_trip(lab, {**PLAIN_CASES, **CLIENT_CASES}[case])


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_hard_cases_open_identical_in_plain_zarr(lab, case):
    """With no aq-data between the folder and xarray."""
    dataset = PLAIN_CASES[case]
    xr.testing.assert_identical(open_plain(lab.save(dataset).path), dataset)


@pytest.mark.parametrize("case", CLIENT_CASES)
def test_what_a_plain_reader_may_decode_it_can_open_and_reads_undecoded(lab, case):
    """The excepted attributes never keep a plain reader from opening; undecoded, every value is as it was saved."""
    dataset = CLIENT_CASES[case]
    file = lab.save(dataset)
    open_plain(file.path)
    raw = open_plain(file.path, decode_cf=False)
    assert sorted(raw.variables) == sorted(dataset.variables)
    for name, variable in dataset.variables.items():
        np.testing.assert_array_equal(raw[name].values, variable.values)
        assert raw[name].dims == variable.dims


def test_a_program_without_aq_data_opens_the_folder(lab, tmp_path):
    """In a process in which importing aq_data fails, `xarray.open_zarr(file.path)` sees the dataset."""
    dataset = PLAIN_CASES["unicode and spaces"].assign(iq=(("a", "b"), np.eye(3) + 1j, {"units": "V"}))
    file = lab.save(dataset, name="for others")
    program = """
import json, sys, warnings
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("aq_data", "aq_server"):
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Refuse())
try:
    import aq_data
except ImportError:
    pass
else:
    sys.exit("aq_data can be imported")
warnings.simplefilter("ignore")
import xarray
dataset = xarray.open_zarr(sys.argv[1], chunks=None, storage_options=json.loads(sys.argv[3])).load()
assert dataset.attrs.pop("aq_data")["document"]["name"] == "for others"
import pickle
pickle.dump(dataset, open(sys.argv[2], "wb"))
""".replace("dataset.to_pickle = None if False else None\n", "")
    target = tmp_path / "seen.pickle"
    done = subprocess.run(
        [sys.executable, "-c", program, file.path, str(target), json.dumps(storage_options(file.path))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    xr.testing.assert_identical(pd.read_pickle(target), dataset)


def test_a_data_array_is_saved_under_its_name(lab):
    """A DataArray becomes a dataset of one variable with its coordinates."""
    array = xr.DataArray([[1.0, 2.0]], dims=("y", "x"), coords={"x": [3, 4]}, name="iq", attrs={"units": "V"})
    xr.testing.assert_identical(lab.save(array).load()["iq"], array)
    assert sorted(lab.save(array.rename(None))) == ["data", "x"]


def test_dask_backed_datasets_are_saved_like_others(lab):
    """What is computed on the way is stored, in its dtype."""
    dataset = xr.Dataset({"a": (("x", "y"), random.random((40, 50)))}, coords={"x": np.arange(40)})
    xr.testing.assert_identical(lab.save(dataset.chunk({"x": 7})).load(), dataset)


# --- lazy reading --------------------------------------------------------------------------------------------------


class Counting(httpx.BaseTransport):
    """Passes requests on and counts them and the bytes of answers: bodies and headers."""

    class _Stream(httpx.SyncByteStream):
        def __init__(self, inner: Any, count: Any) -> None:
            self._inner, self._count = inner, count

        def __iter__(self) -> Iterator[bytes]:
            for piece in self._inner:
                self._count(len(piece))
                yield piece

        def close(self) -> None:
            self._inner.close()

    def __init__(self, inner: httpx.BaseTransport) -> None:
        self._inner = inner
        self.reset()

    def reset(self) -> None:
        self.received, self.requests = 0, 0

    def _count(self, n: int) -> None:
        self.received += n

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        answer = self._inner.handle_request(request)
        self.received += sum(len(name) + len(value) + 4 for name, value in answer.headers.raw)
        stream = self._Stream(answer.stream, self._count)
        return httpx.Response(answer.status_code, headers=answer.headers.raw, stream=stream, extensions=answer.extensions)

    def close(self) -> None:
        self._inner.close()


@contextlib.contextmanager
def counted(client: aq_data.Client) -> Iterator[Counting]:
    """Count what goes over the client's connection within the block."""
    inner = client._http.client._transport
    client._http.client._transport = counting = Counting(inner)
    try:
        yield counting
    finally:
        client._http.client._transport = inner


BIG = xr.Dataset(
    {"z": (("y", "x"), random.random((2000, 2500)), {"units": "V"})},
    coords={"y": np.linspace(0, 1, 2000), "x": np.arange(2500)},
)


@pytest.fixture(scope="module")
def big(lab) -> aq_data.DataFile:
    """40 MB of numbers in chunks of about 1 MB."""
    return lab.save(BIG, name="big")


def test_five_numbers_of_forty_megabytes_cost_less_than_twenty_kilobytes(lab, big):
    """`isel` and `sel` fetch only what they name, however far apart; opening reads index coordinates and nothing else."""
    with counted(lab) as wire:
        dataset = big.open()
        assert wire.received < 60_000
        for pick in [
            {"y": 1234, "x": slice(100, 105)},
            {"y": [0, 500, 1000, 1500, 1999], "x": 7},
            {"y": slice(None, None, 400), "x": -1},
        ]:
            wire.reset()
            np.testing.assert_array_equal(dataset.z.isel(pick).values, BIG.z.isel(pick).values)
            assert (wire.received < 20_000, wire.requests) == (True, 1)
        wire.reset()
        picked = dataset.z.sel(y=0.5, method="nearest").sel(x=slice(10, 14))
        np.testing.assert_array_equal(picked.values, BIG.z.sel(y=0.5, method="nearest").sel(x=slice(10, 14)).values)
        assert wire.received < 20_000
        wire.reset()
        assert big["z"][1999, 2495:].tolist() == BIG.z.values[1999, 2495:].tolist()
        assert wire.received < 20_000


def test_looking_at_a_lazy_dataset_fetches_no_values(lab, big):
    """Repr, dims, dtypes, attributes and arithmetic on metadata cost a few hundred bytes at most."""
    dataset = big.open()
    with counted(lab) as wire:
        assert "z" in repr(dataset)
        assert dataset.z._repr_html_()
        assert dataset.z.attrs == {"units": "V"}
        lazy = dataset.z.isel(y=slice(10, 20)).transpose("x", "y")
        assert lazy.shape == (2500, 10)
        assert wire.received < 1000
        np.testing.assert_array_equal(lazy.isel(x=3).values, BIG.z.values[10:20, 3])
        assert wire.received < 20_000


def test_successive_and_vectorised_indexing_are_right(lab, big):
    """Slices of slices, negative steps, outer lists, pointwise indexing: all equal to NumPy on the whole array."""
    lazy, whole = big.open().z, BIG.z
    points = {"y": xr.DataArray([5, 1999, 5], dims="p"), "x": xr.DataArray([0, 2499, 17], dims="p")}
    for pick in [
        lambda a: a.isel(y=slice(100, 200)).isel(y=slice(None, None, -7), x=[3, 1, 2]),
        lambda a: a.isel(y=[3, 3, 0], x=slice(None, None, -500)),
        lambda a: a.isel(y=slice(5, 5)),
        lambda a: a.isel(points),
        lambda a: a.isel(x=np.arange(2500) % 701 == 0, y=[-1]),
        lambda a: a.isel(y=-2)[::-600],
    ]:
        xr.testing.assert_identical(pick(lazy).load(), pick(whole))


def test_stored_chunks_become_dask_chunks(lab, big):
    """`chunks={}` follows storage; a computed mean is that of the values."""
    dataset = big.open(chunks={})
    grid = big["z"].chunks
    assert dataset.z.data.chunksize == grid
    assert dataset.z.data.numblocks == tuple(-(-n // c) for n, c in zip((2000, 2500), grid, strict=True))
    mean = dataset.z.isel(x=slice(0, 30)).mean("y").compute(scheduler="synchronous")
    np.testing.assert_allclose(mean.values, BIG.z.isel(x=slice(0, 30)).mean("y").values)
    assert big.open(chunks={"y": 1000}).z.data.chunksize[0] == 1000


def test_lazy_datasets_compute_in_another_process(lab):
    """A dask dataset and a lazy one pickle, and are read by a process that was started afresh, over http and embedded."""
    dataset = xr.Dataset(
        {"z": (("y", "x"), np.arange(12.0).reshape(3, 4)), "label": ("x", np.array(list("abcd"), object))},
        coords={"x": [1, 2, 3, 4]},
    )
    file = lab.save(dataset, chunks={"z": (2, 2)})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = file.open(chunks={})
        assert parts.z.data.numblocks == (2, 2)
        computed = pool.submit(operator.methodcaller("compute", scheduler="synchronous"), parts)
        loaded = pool.submit(operator.methodcaller("load"), file.open())
        xr.testing.assert_identical(computed.result(60), dataset)
        xr.testing.assert_identical(loaded.result(60), dataset)


def test_lazy_datasets_outlive_the_client(data):
    """Closing the client takes nothing from a dataset that was opened before: it opens its own way to the data."""
    with running(deployed(data)) as url:
        with aq_data.connect(url) as client:
            lazy = client.save(BIG.isel(y=slice(0, 10))).open()
        np.testing.assert_array_equal(lazy.z.isel(y=3).values, BIG.z.values[3])


@pytest.mark.parametrize("seed", range(3))
def test_long_lists_and_masks_of_positions_work(lab, seed):
    """1e5 picks, sorted or not, with repeats, dense or sparse, and boolean masks: equal to NumPy's answer."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << 40, 400_000)
    grid = rng.random((3, 150_000))
    file = lab.save({"v": ("i", values), "g": (("row", "i2"), grid)})
    picks = rng.integers(0, 400_000, 100_000)
    np.testing.assert_array_equal(file["v"][picks], values[picks])
    np.testing.assert_array_equal(file["v"][np.sort(picks)], values[np.sort(picks)])
    mask = rng.random(400_000) < 0.25
    np.testing.assert_array_equal(file["v"][mask], values[mask])
    np.testing.assert_array_equal(file.open().v.isel(i=mask).values, values[mask])
    columns = rng.permutation(150_000)[:100_000] - 150_000 * (seed == 2)
    np.testing.assert_array_equal(file["g"][[2, 0], columns], grid[[2, 0]][:, columns])
    np.testing.assert_array_equal(file.open().g.isel(i2=columns, row=1).values, grid[1, columns])


def test_sparse_lists_of_positions_work(lab, big):
    """3,000 positions spread over 40 MB need several requests; the answer is one."""
    picks = np.sort(random.choice(2000 * 2500, 3000, replace=False))
    flat = lab.save({"v": BIG.z.values.reshape(-1)})
    np.testing.assert_array_equal(flat["v"][picks], BIG.z.values.reshape(-1)[picks])
    mask = np.zeros(2500, bool)
    mask[::3] = True
    np.testing.assert_array_equal(big["z"][[1999, 0], mask], BIG.z.values[[1999, 0]][:, mask])


def test_positions_that_are_not_there_are_refused_with_the_shape(lab, big):
    """SelectionError, which is an IndexError, names the real shape; nothing is guessed."""
    for key in [(2000, 0), (0, 0, 0), ([0, 2500],), (np.zeros(7, bool),), (None,), (slice(0, 3, 0),), (1.5,)]:
        with pytest.raises(SelectionError, match="2000, 2500") as caught:
            big["z"][key]
        assert caught.value.details["shape"] == [2000, 2500]
    with pytest.raises(IndexError):
        big["z"].select("0:3,9999")
    np.testing.assert_array_equal(big["z"].select("-1,[4,2]"), BIG.z.values[-1, [4, 2]])


# --- the engine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(server) -> Iterator[tuple[str, xr.Dataset]]:
    """Address of a saved dataset on a server, and the dataset."""
    dataset = xr.Dataset({"z": YX, "w": ("x", [1, 2, 3])}, coords={"x": [4, 5, 6]}, attrs={"title": "engine"})
    with aq_data.connect(server) as client:
        file = client.save(dataset)
        yield f"{server}/api/v1/datafiles/{file.id}", dataset


def test_the_engine_opens_an_address(saved):
    """`xarray.open_dataset(url, engine="aq-data")`, also by the class, with chunks, and with a scheme of our own."""
    url, dataset = saved
    with xr.open_dataset(url, engine="aq-data") as opened:
        assert_same(opened.load(), dataset)
        assert opened.encoding["source"] == url
    assert_same(xr.open_dataset(url, engine=AqDataEntrypoint).load(), dataset)
    assert_same(xr.open_dataset(url, engine="aq-data", chunks={}).compute(scheduler="synchronous"), dataset)
    assert_same(xr.open_dataset(f"aq-data+{url}", engine="aq-data").load(), dataset)
    assert_same(xr.open_dataset(f"aq-data+{url}").load(), dataset)
    assert_same(xr.load_dataset(f"{url}/", engine="aq-data"), dataset)


def test_the_engine_drops_variables(saved):
    """Variables and coordinates that are not wanted are not read."""
    url, dataset = saved
    assert_same(xr.open_dataset(url, engine="aq-data", drop_variables="w").load(), dataset.drop_vars("w"))
    dropped = xr.open_dataset(url, engine="aq-data", drop_variables=["x", "z", "nobody"]).load()
    assert_same(dropped, dataset.drop_vars(["x", "z"]))


def test_the_engine_gives_the_reason_when_it_cannot_open(saved):
    """A wrong address, an unknown id, a deleted one, nobody there: an error of ours, never an empty dataset."""
    url, _ = saved
    server, _, id = url.partition("/api/v1/datafiles/")
    with pytest.raises(ValidationError, match="api/v1/datafiles"):
        xr.open_dataset(f"{server}/somewhere", engine="aq-data")
    with pytest.raises(ValidationError):
        xr.open_dataset("file.nc", engine="aq-data")
    unknown = id[:-4] + ("0000" if id[-4:] != "0000" else "1111")
    with pytest.raises(NotFoundError, match=unknown):
        xr.open_dataset(f"{server}/api/v1/datafiles/{unknown}", engine="aq-data")
    with aq_data.connect(server) as client:
        client.delete(id)
    with pytest.raises(NotFoundError) as caught:
        xr.open_dataset(url, engine="aq-data")
    assert caught.value.code == "deleted"


def test_the_engine_says_that_nobody_listens(monkeypatch):
    """UnavailableError naming the address."""
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.001)
    url = "http://127.0.0.1:9/api/v1/datafiles/0197aaaa-bbbb-7ccc-8ddd-000000000000"
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        xr.open_dataset(url, engine="aq-data")


def test_the_engine_guesses_only_its_own_addresses(tmp_path):
    """xarray asks every engine about every address: all others must be left to the others."""
    engine = AqDataEntrypoint()
    id = "0197aaaa-bbbb-7ccc-8ddd-000000000000"
    for own in [
        f"http://host:5000/api/v1/datafiles/{id}",
        f"https://h/api/v1/datafiles/{id}",
        f"aq-data+http://h:1/api/v1/datafiles/{id}",
    ]:
        assert engine.guess_can_open(own)
    for other in [
        "http://host:5000/data.nc",
        "https://example.org/store.zarr",
        f"http://host/api/v1/datafiles/{id}/zarr",
        f"http://host/other/api/v1/datafiles/{id}/x.nc",
        "http://host/api/v1/datafiles/",
        "file.nc",
        "/a/b.zarr",
        b"CDF\x01",
        5,
        None,
        {"a": 1},
    ]:
        assert not engine.guess_can_open(other)
    (tmp_path / "notes.unknown").write_text("not a dataset")
    with pytest.raises(ValueError, match="did not find a match"):
        xr.open_dataset(tmp_path / "notes.unknown")


# --- in a notebook -------------------------------------------------------------------------------------------------

EVIL = "<script>alert('x')</script>\"&"


def test_what_a_notebook_shows_is_escaped_and_has_units(lab):
    """Markup in any place a user writes is shown, never run; units stand beside their arrays."""
    file = lab.save(
        {EVIL.replace("/", "|"): (EVIL, np.zeros(2), {"units": "<b>µV</b>"}), "f": ("g", [1.0], {"units": "GHz"})},
        name=EVIL,
        station=EVIL,
        comment=EVIL,
        user=EVIL,
        tags=[EVIL, "fine"],
        metadata={EVIL: EVIL},
        files={EVIL.replace("/", "|"): b""},
    )
    hits = lab.search({"id": file.id})
    for html in (file._repr_html_(), hits._repr_html_(), lab.get(file.id)._repr_html_()):
        assert "<script" not in html
        assert "<b>µV" not in html
        assert "&lt;script&gt;" in html
        assert "fine" in html
    assert "&lt;b&gt;µV" in file._repr_html_()
    assert "GHz" in file._repr_html_()
    assert file.id in hits._repr_html_()
    assert "GHz" in repr(file["f"])


def test_a_notebook_completes_names(lab):
    """Tab completion knows arrays and typed fields."""
    file = lab.save({"iq": np.zeros(2)}, name="T1")
    assert file._ipython_key_completions_() == ["iq"]
    assert {"name", "station", "load", "metadata"} <= set(dir(file))
    with pytest.raises(AttributeError, match="nobody"):
        _ = file.nobody
    assert isinstance(file, aq_data.DataFile)
    assert issubclass(SelectionError, AqDataError)
