"""Who may come in, what may be sent, and that nothing a client names becomes a path."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import numpy as np
import psutil
import pytest
from aq_server.__main__ import main
from aq_server.commands.serving import running
from aq_server.config import ServerConfig
from forms import DATAFILES, around, array_part, declared, document_part, file_part, kept, new_id, post, save
from services.deployment import blobs, deployed, stored

from aq_data.wire.routes import BULK_GET

WITH_TOKENS = {"AQ_DATA_SERVER__REQUIRE_TOKEN": "true"}


@pytest.fixture
def token(data: Path, capsys):
    """Makes tokens as an operator does, on the command line; each with its id and secret."""

    def create(name: str, *flags: str) -> dict:
        assert main(["token", "create", name, "--data", str(data), "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    return create


def bearer(made: dict) -> dict[str, str]:
    return {"Authorization": f"Bearer {made['secret']}"}


def operations(url: str, **options) -> Iterator[tuple[str, str]]:
    """Every method and address of the OpenAPI document, with something in place of its parameters."""
    document = httpx.get(f"{url}/docs/openapi.json", **options).json()
    for path, item in document["paths"].items():
        for method in item:
            yield method.upper(), re.sub(r"\{[^}]*\}", "x", path)


def exactly(http: httpx.Client, method: str, path: str, **options) -> httpx.Response:
    """A request whose path is sent as it stands, without the normalisation a client library does."""
    return http.request(method, "/x", extensions={"target": path.encode("ascii")}, **options)


# --- an open server ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:5000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost@evil.example",
        "[",
        "",
    ],
)
def test_an_open_server_refuses_foreign_hosts_on_every_route(wire, shared, host):
    """DNS rebinding makes a browser send the attacker's name: such a request reaches nothing."""
    for method, path in operations(shared):
        answer = wire.request(method, path, headers={"Host": host})
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (method, path)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://localhost.evil.example", "null", "http://localhost:1", "file://"]
)
def test_an_open_server_refuses_pages_of_others(wire, shared, origin):
    """Also those that another server of this computer sent."""
    for method, path in operations(shared):
        answer = wire.request(method, path, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (method, path)


def test_an_open_server_answers_to_its_own_names(wire, shared):
    port = urlsplit(shared).port
    for name in ("localhost", "127.0.0.1", "LocalHost", "[::1]"):
        for host in (name, f"{name}:{port}"):
            assert wire.get("/healthz", headers={"Host": host}).status_code == 200
            own_page = {"Host": host, "Origin": f"http://{host}"}
            assert wire.post("/api/v1/search", json={}, headers=own_page).status_code == 200


def test_further_hosts_are_allowed_by_name(data):
    config = deployed(data, allowed_hosts=("Lab.example",))
    with running(config) as url:
        assert httpx.get(f"{url}/healthz", headers={"Host": "lab.example:80"}).status_code == 200
        assert httpx.get(f"{url}/healthz", headers={"Host": "other.example"}).status_code == 403


# --- tokens --------------------------------------------------------------------------------------------------------


def test_without_a_token_every_route_is_closed(serve, token):
    """401 with WWW-Authenticate on every route of the OpenAPI document but the two health checks."""
    token("someone")
    url = serve(environment=WITH_TOKENS).url
    wrong = [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer aqd_wrong"},
        {"Authorization": "Basic YTpi"},
        {"Authorization": "Bearer " + "x" * 10_000},
        {"Authorization": b"Bearer \xff\xfe"},
    ]
    with httpx.Client(base_url=url) as http:
        known = 0
        for method, path in operations(url):
            for headers in wrong:
                answer = http.request(method, path, headers=headers)
                if path in ("/healthz", "/readyz"):
                    assert answer.status_code == 200
                    continue
                known += 1
                assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), (method, path)
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert answer.headers["request-id"] == answer.json()["request_id"]
        assert known > 60
        # Neither a spelling of the address nor of the method leads around the guard.
        for method in ("GET", "HEAD", "OPTIONS", "PUT"):
            for path in (
                "//api/v1/search",
                "/docs/../api/v1/search",
                "/healthz/../metrics",
                "/docs/%2e%2e/metrics",
                "/metrics/",
            ):
                assert exactly(http, method, path).status_code in (401, 404, 405), (method, path)


