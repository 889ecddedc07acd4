"""Every route on the wire: statuses, headers and bodies as a foreign program sees them."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from urllib.parse import quote, unquote

import httpx
import numpy as np
import pyarrow as pa
import pytest
from aq_server import routes
from forms import DATAFILES, array_part, declared, document_part, file_part, kept, new_id, post, save
from services.deployment import blobs

import aq_data

CUBE = np.arange(24, dtype="<f8").reshape(2, 3, 4)


def code(answer: httpx.Response) -> str:
    """The code of a refusal, which must be a whole problem document."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["type"] == f"urn:aq-data:error:{problem['code']}"
    assert problem["request_id"] == answer.headers["request-id"]
    assert problem["title"]
    assert problem["detail"]
    assert problem["instance"].startswith("/")
    return problem["code"]


# --- saving --------------------------------------------------------------------------------------------------------


def test_metadata_alone_is_saved_from_plain_json(wire):
    """201, with the address and the revision of what was made."""
    answer = wire.post(DATAFILES, json={"name": "only words", "metadata": {"chip": "C7"}})
    assert answer.status_code == 201
    document = answer.json()
    assert answer.headers["location"] == f"{DATAFILES}/{document['id']}"
    assert answer.headers["etag"] == '"1"'
    assert answer.headers["content-type"] == "application/json"
    assert (document["revision"], document["state"], document["arrays"], document["size"]) == (1, "complete", [], 0)
    assert wire.get(answer.headers["location"]).json() == document


def test_arrays_and_files_are_saved_from_one_form(wire):
    """The answer describes what is stored: dims, chunks, sizes, hashes."""
    document = save(wire, {"cube": CUBE}, [("note.txt", b"hello")], name="form")
    (array,) = document["arrays"]
    assert array["dims"] == ["cube_0", "cube_1", "cube_2"]
    assert array["shape"] == [2, 3, 4]
    assert array["nbytes"] == CUBE.nbytes
    (file,) = document["files"]
    assert (file["name"], file["size"], file["content_type"]) == ("note.txt", 5, "text/plain")
    assert document["size"] == CUBE.nbytes + 5
    raw = wire.get(f"{DATAFILES}/{document['id']}/arrays/cube")
    assert raw.content == CUBE.tobytes()


def test_arrays_may_come_in_any_order_after_the_document(wire):
    a, b = np.arange(3.0), np.arange(4, dtype="<i2")
    document = {"arrays": [declared("a", a), declared("b", b)]}
    answer = post(wire, document_part(document), array_part(1, b.tobytes()), array_part(0, a.tobytes()))
    assert answer.status_code == 201
    address = answer.headers["location"]
    assert wire.get(f"{address}/arrays/a").content == a.tobytes()
    assert wire.get(f"{address}/arrays/b").content == b.tobytes()


def test_an_array_without_elements_needs_no_part(wire):
    document = {"arrays": [{"name": "empty", "dtype": "<f8", "shape": [0, 3]}]}
    answer = post(wire, document_part(document))
    assert answer.status_code == 201
    read = wire.get(f"{answer.headers['location']}/arrays/empty")
    assert (read.content, read.headers["array-shape"]) == (b"", "0,3")


def test_an_honest_retry_is_answered_with_the_same_document(wire):
    """200 and byte for byte the document of the first answer: also with arrays and files."""
    document = {"id": new_id(), "name": "again", "arrays": [declared("cube", CUBE)]}
    parts = (document_part(document), array_part(0, CUBE.tobytes()), file_part(0, "n.txt", b"x"))
    first, second = post(wire, *parts), post(wire, *parts)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert second.headers["etag"] == '"1"'


@pytest.mark.parametrize("difference", ["document", "values", "file", "no arrays"])
def test_the_same_id_with_other_content_is_refused(wire, shared_data, difference):
    """409 id_taken, and what was saved first stays as it was."""
    id = new_id()
    document = {"id": id, "name": "first", "arrays": [declared("cube", CUBE)]}
    assert post(wire, document_part(document), array_part(0, CUBE.tobytes()), file_part(0, "n", b"x")).status_code == 201
    before = kept(shared_data)
    values, content = CUBE.copy(), b"x"
    if difference == "document":
        document = {**document, "name": "second"}
    elif difference == "values":
        values[0, 0, 0] = 99
    elif difference == "file":
        content = b"y"
    if difference == "no arrays":
        answer = wire.post(DATAFILES, json={"id": id, "name": "first"})
    else:
        answer = post(wire, document_part(document), array_part(0, values.tobytes()), file_part(0, "n", content))
    assert (answer.status_code, code(answer)) == (409, "id_taken")
    assert kept(shared_data) == before
    assert wire.get(f"{DATAFILES}/{id}").json()["name"] == "first"
    assert wire.get(f"{DATAFILES}/{id}/arrays/cube").content == CUBE.tobytes()


ONE = {"name": "a", "dtype": "<f8", "shape": [2]}
TWO_VALUES = np.arange(2.0).tobytes()
ONE_DOCUMENT = document_part({"name": "refused", "arrays": [ONE]})

