"""Named stores: where DataFiles lie, who may add a place, and that none is taken away from under a DataFile."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
import time
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import xarray as xr
from aq_server.__main__ import main
from aq_server.app import Stores, build_app, open_stores
from aq_server.commands.serving import running
from aq_server.config import ServerConfig, StoreConfig, load_config
from aq_server.service import folding, health
from aq_server.service import stores as stores_module
from aq_server.service.datafiles import DataFiles
from aq_server.service.folding import Folding
from aq_server.service.growing import Growing
from aq_server.service.health import Health
from aq_server.service.notices import Notices
from aq_server.service.opening import Opening
from aq_server.service.signals import Signals
from aq_server.service.stores import StoreAdmin
from aq_server.service.sweep_parts import SweepParts
from forms import DATAFILES, new_id, save
from litestar.testing import TestClient
from services.deployment import deployed, listed, lose_database, with_stores

import aq_data
from aq_data.errors import ConfigError, ConflictError, ForbiddenError, UnavailableError, ValidationError
from aq_data.models.datafile import NewDataFile
from aq_data.models.stores import AddedStore
from aq_data.models.sweep import NewSweep, NewSweepArray
from aq_data.storage.arrays import stores as array_stores
from aq_data.storage.arrays.bucket import BucketOptions
from aq_data.storage.arrays.folder import FolderBlobs

STORES = "/api/v1/stores"


@pytest.fixture(autouse=True)
def _eager(monkeypatch, tmp_path):
    """What waits in a laboratory does not here; how long a server may remember keeps its ratio to how long is waited."""
    monkeypatch.setattr(array_stores, "KNOWN_SECONDS", 0.02)
    monkeypatch.setattr(stores_module, "FORGET_SECONDS", 0.03)
    monkeypatch.setattr(health, "KEPT_SECONDS", 0.0)
    monkeypatch.setattr(folding, "FOLD_BLOCKS", 4)
    monkeypatch.setattr(folding, "LOOK_SECONDS", 0.02)
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))


@pytest.fixture
def rooms(tmp_path) -> Path:
    """The folder in which admins may add stores."""
    (tmp_path / "rooms").mkdir()
    return tmp_path / "rooms"


@pytest.fixture
def config(data, tmp_path, rooms) -> ServerConfig:
    """`default` in the data folder, `archive` beside it, masks in `masks`, and room for more."""
    return deployed(
        data,
        stores={"archive": StoreConfig(url=str(tmp_path / "archive")), "masks": StoreConfig(url=str(tmp_path / "masks"))},
        store_of_kind={"mask": "masks"},
        store_roots={f"{rooms}/": BucketOptions()},
    )


@pytest.fixture
def own(config):
    with running(config) as url, httpx.Client(base_url=url, timeout=60, verify=False) as http:
        yield http


@pytest.fixture
def client(own):
    with aq_data.connect(str(own.base_url)) as client:
        yield client


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".ready")


# --- where DataFiles lie -------------------------------------------------------------------------------------------


def test_a_datafile_lies_in_the_store_it_names_or_in_that_of_its_kind(client, data, tmp_path):
    """Its path leads there, any Zarr reader opens it, and it is found, counted and sorted by its store."""
    values = {"a": np.arange(3.0)}
    files = {
        "default": client.save(values, files={"n.txt": b"x"}),
        "archive": client.save(values, store="archive", files={"n.txt": b"x"}),
        "masks": client.save(values, kind="mask"),
    }
    named = client.save(values, kind="mask", store="archive")
    roots = {"default": data / "blobs", "archive": tmp_path / "archive", "masks": tmp_path / "masks"}
    for store, file in files.items():
        assert file.store == store
        assert Path(file.path).is_relative_to(roots[store])
        with xr.open_zarr(file.path, chunks=None, consolidated=False) as plain:
            np.testing.assert_array_equal(plain["a"], values["a"])
        np.testing.assert_array_equal(file["a"][:], values["a"])
        assert client.search({"store": store, "id": file.id})[0].path == file.path == client.get(file.id).path
        assert client.update(file.id, {"comment": "x"}).path == file.path
        assert client.get(file.id, revision=1).path == file.path
        assert client.revert(file.id, 1).path == file.path
    assert files["archive"].read_file("n.txt") == b"x"
    assert dict(client.distinct("store")) == {"default": 1, "archive": 2, "masks": 1}
    assert [file.store for file in client.search({}, sort="store")] == ["archive", "archive", "default", "masks"]
    assert named.store == "archive"
    results = client.save_many([{"name": "a", "store": "archive"}, {"name": "b"}, {"name": "c", "store": "nowhere"}])
    assert [result.file.store if result.file else result.error.code for result in results] == [
        "archive",
        "default",
        "invalid",
    ]
    assert client.get_many([results[0].id])[0].file.path == results[0].file.path
    assert Path(results[0].file.path).is_relative_to(roots["archive"])


def test_a_store_that_does_not_exist_is_refused_with_those_that_do(client, tmp_path):
    for call in (lambda: client.save({"a": np.arange(3)}, store="nowhere"), lambda: client.save(store="nowhere")):
        with pytest.raises(ValidationError, match="there are default, archive, masks"):
            call()
    with pytest.raises(ValidationError, match="there are default, archive, masks"):
        client.sweep("T1", dims={"x": None}, variables={"y": ("f8", "x")}, store="nowhere")
    with pytest.raises(ValidationError, match="set by the server"):
        client.update(client.save(name="x").id, {"store": "archive"})


def test_the_store_is_not_content_so_a_retry_with_another_changes_nothing(client, tmp_path):
    id = new_id()
    first = client.save({"a": np.arange(3.0)}, id=id, store="archive")
    for store in (None, "masks", "gone"):
        again = client.save({"a": np.arange(3.0)}, id=id, store=store)
        assert (again.store, again.path, again.revision) == ("archive", first.path, 1)
    assert not files_below(tmp_path / "masks")
    with pytest.raises(ConflictError):
        client.save({"a": np.arange(4.0)}, id=id, store="archive")


def test_the_path_is_that_of_where_the_store_lies_now(config, data, tmp_path):
    """A folder that was moved, with its configuration, leads the same documents to the same bytes."""
    with running(config) as url, aq_data.connect(url) as client:
        id = client.save({"a": np.arange(3.0)}, store="archive").id
        other = client.save({"a": np.arange(4.0)}).id
    shutil.move(tmp_path / "archive", tmp_path / "elsewhere")
    shutil.move(data, tmp_path / "moved")
    stores = {**config.stores, "archive": StoreConfig(url=str(tmp_path / "elsewhere"))}
    moved = msgspec.structs.replace(config, data=str(tmp_path / "moved"), stores=stores)
    with running(moved) as url, aq_data.connect(url) as client:
        for file, root, n in ((client.get(id), "elsewhere", 3), (client.search({"id": other})[0], "moved", 4)):
            assert Path(file.path).is_relative_to(tmp_path / root)
            np.testing.assert_array_equal(xr.open_zarr(file.path, chunks=None, consolidated=False)["a"], np.arange(float(n)))
        assert client.search({}).table(["path"])["path"].tolist() == [client.get(other).path, client.get(id).path]


def test_a_sweep_lives_and_ends_in_its_store(client, config, tmp_path, data):
    """Blocks, also large ones, folds, previews, events and the plain group: nothing of it lies anywhere else."""
    large = np.random.default_rng(0).random((1, 600_000))
    with client.sweep("T1", dims={"x": None, "k": 600_000}, variables={"y": ("f8", ("x", "k")), "n": ("i4", "x")}, store="archive") as sweep:  # fmt: skip
        sweep.write(y=large, at={"x": slice(0, 1)})
        for i in range(20):
            sweep.append(n=i, dim="x")
            if i % 7 == 0:
                sweep.flush()
        sweep.flush()
        file = client.get(sweep.id)
        assert (file.store, file.state) == ("archive", "open")
        np.testing.assert_array_equal(file["y"][0], large[0])
    file = client.get(sweep.id)
    assert Path(file.path).is_relative_to(tmp_path / "archive")
    np.testing.assert_array_equal(xr.open_zarr(file.path, chunks=None)["n"].values[1:], np.arange(20))
    assert [event.kind for event in client.follow(sweep.id)][-1] == "finished"
    assert not files_below(data / "blobs")
    assert with_stores(config, lambda stores: listed(stores.maintenance.verify())) == []


# --- operating several stores --------------------------------------------------------------------------------------


def filled(client: aq_data.Client) -> dict[str, str]:
    """A DataFile with a snapshot in each of two stores, a sweep, and one that was deleted."""
    settings = {"vna": {"settings": {f"s{i}": ["x"] * 10 for i in range(1000)}}}
    ids = {}
    for store in ("default", "archive"):
        ids[store] = client.save({"a": np.arange(3.0)}, instruments=settings, store=store, name=store).id
        ids[f"{store} deleted"] = client.save({"a": np.arange(3.0)}, store=store).id
        client.delete(ids[f"{store} deleted"])
    with client.sweep("T1", dims={"x": None}, variables={"y": ("f8", "x")}, store="archive") as sweep:
        sweep.append(y=1.5, dim="x")
    ids["sweep"] = sweep.id
    return ids


def test_a_lost_database_is_rebuilt_from_all_stores(config, data, tmp_path):
    """Each DataFile is found where it lies, with its snapshot from there; an orphan in one store does not hide the truth
    in another, nor raise what was deleted there.
    """
    with running(config) as url, aq_data.connect(url) as client:
        ids = filled(client)
        before = {id: client.get(id, include_deleted=True).to_json() for id in ids.values()}
    shutil.copytree(tmp_path / "archive" / ids["archive deleted"], data / "blobs" / ids["archive deleted"])
    for mark in (data / "blobs" / ids["archive deleted"]).glob("tombstone-*"):
        mark.unlink()
    lose_database(data)
    found = with_stores(config, lambda stores: listed(stores.reindexing.run()))
    assert {(entry.id, entry.store) for entry in found if entry.outcome == "restored"} == {
        (ids["default"], "default"),
        (ids["archive"], "archive"),
        (ids["sweep"], "archive"),
    }
    with running(config) as url, aq_data.connect(url) as client:
        for name, id in ids.items():
            after = client.get(id, include_deleted=True)
            if "deleted" in name:
                assert after.state == "deleted"
                continue
            assert {**after.to_json(), "revision": 0} == {**before[id], "revision": 0}
            after.load()
    assert [finding.kind for finding in verified(config) if finding.kind != "orphan"] == []


def verified(config: ServerConfig) -> list:
    return with_stores(config, lambda stores: listed(stores.maintenance.verify()))


def test_gc_and_verify_go_through_all_stores(config, data, tmp_path, capsys):
    """Damage, orphans and what was deleted are found where they lie; each store keeps the snapshots that are its own."""
    with running(config) as url, aq_data.connect(url) as client:
        ids = filled(client)
        client.delete(ids["default"])
    next((tmp_path / "archive" / ids["archive"]).rglob("c/0")).write_bytes(b"damage")
    kinds = {(finding.kind, finding.store) for finding in verified(config)}
    assert kinds == {("damaged_chunk", "archive"), ("orphan", "default"), ("orphan", "archive")}
    orphans = with_stores(config, lambda stores: listed(stores.maintenance.gc(0.0, delete=True)))
    assert {(orphan.prefix.split("/")[0], orphan.store) for orphan in orphans} == {
        (ids["default"], "default"),
        (ids["default deleted"], "default"),
        (ids["archive deleted"], "archive"),
    }
    assert (data / "blobs" / "snapshots").exists(), "a tombstone keeps its snapshot"
    assert len(files_below(tmp_path / "archive" / "snapshots")) == 1
    assert {finding.kind for finding in verified(config)} == {"damaged_chunk"}


def test_a_snapshot_that_only_another_store_needs_is_an_orphan_in_this_one(config, data, tmp_path):
    with running(config) as url, aq_data.connect(url) as client:
        filled(client)
    (snapshot,) = files_below(tmp_path / "archive" / "snapshots")
    (tmp_path / "masks" / "snapshots").mkdir(parents=True)
    shutil.copy(snapshot, tmp_path / "masks" / "snapshots")
    orphans = with_stores(config, lambda stores: listed(stores.maintenance.gc(0.0, delete=True)))
    assert [orphan.prefix for orphan in orphans if orphan.store == "masks"] == [f"snapshots/{snapshot.name}"]
    assert snapshot.exists()


def test_what_lies_in_a_store_that_is_not_known_is_told_and_hinders_nothing(config):
    """A server that lost a store from its configuration reads the others, and says which one it lacks."""
    with running(config) as url, aq_data.connect(url) as client:
        lost, other = client.save({"a": np.arange(3.0)}, store="archive").id, client.save({"a": np.arange(3.0)}).id
    poorer = msgspec.structs.replace(config, stores={}, store_of_kind={})
    with running(poorer) as url, aq_data.connect(url) as client:
        assert client.get(lost).path == ""
        assert [file.path != "" for file in client.search({}, sort="created_at")] == [False, True]
        with httpx.Client(base_url=url) as http:
            answer = http.get(f"{DATAFILES}/{lost}/arrays/a")
            assert answer.status_code == 503
            assert "'archive'" in answer.json()["detail"]
        client.get(other)["a"][:]
    assert [(finding.kind, finding.store) for finding in verified(poorer)] == [("no_store", "archive")]


def test_a_store_that_cannot_be_opened_is_told_by_gc_and_verify_after_the_others_were_looked_at(config, tmp_path, data):
    with running(config) as url, aq_data.connect(url) as client:
        lost, other = client.save(store="archive").id, client.save().id
        client.delete(other)
    shutil.rmtree(tmp_path / "archive")
    (tmp_path / "archive").write_text("no folder")

    async def collect(stores: Stores) -> list:
        found = []
        with pytest.raises(UnavailableError, match="archive"):
            async for orphan in stores.maintenance.gc(0.0, delete=True):
                found.append(orphan.prefix.split("/")[0])
        return found

    assert [(finding.kind, finding.id) for finding in verified(config)] == [("no_store", lost), ("orphan", other)]
    assert with_stores(config, collect) == [other]
    assert [(finding.kind, finding.id) for finding in verified(config)] == [("no_store", lost)]


# --- one store down ------------------------------------------------------------------------------------------------


def test_a_store_that_is_down_takes_none_of_the_others_along(client, own, tmp_path):
    """Degraded, not unavailable: only what lies there fails, with 503; it recovers without a restart."""
    lying = client.save({"a": np.arange(3.0)}, store="archive")
    ready = own.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert ready.json()["stores"] == {"default": "ok", "archive": "ok", "masks": "ok"}
    shutil.move(tmp_path / "archive", tmp_path / "away")
    (tmp_path / "archive").write_text("no folder")
    ready = own.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert {name for name, state in ready.json()["stores"].items() if state != "ok"} == {"archive"}
    assert own.post(DATAFILES, json={"name": "x"}).status_code == 201
    assert own.post(DATAFILES, json={"name": "x", "store": "archive"}).status_code >= 500
    (tmp_path / "archive").unlink()
    shutil.move(tmp_path / "away", tmp_path / "archive")
    np.testing.assert_array_equal(lying["a"][:], np.arange(3.0))
    assert own.get("/readyz").json()["status"] == "ready"


def test_a_store_that_cannot_be_opened_hinders_no_start(config, tmp_path):
    (tmp_path / "archive").write_text("no folder")
    with running(config) as url, httpx.Client(base_url=url) as http:
        assert http.get("/readyz").json()["status"] == "degraded"
        answer = http.post(DATAFILES, json={"name": "x", "store": "archive"})
        assert (answer.status_code, "archive" in answer.json()["detail"]) == (503, True)
        assert http.post(DATAFILES, json={"name": "x"}).status_code == 201


def test_a_store_that_hangs_is_reported_in_time_and_the_default_decides(config, monkeypatch):
    """Probes run side by side, each within its limit; one that hangs is asked once, however many want to know."""
    monkeypatch.setattr(health, "LIMIT_SECONDS", 0.2)
    asked: list[str] = []
    hanging = threading.Event()

    async def hang(self) -> None:
        asked.append(self._root.name)
        while self._root.name != "blobs" and not hanging.is_set():
            await asyncio.sleep(0.01)

    monkeypatch.setattr(FolderBlobs, "check", hang)
    with running(config) as url, httpx.Client(base_url=url) as http:
        for _ in range(3):
            before = time.monotonic()
            ready = http.get("/readyz")
            assert time.monotonic() - before < 1.0
            assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
            assert "does not answer" in ready.json()["stores"]["archive"]
        assert (asked.count("archive"), asked.count("masks"), asked.count("blobs")) == (1, 1, 3)
        assert http.post(DATAFILES, json={"name": "x"}).status_code == 201
        hanging.set()
        until = time.monotonic() + 10
        while http.get("/readyz").json()["status"] != "ready":
            assert time.monotonic() < until


def test_an_answer_about_health_counts_for_a_while(config, monkeypatch):
    monkeypatch.setattr(health, "KEPT_SECONDS", 60.0)
    asked: list[str] = []

    async def check(self) -> None:
        asked.append(self._root.name)

    monkeypatch.setattr(FolderBlobs, "check", check)
    with running(config) as url, httpx.Client(base_url=url) as http:
        for _ in range(5):
            assert http.get("/readyz").status_code == 200
    assert sorted(asked) == ["archive", "blobs", "masks"]


def test_without_its_default_store_a_server_is_not_ready(config, tmp_path):
    (tmp_path / "archive").write_text("no folder")
    with running(msgspec.structs.replace(config, default_store="archive")) as url, httpx.Client(base_url=url) as http:
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()["status"], ready.headers["retry-after"]) == (503, "unavailable", "1")


# --- adding and taking away ----------------------------------------------------------------------------------------


def test_an_admin_adds_a_store_that_every_server_knows_at_once(config, client, own, rooms):
    """It is used on both, listed with its use, kept over restarts, and refused to go while a DataFile lies there."""
    with running(config) as url, aq_data.connect(url) as other:
        answer = own.put(f"{STORES}/fast", json={"root": f"{rooms}/fast/"})
        assert (answer.status_code, answer.json()["root"]) == (201, f"{rooms}/fast")
        assert own.put(f"{STORES}/fast", json={"root": f"{rooms}/fast"}).status_code == 200
        file = other.save({"a": np.arange(3.0)}, store="fast")
        assert client.get(file.id).path == file.path == f"{rooms}/fast/{file.id}/{Path(file.path).parts[-2]}/arrays.zarr"
        np.testing.assert_array_equal(client.get(file.id)["a"][:], np.arange(3.0))
        fast = next(store for store in other.stores() if store.name == "fast")
        assert (fast.kind, fast.origin, fast.datafiles, fast.state, fast.default_for) == ("folder", "added", 1, "ok", [])
        with pytest.raises(ConflictError, match="1 DataFiles") as failure:
            client.remove_store("fast")
        assert (failure.value.code, failure.value.details["datafiles"]) == ("in_use", 1)
        assert other.save(store="fast").store == "fast", "it is open as before"
    with running(config) as url, aq_data.connect(url) as later:
        later.get(file.id)["a"][:]
        assert [store.name for store in later.stores()] == ["default", "archive", "masks", "fast"]


def test_a_store_goes_when_nothing_lies_there_and_its_name_may_have_another_root(config, client, rooms):
    """Deleted is not gone: the bytes are there until gc. Afterwards every server refuses the name, and takes it anew."""
    with running(config) as url, aq_data.connect(url) as other:
        client.add_store("fast", f"{rooms}/fast")
        file = other.save({"a": np.arange(3.0)}, store="fast")
        client.delete(file.id)
        for change in (lambda: client.remove_store("fast"), lambda: client.add_store("fast", f"{rooms}/faster")):
            with pytest.raises(ConflictError, match="something lies"):
                change()
        with_stores(config, lambda stores: listed(stores.maintenance.gc(0.0, delete=True)))
        assert client.add_store("fast", f"{rooms}/faster").root == f"{rooms}/faster"
        moved = other.save({"a": np.arange(4.0)}, store="fast")
        assert Path(moved.path).is_relative_to(rooms / "faster")
        np.testing.assert_array_equal(client.get(moved.id)["a"][:], np.arange(4.0))
        with pytest.raises(ConflictError, match="1 DataFiles"):
            client.add_store("fast", f"{rooms}/fast")
        other.delete(moved.id)
        with_stores(config, lambda stores: listed(stores.maintenance.gc(0.0, delete=True)))
        other.remove_store("fast")
        for each in (client, other):
            with pytest.raises(ValidationError, match="'fast' does not exist"):
                each.save(store="fast")
        with pytest.raises(aq_data.errors.NotFoundError):
            client.remove_store("fast")
        assert client.get(file.id, include_deleted=True).path == ""


@pytest.mark.parametrize("name", ["default", "archive"])
def test_stores_of_the_configuration_are_not_changed_over_http(client, rooms, name):
    for change in (lambda: client.remove_store(name), lambda: client.add_store(name, f"{rooms}/x")):
        with pytest.raises(ConflictError, match="configuration"):
            change()


def test_a_default_is_not_taken_away(config, rooms):
    """An added store may be a default; without it a save that names none says so, and is no mistake of the client's."""
    config = msgspec.structs.replace(config, default_store="fast", store_of_kind={"generic": "slow"})
    with running(config) as url, aq_data.connect(url) as client, httpx.Client(base_url=url) as http:
        assert http.post(DATAFILES, json={"name": "x"}).status_code == 503
        assert http.get("/readyz").status_code == 503
        for name in ("fast", "slow"):
            client.add_store(name, f"{rooms}/{name}")
            with pytest.raises(ConflictError, match="default"):
                client.remove_store(name)
        assert (client.save().store, client.save(kind="generic").store) == ("fast", "slow")
        assert {store.name: store.default_for for store in client.stores() if store.default_for} == {
            "fast": ["*"],
            "slow": ["generic"],
        }
        assert http.get("/readyz").status_code == 200