def test_a_scope_opens_what_it_names_and_nothing_more(serve, token):
    """A read token reads and searches; every other route of the document is 403, and nothing was changed."""
    reader, writer = token("reader", "--scope", "read"), token("writer")
    url = serve(environment=WITH_TOKENS).url
    with httpx.Client(base_url=url, headers=bearer(writer)) as http:
        id = save(http, {"a": np.arange(3.0)}, [("n", b"x")], name="kept", user="somebody else")["id"]
        assert http.get(f"{DATAFILES}/{id}").json()["user"] == "writer", "the token's name, not the client's word"
    with httpx.Client(base_url=url, headers=bearer(reader)) as http:
        for path in ("", "/arrays/a", "/files/n", "/zarr/zarr.json"):
            assert http.get(f"{DATAFILES}/{id}{path}").status_code == 200
            assert http.head(f"{DATAFILES}/{id}{path}").status_code == 200
        assert http.get("/metrics").status_code == 200
        for path in ("", "/count"):
            assert http.post(f"/api/v1/search{path}", json={}).status_code == 200
        assert http.post(BULK_GET, json={"ids": [id]}).json()["results"][0]["status"] == 200
        refused = 0
        for method, path in operations(url):
            if method in ("GET", "HEAD") or path.startswith("/api/v1/search") or path in (BULK_GET, f"{DATAFILES}/compare"):
                assert http.request(method, path).status_code not in (401, 403), (method, path)
                continue
            refused += 1
            answer = http.request(method, path.replace("/x", f"/{id}", 1))
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (method, path)
        assert refused >= 4
        assert http.get(f"{DATAFILES}/{id}").json()["revision"] == 1
        assert http.put(f"{DATAFILES}/{id}/arrays/a").status_code == 403


def test_a_token_ends_with_the_request_it_is_revoked_or_expires(serve, token, data, capsys):
    """From the next request on, also on a connection that stays open, without a restart."""
    lasting, doomed = token("lasting"), token("doomed")
    url = serve(environment=WITH_TOKENS).url
    brief = token("brief", "--expires", "2s")
    with httpx.Client(base_url=url) as http:

        def status(made: dict) -> int:
            return http.get("/metrics", headers=bearer(made)).status_code

        assert [status(made) for made in (lasting, doomed, brief)] == [200, 200, 200]
        assert main(["token", "revoke", doomed["id"], "--data", str(data)]) == 0
        assert status(doomed) == 401
        deadline = time.monotonic() + 10
        while status(brief) == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert status(brief) == 401
        assert status(lasting) == 200
    capsys.readouterr()
    assert main(["token", "list", "--data", str(data), "--json"]) == 0
    listed = {line["name"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert listed["doomed"]["revoked_at"]
    assert listed["brief"]["expires_at"]
    assert all(key not in line for line in listed.values() for key in ("hash", "secret"))


def test_a_secret_rests_nowhere_in_clear(serve, token, data):
    """Neither in the database and its journals, nor in any other file, nor in the log of a server that was asked with it."""
    made = token("secretive")
    process = serve(environment={**WITH_TOKENS, "AQ_DATA_SERVER__LOG_LEVEL": "debug"})
    assert httpx.get(f"{process.url}/metrics", headers=bearer(made)).status_code == 200
    assert httpx.get(f"{process.url}/nothing", headers=bearer(made)).status_code == 404
    secret, seen = made["secret"].encode(), set()
    for where, content in stored(data):
        assert secret not in content, where
        assert secret.removeprefix(b"aqd_") not in content, where
        seen |= {made["id"]} if made["id"].encode() in content else set()
    assert seen == {made["id"]}, "it was looked for where tokens are kept"
    assert made["secret"] not in process.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "lab.example"])
