"""Of a bucket that fails nothing comes out as absence, nothing short as whole, and what repetition mends is mended."""

from __future__ import annotations

import asyncio
import inspect
import time

import aiohttp
import botocore.exceptions
import botocore.parsers
import gcsfs.retry
import google.auth.exceptions
import msgspec
import pytest
import requests.exceptions
from blob_suite import keys_under, put, within
from services.proxying import HttpProxy

from aq_data.errors import AqDataError, NotFoundError, StorageError, UnavailableError
from aq_data.storage.arrays import _bucket, _bucket_blobs
from aq_data.storage.arrays._bucket import RefusedError, asking, translate
from aq_data.storage.arrays._bucket_gcs import GcsBucket
from aq_data.storage.arrays._bucket_s3 import S3Bucket
from aq_data.storage.arrays.bucket import BucketOptions, open_bucket

DATA = bytes(range(256)) * 40
HTML = b"<html><body>default backend - 404</body></html>"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Short pauses between repetitions."""
    monkeypatch.setattr(_bucket, "FIRST_PAUSE", 0.005)


async def upload_in_parts(store):
    upload = await store.upload("k/parts")
    try:
        for start in range(0, len(DATA), 1000):
            await upload.write(DATA[start : start + 1000])
        await upload.finish()
    finally:
        await upload.discard()
    assert await store.get("k/parts") == DATA


async def got(store):
    assert await store.get("k/a") == DATA


async def got_range(store):
    assert await store.get("k/a", 10, 5000) == DATA[10:5000]


async def sized(store):
    assert await store.size("k/a") == len(DATA)


async def walked(store):
    assert "k/a" in await keys_under(store, "k")


async def listed(store):
    assert "a" in await store.children("k")


OPERATIONS = {
    "put": lambda store: put(store, {"k/new": DATA}),
    "replace": lambda store: store.replace("k/a", DATA),
    "get": got,
    "range": got_range,
    "size": sized,
    "copy": lambda store: store.copy_many([("k/a", "k/copy")]),
    "walk": walked,
    "children": listed,
    "remove": lambda store: store.remove("gone"),
    "remove_many": lambda store: store.remove_many(["k/gone", "k/lost"]),
    "upload": lambda store: upload_in_parts(store),
    "check": lambda store: store.check(),
}


def each(proxied, fault, times, check):
    """`check(name, operation)` for every operation, on a store with a blob; each meets the fault so many times."""
    bucket, proxy = proxied

    async def body(store):
        await put(store, {"k/a": DATA})
        for name, operate in OPERATIONS.items():
            proxy.fail(fault, times)
            with proxy.recording() as made:
                await check(name, lambda operate=operate: operate(store))
            requests[name] = made
            proxy.faults.clear()

    requests = {}
    within(bucket.open, body)
    return requests


def raising(error, match):
    """A check that an operation fails so."""

    async def check(name, operation):
        with pytest.raises(error, match=match) as failure:
            await operation()
        assert not isinstance(failure.value, NotFoundError), name

    return check


# --- what repetition mends ---------------------------------------------------------------------------------------------

ONCE = {
    "503": HttpProxy.answering(503),
    "500": HttpProxy.answering(500, b'{"error": "no"}', "application/json"),
    "429": HttpProxy.answering(429),
    "reset": HttpProxy.resetting,
    "lost": HttpProxy.losing,
    "truncated": HttpProxy.truncating,
}


@pytest.mark.services
@pytest.mark.parametrize("fault", ONCE)
def test_what_fails_twice_succeeds(proxied, fault):
    """Everything asked of a bucket may be asked again, also when it was done and only the answer was lost."""

    async def check(name, operation):
        await operation()

    for name, made in each(proxied, ONCE[fault], 2, check).items():
        assert len(made) >= (1 if fault == "truncated" else 3), f"{name} met the fault"  # some answers have no body


@pytest.mark.services
@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("fault", ["503", "reset", "lost"])
def test_an_upload_survives_a_failure_in_each_of_its_requests(bucket, monkeypatch, fault, which):
    """Its beginning, each part, its end: the blob is there once and whole."""
    monkeypatch.setattr(_bucket_blobs, "PART_BYTES", 1 << 18 if bucket.url.startswith("gs") else 5 << 20)
    data = bytes(range(256)) * (_bucket_blobs.PART_BYTES * 3 // 256 + 1)

    with bucket.behind_proxy() as (through, proxy):
        seen = []

        def is_it(request):
            seen.append(request)
            return len(seen) == which + 1

        proxy.fail(ONCE[fault], when=is_it)

        async def body(store):
            upload = await store.upload("k/parts")
            for start in range(0, len(data), 700_000):
                await upload.write(data[start : start + 700_000])
            await upload.finish()
            assert await store.get("k/parts") == data

        within(through.open, body)


# --- what it does not --------------------------------------------------------------------------------------------------


@pytest.mark.services
@pytest.mark.parametrize("fault", ["503", "reset"])
def test_what_goes_on_failing_is_unavailable_and_names_the_bucket(proxied, fault):
    """After a bounded number of requests."""
    for name, made in each(proxied, ONCE[fault], 50, raising(UnavailableError, "//test-bucket/")).items():
        assert len(made) <= 2 * _bucket.ATTEMPTS, name


@pytest.mark.services
def test_what_does_not_answer_is_given_up_in_time(proxied, monkeypatch):
    """The caller is told to try again."""
    bucket, proxy = proxied

    async def body(store):
        await put(store, {"k/a": DATA})
        monkeypatch.setattr(_bucket, "TOTAL_SECONDS", 0.3)
        monkeypatch.setattr(_bucket_blobs, "WHOLE_BYTES", 0)
        proxy.fail(HttpProxy.hanging, 50)
        for name in ("get", "range", "put", "walk"):
            began = time.monotonic()
            await raising(UnavailableError, "//test-bucket/")(name, lambda name=name: OPERATIONS[name](store))
            assert time.monotonic() - began < 10

    within(bucket.open, body)


@pytest.mark.services
def test_half_a_body_is_never_taken_for_the_whole(proxied):
    """However often it comes."""
    bucket, proxy = proxied

    async def body(store):
        await put(store, {"k/a": DATA})
        proxy.fail(HttpProxy.truncating, 50)
        for read in (store.get("k/a"), store.get("k/a", 10, 5000), store.get_many(["k/a"], lambda i, data: None)):
            with pytest.raises(UnavailableError):
                await read

    within(bucket.open, body)


@pytest.mark.services
def test_what_is_forbidden_is_the_operators_to_mend(proxied):
    """And is not asked again and again."""
    check = raising(StorageError, r"//test-bucket/.*403.*credentials")
    for name, made in each(proxied, HttpProxy.answering(403), 50, check).items():
        assert len(made) == (2 if name == "remove_many" and made[-1].status != 403 else 1), name


@pytest.mark.services
def test_a_missing_bucket_is_no_absence(bucket):
    """Nothing is absent that nobody can look for."""
    kind = bucket.url.split("://")[0]

    async def body(store):
        for name, operate in OPERATIONS.items():
            await raising(StorageError, f"{kind}://never-made/x.*404.*no such bucket")(name, lambda op=operate: op(store))

    within(lambda: open_bucket(f"{kind}://never-made/x", bucket.options), body)


@pytest.mark.services
def test_a_gateway_that_knows_nothing_is_no_absence(proxied):
    """Its 404 is not the bucket's."""
    each(proxied, HttpProxy.answering(404, HTML, "text/html"), 50, raising(StorageError, "//test-bucket/.*404"))


