"""W7 on a catalogue of 10,000, 200,000 or 1,000,000 documents: `python -m benchmarks.search`.

Every family of questions is asked of the store itself and of a server on the same data, at least 100 times with varied
values after some that warm the caches; every answer is compared with what NumPy computes. The stores are filled once, into
the cache (a million documents take long). `--explain` shows the statements of the questions that miss their target, how
long each takes alone, and how SQLite means to run it.
"""

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from aq_data.errors import QueryError
from aq_data.storage.metadata.sqlite import SqliteStore
from benchmarks import machine
from benchmarks.asking import Asker, ClientAsker, StoreAsker
from benchmarks.catalogue import RARE_KEYS
from benchmarks.catalogue_store import database_of, ensure_sqlite
from benchmarks.explaining import statements_of
from benchmarks.questions import FAMILIES, Truth
from benchmarks.report import table
from benchmarks.server_process import ServerProcess
from benchmarks.sides import AQ_SERVER

__all__ = ["Finding", "ask_family", "main"]

_CACHE = Path(".cache")
_LOG = logging.getLogger(__name__)

WARM_UP = 10
PATIENCE = 20.0
"""Seconds after which a family is asked no more questions: what is so slow needs no hundred values to be known as slow."""
MEDIAN_MS, P99_MS, HTTP_MORE_MS = 5.0, 20.0, 3.0


@dataclass(frozen=True)
class Finding:
    """How one side answered one family. `trouble`: why there are no figures, or the first wrong answer."""

    side: str
    family: str
    asked: int = 0
    median_ms: float = 0.0
    p99_ms: float = 0.0
    trouble: str = ""


def ask_family(asker: Asker, side: str, name: str, truth: Truth, values: int) -> Finding:
    """Ask questions with `values` different values, until patience ends, after `WARM_UP` others."""
    family = FAMILIES[name]
    seconds: list[float] = []
    begin = perf_counter()
    for k in range(-WARM_UP, values):
        question = family.make(truth, k % (2 * values))
        try:
            took, answer = asker.ask(question)
        except QueryError as error:
            return Finding(side, name, trouble=f"not understood: {error}")
        if answer != question.expected(truth):
            return Finding(side, name, trouble=f"WRONG answer to {json.dumps(question.filter)}")
        if k >= 0:
            seconds.append(took)
        if perf_counter() - begin > PATIENCE and seconds:
            break
    median, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 99])
    return Finding(side, name, len(seconds), float(median), float(p99))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when an answer was wrong; a missed target or a question not understood is a finding."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = ensure_sqlite(options.documents, _CACHE)
    truth = Truth(options.documents)
    before = machine.describe()
    findings: list[Finding] = []
    if "store" in options.sides:
        with _store_of(folder) as store:
            findings += _ask_all(store, "store", options, truth)
    if "http" in options.sides:
        with _server_of(folder) as client:
            findings += _ask_all(client, "http", options, truth)
    print(_as_text(findings))
    if options.explain:
        _explain(folder, findings, truth)
    kept = {"documents": options.documents, "before": before, "findings": [asdict(finding) for finding in findings]}
    options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 1 if any(finding.trouble.startswith("WRONG") for finding in findings) else 0


def _ask_all(asker: Asker, side: str, options: argparse.Namespace, truth: Truth) -> list[Finding]:
    findings = []
    for name in options.only:
        finding = ask_family(asker, side, name, truth, options.values)
        shown = finding.trouble or f"{finding.median_ms:9.2f} {finding.p99_ms:9.2f} ms"
        _LOG.info("%-6s %-40s %s", side, FAMILIES[name].title, shown)
        findings.append(finding)
    return findings


@contextmanager
def _store_of(folder: Path) -> Iterator[Asker]:
    with asyncio.Runner() as loop:
        store = SqliteStore(database_of(folder))
        try:
            yield StoreAsker(store, loop)
        finally:
            loop.run(store.close())


@contextmanager
def _server_of(folder: Path) -> Iterator[Asker]:
    server = ServerProcess(AQ_SERVER, folder)
    server.start()
    try:
        yield ClientAsker(server.url)
    finally:
        server.stop()


def _as_text(findings: list[Finding]) -> str:
    medians = {(finding.side, finding.family): finding.median_ms for finding in findings if not finding.trouble}
    rows = []
    for finding in findings:
        title = FAMILIES[finding.family].title
        if finding.trouble:
            rows.append((finding.family, title, finding.side, "", "", "", finding.trouble))
            continue
        figures = f"{finding.median_ms:.2f}", f"{finding.p99_ms:.2f}", str(finding.asked)
        rows.append((finding.family, title, finding.side, *figures, "" if _is_met(finding, medians) else "MISSED"))
    return table(("", "question", "side", "median ms", "p99 ms", "asked", ""), rows)


def _is_met(finding: Finding, medians: dict[tuple[str, str], float]) -> bool:
    if finding.trouble:
        return False
    if finding.side == "http":
        inside = medians.get(("store", finding.family))
        return inside is None or finding.median_ms <= inside + HTTP_MORE_MS
    return finding.median_ms <= MEDIAN_MS and finding.p99_ms <= P99_MS


def _explain(folder: Path, findings: list[Finding], truth: Truth) -> None:
    for finding in findings:
        if finding.side == "store" and not finding.trouble and not _is_met(finding, {}):
            question = FAMILIES[finding.family].make(truth, 1)
            print(f"\n### {finding.family}: {FAMILIES[finding.family].title}\n{json.dumps(question.filter)}")
            for statement in statements_of(database_of(folder), question):
                print(f"\n{statement.milliseconds:.1f} ms, {statement.rows} rows:\n{statement.sql}\n{statement.plan}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("--documents", type=int, choices=list(RARE_KEYS), default=10_000)
    parser.add_argument("--only", type=_families, default=list(FAMILIES), help=f"some of {','.join(FAMILIES)}")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=["store", "http"], help="store,http")
    parser.add_argument("--values", type=int, default=100, help="questions of each family (100)")
    parser.add_argument("--explain", action="store_true", help="statements and plans of what misses its target")
    parser.add_argument("--json", type=Path, default=_CACHE / "search.json", help="where every figure goes")
    return parser


def _families(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in FAMILIES]:
        raise argparse.ArgumentTypeError(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
