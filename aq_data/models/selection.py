"""The one dialect of slicing: NumPy positions outside, normalised indices inside.

A selection has one entry per axis, applied to each axis in turn (orthogonal): an integer drops its axis, a slice keeps
it, a list of integers keeps it in the order given. As text the entries are separated by commas, as in
`0:10,::2,-1,[3,1,4],...`; stop is exclusive, negative positions count from the end, missing trailing axes are whole.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from aq_data.errors import SelectionError

__all__ = ["Axis", "Selection", "format_selection", "parse_selection", "select", "whole"]

MAX_TEXT = 1 << 20
"""Characters a selection may have; a longer one is refused before it is parsed."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One normalised entry: the positions read from one axis of `size`.

    Either an arithmetic progression (`start`, `step`, `count`; step may be negative, never 0) or, when `picks` is set,
    a list of positions. Every position lies in [0, size). `drop` marks an integer: count is 1 and the axis vanishes.
    """

    size: int
    start: int
    step: int
    count: int
    drop: bool = False
    picks: tuple[int, ...] | None = None

    def positions(self) -> np.ndarray[Any, np.dtype[np.intp]]:
        """All positions in output order, as an intp array of length `count`."""
        if self.picks is not None:
            return np.array(self.picks, dtype=np.intp)
        return self.start + self.step * np.arange(self.count, dtype=np.intp)

    def part(self, first: int, last: int) -> Axis:
        """The entries with output index in [first, last), as an axis of their own."""
        if self.picks is not None:
            return Axis(self.size, 0, 1, last - first, False, self.picks[first:last])
        return Axis(self.size, self.start + first * self.step, self.step, last - first, self.drop)


@dataclass(frozen=True, slots=True)
class Selection:
    """One `Axis` per axis of the array, in order; `array_shape` is what it was normalised against."""

    axes: tuple[Axis, ...]

    @property
    def array_shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result: dropped axes are gone."""
        return tuple(axis.count for axis in self.axes if not axis.drop)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape before dropping: integer axes count as 1."""
        return tuple(axis.count for axis in self.axes)

    @property
    def is_whole(self) -> bool:
        """Whether this is every element in stored order with no axis dropped."""
        return all(not a.drop and a.picks is None and a.start == 0 and a.step == 1 and a.count == a.size for a in self.axes)


def whole(shape: tuple[int, ...]) -> Selection:
    """Everything."""
    return Selection(tuple(Axis(n, 0, 1, n) for n in shape))


def select(key: Any, shape: tuple[int, ...], name: str = "array") -> Selection:
    """Normalise a Python key (`a[key]`) against `shape`.

    Takes integers, slices, `...`, lists or 1-d arrays of integers, and boolean masks as long as their axis, alone or in
    a tuple. Raises SelectionError, whose message holds the real shape, for anything else: N-d masks, new axes, too many
    axes, positions out of range, a step of 0.
    """
    entries = list(key) if isinstance(key, tuple) else [key]
    dots = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    if len(dots) > 1:
        raise _error(name, shape, "`...` may stand only once")
    given = len(entries) - len(dots)
    if given > len(shape):
        raise _error(name, shape, f"{given} axes were selected, but the array has {len(shape)}")
    fill = [slice(None)] * (len(shape) - given)
    at = dots[0] if dots else len(entries)
    entries[at : at + 1] = fill
    return Selection(tuple(_axis(entry, n, i, name, shape) for i, (entry, n) in enumerate(zip(entries, shape, strict=True))))


def _error(name: str, shape: tuple[int, ...], reason: str) -> SelectionError:
    return SelectionError(f"cannot select from {name!r} of shape {shape}: {reason}", shape=list(shape))


def _axis(entry: Any, size: int, axis: int, name: str, shape: tuple[int, ...]) -> Axis:
    if isinstance(entry, (bool, np.bool_)):
        raise _error(name, shape, f"axis {axis} takes no single boolean; use a mask as long as the axis")
    if isinstance(entry, (int, np.integer)):
        return Axis(size, _position(int(entry), size, axis, name, shape), 1, 1, drop=True)
    if isinstance(entry, slice):
        return _slice_axis(entry, size, axis, name, shape)
    if isinstance(entry, (list, np.ndarray, range, tuple)):
        try:
            return _list_axis(np.asarray(entry), size, axis, name, shape)
        except ValueError as exc:
            if isinstance(exc, SelectionError):
                raise
            raise _error(name, shape, f"the list of axis {axis} is ragged") from exc
    if entry is None:
        raise _error(name, shape, "new axes cannot be selected")
    raise _error(name, shape, f"axis {axis} takes an integer, a slice or a list of integers, not {entry!r}")


def _position(index: int, size: int, axis: int, name: str, shape: tuple[int, ...]) -> int:
    if not -size <= index < size:
        raise _error(name, shape, f"index {index} is out of range for axis {axis} of length {size}")
    return index + size if index < 0 else index


def _slice_axis(entry: slice, size: int, axis: int, name: str, shape: tuple[int, ...]) -> Axis:
    try:
        if entry.step is not None and operator.index(entry.step) == 0:
            raise _error(name, shape, f"the step of axis {axis} is 0; it must be 1 or more, or negative to go backwards")
        start, stop, step = entry.indices(size)
    except TypeError as exc:
        raise _error(name, shape, f"the slice of axis {axis} has parts that are not integers") from exc
    count = len(range(start, stop, step))
    # Steps that are never taken are 1: those of an empty or single slice may be larger than any array.
    return Axis(size, start if count else 0, step if count > 1 else 1, count)


def _list_axis(entry: np.ndarray[Any, Any], size: int, axis: int, name: str, shape: tuple[int, ...]) -> Axis:
    if entry.ndim == 0:
        return _axis(entry.item(), size, axis, name, shape)
    if entry.ndim != 1:
        raise _error(name, shape, f"axis {axis} takes a list of one dimension, not {entry.ndim}")
    if entry.dtype.kind == "b":
        if len(entry) != size:
            raise _error(name, shape, f"the mask of axis {axis} has {len(entry)} entries for a length of {size}")
        entry = np.flatnonzero(entry)
    if entry.size == 0:
        return Axis(size, 0, 1, 0, picks=())
    if entry.dtype.kind not in "iu":
        raise _error(name, shape, f"the list of axis {axis} holds {entry.dtype} values; it takes integers")
    if int(entry.min()) < -size or int(entry.max()) >= size:
        bad = int(entry.min()) if int(entry.min()) < -size else int(entry.max())
        raise _error(name, shape, f"index {bad} is out of range for axis {axis} of length {size}")
    picks = tuple(int(i) + size if i < 0 else int(i) for i in entry)
    return Axis(size, 0, 1, len(picks), picks=picks)


_INT = r"\s*[+-]?\d{1,18}\s*"
_ENTRY = re.compile(
    rf"(?P<dots>\s*\.\.\.\s*)|\s*\[(?P<list>\s*|{_INT}(?:,{_INT})*)\]\s*"
    rf"|(?P<slice>(?:{_INT}|\s*):(?:{_INT}|\s*)(?::(?:{_INT}|\s*))?)|(?P<int>{_INT})",
    re.ASCII,
)


def _entries(text: str, shape: tuple[int, ...], name: str) -> Iterator[Any]:
    at = 0
    while True:
        match = _ENTRY.match(text, at)
        if match is None or (match.end() < len(text) and text[match.end()] != ","):
            found = text[at : at + 20]
            raise _error(name, shape, f"expected an integer, a:b:c, [i,j] or ... at {found!r}")
        if match["dots"] is not None:
            yield Ellipsis
        elif match["list"] is not None:
            yield [int(part) for part in match["list"].split(",") if part.strip()]
        elif match["slice"] is not None:
            yield slice(*(int(part) if part.strip() else None for part in match["slice"].split(":")))
        else:
            yield int(match["int"])
        if match.end() == len(text):
            return
        at = match.end() + 1


def parse_selection(text: str, shape: tuple[int, ...], name: str = "array") -> Selection:
    """Normalise the text form against `shape`; blank text is everything. Raises as `select` does."""
    if len(text) > MAX_TEXT:
        raise _error(name, shape, f"the text has {len(text)} characters; the limit is {MAX_TEXT}")
    if not text.strip():
        return whole(shape)
    return select(tuple(_entries(text, shape, name)), shape, name)


def format_selection(selection: Selection, *, explicit: bool = False) -> str:
    """Text that `parse_selection` reads back to an equal result; empty for everything.

    With `explicit` everything has its bounds too: the array may have grown since.
    """
    return "" if selection.is_whole and not explicit else ",".join(_format_axis(axis) for axis in selection.axes)


def _format_axis(axis: Axis) -> str:
    if axis.picks is not None:
        return "[" + ",".join(map(str, axis.picks)) + "]"
    if axis.drop:
        return str(axis.start)
    if axis.count == 0:
        return "0:0"
    stop = min(axis.start + axis.count * axis.step, axis.size)
    # Going backwards past the first element, a negative stop would mean "from the end": leave it out instead.
    return f"{axis.start}:{stop if stop >= 0 else ''}:{axis.step}"
