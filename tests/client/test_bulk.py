"""Many saves, reads, changes and deletes from Python: one result per item, in order."""

from __future__ import annotations

import math
import os
import threading
from datetime import UTC, datetime

import httpx
import numpy as np
import pytest
from aq_server.__main__ import main

import aq_data
from aq_data.client.http import Http
from aq_data.errors import (
    AuthenticationError,
    ConflictError,
    NotFoundError,
    StaleRevisionError,
    UnavailableError,
    ValidationError,
)
from aq_data.models.datafile import make_id
from aq_data.wire.routes import BULK_DELETE


def new_id() -> str:
    return make_id(1, os.urandom(10))


def test_every_item_has_a_result(client):
    """Metadata, arrays, files and mistakes of every kind, each in its place; what was saved is what `save` saves."""
    taken = client.save(name="taken").id
    when = datetime(2026, 1, 3, 8, tzinfo=UTC)
    items = [
        {"name": "plain", "measured_at": when, "metadata": {"z": 1 + 2j, "t": math.nan}},
        {"name": "arrays", "dataset": {"iq": np.arange(6.0).reshape(2, 3)}},
        {"name": "file", "files": {"note.txt": b"x"}},
        {"nam": "unknown"},
        {"name": 5},
        {"id": taken, "name": "else"},
        {"metadata": {"x": object()}},
        "no dict",
        {1: 2},
        {"dataset": {"a": np.array([object()])}},
        {"name": "last"},
    ]
    results = client.save_many(items)
    assert [type(result.error) for result in results] == [
        *(type(None), type(None), type(None), ValidationError, ValidationError, ConflictError),
        *(ValidationError, ValidationError, ValidationError, ValidationError, type(None)),
    ]
    for item, result in zip(items, results, strict=True):
        if result.error is None:
            assert client.get(result.id).name == result.file.name == item["name"]
        else:
            assert result.file is None
    assert results[0].file.measured_at == "2026-01-03T08:00:00.000000Z"
    assert (results[0].file.metadata["z"], math.isnan(results[0].file.metadata["t"])) == (1 + 2j, True)
    np.testing.assert_array_equal(results[1].file["iq"][...], items[1]["dataset"]["iq"])
    assert results[2].file.read_file("note.txt") == b"x"
    assert results[5].error.code == "id_taken"
    assert results[5].id == taken
    assert client.count() == 5


def test_an_item_of_any_kind_of_mistake_leaves_the_others_alone(client, tmp_path):
    """Also one whose file vanishes when it is about to be sent: it has its own error, naming what was wrong."""
    path = tmp_path / "vanishing"
    path.write_bytes(b"x")

    class Vanishing(dict):
        def items(self):
            yield "vanishing", path
            path.unlink()

    results = client.save_many(
        [
            {"name": "first"},
            {"dataset": {"texts": np.array(["\ud800"], object)}},
            {"dataset": {"a": (("\ud800",), np.zeros(3))}},
            {"dataset": {"a": np.zeros(3)}, "chunks": {"a": ("x",)}},
            {"dataset": {"a": np.zeros(3)}, "chunks": {"a": 3}},
            {"dataset": {"a": np.zeros(3)}, "chunks": {"a": (math.inf,)}},
            {"dataset": {"a": np.zeros(3)}, "chunks": 5},
            {"name": "\ud800"},
            {"store": "\ud800"},
            {"files": {"\ud800": b""}},
            {"files": Vanishing()},
            {"name": "last"},
        ]
    )
    assert [results[i].error for i in (0, -1)] == [None, None]
    for result, named in zip(results[1:6], ("'texts'", "surrogate", "chunks", "chunks", "chunks"), strict=True):
        assert named in str(result.error)
    assert all(isinstance(result.error, ValidationError) for result in results[1:-1]), results
    (_, failed) = client.update_many([{"id": results[0].id, "patch": {"name": "1st"}}, {"id": "\ud800", "patch": {}}])
    assert isinstance(failed.error, ValidationError)
    assert client.get(results[0].id).name == "1st"


def test_more_than_the_server_takes_at_once_goes_in_several_requests(client, monkeypatch):
    """By number and by bytes; a document too large to share a request goes alone. Order of saving is the order given."""
    monkeypatch.setattr("aq_data.client.bulk.BULK_ITEMS", 7)
    monkeypatch.setattr("aq_data.client.bulk.BULK_BYTES", 5000)
    sizes = [10, 10, 4500, 10, 6000, 2000, 2000, *[10] * 20]
    results = client.save_many({"name": f"n{i:02}", "comment": "x" * size} for i, size in enumerate(sizes))
    assert [result.error for result in results] == [None] * len(sizes)
    assert [result.file.name for result in results] == [f"n{i:02}" for i in range(len(sizes))]
    assert [file.name for file in client.search(sort="created_at")] == [f"n{i:02}" for i in range(len(sizes))]
    ids = [result.id for result in results]
    assert [result.file.id for result in client.get_many(reversed(ids))] == ids[::-1]
    changed = client.update_many({"id": id, "patch": {"flag": "red"}} for id in ids)
    assert {result.file.flag for result in changed} == {"red"}
    assert [(result.id, result.file, result.error) for result in client.delete_many(ids)] == [(id, None, None) for id in ids]
    assert client.count() == 0
    assert client.save_many([]) == client.get_many([]) == client.update_many([]) == client.delete_many([]) == []


