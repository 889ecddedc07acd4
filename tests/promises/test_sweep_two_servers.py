"""Two server processes over one folder: one sweep, written, folded, read and followed through both; one stops, one dies.

AQ_DATA_SEED=<number> repeats the moments of a run; every run prints its own.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from services.deployment import PATIENCE, at, open_zarr
from shipments import operate
from sweeping import EAGER, Crew, Server, check_events, connected, quiet_port, wait_for

import aq_data
from aq_data.errors import UnavailableError

SEED = int(os.environ.get("AQ_DATA_SEED") or secrets.randbits(32))
LEASE = 5.0
STEP = 1000
"""A row holds writer * 1e9 + n * STEP + position: whose it is, in which call, and where in it."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.01)
    for module in ("sweeps", "live"):
        monkeypatch.setattr(f"aq_data.client.{module}.FIRST_PAUSE", 0.02)
        monkeypatch.setattr(f"aq_data.client.{module}.LONGEST_PAUSE", 0.2)


class House:
    """A folder, its servers, and one sweep that two writers append to."""

    def __init__(self, tmp_path, data) -> None:
        self.tmp_path, self.data = tmp_path, data
        self.servers: list[Server] = []
        self.crew, self.stop, self.gate = Crew(), threading.Event(), threading.Event()
        self.clients: list[aq_data.Client] = []
        self.written = [0, 0]
        self.events: list[list[aq_data.Event]] = [[], []]
        self.looks = 0
        self.id = ""

    def serve(self, **settings) -> Server:
        folding = {**EAGER, "LEASE_SECONDS": LEASE}
        self.servers.append(Server(self.data, self.tmp_path / f"server{len(self.servers)}.log", folding=folding, **settings))
        return self.servers[-1]

    def client(self, server: Server) -> aq_data.Client:
        self.clients.append(connected(server.url))
        return self.clients[-1]

    def write(self, sweep: aq_data.Sweep, writer: int) -> None:
        for n in itertools.count(1):
            if self.stop.is_set():
                return
            rows = 1 + (n * 7 + writer) % 4
            values = writer * 10**9 + n * STEP + np.arange(rows)
            sweep.append(a=values, b=np.repeat(-values[:, None], 3, 1), dim="x")
            self.written[writer] = n
            self.stop.wait(0.004)

    def follow(self, client: aq_data.Client, into: list[aq_data.Event]) -> None:
        with suppress(UnavailableError):  # the client was closed at the end of a test that failed
            into.extend(client.follow(self.id))

    def read(self, client: aq_data.Client) -> None:
        known = 0
        while not self.stop.is_set():
            try:
                file = client.get(self.id)
                if "a" in file:
                    assert file["a"].shape[0] == file["b"].shape[0] >= known
                    names = ["a", "b"] if self.looks % 2 else ["b", "a"]
                    found = {name: np.abs(file[name][...]) for name in names}
                    assert (found["b"] == found["a"][:, None]).all(), "half a block"
                    check_calls(found["a"])
                    known = len(found["a"])
                    self.looks += 1
            except UnavailableError:
                pass  # its server is the one that was stopped or killed
            self.stop.wait(0.05)

    def close(self) -> None:
        self.stop.set()
        for client in self.clients:
            client.close()
        for server in self.servers:
            server.send(signal.SIGCONT)
            server.end()


def check_calls(values: np.ndarray) -> dict[int, int]:
    """Each writer's calls whole, in order, none missing and none twice; the last number of each."""
    last = {0: 0, 1: 0}
    at = 0
    while at < len(values):
        writer, n = int(values[at]) // 10**9, int(values[at]) % 10**9 // STEP
        rows = 1 + (n * 7 + writer) % 4
        assert n == last[writer] + 1, f"writer {writer}: call {n} after {last[writer]}"
        assert values[at : at + rows].tolist() == (writer * 10**9 + n * STEP + np.arange(rows)).tolist(), "torn"
        last[writer], at = n, at + rows
    return last


@pytest.fixture
def house(tmp_path, data) -> Iterator[House]:
    house = House(tmp_path, data)
    yield house
    house.close()


