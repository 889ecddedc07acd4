"""Recorded instrument snapshots are searched by their real paths, units and text; what is right is reckoned from the JSON by plain Python."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from services.deployment import opened

import aq_data

# Beside the project (or above it, where the tests lie elsewhere): not part of the repository.
DATA = next((above / "shared" / "data" for above in Path(__file__).parents if (above / "shared" / "data").is_dir()), None)
SNAPSHOTS = sorted((DATA / "quantum").glob("*/snapshot.json")) if DATA else []
TREES = {path.parent.name: json.loads(path.read_text()) for path in SNAPSHOTS}

pytestmark = pytest.mark.skipif(
    DATA is None, reason="the recorded data is not here: no folder shared/data beside the project"
)

SI: dict[str, tuple[str, Callable[[float], float]]] = {
    "Hz": ("MHz", lambda v: v * 1e6), "s": ("us", lambda v: v * 1e-6), "V": ("mV", lambda v: v * 1e-3), "A": ("uA", lambda v: v * 1e-6),
    "m": ("cm", lambda v: v * 1e-2), "dBm": ("uW", lambda v: 10 * math.log10(v * 1e-3)), "Degrees": ("deg", lambda v: v), "A/s": ("mA/s", lambda v: v * 1e-3),
}  # fmt: skip
"""For each unit that was recorded another one, and what a value in that is in the recorded one."""


def settings_of(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Where each setting of a snapshot keeps its value, the value and its unit."""
    if isinstance(tree, dict):
        if "value" in tree and isinstance(tree.get("unit"), str):
            yield (*path, "value"), tree["value"], tree["unit"]
        for key, value in tree.items():
            yield from settings_of(value, (*path, key))


def dotted(path: tuple[str, ...]) -> str:
    return ".".join(part.replace("\\", "\\\\").replace(".", "\\.") for part in ("snapshot", *path))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[aq_data.Client]:
    """One archive with every snapshot: whole as free metadata, its instruments' settings as typed fields."""
    with opened(tmp_path_factory.mktemp("archive")) as client:
        for name, tree in TREES.items():
            instruments = {
                instrument: {"settings": {key: {"value": p.get("value"), "unit": p.get("unit") or ""} for key, p in known["parameters"].items()}}
                for instrument, known in tree["instruments"].items()
            }  # fmt: skip
            client.save(name=name, metadata={"snapshot": tree}, instruments=instruments)
        yield client


KNOWN = {name: {path: (value, unit) for path, value, unit in settings_of(tree)} for name, tree in TREES.items()}


def found(lab: aq_data.Client, query: dict[str, Any], **options: Any) -> set[str]:
    return {hit.name for hit in lab.search(query, limit=100, **options)}


def test_all_snapshots_are_here():
    """A guard: nine of them, with units."""
    assert len(SNAPSHOTS) == 9
    assert {unit for known in KNOWN.values() for _, unit in known.values()} >= {"dBm", "Hz", "Degrees", "s", "V", "A", ""}


