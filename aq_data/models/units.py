"""Units of settings, so that 20 mK is found as 0.02 K. The units and their prefixes are pint's, loaded when first needed.

Values in SI units are rounded to 12 digits: the same quantity written in two units is then one number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["QUANTITY", "Quantity", "Unit", "parse_quantity", "parse_unit"]

QUANTITY = "si "
"""How the kind of a term in SI units begins; the dimension follows."""

MAX_UNIT = 40
"""Characters of a unit; anything longer is taken for prose."""

_ALIASES = ("@alias ohm = Ohm = Ohms", "@alias degree = Degrees = Degree = degs", "@alias magnetic_flux_quantum = Phi0 = Φ0")
"""Spellings that instruments use and pint does not know."""

_PROBES = (-200.0, -30.0, 0.5, 7.0, 100.0)
"""Where the formula for a logarithmic unit must agree with pint."""

_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S.*?)\s*", re.ASCII)
_EXPONENT = re.compile(r"\*\*\s*(\()?[-+]?\d{1,2}(?:\.\d{1,3})?(?(1)\))(?!\s*\*\*|[\d.])")
_COSTLY = re.compile(r"\*\*|(?<!\w)[\d.]")
"""What remains beside exponents: numbers of their own and powers of powers. Computing them could take for ever, and no unit
has them."""
_ONE_PER = re.compile(r"^\s*1\s*/")
MAX_EXPONENT = 99
_ROOT = re.compile(r"(?:sqrt|√)\(([^()]+)\)|√(\w+)")
_FOREIGN = re.compile(r"[^\w\s*/^().%°·⁻+-]")
"""What pint passes over, and so would read "V?K" as V K."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit. `dimension` is what units must share to be compared, such as `[temperature]`."""

    dimension: str
    in_si: Callable[[float], float]
    """A value in this unit as one in SI units; infinite or NaN where it has none."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with a unit, in SI units."""

    dimension: str
    value: float


def parse_quantity(text: str) -> Quantity | None:
    """`"20 mK"` as a quantity; None for what is not a number followed by a known unit."""
    parts = _NUMBER.fullmatch(text) if len(text) <= MAX_UNIT + 30 else None
    unit = parse_unit(parts[2]) if parts else None
    if parts is None or unit is None:
        return None
    return Quantity(unit.dimension, unit.in_si(float(parts[1])))


@lru_cache(4096)
def parse_unit(text: str) -> Unit | None:
    """The unit that `text` names; None when there is none, or no such unit."""
    if not text.strip() or len(text) > MAX_UNIT:
        return None
    registry = _registry()
    plain = _plain(_ROOT.sub(lambda root: f"({root[1] or root[2]})**0.5", text))
    if _FOREIGN.search(plain) or _COSTLY.search(_EXPONENT.sub("", _ONE_PER.sub("", plain))):
        return None
    try:
        powers = registry.parse_units_as_container(plain)
        if any(abs(power) > MAX_EXPONENT for power in powers.values()):
            return None
        unit = registry.Unit(powers)
        convert = _converter(registry, unit)
        return Unit(str(unit.dimensionality), convert)
    except Exception:  # noqa: BLE001  (whatever a foreign parser meets in a stranger's text: it is no unit)
        return None


def _plain(text: str) -> str:
    """The text as pint will read it, in which superscripts and words such as "squared" are powers."""
    from pint.util import string_preprocessor

    return string_preprocessor(text)


@lru_cache(1)
def _registry() -> Any:
    import pint

    registry: Any = pint.UnitRegistry(autoconvert_offset_to_baseunit=True)
    for alias in _ALIASES:
        registry.define(alias)
    return registry


def _converter(registry: Any, unit: Any) -> Callable[[float], float]:
    def convert(value: float) -> float:
        return float(registry.Quantity(float(value), unit).to_base_units().magnitude)

    def silently(value: float) -> float:
        with np.errstate(all="ignore"):  # here pint reckons with NumPy, which warns of what is too large
            return convert(value)

    zero, one, two = convert(0.0), convert(1.0), convert(2.0)
    if abs(two - 2 * one + zero) <= 1e-9 * max(abs(two), abs(one), abs(zero)):
        slope = one - zero
        if zero == 0.0:
            return lambda value: _rounded(lambda x: x * one, value)
        return lambda value: _rounded(lambda x: x * slope + zero, value)
    growth = math.log(two / one) if one > 0.0 and two > 0.0 else 0.0

    def grown(value: float) -> float:
        return zero * math.exp(growth * value)

    # A logarithmic unit, such as dBm; to ask pint takes longer than to find all other terms of a document.
    if all(math.isclose(grown(x), convert(x), rel_tol=1e-13) for x in _PROBES):
        return lambda value: _rounded(grown, value)
    return lru_cache(4096)(lambda value: _rounded(silently, value))


def _rounded(convert: Callable[[float], float], value: float) -> float:
    try:
        return float(f"{convert(float(value)):.12g}") + 0.0
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
