"""API keys: made once, kept as SHA-256 in a TOML file, and looked up by that."""

from __future__ import annotations

import re
import secrets
import tomllib
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from streamworker.config.types import Section
from streamworker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["SCOPES", "KeySettings", "digest_of", "new_key", "read_keys", "rendered", "tenant_fault"]

PREFIX = "swk_"
"""What every key begins with, so that scanners for leaked secrets can find it."""

SCOPES = ("submit", "read", "cancel", "token")

_TENANT = re.compile(r"[a-z0-9_-]{1,64}\Z")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_BATCHES = "b"
"""First part of the ids of a batch's jobs, which therefore cannot be a tenant."""


def _is_tenant(tenant: str) -> str:
    if tenant and not _TENANT.match(tenant):
        raise ValueError(
            "must be 1 to 64 lower-case letters, digits, hyphens and underscores, or empty for every job"
        )
    return tenant


def _has_one(scopes: tuple[str, ...]) -> tuple[str, ...]:
    if not scopes:
        raise ValueError(f"must name at least one of {', '.join(SCOPES)}")
    return scopes


class KeySettings(Section):
    """One key of the file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: Annotated[str, AfterValidator(_is_tenant)]
    scopes: Annotated[tuple[Literal["submit", "read", "cancel", "token"], ...], AfterValidator(_has_one)]
    max_streams: Annotated[int, Field(ge=1)] = 1000
    requests_per_minute: Annotated[int, Field(ge=1)] = 6000


_KEYS = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], KeySettings])
_SHA256 = "must be the SHA-256 of a key as 64 hexadecimal digits; `streamworker gateway key` prints it"
_KEY_NAME = "must be the name of a key: 1 to 64 letters, digits, hyphens and underscores"


def digest_of(key: str) -> str:
    """Return the SHA-256 of a key, in hexadecimal digits."""
    return sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    """Return a new key with 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def tenant_fault(tenant: str, job_topics: Iterable[str]) -> str | None:
    """Return why a name cannot be a tenant; None if it can. An empty name, for every job, can."""
    try:
        _is_tenant(tenant)
    except ValueError as error:
        return str(error)
    if tenant == _BATCHES:
        return f"cannot be {_BATCHES}: the ids of batch jobs begin with it"
    for topic in job_topics:
        if tenant == topic.partition(".")[0]:
            return (
                f"cannot be {tenant}: the ids of jobs without a job_id begin with the name of topic {topic}"
            )
    return None


def rendered(name: str, key: str, tenant: str, scopes: Iterable[str] = SCOPES) -> str:
    """Return the entry of a key as TOML. Raises ValueError for a name that cannot be used."""
    if not _NAME.match(name):
        raise ValueError(_KEY_NAME)
    quoted = ", ".join(f'"{scope}"' for scope in scopes)
    return f'[keys.{name}]\nsha256 = "{digest_of(key)}"\ntenant = "{tenant}"\nscopes = [{quoted}]\n'


def read_keys(path: Path, job_topics: Iterable[str]) -> Mapping[str, tuple[str, KeySettings]]:
    """Read the keys file; return name and settings of each key, by the SHA-256 of the key.

    Raises:
        ConfigurationError: with every fault of the file. No fault repeats a value.
    """
    where = f"gateway.keys_file: {path}"
    try:
        content = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        advice = "make it with `streamworker gateway key NAME --tenant T`"
        raise ConfigurationError([f"{where}: {error.strerror}; {advice}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError([f"{where}: is not valid TOML: {error}"]) from None
    faults = [
        f"{where}: {name}: is not known; keys are tables [keys.NAME]" for name in content.keys() - {"keys"}
    ]
    keys: dict[str, KeySettings] = {}
    try:
        keys = _KEYS.validate_python(content.get("keys", {}))
    except ValidationError as error:
        faults += [
            f"{where}: {_fault(fault)}" for fault in error.errors(include_url=False, include_input=False)
        ]
    topics = tuple(job_topics)
    for name, key in keys.items():
        if fault := tenant_fault(key.tenant, topics):
            faults.append(f"{where}: keys.{name}.tenant: {fault}")
    by_digest = {key.sha256: (name, key) for name, key in keys.items()}
    if len(by_digest) < len(keys):
        faults.append(f"{where}: two keys have the same sha256")
    if faults:
        raise ConfigurationError(faults)
    return by_digest


def _fault(fault: object) -> str:
    assert isinstance(fault, dict)
    path = ".".join(["keys", *(str(part) for part in fault["loc"] if part != "[key]")])
    match fault["type"]:
        case "extra_forbidden":
            return (
                f"{path}: is not known; a key has sha256, tenant, scopes, max_streams and requests_per_minute"
            )
        case "missing":
            return f"{path}: is required"
        case "string_pattern_mismatch":
            return f"{path}: {_SHA256 if path.endswith('.sha256') else _KEY_NAME}"
        case "model_type" | "dict_type":
            return f"{path}: must be a table"
    message = str(fault["msg"]).removeprefix("Value error, ")
    message = re.sub("^Input should be", "must be", message)
    return f"{path}: {message[:1].lower() + message[1:]}"