def test_roots_that_no_one_allowed_are_refused_and_nothing_is_made_there(client, rooms, tmp_path):
    """Traversal, prefixes of names, links out of the room and into it, other schemes: 403 or 422, and no folder."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (rooms / "link").symlink_to(outside)
    (rooms / "deep").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for root in (str(outside), f"{rooms}-2", f"{rooms}/link", f"{rooms}/link/a", f"{rooms}/deep/outside/a", "/", "gs://lab/a", "s3://lab"):  # fmt: skip
        with pytest.raises(ForbiddenError, match="not among the roots"):
            client.add_store("fast", root)
    for root in (f"{rooms}/../outside", "rooms", f"{rooms}/a\x00b", "http://lab/a", f"{rooms}/a*", "", "memory:"):
        with pytest.raises(ValidationError):
            client.add_store("fast", root)
    for name in ("Fast", "..", "a b"):
        with pytest.raises(aq_data.errors.AqDataError):
            client.add_store(name, f"{rooms}/fast")
    assert sorted(tmp_path.rglob("*")) == before
    assert len(client.stores()) == 3


def test_a_link_inside_the_room_is_resolved_once_and_a_root_that_becomes_one_is_not_followed(
    config, client, rooms, tmp_path
):
    (rooms / "true").mkdir()
    (rooms / "link").symlink_to(rooms / "true")
    assert client.add_store("fast", f"{rooms}/link/a").root == f"{rooms}/true/a"
    file = client.save({"a": np.arange(3.0)}, store="fast")
    shutil.move(rooms / "true" / "a", tmp_path / "stolen")
    (rooms / "true" / "a").symlink_to(tmp_path / "stolen")
    with running(config) as url, httpx.Client(base_url=url) as http:
        answer = http.get(f"{DATAFILES}/{file.id}/arrays/a")
        assert answer.status_code == 503
        assert "link" in answer.json()["detail"] or "not among" in answer.json()["detail"]


def test_two_stores_never_share_a_place(client, data, rooms, tmp_path):
    """Each would take the other's blobs for orphans."""
    client.add_store("fast", f"{rooms}/fast")
    (rooms / "same").symlink_to(rooms / "fast")
    for root in (f"{rooms}/fast", f"{rooms}/fast/inside", f"{rooms}", f"{rooms}/same", f"{rooms}/same/x"):
        with pytest.raises(ConflictError, match="overlap"):
            client.add_store("slow", root)
    assert client.add_store("slow", f"{rooms}/fast-2").state == "ok"


