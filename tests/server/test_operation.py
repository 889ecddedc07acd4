"""Running it: configuration, health, metrics, logs, stopping, limits."""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from aq_server.__main__ import main
from aq_server.commands.serving import running
from aq_server.config import Config, ServerConfig, StoreConfig, load_config
from aq_server.service import health
from aq_server.service.datafiles import DataFiles
from forms import DATAFILES, array_part, declared, document_part, new_id, save
from services.deployment import blobs, deployed, overwrite

from aq_data.errors import AqDataError, ConfigError, UnavailableError

# --- configuration -------------------------------------------------------------------------------------------------


def written(folder: Path, suffix: str, tables: dict) -> Path:
    path = folder / f"config{suffix}"
    if suffix == ".toml":
        lines = [f"{key} = {json.dumps(value)}" for table in tables.values() for key, value in table.items()]
        heads = [(name, len(table)) for name, table in tables.items()]
        text = "".join(f"[{name}]\n" + "".join(f"{lines.pop(0)}\n" for _ in range(count)) for name, count in heads)
        path.write_text(text)
    else:
        path.write_text(json.dumps(tables))
    return path


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_flags_are_stronger_than_environment_and_that_than_the_file(tmp_path, suffix):
    """Each key is decided by itself; what none of them names keeps its default."""
    path = written(tmp_path, suffix, {"server": {"port": 1, "host": "::1", "rate_limit": 7}, "client": {"url": "http://h"}})
    environment = {"AQ_DATA_SERVER__PORT": "2", "AQ_DATA_SERVER__HOST": "localhost", "OTHER": "x"}
    config = load_config(path, environment, {"port": 3, "host": None})
    assert (config.server.port, config.server.host, config.server.rate_limit) == (3, "localhost", 7)
    assert (config.client.url, config.server.log_level) == ("http://h", "info")
    assert load_config(path, {}, {}).server.port == 1
    assert load_config(path, environment, {}).server.port == 2


def test_the_environment_may_hold_every_kind_of_value(tmp_path):
    environment = {
        "AQ_DATA_SERVER__REQUIRE_TOKEN": "true",
        "AQ_DATA_SERVER__ALLOWED_HOSTS": '["a.example", "b.example"]',
        "AQ_DATA_SERVER__MAX_SAVE_BYTES": "1000",
        "AQ_DATA_CLIENT__TOKEN_FILE": "/x",
    }
    config = load_config(None, environment, {})
    assert config.server.require_token is True
    assert config.server.allowed_hosts == ("a.example", "b.example")
    assert config.server.max_save_bytes == 1000
    assert config.client.token_file == "/x"