REFUSED_FORMS = {
    "array before document": (422, "invalid", [array_part(0, TWO_VALUES), ONE_DOCUMENT]),
    "two documents": (422, "invalid", [ONE_DOCUMENT, ONE_DOCUMENT, array_part(0, TWO_VALUES)]),
    "undeclared array": (422, "invalid", [ONE_DOCUMENT, array_part(0, TWO_VALUES), array_part(1, TWO_VALUES)]),
    "array twice": (422, "invalid", [ONE_DOCUMENT, array_part(0, TWO_VALUES), array_part(0, TWO_VALUES)]),
    "array missing": (422, "invalid", [ONE_DOCUMENT, file_part(0, "n.txt", b"already here")]),
    "values too short": (422, "invalid", [ONE_DOCUMENT, array_part(0, TWO_VALUES[:-1])]),
    "values too long": (422, "invalid", [ONE_DOCUMENT, array_part(0, TWO_VALUES + b"\0")]),
    "unknown part": (422, "invalid", [ONE_DOCUMENT, array_part(0, TWO_VALUES), ("other", (None, b"", "text/plain"))]),
    "array index no number": (422, "invalid", [ONE_DOCUMENT, array_part("x", TWO_VALUES)]),
    "file without filename": (422, "invalid", [ONE_DOCUMENT, array_part(0, TWO_VALUES), ("file:0", (None, b"", "a/b"))]),
    "two files of one name": (422, "bad_name", [ONE_DOCUMENT, file_part(0, "n", b"1"), file_part(1, "n", b"2")]),
    "file name with slash": (422, "bad_name", [ONE_DOCUMENT, array_part(0, TWO_VALUES), file_part(0, "a/b", b"1")]),
    "no document": (422, "invalid", [file_part(0, "n", b"1")]),
    "document no JSON": (422, "invalid", [document_part(b"{"), array_part(0, TWO_VALUES)]),
    "document no object": (422, "invalid", [document_part([1])]),
    "unknown field": (422, "invalid", [document_part({"nmae": "x"})]),
    "field of the server": (422, "invalid", [document_part({"revision": 3})]),
    "id no UUIDv7": (422, "invalid", [document_part({"id": "123e4567-e89b-42d3-a456-426614174000"})]),
    "bad date": (422, "invalid", [document_part({"measured_at": "yesterday"})]),
    "bad flag": (422, "invalid", [document_part({"flag": "mauve"})]),
    "bad tag in metadata": (422, "invalid", [document_part({"metadata": {"x": {"$float": "1"}}})]),
    "reserved attribute": (422, "invalid", [document_part({"attrs": {"aq_data": 1}})]),
    "object dtype": (422, "unsupported_dtype", [document_part({"arrays": [{**ONE, "dtype": "|O"}]})]),
    "structured dtype": (422, "unsupported_dtype", [document_part({"arrays": [{**ONE, "dtype": "<f8,<i4"}]})]),
    "big-endian dtype": (422, "unsupported_dtype", [document_part({"arrays": [{**ONE, "dtype": ">f8"}]})]),
    "long double": (422, "unsupported_dtype", [document_part({"arrays": [{**ONE, "dtype": "<f16"}]})]),
    "dtype nonsense": (422, "unsupported_dtype", [document_part({"arrays": [{**ONE, "dtype": "import os"}]})]),
    "array name is a path": (422, "bad_name", [document_part({"arrays": [{**ONE, "name": "../a"}]})]),
    "two arrays of one name": (422, "bad_name", [document_part({"arrays": [ONE, ONE]})]),
    "negative shape": (422, "invalid", [document_part({"arrays": [{**ONE, "shape": [-1]}]})]),
    "dims do not fit shape": (422, "invalid", [document_part({"arrays": [{**ONE, "dims": ["x", "y"]}]})]),
    "dims of two lengths": (
        422,
        "invalid",
        [document_part({"arrays": [{**ONE, "dims": ["x"]}, {"name": "b", "dtype": "<f8", "shape": [3], "dims": ["x"]}]})],
    ),
}


@pytest.mark.parametrize("reason", REFUSED_FORMS)
def test_a_form_that_cannot_be_kept_is_refused_and_leaves_nothing(wire, shared_data, reason):
    """A 4xx with its own code and words; no document, no blob, no folder remains."""
    status, expected, parts = REFUSED_FORMS[reason]
    before = kept(shared_data)
    count = wire.post("/api/v1/search/count", json={}).json()
    answer = post(wire, *parts)
    assert (answer.status_code, code(answer)) == (status, expected)
    assert kept(shared_data) == before
    assert wire.post("/api/v1/search/count", json={}).json() == count


