"""A network between a server and a bucket: it counts the requests, makes them slow, and fails those it is told to."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

__all__ = ["HttpProxy", "Request", "rounds"]

Fault = Callable[["Request", socket.socket], bool]


@dataclass
class Request:
    """One request that went through: what it asked for, when it came and when its answer had gone out."""

    method: str
    target: str
    headers: dict[str, str]
    began: float
    ended: float = 0.0
    status: int = 0
    size: int = 0

    @property
    def path(self) -> str:
        """Without the query, decoded."""
        return unquote(urlsplit(self.target).path)

    def __str__(self) -> str:
        return f"{self.method} {self.target}"


@dataclass
class HttpProxy:
    """Passes HTTP/1.1 on to `target` (`http://host:port`), connection by connection."""

    target: str
    latency: float = 0.0
    """Seconds that each request is held back."""
    gathering: float = 0.0
    """Seconds for which no other must have come before those that came go on: who waits for nobody is in one round."""
    requests: list[Request] = field(default_factory=list)
    faults: list[tuple[Callable[[Request], bool], Fault]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._last = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Cut every connection."""
        for one in (self._listener, *self._sockets):
            one.close()

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Request]]:
        """The requests that are made inside the block."""
        first, made = len(self.requests), []
        yield made
        made += self.requests[first:]

    def fail(self, fault: Fault, times: int = 1, *, when: Callable[[Request], bool] = lambda _: True) -> None:
        """Let `fault` have the next so many requests that are `when`; it returns whether it has dealt with one."""
        self.faults += [(when, fault)] * times

    # --- faults ------------------------------------------------------------------------------------------------------

    @staticmethod
    def answering(status: int, body: bytes = b"", content_type: str = "text/plain") -> Fault:
        """The provider refuses."""

        def fault(request: Request, client: socket.socket) -> bool:
            request.status = status
            head = f"HTTP/1.1 {status} No\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + (b"" if request.method == "HEAD" else body))
            return True

        return fault

    @staticmethod
    def resetting(request: Request, client: socket.socket) -> bool:
        """The connection is reset."""
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionAbortedError

    @staticmethod
    def hanging(request: Request, client: socket.socket) -> bool:
        """Nothing ever comes."""
        client.settimeout(60)
        client.recv(1)
        raise ConnectionAbortedError

    @staticmethod
    def truncating(request: Request, client: socket.socket) -> bool:
        """Half of the body comes, and then the connection ends."""
        request.headers["truncate"] = "yes"
        return False

    @staticmethod
    def losing(request: Request, client: socket.socket) -> bool:
        """The request is carried out, and its answer is lost."""
        request.headers["lose"] = "yes"
        return False

    # --- passing on --------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        parts = urlsplit(self.target)
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection((parts.hostname, parts.port))
            except OSError:
                client.close()
                continue
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError, EOFError, ValueError):
            incoming, outgoing = client.makefile("rb"), server.makefile("rb")
            while True:
                line, headers, head = _head(incoming)
                method, target, _ = line.split(" ", 2)
                request = Request(method, target, headers, time.monotonic())
                body = _body(incoming, headers, has_length=False)
                with self._lock:
                    self.requests.append(request)
                    self._last = time.monotonic()
                    fault = next((one for one in self.faults if one[0](request)), None)
                    if fault is not None:
                        self.faults.remove(fault)
                request.size = len(body)
                time.sleep(self.latency)
                while (left := self._last + self.gathering - time.monotonic()) > 0:
                    time.sleep(left)
                dealt_with = fault is not None and fault[1](request, client)
                if not dealt_with and not self._tell_progress(request, client):
                    server.sendall(head + body)
                    self._answer(request, client, outgoing)
                request.ended = time.monotonic()

    def _tell_progress(self, request: Request, client: socket.socket) -> bool:
        """Answer how far a resumable upload is, where it is asked, or sent what has arrived before.

        GCS does so; its emulator takes the question for the end, and stores what comes twice twice.
        """
        found = re.fullmatch(r"bytes (?:\*|\d+-(\d+))/.*", request.headers.get("content-range", ""))
        if found is None:
            return False
        done = [one for one in self.requests if one.target == request.target and one.status in (200, 308) and one.size]
        size = sum(one.size for one in done)
        if found[1] is not None and int(found[1]) >= size:
            return False
        body = b'{"size": "%d"}' % size if any(one.status == 200 for one in done) else b""
        request.status, request.size = 200 if body else 308, 0
        progress = f"Range: bytes=0-{size - 1}\r\n" if size else ""
        client.sendall(f"HTTP/1.1 {request.status} Told\r\n{progress}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return True

    def _answer(self, request: Request, client: socket.socket, outgoing) -> None:
        line, headers, head = _head(outgoing)
        while line.split(" ")[1] == "100":
            line, headers, head = _head(outgoing)
        request.status = int(line.split(" ")[1])
        body = b""
        if request.method != "HEAD" and request.status not in (204, 304):
            body = _body(outgoing, headers, has_length=True)
        if "lose" in request.headers:
            raise ConnectionAbortedError
        if "truncate" in request.headers:
            client.sendall(head + body[: len(body) // 2])
            raise ConnectionAbortedError
        client.sendall(head + body)


def rounds(requests: Iterable[Request]) -> int:
    """How many of them waited for one another: the longest chain in which each began after the one before had ended."""
    count, ended = 0, 0.0
    for request in sorted(requests, key=lambda one: one.ended):
        if request.began >= ended:
            count, ended = count + 1, request.ended
    return count


def _head(source) -> tuple[str, dict[str, str], bytes]:
    lines = [source.readline()]
    if not lines[0]:
        raise EOFError
    while lines[-1] not in (b"\r\n", b""):
        lines.append(source.readline())
    fields = (line.decode("latin-1").partition(":") for line in lines[1:-1])
    return lines[0].decode("latin-1").strip(), {name.lower(): value.strip() for name, _, value in fields}, b"".join(lines)


def _body(source, headers: dict[str, str], *, has_length: bool) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while True:
            line = source.readline()
            size = int(line.split(b";")[0], 16)
            parts += [line, source.read(size), source.readline()] if size else [line]
            if not size:
                while parts[-1] not in (b"\r\n", b""):
                    parts.append(source.readline())
                return b"".join(parts)
    if "content-length" in headers:
        return source.read(int(headers["content-length"]))
    return source.read() if has_length else b""
