"""What a run found, as a table for people and as JSON for whoever compares runs."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.contest import WORKLOADS, Results
from benchmarks.targets import Verdict

__all__ = ["as_json", "as_text", "table"]

_MET = {True: "met", False: "MISSED", None: ""}


def as_text(results: Results, verdicts: Sequence[Verdict]) -> str:
    """Medians over the rounds, then the quotients beside their targets."""
    tables = [table(("", "workload", "side", "median over rounds"), _figure_rows(results))]
    tables.append(table(("", "value", "median", "rounds", "target", ""), map(_verdict_row, verdicts)))
    if results.errors:
        tables.append("failed:\n" + "\n".join(results.errors))
    return "\n\n".join(tables)


def as_json(results: Results, verdicts: Sequence[Verdict], run: dict[str, Any]) -> dict[str, Any]:
    """`run` says how and where it was made. Every turn's figures are kept, so anything can be computed again."""
    return {
        "run": run,
        "turns": results.turns,
        "targets": [
            {
                "workload": verdict.target.workload,
                "value": _value_name(verdict),
                "median": verdict.median if verdict.rounds else None,
                "rounds": verdict.rounds,
                "sense": verdict.target.sense,
                "bound": verdict.target.bound,
                "met": verdict.met,
            }
            for verdict in verdicts
        ],
        "errors": results.errors,
    }


def _figure_rows(results: Results) -> Iterable[tuple[str, ...]]:
    for name, sides in results.turns.items():
        workload = WORKLOADS[name]
        for position, (side, turns) in enumerate(sides.items()):
            heading = (name, workload.title) if position == 0 else ("", "")
            medians = [
                f"{key} {statistics.median(turn[key] for turn in turns):.4g}"
                for key in workload.shown
                if turns and all(key in turn for turn in turns)
            ]
            yield *heading, side, "  ".join(medians) or "failed"


def _verdict_row(verdict: Verdict) -> tuple[str, ...]:
    target = verdict.target
    bound = "" if target.bound is None else f"{target.sense} {target.bound:g}"
    rounds = " ".join(f"{value:.3g}" for value in verdict.rounds)
    median = f"{verdict.median:.3g}" if verdict.rounds else "not run"
    return target.workload, _value_name(verdict), median, rounds, bound, _MET[verdict.met]


def _value_name(verdict: Verdict) -> str:
    target = verdict.target
    return f"{target.figure} of {target.over}" + (f" / {target.under}" if target.under else "")


def table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Text in columns."""
    lines = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruler = tuple("-" * width for width in widths)
    padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in (heading, ruler, *lines[1:]))
    return "\n".join(padded)
