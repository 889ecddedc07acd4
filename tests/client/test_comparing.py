"""What differs between DataFiles, who changed one and the way back, over a socket and in a folder."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

import aq_data
from aq_data.errors import NotFoundError, QueryError, StaleRevisionError
from aq_data.models.difference import Difference

ABSENT = "0197f000-0000-7000-8000-000000000000"


def vna(power: object, unit: str = "dBm") -> dict:
    return {"vna": {"model": "ZNB", "settings": {"power": {"value": power, "unit": unit}}}}


def paths(found) -> dict:
    return {each.path: (each.before, each.after) for each in found}


# --- two ---------------------------------------------------------------------------------------------------------------


def test_two_measurements_differ_in_exactly_what_was_set_otherwise(client):
    """With units; not in ids, times, sizes or the order of keys."""
    iq = np.zeros(4, dtype=complex)
    one = client.save({"iq": iq}, name="T1", instruments=vna(-30), metadata={"chip": "C7", "fit": {"a": 1, "b": math.nan}})
    two = client.save(
        {"iq": np.ones(5, dtype=complex)},
        name="T1",
        instruments=vna(-20),
        metadata={"fit": {"b": math.nan, "a": 1.0}, "chip": "C8", "when": datetime(2026, 1, 1, tzinfo=UTC)},
    )
    found = client.diff(one.id, two.id)
    assert list(found) == [
        Difference("arrays.iq.shape", before=[4], after=[5]),
        Difference("instruments.vna.settings.power.value", (), -30, -20, "dBm", "dBm"),
        Difference("metadata.chip", before="C7", after="C8"),
        Difference("metadata.when", after=datetime(2026, 1, 1, tzinfo=UTC)),
    ]
    assert found[-1].before is aq_data.MISSING
    assert not aq_data.MISSING
    assert (found.before, found.after) == (one.id, two.id)
    assert len(client.diff(one.id, one.id)) == 0


def test_a_difference_is_a_filter(client):
    """Pasted into a search it finds the one and not the other, with any key."""
    one = client.save(name="a", metadata={"a.b": {"$x": 1, "c\\": [1, 2]}}, instruments=vna(-30))
    two = client.save(name="b", metadata={"a.b": {"$x": 2, "c\\": [1, 3]}}, instruments=vna(-20))
    found = client.diff(one.id, two.id)
    assert len(found) == 4
    for each in found:
        assert [hit.id for hit in client.search({each.path: each.before})] == [one.id], each
        assert [hit.id for hit in client.search({each.path: each.after})] == [two.id], each


def test_differences_print_as_a_table(client):
    """Values with their units, in a terminal and in a notebook, where nothing of a document becomes markup."""
    one = client.save(metadata={"text": "<b>x</b>", "gone": None}, instruments=vna(1, "V"))
    two = client.save(metadata={"text": "y" * 300}, instruments={**vna(1000, "mV"), "dac": {"model": "D"}})
    found = client.diff(one.id, two.id)
    lines = str(found).splitlines()
    assert lines[0] == f"4 differences between {one.id} and {two.id}"
    assert [line.split()[0] for line in lines[1:]] == [
        "path",
        "instruments.dac",
        "instruments.vna.settings.power.value",
        "metadata.gone",
        "metadata.text",
    ]
    assert lines[3].split()[1:] == ["1", "V", "1000", "mV"]
    assert lines[4].split()[1:] == ["None", "–"]
    assert max(map(len, lines)) < 150
    assert lines[0] in repr(found)
    html = found._repr_html_()
    assert "1 V" in html
    assert "1000 mV" in html
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert str(client.diff(one.id, one.id)) == f"no differences between {one.id} and {one.id}"


@pytest.mark.parametrize("kind", ["absent", "deleted"])
def test_what_is_not_there_cannot_be_compared(client, kind):
    one, other = client.save(), ABSENT
    if kind == "deleted":
        other = client.save().id
        client.delete(other)
    for ask in (
        lambda: client.diff(one.id, other),
        lambda: client.diff(other, one.id),
        lambda: client.compare([one.id, other]),
    ):
        with pytest.raises(NotFoundError, match=other) as refused:
            ask()
        assert refused.value.code == ("deleted" if kind == "deleted" else "not_found")


def test_a_sweep_is_compared_as_it_is_now(client, tmp_path, monkeypatch):
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    with client.sweep("T1", dims={"x": None}, variables={"y": ("float64", ("x",))}) as sweep:
        for i in range(3):
            sweep.append(y=float(i), x=float(i), dim="x")
        sweep.flush()
        done = client.save({"y": ("x", np.zeros(3))}, name="T1")
        found = paths(client.diff(sweep.id, done.id))
        assert found["state"] == ("open", "complete")
        assert "arrays.y.shape" not in found
    assert "state" not in paths(client.diff(sweep.id, done.id))


# --- many --------------------------------------------------------------------------------------------------------------


def test_what_varies_among_many_is_told_in_their_order(client):
    """One row per path; what a DataFile lacks is told from null."""
    ids = [client.save(name="T1", instruments=vna(-30 + i), metadata={"chip": "C7", "run": i // 2}).id for i in range(5)]
    ids.append(client.save(name="T1", metadata={"chip": "C7", "run": None}).id)
    found = client.compare(ids)
    assert found.ids == ids
    rows = {each.path: [value.value for value in each.values] for each in found}
    assert rows == {
        "instruments.vna.model": ["ZNB"] * 5 + [aq_data.MISSING],
        "instruments.vna.settings.power.value": [-30, -29, -28, -27, -26, aq_data.MISSING],
        "metadata.run": [0, 0, 1, 1, 2, None],
    }
    assert found[1].values[0].unit == "dBm"
    table = found.table()
    assert list(table.index) == ids
    assert table["metadata.run"].dropna().tolist() == [0, 0, 1, 1, 2]
    assert "3 differences among 6 DataFiles" in str(found)
    assert "-30 dBm" in str(found)
    assert "-30 dBm" in found._repr_html_()


def test_a_table_changes_no_integer(client):
    """Where another DataFile has none, a float, or one that no machine integer holds."""
    odd = 2**53 + 1
    rows = [
        {"serial": odd, "mixed": odd, "huge": odd, "small": 1, "plain": odd},
        {"mixed": 0.5, "huge": 2**70, "plain": 2},
        {"serial": 7, "mixed": None, "small": 3, "plain": 3},
    ]
    table = client.compare([client.save(metadata=row).id for row in rows]).table()
    assert table["metadata.serial"].tolist() == [odd, pd.NA, 7]
    assert table["metadata.mixed"].tolist() == [odd, 0.5, None]
    assert table["metadata.huge"].tolist() == [odd, 2**70, None]
    assert table["metadata.plain"].tolist() == [odd, 2, 3]
    assert str(table["metadata.small"].dtype) == "float64", "as pandas has integers of which one is missing"


def test_a_table_tells_units(client):
    """In the name of a column of numbers where all have one unit, else in every cell: 1 V is not 1 mV."""
    rows = [
        {"instruments": vna(-30), "metadata": {"bias": {"value": 1, "unit": "V"}, "t": {"value": 4.5, "unit": "K"}, "n": 1}},
        {
            "instruments": vna(-20),
            "metadata": {"bias": {"value": 1, "unit": "mV"}, "t": {"value": None, "unit": None}, "n": 2},
        },
        {"metadata": {"bias": {"value": 1.5, "unit": None}, "t": {"value": 4, "unit": "K"}, "n": 3}},
        {"metadata": {"n": 4}},
    ]
    table = client.compare([client.save(**row).id for row in rows]).table()
    power = table["instruments.vna.settings.power.value [dBm]"]
    assert power.dropna().tolist() == [-30, -20]
    assert power.dtype == "float64"
    assert table["metadata.bias.value"].tolist()[:3] == ["1 V", "1 mV", "1.5"]
    assert table["metadata.t.value [K]"].dropna().tolist() == [4.5, 4]
    assert table["metadata.n"].tolist() == [1, 2, 3, 4]
    assert table.isna().sum().tolist() == [2, 2, 1, 0, 2]


def test_few_and_many_ids_are_taken_and_too_many_refused(client):
    file = client.save(metadata={"a": 1})
    assert len(client.compare([])) == 0
    assert client.compare([]).table().empty
    assert len(client.compare([file.id] * 1000)) == 0
    with pytest.raises(QueryError, match="1000"):
        client.compare([file.id] * 1001)


# --- history -----------------------------------------------------------------------------------------------------------


def test_every_change_is_kept_and_every_revision_read_again(client, tmp_path):
    """Of metadata, tags, files and state; typed exactly."""
    file = client.save({"a": np.arange(3)}, name="T1", metadata={"n": 1, "nan": math.nan})
    seen = [file]
    seen.append(client.update(file.id, {"comment": "good", "tags": ["q3"]}))
    seen.append(client.update(file.id, {"metadata": {"n": 1.0, "new": {"value": 3, "unit": "V"}}}))
    (tmp_path / "notes.txt").write_text("hello")
    file.attach(tmp_path / "notes.txt")
    seen.append(client.get(file.id))
    seen.append(client.update(file.id, {"metadata": {"new": None, "nan": None}}))
    history = client.history(file.id)
    assert [change.revision for change in history] == [5, 4, 3, 2]
    assert [change.at for change in history] == [one.updated_at for one in reversed(seen[1:])]
    assert paths(history[3].differences) == {"comment": ("", "good"), "tags": ([], ["q3"])}
    assert paths(history[2].differences) == {
        "metadata.n": (1, 1.0),
        "metadata.new": (aq_data.MISSING, {"value": 3, "unit": "V"}),
    }
    assert type(history[2].differences[0].before) is int
    assert set(paths(history[1].differences)) == {"files", "size"}
    assert math.isnan(paths(history[0].differences)["metadata.nan"][0])
    assert [change.revision for change in client.history(file.id, limit=2)] == [5, 4]
    assert [change.revision for change in client.history(file.id, limit=None)] == [5, 4, 3, 2]
    for one in seen:
        again = client.get(file.id, revision=one.revision)
        assert again.to_json() == one.to_json()
        assert type(again.metadata["n"]) is type(one.metadata["n"])
    np.testing.assert_array_equal(client.get(file.id, revision=1)["a"][...], np.arange(3))
    text = str(history)
    assert text.splitlines()[0] == f"4 changes of {file.id}"
    assert "metadata.new" in text
    assert "3 V" in text
    assert "metadata.new" in history._repr_html_()
    assert len(client.history(client.save().id)) == 0


def test_what_never_was_has_no_history(client):
    file = client.save()
    for revision in (-1, 0, 2, 10**30):
        with pytest.raises(NotFoundError, match=f"no revision {revision}"):
            client.get(file.id, revision=revision)
        with pytest.raises(NotFoundError):
            client.revert(file.id, revision)
    with pytest.raises(NotFoundError):
        client.history(ABSENT)


def test_a_deleted_datafile_still_tells_its_history(client):
    """Also who deleted it, and what it was before."""
    file = client.save(name="T1")
    client.update(file.id, {"name": "T2"})
    client.delete(file.id)
    assert [paths(change.differences) for change in client.history(file.id)] == [
        {"state": ("complete", "deleted")},
        {"name": ("T1", "T2")},
    ]
    with pytest.raises(NotFoundError):
        client.get(file.id, revision=1)
    assert client.get(file.id, include_deleted=True, revision=1).name == "T1"
    with pytest.raises(NotFoundError):
        client.revert(file.id, 1)


def test_going_back_is_a_new_revision_with_the_old_fields_and_metadata(client, tmp_path):
    """Files attached since stay, and so does what is searched: the index follows. Going back twice changes nothing."""
    file = client.save({"a": np.arange(3)}, name="T1", metadata={"chip": "C7", "x": {"y": 1}}, tags=["q3"])
    client.update(file.id, {"name": "T2", "metadata": {"chip": None, "x": {"y": 2, "z": 3}}, "tags": []})
    (tmp_path / "notes.txt").write_text("hello")
    file.attach(tmp_path / "notes.txt")
    back = client.revert(file.id, 1)
    assert (back.revision, back.name, back.tags, back.metadata) == (4, "T1", ["q3"], {"chip": "C7", "x": {"y": 1}})
    assert back.files == ["notes.txt"]
    np.testing.assert_array_equal(back["a"][...], np.arange(3))
    assert client.search({"chip": "C7"}).total == 1
    assert client.search({"x.z": 3}).total == 0
    assert client.revert(file.id, 1).revision == 4
    assert client.revert(file.id, 2).name == "T2"
    assert client.history(file.id).to_json()[0]["revision"] == 5
    with pytest.raises(StaleRevisionError):
        client.update(file.id, {"comment": "late"}, revision=4)


def test_the_end_of_a_sweep_is_in_its_history(client, tmp_path, monkeypatch):
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    with client.sweep("T1", dims={"x": None}, variables={"y": ("float64", ("x",))}) as sweep:
        sweep.append(y=1.0, x=1.0, dim="x")
        sweep.flush()
        client.update(sweep.id, {"comment": "warming up"})
    ended, patched = client.history(sweep.id)
    assert paths(patched.differences) == {"comment": ("", "warming up")}
    assert paths(ended.differences)["state"] == ("open", "complete")
    assert client.get(sweep.id, revision=1).state == "open"
    assert client.revert(sweep.id, 1).state == "complete"
