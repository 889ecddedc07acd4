"""`export`: a DataFile as a file of its own, which other programs read."""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aq_data.errors import ValidationError
from aq_server.commands.client import _check_folder, _connect, _in_one_line

__all__ = ["run_export"]

_FORMATS = {".nc": "NetCDF", ".zarr": "Zarr"}


def run_export(options: argparse.Namespace) -> int:
    """Nothing stands at the path before it is whole."""
    target = Path(options.output)
    if target.suffix not in _FORMATS:
        raise ValidationError(f"{target.name}: write to a path that ends in .nc or .zarr")
    if target.exists():
        raise ValidationError(f"{target} exists; remove it or choose another name")
    _check_folder(target)
    with _connect(options) as client:
        dataset = client.get(options.id).load()
    _refuse_attributes(dataset, target)
    # Made for this alone: whatever else lies beside the target stays what it is.
    partial = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        (_write_zarr if target.suffix == ".zarr" else _write_netcdf)(dataset, partial)
        partial.rename(target)
    except (TypeError, ValueError, OverflowError, RuntimeError) as exc:
        raise ValidationError(f"{target.name} cannot be {_FORMATS[target.suffix]}: {_in_one_line(exc)}") from exc
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
    print(target)
    return 0


def _write_zarr(dataset: Any, path: Path) -> None:
    with warnings.catch_warnings():
        # Consolidated metadata is a convention beside the Zarr v3 text; readers are much faster with it.
        warnings.simplefilter("ignore", UserWarning)
        dataset.to_zarr(path, mode="w")


def _write_netcdf(dataset: Any, path: Path) -> None:
    import netCDF4  # noqa: F401  (missing, it is named in the message of `main`)

    complex_values = any(v.dtype.kind == "c" for v in dataset.variables.values())
    dataset.to_netcdf(path, engine="netcdf4", auto_complex=complex_values)


def _refuse_attributes(dataset: Any, target: Path) -> None:
    """The libraries meet them half-way through, and do not say which one it is."""
    keeps = _zarr_keeps if target.suffix == ".zarr" else _netcdf_keeps
    for place, name, value in _attributes(dataset):
        if not keeps(value):
            way = "export to .zarr" if _zarr_keeps(value) else "take it from Python, with `client.get(id).load()`"
            raise ValidationError(
                f"{_FORMATS[target.suffix]} has no form for the attribute {name!r} of {place}, "
                f"{_in_one_line(repr(value))[:80]}; {way}"
            )


def _attributes(dataset: Any) -> Iterator[tuple[str, str, Any]]:
    holders: Mapping[str, Any] = {"the dataset": dataset, **{f"{name!r}": dataset[name] for name in dataset.variables}}
    for place, holder in holders.items():
        for name, value in holder.attrs.items():
            yield place, str(name), value


def _netcdf_keeps(value: Any) -> bool:
    """Text, numbers of netCDF's types, and rows of them."""
    if isinstance(value, bytes):
        return True
    try:
        values = np.asarray(value)
    except ValueError:  # a ragged list
        return False
    is_number = values.dtype.kind in "iuf" and values.dtype.str[1:] not in ("f2", "f16")
    return values.ndim <= 1 and (is_number or values.dtype.kind == "U")


def _zarr_keeps(value: Any) -> bool:
    """What is JSON, and what xarray makes it of."""
    try:
        json.dumps(value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value)
    except TypeError:
        return False
    return True