def test_beyond_loopback_it_starts_only_with_a_token(data, host):
    """Exit 1, before it listens, with a message that says the way out."""
    command = [sys.executable, "-m", "aq_server", "serve", "--data", str(data), "--host", host, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "aq-data token create" in done.stderr
    assert str(data) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_token_that_has_ended_does_not_allow_a_start(data, token):
    """An expired and a revoked one are as if there were none."""
    token("brief", "--expires", "0s")
    assert main(["token", "revoke", token("doomed")["id"], "--data", str(data)]) == 0
    command = [sys.executable, "-m", "aq_server", "serve", "--data", str(data), "--host", "0.0.0.0", "--port", "0"]
    assert subprocess.run(command, capture_output=True, timeout=30).returncode == 1


# --- names are never paths -----------------------------------------------------------------------------------------

ADDRESSED = [
    *("..", ".", "%2e%2e", "%2E%2E%2F%2E%2E%2Fetc%2Fpasswd", "..%2f..%2fmetadata.sqlite", "%2Fetc%2Fpasswd", "..%5c..%5cx"),
    *(
        "%5cx",
        "%00",
        "a%00b",
        "x" * 5000,
        "..;",
        "%252e%252e%252fx",
        "%c0%ae%c0%ae%c0%af",
        "~root",
        "C:%5cx",
        "-rf",
        "%0d%0aX:1",
    ),
    *(
        "..%2f..%2f..%2f..%2f..%2f..%2f..%2ftmp%2fescape",
        "....//",
        "%ff%fe",
        "zarr.json",
        ".ready",
        "tombstone.json",
        "%F0%9F%92%A5",
    ),
]


@pytest.mark.parametrize("text", ADDRESSED)
def test_no_segment_of_an_address_reaches_a_path(wire, shared_data, text):
    """Whatever stands for an id, an array, a file or a key: a 4xx, nothing read, nothing made outside or inside."""
    id = save(wire, {"a": np.arange(3.0)}, [("n", b"x")])["id"]
    before, outside = kept(shared_data), around(shared_data)
    base = f"{DATAFILES}/{id}"
    for method, path in [
        *((method, f"{DATAFILES}/{text}") for method in ("GET", "PATCH", "DELETE")),
        *(("GET", f"{DATAFILES}/{text}/{rest}") for rest in ("arrays/a", "files/n", "zarr/zarr.json")),
        *(("GET", f"{base}/{room}/{text}") for room in ("arrays", "files", "zarr", "zarr/a", "zarr/a/c", "zarr/a/c/0")),
        ("GET", f"{base}/zarr/{text}/zarr.json"),
        ("PUT", f"{DATAFILES}/{text}/files/n"),
    ]:
        if path in (f"{base}/zarr/zarr.json", f"{base}/zarr/a/zarr.json"):
            continue  # those are there
        options = {"json": {"name": "x"}} if method == "PATCH" else {"content": b"x"} if method == "PUT" else {}
        answer = exactly(wire, method, path, **options)
        assert 400 <= answer.status_code < 500, (method, path[:200], answer.status_code, answer.text[:200])
    assert kept(shared_data) == before
    assert around(shared_data) == outside


@pytest.mark.parametrize("text", ADDRESSED)
def test_a_file_put_under_a_strange_name_lies_under_a_key_of_the_server(wire, shared_data, text):
    """It is refused, or stored under a key that owes nothing to the name."""
    id = save(wire, name="f")["id"]
    before = around(shared_data)
    answer = exactly(wire, "PUT", f"{DATAFILES}/{id}/files/{text}", content=b"content")
    assert answer.status_code < 500, answer.text
    new = around(shared_data) - before
    (attempt,) = {path.name for path in (blobs(shared_data) / id).iterdir()}
    files = blobs(shared_data) / id / attempt / "files"
    new = {path for path in new if path != files and not path.name.startswith("metadata.sqlite")}
    assert all(path.parent == files and re.fullmatch("[0-9a-f]{16}", path.name) for path in new), new
    if answer.status_code == 201:
        assert exactly(wire, "GET", f"{DATAFILES}/{id}/files/{text}").content == b"content"


NAMED = [
    *(
        "..",
        ".",
        "",
        "../../escape",
        "/etc/passwd",
        "a/b",
        "..\\x",
        "a\\b",
        "a\0b",
        "\n",
        "zarr.json",
        "__init__",
        "x" * 5000,
    ),
    *("\u0085", "\x7f"),
]


@pytest.mark.parametrize("text", NAMED)
def test_no_name_in_a_document_reaches_a_path(wire, shared_data, text):
    """Array names that are not one plain segment are refused as bad_name, ids that are no UUIDv7 as invalid."""
    outside = around(shared_data)
    values = np.arange(2.0)
    answer = post(wire, document_part({"arrays": [declared(text, values)]}), array_part(0, values.tobytes()))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_name")
    answer = wire.post(DATAFILES, json={"id": text})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
    assert around(shared_data) == outside


@pytest.mark.parametrize("text", ["..", ".", "../../escape", "/etc/passwd", "a/b", "..\\x", "x" * 300])
def test_no_filename_of_a_form_reaches_a_path(wire, shared_data, text):
    outside = around(shared_data)
    answer = post(wire, document_part({}), file_part(0, text, b"x"))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_name")
    assert around(shared_data) == outside


# --- hostile bodies ------------------------------------------------------------------------------------------------


def nested(depth: int, shape: str) -> str:
    return "[" * depth + "]" * depth if shape == "list" else '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("shape", ["list", "object"])
@pytest.mark.parametrize("depth", [70, 200, 400, 700, 900, 990, 5000, 200_000])
def test_deep_nesting_is_refused_everywhere(wire, depth, shape):
    """422, or 400 of a filter, never a failure of the server: in metadata, attributes, patches, filters and as the body."""
    deep = nested(depth, shape)
    json_type = {"content-type": "application/json"}
    address = f"{DATAFILES}/{save(wire, name='n')['id']}"
    for method, path, body in [
        ("POST", DATAFILES, f'{{"metadata": {{"x": {deep}}}}}'),
        ("POST", DATAFILES, f'{{"arrays": [{{"name": "a", "dtype": "<f8", "shape": [0], "attrs": {{"x": {deep}}}}}]}}'),
        ("POST", DATAFILES, f'{{"instruments": {{"x": {{"y": {deep}}}}}}}'),
        ("POST", DATAFILES, deep),
        ("PATCH", address, f'{{"metadata": {{"x": {deep}}}}}'),
        ("PATCH", address, f'{{"attrs": {{"x": {deep}}}}}'),
        ("POST", "/api/v1/search", f'{{"filter": {{"x": {deep}}}}}'),
        ("POST", "/api/v1/search", f'{{"filter": {{"x": {{"$in": [{deep}]}}}}}}'),
        ("POST", "/api/v1/search/count", f'{{"filter": {deep}}}'),
    ]:
        answer = wire.request(method, path, content=body, headers=json_type)
        assert answer.status_code in (400, 422), (method, path, body[:60], answer.status_code, answer.text[:300])
    operators = '{"filter": ' + '{"$and":[' * depth + "{}" + "]}" * depth + "}"
    negations = '{"filter": {"x": ' + '{"$not":' * depth + '{"$gt": 1}' + "}" * depth + "}}"
    for body in (operators, negations):
        answer = wire.post("/api/v1/search", content=body, headers=json_type)
        assert answer.status_code in (400, 422), answer.text[:300]
    assert wire.get(address).json()["revision"] == 1


HOSTILE_JSON = [
    '{"metadata": {"x": 1e400}}',
    '{"metadata": {"x": NaN}}',
    '{"metadata": {"x": 123456789012345678901234567890}}',
    '{"metadata": {"x": -1' + "0" * 5000 + "}}",
    '{"metadata": {"x": "\\ud800"}}',
    '{"metadata": {"\\u0000": "\\u0000"}}',
    '{"metadata": {"": {"": 1}}}',
    '{"metadata": {"a.b": {"$gt": 1}, "$where": "x"}}',
    '{"metadata": {"x": {"$literal": {"$literal": {"$float": 1}}}}}',
    '{"metadata": {"x": {"$date": "0000-00-00"}}}',
    '{"metadata": {"x": {"$date": "0001-01-01T00:00:00+14:00"}}}',
    '{"metadata": {"x": {"$date": "9999-12-31T23:59:59-14:00"}}}',
    '{"metadata": {"x": {"$complex": [1e400, 0]}}}',
    '{"metadata": {"x": {"$complex": [1' + "0" * 400 + ", 0]}}}",
    '{"metadata": {"x": {"$bytes": "!"}}}',
    '{"attrs": {"x": {"$ndarray": {"dtype": "O", "shape": [1], "data": "AAAAAAAAAAA="}}}}',
    '{"attrs": {"x": {"$ndarray": {"dtype": "<f8", "shape": [99999999999999999999], "data": ""}}}}',
    '{"attrs": {"x": {"$ndarray": {"dtype": "<f8", "shape": ["1"], "data": "AAAAAAAAAAA="}}}}',
    '{"attrs": {"x": {"$ndarray": {"dtype": [["a", "<f8"]], "shape": [], "data": ""}}}}',
    '{"attrs": {"x": {"$ndarray": {"dtype": 3, "shape": 3, "data": 3}}}}',
    '{"attrs": {"x": {"$ndarray": []}}}',
    '{"attrs": {"_FillValue": {"$ndarray": {"dtype": "<f8", "shape": [0], "data": ""}}}}',
    '{"measured_at": "0001-01-01T00:00:00+23:59"}',
    '{"measured_at": "2026-01-01T00:00:00.123456789Z"}',
    '{"derived_from": ["x"]}',
    '{"tags": ["\\u0000", "' + "t" * 10_000 + '"]}',
    '{"name": "' + "n" * 100_000 + '"}',
    "\ufeff{}",
    "[]",
    "null",
    '"x"',
    "",
    "\0",
    '{"name": "a", "name": "b"}',
]


@pytest.fixture(scope="module")
def apart():
    """A server of these documents' own: one that is kept and should not have been may stop every search after it."""
    with running(ServerConfig(memory=True, port=0)) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.mark.parametrize("body", HOSTILE_JSON)
def test_strange_documents_are_kept_exactly_or_refused(apart, body):
    """201 and they come back and stay searchable and patchable, or a 4xx: never a failure, never something else."""
    headers = {"content-type": "application/json"}
    answer = apart.post(DATAFILES, content=body.encode("utf-8", "surrogatepass"), headers=headers)
    assert answer.status_code in (201, 422), answer.text[:300]
    if answer.status_code == 201:
        address = answer.headers["location"]
        assert apart.get(address).json() == answer.json()
        assert apart.get(f"{address}/zarr/zarr.json").status_code == 200
        sent = json.loads(body.removeprefix("\ufeff"))
        for field in ("metadata", "attrs", "tags", "name"):
            assert answer.json()[field] == sent.get(field, answer.json()[field])
        assert apart.patch(address, json={"comment": "x"}).status_code == 200
    for path in ("/api/v1/search", "/api/v1/search/count"):
        for filter in (body, f'{{"x": {body}}}', f'{{"created_at": {{"$gt": {body}}}}}'):
            question = f'{{"filter": {filter}}}'.encode("utf-8", "surrogatepass")
            assert apart.post(path, content=question, headers=headers).status_code < 500, question[:200]


HOSTILE_ARRAYS = [
    *(
        {"dtype": dtype}
        for dtype in ("<M8[0s]", "<M8[99999999999999999999s]", "<M8", "<M8[fortnight]", "<U99999999999", "|S0")
    ),
    *({"dtype": dtype} for dtype in ("(2,3)f4", "", "\0", "<f8" * 1000, "V8", "|V8", "<c32", "float64", "=f8", "|T17", "é")),
    *(
        {"shape": shape}
        for shape in ([2**63], [2**62, 2**62], [10**30], [0, 10**30], [0, 2**62, 2**62], [1] * 33, [2**48 + 1])
    ),
    *({"chunks": chunks} for chunks in ([0], [-1], [1, 1], [2**62], [10**30], [])),
    *({"dims": dims} for dims in ([""], ["x" * 300], ["a", "b"], [])),
    {"shape": [0, 0], "dims": ["x", "x"]},
    {"codec": "gzip"},
    {"role": "x"},
    {"attrs": {"scale_factor": "x", "_FillValue": {"$float": "NaN"}}},
    {"attrs": {"_FillValue": 10**30}},
    {"dtype": "<i4", "attrs": {"_FillValue": {"$float": "NaN"}}},
    {"dtype": "<i4", "attrs": {"_FillValue": {"$float": "Infinity"}}},
    {"dtype": "<f4", "attrs": {"_FillValue": 10**400}},
    {"attrs": {"coordinates": 3, "_ARRAY_DIMENSIONS": ["x"]}},
]


@pytest.mark.parametrize("change", HOSTILE_ARRAYS, ids=lambda change: repr(change)[:50])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_strange_declarations_are_kept_or_refused(wire, shared_data, change):
    """Whatever is declared of an array without elements: 201 and readable, or 422 with nothing stored."""
    before = kept(shared_data)
    array = {"name": "a", "dtype": "<f8", "shape": [0], **change}
    answer = wire.post(DATAFILES, json={"arrays": [array]})
    assert answer.status_code in (201, 422), answer.text
    if answer.status_code == 422:
        assert kept(shared_data) == before
        return
    address = answer.headers["location"]
    for path in ("", "/arrays/a", "/arrays/a?format=json", "/arrays/a?format=npy", "/zarr/zarr.json", "/zarr/a/zarr.json"):
        assert wire.get(address + path).status_code == 200, path


def test_a_selection_cannot_ask_for_more_than_an_address_holds(wire):
    address = f"{DATAFILES}/{save(wire, {'a': np.arange(3.0)})['id']}/arrays/a"
    for sel in (
        "9" * 30,
        "[" + "0," * 5000 + "0]",
        "[" * 1000,
        "..." * 1000,
        "0" * 5000,
        ":" * 100,
        "-" * 100,
        "0:1:" + "9" * 19,
    ):
        assert wire.get(address, params={"sel": sel}).status_code in (200, 400, 413, 414, 431), sel[:20]


def test_compressed_and_binary_junk_is_refused(wire):
    """A body is taken as it is: what claims to be compressed is not unpacked, what is no JSON and no form is refused."""
    junk = b"\x1f\x8b\x08" + b"\0" * 100_000
    for headers in (
        {"content-type": "application/json"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "multipart/form-data; boundary=" + "x" * 5000},
        {"content-type": 'multipart/form-data; boundary="\\'},
    ):
        assert wire.post(DATAFILES, content=junk, headers=headers).status_code in (415, 422), headers


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(data: Path):
    """A server with small limits."""
    config = deployed(data, max_save_bytes=300_000, max_document_bytes=10_000)
    with running(config) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


def in_pieces(content: bytes) -> Iterator[bytes]:
    """A generator makes httpx send chunked, with no length announced."""
    for start in range(0, len(content), 10_000):
        yield content[start : start + 10_000]


@pytest.mark.parametrize("announced", [True, False])
def test_bodies_over_their_limit_are_413(narrow, data, announced):
    """Announced or not, as JSON, as a form, as the document in a form, as a patch, a filter or a file; nothing stays."""
    id = save(narrow, name="small")["id"]
    before = kept(data)
    long = json.dumps({"comment": "x" * 11_000}).encode()
    values = np.arange(40_000.0)
    small_form = narrow.build_request("POST", DATAFILES, files=[document_part(long)])
    large = [document_part({"arrays": [declared("a", values)]}), array_part(0, values.tobytes())]
    large_form = narrow.build_request("POST", DATAFILES, files=large)
    json_type = {"content-type": "application/json"}
    for method, path, content, headers in [
        ("POST", DATAFILES, long, json_type),
        ("POST", DATAFILES, small_form.read(), {"content-type": small_form.headers["content-type"]}),
        ("POST", DATAFILES, large_form.read(), {"content-type": large_form.headers["content-type"]}),
        ("PATCH", f"{DATAFILES}/{id}", long, json_type),
        ("POST", "/api/v1/search", b'{"filter": {"x": "' + b"x" * 11_000 + b'"}}', json_type),
        ("POST", "/api/v1/search/count", b'{"filter": {"x": "' + b"x" * 11_000 + b'"}}', json_type),
        ("PUT", f"{DATAFILES}/{id}/files/large", b"x" * 300_001, {}),
    ]:
        body = content if announced else in_pieces(content)
        answer = narrow.request(method, path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large"), (method, path, answer.text)
        assert "limit" in answer.json()["detail"]
    left = {path for path in kept(data) - before if not path.endswith("/files")}
    assert left == set()
    assert narrow.get(f"{DATAFILES}/{id}").json()["revision"] == 1


def test_what_is_announced_too_large_is_refused_before_it_comes(narrow):
    """The answer does not wait for a body that may take hours."""
    host, port = narrow.base_url.host, narrow.base_url.port
    with socket.create_connection((host, port), timeout=10) as raw:
        head = f"POST {DATAFILES} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {10**12}\r\n\r\n".encode())
        assert b" 413 " in raw.recv(4096).split(b"\r\n")[0]


def test_what_is_declared_too_large_takes_no_room(narrow, data):
    """An array declared beyond the limit is refused by its declaration: no buffer is set aside for what cannot come."""
    document = {"arrays": [{"name": "a", "dtype": "<f8", "shape": [1, 1 << 31]}]}
    answer = post(narrow, document_part(document), array_part(0, b"12345678"))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert kept(data) == set()


def test_many_tiny_parts_are_refused(own, data):
    """More parts than the limit are a 4xx, and none of them stays."""
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="array:%d"\r\n\r\n\r\n' % (i % 100_000) for i in range(5000)
    )
    document = {"arrays": [{"name": f"a{i}", "dtype": "<f8", "shape": [0]} for i in range(5000)]}
    head = b'--b\r\nContent-Disposition: form-data; name="document"\r\n\r\n' + json.dumps(document).encode() + b"\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = own.post(DATAFILES, content=head + body + b"--b--\r\n", headers=headers)
    assert answer.status_code in (413, 422), answer.text
    assert kept(data) == set()


