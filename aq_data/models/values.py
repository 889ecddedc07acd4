"""JSON values with what JSON lacks, tagged: floats that are not finite, complex numbers, instants, bytes, small arrays.

    {"$float": "NaN" | "Infinity" | "-Infinity"}     {"$date": "2026-01-31T08:00:00.000000Z"}
    {"$complex": [re, im]}                           {"$bytes": "base64"}
    {"$ndarray": {"dtype": "<f4", "shape": [2], "data": "base64"}}      (attributes only)
    {"$literal": {...}}                              a user's own dict that looks like one of these

Documents, filters and attributes alike use this form on the wire and in storage; Python objects exist only in clients.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from datetime import UTC, date, datetime
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np

from aq_data.errors import ValidationError

__all__ = [
    "MAX_DEPTH",
    "TAGS",
    "WIDEST",
    "check_value",
    "format_instant",
    "from_tagged",
    "is_unicode",
    "parse_instant",
    "tag_of",
    "to_tagged",
]

MAX_DEPTH = 64
"""Nesting allowed in a document; deeper is refused, so that no reader needs unbounded recursion."""

TAGS = frozenset({"$float", "$complex", "$date", "$bytes", "$ndarray", "$literal"})

WIDEST = {"f": 8, "c": 16}
"""Bytes of the longest floats that are kept: what NumPy calls longer differs from machine to machine."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def tag_of(value: Any) -> str | None:
    """The tag, when `value` is a tagged value: a dict of exactly one key that is in `TAGS`."""
    if isinstance(value, dict) and len(value) == 1:
        key = next(iter(value))
        if key in TAGS:
            return str(key)
    return None


def format_instant(instant: datetime) -> str:
    """RFC 3339 in UTC with microseconds and `Z`: sorts as text in time order. A naive datetime is local time."""
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


def parse_instant(text: str, where: str) -> datetime:
    """An ISO 8601 date or date-time as an aware UTC datetime; without an offset it is UTC, a date alone is 00:00 UTC."""
    try:
        instant = datetime.fromisoformat(text)
        if instant.tzinfo is None:
            instant = instant.replace(tzinfo=UTC)
        return instant.astimezone(UTC)
    except (ValueError, OverflowError, TypeError) as exc:
        raise ValidationError(f"{where}: {text!r} is not an ISO 8601 date, such as 2026-01-31T08:00:00Z") from exc


def to_tagged(value: Any, where: str = "metadata", *, keep_arrays: bool = False, depth: int = 0) -> Any:
    """Python and NumPy objects as tagged JSON.

    NumPy scalars become plain numbers and arrays nested lists, so that they are searchable; with `keep_arrays` (for
    attributes) arrays and the scalars that Python has no equal of keep their dtype. Tuples and sets become lists, enums
    their values, paths and UUIDs strings, integer keys strings. Raises ValidationError naming the place of anything else.
    """
    if depth > MAX_DEPTH:
        raise ValidationError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if keep_arrays:
        _refuse_changing(value, where)
    if isinstance(value, (np.ndarray, np.generic)):
        return _numpy_to_tagged(value, where, keep_arrays, depth)
    if isinstance(value, Enum):
        return to_tagged(value.value, where, keep_arrays=keep_arrays, depth=depth + 1)
    if isinstance(value, Mapping):
        return _mapping_to_tagged(value, where, keep_arrays, depth)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_tagged(item, f"{where}[{i}]", keep_arrays=keep_arrays, depth=depth + 1) for i, item in enumerate(value)]
    return _scalar_to_tagged(value, where)


def _refuse_changing(value: Any, where: str) -> None:
    """Attributes come back identical or are refused; metadata may change its Python type for the sake of search."""
    what = None
    if isinstance(value, (set, frozenset, PurePath, UUID, Enum)) or type(value) is date:
        what = f"a {type(value).__name__}"
    elif isinstance(value, datetime) and value.tzinfo is None:
        what = "a datetime without a time zone"
    elif isinstance(value, datetime) and getattr(value, "nanosecond", 0) != 0:  # pandas'
        what = f"a {type(value).__name__} with nanoseconds"
    elif isinstance(value, np.ma.MaskedArray):
        what = "a masked array"
    elif isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
        what = "a dict with keys that are not strings"
    if what is not None:
        raise ValidationError(f"{where}: {what} would not come back as it is; convert it to numbers, text or UTC")


