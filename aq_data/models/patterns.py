r"""Regular expressions in filters: the RE2 subset, whose time is linear in the text, so that no pattern stalls a server.

Checked when a filter is parsed. Left out is what RE2 and PCRE read differently, so that both databases answer the same:
look-around, back-references, named groups, multi-line mode, `\B`, `\Z`, `\C`, a repeated `^`, `(?i)` beside classes that it
would change in RE2 alone. `$` is the end of the text, `.` is no line break, `\d \w \s \b` are ASCII. `(?i)` at the beginning
ignores case.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from aq_data.errors import QueryError

__all__ = ["MAX_PATTERN", "Pattern", "found_in", "parse_pattern"]

MAX_PATTERN = 200
"""Characters of a pattern."""
MAX_WORK = 500_000_000
"""Instructions of a compiled pattern times bytes of a text. RE2 cannot be interrupted: at worst it follows all instructions
at every byte, which takes up to 5 ns for each (measured), so that no search takes more than some seconds. `flux.*q3` has 18
instructions, `\\pL` 1200: the longest text that a document can hold is searched for up to 29."""

_SPACE = r"\t\n\f\r "
_SAME = set("dDwWbAtnfr")  # escapes that both dialects read alike; of `\B` RE2 has one inside every "é"
_GROUP = re.compile(r"\?(?:[is]*|-[is]+|[is]+-[is]+)[:)]|\?:")
_REPEAT = re.compile(r"\{\d{1,3}(?:,\d{0,3})?\}")
_CATEGORY = re.compile(r"\{\^?[A-Za-z]{1,20}\}|[A-Z]")
_HEX = re.compile(r"[0-9A-Fa-f]{2}|\{[0-9A-Fa-f]{1,6}\}")
_NAMED = re.compile(r"\[:\^?[a-z]{1,8}:\]")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A checked pattern. `pcre` is the same in that dialect; every text it is found in begins with `prefix`."""

    text: str
    pcre: str
    prefix: str


def parse_pattern(text: str) -> Pattern:
    """The pattern; QueryError names what is wrong with it."""
    if len(text) > MAX_PATTERN:
        raise QueryError(f"a pattern has at most {MAX_PATTERN} characters, not {len(text)}", operator="$regex")
    pcre = _Translation(text).run()
    try:
        _compiled(text)
    except _re2().error as exc:
        raise QueryError(f"$regex {text!r} is no RE2 pattern: {_message(exc)}", operator="$regex") from exc
    return Pattern(text, pcre, _prefix(text))


def found_in(pattern: Pattern, text: str) -> bool:
    """Whether the pattern is found anywhere in the text. QueryError when to look for it might take more than `MAX_WORK`."""
    encoded = text.encode()
    compiled = _compiled(pattern.text)
    if len(encoded) > compiled.longest:
        raise QueryError(
            f"$regex {pattern.text!r} might take too long on a text of {len(encoded)} bytes, more than {compiled.longest}; "
            "write it with fewer repetitions and classes, or narrow the query with an equality or a range",
            operator="$regex",
        )
    return compiled.search(encoded) is not None


class _Compiled(NamedTuple):
    search: Callable[[bytes], Any]
    longest: int


