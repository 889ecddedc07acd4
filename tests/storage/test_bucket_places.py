"""Names, sizes and addresses in a bucket, and how it is reached."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc

import botocore
import msgspec
import numpy as np
import pytest
import xarray
from aq_server.commands.serving import running
from aq_server.config import ServerConfig
from blob_suite import keys_under, put, within
from hypothesis import given, settings
from hypothesis import strategies as st
from services.buckets import ACCESS_KEY, SECRET_KEY

import aq_data
from aq_data.errors import ConfigError, NotFoundError
from aq_data.storage.arrays import _bucket_blobs
from aq_data.storage.arrays._bucket import CONNECT_SECONDS
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.bucket import BucketOptions, open_bucket

HARD = [
    "T₁ über",
    "100%",
    "%2F",
    "a+b",
    "a b",
    "#1",
    "why?",
    "a&b=c",
    "a;b",
    "quote'\"",
    "<x>",
    "{0}",
    "~",
    "it's (1)",
    "日本",
]

NAMES = st.text(
    st.characters(min_codepoint=32, exclude_characters="/\\\x7f", exclude_categories=("Cs", "Cc")), min_size=1, max_size=50
).filter(lambda name: name not in (".", ".."))


# --- names and sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.services
def test_any_name_of_an_array_is_a_key(bucket):
    """It is found, listed, copied and deleted under that name, and no other comes of it."""
    blobs = {f"id/{name}/c/0": name.encode() for name in HARD}

    async def body(store):
        await put(store, blobs)
        assert await keys_under(store, "id") == sorted(blobs)
        assert await store.children("id") == sorted(HARD)
        await store.copy_many([(key, f"copies/{key}") for key in blobs])
        for key, data in blobs.items():
            assert await store.get(key) == data
            assert await store.get(f"copies/{key}", 1, 3) == data[1:3]
            assert await store.size(f"copies/{key}") == len(data)
            upload = await store.upload(f"uploads/{key}")
            await upload.write(data)
            await upload.finish()
        assert await keys_under(store, "uploads") == sorted(f"uploads/{key}" for key in blobs)
        for name in HARD[::2]:
            await store.remove(f"id/{name}")
        await store.remove_many([f"copies/id/{name}/c/0" for name in HARD])
        assert await store.children("id") == sorted(HARD[1::2])
        assert await store.children("copies") == []

    within(bucket.open, body)


@pytest.mark.services
@settings(max_examples=settings().max_examples // 20)
@given(names=st.sets(NAMES, max_size=20))
def test_names_nobody_thought_of_are_keys_too(bucket, names):
    """Whatever `check_name` lets pass, as many at once as there are."""
    blobs = {f"a/{name}/x": name.encode() for name in names}

    async def body(store):
        await put(store, blobs)
        for key, data in blobs.items():
            assert await store.get(key) == data
            assert await keys_under(store, key.rpartition("/")[0]) == [key]

    within(bucket.place().open, body)


@pytest.mark.services
def test_a_listing_goes_on_over_its_pages_and_a_removal_over_its_batches(bucket, monkeypatch):
    """More blobs than one answer has, of which only those below the prefix go."""
    keys = [f"many/{i // 50}/{i}" for i in range(230)]

    async def body(store):
        await put(store, dict.fromkeys([*keys, "many-more/1", "many.x"], b"x"))
        inside = await store._opened("")
        whole, at_once = inside.page, type(inside).deleted_at_once
        monkeypatch.setattr(
            inside, "page", lambda prefix, delimiter, following, limit=0: whole(prefix, delimiter, following, 40)
        )
        monkeypatch.setattr(type(inside), "deleted_at_once", min(at_once, 30))
        assert await keys_under(store, "many") == sorted(keys)
        assert await store.children("many") == sorted(str(i) for i in range(5))
        await store.remove("many")
        assert await keys_under(store, "") == ["many-more/1", "many.x"]

    within(bucket.open, body)


@pytest.mark.services
def test_a_long_upload_holds_a_part_or_two_and_is_there_whole(bucket, monkeypatch):
    """However long it is; discarded, it leaves nothing to list and no parts."""
    part = 5 << 20
    monkeypatch.setattr(_bucket_blobs, "PART_BYTES", part)
    piece = np.random.default_rng(1).bytes(1 << 20)

    async def body(store):
        await put(store, {"k/a": b"x"})
        upload = await store.upload("k/long")
        tracemalloc.start()
        for _ in range(32):
            await upload.write(piece)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with pytest.raises(NotFoundError):
            await store.size("k/long")
        await upload.finish()
        assert held < 4.5 * part
        assert await store.size("k/long") == 32 << 20
        assert await store.get("k/long", (7 << 20) - 5, (7 << 20) + 5) == piece[-5:] + piece[:5]
        upload = await store.upload("k/given-up")
        for _ in range(12):
            await upload.write(piece)
        await upload.discard()
        assert await keys_under(store, "k") == ["k/a", "k/long"]
        if bucket.url.startswith("s3"):
            client = await (await store._opened(""))._client()
            listed = await client.list_multipart_uploads(Bucket="test-bucket")  # which other tests use, too
            _, _, prefix = bucket.url.partition("test-bucket/")
            assert [one["Key"] for one in listed.get("Uploads", ()) if one["Key"].startswith(prefix)] == []

    within(bucket.open, body)


# --- other programs ----------------------------------------------------------------------------------------------------


@pytest.mark.services
def test_plain_xarray_opens_the_address_of_a_datafile(bucket, data):
    """`file.path` with fsspec's options for that bucket is all that it needs."""
    dataset = xarray.Dataset({"a b+%é": (("flux",), np.arange(3.0), {"units": "V"})}, {"flux": [0.1, 0.2, 0.3]})
    with running(ServerConfig(data=str(data), port=0, stores=bucket.as_default())) as url, aq_data.connect(url) as client:
        file = client.save(dataset, name="T1")
    code = (
        "import sys, json, xarray\n"
        "found = xarray.open_zarr(sys.argv[1], storage_options=json.loads(sys.argv[2]), consolidated=False)\n"
        "print(json.dumps([list(found), found['flux'].values.tolist(), found['a b+%é'].values.tolist()]))"
    )
    # Else gcsfs asks Google, by gRPC and for a minute, of which kind the emulator's bucket is.
    environment = {**os.environ, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    command = [sys.executable, "-W", "ignore", "-c", code, file.path, json.dumps(bucket.storage_options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    assert json.loads(done.stdout) == [["a b+%é"], [0.1, 0.2, 0.3], [0.0, 1.0, 2.0]]


# --- how it is reached -------------------------------------------------------------------------------------------------


def client_of(url, options, look):
    """What `look` finds in the library's object that a store made for itself; nothing is sent."""

    async def body(store: BlobStore):
        inside = await store._opened("")
        if url.startswith("s3"):
            await inside._client()
        return look(inside._fs)

    return within(lambda: open_bucket(url, options), body)


@pytest.mark.services
@pytest.mark.parametrize("way", ["file", "profile", "environment", "environment_file"])
def test_s3_takes_its_credentials_from_where_the_provider_does(s3, tmp_path, monkeypatch, way):
    """A file by reference, a section of it, or the environment."""
    options = msgspec.structs.replace(s3.options, credentials_file=None)
    keys = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    file = tmp_path / "keys"
    file.write_text(f"[default]\n{keys}" if way in ("file", "environment_file") else f"[lab]\n{keys}")
    if way == "environment":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    elif way == "environment_file":
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    else:
        options = msgspec.structs.replace(options, credentials_file=str(file), profile="lab" if way == "profile" else None)
    place = s3.place()

    async def body(store):
        await store.check()
        await put(store, {"k/a": b"x"})
        assert await store.get("k/a") == b"x"

    within(lambda: open_bucket(place.url, options), body)


def test_region_endpoint_and_anonymous_reach_s3(monkeypatch):
    """As options of the client; nothing is cached, nothing repeated behind our back."""
    options = BucketOptions(endpoint="https://s3.lab.example", region="eu-north-1", anonymous=True)

    def look(fs):
        config = fs.s3.meta.config
        assert (config.region_name, fs.s3.meta.endpoint_url) == ("eu-north-1", "https://s3.lab.example")
        assert config.signature_version is botocore.UNSIGNED
        assert (config.connect_timeout, config.retries["total_max_attempts"]) == (CONNECT_SECONDS, 1)
        assert fs.dircache.use_listings_cache is False

    client_of("s3://lab-bucket/x", options, look)


def test_the_key_of_a_service_account_reaches_gcs(tmp_path):
    """As credentials that sign; the address is Google's unless another is named."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"type": "service_account", "client_email": "aq@lab.example", "token_uri": "https://127.0.0.1:1/token"}
    file = tmp_path / "key.json"
    file.write_text(json.dumps({**account, "private_key": key.decode(), "project_id": "lab", "private_key_id": "1"}))

    def look(fs):
        credentials = fs.credentials.credentials
        assert credentials.service_account_email == "aq@lab.example"
        assert fs._location == "https://storage.googleapis.com"

    client_of("gs://lab-bucket/x", BucketOptions(key_file=str(file)), look)
    anonymous = BucketOptions(endpoint="http://127.0.0.1:1/", anonymous=True)
    seen = client_of("gs://lab-bucket/x", anonymous, lambda fs: (fs.credentials.credentials, fs._location))
    assert seen == (None, "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("gs://", {}, "gs://bucket/prefix"),
        ("gs://lab-bucket//x", {}, "gs://bucket/prefix"),
        ("s3://Lab_Bucket?x", {}, "s3://bucket/prefix"),
        ("az://lab-bucket", {}, "gs://bucket/prefix"),
        ("/srv/blobs", {}, "gs://bucket/prefix"),
        ("gs://lab-bucket", {"region": "eu-north-1"}, "region is an option of s3"),
        ("s3://lab-bucket", {"key_file": "x"}, "key_file is an option of gs"),
        ("gs://lab-bucket", {"key_file": "/nowhere/key.json"}, "key_file '/nowhere/key.json' is no file"),
        ("s3://lab-bucket", {"credentials_file": "/nowhere"}, "is no file"),
        ("s3://lab-bucket", {"endpoint": "s3.lab.example"}, "http://host:port"),
        ("s3://lab-bucket", {"endpoint": "https://lab:s3cret@s3.lab.example"}, "without credentials"),
        ("s3://lab-bucket", {"credentials_file": __file__, "anonymous": True}, "exclude each other"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_what_cannot_be_a_bucket_is_refused_when_the_server_starts(url, options, said):
    """By a message that names the key; a secret is not shown."""
    with pytest.raises(ConfigError, match=re.escape(said)) as failure:
        open_bucket(url, BucketOptions(**options))
    assert "s3cret" not in str(failure.value)


@pytest.mark.parametrize(("url", "package"), [("gs://lab-bucket", "gcsfs"), ("s3://lab-bucket", "s3fs")])
def test_a_package_that_is_not_installed_is_named_with_its_extra(url, package, monkeypatch):
    """And how to install it."""
    module = "aq_data.storage.arrays._bucket_gcs" if package == "gcsfs" else "aq_data.storage.arrays._bucket_s3"
    monkeypatch.delitem(sys.modules, module, raising=False)
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"aq-data\[{'gcs' if package == 'gcsfs' else 's3'}\]"):
        open_bucket(url)


def test_a_server_without_buckets_loads_nothing_for_them(data):
    """Half a second and many megabytes are for those who use them."""
    code = (
        "import sys, aq_server.__main__\nfrom aq_server.app import open_stores\nfrom aq_server.config import ServerConfig\n"
        f"open_stores(ServerConfig(data={str(data)!r}))\n"
        "sys.exit(str({'gcsfs', 's3fs', 'fsspec', 'aiohttp', 'botocore', 'google.auth'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
