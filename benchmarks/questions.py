"""What W7 asks of a catalogue, a family of questions at a time, and what NumPy says the answers are.

Imports nothing but NumPy, since it also runs in Tiled's environment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.catalogue import (
    CHOICES,
    RARE_KEYS,
    TEN,
    Numbers,
    column,
    common_word,
    hours_at,
    instants_at,
    rare_word,
    serial_of,
    some_word,
    station_of,
    times_at,
    user_of,
    word,
)

__all__ = ["EXACT", "FAMILIES", "PAGE", "Answer", "Family", "Question", "Truth"]

PAGE = 100
EXACT = 10_000
"""Totals of a search are exact up to here."""

Mask: TypeAlias = NDArray[np.bool_]
Filter: TypeAlias = dict[str, Any]


class Truth:
    """The columns of a whole catalogue, each made once."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.numbers: Numbers = np.arange(count, dtype=np.uint64)
        self._columns: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._columns:
            self._columns[name] = column(name, self.numbers)
        return self._columns[name]

    @property
    def all(self) -> Mask:
        return np.ones(self.count, dtype=bool)

    def has_word(self, name: str, index: int) -> Mask:
        """Comments with one of the words that are there twice, or with another."""
        if name == "some_word":
            matching: Mask = (self["first_word"] == index) | (self["second_word"] == index)
            return matching
        other: Mask = self[name] == index
        return other


@dataclass(frozen=True)
class Answer:
    """In a form that every side can give: of a page the documents' numbers in order."""

    numbers: tuple[int, ...] = ()
    count: int = 0
    values: tuple[tuple[Any, int], ...] = ()


@dataclass(frozen=True)
class Question:
    """One request, and the documents that match it."""

    filter: Filter
    matching: Mask
    ask: Literal["search", "count", "distinct"] = "search"
    order: str = ""
    """The column that a page is in ascending order of; empty: newest first."""
    of: str = ""
    """The column whose distinct values are asked for."""

    @property
    def path(self) -> str:
        """Of what is asked for, or sorted by."""
        return _PATHS[self.of or self.order]

    @property
    def sort(self) -> str:
        return self.path if self.order else "-created_at"

    def expected(self, truth: Truth) -> Answer:
        found = np.flatnonzero(self.matching)
        if self.ask == "count":
            return Answer(count=len(found))
        if self.ask == "distinct":
            values, counts = np.unique(truth[self.of][found], return_counts=True)
            shown = [(_SHOWN[self.of](int(value)), int(count)) for value, count in zip(values, counts, strict=True)]
            return Answer(values=tuple(sorted(shown, key=lambda pair: (-pair[1], pair[0]))[:PAGE]))
        ordered = found[np.lexsort((found, truth[self.order][found]))] if self.order else found[::-1]
        return Answer(tuple(ordered[:PAGE].tolist()), min(len(found), EXACT))


@dataclass(frozen=True)
class Family:
    """Questions of one form, one for each number."""

    title: str
    make: Callable[[Truth, int], Question]


_PATHS = {
    "": "",
    "t1": "metadata.fit.t1",
    "t2": "metadata.fit.t2",
    "station": "station",
    "user": "user",
    "chip": "device.device_info.chip",
}
_SHOWN: dict[str, Callable[[int], str]] = {"station": station_of, "user": user_of, "chip": "C{}".format}
_TEMPERATURE = "instruments.fridge.settings.mxc_temperature.value"
_POWER = "instruments.vna.settings.power.value"


def _varied(k: int, among: int) -> int:
    """The k-th value, in no order that a cache could like."""
    return k * 7919 % among


def _key(truth: Truth, name: str, k: int) -> tuple[Filter, Mask]:
    value = _varied(k, CHOICES[name])
    return {f"metadata.sample.{name}": value}, truth[name] == value


def _keyed(name: str, **how: Any) -> Callable[[Truth, int], Question]:
    return lambda truth, k: Question(*_key(truth, name, k), **how)


def _everything(**how: Any) -> Callable[[Truth, int], Question]:
    return lambda truth, _: Question({}, truth.all, **how)


