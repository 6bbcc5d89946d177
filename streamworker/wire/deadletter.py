"""Dead letters: the original record with headers that state why it was not processed."""

from __future__ import annotations

from typing import NamedTuple

from streamworker.model import ConsumerRecord, Coordinates, ErrorCode, Headers, ProducerRecord, TopicPartition
from streamworker.text import UPSTREAM_TEXT_LIMIT, truncate
from streamworker.wire.job import RERUN, job_id_of

__all__ = ["PREFIX", "REPLAYS", "DeadLetter", "dead_letter", "read_dead_letter", "replay_of"]

PREFIX = "__streamworker.errors."
REPLAYS = "__streamworker.replays"
"""Header of a replayed job: how many times it was replayed. Dead letters keep it, so that a replay loop is
visible."""

_MAX_DIGITS = 19


def dead_letter(
    record: ConsumerRecord, to: TopicPartition, *, code: ErrorCode, message: str, group: str
) -> ProducerRecord:
    """Return the record's dead letter: key, value and headers unchanged, followed by the error headers."""
    topic, partition, offset = record.at
    members = {
        "code": code,
        "message": truncate(message, UPSTREAM_TEXT_LIMIT),
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "timestamp": record.timestamp,
        "group": group,
    }
    headers: Headers = tuple((PREFIX + name, str(value).encode()) for name, value in members.items())
    return ProducerRecord(to, record.key, record.value, record.headers + headers)


class DeadLetter(NamedTuple):
    """The error headers of a dead letter. `source` and `timestamp` (in ms) are those of the job record."""

    code: str
    message: str
    source: Coordinates
    timestamp: int
    replays: int
    job_id: str


def read_dead_letter(record: ConsumerRecord) -> DeadLetter:
    """Read a record of the dead-letter topic. If a header repeats, the last one counts: the worker appended it.

    Raises:
        ValueError: a worker did not write the record; the message names the missing header.
    """
    headers = {name: value or b"" for name, value in record.headers}
    source = Coordinates(_text(headers, "topic"), _number(headers, "partition"), _number(headers, "offset"))
    job = ConsumerRecord(source, record.timestamp, record.key, record.value, record.headers)
    return DeadLetter(
        code=_text(headers, "code"),
        message=_text(headers, "message"),
        source=source,
        timestamp=_number(headers, "timestamp"),
        replays=_digits(headers.get(REPLAYS, b"0")) or 0,
        job_id=str(source) if record.value is None else job_id_of(job, max_bytes=1 << 30),
    )


def replay_of(record: ConsumerRecord, to: TopicPartition) -> ProducerRecord:
    """Return the dead letter's original job record, with its replay count increased by one."""
    replays = read_dead_letter(record).replays + 1
    headers = tuple(
        (name, value)
        for name, value in record.headers
        if not name.startswith(PREFIX) and name not in {REPLAYS, RERUN}
    )
    added = ((REPLAYS, str(replays).encode()), (RERUN, b"1"))
    return ProducerRecord(to, record.key, record.value, (*headers, *added))


def _text(headers: dict[str, bytes], name: str) -> str:
    if (value := headers.get(PREFIX + name)) is None:
        raise ValueError(f"header {PREFIX}{name} is missing")
    return value.decode("utf-8", "replace")


def _number(headers: dict[str, bytes], name: str) -> int:
    if (number := _digits(_text(headers, name).encode())) is None:
        raise ValueError(f"header {PREFIX}{name} is not a number")
    return number


def _digits(value: bytes) -> int | None:
    return int(value) if value.isdigit() and len(value) <= _MAX_DIGITS else None
