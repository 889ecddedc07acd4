"""Completion notices: signed, to addresses of the server's list alone, again until they are taken."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import queue
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from aq_server.app import build_app, open_stores
from aq_server.commands.serving import running
from aq_server.config import ServerConfig
from services.deployment import deployed

import aq_data
from aq_data.errors import ConfigError, ForbiddenError

SECRET = b"a secret of the laboratory"


@contextmanager
def listener(*statuses: int):
    """A program that listens for webhooks: answers `statuses` in turn, then 204. Its address and what came."""
    came: queue.Queue[tuple[dict[str, str], bytes]] = queue.Queue()
    left = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            came.put((dict(self.headers), body))
            self.send_response(left.pop(0) if left else 204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", came
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def config(data, tmp_path, address: str) -> ServerConfig:
    secret = tmp_path / "secret"
    secret.write_text("whsec_" + base64.b64encode(SECRET).decode())
    return deployed(data, webhooks=(address,), webhook_secret_file=str(secret))


@pytest.fixture(autouse=True)
def _spool(monkeypatch, tmp_path):
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))


def verified(headers: dict[str, str], body: bytes) -> dict:
    """The body, after the check a receiver would make."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = "v1," + base64.b64encode(hmac.new(SECRET, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == expected
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 60
    return json.loads(body)


@pytest.mark.parametrize("step", ["finish", "abandon"])
def test_the_end_is_told_signed_and_again_until_it_is_taken(data, tmp_path, step):
    """A refusal is followed by another try with the same id; after a 2xx there is none."""
    with (
        listener(500) as (address, came),
        running(config(data, tmp_path, address)) as url,
        aq_data.connect(url) as client,
    ):
        sweep = client.sweep("T1", dims={"x": None}, variables={"y": ("f8", "x")}, notify=[address])
        sweep.append(y=1.0, x=1.0)
        sweep.finish() if step == "finish" else sweep.abandon("too warm")
        tries = [came.get(timeout=20), came.get(timeout=20)]
        told = [verified(*one) for one in tries]
        assert tries[0][0]["webhook-id"] == tries[1][0]["webhook-id"]
        outcome = "finished" if step == "finish" else "abandoned"
        assert told[1]["type"] == f"sweep.{outcome}"
        state, reason = ("complete", "") if step == "finish" else ("abandoned", "too warm")
        assert told[1]["data"] == {"id": sweep.id, "name": "T1", "state": state, "reason": reason, "blocks": 1}
        with pytest.raises(queue.Empty):
            came.get(timeout=1.5)


def test_what_was_not_told_is_told_after_a_restart(data, tmp_path):
    """Nobody listens when the sweep ends; the next server over the same folder tells."""
    with listener() as (address, _):
        pass
    with running(config(data, tmp_path, address)) as url, aq_data.connect(url) as client:
        client.sweep("T1", dims={"x": None}, variables={"y": ("f8", "x")}, notify=[address]).finish()
    port = int(address.split(":")[2].split("/")[0])
    came: queue.Queue[bytes] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            came.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with running(config(data, tmp_path, address)):
            assert json.loads(came.get(timeout=20))["type"] == "sweep.finished"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_address_that_is_not_on_the_list_is_refused(data, tmp_path):
    """Nothing is opened, and no server is made to speak to whom a client names."""
    with (
        running(config(data, tmp_path, "http://127.0.0.1:9/hook")) as url,
        aq_data.connect(url) as client,
        pytest.raises(ForbiddenError, match=r"169\.254"),
    ):
        client.sweep("x", dims={"x": None}, variables={"y": ("f8", "x")}, notify=["http://169.254.1.1/"])


@pytest.mark.parametrize(
    "change", [{"webhook_secret_file": None}, {"webhooks": ("ftp://x",)}, {"webhook_secret_file": "/none"}]
)
def test_a_configuration_that_could_not_tell_is_refused(data, tmp_path, change):
    """At start, naming the key."""
    base = {"webhooks": ("http://127.0.0.1:9/",), "webhook_secret_file": None}
    wrong = ServerConfig(data=str(data), **{**base, **change})
    with pytest.raises(ConfigError, match="webhook"):
        build_app(wrong, open_stores(wrong), ask_for_tokens=False)
