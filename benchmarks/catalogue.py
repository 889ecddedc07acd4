"""The documents that W7 searches: number -> a measurement of about 2 kB and 80 leaves, the same on every machine.

Every varying value is a column, a hash of (column, number), so that NumPy can tell what any search must find without reading
a document. Imports nothing but NumPy, since it also runs in Tiled's environment.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.workloads import numbers_at

__all__ = [
    "CHOICES",
    "EXPERIMENTS",
    "GENERATOR_VERSION",
    "RARE_KEYS",
    "TEN",
    "Numbers",
    "column",
    "common_word",
    "documents",
    "hours_at",
    "instants_at",
    "serial_of",
    "some_word",
    "station_of",
    "times_at",
    "user_of",
    "word",
]

GENERATOR_VERSION = 1
"""Stores that were built from other documents are not used again."""

Numbers: TypeAlias = NDArray[np.uint64]

TEN = 10
RARE_KEYS = {10_000: "lot", 200_000: "wafer", 1_000_000: "die"}
"""`metadata.sample.<key>` has `TEN` documents of each value in a catalogue of that many documents."""

CHOICES = {
    "station": 10,
    "user": 50,
    "project": 8,
    "experiment": 12,
    "chip": 500,
    "qubit": 8,
    "flag": 10,
    "starred": 20,
    "tag": 40,
    "second_tag": 40,
    "permille": 1000,
    "percent": 100,
    "tenth": 10,
    "half": 2,
    "gain": 50,
    "second_gain": 50,
    "rare_word": 100_000,
    "first_word": 1000,
    "second_word": 1000,
    "common_word": 10,
    "in_millikelvin": 2,
    "points": 1000,
    "serial": 1 << 32,
    "delay": 20,
}
"""Columns of whole numbers below a bound, each as frequent as the next."""

_RANGES = {
    "t1": (0.0, 100.0, 4),
    "t2": (0.0, 100.0, 4),
    "contrast": (0.0, 1.0, 4),
    "temperature": (8.0, 1008.0, 2),
    "pressure": (0.0, 5.0, 3),
    "power": (-60.0, 0.0, 2),
    "frequency": (4.0, 8.0, 6),
    "bandwidth": (10.0, 1000.0, 1),
    "current": (-5.0, 5.0, 5),
    "made": (0.0, 365.0 * 24, 0),
}
"""Columns of numbers uniform between two bounds, rounded to so many digits, independent of time."""

_SEEDS = {name: seed for seed, name in enumerate((*CHOICES, *_RANGES), 7000)}

_YEAR = np.datetime64("2025-01-01T00:00:00", "us")
_STEP = np.timedelta64(31, "s")
"""Between two measurements: a million take a year."""
_BLOCK = 2000
"""Documents whose columns are made together."""

EXPERIMENTS = (
    "resonator spectroscopy",
    "qubit spectroscopy",
    "T1",
    "T2 echo",
    "Ramsey",
    "Rabi",
    "readout fidelity",
    "flux map",
    "punchout",
    "AllXY",
    "randomized benchmarking",
    "noise thermometry",
)
_FLAGS = ("none", "none", "none", "none", "none", "none", "green", "yellow", "orange", "red")
_SYLLABLES = (
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "ha",
    "je",
    "ki",
    "lo",
    "mu",
    "na",
    "pe",
    "qui",
    "ro",
    "su",
    "ta",
    "ve",
    "wi",
    "xo",
    "zu",
)


def column(name: str, numbers: Numbers) -> NDArray[Any]:
    """One column of these documents."""
    if name in RARE_KEYS.values():
        return _rare(name, numbers)
    uniform = numbers_at(numbers, _SEEDS[name])
    if name in CHOICES:
        return (uniform * CHOICES[name]).astype(np.int64)
    low, high, digits = _RANGES[name]
    return np.round(low + uniform * (high - low), digits)


def _rare(name: str, numbers: Numbers) -> NDArray[np.int64]:
    """A permutation of `count / TEN` values, again and again: no two documents of a value are neighbours."""
    count = next(count for count, key in RARE_KEYS.items() if key == name)
    return (numbers * np.uint64(7919) % np.uint64(count // TEN)).astype(np.int64)


def times_at(numbers: Numbers) -> NDArray[np.datetime64]:
    """`measured_at`: it grows with the number."""
    return _YEAR + numbers.astype(np.int64) * _STEP


def hours_at(hours: NDArray[Any]) -> NDArray[np.datetime64]:
    """The instants that lie so many hours inside the catalogue's year."""
    return _YEAR + hours.astype(np.int64) * np.timedelta64(3600, "s")


def instants_at(times: NDArray[np.datetime64]) -> list[str]:
    """Times in the text form of documents."""
    texts: list[str] = np.datetime_as_string(times, unit="us", timezone="UTC").tolist()
    return texts


def word(index: int, syllables: int) -> str:
    """The word of that index among all of so many syllables; neighbours begin alike."""
    parts = []
    for _ in range(syllables):
        index, syllable = divmod(index, len(_SYLLABLES))
        parts.append(_SYLLABLES[syllable])
    return "".join(reversed(parts))


