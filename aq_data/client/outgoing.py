"""What a user hands to `save`, turned into declared arrays and the parts that carry their values."""

from __future__ import annotations

import mimetypes
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from aq_data.client.http import Body
from aq_data.client.progress import progress
from aq_data.errors import ValidationError
from aq_data.models.arrays import NewArray, check_arrays
from aq_data.models.datafile import TYPED_FIELDS, check_file_name, check_id, make_id
from aq_data.models.values import format_instant, to_tagged
from aq_data.wire.codec import JSON, RAW, MultipartBody, Part, dtype_name, little_endian, text_bytes

__all__ = [
    "OutgoingArray",
    "OutgoingFile",
    "OutgoingSave",
    "declared_values",
    "outgoing_arrays",
    "outgoing_files",
    "outgoing_save",
    "tagged_fields",
]


@dataclass(frozen=True, slots=True)
class OutgoingArray:
    """A declared array with its values: little-endian, in whatever memory order they have."""

    info: NewArray
    values: np.ndarray[Any, Any]

    def part(self, index: int) -> Part:
        if self.values.dtype.kind in "OT":
            encoded = text_bytes(self.values)
            return Part(f"array:{index}", RAW, len(encoded), encoded)
        return Part(f"array:{index}", RAW, self.values.nbytes, self.values)


@dataclass(frozen=True, slots=True)
class OutgoingFile:
    """A file to attach: on disk, or bytes in memory."""

    name: str
    source: Path | bytes

    @property
    def content_type(self) -> str:
        return mimetypes.guess_type(self.name)[0] or RAW

    def part(self, index: int) -> Part:
        """Opens a file on disk; the caller closes `part.source`."""
        if isinstance(self.source, bytes):
            return Part(f"file:{index}", self.content_type, len(self.source), self.source, self.name)
        file = self.source.open("rb")
        return Part(f"file:{index}", self.content_type, self.size, file, self.name)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def pieces(self) -> Iterator[bytes]:
        """The content in pieces."""
        part = self.part(0)
        try:
            for piece in part.pieces():
                yield bytes(piece)
        finally:
            if not isinstance(part.source, (bytes, np.ndarray)):
                part.source.close()


def outgoing_arrays(
    dataset: Any, chunks: Mapping[str, Sequence[int]] | None, codec: str | None
) -> tuple[list[OutgoingArray], dict[str, Any]]:
    """The arrays and the dataset's attributes as tagged JSON, refused by name if they cannot be kept.

    `dataset` is an `xarray.Dataset` or `DataArray`, a dict of arrays or of `(dims, array[, attrs])`, or None.
    """
    entries: list[_Entry] = []
    attrs: dict[str, Any] = {}
    if dataset is None:
        pass
    elif hasattr(dataset, "data_vars") or hasattr(dataset, "to_dataset"):
        entries, attrs = _from_xarray(dataset)
    elif isinstance(dataset, Mapping):
        entries = [_from_mapping(name, value) for name, value in dataset.items()]
    else:
        raise ValidationError(f"save takes an xarray.Dataset, a dict of arrays or None, not a {type(dataset).__name__}")
    arrays = [_declare(entry, chunks or {}, codec) for entry in entries]
    check_arrays(tuple(array.info for array in arrays))
    for name in chunks or {}:
        if not any(array.info.name == name for array in arrays):
            raise ValidationError(f"chunks are given for {name!r}, which is not among the arrays")
    return arrays, attrs


@dataclass(frozen=True, slots=True)
class _Entry:
    name: Any
    dims: tuple[str, ...] | None
    values: Any
    attrs: Mapping[Any, Any]
    role: str = "data"


def _from_xarray(dataset: Any) -> tuple[list[_Entry], dict[str, Any]]:
    if not hasattr(dataset, "data_vars"):  # a DataArray
        dataset = dataset.to_dataset(name=dataset.name or "data")
    for name, index in dataset.xindexes.items():
        if type(index).__name__ == "PandasMultiIndex":
            raise ValidationError(
                f"coordinate {name!r} is a MultiIndex, which cannot be kept; call reset_index({name!r}) first"
            )
    entries = [
        _Entry(name, tuple(variable.dims), variable, variable.attrs, "coordinate" if name in dataset.coords else "data")
        for name, variable in dataset.variables.items()
    ]
    return entries, to_tagged(dict(dataset.attrs), "dataset attrs", keep_arrays=True)


def declared_values(name: str, declared: Any) -> OutgoingArray:
    """The coordinate of a dim: values, `(values, attrs)`, or something of xarray's with attributes of its own."""
    if isinstance(declared, tuple) and len(declared) == 2 and isinstance(declared[1], Mapping):
        values, attrs = declared
    else:
        values, attrs = declared, getattr(declared, "attrs", {})
    return _declare(_Entry(name, None, values, attrs, "coordinate"), {}, None)


def _from_mapping(name: Any, value: Any) -> _Entry:
    if isinstance(value, tuple):
        if not 2 <= len(value) <= 3 or isinstance(value[0], (int, float)):
            raise ValidationError(f"array {name!r}: a tuple means (dims, values) or (dims, values, attrs); use np.array")
        dims = (value[0],) if isinstance(value[0], str) else tuple(value[0])
        return _Entry(name, dims, value[1], value[2] if len(value) == 3 else {})
    if hasattr(value, "dims") and hasattr(value, "attrs"):  # a DataArray or Variable
        return _Entry(name, tuple(value.dims), value, value.attrs)
    return _Entry(name, None, value, {})


