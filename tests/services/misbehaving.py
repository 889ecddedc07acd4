"""A network that misbehaves between a server and what it stands on, as a test tells it while it runs.

    with Network(seed=1) as network:
        way = network.way("http://127.0.0.1:9000", http=True)
        …                                   # the server is given way.address instead of port 9000
        way.be(Weather(delay=0.05))         # slow
        way.be(REFUSING)                    # nobody listens
        way.be(SILENT)                      # accepts, and nothing moves until the weather changes: then what was held arrives
        way.be(Weather(cut_after=2000))     # each connection is reset after at most so many bytes, either way
        way.be(Weather(share=0.3, faults=("500", "truncated")))  # of HTTP requests
        way.be(CLEAR)

What is drawn (where a connection is cut, which request fails and how) comes from the seed and the order of the draws.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

__all__ = ["CLEAR", "HTTP_FAULTS", "REFUSING", "SILENT", "Network", "Way", "Weather"]

PIECE = 1 << 16
HTTP_FAULTS = ("500", "503", "429", "truncated", "lost", "reset")
"""Answers without the request being carried out; half of the answer's body; carried out and the answer lost; neither."""


@dataclass(frozen=True)
class Weather:
    """How a way is: all at once where several are given."""

    delay: float = 0.0
    """Seconds that each piece of bytes is held back."""
    piece: int = PIECE
    """Bytes of a piece."""
    refuses: bool = False
    is_silent: bool = False
    cut_after: int = 0
    """Each connection is reset after a random number of bytes up to this one; 0 is never."""
    share: float = 0.0
    """Of HTTP requests, how many meet one of `faults`."""
    faults: tuple[str, ...] = HTTP_FAULTS


CLEAR = Weather()
REFUSING = Weather(refuses=True)
SILENT = Weather(is_silent=True)


