"""Followers: every event once whatever breaks, and nobody who follows slows the experiment.

AQ_DATA_SEED=<number> repeats the cuts of a run; every run prints its own.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from sweeping import Crew, Server, check_events, quiet_port, wait_for
from test_faults import CUT_ANSWER, CUT_REQUEST, DROP_ANSWER, Fault, Wire

import aq_data
from aq_data.errors import UnavailableError

SEED = int(os.environ.get("AQ_DATA_SEED") or secrets.randbits(32))
PLAIN = {"dims": {"x": None}, "variables": {"y": ("f8", "x")}}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.002)
    for module in ("sweeps", "live"):
        monkeypatch.setattr(f"aq_data.client.{module}.FIRST_PAUSE", 0.01)
        monkeypatch.setattr(f"aq_data.client.{module}.LONGEST_PAUSE", 0.05)


class Bridge(Wire):
    """A wire whose far end may be gone."""

    def _carry(self, near: socket.socket, fault: Fault | None) -> None:
        with suppress(OSError):
            super()._carry(near, fault)


@pytest.fixture
def port() -> int:
    return quiet_port(random.Random(SEED))


@pytest.fixture
def bridge(port) -> Iterator[Bridge]:
    bridge = Bridge(f"http://127.0.0.1:{port}")
    yield bridge
    bridge.close()


@pytest.mark.parametrize("ending", ["finished", "abandoned"])
def test_a_follower_with_a_bad_connection_gets_every_event_once(tmp_path, data, port, bridge, ending):
    """Cut at random through folding, the end and restarts of the server; one that comes late gets the same."""
    print(f"AQ_DATA_SEED={SEED}")
    chance, events, crew = random.Random(SEED), [], Crew()
    log = tmp_path / "server.log"
    with ExitStack() as stack:
        server = Server(data, log, port)
        stack.callback(lambda: server.end())
        near = stack.enter_context(aq_data.connect(server.url))
        far = stack.enter_context(aq_data.connect(bridge.url))
        sweep = near.sweep("x", **PLAIN)
        sweep.flush(20)

        def follow() -> None:
            last = ""
            # The stream of one call, then that of another behind its last event: as a script that is started again.
            while not events or events[-1].kind not in ("finished", "abandoned"):
                try:
                    for event in far.follow(sweep.id, after=last):
                        events.append(event)
                        last = event.id
                        if chance.random() < 0.01:
                            break
                except UnavailableError:
                    if far._http.client.is_closed:
                        return

        crew.start(follow)
        for n in range(1, 301):
            sweep.write(y=float(n), x=float(n), at={"x": chance.randrange(400)})  # not one behind the other: not merged
            if n % 7 == 0:
                kinds = chance.choices((CUT_ANSWER, CUT_ANSWER, CUT_REQUEST, DROP_ANSWER), k=3)
                bridge.arm(*(Fault(kind, chance.randrange(3000)) for kind in kinds))
                time.sleep(0.02)
            if n % 40 == 0:
                near.update(sweep.id, {"comment": f"at {n}"})
            if n in (120, 220):
                server.end()
                server = Server(data, log, port)
        sweep.flush(20)
        if ending == "finished":
            sweep.finish(20)
        else:
            sweep.abandon("a separator: \u2028 \x85 \x1e", 20)
        bridge.arm()
        wait_for(lambda: bool(events) and events[-1].kind == ending, "the follower misses the end", check=crew.check)
        crew.join()
        check_events(events, 300, ending)
        assert [e.data["revision"] for e in events if e.kind == "metadata"] == list(range(2, 9))
        late = list(near.follow(sweep.id))
        blocks = [event.data for event in late if event.kind == "block"]
        assert blocks == [event.data for event in events if event.kind == "block"]
        check_events(late, 300, ending)


def test_followers_that_never_read_slow_nobody(tmp_path, data, port):
    """Thirty connections that ask for events and take none: the experiment is as fast as before, the server as small."""
    server = Server(data, tmp_path / "server.log", port)

    def memory() -> int:
        with open(f"/proc/{server.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    try:
        with aq_data.connect(server.url) as client:

            def measure(deaf: int) -> float:
                with client.sweep("x", **PLAIN) as sweep, ExitStack() as stack:
                    sweep.flush(20)
                    for _ in range(deaf):
                        ear = stack.enter_context(socket.socket())
                        ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                        ear.connect(("127.0.0.1", port))
                        path = f"/api/v1/datafiles/{sweep.id}/events"
                        ear.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                    started = time.monotonic()
                    for n in range(1500):
                        sweep.write(y=float(n), x=float(n), at={"x": n * 7 % 1500})
                        if n % 100 == 0:
                            sweep.flush(20)
                    sweep.flush(20)
                    return time.monotonic() - started

            measure(0)
            alone, before = measure(0), memory()
            crowded = measure(30)
            assert crowded < 6 * alone + 1
            assert memory() - before < 60 << 20
    finally:
        server.end()
