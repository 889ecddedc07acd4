"""One bucket of a provider, as single requests, and what its failures mean."""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aq_data.errors import AqDataError, NotFoundError, StorageError, UnavailableError
from aq_data.storage.arrays.blobs import BlobEntry

__all__ = [
    "CONNECT_SECONDS",
    "SILENT_SECONDS",
    "Bucket",
    "Page",
    "Parts",
    "RefusedError",
    "TruncatedError",
    "asking",
    "refusal",
    "translate",
]

T = TypeVar("T")

CONNECT_SECONDS = 5.0
"""For a connection to be made."""
SILENT_SECONDS = 15.0
"""Without a byte of an answer a request has failed, …"""
TOTAL_SECONDS = 30.0
"""… and with all its repetitions after so many, beyond the time that its bytes take at the rate below."""
LEAST_BYTES_PER_SECOND = 1 << 20
ATTEMPTS = 5
FIRST_PAUSE = 0.1
"""Seconds before the first repetition, at random up to twice as much; each later one waits three times longer."""


class RefusedError(Exception):
    """The provider answered a request with an error."""

    def __init__(self, status: int, code: str = "", text: str = "") -> None:
        super().__init__(status, code, text)
        self.status, self.code, self.text = status, code, text


class TruncatedError(Exception):
    """Fewer bytes came than were announced."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing: blobs, names that have blobs below, and where the next part begins ("" at the end)."""

    entries: list[BlobEntry]
    folders: list[str]
    following: str


class Parts(ABC):
    """A blob on its way in parts, which stands under its key once the last has arrived."""

    @abstractmethod
    async def send(self, data: bytes, is_last: bool) -> None:
        """The next part; asked again after a failure with the same arguments."""

    @abstractmethod
    async def abort(self) -> None:
        """Let the provider forget the parts."""


class Bucket(ABC):
    """Single requests. They raise what the provider's library raises, or `RefusedError`; all may be repeated.

    `RefusedError` with status 404 and no code does not say whether the key or the whole bucket is absent.
    """

    failures: tuple[type[Exception], ...]
    """What the library raises."""
    passing: tuple[type[Exception], ...]
    """Those of them that waiting may mend, …"""
    lasting: tuple[type[Exception], ...]
    """… but for these."""
    deleted_at_once: int
    """Keys that one request can delete."""

    @abstractmethod
    async def put(self, key: str, data: bytes | bytearray | memoryview) -> None: ...

    @abstractmethod
    async def get(self, key: str, start: int, stop: int | None) -> bytes:
        """The bytes in [start, stop), where `stop` is beyond `start`; fewer where the blob ends, none beyond its end."""

    @abstractmethod
    async def size(self, key: str) -> int: ...

    @abstractmethod
    async def copy(self, source: str, target: str) -> None:
        """Copy inside the bucket; what stands under the target stays."""

    @abstractmethod
    async def page(self, prefix: str, delimiter: str, following: str, limit: int = 1000) -> Page: ...

    @abstractmethod
    async def delete(self, keys: Sequence[str]) -> None:
        """At most `deleted_at_once`; those that are not there are passed over."""

    @abstractmethod
    async def begin(self, key: str) -> Parts: ...

    @staticmethod
    @abstractmethod
    def refusal(exc: BaseException) -> RefusedError | None:
        """The answer that an error of the library stands for, if it does."""

    @abstractmethod
    async def close(self) -> None: ...


def refusal(bucket: Bucket | type[Bucket], exc: BaseException | None) -> RefusedError | None:
    """The answer that a failed request was given, if it was given one."""
    if exc is None or isinstance(exc, RefusedError):
        return exc
    return bucket.refusal(exc)


_ABSENT = "NoSuchKey"
_PASSING_CODES = frozenset(
    {"InternalError", "NoSuchUpload", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
)
_PASSING_STATUSES = frozenset({408, 409, 425, 429})
_WAYS_OUT = {
    301: "the bucket is in another region or at another endpoint; correct the configuration",
    307: "the bucket is in another region or at another endpoint; correct the configuration",
    401: "its credentials are not accepted; check them, and this machine's clock",
    403: "access is forbidden; check its credentials and what they may do there",
    404: "there is no such bucket, or its endpoint is another service; make it, or correct the configuration",
}


def translate(bucket: Bucket | type[Bucket], address: str, exc: BaseException, key: str) -> AqDataError:
    """Our error for the library's: absence of the key, what waiting may mend, and what the operator must."""
    refused = refusal(bucket, exc)
    if refused is not None:
        return _of_answer(refused, address, key)
    name = type(exc).__name__
    text = " ".join(str(exc).split()) or "no further word"
    if isinstance(exc, (TimeoutError, TruncatedError, *bucket.passing)) and not isinstance(exc, bucket.lasting):
        return UnavailableError(f"{address} did not answer at {key!r} ({name}: {text}); try again")
    return StorageError(f"{address} cannot be used at {key!r} ({name}: {text}); check its configuration")


def _of_answer(refused: RefusedError, address: str, key: str) -> AqDataError:
    said = ", ".join(part for part in (str(refused.status), refused.code, " ".join(refused.text.split())[:200]) if part)
    if refused.code == _ABSENT:
        return NotFoundError(f"there is no blob {key!r} in {address}")
    if refused.status >= 500 or refused.status in _PASSING_STATUSES or refused.code in _PASSING_CODES:
        return UnavailableError(f"{address} cannot answer now at {key!r} ({said}); try again")
    way_out = _WAYS_OUT.get(refused.status, "look at its settings")
    return StorageError(f"{address} refused {key!r} ({said}): {way_out}")


async def asking(bucket: Bucket, address: str, key: str, call: Callable[[], Awaitable[T]], nbytes: int = 0) -> T:
    """What `call` returns, repeated while that may help and there is time; `nbytes` is what it moves."""
    expected: tuple[type[Exception], ...] = (RefusedError, TruncatedError, TimeoutError, *bucket.failures)
    pause = FIRST_PAUSE
    until = time.monotonic() + TOTAL_SECONDS + nbytes / LEAST_BYTES_PER_SECOND
    for attempt in range(1, ATTEMPTS + 1):
        try:
            async with asyncio.timeout(max(0.1, until - time.monotonic())):
                return await call()
        except expected as exc:
            error = translate(bucket, address, exc, key)
            if not error.retryable or attempt == ATTEMPTS or time.monotonic() + 2 * pause > until:
                raise error from exc
        await asyncio.sleep(pause * (1 + random.random()))  # noqa: S311
        pause *= 3
    raise AssertionError("the last attempt returns or raises")
