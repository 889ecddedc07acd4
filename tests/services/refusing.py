"""A MongoDB that answers, and lets nobody in: enough of the wire protocol to say so."""

from __future__ import annotations

import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import bson

__all__ = ["refusing"]

OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013
HELLO = {"ok": 1, "helloOk": True, "isWritablePrimary": True, "ismaster": True, "minWireVersion": 0, "maxWireVersion": 21}


class _Refusal(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while head := self.rfile.read(16):
            length, request, _, code = struct.unpack("<iiii", head)
            if code not in (OP_QUERY, OP_MSG):
                return  # somebody speaks TLS
            body = self.rfile.read(length - 16)
            start = body.index(b"\0", 4) + 9 if code == OP_QUERY else 5
            asked = bson.decode(body[start : start + struct.unpack_from("<i", body, start)[0]])
            is_hello = next(iter(asked)).lower() in ("hello", "ismaster")
            answer = bson.encode(HELLO if is_hello else self.server.refusal)  # type: ignore[attr-defined]
            before = struct.pack("<iqii", 0, 0, 0, 1) if code == OP_QUERY else b"\0\0\0\0\0"
            kind = OP_REPLY if code == OP_QUERY else OP_MSG
            self.wfile.write(struct.pack("<iiii", 16 + len(before) + len(answer), 0, request, kind) + before + answer)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


@contextmanager
def refusing(code: int, name: str, message: str) -> Iterator[str]:
    """Its host and port; every command but the greeting is answered by this error."""
    with _Server(("127.0.0.1", 0), _Refusal) as server:
        server.refusal = {"ok": 0, "code": code, "codeName": name, "errmsg": message}  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