WRONG = {
    "unknown key": ({"server": {"prot": 1}}, {}, {}, "prot"),
    "unknown table": ({"sever": {}}, {}, {}, "sever"),
    "port too high": ({"server": {"port": 70_000}}, {}, {}, "port"),
    "text for a number": ({"server": {"port": "80"}}, {}, {}, "port"),
    "level unknown": ({"server": {"log_level": "loud"}}, {}, {}, "log_level"),
    "table no table": ({"server": 3}, {}, {}, "server"),
    "unknown in environment": ({}, {"AQ_DATA_SERVER__PROT": "1"}, {}, "prot"),
    "unknown table in environment": ({}, {"AQ_DATA_SEVER__PORT": "1"}, {}, "sever"),
    "no number in environment": ({}, {"AQ_DATA_SERVER__PORT": "many"}, {}, "port"),
    "list no JSON in environment": ({}, {"AQ_DATA_SERVER__ALLOWED_HOSTS": "[a"}, {}, "allowed_hosts"),
    "negative flag": ({}, {}, {"port": -1}, "port"),
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_configuration_that_is_wrong_is_refused_by_name(tmp_path, reason):
    """The message names the key at fault and where it was set."""
    tables, environment, flags, named = WRONG[reason]
    path = written(tmp_path, ".json", tables)
    with pytest.raises(ConfigError) as failure:
        load_config(path, environment, flags)
    assert named in str(failure.value).lower()
    if tables:
        assert str(path) in str(failure.value)
    elif environment:
        assert "environment" in str(failure.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    missing = tmp_path / "none.json"
    with pytest.raises(ConfigError, match=re.escape(str(missing))):
        load_config(missing, {}, {})
    for name, content in (
        ("bad.json", b"{"),
        ("bad.toml", b"= 3"),
        ("list.json", b"[]"),
        ("text.json", b'"x"'),
        ("bin.json", b"\xff"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            load_config(path, {}, {})


@pytest.mark.parametrize("place", ["flag", "environment", "home"])
def test_a_wrong_configuration_stops_the_start_with_its_reason(tmp_path, monkeypatch, capsys, place):
    """Exit 1 and one line, from a flag, a file of AQ_DATA_CONFIG and the default place alike."""
    folder = tmp_path / "home" / ".aq_config"
    folder.mkdir(parents=True)
    bad = written(folder, "", {"server": {"prot": 1}}).rename(folder / "data_server.json")
    if place == "environment":
        monkeypatch.setenv("AQ_DATA_CONFIG", str(bad))
    elif place == "home":
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main(["serve", "--port", "0", *(["--config", str(bad)] if place == "flag" else [])]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "prot" in said
    assert str(bad) in said


def test_every_field_says_what_it_means():
    """A docstring under each field, from which the documentation is made."""
    import inspect

    for table in (ServerConfig, StoreConfig, type(Config().client)):
        source = "".join(inspect.getsource(sys.modules[each.__module__]) for each in table.__mro__[:2])
        for field in msgspec.structs.fields(table):
            assert re.search(rf'^    {field.name}: [^\n]*\n    """[A-Z]', source, re.MULTILINE), field.name


# --- health --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_probes(monkeypatch):
    monkeypatch.setattr(health, "KEPT_SECONDS", 0.0)


def test_a_healthy_server_says_so(own):
    assert own.get("/healthz").json() == {"status": "ok"}
    ready = own.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "metadata": "ok", "stores": {"default": "ok"}})


@pytest.mark.embedded("takes the folder away")
def test_readiness_names_the_default_store_when_it_takes_no_writes(own, data, fresh_probes):
    """503 while the folder is no folder; the process itself is healthy, and recovers by itself."""
    folder = blobs(data)
    folder.rename(data / "elsewhere")
    folder.write_text("not a folder")
    down = own.get("/readyz")
    assert (down.status_code, down.json()["metadata"]) == (503, "ok")
    assert down.json()["status"] == "unavailable"
    assert down.json()["stores"]["default"] != "ok"
    assert int(down.headers["retry-after"]) >= 1
    assert own.get("/healthz").status_code == 200
    folder.unlink()
    (data / "elsewhere").rename(folder)
    assert own.get("/readyz").status_code == 200


@pytest.mark.embedded("damages the tables of SQLite")
def test_readiness_names_the_database_when_it_is_damaged(own, data, fresh_probes):
    with sqlite3.connect(data / "metadata.sqlite") as connection:
        connection.execute("ALTER TABLE tokens RENAME TO lost")
    connection.close()
    down = own.get("/readyz")
    assert (down.status_code, down.json()["stores"]["default"]) == (503, "ok")
    assert "tokens" in down.json()["metadata"]
    assert own.get("/healthz").status_code == 200


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_count_by_route_and_not_by_what_clients_choose(own):
    """A thousand ids make one line: labels are the route's template, the method and the status."""
    id = save(own, {"a": np.arange(3.0)}, [("n", b"x")])["id"]
    for i in range(20):
        own.get(f"{DATAFILES}/{new_id()}")
        own.get(f"{DATAFILES}/{id}/arrays/{i}")
        own.get(f"{DATAFILES}/{id}/zarr/{i}/{i}")
        own.get(f"/{i}")
        own.get(f"/api/v1/{i}")
        own.get(f"/api/v1/search/{i}")
        own.put(f"{DATAFILES}/{id}/files/{i}", content=b"")
    own.head(f"{DATAFILES}/{id}")
    own.post("/api/v1/search", json={})
    text = own.get("/metrics").text
    lines = re.findall(r"^aq_data_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE)
    counts = {tuple(re.findall(r'(\w+)="([^"]*)"', labels)): float(value) for labels, value in lines}
    for labels in counts:
        assert {name for name, _ in labels} == {"method", "route", "status"}

    def count(method: str, route: str, status: int) -> float:
        return counts[("method", method), ("route", route), ("status", str(status))]

    assert count("GET", "/datafiles/{id}", 404) == 20
    assert count("GET", "/datafiles/{id}/arrays", 404) == 20
    assert count("GET", "/datafiles/{id}/zarr", 404) == 20
    assert count("PUT", "/datafiles/{id}/files", 201) == 20
    assert count("POST", "/datafiles", 201) == 1
    assert count("POST", "/search", 200) == 1
    assert count("HEAD", "/datafiles/{id}", 200) == 1
    assert len(counts) < 15
    assert id not in text
    assert "aq_data_request_seconds_bucket" in text
    assert "process_resident_memory_bytes" in text


# --- logs and failures ---------------------------------------------------------------------------------------------


def lines_of(log: str) -> list[dict]:
    """Every line of the log, each of which must be one JSON object."""
    return [json.loads(line) for line in log.splitlines()]


def test_every_request_is_one_json_line_with_its_id(serve):
    process = serve(environment={"AQ_DATA_SERVER__LOG_LEVEL": "debug"})
    answer = httpx.get(f"{process.url}{DATAFILES}/x%0A", headers={"Request-Id": "mine-1"})
    assert answer.status_code == 404
    assert httpx.get(f"{process.url}/healthz").status_code == 200
    lines = lines_of(process.stop())
    (mine,) = (line for line in lines if line.get("request_id") == "mine-1")
    assert (mine["method"], mine["status"], mine["level"]) == ("GET", 404, "info")
    assert mine["path"].startswith(f"{DATAFILES}/x")
    assert mine["ms"] >= 0
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_damage_is_told_to_the_log_with_the_id_the_client_got(serve, data):
    """500 corrupt: words and an id for the client, the whole story for the operator."""
    process = serve()
    with httpx.Client(base_url=process.url) as http:
        id = save(http, {"a": np.arange(1000.0)})["id"]
        (chunk,) = (blobs(data) / id).glob("*/arrays.zarr/a/c/0")
        content = bytearray(chunk.read_bytes())
        content[20] ^= 0xFF
        overwrite(chunk, bytes(content))
        answer = http.get(f"{DATAFILES}/{id}/arrays/a")
    assert (answer.status_code, answer.json()["code"]) == (500, "corrupt")
    assert "Traceback" not in answer.text
    (line,) = (line for line in lines_of(process.stop()) if line["level"] == "error")
    assert line["request_id"] == answer.headers["request-id"] == answer.json()["request_id"]
    assert "CorruptionError" in line["traceback"]
    assert line["code"] == "corrupt"


def test_what_nobody_foresaw_is_told_to_the_log_and_not_to_the_client(own, monkeypatch, caplog):
    """500 internal with an id; neither the message nor the traceback of the cause leaves the server."""
    id = save(own, name="x")["id"]

    async def fail(*_: object) -> None:
        raise ZeroDivisionError("the secret password is 1234")

    monkeypatch.setattr(DataFiles, "get", fail)
    answer = own.get(f"{DATAFILES}/{id}")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    for secret in ("1234", "ZeroDivision", "Traceback", "aq_server", ".py"):
        assert secret not in answer.text
    (record,) = (record for record in caplog.records if record.name == "aq_data" and record.levelname == "ERROR")
    assert record.fields["request_id"] == answer.headers["request-id"]
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    monkeypatch.undo()
    assert own.get(f"{DATAFILES}/{id}").status_code == 200


def test_what_is_down_is_one_line_for_each_request(own, monkeypatch, caplog):
    """An outage is refused as often as it is asked: each line says what is down, and none has the way there."""

    async def fail(*_: object) -> None:
        raise UnavailableError("the database does not answer; try again") from OSError("no route")

    monkeypatch.setattr(DataFiles, "get", fail)
    answer = own.get(f"{DATAFILES}/{new_id()}")
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    (record,) = (record for record in caplog.records if record.name == "aq_data")
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    assert record.fields["error"] == "the database does not answer; try again"
    assert record.fields["request_id"] == answer.headers["request-id"]


def test_a_refusal_is_no_error_in_the_log(serve):
    """Readers probe for what is not there all day: that is no news."""
    process = serve()
    with httpx.Client(base_url=process.url) as http:
        for path in ("/.zmetadata", f"{DATAFILES}/x/zarr/.zgroup", f"{DATAFILES}/x"):
            assert http.get(path).status_code == 404
        assert http.post(DATAFILES, content=b"{").status_code == 415
    assert [line for line in lines_of(process.stop()) if line["level"] in ("error", "warning")] == []


# --- stopping and starting -----------------------------------------------------------------------------------------


def test_a_save_under_way_is_finished_when_asked_to_stop(serve, data):
    """SIGTERM in the middle of a body: the rest is taken, 201 answered, the process ends well, and the data are there."""
    process = serve()
    values = np.random.default_rng(0).random(200_000)
    document = {"id": new_id(), "name": "slow", "arrays": [declared("a", values)]}
    with httpx.Client(base_url=process.url) as http:
        request = http.build_request("POST", DATAFILES, files=[document_part(document), array_part(0, values.tobytes())])
        content, halfway, stopping = request.read(), threading.Event(), threading.Event()

        def slowly():
            yield content[:800_000]
            halfway.set()
            assert stopping.wait(20)
            yield content[800_000:]

        answers: list[httpx.Response] = []
        headers = {"content-type": request.headers["content-type"], "content-length": str(len(content))}
        sender = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{process.url}{DATAFILES}", content=slowly(), headers=headers, timeout=30)
            )
        )
        sender.start()
        assert halfway.wait(20)
        process.process.send_signal(signal.SIGTERM)
        port = httpx.URL(process.url).port
        deadline = time.monotonic() + 15
        while _listens(port) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _listens(port), "it goes on taking new connections"
        stopping.set()
        sender.join()
    assert answers[0].status_code == 201
    log = process.stop()
    # uvicorn ends by the signal it was sent, after everything is done.
    assert process.process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in log
    with running(deployed(data)) as url:
        assert httpx.get(f"{url}{DATAFILES}/{document['id']}/arrays/a").content == values.tobytes()


def _listens(port: int | None) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port or 0)) == 0


