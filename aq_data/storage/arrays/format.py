"""The bytes of a Zarr v3 group as aq-data writes it: `zarr.json` documents and encoded chunks.

Follows the Zarr v3 core specification with the codecs `bytes`, `blosc`, `crc32c` and `vlen-utf8`, the data types zarr-python
registers (`numpy.datetime64`, `fixed_length_utf32`, …) and inline consolidated metadata. Written directly because creating
arrays through zarr-python takes 1.4 to 1.9 ms each; zarr-python reads the result in the tests.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import google_crc32c
import msgspec
import numpy as np
from numcodecs import blosc
from numcodecs.vlen import VLenUTF8

from aq_data.errors import CorruptionError
from aq_data.models.arrays import STRING, ArrayInfo, parse_dtype, stored_dtype
from aq_data.models.datafile import DataFile
from aq_data.models.snapshots import REFERENCE
from aq_data.models.values import tag_of

__all__ = ["chunk_key", "decode_chunk", "encode_chunk", "group_document", "pack", "text_from_wire", "unpack"]

_BLOSC = {"zstd": (b"zstd", 3), "lz4": (b"lz4", 5)}


# --- zarr.json -----------------------------------------------------------------------------------------------------


def group_document(document: DataFile, digest: str, *, snapshot: str = "", is_view: bool = False) -> bytes:
    """The group's `zarr.json`: the dataset's attributes, the metadata copy under `aq_data`, all arrays consolidated.

    That of an open sweep lists its arrays only in the server's view (`is_view`): in storage their chunks have other keys.
    The copy of a document that was separated from its instruments refers to their `snapshot` (a hash) in their place.
    """
    attributes = plain_attributes(document.attrs, None)
    dims = {dim for array in document.arrays for dim in array.dims}
    coordinates = [
        a.name for a in document.arrays if a.role == "coordinate" and not (a.name in dims and a.dims == (a.name,))
    ]
    # CF's list is separated by spaces, so a name that holds one cannot stand in it; plain readers see a data variable.
    listed = " ".join(name for name in coordinates if not any(ch.isspace() for ch in name))
    if listed and "coordinates" not in attributes:
        attributes["coordinates"] = listed
    content = document if not snapshot else {**msgspec.structs.asdict(document), "instruments": {REFERENCE: snapshot}}
    copy = {"id": document.id, "revision": document.revision, "digest": digest, "document": content}
    arrays = document.arrays if document.state != "open" or is_view else ()
    metadata = {array.name: array_document(array) for array in arrays}
    return msgspec.json.format(
        msgspec.json.encode(
            {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": {**attributes, "aq_data": copy},
                "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata},
            }
        ),
        indent=1,
    )


def array_document(array: ArrayInfo) -> dict[str, Any]:
    """An array's `zarr.json` before encoding."""
    dtype = parse_dtype(array.dtype, array.name)
    data_type, fill = _data_type(dtype)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": _not_measured(fill, dtype) if array.is_partial else fill,
        "codecs": list(_codecs(array, dtype)),
        "attributes": plain_attributes(array.attrs, dtype),
        "dimension_names": array.dims,
        "storage_transformers": [],
    }


def _data_type(dtype: np.dtype[Any]) -> tuple[str | dict[str, Any], Any]:
    if dtype.kind in "OT":
        return "string", ""
    if dtype.kind in "Mm":
        unit, scale = np.datetime_data(dtype)
        name = "numpy.datetime64" if dtype.kind == "M" else "numpy.timedelta64"
        return {"name": name, "configuration": {"unit": unit, "scale_factor": scale}}, "NaT"
    if dtype.kind == "U":
        return {"name": "fixed_length_utf32", "configuration": {"length_bytes": dtype.itemsize}}, ""
    if dtype.kind == "S":
        return {"name": "null_terminated_bytes", "configuration": {"length_bytes": dtype.itemsize}}, ""
    if dtype.kind == "b":
        return "bool", False
    return dtype.name, [0.0, 0.0] if dtype.kind == "c" else 0.0 if dtype.kind == "f" else 0


def _not_measured(fill: Any, dtype: np.dtype[Any]) -> Any:
    """What absent chunks of a sweep read as: `models.arrays.fill_of` as JSON."""
    return {"f": "NaN", "c": ["NaN", "NaN"]}.get(dtype.kind, fill)


def _codecs(array: ArrayInfo, dtype: np.dtype[Any]) -> Iterable[dict[str, Any]]:
    if dtype.kind in "OT":
        yield {"name": "vlen-utf8", "configuration": {}}
    elif stored_dtype(dtype).itemsize > 1:
        yield {"name": "bytes", "configuration": {"endian": "little"}}
    else:
        yield {"name": "bytes"}
    if array.codec in _BLOSC:
        name, level = _BLOSC[array.codec]
        configuration = {"cname": name.decode(), "clevel": level, "shuffle": "shuffle", "blocksize": 0}
        yield {"name": "blosc", "configuration": {"typesize": _typesize(dtype), **configuration}}
    yield {"name": "crc32c"}


def _typesize(dtype: np.dtype[Any]) -> int:
    return 1 if dtype.kind in "OT" else stored_dtype(dtype).itemsize


