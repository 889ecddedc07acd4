"""Units of settings: known ones in SI, unknown ones none, and hostile ones harmless."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aq_data.errors import QueryError
from aq_data.models.datafile import DataFile
from aq_data.models.query import Compare, check_dimension, parse_filter
from aq_data.models.terms import terms
from aq_data.models.units import MAX_UNIT, QUANTITY, parse_quantity, parse_unit

LENGTH, TEMPERATURE, TIME = "[length]", "[temperature]", "[time]"
VOLT = "[mass] * [length] ** 2 / [time] ** 3 / [current]"
WATT = "[mass] * [length] ** 2 / [time] ** 3"
NOISE = "[mass] * [length] ** 2 / [time] ** 2.5 / [current]"

KNOWN = [
    ("20 mK", TEMPERATURE, 0.02),
    ("0.02 K", TEMPERATURE, 0.02),
    ("20000 uK", TEMPERATURE, 0.02),
    ("20000 µK", TEMPERATURE, 0.02),  # the micro sign
    ("20000 μK", TEMPERATURE, 0.02),  # the Greek letter
    ("20mK", TEMPERATURE, 0.02),
    ("  2e1   mK ", TEMPERATURE, 0.02),
    ("+.02E0 K", TEMPERATURE, 0.02),
    ("0 degC", TEMPERATURE, 273.15),
    ("20 °C", TEMPERATURE, 293.15),
    ("-40 degF", TEMPERATURE, 233.15),
    ("-0.0 K", TEMPERATURE, 0.0),
    ("0 dBm", WATT, 1e-3),
    ("-30 dBm", WATT, 1e-6),
    ("1 uW", WATT, 1e-6),
    ("4.5 GHz", "1 / [time]", 4.5e9),
    ("50 ohm", f"{VOLT} / [current]", 50.0),
    ("50 Ohm", f"{VOLT} / [current]", 50.0),
    ("50 Ω", f"{VOLT} / [current]", 50.0),
    ("180 Degrees", "dimensionless", 3.14159265359),
    ("180 deg", "dimensionless", 3.14159265359),
    ("50 %", "dimensionless", 0.5),
    ("3 dB", "dimensionless", 1.99526231497),
    ("1 Phi0", "[mass] * [length] ** 2 / [time] ** 2 / [current]", 2.06783384846e-15),
    ("2 V/s", "[mass] * [length] ** 2 / [time] ** 4 / [current]", 2.0),
    ("2 V per s", "[mass] * [length] ** 2 / [time] ** 4 / [current]", 2.0),
    ("3 m s⁻²", "[length] / [time] ** 2", 3.0),
    ("3 m/s**2", "[length] / [time] ** 2", 3.0),
    ("3 m/s^2", "[length] / [time] ** 2", 3.0),
    ("3 m/s²", "[length] / [time] ** 2", 3.0),
    ("4 (m/s)²", "[length] ** 2 / [time] ** 2", 4.0),
    ("1 nV/sqrt(Hz)", NOISE, 1e-9),
    ("1 nV/√Hz", NOISE, 1e-9),
    ("1 nV/√(Hz)", NOISE, 1e-9),
    ("1 nV/Hz**0.5", NOISE, 1e-9),
]


@pytest.mark.parametrize(("text", "dimension", "value"), KNOWN)
def test_a_quantity_is_read_in_si(text, dimension, value):
    """The same quantity in any spelling and unit is the same number, not nearly the same."""
    found = parse_quantity(text)
    assert found is not None
    same = parse_quantity(f"1 {text.strip().lstrip('+-.0123456789eE ')}")
    assert same is not None
    assert found.dimension == same.dimension
    assert found.value == value
    assert math.copysign(1, found.value) == math.copysign(1, value)
    if "current]" not in dimension:
        assert found.dimension == dimension


PREFIXES = {"G": 9, "M": 6, "k": 3, "": 0, "m": -3, "u": -6, "µ": -6, "n": -9, "p": -12}


@settings(max_examples=3 * settings().max_examples)
@given(
    st.integers(-(10**9), 10**9),
    st.integers(-12, 12),
    st.sampled_from(["K", "V", "Hz", "s", "m", "A", "W", "T", "ohm"]),
    *[st.sampled_from(list(PREFIXES))] * 2,
)
@example(1, 0, "K", "m", "u")
def test_one_quantity_with_two_prefixes_is_one_number(digits, exponent, unit, one, other):
    """12 digits, so that 20 mK equals 0.02 K though the floats on the way differ."""
    shift = PREFIXES[one] - PREFIXES[other]
    left = parse_quantity(f"{digits}e{exponent} {one}{unit}")
    right = parse_quantity(f"{digits}e{exponent + shift} {other}{unit}")
    assert left == right
    assert left is not None
    assert left.value == pytest.approx(float(f"{digits}e{exponent + PREFIXES[one]}"), rel=1e-11)


@pytest.mark.parametrize("unit", ["K", "mK", "degC", "dBm", "V/√Hz", "deg"])
def test_a_unit_keeps_the_order_of_numbers(unit):
    """Else a range over quantities would be another than that over the numbers in one unit."""
    found = parse_unit(unit)
    assert found is not None
    numbers = [-1e308, -300.0, -30.5, -1, 0, 0.02, 1, 2**53, 1e300, 10**400]
    converted = [found.in_si(number) for number in numbers]
    assert converted == sorted(converted)
    assert all(isinstance(value, float) for value in converted)


@pytest.mark.parametrize("value", [1e308, -1e308, 10**400, -(10**400), 0, 5e-324])
@pytest.mark.parametrize("unit", ["K", "Gm", "dBm", "dB", "degF", "ym**30", "Ym**3"])
def test_no_number_is_too_large_for_a_unit(unit, value):
    """Infinite where it must be; never an error, and no warning in the server's log."""
    found = parse_unit(unit)
    assert found is not None
    assert isinstance(found.in_si(value), float)


