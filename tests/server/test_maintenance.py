"""What `gc` takes and leaves, and what `verify` says beside servers at work."""

from __future__ import annotations

import asyncio
import os
import time

import numpy as np
import pytest
from aq_server.commands.serving import running
from aq_server.config import ServerConfig
from aq_server.service import collecting
from services.deployment import at, blobs, listed, lose_database, opened, overwrite, with_stores

import aq_data
from aq_data.errors import ValidationError
from aq_data.models.datafile import make_id
from aq_data.storage.arrays import _files
from aq_data.storage.arrays.blobs import BlobStore


def gc(data, older_than: float = 0.0, force: bool = False) -> list[tuple[str, str]]:
    found = with_stores(data, lambda stores: listed(stores.maintenance.gc(older_than, True, force)))
    return [(orphan.prefix, orphan.reason) for orphan in found if orphan.removed]


def test_no_name_of_an_array_makes_it_an_orphan(data):
    """Also such as the store gives to what it has not finished."""
    values = {
        name: np.arange(5.0) + i for i, name in enumerate(["x.tmp", "zarr.json.tmp", "files", "open", "blocks", ".tmp"])
    }
    scalars = {f"0 {name}": np.float64(1.5) for name in values}
    with opened(data) as client:
        id = client.save(values | scalars).id
        assert gc(data) == []
        file = client.get(id)
        for name, expected in (values | scalars).items():
            np.testing.assert_array_equal(file[name][...], expected)


def test_what_was_being_replaced_when_a_process_died_goes(data):
    with opened(data) as client:
        file = client.save({"x": np.arange(5.0)})
        group = at(file.path)
        for name in ("zarr.json.17.4.99.tmp", "x/zarr.json.17.4.99.tmp"):
            overwrite(group / name, b"half")
        assert sorted(gc(data)) == sorted(
            (f"{group.relative_to(blobs(data))}/{name}", "never finished")
            for name in ("zarr.json.17.4.99.tmp", "x/zarr.json.17.4.99.tmp")
        )
        assert gc(data) == []
        np.testing.assert_array_equal(client.get(file.id)["x"][...], np.arange(5.0))


def test_folders_in_which_nothing_lies_go_when_they_are_old(tmp_path):
    """Of a save into a folder that died before its first blob; the age is that of the innermost."""
    config = ServerConfig(data=str(tmp_path), port=0)
    with running(config) as url, aq_data.connect(url) as client:
        kept = client.save({"x": np.arange(5.0)}).id
    begun = tmp_path / "blobs" / make_id(1, bytes(10)) / ("a" * 16) / "arrays.zarr" / "x" / "c"
    begun.mkdir(parents=True)
    assert gc(config, older_than=60) == []
    os.utime(begun, (time.time() - 100,) * 2)
    assert gc(config, older_than=60) == [(f"{begun.parts[-5]}/{'a' * 16}", "never published")]
    assert [path.name for path in (tmp_path / "blobs").iterdir() if path.is_dir()] == [kept]


@pytest.mark.parametrize("known", [0, 3])
def test_what_a_lost_database_knew_is_not_collected(data, monkeypatch, known):
    """Neither where it is gone, nor where it is an older copy that lacks many: `reindex` takes in what is there."""
    monkeypatch.setattr(collecting, "FEW", 4)
    with opened(data) as client:
        for _ in range(5):
            client.save({"x": np.arange(5.0)}, instruments={"vna": {f"s{i}": i / 7 for i in range(3000)}})
    lose_database(data)
    with opened(data) as client:
        for _ in range(known):
            client.save({"x": np.arange(5.0)})
    assert gc(data) == []
    found = with_stores(data, lambda stores: listed(stores.reindexing.run()))
    assert [one.outcome for one in found].count("restored") == 5
    with opened(data) as client:
        assert all(file["x"][...].tolist() == [0, 1, 2, 3, 4] for file in client.search(limit=None))
        assert client.count() == 5 + known
    assert gc(data) == []


@pytest.mark.parametrize("is_many", [False, True])
def test_a_few_saves_that_died_at_the_last_moment_are_collected_and_many_by_force(data, monkeypatch, is_many):
    """They look as what a lost database knew: that they are few among others tells them apart."""
    with opened(data) as client:
        for _ in range(3):
            client.save({"x": np.arange(5.0)})
    lose_database(data)
    with opened(data) as client:
        kept = client.save({"x": np.arange(5.0)}).id
    monkeypatch.setattr(collecting, "FEW", 2 if is_many else 3)
    assert [reason for _, reason in gc(data)] == ([] if is_many else ["never published"] * 3)
    assert [reason for _, reason in gc(data, force=True)] == (["never published"] * 3 if is_many else [])
    with opened(data) as client:
        assert client.get(kept)["x"][...].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("change", ["delete", "update"])
def test_what_changes_while_it_is_verified_is_no_finding(data, monkeypatch, change):
    """The listing is of before, the reading of after."""
    with opened(data) as client:
        others = [client.save({"x": np.arange(5.0)}).id for _ in range(3)]
        file = client.save({"x": np.arange(5.0)})
        looked = 0

        def disturb() -> None:
            if change == "delete":
                client.delete(file.id)
            else:
                client.update(file.id, {"comment": "newer"})

        for kind in BlobStore.__subclasses__():

            async def walk(self, prefix, *, folders=False, walked=kind.walk):
                nonlocal looked
                async for entry in walked(self, prefix, folders=folders):
                    yield entry
                if prefix == file.id:
                    looked += 1
                    if looked == 1:
                        await asyncio.to_thread(disturb)

            monkeypatch.setattr(kind, "walk", walk)
        assert [f for f in with_stores(data, lambda stores: listed(stores.maintenance.verify())) if f.kind != "orphan"] == []
        assert looked >= 1
        assert {hit.id for hit in client.search()} >= set(others)


@pytest.mark.parametrize("way", ["save", "sweep"])
def test_a_folder_that_takes_two_names_for_one_refuses_them(tmp_path, monkeypatch, way):
    """Before anything is acknowledged, also where the arrays come later."""
    monkeypatch.setattr(_files, "folds_names", lambda _: True)
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    with running(ServerConfig(data=str(tmp_path), port=0)) as url, aq_data.connect(url) as client:
        with pytest.raises(ValidationError, match="'T' and 't'"):
            if way == "save":
                client.save({"T": np.arange(3.0), "t": np.arange(3.0)})
            else:
                client.sweep("x", dims={"x": None}, variables={"T": ("f8", "x"), "t": ("f8", "x")}).flush(20)
        assert client.count() == 0
