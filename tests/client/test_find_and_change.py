"""What finding, changing and connecting promise, over a socket and in a folder."""

from __future__ import annotations

import http.server
import json
import math
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from aq_server.commands.serving import running
from services.deployment import WAYS, deployed, opened

import aq_data
from aq_data.errors import (
    AqDataError,
    AuthenticationError,
    ConfigError,
    ConflictError,
    CorruptionError,
    ForbiddenError,
    NotFoundError,
    QueryError,
    StaleRevisionError,
    UnavailableError,
    ValidationError,
)

LAB = [
    {
        "name": "T1 vs flux",
        "station": "fridge 1",
        "tags": ["q3", "t1"],
        "flag": "red",
        "measured_at": "2026-01-01T08:00:00Z",
        "instruments": {"vna": {"model": "ZNB", "settings": {"power": {"value": -30, "unit": "dBm"}}}},
        "metadata": {"chip": "C7", "run": 1, "fit": {"t1": 31.5e-6, "ok": True}, "list": [1, 5]},
    },
    {
        "name": "T2 echo",
        "station": "fridge 1",
        "tags": ["q4"],
        "measured_at": "2026-01-02",
        "instruments": {"vna": {"model": "ZNB", "settings": {"power": {"value": -20.5, "unit": "dBm"}}}},
        "metadata": {"chip": "C7", "run": 9, "fit": {"t1": math.nan, "ok": False}, "list": [7]},
    },
    {
        "name": "spectroscopy",
        "station": "fridge 2",
        "tags": ["q3"],
        "starred": True,
        "measured_at": "2026-01-03T23:00:00+02:00",
        "instruments": {"vna": {"model": "PNA", "settings": {"power": {"value": -10, "unit": "dBm"}}}},
        "metadata": {
            "chip": "D1",
            "run": 10,
            "comment.with.dots": "x",
            "when": datetime(2026, 1, 3, tzinfo=UTC),
            "z0": 50 + 1j,
        },
    },
    {"name": "note", "metadata": {"chip": None, "run": "ten"}},
]


@pytest.fixture(scope="module", params=WAYS)
def lab(request, tmp_path_factory) -> Iterator[aq_data.Client]:
    """Three measurements and a note, for tests that only ask."""
    with opened(tmp_path_factory.mktemp("lab"), request.param) as client:
        for fields in LAB:
            client.save(**fields)
        yield client


@pytest.fixture(scope="module", params=WAYS)
def shared(request, tmp_path_factory) -> Iterator[aq_data.Client]:
    """For tests that touch only what they saved themselves."""
    with opened(tmp_path_factory.mktemp("shared"), request.param) as client:
        yield client


def found(client: aq_data.Client, filter: dict) -> set[str]:
    """Names of what the filter finds; the count must agree."""
    hits = client.search(filter)
    assert (hits.total, hits.total_is_exact, client.count(filter)) == (len(hits), True, len(hits))
    return {file.name for file in hits}