def test_a_form_cut_off_in_the_middle_leaves_nothing(wire, shared_data):
    """A well-formed request whose multipart body has no end is refused, as is one that is no multipart at all."""
    before = kept(shared_data)
    whole = wire.build_request("POST", DATAFILES, files=[ONE_DOCUMENT, array_part(0, TWO_VALUES)])
    content = whole.read()
    head = {"content-type": whole.headers["content-type"]}
    for cut in (content[: len(content) // 2], content[:-6], b"no multipart", b""):
        answer = wire.post(DATAFILES, content=cut, headers=head)
        assert (answer.status_code, code(answer)) == (422, "invalid")
    assert kept(shared_data) == before


def test_other_media_types_are_refused(wire):
    """415 for what no reader is written for, and for a form without a boundary."""
    for media in ("text/plain", "application/xml", "multipart/form-data", "multipart/mixed; boundary=x", ""):
        answer = wire.post(DATAFILES, content=b"{}", headers={"content-type": media})
        assert (answer.status_code, code(answer)) == (415, "unsupported_media")


# --- documents -----------------------------------------------------------------------------------------------------


def test_a_document_is_fetched_again_only_when_it_changed(wire):
    document = save(wire, name="cached")
    address = f"{DATAFILES}/{document['id']}"
    first = wire.get(address)
    assert (first.status_code, first.json(), first.headers["etag"]) == (200, document, '"1"')
    for tags in ('"1"', 'W/"1"', '"7", "1"', "*"):
        again = wire.get(address, headers={"If-None-Match": tags})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", '"1"')
    assert wire.patch(address, json={"comment": "new"}).status_code == 200
    assert wire.get(address, headers={"If-None-Match": '"1"'}).status_code == 200


def test_an_unknown_id_is_not_found_on_every_route(wire):
    for id in (new_id(), "nonsense", "0"):
        for rest in ("", "/arrays/a", "/files/a", "/zarr/zarr.json", "/zarr/a/c/0"):
            answer = wire.get(f"{DATAFILES}/{id}{rest}")
            assert (answer.status_code, code(answer)) == (404, "not_found")
        assert code(wire.patch(f"{DATAFILES}/{id}", json={"name": "x"})) == "not_found"
        assert code(wire.delete(f"{DATAFILES}/{id}")) == "not_found"
        assert code(wire.put(f"{DATAFILES}/{id}/arrays/a", content=b"")) == "not_found"
        assert code(wire.put(f"{DATAFILES}/{id}/files/a", content=b"")) == "not_found"


@pytest.mark.parametrize("media", ["application/json", "application/merge-patch+json"])
def test_a_patch_merges_by_rfc_7396(wire, media):
    """Keys are merged in depth, null deletes, lists are replaced, null on a typed field gives its default back."""
    document = save(
        wire, name="p", tags=["a"], comment="old", metadata={"deep": {"x": 1, "y": 2}, "gone": 1, "kept": [1, 2]}
    )
    change = {"tags": ["b", "c"], "comment": None, "metadata": {"deep": {"y": None, "z": 3}, "gone": None, "kept": [9]}}
    address = f"{DATAFILES}/{document['id']}"
    answer = wire.patch(address, content=json.dumps(change), headers={"content-type": media})
    assert (answer.status_code, answer.headers["etag"]) == (200, '"2"')
    changed = answer.json()
    assert changed["metadata"] == {"deep": {"x": 1, "z": 3}, "kept": [9]}
    assert (changed["tags"], changed["comment"], changed["name"], changed["revision"]) == (["b", "c"], "", "p", 2)
    assert changed["created_at"] == document["created_at"]
    assert changed["updated_at"] > document["updated_at"]
    assert wire.get(address).json() == changed


def test_a_patch_meant_for_an_older_revision_is_refused(wire):
    """412 with the current revision in the details; nothing changes. The right revision passes."""
    address = f"{DATAFILES}/{save(wire, name='r')['id']}"
    assert wire.patch(address, json={"comment": "1"}, headers={"If-Match": '"1"'}).status_code == 200
    stale = wire.patch(address, json={"comment": "2"}, headers={"If-Match": '"1"'})
    assert (stale.status_code, code(stale), stale.json()["details"]) == (412, "stale_revision", {"revision": 2})
    assert wire.get(address).json()["comment"] == "1"
    assert wire.patch(address, json={"comment": "3"}, headers={"If-Match": "*"}).json()["revision"] == 3
    assert code(wire.patch(address, json={}, headers={"If-Match": "abc"})) == "invalid"


@pytest.mark.parametrize("field", ["id", "state", "revision", "created_at", "updated_at", "size", "files", "path", "format"])
def test_fields_of_the_server_cannot_be_patched(wire, field):
    address = f"{DATAFILES}/{save(wire, name='s')['id']}"
    answer = wire.patch(address, json={field: None, "name": "t"})
    assert (answer.status_code, code(answer)) == (422, "invalid")
    assert field in answer.json()["detail"]
    assert wire.get(address).json()["name"] == "s"


def test_patches_that_do_not_fit_are_refused(wire):
    address = f"{DATAFILES}/{save(wire, {'a': CUBE}, name='s')['id']}"
    arrays = wire.patch(address, json={"arrays": []})
    assert (arrays.status_code, code(arrays)) == (409, "finished")
    for patch in ({"nmae": "x"}, {"flag": "mauve"}, {"tags": "x"}, {"metadata": 3}, {"measured_at": "no"}, {"name": 3}):
        answer = wire.patch(address, json=patch)
        assert (answer.status_code, code(answer)) == (422, "invalid"), patch
    assert code(wire.patch(address, json=[1])) == "invalid"
    assert code(wire.patch(address, content=b"{", headers={"content-type": "application/json"})) == "invalid"
    media = wire.patch(address, content=b"{}", headers={"content-type": "text/plain"})
    assert (media.status_code, code(media)) == (415, "unsupported_media")
    assert wire.get(address).json()["revision"] == 1


def test_a_deleted_datafile_leaves_a_tombstone(wire):
    """404 with code deleted everywhere, shown when asked for, and its id never holds anything again."""
    document = save(wire, {"a": CUBE}, [("n.txt", b"x")], id=new_id(), name="gone", tags=["tombstone"])
    address = f"{DATAFILES}/{document['id']}"
    gone = wire.delete(address)
    assert (gone.status_code, gone.content) == (204, b"")
    for rest in ("", "/arrays/a", "/files/n.txt", "/zarr/zarr.json", "/zarr/a/c/0/0/0"):
        answer = wire.get(f"{address}{rest}")
        assert (answer.status_code, code(answer)) == (404, "deleted")
    for again in (
        wire.delete(address),
        wire.patch(address, json={"name": "x"}),
        wire.put(f"{address}/files/m", content=b""),
    ):
        assert (again.status_code, code(again)) == (404, "deleted")
    shown = wire.get(address, params={"include_deleted": "true"})
    assert (shown.status_code, shown.json()["state"], shown.json()["name"]) == (200, "deleted", "gone")
    same = {"id": document["id"], "name": "gone", "tags": ["tombstone"], "arrays": [declared("a", CUBE)]}
    answers = [
        post(wire, document_part(same), array_part(0, CUBE.tobytes()), file_part(0, "n.txt", b"x")),
        wire.post(DATAFILES, json={"id": document["id"]}),
    ]
    for answer in answers:
        assert (answer.status_code, code(answer)) == (409, "id_taken")
    question = {"filter": {"tags": "tombstone"}}
    assert wire.post("/api/v1/search", json=question).json()["items"] == []
    found = wire.post("/api/v1/search", json={**question, "include_deleted": True}).json()["items"]
    assert [item["id"] for item in found] == [document["id"]]


def test_a_deletion_meant_for_an_older_revision_is_refused(wire):
    address = f"{DATAFILES}/{save(wire, name='keep')['id']}"
    wire.patch(address, json={"comment": "x"})
    stale = wire.delete(address, headers={"If-Match": '"1"'})
    assert (stale.status_code, code(stale), stale.json()["details"]["revision"]) == (412, "stale_revision", 2)
    assert wire.get(address).status_code == 200
    assert wire.delete(address, headers={"If-Match": '"2"'}).status_code == 204


# --- arrays --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cube(shared):
    """The address of an array that tests only read."""
    with httpx.Client(base_url=shared, verify=False) as http:
        return f"{shared}{DATAFILES}/{save(http, {'cube': CUBE})['id']}/arrays/cube"


MEDIA = {
    "raw": "application/octet-stream",
    "npy": "application/x-npy",
    "json": "application/json",
    "csv": "text/csv",
    "arrow": "application/vnd.apache.arrow.stream",
}


def decoded(content: bytes, format: str, shape: tuple[int, ...]) -> np.ndarray:
    if format == "raw":
        return np.frombuffer(content, "<f8").reshape(shape)
    if format == "npy":
        return np.load(io.BytesIO(content))
    if format == "json":
        return np.array(json.loads(content))
    if format == "csv":
        return np.array([[float(v) for v in row] for row in csv.reader(io.StringIO(content.decode()))]).reshape(shape)
    with pa.ipc.open_stream(content) as stream:
        table = stream.read_all()
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["shape"] == ",".join(map(str, shape))
    return table["cube"].to_numpy().reshape(shape)


@pytest.mark.parametrize("by", ["accept", "query"])
@pytest.mark.parametrize("format", MEDIA)
@pytest.mark.parametrize(
    ("sel", "index"),
    [
        ("", np.s_[...]),
        ("0:10,::2", np.s_[0:10, ::2]),
        ("1,...,-1", np.s_[1, :, -1]),
        ("...,::-1", np.s_[..., ::-1]),
        ("0,0,0", np.s_[0, 0, 0]),
        ("[1,0],1:", np.s_[[1, 0], 1:]),
    ],
)
def test_a_slice_is_the_same_in_every_format(wire, cube, by, format, sel, index):
    """Values, dtype and shape agree with NumPy, by `Accept` and by `?format=`."""
    expected = CUBE[index]
    options = {"headers": {"Accept": MEDIA[format]}} if by == "accept" else {"params": {"format": format}}
    address = f"{cube}?sel={sel}" + (f"&format={format}" if by == "query" else "")
    answer = wire.get(address, headers=options.get("headers"))
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] == MEDIA[format]
    assert answer.headers["array-dtype"] == "<f8"
    assert answer.headers["array-shape"] == ",".join(map(str, expected.shape))
    np.testing.assert_array_equal(decoded(answer.content, format, expected.shape), expected)


def test_raw_is_what_comes_when_nothing_is_asked_for(wire, cube):
    bare = wire.build_request("GET", cube)
    del bare.headers["accept"]
    answers = [wire.send(bare), *(wire.get(cube, headers={"Accept": accept}) for accept in ("*/*", "text/html, */*;q=0.1"))]
    for answer in answers:
        assert (answer.status_code, answer.headers["content-type"]) == (200, MEDIA["raw"])


def test_preferences_are_weighed(wire, cube):
    answer = wire.get(cube, headers={"Accept": "text/csv;q=0.3, application/json;q=0.9"})
    assert answer.headers["content-type"] == MEDIA["json"]


@pytest.mark.parametrize(
    ("accept", "format"),
    [
        ("application/octet-stream;q=0, */*", "npy"),
        ("application/*; Q=0.000, */*;q=0.1", "csv"),
        ("*/*;q=0, text/csv", "csv"),
        ("text/csv;q=0.001", "csv"),
        ("text/*, text/csv;q=0", None),
        ("text/csv;q=0", None),
        ("*/*;q=0", None),
    ],
)
def test_what_has_a_quality_of_zero_is_refused(wire, cube, accept, format):
    """RFC 9110, 12.4.2; the narrowest range around a type decides."""
    answer = wire.get(cube, headers={"Accept": accept})
    if format is None:
        assert (answer.status_code, code(answer)) == (406, "not_acceptable")
    else:
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, MEDIA[format])


