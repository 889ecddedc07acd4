"""Comparing and history over HTTP: who is named, who may, what is refused; and the commands of the command line."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import httpx
import pytest
from aq_server.__main__ import main
from forms import DATAFILES, new_id, save
from services.deployment import lose_database, opened

import aq_data
from aq_data.errors import ForbiddenError

COMPARE = f"{DATAFILES}/compare"


def patch(http: httpx.Client, id: str, **fields: object) -> int:
    answer = http.patch(f"{DATAFILES}/{id}", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["revision"]


# --- answers -----------------------------------------------------------------------------------------------------------


def test_the_answers_are_as_documented(wire):
    """Nothing there is an absent member, null is null; units stand beside."""
    power = {"vna": {"settings": {"power": {"value": -30, "unit": "dBm"}}}}
    one = save(wire, name="a", instruments=power, metadata={"x": None})["id"]
    two = save(wire, name="a", instruments={"vna": {"settings": {"power": {"value": -20, "unit": "dBm"}}}})["id"]
    answer = wire.get(f"{DATAFILES}/{one}/diff/{two}")
    path = "instruments.vna.settings.power.value"
    assert answer.json() == {
        "before": one,
        "after": two,
        "differences": [
            {"path": path, "before": -30, "after": -20, "before_unit": "dBm", "after_unit": "dBm"},
            {"path": "metadata.x", "before": None},
        ],
    }
    assert wire.post(COMPARE, json={"ids": [one, two]}).json() == {
        "ids": [one, two],
        "variations": [
            {"path": path, "values": [{"value": -30, "unit": "dBm"}, {"value": -20, "unit": "dBm"}]},
            {"path": "metadata.x", "values": [{"value": None}, {}]},
        ],
    }
    patch(wire, one, comment="good")
    changes = wire.get(f"{DATAFILES}/{one}/revisions").json()
    at = wire.get(f"{DATAFILES}/{one}").json()["updated_at"]
    difference = {"path": "comment", "before": "", "after": "good"}
    assert changes == {"items": [{"revision": 2, "at": at, "actor": "", "differences": [difference]}], "next": None}


def test_revisions_are_paged(wire):
    id = save(wire, metadata={"n": 0})["id"]
    for n in range(1, 6):
        patch(wire, id, metadata={"n": n})
    found, before = [], ""
    while before is not None:
        page = wire.get(f"{DATAFILES}/{id}/revisions?limit=2{before}").json()
        found += [each["revision"] for each in page["items"]]
        before = f"&before={page['next']}" if page["next"] is not None else None
    assert found == [6, 5, 4, 3, 2]


def test_an_old_revision_has_its_own_etag(wire):
    id = save(wire)["id"]
    patch(wire, id, comment="x")
    old = wire.get(f"{DATAFILES}/{id}?revision=1")
    assert (old.status_code, old.headers["ETag"], old.json()["comment"]) == (200, '"1"', "")
    assert wire.get(f"{DATAFILES}/{id}?revision=2").content == wire.get(f"{DATAFILES}/{id}").content


def test_going_back_heeds_if_match(wire):
    """A revision that is not current changes nothing; what nothing changes makes no revision."""
    id = save(wire, name="a")["id"]
    patch(wire, id, name="b")
    address, body = f"{DATAFILES}/{id}/revert", {"revision": 1}
    refused = wire.post(address, json=body, headers={"If-Match": '"1"'})
    assert (refused.status_code, refused.json()["code"]) == (412, "stale_revision")
    done = wire.post(address, json=body, headers={"If-Match": '"2"'})
    assert (done.status_code, done.headers["ETag"], done.json()["name"]) == (200, '"3"', "a")
    assert wire.post(address, json=body).headers["ETag"] == '"3"'


@pytest.mark.parametrize(
    ("method", "address", "body", "status", "code"),
    [
        ("GET", "{id}/revisions?limit=0", None, 400, "bad_query"),
        ("GET", "{id}/revisions?limit=1001", None, 400, "bad_query"),
        ("GET", "{id}/revisions?before=0", None, 400, "bad_query"),
        ("GET", f"{{id}}/revisions?before={10**40}", None, 400, "bad_query"),
        ("GET", "{id}?revision=0", None, 404, "not_found"),
        ("GET", f"{{id}}?revision={10**40}", None, 404, "not_found"),
        ("GET", "{id}/diff/x", None, 404, "not_found"),
        ("POST", "{id}/revert", {"revision": 7}, 404, "not_found"),
        ("POST", "{id}/revert", {"revision": "1"}, 422, "invalid"),
        ("POST", "{id}/revert", {"revision": 1, "force": True}, 422, "invalid"),
        ("POST", "{id}/revert", {}, 422, "invalid"),
        ("POST", "compare", {"ids": [1]}, 422, "invalid"),
        ("POST", "compare", {"ids": ["x"] * 1001}, 400, "bad_query"),
        ("POST", "compare", {"ids": ["x"]}, 404, "not_found"),
        ("POST", "compare", [], 422, "invalid"),
        ("GET", "compare", None, 405, None),
    ],
)
def test_what_cannot_be_is_refused_as_the_mistake_it_is(wire, method, address, body, status, code):
    id = save(wire)["id"]
    answer = wire.request(method, f"{DATAFILES}/{address.format(id=id)}", **({} if body is None else {"json": body}))
    assert answer.status_code == status, answer.text
    if code is not None:
        assert answer.json()["code"] == code


@pytest.mark.embedded("loses it in the tables of SQLite")
def test_a_history_that_was_lost_says_where_it_begins(wire, shared_data):
    """As after a database was rebuilt from blobs."""
    id = save(wire, metadata={"n": 0})["id"]
    for n in range(1, 5):
        patch(wire, id, metadata={"n": n})
    with contextlib.closing(sqlite3.connect(shared_data / "metadata.sqlite")) as connection:
        connection.execute(
            "DELETE FROM changes WHERE revision<=3 AND datafile=(SELECT seq FROM datafiles WHERE id=?)", (id,)
        )
        connection.commit()
    assert wire.get(f"{DATAFILES}/{id}?revision=3").json()["metadata"] == {"n": 2}
    lost = wire.get(f"{DATAFILES}/{id}?revision=2")
    assert (lost.status_code, lost.json()["code"]) == (404, "not_found")
    assert "begins at 3" in lost.json()["detail"]


# --- who ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(data: Path, capsys, serve):
    """Clients of a server that asks for tokens, by the names of their tokens: "reader" may only read."""
    secrets = {}
    for name, scope in (("anna", "write"), ("bob", "write"), ("reader", "read")):
        assert main(["token", "create", name, "--data", str(data), "--json", "--scope", scope]) == 0
        secrets[name] = json.loads(capsys.readouterr().out)["secret"]
    url = serve(environment={"AQ_DATA_SERVER__REQUIRE_TOKEN": "true"}).url
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(aq_data.connect(url, token=secret)) for name, secret in secrets.items()}


def test_changes_name_the_user_of_the_token(guarded, tmp_path, monkeypatch):
    """Of patches, files, deletions, also of many at once, the end of a sweep, and going back, which leaves the field `user` alone."""
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    anna, bob = guarded["anna"], guarded["bob"]
    file = anna.save(name="T1")
    bob.update(file.id, {"name": "T2"})
    (tmp_path / "n.txt").write_text("x")
    anna.get(file.id).attach(tmp_path / "n.txt")
    assert bob.revert(file.id, 1).user == "anna"
    anna.delete(file.id)
    assert [change.actor for change in bob.history(file.id)] == ["anna", "bob", "anna", "bob"]
    many = anna.save(name="T1")
    bob.update_many([{"id": many.id, "patch": {"flag": "red"}}])
    anna.delete_many([many.id])
    assert [change.actor for change in bob.history(many.id)] == ["anna", "bob"]
    with anna.sweep("T1", dims={"x": None}, variables={"y": ("float64", ("x",))}) as sweep:
        sweep.append(y=1.0, x=1.0, dim="x")
        sweep.leave()
    with bob.resume_sweep(sweep.id):
        pass
    assert [change.actor for change in anna.history(sweep.id)] == ["bob"]


def test_comparing_and_history_only_read_and_going_back_writes(guarded):
    """A token to read compares and looks back, and can change nothing."""
    writer, reader = guarded["anna"], guarded["reader"]
    file = writer.save(name="T1")
    writer.update(file.id, {"name": "T2"})
    assert len(reader.compare([file.id, file.id])) == 0
    assert len(reader.diff(file.id, file.id)) == 0
    assert len(reader.history(file.id)) == 1
    assert reader.get(file.id, revision=1).name == "T1"
    with pytest.raises(ForbiddenError):
        reader.revert(file.id, 1)
    assert writer.get(file.id).revision == 2


# --- the command line --------------------------------------------------------------------------------------------------


def test_diff_history_and_revert_on_the_command_line(where, capsys):
    """As tables for people and as JSON lines for programs."""

    def run(*arguments: str) -> str:
        assert main([*arguments, *where]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    one = json.loads(run("save", "--name", "T1", "--meta", "chip=C7", "--json"))["id"]
    two = json.loads(run("save", "--name", "T1", "--meta", "chip=C8", "--json"))["id"]
    table = run("diff", one, two)
    assert table.splitlines()[0] == f"1 difference between {one} and {two}"
    assert table.splitlines()[-1].split() == ["metadata.chip", "'C7'", "'C8'"]
    assert json.loads(run("diff", one, two, "--json")) == {"path": "metadata.chip", "before": "C7", "after": "C8"}
    assert run("diff", one, one, "--json") == ""
    with aq_data.connect(where[1]) as client:
        client.update(one, {"comment": "good"})
    assert "comment" in run("history", one)
    assert json.loads(run("history", one, "--json"))["differences"] == [{"path": "comment", "before": "", "after": "good"}]
    assert "revision 3" in run("revert", one, "1")
    assert json.loads(run("revert", one, "2", "--json"))["comment"] == "good"
    assert main(["history", new_id(), *where]) == 1
    assert "no DataFile" in capsys.readouterr().err


def test_reindex_says_that_the_history_is_lost(data, capsys):
    """And the next change begins a new one."""
    with opened(data) as client:
        id = client.save(name="T1").id
        client.update(id, {"name": "T2"})
    lose_database(data)
    assert main(["reindex", "--data", str(data)]) == 0
    assert "history" in capsys.readouterr().out
    with opened(data) as client:
        assert (client.get(id).revision, len(client.history(id))) == (2, 0)
        client.update(id, {"name": "T3"})
        assert client.get(id, revision=2).name == "T2"
        assert [change.revision for change in client.history(id)] == [3]