T1, T2, SPEC, NOTE = (fields["name"] for fields in LAB)
QUESTIONS: list[tuple[dict, set]] = [
    ({}, {T1, T2, SPEC, NOTE}),
    ({"name": "T2 echo"}, {T2}),
    ({"chip": "C7"}, {T1, T2}),
    ({"metadata.chip": "C7"}, {T1, T2}),
    ({"chip": "C7", "station": "fridge 1", "fit.ok": True}, {T1}),
    ({"tags": "q3"}, {T1, SPEC}),
    ({"tags": ["q3", "t1"]}, {T1}),
    ({"tags": {"$in": ["q4", "t1"]}}, {T1, T2}),
    ({"flag": "red"}, {T1}),
    ({"flag": "none"}, {T2, SPEC, NOTE}),
    ({"starred": True}, {SPEC}),
    ({"state": "complete"}, {T1, T2, SPEC, NOTE}),
    ({"instruments.vna.settings.power.value": -30.0}, {T1}),
    ({"instruments.vna.settings.power.value": {"$gt": -30}}, {T2, SPEC}),
    ({"instruments.vna.settings.power.value": {"$gte": -30, "$lt": -10}}, {T1, T2}),
    ({"instruments.vna.model": {"$in": ["PNA", "nobody"]}}, {SPEC}),
    ({"run": {"$gt": 1}}, {T2, SPEC}),
    ({"run": {"$lte": 9}}, {T1, T2}),
    ({"run": {"$lt": "zz"}}, {NOTE}),
    ({"run": {"$ne": 1}}, {T2, SPEC, NOTE}),
    ({"run": {"$nin": [1, 9, "ten"]}}, {SPEC}),
    ({"list": 5}, {T1}),
    ({"list": {"$gte": 6}}, {T2}),
    ({"chip": None}, {NOTE}),
    ({"fit.t1": None}, {SPEC, NOTE}),
    ({"fit.t1": {"$exists": True}}, {T1, T2}),
    ({"fit": {"$exists": False}}, {SPEC, NOTE}),
    ({"fit.t1": math.nan}, {T2}),
    ({"fit.t1": {"$lt": 1}}, {T1}),
    ({"fit": {"t1": 31.5e-6, "ok": True}}, {T1}),
    ({r"comment\.with\.dots": "x"}, {SPEC}),
    ({"when": datetime(2026, 1, 3, tzinfo=UTC)}, {SPEC}),
    ({"when": {"$gt": datetime(2026, 1, 1, tzinfo=UTC)}}, {SPEC}),
    ({"z0": 50 + 1j}, {SPEC}),
    ({"measured_at": {"$gte": "2026-01-02", "$lt": "2026-01-04"}}, {T2, SPEC}),
    ({"measured_at": "2026-01-03T21:00:00Z"}, {SPEC}),
    ({"$or": [{"flag": "red"}, {"tags": {"$in": ["q4"]}}]}, {T1, T2}),
    ({"$and": [{"chip": "C7"}, {"run": {"$not": {"$gt": 5}}}]}, {T1}),
    ({"$nor": [{"chip": "C7"}, {"starred": True}]}, {NOTE}),
    ({"$not": {"station": "fridge 1"}}, {SPEC, NOTE}),
    ({"$or": [{"$and": [{"run": 1}, {"chip": "C7"}]}, {"name": "note"}]}, {T1, NOTE}),
    ({"run": np.int64(9)}, {T2}),
    ({"nowhere.at.all": 1}, set()),
]


def test_every_form_of_question_finds_what_it_should(lab):
    """Dotted paths, typed fields, free metadata, every operator: each filter against a list made by hand."""
    wrong = {str(question): answer for question, names in QUESTIONS if (answer := found(lab, question)) != names}
    assert not wrong


def test_arrays_and_files_are_found_by_name(client):
    """Which array or file a DataFile has is a question like any other."""
    file = client.save({"iq": np.zeros(2), "flux": np.zeros(2)}, files={"notes.txt": b"x"})
    client.save({"other": np.zeros(2)})
    assert [hit.id for hit in client.search({"arrays.name": "flux"})] == [file.id]
    assert [hit.id for hit in client.search({"files.name": "notes.txt"})] == [file.id]


@pytest.mark.parametrize(
    ("filter", "named"),
    [
        ({"chip": {"$near": 1}}, "$near"),
        ({"$where": "1"}, "$where"),
        ({"run": {"$in": 5}}, "$in"),
        ({"run": {"$exists": 1}}, "$exists"),
        ({"$or": []}, "$or"),
        ({"run": {"$gt": [1]}}, "$gt"),
        ({"": 1}, "path"),
        ({"a": {"$gt": 1, "b": 2}}, "a"),
        ({"measured_at": {"$gt": "tuesday"}}, "measured_at"),
    ],
)
def test_what_is_no_question_is_refused_with_its_place(lab, filter, named):
    """QueryError names the operator or path; a wrong filter never finds everything."""
    for ask in (lab.search, lab.count, lambda f: lab.distinct("station", f)):
        with pytest.raises(QueryError) as caught:
            ask(filter)
        assert named in str(caught.value)
        assert caught.value.code == "bad_query"


