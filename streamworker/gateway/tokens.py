"""Read tokens: JWTs (RFC 7519) that name the jobs which their bearer may read, and until when.

The algorithm is that of the configured key of the token's `kid`, never the one that the token names. The claims are
checked here, not by the library, so that the time is an argument and every rule has its message.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from streamworker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["InvalidToken", "ReadToken", "Secrets", "Tokens", "looks_like_token", "read_secrets"]

TYPE = "streamworker+jwt"
MAX_JOBS = 64
MAX_TOKEN_BYTES = 20_480
"""64 prefixes of 200 characters, in base64, and the other claims: 18 KB."""
CLOCK_SKEW_S = 30
"""How far the clock of another signer may be ahead."""

_ISSUER = "streamworker-gateway"
_SCOPES = {"read": frozenset({"read"}), "read cancel": frozenset({"read", "cancel"})}
_JOB = re.compile(r"[A-Za-z0-9._:-]{1,200}\*?\Z")
_KID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_MIN_SECRET_BYTES = 32
_LINE = "must be kid:base64url-secret or kid:ed25519:base64url-public-key"


class InvalidToken(Exception):
    """The token cannot be accepted. The message says why and never repeats the token."""


def looks_like_token(text: str) -> bool:
    """Whether a credential is a token rather than a key: three parts, the first one a JSON object in base64."""
    return text.startswith("ey") and text.count(".") == 2


@dataclass(frozen=True, kw_only=True)
class ReadToken:
    """What a valid token says. `jobs` are ids, or prefixes that end in `*`; `expires_at` is in s since the epoch."""

    jobs: tuple[str, ...]
    scopes: frozenset[str]
    expires_at: float
    kid: str

    def allows(self, job_id: str) -> bool:
        """Whether the token names the job."""
        return any(job_id.startswith(job[:-1]) if job.endswith("*") else job_id == job for job in self.jobs)


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """The keys by `kid`, each with its algorithm; `signer` is the kid that signs, if one can."""

    keys: Mapping[str, tuple[str, Any]] = field(repr=False)
    signer: str | None


NO_SECRETS = Secrets(keys={}, signer=None)


def read_secrets(path: Path | None) -> Secrets:
    """Read the secrets file. Raises ConfigurationError with every fault; no fault repeats a secret."""
    if path is None:
        return NO_SECRETS
    where = f"gateway.token_secrets_file: {path}"
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigurationError(
            [f"{where}: {error.strerror}; docs/gateway.md has the command that makes it"]
        ) from None
    except UnicodeDecodeError:
        raise ConfigurationError([f"{where}: must be text"]) from None
    _library()
    keys: dict[str, tuple[str, Any]] = {}
    faults = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            kid, key = _read_line(line.strip())
            if kid in keys:
                raise ValueError("the kid is used twice")  # noqa: TRY301
            keys[kid] = key
        except ValueError as error:
            faults.append(f"{where}: line {number}: {error}")
    if not keys and not faults:
        faults.append(f"{where}: has no line; each {_LINE}")
    if faults:
        raise ConfigurationError(faults)
    signer = next((kid for kid, (algorithm, _) in keys.items() if algorithm == "HS256"), None)
    return Secrets(keys=keys, signer=signer)


def _read_line(line: str) -> tuple[str, tuple[str, Any]]:
    kid, colon, rest = line.partition(":")
    if not colon or not _KID.match(kid):
        raise ValueError(_LINE)
    if rest.startswith("ed25519:"):
        return kid, ("EdDSA", _public_key(rest.removeprefix("ed25519:")))
    secret = _decoded(rest)
    if len(secret) < _MIN_SECRET_BYTES:
        raise ValueError(f"the secret must have at least {_MIN_SECRET_BYTES} bytes (RFC 7518 section 3.2)")
    return kid, ("HS256", secret)


def _public_key(text: str) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415 - an extra
        Ed25519PublicKey,
    )

    raw = _decoded(text)
    if len(raw) != 32:
        raise ValueError("an Ed25519 public key has 32 bytes")
    return Ed25519PublicKey.from_public_bytes(raw)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(_LINE) from None


def _library() -> Any:
    try:
        import jwt  # noqa: PLC0415 - an extra
        import jwt.exceptions  # noqa: PLC0415
    except ImportError:
        fault = "gateway.token_secrets_file: PyJWT is not installed: pip install 'streamworker[gateway]'"
        raise ConfigurationError([fault]) from None
    return jwt


class Tokens:
    """Signs and verifies tokens. `secrets` returns the current secrets; `now` is in seconds since the epoch."""

    def __init__(
        self,
        secrets: Callable[[], Secrets],
        *,
        audience: str,
        max_age_s: float,
        now: Callable[[], float],
    ) -> None:
        self._secrets = secrets
        self._audience = audience
        self._max_age_s = max_age_s
        self._now = now

    @property
    def can_sign(self) -> bool:
        """Whether a secret is configured that signs."""
        return self._secrets().signer is not None

    def sign(self, jobs: Sequence[str], scope: str, ttl_s: int, *, subject: str = "") -> tuple[str, int]:
        """Return a token and its time of expiry, in seconds since the epoch. The caller has checked the claims."""
        secrets = self._secrets()
        assert secrets.signer is not None
        algorithm, key = secrets.keys[secrets.signer]
        now = int(self._now())
        claims = {
            "iss": _ISSUER,
            "aud": self._audience,
            "iat": now,
            "exp": now + ttl_s,
            "jti": uuid4().hex,
            "jobs": list(jobs),
            "scope": scope,
        }
        if subject:
            claims["sub"] = subject
        token: str = _library().encode(
            claims, key, algorithm=algorithm, headers={"typ": TYPE, "kid": secrets.signer}
        )
        return token, now + ttl_s

    def verify(self, token: str) -> ReadToken:
        """Return what a token says. Raises InvalidToken."""
        if len(token) > MAX_TOKEN_BYTES:
            raise InvalidToken(f"the token is longer than {MAX_TOKEN_BYTES} bytes")
        secrets = self._secrets()
        if not secrets.keys:
            raise InvalidToken("read tokens are not configured: gateway.token_secrets_file is not set")
        jwt = _library()
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.exceptions.PyJWTError, ValueError, RecursionError):
            raise InvalidToken("the token is not a JWT") from None
        kid = header.get("kid")
        if header.get("typ") != TYPE:
            raise InvalidToken(f"the header typ must be {TYPE}")
        if not isinstance(kid, str) or kid not in secrets.keys:
            raise InvalidToken("the header kid does not name a configured secret")
        algorithm, key = secrets.keys[kid]
        if header.get("alg") != algorithm:
            raise InvalidToken(f"the header alg must be {algorithm}, the algorithm of the kid")
        try:
            claims = jwt.decode(token, key, algorithms=[algorithm], options=_SIGNATURE_ONLY)
        except jwt.exceptions.InvalidSignatureError:
            raise InvalidToken("the signature is not valid") from None
        except (jwt.exceptions.PyJWTError, ValueError, RecursionError):
            raise InvalidToken("the token is not a JWT with a JSON object of claims") from None
        return self._read(claims, kid)

    def _read(self, claims: Mapping[str, Any], kid: str) -> ReadToken:
        if not (isinstance(claims.get("iss"), str) and claims["iss"]):
            raise InvalidToken("the claim iss is required: who signed the token")
        audience = claims.get("aud")
        if audience != self._audience and not (isinstance(audience, list) and self._audience in audience):
            raise InvalidToken(f"the claim aud must be {self._audience}")
        expires_at = self._read_times(claims)
        scope: Any = claims.get("scope")
        scopes = _SCOPES.get(scope) if isinstance(scope, str) else None
        if scopes is None:
            raise InvalidToken('the claim scope must be "read" or "read cancel"')
        return ReadToken(jobs=_read_jobs(claims.get("jobs")), scopes=scopes, expires_at=expires_at, kid=kid)

    def _read_times(self, claims: Mapping[str, Any]) -> float:
        now = self._now()
        issued, expires = _time(claims, "iat"), _time(claims, "exp")
        if issued > now + CLOCK_SKEW_S:
            raise InvalidToken("the claim iat is in the future")
        if "nbf" in claims and _time(claims, "nbf") > now + CLOCK_SKEW_S:
            raise InvalidToken("the token is not valid yet: the claim nbf is in the future")
        if expires <= now:
            raise InvalidToken("the token has expired")
        if expires - issued > self._max_age_s:
            raise InvalidToken(f"the claim exp must be at most {self._max_age_s:g} s after iat")
        return expires


_SIGNATURE_ONLY = {
    "verify_signature": True,
    "require": [],
    **dict.fromkeys(
        ("verify_exp", "verify_nbf", "verify_iat", "verify_aud", "verify_iss", "verify_sub", "verify_jti"),
        False,
    ),
}


def job_fault(jobs: object) -> str | None:
    """Return what is wrong with the jobs of a token; None if nothing is."""
    if not (isinstance(jobs, (list, tuple)) and 1 <= len(jobs) <= MAX_JOBS):
        return f"must be a list of 1 to {MAX_JOBS} strings"
    if not all(isinstance(job, str) and _JOB.match(job) for job in jobs):
        return "must be job ids, or prefixes of job ids followed by *"
    return None


def _read_jobs(jobs: object) -> tuple[str, ...]:
    if fault := job_fault(jobs):
        raise InvalidToken(f"the claim jobs {fault}")
    assert isinstance(jobs, list)
    return tuple(jobs)


def _time(claims: Mapping[str, Any], name: str) -> float:
    value: Any = claims.get(name)
    try:
        seconds = float(value) if type(value) in {int, float} else inf
    except OverflowError:  # an integer may have more digits than a float
        seconds = inf
    if not isfinite(seconds):
        raise InvalidToken(f"the claim {name} is required, as a number of seconds since 1970")
    return seconds
