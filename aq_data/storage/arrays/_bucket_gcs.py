"""Google Cloud Storage: credentials, sessions and addresses are gcsfs's, each request is one of the JSON API."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import google.auth.exceptions
import requests.exceptions
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError, NonRetryableError
from google.oauth2.service_account import Credentials
from yarl import URL

from aq_data.storage.arrays._bucket import CONNECT_SECONDS, SILENT_SECONDS, Bucket, Page, Parts, RefusedError, TruncatedError
from aq_data.storage.arrays.blobs import BlobEntry

__all__ = ["GcsBucket"]

SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
BINARY = {"Content-Type": "application/octet-stream"}
BOUNDARY = "one-deletion"
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
    lasting = (aiohttp.ClientSSLError,)
    deleted_at_once = 100

    def __init__(self, name: str, options: dict[str, Any], key_file: str | None, connections: int) -> None:
        """`options` are those of gcsfs, `key_file` is that of a service account.

        To be made in a thread: it may look for credentials on the network.
        """
        self._name = quote(name, safe="")
        if key_file is not None:  # gcsfs would try a wrong one in other ways, and send it as a token
            token = Credentials.from_service_account_file(key_file, scopes=[SCOPE])  # type: ignore[no-untyped-call]
            options = {**options, "token": token}
        self._fs = GCSFileSystem(
            asynchronous=True,
            skip_instance_cache=True,
            use_listings_cache=False,
            **options,
        )
        self._connections = connections
        self._base: str = self._fs._location  # noqa: SLF001  (gcsfs has no other word for the endpoint it found)

    async def _session(self) -> aiohttp.ClientSession:
        if self._fs._session is None:  # noqa: SLF001
            self._fs.session_kwargs = {
                "connector": aiohttp.TCPConnector(limit=self._connections),
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS),
                "auto_decompress": False,
            }
        session: aiohttp.ClientSession = await self._fs._set_session()  # noqa: SLF001
        return session

    async def _request(
        self, method: str, url: str, headers: dict[str, str] | None = None, data: Any = None, taken: tuple[int, ...] = ()
    ) -> tuple[int, Any, bytes]:
        """Status, headers and body of one request; `RefusedError` when the status is an error and not among `taken`."""
        session = await self._session()
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
        if _size(body) != len(data):
            raise TruncatedError(f"{_size(body)} of {len(data)} bytes were stored")

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
        return _size(body)

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
        parts = [
            f"--{BOUNDARY}\r\nContent-Type: application/http\r\nContent-ID: <{i}>\r\n\r\n"
            f"DELETE /storage/v1/b/{self._name}/o/{quote(key, safe='')} HTTP/1.1\r\n\r\n\r\n"
            for i, key in enumerate(keys)
        ]
        data = "".join([*parts, f"--{BOUNDARY}--\r\n"]).encode()
        headers = {"Content-Type": f"multipart/mixed; boundary={BOUNDARY}"}
        _, _, body = await self._request("POST", f"{self._base}/batch/storage/v1", headers, data)
        statuses = [int(found) for found in re.findall(rb"^HTTP/1\.[01] (\d{3})", body, re.MULTILINE)]
        if len(statuses) != len(keys):
            raise TruncatedError(f"{len(statuses)} of {len(keys)} deletions were answered")
        for status in statuses:
            if status >= 300 and status != 404:
                raise RefusedError(status)
        if 404 in statuses:  # which may be that of the whole bucket
            await self.page("", "", "", 1)

    async def begin(self, key: str) -> Parts:
        _, headers, _ = await self._request("POST", self._upload(key, "resumable"), {"Content-Length": "0"})
        return _Session(self, headers["Location"])

    @staticmethod
    def refusal(exc: BaseException) -> RefusedError | None:
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
        arrived, is_done = start, False
        if self._is_in_doubt:  # a part is not simply sent again: how much of it has arrived is asked first
            arrived, is_done = await self._put(f"bytes */{total if is_last else '*'}", b"")
        self._is_in_doubt = True
        if start <= arrived < total and not is_done:
            content_range = f"bytes {arrived}-{total - 1}/{total if is_last else '*'}"
            arrived, is_done = await self._put(content_range, memoryview(data)[arrived - start :])
        if arrived != total or is_done != is_last:
            raise TruncatedError(f"{arrived} of {total} bytes of an upload have arrived")
        self._sent, self._is_in_doubt = total, False

    async def _put(self, content_range: str, data: bytes | memoryview) -> tuple[int, bool]:
        """How many bytes have arrived in all, and whether the blob is complete."""
        headers = {"Content-Range": content_range, **BINARY}
        status, answered, body = await self._bucket._request(  # noqa: SLF001
            "PUT", self._url, headers, data, taken=(308, 404, 410)
        )
        if status in (404, 410):
            raise RefusedError(status, "NoSuchUpload", "the upload was forgotten")
        if status != 308:
            return _size(body), True
        last = answered.get("Range", "").rpartition("-")[2]
        return int(last) + 1 if last else 0, False

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
        code, text = error["errors"][0].get("reason", ""), error.get("message", "")
    except (ValueError, LookupError, TypeError, AttributeError):
        code = ""
    if status == 404:  # the reason is "notFound" whatever is absent: an object, the bucket, or anything at that address
        code = "NoSuchKey" if text.startswith("No such object") else ""
    return RefusedError(status, code, text)


def _size(body: bytes) -> int:
    try:
        return int(json.loads(body)["size"])
    except (ValueError, LookupError, TypeError) as exc:
        raise TruncatedError("the answer does not say how large the blob is") from exc
