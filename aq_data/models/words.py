"""Words, for finding text: our own, so that every store finds the same.

A word is a run of letters and digits, folded: "Résonator_Q3" has the words `resonator` and `q3`. Underscores and punctuation
separate words. A document is found by the words of its texts and by the names of its instruments and their settings.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from aq_data.errors import QueryError
from aq_data.models.datafile import DATE_FIELDS, SERVER_FIELDS
from aq_data.models.paths import UNSEARCHED, escape_segment
from aq_data.models.values import tag_of

__all__ = ["document_words", "highlights", "parse_words", "words_of"]

MAX_WORDS = 20
MAX_WORD = 64
"""Characters of a word that count; of longer ones only so many."""

_UNREAD = SERVER_FIELDS | DATE_FIELDS | UNSEARCHED | {"kind", "flag", "starred"}
# Marks on letters: Latin, Greek and Cyrillic, Hebrew, Arabic, kana.
_MARKS = (
    r"\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    r"\u0610-\u061a\u064b-\u065f\u0670\u3099\u309a"
)
_RUN = re.compile(rf"(?:[^\W_]|[{_MARKS}])+")
_PART = re.compile(r"[^\W_]+")
_ASCII = re.compile(r"[a-z0-9]+")

SHOWN = 5
"""Highlights of one document."""
AROUND = 60
"""Characters shown on each side of a highlight."""


def words_of(text: str) -> Iterator[str]:
    """The words of a text, folded; repeats included."""
    if text.isascii():
        yield from (word[:MAX_WORD] for word in _ASCII.findall(text.lower()))
    else:
        for run in _RUN.findall(text):
            yield from _folded(run)


def _folded(run: str) -> list[str]:
    """One run without case and accents; compatibility forms may make it several words."""
    plain = unicodedata.normalize("NFKD", run).casefold()
    plain = "".join(ch for ch in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(ch))
    return [word[:MAX_WORD] for word in _PART.findall(plain)]


def parse_words(text: str) -> tuple[str, ...]:
    """The words to be found, each the beginning of a word; QueryError when there are none or too many."""
    found = tuple(dict.fromkeys(words_of(text)))
    if not found:
        raise QueryError(f"the text {text[:60]!r} has no letters or digits to look for", operator="$text")
    if len(found) > MAX_WORDS:
        raise QueryError(f"a text to look for has at most {MAX_WORDS} words, not {len(found)}", operator="$text")
    return found


def document_words(document: Mapping[str, Any]) -> frozenset[str]:
    """Every word a document in its JSON form is found by."""
    texts: list[str] = []
    for field, value in document.items():
        if field not in _UNREAD:
            _gather(value, texts)
    for name, settings in _instruments(document):
        texts += [name, *settings]
    return frozenset(words_of("\n".join(texts)))


def _gather(value: Any, texts: list[str]) -> None:
    """Append every text in a value; as `_look_below`, without the paths, for every save runs through here."""
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, list):
        for item in value:
            _gather(item, texts)
    elif isinstance(value, dict):
        tag = tag_of(value)
        if tag is None or tag == "$literal":
            for item in (value if tag is None else value["$literal"]).values():
                if isinstance(item, (str, dict, list)):
                    _gather(item, texts)


def highlights(document: Mapping[str, Any], words: tuple[str, ...]) -> list[dict[str, Any]]:
    """Where the words stand: `path`, a `text` around the first place, and `spans`, half-open [start, stop) positions in it.

    At most five, of an endless word the beginning; a place with a word that no other has shown comes first.
    """
    places: list[tuple[int, dict[str, Any]]] = []
    missing = set(words)
    found: list[tuple[Step, str]] = []
    _look(document, _beginning(words).search, found)
    for step, text in found:
        spans, shown = _spans(text, words)
        if spans:
            fresh = len(shown & missing)
            missing -= shown
            start, stop = max(0, spans[0][0] - AROUND), min(len(text), spans[0][1] + AROUND)
            within = [[low - start, high - start] for low, high in spans if high <= stop]
            places.append((-fresh, {"path": _path_of(step), "text": text[start:stop], "spans": within}))
    return [place for _, place in sorted(places, key=lambda item: item[0])[:SHOWN]]


def _spans(text: str, words: tuple[str, ...]) -> tuple[list[tuple[int, int]], set[str]]:
    spans: list[tuple[int, int]] = []
    shown: set[str] = set()
    for run in _RUN.finditer(text):
        parts = [run[0].lower()] if run[0].isascii() else _folded(run[0])
        hit = {word for part in parts for word in words if part.startswith(word)}
        if hit:
            spans.append((run.start(), min(run.end(), run.start() + 2 * MAX_WORD)))
            shown |= hit
    return spans, shown


Step = tuple[Any, str]
"""A place in a document: that of what is around it (None for the document), and its key there."""
Sees = Callable[[str], Any]


@lru_cache(100)
def _beginning(words: tuple[str, ...]) -> re.Pattern[str]:
    """Matches each text that may have one of the words; of texts in ASCII no other, but for words of another script."""
    some = "|".join(map(re.escape, words))
    return re.compile(rf"(?<![a-z0-9])(?:{some})|[^\x00-\x7f]", re.ASCII | re.IGNORECASE)


def _look(document: Mapping[str, Any], sees: Sees, found: list[tuple[Step, str]]) -> None:
    """Append every place that is read for words, and its text, of those that `sees` does not pass over."""
    for field, value in document.items():
        if field not in _UNREAD:
            _look_below((None, field), value, sees, found)
    for name, settings in _instruments(document):
        instrument = ((None, "instruments"), name)
        if sees(name):
            found.append((instrument, name))
        found += ((((instrument, "settings"), setting), setting) for setting in settings if sees(setting))


def _look_below(step: Step, value: Any, sees: Sees, found: list[tuple[Step, str]]) -> None:
    if isinstance(value, str):
        if sees(value):
            found.append((step, value))
    elif isinstance(value, list):
        for item in value:
            _look_below(step, item, sees, found)
    elif isinstance(value, dict):
        tag = tag_of(value)
        if tag is None or tag == "$literal":
            for key, item in (value if tag is None else value["$literal"]).items():
                if isinstance(item, (str, dict, list)):
                    _look_below((step, key), item, sees, found)


def _path_of(step: Step) -> str:
    around, key = step
    return escape_segment(key) if around is None else f"{_path_of(around)}.{escape_segment(key)}"


def _instruments(document: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[str]]]:
    """Names of the instruments, each with the names of its settings."""
    for name, instrument in (document.get("instruments") or {}).items():
        settings = instrument.get("settings") if isinstance(instrument, dict) else None
        yield name, settings if isinstance(settings, dict) else ()
