"""Tiled's client asked what W7 asks. Runs only inside Tiled's own environment, so nothing else here may import it."""

import re
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

from tiled.client import from_uri  # type: ignore[import-not-found]
from tiled.queries import Comparison, FullText, Key  # type: ignore[import-not-found]

from benchmarks.asking import NotUnderstoodError
from benchmarks.catalogue import documents
from benchmarks.peer import Options
from benchmarks.questions import EXACT, PAGE, Answer, Question

__all__ = ["TiledAsker", "connect"]

_WRITERS = 4
"""Threads that load: Tiled has no way to save many at once."""
_COMPARISONS = {"$gt": "gt", "$gte": "ge", "$lt": "lt", "$lte": "le"}


class TiledAsker:
    """A document is the metadata of a container, as Tiled's documentation suggests for data with several arrays."""

    def __init__(self, options: Options) -> None:
        self._root = from_uri(
            options["url"], structure_clients="numpy", cache=None, api_key=options["api_key"], remember_me=False
        )

    def ask(self, question: Question) -> tuple[float, Answer]:
        queries = [query for key, value in question.filter.items() for query in _queries(key, value)]
        sorting = (question.path, 1) if question.order else ("created_at", -1)
        if question.ask == "distinct":
            raise NotUnderstoodError("not asked of Tiled")
        start = perf_counter()
        results = self._root
        for query in queries:
            results = results.search(query)
        if question.ask == "count":
            count = len(results)
            return perf_counter() - start, Answer(count=count)
        page = results.sort(sorting).values()[:PAGE]
        numbers = tuple(int(node.metadata["metadata"]["number"]) for node in page)
        total = len(results)
        return perf_counter() - start, Answer(numbers, min(total, EXACT))

    def load(self, count: int) -> None:
        """Save what is missing of the first `count` documents; some 50 a second."""
        done = len(self._root)
        # Of a load that was broken off, the last of each writer may be there or not.
        doubtful = range(max(0, done - _WRITERS), done + _WRITERS)

        def save(document: dict[str, Any]) -> None:
            number = document["metadata"]["number"]
            if number not in doubtful or str(number) not in self._root:
                self._root.create_container(key=str(number), metadata=document)

        with ThreadPoolExecutor(_WRITERS) as threads:
            for _ in threads.map(save, documents(doubtful.start, count)):
                pass


def _queries(key: str, value: Any) -> list[Any]:
    if key == "$text" and not value.endswith("*"):
        return [FullText(value)]
    if not key.startswith("$") and not isinstance(value, dict):
        path = key if re.match("metadata|device|station|user", key) else f"metadata.{key}"
        return [Key(path) == value]
    if not key.startswith("$") and value.keys() <= _COMPARISONS.keys():
        return [Comparison(_COMPARISONS[operator], key, operand) for operator, operand in value.items()]
    raise NotUnderstoodError(f"{key}: {value}")


def connect(options: Options) -> TiledAsker:
    """`options`: `url` and `api_key`."""
    return TiledAsker(options)
