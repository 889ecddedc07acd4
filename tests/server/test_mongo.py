"""A server over MongoDB and a folder: what is saved, found and measured through it, and how it is configured."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from aq_server.app import open_stores
from aq_server.commands.serving import running
from aq_server.config import ServerConfig, load_config

import aq_data
from aq_data.errors import ConfigError, ConflictError

SECRET = "mongodb://lab:s3cret@127.0.0.1:1/?serverSelectionTimeoutMS=50"


@pytest.fixture
def config(mongo, mongo_database, data):
    return ServerConfig(data=str(data), port=0, mongo=mongo, mongo_database=mongo_database)


@pytest.fixture
def client(config):
    with running(config) as url, aq_data.connect(url) as client:
        yield client


@pytest.mark.services
def test_what_is_saved_is_got_found_changed_and_deleted(client):
    """As over SQLite: the client cannot tell."""
    trace = np.linspace(0, 1, 5)
    files = [client.save({"trace": trace}, name=f"T{i}", metadata={"chip": f"C{i % 2}", "power": -30 + i}) for i in range(6)]
    assert np.array_equal(client.get(files[2].id)["trace"][1:3], trace[1:3])
    hits = client.search({"chip": "C1", "power": {"$gt": -29}}, sort="-metadata.power")
    assert [hit.id for hit in hits] == [files[5].id, files[3].id]
    client.update(files[3].id, {"metadata": {"chip": "C7"}})
    assert [hit.id for hit in client.search({"chip": "C7"})] == [files[3].id]
    client.delete(files[3].id)
    assert client.search({"chip": "C7"}).total == 0
    assert client.search({}).total == 5


@pytest.mark.services
def test_the_same_save_again_changes_nothing_and_another_under_its_id_is_refused(client):
    """A retry is harmless."""
    one = client.save({"y": np.arange(3)}, name="one")
    with pytest.raises(ConflictError):
        client.save({"y": np.arange(4)}, name="other", id=one.id)
    assert client.save({"y": np.arange(3)}, name="one", id=one.id).id == one.id


@pytest.mark.services
def test_a_sweep_grows_is_followed_and_finished(client, config):
    """By a reader of another server on the same database, who sees every block, and the end."""
    with running(config) as url, aq_data.connect(url) as other:
        with client.sweep("T1", dims={"delay": None}, variables={"iq": ("float64", ("delay",))}) as sweep:
            seen = []
            follower = threading.Thread(target=lambda: seen.extend(event.kind for event in other.follow(sweep.id)))
            follower.start()
            for i in range(20):
                sweep.append(iq=np.full(2, i, "float64"), delay=np.array([2.0 * i, 2.0 * i + 1]), dim="delay")
        follower.join(30)
        assert "finished" in seen
        found = other.get(sweep.id)
        assert found._document["state"] == "complete"
        assert np.array_equal(found["iq"][:], np.repeat(np.arange(20.0), 2))
        assert [hit.id for hit in other.search({"state": "complete", "name": "T1"})] == [sweep.id]


@pytest.mark.services
def test_two_servers_on_one_database_change_one_document_without_losing_a_change(config):
    """Each change is a compare-and-set of the revision."""
    with (
        running(config) as first,
        running(config) as second,
        aq_data.connect(first) as one,
        aq_data.connect(second) as other,
    ):
        file = one.save(None, name="shared", metadata={})

        def change(client, mark):
            for i in range(8):
                client.update(file.id, {"metadata": {f"{mark}{i}": i}})

        threads = [threading.Thread(target=change, args=pair) for pair in ((one, "a"), (other, "b"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = other.get(file.id)
        assert len(found.metadata) == 16
        assert found._document["revision"] == 17


# --- configuration -----------------------------------------------------------------------------------------------------


def test_the_address_comes_from_a_file_or_the_environment(data, tmp_path):
    """And never from both a file and the key."""
    secret = tmp_path / "mongo"
    secret.write_text("nonsense\n")
    with pytest.raises(ConfigError, match=r"server\.mongo is no MongoDB address"):
        open_stores(ServerConfig(data=str(data), mongo_file=str(secret)))
    assert load_config(None, {"AQ_DATA_SERVER__MONGO": SECRET}, {}).server.mongo == SECRET
    with pytest.raises(ConfigError, match="keep one"):
        open_stores(ServerConfig(data=str(data), mongo=SECRET, mongo_file=str(secret)))
    with pytest.raises(ConfigError, match="mongo_file"):
        open_stores(ServerConfig(data=str(data), mongo_file=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match="exclude"):
        open_stores(ServerConfig(data=str(data), mongo=SECRET, memory=True))


@pytest.mark.parametrize(
    "address",
    ["mongodb://lab:s3cret@", "mongodb://lab:s3cret@host:99999999", "s3cret", "mongodb://a:s3cret:b@host/?tls=maybe"],
)
def test_a_wrong_address_is_refused_without_being_shown(data, address):
    """Not in the message, nor in what an error came from, nor where a configuration is printed."""
    with pytest.raises(ConfigError) as failure:
        open_stores(ServerConfig(data=str(data), mongo=address))
    assert "s3cret" not in str(failure.value)
    assert failure.value.__cause__ is None
    assert failure.value.__context__ is None
    assert "s3cret" not in repr(ServerConfig(mongo=address))


def test_the_options_of_tls_and_x509_reach_the_driver(data, tmp_path):
    """They stay inside the address; a certificate that is not there is refused when the server starts."""
    certificate = tmp_path / "absent.pem"
    options = f"tls=true&tlsCertificateKeyFile={certificate}&authMechanism=MONGODB-X509&authSource=%24external"
    with pytest.raises(ConfigError, match=r"server\.mongo: tlsCertificateKeyFile .*absent\.pem cannot be read"):
        open_stores(ServerConfig(data=str(data), mongo=f"mongodb://db.example/?{options}"))


def test_a_database_that_does_not_answer_is_unavailable_and_its_address_is_not_logged(serve):
    """The server starts, says so at /readyz, and answers when the database does."""
    import httpx

    process = serve(environment={"AQ_DATA_SERVER__MONGO": SECRET})
    assert httpx.get(f"{process.url}/readyz", timeout=30).status_code == 503
    answer = httpx.post(f"{process.url}/api/v1/search", json={}, timeout=30)
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "s3cret" not in answer.text
    assert "s3cret" not in process.stop()


def test_a_server_that_needs_tokens_starts_before_its_database_and_lets_nobody_in(serve):
    """Whether there is a token cannot be told yet; it asks for one."""
    import httpx

    process = serve("--host", "0.0.0.0", environment={"AQ_DATA_SERVER__MONGO": SECRET})
    url = process.url.replace("0.0.0.0", "127.0.0.1")
    ready = httpx.get(f"{url}/readyz", timeout=30)
    assert (ready.status_code, ready.json()["stores"]) == (503, {"default": "ok"})
    assert ready.json()["metadata"] != "ok"
    assert httpx.post(f"{url}/api/v1/search", json={}, timeout=30).status_code == 401
    asked = httpx.post(f"{url}/api/v1/search", json={}, timeout=30, headers={"Authorization": "Bearer x"})
    assert (asked.status_code, asked.headers["Retry-After"]) == (503, "1")
    assert "s3cret" not in process.stop()


def test_without_mongo_the_driver_is_not_loaded():
    """A server over SQLite pays nothing for it."""
    code = "import sys, aq_server.app, aq_server.__main__; sys.exit('pymongo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