def test_numbers_sort_as_numbers(client):
    """9 before 10, negative before positive, whole beside fractions; missing first, text after numbers."""
    for run in [10, 9, -1, 2.5, 100, "ten", None, math.inf]:
        client.save(metadata={} if run is None else {"run": run})
    rising = [file.metadata.get("run") for file in client.search(sort="run")]
    assert rising == [None, -1, 2.5, 9, 10, 100, math.inf, "ten"]
    assert [file.metadata.get("run") for file in client.search(sort="-run")] == rising[::-1]


def test_the_newest_comes_first_by_default(client):
    """`-created_at`; `created_at` the other way round."""
    ids = [client.save(name=str(i)).id for i in range(5)]
    assert [file.id for file in client.search()] == ids[::-1]
    assert [file.id for file in client.search(sort="created_at")] == ids
    assert [file.name for file in client.search(sort="name", limit=2)] == ["0", "1"]


def test_pages_join_to_the_whole(client):
    """limit, cursor and total: each once, in order, while others are saved; `limit=None` fetches all."""
    for i in range(25):
        client.save(name=f"n{i:02}", metadata={"i": i % 7})
    names, cursor, pages = [], None, 0
    while True:
        page = client.search({"i": {"$exists": True}}, sort="name", limit=4, cursor=cursor)
        client.save(name=f"a{pages}")
        assert page.total == 25
        names += [file.name for file in page]
        cursor, pages = page.cursor, pages + 1
        if cursor is None:
            break
    assert (names, pages) == ([f"n{i:02}" for i in range(25)], 7)
    assert len(client.search(limit=None)) == 32
    nothing = client.search(limit=0)
    assert (len(nothing), nothing.total) == (0, 32)
    with pytest.raises(QueryError) as caught:
        client.search(cursor="made up")
    assert caught.value.code == "bad_cursor"
    first = client.search(sort="name", limit=3)
    with pytest.raises(QueryError) as caught:
        client.search(sort="created_at", cursor=first.cursor)
    assert caught.value.code == "bad_cursor"


def test_more_than_a_page_of_the_server_is_fetched(client, monkeypatch):
    """A limit beyond what is given at once is met by several requests, without repeats."""
    monkeypatch.setattr("aq_data.client.datafile.PAGE", 10)
    ids = {client.save(metadata={"i": i}).id for i in range(33)}
    assert [file.metadata["i"] for file in client.search(limit=25, sort="i")] == list(range(25))
    everything = client.search(limit=None)
    assert {file.id for file in everything} == ids
    assert (len(everything), everything.total, everything.cursor) == (33, 33, None)


def test_hits_are_a_table(lab):
    """One row per hit, a column per path, in order; None where a document has no value."""
    table = lab.search(sort="created_at").table(
        ["name", "chip", "metadata.run", "fit.t1", "instruments.vna.settings.power.value", r"comment\.with\.dots", "tags"]
    )
    assert list(table["name"]) == [T1, T2, SPEC, NOTE]
    assert table["chip"].tolist()[:3] == ["C7", "C7", "D1"]
    assert table["chip"].isna().tolist() == [False, False, False, True]
    assert list(table["metadata.run"]) == [1, 9, 10, "ten"]
    assert table["instruments.vna.settings.power.value"].tolist()[:3] == [-30, -20.5, -10]
    assert table[r"comment\.with\.dots"].tolist()[2] == "x"
    assert table["tags"].tolist()[0] == ["q3", "t1"]
    assert table["fit.t1"].tolist()[0] == 31.5e-6
    assert list(table.index) == [file.id for file in lab.search(sort="created_at")]
    assert lab.search({"name": "nobody"}).table(["name", "chip"]).shape == (0, 2)


