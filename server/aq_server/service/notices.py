"""Telling other programs that a sweep has ended: signed webhooks to addresses of the server's own list.

The form is that of Standard Webhooks 1.0 (headers `webhook-id`, `webhook-timestamp`, `webhook-signature`). Everybody is told
at least once: who was told is kept in the sweep's state, so that a restarted server goes on; a repeat has the same id.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import time
from datetime import timedelta

import msgspec

from aq_data.errors import AqDataError, ConfigError
from aq_data.models.datafile import DataFile
from aq_data.models.sweep import Plan, State
from aq_data.models.values import parse_instant
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.saving import now
from aq_server.service.tasks import stop

__all__ = ["Notices", "sign"]

log = logging.getLogger("aq_data")

TIMEOUT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
GIVE_UP = timedelta(hours=24)
LEASE_SECONDS = 30.0


def sign(secret: bytes, id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` header: HMAC-SHA256 over id, timestamp and body, in base64."""
    digest = hmac.new(secret, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode("ascii")


def parse_secret(text: str) -> bytes:
    """`whsec_` and base64, as Standard Webhooks writes secrets; any other text is taken as it is."""
    text = text.strip()
    if not text:
        raise ConfigError("the file named by webhook_secret_file is empty")
    if not text.startswith("whsec_"):
        return text.encode()
    try:
        return base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except binascii.Error as exc:
        raise ConfigError("the secret in webhook_secret_file begins with whsec_ but is not base64") from exc


class Notices:
    """Tells; one instance per process."""

    def __init__(self, metadata: MetadataStore, secret: bytes | None) -> None:
        """`secret` None: nobody is to be told."""
        self._metadata, self._secret = metadata, secret
        self._running: dict[str, asyncio.Task[None]] = {}
        self._next: dict[tuple[str, str], tuple[float, float]] = {}

    def begin(self, plan: Plan, state: State) -> None:
        """Tell in the background those who are not told yet; nothing when that is going on already."""
        if self._secret is not None and plan.id not in self._running:
            task = asyncio.create_task(self._tell_all(plan, state))
            self._running[plan.id] = task
            task.add_done_callback(lambda _: self._running.pop(plan.id, None))

    async def close(self) -> None:
        """Stop; what was not told is told after the next start."""
        await stop(self._running.values())

    async def _tell_all(self, plan: Plan, state: State) -> None:
        try:
            due = [address for address in plan.notify if address not in state.told and self._is_due(plan.id, address)]
            instant = time.time()
            leased = await self._metadata.sweeps.lease(plan.id, instant, instant + LEASE_SECONDS) if due else None
            record = await self._metadata.get(plan.id)
            if leased is None or record is None:
                return  # another process tells
            try:
                for address in due:
                    await self._tell_one(record.document, address)
            finally:
                await self._metadata.sweeps.renew(plan.id, leased.token, 0.0)
        except AqDataError as exc:
            log.warning("webhooks wait for the database", extra={"fields": {"id": plan.id, "error": str(exc)}})
        except Exception:
            log.exception("telling failed", extra={"fields": {"id": plan.id}})

    def _is_due(self, id: str, address: str) -> bool:
        return time.monotonic() >= self._next.get((id, address), (0.0, 0.0))[0]

    async def _tell_one(self, document: DataFile, address: str) -> None:
        is_late = now() - parse_instant(document.finished_at or "", "finished_at") > GIVE_UP
        if is_late:
            log.error("a webhook was given up", extra={"fields": {"id": document.id, "address": address}})
        if is_late or await self._tell(document, address):
            await self._metadata.sweeps.tell(document.id, address)
            self._next.pop((document.id, address), None)

    async def _tell(self, document: DataFile, address: str) -> bool:
        """One try; whether the address took it."""
        import httpx

        assert self._secret is not None
        sweep = document.sweep
        outcome = "abandoned" if document.state == "abandoned" else "finished"
        body = msgspec.json.encode(
            {
                "type": f"sweep.{outcome}",
                "timestamp": document.finished_at,
                "data": {
                    "id": document.id,
                    "name": document.name,
                    "state": document.state,
                    "reason": sweep.reason if sweep is not None else "",
                    "blocks": sweep.head if sweep is not None else 0,
                },
            }
        )
        id, timestamp = f"{document.id}.{outcome}", int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "aq-data",
            "webhook-id": id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._secret, id, timestamp, body),
        }
        reason = ""
        try:
            async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False) as client:
                answer = await client.post(address, content=body, headers=headers)
            if answer.is_success:
                return True
            reason = f"answered {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            reason = str(exc) or type(exc).__name__
        pause = min(LONGEST_PAUSE, 2 * self._next.get((document.id, address), (0.0, FIRST_PAUSE / 2))[1])
        self._next[document.id, address] = (time.monotonic() + pause, pause)
        log.warning("a webhook failed", extra={"fields": {"id": document.id, "address": address, "reason": reason}})
        return False
