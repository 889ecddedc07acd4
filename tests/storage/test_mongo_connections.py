"""How MongoDB is reached: options, TLS, what is wrong with them, and a database that does not answer."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from metadata_suite import EVERYTHING, record, within
from services.mongo import IN_DOCKER, Engine
from services.refusing import refusing
from services.tls import tls_before

from aq_data.errors import ConfigError, UnavailableError
from aq_data.storage.metadata._mongo_border import open_client
from aq_data.storage.metadata.mongo import MongoStore

SOON = 18.0
"""Seconds within which whoever asks a database that does not answer is told: twice of what it takes."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate, signed by itself, and its key in one file."""
    return made_certificate(tmp_path_factory.mktemp("certificate"))


def made_certificate(folder: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=aq-data"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key.pem"), "-out", str(folder / "ca.pem")]
    subprocess.run(command, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes((folder / "ca.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return both


# --- options -------------------------------------------------------------------------------------------------------------


def test_what_is_acknowledged_is_on_most_members_and_nobody_waits_for_ever():
    """Unless the address says otherwise; reads are of what can no longer be rolled back."""
    client = open_client("mongodb://db.example/")
    assert client.write_concern.document == {"w": "majority", "j": True, "wtimeout": 10_000}
    assert client.read_concern.document == {"level": "majority"}
    pool = client.options.pool_options
    assert (client.options.server_selection_timeout, pool.connect_timeout, pool.socket_timeout) == (3.0, 4.0, 20.0)
    assert (pool.wait_queue_timeout, client.options.retry_writes) == (3.0, True)
    other = open_client("mongodb://db.example/?w=1&serverSelectionTimeoutMS=50")
    assert other.write_concern.document == {"w": 1, "j": True, "wtimeout": 10_000}
    assert other.options.server_selection_timeout == 0.05


def test_the_options_of_tls_and_x509_reach_the_driver(certificate):
    """The certificate is the login."""
    options = f"tls=true&tlsCAFile={certificate}&tlsCertificateKeyFile={certificate}&tlsAllowInvalidHostnames=true"
    client = open_client(f"mongodb://db.example/?{options}&authMechanism=MONGODB-X509&authSource=%24external")
    pool = client.options.pool_options
    assert pool._ssl_context is not None
    assert (pool._credentials.mechanism, pool._credentials.source) == ("MONGODB-X509", "$external")
    assert (pool.tls_allow_invalid_hostnames, client.options._options["tlscertificatekeyfile"]) == (True, str(certificate))


@pytest.mark.parametrize("option", ["tlsCAFile", "tlsCertificateKeyFile", "tlscafile"])
def test_a_file_of_tls_that_is_not_there_is_named(tmp_path, option):
    """With its option and its path; no password with it."""
    with pytest.raises(ConfigError, match=rf"(?i){option} .*absent\.pem cannot be read: No such file") as failure:
        MongoStore(f"mongodb://lab:s3cret@db.example/?tls=true&{option}={tmp_path}/absent.pem")
    assert "s3cret" not in str(failure.value)


def test_a_file_that_is_no_certificate_and_a_missing_one_are_told(tmp_path, certificate):
    """What belongs into which file."""
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for options in (
        f"tlsCertificateKeyFile={wrong}",
        f"tlsCAFile={wrong}",
        f"tlsCertificateKeyFile={certificate.parent}/ca.pem",
    ):
        with pytest.raises(ConfigError, match="a certificate and its key, both in PEM form"):
            MongoStore(f"mongodb://db.example/?tls=true&{options}")
    with pytest.raises(ConfigError, match="MONGODB-X509 needs tlsCertificateKeyFile"):
        MongoStore("mongodb://db.example/?tls=true&authMechanism=MONGODB-X509&authSource=%24external")


# --- refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name", "user"),
    [(18, "AuthenticationFailed", "lab:s3cret@"), (13, "Unauthorized", "")],
)
def test_a_login_that_is_refused_says_what_to_look_at(code, name, user):
    """And recovers when it is put right: it is no fault of the client."""

    async def body(store):
        with pytest.raises(
            UnavailableError, match=rf"does not let this server in .*{code}.*user, password, authSource"
        ) as failure:
            await store.count(EVERYTHING)
        assert "s3cret" not in str(failure.value)
        with pytest.raises(UnavailableError):
            await store.check()

    with refusing(code, name, "not you") as address:
        within(lambda _: MongoStore(f"mongodb://{user}{address}/?directConnection=true"), body)


@pytest.mark.services
@pytest.mark.skipif(IN_DOCKER, reason="the container's engine has a port that is not known here")
def test_a_database_behind_tls_is_reached_with_a_certificate_and_not_without(tmp_path, certificate):
    """Each side verifies the other, hosts' names included."""

    async def used(store):
        one = record(name="over TLS")
        assert await store.insert(one) is None
        assert await store.get(one.document.id) == one
        assert await store.count(EVERYTHING) == 1

    async def refused(store):
        with pytest.raises(UnavailableError) as caught:  # whoever has no certificate may just hear that nobody talks to him
            await store.count(EVERYTHING)
        return str(caught.value)

    engine = Engine(tmp_path)
    other = made_certificate(tmp_path)
    try:
        with tls_before(engine.port, certificate) as port:
            url = engine.url.replace(str(engine.port), str(port)) + "&tls=true&serverSelectionTimeoutMS=1000"
            within(lambda name: MongoStore(f"{url}&tlsCAFile={certificate}&tlsCertificateKeyFile={certificate}", name), used)
            within(lambda name: MongoStore(f"{url}&tlsCAFile={certificate}", name), refused)
            within(lambda name: MongoStore(f"{url}&tlsCAFile={certificate}&tlsCertificateKeyFile={other}", name), refused)
            impostor = within(
                lambda name: MongoStore(f"{url}&tlsCAFile={other}&tlsCertificateKeyFile={other}", name), refused
            )
            assert "certificate verify failed" in impostor
    finally:
        engine.kill()


def test_a_server_without_tls_is_told_from_one_that_is_down():
    """The driver's words are passed on."""

    async def body(store):
        with pytest.raises(UnavailableError, match="SSL"):
            await store.count(EVERYTHING)

    with refusing(1, "Never", "asked") as address:
        within(
            lambda _: MongoStore(f"mongodb://{address}/?directConnection=true&tls=true&serverSelectionTimeoutMS=500"), body
        )


# --- not there -----------------------------------------------------------------------------------------------------------


def test_a_database_that_is_not_there_is_told_within_seconds_to_all_who_ask_at_once():
    """They wait for one attempt, not for each other's."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def body(store):
        began = time.monotonic()
        asked = [store.count(EVERYTHING), store.insert(record()), store.get("x"), store.tokens(), store.check()] * 4
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(answer) for answer in answers} == {UnavailableError}
        assert time.monotonic() - began < SOON / 2

    within(lambda _: MongoStore(f"mongodb://127.0.0.1:{port}/"), body)


@pytest.mark.services
@pytest.mark.skipif(IN_DOCKER, reason="the container's engine is not this test's to stop")
def test_a_database_that_hangs_is_told_within_seconds_and_is_used_again_when_it_goes_on(tmp_path):
    """Reads, writes, questions; without a restart, and without a connection that is lost for ever."""

    async def body(store):
        one = record()
        await store.insert(one)
        engine.pause()
        try:
            began = time.monotonic()
            asked = [store.get(one.document.id), store.insert(record()), store.count(EVERYTHING), store.check()]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(answer) for answer in answers} == {UnavailableError}
            assert time.monotonic() - began < SOON
            began = time.monotonic()
            with pytest.raises(UnavailableError):
                await store.get(one.document.id)
            assert time.monotonic() - began < SOON / 2
        finally:
            engine.resume()
        deadline = time.monotonic() + 20
        while True:
            try:
                assert await store.get(one.document.id) == one
                break
            except UnavailableError:
                assert time.monotonic() < deadline

    engine = Engine(tmp_path)
    try:
        within(lambda name: MongoStore(engine.url, name), body)
    finally:
        engine.kill()


@pytest.mark.services
@pytest.mark.skipif(IN_DOCKER, reason="the container's engine is not this test's to stop")
def test_a_store_that_was_opened_before_its_database_is_ready_when_that_is(tmp_path):
    """The parts of a cluster start in any order."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def body(store):
        with pytest.raises(UnavailableError):
            await store.check()
        engines.append(Engine(tmp_path, port))
        one = record()
        assert await store.insert(one) is None
        assert await store.get(one.document.id) == one

    engines = []
    url = f"mongodb://127.0.0.1:{port}/?directConnection=true&retryWrites=false&w=1&journal=true"
    try:
        within(lambda name: MongoStore(url, name), body)
    finally:
        for engine in engines:
            engine.kill()