class Network:
    """Ways, and the thread that they live in."""

    def __init__(self, seed: int) -> None:
        self._random, self._ways = random.Random(seed), []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Network:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for way in self._ways:
            self.run(way.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What `work` returns, done in the thread of the network."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def way(self, *targets: str, http: bool = False) -> Way:
        """A way to `host:port` (a scheme before it is ignored); to a random one of several, as a balancer goes."""
        way = Way(self, [target.rpartition("//")[2] for target in targets], http, random.Random(self._random.random()))
        self._ways.append(way)
        self.run(way.open())
        return way


class Way:
    """One address that leads to another."""

    def __init__(self, network: Network, targets: Sequence[str], http: bool, chance: random.Random) -> None:
        self._network, self.targets, self._is_http, self._random = network, list(targets), http, chance
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._port = 0
        self.weather = CLEAR
        self.changed = asyncio.Event()
        self.met: Counter[str] = Counter()
        """How many connections and requests met what."""

    @property
    def address(self) -> str:
        """`host:port` to be given instead of the target's."""
        return f"127.0.0.1:{self._port}"

    @property
    def open_connections(self) -> int:
        """How many there are now."""
        return len(self._connections)

    def be(self, weather: Weather) -> None:
        """Change how it is, also for connections that are there already."""
        self._network.run(self._be(weather))

    def cut(self) -> None:
        """Reset every connection there is."""
        self._network.run(self._cut())

    async def _be(self, weather: Weather) -> None:
        self.weather = weather
        self.changed.set()
        self.changed = asyncio.Event()
        for connection in self._connections:
            connection.left = self.draw_cut()
        if weather.refuses:
            await self.close()
        elif self._server is None:
            await self.open()

    def draw_cut(self) -> int | None:
        """After how many bytes a connection is to be cut."""
        return self._random.randint(1, self.weather.cut_after) if self.weather.cut_after else None

    def draw_fault(self) -> str:
        """What the next HTTP request meets; "" for nothing."""
        weather = self.weather
        fault = self._random.choice(weather.faults) if self._random.random() < weather.share else ""
        self.met[fault] += bool(fault)
        return fault

    async def open(self) -> None:
        """Listen, at the same port as ever."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port, backlog=256)
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Listen no more, and cut what is connected."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _cut(self) -> None:
        for connection in list(self._connections):
            connection.reset()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        targets = self._random.sample(self.targets, len(self.targets))
        connection = _Connection(self, writer)
        self._connections.add(connection)
        try:
            while self.weather.is_silent:
                await self.changed.wait()
            for target in targets:
                host, _, port = target.partition(":")
                with suppress(OSError):
                    server_reader, server_writer = await asyncio.open_connection(host, int(port))
                    break
            else:
                return
            connection.writers.append(server_writer)
            if self._is_http:
                await connection.serve_http(reader, writer, server_reader, server_writer, target)
            else:
                await connection.serve(reader, writer, server_reader, server_writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # cut, by either end or here
        finally:
            self._connections.discard(connection)
            connection.reset()


class _Connection:
    def __init__(self, way: Way, writer: asyncio.StreamWriter) -> None:
        self._way, self.writers, self.left = way, [writer], way.draw_cut()

    def reset(self) -> None:
        """End both sides as a crash would."""
        for writer in self.writers:
            with suppress(OSError, AttributeError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def serve(self, reader, writer, server_reader, server_writer) -> None:
        """Bytes, both ways."""
        ways = [asyncio.create_task(self._pump(*pair)) for pair in ((reader, server_writer), (server_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in ways:
                task.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(PIECE):
            await self._pass(data, writer)
        if not writer.is_closing():
            writer.write_eof()

    async def _pass(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        while data:
            way = self._way
            while way.weather.is_silent:
                await way.changed.wait()
            piece, data = data[: way.weather.piece], data[way.weather.piece :]
            await asyncio.sleep(way.weather.delay)
            if self.left is not None:
                self.left -= len(piece)
                if self.left < 0:
                    writer.write(piece[: self.left])
                    way.met["cut"] += 1
                    raise ConnectionAbortedError
            writer.write(piece)
            await writer.drain()

    async def serve_http(self, reader, writer, server_reader, server_writer, target: str) -> None:
        """Request by request. An address of the target in an answer (of an upload in parts) becomes that of the way."""
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"expect: 100-continue" in head.lower():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await _body(reader, head, is_answer=False)
            fault = self._way.draw_fault()
            if fault == "reset":
                raise ConnectionAbortedError
            if fault.isdigit():
                await self._pass(_error(head, fault), writer)
                continue
            await self._pass(head + body, server_writer)
            answer = await server_reader.readuntil(b"\r\n\r\n")
            while answer.split(b" ", 2)[1] == b"100":
                answer = await server_reader.readuntil(b"\r\n\r\n")
            has_none = head.startswith(b"HEAD ") or answer.split(b" ", 2)[1] in (b"204", b"304")
            content = b"" if has_none else await _body(server_reader, answer, is_answer=True)
            if fault == "lost":
                raise ConnectionAbortedError
            answer = answer.replace(target.encode(), self._way.address.encode())
            if fault == "truncated":
                await self._pass(answer + content[: len(content) // 2], writer)
                await asyncio.sleep(0.01)  # let it arrive: a reset overtakes
                raise ConnectionAbortedError
            await self._pass(answer + content, writer)


def _error(head: bytes, status: str) -> bytes:
    body = b"" if head.startswith(b"HEAD ") else b"the network of this test fails\n"
    return b"HTTP/1.1 %s No\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(body)) + body


async def _body(reader: asyncio.StreamReader, head: bytes, *, is_answer: bool) -> bytes:
    fields = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    headers = {name.lower(): value.strip() for name, _, value in fields}
    if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
        parts = []
        while True:
            line = await reader.readuntil(b"\r\n")
            parts += [line, await reader.readexactly(int(line.split(b";")[0], 16) + 2)]
            if parts[-1] == b"\r\n":
                return b"".join(parts)
    if b"content-length" in headers:
        return await reader.readexactly(int(headers[b"content-length"]))
    return await reader.read() if is_answer else b""
