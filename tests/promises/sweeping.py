"""What the promise tests of sweeps share: blocks made again from a number, processes that may be killed, readers that look."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from services.deployment import PATIENCE, environment, open_zarr

import aq_data
from aq_data.errors import UnavailableError

HERE = Path(__file__).parent
EAGER = {
    "FOLD_BLOCKS": 12,
    "FOLD_SECONDS": 0.3,
    "LOOK_SECONDS": 0.05,
    "LEASE_SECONDS": 1.0,
    "BATCH_BYTES": 12 << 20,
    "SEGMENT_BYTES": 6 << 10,
    "RETIRED_SECONDS": 1.0,
}
"""Folds often, in small batches, and forgets replaced objects soon."""

WIDTH, LONG = 8, 530_001
PLACES = 1000
"""Block g of a course writes g * PLACES + 1, + 2, … into the cells of its region: a cell tells which block it is from."""


@dataclass
class Course:
    """A sweep and all blocks it may ever have, each made from its number alone. One writer at a time goes through them.

    "grid": appends, regions written over and gaps, with a variable of text; "rows": appends alone, which are merged on the
    way; "large": blocks over 4 MB. Whatever a reader sees is the work of the first m blocks, and m is its largest value.
    """

    seed: int
    number: int
    kind: str
    id: str
    _states: list[dict[str, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def names(self) -> list[str]:
        return {"grid": ["a", "b", "t", "s"], "rows": ["a", "b", "t"], "large": ["z", "t"]}[self.kind]

    def open(self, client: aq_data.Client, spool: Path) -> aq_data.Sweep:
        variables = {
            "a": ("int64", ("row", "col")),
            "b": ("int64", ("row", "col")),
            "z": ("float64", ("row", "long")),
            "t": ("int64", ("row",)),
            "s": (str, ("row",)),
        }
        dims = {"row": None} | ({"long": LONG} if self.kind == "large" else {"col": WIDTH})
        chunks = {"t": (5,)} | ({} if self.kind == "large" else {"a": (7, 3), "b": (4, 8)})
        chosen = {name: variables[name] for name in self.names}
        return client.sweep(self.kind, dims=dims, variables=chosen, chunks=chunks, id=self.id, spool=spool)

    def region(self, g: int) -> tuple[bool, int, int, int, int]:
        """Whether block `g` is appended; its first row (when not), rows, first column, columns."""
        chance = np.random.default_rng([self.seed, self.number, g])
        if self.kind == "large":
            return False, int(chance.integers(3)), 1, 0, LONG
        if self.kind == "rows" or chance.random() < 0.4:
            return True, 0, int(chance.integers(1, 5)), 0, WIDTH
        first, left = int(chance.integers(30)), int(chance.integers(WIDTH))
        return False, first, int(chance.integers(1, 9)), left, int(chance.integers(1, WIDTH - left + 1))

    def _values(self, g: int, rows: int, columns: int) -> dict[str, Any]:
        cells = g * PLACES + 1 + np.arange(rows * columns).reshape(rows, columns)
        steps = g * PLACES + 1 + np.arange(rows)
        texts = np.array([str(step) for step in steps], object)
        made = {"a": cells, "b": -cells, "t": steps, "s": texts}
        return {"z": cells.astype(float), "t": steps} if self.kind == "large" else {n: made[n] for n in self.names}

    def write(self, sweep: aq_data.Sweep, g: int) -> None:
        appended, first, rows, left, columns = self.region(g)
        values = self._values(g, rows, columns)
        if appended:
            sweep.append(values, dim="row")
        elif self.kind == "large":
            sweep.write(values, at={"row": slice(first, first + rows)})
        else:
            sweep.write(values, at={"row": slice(first, first + rows), "col": slice(left, left + columns)})

    # --- what there should be ----------------------------------------------------------------------------------------

    def state(self, m: int) -> dict[str, Any]:
        """The arrays after the first m blocks; of "z" one number per row, the block it is from."""
        with self._lock:
            if not self._states:
                wide = {n: np.zeros((0, WIDTH), int) for n in ("a", "b")}
                self._states.append({**wide, "z": np.zeros(0, int), "t": np.zeros(0, int), "s": np.array([], object)})
            while len(self._states) <= m:
                self._states.append(self._after(self._states[-1], len(self._states)))
            return self._states[m]

    def _after(self, before: dict[str, Any], g: int) -> dict[str, Any]:
        appended, first, rows, left, columns = self.region(g)
        length = len(before["t"])
        first = length if appended else first
        values = self._values(g, rows, columns) if self.kind != "large" else {"t": self._values(g, rows, 1)["t"]}
        after = {}
        for name, old in before.items():
            grown = np.full((max(length, first + rows), *old.shape[1:]), "" if name == "s" else 0, old.dtype)
            grown[:length] = old
            if name == "z":
                grown[first] = g
            elif name in ("a", "b") and name in values:
                grown[first : first + rows, left : left + columns] = values[name]
            elif name in values:
                grown[first : first + rows] = values[name]
            after[name] = grown
        return after

    def seen(self, name: str, values: np.ndarray[Any, Any]) -> int:
        """How many blocks went into what was read of an array; AssertionError when it is not the work of the first m."""
        if not values.size:
            return 0
        if name == "z":
            tops = np.nan_to_num(values[:, 0]).astype(int) // PLACES
            m = int(tops.max())
            assert tops.tolist() == self.state(m)["z"][: len(values)].tolist(), f"{self.kind} z is not that of {m} blocks"
            ramp = 1.0 + np.arange(LONG)
            for row, top in zip(values, tops, strict=True):
                assert np.isnan(row).all() if top == 0 else (row == top * PLACES + ramp).all(), f"block {top} of z is torn"
            return m
        numbers = np.array([int(v or 0) for v in values]) if name == "s" else np.abs(values)
        m = int(numbers.max()) // PLACES
        expected = self.state(m)[name][: len(values)]
        assert values.tolist() == expected.tolist(), (
            f"{name} of {self.kind} {self.id} is not the work of its first {m} blocks"
        )
        return m


class Reader:
    """Looks at courses over and over: never torn, never less than what was acknowledged, never back in time."""

    def __init__(self, url: str, courses: list[Course], floors: Callable[[Course], int], seed: int) -> None:
        """`floors`: how many blocks of a course were acknowledged before now."""
        self._url, self._courses, self._floors, self._chance = url, courses, floors, random.Random(seed)
        self._last: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self.looks = 0

    def look(self, client: aq_data.Client, course: Course) -> int:
        floor = max(self._floors(course), self._last.get(course.id, 0))
        file = client.get(course.id)
        names = [name for name in course.names if name in file]
        assert len({file[name].shape[0] for name in names}) <= 1, "extents of one document disagree"
        self._chance.shuffle(names)
        for name in names:
            rows = file[name].shape[0]
            assert rows >= self._rows.get(course.id, 0), "the extent went back"
            self._rows[course.id] = rows
            m = course.seen(name, file[name][...])
            assert m >= floor, f"{name} of {course.kind} shows {m} blocks where {floor} had been seen or acknowledged"
            self._last[course.id] = floor = m
        assert names or not floor
        self.looks += 1
        return floor

    def run(self, stop: threading.Event, pause: float) -> None:
        with connected(self._url) as client:
            while not stop.is_set():
                for course in self._courses:
                    with suppress(UnavailableError, aq_data.errors.NotFoundError):
                        self.look(client, course)
                    stop.wait(pause * self._chance.random())


def check_ended(course: Course, client: aq_data.Client, blocks: int) -> None:
    """A finished course is complete, to our reader and to any."""
    file = client.get(course.id)
    assert file.state == "complete"
    expected = course.state(blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr, about consolidated metadata and text in version 3
        with open_zarr(file.path, chunks=None) as plain:
            for name in course.names:
                assert course.seen(name, file[name][...]) == blocks
                assert course.seen(name, plain[name].values) == blocks
                if name in ("a", "t"):
                    np.testing.assert_array_equal(file.written(name), expected[name] != 0)


def check_events(events: list[aq_data.Event], blocks: int, ending: str = "finished") -> None:
    """Each block once and in order, the end last."""
    told = [event for event in events if event.kind == "block"]
    assert [event.data["seq"] for event in told] == list(range(1, len(told) + 1))
    assert sum(event.data.get("count", 1) for event in told) == blocks
    assert [event.kind for event in events if event.kind in ("finished", "abandoned")] == [ending]
    assert events[-1].kind == ending
    assert len({event.id for event in events}) == len(events)


# --- processes ---------------------------------------------------------------------------------------------------------


def quiet_port(chance: random.Random) -> int:
    """A port nobody listens on, below those that connections take for themselves: it is free again after a kill."""
    while True:
        port = chance.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def connected(url: str, seconds: float = 20.0) -> aq_data.Client:
    """A client, once the server is there."""
    until = time.monotonic() + seconds
    while True:
        try:
            return aq_data.connect(url)
        except UnavailableError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


class Process:
    """A process of a test, with its standard error in a file."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None, **options: Any) -> None:
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", *command],
                stderr=errors,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
                **options,
            )

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> None:
        if self.is_alive:
            self.process.send_signal(number)

    def end(self, number: int = signal.SIGKILL) -> int:
        self.send(number)
        code = self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