@pytest.mark.parametrize("accept", ["image/png", "text/html", "application/json;q=abc", ";;;", "a", "*/*;q="])
def test_accept_headers_without_an_offer_are_406_and_junk_is_no_failure(wire, cube, accept):
    answer = wire.get(cube, headers={"Accept": accept})
    assert answer.status_code in (200, 406), answer.text
    if accept in ("image/png", "text/html"):
        assert code(answer) == "not_acceptable"


def test_an_unknown_format_is_not_acceptable(wire, cube):
    answer = wire.get(cube, params={"format": "xlsx"})
    assert (answer.status_code, code(answer)) == (406, "not_acceptable")
    assert "npy" in answer.json()["detail"]


def test_the_shape_header_of_a_scalar_is_present_and_empty(wire):
    id = save(wire, {"scalar": np.float64(4.5)})["id"]
    for address in (f"{DATAFILES}/{id}/arrays/scalar", f"{DATAFILES}/{id}/arrays/scalar?sel=..."):
        answer = wire.get(address)
        assert answer.headers["array-shape"] == ""
        assert answer.content == struct.pack("<d", 4.5)
        assert wire.get(address, headers={"Accept": "application/json"}).json() == 4.5


@pytest.mark.parametrize("dtype", ["<f4", "<i8", "|u1", "|b1", "<c16", "<M8[us]", "<m8[ns]", "<U4", "|S3", "<f2"])
def test_every_dtype_travels_as_npy_and_names_itself(wire, dtype):
    values = np.arange(6).reshape(2, 3).astype("<i8")
    array = values.astype("U4") if dtype == "<U4" else values.astype("S3") if dtype == "|S3" else values.astype(dtype)
    address = f"{DATAFILES}/{save(wire, {'a': array})['id']}/arrays/a"
    answer = wire.get(address, params={"format": "npy", "sel": "::-1"})
    assert answer.headers["array-dtype"] == dtype
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), array[::-1])
    for format in ("json", "csv", "arrow"):
        assert wire.get(address, params={"format": format}).status_code == 200


