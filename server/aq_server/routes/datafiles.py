"""Save, get, patch and delete DataFiles; attached files."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import msgspec
from litestar import Controller, Request, Response, delete, get, patch, post, put
from litestar.di import NamedDependency
from litestar.openapi.spec import Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.params import FromPath, FromQuery
from litestar.response import Stream

from aq_data.errors import RangeError, TooLargeError, UnsupportedMediaError, ValidationError
from aq_data.models.datafile import DataFile, NewDataFile
from aq_data.wire.codec import JSON
from aq_data.wire.routes import DATAFILES
from aq_server.config import ServerConfig
from aq_server.routes.bodies import (
    AnyRequest,
    FormPart,
    body_pieces,
    decode_json,
    form_events,
    if_match,
    json_body,
    matches_etag,
    media_type,
)
from aq_server.routes.openapi import BINARY, RANGE_HEADERS, header, json_object, operation, refusals
from aq_server.service.datafiles import DataFiles
from aq_server.service.growing import Growing
from aq_server.service.history import History
from aq_server.service.saving import Save

__all__ = ["ARRAY_PART", "DataFileRoutes", "FileRoutes", "document_response"]

_DOCUMENT = json_object("The DataFile's document: typed fields, `metadata`, and what the server adds.")
_NEW = json_object(
    "Typed fields, free `metadata`, and the declared `arrays` (name, dtype, shape, dims, attrs, role, chunks, codec).",
    example={"name": "T1 vs flux", "tags": ["q3"], "metadata": {"chip": "C7"}},
)
_FORM = Schema(
    type=OpenAPIType.OBJECT,
    description="`document` (JSON) first; then for each declared array its values as `array:<i>`, raw, C order, "
    "little-endian; then attached files as `file:<i>`, each with a filename.",
    properties={"document": _NEW, "array:0": BINARY, "file:0": BINARY},
    required=["document"],
)


def document_response(document: DataFile, status: int) -> Response[bytes]:
    """A document as JSON; its ETag is the revision, of an open sweep with the number of blocks (`"3-120"`)."""
    headers = {"ETag": document_etag(document), "Cache-Control": "no-cache"}
    if status == 201:
        headers["Location"] = f"{DATAFILES}/{document.id}"
    return Response(msgspec.json.encode(document), status_code=status, media_type=JSON, headers=headers)


def document_etag(document: DataFile) -> str:
    """Changes whenever the answered document does."""
    head = f"-{document.sweep.head}" if document.state == "open" and document.sweep is not None else ""
    return f'"{document.revision}{head}"'


class DataFileRoutes(Controller):
    """`/datafiles` and `/datafiles/{id}`."""

    path = DATAFILES
    tags = ["DataFiles"]

    @post(
        operation_id="saveDataFile",
        summary="Save a DataFile in one request",
        description="Atomic: 201 means that everything is on disk and visible, any other status that nothing is. With an "
        "`id` made by the client (a UUIDv7) a retry is harmless: the same content is answered again with 200.",
        request_max_body_size=None,
        responses=refusals(409, 413, 415),
        operation_class=operation(
            body={"multipart/form-data": _FORM, JSON: _NEW},
            success={201: ("Saved.", {JSON: _DOCUMENT}), 200: ("It had been saved before.", {JSON: _DOCUMENT})},
        ),
    )
    async def save(
        self,
        request: Request[Any, Any, Any],
        datafiles: NamedDependency[DataFiles],
        growing: NamedDependency[Growing],
        config: NamedDependency[ServerConfig],
    ) -> Response[bytes]:
        user = request.scope["state"].get("user")
        media = media_type(request)
        if media == JSON:
            new = await json_body(request, NewDataFile, config.max_document_bytes)
            save = await datafiles.begin_save(new, user)
        elif media == "multipart/form-data":
            save = await _receive(request, datafiles, config, user)
        else:
            raise UnsupportedMediaError(f"send {JSON} for metadata alone, multipart/form-data with arrays or files")
        try:
            document, is_new = await save.commit()
        except BaseException:
            await save.discard()
            raise
        return document_response(await growing.present(document), 201 if is_new else 200)

    @get(
        "/{datafile_id:str}",
        operation_id="getDataFile",
        summary="The document of a DataFile",
        description="With `revision` as it was then; that of an open sweep with its arrays as they were declared.",
        responses=refusals(404),
        operation_class=operation(
            success={200: ("The document.", {JSON: _DOCUMENT}), 304: ("Unchanged.", {})},
            headers=(header("If-None-Match", "An ETag got earlier: 304 if unchanged."),),
        ),
    )
    async def read(
        self,
        request: Request[Any, Any, Any],
        datafiles: NamedDependency[DataFiles],
        growing: NamedDependency[Growing],
        history: NamedDependency[History],
        datafile_id: FromPath[str],
        include_deleted: FromQuery[bool] = False,
        revision: FromQuery[int | None] = None,
    ) -> Response[bytes]:
        if revision is not None:
            return document_response(await history.document(datafile_id, revision, include_deleted), 200)
        document = await growing.present((await datafiles.get(datafile_id, include_deleted)).document)
        etag = document_etag(document)
        # Silence changes an open document too: it may have become stale.
        if document.state != "open" and matches_etag(request, etag):
            return Response(b"", status_code=304, headers={"ETag": etag})
        return document_response(document, 200)

    @patch(
        "/{datafile_id:str}",
        operation_id="patchDataFile",
        summary="Change metadata by a JSON merge patch (RFC 7396)",
        responses=refusals(404, 409, 412, 413, 415),
        operation_class=operation(
            body={"application/merge-patch+json": json_object("Null deletes a key."), JSON: json_object("The same.")},
            success={200: ("The changed document.", {JSON: _DOCUMENT})},
            headers=(header("If-Match", "The revision the change is meant for; 412 if it is not the current one."),),
        ),
    )
    async def change(
        self,
        request: Request[Any, Any, Any],
        datafiles: NamedDependency[DataFiles],
        growing: NamedDependency[Growing],
        config: NamedDependency[ServerConfig],
        datafile_id: FromPath[str],
    ) -> Response[bytes]:
        media = ("application/merge-patch+json", JSON)
        merge = await json_body(request, dict[str, Any], config.max_document_bytes, media)
        user = request.scope["state"].get("user")
        changed = await datafiles.patch(datafile_id, merge, if_match(request), user)
        return document_response(await growing.present(changed), 200)

    @delete(
        "/{datafile_id:str}",
        operation_id="deleteDataFile",
        summary="Delete a DataFile, leaving a tombstone",
        responses=refusals(404, 409, 412),
        operation_class=operation(headers=(header("If-Match", "The revision that may be deleted."),)),
    )
    async def remove(
        self, request: Request[Any, Any, Any], datafiles: NamedDependency[DataFiles], datafile_id: FromPath[str]
    ) -> None:
        await datafiles.delete(datafile_id, if_match(request), request.scope["state"].get("user"))


async def _receive(request: AnyRequest, datafiles: DataFiles, config: ServerConfig, user: str | None) -> Save:
    """Feed a streaming form into a save; what was stored is undone when the form turns out wrong."""
    save: Save | None = None
    document: bytearray | None = None
    try:
        async for event in form_events(request, config.max_save_bytes):
            if isinstance(event, FormPart):
                if save is None:
                    if event.name != "document" or document is not None:
                        raise ValidationError(f"the first part must be `document`, not {event.name[:40]!r}")
                    document = bytearray()
                else:
                    await _begin_part(save, event)
            elif save is None:
                assert document is not None
                if event is not None:
                    document += event
                    if len(document) > config.max_document_bytes:
                        raise TooLargeError(
                            f"the document is over the limit of {config.max_document_bytes} bytes",
                            limit=config.max_document_bytes,
                        )
                else:
                    new = decode_json(bytes(document), NewDataFile, "document")
                    _check_declared(new, config.max_save_bytes)
                    save = await datafiles.begin_save(new, user)
            elif event is not None:
                await save.write(event)
            else:
                await save.end_part()
        if save is None:
            raise ValidationError("the form has no part `document`")
    except BaseException:
        if save is not None:
            await save.discard()
        raise
    return save


def _check_declared(new: NewDataFile, limit: int) -> None:
    """Refuse what could never arrive whole before room is made for it."""
    declared = sum(array.nbytes for array in new.arrays)
    if declared > limit:
        raise TooLargeError(f"the declared arrays have {declared} bytes; the limit here is {limit}", limit=limit)


ARRAY_PART = re.compile(r"array:(\d{1,5})", re.ASCII)


async def _begin_part(save: Save, part: FormPart) -> None:
    array = ARRAY_PART.fullmatch(part.name)
    if array:
        await save.begin_array(int(array[1]))
    elif part.name.startswith("file:"):
        if part.filename is None:
            raise ValidationError(f"the part {part.name[:40]!r} needs a filename")
        await save.begin_file(part.filename, part.content_type)
    else:
        raise ValidationError(f"unknown part {part.name[:40]!r}; parts are document, array:<i> and file:<i>")


_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


def byte_range(request: AnyRequest, size: int, etag: str) -> tuple[int, int] | None:
    """The half-open range that `Range` asks for: `a-b`, `a-` or `-n`; None for everything (also for forms we do not serve).

    `If-Range` with another tag than `etag` (with its quotes), or with a date, which nothing here has, asks for everything: a
    reader that goes on with what it has must not put the end of one content behind the beginning of another (RFC 9110,
    13.1.5). Raises RangeError when it lies outside.
    """
    if request.headers.get("if-range", etag).strip() != etag:
        return None
    match = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
    if start >= stop:
        raise RangeError(f"the range lies outside the content of {size} bytes", size=size)
    return start, stop


class FileRoutes(Controller):
    """`/datafiles/{id}/files/{name}`."""

    path = f"{DATAFILES}/{{datafile_id:str}}/files"
    tags = ["Files"]

    @get(
        "/{name:str}",
        operation_id="getFile",
        summary="An attached file, whole or a range of it",
        responses=refusals(404, 416),
        operation_class=operation(
            success={
                200: ("The content.", {"*/*": BINARY}),
                206: ("The range.", {"*/*": BINARY}),
                304: ("Unchanged.", {}),
            },
            headers=RANGE_HEADERS,
        ),
    )
    async def read(
        self,
        request: Request[Any, Any, Any],
        datafiles: NamedDependency[DataFiles],
        datafile_id: FromPath[str],
        name: FromPath[str],
    ) -> Response[bytes] | Stream:
        stored = await datafiles.open_file(datafile_id, name)
        info = stored.info
        etag = f'"{info.sha256}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "no-cache"}
        if matches_etag(request, etag):
            return Response(b"", status_code=304, headers=headers)
        wanted = byte_range(request, info.size, etag)
        start, stop = wanted or (0, info.size)
        headers["Content-Length"] = str(stop - start)
        headers["Content-Type"] = info.content_type
        headers["Content-Disposition"] = _attachment(info.name)
        # A browser must not run what a client uploaded as if it came from this server.
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Content-Security-Policy"] = "sandbox"
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{info.size}"
        if request.scope["state"].get("is_head"):
            stop = start  # headers alone
        return Stream(stored.read(start, stop), status_code=206 if wanted else 200, headers=headers)

    @put(
        "/{name:str}",
        operation_id="putFile",
        summary="Attach one more file",
        description="The same content under the same name is harmless, other content is refused: files do not change.",
        request_max_body_size=None,
        responses=refusals(404, 409, 413),
        operation_class=operation(
            body={"*/*": BINARY},
            success={
                201: ("Attached.", {JSON: json_object("Name, size, content type and SHA-256.")}),
                200: ("It was attached before.", {JSON: json_object("Name, size, content type and SHA-256.")}),
            },
        ),
    )
    async def attach(
        self,
        request: Request[Any, Any, Any],
        datafiles: NamedDependency[DataFiles],
        config: NamedDependency[ServerConfig],
        datafile_id: FromPath[str],
        name: FromPath[str],
    ) -> Response[bytes]:
        content_type = request.headers.get("content-type", "application/octet-stream")
        body = body_pieces(request, config.max_save_bytes)
        user = request.scope["state"].get("user")
        info, is_new = await datafiles.attach(datafile_id, name, content_type, body, user)
        return Response(msgspec.json.encode(info), status_code=201 if is_new else 200, media_type=JSON)


def _attachment(name: FromPath[str]) -> str:
    """`Content-Disposition` by RFC 6266: the name in UTF-8, with an ASCII stand-in for old readers."""
    plain = re.sub(r'[^ -~]|["\\]', "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
