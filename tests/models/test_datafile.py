"""The document: ids that sort by time, states by a table, merge patches by RFC 7396."""

from __future__ import annotations

import re
import uuid

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_data.errors import AqDataError, ConflictError, ValidationError
from aq_data.models.datafile import (
    SERVER_FIELDS,
    TRANSITIONS,
    TYPED_FIELDS,
    DataFile,
    NewDataFile,
    apply_patch,
    check_file_name,
    check_id,
    check_new,
    make_id,
    merge_patch,
    next_state,
)

NOW = "2026-01-31T08:00:00.000000Z"
LATER = "2026-02-01T08:00:00.000000Z"
ID = make_id(1_700_000_000_000, bytes(10))


def document(**fields) -> DataFile:
    return DataFile(**{"id": ID, "state": "complete", "revision": 1, "created_at": NOW, "updated_at": NOW, **fields})


milliseconds = st.integers(0, (1 << 48) - 1)
entropy = st.binary(min_size=10, max_size=10)


@given(milliseconds, entropy)
def test_an_id_is_a_uuid_of_version_7_that_holds_its_time(time, random):
    made = make_id(time, random)
    parsed = uuid.UUID(made)
    assert str(parsed) == made == check_id(made)
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert parsed.int >> 80 == time


@given(milliseconds, milliseconds, entropy, entropy)
def test_ids_sort_by_the_time_they_were_made(one, other, first, second):
    if one != other:
        assert (make_id(one, first) < make_id(other, second)) == (one < other)


@given(entropy, entropy)
def test_ids_made_in_one_millisecond_differ_in_at_least_72_random_bits(first, second):
    bits = 72
    mask = (1 << bits) - 1
    if int.from_bytes(first, "big") & mask != int.from_bytes(second, "big") & mask:
        assert make_id(1, first) != make_id(1, second)


def test_an_id_in_capitals_is_the_same_id():
    assert check_id(ID.upper()) == ID


@pytest.mark.parametrize(
    "text",
    ["", "x", "../../etc/passwd", str(uuid.UUID(int=0)), "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
     "6ba7b810-9dad-41d1-80b4-00c04fd430c8",
     ID + "0", " " + ID, ID + "\n", ID.replace("-", ""), "{" + ID + "}", "urn:uuid:" + ID, ID[:19] + "c" + ID[20:],
     "0" * 10_000,
     ID.replace("0", "٠"), "K" * 36],
    ids=lambda text: ascii(text[:45]),
)  # fmt: skip
def test_what_is_no_uuid_of_version_7_is_no_id(text):
    with pytest.raises(ValidationError) as caught:
        check_id(text)
    assert len(str(caught.value)) < 300


STATES = {"open", "complete", "abandoned", "archived", "deleted"}
LEGAL = {
    ("open", "finish"): "complete",
    ("open", "abandon"): "abandoned",
    ("open", "delete"): "deleted",
    ("complete", "archive"): "archived",
    ("complete", "delete"): "deleted",
    ("abandoned", "delete"): "deleted",
    ("archived", "activate"): "complete",
    ("archived", "delete"): "deleted",
}


def test_the_table_has_every_state_and_leads_only_to_states():
    assert set(TRANSITIONS) == STATES
    assert {state for steps in TRANSITIONS.values() for state in steps.values()} <= STATES
    assert TRANSITIONS["deleted"] == {}


@pytest.mark.parametrize("state", sorted(STATES))
@pytest.mark.parametrize("step", ["finish", "abandon", "delete", "archive", "activate", "open", ""])
def test_a_step_goes_where_the_table_says_and_every_other_raises(state, step):
    if (state, step) in LEGAL:
        assert next_state(state, step) == LEGAL[state, step]
        return
    with pytest.raises(ConflictError) as caught:
        next_state(state, step)
    assert caught.value.code == "illegal_state"


RFC_7396_APPENDIX_A = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "result"), RFC_7396_APPENDIX_A)
def test_merge_patch_gives_the_results_of_rfc_7396(target, patch, result):
    before = msgspec.json.encode([target, patch])
    assert merge_patch(target, patch) == result
    assert msgspec.json.encode([target, patch]) == before, "the arguments are left alone"


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": {"$float": "NaN"}}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": {"$float": "NaN"}}, {"a": {"$float": "NaN"}}),
        ({"a": {"$date": "2026-01-01"}}, {"a": {"$date": "2027-01-01"}}, {"a": {"$date": "2027-01-01"}}),
    ],
)
def test_a_tagged_value_is_replaced_whole(target, patch, result):
    assert merge_patch(target, patch) == result


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": {"$literal": {"$date": "mine"}}}, {"a": {"b": 1}}, {"a": {"$date": "mine", "b": 1}}),
        ({"a": {"$date": "mine", "b": 1}}, {"a": {"b": None}}, {"a": {"$literal": {"$date": "mine"}}}),
        ({"a": {"$date": "soon", "b": 1}}, {"a": {"$literal": {"$date": "later"}}}, {"a": {"$date": "later", "b": 1}}),
        ({"a": {"b": 1}}, {"a": {"$literal": {"$float": None}}}, {"a": {"b": 1}}),
        ({"$literal": {"$date": "mine"}}, {"chip": "C7"}, {"$date": "mine", "chip": "C7"}),
        ({}, {"a": {"$literal": {"$literal": 5}}}, {"a": {"$literal": {"$literal": 5}}}),
    ],
)
def test_a_dict_of_the_users_that_looks_like_a_tagged_value_is_an_object(target, patch, result):
    """It merges key by key, and is marked as theirs where it has come to look so."""
    assert merge_patch(target, patch) == result


