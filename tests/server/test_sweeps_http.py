"""Sweeps as any program speaks them: bare HTTP, with nothing of our client in between."""

from __future__ import annotations

import json
import logging
import struct
import time

import numpy as np
import pytest
import xarray as xr
import zarr
from aq_server.commands.serving import running
from aq_server.service import folding
from aq_server.service.following import Following
from forms import DATAFILES, RAW, document_part, new_id
from services.deployment import deployed, open_zarr
from test_zarr_view import HttpStore

import aq_data
from aq_data.errors import UnavailableError

SWEEPS = "/api/v1/sweeps"
IQ = {"name": "iq", "dtype": "<c16", "dims": ["flux", "delay"], "shape": [3, None]}
FLUX = {"name": "flux", "dtype": "<f8", "dims": ["flux"], "shape": [3], "role": "coordinate"}


def block(n: int, *pieces: tuple[dict, np.ndarray], writer: str = "w", **more) -> bytes:
    """One block on the wire."""
    variables = [{"dtype": values.dtype.str, "shape": list(values.shape), **piece} for piece, values in pieces]
    header = json.dumps({"writer": writer, "n": n, "variables": variables, **more}).encode()
    return struct.pack("<I", len(header)) + header + b"".join(np.ascontiguousarray(v).tobytes() for _, v in pieces)


def iq_block(n: int, values: np.ndarray, **more) -> bytes:
    return block(n, ({"name": "iq", "append": "delay"}, values), **more)


def opened(http, *arrays: dict, **fields) -> str:
    answer = http.post(SWEEPS, json={"arrays": list(arrays) or [IQ], **fields})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"{DATAFILES}/{answer.json()['id']}"
    return answer.json()["id"]


def append(http, id: str, body: bytes):
    return http.post(f"{SWEEPS}/{id}/blocks", content=body, headers={"content-type": RAW})


def columns(*numbers: float) -> np.ndarray:
    return np.array([[x, x + 1, x + 2] for x in numbers], complex).T


def test_opening_is_harmless_to_repeat(wire):
    """The same id and content again is 200, other content 409; values may come with it."""
    document = {"id": new_id(), "name": "T1", "arrays": [FLUX, IQ], "metadata": {"chip": "C7"}}
    parts = [document_part(document), ("array:0", (None, np.arange(3.0).tobytes(), RAW))]
    first, again = wire.post(SWEEPS, files=parts), wire.post(SWEEPS, files=parts)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["state"] == "open"
    assert wire.get(f"{DATAFILES}/{document['id']}/arrays/flux?format=json").json() == [0, 1, 2]
    other = wire.post(SWEEPS, json={**document, "name": "other"})
    assert (other.status_code, other.json()["code"]) == (409, "id_taken")


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"arrays": []}, 422, "at least one array"),
        ({"arrays": [{**IQ, "shape": [3]}]}, 422, "2 dims"),
        ({"arrays": [IQ, {**FLUX, "shape": [None]}]}, 422, "grows in one"),
        ({"arrays": [{**IQ, "dims": ["x", "x"]}]}, 422, "each dim once"),
        ({"arrays": [{**IQ, "dtype": "O"}]}, 422, "not supported"),
        ({"arrays": [IQ], "planned": {"flux": 4}}, 422, "planned"),
        ({"arrays": [IQ], "notify": ["http://127.0.0.1/"]}, 403, "webhook"),
        ({"arrays": [{**IQ, "chunks": [1, 1], "shape": [1 << 30, None]}]}, 422, "chunks"),
        ({"arrays": [IQ], "state": "complete"}, 422, "state"),
    ],
)
def test_what_cannot_be_opened_is_refused_by_name(wire, change, status, word):
    """Nothing is stored."""
    before = wire.post("/api/v1/search/count", json={}).json()
    answer = wire.post(SWEEPS, json={"name": "x", **change})
    assert answer.status_code == status, answer.text
    assert word in answer.json()["detail"]
    assert wire.post("/api/v1/search/count", json={}).json() == before