def test_of_two_who_add_stores_in_one_place_at_once_at_most_one_succeeds(config, rooms):
    async def race(stores: Stores) -> list:
        admin = StoreAdmin(stores.metadata, stores.arrays, Health(stores.metadata, stores.arrays))
        roots = [f"{rooms}/a", f"{rooms}/a", f"{rooms}/a/b", f"{rooms}/c"]
        outcomes = await asyncio.gather(*(admin.put(f"s{i}", root) for i, root in enumerate(roots)), return_exceptions=True)
        assert all(isinstance(outcome, (tuple, ConflictError)) for outcome in outcomes)
        return await stores.metadata.added_stores()

    added = with_stores(config, race)
    assert sum(store.root != f"{rooms}/c" for store in added) <= 1
    assert f"{rooms}/c" in {store.root for store in added}
    assert all(not store.closing for store in added)


def test_only_admins_change_stores(data, config, capsys, rooms):
    """Reading the list needs `read`; adding and taking away `admin`."""
    config = msgspec.structs.replace(config, require_token=True)
    secrets = {}
    for scope in ("read", "write", "admin"):
        assert main(["token", "create", scope, "--scope", scope, "--data", str(data), "--json"]) == 0
        secrets[scope] = json.loads(capsys.readouterr().out)["secret"]
    with TestClient(build_app(config, open_stores(config), ask_for_tokens=True).asgi) as http:
        for scope, secret in secrets.items():
            headers = {"Authorization": f"Bearer {secret}"}
            assert http.get(STORES, headers=headers).status_code == 200
            put = http.put(f"{STORES}/fast", json={"root": f"{rooms}/fast"}, headers=headers).status_code
            gone = http.delete(f"{STORES}/fast", headers=headers).status_code
            assert (put, gone) == ((201, 204) if scope == "admin" else (403, 403)), scope
        assert http.get(STORES).status_code == 401


