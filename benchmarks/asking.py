"""How W7 asks: one family of questions of one side, each answer held against the truth.

Imports nothing but NumPy, since it also runs in Tiled's environment.
"""

import json
from dataclasses import dataclass
from operator import itemgetter
from time import perf_counter
from typing import Protocol

import numpy as np

from benchmarks.questions import FAMILIES, Answer, Question, Truth

__all__ = ["Asker", "Finding", "NotUnderstoodError", "ask_family"]

WARM_UP = 10
PATIENCE = 20.0
"""Seconds after which a family is asked no more questions: what is so slow needs no hundred values to be known as slow."""


class NotUnderstoodError(Exception):
    """The side has no such question."""


class Asker(Protocol):
    """One side."""

    def ask(self, question: Question) -> tuple[float, Answer]:
        """The seconds it took to be answered, and the answer; NotUnderstoodError."""
        ...


@dataclass(frozen=True)
class Finding:
    """How one side answered one family. `trouble`: why there are no figures, or what the first wrong answer was to."""

    side: str
    family: str
    asked: int = 0
    median_ms: float = 0.0
    p99_ms: float = 0.0
    trouble: str = ""
    is_wrong: bool = False


def ask_family(asker: Asker, side: str, name: str, truth: Truth, values: int, repeats: int) -> Finding:
    """Ask questions with `values` different values, until patience ends, after `WARM_UP` others.

    Each is asked `repeats` times and the fastest counts: on a shared machine the others tell of its other users. So the p99
    is over values, not over the machine's moods, unless `repeats` is 1.
    """
    family = FAMILIES[name]
    seconds: list[float] = []
    wrong = ""
    begin = perf_counter()
    for k in range(-WARM_UP, values):
        question = family.make(truth, k % (2 * values))
        try:
            took, answer = min((asker.ask(question) for _ in range(repeats if k >= 0 else 1)), key=itemgetter(0))
        except NotUnderstoodError as error:
            return Finding(side, name, trouble=f"not understood: {error}")
        if not wrong and answer != question.expected(truth):
            wrong = f"WRONG: {json.dumps(question.filter)}"
        if k >= 0:
            seconds.append(took)
        if perf_counter() - begin > PATIENCE and seconds:
            break
    median, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 99])
    return Finding(side, name, len(seconds), float(median), float(p99), wrong, bool(wrong))