def _rare(truth: Truth, k: int) -> Question:
    name = RARE_KEYS[truth.count]
    value = _varied(k, truth.count // TEN)
    return Question({f"metadata.sample.{name}": value}, truth[name] == value)


def _chip(truth: Truth, k: int) -> tuple[Filter, Mask]:
    value = _varied(k, CHOICES["chip"])
    return {"device.device_info.chip": f"C{value}"}, truth["chip"] == value


def _two_keys(truth: Truth, k: int) -> Question:
    chip, percent = _chip(truth, k), _key(truth, "percent", k)
    return Question(chip[0] | percent[0], chip[1] & percent[1])


def _two_broad_keys(truth: Truth, k: int) -> Question:
    station, half = _varied(k, 10), _key(truth, "half", k // 10)
    return Question({"station": station_of(station)} | half[0], (truth["station"] == station) & half[1])


def _within(truth: Truth, k: int, width: float) -> tuple[Filter, Mask]:
    low = _varied(k, 9973) / 9973 * (100 - width)
    t1 = truth["t1"]
    return {"metadata.fit.t1": {"$gte": low, "$lt": low + width}}, (t1 >= low) & (t1 < low + width)


def _range(width: float, **how: Any) -> Callable[[Truth, int], Question]:
    return lambda truth, k: Question(*_within(truth, k, width), **how)


def _two_ranges(truth: Truth, k: int) -> Question:
    within, low = _within(truth, k, 10), -60 + _varied(k, 540) / 10
    power = truth["power"]
    return Question(within[0] | {_POWER: {"$gte": low, "$lt": low + 6}}, within[1] & (power >= low) & (power < low + 6))


def _month(truth: Truth, k: int) -> Question:
    """When the sample was made: dates that do not follow the order of saving."""
    first = _varied(k, 335 * 24)
    begin, end = instants_at(hours_at(np.array([first, first + 30 * 24])))
    made = truth["made"]
    filter = {"metadata.made_at": {"$gte": {"$date": begin}, "$lt": {"$date": end}}}
    return Question(filter, (made >= first) & (made < first + 30 * 24))


def _old_day(truth: Truth, k: int) -> Question:
    """Measurements of one day, long ago: a walk from the newest would pass all others first."""
    first = _varied(k, truth.count // 2)
    last = first + truth.count // 365
    begin, end = instants_at(times_at(np.array([first, last])))
    return Question({"measured_at": {"$gte": begin, "$lt": end}}, (truth.numbers >= first) & (truth.numbers < last))


def _old_day_of_key(truth: Truth, k: int) -> Question:
    day, tenth = _old_day(truth, k), _key(truth, "tenth", k)
    return Question(day.filter | tenth[0], day.matching & tenth[1])


def _in_list(truth: Truth, k: int) -> Question:
    users = [_varied(k, 50), _varied(k, 50) // 2, (_varied(k, 50) + 7) % 50]
    return Question({"user": {"$in": [user_of(user) for user in users]}}, np.isin(truth["user"], users))


def _either(truth: Truth, k: int) -> Question:
    left, right = _key(truth, "permille", k), _key(truth, "percent", k)
    return Question({"$or": [left[0], right[0]]}, left[1] | right[1])


def _other_than(ask: Literal["search", "count"]) -> Callable[[Truth, int], Question]:
    def make(truth: Truth, k: int) -> Question:
        station = _varied(k, 10)
        return Question({"station": {"$ne": station_of(station)}}, truth["station"] != station, ask)

    return make


def _key_without(truth: Truth, k: int) -> Question:
    percent, station = _key(truth, "percent", k), _varied(k, 10)
    filter = percent[0] | {"station": {"$ne": station_of(station)}}
    return Question(filter, percent[1] & (truth["station"] != station))


def _missing(truth: Truth, k: int) -> Question:
    return Question({"metadata.never": {"$exists": False}, **(own := _key(truth, "tenth", k))[0]}, own[1])


def _null(truth: Truth, k: int) -> Question:
    own = _key(truth, "permille", k)
    return Question({"pid": None, **own[0]}, own[1])


def _element(truth: Truth, k: int) -> Question:
    gain = _varied(k, CHOICES["gain"])
    return Question({"metadata.lines": {"$elemMatch": {"name": "flux", "gain": gain}}}, truth["second_gain"] == gain)


def _pattern(truth: Truth, k: int) -> Question:
    first = _varied(k, 4096)
    prefix = serial_of(first << 20)[: len("SN-") + 3]
    return Question({"metadata.serial": {"$regex": f"^{prefix}"}}, truth["serial"] >> 20 == first)


def _cold(truth: Truth, k: int) -> tuple[Filter, Mask]:
    """Colder than some 20 mK; stored are two digits, in mK or K, so no rounding of a unit decides."""
    limit = 15 + _varied(k, 1000) / 100 + 0.005
    return {_TEMPERATURE: {"$lt": f"{limit:.3f} mK"}}, truth["temperature"] < limit


def _quantity(**how: Any) -> Callable[[Truth, int], Question]:
    return lambda truth, k: Question(*_cold(truth, k), **how)


def _issue(truth: Truth, k: int) -> Question:
    """Which runs on chip C7 had the fridge below 20 mK and the VNA near -30 dBm, newest first?"""
    chip, cold, power = _chip(truth, k), _cold(truth, k), truth["power"]
    filter = chip[0] | cold[0] | {_POWER: {"$gte": -40, "$lt": -20}}
    return Question(filter, chip[1] & cold[1] & (power >= -40) & (power < -20))


def _text(text: str, matching: Mask, **how: Any) -> Question:
    return Question({"$text": text}, matching, **how)


def _rare_word(truth: Truth, k: int) -> Question:
    index = int(truth["rare_word"][_varied(k, truth.count)])
    return _text(rare_word(index), truth.has_word("rare_word", index))


def _one_word(truth: Truth, k: int) -> Question:
    index = _varied(k, 1000)
    return _text(some_word(index), truth.has_word("some_word", index))


def _two_words(truth: Truth, k: int) -> Question:
    number = _varied(k, truth.count)
    pair = int(truth["first_word"][number]), int(truth["second_word"][number])
    matching = truth.has_word("some_word", pair[0]) & truth.has_word("some_word", pair[1])
    return _text(f"{some_word(pair[0])} {some_word(pair[1])}", matching)


def _common_word(ask: Literal["search", "count"]) -> Callable[[Truth, int], Question]:
    def make(truth: Truth, k: int) -> Question:
        index = _varied(k, 10)
        return _text(common_word(index), truth.has_word("common_word", index), ask=ask)

    return make


def _common_and_rare(truth: Truth, k: int) -> Question:
    number = _varied(k, truth.count)
    common, rare = int(truth["common_word"][number]), int(truth["rare_word"][number])
    matching = truth.has_word("common_word", common) & truth.has_word("rare_word", rare)
    return _text(f"{common_word(common)} {rare_word(rare)}", matching)


def _prefix(truth: Truth, k: int) -> Question:
    """Three syllables of four: twenty words."""
    first = _varied(k, CHOICES["rare_word"] // 20)
    return _text(f"{word(first, 3)}*", truth["rare_word"] // 20 == first)


FAMILIES = {
    "equality": Family("equality, 10 hits", _rare),
    "and": Family("two keys AND, 0.2 % and 1 %", _two_keys),
    "and-broad": Family("two keys AND, 10 % and 50 %", _two_broad_keys),
    "range": Family("range of 1 %, by time", _range(1)),
    "range-sorted": Family("range of 1 %, by itself", _range(1, order="t1")),
    "range-broad": Family("range of 30 %, by time", _range(30)),
    "ranges": Family("two ranges of 10 %, by time", _two_ranges),
    "dates": Family("dates of a month, by time", _month),
    "day": Family("measured on an old day, by time", _old_day),
    "day-key": Family("measured on an old day, and 10 % key", _old_day_of_key),
    "time-0.1": Family("by time, 0.1 % key", _keyed("permille")),
    "time-1": Family("by time, 1 % key", _keyed("percent")),
    "time-10": Family("by time, 10 % key", _keyed("tenth")),
    "time-50": Family("by time, 50 % key", _keyed("half")),
    "time-all": Family("by time, everything", _everything()),
    "field-0.1": Family("by another field, 0.1 % key", _keyed("permille", order="t2")),
    "field-1": Family("by another field, 1 % key", _keyed("percent", order="t2")),
    "field-10": Family("by another field, 10 % key", _keyed("tenth", order="t2")),
    "field-all": Family("by another field, everything", _everything(order="t2")),
    "in": Family("$in of three, 6 %", _in_list),
    "or": Family("$or of 0.1 % and 1 %", _either),
    "ne": Family("$ne, 90 %", _other_than("search")),
    "ne-key": Family("1 % key and $ne", _key_without),
    "exists": Family("10 % key and $exists false", _missing),
    "null": Family("0.1 % key and null", _null),
    "count-10": Family("count, 10 % key", _keyed("tenth", ask="count")),
    "count-range": Family("count, range of 10 %", _range(10, ask="count")),
    "count-ne": Family("count, $ne, 90 %", _other_than("count")),
    "distinct": Family("distinct stations", _everything(ask="distinct", of="station")),
    "distinct-1": Family("distinct users, 1 % key", _keyed("percent", ask="distinct", of="user")),
    "distinct-10": Family("distinct chips, 10 % key", _keyed("tenth", ask="distinct", of="chip")),
    "element": Family("$elemMatch, 2 %", _element),
    "regex": Family("$regex with a prefix, 0.02 %", _pattern),
    "unit": Family('below "20 mK", 1 %', _quantity()),
    "unit-count": Family('count below "20 mK", 1 %', _quantity(ask="count")),
    "issue": Family('chip, below "20 mK", power range', _issue),
    "text-rare": Family("text, a word of 10 documents", _rare_word),
    "text-one": Family("text, a word of 0.2 %", _one_word),
    "text-two": Family("text, two words of 0.2 %", _two_words),
    "text-common": Family("text, a word of 10 %", _common_word("search")),
    "text-count": Family("text, count of a word of 10 %", _common_word("count")),
    "text-mixed": Family("text, a word of 10 % and a rare one", _common_and_rare),
    "text-prefix": Family("text, a prefix of 20 words", _prefix),
}
