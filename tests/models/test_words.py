"""Words: what a text is found by, how it is folded, and that highlights point at the right places."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aq_data.errors import QueryError
from aq_data.models.words import MAX_WORD, MAX_WORDS, SHOWN, document_words, highlights, parse_words, words_of

FOLDED = [
    ("Résonator_Q3", ["resonator", "q3"]),
    ("re\u0301sonator", ["resonator"]),
    ("STRASSE straße Stra\u1e9ee", ["strasse", "strasse", "strasse"]),
    ("ΣΊΣΥΦΟΣ σίσυφος", ["σισυφοσ", "σισυφοσ"]),
    ("İstanbul ISTANBUL", ["istanbul", "istanbul"]),
    ("\u212b \u00c5 A\u030a å", ["a", "a", "a", "a"]),
    ("\u212a \u2126 ﬁt ﬃ", ["k", "ω", "fit", "ffi"]),
    ("Ｆｌｕｘ １２", ["flux", "12"]),
    ("½ x² m₀", ["1", "2", "x2", "m0"]),
    ("T1-vs-flux/q3.dat", ["t1", "vs", "flux", "q3", "dat"]),
    ("4.612GHz 1e-3 -20mK", ["4", "612ghz", "1e", "3", "20mk"]),
    ("a\u0000b\u200bc\u00add\u00a0e", ["a", "b", "c", "d", "e"]),
    ("don't l’été", ["don", "t", "l", "ete"]),
    ("Ελλάδα Москва Ёж", ["ελλαδα", "москва", "еж"]),
    ("量子ビット 3", ["量子ヒット", "3"]),
    ("한국어", ["한국어"]),
    ("ハ\u3099 バ", ["ハ", "ハ"]),
    ("שָׁלוֹם שלום", ["שלום", "שלום"]),
    ("مُحَمَّد محمد", ["محمد", "محمد"]),
    ("😀 ★ ∑ € ©", []),
    ("___ --- \u0301 \u20dd", []),
    ("x" * 100, ["x" * MAX_WORD]),
    ("é" * 100, ["e" * MAX_WORD]),
    ("", []),
]


@pytest.mark.parametrize(("text", "words"), FOLDED, ids=lambda value: ascii(value)[:30])
def test_words_are_folded_runs_of_letters_and_digits(text, words):
    """Case, accents however written, compatibility forms; underscores and signs separate."""
    assert list(words_of(text)) == [unicodedata.normalize("NFKD", word) for word in words]


TEXTS = st.text(max_size=12) | st.text(alphabet="aA1_ é\u0301ßſİı\u212aΣς½ﬁ.-\x00\n'\"*ヒビ\u3099", max_size=12)

LETTERS = st.text(
    st.characters(max_codepoint=0x52F) | st.characters(min_codepoint=0x3040, max_codepoint=0x30FF), max_size=12
)


@settings(max_examples=4 * settings().max_examples)
@given(TEXTS)
def test_words_are_plain_and_stay_what_they_are(text):
    """Letters and digits alone, so that no sign reaches a database's query language; folding twice changes nothing."""
    for word in words_of(text):
        assert word.isalnum()
        assert "_" not in word
        assert len(word) <= MAX_WORD
        assert list(words_of(word)) == [word]


@settings(max_examples=4 * settings().max_examples)
@given(LETTERS, LETTERS)
def test_a_text_is_found_by_its_own_words_in_any_case_and_form(text, around):
    """In Latin, Greek, Cyrillic and kana: in small letters, decomposed or composed, and with anything around it."""
    found = document_words({"name": f"{around} {text} {around}", "metadata": {}})
    for form in (text, unicodedata.normalize("NFD", text), unicodedata.normalize("NFC", text), text.casefold()):
        assert set(words_of(form)) <= found, ascii(form)


@pytest.mark.parametrize("text", ["", " ", "_", "***", '"" AND', "\x00", "\u0301", "😀"])
def test_a_text_without_words_is_refused(text):
    """Rather than matched by everything or nothing."""
    if text == '"" AND':
        assert parse_words(text) == ("and",)
    else:
        with pytest.raises(QueryError, match="no letters or digits"):
            parse_words(text)


