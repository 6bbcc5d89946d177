"""Dead letters: the original record and the reason."""

from __future__ import annotations

import pytest

from streamworker.model import ConsumerRecord, Coordinates, ErrorCode, Headers, ProducerRecord, TopicPartition
from streamworker.wire.deadletter import PREFIX, dead_letter

HEADERS: Headers = (("traceparent", b"00-1"), ("traceparent", b"00-2"), ("empty", b""), ("bytes", b"\xff\0"))
TO = TopicPartition("dlq", 5)


@pytest.mark.parametrize(
    ("key", "value"), [(b"key", b"{broken"), (None, None), (b"", b""), (b"\xff\0", b"\xff\xfe\0")]
)
def test_dead_letter_keeps_key_value_and_headers_byte_for_byte(
    key: bytes | None, value: bytes | None
) -> None:
    """A person or a program can restore the record: the error headers follow its own."""
    record = ConsumerRecord(Coordinates("jobs", 2, 77), 1_700_000_000_123, key, value, HEADERS)
    letter = dead_letter(record, TO, code=ErrorCode.INVALID_JOB, message="no, 🐟", group="g")

    assert letter == ProducerRecord(
        TO,
        key,
        value,
        (
            *HEADERS,
            ("__streamworker.errors.code", b"invalid_job"),
            ("__streamworker.errors.message", "no, 🐟".encode()),
            ("__streamworker.errors.topic", b"jobs"),
            ("__streamworker.errors.partition", b"2"),
            ("__streamworker.errors.offset", b"77"),
            ("__streamworker.errors.timestamp", b"1700000000123"),
            ("__streamworker.errors.group", b"g"),
        ),
    )


def test_dead_letter_long_message_is_cut() -> None:
    """A dead letter is hardly larger than its record."""
    record = ConsumerRecord(Coordinates("jobs", 0, 0), 0, None, b"")
    letter = dead_letter(record, TO, code=ErrorCode.MAX_DELIVERIES, message="x" * 99_999, group="g")

    assert dict(letter.headers)[PREFIX + "message"] == b"x" * 2048


def test_dead_letter_of_a_dead_letter_appends_its_reasons() -> None:
    """Both reasons are kept; the later one is the last of each name."""
    record = ConsumerRecord(Coordinates("jobs", 0, 0), 0, None, b"")
    first = dead_letter(record, TO, code=ErrorCode.INVALID_JOB, message="first", group="g")
    again = ConsumerRecord(Coordinates("dlq", 5, 1), 0, first.key, first.value, first.headers)
    second = dead_letter(again, TO, code=ErrorCode.INVALID_JOB, message="second", group="g")

    assert [value for name, value in second.headers if name == PREFIX + "message"] == [b"first", b"second"]