class Server(Process):
    """The real server with eager folding; `settings` as in sweep_server.py."""

    def __init__(self, data: Path, log: Path, port: int = 0, **settings: Any) -> None:
        self.steps = log.with_suffix(".steps")
        settings = {"folding": EAGER, "steps": str(self.steps), **settings}
        command = [str(HERE / "sweep_server.py"), json.dumps(settings), "serve", "--data", str(data), "--port", str(port)]
        more = {"AQ_DATA_SERVER__LOG_LEVEL": "error", **environment(data)}
        super().__init__(command, log, more, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://\S+?:\d+", self.process.stdout.readline())
        assert found is not None, f"the server did not start: {log.read_text()[-2000:]}"
        self.url = found[0]


class Slots:
    """How many blocks of each course were accepted and acknowledged, in a file that survives the writer."""

    def __init__(self, path: Path, count: int) -> None:
        if not path.exists():
            path.write_bytes(bytes(16 * count))
        self._slots = np.memmap(path, "<i8", "r+", shape=(count, 2))

    def accepted(self, number: int) -> int:
        return int(self._slots[number, 0])

    def acknowledged(self, number: int) -> int:
        return int(self._slots[number, 1])

    def set(self, number: int, accepted: int, acknowledged: int) -> None:
        self._slots[number] = accepted, acknowledged


class Crew:
    """Threads; the first failure of any is raised by `check`."""

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def start(self, work: Callable[..., Any], *arguments: Any) -> None:
        def run() -> None:
            try:
                work(*arguments)
            except BaseException as exc:
                self.failures.append(exc)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def check(self) -> None:
        if self.failures:
            raise self.failures[0]

    def join(self, seconds: float = 30.0) -> None:
        until = time.monotonic() + seconds
        for thread in self._threads:
            while thread.is_alive() and not self.failures and time.monotonic() < until:
                thread.join(0.1)
        self.check()
        assert not any(thread.is_alive() for thread in self._threads), "a thread does not end"


def wait_for(
    condition: Callable[[], bool], what: str, seconds: float = 60.0, check: Callable[[], None] | None = None
) -> None:
    """Poll until it is so; AssertionError saying `what` when it never is."""
    until = time.monotonic() + seconds * PATIENCE
    while not condition():
        if check is not None:
            check()
        assert time.monotonic() < until, what
        time.sleep(0.01)


def rounds_log(path: Path) -> Callable[..., None]:
    """Writes one JSON line per call."""

    def write(**fields: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    return write