def test_a_patch_changes_its_fields_the_revision_and_the_time_and_nothing_else():
    before = document(name="T1", comment="old", tags=["a"], metadata={"chip": "C7", "fridge": {"t": 10, "p": 1}})
    after = apply_patch(before, {"comment": "good", "metadata": {"fridge": {"t": 20, "p": None}}}, LATER)
    expected = msgspec.structs.replace(
        before, comment="good", metadata={"chip": "C7", "fridge": {"t": 20}}, revision=2, updated_at=LATER
    )
    assert after == expected
    assert before.comment == "old"
    assert before.metadata == {"chip": "C7", "fridge": {"t": 10, "p": 1}}


@pytest.mark.parametrize("field", sorted(TYPED_FIELDS))
def test_null_restores_the_default_of_any_typed_field(field):
    changed = {
        "kind": "mask",
        "name": "n",
        "tags": ["a"],
        "flag": "red",
        "starred": True,
        "measured_at": NOW,
        "metadata": {"a": 1},
    }
    after = apply_patch(document(**changed), {field: None}, LATER)
    assert getattr(after, field) == getattr(document(), field)


@pytest.mark.parametrize("field", sorted(SERVER_FIELDS - {"arrays"}))
def test_what_the_server_sets_cannot_be_patched(field):
    with pytest.raises(ValidationError, match=field):
        apply_patch(document(), {"comment": "x", field: getattr(document(), field)}, LATER)


def test_arrays_never_change():
    with pytest.raises(ConflictError) as caught:
        apply_patch(document(), {"arrays": []}, LATER)
    assert caught.value.code == "finished"


@pytest.mark.parametrize(
    "patch",
    [{"colour": "red"}, {"Name": "x"}, {"": 1}, {"name": 1}, {"tags": "a"}, {"tags": [1]}, {"flag": "pink"}, {"kind": "x"},
     {"starred": 1}, {"metadata": []}, {"metadata": {"a": {"$float": "x"}}}, {"measured_at": "yesterday"},
      {"measured_at": 1},
     {"derived_from": ["x"]}, {"identifiers": {"a": 1}}, {"instruments": {"vna": 1}}, {"attrs": {"aq_data": 1}},
      {"device": 1}],
    ids=str,
)  # fmt: skip
def test_a_patch_that_does_not_fit_is_refused(patch):
    with pytest.raises(ValidationError):
        apply_patch(document(), patch, LATER)


def test_a_patch_cannot_nest_metadata_too_deep_by_steps():
    current, patch = document(), {"k": 1}
    for _ in range(40):
        patch = {"k": patch}
    current = apply_patch(current, {"metadata": patch}, LATER)
    deeper = {"k": 1}
    for _ in range(90):
        deeper = {"k": deeper}
    with pytest.raises(ValidationError):
        apply_patch(current, {"metadata": deeper}, LATER)


@pytest.mark.parametrize(
    ("given_text", "kept"),
    [
        ("2026-01-31", "2026-01-31T00:00:00.000000Z"),
        ("2026-01-31T08:00:00", "2026-01-31T08:00:00.000000Z"),
        ("2026-01-31T08:00:00Z", "2026-01-31T08:00:00.000000Z"),
        ("2026-01-31T10:00:00+02:00", "2026-01-31T08:00:00.000000Z"),
        ("2026-01-31T08:00:00.5-01:00", "2026-01-31T09:00:00.500000Z"),
        ("0042-01-01", "0042-01-01T00:00:00.000000Z"),
    ],
)
def test_dates_are_kept_in_utc_with_microseconds(given_text, kept):
    new = check_new(NewDataFile(measured_at=given_text, cooldown=given_text))
    patched = apply_patch(document(), {"measured_at": given_text, "cooldown": given_text}, LATER)
    assert [new.measured_at, new.cooldown, patched.measured_at, patched.cooldown] == [kept] * 4


@pytest.mark.parametrize("text", ["", "yesterday", "2026-02-30", "31.01.2026", "1700000000", "0001-01-01T00:00:00+14:00"])
def test_what_is_no_date_is_refused_naming_the_field(text):
    with pytest.raises(ValidationError, match="measured_at"):
        check_new(NewDataFile(measured_at=text))


def test_repeated_tags_are_kept_once_in_order():
    assert check_new(NewDataFile(tags=["b", "a", "b"])).tags == ["b", "a"]


def test_a_new_document_is_normalised():
    new = check_new(NewDataFile(id=ID.upper(), derived_from=[ID.upper()]))
    assert (new.id, new.derived_from) == (ID, [ID])


@pytest.mark.parametrize(
    "fields",
    [{"id": "x"}, {"derived_from": ["x"]}, {"attrs": {"aq_data": 1}}, {"metadata": {"a": {"$float": 1}}},
     {"device": {"a": {"$date": "x"}}}, {"instruments": {"vna": {"$bytes": "é"}}}],
    ids=str,
)  # fmt: skip
def test_a_new_document_that_could_not_be_kept_is_refused(fields):
    with pytest.raises(AqDataError) as caught:
        check_new(NewDataFile(**fields))
    assert isinstance(caught.value, ValidationError)


@pytest.mark.parametrize("name", ["a.txt", "ü.txt", "a b", "...", "~", "x" * 255])
def test_a_file_name_that_is_one_segment_is_taken(name):
    check_file_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "/a", "a\x00", "a\n", "x" * 256, "ü" * 128, "a/.."], ids=ascii
)
def test_a_file_name_that_is_no_segment_is_refused(name):
    with pytest.raises(ValidationError) as caught:
        check_file_name(name)
    assert caught.value.code == "bad_name"


def test_text_forms_of_documents_and_times_sort_alike():
    """RFC 3339 with microseconds and Z: the text order of `created_at` is the time order."""
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", check_new(NewDataFile(measured_at="2026-01-31")).measured_at or ""
    )