def _declare(entry: _Entry, chunks: Mapping[str, Sequence[int]], codec: str | None) -> OutgoingArray:
    if not isinstance(entry.name, str):
        raise ValidationError(f"array name {entry.name!r} is not a string", code="bad_name")
    for dim in entry.dims or ():
        if not isinstance(dim, str):
            raise ValidationError(f"array {entry.name!r}: the dimension name {dim!r} is not a string")
    values = _values(entry)
    info = NewArray(
        name=entry.name,
        dtype=dtype_name(values.dtype),
        shape=values.shape,
        dims=entry.dims,
        attrs=to_tagged(dict(entry.attrs), f"array {entry.name!r} attrs", keep_arrays=True),
        role="coordinate" if entry.role == "coordinate" else "data",
        chunks=_chunks(entry.name, chunks[entry.name]) if entry.name in chunks else None,
        codec=codec or "zstd",  # type: ignore[arg-type]
    )
    return OutgoingArray(info, values)


def _chunks(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in shape)
    except (TypeError, ValueError, OverflowError) as exc:
        raise ValidationError(f"array {name!r}: chunks takes a length for each axis, not {shape!r}") from exc


def _values(entry: _Entry) -> np.ndarray[Any, Any]:
    if getattr(getattr(entry.values, "dtype", None), "tz", None) is not None:
        raise _unsupported(entry.name, "instants with a time zone, which NumPy has no dtype for; convert them to UTC first")
    source = getattr(entry.values, "values", entry.values)
    if isinstance(source, np.ma.MaskedArray):
        raise _unsupported(entry.name, "a masked array; fill it first, with NaN where the mask is")
    try:
        values = np.asarray(source)
    except ValueError as exc:
        raise _unsupported(entry.name, "a ragged or mixed list") from exc
    if values.dtype.kind in "OT":
        for item in values.flat:
            if not isinstance(item, str):
                what = "a ragged or mixed list" if isinstance(item, (list, tuple)) else f"such as a {type(item).__name__}"
                raise _unsupported(entry.name, f"objects that are not strings, {what}")
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as exc:
                raise _unsupported(entry.name, "text with a lone surrogate, which UTF-8 cannot carry") from exc
        return values if values.dtype.kind == "O" else values.astype(np.dtypes.StringDType())
    return little_endian(values)


def _unsupported(name: Any, what: str) -> ValidationError:
    return ValidationError(f"array {name!r} cannot be kept: it is {what}", code="unsupported_dtype")


def outgoing_files(files: Mapping[str, Any] | Sequence[Any] | None) -> list[OutgoingFile]:
    """Paths, or a dict of name to path or bytes. ValidationError before anything is sent when one cannot be read."""
    if files is None:
        return []
    pairs = files.items() if isinstance(files, Mapping) else [(Path(path).name, path) for path in files]
    outgoing = []
    for name, source in pairs:
        check_file_name(name)
        if isinstance(source, (bytes, bytearray, memoryview)):
            outgoing.append(OutgoingFile(name, bytes(source)))
            continue
        path = Path(source)
        if not path.is_file():
            raise ValidationError(f"there is no file {str(path)!r} to attach")
        outgoing.append(OutgoingFile(name, path))
    return outgoing


@dataclass(frozen=True, slots=True)
class OutgoingSave:
    """One DataFile to save: its document as JSON, and what goes with it."""

    id: str
    document: bytes
    arrays: list[OutgoingArray]
    files: list[OutgoingFile]

    @property
    def is_document(self) -> bool:
        """Whether there is nothing but the document."""
        return not self.arrays and not self.files

    def body(self) -> Body:
        """JSON, or a form; files on disk are opened anew for each try."""
        if self.is_document:
            return Body(lambda: iter((self.document,)), len(self.document), JSON)
        # One boundary for all tries; a part that is an open file is opened again for each.
        first = MultipartBody(self._parts())
        first.close()

        def pieces() -> Iterator[bytes]:
            body = first.again(self._parts())
            try:
                with progress(body.length, "saving") as advance:
                    for piece in body:
                        yield piece
                        advance(len(piece))
            finally:
                body.close()

        return Body(pieces, first.length, first.content_type)

    def _parts(self) -> list[Part]:
        return [
            Part("document", JSON, len(self.document), self.document),
            *(array.part(index) for index, array in enumerate(self.arrays)),
            *(file.part(index) for index, file in enumerate(self.files)),
        ]


def outgoing_save(
    dataset: Any = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | Sequence[Any] | None = None,
    id: str | None = None,
    chunks: Mapping[str, Sequence[int]] | None = None,
    codec: str | None = None,
    store: str | None = None,
    **fields: Any,
) -> OutgoingSave:
    """What `Client.save` was given, with an id made here; ValidationError naming what cannot be kept."""
    for name in fields:
        if name not in TYPED_FIELDS:
            raise ValidationError(f"there is no field {name!r}; free settings go into metadata={{{name!r}: …}}")
    arrays, attrs = outgoing_arrays(dataset, chunks, codec)
    attached = outgoing_files(files)
    document = tagged_fields(fields)
    document |= {
        "id": check_id(id) if id is not None else make_id(time.time_ns() // 1_000_000, os.urandom(10)),
        "metadata": to_tagged(dict(metadata or {})),
        "arrays": [array.info for array in arrays],
        "attrs": {**attrs, **document.get("attrs", {})},
    }
    if store is not None:
        document["store"] = store
    return OutgoingSave(document["id"], msgspec.json.encode(document), arrays, attached)


_DATES = ("measured_at", "cooldown")


def tagged_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a document as tagged JSON. Typed dates travel as plain ISO text; a datetime without a zone is local time."""
    return {
        name: to_tagged(
            format_instant(value) if name in _DATES and hasattr(value, "astimezone") else value,
            name,
        )
        for name, value in fields.items()
    }
