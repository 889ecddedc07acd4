"""A store that is down: new DataFiles wait in its fallback, say so, and are brought home whole, whatever comes between."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from aq_server.commands.serving import running
from aq_server.config import ServerConfig, StoreConfig
from aq_server.deployment import open_stores
from aq_server.service.datafiles import DataFiles
from aq_server.service.draining import Draining
from aq_server.service.growing import Growing
from aq_server.service.health import Health
from aq_server.service.reading import Reading
from aq_server.service.signals import Signals

import aq_data
from aq_data.errors import ConfigError, NotFoundError, StorageError, UnavailableError
from aq_data.models.arrays import NewArray
from aq_data.models.datafile import NewDataFile
from aq_data.models.query import parse_filter
from aq_data.models.snapshots import SNAPSHOT_BYTES
from aq_data.storage.arrays.folder import FolderBlobs

VNA = {"vna": {"settings": {f"s{i}": "x" * 20 for i in range(SNAPSHOT_BYTES // 20)}}}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("aq_server.service.draining.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("aq_server.service.health.KEPT_SECONDS", 0.0)
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.01)


@pytest.fixture
def disk(tmp_path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def config(data, disk):
    stores = {"disk": StoreConfig(url=str(disk), fallback="default")}
    return ServerConfig(data=str(data), port=0, stores=stores, default_store="disk")


@contextlib.contextmanager
def away(disk: Path):
    """The disk is not mounted: a file stands where it was."""
    disk.mkdir(exist_ok=True)
    disk.rename(disk.with_suffix(".away"))
    disk.write_text("not mounted")
    try:
        yield
    finally:
        disk.unlink()
        disk.with_suffix(".away").rename(disk)


def wait_until(condition, what: str) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def wait_for_fallback(client: aq_data.Client) -> None:
    """Until its server has seen the outage. A folder that is none is refused before that, and not worth trying again."""

    def is_seen() -> bool:
        with contextlib.suppress(StorageError):
            return client.save(None, name="probe").to_json()["store"] == "default"
        return False

    wait_until(is_seen, "nothing goes to the fallback")


def state_of(http: httpx.Client) -> dict:
    return http.get("/readyz").json()


def test_what_is_saved_while_a_store_is_down_waits_visibly_and_is_brought_home(config, disk):
    """Nobody is refused; the record, /readyz, /stores and /metrics tell; afterwards it lies where it belongs, the same."""
    trace = np.arange(700_000.0)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(running(config))
        client, http = stack.enter_context(aq_data.connect(url)), stack.enter_context(httpx.Client(base_url=url))
        before = client.save({"y": trace[:3]}, name="before")
        with away(disk):
            wait_for_fallback(client)
            file = client.save({"y": trace}, name="T1", files={"notes.txt": b"cold"}, instruments=VNA)
            document = file.to_json()
            assert (document["store"], document["intended_store"]) == ("default", "disk")
            assert str(config.data) in file.path
            assert {hit.name for hit in client.search({"intended_store": "disk"})} >= {"probe", "T1"}
            waiting = client.search({"intended_store": "disk"}).total
            wait_until(lambda: state_of(http).get("waiting") == {"disk": waiting}, "/readyz does not count")
            assert state_of(http)["status"] == "degraded"
            [status] = [store for store in client.stores() if store.name == "disk"]
            assert (status.fallback, status.waiting) == ("default", waiting)
            assert f'aq_data_waiting_datafiles{{store="disk"}} {waiting}' in http.get("/metrics").text
            assert np.array_equal(client.get(file.id)["y"][:], trace)
        wait_until(lambda: client.search({"intended_store": "disk"}).total == 0, "it is not brought home")
        wait_until(lambda: state_of(http) | {"metadata": ""} == {"status": "ready", "metadata": "", "stores": {"default": "ok", "disk": "ok"}, "waiting": {"disk": 0}}, "not ready again")  # fmt: skip
        home = client.get(file.id)
        assert (home.to_json()["store"], home.to_json()["intended_store"], home.revision) == ("disk", None, 2)
        assert home.path.startswith(str(disk))
        assert np.array_equal(file["y"][5:9], trace[5:9]), "a reader that knows the old document"
        assert np.array_equal(home["y"][:], trace)
        assert home.read_file("notes.txt") == b"cold"
        assert home.instruments == VNA
        assert client.get(before.id).revision == 1
    check_clean(config)


def check_clean(config: ServerConfig) -> None:
    """`gc` finds only what nobody needs, `verify` nothing."""

    async def look() -> None:
        stores = open_stores(config)
        try:
            async for _ in stores.maintenance.gc(0.0, delete=True):
                pass
            assert [finding async for finding in stores.maintenance.verify()] == []
            assert await stores.metadata.count(parse_filter({"intended_store": {"$exists": True, "$ne": None}})) == 0
        finally:
            await stores.close()

    asyncio.run(look())


def test_a_sweep_is_never_opened_in_a_fallback(config, disk):
    """It grows in one place: what the writer has stays in the spool until the store is there."""
    with running(config) as url, aq_data.connect(url) as client:
        with away(disk):
            wait_for_fallback(client)
            sweep = client.sweep("T", dims={"x": None}, variables={"y": ("f8", "x")})
            sweep.append(y=1.0, x=1.0)
        sweep.append(y=2.0, x=2.0)
        sweep.finish(30)
        file = client.get(sweep.id)
        assert (file.to_json()["store"], file["y"][:].tolist()) == ("disk", [1.0, 2.0])


def test_two_servers_bring_everything_home_once(config, disk):
    """Whoever has the lease, and also when both do."""
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(running(config)) for _ in range(2)]
        clients = [stack.enter_context(aq_data.connect(url)) for url in urls]
        with away(disk):
            for client in clients:
                wait_for_fallback(client)
            files = [clients[i % 2].save({"y": np.arange(i + 1.0)}, name=f"T{i}") for i in range(20)]
        wait_until(lambda: clients[0].search({"intended_store": "disk"}).total == 0, "not brought home")
        for i, file in enumerate(files):
            for client in clients:
                found = client.get(file.id)
                assert (found.revision, found.to_json()["store"]) == (2, "disk")
                assert np.array_equal(found["y"][:], np.arange(i + 1.0))
    check_clean(config)


@pytest.mark.parametrize("fallback", ["absent", "disk", "chained"])
def test_a_fallback_is_another_store_of_the_configuration_without_one(data, tmp_path, fallback):
    """Everything else is refused at the start."""
    stores = {
        "disk": StoreConfig(url=str(tmp_path / "disk"), fallback=fallback),
        "chained": StoreConfig(url=str(tmp_path / "chained"), fallback="default"),
    }
    with pytest.raises(ConfigError, match=r"stores\.disk\.fallback"):
        open_stores(ServerConfig(data=str(data), stores=stores))


# --- step by step ------------------------------------------------------------------------------------------------------


class Bench:
    """The use cases over a deployment whose store `disk` is marked as down when something is saved."""

    def __init__(self, config: ServerConfig) -> None:
        self.stores = open_stores(config)
        self.metadata, arrays = self.stores.metadata, self.stores.arrays
        self.files = DataFiles(self.metadata, arrays)
        self.reading = Reading(self.files, Growing(self.metadata, arrays, 3600.0))
        self.draining = Draining(self.metadata, arrays, Health(self.metadata, arrays), Signals())

    async def __aenter__(self) -> Bench:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stores.close()

    async def save(self) -> str:
        """One with a file, in the fallback; its id."""
        self.stores.arrays.mark("disk", is_down=True)
        save = await self.files.begin_save(NewDataFile(name="T", instruments=VNA), None)
        await save.begin_file("notes.txt", "text/plain")
        await save.write(memoryview(b"cold"))
        await save.end_part()
        document, _ = await save.commit()
        self.stores.arrays.mark("disk", is_down=False)
        assert (document.store, document.intended_store) == ("default", "disk")
        return document.id

    async def check(self, id: str, store: str) -> None:
        """It is whole, there."""
        document = (await self.files.get(id)).document
        assert document.store == store
        for info in document.files:
            stored = await self.files.open_file(id, info.name)
            assert b"".join([piece async for piece in stored.read(0, info.size)]) == b"cold"


def test_a_crash_at_any_step_loses_nothing_and_the_next_try_brings_it_home(config, monkeypatch):
    """Each call of the stores fails once, and once its outcome is not heard of; the DataFile is whole all the time."""

    class CrashError(Exception):
        pass

    left = [0]

    def crashing(owner, name: str, after: bool) -> None:
        real = getattr(owner, name)

        async def step(*arguments, **options):
            left[0] -= 1
            if left[0] == 0 and not after:
                raise CrashError
            result = await real(*arguments, **options)
            if left[0] == 0:
                raise CrashError
            return result

        monkeypatch.setattr(owner, name, step)

    async def run(after: bool) -> int:
        crashed = 0
        async with Bench(config) as bench:
            for owner in (FolderBlobs, type(bench.metadata)):
                names = ("get", "replace") if owner is not FolderBlobs else ("size", "get", "upload", "replace", "settle")
                for name in names:
                    crashing(owner, name, after)
            while True:
                left[0] = 0
                id = await bench.save()
                left[0] = crashed + 1
                try:
                    await bench.draining._bring(id, "disk")
                    break
                except CrashError:
                    crashed += 1
                left[0] = 0
                await bench.check(id, (await bench.files.get(id)).document.store)
                await bench.draining._bring(id, "disk")
                await bench.check(id, "disk")
            left[0] = 0
        monkeypatch.undo()
        return crashed

    for after in (False, True):
        assert asyncio.run(run(after)) > 10
    check_clean(config)


async def attached(bench: Bench, id: str) -> None:
    async def body():
        yield b"cold"

    await bench.files.attach(id, "more.txt", "text/plain", body())


async def patched(bench: Bench, id: str) -> None:
    await bench.files.patch(id, {"comment": "good"}, None)


async def deleted(bench: Bench, id: str) -> None:
    await bench.files.delete(id, None)


async def brought(bench: Bench, id: str) -> None:
    await bench.draining._bring(id, "disk")


@pytest.mark.parametrize("between", [attached, patched, deleted, brought])
def test_what_happens_just_before_the_switch_is_not_lost(config, monkeypatch, between):
    """A file, a change, a deletion, another server that was faster: the switch is a compare-and-set."""

    async def run() -> None:
        async with Bench(config) as bench:
            id = await bench.save()
            real, happened = type(bench.metadata).replace, []

            async def replace(store, record, *arguments, **options):
                if not happened:
                    happened.append(1)
                    await between(bench, id)
                return await real(store, record, *arguments, **options)

            monkeypatch.setattr(type(bench.metadata), "replace", replace)
            await bench.draining._bring(id, "disk")
            if between is deleted:
                with pytest.raises(NotFoundError):
                    await bench.files.get(id)
                return
            await bench.check(id, "disk")
            document = (await bench.files.get(id)).document
            assert (len(document.files), document.comment) == (1 + (between is attached), "good" * (between is patched))

    asyncio.run(run())
    monkeypatch.undo()
    check_clean(config)


def test_a_file_that_was_attached_to_the_old_place_is_refused_after_the_switch(config, monkeypatch):
    """Its bytes would go with the old blobs; sent again it arrives."""

    async def run() -> None:
        async with Bench(config) as bench:
            id = await bench.save()

            async def body():
                yield b"cold"
                await bench.draining._bring(id, "disk")

            with pytest.raises(UnavailableError, match="brought to another store"):
                await bench.files.attach(id, "more.txt", "text/plain", body())
            await attached(bench, id)
            await bench.check(id, "disk")

    asyncio.run(run())
    check_clean(config)


def test_a_reader_that_knows_the_old_place_reads_the_new_one(config):
    """Also when the old blobs are gone by the time it reads."""

    async def run() -> None:
        async with Bench(config) as bench:
            bench.stores.arrays.mark("disk", is_down=True)
            save = await bench.files.begin_save(NewDataFile(arrays=(NewArray("y", "<f8", (3,), ("x",)),)), None)
            await save.begin_array(0)
            await save.write(memoryview(np.arange(3.0).tobytes()))
            await save.end_part()
            id = (await save.commit())[0].id
            one, other = [await bench.reading.slice(id, "y", "1:") for _ in range(2)]
            tag = one.tag
            await bench.draining._bring(id, "disk")
            assert (await one.read()).tolist() == [1.0, 2.0]
            assert one.tag == tag
            await bench.draining._remove_leftovers(float("inf"))
            assert (await other.read()).tolist() == [1.0, 2.0]
            assert other.tag != tag
            with pytest.raises(UnavailableError, match="read again"):
                [piece async for piece in one.stream()]

    asyncio.run(run())
    check_clean(config)
