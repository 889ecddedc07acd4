"""Google Cloud Storage: credentials, sessions and addresses are gcsfs's, each request is one of the JSON API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import google.auth.exceptions
import requests.exceptions
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError, NonRetryableError
from yarl import URL

from aq_data.storage.arrays._bucket import CONNECT_SECONDS, Bucket, Page, Parts, RefusedError, TruncatedError
from aq_data.storage.arrays.blobs import BlobEntry

__all__ = ["GcsBucket"]

BINARY = {"Content-Type": "application/octet-stream"}
PIECE = 1 << 18
"""Bytes that are given to a connection at a time, so that the event loop has its turns."""


class GcsBucket(Bucket):
    """A bucket of Google Cloud Storage."""

    failures = (
        aiohttp.ClientError,
        OSError,
        google.auth.exceptions.GoogleAuthError,
        requests.exceptions.RequestException,
        HttpError,
        NonRetryableError,
        ValueError,
    )
    passing = (
        aiohttp.ClientConnectionError,
        aiohttp.ClientPayloadError,
        ConnectionError,
        google.auth.exceptions.TransportError,
        requests.exceptions.ConnectionError,
        requests.exceptions.Timeout,
    )
    deleted_at_once = 100

    def __init__(self, name: str, options: dict[str, Any], connections: int) -> None:
        """`options` are those of gcsfs. To be made inside the event loop that asks."""
        self._name = quote(name, safe="")
        self._fs = GCSFileSystem(
            asynchronous=True,
            skip_instance_cache=True,
            use_listings_cache=False,
            session_kwargs={
                "connector": aiohttp.TCPConnector(limit=connections),
                "timeout": aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=20.0),
                "auto_decompress": False,
            },
            **options,
        )
        self._base: str = self._fs._location  # noqa: SLF001  (gcsfs has no other word for the endpoint it found)

    async def _request(
        self, method: str, url: str, headers: dict[str, str] | None = None, data: Any = None, taken: tuple[int, ...] = ()
    ) -> tuple[int, Any, bytes]:
        """Status, headers and body of one request; `RefusedError` when the status is an error and not among `taken`."""
        session = await self._fs._set_session()  # noqa: SLF001
        sent = {"Accept-Encoding": "identity", **(headers or {})}
        credentials = self._fs.credentials
        if credentials.credentials is not None:
            if not credentials.credentials.valid:
                await asyncio.to_thread(credentials.maybe_refresh)  # it speaks HTTP with requests
            credentials.credentials.apply(sent)
        if data is not None:
            sent["Content-Length"] = str(len(data))
            data = data if len(data) <= PIECE else _pieces(data)
        async with session.request(method, URL(url, encoded=True), headers=sent, data=data, allow_redirects=False) as answer:
            body = await answer.read()
            announced = answer.headers.get("Content-Length")
            if announced is not None and method != "HEAD" and len(body) != int(announced):
                raise TruncatedError(f"{len(body)} of {announced} bytes came")
            if answer.status >= 300 and answer.status not in taken:
                raise _refused(answer.status, body)
            return answer.status, answer.headers, body

    def _object(self, key: str) -> str:
        return f"{self._base}/storage/v1/b/{self._name}/o/{quote(key, safe='')}"

    def _upload(self, key: str, kind: str) -> str:
        return f"{self._base}/upload/storage/v1/b/{self._name}/o?uploadType={kind}&name={quote(key, safe='')}"

    async def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        _, _, body = await self._request("POST", self._upload(key, "media"), BINARY, data)
        _check_size(body, len(data))

    async def get(self, key: str, start: int, stop: int | None) -> bytes:
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        status, answered, body = await self._request("GET", f"{self._object(key)}?alt=media", headers, taken=(416,))
        if status == 416:
            return b""
        if "Content-Length" not in answered:
            raise TruncatedError("the length of the blob was not announced")
        return body if status == 206 or not headers else body[start:stop]

    async def size(self, key: str) -> int:
        _, _, body = await self._request("GET", f"{self._object(key)}?fields=size")
        return int(json.loads(body)["size"])

    async def copy(self, source: str, target: str) -> None:
        token = ""
        while True:  # the provider copies large blobs in several steps
            more = f"&rewriteToken={quote(token, safe='')}" if token else ""
            url = (
                f"{self._object(source)}/rewriteTo/b/{self._name}/o/{quote(target, safe='')}"
                f"?ifGenerationMatch=0&fields=done,rewriteToken{more}"
            )
            status, _, body = await self._request("POST", url, taken=(412,))
            token = "" if status == 412 else json.loads(body).get("rewriteToken", "")
            if not token:
                return

    async def page(self, prefix: str, delimiter: str, following: str, limit: int = 1000) -> Page:
        query = {"prefix": prefix, "delimiter": delimiter, "pageToken": following, "maxResults": str(limit)}
        query["fields"] = "items(name,size,updated),prefixes,nextPageToken"
        url = f"{self._base}/storage/v1/b/{self._name}/o?{urlencode({k: v for k, v in query.items() if v}, quote_via=quote)}"
        _, _, body = await self._request("GET", url)
        answer = json.loads(body)
        entries = [
            BlobEntry(item["name"], int(item["size"]), datetime.fromisoformat(item["updated"]).timestamp())
            for item in answer.get("items", ())
        ]
        return Page(entries, answer.get("prefixes", []), answer.get("nextPageToken", ""))

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            await self._request("DELETE", self._object(key), taken=(404,))

    async def begin(self, key: str) -> Parts:
        _, headers, _ = await self._request("POST", self._upload(key, "resumable"), {"Content-Length": "0"})
        return _Session(self, headers["Location"])

    def refusal(self, exc: BaseException) -> RefusedError | None:
        if isinstance(exc, HttpError):  # from refreshing a token
            return RefusedError(int(exc.code or 401), "", str(exc))
        return None

    async def close(self) -> None:
        session = self._fs._session  # noqa: SLF001
        if session is not None:
            await session.close()


class _Session(Parts):
    """A resumable upload."""

    def __init__(self, bucket: GcsBucket, url: str) -> None:
        self._bucket, self._url = bucket, url
        self._sent = 0
        self._is_in_doubt = False

    async def send(self, data: bytes, is_last: bool) -> None:
        start, total = self._sent, self._sent + len(data)
        arrived = start
        if self._is_in_doubt:
            status, arrived = await self._put(f"bytes */{total if is_last else '*'}", b"")
            if status != 308:
                self._sent = total
                return
        if not start <= arrived <= total:
            raise TruncatedError(f"{arrived} of {start} bytes of an upload have arrived")
        self._is_in_doubt = True
        if arrived < total or is_last:
            content_range = f"bytes {arrived}-{total - 1}/{total if is_last else '*'}"
            status, arrived = await self._put(content_range, memoryview(data)[arrived - start :])
            if (status == 308) == is_last or (not is_last and arrived != total):
                raise TruncatedError(f"{arrived} of {total} bytes of an upload have arrived")
        self._sent, self._is_in_doubt = total, False

    async def _put(self, content_range: str, data: bytes | memoryview) -> tuple[int, int]:
        """The status and how many bytes have arrived in all."""
        headers = {"Content-Range": content_range, **BINARY}
        status, answered, _ = await self._bucket._request("PUT", self._url, headers, data, taken=(308,))  # noqa: SLF001
        last = answered.get("Range", "").rpartition("-")[2]
        return status, int(last) + 1 if last else 0

    async def abort(self) -> None:
        # 499 is how the provider says that it has forgotten the upload.
        await self._bucket._request("DELETE", self._url, {"Content-Length": "0"}, taken=(404, 410, 499))  # noqa: SLF001


async def _pieces(data: bytes | bytearray | memoryview) -> AsyncIterator[memoryview]:
    for start in range(0, len(data), PIECE):
        yield memoryview(data)[start : start + PIECE]


def _refused(status: int, body: bytes) -> RefusedError:
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        return RefusedError(status, error["errors"][0].get("reason", ""), error.get("message", ""))
    except (ValueError, LookupError, TypeError, AttributeError):
        return RefusedError(status, "", text)


def _check_size(body: bytes, size: int) -> None:
    try:
        stored = int(json.loads(body)["size"])
    except (ValueError, LookupError, TypeError) as exc:
        raise TruncatedError("the answer to an upload does not say how much was stored") from exc
    if stored != size:
        raise TruncatedError(f"{stored} of {size} bytes were stored")
