"""The error tree, whole: in one process, through HTTP and back, and at the border to httpx."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator

import httpx
import msgspec
import numpy as np
import pytest
from aq_server.service.datafiles import DataFiles
from forms import DATAFILES, new_id

import aq_data
from aq_data import errors
from aq_data.client import http as client_http
from aq_data.client.arrays import read_selection
from aq_data.client.client import Client
from aq_data.client.connections import Source
from aq_data.client.datafile import DataFile
from aq_data.client.http import Body, Http
from aq_data.errors import ERROR_CODES, AqDataError, StorageError, UnavailableError, error_from_code
from aq_data.models.selection import whole

CODES = {
    "internal": (AqDataError, 500, Exception),
    "not_found": (errors.NotFoundError, 404, KeyError),
    "deleted": (errors.NotFoundError, 404, KeyError),
    "bad_selection": (errors.SelectionError, 400, IndexError),
    "bad_query": (errors.QueryError, 400, ValueError),
    "bad_cursor": (errors.QueryError, 400, ValueError),
    "invalid": (errors.ValidationError, 422, ValueError),
    "unsupported_dtype": (errors.ValidationError, 422, ValueError),
    "bad_name": (errors.ValidationError, 422, ValueError),
    "id_taken": (errors.ConflictError, 409, Exception),
    "finished": (errors.ConflictError, 409, Exception),
    "illegal_state": (errors.ConflictError, 409, Exception),
    "stale_revision": (errors.StaleRevisionError, 412, Exception),
    "too_large": (errors.TooLargeError, 413, Exception),
    "not_acceptable": (errors.NotAcceptableError, 406, Exception),
    "unsupported_media": (errors.UnsupportedMediaError, 415, Exception),
    "unauthenticated": (errors.AuthenticationError, 401, Exception),
    "forbidden": (errors.ForbiddenError, 403, Exception),
    "rate_limited": (errors.RateLimitError, 429, Exception),
    "storage": (errors.StorageError, 500, Exception),
    "unavailable": (errors.UnavailableError, 503, Exception),
    "corrupt": (errors.CorruptionError, 500, Exception),
    "bad_config": (errors.ConfigError, 500, Exception),
}
"""The codes as they were first published: this table may grow and never change."""


def below(cls: type) -> Iterator[type]:
    yield cls
    for child in cls.__subclasses__():
        yield from below(child)


def test_codes_are_those_that_were_published():
    """Stable and append-only: each belongs to one class, with its status and its builtin kin."""
    assert set(CODES) <= set(ERROR_CODES)
    for code, (cls, status, kin) in CODES.items():
        assert ERROR_CODES[code] is cls
        assert cls.status_hint == status
        assert issubclass(cls, kin)
    every = [code for cls in below(AqDataError) if "codes" in vars(cls) for code in cls.codes]
    assert len(every) == len(set(every))
    assert set(every) == set(ERROR_CODES)


def test_the_drawing_shows_the_tree_as_it_is():
    """The docstring's table names each class with its builtin kin, its status and its codes."""
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"\W*(\w+Error)(?: \((\w+)\))?\s{2,}.*?\s{2,}(\d{3}|–)\s+(.*)$", line)
        if match:
            drawn[match[1]] = (match[2], match[3], tuple(match[4].split(", ")))
    classes = {cls.__name__: cls for cls in below(AqDataError) if cls.__module__ == "aq_data.errors"}
    assert set(drawn) == set(classes)
    for name, (kin, status, codes) in drawn.items():
        cls = classes[name]
        assert codes == cls.codes
        assert status in ("–", str(cls.status_hint))
        if kin:
            assert kin in [base.__name__ for base in cls.__bases__]
    assert set(errors.__all__) >= set(classes)


@pytest.mark.parametrize("code", CODES)
def test_an_error_survives_pickling_and_copying(code):
    """Class, words, code and details: errors travel between processes (dask, multiprocessing)."""
    error = error_from_code(code, "what was wrong, and the way out", {"revision": 3, "shape": [1, 2]})
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is type(error) is CODES[code][0]
        assert (twin.message, twin.code, twin.details) == (error.message, code, {"revision": 3, "shape": [1, 2]})
        assert str(twin) == "what was wrong, and the way out"


def test_every_subclass_survives_pickling():
    """Also those that only the server raises."""
    import aq_server.routes.datafiles as routes

    for cls in below(AqDataError):
        error = routes.RangeError(10) if cls is routes.RangeError else cls("words", revision=3)
        twin = pickle.loads(pickle.dumps(error))
        assert (type(twin), twin.message, twin.code, twin.details) == (cls, error.message, error.code, error.details)


def test_a_code_of_a_newer_peer_gives_the_root_class():
    error = error_from_code("made_of_cheese", "words", {"holes": 3})
    assert type(error) is AqDataError
    assert (error.code, error.message, error.details) == ("made_of_cheese", "words", {"holes": 3})
    assert error_from_code("not_found", "words").details == {}


