"""The bytes of event streams: server-sent events (WHATWG HTML, section 9.2) and newline-delimited JSON. No I/O."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.gateway.feeds import FeedEvent

__all__ = ["NDJSON", "SSE", "Framing", "chunk", "retry_ms"]

RETRY_MS = (1000, 5000)
"""Bounds of the time after which a client reconnects. It is drawn, so that clients do not come back together."""


def retry_ms() -> int:
    """Return a time after which a client is to reconnect, in ms."""
    return random.randint(*RETRY_MS)  # noqa: S311 - not a secret


def chunk(data: bytes) -> bytes:
    """Return data as a chunk of a chunked body (RFC 9112 section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Framing(Protocol):
    """How one format of an event stream writes what it carries."""

    face: str
    """The format's name in metrics."""

    content_type: str
    keep_alive: bytes

    def opening(self) -> bytes:
        """Return what precedes the first event."""
        ...

    def event(self, event: FeedEvent) -> bytes:
        """Return an event of the log."""
        ...

    def own(self, kind: str, value: Mapping[str, object], cursor: str | None = None) -> bytes:
        """Return an event of the gateway: `position`, with its cursor, or `closing`."""
        ...


class _ServerSentEvents:
    face = "sse"
    content_type = "text/event-stream"
    keep_alive = b":\n"

    def opening(self) -> bytes:
        # No blank line behind it: some clients would make an empty event of it.
        return b": streamworker\nretry: %d\n" % retry_ms()

    def event(self, event: FeedEvent) -> bytes:
        kind, cursor, value, _, _ = event
        if b"\n" in value or b"\r" in value:
            value = _in_lines(value)
        return b"event: %b\nid: %b\ndata: %b\n\n" % (kind.encode(), cursor.encode(), value)

    def own(self, kind: str, value: Mapping[str, object], cursor: str | None = None) -> bytes:
        head = b"retry: %d\n" % retry_ms() if kind == "closing" else b""
        head += b"id: %b\n" % cursor.encode() if cursor is not None else b""
        return b"event: %b\n%bdata: %b\n\n" % (kind.encode(), head, orjson.dumps(value))


class _Lines:
    face = "ndjson"
    content_type = "application/x-ndjson"
    keep_alive = b"\n"

    def opening(self) -> bytes:
        return b""

    def event(self, event: FeedEvent) -> bytes:
        _, cursor, value, _, _ = event
        if b"\n" in value or b"\r" in value:  # white space between tokens: a string has them escaped
            value = value.replace(b"\r", b" ").replace(b"\n", b" ")
        return b'{"cursor":"%b","event":%b}\n' % (cursor.encode(), value)

    def own(self, kind: str, value: Mapping[str, object], cursor: str | None = None) -> bytes:
        assert value["type"] == kind
        shown = orjson.dumps(value)
        return b'{"cursor":%b,"event":%b}\n' % (orjson.dumps(cursor), shown)


SSE: Framing = _ServerSentEvents()
NDJSON: Framing = _Lines()


def _in_lines(value: bytes) -> bytes:
    """Return a value with line ends as several `data` fields: a reader joins them with line feeds."""
    return value.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\ndata: ")
