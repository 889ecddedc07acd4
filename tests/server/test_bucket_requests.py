"""What the operations cost in requests to the bucket, and how many of them wait for one another."""

from __future__ import annotations

import numpy as np
import pytest
import xarray
from aq_server.commands.serving import running
from aq_server.config import ServerConfig
from services.deployment import listed, with_stores
from services.proxying import rounds

import aq_data

SMALL = xarray.Dataset({"iq": (("flux",), np.arange(5.0))}, {"flux": np.arange(5.0)})


@pytest.fixture
def counted(proxied, data):
    """A client of a server on a bucket, and the proxy between them, which lets requests on when no more come."""
    bucket, proxy = proxied
    with running(ServerConfig(data=str(data), port=0, stores=bucket.as_default())) as url, aq_data.connect(url) as client:
        client.save(None, name="first")  # the connection and the credentials
        proxy.gathering = 0.25
        yield client, proxy


@pytest.mark.services
def test_a_small_save_is_one_round_of_one_request_for_each_object(counted):
    """Two of an array and its chunk, two of its coordinate, one of the group; a file attached to it is a request before."""
    client, proxy = counted
    with proxy.recording() as made:
        client.save(SMALL, name="T1")
    assert [request.method for request in made] == [made[0].method] * 5
    assert rounds(made) == 1
    with proxy.recording() as made:
        client.save(SMALL, name="T1", files=[__file__])
    assert (len(made), rounds(made)) == (6, 2)


@pytest.mark.services
def test_a_slice_is_one_request_for_each_chunk_and_one_round(counted):
    """Also of many chunks, of which none waits for another; what it costs does not depend on what lies beside."""
    client, proxy = counted
    file = client.save({"matrix": np.arange(1 << 20, dtype="f8").reshape(1024, 1024)}, name="T1")
    array = file["matrix"]
    with proxy.recording() as made:
        assert array[5, 7] == 5 * 1024 + 7
    assert [request.method for request in made] == ["GET"]
    with proxy.recording() as made:
        assert array[:, 3].shape == (1024,)
    assert 1 < len(made) <= 16
    assert rounds(made) == 1


@pytest.mark.services
def test_a_change_is_one_request_and_a_deletion_two(counted):
    """The metadata copy; and the mark that says so before."""
    client, proxy = counted
    file = client.save(SMALL, name="T1")
    with proxy.recording() as made:
        client.update(file.id, {"comment": "good"})
    assert len(made) == 1
    with proxy.recording() as made:
        client.delete(file.id)
    assert (len(made), rounds(made)) == (2, 2)


@pytest.mark.services
def test_an_attached_file_is_read_by_two_requests(counted, tmp_path):
    """Its size, which the answer begins with, and its bytes."""
    client, proxy = counted
    note = tmp_path / "notes.txt"
    note.write_bytes(b"0123456789" * 1000)
    file = client.save(None, name="T1", files=[note])
    with proxy.recording() as made:
        assert file.read_file("notes.txt") == note.read_bytes()
    assert len(made) == 2


@pytest.mark.services
def test_a_snapshot_of_the_instruments_is_looked_for_and_stored_once(counted, bucket):
    """Two requests more, beside the others and after the record; the first time also the snapshot.

    The emulator of GCS does not say what it is that is absent, which costs a look whether the bucket is there.
    """
    client, proxy = counted
    first = (3, 3) if bucket.url.startswith("s3") else (4, 4)
    vna = {"model": "Z1", "settings": {f"setting_{i}": {"value": i, "unit": "V"} for i in range(1000)}}
    for more, waits in (first, (2, 2)):
        with proxy.recording() as made:
            client.save(SMALL, name="T1", instruments={"vna": vna})
        assert len(made) == 5 + more
        assert rounds(made) <= waits  # the look whether the bucket is there may fall beside another


@pytest.mark.services
def test_a_long_attached_file_is_sent_in_parts(counted, tmp_path, bucket):
    """Of 8 MiB each, besides the beginning and on S3 the end."""
    client, proxy = counted
    path = tmp_path / "long.bin"
    path.write_bytes(bytes(20 << 20))
    with proxy.recording() as made:
        client.save(None, name="T1", files=[path])
    assert len(made) == 1 + 3 + (1 if bucket.url.startswith("gs") else 2)


@pytest.fixture
def filled(proxied, data):
    """A deployment in which thirty small DataFiles lie, and the proxy before its bucket."""
    bucket, proxy = proxied
    config = ServerConfig(data=str(data), port=0, stores=bucket.as_default())
    with running(config) as url, aq_data.connect(url) as client:
        for i in range(30):
            client.save(SMALL, name=str(i))
    return config, proxy


@pytest.mark.services
def test_collecting_is_one_request_for_a_thousand_blobs(filled):
    """Of whatever DataFiles, and one for the snapshots."""
    config, proxy = filled
    with proxy.recording() as made:
        assert with_stores(config, lambda stores: listed(stores.maintenance.gc(0.0, delete=True))) == []
    assert [request.method for request in made] == ["GET"] * 2


@pytest.mark.services
def test_verifying_is_one_request_for_each_blob_and_one_for_a_datafile(filled):
    """Besides those of collecting. Several DataFiles are looked at at once: they do not wait for one another."""
    config, proxy = filled
    proxy.gathering = 0.05
    with proxy.recording() as made:
        assert with_stores(config, lambda stores: listed(stores.maintenance.verify())) == []
    assert len(made) == 30 * (5 + 1) + 2
    assert rounds(made) < len(made) / 3
