"""The experiment of the kill tests, as a process of its own: goes through courses block by block until it is told to finish.

    python sweep_writer.py '{"url": …, "spool": …, "slots": …, "stop": …, "by": "resume", "pace": 0.01, "courses": [[seed, 0, "grid", id]]}'

Whatever an earlier process accepted must be at the server once it was delivered; otherwise it ends with status 3.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from sweeping import Course, Slots, connected

import aq_data
import aq_data.client.http
import aq_data.client.sweeps
from aq_data.client.live import push
from aq_data.client.spool import Spool
from aq_data.client.spools import spool_paths
from aq_data.errors import ConflictError, NotFoundError, UnavailableError

aq_data.client.http.FIRST_PAUSE = 0.01
aq_data.client.sweeps.FIRST_PAUSE, aq_data.client.sweeps.LONGEST_PAUSE = 0.02, 0.2

MOST_BLOCKS, MOST_BYTES = 200, 10 << 20
"""The writer rests when it is so far ahead: a test should catch up soon."""


def deliver(url: str, spool: Path, by: str) -> None:
    """What an earlier process left goes to the server, by the way that this round tests."""
    os.environ["AQ_DATA_SPOOL"] = str(spool) if by == "connect" else f"{spool}-none"
    if by == "connect":
        connected(url).close()  # waits for the delivery in the background
    elif by == "push":
        with connected(url) as client:
            for path in spool_paths(spool):
                left = Spool.open(path)
                assert left is not None
                with suppress(UnavailableError):
                    push(client._http, left)
    os.environ["AQ_DATA_SPOOL"] = f"{spool}-none"


def total(url: str, id: str) -> int:
    """Blocks of all writers of a sweep, once the server is there."""
    while True:
        try:
            answer = httpx.get(f"{url}/api/v1/sweeps/{id}", timeout=10)
            answer.raise_for_status()
            return sum(answer.json()["writers"].values())
        except httpx.HTTPError:
            time.sleep(0.02)


def begin(client: aq_data.Client, course: Course, spool: Path) -> aq_data.Sweep | None:
    """The sweep of a course, opened or gone on with; None when it has ended."""
    while True:
        try:
            return client.resume_sweep(course.id, spool=spool)
        except NotFoundError:
            return course.open(client, spool)
        except ConflictError as exc:
            if exc.code != "finished":
                raise
            return None
        except UnavailableError:
            time.sleep(0.05)


def run(settings: dict[str, Any]) -> int:
    url, spool, stop = settings["url"], Path(settings["spool"]), Path(settings["stop"])
    courses = [Course(*given) for given in settings["courses"]]
    slots = Slots(Path(settings["slots"]), len(courses))
    deliver(url, spool, settings["by"])
    client = connected(url)
    sweeps: list[aq_data.Sweep | None] = []
    starts, counts = [], []
    for i, course in enumerate(courses):
        sweeps.append(begin(client, course, spool))
        found = total(url, course.id)
        if not slots.accepted(i) <= found <= slots.accepted(i) + 1:
            print(
                f"{course.kind} {course.id}: {slots.accepted(i)} blocks had been accepted, {found} arrived", file=sys.stderr
            )
            return 3
        slots.set(i, found, found)
        starts.append(found)
        counts.append(found)
    turn = 0
    while not stop.exists():
        turn += 1
        for i, (course, sweep) in enumerate(zip(courses, sweeps, strict=True)):
            if sweep is None:
                continue
            lag = sweep.lag
            slots.set(i, counts[i], counts[i] - lag.blocks)
            if lag.blocks < MOST_BLOCKS and lag.bytes < MOST_BYTES and (course.kind != "large" or turn % 12 == 1):
                course.write(sweep, counts[i] + 1)
                counts[i] += 1
                slots.set(i, counts[i], counts[i] - lag.blocks - 1)
        time.sleep(settings["pace"])
    for i, sweep in enumerate(sweeps):
        if sweep is not None:
            sweep.finish()
            slots.set(i, counts[i], counts[i])
    client.close()
    return 0


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1])))
