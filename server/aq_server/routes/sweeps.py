"""Open a sweep, append blocks, end it; follow any DataFile."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec
from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.openapi.spec import Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.params import FromPath
from litestar.response import Stream

from aq_data.errors import TooLargeError, UnavailableError, UnsupportedMediaError, ValidationError
from aq_data.models.datafile import DataFile
from aq_data.models.sweep import Ending, NewSweep
from aq_data.wire.blocks import BlockReader
from aq_data.wire.codec import JSON, RAW
from aq_data.wire.routes import DATAFILES, SWEEPS
from aq_server.config import ServerConfig
from aq_server.routes.bodies import AnyRequest, FormPart, body_pieces, decode_json, form_events, json_body, media_type
from aq_server.routes.datafiles import ARRAY_PART, document_response
from aq_server.routes.openapi import BINARY, header, json_object, operation, refusals
from aq_server.service.following import Event, Following
from aq_server.service.opening import Opening
from aq_server.service.sweeps import Sweeps

__all__ = ["EventRoutes", "SweepRoutes"]

log = logging.getLogger("aq_data")

EVENT_STREAM = "text/event-stream"
HEARTBEAT_SECONDS = 15.0
"""A comment is sent after so long without events, so that neither side nor a proxy takes the silence for death."""

_DOCUMENT = json_object("The DataFile's document; `arrays` have the true extents, `sweep` what only a sweep has.")
_NEW = json_object(
    "Typed fields, free `metadata`, and the declared `arrays` (name, dtype, dims, shape with null where a dim grows, attrs, "
    "role, chunks, codec); `planned` lengths of growing dims; `notify`, addresses to tell of the end.",
    example={
        "name": "T1",
        "arrays": [{"name": "iq", "dtype": "<c16", "dims": ["flux", "delay"], "shape": [21, None]}],
    },
)
_FORM = Schema(
    type=OpenAPIType.OBJECT,
    description="`document` (JSON) first; then, for arrays none of whose dims grows, their values as `array:<i>`.",
    properties={"document": _NEW, "array:0": BINARY},
    required=["document"],
)
_STATUS = json_object(
    "id, name, state, arrays (as declared), head, folded, writers, extents, planned, last_block_at, stale, reason."
)
_ENDING = json_object("`writers`: the last number of each writer that must have arrived; `reason` (of abandoning).")
_ACKNOWLEDGED = json_object("`acknowledged`: the last number of each writer of this request; `head`: blocks in the sweep.")


_EVENT = json_object("`id`, `event`, and `data`: JSON of the block, the revision, or the end.")


class SweepRoutes(Controller):
    """`/sweeps` and `/sweeps/{id}`."""

    path = SWEEPS
    tags = ["Sweeps"]

    @post(
        operation_id="openSweep",
        summary="Open a sweep",
        description="A DataFile in state `open` that grows by blocks. With an `id` made by the client a retry is harmless.",
        request_max_body_size=None,
        responses=refusals(409, 413, 415),
        operation_class=operation(
            body={JSON: _NEW, "multipart/form-data": _FORM},
            success={201: ("Open.", {JSON: _DOCUMENT}), 200: ("It had been opened before.", {JSON: _DOCUMENT})},
        ),
    )
    async def open(
        self, request: Request[Any, Any, Any], sweeps: NamedDependency[Sweeps], config: NamedDependency[ServerConfig]
    ) -> Response[bytes]:
        user = request.scope["state"].get("user")
        media = media_type(request)
        if media == JSON:
            opening = sweeps.begin_open(await json_body(request, NewSweep, config.max_document_bytes), user)
        elif media == "multipart/form-data":
            opening = await _receive(request, sweeps, config, user)
        else:
            raise UnsupportedMediaError(f"send {JSON}, or multipart/form-data with values of arrays that do not grow")
        document, is_new = await opening.commit()
        return document_response(document, 201 if is_new else 200)

    @get(
        "/{sweep_id:str}",
        operation_id="getSweep",
        summary="The state of a sweep and the last number of each writer",
        responses=refusals(404),
        operation_class=operation(success={200: ("The state.", {JSON: _STATUS})}),
    )
    async def status(self, sweeps: NamedDependency[Sweeps], sweep_id: FromPath[str]) -> Response[bytes]:
        return Response(
            msgspec.json.encode(await sweeps.status(sweep_id)), media_type=JSON, headers={"Cache-Control": "no-store"}
        )

    @post(
        "/{sweep_id:str}/blocks",
        operation_id="appendBlocks",
        summary="Append blocks",
        description="For each block: u32 length (little-endian), a JSON header `{writer, n, variables: [{name, dtype, "
        "shape, start | append}]}`, then the values of its variables, raw, C order, little-endian. A block is stored whole "
        "or not at all; 200 means that all are on disk. A repeat (same writer and n) changes nothing, a gap is refused. "
        "When one is refused those before it stay: `details.acknowledged` says how far it came.",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(404, 409, 413, 415),
        operation_class=operation(body={RAW: BINARY}, success={200: ("Stored.", {JSON: _ACKNOWLEDGED})}),
    )
    async def append(
        self,
        request: Request[Any, Any, Any],
        sweeps: NamedDependency[Sweeps],
        config: NamedDependency[ServerConfig],
        sweep_id: FromPath[str],
    ) -> Response[bytes]:
        if media_type(request) != RAW:
            raise UnsupportedMediaError(f"send blocks as {RAW}")
        appending = await sweeps.begin_append(sweep_id)
        reader = BlockReader(body_pieces(request, config.max_save_bytes))
        try:
            while (block := await reader.header()) is not None:
                left = await appending.begin(block)
                while left:
                    piece = await reader.some(left)
                    await appending.write(piece)
                    left -= len(piece)
                await appending.end()
            await appending.commit()
        except BaseException:
            await appending.discard()
            raise
        return Response(
            msgspec.json.encode({"acknowledged": appending.acknowledged, "head": appending.head}), media_type=JSON
        )

    @post(
        "/{sweep_id:str}/finish",
        operation_id="finishSweep",
        summary="End a sweep: it becomes a complete DataFile, plain Zarr in its folder",
        status_code=200,
        responses=refusals(404, 409, 413, 415),
        operation_class=operation(body={JSON: _ENDING}, success={200: ("Complete.", {JSON: _DOCUMENT})}),
    )
    async def finish(
        self, request: Request[Any, Any, Any], sweeps: NamedDependency[Sweeps], sweep_id: FromPath[str]
    ) -> Response[bytes]:
        return document_response(await _end(request, sweeps, sweep_id, "complete"), 200)

    @post(
        "/{sweep_id:str}/abandon",
        operation_id="abandonSweep",
        summary="End a sweep that did not get where it should; what was written stays readable",
        status_code=200,
        responses=refusals(404, 409, 413, 415),
        operation_class=operation(body={JSON: _ENDING}, success={200: ("Abandoned.", {JSON: _DOCUMENT})}),
    )
    async def abandon(
        self, request: Request[Any, Any, Any], sweeps: NamedDependency[Sweeps], sweep_id: FromPath[str]
    ) -> Response[bytes]:
        return document_response(await _end(request, sweeps, sweep_id, "abandoned"), 200)


async def _end(request: AnyRequest, sweeps: Sweeps, sweep_id: str, outcome: Literal["complete", "abandoned"]) -> DataFile:
    ending = await json_body(request, Ending, 1 << 20)
    return await sweeps.end(sweep_id, outcome, ending, request.scope["state"].get("user"))


async def _receive(request: AnyRequest, sweeps: Sweeps, config: ServerConfig, user: str | None) -> Opening:
    """Feed a form into an opening; nothing is stored before its `commit`."""
    opening: Opening | None = None
    document: bytearray | None = None
    async for event in form_events(request, config.max_save_bytes):
        if isinstance(event, FormPart):
            if opening is None:
                if event.name != "document" or document is not None:
                    raise ValidationError(f"the first part must be `document`, not {event.name[:40]!r}")
                document = bytearray()
            else:
                named = ARRAY_PART.fullmatch(event.name)
                if named is None:
                    raise ValidationError(f"unknown part {event.name[:40]!r}; parts are document and array:<i>")
                await opening.begin_array(int(named[1]))
        elif opening is None:
            assert document is not None
            if event is None:
                opening = sweeps.begin_open(decode_json(bytes(document), NewSweep, "document"), user)
            else:
                document += event
                if len(document) > config.max_document_bytes:
                    limit = config.max_document_bytes
                    raise TooLargeError(f"the document is over the limit of {limit} bytes", limit=limit)
        elif event is not None:
            await opening.write(event)
    if opening is None:
        raise ValidationError("the form has no part `document`")
    return opening


class EventRoutes(Controller):
    """`/datafiles/{id}/events`."""

    path = f"{DATAFILES}/{{datafile_id:str}}/events"
    tags = ["Sweeps"]

    @get(
        operation_id="followDataFile",
        summary="What happens to a DataFile, as server-sent events",
        description="Events are `block`, `metadata`, `finished` and `abandoned`, from the beginning or after "
        "`Last-Event-ID`; they come from what is stored, each once, however long a reader was away. The stream stays open.",
        responses=refusals(404),
        operation_class=operation(
            success={200: ("The events.", {EVENT_STREAM: _EVENT})},
            headers=(header("Last-Event-ID", "The id of the last event that was seen, as in `12-3`."),),
        ),
    )
    async def follow(
        self, request: Request[Any, Any, Any], following: NamedDependency[Following], datafile_id: FromPath[str]
    ) -> Response[bytes] | Stream:
        events = following.follow(datafile_id, request.headers.get("last-event-id", ""))
        first = await anext(events, None)  # what is wrong with the request is told before the stream begins
        if first is None:
            raise UnavailableError("the server is stopping")
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.scope["state"].get("is_head"):
            await events.aclose()
            return Response(b"", media_type=EVENT_STREAM, headers=headers)
        return Stream(_lines(first, events), media_type=EVENT_STREAM, headers=headers)


async def _lines(first: list[Event], events: AsyncIterator[list[Event]]) -> AsyncIterator[bytes]:
    yield b"retry: 1000\n\n" + b"".join(map(_line, first))
    last = time.monotonic()
    try:
        async for batch in events:
            if batch:
                yield b"".join(map(_line, batch))
                last = time.monotonic()
            elif time.monotonic() - last > HEARTBEAT_SECONDS:
                yield b":\n\n"
                last = time.monotonic()
    except UnavailableError as exc:
        # The status has gone out. Whoever follows comes again, with the id of the last event, and is told what is down.
        log.warning("an event stream ends", extra={"fields": {"error": exc.message}})


def _line(event: Event) -> bytes:
    return f"id: {event.id}\nevent: {event.event}\ndata: ".encode() + event.data + b"\n\n"