# --- a save that races with the removal of its store ---------------------------------------------------------------


def begin_sweep(stores: Stores) -> Opening:
    """An attempt to open a sweep in the store `fast`."""
    growing, signals = Growing(stores.metadata, stores.arrays, 60.0), Signals()
    back = Folding(stores.metadata, stores.arrays, signals, Notices(stores.metadata, None))
    parts = SweepParts(stores.metadata, stores.arrays, growing, back, signals, frozenset(), 1 << 20)
    return Opening(parts, NewSweep(store="fast", arrays=(NewSweepArray("y", "<f8", (None,), ("x",)),)), None)


class Removal:
    """Another server that removes the store `fast` when it is told to, once."""

    def __init__(self, config: ServerConfig) -> None:
        self.stores = open_stores(config)
        self.admin = StoreAdmin(self.stores.metadata, self.stores.arrays, Health(self.stores.metadata, self.stores.arrays))
        self._task: asyncio.Task | None = None
        self.refusal: Exception | None = None

    async def close_store(self) -> None:
        """Begin; return when the store is closed and has not been looked into."""
        if self._task is None:
            self._task = asyncio.create_task(self.admin.remove("fast"))
            until = time.monotonic() + 10
            while not any(store.closing for store in await self.stores.metadata.added_stores()):
                assert time.monotonic() < until
                await asyncio.sleep(0.001)

    async def run(self) -> None:
        """Begin and end."""
        self._task = self._task or asyncio.create_task(self.admin.remove("fast"))
        (self.refusal,) = await asyncio.gather(self._task, return_exceptions=True)
        assert self.refusal is None or isinstance(self.refusal, ConflictError)


