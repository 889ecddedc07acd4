"""Blobs in a bucket: of Google Cloud Storage (`gs://bucket/prefix`), of S3 and of what speaks like it (`s3://…`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from aq_data.errors import ConfigError
from aq_data.models.structs import resolve
from aq_data.storage.arrays._bucket import Bucket
from aq_data.storage.arrays._bucket_blobs import CONNECTIONS, BucketBlobs
from aq_data.storage.arrays.blobs import BlobStore

__all__ = ["BucketOptions", "open_bucket"]


class BucketOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a bucket is reached. Holds no secret, only where one lies.

    Without credentials named here GCS takes the default ones (`GOOGLE_APPLICATION_CREDENTIALS`, workload identity, the
    machine's account) and S3 its own chain (environment, profile, role of the machine).
    """

    endpoint: str | None = None
    """Address of an emulator or of a server that speaks S3, `http://` or `https://`; None is the provider's own."""
    region: str | None = None
    """S3: region of the bucket."""
    key_file: str | None = None
    """GCS: file of a service account's key."""
    credentials_file: str | None = None
    """S3: credentials file in the provider's form, `[default]` with `aws_access_key_id` and `aws_secret_access_key`."""
    profile: str | None = None
    """S3: section of the credentials file; None is `default`."""
    anonymous: bool = False
    """Ask without credentials, as emulators and public buckets allow."""


_ONLY = {"gs": ("key_file",), "s3": ("region", "credentials_file", "profile")}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def open_bucket(url: str, options: BucketOptions = BucketOptions()) -> BlobStore:
    """Blobs under `gs://bucket/prefix` or `s3://bucket/prefix`. Connects to nothing before the first call.

    ConfigError when the address or an option is wrong, or the package for the provider is not installed.
    """
    kind, name, prefix = _parse(url)
    _check_options(kind, options)
    address = f"{kind}://{name}/{prefix}".rstrip("/")
    return BucketBlobs(address, f"{prefix}/" if prefix else "", *(_gcs if kind == "gs" else _s3)(name, options))


def _parse(url: str) -> tuple[str, str, str]:
    kind, _, rest = url.partition("://")
    name, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    if kind not in _ONLY or not _NAME.fullmatch(name) or (prefix and not all(prefix.split("/"))):
        raise ConfigError(f"{url!r} is no address of a bucket; write gs://bucket/prefix or s3://bucket/prefix")
    return kind, name, prefix


def _check_options(kind: str, options: BucketOptions) -> None:
    for other, fields in _ONLY.items():
        for field in fields if other != kind else ():
            if getattr(options, field) is not None:
                raise ConfigError(f"{field} is an option of {other}:// buckets, not of {kind}://; remove it")
    if options.endpoint is not None:
        parts = urlsplit(options.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConfigError("the endpoint of a bucket is http://host:port or https://host:port, without credentials")
    for field in ("key_file", "credentials_file"):
        path = getattr(options, field)
        if path is not None and not Path(path).expanduser().is_file():
            raise ConfigError(f"{field} {path!r} is no file; name one that this server can read")
        if path is not None and options.anonymous:
            raise ConfigError(f"anonymous and {field} exclude each other: keep one of them")


def _gcs(name: str, options: BucketOptions) -> tuple[type[Bucket], Callable[[], Bucket]]:
    try:
        from aq_data.storage.arrays._bucket_gcs import GcsBucket
    except ImportError as exc:
        raise ConfigError(f"a gs:// bucket needs gcsfs: `pip install 'aq-data[gcs]'` ({exc})") from exc

    given = {
        "token": "anon" if options.anonymous else "google_default",
        "endpoint_url": options.endpoint and options.endpoint.rstrip("/"),
    }
    file = None if options.key_file is None else str(Path(options.key_file).expanduser())
    return GcsBucket, lambda: GcsBucket(name, given, file, CONNECTIONS)


def _s3(name: str, options: BucketOptions) -> tuple[type[Bucket], Callable[[], Bucket]]:
    try:
        from aq_data.storage.arrays._bucket_s3 import S3Bucket, session
    except ImportError as exc:
        raise ConfigError(f"an s3:// bucket needs s3fs: `pip install 'aq-data[s3]'` ({exc})") from exc

    given: dict[str, Any] = {"anon": options.anonymous, "endpoint_url": options.endpoint}
    if options.region is not None:
        given["client_kwargs"] = {"region_name": options.region}
    return S3Bucket, lambda: S3Bucket(
        name, {**given, "session": session(options.credentials_file, options.profile)}, CONNECTIONS
    )


resolve(BucketOptions)
