"""Sweeps over a wire that breaks, proxies that answer themselves, full disks: nothing lost, nothing twice, said in words.

AQ_DATA_SEED=<number> repeats the faults of a run; every run prints its own.
"""

from __future__ import annotations

import os
import random
import resource
import secrets
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from services.deployment import WAYS
from sweeping import check_events, quiet_port, wait_for
from test_faults import CUT_ANSWER, CUT_REQUEST, DELAY, DROP_ANSWER, Fault, Wire, small_disk

import aq_data
from aq_data.client.delivery import Delivery
from aq_data.client.spools import found_spools, spool_root
from aq_data.client.sweeps import Sweep
from aq_data.errors import CorruptionError, NotFoundError, StorageError, UnavailableError
from aq_data.models.datafile import make_id

SEED = int(os.environ.get("AQ_DATA_SEED") or secrets.randbits(32))

PLAIN: dict[str, Any] = {"dims": {"x": None, "c": 4}, "variables": {"y": ("int64", ("x", "c")), "u": ("int64", "x")}}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.002)
    monkeypatch.setattr("aq_data.client.sweeps.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("aq_data.client.sweeps.LONGEST_PAUSE", 0.05)
    monkeypatch.setattr("aq_data.client.live.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("aq_data.client.live.LONGEST_PAUSE", 0.05)


@pytest.fixture
def spools(tmp_path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def near(server) -> Iterator[aq_data.Client]:
    with aq_data.connect(server) as client:
        yield client


@pytest.fixture
def wire(server) -> Iterator[Wire]:
    wire = Wire(server)
    yield wire
    wire.close()


def put(sweep: Sweep, n: int) -> None:
    """Append row number `n`, counted from 1."""
    sweep.append(y=np.full(4, n), u=n, dim="x")


def assert_rows(client: aq_data.Client, id: str, count: int, state: str = "complete") -> None:
    """Rows 1 to `count`, each once and in order."""
    file = client.get(id)
    assert file.state == state
    assert file["u"][...].tolist() == list(range(1, count + 1))
    assert file["y"][...].tolist() == [[n] * 4 for n in range(1, count + 1)]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/target"))


# --- the wire ----------------------------------------------------------------------------------------------------------


def test_a_breaking_wire_loses_nothing_and_repeats_nothing(wire, near, spools):
    """Requests cut anywhere, answers cut, lost or late, again and again while blocks are written."""
    print(f"AQ_DATA_SEED={SEED}")
    chance = random.Random(SEED)
    with aq_data.connect(wire.url) as far, far.sweep("x", **PLAIN) as sweep:
        n = 0
        for _ in range(12):
            kinds = chance.choices((CUT_REQUEST, CUT_ANSWER, DROP_ANSWER, DELAY), k=chance.randrange(1, 9))
            wire.arm(*(Fault(kind, chance.choice([0, 1, 30, 200, 400, 900])) for kind in kinds))
            for _ in range(chance.randrange(1, 12)):
                n += 1
                put(sweep, n)
                if chance.random() < 0.2:
                    sweep.flush(20)
            if chance.random() < 0.3:
                sweep.flush(20)
        wire.arm()
        sweep.flush(20)
        assert sweep.lag.blocks == 0
        assert sweep.lag.seconds == 0
        assert_rows(near, sweep.id, n, "open")
    assert_rows(near, sweep.id, n)
    check_events(list(near.follow(sweep.id)), n)
    assert left(spools) == []


def test_nothing_lags_after_a_lost_answer(wire, near):
    """What arrived although its answer did not is counted as arrived, in blocks and in bytes."""
    with aq_data.connect(wire.url) as far, far.sweep("x", **PLAIN) as sweep:
        sweep.flush(10)
        wire.arm(*[Fault(DROP_ANSWER)] * 12)
        for n in range(1, 30):
            put(sweep, n)
            time.sleep(0.005)
        wire.arm()
        sweep.flush(10)
        assert sweep.lag == (0, 0, 0.0)


def test_resets_in_the_middle_of_large_blocks(wire, near):
    """6 MB blocks whose connection is reset after any number of bytes arrive whole, once, in order."""
    print(f"AQ_DATA_SEED={SEED}")
    chance, size = random.Random(SEED + 1), 750_000
    with aq_data.connect(wire.url) as far:
        sweep = far.sweep("x", dims={"x": None, "c": size}, variables={"z": ("f8", ("x", "c"))})
        for n in range(1, 4):
            wire.arm(*(Fault(CUT_REQUEST, chance.randrange(8 * size)) for _ in range(chance.randrange(1, 4))))
            sweep.append(z=np.arange(size) + n)
            sweep.flush(30)
            assert near.get(sweep.id)["z"].shape == (n, size)
        wire.arm(Fault(DROP_ANSWER))
        sweep.finish(30)
    values = near.get(sweep.id)["z"][...]
    assert (values == np.arange(size) + np.arange(1, 4)[:, None]).all()


class Proxy:
    """A proxy that speaks HTTP: it may answer itself, before or after the server acted, or send a request twice."""

    def __init__(self, url: str) -> None:
        proxy = self
        self.code, self.acts, self.twice, self.only_success = 0, False, False, False
        self.repeats: list[tuple[int, int]] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                answer = None
                if not proxy.code or proxy.acts:
                    answer = httpx.request(self.command, url + self.path, content=body, headers=headers)
                    if proxy.twice and self.path.endswith("/blocks"):
                        again = httpx.request(self.command, url + self.path, content=body, headers=headers)
                        proxy.repeats.append((answer.status_code, again.status_code))
                if answer is None or (proxy.code and (answer.is_success or not proxy.only_success)):
                    self._answer(proxy.code, b"<html>down</html>", {"content-type": "text/html"})
                else:
                    self._answer(answer.status_code, answer.content, dict(answer.headers))

            do_GET = do_POST

            def _answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response_only(code)
                for name, value in headers.items():
                    if name not in ("content-length", "transfer-encoding", "content-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def proxy(server) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("acts", [False, True], ids=["before the server", "after it acted"])
@pytest.mark.parametrize("code", [502, 503, 504])
def test_a_proxy_without_its_server_is_waited_for(proxy, near, code, acts):
    """A proxy's own 502, 503 or 504 is an outage like any other: the experiment goes on, later everything arrives once."""
    with aq_data.connect(proxy.url) as far, far.sweep("x", **PLAIN) as sweep:
        put(sweep, 1)
        sweep.flush(10)
        proxy.code, proxy.acts = code, acts
        for n in range(2, 30):
            put(sweep, n)
            time.sleep(0.01)
        with pytest.raises(UnavailableError, match="wait in"):
            sweep.flush(0.1)
        proxy.code = 0
        sweep.flush(10)
        assert_rows(near, sweep.id, 29, "open")
    assert_rows(near, sweep.id, 29)


def test_a_proxy_that_gives_up_on_each_success_is_outlived(proxy, near):
    """Every block is stored but answered 504, refusals get through: progress is no failure, however often."""
    with aq_data.connect(proxy.url) as far, far.sweep("x", **PLAIN) as sweep:
        sweep.flush(10)
        proxy.code, proxy.acts, proxy.only_success = 504, True, True
        stop = time.monotonic() + 1.5
        n = 0
        while time.monotonic() < stop:
            n += 1
            put(sweep, n)
            time.sleep(0.01)
        proxy.code = 0
        sweep.flush(10)
    assert_rows(near, sweep.id, n)


def test_requests_that_come_twice_change_nothing(proxy, near):
    """The same body of blocks a second time, at once: both are answered 200, the rows are there once."""
    proxy.twice = True
    with aq_data.connect(proxy.url) as far, far.sweep("x", **PLAIN) as sweep:
        for n in range(1, 41):
            put(sweep, n)
            if n % 5 == 0:
                sweep.flush(10)
    assert_rows(near, sweep.id, 40)
    assert proxy.repeats
    assert set(proxy.repeats) == {(200, 200)}


# --- the server goes away ------------------------------------------------------------------------------------------------


def test_a_server_that_goes_and_comes_back(data, serve, spools):
    """Away when the sweep begins, away in the middle: the calls return, lag tells, flush raises in time, then all arrives."""
    port = quiet_port(random.Random())
    first = serve("--port", str(port))
    with aq_data.connect(first.url) as client:
        first.kill()
        started = time.monotonic()
        with client.sweep("x", **PLAIN) as sweep:  # away already
            for n in range(1, 101):
                put(sweep, n)
            assert time.monotonic() - started < 10
            assert sweep.lag.blocks == 100
            assert sweep.lag.bytes == 100 * 40
            wait_for(lambda: sweep.lag.seconds > 0.05, "the lag has no age")
            with pytest.raises(UnavailableError, match="100 blocks"):
                sweep.flush(0.05)
            second = serve("--port", str(port))
            sweep.flush(20)
            assert sweep.lag.blocks == 0
            second.kill()
            for n in range(101, 111):
                put(sweep, n)
            serve("--port", str(port))
        assert_rows(client, sweep.id, 110)
    assert left(spools) == []


def test_leaving_without_a_server_warns_and_keeps(data, serve, spools, monkeypatch):
    """The end of `with` waits a while, then warns; the next process's `connect` delivers the rest and the end."""
    monkeypatch.setattr("aq_data.client.sweeps.CLOSE_SECONDS", 0.1)
    port = quiet_port(random.Random())
    server = serve("--port", str(port))
    client = aq_data.connect(server.url)

    def measure() -> str:
        with client.sweep("x", **PLAIN) as sweep:
            put(sweep, 1)
            sweep.flush(10)
            server.kill()
            put(sweep, 2)
        return sweep.id

    with pytest.warns(RuntimeWarning, match="aq-data spool push"):
        id = measure()
    assert len(left(spools)) == 1
    client.close()
    serve("--port", str(port))
    with aq_data.connect(server.url) as later:
        wait_for(lambda: left(spools) == [], "it is not delivered")
        assert_rows(later, id, 2)


DEAD = """
    import os, signal, sys
    import numpy as np
    import aq_data, aq_data.client.http
    aq_data.client.http.FIRST_PAUSE = 0.002
    client = aq_data.connect({url!r})
    sweep = client.sweep("x", id={id!r}, **{plain!r})
    sweep.append(y=np.full(4, 1), u=1, dim="x")
    sweep.flush()
    print("gone", flush=True)
    sys.stdin.readline()
    for n in range(2, 11):
        sweep.append(y=np.full(4, n), u=n, dim="x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "torn", ["whole", "flipped", *(pytest.param(t, marks=pytest.mark.soak) for t in ("cut", "noise", "header"))]
)
def test_what_a_dead_process_left_is_delivered(data, serve, spools, torn):
    """By the next `connect`; of a last frame that the crash tore nothing is used, everything before it is.

    What no crash leaves is told: it stays where it is, and so does everything behind it.
    """
    port = quiet_port(random.Random())
    server = serve("--port", str(port))
    id = make_id(time.time_ns() // 1_000_000, secrets.token_bytes(10))
    code = textwrap.dedent(DEAD.format(url=server.url, id=id, plain=PLAIN))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as dead:
        assert dead.stdout.readline() == "gone\n"
        server.kill()
        dead.stdin.write("\n")
        dead.stdin.flush()
        dead.wait(20)
    segment = next(spools.glob("*/*.segment"))
    content = segment.read_bytes()
    if torn == "cut":
        content = content[:-7]
    elif torn == "flipped":
        content = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    elif torn == "noise":
        content += b"\x40\0\0\0" + bytes(40)
    elif torn == "header":
        content += b"\x40\0"
    segment.write_bytes(content)
    serve("--port", str(port))
    with aq_data.connect(server.url) as client:
        if torn in ("flipped", "noise"):
            wait_for(lambda: (segment.parent / "refused").exists(), "nothing is said of the damage")
            (outcome,) = client.deliver()
            assert isinstance(outcome.error, CorruptionError)
            assert segment.name in str(outcome.error)
            assert segment.read_bytes() == content
            shutil.rmtree(segment.parent)
        wait_for(lambda: left(spools) == [], "it is not delivered")
        assert_rows(client, id, 9 if torn in ("cut", "flipped") else 10, "open")
        with client.resume_sweep(id) as sweep:
            put(sweep, 10 if torn in ("cut", "flipped") else 11)
        assert_rows(client, id, 10 if torn in ("cut", "flipped") else 11)


@pytest.mark.parametrize("damaged", ["the opening", "the third block", "the length of the third", "the end", "a hole"])
def test_a_damaged_spool_is_never_deleted(near, spools, damaged):
    """What stands before the damage arrives; what is damaged, and all behind it, stays for whoever can mend it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Delivery, "step", lambda _: _raise(UnavailableError("away")))
        sweep = near.sweep("x", dims={"x": None}, variables={"y": ("f8", "x")})
        for i in range(20):
            sweep.append(y=float(i), x=float(i))
        with pytest.raises(UnavailableError):
            sweep.finish(0.1)
        sweep.close()
    (segment,) = spools.glob("*/*.segment")
    content, starts, at = bytearray(segment.read_bytes()), [], 0
    while at < len(content):
        starts.append(at)
        at += 12 + int.from_bytes(content[at : at + 8], "little")
    assert len(starts) == 22
    frame, delivered = {"the opening": (0, 0), "the end": (21, 20)}.get(damaged, (3, 2))
    if damaged == "a hole":
        content[starts[3] : starts[5]] = bytes(starts[5] - starts[3])
    elif damaged == "the length of the third":
        content[starts[3] + 2] ^= 0x10
    else:
        content[starts[frame] + 30] ^= 1
    segment.write_bytes(content)
    for _ in range(2):
        (outcome,) = near.deliver()
        assert isinstance(outcome.error, CorruptionError), outcome
        assert str(segment.parent) in str(outcome.error)
        assert segment.read_bytes() == content
    if delivered:
        assert near.get(sweep.id)["y"][...].tolist() == [float(i) for i in range(delivered)]
        assert near.get(sweep.id).state == "open"


def _raise(exc: Exception) -> None:
    raise exc


# --- full disks ----------------------------------------------------------------------------------------------------------


def test_a_full_spool_disk_is_said_and_survived(server, near, tmp_path):
    """StorageError naming the place; earlier calls are kept, smaller ones go on, with room again everything does."""
    folder = tmp_path / "small"
    folder.mkdir()
    with small_disk(folder):
        sweep = near.sweep("x", dims={"x": None, "c": None}, variables={"z": ("f8", ("x", "c"))}, spool=folder / "spool")
        sweep.append(z=np.full((1, 3), 1.0), dim="x")
        with pytest.raises(StorageError, match=str(folder)):
            sweep.append(z=np.full((1, 2_000_000), 2.0), dim="x")
        filler = folder / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as full:
            while True:
                full.write(bytes(4096))
        with pytest.raises(StorageError, match=str(folder)):
            for _ in range(100):
                sweep.append(z=np.full((1, 500), 3.0), dim="x")
        rows = sweep._accepted
        with pytest.raises(StorageError, match=str(folder)):
            sweep.abandon("longer than what is left of a page " * 200, timeout=5)
        filler.unlink()
        sweep.append(z=np.full((1, 500), 4.0), dim="x")
        sweep.finish(20)
    values = near.get(sweep.id)["z"][:, 0]
    assert len(values) == rows + 1
    assert [values[0], values[-1]] == [1, 4]


@pytest.mark.embedded("of the disk under the server")
def test_a_full_server_disk_is_waited_for(data, serve):
    """RLIMIT_FSIZE as a quota: the server answers with an error, the experiment goes on, with room again all arrives."""
    server = serve(environment={"AQ_DATA_SERVER__LOG_LEVEL": "error"})
    with aq_data.connect(server.url) as client, client.sweep("x", **PLAIN) as sweep:
        put(sweep, 1)
        sweep.flush(10)
        disk = (data / "metadata.sqlite").stat().st_size
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (max(4096, disk // 4), resource.RLIM_INFINITY))
        for n in range(2, 60):
            put(sweep, n)
            time.sleep(0.005)
        with pytest.raises(UnavailableError):
            sweep.flush(0.3)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sweep.flush(20)
        assert_rows(client, sweep.id, 59, "open")


@pytest.mark.embedded("of the disk under the server")
class TestFullServer:
    """A server whose file system of 8 MB is full."""

    @pytest.fixture
    def data(self, tmp_path) -> Iterator[Path]:
        """Comes before `serve`, so that the server has stopped when the disk goes."""
        folder = tmp_path / "disk"
        folder.mkdir()
        with small_disk(folder):
            yield folder

    def test_blocks_wait_for_room(self, data, serve):
        """503 while there is none: nothing is lost, readers go on, later everything arrives once."""
        server = serve(environment={"AQ_DATA_SERVER__LOG_LEVEL": "error"})
        with aq_data.connect(server.url) as client, client.sweep("x", **PLAIN) as sweep:
            put(sweep, 1)
            sweep.flush(10)
            filler = data / "filler"
            with suppress(OSError), filler.open("wb", buffering=0) as full:
                while True:
                    full.write(bytes(4096))
            for n in range(2, 400):
                put(sweep, n)
            with pytest.raises(UnavailableError):
                sweep.flush(1)
            assert client.get(sweep.id)["u"][...].tolist()[:1] == [1]
            filler.unlink()
            sweep.flush(30)
            assert_rows(client, sweep.id, 399, "open")


def test_a_spool_that_the_server_does_not_take_says_why(data, serve, tmp_path):
    """Of a sweep that was deleted meanwhile: it stays, `spool ls` shows the reason, nothing else is held up."""
    server = serve()
    with aq_data.connect(server.url) as client:
        sweep = client.sweep("x", dims={"x": None}, variables={"y": ("f8", "x")})
        sweep.append(y=1.0, x=1.0)
        sweep.flush()
        client.delete(sweep.id)
        sweep.append(y=2.0, x=2.0)
        with pytest.raises(NotFoundError):
            sweep.flush()
        assert [outcome.error.code for outcome in client.deliver()] == ["id_taken"]
        (info,) = found_spools(spool_root())
        assert info.blocks == 1
        assert "was deleted" in info.refused


@pytest.mark.parametrize("way", WAYS)
def test_a_script_that_just_ends_delivers_or_says_what_waits(way, data, serve, tmp_path):
    """Without `with` and without an end: to a server everything is delivered at exit, of a folder what waits is told."""
    target = serve().url if way == "http" else str(data)
    code = (
        "import aq_data, sys\n"
        "client = aq_data.connect(sys.argv[1])\n"
        "sweep = client.sweep('x', dims={'x': None}, variables={'y': ('int64', 'x')})\n"
        "for i in range(3000):\n"
        "    sweep.append(y=i, x=float(i))\n"
        "print(sweep.id)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, target], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    id = done.stdout.strip()
    with aq_data.connect(target) as client:
        assert "was not ended" in done.stderr or client.get(id)["y"].shape == (3000,)
        if way == "http":
            assert done.stderr == ""
        client.resume_sweep(id).finish()
        assert client.get(id)["y"][...].tolist() == list(range(3000))
