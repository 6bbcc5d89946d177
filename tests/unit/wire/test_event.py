"""Events to records and back: member names, order and headers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from streamworker.model import (
    DeltaEvent,
    ErrorCode,
    Event,
    Headers,
    JobError,
    Observed,
    Source,
    Started,
    Status,
    Timing,
    TopicPartition,
    UsageEvent,
    UsageSource,
)
from streamworker.wire.event import EventWriter, read_event

TO = TopicPartition("events", 3)
TRACE: Headers = (("traceparent", b"00-1"),)
STARTED = Started(
    job_id="j",
    attempt="a",
    ts=1_700_000_000_123,
    model="m",
    upstream="u",
    cause="new",
    source=Source("jobs", 1, 2),
    metadata={"k": "v"},
)
DELTA = DeltaEvent("j", "a", 1, 1_700_000_000_124, 0, {"content": "🐟"}, None)
FULL_DELTA = DeltaEvent("j", "a", 1, 0, None, {}, "stop", {"content": []}, {"id": "c"}, {"x": 1})
USAGE = UsageEvent(
    job_id="j",
    attempt="a",
    seq=2,
    ts=1_700_000_000_000,
    status=Status.FAILED,
    finish_reasons={"0": "stop"},
    usage={"n": 2**70},
    usage_source=UsageSource.UPSTREAM,
    observed=Observed(1, 2, 3, 4, 5),
    error=JobError(ErrorCode.AUTH, "no", 401),
    timing=Timing(1, None, 3),
    tries=1,
    metadata={},
)


def value_of(event: Event) -> bytes:
    value = EventWriter().write(event, TO, b"j").value
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("event", "value"),
    [
        (
            STARTED,
            (
                '{"type":"started","v":1,"job_id":"j","attempt":"a","seq":0,"ts":1700000000123,"model":"m",'
                '"upstream":"u","cause":"new","source":{"topic":"jobs","partition":1,"offset":2},"metadata":{"k":"v"}}'
            ),
        ),
        (
            DELTA,
            (
                '{"type":"delta","job_id":"j","attempt":"a","seq":1,"ts":1700000000124,"choice":0,'
                '"delta":{"content":"🐟"},"finish_reason":null,"v":1}'
            ),
        ),
        (
            FULL_DELTA,
            (
                '{"type":"delta","job_id":"j","attempt":"a","seq":1,"ts":0,"choice":null,"delta":{},'
                '"finish_reason":"stop","logprobs":{"content":[]},"chunk":{"id":"c"},"extra":{"x":1},"v":1}'
            ),
        ),
        (
            USAGE,
            (
                '{"type":"usage","v":1,"job_id":"j","attempt":"a","seq":2,"ts":1700000000000,"status":"failed",'
                '"finish_reasons":{"0":"stop"},"usage":{"n":1180591620717411303424},"usage_source":"upstream",'
                '"observed":{"deltas":1,"chunks":2,"content_chars":3,"reasoning_chars":4,"bytes":5},'
                '"error":{"code":"auth","message":"no","http_status":401,"upstream":null,"retriable":false},'
                '"timing":{"queued":1,"first_delta":null,"total":3},"tries":1,"metadata":{}}'
            ),
        ),
    ],
)
def test_event_value_is_compact_json_with_documented_names(event: Event, value: str) -> None:
    """Members that are always present are written; unset ones are not."""
    assert value_of(event) == value.encode()


@pytest.mark.parametrize(
    ("event", "name", "trace"),
    [
        (STARTED, b"started", TRACE),
        (DELTA, b"delta", ()),
        (USAGE, b"usage", (("streamworker-status", b"failed"), *TRACE)),
    ],
)
def test_event_record_has_type_header_and_trace_on_first_and_last_only(
    event: Event, name: bytes, trace: Headers
) -> None:
    """Readers can filter without parsing; deltas carry no trace because there are many."""
    record = EventWriter().write(event, TO, b"key", TRACE)

    assert (record.topic_partition, record.key) == (TO, b"key")
    assert record.headers == (("content-type", b"application/json"), ("streamworker-type", name), *trace)


@pytest.mark.parametrize(
    ("event", "name", "ce_id", "time"),
    [
        (STARTED, "started", b"j/a/0", b"2023-11-14T22:13:20.123Z"),
        (DELTA, "delta", b"j/a/1", b"2023-11-14T22:13:20.124Z"),
        (USAGE, "usage", b"j/a/2", b"2023-11-14T22:13:20.000Z"),
    ],
)
def test_event_as_cloudevent_is_binary_mode_of_the_same_value(
    event: Event, name: str, ce_id: bytes, time: bytes
) -> None:
    """The value is the same, and the attributes are headers."""
    record = EventWriter(cloud_source="/workers/1").write(event, TO, b"j", TRACE)

    assert record.value == value_of(event)
    assert dict(record.headers) == {
        "content-type": b"application/json",
        "streamworker-type": name.encode(),
        "ce_specversion": b"1.0",
        "ce_type": f"dev.streamworker.{name}.v1".encode(),
        "ce_source": b"/workers/1",
        "ce_id": ce_id,
        **({"streamworker-status": b"failed"} if event is USAGE else {}),
        "ce_subject": b"j",
        "ce_time": time,
    } | (dict(TRACE) if name != "delta" else {})


def test_event_with_half_a_character_is_written_with_a_replacement() -> None:
    """A lone surrogate does not stop a job; tag and members are still there."""
    event = msgspec.structs.replace(USAGE, metadata={"k": "\ud83d"}, usage=None)

    assert read_event(value_of(event)) == read_event(value_of(USAGE)) | {
        "metadata": {"k": "\ufffd"},
        "usage": None,
    }


@pytest.mark.parametrize("event", [STARTED, DELTA, FULL_DELTA, USAGE])
def test_read_event_of_a_written_event_has_the_common_members(event: Event) -> None:
    """Written events can be read back."""
    read = read_event(value_of(event))

    assert read == msgspec.to_builtins(event)
    assert {"v", "job_id", "attempt", "seq", "type", "ts"} <= set(read)


def test_read_event_of_a_later_version_keeps_unknown_members() -> None:
    """Readers ignore unknown types and members."""
    later: dict[str, Any] = {
        "v": 1,
        "job_id": "j",
        "attempt": "a",
        "seq": 9,
        "type": "new",
        "ts": 0,
        "x": [1],
    }

    assert read_event(msgspec.json.encode(later)) == later


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"{",
        b"\xff",
        b'{"v":1,"job_id":"j","attempt":"a","seq":"1","type":"delta","ts":0}',
        b'{"v":1,"job_id":"j","attempt":"a","seq":1.5,"type":"delta","ts":0}',
        b'{"v":1,"job_id":null,"attempt":"a","seq":1,"type":"delta","ts":0}',
        b'{"v":1,"job_id":"j","attempt":"a","seq":1,"type":"delta","ts":0,"x":"\\ud83d"}',
        b'{"x":' + b"[" * 99_999,
        b'{"x":' + b"1" * 9_999 + b"}",
    ],
)
def test_read_event_of_another_value_raises_value_error(value: bytes) -> None:
    """Any bytes in the topic give an event or a reason."""
    with pytest.raises(ValueError, match=r"."):
        read_event(value)


def test_text_pattern_gives_what_the_event_writer_writes() -> None:
    """The constant members are encoded once; a percent sign is text."""
    writer = EventWriter()
    event = DeltaEvent("a:b", "f00", 7, 1_700_000_000_124, 2, {"role": "100%", "content": "50% of 🐟"}, None)
    pattern = writer.text_pattern("a:b", "f00", 2, (b'{"role":"100%","content":"', b'"}'))
    record = writer.write(event, TO, b"a:b")

    assert pattern % (7, 1_700_000_000_124, '"50% of 🐟"'.encode()) == record.value
    assert writer.delta_headers == record.headers


def test_event_writer_of_cloudevents_has_no_constant_headers() -> None:
    """`ce_id` and `ce_time` differ in each event."""
    assert EventWriter(cloud_source="/s").delta_headers is None
