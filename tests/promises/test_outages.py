"""How long it takes to fail when the database or the bucket is down, what an outage leaves behind, and that it ends by itself."""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from clustering import Cluster, Node
from services.deployment import SOAK
from services.misbehaving import CLEAR, REFUSING, SILENT, Network, Weather
from sweeping import Crew, wait_for

from aq_data.client.outgoing import outgoing_save
from aq_data.wire.routes import DATAFILES

SEED = int(os.environ.get("AQ_DATA_SEED") or secrets.randbits(32))

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]

BUSY = 1.5
"""The bounds are those of the documentation; a busy machine is given half as much again."""
SAVES = {
    ("database", REFUSING): 4.0,
    ("database", SILENT): 10.0,
    ("bucket", REFUSING): 12.0,
    ("bucket", SILENT): 34.0,
    ("bucket", Weather(share=1.0, faults=("500",))): 12.0,
    ("bucket", Weather(share=1.0, faults=("truncated", "reset"))): 12.0,
}
"""Seconds until a save is refused, by what is wrong with which part."""
READY_SECONDS = 2.0


@contextmanager
def made(bucket, servers: int, fallback: bool = False) -> Iterator[Cluster]:
    print(f"AQ_DATA_SEED={SEED}")
    with (
        tempfile.TemporaryDirectory(prefix="aq-data-outage-", ignore_cleanup_errors=True) as folder,
        Network(SEED) as network,
    ):
        cluster = Cluster(Path(folder), network, bucket.place(), SEED, servers, f"{folder}/disk" if fallback else "")
        try:
            yield cluster
        finally:
            cluster.close()


def save(node: Node, timeout: float = 100.0) -> httpx.Response:
    """One try to save a small array, without any repetition."""
    body = outgoing_save({"y": np.arange(5)}, metadata=None, files=None, id=None, chunks=None, codec=None, store=None).body()
    content, headers = b"".join(map(bytes, body.make())), {"Content-Type": body.content_type}
    return httpx.post(f"{node.url}{DATAFILES}", content=content, headers=headers, timeout=timeout)


def ready(node: Node) -> tuple[dict, float]:
    """What the server says of its parts, and the seconds that took."""
    began = time.monotonic()
    return node.readiness(), time.monotonic() - began


def test_a_part_that_is_down_is_named_at_once_and_a_save_fails_in_bounded_time_and_works_again(gcs):
    """Each kind of outage on a server of its own: 503 with Retry-After, /healthz stays 200, nothing has to be restarted."""
    crew, figures = Crew(), {}

    def suffer(node: Node, part: str, weather: Weather, bound: float) -> None:
        assert save(node).status_code == 201
        getattr(node, part).be(weather)
        took = []
        for _ in range(2 if bound < 20 else 1):
            began = time.monotonic()
            answer = save(node)
            took.append(round(time.monotonic() - began, 1))
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable"), answer.text
            assert "retry-after" in answer.headers
            assert took[-1] < BUSY * bound
        said, seconds = min((ready(node) for _ in range(3)), key=lambda each: each[1])
        assert seconds < READY_SECONDS
        assert said["status"] == "unavailable"
        assert (said["metadata"] != "ok", said["stores"]["default"] != "ok") == (part == "database", part == "bucket")
        assert httpx.get(f"{node.url}/healthz", timeout=5).status_code == 200
        getattr(node, part).be(CLEAR)
        began = time.monotonic()
        wait_for(lambda: ready(node)[0]["status"] == "ready", f"{part} {weather} is not got over", 60)
        assert save(node).status_code == 201
        figures[part, weather] = (took, round(seconds, 2), round(time.monotonic() - began, 1))

    with made(gcs, len(SAVES)) as cluster:
        for node, ((part, weather), bound) in zip(cluster.nodes, SAVES.items(), strict=True):
            crew.start(suffer, node, part, weather, bound)
        crew.join(300)
    for (part, weather), (took, seconds, after) in figures.items():
        print(f"{part} {weather}: saves {took} s, /readyz {seconds} s, works again after {after} s")


