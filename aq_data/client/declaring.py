"""What a user says of a sweep before it begins, turned into declared arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from aq_data.client.outgoing import OutgoingArray, declared_values
from aq_data.client.regions import Buffer
from aq_data.errors import ValidationError
from aq_data.models.arrays import STRING
from aq_data.models.sweep import NewSweepArray
from aq_data.models.values import to_tagged
from aq_data.wire.codec import raw_view, text_bytes

__all__ = ["declare_sweep"]

_EXAMPLES = {"dims": '{"flux": values, "delay": None}', "variables": '{"iq": ("complex128", ("flux", "delay"))}'}


def declare_sweep(
    dims: Mapping[str, Any],
    variables: Mapping[str, Any],
    chunks: Mapping[str, Sequence[int]] | None,
    codec: str | None,
) -> tuple[list[NewSweepArray], list[tuple[int, Buffer]]]:
    """The arrays of a sweep, and index and bytes of those given whole (coordinates); ValidationError names the culprit."""
    for what, given_ in (("dims", dims), ("variables", variables)):
        if not isinstance(given_, Mapping):
            raise ValidationError(f"{what} takes a dict, as in {_EXAMPLES[what]}, not a {type(given_).__name__}")
    sizes, coordinates = _dims(dims)
    arrays = [array for array, _ in coordinates]
    given = [(i, values) for i, (_, values) in enumerate(coordinates) if values is not None]
    arrays += [_variable(name, declared, sizes) for name, declared in variables.items()]
    known = {array.name for array in arrays}
    used = {dim for array in arrays for dim in array.dims}
    for dim, declared in dims.items():
        if sizes[dim] is None and dim not in known and dim in used:
            attrs = _attrs(declared[1], f"dims[{dim!r}]") if declared is not None else {}
            arrays.append(NewSweepArray(dim, "<f8", (None,), (dim,), attrs, "coordinate"))
    return _laid_out(arrays, chunks or {}, codec), given


def _dims(dims: Mapping[str, Any]) -> tuple[dict[str, int | None], list[tuple[NewSweepArray, Buffer | None]]]:
    """The length of each dim, None where it grows, and the coordinates that are given whole."""
    sizes: dict[str, int | None] = {}
    coordinates: list[tuple[NewSweepArray, Buffer | None]] = []
    for dim, declared in dims.items():
        if declared is None or (isinstance(declared, tuple) and len(declared) == 2 and declared[0] is None):
            sizes[dim] = None
        elif isinstance(declared, (int, np.integer)) and not isinstance(declared, bool):
            sizes[dim] = int(declared)
        else:
            coordinate = declared_values(dim, declared)
            if len(coordinate.values.shape) != 1:
                raise ValidationError(f"dims[{dim!r}] takes None, a length, or values along one axis")
            sizes[dim] = coordinate.values.shape[0]
            info = coordinate.info
            array = NewSweepArray(dim, info.dtype, info.shape, (dim,), info.attrs, "coordinate")
            coordinates.append((array, _bytes_of(coordinate)))
    return sizes, coordinates


def _laid_out(arrays: list[NewSweepArray], chunks: Mapping[str, Sequence[int]], codec: str | None) -> list[NewSweepArray]:
    """The arrays with the chunks and the codec that were asked for."""
    for name in chunks:
        if not any(array.name == name for array in arrays):
            raise ValidationError(f"chunks are given for {name!r}, which is not among the variables")
    options: dict[str, Any] = {"codec": codec} if codec else {}
    return [
        msgspec.structs.replace(a, **options, **({"chunks": tuple(map(int, chunks[a.name]))} if a.name in chunks else {}))
        for a in arrays
    ]


def _bytes_of(array: OutgoingArray) -> Buffer:
    values = array.values
    return text_bytes(values) if values.dtype.kind in "OT" else raw_view(np.ascontiguousarray(values))


def _variable(name: str, declared: Any, sizes: Mapping[str, int | None]) -> NewSweepArray:
    if not isinstance(declared, (tuple, list)) or not 2 <= len(declared) <= 3:
        raise ValidationError(
            f'variables[{name!r}] takes (dtype, dims) or (dtype, dims, attrs), as in ("complex128", ("x",))'
        )
    dims = (declared[1],) if isinstance(declared[1], str) else tuple(declared[1])
    for dim in dims:
        if dim not in sizes:
            raise ValidationError(f"variables[{name!r}] has the dim {dim!r}, which dims does not name: {list(sizes)}")
    try:
        dtype = np.dtype(object if declared[0] in (STRING, str, "str") else declared[0])
    except TypeError as exc:
        raise ValidationError(
            f"variables[{name!r}]: NumPy knows no dtype {declared[0]!r}", code="unsupported_dtype"
        ) from exc
    attrs = _attrs(declared[2], f"variables[{name!r}]") if len(declared) == 3 else {}
    text = STRING if dtype.kind == "O" else "|T16" if dtype.kind == "T" else dtype.newbyteorder("<").str
    role: Literal["data", "coordinate"] = "coordinate" if dims == (name,) else "data"
    return NewSweepArray(name, text, tuple(sizes[dim] for dim in dims), dims, attrs, role)


def _attrs(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValidationError(f'{where}: attributes are a dict, as in {{"units": "V"}}, not {given!r}')
    return dict(to_tagged(dict(given), f"{where} attrs", keep_arrays=True))