def call_before(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, act) -> None:
    original = getattr(owner, name)

    async def wrapped(*args, **options):
        await act()
        return await original(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("kind", ["save", "sweep"])
@pytest.mark.parametrize("moment", ["blobs", "confirm", "confirm while closed", "publish", "end"])
def test_a_save_is_never_acknowledged_into_a_store_that_is_gone(config, rooms, monkeypatch, moment, kind):
    """Wherever the removal, by another server, falls into the save: an acknowledged DataFile has its store, a refused one
    leaves nothing, so that the store can go.
    """

    async def race(here: Stores) -> None:
        removal = Removal(config)
        await removal.admin.put("fast", f"{rooms}/fast")
        blobs = (await here.arrays.at("fast")).blobs
        if moment == "blobs":
            call_before(monkeypatch, blobs, "put_many", removal.run)
        elif moment == "publish" and kind == "save":
            call_before(monkeypatch, here.metadata, "insert", removal.run)
        elif moment == "publish":
            call_before(monkeypatch, here.metadata.sweeps, "open", removal.run)
        elif moment != "end":
            monkeypatch.setattr(stores_module, "FORGET_SECONDS", 0.1)
            act = removal.run if moment == "confirm" else removal.close_store
            call_before(monkeypatch, here.arrays, "_confirm", act)
        new, document = NewDataFile(store="fast"), None
        attempt = begin_sweep(here) if kind == "sweep" else await DataFiles(here.metadata, here.arrays).begin_save(new, None)
        try:
            document = (await attempt.commit())[0]
        except UnavailableError:
            if kind == "save":
                await attempt.discard()
        await removal.run()
        names = [store.name for store in await removal.stores.metadata.added_stores()]
        assert (document is not None) == (moment in ("confirm", "publish", "end"))
        if document is not None:
            assert (names, type(removal.refusal)) == (["fast"], ConflictError)
            assert await blobs.children(document.id)
        else:
            assert set(await blobs.children("")) <= {".ready"}
            assert (names, removal.refusal) == ([], None)
        await removal.stores.close()

    with_stores(config, race)


def test_a_removal_that_died_half_way_leaves_a_closed_store_that_can_be_opened_again_or_removed(config, client, rooms):
    """While it is closed nothing new goes there; the next DELETE finishes, or a PUT with the same root undoes it."""
    client.add_store("fast", f"{rooms}/fast")

    async def die(stores: Stores):
        (before,) = await stores.metadata.added_stores()
        assert await stores.metadata.change_store(before, msgspec.structs.replace(before, closing="of a process that died"))

    with_stores(config, die)
    assert next(store for store in client.stores() if store.name == "fast").state == "closing"
    time.sleep(0.05)
    with pytest.raises(ValidationError, match="being removed"):
        client.save(store="fast")
    assert client.add_store("fast", f"{rooms}/fast").state == "ok"
    assert client.save(store="fast").store == "fast"
    client.add_store("slow", f"{rooms}/slow")
    client.remove_store("slow")


def test_a_removal_that_was_undone_meanwhile_does_not_take_the_store(config, rooms, monkeypatch):
    """Somebody opened the store again while it was being looked through: what was saved since stays."""

    async def race(stores: Stores):
        admin = StoreAdmin(stores.metadata, stores.arrays, Health(stores.metadata, stores.arrays))
        await admin.put("fast", f"{rooms}/fast")
        monkeypatch.setattr(stores_module, "FORGET_SECONDS", 0.5)
        removal = asyncio.create_task(admin.remove("fast"))
        until = time.monotonic() + 10
        while not (await stores.metadata.added_stores())[0].closing:
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
        await admin.put("fast", f"{rooms}/fast")
        with pytest.raises(ConflictError):
            await removal
        assert await stores.metadata.added_stores() == [AddedStore("fast", f"{rooms}/fast")]

    with_stores(config, race)


# --- configuration and secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stores": {"Fast": {"url": "/a"}}}, "stores.Fast"),
        ({"stores": {"fast": {"url": "a/b"}}}, "stores.fast.url"),
        ({"stores": {"fast": {"url": "/a/../b"}}}, "stores.fast.url"),
        ({"stores": {"a": {"url": "/x/y"}, "b": {"url": "/x/y/z"}}}, "overlap"),
        ({"stores": {"fast": {"url": "/a", "secret": "x"}}}, "secret"),
        ({"default_store": "fast"}, "'fast'"),
        ({"store_of_kind": {"mask": "fast"}}, "'fast'"),
        ({"store_of_kind": {"masks": "default"}}, "masks"),
        ({"store_roots": {"a": {}}}, "store_roots"),
        ({"store_roots": ["/a"]}, "store_roots"),
    ],
)
def test_a_configuration_of_stores_that_is_wrong_is_refused_by_name(tmp_path, changes, named):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"server": {"data": str(tmp_path / "data"), **changes}}))
    with pytest.raises(ConfigError, match=named):
        open_stores(load_config(path, {}, {}).server)


