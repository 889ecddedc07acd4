"""`python -m benchmarks`, in the project's root, with the project's environment."""

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks import machine
from benchmarks.contest import WORKLOADS, Results, hold
from benchmarks.report import as_json, as_text
from benchmarks.sides import SIDES, open_sides
from benchmarks.targets import judge
from benchmarks.tiled_environment import TILED, ensure_tiled
from benchmarks.workloads import FULL, SMALL, Scale

_CACHE = Path(".cache")
"""In the project's root, not kept by git."""
_LOG = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a side failed; a missed target is a finding, not a failure."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    scale = SMALL if options.small else FULL
    names = [side for side in SIDES if any(side in WORKLOADS[name].sides for name in options.only)]
    names = [side for side in names if not (options.no_tiled and side.startswith("tiled"))]
    names = [side for side in names if not (options.no_services and side.startswith("aq-"))]
    names = [side for side in names if not (options.no_aq and side.startswith("aq"))]
    tiled = ensure_tiled((_CACHE / "tiled-venv").absolute()) if any(map(_is_tiled, names)) else None
    _LOG.info("warming memory: %.1f s", machine.warm_memory(scale.warm_bytes))
    run = {"tiled": TILED, "rounds": options.rounds, "scale": asdict(scale), "before": machine.describe()}
    results = _contest(options, names, scale, tiled)
    verdicts = judge(results)
    print(as_text(results, verdicts))
    run |= {"after": machine.describe()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(as_json(results, verdicts, run), indent=1, allow_nan=False) + "\n")
    return 1 if results.errors else 0


def _contest(options: argparse.Namespace, names: list[str], scale: Scale, tiled: Path | None) -> Results:
    folder = Path(tempfile.mkdtemp(prefix="aq-benchmarks-"))
    try:
        with ExitStack() as stack:
            return hold(options.only, open_sides(names, folder, scale, tiled, stack), options.rounds)
    finally:
        if options.keep:
            _LOG.info("kept %s", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_tiled(side: str) -> bool:
    return side.startswith("tiled")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", type=_workloads, default=list(WORKLOADS), help=f"some of {','.join(WORKLOADS)}")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a smoke test, its figures mean nothing")
    parser.add_argument("--no-tiled", action="store_true", help="without Tiled")
    parser.add_argument("--no-services", action="store_true", help="without MongoDB and buckets")
    parser.add_argument("--no-aq", action="store_true", help="without aq-data: the peer and the floors alone")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side at each workload (3)")
    parser.add_argument("--json", type=Path, default=_CACHE / "benchmarks.json", help="where every figure goes")
    parser.add_argument("--keep", action="store_true", help="keep the servers' folders and logs")
    return parser


def _workloads(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise argparse.ArgumentTypeError(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
