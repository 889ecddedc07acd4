"""Patterns in filters: what is taken, what is refused by name, that they mean in PCRE what they mean here, and linear time."""

from __future__ import annotations

import random
import re
import time

import pcre
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aq_data.errors import QueryError
from aq_data.models.patterns import MAX_PATTERN, found_in, parse_pattern

EXAMPLES = 3 * settings().max_examples

# Where Python's own expressions mean the same: ASCII classes, `$` written \Z, which is our \z.
PLAIN = ["a", "b", "A", "é", "1", " ", ".", "[ab]", "[^ab]", "[a-z]", "[]a]", r"\d", r"\D", r"\w", r"\W", r"\.", r"\n", r"\x41",
         "(a|b)", "(?:ab|)", "(?s:.)"]  # fmt: skip
PLACES = ["^", "$", r"\b", r"\A", r"\z", "|"]
# Where only PCRE can say: spaces, categories, named classes, folding in the middle.
OTHERS = ["ß", "ſ", "\u212a", "K", "σ", "😀", "\x00", "\x0b", "\x85", r"\s", r"\S", r"[\s]", r"[^\s_]", r"\v", r"\f", r"\x{1F600}", r"\pL", r"\PL",
          r"\p{Greek}", r"\P{^Lu}", "[[:alpha:]]", "[[:^space:]x]", "[[a]", r"[a\]-]", "[é-ü]", "(?i:k)", "(?i-s:s.)", "(?-i:K)", "(?i)", "(?s)", r"\/",
          r"\-", "#", "()", "x{0}"]  # fmt: skip
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{0,1}", "{1,}", "*?", "+?", "??", "{1,2}?"]
LETTERS = "abAkKsS1_ é ßſ\u212aσςΣ😀\n\r\t\x0b\x00\x85-]^.\\"


def patterns(atoms: list[str]) -> st.SearchStrategy[str]:
    repeated = st.builds(str.__add__, st.sampled_from(atoms), st.sampled_from(REPEATS))
    return st.lists(repeated | st.sampled_from(PLACES), min_size=1, max_size=5).map("".join)


texts = st.lists(st.text(LETTERS, max_size=6), min_size=1, max_size=4)


def taken(pattern: str):
    """The pattern, or None where it is refused."""
    try:
        return parse_pattern(pattern)
    except QueryError:
        return None


# --- meaning -------------------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES)
@given(patterns(PLAIN), texts)
@example("^a$", ["a\n", "a"])
@example("a.b", ["a\nb", "a\rb"])
@example(r"\bé", ["é", "aé"])
def test_a_plain_pattern_is_found_where_python_finds_it(pattern, listed):
    """Search anywhere; `$` is the very end, `.` no line feed, words and digits are ASCII."""
    found = taken(pattern)
    if found is not None:
        python = re.compile(re.sub(r"\\z|\$", r"\\Z", pattern), re.ASCII)
        assert {text: found_in(found, text) for text in listed} == {text: bool(python.search(text)) for text in listed}


@pytest.mark.skipif(pcre.search is None, reason="the system has no PCRE2 (libpcre2-8)")
@settings(max_examples=EXAMPLES)
@given(patterns(PLAIN + OTHERS), texts)
@example(r"[\s]", ["\x0b", "\x85", " "])
@example("(?i)ß", ["ß", "ẞ", "SS", "ſ"])
@example("[[]", ["["])
@example(r"[\]]", ["]"])
@example("\x00", ["a\x00b"])
@example("(?i)[^k]", ["\u212a", "K"])
def test_the_pcre_form_is_found_where_the_pattern_is(pattern, listed):
    """Whatever is taken: MongoDB, which has PCRE, answers as SQLite with RE2 does."""
    found = taken(pattern)
    if found is not None:
        assert {text: found_in(found, text) for text in listed} == {text: pcre.search(found.pcre, text) for text in listed}


