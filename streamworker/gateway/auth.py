"""Who calls, and what the caller may do."""

from __future__ import annotations

import time
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from aiohttp import web

from streamworker.gateway.errors import ApiError
from streamworker.gateway.keys import SCOPES, KeySettings, digest_of, read_keys
from streamworker.gateway.tokens import InvalidToken, ReadToken, Tokens, looks_like_token, read_secrets
from streamworker.gateway.watched import Watched

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamworker.config import Settings

__all__ = ["CALLER", "TOKEN_STREAMS", "Authenticator", "Caller"]

TOKEN_STREAMS = 8
"""Streams that may be open with one read token."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The holder of a key or of a read token. `expires_at` is in seconds since the epoch, for tokens only."""

    name: str
    """The name of the key, or the kid of the token's secret: for logs."""
    account: str
    """What its streams and requests are counted under."""
    tenant: str
    scopes: frozenset[str]
    max_streams: int
    requests_per_minute: int | None = None
    token: ReadToken | None = None

    @property
    def expires_at(self) -> float | None:
        """When its token expires, in seconds since the epoch; None for a key."""
        return None if self.token is None else self.token.expires_at

    def allows(self, job_id: str) -> bool:
        """Whether the job is the caller's."""
        if self.token is not None:
            return self.token.allows(job_id)
        return not self.tenant or job_id.startswith(f"{self.tenant}.")


CALLER = web.RequestKey("caller", Caller)
"""The caller of a request, for the access log."""

_UNAUTHENTICATED = Caller(
    name="unauthenticated", account="unauthenticated", tenant="", scopes=frozenset(SCOPES), max_streams=10_000
)


class Authenticator:
    """Finds the caller of a request. Files of keys and secrets are read again when they change."""

    def __init__(
        self,
        settings: Settings,
        *,
        now: Callable[[], float] = time.time,
        admit: Callable[[Caller], None] = lambda _: None,
        refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Read the files.

        `admit` raises ApiError if the caller has too many requests; `refused` is called with the code of each refusal.

        Raises:
            ConfigurationError: a file cannot be read or has faults.
        """
        gateway, topics = settings.gateway, settings.topics.jobs
        self._is_open = gateway.auth == "off"
        path = None if self._is_open else gateway.keys_file
        self._keys: Watched[Mapping[str, tuple[str, KeySettings]]] = Watched(
            path, lambda: {} if path is None else read_keys(path, topics)
        )
        secrets_file = gateway.token_secrets_file
        secrets = Watched(secrets_file, lambda: read_secrets(secrets_file))
        self.tokens = Tokens(
            secrets.get, audience=gateway.token_audience, max_age_s=gateway.token_max_age_s, now=now
        )
        self._now = now
        self._admit = admit
        self._refused = refused

    def require(self, request: web.Request, scope: str) -> Caller:
        """Return the caller of a request if it has the scope. Raises ApiError."""
        caller = self.caller(request)
        self.check_scope(caller, scope)
        return caller

    def caller(self, request: web.Request) -> Caller:
        """Return the caller of a request. Raises ApiError 401, or 429 where it makes too many requests."""
        credential, may_be_key = self._credential(request)
        caller = self._checked(credential, may_be_key=may_be_key)
        request[CALLER] = caller
        self._admit(caller)
        return caller

    def check_scope(self, caller: Caller, scope: str) -> None:
        """Raise ApiError 403 if the caller does not have the scope."""
        if scope not in caller.scopes:
            self._refused("insufficient_scope")
            challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
            raise ApiError(
                403,
                "insufficient_scope",
                f"this needs the scope {scope}; the credential has: {' '.join(sorted(caller.scopes))}",
                headers={"WWW-Authenticate": challenge},
            )

    def has_credential(self, request: web.Request) -> bool:
        """Whether the request itself is enough to find its caller. Raises ApiError 401 for a malformed header."""
        return self._is_open or self._credential(request)[0] is not None

    def identify(self, credential: str) -> Caller:
        """Return the holder of a key or token. Raises ApiError 401."""
        return self._checked(credential, may_be_key=True)

    def is_valid(self, caller: Caller) -> bool:
        """Whether the credential of a caller is still accepted: neither expired nor removed."""
        if caller.token is not None:
            return caller.token.expires_at > self._now()
        return self._is_open or any(name == caller.name for name, _ in self._keys.get().values())

    def _credential(self, request: web.Request) -> tuple[str | None, bool]:
        """Return the credential of a request, and whether it may be a key. The query may only have a token."""
        headers = request.headers
        if given := headers.getall("Authorization", ()):
            scheme, _, credential = given[0].strip().partition(" ")
            # A proxy in front may have checked another one of several.
            if len(given) == 1 and scheme.lower() == "bearer" and credential.strip():
                return credential.strip(), True
            raise self._unauthenticated(
                "the Authorization header must be given once: Bearer, a space, and a key or a read token"
            )
        if key := headers.get("X-API-Key"):
            return key, True
        if token := request.query.get("access_token"):
            return token, False
        return None, False

    def _checked(self, credential: str | None, *, may_be_key: bool) -> Caller:
        if credential is None:
            if self._is_open:
                return _UNAUTHENTICATED
            raise self._unauthenticated("a key or a read token is required, as Authorization: Bearer …")
        if looks_like_token(credential):
            return self._of_token(credential)
        found = self._keys.get().get(digest_of(credential)) if may_be_key else None
        if found is not None:
            return _of_key(*found)
        if self._is_open and may_be_key:  # SDKs always send some key
            return _UNAUTHENTICATED
        raise self._invalid("the key is not known" if may_be_key else "access_token must be a read token")

    def _of_token(self, credential: str) -> Caller:
        try:
            token = self.tokens.verify(credential)
        except InvalidToken as error:
            raise self._invalid(str(error)) from None
        return Caller(
            name=token.kid,
            account=f"token {sha256(credential.encode()).hexdigest()}",
            tenant="",
            scopes=token.scopes,
            max_streams=TOKEN_STREAMS,
            token=token,
        )

    def _invalid(self, message: str) -> ApiError:
        described = message.replace('"', "'")  # RFC 6750 section 3: a description has no quotes
        challenge = f'Bearer error="invalid_token", error_description="{described}"'
        return self._unauthenticated(message, challenge)

    def _unauthenticated(self, message: str, challenge: str = "Bearer") -> ApiError:
        self._refused("unauthenticated")
        return ApiError(401, "unauthenticated", message, headers={"WWW-Authenticate": challenge})


def _of_key(name: str, key: KeySettings) -> Caller:
    return Caller(
        name=name,
        account=f"key {name}",
        tenant=key.tenant,
        scopes=frozenset(key.scopes),
        max_streams=key.max_streams,
        requests_per_minute=key.requests_per_minute,
    )
