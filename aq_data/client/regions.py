"""What a call of a sweep names, as pieces of a block: checked here, so that the call that erred is the one that raises."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np

from aq_data.errors import ValidationError
from aq_data.models.arrays import parse_dtype
from aq_data.models.sweep import NewSweepArray, Piece, check_chunks
from aq_data.wire.codec import raw_view, text_bytes

__all__ = ["Variables"]

Buffer = bytes | memoryview

SMALL_BYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class _Variable:
    name: str
    dims: tuple[str, ...]
    sizes: tuple[int | None, ...]
    dtype: np.dtype[Any]
    dtype_name: str


class Variables:
    """The variables of one sweep."""

    def __init__(self, arrays: Sequence[NewSweepArray]) -> None:
        self._variables = {a.name: _Variable(a.name, a.dims, a.shape, parse_dtype(a.dtype, a.name), a.dtype) for a in arrays}
        self._chunks: dict[str, tuple[int, ...]] = {a.name: a.chunks for a in arrays if a.chunks is not None}
        self._extents: dict[str, int] = {}
        self.growing = {d for v in self._variables.values() for d, n in zip(v.dims, v.sizes, strict=True) if n is None}

    def learn_chunks(self, chunks: Mapping[str, tuple[int, ...]]) -> None:
        """How the server cuts the variables: with it a place that would need too many chunks is refused here."""
        self._chunks.update(chunks)

    def _check_growth(self, pieces: tuple[Piece, ...]) -> None:
        extents = dict(self._extents)
        for piece in pieces:
            if 0 not in piece.shape:
                for dim, first, length in zip(self.dims(piece.name), piece.start or (), piece.shape, strict=True):
                    if dim in self.growing:
                        extents[dim] = max(extents.get(dim, 0), first + length)
        if extents == self._extents:
            return
        for name, chunks in self._chunks.items():
            variable = self._variables[name]
            shape = tuple(extents.get(d, 0) if n is None else n for d, n in zip(variable.dims, variable.sizes, strict=True))
            check_chunks(name, shape, chunks)
        self._extents = extents

    def dims(self, name: str) -> tuple[str, ...]:
        """The dims of a variable."""
        return self._variables[name].dims

    def itemsize(self, name: str) -> int | None:
        """Bytes of one value; None for text of variable length."""
        dtype = self._variables[name].dtype
        return None if dtype.kind in "OT" else dtype.itemsize

    def pieces(
        self, values: Mapping[str, Any], at: Mapping[str, Any] | None, dim: str | None
    ) -> tuple[tuple[Piece, ...], list[Buffer]]:
        """The pieces that place `values`, and their bytes; along `dim` the server decides where.

        ValidationError names the variable and what does not fit.
        """
        if not values:
            raise ValidationError("name at least one variable: sweep.write(iq=values)")
        if at is not None and not isinstance(at, Mapping):
            raise ValidationError(f'at takes a dict of dim to index or slice, as in at={{"flux": 3}}, not {at!r}')
        places = {d: _place(d, p) for d, p in at.items()} if at else {}
        variables = [self._named(name) for name in values]
        for named in places:
            if not any(named in v.dims for v in variables):
                raise ValidationError(f"at names {named!r}, which is a dim of none of {', '.join(map(repr, values))}")
        if dim is not None:
            self._check_growing(dim, variables, places)
        pieces: list[Piece] = []
        buffers: list[Buffer] = []
        steps: int | None = None
        for variable, value in zip(variables, values.values(), strict=True):
            array = _converted(variable, value)
            start, shape, along = _fit(variable, array, places, dim)
            if along is not None:
                if steps not in (None, along):
                    raise ValidationError(f"{variable.name!r} has {along} steps of {dim!r}, an earlier variable {steps}")
                steps = along
            encoded: Buffer
            if variable.dtype.kind in "OT":
                encoded = text_bytes(array)
                size: int | None = len(encoded)
            else:
                # A copy of a few bytes costs less than a view of them.
                encoded = array.tobytes() if array.nbytes < SMALL_BYTES else raw_view(np.ascontiguousarray(array))
                size = None
            append = dim if along is not None else None
            pieces.append(Piece(variable.name, shape, variable.dtype_name, start, append, size))
            buffers.append(encoded)
        if at and self._chunks:
            self._check_growth(tuple(pieces))
        return tuple(pieces), buffers

    def _named(self, name: str) -> _Variable:
        try:
            return self._variables[name]
        except KeyError:
            known = ", ".join(map(repr, self._variables))
            raise ValidationError(f"the sweep has no variable {name!r}; it has {known}") from None

    def _check_growing(self, dim: str, variables: list[_Variable], places: Mapping[str, Any]) -> None:
        if dim not in self.growing:
            known = ", ".join(map(repr, sorted(self.growing))) or "none"
            raise ValidationError(
                f"{dim!r} is no dim that grows (those are {known}); write at a place with sweep.write(at=…)"
            )
        if dim in places:
            raise ValidationError(f"the server decides the place along {dim!r}; leave it out of at, or use sweep.write")
        if not any(dim in v.dims for v in variables):
            raise ValidationError(f"none of {', '.join(repr(v.name) for v in variables)} has the dim {dim!r}")


def _place(dim: str, place: Any) -> int | slice:
    """A non-negative start, or start and stop; -1 is left to those that know the length."""
    if isinstance(place, slice):
        if place.step not in (None, 1):
            raise ValidationError(f"at[{dim!r}] takes a step of 1, not {place.step}")
        try:
            start = 0 if place.start is None else _index_of(place.start)
            stop = None if place.stop is None else _index_of(place.stop)
        except TypeError as exc:
            raise ValidationError(f"at[{dim!r}] takes indices, never coordinate values: {place}") from exc
        if start < 0 or (stop is not None and stop < start):
            raise ValidationError(f"at[{dim!r}] = {place}: it takes 0 <= start <= stop")
        return slice(start, stop)
    try:
        return _index_of(place)
    except TypeError as exc:
        raise ValidationError(f"at[{dim!r}] takes one index or one slice, never a coordinate value: {place!r}") from exc


def _index_of(number: Any) -> int:
    if isinstance(number, (bool, np.bool_)):
        raise TypeError("a truth value is no position")
    return operator.index(number)


def _fit(
    variable: _Variable, array: np.ndarray[Any, Any], places: Mapping[str, int | slice], dim: str | None
) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """Start and shape of the region, and its steps along the dim that is appended to."""
    lengths = list(array.shape)
    kept = [d for d in variable.dims if not isinstance(places.get(d), int)]
    if dim in kept and len(lengths) == len(kept) - 1:
        lengths.insert(kept.index(dim), 1)  # one step of it
    if len(lengths) != len(kept):
        way_out = f'; name the place of those it lacks, as in at={{"{variable.dims[0]}": 3}}' if variable.dims else ""
        raise ValidationError(
            f"{variable.name!r} has the dims {variable.dims}: a value with {len(kept)} axes is needed, not one of shape "
            f"{array.shape}{way_out}"
        )
    start: list[int] = []
    shape: list[int] = []
    along = None
    rest = iter(lengths)
    for d, size in zip(variable.dims, variable.sizes, strict=True):
        place = places.get(d, 0 if d not in places else None)
        if d in places and isinstance(place, int):
            first, length = _index(variable, d, place, size), 1
        else:
            first, length = 0, next(rest)
            if isinstance(place, slice):
                first = place.start
                if place.stop is not None and place.stop - place.start != length:
                    raise ValidationError(
                        f"{variable.name!r}: at[{d!r}] spans {place.stop - place.start} places for {length} values"
                    )
        if d == dim:
            along = length
        if size is not None and first + length > size:
            raise ValidationError(f"{variable.name!r}: [{first}, {first + length}) lies outside dim {d!r} of length {size}")
        start.append(first)
        shape.append(length)
    return tuple(start), tuple(shape), along


def _index(variable: _Variable, dim: str, place: int, size: int | None) -> int:
    if place < 0 and size is not None:
        place += size
    if place < 0 or (size is not None and place >= size):
        limit = "a dim that grows takes 0 and more" if size is None else f"the length is {size}"
        raise ValidationError(f"{variable.name!r}: at[{dim!r}] is out of range; {limit}")
    return place


_KINDS: dict[type, str] = {bool: "b", int: "iufc", float: "fc", complex: "c"}
_PYTHON = (list, tuple, bool, int, float, complex, str, bytes)
_AS_WIDE_AS_PYTHON = (np.dtype("f8"), np.dtype("c16"), np.dtype("?"))
_GROUPS = {"b": "bool", "i": "number", "u": "number", "f": "number", "c": "number", "M": "instant", "m": "duration"}


def _converted(variable: _Variable, value: Any) -> np.ndarray[Any, Any]:
    """The value as an array of exactly the variable's dtype; ValidationError where that would change what it says."""
    dtype = variable.dtype
    kinds = _KINDS.get(type(value))
    if kinds is not None and dtype.kind in kinds:
        return _scalar(variable, value)
    source = getattr(value, "values", value)
    if isinstance(source, np.ma.MaskedArray):
        raise _wrong(variable, "a masked array: fill it first")
    try:
        array = np.asarray(source)
    except ValueError as exc:
        raise _wrong(variable, "a ragged list") from exc
    if dtype.kind in "OT":
        return _text(variable, array)
    is_list = array.dtype.kind in "mM" and type(value) in (list, tuple)
    if is_list and {getattr(item, "dtype", None) for item in value} != {array.dtype}:
        # Of several units NumPy takes the finest, and says nothing when a value does not fit it.
        return np.stack([_converted(variable, item) for item in value])
    if array.dtype == dtype:
        return array
    if array.dtype.newbyteorder("<") == dtype:
        return array.astype(dtype)
    if array.dtype.kind == "O" and dtype.kind in "mM":
        return _times(variable, array)
    return _cast(variable, array, is_python=type(value) in _PYTHON)