def test_a_server_stops_soon_when_nothing_is_under_way(serve):
    process = serve()
    with httpx.Client(base_url=process.url) as idle:
        assert idle.get("/healthz").status_code == 200
        started = time.monotonic()
        process.stop()
    assert time.monotonic() - started < 5
    assert process.process.returncode in (0, -signal.SIGTERM)


def test_the_announced_address_answers_at_once(serve):
    """Whoever reads the line on standard output may connect: nothing is refused for a moment."""
    for _ in range(2):
        assert httpx.get(f"{serve().url}/healthz").status_code == 200


def test_a_taken_port_fails_and_says_how_to_go_on(server, tmp_path):
    port = httpx.URL(server).port
    command = [sys.executable, "-m", "aq_server", "serve", "--data", str(tmp_path / "other"), "--port", str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert str(port) in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.embedded("three files of SQLite that cannot be used")
@pytest.mark.parametrize(("name", "word"), [("file", "file"), ("newer", "version"), ("broken", "database")])
def test_a_folder_that_cannot_be_used_fails_with_its_reason(tmp_path, capsys, name, word):
    """A file in its place, a database of a newer version, one that is none: exit 1 and one line."""
    if name == "file":
        (tmp_path / "file").write_text("")
    else:
        (tmp_path / name / "blobs").mkdir(parents=True)
    if name == "newer":
        connection = sqlite3.connect(tmp_path / name / "metadata.sqlite")
        connection.execute("PRAGMA user_version=99")
        connection.close()
    elif name == "broken":
        (tmp_path / name / "metadata.sqlite").write_bytes(b"no database" * 1000)
    # `token create` opens the folder as `serve` does, and makes it when it is not there.
    assert main(["token", "create", "x", "--data", str(tmp_path / name)]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert word in said.err


@pytest.mark.embedded("a deployment of its own, in memory")
def test_a_server_in_memory_writes_nothing(serve, data):
    process = serve("--memory")
    with httpx.Client(base_url=process.url) as http:
        id = save(http, {"a": np.arange(3.0)})["id"]
        assert http.get(f"{DATAFILES}/{id}/arrays/a").status_code == 200
        assert http.get("/readyz").status_code == 200
    process.stop()
    assert not data.exists()


def test_too_many_requests_are_told_to_wait(data):
    """429 with Retry-After over the limit; after a second it goes on. Refusals are problem documents too."""
    with running(deployed(data, rate_limit=5)) as url, httpx.Client(base_url=url) as http:
        answers = [http.get(f"{DATAFILES}/x") for _ in range(12)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {404, 429}
        assert len(refused) >= 2
        for answer in refused:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["code"] == "rate_limited"
            assert answer.json()["retryable"] is True
            assert answer.headers["request-id"]
        deadline = time.monotonic() + 5
        while http.get(f"{DATAFILES}/x").status_code == 429 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert http.get(f"{DATAFILES}/x").status_code == 404


def test_our_client_waits_when_it_is_told_to(data):
    """Over the limit a client's calls take longer; none fails."""
    import aq_data

    with running(deployed(data, rate_limit=20)) as url, aq_data.connect(url) as client:
        for _ in range(30):
            with pytest.raises(AqDataError) as failure:
                client.get(new_id())
            assert failure.value.code == "not_found"
