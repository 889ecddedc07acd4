"""See, add and take away stores."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Controller, Request, Response, delete, get, put
from litestar.di import NamedDependency
from litestar.params import FromPath

from aq_data.models.structs import resolve
from aq_data.wire.codec import JSON
from aq_data.wire.routes import STORES
from aq_server.routes.bodies import json_body
from aq_server.routes.openapi import json_object, operation, refusals
from aq_server.service.stores import StoreAdmin

__all__ = ["StoreRoutes"]

_STATUS = json_object(
    "`name`, `kind` (folder, gs, s3, memory), `root`, `origin` (configured, added), `default_for` (kinds; `*` for all "
    'others), `datafiles` (exact up to 10,000: `datafiles_is_exact`), `state` ("ok", "closing", or what is wrong), '
    "`fallback` (the store that takes new DataFiles while this one does not answer), `waiting` (DataFiles that lie "
    "elsewhere until they are brought here)."
)


class NewStore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a store is to lie."""

    root: str


class StoreRoutes(Controller):
    """`/stores` and `/stores/{name}`."""

    path = STORES
    tags = ["Stores"]

    @get(
        operation_id="listStores",
        summary="The places in which blobs lie",
        responses=refusals(),
        operation_class=operation(
            success={200: ("All of them.", {JSON: json_object("`items`, each with what `putStore` answers.")})}
        ),
    )
    async def all(self, stores: NamedDependency[StoreAdmin]) -> Response[bytes]:
        items = await stores.list()
        return Response(msgspec.json.encode({"items": items}), media_type=JSON, headers={"Cache-Control": "no-store"})

    @put(
        "/{name:str}",
        operation_id="putStore",
        summary="Add a store, or give one in which nothing lies another root",
        description="Needs the scope admin. The root is one that `store_roots` of the configuration allows. All servers of "
        "the deployment know it at once. Stores of the configuration cannot be changed here.",
        responses=refusals(409, 413, 415),
        operation_class=operation(
            body={JSON: json_object("`root`.", example={"root": "/data/archive"})},
            success={201: ("Added.", {JSON: _STATUS}), 200: ("It was there.", {JSON: _STATUS})},
        ),
    )
    async def put(
        self, request: Request[Any, Any, Any], stores: NamedDependency[StoreAdmin], name: FromPath[str]
    ) -> Response[bytes]:
        wanted = await json_body(request, NewStore, 1 << 16)
        status, is_new = await stores.put(name, wanted.root)
        return Response(msgspec.json.encode(status), status_code=201 if is_new else 200, media_type=JSON)

    @delete(
        "/{name:str}",
        operation_id="deleteStore",
        summary="Take away a store in which nothing lies",
        description="Needs the scope admin. 409 while a DataFile or anything else lies there, or while it is a default.",
        responses=refusals(404, 409),
    )
    async def remove(self, stores: NamedDependency[StoreAdmin], name: FromPath[str]) -> None:
        await stores.remove(name)


resolve(NewStore)
