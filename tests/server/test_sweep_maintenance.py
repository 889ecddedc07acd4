"""The operator's commands and sweeps: what is needed is never an orphan, what is lost is found, what can be rebuilt is."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from aq_server.app import Stores
from aq_server.service import folding, tasks
from aq_server.service.notices import Notices
from aq_server.service.signals import Signals
from aq_server.service.tasks import stop
from services.deployment import blobs, left, listed, lose_database, opened, overwrite, rows_of_sweeps, with_stores

import aq_data
from aq_data.errors import NotFoundError


@pytest.fixture(autouse=True)
def _eager(monkeypatch, tmp_path):
    monkeypatch.setattr(folding, "FOLD_BLOCKS", 4)
    monkeypatch.setattr(folding, "LOOK_SECONDS", 0.02)
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))


def verify(data: Path) -> list:
    return with_stores(data, lambda stores: listed(stores.maintenance.verify()))


def gc(data: Path, delete: bool = False) -> list:
    return with_stores(data, lambda stores: listed(stores.maintenance.gc(0.0, delete)))


def reindex(data: Path) -> list:
    return with_stores(data, lambda stores: listed(stores.reindexing.run()))


def folded(client: aq_data.Client, id: str, least: int) -> None:
    deadline = time.monotonic() + 20
    while client._http.json("GET", f"/api/v1/sweeps/{id}")["folded"] < least:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def half_measured(client: aq_data.Client) -> tuple[aq_data.Sweep, np.ndarray]:
    """An open sweep with folded blocks, unfolded ones, a large one and gaps."""
    sweep = client.sweep("half", dims={"x": None, "k": 600_000}, variables={"y": ("f8", ("x", "k")), "n": ("i4", "x")})
    large = np.random.default_rng(0).random((1, 600_000))
    sweep.write(y=large, at={"x": slice(0, 1)})
    for i in range(10):
        sweep.write(n=i, at={"x": 2 * i})
        sweep.flush()
    folded(client, sweep.id, 5)
    return sweep, large[0]


def test_nothing_that_an_open_sweep_needs_is_an_orphan(data):
    """`gc --older-than 0s --delete` beside the growing sweep; afterwards everything is there, and it finishes."""
    with opened(data) as client:
        sweep, large = half_measured(client)
        gc(data, delete=True)
        assert verify(data) == []
        file = client.get(sweep.id)
        assert np.array_equal(file["y"][0], large)
        assert file["n"][::2].tolist() == list(range(10))
        sweep.write(n=77, at={"x": 1})
        sweep.finish()
        assert client.get(sweep.id)["n"][:3].tolist() == [0, 77, 1]
        assert verify(data) == []


def test_what_the_open_phase_left_is_removed_after_the_end(data):
    """Chunks under their old keys and blocks; the finished DataFile does not need them."""
    with opened(data) as client:
        sweep, large = half_measured(client)
        sweep.finish()
        assert {orphan.reason for orphan in gc(data, delete=True)} == {"left by an open sweep"}
        assert gc(data) == []
        assert left(data, "*/*/open") + left(data, "*/*/blocks") == []
        assert np.array_equal(client.get(sweep.id)["y"][0], large)
        assert verify(data) == []


def test_what_a_folder_that_died_left_is_found(data):
    """Objects under an older token that no manifest names; those of the newest token may still come into force."""
    with opened(data) as client:
        sweep, _ = half_measured(client)
        prefix = next(blobs(data).glob("*/*/open"))
        for generation in ("3-0", "99-999"):
            overwrite(prefix / generation / "0.0.0", b"x" * 10)
        found = [Path(orphan.prefix).parts[-2] for orphan in gc(data, delete=True)]
        assert "3-0" in found
        assert "99-999" not in found
        assert (prefix / "99-999").exists()
        sweep.finish()


def test_a_deleted_sweep_leaves_nothing(data):
    """Neither blobs nor rows of its log."""
    with opened(data) as client:
        sweep, _ = half_measured(client)
        client.delete(sweep.id)
    gc(data, delete=True)
    assert rows_of_sweeps(data) == 0
    with pytest.raises(NotFoundError):
        with_stores(data, lambda stores: stores.metadata.sweeps.get(sweep.id))
    assert left(data, f"{sweep.id}/*/*") == []


def test_damage_of_an_open_sweep_is_found(data):
    """A chunk that is missing and one that changed."""
    with opened(data) as client:
        sweep, _ = half_measured(client)
        folded(client, sweep.id, 8)
    chunks = sorted(blobs(data).glob("*/*/open/*/0.0.*"))
    chunks = [chunk for chunk in chunks if not chunk.name.endswith(".w")]
    chunks[0].unlink()
    content = bytearray(chunks[1].read_bytes())
    content[100] ^= 1
    overwrite(chunks[1], bytes(content))
    details = [finding.detail for finding in verify(data) if finding.kind == "damaged_chunk"]
    assert any("is missing" in detail for detail in details)
    assert any("checksum" in detail for detail in details)


def test_damage_of_a_partly_measured_datafile_is_found(data):
    """What was never measured is no finding; a lost chunk and a lost written map are."""
    with opened(data) as client:
        sweep, _ = half_measured(client)
        sweep.finish()
        assert client.get(sweep.id)["n"].is_partial
    gc(data, delete=True)
    assert verify(data) == []
    next(blobs(data).glob("*/*/arrays.zarr/n/c/0")).unlink()
    assert [finding.kind for finding in verify(data)] == ["missing_chunk"]
    next(blobs(data).glob("*/*/written/n/c/0")).unlink()
    assert "written map" in verify(data)[0].detail


def test_a_lost_database_is_rebuilt_with_its_sweeps(data):
    """Finished ones whole, with their events; an open one abandoned with every folded block."""
    with opened(data) as client:
        with client.sweep("done", dims={"x": 20}, variables={"y": ("f8", "x")}) as done:
            done.write(y=np.arange(5.0), at={"x": slice(3, 8)})
        sweep, large = half_measured(client)
        count = client._http.json("GET", f"/api/v1/sweeps/{sweep.id}")["folded"]
        before = list(client.follow(done.id))
    lose_database(data)
    assert sorted(entry.outcome for entry in reindex(data)) == ["restored", "restored"]
    with opened(data) as client:
        again = client.get(done.id)
        assert again.written("y").nonzero()[0].tolist() == [3, 4, 5, 6, 7]
        assert [event.kind for event in client.follow(done.id)] == [event.kind for event in before]
        file = client.get(sweep.id)
        assert file.state == "abandoned"
        assert "the database was lost" in file.sweep["reason"]
        assert np.array_equal(file["y"][0], large)
        assert file["n"][::2][: count - 1].tolist() == list(range(count - 1))
    assert verify(data) == []
    assert {entry.outcome for entry in reindex(data)} == {"known"}


@pytest.mark.parametrize("turns", range(5))
def test_folding_ends_when_it_is_woken_and_stopped_at_the_same_moment(data, monkeypatch, turns):
    """However many turns of the event loop lie between the two, or a server would not stop."""
    monkeypatch.setattr(folding, "LOOK_SECONDS", 60.0)
    monkeypatch.setattr(tasks, "AGAIN_SECONDS", 0.2)

    async def body(stores: Stores) -> None:
        await stores.metadata.sweeps.unfinished()  # a connection cut short would leave its socket open (pymongo 4.20)
        background = folding.Folding(stores.metadata, stores.arrays, Signals(), Notices(stores.metadata, None))
        running = asyncio.create_task(background.run())
        await asyncio.sleep(0.05)
        background._wake.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await stop([running])
        await background.close()

    with_stores(data, body)
