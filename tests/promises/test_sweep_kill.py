"""`kill -9` of the server, of the experiment, of both, and of the server in the middle of folding, while sweeps grow.

What was acknowledged is there exactly once, what was accepted arrives, readers see neither half a block nor the past.
AQ_DATA_SEED=<number> repeats the moments and contents of a run; every run prints its own. A long run (`make soak`) writes a
line per round to AQ_DATA_SOAK_LOG, else to a file in the test's folder.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import threading
import time
from pathlib import Path

import pytest
from services.deployment import PATIENCE
from shipments import operate
from sweeping import (
    HERE,
    Course,
    Crew,
    Process,
    Reader,
    Server,
    Slots,
    check_ended,
    check_events,
    connected,
    quiet_port,
    rounds_log,
    wait_for,
)

import aq_data
from aq_data.errors import NotFoundError, UnavailableError
from aq_data.models.datafile import make_id

# Read before the fixture that clears the environment.
SEED = int(os.environ.get("AQ_DATA_SEED") or secrets.randbits(32))
LOG = os.environ.get("AQ_DATA_SOAK_LOG")

KINDS = ("grid", "rows", "large")
VICTIMS = ("server", "writer", "both", "fold", "fold and writer")
WAYS = ("resume", "connect", "push")
"""How the next process of the experiment delivers what the last one left."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("aq_data.client.live.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("aq_data.client.live.LONGEST_PAUSE", 0.2)


