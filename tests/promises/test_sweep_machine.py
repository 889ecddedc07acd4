"""Sweeps over the HTTP API beside NumPy arrays with a written mask: several writers, folding all the time, every way to read."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import httpx
import numpy as np
import pytest
import zarr
from aq_server.commands.serving import running
from aq_server.service import folding
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from services.deployment import deployed
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

import aq_data
from aq_data.errors import AqDataError, ConflictError, NotFoundError, ValidationError
from aq_data.storage.arrays.chunking import chunk_grid

K = 3
MOST = 400
DIMS = {"iq": ("k", "x"), "n": ("x",), "label": ("x",), "s": (), "map": ("y", "x"), "x": ("x",)}
DTYPES = {"iq": "<c16", "n": "<i4", "label": "string", "s": "<f8", "map": "|b1", "x": "<f8"}
FILLS = {"iq": complex("nan+nanj"), "n": 0, "label": "", "s": float("nan"), "map": False, "x": float("nan")}
NAMES = st.lists(st.sampled_from(sorted(DIMS)), min_size=1, max_size=3, unique=True)

numbers = itertools.count(1)
runs = itertools.count()


def values_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    made = np.array([next(numbers) for _ in range(int(np.prod(shape, dtype=int)))]).reshape(shape)
    if name == "label":
        return np.array([f"ü{n}" for n in made.reshape(-1)], object).reshape(shape)
    return (made % 2 == 1) if name == "map" else made.astype(DTYPES[name])


def let_go(writer: Any) -> None:
    """Of a writer, also of one that was refused for good."""
    with contextlib.suppress(AqDataError):
        writer.leave(1)
    writer.close()


class SweepMachine(RuleBasedStateMachine):
    """Every rule does one thing to the server and to the model; after each, all that a reader may ask is compared."""

    def __init__(self, url: str, client: aq_data.Client) -> None:
        super().__init__()
        self.url, self.client, self.http = url, client, httpx.Client()
        self.writers: list[Any] = []
        self.state, self.last_event = "none", ""

    # --- the model -------------------------------------------------------------------------------------------------

    @initialize()
    def open(self) -> None:
        self.writers = [
            self.client.sweep(
                f"run {next(runs)}",
                dims={"k": np.arange(K), "x": None, "y": None},
                variables={name: (str if DTYPES[name] == "string" else DTYPES[name], dims) for name, dims in DIMS.items()},
                chunks={"iq": (2, 3), "map": (2, 4), "n": (5,)},
            )
        ]
        self.id, self.state, self.comment, self.files = self.writers[0].id, "open", "", {}
        self.extents, self.revision, self.last_event = {"x": 0, "y": 0, "k": K}, 1, ""
        self.values = {
            name: np.full((MOST,) * len(dims), FILLS[name], object if DTYPES[name] == "string" else DTYPES[name])
            for name, dims in DIMS.items()
        }
        self.masks = {name: np.zeros((MOST,) * len(dims), bool) for name, dims in DIMS.items()}
        self.seen = {name: np.zeros((MOST,) * len(dims), bool) for name, dims in DIMS.items()}
        self.seen_blocks, self.seen_revision = 0, 1

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.extents[dim] for dim in DIMS[name])

    def put(self, parts: dict[str, np.ndarray], starts: dict[str, dict[str, int]]) -> None:
        for name, part in parts.items():
            where = tuple(
                slice(starts[name].get(dim, 0), starts[name].get(dim, 0) + n)
                for dim, n in zip(DIMS[name], part.shape, strict=True)
            )
            if 0 in part.shape:
                continue
            self.values[name][where], self.masks[name][where] = part, True
            for dim, entry in zip(DIMS[name], where, strict=True):
                self.extents[dim] = max(self.extents[dim], entry.stop)

    def writer(self, number: int) -> Any:
        """One of the writers; what the others wrote has arrived, so that the order is known."""
        chosen = self.writers[number % len(self.writers)]
        for other in self.writers:
            if other is not chosen:
                other.flush(30)
        return chosen

    def flush(self) -> None:
        for writer in self.writers if self.state == "open" else ():
            writer.flush(30)
            assert tuple(writer.lag) == (0, 0, 0.0)

    is_open = precondition(lambda self: self.state == "open")
    is_there = precondition(lambda self: self.state not in ("deleted", "none"))

    # --- writing ---------------------------------------------------------------------------------------------------

    @is_open
    @rule(
        number=st.integers(0, 3),
        names=NAMES,
        steps=st.lists(st.integers(0, 4), min_size=1, max_size=5),
        dim=st.sampled_from("xxy"),
    )
    def append(self, number: int, names: list[str], steps: list[int], dim: str) -> None:
        """Several calls in a row, which the client may send as one block."""
        names = [name for name in names if dim in DIMS[name]] or ["map"]
        writer = self.writer(number)
        for count in steps:
            parts, starts = {}, {}
            end = self.extents[dim]
            for name in names:
                parts[name] = values_of(name, tuple({dim: count, "k": K}.get(d, 2) for d in DIMS[name]))
                starts[name] = {dim: end}
            writer.append(parts, dim=dim)
            self.put(parts, starts)

    @is_open
    @rule(
        number=st.integers(0, 3), names=NAMES, x=st.integers(0, 20), y=st.integers(0, 5), k=st.integers(0, K - 1),
        length=st.integers(0, 6), is_indexed=st.booleans(),
    )  # fmt: skip
    def write(self, number: int, names: list[str], x: int, y: int, k: int, length: int, is_indexed: bool) -> None:
        """A region anywhere, also over what is there."""
        parts, at = {}, {}
        used = {dim for name in names for dim in DIMS[name]}
        for dim, start in (("x", x), ("y", y), ("k", k)):
            if dim in used:
                at[dim] = start if is_indexed and dim != "x" else slice(start, None)
        for name in names:
            sizes = {"x": length, "y": 1 if is_indexed else 2, "k": 1 if is_indexed else K - k}
            parts[name] = values_of(name, tuple(sizes[dim] for dim in DIMS[name]))
        given = {
            name: part.reshape([n for d, n in zip(DIMS[name], part.shape, strict=True) if not isinstance(at[d], int)])
            for name, part in parts.items()
        }
        self.writer(number).write(given, at=at or None)
        self.put(parts, {name: {"x": x, "y": y, "k": k} for name in names})

    @is_open
    @rule(number=st.integers(0, 3))
    def a_mistake_raises_at_once_and_changes_nothing(self, number: int) -> None:
        writer = self.writers[number % len(self.writers)]
        for call in (
            lambda: writer.write(iq=np.zeros((K + 1, 1), complex)),
            lambda: writer.write(n=1.5, at={"x": 0}),
            lambda: writer.append(nobody=1, dim="x"),
            lambda: writer.write(n=[1], at={"x": -1}),
            lambda: writer.append(n=[1], dim="k"),
        ):
            with pytest.raises(ValidationError):
                call()

    @is_open
    @precondition(lambda self: len(self.writers) < 3)
    @rule()
    def resume(self) -> None:
        """One more writer."""
        self.writers.append(self.client.resume_sweep(self.id))

    @is_open
    @precondition(lambda self: len(self.writers) > 1)
    @rule(number=st.integers(0, 3))
    def leave(self, number: int) -> None:
        self.writers.pop(number % len(self.writers)).leave(30)

    @is_open
    @rule(number=st.integers(0, 3), outcome=st.sampled_from(["complete", "abandoned"]))
    def end(self, number: int, outcome: str) -> None:
        """The others are refused from then on; doing it again is harmless."""
        writer = self.writer(number)
        for _ in range(2):
            writer.finish(30) if outcome == "complete" else writer.abandon("why not", 30)
        self.state, self.revision = outcome, self.revision + 1
        for other in self.writers:
            with pytest.raises(ConflictError):
                other.append(n=1, dim="x")
                other.flush(30)
        with pytest.raises(ConflictError):
            self.client.resume_sweep(self.id)
        for other in self.writers:
            if other is not writer:
                let_go(other)

    # --- the document ----------------------------------------------------------------------------------------------

    @is_there
    @rule(comment=st.sampled_from(["good", "bad", "ü"]))
    def patch(self, comment: str) -> None:
        file = self.client.update(self.id, {"comment": comment})
        self.comment, self.revision = comment, self.revision + 1
        assert file.revision == self.revision

    @is_there
    @rule(name=st.sampled_from(["a.txt", "b.bin"]))
    def attach(self, name: str) -> None:
        """New, or the same again."""
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(name.encode() * 100)
            self.client.get(self.id).attach(path)
        self.revision += name not in self.files
        self.files[name] = name.encode() * 100

    @is_there
    @rule()
    def delete(self) -> None:
        """Nothing can be read or written any more; a new sweep begins."""
        for writer in self.writers:
            if self.state == "open":
                writer.flush(30)
        self.client.delete(self.id)
        for ask in (lambda: self.client.get(self.id), lambda: list(self.client.follow(self.id))):
            with pytest.raises(NotFoundError) as failure:
                ask()
            assert failure.value.code == "deleted"
        if self.state == "open":
            with pytest.raises(NotFoundError):
                self.writers[0].append(n=1, dim="x")
                self.writers[0].flush(30)
            for writer in self.writers:
                let_go(writer)
        self.open()

    # --- what holds after every step -------------------------------------------------------------------------------

    @is_there
    @invariant()
    def every_reader_sees_what_was_acknowledged(self) -> None:
        self.flush()
        file = self.client.get(self.id)
        assert (file.state, file.revision, file.comment) == (self.state, self.revision, self.comment)
        assert sorted(file.files) == sorted(self.files)
        # The own coordinate of a dim that has grown is there once somebody wrote it; nobody ever writes that of y.
        hidden = {dim for dim in ("x", "y") if self.extents[dim] and not (dim == "x" and self.masks["x"].any())}
        assert set(file) == (set(DIMS) | {"k", "y"}) - hidden
        dataset = file.open(live=True)
        group = self.zarr_view()
        for name in sorted(set(DIMS) - hidden):
            inside = tuple(map(slice, self.shape(name)))
            expected, mask = self.values[name][(*inside, ...)], self.masks[name][(*inside, ...)]
            array = file[name]
            assert array.shape == expected.shape
            found = np.asarray(array[...])
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(file.written(name), mask)
            back = (slice(None, None, -2),) * expected.ndim
            np.testing.assert_array_equal(np.asarray(array[back]), expected[back])
            np.testing.assert_array_equal(dataset[name].values, expected)
            np.testing.assert_array_equal(np.asarray(group[name][...]).astype(expected.dtype), expected)
        np.testing.assert_array_equal(file["k"][...], np.arange(K))

    def zarr_view(self) -> zarr.Group:
        """Every key that the metadata name, fetched as a reader that speaks HTTP does; 404 is a chunk of fill values."""
        base, found = f"{self.url}/api/v1/datafiles/{self.id}/zarr", {}
        document = self.http.get(f"{base}/zarr.json").raise_for_status()
        found["zarr.json"] = document.content
        for name, array in document.json()["consolidated_metadata"]["metadata"].items():
            grid = chunk_grid(array["shape"], array["chunk_grid"]["configuration"]["chunk_shape"])
            for key in (f"{name}/zarr.json", *("/".join([name, "c", *map(str, index)]) for index in np.ndindex(*grid))):
                answer = self.http.get(f"{base}/{key}")
                assert answer.status_code in (200, 404), (key, answer.text)
                if answer.status_code == 200:
                    found[key] = answer.content
        buffers = {key: default_buffer_prototype().buffer.from_bytes(content) for key, content in found.items()}
        return zarr.open_group(MemoryStore(buffers), mode="r", zarr_format=3)

    @is_there
    @invariant()
    def events_tell_each_block_once_and_what_was_written(self) -> None:
        """Going on from the last event: what the blocks name is what is measured now."""
        self.flush()
        head = self.client.get(self.id).sweep["head"]
        if (self.seen_blocks, self.seen_revision) == (head, self.revision):
            return
        stream = self.client.follow(self.id, self.last_event)
        with contextlib.closing(stream):
            for event in stream:
                self.last_event = event.id
                if event.kind == "block":
                    self.seen_blocks += 1
                    assert event.data["seq"] == self.seen_blocks
                    for part in event.data["variables"]:
                        if part["name"] in self.seen:
                            where = tuple(slice(s, s + n) for s, n in zip(part["start"], part["shape"], strict=True))
                            self.seen[part["name"]][where] = True
                else:
                    self.seen_revision += 1
                    assert event.id.endswith(f"-{self.seen_revision}")
                    if event.kind == "metadata":
                        assert event.data == {"revision": self.seen_revision}
                    else:
                        assert event.kind == {"complete": "finished", "abandoned": "abandoned"}[self.state]
                if (self.seen_blocks, self.seen_revision) == (head, self.revision):
                    break
        assert self.seen_blocks == head
        for name, mask in self.masks.items():
            np.testing.assert_array_equal(self.seen[name], mask)

    def teardown(self) -> None:
        for writer in self.writers:
            let_go(writer)
        self.http.close()


@pytest.mark.filterwarnings("ignore:.*(V3 specification|vlen|consolidated).*")
def test_a_sweep_is_a_set_of_numpy_arrays_for_every_reader_at_every_moment(tmp_path, monkeypatch):
    """Random walks over everything a measurement does, while the server folds after every few blocks."""
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(folding, "FOLD_BLOCKS", 2)
    monkeypatch.setattr(folding, "FOLD_SECONDS", 0.05)
    monkeypatch.setattr(folding, "LOOK_SECONDS", 0.02)
    walk = settings(max_examples=max(8, settings().max_examples // 6), stateful_step_count=10)
    with running(deployed(tmp_path / "data")) as url, aq_data.connect(url) as client:
        run_state_machine_as_test(lambda: SweepMachine(url, client), settings=walk)
