"""One array of a DataFile, read by slices."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import httpx
import numpy as np

from aq_data.client.http import Http, decoded
from aq_data.client.progress import progress
from aq_data.errors import ConflictError, StorageError, TooLargeError, UnavailableError
from aq_data.models.arrays import parse_dtype
from aq_data.models.selection import Axis, Selection, format_selection, parse_selection, select
from aq_data.models.values import from_tagged
from aq_data.wire.codec import JSON, RAW, raw_view
from aq_data.wire.routes import array_path, datafile_path, preview_path, written_path

__all__ = ["MOMENTS", "Preview", "RemoteArray", "read_selection"]

URL_CHARACTERS = 4000
"""A selection as text beyond this is read in several requests: servers and proxies limit the length of an address."""
DENSE = 0.25
"""Share of a span that must be picked for the span to be fetched whole."""
TRIES = 3
MOMENTS = 8
"""Of an open sweep, how many are tried for a read that takes several requests: each fold takes one away."""
TEXTS = 1 << 17
"""Texts that are asked for at once; the server has a limit of its own for their bytes."""
STREAMED_FROM = 1 << 20
"""Bytes up to which the server reads everything before it answers, so that damage is told as an error."""


class Preview(NamedTuple):
    """A reduced selection: `values` as float64, of minmax `(bins, 2)`. Along each axis `starts` has the first position of
    every bin, and `steps` the elements in it.
    """

    values: np.ndarray[Any, Any]
    starts: tuple[np.ndarray[Any, Any], ...]
    steps: tuple[int, ...]


class RemoteArray:
    """A stored array. `array[...]` reads just what it names; every axis is indexed in turn, as the selection language does.

    Slices of any step and sign, integers, `...`, integer lists and boolean masks along an axis; positions, never
    coordinate values (for those see `DataFile.open`).
    """

    def __init__(self, http: Http, id: str, info: dict[str, Any]) -> None:
        self._http, self._id = http, id
        self.name: str = info["name"]
        self.shape: tuple[int, ...] = tuple(info["shape"])
        self.dims: tuple[str, ...] = tuple(info["dims"])
        self.chunks: tuple[int, ...] = tuple(info["chunks"])
        self.nbytes: int = info["nbytes"]
        self.dtype: np.dtype[Any] = parse_dtype(info["dtype"], self.name)
        self.role: str = info.get("role", "data")
        self.is_partial: bool = info.get("is_partial", False)
        """Whether some elements were not measured (yet)."""
        self._attrs: dict[str, Any] = info.get("attrs", {})

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes (units, long_name…) as they were given; a copy."""
        return dict(from_tagged(self._attrs))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, key: Any) -> Any:
        """The values, owned by the caller; a NumPy scalar when every axis is dropped. SelectionError names the shape."""
        return self._read(select(key, self.shape, self.name))

    def select(self, text: str) -> Any:
        """The same for the text form: `array.select("0:10,::2,-1")`."""
        return self._read(parse_selection(text, self.shape, self.name))

    def written(self, text: str = "") -> np.ndarray[Any, Any]:
        """Which of the elements that `select(text)` gives were measured, as booleans of its shape.

        All of them in an array that was saved, or measured whole; elements that were not read as NaN, NaT, 0 or "".
        """
        selection = parse_selection(text, self.shape, self.name)
        if 0 in selection.shape or not self.is_partial:
            return np.ones(selection.shape, bool)
        values = np.empty(selection.shape, bool)
        return _read_raw(
            self._http, written_path(self._id, self.name), {"sel": format_selection(selection, explicit=True)}, values
        )

    def preview(self, text: str = "", *, pixels: int = 1000, how: str = "", part: str = "abs") -> Preview:
        """What a plot of `select(text)` needs, reduced by the server: one or two axes, at most `pixels` bins along each.

        `how`: "minmax" (one axis; the default there), "mean" (the default for two), "min" or "max". `part` of complex
        values: "abs", "angle", "real" or "imag". NaN and what was not measured count as nothing.
        """
        query = {"sel": text, "pixels": str(pixels), "how": how, "part": part}
        response = self._http.request("GET", preview_path(self._id, self.name), params=query)
        shape = tuple(int(n) for n in response.headers["Array-Shape"].split(","))
        steps = tuple(int(n) for n in response.headers["Preview-Step"].split(","))
        values = np.frombuffer(response.content, "<f8").reshape(shape)
        return Preview(values, tuple(np.arange(n) * step for n, step in zip(shape, steps, strict=False)), steps)

    def _read(self, selection: Selection) -> Any:
        values = read_selection(self._http, self._id, self.name, self.dtype, selection)
        return values[()] if values.ndim == 0 else values

    def __setitem__(self, key: Any, value: Any) -> None:
        raise ConflictError(
            f"array {self.name!r} is finished and never changes; save a new DataFile with derived_from=[{self._id!r}]",
            code="finished",
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("the values are on a server: an array of them is always a copy")
        return np.asarray(self[...], dtype=dtype)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a scalar array has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        dims = ", ".join(f"{dim}: {n}" for dim, n in zip(self.dims, self.shape, strict=True))
        units = f" [{self._attrs['units']}]" if "units" in self._attrs else ""
        return f"<{self.name} ({dims}) {'text' if self.dtype.kind in 'OT' else self.dtype}{units}>"


def read_selection(
    http: Http, id: str, name: str, dtype: np.dtype[Any], selection: Selection, head: int | None = None
) -> np.ndarray[Any, Any]:
    """The selected values of one array, of `selection.shape`: one request, or several for very long lists of positions and
    for much text, all of one moment.

    With `head` as of that block of an open sweep; ConflictError when it is gone.
    """
    for _ in range(MOMENTS):
        try:
            return _Reading(http, id, name, dtype, head).values(selection)
        except ConflictError:
            if head is not None:
                raise
            continue  # folded between two requests: that moment is gone
    raise UnavailableError(
        f"array {name!r} of DataFile {id} grows faster than so much of it can be read; read less at once, or try again"
    )


class _Reading:
    """One read of one array. What takes several requests is read as of `head`, which the first split asks for."""

    def __init__(self, http: Http, id: str, name: str, dtype: np.dtype[Any], head: int | None) -> None:
        self._http, self._id, self._name, self._dtype, self._head = http, id, name, dtype, head
        self._is_settled = head is not None

    def values(self, selection: Selection) -> np.ndarray[Any, Any]:
        text = format_selection(selection, explicit=True)
        if len(text) > URL_CHARACTERS:
            return self._in_parts(selection)
        if 0 in selection.shape:
            return np.empty(selection.shape, self._dtype)
        params = ({"sel": text} if text else {}) | ({"head": str(self._head)} if self._head is not None else {})
        path, count = array_path(self._id, self._name), math.prod(selection.shape)
        if self._dtype.kind in "OT":
            if count > TEXTS:
                return self._in_halves(selection)
            try:
                return _read_text(self._http, path, params, self._dtype, selection.shape)
            except TooLargeError:
                if count == 1:
                    raise
                return self._in_halves(selection)
        try:
            return _read_raw(self._http, path, params, np.empty(selection.shape, self._dtype))
        except UnavailableError as exc:
            if not exc.details.get("broke") or count * self._dtype.itemsize <= STREAMED_FROM:
                raise
            # An error in the middle of a stream has no words, a small request is told what is wrong.
            return self._in_halves(selection)

    def _settle(self) -> None:
        """Before the first of several requests: a sweep that is open must not grow between them."""
        if not self._is_settled:
            document = self._http.json("GET", datafile_path(self._id))
            self._head = document["sweep"].get("head", 0) if document.get("state") == "open" else None
            self._is_settled = True

    def _in_halves(self, selection: Selection) -> np.ndarray[Any, Any]:
        return self._joined(selection, next(i for i, axis in enumerate(selection.axes) if axis.count > 1))

    def _in_parts(self, selection: Selection) -> np.ndarray[Any, Any]:
        """Along the axis with the longest list: its span fetched whole where that is dense, else the list in halves."""
        longest = max(range(len(selection.axes)), key=lambda i: len(selection.axes[i].picks or ()))
        axis = selection.axes[longest]
        picks = axis.positions()
        low, span = int(picks.min()), int(picks.max() - picks.min()) + 1
        if len(picks) < DENSE * span:
            return self._joined(selection, longest)
        values = self.values(_with_axis(selection, longest, Axis(axis.size, low, 1, span)))
        return np.take(values, picks - low, axis=_position(selection, longest))

    def _joined(self, selection: Selection, cut: int) -> np.ndarray[Any, Any]:
        """Two reads, each of a half along the axis `cut`."""
        self._settle()
        axis, half = selection.axes[cut], selection.axes[cut].count // 2
        halves = [_with_axis(selection, cut, part) for part in (axis.part(0, half), axis.part(half, axis.count))]
        return np.concatenate([self.values(part) for part in halves], axis=_position(selection, cut))


def _with_axis(selection: Selection, at: int, axis: Axis) -> Selection:
    return Selection((*selection.axes[:at], axis, *selection.axes[at + 1 :]))


def _position(selection: Selection, at: int) -> int:
    """Which axis of the result an axis that is kept is."""
    return sum(not other.drop for other in selection.axes[:at])


def _read_raw(http: Http, path: str, params: dict[str, str], values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Fill `values` with the raw answer."""
    buffer = raw_view(values)
    for attempt in range(TRIES):
        try:
            with (
                http.stream("GET", path, params=params, headers={"Accept": RAW}) as response,
                progress(len(buffer), f"reading {path.rsplit('/', 1)[-1]}") as advance,
            ):
                at = 0
                for piece in response.iter_raw():
                    if at + len(piece) > len(buffer):
                        raise StorageError(f"{path} came longer than announced")
                    buffer[at : at + len(piece)] = piece
                    at += len(piece)
                    advance(len(piece))
            if at == len(buffer):
                return values
        except (httpx.HTTPError, UnavailableError) as exc:
            broke = not isinstance(exc, UnavailableError) or bool(exc.details.get("broke"))
            if attempt + 1 == TRIES or not broke:
                raise UnavailableError(f"the connection broke while {path} was read: {exc}", broke=broke) from exc
    raise UnavailableError(f"{path} came shorter than announced, {TRIES} times")


def _read_text(
    http: Http, path: str, params: dict[str, str], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    response = http.request("GET", path, params=params, headers={"Accept": JSON})
    listed = decoded(response)
    values = np.empty(shape, dtype=object)
    values[...] = np.array(listed, dtype=object).reshape(shape)
    return values.astype(dtype)