def test_stores_may_be_named_in_toml_and_in_the_environment(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[server]\ndefault_store = "a"\n[server.stores.a]\nurl = "/x/a"\n[server.store_roots]\n"/y" = {}\n')
    environment = {"AQ_DATA_SERVER__STORES": '{"b": {"url": "/x/b"}}', "AQ_DATA_SERVER__STORE_OF_KIND": '{"mask": "b"}'}
    assert load_config(path, {}, {}).server.stores["a"].url == "/x/a"
    server = load_config(path, environment, {}).server
    assert (list(server.stores), server.store_of_kind, server.default_store) == (["b"], {"mask": "b"}, "a")


def test_credentials_are_named_and_shown_nowhere(config, own, caplog, tmp_path):
    """An address with a secret in it is refused, in the configuration and over HTTP, without repeating it."""
    caplog.set_level(logging.DEBUG)
    url = "s3://AKIAEXAMPLE:s3cr3t@lab/a"
    answer = own.put(f"{STORES}/fast", json={"root": url})
    assert answer.status_code == 422
    shown = [answer.text, own.get(STORES).text, own.get("/readyz").text, own.get("/metrics").text]
    with pytest.raises(ConfigError) as failure:
        open_stores(msgspec.structs.replace(config, stores={"fast": StoreConfig(url=url)}))
    shown += [str(failure.value), repr(failure.value), caplog.text]
    for text in shown:
        assert "s3cr3t" not in text
        assert "AKIAEXAMPLE" not in text


def test_the_command_line_lists_adds_and_takes_away(own, rooms, capsys):
    flags = ("--url", str(own.base_url))
    assert main(["store", "add", "fast", f"{rooms}/fast", *flags]) == 0
    assert main(["store", "ls", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["fast", f"{rooms}/fast"]
    assert [line.split()[0] for line in lines[1:]] == ["default", "archive", "masks", "fast"]
    assert "default for *" in lines[1]
    assert "default for mask" in lines[3]
    assert main(["store", "ls", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["name"] == "fast"
    assert main(["save", "--name", "x", "--store", "archive", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["store"] == "archive"
    assert main(["store", "rm", "fast", *flags]) == 0
    assert main(["store", "rm", "fast", *flags]) == 1
    assert "no store 'fast'" in capsys.readouterr().err


def test_saving_by_hand_names_a_store_too(own):
    """The form and the JSON of `POST /datafiles` have the field `store`."""
    assert save(own, {"a": np.arange(3.0)}, store="archive")["store"] == "archive"
    assert own.post(DATAFILES, json={"store": "archive"}).json()["store"] == "archive"
    assert own.post(DATAFILES, json={"store": None}).status_code == 422