class Era:
    """Some sweeps from their opening to their end, and the processes around them."""

    def __init__(self, folder: Path, data: Path, chance: random.Random, number: int) -> None:
        self.folder, self.data, self.chance = folder / f"era-{number}", data, chance
        self.folder.mkdir()
        seed = chance.randrange(1 << 30)
        self.courses = [
            Course(seed, i, kind, make_id(time.time_ns() // 1_000_000, random.Random(seed + i).randbytes(10)))
            for i, kind in enumerate(KINDS)
        ]
        self.slots = Slots(self.folder / "slots", len(KINDS))
        self.port = quiet_port(chance)
        self.url = f"http://127.0.0.1:{self.port}"
        self.events: dict[str, list[aq_data.Event]] = {course.id: [] for course in self.courses}
        self.crew, self.stop = Crew(), threading.Event()
        self.server: Server | None = None
        self.writer: Process | None = None
        self.reader = Reader(self.url, self.courses, self.floor, seed)

    def floor(self, course: Course) -> int:
        return self.slots.acknowledged(course.number)

    def start_server(self, die_at: int = 0) -> None:
        slow = self.chance.choice([0.0, 0.01, 0.05])
        seed = self.chance.randrange(1 << 30)
        self.server = Server(self.data, self.folder / "server.log", self.port, die_at=die_at, slow=slow, seed=seed)

    def start_writer(self) -> None:
        settings = {
            "url": self.url,
            "spool": str(self.folder / "spool"),
            "slots": str(self.folder / "slots"),
            "stop": str(self.folder / "stop"),
            "by": self.chance.choice(WAYS),
            "pace": self.chance.choice([0.02, 0.05]) * PATIENCE**2,
            "courses": [[c.seed, c.number, c.kind, c.id] for c in self.courses],
        }
        self.writer = Process([str(HERE / "sweep_writer.py"), json.dumps(settings)], self.folder / "writer.log")

    def begin(self) -> None:
        self.start_server()
        self.start_writer()
        self.crew.start(self.reader.run, self.stop, 0.1)
        for course in self.courses:
            self.crew.start(self.follow, course)

    def follow(self, course: Course) -> None:
        with connected(self.url) as client:
            while not self.stop.is_set():
                try:
                    for event in client.follow(course.id):
                        self.events[course.id].append(event)
                    return
                except NotFoundError:
                    self.stop.wait(0.05)  # not opened yet
                except UnavailableError:
                    if not self.stop.is_set():
                        raise

    def is_over(self, course: Course) -> bool:
        return bool(self.events[course.id]) and self.events[course.id][-1].kind == "finished"

    def check(self) -> None:
        self.crew.check()
        assert self.writer is not None
        assert self.writer.process.poll() in (None, 0, -9), self.writer.log.read_text()[-3000:]

    def round(self, victim: str) -> dict[str, object]:
        """Let them work, kill, begin again; wait until everything that was accepted has arrived."""
        assert self.server is not None
        assert self.writer is not None
        die_at = self.chance.randrange(1, 120) if "fold" in victim else 0
        looks, moment = self.reader.looks, self.chance.uniform(0.1, 1.0)
        if die_at:
            # The server that will kill itself takes the place of the one that is there.
            self.server.end()
            self.start_server(die_at)
            until = time.monotonic() + 5
            while self.server.is_alive and time.monotonic() < until:
                time.sleep(0.005)
            where = self.server.steps.read_text() if not self.server.is_alive else "did not fold"
        else:
            self.stop.wait(moment)
            where = f"{moment:.3f} s"
        order = [self.server] if victim in ("server", "fold") else [self.writer] if victim == "writer" else []
        for process in order or self.chance.sample([self.server, self.writer], 2):
            process.end()
        accepted = [self.slots.accepted(c.number) for c in self.courses]
        acknowledged = [self.slots.acknowledged(c.number) for c in self.courses]
        begin_again = [self.start_server] * (not self.server.is_alive) + [self.start_writer] * (not self.writer.is_alive)
        self.chance.shuffle(begin_again)
        for begin in begin_again:
            begin()
        for course in self.courses:
            wanted = accepted[course.number]
            wait_for(
                lambda n=course.number, wanted=wanted: self.slots.acknowledged(n) >= wanted,
                f"{wanted} blocks of {course.kind} were accepted and do not arrive",
                check=self.check,
            )
        wait_for(lambda: self.reader.looks >= looks + len(self.courses), "the reader gets nowhere", check=self.check)
        found = [self.look(course, accepted[course.number]) for course in self.courses]
        self.check()
        return {"victim": victim, "when": where, "accepted": accepted, "acknowledged": acknowledged, "found": found}

    def look(self, course: Course, accepted: int) -> int:
        """What a reader sees of a course; one that was killed before it was opened may not be there yet."""
        with connected(self.url) as client:
            try:
                return Reader(self.url, [], self.floor, 0).look(client, course)
            except NotFoundError:
                assert accepted == 0, f"{course.id} is gone with {accepted} blocks"
                return 0

    def end(self, kills: int) -> None:
        """Finish, also when killed while finishing; then compare everything."""
        assert self.server is not None
        assert self.writer is not None
        (self.folder / "stop").touch()
        for _ in range(kills):
            time.sleep(self.chance.uniform(0.05, 0.8))
            if self.chance.random() < 0.5:
                self.server.end()
                self.start_server()
            elif self.writer.is_alive:
                self.writer.end()
                self.start_writer()
            self.check()
        wait_for(lambda: not self.writer.is_alive, "the writer does not finish", seconds=60, check=self.check)
        assert self.writer.process.returncode == 0, self.writer.log.read_text()[-3000:]
        wait_for(lambda: all(self.is_over(c) for c in self.courses), "a follower misses the end", check=self.check)
        self.stop.set()
        self.crew.join()
        assert [p.name for p in (self.folder / "spool").glob("*/*.segment")] == []
        with connected(self.url) as client:
            for course in self.courses:
                blocks = self.slots.accepted(course.number)
                assert blocks > 0
                check_ended(course, client, blocks)
                check_events(self.events[course.id], blocks)

    def close(self, number: int = signal.SIGKILL) -> None:
        self.stop.set()
        for process in (self.writer, self.server):
            if process is not None:
                process.end(number)


def kill_sweeps(folder: Path, data: Path, rounds: int, per_era: int, log: Path) -> None:
    print(f"AQ_DATA_SEED={SEED}, rounds in {log}")
    chance, write, done, number = random.Random(SEED), rounds_log(log), 0, 0
    victims: list[str] = []
    while done < rounds:
        era = Era(folder, data, chance, number)
        try:
            era.begin()
            for _ in range(min(per_era, rounds - done)):
                if not victims:
                    victims = chance.sample(VICTIMS, len(VICTIMS))
                write(seed=SEED, round=done, era=number, **era.round(victims.pop()))
                done += 1
            era.end(kills=2)
        except BaseException:
            era.close(signal.SIGABRT)  # their logs then show what they were at
            raise
        finally:
            era.close()
        number += 1
    operate(data, "gc", "--older-than", "0s", "--delete")
    assert operate(data, "verify") == []


def test_sweeps_survive_kills(tmp_path, data):
    """Each kind of kill once: every accepted block arrives exactly once, and no reader sees a torn block or the past."""
    kill_sweeps(tmp_path, data, rounds=5, per_era=5, log=tmp_path / "rounds.jsonl")


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_sweeps_survive_a_thousand_kills(tmp_path, data):
    """The same a thousand times, with a log of every round."""
    kill_sweeps(tmp_path, data, rounds=1000, per_era=12, log=Path(LOG) if LOG else tmp_path / "rounds.jsonl")
