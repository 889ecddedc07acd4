"""What the OpenAPI document says beyond the handlers' signatures: bodies that stream, every status, media types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
)
from litestar.openapi.spec.enums import OpenAPIFormat, OpenAPIType

from aq_server.problems import PROBLEM_JSON, Problem

__all__ = ["header", "json_object", "operation", "refusals"]

_REFUSALS = {
    400: "The selection, query or cursor cannot be understood.",
    401: "No token, or one that is not valid.",
    403: "The token lacks the scope, or Host or Origin is foreign.",
    404: "No such DataFile, array or file, or it was deleted.",
    405: "The method is not one of this address.",
    406: "None of the accepted media types can carry this.",
    409: "It contradicts what is stored.",
    412: "The document changed since that revision.",
    413: "Over a limit.",
    415: "Not a media type this address reads.",
    416: "The range lies outside the content.",
    422: "What was sent cannot be kept as it is.",
    429: "Too many requests.",
    500: "The server or its storage failed.",
    503: "Not available now; try again.",
}
_ALWAYS = (400, 401, 403, 405, 422, 429, 500, 503)


def refusals(*statuses: int) -> dict[int, ResponseSpec]:
    """The `responses` of a route: those any route may give and these."""
    return {
        status: ResponseSpec(
            Problem,
            description=_REFUSALS[status],
            media_type=PROBLEM_JSON,
            generate_examples=False,
        )
        for status in sorted({*_ALWAYS, *statuses})
    }


def json_object(description: str, properties: dict[str, Schema] | None = None, example: Any = None) -> Schema:
    """The schema of a JSON object, open to further members unless `properties` are given."""
    return Schema(
        type=OpenAPIType.OBJECT,
        description=description,
        properties=dict(properties) if properties else None,
        additional_properties=None if not properties else False,
        example=example,
    )


BINARY = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)


def header(name: str, description: str) -> Parameter:
    """An optional request header."""
    return Parameter(
        name=name, param_in="header", description=description, required=False, schema=Schema(type=OpenAPIType.STRING)
    )


RANGE_HEADERS = (
    header("Range", "`bytes=a-b`, `bytes=a-` or `bytes=-n`."),
    header("If-Range", "An ETag: the range is asked for as long as this is the content's; everything otherwise."),
    header("If-None-Match", "An ETag."),
)


def operation(
    *,
    body: dict[str, Schema] | None = None,
    success: dict[int, tuple[str, dict[str, Schema]]] | None = None,
    headers: tuple[Parameter, ...] = (),
) -> type[Operation]:
    """An operation class that states the request body by media type, the successes, and request headers."""

    @dataclass
    class Described(Operation):
        def __post_init__(self) -> None:
            if body is not None:
                content = {media: OpenAPIMediaType(schema=schema) for media, schema in body.items()}
                self.request_body = RequestBody(content=content, required=True)
            if headers:
                self.parameters = [*(self.parameters or []), *headers]
            responses: dict[str, OpenAPIResponse | Reference] = dict(self.responses or {})
            for status, (description, media_types) in (success or {}).items():
                content = {media: OpenAPIMediaType(schema=schema) for media, schema in media_types.items()}
                responses[str(status)] = OpenAPIResponse(description=description, content=content or None)
            for response in responses.values():
                if isinstance(response, OpenAPIResponse):
                    response.headers = {**(response.headers or {}), **_request_id()}
            self.responses = responses

    return Described


def _request_id() -> dict[str, OpenAPIHeader | Reference]:
    return {"Request-Id": OpenAPIHeader(schema=Schema(type=OpenAPIType.STRING), description="Names the request in the log.")}