@settings(max_examples=EXAMPLES)
@given(patterns(PLAIN + OTHERS), texts)
@example("^ab*c", ["ac"])
@example("^ab?", ["a"])
@example("^ab{0}", ["a"])
@example("^abc|x", ["x"])
@example("^(?i)ab", ["AB"])
@example("^é", ["é"])
def test_every_text_a_pattern_is_found_in_begins_with_its_prefix(pattern, listed):
    """By which the index is entered: a prefix too long would lose documents."""
    found = taken("^" + pattern)
    if found is not None:
        assert [text for text in listed if found_in(found, text) and not text.startswith(found.prefix)] == []


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [("^abc", "abc"), ("^abc.*", "abc"), ("^ab+", "ab"), ("^Q3_", "Q3_"), ("^ab c\n", "ab c\n"), ("abc", ""), ("^abc|d", ""), ("^", "")],
)  # fmt: skip
def test_a_literal_beginning_is_known(pattern, prefix):
    """Else every search for a beginning would look at every text."""
    assert parse_pattern(pattern).prefix == prefix


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "named"),
    [("(?=a)", "group"), ("(?!a)", "group"), ("(?<=a)b", "group"), ("(?<!a)b", "group"), ("(?P<n>a)", "group"), ("(?<n>a)", "group"),
     ("(?>a)", "group"), ("(?#c)", "group"), ("(?m)^a", "group"), ("(?m:a)", "group"), ("(?U)a", "group"), ("(?x)a", "group"), ("(?R)", "group"),
     (r"(a)\1", r"\1"), (r"\k<a>", r"\k"), (r"\Za", r"\Z"), (r"\C", r"\C"), (r"\Bx", r"\B"), (r"\Qa\E", r"\Q"), (r"\G", r"\G"), (r"\K", r"\K"),
     (r"\R", r"\R"), (r"\X", r"\X"), (r"\h", r"\h"), (r"\cA", r"\c"), (r"\07", r"\0"), (r"\u0041", r"\u"), (r"\é", r"\é"), ("\\", "escape"), (r"\xZZ", r"\x"),
     (r"\x{110000}", "RE2"), (r"\p", r"\p"), (r"\p{Nothing}", "RE2"), (r"[\b]", r"\b"), (r"[\S]", r"\S"), (r"[\A]", r"\A"), ("[a", "class"),
     ("[", "class"), ("[]", "class"), ("[[=a=]]", "named class"), ("[[:nothing:]]", "RE2"), ("[b-a]", "RE2"), ("a{", "brace"), ("a{,2}", "brace"),
     ("a{x}", "brace"), ("{2}", "repetition"), ("a{2,1}", "RE2"), ("a**", "RE2"), ("a*+", "RE2"), ("a++", "RE2"), ("*a", "repetition"), ("(*a)", "repetition"),
     ("(*UCP)a", "repetition"), ("a|*", "repetition"), ("^*", "repetition"), ("$?", "repetition"), (r"\b+", "repetition"), (r"\z{2}", "repetition"),
     ("(?i)+", "repetition"), ("(", "RE2"), (")", "RE2"), ("(a", "RE2"), ("a)", "RE2"), (r"(?i)\pL", "(?i)"), ("(?i:a)[[:alpha:]]", "(?i)"), (r"(?i)[\w]", "(?i)"),
     ("a" * (MAX_PATTERN + 1), str(MAX_PATTERN))],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_what_is_not_in_the_subset_is_refused_by_name(pattern, named):
    """Briefly."""
    with pytest.raises(QueryError) as caught:
        parse_pattern(pattern)
    assert named in str(caught.value)
    assert caught.value.details["operator"] == "$regex"
    assert len(str(caught.value)) < 500


@settings(max_examples=EXAMPLES)
@given(st.text(alphabet="a(){}[]\\^$*+?|.-:iPxQ\x00é<>=!,0129", max_size=30) | st.text(max_size=20))
def test_any_text_is_a_pattern_or_a_refusal(pattern):
    """Never another error; and what is taken can be searched for."""
    found = taken(pattern)
    if found is not None:
        found_in(found, "aé\x00\n")
        if pcre.search is not None:
            pcre.search(found.pcre, "aé\x00\n")


# --- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a*)*$", "(a|a)*$", "(a|aa)+$", "(.*)(.*)(.*)(.*)x", r"^(([a-z])+.)+[A-Z]([a-z])+$", "(a?){50}a{50}$", "((a{0,9}){0,9}){0,9}$",
     "(?i)(é|e)*$", "[^b]*[^c]*[^d]*$"],
)  # fmt: skip
def test_a_hostile_pattern_takes_linear_time(pattern):
    """Those over which a backtracking engine would sit for the age of the universe, over a megabyte.

    One that is too large for that is refused there, and searched in less.
    """
    found = parse_pattern(pattern)
    began = time.perf_counter()
    try:
        found_in(found, "a" * 1_000_000 + "!")
    except QueryError:
        assert "{0,9}" in pattern, "the only one of these whose program is so large"
        found_in(found, "a" * 300_000 + "!")
    assert time.perf_counter() - began < 2


def test_a_text_that_a_pattern_might_take_too_long_on_is_refused():
    """RE2 cannot be interrupted: this would take half a minute. A shorter text is searched."""
    found = parse_pattern("(?s)[a-q][^u-z]{300}x")
    text = "".join(random.Random(1).choices("abcdefghijklmnopqrst", k=15_500_000))
    began = time.perf_counter()
    with pytest.raises(QueryError, match="might take too long on a text of 15500000 bytes") as caught:
        found_in(found, text)
    assert time.perf_counter() - began < 5
    assert caught.value.details["operator"] == "$regex"
    assert not found_in(found, text[:75_000])
    assert found_in(found, text[:75_000] + "x")


@pytest.mark.parametrize("pattern", ["flux.*q3", "(?i)FLUX", r"(?i)\bflux: (résonator )?q[0-9]$", "^[a-z ]+:.*q3$"])
def test_a_simple_pattern_is_found_at_the_end_of_the_longest_text(pattern):
    """Of sixteen megabytes, as much as a document has."""
    assert found_in(parse_pattern(pattern), "y" * ((16 << 20) - 20) + " flux: résonator q3")


@pytest.mark.parametrize(
    "pattern",
    [
        "((((a{1,9}){1,9}){1,9}){1,9}){1,9}",
        "a{999}{2}",
        "(" * 100 + ")" * 100,
        "|" * 200,
        "[a-z]{1000}",
        r"\pL{900}",
        "(\\pL{30}){30}",
    ],
)
def test_a_pattern_that_grows_is_refused_or_small(pattern):
    """A few characters never become much memory or time when compiled."""
    began = time.perf_counter()
    found = taken(pattern)
    if found is not None:
        found_in(found, "abc" * 10_000)
    assert time.perf_counter() - began < 2
