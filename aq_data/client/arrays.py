"""One array of a DataFile, read by slices."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import httpx
import numpy as np

from aq_data.client.http import Http, decoded
from aq_data.client.progress import progress
from aq_data.errors import ConflictError, StorageError, UnavailableError
from aq_data.models.arrays import parse_dtype
from aq_data.models.selection import Axis, Selection, format_selection, parse_selection, select
from aq_data.models.values import from_tagged
from aq_data.wire.codec import JSON, RAW, raw_view
from aq_data.wire.routes import array_path, preview_path, written_path

__all__ = ["Preview", "RemoteArray", "read_selection"]

URL_CHARACTERS = 4000
"""A selection as text beyond this is read in several requests: servers and proxies limit the length of an address."""
DENSE = 0.25
"""Share of a span that must be picked for the span to be fetched whole."""
TRIES = 3
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
    """The selected values of one array, of `selection.shape`: one request, or several for very long lists of positions.

    With `head` as of that block of an open sweep; ConflictError when it is gone.
    """
    text = format_selection(selection, explicit=True)
    if len(text) > URL_CHARACTERS:
        return _in_parts(http, id, name, dtype, selection, head)
    if 0 in selection.shape:
        return np.empty(selection.shape, dtype)
    params = ({"sel": text} if text else {}) | ({"head": str(head)} if head is not None else {})
    if dtype.kind in "OT":
        return _read_text(http, array_path(id, name), params, dtype, selection.shape)
    try:
        return _read_raw(http, array_path(id, name), params, np.empty(selection.shape, dtype))
    except UnavailableError as exc:
        if not exc.details.get("broke") or math.prod(selection.shape) * dtype.itemsize <= STREAMED_FROM:
            raise
        return _in_halves(http, id, name, dtype, selection, head)


def _in_halves(
    http: Http, id: str, name: str, dtype: np.dtype[Any], selection: Selection, head: int | None
) -> np.ndarray[Any, Any]:
    """For answers that broke off: an error in the middle of a stream has no words, a small request is told what is wrong."""
    cut = next(i for i, axis in enumerate(selection.axes) if axis.count > 1)
    axis, half = selection.axes[cut], selection.axes[cut].count // 2
    position = sum(not other.drop for other in selection.axes[:cut])
    parts = [
        Selection((*selection.axes[:cut], part, *selection.axes[cut + 1 :]))
        for part in (axis.part(0, half), axis.part(half, axis.count))
    ]
    return np.concatenate([read_selection(http, id, name, dtype, part, head) for part in parts], axis=position)


def _in_parts(
    http: Http, id: str, name: str, dtype: np.dtype[Any], selection: Selection, head: int | None
) -> np.ndarray[Any, Any]:
    """Along the axis with the longest list: its span fetched whole where that is dense, else the list in halves."""
    longest = max(range(len(selection.axes)), key=lambda i: len(selection.axes[i].picks or ()))
    axis = selection.axes[longest]
    picks = axis.positions()
    low, span = int(picks.min()), int(picks.max() - picks.min()) + 1
    position = sum(not other.drop for other in selection.axes[:longest])

    def with_axis(other: Axis) -> Selection:
        return Selection((*selection.axes[:longest], other, *selection.axes[longest + 1 :]))

    if len(picks) >= DENSE * span:
        values = read_selection(http, id, name, dtype, with_axis(Axis(axis.size, low, 1, span)), head)
        return np.take(values, picks - low, axis=position)
    half = len(picks) // 2
    parts = (axis.part(0, half), axis.part(half, len(picks)))
    return np.concatenate([read_selection(http, id, name, dtype, with_axis(part), head) for part in parts], axis=position)


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
