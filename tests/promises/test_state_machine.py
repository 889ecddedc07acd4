"""The HTTP API beside a dict of NumPy arrays and documents: whatever is done in whatever order, both stay the same."""

from __future__ import annotations

import copy
import itertools
import json
import os
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule, run_state_machine_as_test
from services.deployment import WAYS, opened

import aq_data
from aq_data.errors import AqDataError, ConflictError, NotFoundError, SelectionError, StaleRevisionError
from aq_data.models.datafile import make_id

TAGS = st.lists(st.sampled_from(["q1", "q2", "good", "Ünïcode"]), max_size=3, unique=True)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 2.0, "", "C7", "c7", "2"]))
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.sampled_from("xy"), SCALARS, max_size=2))
METADATA = st.dictionaries(st.sampled_from(["chip", "power", "deep", "a.b"]), VALUES, max_size=3)
DTYPES = st.sampled_from(["<f8", "<c16", "<i4", "|b1", "<M8[us]", "<U3"])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
INDEX = st.one_of(
    st.integers(-6, 6),
    st.slices(6),
    st.lists(st.integers(-5, 4), max_size=3),
)
NAMES = st.sampled_from(["iq", "flux", "naïve name"])

_runs = itertools.count()


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    found = {}
    for name in draw(st.lists(NAMES, max_size=2, unique=True)):
        shape, dtype = draw(SHAPES), draw(DTYPES)
        numbers = np.arange(int(np.prod(shape, dtype=int))).reshape(shape) * draw(st.sampled_from([0, 1, -7]))
        found[name] = numbers.astype("<i8").astype(dtype)
    return found


class Model:
    """One DataFile as it should be: plain Python and NumPy."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.fields = {name: copy.deepcopy(request[name]) for name in ("name", "tags", "metadata")} | {"comment": ""}
        self.arrays: dict[str, np.ndarray] = request["dataset"]
        self.files: dict[str, bytes] = {}
        self.revision, self.is_deleted = 1, False
        self.past: dict[int, dict[str, Any]] = {}
        """The fields at each revision."""


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396, as its text has it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def same(left: Any, right: Any) -> bool:
    """Equal as a filter means it: numbers with numbers, truth values only with truth values."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def holds(metadata: dict[str, Any], key: str, value: Any) -> bool:
    """Whether `{key: value}` matches: the value itself, any element of a list, null also where nothing is."""
    found = metadata.get(key)
    if value is None and (key not in metadata or found is None):
        return True
    candidates = [found, *found] if isinstance(found, list) else [found]
    return key in metadata and any(same(candidate, value) for candidate in candidates)


def text(fields: dict[str, Any]) -> str:
    """Equal for what is the same in form: 2 is not 2.0 here."""
    return json.dumps(fields, sort_keys=True)


def orthogonal(array: np.ndarray, key: tuple) -> np.ndarray:
    """Each axis indexed in turn, as the selection language promises; from the last axis on, so that none moves."""
    for axis in reversed(range(len(key))):
        array = array[
            (slice(None),) * axis + (np.array(key[axis], dtype=int) if isinstance(key[axis], list) else key[axis],)
        ]
    return array