def test_hits_are_a_sequence(lab):
    """Indices, slices, iteration, membership of the whole page."""
    hits = lab.search(sort="created_at")
    assert (hits[0].name, hits[-1].name, [f.name for f in hits[1:3]]) == (T1, NOTE, [T2, SPEC])
    assert len(list(hits)) == len(hits) == 4
    assert T1 in repr(hits)


def test_distinct_values_are_counted(lab):
    """Most frequent first; each element of a list counts; by filter."""
    assert lab.distinct("station") == {"fridge 1": 2, "": 1, "fridge 2": 1}
    assert lab.distinct("tags") == {"q3": 2, "q4": 1, "t1": 1}
    assert next(iter(lab.distinct("tags"))) == "q3"
    assert lab.distinct("chip", {"station": "fridge 1"}) == {"C7": 2}
    assert lab.distinct("instruments.vna.settings.power.value", {"tags": "q3"}) == {-30: 1, -10: 1}
    assert lab.distinct("when") == {datetime(2026, 1, 3, tzinfo=UTC): 1}
    assert len(lab.distinct("name", limit=2)) == 2


def test_truth_values_and_numbers_are_counted_apart(client):
    """True is not 1; beyond that it is a dict, and what has no value to count by is left out."""
    given = [True, 1, 1.0, True, True, 0, False, 1, "x" * 150, math.nan, 1j, None, b"1", {"a": 1}, "1"]
    client.save_many([{"metadata": {"x": value}} for value in given])
    found = client.distinct("x")
    assert (found[True], found[1], found[1.0], found[False], found[0], found["1"]) == (3, 3, 3, 1, 1, 1)
    assert {(isinstance(value, bool), value) for value in found} == {
        (True, True), (True, False), (False, 1), (False, 0), (False, "1"), (False, "x" * 100),
    }  # fmt: skip
    assert (len(found), sum(found.values()), True in found, 2 in found, found.get("2", 0)) == (6, 10, True, False, 0)
    with pytest.raises(KeyError, match="x1"):
        found["x1"]
    assert found == client.distinct("x")
    assert found != dict(found)
    assert all(part in repr(found) for part in ("True: 3", "False: 1"))
    plain = client.distinct("x", {"x": {"$in": ["1", True]}})
    assert plain == {"1": 1, True: 3} == dict(plain)
    assert plain != {"1": 1, 1: 3}


# --- change --------------------------------------------------------------------------------------------------------


def test_a_change_merges_and_raises_the_revision(shared):
    """Typed fields and metadata merge key by key; None deletes; lists are replaced; nothing else changes."""
    file = shared.save(
        {"x": np.arange(3)}, name="a", tags=["one", "two"], metadata={"keep": 1, "drop": 2, "deep": {"a": 1, "b": [1, 2]}}
    )
    changed = shared.update(
        file.id,
        {"comment": "good", "tags": ["three"], "metadata": {"drop": None, "deep": {"b": [3]}, "new": {"t": math.nan}}},
    )
    assert (file.revision, changed.revision) == (1, 2)
    got = shared.get(file.id)
    assert (got.comment, got.tags, got.name) == ("good", ["three"], "a")
    metadata = got.metadata
    assert math.isnan(metadata.pop("new")["t"])
    assert metadata == {"keep": 1, "deep": {"a": 1, "b": [3]}}
    assert got.updated_at > got.created_at
    assert got["x"][...].tolist() == [0, 1, 2]
    assert shared.count({"drop": {"$exists": True}}) == 0
    assert shared.count({"deep.b": 3}) == 1
    assert shared.count({"tags": "one"}) == 0
    assert file.refresh().revision == 2
    assert shared.update(file.id, {"comment": None}).comment == ""


def test_flags_stars_tags_and_dates_change(shared):
    """What people set in passing."""
    id = shared.save(name="x").id
    when = datetime(2026, 1, 31, 8, tzinfo=UTC)
    file = shared.update(
        id, {"flag": "green", "starred": True, "tags": ["a", "b", "a"], "measured_at": when, "identifiers": {"sample": "S1"}}
    )
    assert (file.flag, file.starred, file.tags, file.identifiers) == ("green", True, ["a", "b"], {"sample": "S1"})
    assert file.measured_at == "2026-01-31T08:00:00.000000Z"
    assert shared.update(id, {"measured_at": None, "flag": None}).document["flag"] == "none"