def test_blocks_are_numbered_by_their_writer(wire):
    """In order they are stored, a repeat changes nothing, a gap is 409 that names what is missing."""
    id = opened(wire)
    assert append(wire, id, iq_block(1, columns(1)) + iq_block(2, columns(2, 3))).json() == {
        "acknowledged": {"w": 2},
        "head": 2,
    }
    assert append(wire, id, iq_block(2, columns(2, 3))).json()["head"] == 2
    gap = append(wire, id, iq_block(5, columns(9)))
    assert (gap.status_code, gap.json()["code"]) == (409, "missing_blocks")
    assert "missing 3..4" in gap.json()["detail"]
    assert gap.json()["details"] == {"writer": "w", "known": 2, "acknowledged": {}}
    both = append(wire, id, iq_block(3, columns(4)) + iq_block(9, columns(5)))
    assert both.json()["details"]["acknowledged"] == {"w": 3}
    status = wire.get(f"{SWEEPS}/{id}").json()
    assert (status["head"], status["writers"], status["extents"]) == (3, {"w": 3}, {"delay": 4})
    assert wire.get(f"{DATAFILES}/{id}").json()["arrays"][0]["shape"] == [3, 4]


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (iq_block(1, columns(1).real), 422, "holds <c16"),
        (iq_block(1, np.zeros((4, 1), complex)), 422, "lies outside dim 'flux'"),
        (iq_block(1, np.zeros(3, complex)), 422, "2 starts and lengths"),
        (block(1, ({"name": "nope"}, columns(1))), 422, "no variable 'nope'"),
        (block(1, ({"name": "iq", "append": "flux"}, columns(1))), 422, "no growing dim"),
        (block(1, ({"name": "iq", "start": [-1, 0]}, columns(1))), 422, "no position"),
        (block(1, ({"name": "iq", "start": [0, 1 << 45]}, columns(1))), 422, "chunks"),
        (block(1), 422, "at least one"),
        (iq_block(1, columns(1), writer=":open"), 422, "reserved"),
        (iq_block(0, columns(1)), 422, "count from 1"),
        (iq_block(1, columns(1))[:-1], 422, "middle of a block"),
        (b"\x00\x00", 422, "middle of a block"),
        (struct.pack("<I", 5) + b"hello", 422, "not valid JSON"),
        (struct.pack("<I", 1 << 30), 422, "limit"),
    ],
)
def test_a_block_that_does_not_fit_is_refused_and_the_sweep_goes_on(wire, body, status, word):
    """Nothing of it is there; the next good one has the same number."""
    id = opened(wire)
    answer = append(wire, id, body)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["detail"]
    assert wire.get(f"{SWEEPS}/{id}").json()["head"] == 0
    assert append(wire, id, iq_block(1, columns(1))).status_code == 200


def test_the_end_is_asked_for_once_and_the_first_counts(wire):
    """A missing number is 409; a repeat answers the same; the other end is illegal; nothing is taken afterwards."""
    id = opened(wire)
    append(wire, id, iq_block(1, columns(1)))
    early = wire.post(f"{SWEEPS}/{id}/finish", json={"writers": {"w": 3}})
    assert (early.status_code, early.json()["code"]) == (409, "missing_blocks")
    done = wire.post(f"{SWEEPS}/{id}/finish", json={"writers": {"w": 1}})
    assert (done.status_code, done.json()["state"], done.json()["revision"]) == (200, "complete", 2)
    assert wire.post(f"{SWEEPS}/{id}/finish", json={}).json() == done.json()
    other = wire.post(f"{SWEEPS}/{id}/abandon", json={"reason": "late"})
    assert (other.status_code, other.json()["code"]) == (409, "illegal_state")
    late = append(wire, id, iq_block(2, columns(2)))
    assert (late.status_code, late.json()["code"]) == (409, "finished")
    assert append(wire, id, iq_block(1, columns(1))).status_code == 200
    assert wire.post(f"{SWEEPS}/{new_id()}/finish", json={}).status_code == 404