def test_requests_to_a_bucket_that_refuses_are_bounded(gcs):
    """No save asks more than five times for each of its few requests."""
    with made(gcs, 1) as cluster:
        [node] = cluster.nodes
        assert save(node).status_code == 201
        node.bucket.be(Weather(share=1.0, faults=("503",)))
        assert save(node).status_code == 503
        assert 5 <= node.bucket.met["503"] <= 30


@pytest.mark.timeout(1200 if SOAK else 400)
def test_an_outage_under_load_leaves_nothing_behind(gcs):
    """Threads, files, connections and memory are what they were before."""
    with made(gcs, 1) as cluster:
        [node] = cluster.nodes
        process, stop, crew, counts = psutil.Process(node.process.pid), threading.Event(), Crew(), {201: 0, 503: 0}

        def hammer() -> None:
            while not stop.is_set():
                status = save(node).status_code
                counts[status] += 1

        for _ in range(24):
            crew.start(hammer)
        wait_for(lambda: counts[201] > 100, "saves do not work", check=crew.check)
        before = process.num_threads(), process.num_fds(), process.memory_info().rss
        worst = [0, 0, 0]
        for part in ("bucket", "database"):
            for weather in (SILENT, REFUSING, Weather(cut_after=3000)):
                getattr(node, part).be(weather)
                until = time.monotonic() + (60 if SOAK else 4)
                while time.monotonic() < until:
                    now = process.num_threads(), process.num_fds(), process.memory_info().rss
                    worst = [max(pair) for pair in zip(worst, now, strict=True)]
                    assert node.bucket.open_connections <= 64 + 8
                    assert node.database.open_connections <= 100 + 8
                    time.sleep(0.1)
                getattr(node, part).be(CLEAR)
                had = counts[201]
                wait_for(lambda had=had: counts[201] > had + 50, "saves do not work again", 120, crew.check)
        stop.set()
        crew.join(120)
        print(f"threads, files, bytes: {before}, at worst {worst}; answers {counts}")
        assert worst[0] <= before[0] + 16
        assert worst[1] <= before[1] + 300
        assert worst[2] <= before[2] + (200 << 20)
        wait_for(lambda: process.num_fds() <= before[1] + 20, f"{process.num_fds()} files are open, {before[1]} before", 90)
        assert process.num_threads() <= before[0] + 4


def is_quick(client) -> bool:
    """Whether a save does not wait for a bucket that says nothing."""
    began = time.monotonic()
    client.save({"y": np.arange(3)}, name="first")
    return time.monotonic() - began < 3.0


def test_a_fallback_takes_what_is_saved_while_the_bucket_says_nothing(gcs):
    """After the first that met the silence nobody waits; all of it lies in the bucket in the end."""
    with made(gcs, 2, fallback=True) as cluster:
        clients = [cluster.client(node.url) for node in cluster.nodes]
        for node in cluster.nodes:
            node.bucket.be(SILENT)
        for node in cluster.nodes:
            wait_for(lambda node=node: ready(node)[0]["status"] == "degraded", "the outage is not seen")
        for client in clients:
            wait_for(lambda client=client: is_quick(client), "saves go on waiting for the bucket")
        files = []
        for i in range(10):
            began = time.monotonic()
            files.append(clients[i % 2].save({"y": np.arange(i + 1)}, name=f"T{i}"))
            assert time.monotonic() - began < 5.0
            assert files[-1].to_json()["intended_store"] == "default"
            assert np.array_equal(clients[(i + 1) % 2].get(files[-1].id)["y"][:], np.arange(i + 1))
        for node in cluster.nodes:
            node.bucket.be(CLEAR)
        wait_for(lambda: clients[0].search({"intended_store": "default"}).total == 0, "it is not brought home", 90)
        for i, file in enumerate(files):
            found = clients[i % 2].get(file.id)
            assert found.path.startswith(cluster.bucket.url)
            assert np.array_equal(found["y"][:], np.arange(i + 1))
        cluster.nodes[0].operate("gc", "--older-than", "0s", "--delete")
        assert cluster.nodes[0].operate("verify") == []
        cluster.check()
