"""Making large arrays small enough for a screen: the extremes or the mean of each bin, tile by tile. Pure."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import numpy as np

from aq_data.errors import SelectionError, ValidationError

__all__ = ["How", "Part", "Reduction", "check_preview", "real_part"]

How = Literal["minmax", "mean", "min", "max"]
Part = Literal["abs", "angle", "real", "imag"]

MAX_PIXELS = 10_000

Values = np.ndarray[Any, Any]


def check_preview(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], how: str, part: str, pixels: int) -> How:
    """How to reduce a selection of `shape`; an empty `how` is minmax for one axis, mean for two.

    Raises SelectionError for other numbers of axes, ValidationError for values that are no numbers and unknown words.
    """
    if dtype.kind not in "biufc":
        raise ValidationError(f"array {name!r} holds {dtype}; a preview is of numbers", code="unsupported_dtype")
    if len(shape) not in (1, 2):
        raise SelectionError(
            f"a preview has one or two axes, the selection of {name!r} has shape {shape}; give positions for the others"
        )
    if part not in get_args(Part):
        raise ValidationError(f"part is one of {', '.join(get_args(Part))}, not {part[:40]!r}")
    chosen = how or ("minmax" if len(shape) == 1 else "mean")
    allowed = get_args(How) if len(shape) == 1 else ("mean", "min", "max")
    if chosen not in allowed:
        raise ValidationError(f"how is one of {', '.join(allowed)} for {len(shape)} axes, not {how[:40]!r}")
    if not 1 <= pixels <= MAX_PIXELS:
        raise ValidationError(f"pixels is 1 to {MAX_PIXELS}, not {pixels}")
    return cast("How", chosen)


def real_part(values: Values, part: str) -> Values:
    """Complex values as magnitude, phase (radians), real or imaginary part; real ones as they are."""
    if values.dtype.kind != "c":
        return values
    if part == "abs":
        wide: Values = values.astype("c16", copy=False)  # the magnitude of two large float32 may be none
        return np.abs(wide)
    if part == "angle":
        return np.angle(values)
    return values.real if part == "real" else values.imag


class Reduction:
    """Bins over one or two axes. NaN counts as nothing; a bin of nothing is NaN."""

    def __init__(self, shape: tuple[int, ...], pixels: int, how: How) -> None:
        """At most `pixels` bins per axis; `steps` are the elements per bin, the last bin may have fewer."""
        self.steps = tuple(max(1, math.ceil(n / pixels)) for n in shape)
        self.bins = tuple(math.ceil(n / s) for n, s in zip(shape, self.steps, strict=True))
        self._how = how
        self._low = np.full(self.bins, np.nan)
        self._high = np.full(self.bins, np.nan)
        self._sum = np.zeros(self.bins)
        self._count = np.zeros(self.bins)

    def partial(self, values: Values, offset: tuple[int, ...]) -> tuple[tuple[slice, ...], list[Values]]:
        """What a tile at `offset` contributes, for `add`: this is the work, and may be done in any thread."""
        where = tuple(slice(o // s, (o + n - 1) // s + 1) for o, n, s in zip(offset, values.shape, self.steps, strict=True))
        if self._how == "mean":
            measured = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
            # A sum in float16 or float32 would leave their range, or stop growing, long before its bin ends.
            filled = np.where(measured, values.astype("f8", copy=False), 0.0)
            parts = [self._reduced(np.add, filled, offset), self._reduced(np.add, measured.astype("f8"), offset)]
        elif self._how == "minmax":
            parts = [self._reduced(np.fmin, values, offset), self._reduced(np.fmax, values, offset)]
        else:
            parts = [self._reduced(np.fmin if self._how == "min" else np.fmax, values, offset)]
        return where, parts

    def _reduced(self, ufunc: np.ufunc, values: Values, offset: tuple[int, ...]) -> Values:
        # The last axis first: along it memory is contiguous.
        for axis in reversed(range(values.ndim)):
            step, first = self.steps[axis], -offset[axis] % self.steps[axis]
            starts = np.arange(first or step, values.shape[axis], step)
            values = ufunc.reduceat(values, np.concatenate(([0], starts)).astype(np.intp), axis=axis)
        return values

    def add(self, where: tuple[slice, ...], parts: list[Values]) -> None:
        """Take in what `partial` made."""
        if self._how == "mean":
            self._sum[where] += parts[0]
            self._count[where] += parts[1]
        else:
            if self._how != "max":
                self._low[where] = np.fmin(self._low[where], parts[0])
            if self._how != "min":
                self._high[where] = np.fmax(self._high[where], parts[-1])

    def result(self) -> Values:
        """float64 of shape `bins`; for minmax `(bins, 2)`, the minimum and the maximum of each."""
        if self._how == "mean":
            with np.errstate(invalid="ignore"):
                return self._sum / np.where(self._count == 0, np.nan, self._count)
        if self._how == "minmax":
            return np.stack([self._low, self._high], axis=-1)
        return self._low if self._how == "min" else self._high
