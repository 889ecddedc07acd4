"""Every error aq-data raises, grouped by what the catcher will do about it.

    AqDataError                       tell the operator        500  internal
     ├─ NotFoundError (KeyError)      look elsewhere           404  not_found, deleted
     ├─ SelectionError (IndexError)   correct the selection    400  bad_selection
     ├─ QueryError (ValueError)       correct the query        400  bad_query, bad_cursor
     ├─ ValidationError (ValueError)  correct what was sent    422  invalid, unsupported_dtype, bad_name
     ├─ ConflictError                 decide which one counts  409  id_taken, finished, illegal_state, missing_blocks, in_use
     ├─ StaleRevisionError            read again, then change  412  stale_revision
     ├─ RangeError                    ask for a range inside   416  bad_range
     ├─ TooLargeError                 send less                413  too_large
     ├─ NotAcceptableError            ask for another format   406  not_acceptable
     ├─ UnsupportedMediaError         send another format      415  unsupported_media
     ├─ AuthenticationError           present a token          401  unauthenticated
     ├─ ForbiddenError                ask for the right scope  403  forbidden
     ├─ RateLimitError                slow down                429  rate_limited
     ├─ StorageError                  call the operator        500  storage
     ├─ CorruptionError               restore from a copy      500  corrupt
     ├─ UnavailableError              try again                503  unavailable
     └─ ConfigError                   mend the configuration     –  bad_config

A `code` is stable and append-only: clients may branch on it. `status_hint` is what an HTTP server should answer; nothing
here speaks HTTP. Details a program may need (the current revision, the real shape) are in `details`.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "ERROR_CODES",
    "AqDataError",
    "AuthenticationError",
    "ConfigError",
    "ConflictError",
    "CorruptionError",
    "ForbiddenError",
    "NotAcceptableError",
    "NotFoundError",
    "QueryError",
    "RangeError",
    "RateLimitError",
    "SelectionError",
    "StaleRevisionError",
    "StorageError",
    "TooLargeError",
    "UnavailableError",
    "UnsupportedMediaError",
    "ValidationError",
    "error_from_code",
]


class AqDataError(Exception):
    """The root. `message` says what was wrong and the way out; `code` is the first of `codes` unless named."""

    codes: ClassVar[tuple[str, ...]] = ("internal",)
    status_hint: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, code: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else self.codes[0]
        self.details = details

    # KeyError would show the message's repr; ours is meant to be read.
    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.code, self.details)


def _rebuild(cls: type[AqDataError], message: str, code: str, details: dict[str, Any]) -> AqDataError:
    return cls(message, code=code, **details)


class NotFoundError(AqDataError, KeyError):
    """No such DataFile, array or file; code `deleted` when a tombstone stands in its place."""

    codes = ("not_found", "deleted")
    status_hint = 404


class SelectionError(AqDataError, IndexError):
    """The selection does not fit the array; `details["shape"]` is the array's real shape."""

    codes = ("bad_selection",)
    status_hint = 400


class QueryError(AqDataError, ValueError):
    """The filter, sort, text or cursor cannot be understood; the message names the place inside the query."""

    codes = ("bad_query", "bad_cursor")
    status_hint = 400


class ValidationError(AqDataError, ValueError):
    """What was sent cannot be kept as it is; nothing was stored."""

    codes = ("invalid", "unsupported_dtype", "bad_name")
    status_hint = 422


class ConflictError(AqDataError):
    """The request contradicts what is stored: the id holds other content, the arrays are finished, blocks are missing, a
    store is in use.

    With `missing_blocks`, `details["known"]` is the last number of the writer that is stored.
    """

    codes = ("id_taken", "finished", "illegal_state", "missing_blocks", "in_use")
    status_hint = 409


class StaleRevisionError(AqDataError):
    """The document changed since it was read; `details["revision"]` is the current revision."""

    codes = ("stale_revision",)
    status_hint = 412


class RangeError(AqDataError):
    """A byte range outside the content; `details["size"]` is the content's length in bytes."""

    codes = ("bad_range",)
    status_hint = 416


class TooLargeError(AqDataError):
    """A body, document or result is over a limit, which the message names."""

    codes = ("too_large",)
    status_hint = 413


class NotAcceptableError(AqDataError):
    """None of the accepted media types can carry this array."""

    codes = ("not_acceptable",)
    status_hint = 406


class UnsupportedMediaError(AqDataError):
    """The body's media type is not one this address reads."""

    codes = ("unsupported_media",)
    status_hint = 415


class AuthenticationError(AqDataError):
    """No token, or one that is unknown, expired or revoked."""

    codes = ("unauthenticated",)
    status_hint = 401


class ForbiddenError(AqDataError):
    """The token lacks the scope, or the Host or Origin is foreign to an open server."""

    codes = ("forbidden",)
    status_hint = 403


class RateLimitError(AqDataError):
    """Too many requests from one client; wait as long as Retry-After says."""

    codes = ("rate_limited",)
    status_hint = 429
    retryable = True


class StorageError(AqDataError):
    """The database or the blob store failed in a way that waiting will not mend."""

    codes = ("storage",)


class CorruptionError(AqDataError):
    """Stored bytes are missing or do not match their checksum; never answered with fill values."""

    codes = ("corrupt",)


class UnavailableError(AqDataError):
    """The server, the database or the blob store cannot be reached now; the same request may succeed later."""

    codes = ("unavailable",)
    status_hint = 503
    retryable = True


class ConfigError(AqDataError):
    """The configuration cannot be used; the message names the key and where it was set."""

    codes = ("bad_config",)


_CLASSES: list[type[AqDataError]] = [AqDataError, *AqDataError.__subclasses__()]

ERROR_CODES: dict[str, type[AqDataError]] = {code: cls for cls in _CLASSES for code in cls.codes}
"""Every stable code and the class that carries it."""


def error_from_code(code: str, message: str, details: dict[str, Any] | None = None) -> AqDataError:
    """The error a peer raised, rebuilt on this side; an unknown code (a newer peer) gives the root class."""
    return ERROR_CODES.get(code, AqDataError)(message, code=code, **(details or {}))
