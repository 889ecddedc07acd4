"""Large instruments lie once beside the blobs: referred to, proved, rebuilt from, and collected when nobody needs them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from aq_server.app import Stores
from aq_server.service.datafiles import DataFiles
from aq_server.service.saving import Save
from aq_server.service.snapshots import SnapshotMaintenance
from services.deployment import PRODUCTION, at, blobs, listed, lose_database, open_zarr, opened, overwrite, with_stores

import aq_data
from aq_data.models.datafile import DataFile, NewDataFile, make_id
from aq_data.models.query import parse_filter
from aq_data.storage.metadata.record import Record


def instruments(number: float = 1, settings: int = 600) -> dict:
    """Some 25 kB of JSON, another for each number."""
    return {
        "vna": {
            "settings": {"number": {"value": number}, **{f"s{i}": {"value": i / 7, "unit": "mV"} for i in range(settings)}}
        }
    }


def key_of(instruments: dict) -> str:
    return f"snapshots/{hashlib.sha256(msgspec.json.encode(instruments)).hexdigest()}.json"


def snapshots(data: Path) -> set[str]:
    """Keys of all that lies beside the blobs."""
    return {str(path.relative_to(blobs(data))) for path in blobs(data).glob("snapshots/*")}


def copy_of(file: aq_data.DataFile) -> dict:
    return json.loads((at(file.path) / "zarr.json").read_bytes())["attributes"]["aq_data"]["document"]


async def begin_save(stores: Stores) -> Save:
    new = NewDataFile(instruments=instruments())
    return await DataFiles(stores.metadata, stores.arrays).begin_save(new, None)


def verify(data: Path, repair: bool = False) -> list:
    found = with_stores(data, lambda stores: listed(stores.maintenance.verify(repair)))
    return [(finding.kind, finding.id) for finding in found]


def gc(data: Path) -> list[str]:
    found = with_stores(data, lambda stores: listed(stores.maintenance.gc(0.0, True)))
    return [orphan.prefix for orphan in found]


def left_of(number: int) -> list[str]:
    """What is left of a snapshot that no record has: the blob, and what MongoDB keeps of it."""
    key = key_of(instruments(number))
    return [key, key.removesuffix(".json")] if PRODUCTION else [key]


def record(number: int, **fields) -> Record:
    at = "2026-01-31T08:00:00.000000Z"
    id = make_id(number, number.to_bytes(10, "big"))
    document = DataFile(id=id, state="complete", revision=1, created_at=at, updated_at=at, **fields)
    return Record(document, f"{number:016x}", f"{number:064x}")


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_measurements_that_share_a_snapshot_refer_to_one_blob(data, client):
    """It proves itself by its name; who asks for the documents cannot tell."""
    files = [client.save({"a": np.arange(3)}, name=f"n{i}", instruments=instruments()) for i in range(3)]
    other = client.save(None, instruments=instruments(2))
    small = client.save(None, instruments={"vna": {"number": 1}})
    assert snapshots(data) == {key_of(instruments()), key_of(instruments(2))}
    for key in snapshots(data):
        content = (blobs(data) / key).read_bytes()
        assert hashlib.sha256(content).hexdigest() == Path(key).stem
    for file in files:
        assert copy_of(file)["instruments"] == {"$snapshot": Path(key_of(instruments())).stem}
        assert client.get(file.id).instruments == instruments()
        np.testing.assert_array_equal(open_zarr(file.path, chunks=None)["a"], np.arange(3))
    assert copy_of(small)["instruments"] == {"vna": {"number": 1}}
    assert client.search({"instruments.vna.settings.number.value": 2}).total == 1
    assert [file.instruments for file in client.search({"instruments.vna.settings.number.value": 1}, limit=9)] == [
        instruments()
    ] * 3
    assert client.get(other.id).instruments == instruments(2)
    assert verify(data) == []


def test_a_change_inside_a_snapshot_is_a_difference_and_can_be_undone(data, client):
    """The document refers to another snapshot then, and none when it has become small."""
    file = client.save(None, name="n", instruments=instruments())
    client.update(file.id, {"instruments": {"vna": {"settings": {"number": {"value": 7}}}}})
    assert copy_of(client.get(file.id))["instruments"] == {"$snapshot": Path(key_of(instruments(7))).stem}
    (change,) = client.history(file.id)[:1]
    assert [one.path for one in change.differences] == ["instruments.vna.settings.number.value"]
    assert client.get(file.id, revision=1).instruments == instruments()
    client.update(file.id, {"instruments": {"vna": None}})
    assert copy_of(client.get(file.id))["instruments"] == {}
    client.revert(file.id, 1)
    assert client.get(file.id).instruments == instruments()
    assert verify(data) == [("orphan", "snapshots")] * len(left_of(7)), "what revision 2 had"
    assert gc(data) == left_of(7)
    assert verify(data) == []


def test_the_copy_that_a_zarr_reader_gets_over_http_is_whole(serve):
    """It could not follow a reference."""
    url = serve().url
    with aq_data.connect(url) as client:
        file = client.save({"a": np.arange(3)}, instruments=instruments())
        group = httpx.get(f"{url}/api/v1/datafiles/{file.id}/zarr/zarr.json").json()
        assert group["attributes"]["aq_data"]["document"]["instruments"] == instruments()


def test_a_sweep_refers_to_its_snapshot_from_beginning_to_end(data, serve, tmp_path, monkeypatch):
    """While it is open and when it has ended."""
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    with aq_data.connect(serve().url) as client:
        with client.sweep("T1", dims={"x": 3}, variables={"v": ("float64", ("x",))}, instruments=instruments()) as sweep:
            assert snapshots(data) == {key_of(instruments())}
            sweep.write(v=np.arange(3.0))
        file = client.get(sweep.id)
        assert file.instruments == instruments()
        assert copy_of(file)["instruments"] == {"$snapshot": Path(key_of(instruments())).stem}
    assert not any(prefix.startswith("snapshots") for prefix in gc(data))
    assert verify(data) == []


# --- what is lost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: overwrite(path, path.read_bytes().replace(b"mV", b"kV", 1))])
def test_a_lost_or_damaged_snapshot_is_found_and_repaired_from_the_database(data, harm):
    with opened(data) as client:
        ids = [client.save(None, instruments=instruments()).id for _ in range(2)]
    harm(blobs(data) / key_of(instruments()))
    for repair in (False, True):
        ((kind, id),) = verify(data, repair=repair)  # once, not for each that has it
        assert kind == "damaged_snapshot"
        assert id in ids
    assert verify(data) == []


def test_a_catalogue_is_rebuilt_with_its_snapshots(data):
    """Whole documents, found by their instruments."""
    with opened(data) as client:
        saved = [client.save(None, name=f"n{i}", instruments=instruments(i % 2)).to_json() for i in range(4)]
    lose_database(data)
    found = with_stores(data, lambda stores: listed(stores.reindexing.run()))
    assert [one.outcome for one in found] == ["restored"] * 4
    with opened(data) as client:
        assert [client.get(one["id"]).to_json() for one in saved] == saved
        assert client.search({"instruments.vna.settings.number.value": 1}).total == 2
    assert verify(data) == []


def test_what_lost_its_snapshot_is_not_rebuilt_and_says_which(data):
    """Half a document is not passed off as the whole."""
    with opened(data) as client:
        whole, half = client.save(None, instruments=instruments(1)), client.save(None, instruments=instruments(2))
    lose_database(data)
    (blobs(data) / key_of(instruments(2))).unlink()
    found = {one.id: one for one in with_stores(data, lambda stores: listed(stores.reindexing.run()))}
    assert {id: one.outcome for id, one in found.items()} == {whole.id: "restored", half.id: "incomplete"}
    assert key_of(instruments(2)) in found[half.id].detail


# --- what nobody needs ------------------------------------------------------------------------------------------------


def test_a_snapshot_stays_as_long_as_any_record_has_it(data):
    """Then it is an orphan, which only an age below its own takes."""
    with opened(data) as client:
        one, two = [client.save(None, name=f"n{i}", instruments=instruments()) for i in range(2)]
        client.update(one.id, {"instruments": None})
        assert gc(data) == []
        client.update(two.id, {"instruments": None})
        young = with_stores(data, lambda stores: listed(stores.maintenance.gc(3600.0, True)))
        assert young == []
        assert gc(data) == left_of(1)
        assert snapshots(data) == set()
        assert client.save(None, instruments=instruments()).instruments == instruments()
    assert verify(data) == []


class CrashError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("step", ["put_many", "settle", "insert"])
def test_a_save_that_dies_after_its_snapshot_leaves_only_orphans(data, monkeypatch, step):
    """Whatever the step, `gc` takes what is left and the same save succeeds again."""
    with opened(data) as client:
        client.save(None)

    async def crash(*_):
        raise CrashError

    async def die(stores: Stores):
        monkeypatch.setattr(type(stores.metadata if step == "insert" else stores.arrays.open("default").blobs), step, crash)
        with pytest.raises(CrashError):
            await (await begin_save(stores)).commit()
        monkeypatch.undo()

    with_stores(data, die)
    assert {kind for kind, _ in verify(data)} == {"orphan"}
    assert key_of(instruments()) in gc(data)
    assert verify(data) == []
    with opened(data) as client:
        client.save(None, instruments=instruments())
    assert verify(data) == []


def between(monkeypatch, owner: object, name: str, act) -> None:
    """Let `act` happen once, right before a method of one object."""
    original = getattr(owner, name)

    async def wrapped(*arguments):
        monkeypatch.setattr(owner, name, original)
        await act()
        return await original(*arguments)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(("owner", "name"), [("metadata", "insert"), ("blobs", "put_many"), ("blobs", "settle")])
def test_a_snapshot_collected_while_a_save_is_about_to_refer_to_it_is_written_again(data, monkeypatch, owner, name):
    """`gc` runs whole in the middle of the save."""

    async def race(stores: Stores):
        save = await begin_save(stores)
        part = stores.metadata if owner == "metadata" else stores.arrays.open("default").blobs
        between(
            monkeypatch,
            part,
            name,
            lambda: listed(
                SnapshotMaintenance(stores.metadata, stores.arrays.open("default"), "default").orphans(0.0, True)
            ),
        )
        await save.commit()
        return await listed(stores.maintenance.verify())

    assert with_stores(data, race) == []
    assert snapshots(data) == {key_of(instruments())}


@pytest.mark.parametrize("name", ["get", "remove", "replace"])
def test_a_snapshot_that_a_save_came_to_refer_to_while_it_was_collected_is_put_back(data, monkeypatch, name):
    """The save runs whole in the middle of `gc`, where it finds its snapshot still there, or just gone."""
    with opened(data) as client:
        client.update(client.save(None, instruments=instruments()).id, {"instruments": None})

    async def race(stores: Stores):
        async def save():
            await (await begin_save(stores)).commit()

        if name == "replace":  # after the removal, before the second look

            async def first_look():
                between(monkeypatch, stores.metadata, "needs_snapshot", save)

            between(monkeypatch, stores.arrays.open("default").blobs, "remove", first_look)
        else:
            between(monkeypatch, stores.arrays.open("default").blobs, name, save)
        await listed(SnapshotMaintenance(stores.metadata, stores.arrays.open("default"), "default").orphans(0.0, True))
        return await listed(stores.maintenance.verify())

    assert with_stores(data, race) == []
    assert snapshots(data) == {key_of(instruments())}


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.embedded("measures the files of SQLite")
@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.soak)])
def test_records_with_one_snapshot_of_a_megabyte_cost_what_they_do_without_and_the_snapshot(data, monkeypatch, count):
    """Database and blobs together, everything indexed: 3.3 kB a record, and the snapshot once in each with its terms."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    calibration = {f"curve {i}": {"value": f"{i:04} ".join("0123456789") * 20} for i in range(1000)}
    shared = {"vna": {"model": "ZNB20", "settings": calibration}}
    assert len(msgspec.json.encode(shared)) > 1_000_000
    saved = [record(i, name=f"T1 of q{i}", metadata={"chip": "C7", "n": i}, instruments=shared) for i in range(count)]

    async def save(stores: Stores):
        async def one(new: Record) -> None:
            await stores.arrays.open("default").publish_group(new.document, new.attempt, new.digest, [])
            assert await stores.metadata.insert(new) is None

        for first in range(0, len(saved), 50):
            await asyncio.gather(*(one(new) for new in saved[first : first + 50]))
        assert await stores.metadata.count(parse_filter({"instruments.vna.model": "ZNB20", "chip": "C7"})) == count
        assert await stores.metadata.count(parse_filter({"$text": "curve q249 c7"})) == 1
        assert await stores.metadata.get(saved[-1].document.id) == saved[-1]

    with_stores(data, save)
    cost = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    assert cost < 3_500_000 + 3_500 * count
