"""One HTTP conversation: retries, timeouts, and errors turned back into the classes the server raised."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

from aq_data.errors import AqDataError, StorageError, UnavailableError, error_from_code
from aq_data.models.structs import resolve

__all__ = ["TIMEOUT", "Body", "Http", "decoded"]

TIMEOUT = httpx.Timeout(300.0, connect=5.0)
"""A large save may spend minutes becoming durable before its answer begins."""
TRIES = 5
FIRST_PAUSE = 0.2
"""Seconds before the second try; doubled each time, with jitter so that many clients do not return at once."""


class _Problem(msgspec.Struct):
    code: str
    detail: str
    request_id: str = ""
    details: dict[str, Any] = {}


class Body:
    """A request body that can be sent again: `make` gives a fresh iterator of its bytes for each try."""

    def __init__(self, make: Callable[[], Iterator[bytes]], length: int, content_type: str) -> None:
        self.make, self.length, self.content_type = make, length, content_type


class Http:
    """Requests to one server.

    Connection failures, 429 and 503 are tried again a few times; then UnavailableError, or the error the server named.
    With `repeatable=False` a request is not sent twice once the server may have acted on it.
    """

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    @contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """A successful response whose body has not been read."""
        response = self._send(method, path, None, options)
        try:
            yield response
        except httpx.HTTPError as exc:
            # `broke` tells a reader that an answer had begun: a part of it may be what the server cannot give.
            raise UnavailableError(f"the connection broke while {method} {path} was answered: {exc}", broke=True) from exc
        finally:
            response.close()

    def request(
        self, method: str, path: str, body: Body | None = None, *, repeatable: bool = True, **options: Any
    ) -> httpx.Response:
        """A successful response, read whole."""
        for attempt in range(TRIES):
            response = self._send(method, path, body, options, repeatable)
            try:
                response.read()
                return response
            except httpx.HTTPError as exc:
                response.close()
                if attempt + 1 == TRIES or not repeatable:
                    raise UnavailableError(f"the connection broke while {method} {path} was answered: {exc}") from exc
        raise AssertionError("unreachable")

    def json(
        self,
        method: str,
        path: str,
        content: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        repeatable: bool = True,
        type: Any = Any,
    ) -> Any:
        """Send and receive JSON, as dicts and lists or as another `type`."""
        options: dict[str, Any] = {"headers": dict(headers or {})}
        if content is not None:
            options["content"] = msgspec.json.encode(content)
            options["headers"].setdefault("Content-Type", "application/json")
        response = self.request(method, path, repeatable=repeatable, **options)
        return None if response.status_code == httpx.codes.NO_CONTENT else decoded(response, type)

    def _send(
        self, method: str, path: str, body: Body | None, options: Mapping[str, Any], repeatable: bool = True
    ) -> httpx.Response:
        for attempt in range(TRIES):
            last = attempt + 1 == TRIES
            if self.client.is_closed:
                raise UnavailableError("this client was closed; connect again")
            try:
                response = self.client.send(self._build(method, path, body, options), stream=True)
                if not response.is_success:
                    response.read()  # a refusal that breaks off has not said what it refuses: it counts as no answer
            except (httpx.HTTPError, httpx.InvalidURL) as exc:
                not_sent = isinstance(exc, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
                if last or isinstance(exc, (httpx.UnsupportedProtocol, httpx.InvalidURL)) or not (repeatable or not_sent):
                    unknown = "" if repeatable or not_sent else "; whether it was done is unknown, read again to see"
                    reason = (str(exc) or type(exc).__name__) + unknown
                    raise UnavailableError(f"no answer from {self.client.base_url} to {method} {path}: {reason}") from exc
                _pause(attempt, None)
                continue
            if response.status_code in (429, 503) and not last:
                retry_after = response.headers.get("retry-after")
                response.close()
                _pause(attempt, retry_after)
                continue
            if not response.is_success:
                raise self._error(response)
            return response
        raise AssertionError("unreachable")

    def _build(self, method: str, path: str, body: Body | None, options: Mapping[str, Any]) -> httpx.Request:
        if body is None:
            return self.client.build_request(method, path, **options)
        headers = {
            **options.get("headers", {}),
            "Content-Type": body.content_type,
            "Content-Length": str(body.length),
        }
        return self.client.build_request(method, path, **{**options, "content": body.make(), "headers": headers})

    def _error(self, response: httpx.Response) -> AqDataError:
        try:
            problem = msgspec.json.decode(response.content, type=_Problem)
        except msgspec.DecodeError:
            cls = UnavailableError if response.status_code in (502, 503, 504) else StorageError  # a proxy before the server
            return cls(f"{response.request.method} {response.request.url} was answered {response.status_code}")
        finally:
            response.close()
        message = problem.detail
        if response.status_code >= 500 and problem.request_id:
            message += f" (request {problem.request_id})"
        return error_from_code(problem.code, message, problem.details)


def decoded(response: httpx.Response, type: Any = Any) -> Any:
    """The JSON of an answer; StorageError when something other than aq-data gave it."""
    try:
        return msgspec.json.decode(response.content, type=type)
    except msgspec.DecodeError as exc:
        raise StorageError(f"{response.request.url} was not answered by aq-data: {exc}") from exc


def _pause(attempt: int, retry_after: str | None) -> None:
    seconds = FIRST_PAUSE * 2**attempt * random.uniform(0.7, 1.3)  # noqa: S311  (jitter, not a secret)
    if retry_after is not None and retry_after.isdigit():
        seconds = max(seconds, min(float(retry_after), 30.0))
    time.sleep(seconds)


resolve(_Problem)
