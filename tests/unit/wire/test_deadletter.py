"""Dead letters: the original record and the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamworker.model import ConsumerRecord, Coordinates, ErrorCode, Headers, ProducerRecord, TopicPartition
from streamworker.wire.deadletter import PREFIX, DeadLetter, dead_letter, read_dead_letter, replay_of

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def letter(
    *,
    value: bytes | None = b'{"job_id":"mine"}',
    headers: Headers = (),
    changes: Mapping[str, bytes | None] | None = None,
) -> ConsumerRecord:
    """Make a record of the dead-letter topic; `changes` replaces error headers, None removes one."""
    record = ConsumerRecord(Coordinates("jobs", 2, 77), 1_700_000_000_123, b"key", value, headers)
    written = dead_letter(record, TO, code=ErrorCode.INVALID_JOB, message="no, 🐟", group="g")
    changed = {PREFIX + name: text for name, text in (changes or {}).items()}
    removed = {name for name, text in changed.items() if text is None}
    kept = tuple((name, changed.get(name, text)) for name, text in written.headers if name not in removed)
    return ConsumerRecord(Coordinates("dlq", 5, 1), 1_700_000_060_000, written.key, written.value, kept)


def test_read_dead_letter_reads_what_was_written() -> None:
    """Source and time are those of the job record, not those of the dead letter."""
    assert read_dead_letter(letter()) == DeadLetter(
        code="invalid_job",
        message="no, 🐟",
        source=Coordinates("jobs", 2, 77),
        timestamp=1_700_000_000_123,
        replays=0,
        job_id="mine",
    )


@pytest.mark.parametrize(
    ("value", "job_id"),
    [
        (b'{"job_id":"mine","request":"' + b"x" * (1 << 21) + b'"}', "mine"),
        (b'{"job_id":"not mine"}', "jobs-2-77"),
        (b"{broken", "jobs-2-77"),
        (None, "jobs-2-77"),
    ],
)
def test_read_dead_letter_finds_the_id_that_the_events_carry(value: bytes | None, job_id: str) -> None:
    """An unreadable or absent value has the id of its coordinates, a value of any size its own."""
    assert read_dead_letter(letter(value=value)).job_id == job_id


@pytest.mark.parametrize("name", ["code", "message", "topic", "partition", "offset", "timestamp"])
def test_read_dead_letter_without_an_error_header_names_it(name: str) -> None:
    """Any program may write to the topic."""
    with pytest.raises(ValueError, match=rf"^header __streamworker\.errors\.{name} is missing$"):
        read_dead_letter(letter(changes={name: None}))


@pytest.mark.parametrize("name", ["partition", "offset", "timestamp"])
@pytest.mark.parametrize("text", [b"", b"-1", b"1.5", b" 1", b"1_0", "²".encode(), b"\xff", b"1" * 20])
def test_read_dead_letter_with_a_header_that_is_not_a_number_names_it(name: str, text: bytes) -> None:
    """At most 19 digits, as Kafka's 64-bit numbers have."""
    with pytest.raises(ValueError, match=rf"^header __streamworker\.errors\.{name} is not a number$"):
        read_dead_letter(letter(changes={name: text}))


def test_read_dead_letter_with_the_largest_offset_reads_it() -> None:
    """Kafka's largest offset has 19 digits; text that is not UTF-8 is read with replacements."""
    found = read_dead_letter(letter(changes={"offset": b"9223372036854775807", "message": b"no \xff"}))

    assert (found.source.offset, found.message) == ((1 << 63) - 1, "no \ufffd")


@pytest.mark.parametrize(
    ("headers", "replays"),
    [
        ((), 0),
        ((("__streamworker.replays", b"2"),), 2),
        ((("__streamworker.replays", b"2"), ("__streamworker.replays", b"3")), 3),
        ((("__streamworker.replays", b"many"),), 0),
        ((("__streamworker.replays", None),), 0),
    ],
)
def test_replay_counts_up_and_keeps_the_jobs_own_headers(headers: Headers, replays: int) -> None:
    """Error headers are removed; count and rerun header are written once, however often the job was replayed."""
    own: Headers = (("traceparent", b"00-1"), ("traceparent", b"00-2"), ("null", None))
    record = letter(headers=(*own, ("streamworker-rerun", b"1"), *headers))

    assert read_dead_letter(record).replays == replays
    assert replay_of(record, TopicPartition("jobs", 2)) == ProducerRecord(
        TopicPartition("jobs", 2),
        b"key",
        b'{"job_id":"mine"}',
        (*own, ("__streamworker.replays", str(replays + 1).encode()), ("streamworker-rerun", b"1")),
    )