def test_every_kind_of_value_finds_the_measurements_that_had_it(lab):
    """By its real path: texts, numbers, truth values, nothing."""
    asked: Counter[str] = Counter()
    every = sorted({path for known in KNOWN.values() for path in known})
    for path in every[:: max(1, len(every) // 120)]:
        for value in {json.dumps(known[path][0]): known[path][0] for known in KNOWN.values() if path in known}.values():
            if isinstance(value, (dict, list)):
                continue
            same = {n for n, known in KNOWN.items() if (known[path][0] if path in known else None) == value
                    and (path not in known or isinstance(known[path][0], bool) == isinstance(value, bool))}  # fmt: skip
            lists = {
                n
                for n, known in KNOWN.items()
                if path in known and isinstance(known[path][0], list) and value in known[path][0]
            }
            assert found(lab, {dotted(path): value}) == same | lists, (path, value)
            assert found(lab, {dotted(path): {"$ne": value}}) == set(KNOWN) - same - lists, (path, value)
            asked[type(value).__name__] += 1
    assert set(asked) >= {"str", "bool", "int", "float", "NoneType"}


@pytest.mark.parametrize("unit", SI)
def test_a_range_in_another_unit_finds_what_the_numbers_say(lab, unit):
    """In the unit that was recorded, in another, and bare: the same measurements."""
    other, back = SI[unit]
    paths = sorted(
        {path for known in KNOWN.values() for path, (value, u) in known.items() if u == unit and is_number(value)}
    )
    if not paths:
        pytest.skip(f"no number was recorded in {unit}")
    for path in paths[:: max(1, len(paths) // 12)]:
        numbers = {n: known[path][0] for n, known in KNOWN.items() if path in known and is_number(known[path][0])}
        middle = sorted(numbers.values())[len(numbers) // 2]
        below = {n for n, value in numbers.items() if value < middle}
        assert found(lab, {dotted(path): {"$lt": middle}}) == below
        assert found(lab, {dotted(path): {"$lt": f"{middle!r} {unit}"}}) == below
        assert found(lab, {dotted(path): {"$gte": f"{middle!r} {unit}"}}) == set(numbers) - below
        assert found(lab, {dotted(path): f"{middle!r} {unit}"}) == {n for n, value in numbers.items() if value == middle}
        for amount in (0.5, 3, 1000):
            limit = back(amount)
            if all(abs(value - limit) > 1e-9 * max(abs(value), abs(limit)) for value in numbers.values()):
                expected = {n for n, value in numbers.items() if value < limit}
                assert found(lab, {dotted(path): {"$lt": f"{amount} {other}"}}) == expected, (path, amount, other)


@pytest.mark.parametrize(("unit", "other"), [("dBm", "5 GHz"), ("Hz", "20 mK"), ("V", "1 A"), ("s", "3 m")])
def test_another_dimension_than_was_recorded_is_refused(lab, unit, other):
    """Rather than answered with nothing."""
    path = next(
        path for known in KNOWN.values() for path, (value, u) in sorted(known.items()) if u == unit and is_number(value)
    )
    with pytest.raises(aq_data.errors.QueryError, match=re.escape("is measured in")):
        lab.search({dotted(path): {"$lt": other}}, limit=1).total  # noqa: B018  (which asks)


def test_settings_of_instruments_are_found_as_typed_fields(lab):
    """`instruments.<name>.settings.<setting>.value`, with units."""
    asked = 0
    for instrument, setting in sorted(
        {(i, s) for tree in TREES.values() for i, known in tree["instruments"].items() for s in known["parameters"]}
    )[::25]:
        values = {
            n: tree["instruments"][instrument]["parameters"][setting].get("value")
            for n, tree in TREES.items()
            if setting in tree["instruments"].get(instrument, {}).get("parameters", {})
        }
        field = dotted(("", instrument, "settings", setting, "value")).replace("snapshot.", "instruments", 1)
        assert found(lab, {field: {"$exists": True}}) == set(values), field
        for n, value in values.items():
            if is_number(value):
                assert n in found(lab, {field: {"$gte": value}})
                asked += 1
    assert asked


@pytest.mark.parametrize(
    "text",
    [
        "T1",
        "pulsed spectroscopy",
        "Pulsed_spectroscopy_q4",
        "mockDev",
        "lo_ro",
        "Instruments Monitor",
        "meas ctrl",
        "q4 pulsed",
        "dummyinstrument",
        "hetero",
        "absent",
    ],
)
def test_text_finds_names_and_instruments(lab, text):
    """All words, each the beginning of one in the name, an instrument, a setting, or a text."""

    def texts(name: str, tree: Any) -> Iterator[str]:
        yield name
        for instrument, known in tree["instruments"].items():
            yield instrument
            yield from known["parameters"]
        stack = [tree]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                yield item
            elif isinstance(item, (list, dict)):
                stack += item if isinstance(item, list) else item.values()

    wanted = re.findall("[a-z0-9]+", text.lower())
    expected = {
        name
        for name, tree in TREES.items()
        if all(
            any(w.startswith(word) for t in texts(name, tree) for w in re.findall("[a-z0-9]+", t.lower())) for word in wanted
        )
    }
    assert found(lab, {"$text": text}) == expected
    assert lab.count({"$text": text}) == len(expected)


def test_a_question_of_several_settings_is_their_conjunction(lab):
    """Frequency, power and text together, newest first."""
    path = ("instruments", "lo_ro", "parameters", "frequency", "value")
    if not any(path in known for known in KNOWN.values()):
        pytest.skip("the read-out source was not recorded")
    query = {dotted(path): {"$gt": "1 GHz", "$lt": "20 GHz"}, "$text": "pulsed q4"}
    expected = [
        n
        for n, known in KNOWN.items()
        if path in known and is_number(known[path][0]) and 1e9 < known[path][0] < 20e9 and "Pulsed" in n and n.endswith("q4")
    ]
    assert [hit.name for hit in lab.search(query, sort="-name", limit=10)] == sorted(expected, reverse=True)
    assert expected
