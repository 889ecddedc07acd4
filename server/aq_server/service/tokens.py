"""Access tokens: made once, shown once, kept only as a hash."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta

import msgspec

from aq_data.errors import AuthenticationError, NotFoundError, ValidationError
from aq_data.models.values import format_instant
from aq_data.storage.metadata.store import MetadataStore, Token

__all__ = ["SCOPES", "Tokens"]

SCOPES = ("read", "write", "admin")
"""Each scope includes those before it."""

PREFIX = "aqd_"
"""Marks a secret as ours, so that scanners find one that leaked."""


def _hash(secret: str) -> str:
    # 256 random bits need no slow hash: there is nothing to guess.
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


class Tokens:
    """Create, list, revoke and check tokens; a revoked one is refused from the next request on."""

    def __init__(self, metadata: MetadataStore) -> None:
        self._metadata = metadata

    async def create(self, name: str, scopes: tuple[str, ...], lifetime: timedelta | None) -> tuple[Token, str]:
        """A token and its secret, which is stored nowhere: show it now or never."""
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise ValidationError(f"scopes are {', '.join(SCOPES)}; not {', '.join(unknown) or 'none'}")
        now = datetime.now(UTC)
        secret = PREFIX + secrets.token_urlsafe(32)
        token = Token(
            id=secrets.token_hex(6),
            name=name,
            hash=_hash(secret),
            scopes=scopes,
            created_at=format_instant(now),
            expires_at=format_instant(now + lifetime) if lifetime is not None else None,
        )
        await self._metadata.add_token(token)
        return token, secret

    async def list(self) -> list[Token]:
        return await self._metadata.tokens()

    async def revoke(self, id: str) -> None:
        if not await self._metadata.revoke_token(id, format_instant(datetime.now(UTC))):
            raise NotFoundError(f"there is no token {id!r}; `aq-data token list` shows all")

    async def any_active(self) -> bool:
        return any(_is_active(token) for token in await self._metadata.tokens())

    async def check(self, secret: str) -> Token:
        """The token of a secret; AuthenticationError when it is unknown, revoked or expired, without saying which."""
        token = await self._metadata.find_token(_hash(secret))
        if token is None or not _is_active(token):
            raise AuthenticationError("the token is not valid here; ask for a new one (`aq-data token create`)")
        return token


def _is_active(token: Token) -> bool:
    now = format_instant(datetime.now(UTC))
    return token.revoked_at is None and (token.expires_at is None or token.expires_at > now)


def allows(token: Token, scope: str) -> bool:
    """Whether one of the token's scopes includes `scope`."""
    return any(SCOPES.index(own) >= SCOPES.index(scope) for own in token.scopes if own in SCOPES)


def redacted(token: Token) -> dict[str, object]:
    """What may be shown of a token."""
    shown = msgspec.to_builtins(token)
    del shown["hash"]
    return dict(shown)