@pytest.mark.parametrize("format", ["json", "csv", "arrow"])
def test_text_is_limited_by_its_letters(shared, wire, monkeypatch, format):
    """Whether there are many or long ones, 413 says to select less, not to ask for what there is not; one is always given."""
    monkeypatch.setattr(routes.arrays, "TEXT_FORM_BYTES", 4 << 10)
    texts = {"many": ["äb"] * 586, "long": ["x" * 1500] * 3, "one": ["x" * 5000] * 70, "empty": [""] * 1025}
    arrays = {name: np.array(listed, object) for name, listed in texts.items()}
    client = aq_data.connect(shared)
    file = client.save(arrays, chunks={"one": (1,), "many": (100,)})

    def status(name: str, sel: str) -> int:
        answer = wire.get(f"{DATAFILES}/{file.id}/arrays/{name}", params={"format": format, "sel": sel})
        if answer.status_code != 200:
            assert (answer.status_code, code(answer)) == (413, "too_large")
            assert "select less" in answer.json()["detail"]
            assert "octet-stream" not in answer.text
        elif format == "json":
            assert answer.json() == np.asarray(file[name].select(sel)).tolist()
        return answer.status_code

    assert [status("many", sel) for sel in ("", ":-1", "::2")] == [413, 200, 200]
    assert [status("long", sel) for sel in ("", ":2", "[0,0,0]")] == [413, 200, 413]
    assert [status("one", sel) for sel in ("", ":2", ":1", "69")] == [413, 413, 200, 200]
    assert [status("empty", sel) for sel in ("", ":1024", "0:0")] == [413, 200, 200]
    client.close()


@pytest.mark.parametrize("format", ["json", "csv", "arrow"])
def test_fixed_text_that_is_no_unicode_is_sent_only_as_it_lies(wire, format):
    """406 names the array and the formats that can carry it; what lies beside the lone surrogate comes as ever."""
    letters = np.array([[ord("a"), ord("b")], [0xD800, 0], [0x110000, 0]], "<u4").view("<U2").reshape(3)
    address = f"{DATAFILES}/{save(wire, {'fit': letters})['id']}/arrays/fit"
    for sel in ("", "1", "::2"):
        answer = wire.get(address, params={"format": format, "sel": sel})
        assert (answer.status_code, code(answer)) == (406, "not_acceptable")
        assert all(word in answer.json()["detail"] for word in ("'fit'", "octet-stream", "npy"))
    assert wire.get(address, params={"format": format, "sel": "0"}).status_code == 200
    assert wire.get(address).content == letters.tobytes()
    assert letters.tobytes() in wire.get(address, params={"format": "npy"}).content


def test_values_json_lacks_are_tagged_and_never_bare(wire):
    """NaN and infinities are no JSON: they travel as tagged objects, NaT as null, instants as ISO text."""
    floats, instants = np.array([1.5, np.nan, -np.inf]), np.array(["2026-01-31T08:00", "NaT"], "<M8[s]")
    document = save(wire, {"f": floats, "t": instants, "c": np.array([1 + 2j])})
    address = f"{DATAFILES}/{document['id']}/arrays"
    answer = wire.get(f"{address}/f?format=json")
    assert json.loads(answer.content, parse_constant=pytest.fail) == [1.5, {"$float": "NaN"}, {"$float": "-Infinity"}]
    assert wire.get(f"{address}/t?format=json").json() == ["2026-01-31T08:00:00", None]
    assert wire.get(f"{address}/c?format=json").json() == [{"$complex": [1.0, 2.0]}]


def test_a_large_slice_streams_with_its_length_announced(wire):
    values = np.random.default_rng(1).random((1500, 300))
    address = f"{DATAFILES}/{save(wire, {'large': values})['id']}/arrays/large"
    answer = wire.get(address)
    assert int(answer.headers["content-length"]) == values.nbytes
    assert answer.content == values.tobytes()
    npy = wire.get(address, params={"format": "npy", "sel": "::-1,::3"})
    np.testing.assert_array_equal(np.load(io.BytesIO(npy.content)), values[::-1, ::3])


def test_an_array_is_fetched_again_only_when_the_answer_would_differ(wire, shared_data):
    """304 is answered without reading a chunk: it comes although the chunks are gone."""
    document = save(wire, {"a": CUBE})
    address = f"{DATAFILES}/{document['id']}/arrays/a"
    tags = {}
    for format in MEDIA:
        for sel in ("", "0"):
            tags[format, sel] = wire.get(address, params={"format": format, "sel": sel}).headers["etag"]
    assert len(set(tags.values())) == len(tags), "another format or selection must have another tag"
    for chunk in (blobs(shared_data) / document["id"]).rglob("c/*/*/*"):
        chunk.unlink()
    for (format, sel), tag in tags.items():
        answer = wire.get(address, params={"format": format, "sel": sel}, headers={"If-None-Match": tag})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert wire.get(address, headers={"If-None-Match": '"other"'}).status_code == 500
    assert code(wire.get(address)) == "corrupt"


def test_text_has_no_raw_form(wire):
    """Variable-length text is 406 as raw and .npy, and comes as JSON unless another form is asked for."""
    texts = ["äö", "", 'three,\n"four"']
    encoded = struct.pack("<I", 3) + b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)
    document = {"arrays": [{"name": "words", "dtype": "string", "shape": [3]}]}
    answer = post(wire, document_part(document), array_part(0, encoded))
    assert answer.status_code == 201
    address = f"{answer.headers['location']}/arrays/words"
    for format in ("raw", "npy"):
        for refused in (wire.get(address, params={"format": format}), wire.get(address, headers={"Accept": MEDIA[format]})):
            assert (refused.status_code, code(refused)) == (406, "not_acceptable")
            assert "application/json" in refused.json()["detail"]
    assert wire.get(address).json() == texts
    rows = csv.reader(io.StringIO(wire.get(address, params={"format": "csv"}).text, newline=""))
    assert [text for row in rows for text in (row or [""])] == texts
    with pa.ipc.open_stream(wire.get(address, params={"format": "arrow"}).content) as stream:
        assert stream.read_all()["words"].to_pylist() == texts
    for broken in (encoded[:-1], encoded + b"x", struct.pack("<I", 2) + encoded[4:], struct.pack("<I", 3) + b"\xff" * 12):
        refused = post(wire, document_part(document), array_part(0, broken))
        assert (refused.status_code, code(refused)) == (422, "invalid")


