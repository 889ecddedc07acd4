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


def declare_sweep(
    dims: Mapping[str, Any],
    variables: Mapping[str, Any],
    chunks: Mapping[str, Sequence[int]] | None,
    codec: str | None,
) -> tuple[list[NewSweepArray], list[tuple[int, Buffer]]]:
    """The arrays of a sweep, and index and bytes of those given whole (coordinates); ValidationError names the culprit."""
    sizes: dict[str, int | None] = {}
    arrays: list[NewSweepArray] = []
    given: list[tuple[int, Buffer]] = []
    for dim, declared in dims.items():
        if declared is None:
            sizes[dim] = None
        elif isinstance(declared, (int, np.integer)) and not isinstance(declared, bool):
            sizes[dim] = int(declared)
        else:
            coordinate = declared_values(dim, declared)
            if len(coordinate.values.shape) != 1:
                raise ValidationError(f"dims[{dim!r}] takes None, a length, or values along one axis")
            sizes[dim] = coordinate.values.shape[0]
            given.append((len(arrays), _bytes_of(coordinate)))
            info = coordinate.info
            arrays.append(NewSweepArray(dim, info.dtype, info.shape, (dim,), info.attrs, "coordinate"))
    for name, declared in variables.items():
        arrays.append(_variable(name, declared, sizes))
    known = {array.name for array in arrays}
    for dim, size in sizes.items():
        if size is None and dim not in known and any(dim in array.dims for array in arrays):
            arrays.append(NewSweepArray(dim, "<f8", (None,), (dim,), role="coordinate"))
    options: dict[str, Any] = {"codec": codec} if codec else {}
    for name in chunks or {}:
        if not any(array.name == name for array in arrays):
            raise ValidationError(f"chunks are given for {name!r}, which is not among the variables")
    arrays = [
        msgspec.structs.replace(
            a, **options, **({"chunks": tuple(map(int, chunks[a.name]))} if chunks and a.name in chunks else {})
        )
        for a in arrays
    ]
    return arrays, given


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
    attrs = to_tagged(dict(declared[2]), f"variables[{name!r}] attrs", keep_arrays=True) if len(declared) == 3 else {}
    text = STRING if dtype.kind == "O" else "|T16" if dtype.kind == "T" else dtype.newbyteorder("<").str
    role: Literal["data", "coordinate"] = "coordinate" if dims == (name,) else "data"
    return NewSweepArray(name, text, tuple(sizes[dim] for dim in dims), dims, attrs, role)
