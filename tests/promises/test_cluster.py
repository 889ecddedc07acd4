"""Servers killed, stopped beyond their leases, and cut off from a database and a bucket that fail in every way.

What was acknowledged is there, once and true, through every server; nothing is half visible; nobody sees an older state than
before; a failure is a 503 that says when to come again. AQ_DATA_SEED=<number> repeats the order of a run; every run prints
its own. A long run (`make soak`) writes a line per round to AQ_DATA_SOAK_LOG, else to a file in the test's folder.
"""

from __future__ import annotations

import os
import random
import secrets
import tempfile
import time
from pathlib import Path

import pytest
from clustering import MISFORTUNES, Cluster, Work, befall
from services.buckets import Bucket
from services.misbehaving import Network
from sweeping import check_events, rounds_log

from aq_data.errors import NotFoundError

# Read before the fixture that clears the environment.
SEED = int(os.environ.get("AQ_DATA_SEED") or secrets.randbits(32))
LOG = os.environ.get("AQ_DATA_SOAK_LOG")
SECONDS = float(os.environ.get("AQ_DATA_SOAK_SECONDS") or 4 * 3600)

pytestmark = pytest.mark.services

COURSES = ("grid", "rows", "large")
MENDED = {"stale_copy", "half_deleted", "orphan"}
"""What a crash or an outage may leave for `verify --repair` and `gc`."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.05)
    monkeypatch.setattr("aq_data.client.live.FIRST_PAUSE", 0.05)
    monkeypatch.setattr("aq_data.client.live.LONGEST_PAUSE", 0.5)
    monkeypatch.setattr("aq_data.client.sweeps.LONGEST_PAUSE", 0.5)


def run_cluster(
    bucket: Bucket, misfortunes: list[str], seed: int, servers: int, longest: float, courses: tuple[str, ...], write
) -> None:
    """One life of a cluster: a round for each misfortune, then the end, and a look at everything through every server."""
    with (
        tempfile.TemporaryDirectory(prefix="aq-data-cluster-", ignore_cleanup_errors=True) as folder,
        Network(seed) as network,
    ):
        cluster = Cluster(Path(folder), network, bucket, seed, servers)
        work = None
        try:
            work = Work(cluster, courses)
            work.wait_for_progress()
            for number, misfortune in enumerate(misfortunes):
                began, before = time.monotonic(), dict(work.ledger.counts)
                seconds = cluster.chance.uniform(0.3, longest)
                befall(cluster, misfortune, seconds)
                work.check()
                healed = time.monotonic()
                work.wait_for_progress()
                write(
                    seed=seed,
                    round=number,
                    bucket=bucket.url[:2],
                    servers=servers,
                    misfortune=misfortune,
                    seconds=round(healed - began, 1),
                    recovered_in=round(time.monotonic() - healed, 1),
                    blocks=list(work.acknowledged),
                    **{key: n - before.get(key, 0) for key, n in work.ledger.counts.items()},
                )
            work.end()
            check_everything(cluster, work)
        except BaseException:
            for node in cluster.nodes:
                print(f"--- {node.url}\n{node.log.read_text()[-3000:]}")
            raise
        finally:
            if work is not None:
                work.close()
            cluster.close()


def check_everything(cluster: Cluster, work: Work) -> None:
    """Before and after the operator has cleaned up, through every server."""
    findings = cluster.nodes[0].operate("verify", "--repair")
    assert {finding["kind"] for finding in findings} <= MENDED, findings
    cluster.nodes[0].operate("gc", "--older-than", "0s", "--delete")
    assert cluster.nodes[-1].operate("verify") == []
    clients = [cluster.client(node.url) for node in cluster.nodes]
    chance = random.Random(cluster.seed)
    there = set()
    for known in work.ledger.files:
        for client in clients:
            work.look(client, known, closely=False)
        try:
            file = chance.choice(clients).get(known.shipment.id)
            known.shipment.assert_complete(file)  # also one that nobody was told of
            there.add(file.id)
        except NotFoundError:
            assert known.is_going or not known.is_saved
    for client in clients:
        assert {hit.id for hit in client.search({"number": {"$exists": True}}, limit=None)} == there
        for course in work.courses:
            file, blocks = client.get(course.id), work.accepted[course.number]
            assert file.state == "complete"
            assert {course.seen(name, file[name][...]) for name in course.names} == {blocks}
    for course in work.courses:
        check_events(work.events[course.id], work.accepted[course.number])
    cluster.check()


@pytest.mark.timeout(300)
def test_a_cluster_survives_what_may_befall_it(gcs, tmp_path):
    """A few of the misfortunes, drawn by the seed, after another on one cluster of three servers."""
    print(f"AQ_DATA_SEED={SEED}")
    chosen = random.Random(SEED).sample(MISFORTUNES, 4)
    run_cluster(gcs.place(), chosen, SEED, 3, 1.5, ("grid", "large"), rounds_log(tmp_path / "rounds.jsonl"))


@pytest.mark.soak
@pytest.mark.timeout(8 * 3600)
def test_clusters_survive_everything_that_may_befall_them(gcs, s3, tmp_path):
    """All misfortunes, in every order, for longer, on clusters of two to four servers over either kind of bucket."""
    log = Path(LOG) if LOG else tmp_path / "rounds.jsonl"
    print(f"AQ_DATA_SEED={SEED}, rounds in {log}")
    chance, until = random.Random(SEED), time.monotonic() + SECONDS
    number = 0
    while time.monotonic() < until:
        bucket = (gcs, s3)[number % 2].place()
        chosen = chance.sample(MISFORTUNES, 6)
        run_cluster(bucket, chosen, chance.randrange(1 << 32), chance.randint(2, 4), 8.0, COURSES, rounds_log(log))
        number += 1
