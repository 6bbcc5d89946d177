"""Settings to the arguments that every aiokafka client shares, and what all of them have to do better."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from aiokafka import conn
from aiokafka.abc import AbstractTokenProvider
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import OAuthAuthenticator, create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    KafkaConnectionError,
    ProducerClosed,
    SaslAuthenticationFailed,
)
from aiokafka.errors import KafkaError as ForeignKafkaError

from streamworker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamworker.config import KafkaSettings

__all__ = [
    "client_arguments",
    "close_producer",
    "compression_type",
    "install_client",
    "silence_abandoned_futures",
]

_CALM_S = 0.25
_WHY_TIMEOUT_S = 5.0


def client_arguments(settings: KafkaSettings) -> dict[str, Any]:
    """Return keyword arguments for a consumer, a producer or an admin client."""
    arguments: dict[str, Any] = {
        "bootstrap_servers": [
            server.strip() for server in settings.bootstrap_servers.split(",") if server.strip()
        ],
        "client_id": settings.client_id,
        "security_protocol": settings.security_protocol,
        "request_timeout_ms": round(settings.request_timeout_s * 1000),
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


def compression_type(settings: KafkaSettings) -> str | None:
    """Return aiokafka's name for the configured compression."""
    return None if settings.compression == "none" else settings.compression


def install_client(client: Any, settings: KafkaSettings) -> None:
    """Make an aiokafka client, which nobody can pass in, one of ours."""
    client.__class__ = _Client
    client.settings = settings


class _Client(AIOKafkaClient):  # type: ignore[misc]  # aiokafka is untyped
    """aiokafka's client, calm, renewing its credentials, and telling why it cannot connect."""

    settings: KafkaSettings

    async def _metadata_update(self, cluster: Any, topics: Any) -> bool:
        """Wait a little after a failure.

        Left alone, one that waits for a partition's leader asks again at once: a broker that refuses connections costs
        a processor and thousands of log lines a second.
        """
        if await super()._metadata_update(cluster, topics):
            return True
        await asyncio.sleep(_CALM_S)
        return False

    @property
    def _sasl_plain_password(self) -> str | None:
        """Asked for once per connection. Set by aiokafka at its start, which a property of the class passes over."""
        with _faults_as_foreign():
            return self.settings.password()

    @property
    def _ssl_context(self) -> ssl.SSLContext | None:
        """As above. What a context was given last counts for connections that come."""
        context: ssl.SSLContext | None = self.__dict__["_ssl_context"]
        if context is not None:
            with _faults_as_foreign():
                _load_certificate(context, self.settings)
        return context

    async def bootstrap(self) -> None:
        """Connect for the first time. aiokafka logs why it cannot and raises that it cannot: ask once more, and raise."""
        try:
            await super().bootstrap()
        except KafkaConnectionError:
            async with asyncio.timeout(_WHY_TIMEOUT_S):
                await self._try_first()
            raise

    async def _try_first(self) -> None:
        host, port, _ = self.hosts[0]
        connection = await create_conn(
            host,
            port,
            client_id=self._client_id,
            request_timeout_ms=self._request_timeout_ms,
            ssl_context=self._ssl_context,
            security_protocol=self._security_protocol,
            sasl_mechanism=self._sasl_mechanism,
            sasl_plain_username=self._sasl_plain_username,
            sasl_plain_password=self._sasl_plain_password,
            sasl_oauth_token_provider=self._sasl_oauth_token_provider,
        )
        connection.close()


class _TokenFile(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka is untyped
    """The token for OAUTHBEARER, as it lies in its file when a connection is made."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings

    async def token(self) -> str:
        with _faults_as_foreign():
            return self._settings.token() or ""


class _OAuthAuthenticator(OAuthAuthenticator):  # type: ignore[misc]  # aiokafka is untyped
    """Hears a no. A broker that refuses a token says so in JSON and not by an error (RFC 7628 §3.2.2).

    aiokafka takes any answer for a yes, and the next one, which is empty, for a cluster without topics.
    """

    async def step(self, payload: bytes | None) -> Any:
        if self._token_sent and payload:
            raise SaslAuthenticationFailed(f"the token is refused: {payload[:200].decode(errors='replace')}")
        return await super().step(payload)


conn.OAuthAuthenticator = _OAuthAuthenticator  # it has no other way in


@contextmanager
def _faults_as_foreign() -> Iterator[None]:
    """Raise what aiokafka takes for a connection that failed: a file that is missing for a moment may come back."""
    try:
        yield
    except ConfigurationError as error:
        raise AuthenticationFailedError("; ".join(error.faults)) from None


def silence_abandoned_futures(loop: asyncio.AbstractEventLoop) -> None:
    """Have the loop say nothing of failed futures that aiokafka leaves behind: nobody is meant to ask them."""
    before = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), ForeignKafkaError) and "task" not in context:
            return
        if before is None:
            loop.default_exception_handler(context)
        else:
            before(loop, context)

    loop.set_exception_handler(handle)


async def close_producer(producer: Any, patience_s: float) -> None:
    """Stop a producer: in peace if that is done in time, else by force. Never raises.

    `stop` waits for every batch, and an idempotent producer never gives up on one (aiokafka #1101). Left alone, its
    sender would go on for ever, and write when the broker is back what nobody waits for any more.
    """
    if producer is None:
        return
    stopping = asyncio.create_task(producer.stop())
    try:
        await asyncio.wait([stopping], timeout=patience_s)
    finally:
        if not stopping.done():
            producer._message_accumulator.fail_all(ProducerClosed())  # noqa: SLF001 - no public way to give up
            if (sender := producer._sender.sender_task) is not None:  # noqa: SLF001 - as above
                sender.cancel()
            await producer.client.close()
    with suppress(ForeignKafkaError, OSError, asyncio.CancelledError):
        await stopping


def _ssl_context(settings: KafkaSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
    except OSError as error:  # ssl.SSLError is one: a file that is no PEM
        raise ConfigurationError([f"kafka.ssl_cafile: {_reason(error)}"]) from error
    _load_certificate(context, settings)
    return context


def _load_certificate(context: ssl.SSLContext, settings: KafkaSettings) -> None:
    if settings.ssl_certfile is None:
        return
    try:
        # Without a password given, OpenSSL would ask for one on the terminal and wait.
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password=_no_password)
    except (OSError, ValueError) as error:  # no PEM, an encrypted key, a key that is not the certificate's
        raise ConfigurationError([f"kafka.ssl_certfile, ssl_keyfile: {_reason(error)}"]) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not, readable for this user only")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
