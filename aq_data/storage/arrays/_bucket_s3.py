"""S3 and servers that speak like it: credentials and client are s3fs's, each request is one of the client's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import botocore.parsers
from aiobotocore.session import AioSession
from botocore.handlers import add_expect_header
from s3fs import S3FileSystem

from aq_data.storage.arrays._bucket import CONNECT_SECONDS, SILENT_SECONDS, Bucket, Page, Parts, RefusedError, TruncatedError
from aq_data.storage.arrays.blobs import BlobEntry

__all__ = ["S3Bucket", "session"]


class S3Bucket(Bucket):
    """A bucket of Amazon S3, or of a server that speaks like it."""

    failures = (
        botocore.exceptions.BotoCoreError,
        botocore.exceptions.ClientError,
        botocore.parsers.ResponseParserError,
        aiohttp.ClientError,
        OSError,
        ValueError,
    )
    passing = (
        botocore.exceptions.ChecksumError,
        botocore.exceptions.ConnectionError,
        botocore.exceptions.CredentialRetrievalError,
        botocore.exceptions.FlexibleChecksumError,
        botocore.exceptions.MetadataRetrievalError,
        botocore.parsers.ResponseParserError,
        botocore.exceptions.HTTPClientError,
        botocore.exceptions.IncompleteReadError,
        aiohttp.ClientConnectionError,
        aiohttp.ClientPayloadError,
        ConnectionError,
    )
    lasting = (botocore.exceptions.SSLError, aiohttp.ClientSSLError)
    deleted_at_once = 1000

    def __init__(self, name: str, options: dict[str, Any], connections: int) -> None:
        """`options` are those of s3fs. To be made in a thread: it may look for credentials on the network."""
        self._name, self._prepared = name, None
        config = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": SILENT_SECONDS,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "max_pool_connections": connections,
        }
        self._fs = S3FileSystem(
            asynchronous=True,
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs=config | options.pop("config_kwargs", {}),
            **options,
        )

    async def _client(self) -> Any:
        client = await self._fs.set_session()
        if client is not self._prepared:
            # Asking for leave before each body would cost a round trip more; ours are small enough to be sent in vain.
            client.meta.events.unregister("before-call.s3", add_expect_header)
            self._prepared = client
        return client

    async def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        client = await self._client()
        # A file, for aiohttp warns of bare bytes beyond a megabyte, and botocore knows no memoryview.
        await client.put_object(Bucket=self._name, Key=key, Body=BytesIO(data))

    async def get(self, key: str, start: int, stop: int | None) -> bytes:
        client = await self._client()
        wanted = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        try:
            answer = await client.get_object(Bucket=self._name, Key=key, **wanted)
        except botocore.exceptions.ClientError as exc:
            if exc.response.get("Error", {}).get("Code") in ("InvalidRange", "416"):
                return b""
            raise
        async with answer["Body"] as body:
            data: bytes = await body.read()
        if len(data) != answer["ContentLength"]:
            raise TruncatedError(f"{len(data)} of {answer['ContentLength']} bytes came")
        return data if "ContentRange" in answer or not wanted else data[start:stop]

    async def size(self, key: str) -> int:
        client = await self._client()
        return int((await client.head_object(Bucket=self._name, Key=key))["ContentLength"])

    async def copy(self, source: str, target: str) -> None:
        client = await self._client()
        try:
            await client.copy_object(
                Bucket=self._name, Key=target, CopySource={"Bucket": self._name, "Key": source}, IfNoneMatch="*"
            )
        except botocore.exceptions.ClientError as exc:
            if exc.response.get("Error", {}).get("Code") != "PreconditionFailed":
                raise

    async def page(self, prefix: str, delimiter: str, following: str, limit: int = 1000) -> Page:
        client = await self._client()
        wanted = {"Delimiter": delimiter, "ContinuationToken": following}
        answer = await client.list_objects_v2(
            Bucket=self._name, Prefix=prefix, MaxKeys=limit, **{k: v for k, v in wanted.items() if v}
        )
        entries = [BlobEntry(o["Key"], o["Size"], o["LastModified"].timestamp()) for o in answer.get("Contents", ())]
        folders = [each["Prefix"] for each in answer.get("CommonPrefixes", ())]
        return Page(entries, folders, answer.get("NextContinuationToken", "") if answer["IsTruncated"] else "")

    async def delete(self, keys: Sequence[str]) -> None:
        client = await self._client()
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        answer = await client.delete_objects(Bucket=self._name, Delete=wanted)
        for error in answer.get("Errors", ()):
            if error.get("Code") not in ("NoSuchKey", "NoSuchVersion"):
                raise RefusedError(
                    403 if error.get("Code") == "AccessDenied" else 500, error.get("Code", ""), error.get("Message", "")
                )

    async def begin(self, key: str) -> Parts:
        client = await self._client()
        answer = await client.create_multipart_upload(Bucket=self._name, Key=key)
        return _Multipart(self, client, {"Bucket": self._name, "Key": key, "UploadId": answer["UploadId"]})

    @staticmethod
    def refusal(exc: BaseException) -> RefusedError | None:
        if not isinstance(exc, botocore.exceptions.ClientError):
            return None
        error = exc.response.get("Error", {})
        status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(error.get("Code", ""))
        return RefusedError(status, "" if code.isdigit() else code, error.get("Message", ""))

    async def close(self) -> None:
        creator = getattr(self._fs, "_s3creator", None)
        if creator is not None:
            await asyncio.shield(creator.__aexit__(None, None, None))


class _Multipart(Parts):
    def __init__(self, bucket: S3Bucket, client: Any, upload: dict[str, str]) -> None:
        self._bucket, self._client, self._upload = bucket, client, upload
        self._tags: list[str] = []
        self._size = 0
        self._is_last_there = False
        self._is_asked_to_complete = False

    async def send(self, data: bytes, is_last: bool) -> None:
        if not self._is_last_there:
            number = len(self._tags) + 1
            answer = await self._client.upload_part(**self._upload, PartNumber=number, Body=BytesIO(data))
            self._tags.append(answer["ETag"])
            self._size += len(data)
            self._is_last_there = is_last
        if is_last:
            await self._complete()

    async def _complete(self) -> None:
        parts = [{"PartNumber": i, "ETag": tag} for i, tag in enumerate(self._tags, 1)]
        try:
            await self._client.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": parts})
        except botocore.exceptions.ClientError as exc:
            # A repetition of one whose answer was lost finds the upload gone, and the blob in its place.
            is_gone = exc.response.get("Error", {}).get("Code") == "NoSuchUpload"
            if not (is_gone and self._is_asked_to_complete and await self._bucket.size(self._upload["Key"]) == self._size):
                raise
        finally:
            self._is_asked_to_complete = True

    async def abort(self) -> None:
        try:
            await self._client.abort_multipart_upload(**self._upload)
        except botocore.exceptions.ClientError as exc:
            if exc.response.get("Error", {}).get("Code") != "NoSuchUpload":
                raise


def session(credentials_file: str | None, profile: str | None) -> AioSession:
    """A session whose chain of credentials begins at the named file or profile."""
    made = AioSession(profile=profile)
    if credentials_file is not None:
        made.set_config_variable("credentials_file", str(Path(credentials_file).expanduser()))
    return made
