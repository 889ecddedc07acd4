"""A network between a driver and MongoDB that loses answers: the write was made, and its writer never hears of it."""

from __future__ import annotations

import socket
import struct
import threading
from urllib.parse import urlsplit

__all__ = ["CuttingProxy"]

OP_MSG = 2013


class CuttingProxy:
    """Passes everything on, until it is told of which command to lose the answer, or the command itself."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = url.replace(f"{parts.hostname}:{parts.port}", f"127.0.0.1:{self._listener.getsockname()[1]}")
        self.url += ("&" if parts.query else "/?") + "serverMonitoringMode=poll"  # each answer belongs to a request
        self._to_lose: list[tuple[str, str, bool]] = []
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self, command: str, collection: str, times: int = 1, *, request: bool = False) -> None:
        """Cut the connection instead of answering the next such commands; with `request` they do not even arrive."""
        self._to_lose += [(command, collection, request)] * times

    @property
    def waits(self) -> bool:
        """Whether something that was to be lost has not come yet."""
        return bool(self._to_lose)

    def close(self) -> None:
        for one in (self._listener, *self._sockets):
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            try:
                while True:
                    request = _message(client)
                    lost = self._find(request)
                    if lost is not None and lost[2]:
                        return
                    server.sendall(request)
                    answer = _message(server)
                    if lost is not None:
                        return
                    client.sendall(answer)
            except (OSError, EOFError):
                return

    def _find(self, request: bytes) -> tuple[str, str, bool] | None:
        """What is to be lost of this request: its body begins with the command and its collection."""
        if struct.unpack_from("<i", request, 12)[0] == OP_MSG:
            name, _, rest = request[26:].partition(b"\0")
            for lost in self._to_lose:
                if name == lost[0].encode() and rest[4:].startswith(lost[1].encode() + b"\0"):
                    self._to_lose.remove(lost)
                    return lost
        return None


def _message(source: socket.socket) -> bytes:
    head = _exactly(source, 4)
    return head + _exactly(source, struct.unpack("<i", head)[0] - 4)


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = source.recv(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