def run(house: House, one: Server, two: Server, disturb) -> None:
    """Two writers, two followers, two readers, while `disturb` does its work; then the end, seen through both."""
    clients = [house.client(one), house.client(two)]
    variables = {"a": ("int64", "x"), "b": ("int64", ("x", "c"))}
    chunks = {"a": (64,), "b": (20, 2)}
    first = clients[0].sweep("two", dims={"x": None, "c": 3}, variables=variables, chunks=chunks)
    first.flush(20)
    house.id = first.id
    second = clients[1].resume_sweep(first.id)
    for i, (client, sweep) in enumerate(zip(clients, (first, second), strict=True)):
        house.crew.start(house.write, sweep, i)
        house.crew.start(house.follow, client, house.events[i])
        house.crew.start(house.read, client)
    disturb(clients)
    looks = house.looks
    wait_for(lambda: house.looks > looks + 3, "the readers get nowhere", check=house.crew.check)
    house.stop.set()
    for sweep in (first, second):
        sweep.flush(40 * PATIENCE)
    second.leave(20 * PATIENCE)
    first.finish(40 * PATIENCE)
    wait_for(
        lambda: all(events and events[-1].kind == "finished" for events in house.events) or bool(house.crew.failures),
        "a follower misses the end",
        check=house.crew.check,
    )
    house.crew.join()
    for client in clients:
        with suppress(UnavailableError):
            file = client.get(house.id)
            values = file["a"][...]
            assert check_calls(values) == {0: house.written[0], 1: house.written[1]}
            with open_zarr(file.path) as plain:
                np.testing.assert_array_equal(plain["a"].values, values)
                np.testing.assert_array_equal(plain["b"].values, np.repeat(-values[:, None], 3, 1))
    assert min(house.written) > 10
    for events in house.events:
        check_events(events, sum(house.written))
    one_told, two_told = ([(e.kind, e.data) for e in events if e.kind == "block"] for events in house.events)
    assert one_told == two_told


@pytest.mark.parametrize(
    "where",
    [
        "before record_fold",
        *(pytest.param(step, marks=pytest.mark.soak) for step in ("before put_many", "after settle", "after record_fold")),
    ],
)
def test_a_folder_that_wakes_up_late_changes_nothing(house, where):
    """Stopped in the middle of folding until its lease is over and the other has folded, then continued."""
    one = house.serve(only=where, stop_at=4)
    two = house.serve()

    def disturb(clients: list[aq_data.Client]) -> None:
        wait_for(lambda: one.steps.exists(), "it does not fold", check=house.crew.check)
        folded = clients[1]._http.json("GET", f"/api/v1/sweeps/{house.id}")["folded"]
        wait_for(
            lambda: clients[1]._http.json("GET", f"/api/v1/sweeps/{house.id}")["folded"] > folded,
            "nobody takes the lease over",
            check=house.crew.check,
        )
        one.send(signal.SIGCONT)

    run(house, one, two, disturb)
    operate(house.data, "gc", "--older-than", "0s", "--delete")
    assert operate(house.data, "verify") == []


def test_one_dies_and_comes_back(house):
    """One of two servers is killed while it folds; its clients go on once another listens where it did."""
    print(f"AQ_DATA_SEED={SEED}")
    chance = random.Random(SEED)
    port = quiet_port(chance)
    one = house.serve(port=port, die_at=chance.randrange(20, 150), slow=0.01)
    two = house.serve(slow=0.01)

    def disturb(_: list[aq_data.Client]) -> None:
        until = time.monotonic() + 6
        while one.is_alive and time.monotonic() < until:
            time.sleep(0.01)
        one.end()
        house.serve(port=port)

    run(house, one, two, disturb)


def test_the_late_end_of_a_folder_keeps_the_newest_copy(house):
    """Stopped while it publishes the end, woken after the other ended it and a change was made: the copy is the newest."""
    one = house.serve(only="before replace", stop_at=3)  # after those of two arrays that of the group, with the copy
    near = house.client(one)
    sweep = near.sweep("x", dims={"x": None}, variables={"y": ("f8", "x")})
    sweep.append(y=1.0, x=1.0)
    sweep.flush(20)
    house.crew.start(lambda: sweep.finish(60 * PATIENCE))
    wait_for(lambda: one.steps.exists(), "nobody ends it", check=house.crew.check)
    far = house.client(house.serve())
    wait_for(lambda: far.get(sweep.id).state == "complete", "nobody takes the lease over", check=house.crew.check)
    far.update(sweep.id, {"comment": "made after the end"})
    one.send(signal.SIGCONT)
    house.crew.join()
    revision = far.get(sweep.id).revision
    copy = at(far.get(sweep.id).path) / "zarr.json"
    wait_for(
        lambda: json.loads(copy.read_bytes())["attributes"]["aq_data"]["document"]["revision"] == revision,
        "the metadata copy is not of the newest revision",
        seconds=5,
    )
    operate(house.data, "gc", "--older-than", "0s", "--delete")
    assert operate(house.data, "verify") == []