def test_only_what_waiting_may_mend_is_retryable():
    retryable = {cls.__name__ for cls in below(AqDataError) if cls.retryable}
    assert retryable == {"RateLimitError", "UnavailableError"}


# --- through HTTP and back -----------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch):
    """A client that tries as often as ever and does not wait in between."""
    monkeypatch.setattr(client_http, "_pause", lambda *_: None)


@pytest.mark.usefixtures("hasty")
def test_what_the_server_raises_the_client_raises(client, monkeypatch):
    """For every code the same class, code, words and details, through a socket and embedded."""
    for code in CODES:
        raised = error_from_code(code, "wörds and\nthe way out", {"revision": 3, "shape": [1, 2]})

        async def fail(*_: object, raised: AqDataError = raised) -> None:
            raise raised

        monkeypatch.setattr(DataFiles, "get", fail)
        with pytest.raises(AqDataError) as failure:
            client.get(new_id())
        assert type(failure.value) is type(raised)
        assert (failure.value.code, failure.value.details) == (code, raised.details)
        assert failure.value.message.startswith(raised.message)
        if raised.status_hint >= 500:
            assert re.search(r"\(request [0-9a-f]{16}\)$", failure.value.message)


def test_errors_of_real_mistakes_come_back_as_their_class(client):
    """No stand-in: each is provoked by a call a user makes."""
    file = client.save({"a": np.arange(6.0).reshape(2, 3)}, name="x", files={"n": b"x"})
    with pytest.raises(KeyError) as failure:
        client.get(new_id())
    assert isinstance(failure.value, errors.NotFoundError)
    with pytest.raises(IndexError):
        file["a"].select("5")
    with pytest.raises(errors.QueryError, match=r"\$where"):
        client.search({"x": {"$where": 1}})
    with pytest.raises(errors.QueryError) as failure:
        client.search({}, cursor="junk")
    assert failure.value.code == "bad_cursor"
    with pytest.raises(errors.ValidationError):
        client.update(file.id, {"flag": "mauve"})
    client.update(file.id, {"comment": "x"})
    with pytest.raises(errors.StaleRevisionError) as failure:
        client.update(file.id, {"comment": "y"}, revision=1)
    assert failure.value.details["revision"] == 2
    with pytest.raises(errors.ConflictError) as failure:
        client.update(file.id, {"arrays": []})
    assert failure.value.code == "finished"
    with pytest.raises(errors.ConflictError) as failure:
        client.save(None, id=file.id, name="other")
    assert failure.value.code == "id_taken"
    client.delete(file.id)
    with pytest.raises(errors.NotFoundError) as failure:
        client.get(file.id)
    assert failure.value.code == "deleted"
    with pytest.raises(errors.NotFoundError):
        file.load()
    with pytest.raises(errors.NotFoundError):
        file.read_file("n")


# --- the border to httpx -------------------------------------------------------------------------------------------

FOREIGN = [
    (cls, when)
    for cls in [*below(httpx.HTTPError), httpx.InvalidURL]
    for when in ("sending", "reading", "reading a refusal")
    if cls is not httpx.InvalidURL or when == "sending"
]


def foreign(cls: type[Exception], request: httpx.Request) -> Exception:
    if cls is httpx.HTTPStatusError:
        return httpx.HTTPStatusError("x", request=request, response=httpx.Response(500, request=request))
    return cls("the wire is cut")