def test_a_change_meant_for_an_older_revision_is_refused(shared):
    """StaleRevisionError with the current revision in its details; nothing changes."""
    file = shared.save(name="a")
    shared.update(file.id, {"name": "b"}, revision=1)
    with pytest.raises(StaleRevisionError) as caught:
        shared.update(file.id, {"name": "c"}, revision=1)
    assert caught.value.details["revision"] == 2
    with pytest.raises(StaleRevisionError) as caught:
        shared.delete(file.id, revision=1)
    assert caught.value.details["revision"] == 2
    assert shared.get(file.id).name == "b"
    assert shared.update(file.id, {"name": "d"}, revision=caught.value.details["revision"]).revision == 3


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        ({"state": "deleted"}, ValidationError),
        ({"id": "0197aaaa-bbbb-7ccc-8ddd-000000000000"}, ValidationError),
        ({"revision": 7}, ValidationError),
        ({"created_at": "2020-01-01"}, ValidationError),
        ({"size": 0}, ValidationError),
        ({"files": []}, ValidationError),
        ({"path": "/etc"}, ValidationError),
        ({"chip": "C7"}, ValidationError),
        ({"flag": "pink"}, ValidationError),
        ({"tags": "q3"}, ValidationError),
        ({"name": 5}, ValidationError),
        ({"metadata": 5}, ValidationError),
        ({"measured_at": "tuesday"}, ValidationError),
        ({"derived_from": ["x"]}, ValidationError),
        ({"arrays": []}, ConflictError),
    ],
    ids=str,
)
def test_what_may_not_change_is_refused_by_name(shared, patch, error):
    """Fields of the server, fields that do not exist, values that do not fit: named, and nothing changes."""
    file = shared.save(name="a", metadata={"chip": "C7"})
    with pytest.raises(error) as caught:
        shared.update(file.id, {"comment": "half", **patch})
    assert next(iter(patch)) in str(caught.value)
    assert shared.get(file.id).to_json() == file.to_json()


def test_a_deleted_data_file_is_gone_but_known(client):
    """Not found, not counted, its id not free again; a tombstone for those who ask."""
    file = client.save({"x": np.arange(3)}, name="a", id="0197aaaa-bbbb-7ccc-8ddd-000000000000")
    client.delete(file.id)
    for use in (client.get, client.delete, lambda known: client.update(known, {"name": "b"}), lambda _: file["x"][...]):
        with pytest.raises(NotFoundError) as caught:
            use(file.id)
        assert caught.value.code == "deleted"
    assert (client.count(), len(client.search()), client.distinct("name")) == (0, 0, {})
    assert client.get(file.id, include_deleted=True).state == "deleted"
    assert [hit.id for hit in client.search(include_deleted=True)] == [file.id]
    with pytest.raises(ConflictError):
        client.save({"x": np.arange(3)}, name="a", id=file.id)
    with pytest.raises(NotFoundError) as caught:
        client.delete("0197aaaa-bbbb-7ccc-8ddd-00000000ffff")
    assert caught.value.code == "not_found"


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_attached_once(shared, tmp_path):
    """The same content again is harmless, other content under its name is refused; the document knows it."""
    path = tmp_path / "Fit ü.json"
    path.write_bytes(b"{}" * 100)
    file = shared.save({"x": np.arange(3)})
    file.attach(path)
    assert (file.files, file.revision, file.size) == (["Fit ü.json"], 2, 3 * 8 + 200)
    file.attach(path)
    assert shared.get(file.id).revision == 2
    path.write_bytes(b"[]")
    with pytest.raises(ConflictError) as caught:
        file.attach(path)
    assert caught.value.code == "finished"
    assert shared.get(file.id).read_file("Fit ü.json") == b"{}" * 100
    with pytest.raises(ValidationError, match="nowhere"):
        file.attach(tmp_path / "nowhere")
    (tmp_path / "empty").write_bytes(b"")
    file.attach(tmp_path / "empty")
    assert file.read_file("empty") == b""