def test_changes_fail_one_by_one(client):
    """A stale revision, an unknown id and a wrong patch stand beside the changes that were made."""
    one, two = (result.id for result in client.save_many([{}, {}]))
    results = client.update_many(
        [
            {"id": one, "patch": {"comment": "a", "measured_at": datetime(2026, 1, 1, tzinfo=UTC)}},
            {"id": one, "patch": {"comment": "b"}, "revision": 2},
            {"id": two, "patch": {"comment": "c"}, "revision": 9},
            {"id": new_id(), "patch": {}},
            {"id": two, "patch": {"color": "red"}},
            {"id": two},
            {"patch": {}},
            {"id": two, "patch": {"metadata": {"x": np.int32(3)}}},
        ]
    )
    kinds = [type(result.error) for result in results]
    none = type(None)
    assert kinds == [
        *(none, none, StaleRevisionError, NotFoundError, ValidationError, ValidationError, ValidationError, none)
    ]
    assert results[2].error.details == {"revision": 1}
    assert (client.get(one).comment, client.get(one).measured_at) == ("b", "2026-01-01T00:00:00.000000Z")
    assert (client.get(two).comment, client.get(two).metadata) == ("", {"x": 3})


def test_reads_and_deletes_fail_one_by_one(client):
    ids = [result.id for result in client.save_many([{"name": f"n{i}"} for i in range(5)])]
    assert [type(result.error) for result in client.delete_many([ids[0], new_id(), ids[0], ids[1]])] == [
        *(type(None), NotFoundError, NotFoundError, type(None))
    ]
    got = client.get_many([ids[0], ids[2], "nobody", ids[4]])
    assert [result.error.code if result.error else result.file.name for result in got] == [
        *("deleted", "n2", "not_found", "n4")
    ]


class Between(httpx.BaseTransport):
    """Passes requests on; drops the answers that `loses` names."""

    def __init__(self, loses) -> None:
        self.inner, self.loses, self.seen = httpx.HTTPTransport(), loses, []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self.inner.handle_request(request)
        self.seen.append(request.url.path)
        if self.loses(request, len(self.seen)):
            response.read()
            response.close()
            raise httpx.ReadError("the answer was lost", request=request)
        return response

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def losing(server, monkeypatch):
    """A client between which and the server answers get lost."""
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.001)
    with aq_data.connect(server) as client:
        plain = client._http

        def make(loses) -> aq_data.Client:
            client._http = Http(httpx.Client(base_url=server, transport=Between(loses)))
            return client

        yield make
        client._http.client.close()
        client._http = plain


def test_a_lost_answer_is_no_second_save(losing):
    """The request is repeated with the same ids: saved once, told as success. So is a delete."""
    client = losing(lambda request, n: n in (1, 4))
    results = client.save_many([{"name": "a"}, {"name": 5}, {"name": "b"}])
    assert [result.error is None for result in results] == [True, False, True]
    assert client.count() == 2
    ids = [result.id for result in results if result.file]
    assert [result.error for result in client.delete_many(ids)] == [None, None]
    assert client._http.client._transport.seen.count(BULK_DELETE) == 2


def test_what_could_not_be_sent_says_so(losing, monkeypatch):
    """The server goes away between two requests: earlier items are saved, later ones have the error; none is missing."""
    monkeypatch.setattr("aq_data.client.bulk.BULK_ITEMS", 2)
    client = losing(lambda request, n: n > 1)
    results = client.save_many([{"name": f"n{i}"} for i in range(7)])
    assert [result.error is None for result in results] == [True] * 2 + [False] * 5
    assert all(isinstance(result.error, UnavailableError) for result in results[2:])
    assert len(client._http.client._transport.seen) == 1 + 5, "one request was tried again, those behind it were not sent"


def test_a_refused_token_is_the_error_of_every_item(serve, data, capsys):
    assert main(["token", "create", "someone", "--data", str(data)]) == 0
    server = serve(environment={"AQ_DATA_SERVER__REQUIRE_TOKEN": "true"})
    with aq_data.connect(server.url, token="aqd_wrong") as client:
        results = client.save_many([{"name": "a"}, {"name": "b"}])
    assert [type(result.error) for result in results] == [AuthenticationError] * 2


def test_many_at_once_lose_nothing(client):
    """Four threads save at the same time; all is found."""
    found: list[list] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(client.save_many([{"name": f"{n}-{i}"} for i in range(40)])))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result.error is None for results in found for result in results)
    assert client.count() == 160
    assert {file.name for file in client.search(limit=None)} == {f"{n}-{i}" for n in range(4) for i in range(40)}