@pytest.mark.parametrize("sel", ["0,0,0,0", "2", "-3", "0,3", "::0", "[5]", "...,...", "x", "0:1:", "1.5", ",", "[", "0,,1"])
def test_a_selection_that_does_not_fit_says_the_real_shape(wire, cube, sel):
    answer = wire.get(cube, params={"sel": sel})
    if sel == "0:1:":  # NumPy allows the empty step
        assert answer.status_code == 200
        return
    assert (answer.status_code, code(answer)) == (400, "bad_selection")
    if sel not in ("x", "1.5", ",", "[", "0,,1"):
        assert "(2, 3, 4)" in answer.json()["detail"]
        assert answer.json()["details"]["shape"] == [2, 3, 4]


def test_an_unknown_array_or_file_names_those_there_are(wire):
    id = save(wire, {"iq": CUBE}, [("note.txt", b"x")])["id"]
    array = wire.get(f"{DATAFILES}/{id}/arrays/qi")
    assert (array.status_code, code(array)) == (404, "not_found")
    assert "'iq' (2, 3, 4)" in array.json()["detail"]
    file = wire.get(f"{DATAFILES}/{id}/files/other")
    assert (file.status_code, code(file)) == (404, "not_found")
    assert "'note.txt'" in file.json()["detail"]


def test_arrays_are_never_written_again(wire):
    id = save(wire, {"iq": CUBE})["id"]
    answer = wire.put(f"{DATAFILES}/{id}/arrays/iq", content=CUBE.tobytes())
    assert (answer.status_code, code(answer)) == (409, "finished")
    assert "derived_from" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["a b", "ü∂", "a?b#c", "a%2Fb", "c", "x'\"y", "+&="])
def test_names_that_addresses_must_escape_come_back(wire, name):
    id = save(wire, {name: CUBE}, [(name, b"content")])["id"]
    quoted = quote(name, safe="")
    assert wire.get(f"{DATAFILES}/{id}/arrays/{quoted}").content == CUBE.tobytes()
    assert wire.get(f"{DATAFILES}/{id}/files/{quoted}").content == b"content"
    assert wire.get(f"{DATAFILES}/{id}/zarr/{quoted}/zarr.json").status_code == 200


# --- attached files ------------------------------------------------------------------------------------------------

LETTERS = b"abcdefghij"


@pytest.fixture(scope="module")
def letters(shared):
    """The address of a file that tests only read."""
    with httpx.Client(base_url=shared, verify=False) as http:
        return f"{shared}{DATAFILES}/{save(http, {}, [('letters.txt', LETTERS)])['id']}/files/letters.txt"


def test_a_file_comes_whole_with_everything_a_cache_needs(wire, letters):
    answer = wire.get(letters)
    assert (answer.status_code, answer.content) == (200, LETTERS)
    assert answer.headers["content-type"] == "text/plain"
    assert answer.headers["content-length"] == "10"
    assert answer.headers["accept-ranges"] == "bytes"
    again = wire.get(letters, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("range", "expected", "content_range"),
    [
        ("bytes=0-0", b"a", "bytes 0-0/10"),
        ("bytes=2-4", b"cde", "bytes 2-4/10"),
        ("bytes=7-", b"hij", "bytes 7-9/10"),
        ("bytes=-3", b"hij", "bytes 7-9/10"),
        ("bytes=-99", LETTERS, "bytes 0-9/10"),
        ("bytes=8-99", b"ij", "bytes 8-9/10"),
    ],
)
def test_a_range_of_a_file(wire, letters, range, expected, content_range):
    answer = wire.get(letters, headers={"Range": range})
    assert (answer.status_code, answer.content) == (206, expected)
    assert answer.headers["content-range"] == content_range
    assert answer.headers["content-length"] == str(len(expected))


@pytest.mark.parametrize("range", ["bytes=10-", "bytes=99-100", "bytes=-0"])
def test_a_range_outside_is_416_and_tells_the_size(wire, letters, range):
    answer = wire.get(letters, headers={"Range": range})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */10"
    code(answer)


@pytest.mark.parametrize("range", ["bytes=", "bytes=-", "bytes=1-2,4-5", "items=0-1", "bytes=a-b"])
def test_a_range_of_another_form_is_ignored(wire, letters, range):
    """RFC 9110: a Range that is not understood is as if it were not there."""
    answer = wire.get(letters, headers={"Range": range})
    assert (answer.status_code, answer.content) == (200, LETTERS)


def test_a_range_of_other_content_than_the_reader_has_is_answered_whole(wire, letters):
    """Whoever goes on with a download would put the end of one content behind the beginning of another."""
    tag = wire.get(letters).headers["etag"]
    for condition, expected in (
        (tag, (206, b"cde")),
        ('"another"', (200, LETTERS)),
        (f"W/{tag}", (200, LETTERS)),
        ("Sun, 22 Nov 2026 00:00:00 GMT", (200, LETTERS)),
    ):
        answer = wire.get(letters, headers={"Range": "bytes=2-4", "If-Range": condition})
        assert (answer.status_code, answer.content) == expected, condition
        assert ("content-range" in answer.headers) == (expected[0] == 206)
    assert wire.get(letters, headers={"Range": "bytes=99-", "If-Range": '"another"'}).status_code == 200


@pytest.mark.parametrize(
    "name", ["plain.txt", "naïve café ∂.txt", 'quo"te.txt', "semi;colon.txt", "per%cent.txt", "it's.txt"]
)
def test_the_name_of_a_download_survives_the_header(wire, name):
    id = save(wire, name="f")["id"]
    address = f"{DATAFILES}/{id}/files/{quote(name, safe='')}"
    assert wire.put(address, content=b"x", headers={"content-type": "text/plain"}).status_code == 201
    disposition = wire.get(address).headers["content-disposition"]
    assert disposition.startswith("attachment; filename=")
    extended = re.search(r"filename\*=UTF-8''(\S+)$", disposition)
    assert extended is not None
    assert unquote(extended[1]) == name
    plain = re.search(r'filename="([^"]*)"', disposition)
    assert plain is not None
    assert plain[1].isascii()


