"""The private names of aiokafka: one module, known releases."""

from __future__ import annotations

import ast
import asyncio
import socket
import ssl
import struct
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

import aiokafka
import pytest
import trustme
import uvloop
from aiokafka import conn
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest

import streamworker.kafka
from streamworker.kafka.compat import KNOWN_VERSIONS

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = Path(streamworker.kafka.__file__).parent
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "compat.py")


def test_installed_aiokafka_is_one_that_compat_was_compared_with() -> None:
    """After an upgrade: compare kafka/compat.py with aiokafka's source, run the integration tests, add the version."""
    assert aiokafka.__version__ in KNOWN_VERSIONS


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.name)
def test_module_other_than_compat_uses_no_private_name_of_another_object(path: Path) -> None:
    """An underscore attribute of anything but self or cls belongs into compat.py; so does an exemption from the rule."""
    text = path.read_text("utf-8")
    private = [
        f"{node.lineno}: {node.attr}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})
    ]

    assert private == []
    assert "SLF001" not in text


API_VERSIONS = struct.pack(">ihihhh", 1, 0, 1, MetadataRequest.API_KEY, 0, 5)
"""The response to a connection's first request: correlation id, no error, one API with its versions."""


def answer_api_versions_and_stop_reading(
    listener: socket.socket, context: ssl.SSLContext, end: Event
) -> None:
    """Answer the request that opens every connection, and read nothing after it."""
    accepted, _ = listener.accept()
    with context.wrap_socket(accepted, server_side=True) as connection:
        connection.recv(4096)
        connection.sendall(len(API_VERSIONS).to_bytes(4) + API_VERSIONS)
        end.wait(20)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
def test_closed_tls_connection_with_unsent_bytes_lets_the_loop_close(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """A command that ends after a refusal must not end with OSError from the loop (`Device or resource busy`)."""
    authority = trustme.CA()
    serving, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(serving)
    authority.configure_trust(trusting)

    async def connect_send_and_close(port: int) -> None:
        connection = await conn.create_conn("localhost", port, ssl_context=trusting, security_protocol="SSL")
        request = connection.send(MetadataRequest([f"{number:0200}" for number in range(50_000)]))
        connection.close()
        with pytest.raises(KafkaConnectionError, match="closed"):
            await request

    end = Event()
    with socket.create_server(("localhost", 0)) as listener:
        server = Thread(target=answer_api_versions_and_stop_reading, args=(listener, serving, end))
        server.start()
        try:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(connect_send_and_close(listener.getsockname()[1]))
                loop = runner.get_loop()
        finally:
            end.set()
            server.join()

    assert loop.is_closed()
