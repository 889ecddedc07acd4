"""Many DataFiles in few requests, with a result for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from aq_data.client.datafile import DataFile
from aq_data.client.http import TRIES, Body, Http, decoded
from aq_data.client.outgoing import outgoing_save, tagged_fields
from aq_data.errors import AqDataError, UnavailableError, ValidationError, error_from_code
from aq_data.wire.codec import JSON
from aq_data.wire.routes import BULK, BULK_BYTES, BULK_DELETE, BULK_GET, BULK_ITEMS, DATAFILES

__all__ = ["Result", "delete_many", "get_many", "save_many", "update_many"]

FileOf = Callable[[dict[str, Any]], DataFile]
Answers = list[dict[str, Any]]

UNFIT = (AqDataError, TypeError, ValueError, OverflowError, OSError)
"""What may be wrong with a single item: the error of that item, and of no other."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one item: the DataFile as it is now (None once deleted), or the `error` that it alone would raise.

    `id` is that of the item, also of one that failed; empty when it failed before it got one.
    """

    id: str
    file: DataFile | None = None
    error: AqDataError | None = None


@dataclass(frozen=True, slots=True)
class _Item:
    id: str
    encoded: bytes
    is_repeatable: bool = True


def save_many(http: Http, file_of: FileOf, items: Iterable[Mapping[str, Any]]) -> list[Result]:
    """As `Client.save_many`."""
    requests = _Requests(file_of, lambda group: _send(http, "POST", BULK, group))
    for item in items:
        try:
            outgoing = outgoing_save(**_keywords(item))
        except UNFIT as exc:
            requests.add(_refused(item, exc))
            continue
        if outgoing.is_document and len(outgoing.document) < BULK_BYTES:
            requests.add(_Item(outgoing.id, outgoing.document))
            continue
        requests.flush()  # saved before this one
        try:
            file = file_of(decoded(http.request("POST", DATAFILES, outgoing.body())))
            requests.add(Result(outgoing.id, file))
        except UNFIT as exc:  # also a file that can no longer be read
            requests.add(Result(outgoing.id, error=_unfit(exc)))
    return requests.results()


def get_many(http: Http, file_of: FileOf, ids: Iterable[str]) -> list[Result]:
    """As `Client.get_many`."""
    requests = _Requests(file_of, lambda group: _send(http, "POST", BULK_GET, group, b'{"ids":[', b"]}"))
    for id in ids:
        requests.add(_Item(id, msgspec.json.encode(id)))
    return requests.results()


def update_many(http: Http, file_of: FileOf, items: Iterable[Mapping[str, Any]]) -> list[Result]:
    """As `Client.update_many`."""
    requests = _Requests(file_of, lambda group: _send(http, "PATCH", BULK, group))
    for item in items:
        try:
            change = _keywords(item)
            if not isinstance(change.get("id"), str) or not isinstance(change.get("patch"), Mapping):
                raise ValidationError("an item needs `id`, a text, and `patch`, a dict")
            change["patch"] = tagged_fields(change["patch"])
            requests.add(_Item(change["id"], msgspec.json.encode(change), change.get("revision") is None))
        except UNFIT as exc:
            requests.add(_refused(item, exc))
    return requests.results()


def delete_many(http: Http, file_of: FileOf, ids: Iterable[str]) -> list[Result]:
    """As `Client.delete_many`."""

    def send(group: list[_Item]) -> Answers:
        for attempt in range(TRIES):
            try:
                answers = _send(http, "POST", BULK_DELETE, group)
            except UnavailableError:
                if attempt + 1 == TRIES:
                    raise
                continue
            if not attempt:
                return answers
            # By the try before, whose answer was lost.
            return [{} if answer.get("error", {}).get("code") == "deleted" else answer for answer in answers]
        raise AssertionError("unreachable")

    requests = _Requests(file_of, send)
    for id in ids:
        requests.add(_Item(id, msgspec.json.encode({"id": id}), is_repeatable=False))
    return requests.results()


def _keywords(item: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise ValidationError(f"an item is a dict of keywords, not a {type(item).__name__}")
    return dict(item)


def _refused(item: Any, exc: Exception) -> Result:
    id = item.get("id") if isinstance(item, Mapping) else None
    return Result(id if isinstance(id, str) else "", error=_unfit(exc))


def _unfit(exc: Exception) -> AqDataError:
    return exc if isinstance(exc, AqDataError) else ValidationError(f"the item does not fit: {exc}")


def _send(http: Http, method: str, path: str, group: list[_Item], before: bytes = b"[", after: bytes = b"]") -> Answers:
    content = before + b",".join(item.encoded for item in group) + after
    body = Body(lambda: iter((content,)), len(content), JSON)
    repeatable = all(item.is_repeatable for item in group)
    return list(decoded(http.request(method, path, body, repeatable=repeatable))["results"])


class _Requests:
    """Items, sent in as few requests as the server's limits allow, and results that are known, in the order given."""

    def __init__(self, file_of: FileOf, send: Callable[[list[_Item]], Answers]) -> None:
        self._file_of, self._send = file_of, send
        self._results: list[Result] = []
        self._group: list[_Item | Result] = []
        self._bytes = 0
        self._failed: AqDataError | None = None

    def add(self, entry: _Item | Result) -> None:
        size = len(entry.encoded) + 1 if isinstance(entry, _Item) else 0
        if len(self._group) == BULK_ITEMS or self._bytes + size > BULK_BYTES - 16:
            self.flush()
        self._group.append(entry)
        self._bytes += size

    def flush(self) -> None:
        """Send what waits."""
        answered = iter(self._ask([entry for entry in self._group if isinstance(entry, _Item)]))
        self._results += [entry if isinstance(entry, Result) else next(answered) for entry in self._group]
        self._group, self._bytes = [], 0

    def results(self) -> list[Result]:
        self.flush()
        return self._results

    def _ask(self, items: list[_Item]) -> list[Result]:
        if items and self._failed is None:
            try:
                answers = self._send(items)
            except AqDataError as exc:
                self._failed = exc  # a whole request, which the following ones would hardly fare better than
            else:
                return [self._result(item, answer) for item, answer in zip(items, answers, strict=True)]
        return [Result(item.id, error=self._failed) for item in items]

    def _result(self, item: _Item, answer: dict[str, Any]) -> Result:
        problem, document = answer.get("error"), answer.get("document")
        if problem is not None:
            return Result(item.id, error=error_from_code(problem["code"], problem["detail"], problem.get("details")))
        return Result(item.id, None if document is None else self._file_of(document))
