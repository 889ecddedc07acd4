"""Where pymongo's errors become ours, and the client is made from an address that is a secret."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

from bson.errors import BSONError
from pymongo import AsyncMongoClient
from pymongo.errors import (
    ConnectionFailure,
    CursorNotFound,
    DocumentTooLarge,
    ExecutionTimeout,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
)

from aq_data.errors import AqDataError, ConfigError, StorageError, TooLargeError, UnavailableError

__all__ = ["border", "open_client", "translate"]

DEFAULTS: dict[str, Any] = {
    # On disk of most members before it is acknowledged, and read only what can no longer be rolled back.
    "w": "majority",
    "journal": True,
    "readConcernLevel": "majority",
    "wtimeoutMS": 10_000,
    # A database that is down or says nothing is found out by the driver's own probes: the first question then fails within
    # ten seconds, every later one within three. What may take long, a question, says itself that it took ten.
    "heartbeatFrequencyMS": 2_000,
    "connectTimeoutMS": 4_000,
    "serverSelectionTimeoutMS": 3_000,
    "waitQueueTimeoutMS": 3_000,
    "socketTimeoutMS": 20_000,
    "appname": "aq-data",
}
"""What an address may say otherwise."""

PASSING = {
    6, 7, 43, 50, 64, 89, 91, 100, 112, 133, 189, 202, 234, 246, 262, 317, 365, 9001, 10058, 10107, 11600, 11602, 13388,
    13435, 13436, 14031,
}  # fmt: skip
"""Codes of what waiting may mend: elections, shutdowns, networks, conflicts, migrations of shards, a full disk."""
TOO_LARGE = {10334, 17419, 17420}
REFUSED = {13, 18}
FILES = ("tlsCAFile", "tlsCertificateKeyFile", "tlsCRLFile")


def translate(exc: PyMongoError | BSONError) -> AqDataError:
    """Our error for pymongo's: what a wait may mend is UnavailableError, too large a document TooLargeError."""
    code = exc.code if isinstance(exc, OperationFailure) else None
    name = type(exc).__name__ if code is None else f"{type(exc).__name__} {code}"
    message = f"the metadata database failed ({name}): {str(exc)[:500]}"
    if isinstance(exc, DocumentTooLarge) or code in TOO_LARGE:
        return TooLargeError(
            f"the document is too large for MongoDB (16 MB with its index terms); attach it as a file: {exc}"
        )
    if code in REFUSED:
        return UnavailableError(
            f"MongoDB does not let this server in ({name}): user, password, authSource or certificate in the address, or "
            f"the user's role there, must be put right: {str(exc)[:200]}"
        )
    if isinstance(exc, (ConnectionFailure, ExecutionTimeout, CursorNotFound, WriteConcernError)) or code in PASSING:
        return UnavailableError(message)
    if isinstance(exc, PyMongoError) and any(map(exc.has_error_label, ("RetryableWriteError", "TransientTransactionError"))):
        return UnavailableError(message)
    return StorageError(message)


@contextmanager
def border() -> Iterator[None]:
    """Nothing of `pymongo` leaves this block."""
    try:
        yield
    except (PyMongoError, BSONError) as exc:
        raise translate(exc) from exc


def open_client(url: str, **options: Any) -> AsyncMongoClient[dict[str, Any]]:
    """A client that connects when first used; `options` go before those of the address.

    ConfigError, without the address in it, when that cannot be one.
    """
    given = {option.lower(): values[-1] for option, values in parse_qs(url.partition("?")[2]).items()}
    _check_files(given)
    defaults = {key: value for key, value in DEFAULTS.items() if key.lower() not in given}
    problem = "it begins with mongodb:// or mongodb+srv://"
    if url.startswith(("mongodb://", "mongodb+srv://")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # the driver would go on without an option that it does not understand
                return AsyncMongoClient(url, **{**defaults, **options})
        except (PyMongoError, UserWarning, ValueError, TypeError, OSError) as exc:
            # Its words may quote the address, in which a password may stand.
            problem = f"the driver says {type(exc).__name__}: an option, a name or a file in it is wrong"
            if FILES[1].lower() in given or FILES[0].lower() in given:
                problem += f"; {FILES[0]} holds certificates, {FILES[1]} a certificate and its key, both in PEM form"
    raise ConfigError(
        f"server.mongo is no MongoDB address ({problem}); one looks like mongodb://user:password@host:27017/?tls=true, with "
        "the special characters of a password percent-encoded"
    )


def _check_files(given: dict[str, str]) -> None:
    """ConfigError naming the file of TLS that is missing; its path is no secret."""
    for option in FILES:
        path = given.get(option.lower())
        if path is not None:
            try:
                with open(path, "rb"):
                    pass
            except OSError as exc:
                raise ConfigError(f"server.mongo: {option} {path} cannot be read: {exc.strerror}") from exc
    if given.get("authmechanism") == "MONGODB-X509" and FILES[1].lower() not in given:
        raise ConfigError(f"server.mongo: authMechanism=MONGODB-X509 needs {FILES[1]}, a PEM file with certificate and key")
