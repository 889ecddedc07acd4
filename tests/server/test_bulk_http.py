"""Many DataFiles in one request: each fares as it would alone, in order, and none hides another."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from aq_server.commands.serving import running
from forms import DATAFILES, new_id
from hypothesis import given, settings
from hypothesis import strategies as st
from services.deployment import deployed

from aq_data.wire.routes import BULK, BULK_BYTES, BULK_DELETE, BULK_GET, BULK_ITEMS

NDJSON = {"Content-Type": "application/x-ndjson"}


def results(answer: httpx.Response) -> list[dict]:
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def statuses(answer: httpx.Response) -> list[int]:
    return [result["status"] for result in results(answer)]


def lines(items: list) -> bytes:
    return b"\n".join(item if isinstance(item, bytes) else json.dumps(item).encode() for item in items)


def count(wire: httpx.Client, **filter) -> int:
    return wire.post("/api/v1/search/count", json={"filter": filter}).json()["count"]


def test_each_item_has_its_result_in_order(wire):
    """Good, wrong, known and contradicting items side by side: what a single save would answer to each."""
    known, taken = new_id(), new_id()
    for id in (known, taken):
        assert wire.post(DATAFILES, json={"id": id, "name": "before"}).status_code == 201
    items = [
        {"id": new_id(), "name": "good"},
        {"name": 5},
        {"id": known, "name": "before"},
        {"id": taken, "name": "other"},
        17,
        {"id": "no-uuid"},
        {"name": "no id"},
        {"nam": "unknown field"},
        {"arrays": [{"name": "a", "dtype": "<f8", "shape": [3]}]},
        {"metadata": {"$float": "NaN"}},
    ]
    got = results(wire.post(BULK, json=items))
    assert [result["status"] for result in got] == [201, 422, 200, 409, 422, 422, 201, 422, 422, 422]
    assert [result["error"]["code"] for result in got if "error" in result] == [
        *("invalid", "id_taken", "invalid", "invalid", "invalid", "invalid", "invalid")
    ]
    assert (got[0]["document"]["name"], got[2]["document"]["revision"], got[6]["document"]["name"]) == ("good", 1, "no id")
    for item, result in zip(items, got, strict=True):
        if result["status"] < 300:
            assert wire.get(f"{DATAFILES}/{result['document']['id']}").json() == result["document"]
        else:
            alone = wire.post(DATAFILES, json=item)
            assert (alone.status_code, alone.json()["code"]) == (result["status"], result["error"]["code"]), item
            assert result["error"]["type"] == f"urn:aq-data:error:{result['error']['code']}"
            assert result["error"]["request_id"]


def test_a_repeated_request_changes_nothing(wire):
    """All are 200 the second time, with the same documents."""
    items = [{"id": new_id(), "name": f"n{i}", "project": "repeated"} for i in range(70)]
    first, again = (results(wire.post(BULK, json=items)) for _ in range(2))
    assert {result["status"] for result in first} == {201}
    assert {result["status"] for result in again} == {200}
    assert [result["document"] for result in first] == [result["document"] for result in again]
    assert [result["document"]["name"] for result in first] == [item["name"] for item in items]
    assert count(wire, project="repeated") == 70


def test_the_same_request_from_many_at_once_saves_each_once(wire):
    items = [{"id": new_id(), "name": f"n{i}", "project": "raced"} for i in range(50)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: results(wire.post(BULK, json=items)), range(4)))
    for place in zip(*answers, strict=True):
        assert sorted(result["status"] for result in place) == [200, 200, 200, 201]
        assert len({json.dumps(result["document"]) for result in place}) == 1
    assert count(wire, project="raced") == 50


def test_a_line_that_is_no_json_is_one_failure(wire):
    """In NDJSON each line stands for itself; empty lines are none."""
    body = lines([{"name": "a"}, b"{broken", b"", b"  ", {"name": "b"}, b"\xff\xfe", b'{"metadata": ' + b"[" * 500])
    got = results(wire.post(BULK, content=body + b"\r\n", headers=NDJSON))
    assert [result["status"] for result in got] == [201, 422, 201, 422, 422]
    assert "not valid JSON" in got[1]["error"]["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"{}", b'"x"', b"[{}", b"[1,]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_list_is_refused_as_a_whole(wire, body):
    """Nothing of it is done."""
    before = count(wire)
    for method, address in (("POST", BULK), ("PATCH", BULK), ("POST", BULK_DELETE), ("POST", BULK_GET)):
        answer = wire.request(method, address, content=body, headers={"Content-Type": "application/json"})
        if address == BULK_GET and body == b"{}":
            assert "ids" in answer.json()["detail"]
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid"), (method, address)
    assert count(wire) == before


def test_the_limits_are_named(wire):
    """Too many items or bytes: 413 that says how many may come, and nothing is saved."""
    before = count(wire)
    many = [{}] * (BULK_ITEMS + 1)
    for answer in (
        wire.post(BULK, json=many),
        wire.post(BULK, content=lines(many), headers=NDJSON),
        wire.patch(BULK, json=many),
        wire.post(BULK_DELETE, json=many),
        wire.post(BULK_GET, json={"ids": ["x"] * (BULK_ITEMS + 1)}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert str(BULK_ITEMS) in answer.json()["detail"]
        assert answer.json()["details"]["limit"] == BULK_ITEMS
    answer = wire.post(BULK, content=b"[" + b" " * BULK_BYTES + b"]", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["details"]["limit"]) == (413, BULK_BYTES)
    assert wire.post(BULK, content=b"[]", headers={"Content-Type": "text/plain"}).status_code == 415
    assert count(wire) == before
    assert results(wire.post(BULK, json=[])) == []
    assert results(wire.post(BULK, content=b"\n", headers=NDJSON)) == []


def test_one_item_over_the_limit_of_a_document_fails_alone(data):
    with running(deployed(data, max_document_bytes=1000)) as url:
        items = [{"name": "small"}, {"comment": "x" * 2000}, {"name": "small"}]
        got = results(httpx.post(f"{url}{BULK}", json=items))
    assert [result["status"] for result in got] == [201, 413, 201]
    assert "1000" in got[1]["error"]["detail"]


def test_documents_are_read_in_order(wire):
    """Whole or in parts; what is missing, deleted or asked for twice is answered in its place."""
    ids = [result["document"]["id"] for result in results(wire.post(BULK, json=[{"name": f"r{i}"} for i in range(20)]))]
    assert wire.delete(f"{DATAFILES}/{ids[3]}").status_code == 204
    asked = [*reversed(ids), ids[0], new_id(), "x", ids[0].upper()]
    got = results(wire.post(BULK_GET, json={"ids": asked}))
    assert [result["status"] for result in got] == [404 if i == 16 else 200 for i in range(20)] + [200, 404, 404, 200]
    assert (got[16]["error"]["code"], got[21]["error"]["code"]) == ("deleted", "not_found")
    for id, result in zip(asked, got, strict=True):
        if result["status"] == 200:
            assert result["document"] == wire.get(f"{DATAFILES}/{id}").json()
    parts = results(wire.post(BULK_GET, json={"ids": ids[:1], "fields": ["name", "arrays", "metadata.chip"]}))
    assert parts == [{"status": 200, "document": {"id": ids[0], "name": "r0", "arrays": []}}]
    assert wire.post(BULK_GET, json={"ids": [], "fields": [""]}).status_code == 400


def test_changes_of_one_id_are_made_in_order(wire):
    """Also with revisions that only fit when each waits for the one before; a stale one fails alone."""
    id, other = (result["document"]["id"] for result in results(wire.post(BULK, json=[{}, {}])))
    items = [{"id": id, "patch": {"metadata": {"n": n}}, "revision": n} for n in range(1, 6)]
    items.insert(3, {"id": other, "patch": {"comment": "meanwhile"}})
    items += [{"id": id, "patch": {"comment": "late"}, "revision": 2}, {"id": id, "patch": {"flag": "red"}}]
    got = results(wire.patch(BULK, json=items))
    assert [result["status"] for result in got] == [200] * 6 + [412, 200]
    assert got[6]["error"]["details"]["revision"] == 6
    assert got[-1]["document"] == wire.get(f"{DATAFILES}/{id}").json()
    assert (got[-1]["document"]["metadata"], got[-1]["document"]["revision"]) == ({"n": 5}, 7)
    assert got[3]["document"]["comment"] == "meanwhile"


def test_wrong_changes_fail_alone(wire):
    id = results(wire.post(BULK, json=[{}]))[0]["document"]["id"]
    items = [
        {"id": id, "patch": {"flag": "mauve"}},
        {"id": id},
        {"id": id, "patch": {"arrays": []}},
        {"id": id, "patch": {"id": "x"}},
        {"id": new_id(), "patch": {}},
        {"id": id, "patch": {}, "revison": 3},
        {"id": id, "patch": {"comment": "good"}},
    ]
    assert statuses(wire.patch(BULK, json=items)) == [422, 422, 409, 422, 404, 422, 200]
    assert statuses(wire.patch(BULK, content=lines(items), headers=NDJSON)) == [422, 422, 409, 422, 404, 422, 200]
    assert wire.get(f"{DATAFILES}/{id}").json()["comment"] == "good"


def test_deletes_leave_tombstones(wire):
    """Once each; with a revision only that one."""
    ids = [result["document"]["id"] for result in results(wire.post(BULK, json=[{"project": "gone"}] * 40))]
    items = [*({"id": id} for id in ids[:-1]), {"id": ids[0]}, {"id": ids[-1], "revision": 2}, {"id": new_id()}, {}]
    got = results(wire.post(BULK_DELETE, json=items))
    assert [result["status"] for result in got] == [204] * 39 + [404, 412, 404, 422]
    assert got[0] == {"status": 204}
    assert got[39]["error"]["code"] == "deleted"
    assert count(wire, project="gone") == 1
    assert wire.get(f"{DATAFILES}/{ids[-1]}").status_code == 200


def test_bulk_is_no_id(wire):
    """405 with what is allowed at the address, and OPTIONS agrees; what only asks is counted under its own name."""
    for method in ("GET", "DELETE", "PUT"):
        answer = wire.request(method, BULK)
        assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, {"POST", "PATCH", "OPTIONS"})
    assert set(wire.options(BULK).headers["allow"].split(", ")) == {"POST", "PATCH", "OPTIONS"}
    wire.post(BULK_GET, json={"ids": []})
    assert 'route="/datafiles/bulk/get"' in wire.get("/metrics").text


ITEMS = st.sampled_from(["new", "same", "other", "wrong", "twice"])


@settings(max_examples=settings().max_examples // 4)
@given(st.lists(ITEMS, max_size=80))
def test_a_bulk_save_equals_single_saves(wire, plan):
    """Whatever the items: status and content of each are those of saving them one after the other."""
    numbers = itertools.count()
    ids = [new_id() for _ in range(3)]

    def item(kind: str, own: list[str]) -> object:
        n = next(numbers)
        return {
            "new": {"name": f"n{n}"},
            "same": {"id": own[0], "name": "same"},
            "other": {"id": own[1], "name": f"n{n}"},
            "wrong": {"name": n},
            "twice": {"id": own[2], "metadata": {"n": n % 2}},
        }[kind]

    items = [item(kind, ids) for kind in plan]
    got = results(wire.post(BULK, json=items))
    fresh = dict(zip(ids, [new_id() for _ in ids], strict=True))
    for sent, result in zip(items, got, strict=True):
        alone = wire.post(DATAFILES, json={**sent, "id": fresh[sent["id"]]} if "id" in sent else sent)
        assert alone.status_code == result["status"]
        if result["status"] < 300:
            left, right = result["document"], alone.json()
            assert {key: left[key] for key in ("name", "metadata")} == {key: right[key] for key in ("name", "metadata")}
