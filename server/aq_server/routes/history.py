"""What differs between DataFiles, and what became of one."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery

from aq_data.models.structs import resolve
from aq_data.wire.codec import JSON
from aq_data.wire.routes import DATAFILES
from aq_server.config import ServerConfig
from aq_server.routes.bodies import if_match, json_body
from aq_server.routes.datafiles import document_response
from aq_server.routes.openapi import header, json_object, operation, refusals
from aq_server.service.comparing import Comparing
from aq_server.service.growing import Growing
from aq_server.service.history import History

__all__ = ["ComparisonRoutes", "HistoryRoutes"]

_DIFFERENCE = (
    "`path` (as filters take it), `before`, `after` (absent where there is nothing), `before_unit`, `after_unit`; `at` has, "
    "for each list on the way, the number of keys before it and the position."
)

_VARIATIONS = json_object(
    "In order of paths: `path` (and `at`) with `values`, one {value, unit} for each id, {} where there is nothing."
)


class CompareRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The DataFiles to compare."""

    ids: list[str]


class RevertRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The revision to go back to."""

    revision: int


class ComparisonRoutes(Controller):
    """`/datafiles/{id}/diff/{other}` and `/datafiles/compare`, a post that only reads."""

    path = DATAFILES
    tags = ["Comparison"]

    @get(
        "/{datafile_id:str}/diff/{other_id:str}",
        operation_id="diffDataFiles",
        summary="Which settings and fields differ between two DataFiles",
        description="Compares typed fields, metadata, attributes, state, and arrays and files by name: not the values of "
        "arrays, how they are stored, nor what the server sets (id, revision, times, size, path, store, sweep). "
        + _DIFFERENCE,
        responses=refusals(404),
        operation_class=operation(
            success={200: ("`before`, `after` (the ids), `differences`.", {JSON: json_object("In order of paths.")})}
        ),
    )
    async def diff(
        self, comparing: NamedDependency[Comparing], datafile_id: FromPath[str], other_id: FromPath[str]
    ) -> Response[bytes]:
        found = await comparing.diff(datafile_id, other_id)
        answer = {"before": datafile_id, "after": other_id, "differences": found}
        return Response(msgspec.json.encode(answer), media_type=JSON, headers={"Cache-Control": "no-cache"})

    @post(
        "/compare",
        operation_id="compareDataFiles",
        summary="Which settings and fields vary among many DataFiles",
        status_code=200,
        request_max_body_size=None,
        responses=refusals(404, 413, 415),
        operation_class=operation(
            body={JSON: json_object("`ids`: up to 1000.", example={"ids": []})},
            success={200: ("`ids` and `variations`.", {JSON: _VARIATIONS})},
        ),
    )
    async def compare(
        self, request: Request[Any, Any, Any], comparing: NamedDependency[Comparing], config: NamedDependency[ServerConfig]
    ) -> Response[bytes]:
        wanted = await json_body(request, CompareRequest, config.max_document_bytes)
        answer = {"ids": wanted.ids, "variations": await comparing.compare(wanted.ids)}
        return Response(msgspec.json.encode(answer), media_type=JSON)


class HistoryRoutes(Controller):
    """`/datafiles/{id}/revisions` and `/datafiles/{id}/revert`."""

    path = f"{DATAFILES}/{{datafile_id:str}}"
    tags = ["History"]

    @get(
        "/revisions",
        operation_id="listRevisions",
        summary="The changes of a DataFile, newest first",
        description="Each with the `revision` it made, `at`, `actor` (the user of the token) and `differences`: "
        + _DIFFERENCE
        + " `next` is the `before` of the next page; a page of large changes is shorter than `limit`. Also of a DataFile "
        "that was deleted.",
        responses=refusals(404),
        operation_class=operation(success={200: ("`items`, `next`.", {JSON: json_object("One page.")})}),
    )
    async def revisions(
        self,
        history: NamedDependency[History],
        datafile_id: FromPath[str],
        limit: FromQuery[int] = 100,
        before: FromQuery[int | None] = None,
    ) -> Response[bytes]:
        changes = await history.changes(datafile_id, limit, before)
        following = changes[-1].revision if changes and changes[-1].revision > 2 else None  # 2 is what the first change made
        answer = {"items": changes, "next": following}
        return Response(msgspec.json.encode(answer), media_type=JSON, headers={"Cache-Control": "no-cache"})

    @post(
        "/revert",
        operation_id="revertDataFile",
        summary="Give a DataFile the typed fields and the metadata of an old revision, as a new one",
        description="Arrays, files and state stay. When nothing would change there is no new revision.",
        status_code=200,
        responses=refusals(404, 409, 412, 413, 415),
        operation_class=operation(
            body={JSON: json_object("`revision`.", example={"revision": 1})},
            success={200: ("The document.", {JSON: json_object("As `GET` answers it.")})},
            headers=(header("If-Match", "The revision that is meant to be current; 412 if it is not."),),
        ),
    )
    async def revert(
        self,
        request: Request[Any, Any, Any],
        history: NamedDependency[History],
        growing: NamedDependency[Growing],
        datafile_id: FromPath[str],
    ) -> Response[bytes]:
        wanted = await json_body(request, RevertRequest, 1 << 20)
        user = request.scope["state"].get("user")
        changed = await history.revert(datafile_id, wanted.revision, if_match(request), user)
        return document_response(await growing.present(changed), 200)


resolve(CompareRequest, RevertRequest)