def test_a_deleted_sweep_takes_nothing(wire):
    """404 with the code `deleted`, for blocks, the end and the state."""
    id = opened(wire)
    assert wire.delete(f"{DATAFILES}/{id}").status_code == 204
    for answer in (
        append(wire, id, iq_block(1, columns(1))),
        wire.post(f"{SWEEPS}/{id}/finish", json={}),
        wire.get(f"{SWEEPS}/{id}"),
        wire.get(f"{DATAFILES}/{id}/events"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "deleted")


def test_an_open_document_has_an_etag_that_changes_with_every_block(wire):
    """Never 304 while it grows; `If-Match` means the revision; a patch does not disturb the sweep."""
    id = opened(wire)
    first = wire.get(f"{DATAFILES}/{id}")
    append(wire, id, iq_block(1, columns(1)))
    second = wire.get(f"{DATAFILES}/{id}", headers={"if-none-match": first.headers["etag"]})
    assert second.status_code == 200
    assert first.headers["etag"] != second.headers["etag"]
    changed = wire.patch(f"{DATAFILES}/{id}", json={"comment": "good"}, headers={"if-match": second.headers["etag"]})
    assert (changed.status_code, changed.json()["sweep"]["head"]) == (200, 1)
    stale = wire.patch(f"{DATAFILES}/{id}", json={"comment": "x"}, headers={"if-match": first.headers["etag"]})
    assert stale.status_code == 412
    part = wire.get(f"{DATAFILES}/{id}/arrays/iq")
    append(wire, id, iq_block(2, columns(2)))
    again = wire.get(f"{DATAFILES}/{id}/arrays/iq", headers={"if-none-match": part.headers["etag"]})
    assert (again.status_code, again.headers["array-shape"]) == (200, "3,2")
    found = wire.post("/api/v1/search", json={"filter": {"state": "open"}, "limit": 1000}).json()["items"]
    assert next(item for item in found if item["id"] == id)["arrays"][0]["shape"] == [3, 2]


def test_the_zarr_view_of_an_open_sweep_is_read_by_any_reader(own, server, monkeypatch):
    """Folded chunks, blocks over them and places nobody measured: what zarr and xarray read is what was written."""
    monkeypatch.setattr(folding, "FOLD_BLOCKS", 3)
    monkeypatch.setattr(folding, "LOOK_SECONDS", 0.02)
    id = opened(own, {**IQ, "chunks": [2, 2]}, FLUX)
    expected = np.full((3, 9), complex("nan+nanj"))
    for n in range(1, 8):
        expected[:, n - 1 : n] = columns(n)
        append(own, id, iq_block(n, columns(n)))
    deadline = time.monotonic() + 20
    while own.get(f"{SWEEPS}/{id}").json()["folded"] < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert own.get(f"{SWEEPS}/{id}").json()["folded"] >= 3
    append(own, id, block(8, ({"name": "iq", "start": [1, 8]}, np.array([[5j]]))))
    expected[1, 8] = 5j
    for _ in range(2):
        group = zarr.open_group(HttpStore(f"{server}{DATAFILES}/{id}/zarr"), mode="r")
        np.testing.assert_array_equal(group["iq"][...], expected)
        with xr.open_zarr(HttpStore(f"{server}{DATAFILES}/{id}/zarr")) as dataset:
            np.testing.assert_array_equal(dataset["iq"].values, expected)
        answer = own.post(f"{SWEEPS}/{id}/finish", json={"writers": {"w": 8}})  # the second time round it has ended
        assert answer.status_code == 200
    assert own.get(f"{DATAFILES}/{id}/zarr/flux/c/0").status_code == 404  # nobody measured it
    np.testing.assert_array_equal(open_zarr(answer.json()["path"])["iq"].values, expected)


def test_previews_count_only_what_was_measured(wire):
    """Of integers too, for which no value says "not measured"."""
    counts = {"name": "counts", "dtype": "<i4", "dims": ["x"], "shape": [40]}
    id = opened(wire, counts)
    append(wire, id, block(1, ({"name": "counts", "start": [10]}, np.arange(5, 15, dtype="<i4"))))
    answer = wire.get(f"{DATAFILES}/{id}/arrays/counts/preview?pixels=4")
    assert (answer.headers["array-shape"], answer.headers["preview-step"]) == ("4,2", "10")
    low, high = np.frombuffer(answer.content).reshape(4, 2).T
    np.testing.assert_array_equal(low, [np.nan, 5, np.nan, np.nan])
    np.testing.assert_array_equal(high, [np.nan, 14, np.nan, np.nan])
    assert wire.get(f"{DATAFILES}/{id}/arrays/counts/written").content == bytes([0] * 10 + [1] * 10 + [0] * 20)
    tag = {"if-none-match": answer.headers["etag"]}
    assert wire.get(f"{DATAFILES}/{id}/arrays/counts/preview?pixels=4", headers=tag).status_code == 304
    assert wire.get(f"{DATAFILES}/{id}/arrays/counts/preview?pixels=4&how=what").status_code == 422
    assert wire.get(f"{DATAFILES}/{id}/arrays/counts/preview?sel=3").status_code == 400


def test_events_are_server_sent_with_ids_to_go_on_from(wire):
    """`text/event-stream`, replayed from the beginning or behind `Last-Event-ID`, through folding and the end."""
    id = opened(wire)
    for n in range(1, 4):
        append(wire, id, iq_block(n, columns(n)))
    wire.post(f"{SWEEPS}/{id}/abandon", json={"reason": "too warm\u2028really"})

    def read(last: str = "") -> list[dict[str, str]]:
        events: list[dict[str, str]] = []
        with wire.stream("GET", f"{DATAFILES}/{id}/events", headers={"last-event-id": last} if last else {}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            text = ""
            for piece in answer.iter_text():
                text += piece
                events = [
                    dict(line.split(": ", 1) for line in chunk.split("\n"))
                    for chunk in text.split("\n\n")[:-1]
                    if "event: " in chunk
                ]
                if events and events[-1]["event"] == "abandoned":
                    return events
        return events

    events = read()
    assert [event["event"] for event in events] == ["block"] * 3 + ["abandoned"]
    assert json.loads(events[1]["data"])["variables"] == [{"name": "iq", "start": [0, 1], "shape": [3, 1], "nbytes": 48}]
    assert json.loads(events[-1]["data"])["reason"] == "too warm\u2028really"
    assert read(events[1]["id"]) == events[2:]
    wrong = wire.get(f"{DATAFILES}/{id}/events", headers={"last-event-id": "yesterday"})
    assert wrong.status_code == 422
    assert wire.get(f"{DATAFILES}/{new_id()}/events").status_code == 404
    assert wire.head(f"{DATAFILES}/{id}/events").status_code == 200


def test_a_stream_of_events_ends_where_the_store_is_down_and_goes_on_after(own, monkeypatch, caplog):
    """The status has gone out: the stream ends as a stream does, whoever comes again is told 503, and nothing is missed."""
    id = opened(own)
    assert append(own, id, iq_block(1, columns(1))).status_code == 200
    real, looks = Following._next, 0

    async def look(self, id, seq, revision):
        nonlocal looks
        looks += 1
        if looks > 1:
            raise UnavailableError("the database does not answer; try again")
        return await real(self, id, seq, revision)

    monkeypatch.setattr(Following, "_next", look)
    first = own.get(f"{DATAFILES}/{id}/events")
    assert (first.status_code, first.text.count("event: block")) == (200, 1)
    refused = own.get(f"{DATAFILES}/{id}/events", headers={"last-event-id": "1-1"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert [(r.levelname, r.exc_info) for r in caplog.records if r.levelno >= logging.WARNING] == [("WARNING", None)] * 2
    monkeypatch.undo()
    assert append(own, id, iq_block(2, columns(2))).status_code == 200
    with own.stream("GET", f"{DATAFILES}/{id}/events", headers={"last-event-id": "1-1"}) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("id:"))
        assert next(lines) == "id: 2-1"


def test_a_silent_sweep_is_stale_until_its_writer_goes_on(data):
    """Said by the document and the state; it stays readable, and the next block ends it."""
    with running(deployed(data, stale_after=0.3)) as url, aq_data.connect(url) as client:
        http = client._http.client
        id = opened(http)
        append(http, id, iq_block(1, columns(1)))
        assert not client.get(id).sweep.get("stale")
        deadline = time.monotonic() + 10
        while not client.get(id).sweep.get("stale") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.get(id).sweep["stale"]
        assert http.get(f"{SWEEPS}/{id}").json()["stale"]
        assert client.get(id)["iq"].shape == (3, 1)
        append(http, id, iq_block(2, columns(2)))
        assert not client.get(id).sweep.get("stale")


def test_the_log_stays_bounded_however_fast_a_writer_is(data, monkeypatch):
    """A full log makes the next request wait until blocks were folded; nothing is refused and nothing lost."""
    monkeypatch.setattr(folding, "MOST_BLOCKS", 20)
    monkeypatch.setattr(folding, "FOLD_BLOCKS", 10)
    monkeypatch.setattr(folding, "LOOK_SECONDS", 0.02)
    with running(deployed(data)) as url, aq_data.connect(url) as client:
        http = client._http.client
        id = opened(http)
        most = 0
        for first in range(1, 200, 5):
            body = b"".join(iq_block(n, columns(n)) for n in range(first, first + 5))
            assert append(http, id, body).status_code == 200
            status = http.get(f"{SWEEPS}/{id}").json()
            most = max(most, status["head"] - status["folded"])
        assert most <= 25
        assert client.get(id)["iq"][0].real.tolist() == list(range(1, 201))
