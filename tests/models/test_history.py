"""Every revision of a document is rebuilt from the newest one and its changes."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_difference import form, keys, scalars, trees

from aq_data.errors import CorruptionError, ValidationError
from aq_data.models.arrays import ArrayInfo
from aq_data.models.datafile import DataFile, FileInfo, apply_patch, next_state
from aq_data.models.difference import Difference, json_of
from aq_data.models.history import Change, change_between, rebuilt, reverted, shown

FIRST = DataFile(id="x", state="complete", revision=1, created_at="t1", updated_at="t1")

values = trees(keys, lookalikes=True)
free = st.dictionaries(keys, values | st.none(), max_size=4)
fields = st.fixed_dictionaries(
    {},
    optional={
        "metadata": free | st.none(),
        "name": st.sampled_from(["", "T1", "T2"]) | st.none(),
        "starred": st.booleans(),
        "tags": st.lists(st.sampled_from(["q1", "q2", "q3"]), max_size=3),
        "measured_at": st.sampled_from([None, "2026-01-01T00:00:00Z", "2026-01-02"]),
        "instruments": st.dictionaries(
            st.sampled_from(["vna", "dac.1"]),
            st.builds(
                lambda value, unit: {"settings": {"power": {"value": value, "unit": unit}}},
                scalars,
                st.sampled_from(["V", "mV", None]),
            ),
            max_size=2,
        ),
    },
)


def attached(document: DataFile, number: int) -> DataFile:
    info = FileInfo(f"f{number}", number, "text/plain", "00", f"k{number}")
    return msgspec.structs.replace(document, files=(*document.files, info), size=document.size + number)


def grown(document: DataFile, number: int) -> DataFile:
    return msgspec.structs.replace(document, arrays=(ArrayInfo("y", "<f8", (number,), ("x",), (4,), 8 * number),))


def deleted(document: DataFile, _: int) -> DataFile:
    return (
        document
        if document.state == "deleted"
        else msgspec.structs.replace(document, state=next_state("complete", "delete"))
    )


steps = st.lists(fields | st.sampled_from([attached, grown, deleted]), max_size=6)


def revisions_of(made: list) -> list[DataFile]:
    revisions = [FIRST]
    for number, step in enumerate(made, start=2):
        newest, now = revisions[-1], f"t{number}"
        if isinstance(step, dict):
            with contextlib.suppress(ValidationError):  # what is left looks like a tag: refused, and no revision
                revisions.append(apply_patch(newest, step, now))
        else:
            changed = step(newest, number)
            revisions.append(msgspec.structs.replace(changed, revision=newest.revision + 1, updated_at=now))
    return revisions


@given(steps)
def test_every_revision_is_rebuilt_exactly(made):
    """From random patches, attached files, arrays and states; 1 and 1.0 kept apart, whatever keys look like."""
    revisions = revisions_of(made)
    changes = [change_between(before, after, "anna") for before, after in pairwise(revisions)]
    kept = msgspec.json.decode(msgspec.json.encode(changes), type=list[Change])
    assert [(change.revision, change.at, change.actor) for change in kept] == [
        (revision.revision, revision.updated_at, "anna") for revision in revisions[1:]
    ]
    for back in range(len(revisions)):
        document = rebuilt(revisions[-1], kept[::-1][:back])
        assert form(json_of(document)) == form(json_of(revisions[-1 - back]))


@given(steps, st.data())
def test_reverting_restores_fields_and_metadata_and_nothing_else(made, data):
    """As a revision of its own; arrays, files and state stay, and nothing happens where nothing differs."""
    revisions = revisions_of(made)
    current, old = revisions[-1], data.draw(st.sampled_from(revisions))
    after = reverted(current, old, "now", frozenset({"name"}))
    server = {"arrays", "files", "state", "size", "id", "created_at", "path", "sweep", "finished_at"}
    kept = {field: value for field, value in json_of(current).items() if field in server | {"name"}}
    typed = {
        field: value for field, value in json_of(old).items() if field not in {*server, "name", "revision", "updated_at"}
    }
    if form({**json_of(current), **typed}) == form(json_of(current)):
        assert after is current
    else:
        assert form(json_of(after)) == form({**typed, **kept, "revision": current.revision + 1, "updated_at": "now"})
        assert reverted(after, old, "later", frozenset({"name"})) is after


def test_a_listed_change_says_its_revision_and_time_once():
    change = change_between(FIRST, apply_patch(FIRST, {"comment": "good"}, "t2"), "anna")
    assert shown(change) == Change(2, "t2", "anna", (Difference("comment", before="", after="good"),))
    assert len(change.differences) == 3


@pytest.mark.parametrize(
    "difference",
    [
        Difference("metadata.a.b", before=1),
        Difference("metadata.x", ((1, 3),), before=1),
        Difference("name.x", before=1),
        Difference("revision", before="one"),
    ],
)
def test_a_history_that_does_not_fit_is_corruption(difference):
    with pytest.raises(CorruptionError, match="history"):
        rebuilt(FIRST, [Change(1, "t", "", (difference,))])