def rare_word(index: int) -> str:
    return word(index, 4)


def some_word(index: int) -> str:
    """One of 1,000; a comment has two, which may be the same."""
    return "n" + word(index, 3)


def common_word(index: int) -> str:
    """One of ten; every comment has one."""
    return ("stable", "drifting", "noisy", "saturated", "warm", "repeated", "tuned", "unclear", "hysteretic", "clean")[index]


def station_of(index: int) -> str:
    return f"fridge-{index}"


def user_of(index: int) -> str:
    return f"user{index:02d}"


def serial_of(index: int) -> str:
    return f"SN-{index:08x}"


def documents(start: int, stop: int) -> Iterator[dict[str, Any]]:
    """The documents from `start` to before `stop`, in JSON form: typed fields, `metadata`, `arrays`, and the times and size
    that a server would add; no id, state or revision.
    """
    names = (*CHOICES, *_RANGES, *RARE_KEYS.values())
    for first in range(start, stop, _BLOCK):
        numbers = np.arange(first, min(first + _BLOCK, stop), dtype=np.uint64)
        times = times_at(numbers)
        rows = zip(*(column(name, numbers).tolist() for name in names), strict=True)
        measured = instants_at(times)
        created = instants_at(times + (2 + column("delay", numbers)) * np.timedelta64(1, "s"))
        made = instants_at(hours_at(column("made", numbers)))
        for offset, row in enumerate(rows):
            c = dict(zip(names, row, strict=True)) | {"number": first + offset}
            yield _document(c, measured[offset], created[offset], made[offset])


def _document(c: dict[str, Any], measured: str, created: str, made: str) -> dict[str, Any]:
    experiment, qubit = EXPERIMENTS[c["experiment"]], f"q{c['qubit']}"
    words = (common_word(c["common_word"]), some_word(c["first_word"]), some_word(c["second_word"]))
    points = 101 + c["points"]
    return {
        "name": f"{experiment} {qubit}",
        "user": user_of(c["user"]),
        "project": f"project-{c['project']}",
        "station": station_of(c["station"]),
        "device": {"device_info": {"chip": f"C{c['chip']}", "design": f"xmon-{c['chip'] % 7}"}, "qubit": qubit},
        "instruments": _instruments(c),
        "tags": list(dict.fromkeys((f"tag{c['tag']}", f"tag{c['second_tag']}"))),
        "flag": _FLAGS[c["flag"]],
        "starred": c["starred"] == 0,
        "comment": f"{' '.join(words)} {rare_word(c['rare_word'])}",
        "measured_at": measured,
        "created_at": created,
        "updated_at": created,
        "finished_at": created,
        "size": points * 27 * 16 + points * 8 + 27 * 8,
        "metadata": {
            "number": c["number"],
            "sample": {key: c[key] for key in (*RARE_KEYS.values(), "permille", "percent", "tenth", "half")},
            "serial": serial_of(c["serial"]),
            "made_at": {"$date": made},
            "fit": {"t1": c["t1"], "t2": c["t2"], "contrast": c["contrast"], "converged": c["half"] == 0},
            "lines": [{"name": "drive", "gain": c["gain"]}, {"name": "flux", "gain": c["second_gain"]}],
        },
        "arrays": [
            _array("frequency", [points], ["frequency"], "coordinate", {"units": "Hz"}),
            _array("flux", [27], ["flux"], "coordinate", {"units": "V"}),
            _array("s21", [points, 27], ["frequency", "flux"], "data", {}),
        ],
    }


def _instruments(c: dict[str, Any]) -> dict[str, Any]:
    # Both units for one setting: a search by quantity has to convert.
    temperature = _quantity(c["temperature"], "mK") if c["in_millikelvin"] else _quantity(c["temperature"] / 1000, "K")
    return {
        "fridge": {
            "model": "LD400",
            "settings": {"mxc_temperature": temperature, "still_pressure": _quantity(c["pressure"], "mbar")},
        },
        "vna": {
            "model": "N5222B",
            "address": "TCPIP::10.0.0.7::INSTR",
            "settings": {
                "power": _quantity(c["power"], "dBm"),
                "frequency": _quantity(c["frequency"], "GHz"),
                "bandwidth": _quantity(c["bandwidth"], "Hz"),
            },
        },
        "source": {"model": "GS200", "settings": {"current": _quantity(c["current"], "mA")}},
    }


def _quantity(value: float, unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit}


def _array(name: str, shape: list[int], dims: list[str], role: str, attrs: dict[str, Any]) -> dict[str, Any]:
    item = 8 if role == "coordinate" else 16
    size = item * int(np.prod(shape))
    dtype = "<f8" if role == "coordinate" else "<c16"
    return {
        "name": name,
        "dtype": dtype,
        "shape": shape,
        "dims": dims,
        "chunks": shape,
        "nbytes": size,
        "role": role,
        "attrs": attrs,
    }
