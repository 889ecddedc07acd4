"""Create, read, patch and delete many DataFiles in one request, with a result for each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

import msgspec
from litestar import Controller, Request, patch, post
from litestar.di import NamedDependency
from litestar.openapi.spec import Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.response import Stream

from aq_data.errors import AqDataError, TooLargeError, UnsupportedMediaError, ValidationError
from aq_data.models.datafile import NewDataFile
from aq_data.models.structs import resolve
from aq_data.wire.codec import JSON, NDJSON
from aq_data.wire.routes import BULK, BULK_BYTES, BULK_ITEMS
from aq_server.config import ServerConfig
from aq_server.problems import problem_of
from aq_server.routes.bodies import AnyRequest, body_bytes, decode_json, json_body, media_type
from aq_server.routes.openapi import BINARY, json_object, operation, refusals
from aq_server.service.bulk import Bulk, Outcome, Patch, Removal

__all__ = ["BulkRoutes"]

T = TypeVar("T")

_LIMITS = (
    f"At most {BULK_ITEMS} items and {BULK_BYTES >> 20} MiB, as a JSON list or as NDJSON, one item a line. 200 says that "
    "the request was understood: `results` has, in the order of the items, for each its `status` and its `document` or, as "
    "a problem document, its `error`, as if it had been sent alone. One that fails does not hinder the others."
)
_RESULTS = json_object(
    "`results`: a list of {status, document} or {status, error}, in the order of the items.",
    example={"results": [{"status": 201, "document": {"id": "…"}}, {"status": 409, "error": {"code": "id_taken"}}]},
)


def _list_of(description: str, example: dict[str, Any]) -> dict[str, Schema]:
    items = json_object(description, example=example)
    return {JSON: Schema(type=OpenAPIType.ARRAY, items=items, max_items=BULK_ITEMS), NDJSON: BINARY}


_SUCCESS = {200: ("A result for each item.", {JSON: _RESULTS})}


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which documents, and what of them: dotted paths (`id` always is), or everything."""

    ids: list[str]
    fields: list[str] | None = None


class BulkRoutes(Controller):
    """`/datafiles/bulk`."""

    path = BULK
    tags = ["Bulk"]

    @post(
        operation_id="saveDataFiles",
        summary="Save many DataFiles without arrays",
        description=f"{_LIMITS} 201 is a new one; 200 one that was saved before, when a client that made the ids repeats "
        "the request.",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(413, 415),
        operation_class=operation(
            body=_list_of("Typed fields and free `metadata`.", {"name": "T1", "metadata": {"chip": "C7"}}), success=_SUCCESS
        ),
    )
    async def save(
        self, request: Request[Any, Any, Any], bulk: NamedDependency[Bulk], config: NamedDependency[ServerConfig]
    ) -> Stream:
        items = await _items(request, NewDataFile, config.max_document_bytes)
        return _answer(request, bulk.save(items, request.scope["state"].get("user")))

    @post(
        "/get",
        operation_id="getDataFiles",
        summary="The documents of many DataFiles",
        description=f"At most {BULK_ITEMS} ids. `fields` are dotted paths to keep of each document; `id` always is.",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(400, 413, 415),
        operation_class=operation(body={JSON: json_object("`ids`, `fields`.")}, success=_SUCCESS),
    )
    async def read(
        self, request: Request[Any, Any, Any], bulk: NamedDependency[Bulk], config: NamedDependency[ServerConfig]
    ) -> Stream:
        wanted = await json_body(request, Wanted, config.max_document_bytes)
        _check_count(len(wanted.ids))
        return _answer(request, bulk.get(wanted.ids, wanted.fields))

    @patch(
        operation_id="patchDataFiles",
        summary="Patch the metadata of many DataFiles",
        description=f"{_LIMITS} Of each the merge patch (RFC 7396) and, where it counts, the revision it is meant for.",
        request_max_body_size=None,
        responses=refusals(413, 415),
        operation_class=operation(
            body=_list_of("`id`, `patch`, `revision`.", {"id": "…", "patch": {"comment": "good"}, "revision": 3}),
            success=_SUCCESS,
        ),
    )
    async def change(
        self, request: Request[Any, Any, Any], bulk: NamedDependency[Bulk], config: NamedDependency[ServerConfig]
    ) -> Stream:
        items = await _items(request, Patch, config.max_document_bytes)
        return _answer(request, bulk.patch(items, request.scope["state"].get("user")))

    @post(
        "/delete",
        operation_id="deleteDataFiles",
        summary="Delete many DataFiles, leaving tombstones",
        description=f"{_LIMITS} 204 is one that was deleted.",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(413, 415),
        operation_class=operation(body=_list_of("`id`, `revision`.", {"id": "…", "revision": 3}), success=_SUCCESS),
    )
    async def remove(
        self, request: Request[Any, Any, Any], bulk: NamedDependency[Bulk], config: NamedDependency[ServerConfig]
    ) -> Stream:
        items = await _items(request, Removal, config.max_document_bytes)
        return _answer(request, bulk.delete(items, request.scope["state"].get("user")))


async def _items(request: AnyRequest, type: type[T], limit: int) -> Iterator[T | AqDataError]:
    """The items of the body, decoded when their turn comes; of one that does not fit, the error."""
    media = media_type(request)
    if media not in (JSON, NDJSON):
        raise UnsupportedMediaError(f"send the items as {JSON} or {NDJSON}")
    content = await body_bytes(request, BULK_BYTES)
    encoded: list[Any]
    if media == JSON:
        encoded = decode_json(content, list[msgspec.Raw], "body")
    else:
        encoded = [line for line in content.split(b"\n") if line.strip()]
    _check_count(len(encoded))
    return (_item(bytes(item), type, limit) for item in encoded)


def _check_count(count: int) -> None:
    if count > BULK_ITEMS:
        raise TooLargeError(f"{count} items in one request; the limit is {BULK_ITEMS}, send several", limit=BULK_ITEMS)


def _item(encoded: bytes, type: type[T], limit: int) -> T | AqDataError:
    if len(encoded) > limit:
        return TooLargeError(f"the item has {len(encoded)} bytes; the limit here is {limit}", limit=limit)
    try:
        return decode_json(encoded, type, "item")
    except ValidationError as exc:
        return exc


def _answer(request: AnyRequest, outcomes: AsyncIterator[list[Outcome]]) -> Stream:
    """`results` as they come: a thousand documents need not fit in memory together."""
    path, request_id = request.url.path, request.scope.get("state", {}).get("request_id", "")

    def result(outcome: Outcome) -> bytes:
        if outcome.error is not None:
            problem = problem_of(outcome.error, path, request_id)
            return msgspec.json.encode({"status": problem.status, "error": problem})
        if outcome.document is None:
            return b'{"status":204}'
        return msgspec.json.encode({"status": 201 if outcome.is_new else 200, "document": outcome.document})

    async def pieces() -> AsyncIterator[bytes]:
        before = b'{"results":['
        async for several in outcomes:
            yield before + b",".join(map(result, several))
            before = b","
        yield (b'{"results":[' if before != b"," else b"") + b"]}"

    return Stream(pieces(), media_type=JSON)


resolve(Wanted)
