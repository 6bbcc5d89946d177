"""Settings to the arguments that every aiokafka client shares."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiokafka.errors import KafkaError as ForeignKafkaError
from aiokafka.errors import ProducerClosed
from aiokafka.helpers import create_ssl_context

from streamworker.errors import ConfigurationError

if TYPE_CHECKING:
    import ssl

    from streamworker.config import KafkaSettings

__all__ = ["calm", "client_arguments", "close_producer", "compression_type", "hush"]

_CALM_S = 0.25


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
        arguments["sasl_plain_username"] = settings.sasl_username
        arguments["sasl_plain_password"] = settings.password()
    return arguments


def compression_type(settings: KafkaSettings) -> str | None:
    """Return aiokafka's name for the configured compression."""
    return None if settings.compression == "none" else settings.compression


def calm(client: Any) -> None:
    """Have an aiokafka client wait a little after it failed to get metadata.

    Left alone, one that waits for a partition's leader asks again at once: a broker that refuses connections costs a
    processor and thousands of log lines a second.
    """
    update = client._metadata_update  # noqa: SLF001 - its one place where it asks

    async def update_calmly(cluster: Any, topics: Any) -> bool:
        if await update(cluster, topics):
            return True
        await asyncio.sleep(_CALM_S)
        return False

    client._metadata_update = update_calmly  # noqa: SLF001


def hush(loop: asyncio.AbstractEventLoop) -> None:
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
        context: ssl.SSLContext = create_ssl_context(
            cafile=str(settings.ssl_cafile) if settings.ssl_cafile else None,
            certfile=str(settings.ssl_certfile) if settings.ssl_certfile else None,
            keyfile=str(settings.ssl_keyfile) if settings.ssl_keyfile else None,
        )
    except (
        OSError
    ) as error:  # ssl.SSLError is one: a file that is no PEM, a key that is not the certificate's
        raise ConfigurationError([f"kafka.ssl_cafile, ssl_certfile, ssl_keyfile: {error}"]) from error
    return context
