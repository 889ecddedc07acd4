"""Named stores of a deployment on MongoDB: a folder and a bucket that an admin added, seen by two servers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from aq_server.commands.serving import running
from aq_server.config import ServerConfig
from aq_server.service import stores as stores_module
from services.deployment import listed, with_stores

import aq_data
from aq_data.errors import ConflictError, ForbiddenError, ValidationError
from aq_data.storage.arrays import stores as array_stores

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def _eager(monkeypatch, tmp_path):
    monkeypatch.setattr(array_stores, "KNOWN_SECONDS", 0.05)
    monkeypatch.setattr(stores_module, "FORGET_SECONDS", 0.1)
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))


@pytest.fixture
def config(mongo, mongo_database, data, bucket) -> ServerConfig:
    return ServerConfig(
        data=str(data),
        port=0,
        mongo=mongo,
        mongo_database=mongo_database,
        store_roots={f"{bucket.url}*": bucket.options},
    )


def test_a_bucket_that_an_admin_adds_is_a_store_on_every_server(config, bucket):
    """Saves, sweeps, files, gc, verify and reindex work there; it goes when nothing is left in it."""
    values = np.arange(600_000, dtype="f8")
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(aq_data.connect(stack.enter_context(running(config)))) for _ in range(2))
        with pytest.raises(ForbiddenError):
            one.add_store("elsewhere", bucket.url.replace("test-bucket", "other-bucket"))
        with pytest.raises(ValidationError):
            one.add_store("fast", f"{bucket.url}/../x")
        status = one.add_store("fast", f"{bucket.url}/fast")
        assert (status.kind, status.state, status.root) == (bucket.url[:2], "ok", f"{bucket.url}/fast")
        file = two.save({"a": values}, store="fast", files={"n.txt": b"x"})
        with two.sweep("T1", dims={"x": None}, variables={"y": ("f8", "x")}, store="fast") as sweep:
            sweep.append(y=1.5, dim="x")
        here = two.save({"a": np.arange(3.0)})
        assert one.get(file.id).path == file.path
        assert file.path.startswith(f"{bucket.url}/fast/{file.id}/")
        np.testing.assert_array_equal(one.get(file.id)["a"][10:20], values[10:20])
        assert one.get(file.id).read_file("n.txt") == b"x"
        assert one.get(sweep.id)["y"][:].tolist() == [1.5]
        with pytest.raises(ConflictError, match="2 DataFiles"):
            one.remove_store("fast")
        assert with_stores(config, lambda stores: listed(stores.maintenance.verify())) == []
        for id in (file.id, sweep.id):
            one.delete(id)
        with pytest.raises(ConflictError, match="something lies"):
            one.remove_store("fast")
        with_stores(config, lambda stores: listed(stores.maintenance.gc(0.0, delete=True)))
        one.remove_store("fast")
        with pytest.raises(ValidationError, match="does not exist"):
            two.save(store="fast")
        assert two.get(here.id)["a"][:].tolist() == [0, 1, 2]


def test_a_lost_database_is_rebuilt_from_a_folder_and_a_bucket(config, bucket, mongo_room):
    """Once the admin has named the bucket again."""
    with running(config) as url, aq_data.connect(url) as client:
        client.add_store("fast", f"{bucket.url}/fast")
        ids = {client.save({"a": np.arange(3.0)}, store=store).id: store for store in ("default", "fast")}
    mongo_room.clear()
    with running(config) as url, aq_data.connect(url) as client:
        client.add_store("fast", f"{bucket.url}/fast")
        found = with_stores(config, lambda stores: listed(stores.reindexing.run()))
        assert {entry.id: entry.store for entry in found if entry.outcome == "restored"} == ids
        for id, store in ids.items():
            assert client.get(id).store == store
            assert client.get(id)["a"][:].tolist() == [0, 1, 2]


def test_a_bucket_that_is_not_there_cannot_be_added(config, bucket):
    """422, which names it; nothing is left of the attempt."""
    missing = bucket.url.replace("test-bucket", "no-such-bucket")
    allowed = msgspec.structs.replace(config, store_roots={missing: bucket.options})
    with running(allowed) as url, aq_data.connect(url) as client:
        with pytest.raises(aq_data.errors.AqDataError, match="no-such-bucket"):
            client.add_store("fast", missing)
        assert [store.name for store in client.stores()] == ["default"]


def test_secrets_of_a_bucket_stand_in_no_answer_and_no_log(config, bucket, caplog, tmp_path):
    """Neither the key nor the file it is in: a client is told where a store lies, and not how it is reached."""
    caplog.set_level("DEBUG", "aq_data")
    with running(config) as url, aq_data.connect(url) as client:
        client.add_store("fast", f"{bucket.url}/fast")
        client.save({"a": np.arange(3.0)}, store="fast")
        logged = "".join(record.getMessage() + repr(vars(record)) for record in caplog.records if "aq_data" in record.name)
        shown = [repr(client.stores()), logged, repr(config.store_roots), client._http.request("GET", "/readyz").text]
    if bucket.options.credentials_file is not None:
        secrets = [line.partition(" = ")[2] for line in Path(bucket.options.credentials_file).read_text().splitlines()[1:]]
        for secret in secrets:
            assert secret
            assert not any(secret in text for text in shown)
        assert bucket.options.credentials_file not in shown[0] + shown[1] + shown[3]