def _scalar_to_tagged(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (str, PurePath, UUID)):
        return _text(str(value), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": _float_name(value)}
    if isinstance(value, complex):
        return {"$complex": [_scalar_to_tagged(part, where) for part in (value.real, value.imag)]}
    if isinstance(value, datetime):
        return {"$date": _instant(value, where)}
    if isinstance(value, date):
        return {"$date": format_instant(datetime(value.year, value.month, value.day, tzinfo=UTC))}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    raise ValidationError(f"{where}: a {type(value).__name__} cannot be kept as JSON; convert it to numbers or text")


def _text(value: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ValidationError(f"{where}: the text holds a lone surrogate, which UTF-8 cannot carry") from exc
    return value


def _instant(value: datetime, where: str) -> str:
    try:
        return format_instant(value)
    except (OverflowError, ValueError) as exc:
        raise ValidationError(f"{where}: {value} lies outside the years 1 to 9999 in UTC") from exc


def _float_name(value: float) -> str:
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _numpy_to_tagged(value: Any, where: str, keep: bool, depth: int) -> Any:
    dtype = value.dtype
    if dtype.itemsize > WIDEST.get(dtype.kind, dtype.itemsize):
        raise ValidationError(f"{where}: NumPy {dtype} cannot be kept; convert it to float64 or complex128")
    native = isinstance(value, (np.float64, np.complex128, np.bool_, np.str_))
    if keep and not native and dtype.kind in "biufcmMUS" and dtype.itemsize:
        little = np.asarray(value).astype(dtype.newbyteorder("<"), copy=False)
        _refuse_surrogates(little, where)
        data = base64.b64encode(little.tobytes()).decode("ascii")
        return {"$ndarray": {"dtype": little.dtype.str, "shape": list(little.shape), "data": data}}
    if depth + value.ndim > MAX_DEPTH:
        raise ValidationError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if dtype.kind == "M":
        instants = np.asarray(value)
        ticks = instants.astype("M8[us]")
        years = (np.datetime64("0001-01-01", "Y"), np.datetime64("9999-12-31", "Y"))
        inside = np.isnat(instants) | (instants.astype("M8[Y]") >= years[0]) & (instants.astype("M8[Y]") <= years[1])
        if not inside.all():
            raise ValidationError(f"{where}: an instant lies outside the years 1 to 9999")
        return _instants(ticks.tolist())
    if dtype.kind in "mV":
        raise ValidationError(f"{where}: NumPy {dtype} cannot be kept as JSON; convert it to numbers with a unit")
    return to_tagged(value.tolist(), where, keep_arrays=keep, depth=depth + 1)


def is_unicode(array: np.ndarray[Any, Any]) -> bool:
    """Whether UTF-8 can carry every text of an array of fixed-width text: NumPy takes any number for a letter."""
    points = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).reshape(-1).view("<u4")
    return not bool(((points >= 0xD800) & (points < 0xE000) | (points > 0x10FFFF)).any())


def _refuse_surrogates(array: np.ndarray[Any, Any], where: str) -> None:
    if array.dtype.kind == "U" and not is_unicode(array):
        raise ValidationError(f"{where}: the text holds a lone surrogate, which UTF-8 cannot carry")


def _instants(ticks: Any) -> Any:
    if isinstance(ticks, list):
        return [_instants(tick) for tick in ticks]
    return None if ticks is None else {"$date": format_instant(ticks.replace(tzinfo=UTC))}


def _mapping_to_tagged(value: Mapping[Any, Any], where: str, keep: bool, depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(key, Enum):
            key = key.value
        if isinstance(key, (bool, float)) or not isinstance(key, (str, int, np.integer)):
            raise ValidationError(f"{where}: the key {key!r} is not a string")
        text = _text(str(key), where)
        if text in result:
            raise ValidationError(f"{where}: the key {text!r} occurs twice, as text and as a number")
        result[text] = to_tagged(item, f"{where}.{text}", keep_arrays=keep, depth=depth + 1)
    return {"$literal": result} if tag_of(result) else result


def from_tagged(value: Any) -> Any:
    """The Python objects that `to_tagged` was given: the inverse, up to what its docstring says is converted."""
    if isinstance(value, list):
        return [from_tagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = tag_of(value)
    if tag is None:
        return {key: from_tagged(item) for key, item in value.items()}
    inner = value[tag]
    if tag == "$literal":
        return {key: from_tagged(item) for key, item in inner.items()}
    if tag == "$float":
        return _NON_FINITE[inner]
    if tag == "$complex":
        return complex(*(from_tagged(part) for part in inner))
    if tag == "$date":
        return parse_instant(inner, "$date")
    if tag == "$bytes":
        return base64.b64decode(inner)
    array = np.frombuffer(base64.b64decode(inner["data"]), dtype=inner["dtype"]).reshape(inner["shape"]).copy()
    return array[()] if not inner["shape"] else array


def check_value(value: Any, where: str, depth: int = 0) -> None:
    """Refuse tagged JSON that `from_tagged` could not read, or that is nested too deep, naming the place."""
    if depth > MAX_DEPTH:
        raise ValidationError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        for i, item in enumerate(value):
            check_value(item, f"{where}[{i}]", depth + 1)
    elif isinstance(value, dict):
        tag = tag_of(value)
        if tag is None:
            for key, item in value.items():
                check_value(item, f"{where}.{key}", depth + 1)
        else:
            _check_tagged(tag, value[tag], where, depth)


def _check_tagged(tag: str, inner: Any, where: str, depth: int) -> None:
    if tag == "$literal":
        if not isinstance(inner, dict):
            raise ValidationError(f"{where}: $literal takes an object")
        for key, item in inner.items():
            check_value(item, f"{where}.{key}", depth + 1)
    elif tag == "$float":
        if not isinstance(inner, str) or inner not in _NON_FINITE:
            raise ValidationError(f'{where}: $float takes "NaN", "Infinity" or "-Infinity"')
    elif tag == "$complex":
        if not isinstance(inner, list) or len(inner) != 2 or not all(_is_real(part) for part in inner):
            raise ValidationError(f"{where}: $complex takes [real, imaginary]")
    elif tag == "$date":
        if not isinstance(inner, str):
            raise ValidationError(f"{where}: $date takes an ISO 8601 string")
        parse_instant(inner, where)
    elif tag == "$bytes":
        _decode_base64(inner, f"{where}: $bytes")
    else:
        _check_ndarray(inner, where)


def _is_real(part: Any) -> bool:
    if tag_of(part) == "$float":
        return isinstance(part["$float"], str) and part["$float"] in _NON_FINITE
    return isinstance(part, float) or (isinstance(part, int) and not isinstance(part, bool) and abs(part) < 1 << 1023)


def _decode_base64(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as exc:
        raise ValidationError(f"{where} takes base64 text") from exc


def _check_ndarray(inner: Any, where: str) -> None:
    try:
        dtype, shape = np.dtype(str(inner["dtype"])), inner["shape"]
        data = _decode_base64(inner["data"], f"{where}: $ndarray data")
    except (KeyError, TypeError, ValueError, SyntaxError) as exc:
        raise ValidationError(f"{where}: $ndarray takes dtype, shape and base64 data") from exc
    is_shape = isinstance(shape, list) and len(shape) <= 32 and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    is_kept = dtype.kind in "biufcmMUS" and 0 < dtype.itemsize <= WIDEST.get(dtype.kind, dtype.itemsize)
    if not is_shape or not is_kept:
        raise ValidationError(f"{where}: $ndarray takes a dtype of numbers, instants or text and a list of lengths")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValidationError(f"{where}: the bytes of $ndarray do not fit its dtype and shape")
    _refuse_surrogates(np.frombuffer(data, dtype), where)
