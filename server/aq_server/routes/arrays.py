"""Array slices in several formats, and the Zarr view."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from litestar import Controller, Request, Response, get, put
from litestar.di import NamedDependency
from litestar.openapi.spec import Schema
from litestar.params import FromPath, FromQuery
from litestar.response import Stream

from aq_data.errors import ConflictError, NotAcceptableError, TooLargeError
from aq_data.models.arrays import is_text, parse_dtype
from aq_data.models.values import is_unicode
from aq_data.wire.codec import ARROW, CSV, JSON, NPY, RAW, array_pieces
from aq_data.wire.routes import DATAFILES
from aq_server.routes.accepting import best_match
from aq_server.routes.bodies import matches_etag
from aq_server.routes.datafiles import byte_range
from aq_server.routes.formats import arrow_stream, as_csv, as_json, npy_header
from aq_server.routes.openapi import BINARY, RANGE_HEADERS, header, operation, refusals
from aq_server.service.datafiles import DataFiles
from aq_server.service.previewing import previewed
from aq_server.service.reading import Reading, Slice

__all__ = ["ArrayRoutes", "ZarrRoutes"]

FORMATS = {"raw": RAW, "npy": NPY, "json": JSON, "csv": CSV, "arrow": ARROW}

WHOLE_BYTES = 1 << 20
"""Up to this size an answer is one piece; beyond, values stream while the next are read."""
MAP_ELEMENTS = 256 << 20
TEXT_FORM_BYTES = 4 << 20
"""JSON, CSV and Arrow are made in memory: of at most this many bytes of values, text as UTF-8 and 4 more for each."""


class ArrayRoutes(Controller):
    """`/datafiles/{id}/arrays/{name}`."""

    path = f"{DATAFILES}/{{datafile_id:str}}/arrays"
    tags = ["Arrays"]

    @get(
        "/{name:str}",
        operation_id="readArray",
        summary="A slice of one array",
        description="`sel` has one entry per axis, each applied in turn: `0:10`, `::2`, `-1`, `[3,1,4]`, `...`; missing or "
        "empty it is everything. The format follows `Accept`, or `format` where that is easier. Raw values are C order, "
        "little-endian; `Array-Dtype` and `Array-Shape` describe them. `ETag` is known without reading the values. `head` "
        "(the document's `sweep.head`) reads an open sweep as of that block, so that several arrays are of one moment; 409 "
        "when that is gone.",
        responses=refusals(400, 404, 406, 409, 413),
        operation_class=operation(
            success={
                200: ("The values.", dict.fromkeys((RAW, NPY, CSV, ARROW), BINARY) | {JSON: Schema()}),
                304: ("Unchanged.", {}),
            },
            headers=(header("If-None-Match", "An ETag got earlier: 304 if the values are the same."),),
        ),
    )
    async def read(
        self,
        request: Request[Any, Any, Any],
        reading: NamedDependency[Reading],
        datafile_id: FromPath[str],
        name: FromPath[str],
        sel: FromQuery[str] = "",
        format: FromQuery[str] = "",
        head: FromQuery[int | None] = None,
    ) -> Response[bytes] | Stream:
        part = await reading.slice(datafile_id, name, sel, head)
        media = _choose(request.headers.get("accept", "*/*"), format, part)
        etag = f'"{part.tag}.{media.rsplit("/", 1)[-1][:12]}"'
        headers = {
            "ETag": etag,
            "Cache-Control": "private, no-cache",
            "Vary": "Accept",
            "Array-Dtype": part.array.dtype,
            "Array-Shape": ",".join(map(str, part.selection.shape)),
        }
        if matches_etag(request, etag):
            return Response(b"", status_code=304, headers=headers)
        if media in (RAW, NPY):
            return await _raw(part, media, headers, request.scope["state"].get("is_head", False))
        values = await _bounded(part, media)
        headers["ETag"] = f'"{part.tag}.{media.rsplit("/", 1)[-1][:12]}"'
        if media == JSON:
            content = await asyncio.to_thread(as_json, values)
        elif media == CSV:
            content = await asyncio.to_thread(as_csv, values)
        else:
            content = await asyncio.to_thread(arrow_stream, values, name, part.array.dims)
        return Response(content, media_type=media, headers=headers)

    @get(
        "/{name:str}/written",
        operation_id="readWrittenMap",
        summary="Which elements of a slice were measured",
        description="Booleans (one byte each, C order) of the slice's shape: what an open or abandoned sweep did not "
        "measure reads as NaN, NaT, 0 or empty text, and is 0 here.",
        responses=refusals(400, 404),
        operation_class=operation(success={200: ("The map.", {RAW: BINARY})}),
    )
    async def written(
        self,
        reading: NamedDependency[Reading],
        datafile_id: FromPath[str],
        name: FromPath[str],
        sel: FromQuery[str] = "",
    ) -> Response[bytes]:
        part = await reading.slice(datafile_id, name, sel)
        if int(np.prod(part.selection.full_shape, dtype=object)) > MAP_ELEMENTS:
            raise TooLargeError(f"the written map of at most {MAP_ELEMENTS} elements is given at once; select less")
        values = await part.written()
        headers = {
            "Array-Dtype": "|b1",
            "Array-Shape": ",".join(map(str, part.selection.shape)),
            "Cache-Control": "no-store",
        }
        return Response(values.tobytes(), media_type=RAW, headers=headers)

    @get(
        "/{name:str}/preview",
        operation_id="previewArray",
        summary="A slice reduced to the pixels of a plot",
        description="`sel` must leave one or two axes. At most `pixels` bins per axis: the minimum and maximum of each bin "
        "(`minmax`, for one axis the default), or the `mean` (for two), `min` or `max`. Complex values by `part`: `abs`, "
        "`angle`, `real` or `imag`. NaN and what was not measured count as nothing. float64, C order; `Preview-Step` has "
        "the elements per bin along each axis.",
        responses=refusals(400, 404),
        operation_class=operation(
            success={200: ("The reduced values.", {RAW: BINARY}), 304: ("Unchanged.", {})},
            headers=(header("If-None-Match", "An ETag got earlier."),),
        ),
    )
    async def preview(
        self,
        request: Request[Any, Any, Any],
        reading: NamedDependency[Reading],
        datafile_id: FromPath[str],
        name: FromPath[str],
        sel: FromQuery[str] = "",
        pixels: FromQuery[int] = 1000,
        how: FromQuery[str] = "",
        part: FromQuery[str] = "abs",
    ) -> Response[bytes]:
        preview = await previewed(reading, datafile_id, name, sel, how, part, pixels)
        headers = {
            "ETag": f'"{preview.tag}"',
            "Cache-Control": "private, no-cache",
            "Array-Dtype": "<f8",
            "Array-Shape": ",".join(map(str, preview.values.shape)),
            "Preview-Step": ",".join(map(str, preview.steps)),
        }
        if matches_etag(request, headers["ETag"]):
            return Response(b"", status_code=304, headers=headers)
        return Response(preview.values.tobytes(), media_type=RAW, headers=headers)

    @put(
        "/{name:str}",
        operation_id="writeArray",
        summary="Refused: finished arrays never change",
        status_code=200,
        responses=refusals(404, 409),
        operation_class=operation(),
    )
    async def write(self, datafiles: NamedDependency[DataFiles], datafile_id: FromPath[str], name: FromPath[str]) -> None:
        """Refused for every array there is: says so in the words of this program."""
        await datafiles.get(datafile_id)
        raise ConflictError(
            f"array {name[:80]!r} is finished and never changes; save a new DataFile with derived_from=[{datafile_id!r}]",
            code="finished",
        )


def _choose(accept: str, format: str, part: Slice) -> str:
    """The media type to answer with."""
    has_no_raw = is_text(parse_dtype(part.array.dtype, part.array.name))
    possible = [JSON, ARROW, CSV] if has_no_raw else [RAW, NPY, JSON, CSV, ARROW]
    if format:
        media = FORMATS.get(format)
        if media is None:
            raise NotAcceptableError(f"format is one of {', '.join(FORMATS)}, not {format[:40]!r}")
    else:
        media = best_match(accept, possible)
    if media is None or media not in possible:
        reason = "variable-length text has no raw form; " if has_no_raw else ""
        raise NotAcceptableError(f"{reason}this array can be sent as {', '.join(possible)}")
    return media


async def _raw(part: Slice, media: str, headers: dict[str, str], without_body: bool) -> Response[bytes] | Stream:
    dtype = parse_dtype(part.array.dtype, part.array.name)
    head = npy_header(dtype, part.selection.shape) if media == NPY else b""
    length = len(head) + int(np.prod(part.selection.full_shape, dtype=object)) * dtype.itemsize
    if length <= WHOLE_BYTES:
        content = head + (await part.read()).tobytes()
        headers["ETag"] = f'"{part.tag}.{media.rsplit("/", 1)[-1][:12]}"'  # a sweep may have been read a little later
        return Response(content, media_type=media, headers=headers)
    if without_body:
        return Response(b"", media_type=media, headers={**headers, "Content-Length": str(length)})

    stream = part.stream()
    # The first values are read before the head is sent: damage there is answered as what it is.
    first = await anext(stream)

    async def pieces() -> AsyncIterator[bytes]:
        if head:
            yield head
        for piece in array_pieces(first):
            yield bytes(piece)
            await part.give_way()
        async for values in stream:
            for piece in array_pieces(values):
                yield bytes(piece)
                # A socket with room never makes this task wait: let small requests come in between all the same.
                await part.give_way()

    return Stream(pieces(), media_type=media, headers={**headers, "Content-Length": str(length)})


async def _bounded(part: Slice, media: str) -> np.ndarray[Any, Any]:
    dtype = parse_dtype(part.array.dtype, part.array.name)
    if is_text(dtype):
        return await part.read_text(TEXT_FORM_BYTES)
    size = int(np.prod(part.selection.full_shape, dtype=object)) * dtype.itemsize
    if size > TEXT_FORM_BYTES:
        raise TooLargeError(f"{media} is limited to {TEXT_FORM_BYTES >> 20} MiB of values; select less, or ask for {RAW}")
    values = await part.read()
    if dtype.kind == "U" and not is_unicode(values):
        raise NotAcceptableError(
            f"array {part.array.name!r} holds a lone surrogate there, which {media} cannot carry; ask for {RAW} or {NPY}"
        )
    return values


class ZarrRoutes(Controller):
    """`/datafiles/{id}/zarr/…`: the DataFile as a Zarr v3 store, for any reader that speaks HTTP."""

    path = f"{DATAFILES}/{{datafile_id:str}}/zarr"
    tags = ["Zarr"]

    @get(
        "/{key:path}",
        operation_id="readZarrKey",
        summary="One key of the Zarr v3 store",
        description="404 only for what does not exist: a reader takes it for fill values. Ranges are served.",
        responses=refusals(404, 416),
        operation_class=operation(
            success={
                200: ("The content.", {JSON: Schema(), RAW: BINARY}),
                206: ("The range.", {RAW: BINARY, JSON: BINARY}),
                304: ("Unchanged.", {}),
            },
            headers=RANGE_HEADERS,
        ),
    )
    async def read(
        self,
        request: Request[Any, Any, Any],
        reading: NamedDependency[Reading],
        datafile_id: FromPath[str],
        key: FromPath[str],
    ) -> Response[bytes]:
        blob = await reading.zarr(datafile_id, key.lstrip("/"))
        etag = f'"{blob.tag}"'
        lasting = "private, max-age=31536000, immutable" if blob.is_final else "no-cache"
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": lasting}
        if matches_etag(request, etag):
            return Response(b"", status_code=304, headers=headers)
        media = RAW if blob.is_final else JSON
        wanted = byte_range(request, len(blob.content), etag)
        if wanted is None:
            return Response(blob.content, media_type=media, headers=headers)
        start, stop = wanted
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(blob.content)}"
        return Response(blob.content[start:stop], status_code=206, media_type=media, headers=headers)
