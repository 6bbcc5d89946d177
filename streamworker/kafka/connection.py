"""The arguments that every aiokafka client shares: addresses, time limits, TLS and SASL."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaError as ForeignKafkaError

from streamworker.errors import ConfigurationError
from streamworker.kafka.compat import renew_credentials_in

if TYPE_CHECKING:
    import asyncio

    from streamworker.config import KafkaSettings

__all__ = ["RotatedSecrets", "client_arguments", "silence_abandoned_futures"]


_METADATA_MAX_AGE_MS = 20_000
"""How soon a created topic or an added partition is noticed. aiokafka's default is 5 minutes."""


def client_arguments(settings: KafkaSettings) -> dict[str, Any]:
    """Return keyword arguments for a consumer, a producer or an admin client. Raises ConfigurationError."""
    arguments: dict[str, Any] = {
        "bootstrap_servers": [
            server.strip() for server in settings.bootstrap_servers.split(",") if server.strip()
        ],
        "client_id": settings.client_id,
        "security_protocol": settings.security_protocol,
        "request_timeout_ms": round(settings.request_timeout_s * 1000),
        "metadata_max_age_ms": _METADATA_MAX_AGE_MS,
    }
    if settings.security_protocol.endswith("SSL"):
        arguments["ssl_context"] = _ssl_context(settings)
    if settings.security_protocol.startswith("SASL"):
        arguments["sasl_mechanism"] = settings.sasl_mechanism
        if settings.sasl_mechanism == "OAUTHBEARER":
            arguments["sasl_oauth_token_provider"] = _TokenFile(settings)
        else:
            arguments["sasl_plain_username"] = settings.sasl_username
            arguments["sasl_plain_password"] = settings.password()
    return arguments


class RotatedSecrets:
    """The password and the client certificate, read from their files for each connection."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings

    def password(self) -> str | None:
        """Return the SASL password that is valid now. Raises ConfigurationError."""
        return self._settings.password()

    def load_certificate(self, context: ssl.SSLContext) -> None:
        """Load the client certificate that is valid now. Raises ConfigurationError."""
        _load_certificate(context, self._settings)


class _TokenFile(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka is untyped
    """The token for OAUTHBEARER, read from its file for each connection."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings

    async def token(self) -> str:
        with renew_credentials_in():
            return self._settings.token() or ""


def silence_abandoned_futures(loop: asyncio.AbstractEventLoop) -> None:
    """Keep the loop from reporting failed futures that aiokafka creates and never awaits."""
    before = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), ForeignKafkaError) and "task" not in context:
            return
        if before is None:
            loop.default_exception_handler(context)
        else:
            before(loop, context)

    loop.set_exception_handler(handle)


def _ssl_context(settings: KafkaSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
    except OSError as error:  # ssl.SSLError is an OSError: the file is not PEM
        raise ConfigurationError([f"kafka.ssl_cafile: {_reason(error)}"]) from error
    _load_certificate(context, settings)
    return context


def _load_certificate(context: ssl.SSLContext, settings: KafkaSettings) -> None:
    if settings.ssl_certfile is None:
        return
    try:
        # Without a password callback, OpenSSL asks for the password on the terminal and waits.
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password=_no_password)
    except (OSError, ValueError) as error:  # not PEM, an encrypted key, a key of another certificate
        raise ConfigurationError([f"kafka.ssl_certfile, ssl_keyfile: {_reason(error)}"]) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted; use a key without a password that only this user can read")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
