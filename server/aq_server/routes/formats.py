"""Values as .npy, JSON, CSV and Arrow."""

from __future__ import annotations

import csv
import io
from typing import Any

import msgspec
import numpy as np

from aq_data.errors import NotAcceptableError
from aq_data.models.values import to_tagged

__all__ = ["arrow_stream", "as_csv", "as_json", "npy_header"]


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The head of a .npy file (NumPy's format, version 2.0); raw C-order values follow it."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_2_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def as_json(values: np.ndarray[Any, Any]) -> bytes:
    """Nested lists in C order, a bare value for a scalar; what JSON lacks is tagged, instants are ISO text, NaT null."""
    if values.dtype.kind in "Mm":
        ticks = np.datetime_as_string(values) if values.dtype.kind == "M" else values.view("i8")
        listed = np.where(np.isnat(values), np.array(None), ticks).tolist()
    elif values.dtype.kind in "biuUOT" or (values.dtype.kind == "f" and bool(np.isfinite(values).all())):
        listed = values.tolist()
    else:
        listed = to_tagged(values, "values")
    return msgspec.json.encode(listed)


def as_csv(values: np.ndarray[Any, Any]) -> bytes:
    """One line per position of the leading axes, the last axis across; no header. Floats round-trip, complex as `(1+2j)`."""
    rows = values.reshape(-1, 1) if values.ndim < 2 else values.reshape(-1, values.shape[-1]) if values.size else values
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    if values.size:
        if rows.dtype.kind == "S":
            rows = np.char.decode(rows, "latin-1")
        writer.writerows((rows.astype(str) if rows.dtype.kind in "Mm" else rows).tolist())
    return text.getvalue().encode()


def arrow_stream(values: np.ndarray[Any, Any], name: str, dims: tuple[str, ...]) -> bytes:
    """An Arrow IPC stream of one column: the values in C order; shape, dims and dtype stand in the schema's metadata.

    Complex numbers are fixed-size lists [re, im]. Instants of units that Arrow lacks are int64 ticks.
    """
    try:
        import pyarrow as pa
    except ImportError as exc:
        raise NotAcceptableError("Arrow needs the extra: pip install 'aq-data[arrow]' on the server") from exc
    flat = values.reshape(-1)
    if flat.dtype.kind == "c":
        parts = np.ascontiguousarray(flat).view(f"<f{flat.dtype.itemsize // 2}")
        column = pa.FixedSizeListArray.from_arrays(pa.array(parts), 2)
    elif flat.dtype.kind in "Mm" and np.datetime_data(flat.dtype) not in {(unit, 1) for unit in ("s", "ms", "us", "ns")}:
        column = pa.array(flat.view("i8"), mask=np.isnat(flat))
    elif flat.dtype.kind in "UOT":
        column = pa.array(flat.tolist(), type=pa.string())
    else:
        column = pa.array(np.ascontiguousarray(flat))
    described = {"shape": ",".join(map(str, values.shape)), "dims": msgspec.json.encode(dims), "dtype": str(values.dtype)}
    table = pa.table({name: column}).replace_schema_metadata(described)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