# --- what is no unit -------------------------------------------------------------------------------------------------

UNKNOWN = ["", " ", "furlongs per banana", "arb", "a.u.x", "Vpp", "V rms", "None", "nan", "inf", "kilo", "DBM", "hz", "12", "1", "-m", "2*m", "m*2", "V/1000",
           "K" * (MAX_UNIT + 1), "V?K", "V # noise", "V\x00", "V$", "V;K", "V=K", "V→K", "[length]", "V[0]", "{V}", "V)", "(V", "V'", 'V"', "V_", "€", "😀",
           "m**(1/2)", "m**", "**m", "m**-", "m<s", "m if s", "lambda: m", "m\\", "m!"]  # fmt: skip


@pytest.mark.parametrize("text", UNKNOWN, ids=lambda text: ascii(text)[:30])
def test_what_names_no_unit_is_none(text):
    """Not a guess: a sign that is not understood is not passed over."""
    assert parse_unit(text) is None
    assert parse_quantity(f"20 {text}") is None


@pytest.mark.parametrize("text", ["", "20", "mK", "20 20 mK", "1,5 K", "0x10 K", "1_000 K", "٣ K", "nan K", "inf K", "e5 K", "--1 K", "20 mK!", "T1 20 mK",
                                  "2026-01-31", "10:30", "1" * 80 + " K", "1 " + "K" * 100, "1\x00K"])  # fmt: skip
def test_what_is_no_number_with_a_unit_is_no_quantity(text):
    """But just text."""
    assert parse_quantity(text) is None