def test_a_download_is_whole_or_not_there(shared, tmp_path):
    """Into a folder or under a new name; nothing is left beside it, and nothing is made for what does not exist."""
    content = np.random.default_rng(0).bytes(3 << 20)
    file = shared.save(files={"raw ü.bin": content, "empty": b""})
    assert file.download("raw ü.bin", tmp_path) == tmp_path / "raw ü.bin"
    assert (tmp_path / "raw ü.bin").read_bytes() == content
    assert file.download("empty", tmp_path / "other").read_bytes() == b""
    assert file.download("raw ü.bin", str(tmp_path / "other")).read_bytes() == content
    with pytest.raises(NotFoundError, match="raw"):
        file.download("nobody", tmp_path)
    shared.delete(file.id)
    with pytest.raises(NotFoundError):
        file.download("raw ü.bin", tmp_path / "late")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["other", "raw ü.bin"]


def test_a_download_leaves_every_other_file_alone(shared, tmp_path, monkeypatch):
    """Also one that is called as if it were a part of it, when it succeeds and when it fails."""
    file = shared.save(files={"log": b"log", "log.part": b"part"})
    names = "log.part", "log"
    (tmp_path / "log.part").write_bytes(b"mine")
    file.download("log", tmp_path)
    assert (tmp_path / "log.part").read_bytes() == b"mine"
    for name in (*names, *names):
        file.download(name, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == [b"part", b"log"]
    (plain := tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "log").stat().st_mode == plain.stat().st_mode
    monkeypatch.setattr(file, "_file_info", lambda name: {"name": name, "size": 3, "sha256": "another"})
    with pytest.raises(CorruptionError):
        file.download("log", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == {
        "log": b"log", "log.part": b"part", "plain": b"",
    }  # fmt: skip


# --- connect -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder without configuration."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".aq_config").mkdir(parents=True)
    return tmp_path / "home"


@pytest.fixture
def quick(monkeypatch) -> None:
    """Tries again at once."""
    monkeypatch.setattr("aq_data.client.http.FIRST_PAUSE", 0.001)


def where(client: aq_data.Client) -> str:
    with client:
        client.count()
        return repr(client)


def test_the_address_comes_from_the_environment_then_the_configuration(server, home, tmp_path, monkeypatch):
    """`connect(target)` over AQ_DATA_URL over `client.url` in ~/.aq_config; addresses and folders alike."""
    (home / ".aq_config" / "data_server.toml").write_text(f'[client]\nurl = "{tmp_path}/from toml"\n')
    assert "from toml" in where(aq_data.connect())
    (home / ".aq_config" / "data_server.json").write_text(json.dumps({"client": {"url": server}}))
    assert server in where(aq_data.connect())
    monkeypatch.setenv("AQ_DATA_URL", str(tmp_path / "from environment"))
    assert "from environment" in where(aq_data.connect())
    assert "from argument" in where(aq_data.connect(tmp_path / "from argument"))
    assert server in where(aq_data.connect(server + "/"))
    monkeypatch.delenv("AQ_DATA_URL")
    (tmp_path / "moved.json").write_text(json.dumps({"client": {"url": str(tmp_path / "moved")}}))
    monkeypatch.setenv("AQ_DATA_CONFIG", str(tmp_path / "moved.json"))
    assert "moved" in where(aq_data.connect())


def test_a_configuration_that_cannot_be_read_is_named(home):
    """ConfigError with the path, not a default in silence."""
    path = home / ".aq_config" / "data_server.json"
    for content in ("{", "[]", '{"client": 5}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"data_server\.json"):
            aq_data.connect()


def make_token(data: Path, name: str, *flags: str) -> str:
    command = [sys.executable, "-m", "aq_server", "token", "create", name, "--data", str(data), "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)["secret"]


def test_tokens_are_taken_from_argument_environment_and_file(data, serve, home, monkeypatch):
    """A server that asks for tokens is refused without one, and knows who saves with one."""
    secret, reader = make_token(data, "ada"), make_token(data, "guest", "--scope", "read")
    url = serve(environment={"AQ_DATA_SERVER__REQUIRE_TOKEN": "true"}).url
    with aq_data.connect(url, token=secret) as client:
        file = client.save({"x": np.arange(3)}, user="somebody else")
        assert file.user == "ada"
    with aq_data.connect(url) as client, pytest.raises(AuthenticationError):
        client.count()
    with aq_data.connect(url, token="aqd_wrong") as client, pytest.raises(AuthenticationError):
        client.get(file.id)
    (home / "secret").write_text(secret + "\n")
    (home / ".aq_config" / "data_server.json").write_text(json.dumps({"client": {"url": url, "token_file": "~/secret"}}))
    with aq_data.connect() as client:
        assert client.get(file.id)["x"][...].tolist() == [0, 1, 2]
    monkeypatch.setenv("AQ_DATA_TOKEN", reader)
    with aq_data.connect() as client:
        assert client.count() == 1
        with pytest.raises(ForbiddenError):
            client.save(name="not allowed")
    monkeypatch.delenv("AQ_DATA_TOKEN")
    (home / "secret").unlink()
    with pytest.raises(ConfigError, match="secret"):
        aq_data.connect()


@pytest.fixture(params=[200, 404, 500])
def foreign(request) -> Iterator[str]:
    """A web server that is not ours, which has a page of that status for everyone."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"hi")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_is_not_aq_data_is_refused(foreign, quick):
    """UnavailableError says that something else answers there, whatever it answers."""
    with pytest.raises(UnavailableError, match="not an aq-data server") as caught:
        aq_data.connect(foreign)
    assert foreign in str(caught.value)


def test_nothing_listening_is_named_with_the_address(quick, home):
    """UnavailableError, which may be tried again, names the address; also for the default one of a bad configuration."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(UnavailableError, match=address) as caught:
        aq_data.connect(address)
    assert caught.value.retryable
    for wrong in ("ftp://127.0.0.1/x", "http://"):
        with pytest.raises(AqDataError):
            aq_data.connect(wrong)


@pytest.mark.parametrize("id", ["", ".", ".."])
def test_an_id_that_no_address_has_is_that_of_no_datafile(client, id):
    """As any other that is not there; the address of all DataFiles is not asked in its place."""
    there = client.save(name="there").id
    for ask in (
        lambda: client.get(id),
        lambda: client.update(id, {"comment": "x"}),
        lambda: client.delete(id),
        lambda: client.history(id),
        lambda: client.revert(id, 1),
        lambda: client.diff(id, there),
        lambda: client.diff(there, id),
    ):
        with pytest.raises(NotFoundError, match=re.escape(f"there is no DataFile {id!r}")) as caught:
            ask()
        assert caught.value.code == "not_found"


@pytest.mark.embedded("the folder itself is a way in only there")
def test_a_folder_and_a_server_show_the_same(data):
    """What one saves the other finds: two doors to one house."""
    with (
        running(deployed(data)) as url,
        aq_data.connect(url) as remote,
        aq_data.connect(data) as local,
    ):
        one = remote.save({"x": np.arange(3)}, name="remote")
        two = local.save({"x": np.arange(4)}, name="local")
        assert local.get(one.id)["x"][...].tolist() == [0, 1, 2]
        assert remote.get(two.id)["x"][...].tolist() == [0, 1, 2, 3]
        assert {file.name for file in remote.search()} == {file.name for file in local.search()} == {"remote", "local"}


def test_a_client_is_usable_from_many_threads(client):
    """Saves, reads and searches at once; every one gets its own answer."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(8):
                values = np.arange(1000) * number + i
                file = client.save({"x": values}, metadata={"worker": number, "i": i})
                assert (file["x"][...] == values).all()
                assert client.count({"worker": number}) == i + 1
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert client.count() == 48