def test_words_to_look_for_are_few_and_each_once():
    """At most so many; repeats count once."""
    assert parse_words("flux FLUX Flúx q3") == ("flux", "q3")
    assert len(parse_words(" ".join(f"w{i}" for i in range(MAX_WORDS)))) == MAX_WORDS
    with pytest.raises(QueryError, match=str(MAX_WORDS)):
        parse_words(" ".join(f"w{i}" for i in range(MAX_WORDS + 1)))


DOCUMENT = {
    "id": "idword", "kind": "measurement", "state": "complete", "created_at": "2026-01-31T08:00:00.000000Z", "name": "named", "description": "described",
    "comment": "commented", "tags": ["tagged"], "user": "someuser", "station": "somestation", "flag": "flagged", "device": {"device_info": {"chip": "chipped"}},
    "instruments": {"fridge_1": {"model": "modelled", "settings": {"mxc temperature": {"value": "textual", "unit": "unitary"}}}, "bare": {}},
    "metadata": {"akey": "avalue", "list": ["listed", {"deep": ["deeper", ["deepest"]]}], "tag": {"$literal": {"$date": "literally"}},
                 "date": {"$date": "2026-01-31T00:00:00Z"}, "bytes": {"$bytes": "Ynl0ZXM="}, "n": 12345, "t": True},
    "attrs": {"note": "attributed"}, "path": "apath", "arrays": [], "files": [],
}  # fmt: skip


@pytest.mark.parametrize("word", ["named", "described", "commented", "tagged", "chipped", "fridge", "1", "modelled", "mxc", "temperature", "textual", "unitary", "bare",
                                  "avalue", "listed", "deeper", "deepest", "literally"])  # fmt: skip
def test_a_document_is_found_by_its_texts_and_the_names_of_instruments_and_settings(word):
    """Wherever they stand, and each has a highlight that says where."""
    assert word in document_words(DOCUMENT)
    (place, *_) = highlights(DOCUMENT, (word,))
    start, stop = place["spans"][0]
    assert list(words_of(place["text"][start:stop])) == [word]


@pytest.mark.parametrize(
    "word",
    [
        "idword",
        "measurement",
        "complete",
        "2026",
        "flagged",
        "akey",
        "attributed",
        "apath",
        "12345",
        "true",
        "ynl0zxm",
        "settings",
        "value",
    ],
)
def test_a_document_is_not_found_by_ids_dates_numbers_or_keys(word):
    """Which filters ask for exactly, and which would drown the rest."""
    assert word not in document_words(DOCUMENT)
    assert highlights(DOCUMENT, (word,)) == []


@settings(max_examples=4 * settings().max_examples)
@given(st.dictionaries(st.sampled_from("ab"), TEXTS | st.lists(TEXTS, max_size=3), max_size=2), TEXTS, TEXTS)
def test_highlights_are_of_matching_words_and_all_words_are_shown(metadata, name, wanted):
    """Spans lie in the text in order, and each holds a word that begins with one looked for."""
    words = tuple(dict.fromkeys(words_of(wanted)))[:3]
    document = {"name": name, "metadata": metadata}
    shown: set[str] = set()
    places = highlights(document, words)
    for place in places:
        end = 0
        assert place["spans"]
        for start, stop in place["spans"]:
            assert end <= start < stop <= len(place["text"])
            end = stop
            hits = {word for part in words_of(place["text"][start:stop]) for word in words if part.startswith(word)}
            assert hits
            shown |= hits
    known = {word for word in words if any(found.startswith(word) for found in document_words(document))}
    assert shown == known
    assert len(places) <= SHOWN


def test_a_highlight_is_a_short_piece_of_a_long_text():
    """Around the first place, whole words marked."""
    text = "x " * 500 + "the Résonator_q3 here " + "y " * 500
    (place,) = highlights({"comment": text, "metadata": {}}, ("resonator",))
    assert place["path"] == "comment"
    assert len(place["text"]) < 200
    assert [place["text"][start:stop] for start, stop in place["spans"]] == ["Résonator"]
    assert place["text"] in text


@pytest.mark.parametrize("word", ["é" * 200_000, "a" * 200_000, "\u0301" * 200_000, "_" * 200_000, "1" * 200_000])
def test_a_text_without_blanks_is_cut(word):
    """Base64 in a comment is no index of its own, nor an answer of its own."""
    document = {"comment": word, "metadata": {}}
    assert sum(map(len, document_words(document))) <= MAX_WORD
    for found in document_words(document):
        assert sum(len(place["text"]) for place in highlights(document, (found,))) < 1000
