"""Where stores may lie: one form of a root, and allowances that nothing climbs out of."""

from __future__ import annotations

import posixpath

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_data.errors import ValidationError
from aq_data.models.datafile import DataFile, make_id
from aq_data.models.placing import inner_path, placed, placed_json
from aq_data.models.stores import allowing, check_store_name, kind_of_root, normal_allowance, normal_root, overlap

SEGMENTS = st.sampled_from(
    ["a", "ab", "a b", "é", "a.b", "..", ".", "", "a*", "%2e%2e", "a\x00", "..a", "lab-1", "\n", "a\\b", "?"]
)
paths = st.lists(SEGMENTS, max_size=4).map("/".join)
roots = st.builds(
    lambda head, path: head + path,
    st.sampled_from(["/", "", "gs://lab-1/", "s3://lab-1/", "gs://", "//", "file://", "/data/"]),
    paths,
)


def normal(text: str) -> str | None:
    try:
        return normal_root(text)
    except ValidationError:
        return None


@given(roots)
def test_a_root_has_one_form_that_stays_and_climbs_nowhere(text):
    """What is accepted is accepted again as it is, has no `..`, no doubled and no trailing slash."""
    root = normal(text)
    if root is None:
        return
    assert normal_root(root) == root
    body = root.partition("://")[2] if "://" in root else root
    assert ".." not in body.split("/")
    assert "//" not in body
    assert root == "/" or not root.endswith("/")
    if kind_of_root(root) == "folder":
        assert root == posixpath.normpath("/" + text.lstrip("/"))


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("/data/archive/", "/data/archive"),
        ("//data//archive/.", "/data/archive"),
        ("gs://lab-2026/", "gs://lab-2026"),
        ("s3://lab.x/a/b/", "s3://lab.x/a/b"),
        ("memory:", "memory:"),
    ],
)
def test_roots_are_normalised(text, root):
    assert normal_root(text) == root


@pytest.mark.parametrize(
    "text",
    ["", "archive", "./a", "/data/../etc", "gs://", "gs:///a", "gs://UPPER/a", "gs://lab/a//b", "gs://lab/../x", "http://lab/a", "s3://lab/a?x=1", "/a\nb", "/a*", "memory", "memory:x"],
)  # fmt: skip
def test_what_is_no_root_is_refused(text):
    with pytest.raises(ValidationError):
        normal_root(text)


def test_credentials_in_an_address_are_refused_and_not_shown():
    with pytest.raises(ValidationError) as failure:
        normal_root("s3://AKIA123:s3cret@lab/a")
    assert "s3cret" not in str(failure.value)
    assert "AKIA123" not in str(failure.value)


@given(roots, st.lists(roots, max_size=3))
def test_an_allowance_without_a_star_allows_itself_and_what_lies_below_segment_by_segment(text, entries):
    root, known = normal(text), [entry for entry in map(normal, entries) if entry is not None]
    if root is None:
        return
    found = allowing(root, known)
    expected = [entry for entry in known if is_below(root, entry)]
    assert (found is None) == (not expected)
    assert found is None or len(found) == max(map(len, expected))


def is_below(root: str, entry: str) -> bool:
    """The same, said otherwise."""
    return root.split("/")[: len(entry.rstrip("/").split("/"))] == entry.rstrip("/").split("/")


@pytest.mark.parametrize(
    ("entry", "root", "is_allowed"),
    [
        ("/data/", "/data/a", True),
        ("/data/", "/data", True),
        ("/data/", "/database", False),
        ("/data", "/data-old/a", False),
        ("/data/lab-*", "/data/lab-1/a", True),
        ("/data/lab-*", "/data/la", False),
        ("/data/*", "/data/a", True),
        ("/data/*", "/data", False),
        ("/", "/anything", True),
        ("gs://lab-*", "gs://lab-2026/x", True),
        ("gs://lab-*", "gs://lax", False),
        ("gs://lab-*", "s3://lab-2026", False),
        ("gs://lab", "gs://lab-2026", False),
        ("gs://lab/a", "gs://lab/ab", False),
        ("gs://lab/a", "gs://lab/a/b", True),
    ],
)
def test_allowances(entry, root, is_allowed):
    assert (allowing(normal_root(root), [normal_allowance(entry)]) is not None) == is_allowed


@pytest.mark.parametrize("entry", ["*", "data/*", "/data/../*", "/a/..*", "gs://UPPER*", "http://a*", "s3://a@b/*", "/a*b"])
def test_allowances_that_make_no_sense_are_refused(entry):
    with pytest.raises(ValidationError):
        normal_allowance(entry)


@given(roots, roots)
def test_roots_overlap_when_one_is_in_the_other_whichever_is_asked_first(one, two):
    first, second = normal(one), normal(two)
    if first is None or second is None:
        return
    assert overlap(first, second) == overlap(second, first)
    assert overlap(first, second) == (is_below(first, second) or is_below(second, first))
    assert overlap(first, first)


def test_memory_is_a_place_of_its_own_each_time():
    assert not overlap("memory:", "memory:")


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", ".a", "-a", "a" * 65, "a b", "é", "a\n", "a:b"])
def test_names_that_could_not_stand_in_an_address_are_refused(name):
    with pytest.raises(ValidationError) as failure:
        check_store_name(name)
    assert failure.value.code == "bad_name"


@given(
    st.sampled_from(["", "i/a/arrays.zarr", "/stores/i/a/arrays.zarr", 'C:/"x"/i/a/arrays.zarr', "/é/i/a/arrays.zarr"]),
    st.sampled_from(["default", "archive", "gone"]),
    st.dictionaries(st.sampled_from(["path", "store", "format"]), st.sampled_from(["x", '"path":"y","store":"z","format":1}', None]) | st.just({"path": "p", "store": "s", "format": 1})),
    st.booleans(),
)  # fmt: skip
def test_the_path_of_an_encoded_document_is_that_of_the_document(path, store, metadata, is_old):
    """Whatever a client wrote elsewhere in it, and in the form it had before there were stores."""
    document = DataFile(id=make_id(1, b"0" * 10), state="complete", revision=1, created_at="", updated_at="", path=path, store=store, metadata=metadata)  # fmt: skip
    encoded = msgspec.json.encode(document)
    if is_old:
        encoded = encoded.replace(f'"store":"{store}","format":1}}'.encode(), b'"format":1}') if not metadata else encoded
        document = msgspec.json.decode(encoded, type=DataFile)

    def locate(name: str, key: str) -> str:
        return "" if name == "gone" else f'/"{name}"/{key}'

    expected = placed(document, locate)
    assert msgspec.json.decode(placed_json(encoded, locate), type=DataFile) == expected
    assert expected.path == ("" if not path else locate(document.store, "i/a/arrays.zarr"))
    assert inner_path(path) == ("i/a/arrays.zarr" if path else "")
