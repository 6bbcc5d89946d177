"""Events to record values and headers, and back (contract §3, §4)."""

from __future__ import annotations

import msgspec

from streamworker.core.json import encode
from streamworker.model import DeltaEvent, Event, Headers, Started, UsageEvent

__all__ = ["encode_event", "headers_of", "read_event"]

_CONTENT_TYPE = ("content-type", b"application/json")
_TYPES = {Started: b"started", DeltaEvent: b"delta", UsageEvent: b"usage"}
_HEADERS: dict[type, Headers] = {
    kind: (_CONTENT_TYPE, ("streamworker-type", name)) for kind, name in _TYPES.items()
}
_ENCODER = msgspec.json.Encoder()


def encode_event(event: Event) -> bytes:
    """Return the record value: compact JSON in UTF-8."""
    try:
        return _ENCODER.encode(event)
    except UnicodeEncodeError:
        return encode(event)


def headers_of(event: Event, trace: Headers = ()) -> Headers:
    """Return the record headers. `trace` goes on the first and the last event only: deltas are many."""
    headers = _HEADERS[type(event)]
    return headers if type(event) is DeltaEvent else headers + trace


class _Common(msgspec.Struct, frozen=True):
    v: int
    job_id: str
    attempt: str
    seq: int
    type: str
    ts: int


def read_event(value: bytes) -> dict[str, object]:
    """Read an event record's value as a reader of any language would: an object with the common members.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        event = msgspec.json.decode(value)
        msgspec.convert(event, _Common)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    assert isinstance(event, dict)
    return event
