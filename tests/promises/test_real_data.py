"""Recorded measurements and a packed grid go in and come back identical; their settings are found by search."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from services.deployment import WAYS, open_zarr, opened

import aq_data

# Beside the project (or above it, where the tests lie elsewhere): not part of the repository.
DATA = next((above / "shared" / "data" for above in Path(__file__).parents if (above / "shared" / "data").is_dir()), None)
QUANTUM = sorted((DATA / "quantum").rglob("dataset*.hdf5")) if DATA else []
SNAPSHOTS = sorted((DATA / "quantum").glob("*/snapshot.json")) if DATA else []

pytestmark = pytest.mark.skipif(
    DATA is None, reason="the recorded data is not here: no folder shared/data beside the project"
)


@pytest.fixture(scope="module", params=WAYS)
def lab(request, tmp_path_factory) -> Iterator[aq_data.Client]:
    """One archive for all."""
    data = tmp_path_factory.mktemp("archive")
    with opened(data, request.param) as client:
        yield client


def recorded(path: Path, **options: Any) -> xr.Dataset:
    """The dataset of a file, whatever kind of NetCDF its ending hides."""
    reasons = []
    for engine in ("h5netcdf", "netcdf4", "scipy"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the readers, about their own future
                return xr.load_dataset(path, engine=engine, **options)
        except Exception as exc:
            reasons.append(f"{engine}: {exc}")
    raise AssertionError(f"{path} cannot be opened: {reasons}")


def assert_same(got: xr.Dataset, sent: xr.Dataset) -> None:
    xr.testing.assert_identical(got, sent)
    dtypes = {name: variable.dtype.newbyteorder("<") for name, variable in sent.variables.items()}
    assert {name: variable.dtype for name, variable in got.variables.items()} == dtypes


def test_all_that_was_recorded_is_here():
    """Guards the other tests against an empty folder: 39 datasets, 9 snapshots, one grid."""
    assert (len(QUANTUM), len(SNAPSHOTS)) == (39, 9)
    assert (DATA / "grid" / "eraint_uvz.nc").is_file()


@pytest.mark.parametrize("path", QUANTUM, ids=lambda path: f"{path.parent.name[:26]} {path.stem}")
def test_a_recorded_measurement_comes_back_identical(lab, path):
    """Values, dtypes, coordinates, units, long names; through our client, lazily, and for a reader without aq-data."""
    dataset = recorded(path)
    assert dataset.variables
    where = str(path.relative_to(DATA))
    file = lab.save(dataset, name=path.parent.name, identifiers={"file": where}, files=[path])
    assert_same(file.load(), dataset)
    assert_same(lab.get(file.id).open().load(), dataset)
    assert file.read_file(path.name) == path.read_bytes()
    assert [hit.id for hit in lab.search({"identifiers.file": where, "files.name": path.name})] == [file.id]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr, about what version 3 of its specification does not name yet
        plain = open_zarr(file.path, chunks=None, decode_cf=False)
        for name, variable in dataset.variables.items():
            xr.testing.assert_identical(plain[name].variable.load(), variable)


@pytest.mark.parametrize("options", [{}, {"mask_and_scale": False}, {"decode_cf": False}], ids=["decoded", "packed", "raw"])
def test_the_packed_grid_comes_back_identical(lab, options):
    """int16 with scale, offset and fill value, as floats and as it lies in the file; slices equal those of the file."""
    dataset = recorded(DATA / "grid" / "eraint_uvz.nc", **options)
    file = lab.save(dataset, name="eraint_uvz")
    assert_same(file.load(), dataset)
    part = {dim: slice(0, size, max(1, size // 3)) for dim, size in dataset.sizes.items()}
    xr.testing.assert_identical(file.open().isel(part).load(), dataset.isel(part))
    if "mask_and_scale" in options:
        assert {variable.dtype.kind for variable in file.load().data_vars.values()} == {"i"}
        assert "scale_factor" in file.load()["u"].attrs


def settings_of(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every scalar below a snapshot and where it stands."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from settings_of(value, (*path, key))
    elif isinstance(tree, (bool, int, float, str)):
        yield path, tree


def dotted(path: tuple[str, ...]) -> str:
    return ".".join(part.replace("\\", "\\\\").replace(".", "\\.") for part in path)


def test_settings_inside_snapshots_are_found(lab):
    """Any nested setting of any instrument finds exactly the measurements that had it, by value and by range."""
    snapshots = [json.loads(path.read_text()) for path in SNAPSHOTS]
    ids = [
        lab.save(name=path.parent.name, metadata={"snapshot": tree}).id
        for path, tree in zip(SNAPSHOTS, snapshots, strict=True)
    ]
    for id, tree in zip(ids, snapshots, strict=True):
        assert lab.get(id).metadata == {"snapshot": tree}
    leaves = [dict(settings_of(tree, ("snapshot",))) for tree in snapshots]
    asked = 0
    for known in leaves:
        nested = sorted((path for path in known if len(path) > 4), key=lambda path: (-len(path), path))
        for path in nested[:: max(1, len(nested) // 8)]:
            value = known[path]
            if isinstance(value, float) and value != value:
                continue
            same = {id for id, other in zip(ids, leaves, strict=True) if equal(other.get(path), value)}
            assert {hit.id for hit in lab.search({dotted(path): value})} == same, (path, value)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                above = {id for id, other in zip(ids, leaves, strict=True) if is_number(n := other.get(path)) and n >= value}
                assert {hit.id for hit in lab.search({dotted(path): {"$gte": value}})} == above, (path, value)
            asked += 1
    assert asked > 40


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def equal(left: Any, right: Any) -> bool:
    return (
        left == right
        and isinstance(left, bool) == isinstance(right, bool)
        and isinstance(left, str) == isinstance(right, str)
    )