@lru_cache(256)
def _compiled(text: str) -> _Compiled:
    options = _re2().Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    options.never_capture = True  # nobody asks for groups, which would take a multiple of the time
    compiled = _re2().compile(text, options)
    return _Compiled(compiled.search, MAX_WORK // compiled.programsize)


@lru_cache(1)
def _re2() -> Any:
    import re2

    return re2


def _message(exc: Exception) -> str:
    text = exc.args[0] if exc.args else ""
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


class _Translation:
    """Walks a pattern once: refuses what is not in the subset, and writes down the PCRE form."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.out: list[str] = []
        self.is_repeatable = self.folds = self.has_category = False

    def refuse(self, what: str, instead: str) -> QueryError:
        return QueryError(f"$regex has {what} at position {self.at}, which is not taken; {instead}", operator="$regex")

    def run(self) -> str:
        while self.at < len(self.text):
            ch = self.text[self.at]
            if ch in "*+?{" and not self.is_repeatable:
                raise self.refuse("a repetition of a place", "repeat a character, a class or a group")
            if ch == "\\":
                self.is_repeatable = self.text[self.at + 1 : self.at + 2] not in ("b", "A", "z")
                self.escape(in_class=False)
            elif ch == "[":
                self.character_class()
                self.is_repeatable = True
            elif ch == "(" and self.text[self.at + 1 : self.at + 2] == "?":
                group = self.take(_GROUP, 1, "a group of its own kind", "there are (…), (?:…), (?i) and (?s)")
                self.folds = self.folds or "i" in group.partition("-")[0]
                self.is_repeatable = False
            elif ch == "{":
                self.take(_REPEAT, 0, "a brace", r"write \{ for the character, {2,5} for a repetition")
            else:
                self.put(r"\z" if ch == "$" else ch)
                self.at += 1
                self.is_repeatable = ch not in "^$(|"
        if self.folds and self.has_category:
            raise self.refuse("(?i) beside a class such as \\pL, [:alpha:] or [\\w]", "leave out one of them")
        return "".join(self.out)

    def put(self, text: str) -> None:
        self.out.append(r"\x00" if text == "\x00" else text)  # a pattern with a NUL cannot be sent

    def take(self, form: re.Pattern[str], skip: int, what: str, instead: str) -> str:
        found = form.match(self.text, self.at + skip)
        if found is None:
            raise self.refuse(what, instead)
        self.put(self.text[self.at : found.end()])
        self.at = found.end()
        return found[0]

    def escape(self, in_class: bool) -> None:
        ch = self.text[self.at + 1 : self.at + 2]
        if ch in ("s", "S"):
            if in_class and ch == "S":
                raise self.refuse(r"\S in a class", r"write [^\s…]")
            self.put(_SPACE if in_class else f"[{'^' if ch == 'S' else ''}{_SPACE}]")
        elif ch == "z" and not in_class:
            self.put(r"\z")
        elif ch == "v":
            self.put(r"\x0b")
        elif ch == "x":
            self.take(_HEX, 2, r"\x", r"write \x41 or \x{1F600}")
            return
        elif ch in ("p", "P"):
            self.has_category = True
            self.take(_CATEGORY, 2, rf"\{ch}", r"write \pL or \p{Greek}")
            return
        elif (ch in _SAME and not (in_class and ch in "bA")) or (
            ch and not ch.isalnum() and ch.isascii() and ch.isprintable()
        ):
            self.has_category = self.has_category or (in_class and ch in "wW")
            self.put("\\" + ch)
        else:
            raise self.refuse(
                f"the escape \\{ch}", r"there are \d \w \s \b \A \z \t \n \r \f \v \x41 \pL, and \ before punctuation"
            )
        self.at += 2

    def character_class(self) -> None:
        """`[…]`, in which a bracket first is itself."""
        start = self.at
        self.put("[")
        self.at += 1
        if self.text[self.at : self.at + 1] == "^":
            self.put("^")
            self.at += 1
        is_first = True
        while self.at < len(self.text):
            ch = self.text[self.at]
            if ch == "]" and not is_first:
                self.put("]")
                self.at += 1
                return
            is_first = False
            if ch == "\\":
                self.escape(in_class=True)
            elif ch == "[" and self.text[self.at + 1 : self.at + 2] in (":", ".", "="):
                self.has_category = True
                self.take(_NAMED, 0, "a named class", "there are [:alpha:], [:digit:] and their like")
            else:
                self.put("\\" + ch if ch in "[]" else ch)
                self.at += 1
        self.at = start
        raise self.refuse("a class without an end", r"write \[ for the character")


def _prefix(text: str) -> str:
    """The literal beginning that `^abc` demands; empty where there is none."""
    if not text.startswith("^") or "|" in text:
        return ""
    literal = re.match(r"[^\\\[\](){}.*+?$^|]*", text[1:])
    assert literal is not None
    found = literal[0]
    following = text[1 + len(found) : 2 + len(found)]
    return found[:-1] if following and following in "*?{" else found
