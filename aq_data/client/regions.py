"""What a call of a sweep names, as pieces of a block: checked here, so that the call that erred is the one that raises."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aq_data.errors import ValidationError
from aq_data.models.arrays import parse_dtype
from aq_data.models.sweep import NewSweepArray, Piece
from aq_data.wire.codec import raw_view, text_bytes

__all__ = ["Variables"]

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class _Variable:
    name: str
    dims: tuple[str, ...]
    sizes: tuple[int | None, ...]
    dtype: np.dtype[Any]
    dtype_name: str


class Variables:
    """The variables of one sweep."""

    def __init__(self, arrays: Iterable[NewSweepArray]) -> None:
        self._variables = {a.name: _Variable(a.name, a.dims, a.shape, parse_dtype(a.dtype, a.name), a.dtype) for a in arrays}
        self.growing = {d for v in self._variables.values() for d, n in zip(v.dims, v.sizes, strict=True) if n is None}

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
                encoded, size = raw_view(np.ascontiguousarray(array)), None
            append = dim if along is not None else None
            pieces.append(Piece(variable.name, shape, variable.dtype_name, start, append, size))
            buffers.append(encoded)
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
            start = operator.index(place.start or 0)
            stop = None if place.stop is None else operator.index(place.stop)
        except TypeError as exc:
            raise ValidationError(f"at[{dim!r}] takes indices, never coordinate values: {place}") from exc
        if start < 0 or (stop is not None and stop < start):
            raise ValidationError(f"at[{dim!r}] = {place}: it takes 0 <= start <= stop")
        return slice(start, stop)
    if isinstance(place, (bool, np.bool_)):
        raise ValidationError(f"at[{dim!r}] takes an index or a slice, not {place!r}")
    try:
        return operator.index(place)
    except TypeError as exc:
        raise ValidationError(f"at[{dim!r}] takes an index or a slice, never a coordinate value: {place!r}") from exc


def _fit(
    variable: _Variable, array: np.ndarray[Any, Any], places: Mapping[str, int | slice], dim: str | None
) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """Start and shape of the region, and its steps along the dim that is appended to."""
    lengths = list(array.shape)
    kept = [d for d in variable.dims if not isinstance(places.get(d), int)]
    if dim in kept and len(lengths) == len(kept) - 1:
        lengths.insert(kept.index(dim), 1)  # one step of it
    if len(lengths) != len(kept):
        raise ValidationError(
            f"{variable.name!r} has the dims {variable.dims}: a value with {len(kept)} axes is needed here, "
            f"not one of shape {array.shape}"
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


def _converted(variable: _Variable, value: Any) -> np.ndarray[Any, Any]:
    """The value as an array of exactly the variable's dtype; ValidationError where that would lose something."""
    dtype = variable.dtype
    kinds = _KINDS.get(type(value))
    if kinds is not None:
        if dtype.kind not in kinds:
            raise _wrong(variable, type(value).__name__)
        try:
            return np.array(value, dtype)
        except OverflowError as exc:
            raise _wrong(variable, f"the number {value}") from exc
    source = getattr(value, "values", value)
    if isinstance(source, np.ma.MaskedArray):
        raise _wrong(variable, "a masked array: fill it first")
    try:
        array = np.asarray(source)
    except ValueError as exc:
        raise _wrong(variable, "a ragged list") from exc
    if array.dtype == dtype and array.dtype.kind not in "OT":
        return array if array.dtype.byteorder != ">" else array.astype(dtype)
    if dtype.kind in "OT":
        if not all(isinstance(item, str) for item in array.astype(object, copy=False).reshape(-1)):
            raise _wrong(variable, f"{array.dtype} values that are not text")
        return array.astype(dtype)
    if np.can_cast(array.dtype, dtype, "safe") and array.dtype.kind != "O":
        return array.astype(dtype)
    return _from_python(variable, value, array)


def _from_python(variable: _Variable, value: Any, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Lists of Python numbers have no dtype of their own: they become the variable's when every value survives it."""
    dtype = variable.dtype
    if array.dtype.kind == "O" and dtype.kind in "mM":
        try:
            return np.asarray(value, dtype)
        except (TypeError, ValueError) as exc:
            raise _wrong(variable, f"a {type(value).__name__}") from exc
    if isinstance(value, (list, tuple)) and np.can_cast(array.dtype, dtype, "same_kind"):
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        if array.dtype.kind not in "iu" or (cast == array).all():
            return cast
    raise _wrong(variable, f"{array.dtype} values")


def _wrong(variable: _Variable, what: str) -> ValidationError:
    return ValidationError(
        f"{variable.name!r} holds {variable.dtype_name}, which cannot keep {what} exactly; convert it, or declare otherwise",
        code="unsupported_dtype",
    )
