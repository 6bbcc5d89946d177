"""Settings to the arguments that every aiokafka client shares."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

from aiokafka.helpers import create_ssl_context

if TYPE_CHECKING:
    from streamworker.config import KafkaSettings

__all__ = ["client_arguments", "compression_type"]


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


def _ssl_context(settings: KafkaSettings) -> ssl.SSLContext:
    context: ssl.SSLContext = create_ssl_context(
        cafile=str(settings.ssl_cafile) if settings.ssl_cafile else None,
        certfile=str(settings.ssl_certfile) if settings.ssl_certfile else None,
        keyfile=str(settings.ssl_keyfile) if settings.ssl_keyfile else None,
    )
    return context