@pytest.mark.parametrize("host", ["127.0.0.1:1", "nowhere.invalid"])
@pytest.mark.parametrize("url", ["gs://lab-bucket/x", "s3://lab-bucket/x"])
def test_a_bucket_that_nobody_serves_is_unavailable(url, host, monkeypatch):
    """And so is one whose host has no address."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")

    async def body(store):
        for name, operate in OPERATIONS.items():
            await raising(UnavailableError, "//lab-bucket/x")(name, lambda op=operate: op(store))

    within(lambda: open_bucket(url, BucketOptions(endpoint=f"http://{host}", anonymous=url.startswith("gs"))), body)


@pytest.mark.services
def test_wrong_credentials_are_named(s3, tmp_path):
    """Not shown."""
    wrong = tmp_path / "credentials"
    wrong.write_text("[default]\naws_access_key_id = laboratory\naws_secret_access_key = s3cret\n")
    options = msgspec.structs.replace(s3.options, credentials_file=str(wrong))
    with pytest.raises(StorageError, match="credentials") as failure:
        within(lambda: open_bucket(s3.url, options), lambda store: store.check())
    assert "s3cret" not in str(failure.value)


def test_a_machine_without_credentials_is_told_so(monkeypatch):
    """By the first request: it may have them later."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match=r"s3://lab-bucket.*[Cc]redentials"):
        within(lambda: open_bucket("s3://lab-bucket", BucketOptions(endpoint="http://127.0.0.1:1")), lambda s: s.check())


