"""Several servers on one MongoDB and one bucket, behind a balancer that sends each connection anywhere, on ways that fail.

`Cluster` has the processes and the ways between them, `Ledger` what was acknowledged, `Work` those who save, change, delete,
measure, follow and look all the time. Whatever an answer says that cannot be so is a failure of the test.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from services.buckets import Bucket
from services.misbehaving import CLEAR, Network, Weather
from services.mongo import Engine
from shipments import Shipment
from sweeping import EAGER, HERE, Course, Crew, Process, Reader, quiet_port, wait_for

import aq_data
from aq_data.errors import NotFoundError, UnavailableError
from aq_data.models.datafile import make_id

LEASE = 3.0
FOLDING = {**EAGER, "LEASE_SECONDS": LEASE}
PATIENCE = 120.0
MOST_BLOCKS = 40
"""A writer waits while so many of its blocks are not acknowledged."""


class Node(Process):
    """`aq-data serve` with eager folding, on ways of its own to the database and to the bucket."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.database = cluster.network.way(cluster.engine_at)
        self.bucket = cluster.network.way(cluster.bucket_at, http=True)
        self.port, self._folder = quiet_port(cluster.chance), cluster.folder / f"node-{number}"
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder.mkdir()
        self.config = self._folder / "config.json"
        self.config.write_text(json.dumps({"server": cluster.settings(self)}))
        self.start()

    def start(self) -> None:
        """Return when it listens."""
        command = [str(HERE / "sweep_server.py"), json.dumps({"folding": FOLDING}), "serve", "--config", str(self.config)]
        super().__init__(command, self._folder / "log", stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert re.search(r"http://\S+?:\d+", line), f"it did not start: {self.log.read_text()[-2000:]}"

    def readiness(self) -> dict[str, Any]:
        """What it says of itself."""
        return httpx.get(f"{self.url}/readyz", timeout=20).json()

    def operate(self, *words: str) -> list[dict[str, Any]]:
        """Lines of an operator's command with the configuration of this server."""
        command = [sys.executable, "-m", "aq_server", *words, "--config", str(self.config), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode in (0, 3), done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


class Cluster:
    """The processes. To be closed, also when it could not be made whole."""

    def __init__(self, folder: Path, network: Network, bucket: Bucket, seed: int, servers: int, fallback: str = "") -> None:
        """`fallback`: a folder that stands in for the bucket while it is down."""
        self.folder, self.network, self.bucket, self.seed = folder, network, bucket, seed
        self.chance, self._fallback = random.Random(seed), fallback
        self.nodes: list[Node] = []
        self.clients: list[aq_data.Client] = []
        self.wrong: list[str] = []
        self.engine = Engine(folder / "mongo")
        self.engine_at = f"127.0.0.1:{self.engine.port}"
        self.bucket_at = urlsplit(bucket.options.endpoint or "").netloc
        for number in range(servers):
            self.nodes.append(Node(self, number))
        self.front = network.way(*(node.url for node in self.nodes))
        self.url = f"http://{self.front.address}"

    def settings(self, node: Node) -> dict[str, Any]:
        options = {"anonymous": True}
        if not self.bucket.options.anonymous:
            options = {"region": self.bucket.options.region, "credentials_file": self.bucket.options.credentials_file}
        stores = {"default": {"url": self.bucket.url, "endpoint": f"http://{node.bucket.address}", **options}}
        if self._fallback:
            stores["default"]["fallback"] = "disk"
            stores["disk"] = {"url": self._fallback}
        return {
            "data": str(node.config.parent / "data"),
            "port": node.port,
            "mongo": self.engine.url.replace(self.engine_at, node.database.address),
            "mongo_database": "cluster",
            "log_level": "error",
            "stores": stores,
        }

    def client(self, url: str = "") -> aq_data.Client:
        """A client through the balancer, each request of which may meet another server; or of one server."""
        client = aq_data.connect(url or self.url)
        inner = client._http.client
        inner.event_hooks = {"response": [self._check_answer]}
        if not url:
            inner.headers["Connection"] = "close"
        self.clients.append(client)
        return client

    def _check_answer(self, answer: httpx.Response) -> None:
        if answer.status_code < 500:
            return
        what = f"{answer.request.method} {answer.request.url.path} was answered {answer.status_code}"
        if answer.status_code != 503 or "retry-after" not in answer.headers:
            with suppress(httpx.HTTPError):
                what += f": {answer.read()[:600]!r}"
            self.wrong.append(what)
        elif answer.headers.get("content-type") != "application/problem+json":
            self.wrong.append(f"{what} without a problem document")

    def restart_database(self) -> None:
        """Kill it, and start it where it was."""
        self.engine.kill()
        self.engine = Engine(self.folder / "mongo", self.engine.port)

    def heal(self) -> None:
        """Everything runs and all ways are clear."""
        for node in self.nodes:
            node.send(signal.SIGCONT)
            for way in (node.database, node.bucket):
                if way.weather != CLEAR:
                    way.be(CLEAR)
            if not node.is_alive:
                node.start()

    def check(self) -> None:
        assert not self.wrong, self.wrong[0]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for node in self.nodes:
            node.send(signal.SIGCONT)
            node.end()
        self.engine.kill()


@dataclass
class Known:
    """A DataFile: the least that every answer about it must show from now on."""

    shipment: Shipment
    is_saved: bool = False
    is_going: bool = False
    is_gone: bool = False
    revision: int = 0
    comment: int = 0


@dataclass
class Ledger:
    """What was acknowledged."""

    files: list[Known] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def pick(self, chance: random.Random) -> Known | None:
        """One that was saved and is not being deleted; of the newest more often."""
        with self.lock:
            living = [known for known in self.files if known.is_saved and not known.is_going]
        return living[-1 - int(len(living) * chance.random() ** 2)] if living else None


class Work:
    """Those who work on a cluster, each in a thread with a client of its own."""

    def __init__(self, cluster: Cluster, courses: tuple[str, ...], savers: int = 1) -> None:
        self.cluster, self.ledger, self.crew = cluster, Ledger(), Crew()
        self.stop, self.done = threading.Event(), threading.Event()
        seed = cluster.chance.randrange(1 << 30)
        self.courses = [
            Course(seed, i, kind, make_id(time.time_ns() // 1_000_000, random.Random(seed + i).randbytes(10)))
            for i, kind in enumerate(courses)
        ]
        self.accepted = [0] * len(courses)
        self.acknowledged = [0] * len(courses)
        self.events: dict[str, list[aq_data.Event]] = {course.id: [] for course in self.courses}
        self.reader = Reader(cluster.url, self.courses, lambda course: self.acknowledged[course.number], seed)
        self.number = 0
        for i in range(savers):
            self._start(self._save, random.Random(seed + 100 + i))
        for work in (self._change, self._delete, self._look):
            self._start(work, random.Random(cluster.chance.random()))
        self.opened = [threading.Event() for _ in courses]
        self.sweeps: dict[int, aq_data.Sweep] = {}
        for course in self.courses:
            self._start(self._measure, course)
            self._start(self._follow, course)
        self.crew.start(self.reader.run, self.stop, 0.2)

    def _start(self, work: Any, *arguments: Any) -> None:
        self.crew.start(work, self.cluster.client(), *arguments)

    def check(self) -> None:
        self.crew.check()
        self.cluster.check()

    # --- DataFiles -------------------------------------------------------------------------------------------------

    def _save(self, client: aq_data.Client, chance: random.Random) -> None:
        while not self.stop.is_set():
            with self.ledger.lock:
                known = Known(Shipment.make(self.cluster.seed, self.number))
                self.number += 1
                self.ledger.files.append(known)
            while not self.stop.is_set():
                try:
                    file = known.shipment.save(client)
                    assert file.id == known.shipment.id
                    known.revision, known.is_saved = max(known.revision, file.revision), True
                    self.ledger.count("saved")
                    break
                except UnavailableError:
                    self.ledger.count("saves that failed")
            self.stop.wait(0.1 * chance.random())

    def _change(self, client: aq_data.Client, chance: random.Random) -> None:
        n = 0
        while not self.stop.is_set():
            known = self.ledger.pick(chance)
            if known is not None:
                n += 1
                try:
                    file = client.update(known.shipment.id, {"comment": str(n)})
                    known.comment, known.revision = n, max(known.revision, file.revision)
                    self.ledger.count("changed")
                except UnavailableError:
                    self.ledger.count("changes that failed")
                except NotFoundError:
                    if not known.is_going:
                        raise
            self.stop.wait(0.1 * chance.random())

    def _delete(self, client: aq_data.Client, chance: random.Random) -> None:
        while not self.stop.is_set():
            self.stop.wait(1.5 * chance.random())
            known = self.ledger.pick(chance)
            while known is not None and not self.stop.is_set():
                known.is_going = True
                try:
                    client.delete(known.shipment.id)
                except NotFoundError as exc:  # the try before, of which nothing was heard, has done it
                    if exc.code != "deleted":
                        raise
                except UnavailableError:
                    continue
                known.is_gone = True
                self.ledger.count("deleted")
                break

    def _look(self, client: aq_data.Client, chance: random.Random) -> None:
        while not self.stop.is_set():
            with self.ledger.lock:
                known = chance.choice(self.ledger.files[-30:]) if self.ledger.files else None
            if known is not None:
                with suppress(UnavailableError):
                    self.look(client, known, chance.random() < 0.3)
                    self.ledger.count("looked")
            self.stop.wait(0.05)

    def look(self, client: aq_data.Client, known: Known, closely: bool) -> None:
        """AssertionError when it is less than it was, half there, or another."""
        is_saved, is_gone, revision, comment = known.is_saved, known.is_gone, known.revision, known.comment
        id = known.shipment.id
        try:
            file = client.get(id)
            assert not is_gone, f"{id} was deleted and is there"
            assert file.revision >= revision, f"{id} went back from revision {revision} to {file.revision}"
            assert int(file.comment or 0) >= comment, f"{id} lost its comment {comment}: {file.comment!r}"
            known.revision = max(known.revision, file.revision)
            if closely:
                known.shipment.assert_complete(file)
                found = client.search({"number": known.shipment.number})
                assert known.is_going or [each.id for each in found] == [id], "what is there is not found, or more than once"
        except NotFoundError as exc:
            if is_saved and not known.is_going:
                raise AssertionError(f"{id} was acknowledged and is lost") from exc

    # --- sweeps ------------------------------------------------------------------------------------------------------

    def _measure(self, client: aq_data.Client, course: Course) -> None:
        i = course.number
        while not self.opened[i].is_set():
            try:
                sweep = course.open(client, self.cluster.folder / "spool")
                self.sweeps[i] = sweep
                self.opened[i].set()
            except UnavailableError:
                self.check()
        while not self.stop.is_set():
            lag = sweep.lag.blocks
            self.acknowledged[i] = self.accepted[i] - lag
            if lag < MOST_BLOCKS and (course.kind != "large" or lag == 0):
                course.write(sweep, self.accepted[i] + 1)
                self.accepted[i] += 1
            self.stop.wait(4.0 if course.kind == "large" else 0.1)
        sweep.finish(2 * PATIENCE)
        self.acknowledged[i] = self.accepted[i]

    def _follow(self, client: aq_data.Client, course: Course) -> None:
        while not self.done.is_set():
            try:
                after = self.events[course.id][-1].id if self.events[course.id] else ""
                for event in client.follow(course.id, after):
                    self.events[course.id].append(event)
                return
            except NotFoundError:
                self.stop.wait(0.05)  # not opened yet
            except UnavailableError:
                if not self.done.is_set():
                    raise

    # --- rounds ------------------------------------------------------------------------------------------------------

    def wait_for_progress(self) -> None:
        """Everybody gets on: nobody waits for what is over."""
        before, accepted, looks = dict(self.ledger.counts), list(self.accepted), self.reader.looks

        def gets_on() -> bool:
            counts = self.ledger.counts
            return (
                all(counts.get(what, 0) > before.get(what, 0) + 1 for what in ("saved", "changed", "looked"))
                and all(now >= then for now, then in zip(self.acknowledged, accepted, strict=True))
                and self.reader.looks >= looks + len(self.courses)
            )

        try:
            wait_for(gets_on, "somebody does not get on after everything works again", PATIENCE, self.check)
        except AssertionError as exc:
            now = (self.ledger.counts, self.accepted, self.acknowledged, self.reader.looks, self.sweeps)
            raise AssertionError(f"{exc}: {(before, accepted, looks)} became {now}") from exc
        for node in self.cluster.nodes:
            wait_for(
                lambda node=node: node.readiness()["status"] == "ready", "a server does not get ready", PATIENCE, self.check
            )

    def end(self) -> None:
        """Stop; finish the sweeps; every follower has seen the end."""
        self.stop.set()
        wait_for(
            lambda: all(events and events[-1].kind == "finished" for events in self.events.values()),
            "a sweep does not end, or a follower misses it",
            3 * PATIENCE,
            self.check,
        )
        self.done.set()
        self.crew.join(60)
        self.check()

    def close(self) -> None:
        self.stop.set()
        self.done.set()


# --- what may happen ---------------------------------------------------------------------------------------------------

WEATHERS = {
    "slow": Weather(delay=0.03),
    "refuses": Weather(refuses=True),
    "silent": Weather(is_silent=True),
    "cut": Weather(cut_after=6000),
}
ERRORS = {"errors": Weather(share=0.4)}
MISFORTUNES = (
    "kill",
    "pause",
    "database killed",
    *(f"database {how} for {whom}" for how in WEATHERS for whom in ("one", "all")),
    *(f"bucket {how} for {whom}" for how in WEATHERS | ERRORS for whom in ("one", "all")),
    "bucket errors for all and kill",
    "database cut for all and pause",
)


def befall(cluster: Cluster, misfortune: str, seconds: float) -> None:
    """Let it happen for some time, then mend it. A pause is longer than a lease."""
    for part in misfortune.split(" and "):
        words = part.split()
        victims = list(cluster.nodes) if words[-1] == "all" else [cluster.chance.choice(cluster.nodes)]
        if words[0] == "kill":
            victims[0].end()
        elif words[0] == "pause":
            victims[0].send(signal.SIGSTOP)
            seconds = max(seconds, 1.5 * LEASE)
        elif words[1] == "killed":
            cluster.restart_database()
        else:
            for node in victims:
                getattr(node, words[0]).be((WEATHERS | ERRORS)[words[1]])
    time.sleep(seconds)
    cluster.heal()
