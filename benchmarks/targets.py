"""What the figures are held against."""

import statistics
from dataclasses import dataclass
from typing import Literal

from benchmarks.contest import Results

__all__ = ["TARGETS", "Target", "Verdict", "judge"]


@dataclass(frozen=True)
class Target:
    """A figure of one side, or its quotient `over / under` inside each round, and the bound of its median."""

    workload: str
    figure: str
    over: str
    under: str | None = None
    sense: Literal[">=", "<="] = ">="
    bound: float | None = None
    """None: shown, held against nothing."""


@dataclass(frozen=True)
class Verdict:
    target: Target
    rounds: list[float]
    """One value of each round; empty when a side of it did not run."""

    @property
    def median(self) -> float:
        return statistics.median(self.rounds) if self.rounds else float("nan")

    @property
    def met(self) -> bool | None:
        """None when there was nothing to hold against the bound."""
        if self.target.bound is None or not self.rounds:
            return None
        return self.median >= self.target.bound if self.target.sense == ">=" else self.median <= self.target.bound


def judge(results: Results) -> list[Verdict]:
    """Every target whose workload ran, in the order of `TARGETS`."""
    return [Verdict(target, _rounds(results, target)) for target in TARGETS if target.workload in results.turns]


def _rounds(results: Results, target: Target) -> list[float]:
    sides = results.turns[target.workload]
    figure = target.figure
    over = [turn[figure] for turn in sides.get(target.over, []) if figure in turn]
    if target.under is None:
        return over
    under = [turn[figure] for turn in sides.get(target.under, []) if figure in turn]
    return [a / b for a, b in zip(over, under, strict=False)]


TARGETS = (
    Target("start", "start_s", "aq", sense="<=", bound=2),
    Target("start", "idle_mb", "aq", sense="<=", bound=150),
    Target("W1", "files_per_s", "aq", "tiled", ">=", 25),
    Target("W2", "mb_per_s", "aq", "tiled", ">=", 3),
    Target("W2", "mb_per_s", "aq", "tiled-tuned"),
    Target("W2", "mb_per_s", "aq", "zarr"),
    Target("W3", "mb_per_s", "aq", "tiled", ">=", 5),
    Target("W3", "mb_per_s", "aq", "tiled-tuned"),
    Target("W3", "mb_per_s", "aq", "zarr", ">=", 0.5),
    Target("W4", "median_ms", "tiled-tuned", "aq", ">=", 12),
    Target("W4", "median_ms", "tiled", "aq"),
    Target("W4", "p99_ms", "tiled-tuned", "aq"),
    Target("W4", "median_ms", "aq", "route", "<=", 3),
    Target("W4", "median_ms", "aq", "zarr"),
    Target("W5", "median_ms", "tiled", "aq", ">=", 5),
    Target("W5", "median_ms", "tiled-tuned", "aq"),
    Target("W5", "median_ms", "aq", "zarr"),
    Target("W6", "rows_per_s", "aq", "tiled", ">=", 10),
    Target("W6-writer", "rows_per_s", "aq", "tiled", ">=", 60),
    Target("points", "points_per_s", "aq", sense=">=", bound=20_000),
    Target("points", "call_us", "aq", sense="<=", bound=50),
    Target("far", "cost_ratio", "aq", sense="<=", bound=1.3),
    Target("polled", "kept", "aq", sense=">=", bound=0.9),
    Target("events", "median_ms", "aq", sense="<=", bound=50),
    Target("block", "growth_mb", "aq", sense="<=", bound=200),
    Target("preview", "seconds", "aq", sense="<=", bound=0.2),
    Target("W8", "requests_per_s", "aq", "tiled", ">=", 15),
    Target("W8", "requests_per_s", "aq-gcs-two", "aq-gcs", ">=", 1),
    Target("bucket", "save_at_20_ms", "aq-gcs", sense="<=", bound=80),
    Target("bucket", "save_at_20_ms", "aq-s3", sense="<=", bound=80),
    Target("bucket", "slice_at_20_ms", "aq-gcs", sense="<=", bound=40),
    Target("bucket", "slice_at_20_ms", "aq-s3", sense="<=", bound=40),
    Target("X2", "p99_ratio", "aq", sense="<=", bound=4),
    Target("growth", "growth_mb", "aq", sense="<=", bound=200),
)
"""Quotients are written so that the side expected to have the larger number stands above. "Tiled" alone means its
default chunks; only W4's target is set against the tuned ones, the quotients without a bound tell the rest."""
