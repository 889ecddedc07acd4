"""What an array is: a name, a dtype, a shape, named dims and attributes; and which of each can be kept."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
import numpy as np

from aq_data.errors import ValidationError
from aq_data.models.structs import resolve
from aq_data.models.values import WIDEST, check_value

__all__ = [
    "STRING",
    "ArrayInfo",
    "NewArray",
    "check_arrays",
    "check_name",
    "dims_of",
    "fill_of",
    "is_text",
    "parse_dtype",
    "stored_dtype",
]

STRING = "string"
"""The dtype name of variable-length text given as NumPy objects; `np.dtypes.StringDType()` goes by its own `|T16`."""

MAX_NAME_BYTES = 200
MAX_AXES = 32
MAX_ELEMENTS = 1 << 48

Role = Literal["data", "coordinate"]


class NewArray(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array as a client declares it.

    `dtype` is NumPy's `dtype.str` (little-endian, `<f8`, `<M8[us]`, `<U4`, `|b1`) or "string". `dims` name the axes; left
    out they are `<name>_0`, `<name>_1`… `chunks` overrides the chunk shape, `codec` is "zstd" (blosc zstd 3, default),
    "lz4" (blosc lz4 5) or "none"; every chunk carries a CRC-32C whatever the codec.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    dims: tuple[str, ...] | None = None
    attrs: dict[str, Any] = {}
    role: Role = "data"
    chunks: tuple[int, ...] | None = None
    codec: Literal["zstd", "lz4", "none"] = "zstd"

    @property
    def nbytes(self) -> int:
        """Bytes of the values as declared; 0 for variable-length text and for dtypes that are refused anyway."""
        try:
            return math.prod(self.shape) * np.dtype(self.dtype).itemsize if self.dtype not in (STRING, "|T16") else 0
        except (TypeError, ValueError, SyntaxError):
            return 0


class ArrayInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An array as it is stored: `NewArray` with everything decided. `nbytes` counts the values uncompressed.

    `is_partial`: some elements were not measured (yet); they read as `fill_of` the dtype, and the written map tells which.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    chunks: tuple[int, ...]
    nbytes: int
    attrs: dict[str, Any] = {}
    role: Role = "data"
    codec: Literal["zstd", "lz4", "none"] = "zstd"
    is_partial: bool = False


def check_name(name: str) -> None:
    """Refuse an array name that cannot be one path segment of a Zarr group (the rules of the storage layout)."""
    reason = None
    if name in ("", ".", "..", "zarr.json"):
        reason = "it is reserved"
    elif any(ch in "/\\" or ord(ch) < 32 or 127 <= ord(ch) < 160 or 0xD800 <= ord(ch) < 0xE000 for ch in name):
        reason = "it holds a slash, a backslash, a control character or a lone surrogate"
    elif name.startswith("__"):
        reason = "names beginning with two underscores are reserved"
    elif len(name.encode("utf-8")) > MAX_NAME_BYTES:
        reason = f"it is longer than {MAX_NAME_BYTES} bytes in UTF-8"
    if reason:
        raise ValidationError(f"array name {name[:80]!r} cannot be used: {reason}; choose another", code="bad_name")


def parse_dtype(text: str, name: str) -> np.dtype[Any]:
    """The NumPy dtype that a declared dtype stands for; `object` for "string".

    Raises ValidationError (`unsupported_dtype`) for objects, structured types, long doubles and big-endian names.
    """
    if text == STRING:
        return np.dtype(object)
    try:
        dtype = np.dtypes.StringDType() if text == "|T16" else np.dtype(text)
    except (TypeError, ValueError, SyntaxError) as exc:
        raise _unsupported(name, text, "NumPy knows no such dtype") from exc
    if dtype.kind == "T" or (dtype.str == text and dtype.kind in "biufcmMUS" and _is_kept(dtype)):
        return dtype
    if dtype.kind in "biufcmMUS" and _is_kept(dtype):
        raise _unsupported(name, text, f"write it as {dtype.newbyteorder('<').str!r}, its little-endian dtype.str")
    raise _unsupported(name, text, "objects, structured types and long doubles cannot be kept; convert the array first")


def _is_kept(dtype: np.dtype[Any]) -> bool:
    if dtype.byteorder == ">" or dtype.itemsize == 0:
        return False
    return dtype.itemsize <= WIDEST.get(dtype.kind, 1 << 24)


def _unsupported(name: str, dtype: str, reason: str) -> ValidationError:
    return ValidationError(f"array {name[:80]!r}: dtype {dtype[:80]!r} is not supported: {reason}", code="unsupported_dtype")


def stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A buffer-friendly dtype with the same bytes: instants as int64, UCS-4 text as uint32, byte strings as uint8.

    A fixed-width text item becomes several stored items.
    """
    stored: dict[str, np.dtype[Any]] = {
        "M": np.dtype("<i8"),
        "m": np.dtype("<i8"),
        "U": np.dtype("<u4"),
        "S": np.dtype("u1"),
        "b": np.dtype("u1"),
    }
    return stored.get(dtype.kind, dtype)


