"""Reading requests: bodies within limits, JSON into structs, multipart as it streams, If-Match."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
import multipart
from litestar import Request

from aq_data.errors import TooLargeError, UnsupportedMediaError, ValidationError

__all__ = ["FormPart", "body_bytes", "body_pieces", "form_events", "if_match", "json_body", "matches_etag"]

T = TypeVar("T")
AnyRequest = Request[Any, Any, Any]

PART_HEADER_BYTES = 8192
MAX_PARTS = 4096


async def body_pieces(request: AnyRequest, limit: int) -> AsyncIterator[bytes]:
    """The body as it comes. TooLargeError as soon as it is known to be over `limit` bytes, announced or not."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise TooLargeError(f"the body has {announced} bytes; the limit here is {limit}", limit=limit)
    received = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ValidationError("the connection closed before the body was complete")
        if message["type"] == "http.request":
            piece = message["body"]
            received += len(piece)
            if received > limit:
                raise TooLargeError(f"the body is over the limit of {limit} bytes", limit=limit)
            more = message.get("more_body", False)
            if piece:
                yield piece


def media_type(request: AnyRequest) -> str:
    """The body's media type without parameters, lower case."""
    return request.headers.get("content-type", "").split(";", 1)[0].strip().lower()


async def json_body(request: AnyRequest, type: type[T], limit: int, media: tuple[str, ...] = ("application/json",)) -> T:
    """The body decoded into `type`; ValidationError says where it does not fit."""
    if media_type(request) not in media:
        raise UnsupportedMediaError(f"send the body as {' or '.join(media)}")
    return decode_json(await body_bytes(request, limit), type, "body")


async def body_bytes(request: AnyRequest, limit: int) -> bytes:
    """The whole body, in memory."""
    content = bytearray()
    async for piece in body_pieces(request, limit):
        content += piece
    return bytes(content)


def decode_json(content: bytes, type: type[T], what: str) -> T:
    """JSON into `type`, strictly; ValidationError names `what` and the place."""
    try:
        return msgspec.json.decode(content, type=type)
    except msgspec.ValidationError as exc:
        raise ValidationError(f"the {what} does not fit: {exc}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ValidationError(f"the {what} is not valid JSON: {exc}") from exc


def if_match(request: AnyRequest) -> int | None:
    """The revision that `If-Match` names, None without it or with `*`; of `"3-120"` (an open sweep) it is the 3."""
    text = request.headers.get("if-match", "").strip()
    if text in ("", "*"):
        return None
    number = text.removeprefix("W/").strip('"')
    number = number.partition("-")[0] or number
    if not number.isascii() or not number.isdigit() or len(number) > 18:
        raise ValidationError(f'If-Match takes the revision, as in "3", not {text[:40]!r}')
    return int(number)


def matches_etag(request: AnyRequest, etag: str) -> bool:
    """Whether `If-None-Match` holds `etag` (with its quotes), so that 304 is the answer."""
    given = request.headers.get("if-none-match", "")
    return given.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in given.split(","))


@dataclass(frozen=True, slots=True)
class FormPart:
    """The head of one form part; its bytes follow as `bytes` events."""

    name: str
    filename: str | None
    content_type: str


async def form_events(request: AnyRequest, limit: int) -> AsyncIterator[FormPart | memoryview | None]:
    """multipart/form-data as it streams: a `FormPart`, its bytes in pieces, then None, for each part in turn."""
    kind, options = multipart.parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get("boundary", "")
    if kind != "multipart/form-data" or not 1 <= len(boundary) <= 200:
        raise UnsupportedMediaError("send multipart/form-data with a boundary")
    parser = multipart.PushMultipartParser(
        boundary,
        max_segment_size=limit,
        max_segment_count=MAX_PARTS,
        max_header_size=PART_HEADER_BYTES,
        strict=True,
    )
    try:
        async for piece in body_pieces(request, limit):
            for event in parser.parse(piece):
                yield _form_event(event)
        for event in parser.parse(b""):
            yield _form_event(event)
    except (multipart.MultipartError, ValueError) as exc:
        raise ValidationError(f"the multipart body is malformed: {exc}") from exc
    finally:
        parser.close(check_complete=False)


_EXTENDED_NAME = re.compile(r"filename\*=UTF-8''([^;\s]+)", re.IGNORECASE)


def _form_event(event: Any) -> FormPart | memoryview | None:
    if isinstance(event, multipart.MultipartSegment):
        content_type = event.header("Content-Type", "application/octet-stream") or "application/octet-stream"
        extended = _EXTENDED_NAME.search(event.header("Content-Disposition") or "")
        return FormPart(event.name or "", unquote(extended[1]) if extended else event.filename, content_type)
    return None if event is None else memoryview(event)
