"""Event records: write the value and headers of an event, and read a value back."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from streamworker.model import DeltaEvent, Event, Headers, ProducerRecord, Started, TopicPartition, UsageEvent
from streamworker.wire.json import encode

__all__ = ["EventWriter", "cloud_headers", "plain_headers", "read_event", "rfc3339"]

_TYPES = {Started: "started", DeltaEvent: "delta", UsageEvent: "usage"}
_ENCODER = msgspec.json.Encoder()


class EventWriter:
    """Writes events as records, in plain JSON or as CloudEvents 1.0 (Kafka binding, binary mode)."""

    def __init__(self, *, cloud_source: str | None = None) -> None:
        """Create a writer. It writes CloudEvents if `cloud_source`, the `ce_source` header, is given."""
        self._headers: dict[type, Headers] = {
            kind: _headers(name, cloud_source) for kind, name in _TYPES.items()
        }
        self._is_cloud = cloud_source is not None

    def write(self, event: Event, to: TopicPartition, key: bytes, trace: Headers = ()) -> ProducerRecord:
        """Return the event's record. Deltas carry no `trace`, because there are many of them."""
        headers = self._headers[type(event)]
        if self._is_cloud:
            headers += _cloud_headers(event)
        if type(event) is UsageEvent:
            headers += (("streamworker-status", event.status.value.encode()),)
        if type(event) is not DeltaEvent:
            headers += trace
        return ProducerRecord(to, key, _encoded(event), headers)

    @property
    def delta_headers(self) -> Headers | None:
        """The headers that all deltas have; None where each delta has its own."""
        return None if self._is_cloud else self._headers[DeltaEvent]

    def text_pattern(self, job_id: str, attempt: str, choice: int, delta: tuple[bytes, bytes]) -> bytes:
        """Return the value of an attempt's deltas that differ in their text alone: format it with `seq`, `ts` and text.

        `delta` is the encoded delta before and after the text, without the quotes of the text. The text to insert is a
        JSON string, with its quotes.
        """
        before, after = delta
        parts = (encode(job_id), encode(attempt), encode(choice), before[:-1], after[1:])
        # The order of members is that of `DeltaEvent`.
        return (
            b'{"type":"delta","job_id":%b,"attempt":%b,"seq":%%d,"ts":%%d,"choice":%b,"delta":%b%%b%b,"finish_reason":null,"v":1}'
            % tuple(part.replace(b"%", b"%%") for part in parts)
        )


def _encoded(event: Event) -> bytes:
    try:
        return _ENCODER.encode(event)
    except UnicodeEncodeError:
        return encode(event)


def plain_headers(name: str) -> Headers:
    """Return the headers that every record of this type has."""
    return (("content-type", b"application/json"), ("streamworker-type", name.encode()))


def cloud_headers(name: str, cloud_source: str) -> Headers:
    """Return the CloudEvents headers that every record of this type has."""
    cloud_type = f"dev.streamworker.{name}.v1".encode()
    return (("ce_specversion", b"1.0"), ("ce_type", cloud_type), ("ce_source", cloud_source.encode()))


def _headers(name: str, cloud_source: str | None) -> Headers:
    headers = plain_headers(name)
    return headers if cloud_source is None else (*headers, *cloud_headers(name, cloud_source))


def _cloud_headers(event: Event) -> Headers:
    return (
        ("ce_id", f"{event.job_id}/{event.attempt}/{event.seq}".encode()),
        ("ce_subject", event.job_id.encode()),
        ("ce_time", rfc3339(event.ts).encode()),
    )


def rfc3339(ms: int) -> str:
    """Return a time, in ms since the epoch, as RFC 3339 writes it."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Common(msgspec.Struct, frozen=True):
    v: int
    job_id: str
    attempt: str
    seq: int
    type: str
    ts: int


def read_event(value: bytes) -> dict[str, object]:
    """Read an event record's value as a JSON object and check that it has the common members.

    Raises:
        ValueError: the value is not an event; the message says why.
    """
    try:
        event = msgspec.json.decode(value)
        msgspec.convert(event, _Common)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    assert isinstance(event, dict)
    return event
