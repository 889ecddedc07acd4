"""Errors as RFC 9457 problem documents: the one table from what went wrong to what HTTP says."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from aq_data.errors import (
    AqDataError,
    AuthenticationError,
    ForbiddenError,
    NotFoundError,
    RangeError,
    RateLimitError,
    TooLargeError,
    UnavailableError,
    UnsupportedMediaError,
    ValidationError,
)
from aq_data.models.structs import resolve

__all__ = ["PROBLEM_JSON", "Problem", "handle", "problem_headers", "problem_of"]

PROBLEM_JSON = "application/problem+json"
RETRY_AFTER = "1"

log = logging.getLogger("aq_data")


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of every answer that is not a success. `code` is stable; `details` holds what a program may need."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool
    instance: str
    request_id: str
    details: dict[str, Any] = {}


# Litestar's own refusals, by status, as the errors of our tree.
_BY_STATUS: dict[int, type[AqDataError]] = {
    400: ValidationError,
    401: AuthenticationError,
    403: ForbiddenError,
    404: NotFoundError,
    413: TooLargeError,
    415: UnsupportedMediaError,
    422: ValidationError,
    429: RateLimitError,
    503: UnavailableError,
}


def as_error(exc: Exception) -> tuple[AqDataError, int]:
    """Our error for any exception, and its status. What nobody foresaw is `internal`, and says nothing of its cause."""
    if isinstance(exc, AqDataError):
        return exc, exc.status_hint
    if isinstance(exc, ValidationException):
        reasons = "; ".join(
            f"{e.get('key', '')}: {e['message']}" if isinstance(e, dict) else str(e) for e in exc.extra or []
        )
        return ValidationError(reasons or exc.detail), 422
    if isinstance(exc, HTTPException) and exc.status_code < 500:
        cls = _BY_STATUS.get(exc.status_code)
        if cls is not None:
            return cls(exc.detail or HTTPStatus(exc.status_code).phrase), exc.status_code
        return AqDataError(exc.detail or HTTPStatus(exc.status_code).phrase, code="invalid"), exc.status_code
    return AqDataError("the server failed in a way nobody foresaw; its log has the request id"), 500


def problem_of(exc: Exception, path: str, request_id: str) -> Problem:
    """The problem document of an exception."""
    error, status = as_error(exc)
    if status >= 500:
        fields = {"request_id": request_id, "path": path, "code": error.code}
        if isinstance(error, UnavailableError):
            # What waiting may mend says itself what is down, and an outage says it as often as there are requests.
            log.warning("request refused", extra={"fields": {**fields, "error": error.message}})
        else:
            log.error("request failed", exc_info=exc, extra={"fields": fields})
    return Problem(
        type=f"urn:aq-data:error:{error.code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=error.message,
        code=error.code,
        retryable=error.retryable,
        instance=path,
        request_id=request_id,
        details=error.details,
    )


def problem_headers(exc: Exception, status: int) -> dict[str, str]:
    """The headers a status obliges to."""
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = RETRY_AFTER
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="aq-data"'
    if status == 416 and isinstance(exc, RangeError):
        headers["Content-Range"] = f"bytes */{exc.details['size']}"
    if status == 405:
        own = {name.lower(): value for name, value in (getattr(exc, "headers", None) or {}).items()}
        headers["Allow"] = own.get("allow", "")
    return headers


def handle(request: Request[Any, Any, Any], exc: Exception) -> Response[bytes]:
    """Litestar's handler for every exception that leaves a route."""
    problem = problem_of(exc, request.url.path, request.scope.get("state", {}).get("request_id", ""))
    return Response(
        content=msgspec.json.encode(problem),
        status_code=problem.status,
        media_type=PROBLEM_JSON,
        headers=problem_headers(exc, problem.status),
    )


resolve(Problem)