def plain_attributes(attrs: Mapping[str, Any], dtype: np.dtype[Any] | None) -> dict[str, Any]:
    """Attributes as other Zarr readers expect them: small arrays become lists, the rest stays tagged.

    `_FillValue` takes the form that xarray writes and reads in Zarr v3; the exact value is in the metadata copy.
    """
    own = attrs["$literal"] if tag_of(attrs) == "$literal" else attrs
    plain = {key: _plain(value) for key, value in own.items()}
    if dtype is not None and "_FillValue" in plain:
        fill = _fill_attribute(plain.pop("_FillValue"), dtype)
        if fill is not None:
            plain["_FillValue"] = fill
    return plain


def _plain(value: Any) -> Any:
    tag = tag_of(value)
    if tag == "$ndarray":
        inner = value[tag]
        array = np.frombuffer(base64.b64decode(inner["data"]), dtype=inner["dtype"]).reshape(inner["shape"])
        if array.dtype.kind in "biuU" or (array.dtype.kind == "f" and np.isfinite(array).all()):
            return array.tolist()
        return value
    if tag == "$literal":
        return {key: _plain(item) for key, item in value[tag].items()}
    if tag is None and isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _fill_attribute(value: Any, dtype: np.dtype[Any]) -> Any:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if tag_of(value) == "$float":
        value = float(value["$float"])
    elif tag_of(value) == "$ndarray":
        array = np.frombuffer(base64.b64decode(value["$ndarray"]["data"]), dtype=value["$ndarray"]["dtype"])
        value = float(array[0]) if array.size == 1 and array.dtype.kind == "f" else None
    if isinstance(value, int) and abs(value) >= 1 << 1023:
        return None
    if dtype.kind == "f" and isinstance(value, (int, float)):
        return base64.b64encode(struct.pack("<d", value)).decode("ascii")
    if dtype.kind in "iub" and isinstance(value, (int, float)) and math.isfinite(value) and value == int(value):
        return int(value)
    return value if dtype.kind in "OT" and isinstance(value, str) else None


# --- chunks --------------------------------------------------------------------------------------------------------


def chunk_key(name: str, index: tuple[int, ...]) -> str:
    """Key of a chunk below the group, in Zarr's default encoding: `name/c/0/1`, for a scalar `name/c`."""
    return "/".join([name, "c", *map(str, index)])


def encode_chunk(values: np.ndarray[Any, Any], codec: str) -> bytes:
    """A whole chunk (already padded to the chunk shape) as stored: compressed, then followed by its CRC-32C."""
    if values.dtype.kind in "OT":
        flat = np.array(values.astype(object, copy=False).reshape(-1), dtype=object)
        body: Any = np.frombuffer(VLenUTF8().encode(flat), dtype="u1")
    else:
        body = np.ascontiguousarray(values).reshape(-1).view(stored_dtype(values.dtype))
    if codec in _BLOSC:
        name, level = _BLOSC[codec]
        body = blosc.compress(body, name, level, blosc.SHUFFLE)
    else:
        body = body.tobytes()
    return bytes(body) + struct.pack("<I", google_crc32c.value(body))


def _checked_body(data: bytes, key: str) -> Any:
    body = np.frombuffer(data, "u1")[:-4]  # a view without a copy, read-only as the checksum's C code demands
    if len(data) < 4 or struct.unpack("<I", data[-4:])[0] != google_crc32c.value(body):
        raise CorruptionError(f"chunk {key!r} does not match its checksum; `aq-data verify` lists what is damaged")
    return body


def decode_chunk(data: bytes, array: ArrayInfo, dtype: np.dtype[Any], key: str) -> np.ndarray[Any, Any]:
    """The values of a stored chunk, of the chunk shape. CorruptionError naming `key` when the checksum fails."""
    body = _checked_body(data, key)
    try:
        if array.codec in _BLOSC:
            body = blosc.decompress(body)
        if dtype.kind in "OT":
            return np.asarray(VLenUTF8().decode(body)).astype(dtype).reshape(array.chunks)
        return np.frombuffer(body, dtype=dtype).reshape(array.chunks)
    except (RuntimeError, ValueError) as exc:
        raise CorruptionError(f"chunk {key!r} cannot be decoded: {exc}") from exc


def pack(data: bytes) -> bytes:
    """Bytes compressed and followed by their CRC-32C, as a chunk of bytes is."""
    return encode_chunk(np.frombuffer(data, "u1"), "zstd") if data else encode_chunk(np.empty(0, "u1"), "none")


def unpack(data: bytes, key: str) -> bytes:
    """What `pack` was given; CorruptionError naming `key` when the checksum fails."""
    body = _checked_body(data, key)
    try:
        return bytes(blosc.decompress(body)) if len(body) else b""
    except (RuntimeError, ValueError) as exc:
        raise CorruptionError(f"{key!r} cannot be decoded: {exc}") from exc


def text_from_wire(data: bytes, count: int) -> np.ndarray[Any, Any]:
    """Variable-length text as it travels (u32 count, then u32 length and UTF-8 of each) as an object array.

    ValueError when the bytes do not hold exactly `count` texts.
    """
    if count == 0 and not data:
        return np.empty(0, dtype=object)
    if len(data) < 4 or struct.unpack("<I", data[:4])[0] != count:
        raise ValueError("the number of texts does not fit the shape")
    at = 4
    for _ in range(count):
        if at + 4 > len(data):
            raise ValueError("the texts are cut short")
        at += 4 + struct.unpack_from("<I", data, at)[0]
    if at != len(data):
        raise ValueError("the texts are cut short or too long")
    return np.asarray(VLenUTF8().decode(data), dtype=object)


def is_string(array: ArrayInfo) -> bool:
    """Whether the array holds variable-length text."""
    return array.dtype in (STRING, "|T16")
