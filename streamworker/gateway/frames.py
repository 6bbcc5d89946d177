"""The bytes of event streams: server-sent events (WHATWG HTML, section 9.2) and newline-delimited JSON. No I/O."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.gateway.feeds import FeedEvent

__all__ = ["NDJSON", "SSE", "DeltaFraming", "Framing", "chunk", "retry_ms"]

RETRY_MS = (1000, 5000)
"""Bounds of the time after which a client reconnects. It is drawn, so that clients do not come back together."""


_LF, _CR = b"\n\r"
"""As integers: a search for a bytes object raises and drops a TypeError first, which takes longer than the search."""

_DELTA_BYTES = len(b"event: delta\nid: \ndata: \n\n")


def retry_ms() -> int:
    """Return a time after which a client is to reconnect, in ms."""
    return random.randint(*RETRY_MS)  # noqa: S311 - not a secret


def chunk(data: bytes) -> bytes:
    """Return data as a chunk of a chunked body (RFC 9112 section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class DeltaFraming(Protocol):
    """How deltas are written."""

    def delta(self, cursor: bytes, value: bytes) -> bytes:
        """Return a delta of the log as it is written to the transport."""
        ...


class Framing(DeltaFraming, Protocol):
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

    def delta(self, cursor: bytes, value: bytes) -> bytes:
        """Return a delta of the log as a chunk of a chunked body; the same object for the same two objects."""
        ...

    def own(self, kind: str, value: Mapping[str, object], cursor: str | None = None) -> bytes:
        """Return an event of the gateway: `position`, with its cursor, or `closing`."""
        ...


class _LastDelta:
    """Keeps the last delta that was framed: several clients may follow one job, and get its events one after another."""

    def __init__(self) -> None:
        self._cursor = self._value = self._chunk = b""


class _ServerSentEvents(_LastDelta):
    face = "sse"
    content_type = "text/event-stream"
    keep_alive = b":\n"

    def opening(self) -> bytes:
        # No blank line behind it: some clients would make an empty event of it.
        return b": streamworker\nretry: %d\n" % retry_ms()

    def event(self, event: FeedEvent) -> bytes:
        kind, cursor, value, _, _ = event
        if _LF in value or _CR in value:
            value = _in_lines(value)
        return b"event: %b\nid: %b\ndata: %b\n\n" % (kind.encode(), cursor.encode(), value)

    def delta(self, cursor: bytes, value: bytes) -> bytes:
        if cursor is self._cursor and value is self._value:
            return self._chunk
        self._cursor, self._value = cursor, value
        if _LF in value or _CR in value:
            value = _in_lines(value)
        size = _DELTA_BYTES + len(cursor) + len(value)
        self._chunk = data = b"%x\r\nevent: delta\nid: %b\ndata: %b\n\n\r\n" % (size, cursor, value)
        return data

    def own(self, kind: str, value: Mapping[str, object], cursor: str | None = None) -> bytes:
        head = b"retry: %d\n" % retry_ms() if kind == "closing" else b""
        head += b"id: %b\n" % cursor.encode() if cursor is not None else b""
        return b"event: %b\n%bdata: %b\n\n" % (kind.encode(), head, orjson.dumps(value))


class _Lines(_LastDelta):
    face = "ndjson"
    content_type = "application/x-ndjson"
    keep_alive = b"\n"

    def opening(self) -> bytes:
        return b""

    def event(self, event: FeedEvent) -> bytes:
        _, cursor, value, _, _ = event
        return b'{"cursor":"%b","event":%b}\n' % (cursor.encode(), _in_one_line(value))

    def delta(self, cursor: bytes, value: bytes) -> bytes:
        if cursor is self._cursor and value is self._value:
            return self._chunk
        self._cursor, self._value = cursor, value
        self._chunk = data = chunk(b'{"cursor":"%b","event":%b}\n' % (cursor, _in_one_line(value)))
        return data

    def own(self, kind: str, value: Mapping[str, object], cursor: str | None = None) -> bytes:
        assert value["type"] == kind
        shown = orjson.dumps(value)
        return b'{"cursor":%b,"event":%b}\n' % (orjson.dumps(cursor), shown)


SSE: Framing = _ServerSentEvents()
NDJSON: Framing = _Lines()


def _in_one_line(value: bytes) -> bytes:
    """Return a value without line ends. They can be between tokens only: a string has them escaped."""
    if _LF in value or _CR in value:
        return value.replace(b"\r", b" ").replace(b"\n", b" ")
    return value


def _in_lines(value: bytes) -> bytes:
    """Return a value with line ends as several `data` fields: a reader joins them with line feeds."""
    return value.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\ndata: ")
