"""Two server processes and an embedded client on one folder behave as one: nothing lost, nothing stale, one winner."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services.deployment import blobs, deployed, environment, opened
from shipments import Shipment, operate, unexplained

import aq_data
from aq_data.errors import AqDataError, ConflictError, NotFoundError, StaleRevisionError, UnavailableError
from aq_data.models.datafile import make_id


@contextmanager
def server_process(data: Path) -> Iterator[str]:
    """The address of a server in a process of its own; `serve` of the conftest ends with each test, this lasts."""
    command = [sys.executable, "-m", "aq_server", "serve", "--data", str(data), "--port", "0"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AQ_DATA_")} | environment(data)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean) as process:
        try:
            yield re.search(r"http://\S+?:\d+", process.stdout.readline())[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Iterator[tuple[Path, list[aq_data.Client]]]:
    """A deployment and three ways into it: two server processes and this one, which opens the folder itself where it may."""
    data = tmp_path_factory.mktemp("house")
    with ExitStack() as stack:
        one, two = stack.enter_context(server_process(data)), stack.enter_context(server_process(data))
        processes = [stack.enter_context(aq_data.connect(url)) for url in (one, two)]
        yield data, [*processes, stack.enter_context(opened(data))]


@pytest.fixture
def data(house) -> Path:
    return house[0]


@pytest.fixture
def doors(house) -> list[aq_data.Client]:
    return house[1]


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """All at the same moment, each in a thread of its own: results, or the errors of ours that were raised."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return call()
        except AqDataError as exc:
            return exc

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def new_id() -> str:
    return make_id(time.time_ns() // 1_000_000, os.urandom(10))


def test_saves_through_every_door_are_all_there(data, doors):
    """Saves of all sizes at once through three doors: each is visible through each, whole, and nothing is left over."""
    shipments = [Shipment.make(1, number) for number in range(45)]
    answers = together(
        [
            lambda client=client, part=part: [s.save(client).id for s in shipments[part::6]]
            for part, client in zip(range(6), itertools.cycle(doors), strict=False)
        ]
    )
    assert list(itertools.chain(*answers)) == [s.id for part in range(6) for s in shipments[part::6]]
    mine = {"id": {"$in": [s.id for s in shipments]}}  # other tests may have been at work in the same house before
    for client in doors:
        assert {file.id for file in client.search(mine | {"tags": {"$exists": True}}, limit=None)} == {
            s.id for s in shipments
        }
        assert client.count(mine | {"tags": "large"}) == sum(s.kind == "large" for s in shipments)
    for shipment, client in zip(shipments, itertools.cycle(doors[::-1]), strict=False):
        shipment.assert_complete(client.get(shipment.id))
    assert operate(data, "verify") == []
    assert unexplained(data, doors[0]) == []


def test_every_merge_lands(doors):
    """Patches without If-Match from everywhere to one document: each key is there, each counts as one revision."""
    id = doors[0].save(name="target", metadata={"nested": {}}).id

    def patch(client: aq_data.Client, who: int) -> None:
        for i in range(10):
            client.update(id, {"metadata": {f"k{who}.{i}": i, "nested": {f"w{who}": i}}})

    assert together([lambda c=c, w=w: patch(c, w) for w, c in enumerate(doors * 2)]) == [None] * 6
    for client in doors:
        file = client.get(id)
        assert file.revision == 61
        assert file.metadata == {f"k{w}.{i}": i for w in range(6) for i in range(10)} | {
            "nested": {f"w{w}": 9 for w in range(6)}
        }
        assert client.count({"nested.w5": 9}) == 1
        assert client.count({"nested.w5": 8}) == 0


def test_no_update_is_lost_with_if_match(doors):
    """Read, add one, write with the revision that was read: the sum is exact, whoever had to try again."""
    id = doors[0].save(name="counter", metadata={"n": 0}).id

    def add(client: aq_data.Client) -> int:
        refused = 0
        for _ in range(8):
            while True:
                file = client.get(id)
                try:
                    client.update(id, {"metadata": {"n": file.metadata["n"] + 1}}, revision=file.revision)
                    break
                except StaleRevisionError as exc:
                    assert exc.details["revision"] > file.revision  # noqa: PT017  (expected now and then, not always)
                    refused += 1
        return refused

    refusals = together([lambda c=c: add(c) for c in doors])
    assert [client.get(id).metadata["n"] for client in doors] == [24, 24, 24]
    assert doors[0].get(id).revision == 25
    assert all(isinstance(count, int) for count in refusals)


def test_nobody_reads_a_stale_revision(data, doors):
    """Once a change is acknowledged through one door, every other door shows it: document, search, count, lazy reads."""
    ids = [doors[0].save({"x": np.arange(3)}, metadata={"step": 0}).id for _ in range(4)]
    for client in doors:
        for id in ids:
            client.get(id)
    for n, (writer, reader) in enumerate(itertools.islice(itertools.cycle(itertools.permutations(doors, 2)), 36), start=1):
        id = ids[n % len(ids)]
        changed = writer.update(id, {"metadata": {"step": n}})
        assert reader.get(id).to_json() == changed.to_json()
        assert [file.id for file in reader.search({"step": n})] == [id]
        assert reader.count({"step": n - len(ids), "id": id}) == 0
    doors[1].delete(ids[0])
    for client in doors:
        with pytest.raises(NotFoundError):
            client.get(ids[0])["x"][...]
        assert ids[0] not in {file.id for file in client.search()}
    operate(data, "gc", "--older-than", "0s", "--delete")


def test_readers_never_see_revisions_go_back(doors):
    """While one door changes a document over and over, readers at all doors see it move forward only."""
    id = doors[0].save(metadata={"tick": 1}).id
    done = threading.Event()

    def write() -> None:
        try:
            for n in range(2, 60):
                assert doors[n % 3].update(id, {"metadata": {"tick": n}}).revision == n
        finally:
            done.set()

    def read(client: aq_data.Client) -> int:
        last = 0
        while not done.is_set():
            for file in (client.get(id), client.search({"tick": {"$exists": True}})[0]):
                assert file.revision >= last
                assert file.metadata["tick"] == file.revision
                last = file.revision
        return last

    answers = together([write, *(lambda c=c: read(c) for c in doors)])
    assert answers[0] is None
    assert all(1 <= last <= 59 for last in answers[1:])


def test_of_racing_saves_under_one_id_one_wins(data, doors):
    """Other content under the same id at the same moment: one is stored, the rest are told so, its bytes stay intact."""
    for round in range(8):
        id = new_id()
        contents = [np.full((200, 300), 10 * round + i, "f8") for i in range(6)]
        answers = together(
            [
                lambda c=client, v=values, one=id: c.save({"x": v}, id=one, files={"who": bytes([int(v[0, 0])]) * 1000})
                for client, values in zip(doors * 2, contents, strict=True)
            ]
        )
        winners = [i for i, answer in enumerate(answers) if isinstance(answer, aq_data.DataFile)]
        assert len(winners) == 1
        losers = [answer for i, answer in enumerate(answers) if i not in winners]
        assert all(isinstance(answer, ConflictError) and answer.code == "id_taken" for answer in losers)
        for client in doors:
            file = client.get(id)
            assert file["x"][...].tobytes() == contents[winners[0]].tobytes()
            assert file.read_file("who") == bytes([int(contents[winners[0]][0, 0])]) * 1000
    assert operate(data, "verify") == []
    assert unexplained(data, doors[0]) == []


def test_racing_repeats_of_one_save_agree(data, doors):
    """The same content under the same id at the same moment: everybody gets the same answer, one copy is kept."""
    for number in range(5):
        shipment = Shipment.make(2, number)
        answers = together([lambda c=client, s=shipment: s.save(c) for client in doors * 2])
        documents = [answer.to_json() for answer in answers]
        assert documents == [documents[0]] * 6
        shipment.assert_complete(doors[number % 3].get(shipment.id))
        assert doors[2].count({"id": shipment.id}) == 1
    assert unexplained(data, doors[0]) == []


def test_of_racing_deletions_nothing_is_left_half_done(data, doors):
    """Deletions, patches and searches at once: a deleted document stays deleted; no tombstone lies beside a living one."""
    for _ in range(6):
        file = doors[0].save({"x": np.arange(3)}, name="doomed")
        answers = together(
            [
                *(lambda c=c, one=file.id: c.delete(one) for c in doors),
                lambda one=file.id: doors[0].update(one, {"comment": "late"}),
                lambda one=file.id: doors[1].delete(one, revision=99),
                lambda: len(doors[2].search({"name": "doomed"})),
            ]
        )
        assert any(answer is None for answer in answers[:3])
        assert all(answer is None or isinstance(answer, NotFoundError) for answer in answers[:3])
        assert isinstance(answers[3], (aq_data.DataFile, NotFoundError))
        assert isinstance(answers[4], (StaleRevisionError, NotFoundError))
        for client in doors:
            assert client.count({"name": "doomed"}) == 0
            assert client.get(file.id, include_deleted=True).state == "deleted"
        assert list((blobs(data) / file.id).glob("tombstone-*"))  # or a rebuilt catalogue would raise the dead
    living = doors[0].save({"x": np.arange(3)}, name="living")
    together([lambda c=c: c.delete(living.id, revision=99) for c in doors])
    assert operate(data, "verify") != []  # of the deleted ones the bytes are still there…
    assert {finding["kind"] for finding in operate(data, "verify")} == {"orphan"}  # …and that is all
    operate(data, "gc", "--older-than", "0s", "--delete")
    assert unexplained(data, doors[0]) == []
    assert doors[1].get(living.id)["x"][...].tolist() == [0, 1, 2]


class Collector:
    """`gc --delete --older-than 0s` over and over, as a process of its own, until the block ends."""

    def __init__(self, data: Path) -> None:
        self._data, self._stop = data, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.runs = 0
        self.failures: list[BaseException] = []

    def _run(self) -> None:
        import asyncio

        from aq_server.app import open_stores

        async def collect() -> None:
            stores = open_stores(deployed(self._data))
            try:
                while not self._stop.is_set():
                    async for _ in stores.maintenance.gc(0.0, delete=True):
                        pass
                    self.runs += 1
                    # Without a pause no save would ever come to its end.
                    await asyncio.to_thread(self._stop.wait, 0.03)
            finally:
                await stores.close()

        try:
            asyncio.run(collect())
        except BaseException as exc:
            self.failures.append(exc)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_collecting_orphans_beside_saves_loses_nothing(data, doors, monkeypatch, tmp_path):
    """With `gc` always at work a save may be told to try again, never anything else, and what is acknowledged is kept."""
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.002)
    kept: dict[str, tuple[Shipment, str | None]] = {}
    attached = tmp_path / "attached.bin"
    attached.write_bytes(b"attached" * 50_000)

    def work(client: aq_data.Client, part: int) -> int:
        refused = 0
        begun = time.monotonic()
        for number in itertools.count(part, 6):
            seconds = time.monotonic() - begun
            if seconds > 60 or (seconds > 1.5 and collector.runs > 1):
                return refused
            shipment = Shipment.make(3, number)
            try:
                file = shipment.save(client)
                kept[shipment.id] = (shipment, None)
                if shipment.kind == "note":
                    file.attach(attached)
                    kept[shipment.id] = (shipment, attached.name)
            except UnavailableError:
                refused += 1
        raise AssertionError("unreachable")

    with Collector(data) as collector:
        answers = together([lambda c=c, p=p: work(c, p) for p, c in enumerate(doors * 2)])
    assert collector.failures == []
    assert collector.runs > 1
    assert all(isinstance(answer, int) for answer in answers), answers
    assert len(kept) > 2
    for (shipment, attachment), client in zip(list(kept.values()), itertools.cycle(doors), strict=False):
        file = client.get(shipment.id)
        if attachment is None:
            shipment.assert_complete(file)
        else:
            assert file.read_file(attachment) == attached.read_bytes()
    operate(data, "gc", "--older-than", "0s", "--delete")
    assert operate(data, "verify") == []
    assert unexplained(data, doors[0]) == []
