"""The OpenAPI document is true: every answer of a real server conforms to it, and the page about it needs no network."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import numpy as np
import pytest
from forms import DATAFILES, save

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,unsupported_method,allow_header_conformance"
)


@pytest.mark.parametrize("phase", ["coverage", "fuzzing"])
def test_schemathesis_finds_no_answer_beside_the_document(own, phase, tmp_path):
    """No 5xx, no undocumented status, the documented content types and headers, 405 with Allow."""
    id = save(own, {"a": np.arange(6.0).reshape(2, 3)}, [("a", b"note")], name="x", metadata={"chip": "C7"})["id"]
    # Fuzzing goes to a DataFile that is there, so that requests reach what lies behind the first look-up.
    (tmp_path / "schemathesis.toml").write_text(
        ""
        if phase == "coverage"
        else f'[parameters]\n"path.datafile_id" = "{id}"\n"path.name" = "a"\n"path.key" = "a/c/0/0"\n'
    )
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(tmp_path / "schemathesis.toml")),
        *("run", f"{own.base_url}/docs/openapi.json", "--phases", phase, "--checks", CHECKS, "--seed", "7"),
        *("--max-examples", "12", "--continue-on-failure", "--suppress-health-check", "all", "--no-shrink"),
        *("--warnings", "off", "--generation-deterministic"),
        # A stream of events ends only when its reader goes: once, in the first phase, is enough.
        *([] if phase == "coverage" else ["--exclude-method", "DELETE", "--exclude-path-regex", "events$"]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None
    assert int(generated[1]) > 50


def test_every_route_is_described(wire):
    """An operationId of its own, a summary, its refusals as problem documents, and a tag."""
    document = wire.get("/docs/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    seen = set()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            where = f"{method} {path}"
            assert re.fullmatch(r"[a-z][A-Za-z]+", operation["operationId"]), where
            assert operation["operationId"] not in seen, where
            seen.add(operation["operationId"])
            assert operation["summary"], where
            assert operation["tags"], where
            refusals = {status for status in operation["responses"] if status.startswith(("4", "5"))}
            assert {"401", "403", "429", "500", "503"} <= refusals, where
            for status in refusals - ({"503"} if path == "/readyz" else set()):
                assert list(operation["responses"][status]["content"]) == ["application/problem+json"], where
            for status, answer in operation["responses"].items():
                assert answer["description"], (where, status)
            for parameter in operation.get("parameters", []):
                assert parameter["schema"], where
    assert {"saveDataFile", "getDataFile", "patchDataFile", "deleteDataFile", "readArray", "readZarrKey"} <= seen
    assert {"getFile", "putFile", "search", "count", "distinct", "health", "ready", "metrics"} <= seen


def test_every_reference_inside_the_document_leads_somewhere(wire):
    document = wire.get("/docs/openapi.json").json()
    for reference in re.findall(r'"\$ref":\s*"([^"]+)"', wire.get("/docs/openapi.json").text):
        node = document
        assert reference.startswith("#/"), reference
        for segment in reference[2:].split("/"):
            node = node[segment.replace("~1", "/").replace("~0", "~")]


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset") and value]


@pytest.mark.parametrize("address", ["/", "/docs", "/docs/", "/docs/nothing"])
def test_the_page_fetches_nothing_from_elsewhere(wire, address):
    """No script, style, image or link of another origin; what it links to is there."""
    answer = wire.get(address, follow_redirects=True)
    if address == "/docs/nothing":
        assert answer.status_code == 404
        if not answer.headers["content-type"].startswith("text/html"):
            return
    else:
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, "text/html")
        for path in wire.get("/docs/openapi.json").json()["paths"]:
            assert path in answer.text, path
    links = _Links()
    links.feed(answer.text)
    own_origin = urlsplit(str(wire.base_url)).netloc
    for link in links.found:
        absolute = urljoin(str(answer.url), link)
        assert urlsplit(absolute).netloc == own_origin, link
        assert wire.get(absolute, follow_redirects=True).status_code == 200, link
    assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", answer.text)
    assert not re.search(r"<(script|link|img|iframe)[^>]+https?://", answer.text)


def test_descriptions_cannot_break_out_of_the_page(wire):
    """Text of the document is escaped, and a strange Host does not become markup."""
    page = wire.get("/docs", headers={"Host": "localhost"})
    assert "<script" not in page.text
    refused = wire.get("/docs", headers={"Host": "localhost:1'\"><script>"})
    assert "<script" not in refused.text or refused.headers["content-type"] == "application/problem+json"


def test_the_document_shows_a_request_that_works(wire):
    """The examples in the document are accepted as they stand."""
    paths = wire.get("/docs/openapi.json").json()["paths"]
    tried = 0
    for path in (DATAFILES, "/api/v1/search", "/api/v1/search/distinct"):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for example in [schema["example"]] if "example" in schema else schema.get("examples", []):
            tried += 1
            assert wire.post(path, json=example).status_code in (200, 201), path
    assert tried >= 3