HOSTILE = [
    "m**9**9**9**9", "m^9^9^9^9", "m**9⁹⁹⁹⁹⁹⁹⁹⁹⁹", "m⁹⁹⁹⁹⁹⁹⁹⁹⁹", "m⁹**9⁹**9⁹", "((min**999)**999)**99", "(((min**99)**99)**99)**99", "((((B**99)**99)**99)**99)**99",
    "m*(((9**999)**999)**99)", "m*9**9**9", "(m**9)**(9**9)", "m**99999999", "m**1e9", "m**9.9e9", "min**1000000", "(year)**99**99", "m squared cubed squared cubed",
    "m cubed cubed cubed cubed cubed", "cubic square sq m squared", "sqrt(sqrt(sqrt(min**99)))", "√√√√m", "__import__('os')", "__class__", "().__class__", "m.__class__", "exec('1')",
    "eval", "open('/etc/passwd')", "os.system('x')", "m;import os", "m\nimport os", "{m}", "%s%s%s%n", "${HOME}", "../../etc/passwd", "'; DROP TABLE terms; --", "(" * 40, ")" * 40, "-" * 40,
    "/" * 40, "*" * 40, "m" * 40, "m " * 20, "m*" * 19 + "m", "\x00" * 40, "\U0001f600" * 40, "±" * 20, "(m+/-m)", "m+m", "m-1", "delta_" * 6, "kkkkkkm", "e" * 39, "1e999999999", "9" * 40,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_a_hostile_unit_costs_nothing(text):
    """A unit is read while a document is indexed, in the one thread that writes."""
    parse_unit("K")  # which loads the registry
    began = time.perf_counter()
    found = parse_unit(text)
    if found is not None:
        assert isinstance(found.in_si(1e300), float)
    parse_quantity(f"1e300 {text}")
    assert time.perf_counter() - began < 0.5


@settings(max_examples=4 * settings().max_examples)
@given(st.lists(st.sampled_from(["m", "s", "min", "B", "dBm", "degC", "99", "9", "0.5", "-1", "**", "**", "^", "(", ")", "*", "/", " ", "²", "⁹⁹", "⁻", "√", "sqrt(", " squared",
                                 " cubed", "cubic ", " per ", "%", "·", ".", "e", "j", "°", "Δ", "_", ":"]), max_size=16).map("".join))  # fmt: skip
def test_any_text_is_a_unit_or_none_and_at_once(text):
    """Whatever is put together from what units are made of."""
    parse_unit("K")
    began = time.perf_counter()
    found = parse_unit(text)
    if found is not None:
        assert [isinstance(found.in_si(value), float) for value in (0, -1.5, 1e300)] == [True] * 3
    assert time.perf_counter() - began < 1


# --- in documents and filters ----------------------------------------------------------------------------------------


def quantities(metadata: dict) -> set[tuple[str, str, float]]:
    document = {"id": "x", "metadata": metadata}
    return {(term.path, term.kind, term.value) for term in terms(document) if term.kind.startswith(QUANTITY)}


@pytest.mark.parametrize(
    ("setting", "values"),
    [({"value": 20, "unit": "mK"}, [0.02]), ({"value": [20, 30, "x", None, True, [1]], "unit": "mK"}, [0.02, 0.03]), ({"value": "20", "unit": "mK"}, []),
     ({"value": True, "unit": "mK"}, []), ({"value": None, "unit": "mK"}, []), ({"value": 20, "unit": ""}, []), ({"value": 20, "unit": None}, []),
     ({"value": 20, "unit": 5}, []), ({"value": 20, "unit": "furlongish"}, []), ({"value": 20}, []), ({"unit": "mK"}, []), ({"Value": 20, "unit": "mK"}, []),
     ({"value": {"$float": "NaN"}, "unit": "mK"}, []), ({"value": {"x": 1}, "unit": "mK"}, []), ({"value": 20, "unit": "mK", "label": "T"}, [0.02])],
    ids=str,
)  # fmt: skip
def test_a_number_beside_a_unit_is_a_quantity_and_nothing_else_is(setting, values):
    """Each number of a list; never truth values, texts or what is nested deeper."""
    assert quantities({"t": setting}) == {("metadata.t.value", f"{QUANTITY}[temperature]", value) for value in values}


@pytest.mark.parametrize("path", ["value", "a.value", "instruments.f.settings.t.value", r"a\.b.value"])
def test_a_text_with_a_unit_stands_for_a_quantity_only_where_values_are_kept(path):
    """Elsewhere, and where there is no unit, it is a text."""
    node = parse_filter({path: {"$lt": "20 mK"}})
    assert isinstance(node, Compare)
    assert (node.kind, node.value) == (f"{QUANTITY}[temperature]", 0.02)
    for query in (
        {f"{path}s": {"$lt": "20 mK"}},
        {f"{path}.x": {"$lt": "20 mK"}},
        {path: {"$lt": "20 mX"}},
        {r"a\.value": {"$lt": "20 mK"}},
    ):
        other = parse_filter(query)
        assert isinstance(other, Compare)
        assert other.kind == "text"


def test_another_dimension_is_refused_by_name_and_only_where_there_are_quantities():
    """`20 V` of a temperature: the message says what is measured there."""
    node = parse_filter({"a.value": {"$lt": "20 V"}})
    assert isinstance(node, Compare)
    with pytest.raises(QueryError, match=r"metadata\.a\.value is measured in \[temperature\]"):
        check_dimension(node, ["number", f"{QUANTITY}[temperature]"])
    check_dimension(node, ["number", "text"])
    check_dimension(node, [])
    check_dimension(node, [f"{QUANTITY}[temperature]", node.kind])


def test_documents_have_the_fields_these_tests_speak_of():
    """A guard: `metadata` is where free keys are kept."""
    assert "metadata" in DataFile.__struct_fields__
