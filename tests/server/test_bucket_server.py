"""A server over MongoDB and a bucket keeps nothing of its own: what one saves another reads."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from aq_server.commands.serving import running
from aq_server.config import ServerConfig, StoreConfig
from aq_server.deployment import open_stores
from services.buckets import ACCESS_KEY, SECRET_KEY

import aq_data
from aq_data.errors import ConfigError


@pytest.fixture
def config(mongo, mongo_database, data, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    options = {"endpoint": bucket.options.endpoint, "anonymous": bucket.options.anonymous}
    store = StoreConfig(url=bucket.url, **options)
    return ServerConfig(
        data=str(data),
        port=0,
        stores={"default": store},
        mongo=mongo,
        mongo_database=mongo_database,
    )


@pytest.mark.services
def test_what_one_server_saves_another_with_an_empty_folder_reads(config, tmp_path):
    """Arrays, attached files, a sweep; and what one deletes is gone from the other."""
    other = ServerConfig(
        **{field: getattr(config, field) for field in config.__struct_fields__} | {"data": str(tmp_path / "b")}
    )
    trace, matrix = np.linspace(0, 1, 5), np.arange(600_000, dtype="f8").reshape(600, 1000)
    note = tmp_path / "notes.txt"
    note.write_text("cold")
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(aq_data.connect(stack.enter_context(running(each)))) for each in (config, other))
        file = one.save({"trace": trace, "matrix": matrix}, name="T1", files=[note])
        found = two.get(file.id)
        assert np.array_equal(found["trace"][1:3], trace[1:3])
        assert np.array_equal(found["matrix"][:], matrix)
        assert found.path.startswith(config.stores["default"].url)
        with one.sweep("T2", dims={"delay": None}, variables={"iq": ("float64", ("delay",))}) as sweep:
            for i in range(5):
                sweep.append(iq=np.full(2, i, "float64"), delay=np.array([2.0 * i, 2.0 * i + 1]), dim="delay")
        assert np.array_equal(two.get(sweep.id)["iq"][:], np.repeat(np.arange(5.0), 2))
        two.delete(file.id)
        assert one.search({}).total == 1


def test_what_is_no_address_of_a_bucket_and_options_of_another_kind_are_refused_at_the_start(data):
    """By name, before anything is stored."""
    for store, wrong in (
        (StoreConfig(url="https://bucket"), "https://bucket"),
        (StoreConfig(url="gs://bucket", region="eu"), "region"),
        (StoreConfig(url="s3://bucket", credentials_file=str(data / "absent")), "absent"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            open_stores(ServerConfig(data=str(data), stores={"default": store}))


def test_blobs_may_lie_in_another_folder(data, tmp_path):
    """Named by the store `default`, made when absent."""
    disk = tmp_path / "disk"
    config = ServerConfig(data=str(data), port=0, stores={"default": StoreConfig(url=str(disk))})
    with running(config) as url, aq_data.connect(url) as client:
        file = client.save({"y": np.arange(3)}, name="x")
        assert file.path.startswith(str(disk))
        assert not (data / "blobs").exists()