def test_an_id_may_be_written_in_capitals(own, data):
    """Everything is done to the one DataFile: what is attached so is found by its true id, whatever is asked of it."""
    id = save(own, {"a": np.arange(3.0)}, [("before", b"one")])["id"]
    shouted = f"{DATAFILES}/{id.upper()}"
    assert own.put(f"{shouted}/files/after", content=b"two").status_code == 201
    for address in (shouted, f"{DATAFILES}/{id}"):
        assert own.get(f"{address}/files/before").content == b"one"
        assert own.get(f"{address}/files/after").content == b"two"
        assert own.get(f"{address}/arrays/a?format=json").json() == [0, 1, 2]
    assert own.patch(shouted, json={"comment": "x"}).json()["id"] == id
    assert own.delete(shouted).status_code == 204
    assert {path.name for path in blobs(data).iterdir() if not path.name.startswith(".")} == {id}


def test_a_file_is_attached_once_and_never_changed(wire, shared_data):
    """201 new, 200 the same again, 409 other content; losers leave no blobs."""
    document = save(wire, name="f")
    address = f"{DATAFILES}/{document['id']}"
    headers = {"content-type": "text/x-log"}
    new = wire.put(f"{address}/files/log", content=b"one", headers=headers)
    assert (new.status_code, new.json()["size"]) == (201, 3)
    before = kept(shared_data)
    same = wire.put(f"{address}/files/log", content=b"one", headers=headers)
    assert (same.status_code, same.json()) == (200, new.json())
    other = wire.put(f"{address}/files/log", content=b"two", headers=headers)
    assert (other.status_code, code(other)) == (409, "finished")
    assert kept(shared_data) == before
    got = wire.get(f"{address}/files/log")
    assert (got.content, got.headers["content-type"].split(";")[0]) == (b"one", "text/x-log")
    document = wire.get(address).json()
    assert (document["revision"], document["size"], [f["name"] for f in document["files"]]) == (2, 3, ["log"])


@pytest.mark.parametrize("media", ["text/plain; charset=utf-8", "nonsense", "text/plain; x=…", "a/b\tc", "text/ü"])
def test_whatever_media_type_a_file_was_given_it_can_be_fetched(wire, media):
    id = save(wire, {}, [("f", b"content", media)])["id"]
    answer = wire.get(f"{DATAFILES}/{id}/files/f")
    assert (answer.status_code, answer.content) == (200, b"content")


def test_an_attached_page_is_never_run_by_a_browser(wire):
    id = save(wire, {}, [("x.html", b"<script>alert(1)</script>", "text/html")])["id"]
    answer = wire.get(f"{DATAFILES}/{id}/files/x.html")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"].startswith("attachment")


# --- what every route does -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readable(shared):
    """One address of every GET route."""
    with httpx.Client(base_url=shared, verify=False) as http:
        id = save(http, {"a": np.random.default_rng(2).random((400, 500))}, [("n.txt", b"note")])["id"]
    base = f"{DATAFILES}/{id}"
    return [
        "/",
        "/docs",
        "/docs/openapi.json",
        "/healthz",
        "/readyz",
        base,
        f"{base}/arrays/a",
        f"{base}/arrays/a?sel=0&format=json",
        f"{base}/files/n.txt",
        f"{base}/zarr/zarr.json",
        f"{base}/zarr/a/zarr.json",
        f"{base}/zarr/a/c/0/0",
        f"{base}/nothing",
        f"{DATAFILES}/{new_id()}",
    ]


def test_head_is_get_without_the_body_on_every_route(wire, readable, caplog):
    """Same status and headers, no byte of body, and the connection stays usable: nothing failed behind the answer."""
    for address in readable:
        got, head = wire.get(address), wire.head(address)
        assert head.status_code == got.status_code, address
        assert head.content == b""
        for name in ("date", "request-id"):
            got.headers.pop(name, None)
            head.headers.pop(name, None)
        assert head.headers == got.headers, address
    assert wire.head("/metrics").status_code == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_method_that_is_not_there_is_405_and_allow_lists_those_that_are(wire, readable):
    """RFC 9110 demands `Allow`; it names every method of the address, not only some."""
    document = wire.get("/docs/openapi.json").json()
    for path, item in document["paths"].items():
        address = re.sub(r"\{[^}]*\}", "x", path)
        for method in ("DELETE", "PUT", "PATCH", "POST", "TRACE"):
            if method.lower() in item or (method == "PUT" and path.endswith("/arrays/{name}")):
                continue
            answer = wire.request(method, address)
            assert answer.status_code == 405, (method, address)
            code(answer)
            allowed = {name.strip() for name in answer.headers["allow"].split(",")}
            assert {name.upper() for name in item if name in ("get", "post", "put", "patch", "delete")} <= allowed, address


def test_options_lists_every_method_of_an_address(wire):
    for path, methods in (("/x", {"GET", "PATCH", "DELETE"}), ("/x/files/n", {"GET", "PUT"}), ("", {"POST"})):
        answer = wire.options(f"{DATAFILES}{path}")
        assert answer.status_code == 204
        assert methods <= {name.strip() for name in answer.headers["allow"].split(",")}


def test_every_answer_carries_a_request_id_and_the_server_name(wire, readable):
    """A harmless id is kept, any other is replaced; refusals have one too."""
    for address in readable:
        answer = wire.get(address, headers={"Request-Id": "lab-7.A_b"})
        assert answer.headers["request-id"] == "lab-7.A_b"
        assert answer.headers.get_list("server") == ["aq-data"]
    ids = {wire.get("/healthz").headers["request-id"] for _ in range(5)}
    assert len(ids) == 5
    for bad in ("", "x" * 65, "a b", "a\tb", "{}", "ü".encode().decode("latin-1")):
        answer = wire.get("/healthz", headers=[("Request-Id", bad.encode("latin-1"))])
        assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["request-id"])


def test_an_address_that_does_not_exist_is_a_problem_document(wire):
    for address in ("/nothing", "/api/v1/nothing", "/api/v2/datafiles", "/api/v1/datafiles/x/y/z"):
        answer = wire.get(address)
        assert (answer.status_code, code(answer)) == (404, "not_found")