def _scalar(variable: _Variable, value: Any) -> np.ndarray[Any, Any]:
    """A Python number. A float is rounded to what the dtype has: Python knows no shorter ones; an int is kept or refused."""
    dtype = variable.dtype
    if dtype in _AS_WIDE_AS_PYTHON and type(value) is not int:
        return np.array(value, dtype)
    try:
        with np.errstate(over="ignore"):
            array = np.array(value, dtype)
    except OverflowError as exc:
        raise _wrong(variable, f"the number {value}") from exc
    is_changed = array.item() != value if type(value) is int else np.isfinite(value) and not np.isfinite(array)
    if is_changed:
        raise _wrong(variable, f"the number {value}")
    return array


def _text(variable: _Variable, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    for item in array.astype(object, copy=False).reshape(-1):
        if not isinstance(item, str):
            raise _wrong(variable, f"a {type(item).__name__}")
        try:
            item.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise _wrong(variable, "text with a lone surrogate") from exc
    return array.astype(variable.dtype)


def _times(variable: _Variable, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Python's and pandas' instants and durations, each from the unit it has: NumPy would cut it to that of the dtype."""
    items = [_time(variable, item) for item in array.reshape(-1)]
    times = np.empty(len(items), variable.dtype)
    for unit in {item.dtype for item in items}:
        at = [i for i, item in enumerate(items) if item.dtype == unit]
        times[at] = _cast(variable, np.array([items[i] for i in at], unit), is_python=False)
    return times.reshape(array.shape)


def _time(variable: _Variable, item: Any) -> Any:
    """One of them as a scalar of NumPy."""
    if isinstance(item, (np.datetime64, np.timedelta64)):
        return item
    if item is None or (isinstance(item, datetime) and item != item):  # (pandas' NaT, which is among durations, too)
        return np.array("NaT", variable.dtype)[()]
    if isinstance(item, (datetime, timedelta)) and hasattr(item, "to_numpy"):  # pandas' have nanoseconds
        return item.to_numpy()
    if isinstance(item, timedelta):
        ticks = item // timedelta(microseconds=1)
        if abs(ticks) >= 1 << 63:  # 292,000 years, which NumPy wraps around
            raise _wrong(variable, f"the timedelta {item}")
        return np.timedelta64(ticks, "us")
    if isinstance(item, datetime) and item.tzinfo is not None:
        try:
            return np.datetime64(item.astimezone(UTC).replace(tzinfo=None))
        except OverflowError as exc:
            raise _wrong(variable, f"the datetime {item}, outside the years 1 to 9999 in UTC") from exc
    if isinstance(item, date):
        return np.datetime64(item)
    raise _wrong(variable, f"a {type(item).__name__}")


def _cast(variable: _Variable, array: np.ndarray[Any, Any], *, is_python: bool) -> np.ndarray[Any, Any]:
    """Another dtype of the same nature, when every value survives. `is_python`: the values had no dtype of their own."""
    dtype, what = variable.dtype, f"{array.dtype} values"
    before, after = (_GROUPS.get(d.kind, d.kind) for d in (array.dtype, dtype))
    if not array.size and is_python:
        return np.empty(array.shape, dtype)
    is_narrower = not np.can_cast(array.dtype, dtype, "safe")
    if before != after or (array.dtype.kind in "fc" and (dtype.kind not in "fc" or (is_narrower and not is_python))):
        raise _wrong(variable, what)
    if array.dtype.kind == "c" and dtype.kind == "f":
        raise _wrong(variable, what)
    with np.errstate(all="ignore"):
        try:
            cast = array.astype(dtype)
        except OverflowError as exc:  # days as attoseconds
            raise _wrong(variable, what) from exc
        if array.dtype.kind in "fc":
            is_kept = bool((np.isfinite(cast) | ~np.isfinite(array)).all())
        else:
            back = cast.real.astype(array.dtype) if dtype.kind == "c" else cast.astype(array.dtype)
            is_kept = bool(((back == array) | ((array != array) & (cast != cast))).all())  # (NaT)
            if array.dtype.kind in "iu":
                # Near the ends of 64 bits the way back wraps around.
                is_kept = is_kept and (_fits(array, dtype) if dtype.kind in "fc" else not ((cast < 0) != (array < 0)).any())
    if not is_kept:
        raise _wrong(variable, what)
    return cast


def _fits(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> bool:
    """Whether whole numbers are all below the first that a float of `dtype` cannot tell from its neighbour."""
    mantissa = int(np.finfo(dtype).nmant) + 1
    return not array.size or (int(array.max()) <= 1 << mantissa and int(array.min()) >= -(1 << mantissa))


def _wrong(variable: _Variable, what: str) -> ValidationError:
    return ValidationError(
        f"{variable.name!r} holds {variable.dtype_name}, which cannot keep {what} exactly; convert it, or declare otherwise",
        code="unsupported_dtype",
    )