def fill_of(dtype: np.dtype[Any]) -> Any:
    """What stands where nothing was measured: NaN, NaT, 0, False or empty text."""
    if dtype.kind in "fc":
        return dtype.type(complex("nan+nanj") if dtype.kind == "c" else float("nan"))
    if dtype.kind in "mM":
        return dtype.type("NaT")
    return "" if dtype.kind in "UOT" else b"" if dtype.kind == "S" else dtype.type(0)


def is_text(dtype: np.dtype[Any]) -> bool:
    """Whether values are variable-length text, which has no raw fixed-width form."""
    return dtype.kind in "OT"


def check_arrays(arrays: tuple[NewArray, ...]) -> None:
    """Refuse declarations that could not be stored or opened again, naming the array: before anything is stored."""
    names: set[str] = set()
    sizes: dict[str, tuple[int, str]] = {}
    for array in arrays:
        check_name(array.name)
        if array.name in names:
            raise ValidationError(f"two arrays are named {array.name!r}", code="bad_name")
        names.add(array.name)
        dtype = parse_dtype(array.dtype, array.name)
        _check_shape(array, dtype)
        check_value(array.attrs, f"array {array.name!r} attrs")
        for dim, size in zip(dims_of(array), array.shape, strict=True):
            other = sizes.setdefault(dim, (size, array.name))
            if other[0] != size:
                raise ValidationError(
                    f"dimension {dim!r} has size {other[0]} in array {other[1]!r} and {size} in array {array.name!r}"
                )

    for array in arrays:
        if not array.shape and array.name in sizes:
            raise ValidationError(
                f"array {array.name!r} is a single value named as a dimension of {sizes[array.name][1]!r}; rename one"
            )


def dims_of(array: NewArray) -> tuple[str, ...]:
    """Its dims, or those it gets where none are named."""
    return array.dims if array.dims is not None else tuple(f"{array.name}_{i}" for i in range(len(array.shape)))


def _check_shape(array: NewArray, dtype: np.dtype[Any]) -> None:
    where = f"array {array.name!r}"
    # An axis of length 0 counts as 1: chunk arithmetic must be able to hold the others all the same.
    elements = math.prod(max(1, n) for n in array.shape)
    if len(array.shape) > MAX_AXES or any(n < 0 for n in array.shape) or elements > MAX_ELEMENTS:
        raise ValidationError(f"{where}: shape {array.shape} must have at most {MAX_AXES} axes of 0 or more elements")
    if array.dims is not None and len(array.dims) != len(array.shape):
        raise ValidationError(f"{where}: {len(array.dims)} dims were named for {len(array.shape)} axes")
    for dim in array.dims or ():
        if not dim or len(dim.encode("utf-8", "replace")) > MAX_NAME_BYTES:
            raise ValidationError(f"{where}: the dimension name {dim[:80]!r} is empty or over {MAX_NAME_BYTES} bytes")
        if any(0xD800 <= ord(ch) < 0xE000 for ch in dim):
            raise ValidationError(f"{where}: the dimension name {dim[:80]!r} holds a lone surrogate")
    if array.chunks is not None:
        if len(array.chunks) != len(array.shape) or any(n < 1 for n in array.chunks):
            raise ValidationError(f"{where}: chunks {array.chunks} must name 1 or more elements for each axis")
        pieces = math.prod(-(-max(1, n) // c) for n, c in zip(array.shape, array.chunks, strict=True))
        if pieces > MAX_SMALL_CHUNKS and math.prod(array.chunks) * (dtype.itemsize or 1) < LEAST_CHUNK_BYTES:
            raise ValidationError(
                f"{where}: chunks of {array.chunks} make {pieces} files below {LEAST_CHUNK_BYTES} bytes; make them larger"
            )
        if math.prod(array.chunks) * (dtype.itemsize or 1) > MAX_CHUNK_BYTES:
            raise ValidationError(f"{where}: chunks of {array.chunks} are over {MAX_CHUNK_BYTES >> 20} MiB each")


LEAST_CHUNK_BYTES = 4096
MAX_SMALL_CHUNKS = 1000
"""So many chunks below `LEAST_CHUNK_BYTES` an array may have: each is a file."""
MAX_CHUNK_BYTES = 256 << 20
"""The largest chunk a client may ask for; a slice read holds whole chunks in memory."""


resolve(NewArray, ArrayInfo)