class DataFilesMachine(RuleBasedStateMachine):
    """Every rule does one thing to the server and to the model, and compares what both say."""

    ids = Bundle("ids")

    def __init__(self, client: aq_data.Client) -> None:
        super().__init__()
        self.client = client
        self.project = f"run {next(_runs)}"
        self.models: dict[str, Model] = {}

    def alive(self) -> dict[str, Model]:
        return {id: model for id, model in self.models.items() if not model.is_deleted}

    # --- rules -----------------------------------------------------------------------------------------------------

    @rule(target=ids, name=st.sampled_from(["T1", "spectrum"]), tags=TAGS, metadata=METADATA, dataset=arrays())
    def save(self, name: str, tags: list[str], metadata: dict, dataset: dict) -> str:
        id = make_id(time.time_ns() // 1_000_000, os.urandom(10))
        request = {"dataset": dataset, "name": name, "tags": tags, "metadata": metadata}
        file = self.client.save(**request, id=id, project=self.project)
        assert (file.id, file.revision, list(file)) == (id, 1, list(dataset))
        self.models[id] = Model(request)
        return id

    @rule(id=ids)
    def save_the_same_again(self, id: str) -> None:
        """An honest retry gives the document as it is now, and changes nothing; a tombstone stays one."""
        model = self.models[id]
        if model.is_deleted:
            with pytest.raises(ConflictError):
                self.client.save(**model.request, id=id, project=self.project)
        else:
            again = self.client.save(**model.request, id=id, project=self.project)
            assert (again.id, again.revision) == (id, model.revision)

    @rule(id=ids, name=st.sampled_from(["other", "another"]))
    def save_something_else_under_the_id(self, id: str, name: str) -> None:
        with pytest.raises(ConflictError) as failure:
            self.client.save(**{**self.models[id].request, "name": name}, id=id, project=self.project)
        assert failure.value.code == "id_taken"

    @rule(
        id=ids,
        comment=st.sampled_from(["good", None]),
        tags=st.none() | TAGS,
        metadata=METADATA,
        with_revision=st.booleans(),
    )
    def patch(self, id: str, comment: str | None, tags: list | None, metadata: dict, with_revision: bool) -> None:
        model = self.models[id]
        patch = {"comment": comment, "metadata": metadata} | ({} if tags is None else {"tags": tags})
        revision = model.revision if with_revision else None
        if model.is_deleted:
            with pytest.raises(NotFoundError):
                self.client.update(id, patch, revision)
            return
        file = self.client.update(id, patch, revision)
        model.fields = {**merged(model.fields, patch), "comment": comment or ""}
        model.revision += 1
        assert file.revision == model.revision

    @rule(id=ids, revision=st.integers(0, 6))
    def look_back(self, id: str, revision: int) -> None:
        """An old revision is what it was, types included; of the history there is one change for each."""
        model = self.models[id]
        assert [change.revision for change in self.client.history(id)] == list(range(model.revision, 1, -1))
        if revision not in model.past:
            with pytest.raises(NotFoundError):
                self.client.get(id, revision=revision)
            return
        file = self.client.get(id, include_deleted=True, revision=revision)
        assert file.revision == revision
        assert text({name: getattr(file, name) for name in model.fields}) == text(model.past[revision])

    @rule(id=ids, revision=st.integers(0, 6))
    def go_back(self, id: str, revision: int) -> None:
        """To the fields of then; when they are those of now nothing happens."""
        model = self.models[id]
        if model.is_deleted or revision not in model.past:
            with pytest.raises(NotFoundError):
                self.client.revert(id, revision)
            return
        file = self.client.revert(id, revision)
        model.revision += text(model.fields) != text(model.past[revision])
        model.fields = copy.deepcopy(model.past[revision])
        assert file.revision == model.revision

    @rule(id=ids, off=st.sampled_from([-1, 1, 5]), way=st.sampled_from(["patch", "delete"]))
    def change_another_revision(self, id: str, off: int, way: str) -> None:
        model = self.models[id]
        if model.is_deleted:
            return
        with pytest.raises(StaleRevisionError) as failure:
            if way == "patch":
                self.client.update(id, {"comment": "stale"}, model.revision + off)
            else:
                self.client.delete(id, model.revision + off)
        assert failure.value.details["revision"] == model.revision

    @rule(target=ids, id=consumes(ids))
    def delete(self, id: str) -> Any:
        """Once; the second time there is only the tombstone. The id stays known, so that it is tried again."""
        model = self.models[id]
        if model.is_deleted:
            with pytest.raises(NotFoundError) as failure:
                self.client.delete(id)
            assert failure.value.code == "deleted"
            return multiple()
        self.client.delete(id)
        model.is_deleted = True
        model.revision += 1
        return id

    @rule(id=ids, name=NAMES, key=st.lists(INDEX, max_size=4).map(tuple))
    def slice(self, id: str, name: str, key: tuple) -> None:
        model = self.models[id]
        if model.is_deleted or name not in model.arrays:
            with pytest.raises(NotFoundError):
                self.client.get(id)[name]
            return
        array = model.arrays[name]
        try:
            if len(key) > array.ndim:
                raise IndexError
            expected = orthogonal(array, key)
        except IndexError:
            with pytest.raises(SelectionError, match=r"shape"):
                self.client.get(id)[name][key]
            return
        found = self.client.get(id)[name][key]
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)

    @rule(tag=st.sampled_from(["q1", "good", "Ünïcode", "none"]))
    def search_by_tag(self, tag: str) -> None:
        self._finds({"tags": tag}, lambda model: tag in model.fields["tags"])

    @rule(key=st.sampled_from(["chip", "power", "deep"]), value=SCALARS)
    def search_by_metadata(self, key: str, value: Any) -> None:
        self._finds({key: value}, lambda model: holds(model.fields["metadata"], key, value))
        self._finds({key: {"$ne": value}}, lambda model: not holds(model.fields["metadata"], key, value))

    @rule(limit=st.sampled_from([-1, 0, 1, 2]))
    def search_by_number(self, limit: int) -> None:
        def above(model: Model) -> bool:
            found = model.fields["metadata"].get("power")
            candidates = found if isinstance(found, list) else [found]
            return any(isinstance(c, (int, float)) and not isinstance(c, bool) and c > limit for c in candidates)

        self._finds({"power": {"$gt": limit}}, above)

    def _finds(self, question: dict, expected: Any) -> None:
        hits = self.client.search({**question, "project": self.project}, limit=None)
        wanted = {id for id, model in self.alive().items() if expected(model)}
        assert {file.id for file in hits} == wanted
        assert (len(hits), hits.total) == (len(wanted), len(wanted))
        assert self.client.count({**question, "project": self.project}) == len(wanted)

    @rule(id=ids, name=st.sampled_from(["n.txt", "ü.bin"]), content=st.sampled_from([b"", b"one", b"two" * 1000]))
    def attach(self, id: str, name: str, content: bytes) -> None:
        """New, the same again, or refused because other content has the name."""
        import tempfile
        from pathlib import Path

        model = self.models[id]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            file = self.client.get(id, include_deleted=True)
            if model.is_deleted:
                with pytest.raises(NotFoundError):
                    file.attach(path)
            elif model.files.get(name, content) != content:
                with pytest.raises(ConflictError):
                    file.attach(path)
            else:
                file.attach(path)
                if name not in model.files:
                    model.files[name] = content
                    model.revision += 1
                assert file.revision == model.revision

    # --- what holds after every step -------------------------------------------------------------------------------

    @invariant()
    def the_past_is_remembered(self) -> None:
        for model in self.alive().values():
            model.past.setdefault(model.revision, copy.deepcopy(model.fields))

    @invariant()
    def what_is_listed_is_what_lives(self) -> None:
        hits = self.client.search({"project": self.project}, sort="id", limit=None)
        assert [file.id for file in hits] == sorted(self.alive())
        for file in hits:
            self._is_as_modelled(file)
        buried = self.client.search({"project": self.project}, limit=None, include_deleted=True)
        assert {file.id for file in buried} == set(self.models)

    @invariant()
    def every_id_answers_as_modelled(self) -> None:
        for id, model in self.models.items():
            if model.is_deleted:
                with pytest.raises(AqDataError) as failure:
                    self.client.get(id)
                assert failure.value.code == "deleted"
                assert self.client.get(id, include_deleted=True).state == "deleted"
            else:
                self._is_as_modelled(self.client.get(id))

    @invariant()
    def every_value_is_still_there(self) -> None:
        for id, model in self.alive().items():
            file = self.client.get(id)
            for name, array in model.arrays.items():
                found = file[name][...]
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array)
            for name, content in model.files.items():
                assert file.read_file(name) == content

    def _is_as_modelled(self, file: Any) -> None:
        model = self.models[file.id]
        assert {name: getattr(file, name) for name in model.fields} == model.fields
        assert (file.revision, file.state) == (model.revision, "complete")
        assert list(file) == list(model.arrays)
        assert sorted(file.files) == sorted(model.files)
        expected = sum(array.nbytes for array in model.arrays.values()) + sum(map(len, model.files.values()))
        assert file.size == expected


@pytest.mark.parametrize("way", WAYS)
def test_the_api_is_a_dict_of_documents_and_arrays(tmp_path, way):
    """Random walks over save, retry, patch, delete, going back, slice, search and attach: API and model never differ."""
    examples = max(8, settings().max_examples // 4)
    walk = settings(max_examples=examples, stateful_step_count=15)
    with opened(tmp_path / "data", way) as client:
        run_state_machine_as_test(lambda: DataFilesMachine(client), settings=walk)