def test_a_client_that_leaves_in_the_middle_leaves_nothing(own, data):
    """The connection breaks after half of the values: what was stored is undone."""
    values = np.random.default_rng(0).random(600_000)
    document = {"id": new_id(), "arrays": [declared("a", values, chunks=[10_000])]}
    request = own.build_request("POST", DATAFILES, files=[document_part(document), array_part(0, values.tobytes())])
    content = request.read()
    with socket.create_connection((own.base_url.host, own.base_url.port), timeout=10) as raw:
        head = f"POST {DATAFILES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {request.headers['content-type']}\r\n"
        raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[: len(content) // 2])
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and own.get("/healthz").status_code == 200:
            # Everything sent has been read when the server sits idle on the half-sent body.
            if _unread(raw) == 0:
                break
            time.sleep(0.02)
    deadline = time.monotonic() + 10
    while kept(data) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert kept(data) == set()
    assert own.get(f"{DATAFILES}/{document['id']}").status_code == 404
    assert post(own, document_part(document), array_part(0, values.tobytes())).status_code == 201


def _half_written(http: httpx.Client, chunk: int) -> httpx.Response:
    """A save refused for its length while many or large chunks of it are on their way to the disk."""
    values = np.random.default_rng(1).random(5_000_000)
    document = {"arrays": [{"name": "a", "dtype": "<f8", "shape": [6_000_000], "chunks": [chunk]}]}
    return post(http, document_part(document), array_part(0, values.tobytes()))


@pytest.mark.parametrize("chunk", [2_000, 100_000, 1_000_000])
def test_a_save_refused_while_it_is_written_leaves_nothing(data, chunk):
    """Nothing goes on writing behind the refusal: when the answer has come, and when the server has ended, all is gone."""
    with running(deployed(data)) as url, httpx.Client(base_url=url, timeout=60) as http:
        for _ in range(2):
            answer = _half_written(http, chunk)
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
            assert kept(data) == set()
    assert kept(data) == set()


def test_refused_saves_do_no_harm_to_others(data, capsys):
    """While some are refused half-written others are saved: `verify` finds every byte of those as it was sent."""
    values = np.random.default_rng(0).random(200_000)
    with running(deployed(data)) as url:
        over, refused = threading.Event(), []

        def keep_failing() -> None:
            with httpx.Client(base_url=url, timeout=60) as http:
                for _ in range(4):
                    refused.append(_half_written(http, 20_000).status_code)
            over.set()

        thread = threading.Thread(target=keep_failing)
        thread.start()
        with httpx.Client(base_url=url, timeout=60) as http:
            document = {"arrays": [declared("a", values, chunks=[20_000], codec="none")]}
            while not over.is_set():
                assert post(http, document_part(document), array_part(0, values.tobytes())).status_code == 201
        thread.join()
    assert refused == [422] * 4
    assert main(["verify", "--data", str(data), "--json"]) == 0
    kinds = {json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()}
    assert kinds <= {"orphan"}, "what refused saves may leave is another test's matter"


def _unread(connection: socket.socket) -> int:
    """Bytes sent that the other side's kernel has not acknowledged."""
    import array
    import fcntl

    count = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), 0x5411, count)  # SIOCOUTQ
    return count[0]


