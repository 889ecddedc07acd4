"""Sides that W7 can be asked of in one process: any metadata store, and a server through aq-data's client."""

import asyncio
from time import perf_counter
from typing import Any

import msgspec

import aq_data
from aq_data.errors import QueryError
from aq_data.models.paths import parse_path, parse_sort
from aq_data.models.query import parse_filter
from aq_data.models.values import from_tagged
from aq_data.storage.metadata.store import MetadataStore
from benchmarks.asking import NotUnderstoodError
from benchmarks.questions import PAGE, Answer, Question

__all__ = ["ClientAsker", "StoreAsker"]


class StoreAsker:
    """A store, and the event loop it lives on. The clock covers parsing and the store's own call."""

    def __init__(self, store: MetadataStore, loop: asyncio.Runner) -> None:
        self._store, self._loop = store, loop

    def ask(self, question: Question) -> tuple[float, Answer]:
        try:
            return self._loop.run(self._timed(question))
        except QueryError as error:
            raise NotUnderstoodError(str(error)) from error

    async def _timed(self, question: Question) -> tuple[float, Answer]:
        start = perf_counter()
        node = parse_filter(question.filter)
        if question.ask == "count":
            count = await self._store.count(node)
            return perf_counter() - start, Answer(count=count)
        if question.ask == "distinct":
            pairs = await self._store.distinct(parse_path(question.path), node, PAGE)
            return perf_counter() - start, Answer(values=tuple(pairs))
        page = await self._store.search(node, parse_sort(question.sort), PAGE, None)
        seconds = perf_counter() - start
        return seconds, Answer(tuple(_number(msgspec.json.decode(raw)) for raw in page.documents), page.total)


class ClientAsker:
    """The client of a server. The clock covers everything until the documents are there to be read."""

    def __init__(self, url: str) -> None:
        self._client = aq_data.connect(url)

    def ask(self, question: Question) -> tuple[float, Answer]:
        try:
            return self._timed(question)
        except QueryError as error:
            raise NotUnderstoodError(str(error)) from error

    def _timed(self, question: Question) -> tuple[float, Answer]:
        client, filter = self._client, from_tagged(question.filter)
        start = perf_counter()
        if question.ask == "count":
            count = client.count(filter)
            return perf_counter() - start, Answer(count=count)
        if question.ask == "distinct":
            values = client.distinct(question.path, filter, limit=PAGE)
            return perf_counter() - start, Answer(values=tuple(values.items()))
        hits = client.search(filter, sort=question.sort, limit=PAGE)
        seconds = perf_counter() - start
        return seconds, Answer(tuple(file.metadata["number"] for file in hits), hits.total)


def _number(document: dict[str, Any]) -> int:
    return int(document["metadata"]["number"])
