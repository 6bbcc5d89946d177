"""Event streams with the events that WHATWG HTML §9.2.6 gives for them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CASES", "Case", "Event"]


class Event(NamedTuple):
    """A dispatched event, in the words of the standard."""

    data: str
    event: str = "message"
    id: str = ""
    retry: int | None = None


class Case(NamedTuple):
    """A stream, its events, and the parser's state at its end."""

    stream: bytes
    events: list[Event]
    last_event_id: str = ""
    reconnection_time: int | None = None


CASES = {
    "fields with and without a space": Case(
        b"data:a\n\ndata: b\n\ndata:  c\n\n", [Event("a"), Event("b"), Event(" c")]
    ),
    "line ends of every kind": Case(
        b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [Event("a"), Event("b"), Event("c")]
    ),
    "a bare CR at the end": Case(b"data: a\r\r", [Event("a")]),
    "several data lines": Case(b"data: a\ndata:\ndata: b\n\n", [Event("a\n\nb")]),
    "a field without a colon": Case(b"data\n\ndata\ndata\n\n", [Event(""), Event("\n")]),
    "a byte order mark": Case(b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n", [Event("a")]),
    "comments and unknown fields": Case(b": c\nfoo: 1\nDATA: b\n data: d\ndata: a\n\n:\n\n", [Event("a")]),
    "types": Case(b"event: x\ndata: a\n\ndata: b\n\nevent: y\n\n", [Event("a", "x"), Event("b")]),
    "ids": Case(
        b"id: 1\ndata: a\n\ndata: b\n\nid: 2\0\ndata: c\n\nid\ndata: d\n\nid: 3\n\n",
        [Event("a", id="1"), Event("b", id="1"), Event("c", id="1"), Event("d")],
        last_event_id="3",
    ),
    "reconnection times": Case(
        b"retry: 10\n\nretry: 1x\n\nretry: -1\n\nretry: 20\ndata: a\n\n",
        [Event("a", retry=20)],
        reconnection_time=20,
    ),
    "line separators of Unicode": Case(
        "data: a\u2028b\u0085c\u000bd\n\n".encode(), [Event("a\u2028b\u0085c\u000bd")]
    ),
    "invalid UTF-8": Case(b"data: \xff\xf0\x9f\n\n", [Event("\ufffd\ufffd")]),
    "an unfinished event": Case(b"data: a\n\ndata: b\n", [Event("a")]),
    "an unfinished line": Case(b"data: a\n\ndata: b", [Event("a")]),
    "no data": Case(b"event: ping\n\nid: 7\n\nretry: 5\n\n", [], last_event_id="7", reconnection_time=5),
    "nothing": Case(b"", []),
}