class _Peak:
    """The greatest resident memory of a process while the block runs, in bytes; without pages of files."""

    def __init__(self, pid: int) -> None:
        self._process, self._over = psutil.Process(pid), threading.Event()
        self.start = self.peak = self._now()
        self._thread = threading.Thread(target=self._watch)

    def _now(self) -> int:
        memory = self._process.memory_info()
        return memory.rss - memory.shared

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, self._now())

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.start


def _form_of(rows: int, document: dict) -> Iterator[bytes]:
    """A save of `rows` MB of values, made while it is sent."""
    block = np.random.default_rng(5).integers(0, 50, 1 << 17).astype("<f8").tobytes()
    yield b'--b\r\nContent-Disposition: form-data; name="document"\r\n\r\n' + json.dumps(document).encode()
    yield b'\r\n--b\r\nContent-Disposition: form-data; name="array:0"\r\n\r\n'
    for _ in range(rows):
        yield block
    yield b"\r\n--b--\r\n"


@pytest.mark.parametrize("shape", [(300 << 7, 1 << 10), (300, 1 << 17)], ids=["tall", "wide"])
def test_memory_stays_bounded_while_300_mb_are_refused_saved_and_read(serve, data, shape):
    """Neither a save that turns out too large after 310 MB, nor a large save, nor reading it costs over 250 MB.

    What is mapped from files is not counted: a wide array waits in a scratch file until its chunks are complete.
    """
    process = serve(environment={"AQ_DATA_SERVER__MAX_SAVE_BYTES": str(310 << 20)})
    headers = {"content-type": "multipart/form-data; boundary=b"}

    def document(rows: int) -> dict:
        return {"arrays": [{"name": "a", "dtype": "<f8", "shape": [rows, shape[1]]}]}

    with httpx.Client(base_url=process.url, timeout=120) as http:
        save(http, {"warm": np.zeros((30, 1 << 17))})
        with _Peak(process.process.pid) as refusing:
            refused = http.post(DATAFILES, content=_form_of(312, document(shape[0] * 2)), headers=headers)
        assert refused.status_code == 413
        with _Peak(process.process.pid) as saving:
            saved = http.post(DATAFILES, content=_form_of(300, document(shape[0])), headers=headers)
        assert saved.status_code == 201
        array = f"{saved.headers['location']}/arrays/a"
        with _Peak(process.process.pid) as reading, http.stream("GET", array) as answer:
            size = sum(len(piece) for piece in answer.iter_raw(1 << 20))
        assert size == 300 << 20
    growth = [peak.growth >> 20 for peak in (refusing, saving, reading)]
    assert max(growth) < 250, growth
    assert len(list(blobs(data).glob("[0-9a-f]*"))) == 2


def test_quoting_of_what_a_client_sent_stays_short(wire):
    """A message does not send megabytes back."""
    for answer in (
        wire.get(f"{DATAFILES}/{'x' * 3000}"),
        wire.post("/api/v1/search", json={"filter": {"x": {"$" + "y" * 5000: 1}}}),
        wire.post("/api/v1/search", json={"sort": "x" * 5000}),
        wire.get(f"{DATAFILES}/{save(wire, name='q')['id']}/arrays/{quote('n' * 3000)}"),
    ):
        assert 400 <= answer.status_code < 500
        assert len(answer.json()["detail"]) < 1000
