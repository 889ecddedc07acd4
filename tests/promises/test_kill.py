"""`kill -9` at random moments: what was acknowledged is there and whole, what was not is there whole or not at all.

AQ_DATA_SEED=<number> repeats the moments and contents of a run; every run prints its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from services.deployment import PATIENCE
from shipments import Shipment, operate, unexplained

import aq_data
from aq_data.errors import NotFoundError, UnavailableError

# Read before the fixture that clears the environment.
SEED = int(os.environ.get("AQ_DATA_SEED") or secrets.randbits(32))

QUIET = {"AQ_DATA_SERVER__LOG_LEVEL": "error"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    """The client tries again as often as it does, but at once: the server stays away until the round is over."""
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.005)


class Crew:
    """Threads that do one kind of work each until the server is gone."""

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self._failed = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, work: Any, *arguments: Any) -> None:
        def run() -> None:
            try:
                while not self._failed.is_set():
                    work(*arguments)
            except UnavailableError:
                return
            except BaseException as exc:
                self.failures.append(exc)
                self._failed.set()

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def wait(self, seconds: float) -> None:
        """Let them work, but no longer once one has failed."""
        self._failed.wait(seconds)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


class Ledger:
    """Which shipments were sent, and which of them were acknowledged."""

    def __init__(self, seed: int) -> None:
        self._seed, self._lock, self._count = seed, threading.Lock(), 0
        self.sent: dict[str, Shipment] = {}
        self.acknowledged: set[str] = set()
        self.checked: set[str] = set()

    def ship(self, client: aq_data.Client) -> None:
        with self._lock:
            shipment = Shipment.make(self._seed, self._count)
            self._count += 1
            self.sent[shipment.id] = shipment
        shipment.save(client)
        self.acknowledged.add(shipment.id)

    def unanswered(self) -> list[Shipment]:
        return [shipment for id, shipment in sorted(self.sent.items()) if id not in self.acknowledged]

    def check(self, client: aq_data.Client, *, again: bool = False) -> None:
        """What is visible is whole, to our reader and to any; what was acknowledged is visible."""
        visible = {file.id: file for file in client.search(limit=None)}
        assert visible.keys() <= self.sent.keys()
        assert self.acknowledged <= visible.keys()
        for id, found in visible.items():
            if again or id not in self.checked:
                file = client.get(id)
                assert file.to_json() == found.to_json()
                self.sent[id].assert_complete(file)
                if id not in self.checked:
                    self.sent[id].assert_opens_as_zarr(file.path)
                self.checked.add(id)
        for shipment in self.unanswered():
            if shipment.id not in visible:
                with pytest.raises(NotFoundError) as caught:
                    client.get(shipment.id)
                assert caught.value.code == "not_found"


def kill_while_saving(data: Path, serve: Any, saves: int, kills: int, seconds: float) -> None:
    print(f"AQ_DATA_SEED={SEED}")
    chance, ledger, done = random.Random(SEED), Ledger(SEED), 0
    server = serve(environment=QUIET)
    started = time.monotonic()
    while done < kills or len(ledger.acknowledged) < saves:
        assert time.monotonic() - started < seconds * PATIENCE, f"{done} kills, {len(ledger.acknowledged)} saves"
        crew = Crew()
        with aq_data.connect(server.url) as client:
            for _ in range(4):
                crew.start(ledger.ship, client)
            crew.wait(chance.uniform(0.05, 0.9))
            server.kill()
            crew.join()
        done += 1
        server = serve(environment=QUIET)
        with aq_data.connect(server.url) as client:
            ledger.check(client)
            for shipment in ledger.unanswered():
                if chance.random() < 0.5:
                    shipment.assert_complete(shipment.save(client))
                    ledger.acknowledged.add(shipment.id)
        if done % 2:
            assert {finding["kind"] for finding in operate(data, "verify")} <= {"orphan"}
    with aq_data.connect(server.url) as client:
        operate(data, "gc", "--older-than", "0s", "--delete")
        assert operate(data, "verify") == []
        ledger.check(client, again=True)
        assert unexplained(data, client) == []
        for shipment in ledger.unanswered():
            shipment.assert_complete(shipment.save(client))
        assert client.count() == len(ledger.sent)
    assert operate(data, "verify") == []


def test_killed_while_saving(data, serve):
    """Over 200 acknowledged saves of all sizes by four threads, killed at least five times; only orphans are left."""
    kill_while_saving(data, serve, saves=200 // PATIENCE**2, kills=5, seconds=90)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_while_saving_for_long(data, serve):
    """The same a hundred times."""
    kill_while_saving(data, serve, saves=5000, kills=100, seconds=3000)


class Desk:
    """One DataFile per thread, changed in one way over and over; remembers what was acknowledged last."""

    def __init__(self, client: aq_data.Client, number: int) -> None:
        self.id = client.save({"x": [number]}, name=f"desk {number}").id
        self.patched = 0
        self.attached: list[str] = []
        self.begun: list[str] = []

    def patch(self, client: aq_data.Client) -> None:
        client.update(self.id, {"metadata": {"n": self.patched + 1, "pad": "x" * 20_000}})
        self.patched += 1

    def attach(self, client: aq_data.Client, folder: Path) -> None:
        path = folder / f"{len(self.begun)}.bin"
        path.write_bytes(path.name.encode() * 10_000)
        self.begun.append(path.name)
        client.get(self.id).attach(path)
        self.attached.append(path.name)

    def check(self, client: aq_data.Client) -> None:
        file = client.get(self.id)
        n = file.metadata.get("n", 0)
        assert self.patched <= n <= self.patched + 1
        self.patched = n
        assert set(self.attached) <= set(file.files) <= set(self.begun)
        for name in file.files:
            assert file.read_file(name) == name.encode() * 10_000
        assert file["x"].shape == (1,)


class Bin:
    """DataFiles saved and deleted at once."""

    def __init__(self) -> None:
        self.saved: list[str] = []
        self.deleted: set[str] = set()

    def work(self, client: aq_data.Client) -> None:
        file = client.save({"x": [1.0, 2.0]}, name="to be deleted")
        self.saved.append(file.id)
        with contextlib.suppress(NotFoundError):  # when the answer to the first try was lost
            client.delete(file.id)
        self.deleted.add(file.id)

    def check(self, client: aq_data.Client) -> None:
        visible = {file.id for file in client.search({"name": "to be deleted"}, limit=None)}
        assert not visible & self.deleted
        for id in self.deleted:
            assert client.get(id, include_deleted=True).state == "deleted"
        for id in visible & set(self.saved):
            assert client.get(id)["x"][...].tolist() == [1.0, 2.0]


def test_killed_while_changing(data, serve, tmp_path):
    """Acknowledged patches, attached files and deletions are kept; `verify --repair` and `gc` put the rest in order."""
    print(f"AQ_DATA_SEED={SEED}")
    chance = random.Random(SEED)
    server = serve(environment=QUIET)
    with aq_data.connect(server.url) as client:
        patchers, attacher, rubbish = [Desk(client, n) for n in range(2)], Desk(client, 2), Bin()
    for _ in range(4):
        crew = Crew()
        with aq_data.connect(server.url) as client:
            for desk in patchers:
                crew.start(desk.patch, client)
            crew.start(attacher.attach, client, tmp_path)
            crew.start(rubbish.work, client)
            crew.wait(chance.uniform(0.05, 0.5))
            server.kill()
            crew.join()
        server = serve(environment=QUIET)
        with aq_data.connect(server.url) as client:
            for desk in (*patchers, attacher):
                desk.check(client)
            rubbish.check(client)
        found = operate(data, "verify")
        assert {finding["kind"] for finding in found} <= {"orphan", "stale_copy", "half_deleted"}
    operate(data, "verify", "--repair")
    operate(data, "gc", "--older-than", "0s", "--delete")
    assert operate(data, "verify") == []
    with aq_data.connect(server.url) as client:
        assert unexplained(data, client) == []
        for desk in (*patchers, attacher):
            desk.check(client)
