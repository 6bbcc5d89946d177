"""Events to record values and headers, and back (contract §3, §4)."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from streamworker.model import DeltaEvent, Event, Headers, ProducerRecord, Started, TopicPartition, UsageEvent
from streamworker.wire.json import encode

__all__ = ["EventWriter", "read_event"]

_TYPES = {Started: "started", DeltaEvent: "delta", UsageEvent: "usage"}
_ENCODER = msgspec.json.Encoder()


class EventWriter:
    """Makes records of events, as plain JSON or as CloudEvents 1.0 in the Kafka binding's binary mode."""

    def __init__(self, *, cloud_source: str | None = None) -> None:
        """Write CloudEvents if a `ce_source` is given."""
        self._headers: dict[type, Headers] = {
            kind: _headers(name, cloud_source) for kind, name in _TYPES.items()
        }
        self._is_cloud = cloud_source is not None

    def write(self, event: Event, to: TopicPartition, key: bytes, trace: Headers = ()) -> ProducerRecord:
        """Return the event's record. `trace` goes on the first and the last event only: deltas are many."""
        headers = self._headers[type(event)]
        if self._is_cloud:
            headers += _cloud_headers(event)
        if type(event) is not DeltaEvent:
            headers += trace
        return ProducerRecord(to, key, _encoded(event), headers)


def _encoded(event: Event) -> bytes:
    try:
        return _ENCODER.encode(event)
    except UnicodeEncodeError:
        return encode(event)


def _headers(name: str, cloud_source: str | None) -> Headers:
    headers: Headers = (("content-type", b"application/json"), ("streamworker-type", name.encode()))
    if cloud_source is None:
        return headers
    cloud = (("ce_specversion", b"1.0"), ("ce_type", f"dev.streamworker.{name}.v1".encode()))
    return (*headers, *cloud, ("ce_source", cloud_source.encode()))


def _cloud_headers(event: Event) -> Headers:
    return (
        ("ce_id", f"{event.job_id}/{event.attempt}/{event.seq}".encode()),
        ("ce_subject", event.job_id.encode()),
        ("ce_time", _rfc3339(event.ts).encode()),
    )


def _rfc3339(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


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
