"""Reducing for plots, against NumPy: any tiling gives the bins of the whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_data.errors import SelectionError, ValidationError
from aq_data.models.preview import Reduction, check_preview, real_part


def expected(values: np.ndarray, steps: tuple[int, ...], how: str) -> np.ndarray:
    """The same, bin by bin."""
    bins = tuple(-(-n // s) for n, s in zip(values.shape, steps, strict=True))
    result = np.full((*bins, 2) if how == "minmax" else bins, np.nan)
    for index in np.ndindex(*bins):
        part = values[tuple(slice(i * s, (i + 1) * s) for i, s in zip(index, steps, strict=True))].astype(float)
        part = part[~np.isnan(part)]
        if part.size:
            both = {"min": part.min(), "max": part.max(), "mean": part.mean(), "minmax": (part.min(), part.max())}
            result[index] = both[how]
    return result


@given(st.data())
def test_tiles_in_any_order_give_the_bins_of_the_whole(data):
    """One and two axes, with NaN, for every way of reducing."""
    shape = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=2).map(tuple))
    how = data.draw(st.sampled_from(["minmax", "mean", "min", "max"] if len(shape) == 1 else ["mean", "min", "max"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = rng.normal(size=shape)
    values[rng.random(shape) < 0.2] = np.nan
    pixels = data.draw(st.integers(1, 35))
    reduction = Reduction(shape, pixels, how)
    assert all(n <= pixels for n in reduction.bins)
    cuts = [[0, *sorted(data.draw(st.sets(st.integers(1, n), max_size=4))), n] for n in shape]
    tiles = [
        tuple(slice(a, b) for a, b in spans)
        for spans in ([(c,) for c in zip(cuts[0], cuts[0][1:], strict=False)] if len(shape) == 1 else _pairs(cuts))
        if all(a < b for a, b in spans)
    ]
    for i in rng.permutation(len(tiles)):
        reduction.add(*reduction.partial(values[tiles[i]], tuple(s.start for s in tiles[i])))
    np.testing.assert_allclose(reduction.result(), expected(values, reduction.steps, how))


def _pairs(cuts):
    first, second = (list(itertools.pairwise(c)) for c in cuts)
    return [(a, b) for a in first for b in second]


def test_complex_values_by_part():
    """Magnitude, phase, real and imaginary part; real values are as they are."""
    z = np.array([3 + 4j, -1j])
    assert real_part(z, "abs").tolist() == [5, 1]
    assert real_part(z, "angle").tolist() == np.angle(z).tolist()
    assert (real_part(z, "real").tolist(), real_part(z, "imag").tolist()) == ([3, 0], [4, -1])
    assert real_part(np.array([1, 2]), "angle").tolist() == [1, 2]


@pytest.mark.parametrize(
    ("dtype", "value", "count"),
    [("f2", 100.0, 1000), ("f2", 1.0, 5000), ("f4", 3e38, 3), ("f4", 1.0, (1 << 24) + 1000), ("c8", 3e38 + 3e38j, 2)],
)
@pytest.mark.parametrize("axes", [1, 2])
def test_the_mean_of_narrow_floats_is_that_of_their_values(dtype, value, count, axes):
    """However large their sum: each is finite, and so is the mean of equal ones."""
    values = np.full((count,) if axes == 1 else (count, 1), value, dtype)
    values[count // 2] = np.nan
    reduction = Reduction(values.shape, 1, "mean")
    reduction.add(*reduction.partial(real_part(values, "abs"), (0,) * axes))
    np.testing.assert_allclose(reduction.result(), abs(complex(values.flat[0])), rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "shape", "how", "part", "pixels", "error"),
    [
        ("f8", (), "", "abs", 10, SelectionError),
        ("f8", (2, 2, 2), "", "abs", 10, SelectionError),
        ("f8", (2, 2), "minmax", "abs", 10, ValidationError),
        ("f8", (2,), "median", "abs", 10, ValidationError),
        ("c16", (2,), "", "phase", 10, ValidationError),
        ("<U3", (2,), "", "abs", 10, ValidationError),
        ("f8", (2,), "", "abs", 0, ValidationError),
        ("f8", (2,), "", "abs", 10_001, ValidationError),
    ],
)
def test_what_no_plot_can_show_is_refused(dtype, shape, how, part, pixels, error):
    """Naming the array."""
    with pytest.raises(error):
        check_preview("iq", np.dtype(dtype), shape, how, part, pixels)
