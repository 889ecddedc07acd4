"""The embedded mode's transport, over small applications: what its end finishes, and what it gives up."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from aq_data.client.inprocess import PIECES, AppTransport

SOON = 20.0
"""Seconds; the transport waits three times as long for what it does not give up."""


@pytest.fixture
def events() -> list[str]:
    """What happened in the application, in order."""
    return []


@pytest.fixture
def client(events):
    """Of an application that answers `/n` with n pieces, and `/save` when it is `released`."""

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            events.append("shutdown")
            return
        while (await receive())["more_body"]:
            pass
        if scope["path"] == "/save":
            events.append("saving")
            await asyncio.sleep(0.5)
            events.append("saved")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            for _ in range(int(scope["path"].strip("/").replace("save", "1"))):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await send({"type": "http.response.body"})
            events.append((await receive())["type"])
        finally:
            await asyncio.sleep(0.05)
            events.append("let go")

    with httpx.Client(base_url="http://localhost", transport=AppTransport(lambda: app)) as client:
        yield client


def closed_soon(client: httpx.Client) -> bool:
    begun = time.monotonic()
    client.close()
    return time.monotonic() - begun < SOON


def test_an_answer_left_half_read_is_given_up(client, events):
    """The application lets go of what it reads before it is shut down; who reads on is told, and not that this is all."""
    response = client.send(client.build_request("GET", f"/{10 * PIECES}"), stream=True)
    pieces = response.iter_bytes()
    next(pieces)
    assert closed_soon(client)
    assert events == ["let go", "shutdown"]
    with pytest.raises(httpx.RemoteProtocolError, match="closed"):
        list(pieces)


def test_an_answer_that_is_closed_half_read_is_let_go_of_before_the_end(client, events):
    with client.stream("GET", f"/{10 * PIECES}") as response:
        next(response.iter_bytes())
    assert closed_soon(client)
    assert events == ["let go", "shutdown"]


def test_an_answer_that_was_sent_hinders_no_end_and_can_still_be_read(client, events):
    """The application is told that the exchange is over."""
    response = client.send(client.build_request("GET", "/3"), stream=True)
    assert closed_soon(client)
    assert events == ["http.disconnect", "let go", "shutdown"]
    assert response.read() == b"xxx"


def test_a_save_under_way_is_finished(client, events):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/save").content))
    thread.start()
    while "saving" not in events:
        time.sleep(0.01)
    assert closed_soon(client)
    thread.join()
    assert events[:2] == ["saving", "saved"]
    assert events[-1] == "shutdown"
    assert answers == [b"x"]


def test_an_answer_that_is_being_read_is_read_to_its_end(client, events, monkeypatch):
    """However slowly: a bulk save may answer while it saves."""
    monkeypatch.setattr("aq_data.client.inprocess.READER_SECONDS", 0.2)
    response = client.send(client.build_request("GET", f"/{4 * PIECES}"), stream=True)
    read = []

    def slowly() -> None:
        for piece in response.iter_bytes():
            read.append(piece)
            time.sleep(0.05)

    thread = threading.Thread(target=slowly)
    thread.start()
    assert closed_soon(client)
    thread.join()
    assert b"".join(read) == b"x" * 4 * PIECES
    assert events[-1] == "shutdown"
