"""A wire that breaks anywhere and a disk that fills up: everything or nothing, said in words, and never wrong data."""

from __future__ import annotations

import os
import random
import resource
import secrets
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shipments import Shipment, operate, unexplained

import aq_data
from aq_data.errors import AqDataError, NotFoundError, StorageError, UnavailableError
from aq_data.models.datafile import make_id

# Read before the fixture that clears the environment; every run prints its own.
SEED = int(os.environ.get("AQ_DATA_SEED") or secrets.randbits(32))


@dataclass(frozen=True)
class Fault:
    """What one connection suffers, once so many bytes have gone one way: it is cut, its answer is kept back, it waits."""

    kind: str
    after: int = 0


CUT_REQUEST, CUT_ANSWER, DROP_ANSWER, DELAY = "cut request", "cut answer", "drop answer", "delay"


class Wire:
    """A TCP proxy in front of a server. Each new connection takes the next fault of the list; without one it is sound."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    def _begin(self, work: Any, *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def arm(self, *faults: Fault) -> None:
        """Faults for the connections to come; those that are open are closed, so that the next request makes one."""
        with self._lock:
            self._faults = list(faults)
            for side in list(self._open):
                with suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)

    @property
    def faults_left(self) -> int:
        return len(self._faults)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                fault = self._faults.pop(0) if self._faults else None
            self._begin(self._carry, near, fault)

    def _carry(self, near: socket.socket, fault: Fault | None) -> None:
        with near, socket.create_connection(self._target) as far:
            with self._lock:
                self._open |= {near, far}
            with suppress(OSError):
                self._pump(near, far, fault)
            with self._lock:
                self._open -= {near, far}
            if fault is not None and fault.kind != DELAY:
                # A reset rather than an orderly end, as a cable pulled out or a proxy that dies would give.
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def _pump(self, near: socket.socket, far: socket.socket, fault: Fault | None) -> None:
        sent = answered = 0
        while True:
            ready, _, _ = select.select([near, far], [], [], 30)
            for side in ready:
                data = side.recv(1 << 16)
                if not data:
                    return
                if side is near:
                    sent += len(data)
                    if fault is not None and fault.kind == CUT_REQUEST and sent > fault.after:
                        far.sendall(data[: len(data) - (sent - fault.after)])
                        return
                    far.sendall(data)
                else:
                    if fault is not None and fault.kind == DROP_ANSWER:
                        return  # the server has acted; nobody hears of it
                    if fault is not None and fault.kind == DELAY and not answered:
                        threading.Event().wait(fault.after / 1000)
                    answered += len(data)
                    if fault is not None and fault.kind == CUT_ANSWER and answered > fault.after:
                        near.sendall(data[: len(data) - (answered - fault.after)])
                        return
                    near.sendall(data)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.arm()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def wire(server, monkeypatch) -> Iterator[Wire]:
    """A sound wire to a server, to be armed."""
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.002)
    wire = Wire(server)
    yield wire
    wire.close()


@pytest.fixture
def far(wire) -> Iterator[aq_data.Client]:
    """A client at the near end of the wire."""
    with aq_data.connect(wire.url) as client:
        yield client


@pytest.fixture
def near(server) -> Iterator[aq_data.Client]:
    """A client that sees what the server really has."""
    with aq_data.connect(server) as client:
        yield client


BREAKS = (CUT_REQUEST, CUT_ANSWER, DROP_ANSWER)


def a_fault(chance: random.Random, request: int, answer: int) -> Fault:
    kind = chance.choice((*BREAKS, DELAY))
    if kind == CUT_REQUEST:
        return Fault(kind, chance.choice([0, 1, 50, 300, request // 2, request - 1, chance.randrange(request)]))
    if kind == CUT_ANSWER:
        return Fault(kind, chance.choice([0, 1, 20, 200, answer // 2, answer - 1, chance.randrange(answer)]))
    return Fault(kind, chance.randrange(60))


def assert_all_or_nothing(near: aq_data.Client, shipment: Shipment, *, all: bool) -> None:
    """Exactly one whole DataFile, or none."""
    ids = [file.id for file in near.search({"number": shipment.number}, limit=None)]
    if all or ids:
        assert ids == [shipment.id]
        shipment.assert_complete(near.get(shipment.id))
        shipment.assert_opens_as_zarr(near.get(shipment.id).path)
    else:
        with pytest.raises(NotFoundError):
            near.get(shipment.id)


def test_a_save_over_a_breaking_wire_is_one_data_file(data, wire, far, near):
    """Up to four broken tries, cut or unanswered or late anywhere: the fifth succeeds, and there is exactly one."""
    print(f"AQ_DATA_SEED={SEED}")
    chance = random.Random(SEED)
    sizes = {"note": 600, "small": 33_000, "files": 235_000, "large": 5_250_000}
    for number in range(32):
        shipment = Shipment.make(4, number)
        wire.arm(*(a_fault(chance, sizes[shipment.kind], 900) for _ in range(chance.randrange(1, 5))))
        shipment.assert_complete(shipment.save(far))
        wire.arm()
        assert_all_or_nothing(near, shipment, all=True)
    assert near.count() == 32
    operate(data, "gc", "--older-than", "0s", "--delete")
    assert operate(data, "verify") == []
    assert unexplained(data, near) == []


def test_a_save_that_never_gets_through_is_a_clean_error(data, wire, far, near):
    """When every try breaks: UnavailableError, and the DataFile is there whole or not at all; later it may be sent again."""
    print(f"AQ_DATA_SEED={SEED}")
    chance = random.Random(SEED + 1)
    sizes = {"note": 600, "small": 33_000, "files": 235_000, "large": 5_250_000}
    for number in range(16):
        shipment = Shipment.make(5, number)
        kind = BREAKS[number % 3]
        wire.arm(
            *(Fault(kind, chance.randrange(sizes[shipment.kind] // 2 if kind == CUT_REQUEST else 100)) for _ in range(40))
        )
        with pytest.raises(UnavailableError):
            shipment.save(far)
        wire.arm()
        assert_all_or_nothing(near, shipment, all=False)
        shipment.assert_complete(shipment.save(far))
        assert_all_or_nothing(near, shipment, all=True)
    operate(data, "gc", "--older-than", "0s", "--delete")
    assert operate(data, "verify") == []
    assert unexplained(data, near) == []


def test_an_answer_that_is_lost_does_not_save_twice(wire, far, near):
    """The server acted, nobody heard: the repeat is answered with what is there, also for a client-made id and for files."""
    values = np.arange(12.0).reshape(3, 4)
    for save in [{"name": "note"}, {"dataset": {"x": values}}, {"files": {"a": b"1"}}]:
        before = near.count()
        wire.arm(Fault(DROP_ANSWER))
        file = far.save(**save)
        assert wire.faults_left == 0
        assert near.count() == before + 1
        assert near.get(file.id).revision == 1
    id = make_id(1_790_000_000_000, secrets.token_bytes(10))
    wire.arm(Fault(DROP_ANSWER), Fault(DROP_ANSWER))
    assert far.save({"x": values}, id=id)["x"][...].tolist() == values.tolist()


def test_changes_over_a_breaking_wire_are_made_once(wire, far, near, tmp_path):
    """Patches, files and deletions whose answer is lost are repeated without harm."""
    file = near.save({"x": np.arange(3)}, metadata={"keep": 1})
    for n, kind in enumerate((DROP_ANSWER, CUT_ANSWER, CUT_REQUEST)):
        wire.arm(Fault(kind, 60))
        far.update(file.id, {"metadata": {"n": n}})
        assert near.get(file.id).metadata == {"keep": 1, "n": n}
    (tmp_path / "notes.bin").write_bytes(b"n" * 300_000)
    wire.arm()
    remote = far.get(file.id)
    for kind in (DROP_ANSWER, CUT_REQUEST):
        wire.arm(Fault(kind, 100_000))
        remote.attach(tmp_path / "notes.bin")
        assert wire.faults_left == 0
    assert near.get(file.id).files == ["notes.bin"]
    assert near.get(file.id).read_file("notes.bin") == b"n" * 300_000
    wire.arm(Fault(DROP_ANSWER))
    with suppress(NotFoundError):  # the repeat finds it deleted
        far.delete(file.id)
    assert near.get(file.id, include_deleted=True).state == "deleted"


def test_reads_over_a_breaking_wire_are_right_or_refused(wire, far, near):
    """Arrays, text, lazy datasets, documents, searches, files: each equal to what is stored, or an error of ours."""
    print(f"AQ_DATA_SEED={SEED}")
    chance = random.Random(SEED + 2)
    rng = np.random.default_rng(6)
    big, words = rng.random((700, 900)), np.array([f"w{i}" for i in range(5000)], object)
    raw = rng.bytes(400_000)
    saved = near.save({"big": (("y", "x"), big), "words": ("w", words)}, name="read me", files={"raw": raw})
    whole = saved.load()
    file = far.get(saved.id)

    def check(what: str) -> None:
        if what == "array":
            assert file["big"][...].tobytes() == big.tobytes()
        elif what == "slice":
            assert file["big"][10:600:7, [3, 899]].tobytes() == np.ascontiguousarray(big[10:600:7][:, [3, 899]]).tobytes()
        elif what == "text":
            assert file["words"][...].tolist() == words.tolist()
        elif what == "lazy":
            assert file.open().identical(whole)
        elif what == "search":
            assert [hit.id for hit in far.search({"name": "read me"})] == [saved.id]
        elif what == "file":
            assert file.read_file("raw") == raw
        else:
            assert far.get(saved.id).to_json() == saved.to_json()

    sizes = {
        "array": big.nbytes,
        "slice": 1400,
        "text": 40_000,
        "lazy": big.nbytes,
        "search": 1500,
        "file": 400_000,
        "document": 1500,
    }
    right = 0
    for _ in range(10):
        for what, size in sizes.items():
            faults = [a_fault(chance, 250, size + 300) for _ in range(chance.choice([1, 2, 4, 30]))]
            wire.arm(*faults)
            try:
                check(what)
                right += 1
            except UnavailableError:
                assert len(faults) > 3
    wire.arm()
    for what in sizes:
        check(what)
    assert right > 30


@pytest.mark.parametrize("after", [0, 100, 400, 150_000, 399_000])
def test_a_download_over_a_breaking_wire_is_whole_or_not_there(wire, far, near, tmp_path, after):
    """Cut anywhere, for once or for good: the whole file or an error of ours, and no part of it in the folder."""
    raw = np.random.default_rng(7).bytes(400_000)
    file = far.get(near.save(files={"raw": raw}).id)
    for faults in (1, 40):
        wire.arm(*[Fault(CUT_ANSWER, after)] * faults)
        target = tmp_path / f"{faults}"
        try:
            file.download("raw", target)
        except AqDataError:
            assert not target.exists()
        else:
            assert target.read_bytes() == raw
    wire.arm()
    assert file.download("raw", tmp_path / "sound").read_bytes() == raw
    assert [path for path in tmp_path.iterdir() if path.suffix == ".part"] == []


@pytest.mark.parametrize("after", [0, 20, 150, 260, 350, 400])
def test_a_refusal_that_breaks_off_is_asked_for_again(wire, far, after):
    """Cut anywhere in its answer, the refusal still arrives as what it is."""
    for ask in (lambda: far.get(make_id(1, bytes(10))), lambda: next(iter(far.follow(make_id(1, bytes(10)))))):
        wire.arm(Fault(CUT_ANSWER, after))
        with pytest.raises(NotFoundError, match="there is no"):
            ask()


def test_a_late_answer_is_waited_for(wire, far):
    """A slow wire is not a broken one."""
    wire.arm(Fault(DELAY, 400))
    file = far.save({"x": np.arange(5)})
    wire.arm(Fault(DELAY, 400))
    assert file["x"][...].tolist() == list(range(5))


# --- a full disk ---------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """8 MB mounted on `folder`; a skip where that is not permitted."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "aq-data-test", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def hasty(monkeypatch) -> None:
    """One try: the server asks for a second's pause before the next, and a disk does not empty itself."""
    monkeypatch.setattr("aq_data.client.http.TRIES", 1)