class _Broken(httpx.SyncByteStream):
    """A body that breaks off after its first bytes."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __iter__(self) -> Iterator[bytes]:
        yield b"{"
        raise self._error


DOCUMENT = {"id": new_id(), "arrays": [], "files": [{"name": "n", "size": 3}]}

CALLS = {
    "get": lambda http: http.json("GET", "/x"),
    "save": lambda http: http.request("POST", "/x", Body(lambda: iter([b"x"]), 1, "text/plain")),
    "slice": lambda http: read_selection(http, DOCUMENT["id"], "a", np.dtype("<f8"), whole((2,))),
    "text": lambda http: read_selection(http, DOCUMENT["id"], "a", np.dtype(object), whole((2,))),
    "file": lambda http: DataFile(http, DOCUMENT, Source("http://h")).read_file("n"),
    "search": lambda http: Client(http, Source("http://h")).search({}),
}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("cls", "when"), FOREIGN)
def test_no_error_of_httpx_leaves_the_client(cls, when, tmp_path):
    """Whatever class httpx raises, while a request is sent or an answer is read, the caller sees one of ours."""

    def answer(request: httpx.Request) -> httpx.Response:
        error = foreign(cls, request)
        if when == "sending":
            raise error
        return httpx.Response(200 if when == "reading" else 404, stream=_Broken(error))

    http = Http(httpx.Client(base_url="http://h", transport=httpx.MockTransport(answer)))
    calls = {**CALLS, "download": lambda http: DataFile(http, DOCUMENT, Source("http://h")).download("n", tmp_path)}
    for name, call in calls.items():
        with pytest.raises(AqDataError) as failure:
            call(http)
        assert isinstance(failure.value, (UnavailableError, StorageError)), name
    assert list(tmp_path.iterdir()) == []


STRANGERS = {
    "login page": (200, b"<html>Log in to the hotel network</html>", {"content-type": "text/html"}),
    "redirect": (302, b"", {"location": "http://elsewhere/"}),
    "nothing": (200, b"", {}),
    "junk": (200, b"\xff\xfe", {}),
    "broken compression": (200, b"junk", {"content-encoding": "gzip"}),
    "foreign 404": (404, b"not ours", {}),
    "foreign 500": (500, b"<html>nginx</html>", {"content-type": "text/html"}),
    "empty 502": (502, b"", {}),
    "half a problem": (404, b'{"code": 3}', {}),
    "newer code": (418, b'{"code": "made_of_cheese", "detail": "words"}', {}),
}


def answering(status: int, content: bytes, headers: dict[str, str]) -> Http:
    """A client of something that answers everything with this."""

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(content))

    return Http(httpx.Client(base_url="http://h", transport=httpx.MockTransport(answer)))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", STRANGERS)
def test_what_answers_in_place_of_a_server_is_an_error_of_ours(kind):
    """A proxy, a login page, a server of another kind: never data, never a foreign exception."""
    http = answering(*STRANGERS[kind])
    client = Client(http, Source("http://h"))
    for call in (
        lambda: client.get(new_id()),
        lambda: client.search({}),
        lambda: client.count({}),
        lambda: client.distinct("x"),
        lambda: client.save(None, name="x"),
        lambda: client.update(new_id(), {"name": "x"}),
        lambda: read_selection(http, new_id(), "a", np.dtype("<f8"), whole((2,))),
        lambda: read_selection(http, new_id(), "a", np.dtype(object), whole((2,))),
    ):
        with pytest.raises(AqDataError):
            call()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("size", [0, 15, 17, 64])
def test_a_slice_that_comes_too_long_or_too_short_is_never_returned(size):
    with pytest.raises(AqDataError):
        read_selection(answering(200, b"x" * size, {}), new_id(), "a", np.dtype("<f8"), whole((2,)))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("failures", [1, 4])
def test_what_passes_is_tried_again(failures):
    """429, 503 and a broken connection are met by another try; what was asked for comes in the end."""
    for kind in (429, 503, httpx.ConnectError, httpx.ReadError, httpx.ReadTimeout):
        left = [failures]

        def answer(request: httpx.Request, kind=kind, left=left) -> httpx.Response:
            left[0] -= 1
            if left[0] < 0:
                return httpx.Response(200, json={"count": 7})
            if isinstance(kind, int):
                return httpx.Response(kind, headers={"retry-after": "1"}, json={"code": "unavailable", "detail": "busy"})
            raise kind("x")

        http = Http(httpx.Client(base_url="http://h", transport=httpx.MockTransport(answer)))
        assert Client(http, Source("http://h")).count({}) == 7


@pytest.mark.usefixtures("hasty")
def test_connect_refuses_what_is_not_ours():
    """An address nobody listens on, an odd one, and a server of another kind: UnavailableError that names it."""
    import http.server
    import threading

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            with pytest.raises(UnavailableError, match="not an aq-data server"):
                aq_data.connect(f"http://127.0.0.1:{other.server_port}")
        finally:
            other.shutdown()
            thread.join()
    for odd in ("ftp://127.0.0.1/x", "http://", "http://[", "http://127.0.0.1:99999"):
        with pytest.raises(AqDataError):
            aq_data.connect(odd)


def test_every_refusal_of_the_server_decodes_as_a_problem(wire):
    """The members conventions ask for, on a refusal by each layer: guard, router, route, use case, store."""

    class Problem(msgspec.Struct, forbid_unknown_fields=True):
        type: str
        title: str
        status: int
        detail: str
        code: str
        retryable: bool
        instance: str
        request_id: str
        details: dict = {}

    for answer in (
        wire.get("/healthz", headers={"Host": "evil.example"}),
        wire.get("/api/v1/nothing"),
        wire.get(f"{DATAFILES}/x", params={"include_deleted": "perhaps"}),
        wire.post("/healthz"),
        wire.get(f"{DATAFILES}/{new_id()}"),
        wire.post("/api/v1/search", json={"filter": {"$x": 1}}),
        wire.post("/healthz", content=b"x" * (2 << 20)),
    ):
        problem = msgspec.json.decode(answer.content, type=Problem)
        assert answer.headers["content-type"] == "application/problem+json"
        assert problem.status == answer.status_code >= 400
        assert problem.code in ERROR_CODES
        assert problem.request_id == answer.headers["request-id"]