@pytest.mark.parametrize("content", [None, "nonsense", "{}"], ids=["none", "nonsense", "empty"])
def test_google_credentials_that_are_not_there_or_wrong_are_named(content, tmp_path, monkeypatch):
    """By the first request, as an error of ours."""
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    file = tmp_path / "key.json"
    if content is not None:
        file.write_text(content)
    options = BucketOptions(key_file=None if content is None else str(file))
    with pytest.raises(StorageError, match=r"gs://lab-bucket cannot be used"):
        within(lambda: open_bucket("gs://lab-bucket", options), lambda store: store.check())


# --- the table ---------------------------------------------------------------------------------------------------------


def errors_of(*modules):
    found = {cls for module in modules for _, cls in inspect.getmembers(module, inspect.isclass)}
    return sorted((cls for cls in found if issubclass(cls, Exception)), key=lambda cls: (cls.__module__, cls.__name__))


ERRORS = {
    GcsBucket: errors_of(aiohttp, gcsfs.retry, google.auth.exceptions, requests.exceptions),
    S3Bucket: errors_of(aiohttp, botocore.exceptions, botocore.parsers),
}
ELSEWHERE = {"BadRequest", "WebSocketError", "WSMessageTypeError", "EofStream", "ChecksumError", "NoInitialResponseError"}
ELSEWHERE |= {"MissingServiceIdError", "UndefinedModelAttributeError", "ParseError"}
"""Of sockets and servers, of gcsfs's own files, of streams of events, of making a model, and XML, which the parser catches."""
CASES = [
    (kind, cls)
    for kind, classes in ERRORS.items()
    for cls in classes
    if not issubclass(cls, Warning)
    and not cls.__module__.startswith("urllib3")
    and not {cls.__name__, *(base.__name__ for base in cls.__bases__)} & ELSEWHERE
]


def raised(cls):
    """An instance, as `except` sees one: some cannot be made without a connection."""
    known = type(cls.__name__, (cls,), {"__str__": lambda self: "said the library"})
    exc = known.__new__(known)
    vars(exc).setdefault("response", {"Error": {"Code": "SomeCode"}, "ResponseMetadata": {"HTTPStatusCode": 400}})
    vars(exc).setdefault("code", None)
    return exc


def test_the_libraries_name_their_errors():
    """A guard: the walks below are over something."""
    names = {cls.__name__ for _, cls in CASES}
    assert {"ClientPayloadError", "TransportError", "HttpError", "NoCredentialsError", "ResponseParserError"} <= names
    assert len(CASES) > 150


@pytest.mark.parametrize(("kind", "cls"), CASES, ids=lambda one: one.__name__)
def test_no_error_of_a_library_comes_out_of_an_operation(kind, cls):
    """Whatever it raises leaves as ours, and never as absence."""

    async def call():
        raise raised(cls)

    with pytest.raises((StorageError, UnavailableError), match="gs://b"):
        asyncio.run(asking(kind, "gs://b", "k", call))


@pytest.mark.parametrize("status", [*range(300, 309), *range(400, 432), 451, *range(500, 512), 599])
@pytest.mark.parametrize("code", ["", "NoSuchKey", "NoSuchBucket", "AccessDenied", "SlowDown"])
def test_every_answer_has_one_error_of_ours_and_only_the_absent_key_is_not_found(status, code):
    """What a provider may mend by itself is unavailable."""
    ours = translate(S3Bucket, "s3://b", RefusedError(status, code, "said the provider"), "some/key")
    assert isinstance(ours, AqDataError)
    assert type(ours) in (NotFoundError, UnavailableError, StorageError)
    assert isinstance(ours, NotFoundError) == (code == "NoSuchKey")
    assert "s3://b" in str(ours)
    assert "some/key" in str(ours)
    if status >= 500 and code != "NoSuchKey":
        assert isinstance(ours, UnavailableError)