def test_the_root_leads_to_the_documentation(wire):
    answer = wire.get("/", follow_redirects=True)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")


# --- finding -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd(shared):
    """25 DataFiles of one series, by number."""
    with httpx.Client(base_url=shared, verify=False) as http:
        return [save(http, name=f"crowd {i}", metadata={"series": "crowd", "i": i, "third": i % 3})["id"] for i in range(25)]


def test_search_gives_documents_with_totals(wire, crowd):
    body = {"filter": {"series": "crowd", "i": {"$gte": 5}}, "sort": "metadata.i", "limit": 3}
    answer = wire.post("/api/v1/search", json=body)
    assert answer.status_code == 200
    page = answer.json()
    assert set(page) == {"items", "total", "total_is_exact", "cursor"}
    assert [item["metadata"]["i"] for item in page["items"]] == [5, 6, 7]
    assert (page["total"], page["total_is_exact"]) == (20, True)
    assert page["items"][0] == wire.get(f"{DATAFILES}/{crowd[5]}").json()


@pytest.mark.parametrize("sort", ["metadata.i", "-metadata.i", "-created_at", "metadata.third", "-third", "nowhere", "name"])
def test_the_cursor_walks_every_hit_once_while_others_arrive(wire, crowd, sort):
    """Pages join without a gap or a repeat, in one order, also when a DataFile is saved between two pages."""
    question = {"filter": {"series": "crowd", "extra": {"$exists": False}}, "sort": sort, "limit": 7}
    everything = wire.post("/api/v1/search", json={**question, "limit": 1000}).json()
    seen, cursor = [], None
    while True:
        page = wire.post("/api/v1/search", json={**question, "cursor": cursor}).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["cursor"]
        if cursor is None:
            break
        save(wire, name="crowd", metadata={"series": "crowd", "i": 3, "extra": 1})
    assert seen == [item["id"] for item in everything["items"]]
    assert sorted(seen) == sorted(crowd)


def test_fields_keep_what_is_asked_for(wire, crowd):
    body = {"filter": {"series": "crowd", "i": 4}, "fields": ["name", "metadata.i", "state", "third", "nowhere"]}
    (item,) = wire.post("/api/v1/search", json=body).json()["items"]
    assert item == {"id": crowd[4], "name": "crowd 4", "state": "complete", "metadata": {"i": 4, "third": 1}}


def test_fields_enter_lists(wire):
    """In the answer of a search and in that of many ids, as in a table of the same fields."""
    lines = [{"gain": 1, "at": 5}, 2, {"gain": 3}, {"at": 6}]
    id = save(wire, {"iq": CUBE, "t": CUBE}, metadata={"lines": lines})["id"]
    fields = ["lines.gain", "arrays.name"]
    (found,) = wire.post("/api/v1/search", json={"filter": {"id": id}, "fields": fields}).json()["items"]
    (got,) = wire.post(f"{DATAFILES}/bulk/get", json={"ids": [id], "fields": fields}).json()["results"]
    pruned = [{"gain": 1}, {}, {"gain": 3}, {}]
    assert found == {"id": id, "metadata": {"lines": pruned}, "arrays": [{"name": "iq"}, {"name": "t"}]}
    assert got["document"] == found


def test_counts_and_distinct_values(wire, crowd):
    question = {"series": "crowd", "extra": {"$exists": False}}
    assert wire.post("/api/v1/search/count", json={"filter": question}).json() == {"count": 25}
    answer = wire.post("/api/v1/search/distinct", json={"field": "third", "filter": question})
    assert answer.json() == {"values": [{"value": 0, "count": 9}, {"value": 1, "count": 8}, {"value": 2, "count": 8}]}


REFUSED_QUESTIONS = {
    "unknown operator": ({"filter": {"x": {"$where": "1"}}}, "bad_query", "$where"),
    "unknown operator on filters": ({"filter": {"$xor": []}}, "bad_query", "$xor"),
    "operand of a wrong type": ({"filter": {"x": {"$in": 3}}}, "bad_query", "$in"),
    "order of a list": ({"filter": {"x": {"$gt": [1]}}}, "bad_query", "$gt"),
    "empty path": ({"filter": {"": 1}}, "bad_query", "path"),
    "limit too high": ({"limit": 1001}, "bad_query", "1000"),
    "limit below zero": ({"limit": -1}, "bad_query", "limit"),
    "cursor junk": ({"cursor": "junk"}, "bad_cursor", "cursor"),
    "bad date": ({"filter": {"created_at": {"$gt": "soon"}}}, "bad_query", "soon"),
}


@pytest.mark.parametrize("reason", REFUSED_QUESTIONS)
def test_a_question_that_cannot_be_understood_names_its_fault(wire, reason):
    body, expected, named = REFUSED_QUESTIONS[reason]
    answer = wire.post("/api/v1/search", json=body)
    assert (answer.status_code, code(answer)) == (400, expected)
    assert named in answer.json()["detail"]
    if named.startswith("$"):
        assert answer.json()["details"]["operator"] == named


def test_a_cursor_of_another_question_is_refused(wire, crowd):
    body = {"filter": {"series": "crowd"}, "sort": "metadata.i", "limit": 2}
    cursor = wire.post("/api/v1/search", json=body).json()["cursor"]
    answer = wire.post("/api/v1/search", json={**body, "sort": "-name", "cursor": cursor})
    assert (answer.status_code, code(answer)) == (400, "bad_cursor")


def test_questions_of_a_wrong_form_are_refused(wire):
    for path in ("/api/v1/search", "/api/v1/search/count", "/api/v1/search/distinct"):
        for body in ({"filtre": {}}, {"filter": 3}, [], {"field": 3}):
            answer = wire.post(path, json=body)
            assert (answer.status_code, code(answer)) == (422, "invalid"), (path, body)
        assert wire.post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
        assert wire.post(path, content=b"{", headers={"content-type": "application/json"}).status_code == 422
    answer = wire.post("/api/v1/search/distinct", json={"field": "x", "limit": 0})
    assert (answer.status_code, code(answer)) == (400, "bad_query")