@pytest.mark.embedded("of the disk under the server")
class TestFullDisk:
    """Saves to a file system of 8 MB."""

    @pytest.fixture
    def data(self, tmp_path) -> Iterator[Path]:
        """Comes before `serve`, so that the server has stopped when the disk goes."""
        folder = tmp_path / "disk"
        folder.mkdir()
        with small_disk(folder):
            yield folder

    def test_a_save_that_does_not_fit_leaves_nothing(self, data, serve, hasty):
        """UnavailableError or StorageError, nothing visible, nothing left over; the next small save works."""
        with aq_data.connect(serve(environment={"AQ_DATA_SERVER__LOG_LEVEL": "error"}).url) as client:
            kept = Shipment.make(8, 1)
            kept.save(client)
            noise = np.random.default_rng(9)
            for save in [
                {"dataset": {"z": noise.random((1500, 1000))}},
                {"dataset": {"z": noise.random((1500, 1000))}, "chunks": {"z": (1500, 1000)}},
                {"files": {"raw": noise.bytes(12_000_000)}},
                {"dataset": {"a": noise.random(400_000), "b": noise.random(400_000), "c": noise.random(400_000)}},
            ]:
                with pytest.raises((UnavailableError, StorageError)):
                    client.save(**save, name="too large")
                assert client.count({"name": "too large"}) == 0
                assert unexplained(data, client) == []
                client.save({"x": np.arange(1000)}, name="small")["x"][...]
            assert client.count({"name": "small"}) == 4
            kept.assert_complete(client.get(kept.id))
        assert operate(data, "verify") == []

    def test_a_disk_without_a_byte_left_still_reads(self, data, serve, hasty):
        """Even notes fail then, in words; reading and searching go on; with room again everything works."""
        with aq_data.connect(serve(environment={"AQ_DATA_SERVER__LOG_LEVEL": "error"}).url) as client:
            kept = Shipment.make(8, 1)
            file = kept.save(client)
            assert client.count() == 1
            filler = data / "filler"
            with suppress(OSError), filler.open("wb", buffering=0) as full:
                while True:
                    full.write(b"\0" * 4096)
            for _ in range(2):
                with pytest.raises((UnavailableError, StorageError)):
                    client.save({"x": np.random.default_rng(1).random(2000)}, name="late")
            kept.assert_complete(client.get(kept.id))
            assert [hit.id for hit in client.search(limit=None)] == [kept.id]
            assert client.count({"name": "late"}) == 0
            comment = ""
            with suppress(UnavailableError, StorageError):
                comment = client.update(file.id, {"comment": "x" * 50_000}).comment
            assert client.get(file.id).comment == comment
            filler.unlink()
            client.save({"x": np.arange(3)}, name="again")
            assert client.update(file.id, {"comment": "fine"}).comment == "fine"
            assert client.count() == 2
        operate(data, "verify", "--repair")
        operate(data, "gc", "--older-than", "0s", "--delete")
        assert operate(data, "verify") == []


@pytest.mark.embedded("of the disk under the server")
def test_a_file_that_may_not_grow_fails_cleanly(data, serve, hasty):
    """Under a limit on the size of files (EFBIG, as on a full quota) large writes fail in words, small ones go on."""
    server = serve(environment={"AQ_DATA_SERVER__LOG_LEVEL": "error"})
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
    noise = np.random.default_rng(10)
    with aq_data.connect(server.url) as client:
        for save in [
            {"files": {"raw": noise.bytes(5_000_000)}},
            {"dataset": {"z": noise.random((800, 1000))}, "chunks": {"z": (800, 1000)}},
            {"dataset": {"a": noise.random(10), "z": noise.random((800, 1000))}, "chunks": {"z": (800, 1000)}},
        ]:
            with pytest.raises((UnavailableError, StorageError)):
                client.save(**save, name="too large")
            assert client.count({"name": "too large"}) == 0
            assert unexplained(data, client) == []
            Shipment.make(11, client.count()).save(client)
        assert client.count() == 3
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        values = noise.random((800, 1000))
        assert client.save({"z": values}, chunks={"z": (800, 1000)})["z"][...].tobytes() == values.tobytes()
    assert operate(data, "verify") == []
