"""An ASGI application as an httpx transport: the embedded mode's stand-in for a network.

The application runs on an event loop in a thread of its own. Bodies pass in pieces both ways and neither side runs ahead:
request bodies are pulled as the application asks for them, response pieces wait in a bounded queue. So a body never has to
fit in memory, and an endless response can be read and closed.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import httpx

__all__ = ["AppTransport"]

Message = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]

GRACE_SECONDS = 60
PIECES = 8
"""Response pieces that may wait for the reader."""
READER_SECONDS = 1.0
"""A full queue of which nothing was taken for so long has no reader any more."""


class AppTransport(httpx.BaseTransport):
    """Runs `app` from its lifespan's start-up to its shutdown, which `close` waits for. Usable from many threads."""

    def __init__(self, make_app: Callable[[], App]) -> None:
        """`make_app` is called in the loop's thread."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="aq-data-embedded", daemon=True)
        self._thread.start()
        self._lifespan_in: asyncio.Queue[Message] = asyncio.Queue()
        self._closed = False
        self._running: set[Future[None]] = set()
        self._exchanges: set[_Exchange] = set()
        try:
            self._app, self._stopped = asyncio.run_coroutine_threadsafe(self._start(make_app), self._loop).result()
        except BaseException:
            self._end_thread()
            raise

    async def _start(self, make_app: Callable[[], App]) -> tuple[App, asyncio.Task[None]]:
        app = make_app()
        started: asyncio.Queue[Message] = asyncio.Queue()

        async def send(message: Message) -> None:
            await started.put(message)

        task = asyncio.ensure_future(_awaited(app({"type": "lifespan", "state": {}}, self._lifespan_in.get, send)))
        await self._lifespan_in.put({"type": "lifespan.startup"})
        message = await started.get()
        if message["type"] != "lifespan.startup.complete":
            raise RuntimeError(f"the embedded server did not start: {message.get('message')}")
        return app, task

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _Exchange(self._loop, request)
        if self._closed:
            raise httpx.ConnectError("the embedded server was closed", request=request)
        exchange.task = asyncio.run_coroutine_threadsafe(exchange.run(self._app), self._loop)
        self._running.add(exchange.task)
        self._exchanges.add(exchange)
        exchange.task.add_done_callback(self._running.discard)
        exchange.task.add_done_callback(lambda _: self._exchanges.discard(exchange))
        status, headers = exchange.start()
        return httpx.Response(status, headers=headers, stream=exchange, request=request)

    def close(self) -> None:
        """What was accepted is finished, and what is being read is read; an answer that was left half-read is given up."""
        if self._closed:
            return
        self._closed = True
        for exchange in list(self._exchanges):
            if exchange.is_endless:
                exchange.close()
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end:
            taken = {exchange: exchange.taken for exchange in list(self._exchanges)}
            if not wait(list(self._running), timeout=READER_SECONDS).not_done:
                break
            for exchange, before in taken.items():
                # Not every answer that has begun: a bulk save answers while it saves.
                if exchange.is_endless or (exchange.is_full and exchange.taken == before):
                    exchange.close()

        async def stop() -> None:
            await self._lifespan_in.put({"type": "lifespan.shutdown"})
            await self._stopped

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._end_thread()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _awaited(awaitable: Awaitable[None]) -> None:
    await awaitable


class _Exchange(httpx.SyncByteStream):
    """One request and its answer, between the caller's thread and the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, request: httpx.Request) -> None:
        self._loop, self._request = loop, request
        self._pieces: Iterator[bytes] = iter(request.stream)  # type: ignore[arg-type]
        self._answers: queue.SimpleQueue[Message | BaseException] = queue.SimpleQueue()
        self._space = asyncio.Semaphore(PIECES)
        self._body_done = False
        self._answered = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self.is_endless = False
        self.taken = 0
        """Messages that the reader has had."""
        self.task: Future[None] | None = None

    def _scope(self) -> dict[str, Any]:
        url = self._request.url
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self._request.method,
            "scheme": url.scheme,
            "path": url.path,
            "raw_path": url.raw_path.partition(b"?")[0],
            "query_string": url.query,
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in self._request.headers.raw],
            "server": (url.host, url.port or 80),
            "client": ("127.0.0.1", 0),
            "state": {},
        }

    @property
    def is_full(self) -> bool:
        """Whether the application has to wait for the reader."""
        return self._answers.qsize() >= PIECES

    async def run(self, app: App) -> None:
        self._work = asyncio.current_task()
        try:
            await app(self._scope(), self._receive, self._send)
        except BaseException as exc:
            self._answers.put(exc)
            raise

    async def _receive(self) -> Message:
        if self._body_done:
            await self._answered.wait()  # until then the caller is still there; `close` cancels
            return {"type": "http.disconnect"}
        piece = await self._loop.run_in_executor(None, next, self._pieces, None)
        if piece is None:
            self._body_done = True
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def _send(self, message: Message) -> None:
        await self._space.acquire()
        self._answers.put(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._answered.set()

    def _next(self) -> Message:
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            what = "was closed" if isinstance(answer, asyncio.CancelledError) else f"failed: {answer!r}"
            raise httpx.RemoteProtocolError(f"the embedded server {what}", request=self._request) from answer
        self.taken += 1
        with suppress(RuntimeError):  # the loop was closed: nobody waits for space
            self._loop.call_soon_threadsafe(self._space.release)
        return answer

    def start(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Wait for the head of the answer."""
        message = self._next()
        headers = list(message["headers"])
        # A stream of events would never end by itself.
        self.is_endless = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
        return message["status"], headers

    def __iter__(self) -> Iterator[bytes]:
        more = True
        while more:
            message = self._next()
            more = message.get("more_body", False)
            if message.get("body"):
                yield bytes(message["body"])

    def close(self) -> None:
        if self.task is not None and self._work is not None and not self.task.done():
            # Not `self.task.cancel()`: that is done at once, before the application has let go of what it reads.
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._work.cancel)
