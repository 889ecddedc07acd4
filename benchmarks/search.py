"""W7 on a catalogue of 10,000, 200,000 or 1,000,000 documents: `python -m benchmarks.search`.

Every family of questions is asked of the store itself, of a server on the same data and, if asked for, of Tiled, one side
after the other, with 100 varied values (the fastest of three times each) after some that warm the caches; every answer is
compared with what NumPy computes. The catalogues are filled once, into the cache (a million takes long). `--explain`
shows the statements of the questions that miss their target, how long each takes alone, and how SQLite means to run it.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks import machine
from benchmarks.asking import Finding
from benchmarks.catalogue import RARE_KEYS
from benchmarks.catalogue_store import database_of, ensure_sqlite, filling_of
from benchmarks.explaining import statements_of
from benchmarks.questions import FAMILIES, Truth
from benchmarks.report import table
from benchmarks.search_sides import SIDES, open_sides

__all__ = ["main"]

_CACHE = Path(".cache")
_LOG = logging.getLogger(__name__)

MEDIAN_MS, P99_MS = 5.0, 20.0
"""Of the store."""
HTTP_MORE_MS = 3.0
MONGO_MS = 10.0
"""Promised of equality, AND, ranges and pages by time; the others are told."""
TIMES_TILED = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when aq-data answered wrongly; a missed target or a question not understood is a finding."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    before = machine.describe()
    findings: dict[str, dict[str, Finding]] = {}
    with ExitStack() as stack:
        sides = open_sides(options.sides, options.documents, _CACHE, stack)
        for family in options.only:
            findings[family] = {}
            for side, ask in sides.items():
                finding = findings[family][side] = ask(family, options.values, options.repeats)
                _LOG.info("%-38s %-6s %8s %8s  %s", FAMILIES[family].title, side, *_shown(finding), finding.trouble)
    print(table(("", "question", "side", "median ms", "p99 ms", ""), _rows(findings)))
    if {"store", "http"} & set(sides):
        print(f"\nSQLite: {filling_of(ensure_sqlite(options.documents, _CACHE))}")
    if options.explain:
        _explain(ensure_sqlite(options.documents, _CACHE), findings, options.documents)
    every = [finding for sides in findings.values() for finding in sides.values()]
    kept = {
        "documents": options.documents,
        "repeats": options.repeats,
        "before": before,
        "findings": [asdict(finding) for finding in every],
    }
    options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 1 if any(finding.is_wrong and finding.side != "tiled" for finding in every) else 0


def _rows(findings: dict[str, dict[str, Finding]]) -> list[tuple[str, ...]]:
    return [
        (family if first else "", FAMILIES[family].title if first else "", side, *_shown(finding), _verdict(finding, sides))
        for family, sides in findings.items()
        for side, finding in sides.items()
        for first in [side == next(iter(sides))]
    ]


def _shown(finding: Finding) -> tuple[str, str]:
    return (f"{finding.median_ms:.2f}", f"{finding.p99_ms:.2f}") if finding.asked else ("", "")


def _verdict(finding: Finding, sides: dict[str, Finding]) -> str:
    """What is to be said of it: trouble, a missed target, how many times slower than aq-data over HTTP Tiled is."""
    if finding.trouble and (finding.side != "tiled" or not finding.asked):
        return finding.trouble
    if finding.side == "mongo":
        return "" if finding.median_ms <= MONGO_MS else f"over {MONGO_MS:.0f} ms"
    if finding.side == "store":
        return "" if finding.median_ms <= MEDIAN_MS and finding.p99_ms <= P99_MS else "MISSED"
    other = sides.get("store" if finding.side == "http" else "http")
    if other is None or not other.asked:
        return ""
    if finding.side == "http":
        more = finding.median_ms - other.median_ms
        return f"+{more:.1f}" + ("" if more <= HTTP_MORE_MS else " MISSED")
    times = finding.median_ms / other.median_ms
    wrong = ", and wrong" if finding.is_wrong else ""
    return f"{times:.0f} times{wrong}" + ("" if times >= TIMES_TILED else " MISSED")


def _explain(folder: Path, findings: dict[str, dict[str, Finding]], documents: int) -> None:
    truth = Truth(documents)
    for family, sides in findings.items():
        if sides["store"].asked and _verdict(sides["store"], sides):
            question = FAMILIES[family].make(truth, 1)
            print(f"\n### {family}: {FAMILIES[family].title}\n{json.dumps(question.filter)}")
            for statement in statements_of(database_of(folder), question):
                print(f"\n{statement.milliseconds:.1f} ms, {statement.rows} rows:\n{statement.sql}\n{statement.plan}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("--documents", type=int, choices=list(RARE_KEYS), default=10_000)
    parser.add_argument("--only", type=_some_of(FAMILIES), default=list(FAMILIES), help=f"some of {','.join(FAMILIES)}")
    parser.add_argument("--sides", type=_some_of(SIDES), default=["store", "http"], help=f"some of {','.join(SIDES)}")
    parser.add_argument("--values", type=int, default=100, help="questions of each family (100)")
    parser.add_argument("--repeats", type=int, default=3, help="times each is asked; the fastest counts (3)")
    parser.add_argument("--explain", action="store_true", help="statements and plans of what misses its target in the store")
    parser.add_argument("--json", type=Path, default=_CACHE / "search.json", help="where every figure goes")
    return parser


def _some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return given

    return names


if __name__ == "__main__":
    sys.exit(main())
