"""Which jobs `retry` selects, and the records that it writes."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click
import pytest

from streamworker.cli.retry import _new_value, _Selection
from streamworker.cli.shared import parse_since
from streamworker.errors import StreamworkerError
from streamworker.kafka.partitioner import partition_of
from streamworker.model import ConsumerRecord, Coordinates
from streamworker.wire.job import RERUN
from tests.unit.cli.conftest import REQUEST

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.memory_kafka import MemoryKafka
    from tests.unit.cli.conftest import Events, Outcome


def started(job_id: str, offset: int = 0) -> dict[str, Any]:
    source = {"topic": "jobs", "partition": 1, "offset": offset}
    return {"job_id": job_id, "type": "started", "ts": 0, "source": source}


def usage(job_id: str, status: str, code: str | None = None, ts: int = 1000) -> dict[str, Any]:
    error = None if code is None else {"code": code}
    return {"job_id": job_id, "type": "usage", "ts": ts, "status": status, "error": error}


def selected(events: list[dict[str, Any]], **over: Any) -> dict[str, Coordinates | None]:
    arguments: dict[str, Any] = {
        "statuses": frozenset(),
        "codes": frozenset(),
        "since_ms": 0,
        "max_jobs": 10,
    } | over
    selection = _Selection(**arguments)
    for event in events:
        selection.read(event)
    return selection.sources


def test_selection_by_status_and_code_needs_both() -> None:
    """Options of different kinds restrict the selection, options of one kind extend it."""
    events = [
        *(started("a", 1), usage("a", "failed", "auth")),
        *(started("b", 2), usage("b", "failed", "quota")),
        *(started("c", 3), usage("c", "interrupted", "auth")),
        *(started("d", 4), usage("d", "completed")),
    ]

    assert list(selected(events, statuses=frozenset({"failed"}))) == ["a", "b"]
    assert list(selected(events, codes=frozenset({"auth"}))) == ["a", "c"]
    assert selected(events, statuses=frozenset({"failed"}), codes=frozenset({"auth", "x"})) == {
        "a": Coordinates("jobs", 1, 1)
    }


@pytest.mark.parametrize(
    "later", [[started("a", 7)], [started("a", 7), usage("a", "completed")], [usage("a", "cancelled")]]
)
def test_selection_of_a_job_whose_last_run_is_open_or_ended_otherwise_is_empty(
    later: list[dict[str, Any]],
) -> None:
    """The last run of a job counts."""
    events = [started("a"), usage("a", "failed", "auth"), *later]

    assert selected(events, statuses=frozenset({"failed"})) == {}


def test_selection_since_a_time_compares_the_terminal_event() -> None:
    """A job that ended before the time is not selected."""
    events = [started("a"), usage("a", "failed", ts=999), started("b"), usage("b", "failed", ts=1000)]

    assert list(selected(events, statuses=frozenset({"failed"}), since_ms=1000)) == ["b"]


def test_selection_of_a_rejected_job_has_no_source() -> None:
    """A rejected job has no `started` event."""
    assert selected([usage("a", "rejected", "invalid_job")], codes=frozenset({"invalid_job"})) == {"a": None}


def test_selection_of_too_many_jobs_raises() -> None:
    """The memory of the command is bounded, and nothing is written."""
    events = [one for n in range(11) for one in (started(f"j{n}"), usage(f"j{n}", "failed"))]

    with pytest.raises(StreamworkerError, match="more than 10 jobs are selected, and none was submitted"):
        selected(events, statuses=frozenset({"failed"}))


@pytest.mark.parametrize(("text", "age_s"), [("90m", 5400), ("2h", 7200), ("3d", 259_200), ("5s", 5)])
def test_since_as_a_duration_is_relative_to_now(text: str, age_s: int) -> None:
    """Seconds, minutes, hours and days are accepted."""
    value = parse_since(click.Context(click.Command("x")), click.Option(["--since"]), text)

    assert value == pytest.approx((time.time() - age_s) * 1000, abs=2000)


def test_since_as_rfc_3339_is_absolute() -> None:
    """A time needs a zone."""
    context, option = click.Context(click.Command("x")), click.Option(["--since"])

    assert parse_since(context, option, "1970-01-01T00:01:00Z") == 60_000
    for text in ("yesterday", "1970-01-01T00:01:00", "2 h"):
        with pytest.raises(click.BadParameter, match="is not a valid time"):
            parse_since(context, option, text)


def record(value: bytes | None) -> ConsumerRecord:
    return ConsumerRecord(Coordinates("jobs", 1, 7), 0, None, value)


def test_new_value_of_a_job_with_an_id_is_unchanged() -> None:
    """The record is submitted byte for byte."""
    value = json.dumps({"job_id": "a", "request": REQUEST}).encode()

    assert _new_value(record(value), "a", 1 << 20) == (value, None)


def test_new_value_of_a_job_without_an_id_has_its_id_as_a_member() -> None:
    """The id was derived from the coordinates of the record, and the new record has other ones."""
    value = b' {"request": ' + json.dumps(REQUEST).encode() + b"}"
    new, reason = _new_value(record(value), "jobs-1-7", 1 << 20)

    assert reason is None
    assert json.loads(new) == {"job_id": "jobs-1-7", "request": REQUEST}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "has no value"),
        (b"noise", "is another one now"),
        (json.dumps({"job_id": "b", "request": REQUEST}).encode(), "is another one now"),
        (
            json.dumps({"job_id": "a", "request": REQUEST, "deadline": "2020-01-01T00:00:00Z"}).encode(),
            "its deadline has passed",
        ),
    ],
)
def test_new_value_of_a_job_that_cannot_run_again_has_a_reason(value: bytes | None, reason: str) -> None:
    """The job is skipped with a message."""
    _, found = _new_value(record(value), "a", 1 << 20)

    assert found is not None
    assert reason in found


# The command


JOBS = "streamworker.jobs"


def submitted(kafka: MemoryKafka, first: int) -> list[Any]:
    """Return the job records that were written from an offset of the first partition on, and all of the second."""
    return [one for one in kafka.records(JOBS) if one.partition == 1 or one.offset >= first]


def failed_job(
    events: Events, job_id: str, *, code: str = "auth", key: bytes | None = b"k", **over: Any
) -> int:
    """Write a job record, and the events of its run that failed; return the record's offset."""
    value = over.pop("value", None) or json.dumps({"job_id": job_id, "request": REQUEST}).encode()
    offset = events.kafka.write(JOBS, value, key=key, partition=0, **over)
    events.whole(job_id, "failed", offset, error={"code": code, "message": "m"})
    return offset


def test_retry_writes_the_records_of_the_selected_jobs_again(
    events: Events, command: Callable[..., Outcome]
) -> None:
    """As they were, and marked as a further run; the others are left alone."""
    failed_job(events, "a", headers=(("traceparent", b"00"), (RERUN, b"1")))
    failed_job(events, "b", code="quota")
    events.whole("c", offset=events.kafka.write(JOBS, b"{}", partition=0))
    ended = command("retry", "--status", "failed", "--code", "auth")
    [record] = submitted(events.kafka, 3)

    assert ended.code == 0
    assert ended.lines == [f"submitted a: the record {JOBS}-0-0 to {JOBS} again"]
    assert ended.err == "1 of 1 selected jobs submitted again\n"
    assert json.loads(record.value) == {"job_id": "a", "request": REQUEST}
    assert (record.key, record.headers) == (b"k", (("traceparent", b"00"), (RERUN, b"1")))
    assert record.partition == partition_of(b"k", 2)


def test_retry_of_a_record_without_key_and_id_keeps_both_identities(
    events: Events, command: Callable[..., Outcome]
) -> None:
    """The id is that of the first run, and the partition that of its coordinates."""
    job_id = f"{JOBS}-0-0"
    failed_job(events, job_id, key=None, value=json.dumps({"request": REQUEST}).encode())
    assert command("retry", "--code", "auth").code == 0
    [record] = submitted(events.kafka, 1)

    assert json.loads(record.value) == {"job_id": job_id, "request": REQUEST}
    assert (record.key, record.partition) == (None, partition_of(job_id.encode(), 2))


def test_dry_run_of_a_retry_writes_nothing(events: Events, command: Callable[..., Outcome]) -> None:
    """It reads the records as well: it says what would be left, and why."""
    failed_job(events, "a")
    failed_job(events, "b", value=b"noise")
    ended = command("retry", "--status", "failed", "--dry-run")

    assert ended.code == 1
    assert ended.lines == [f"would submit a: the record {JOBS}-0-0 to {JOBS} again"]
    assert "left b: the record streamworker.jobs-0-1 is another one now" in ended.err
    assert ended.err.endswith("1 of 2 selected jobs would be submitted again\n")
    assert submitted(events.kafka, 2) == []
    assert events.kafka.producers == []


def test_job_that_cannot_be_submitted_is_left_with_the_reason(
    events: Events, command: Callable[..., Outcome]
) -> None:
    """Rejected, deleted, of another topic, refused by the broker: the others are submitted, and the code is 1."""
    for number in range(2):
        failed_job(events, f"deleted-{number}")
    events.kafka.log(JOBS).beginning = 2
    failed_job(
        events,
        "large",
        value=json.dumps({"job_id": "large", "request": REQUEST, "metadata": {"a": "x" * 200}}).encode(),
    )
    failed_job(events, "good")
    events.kafka.max_value_bytes = 200
    events.ended(0, "rejected", "rejected")
    source = {"topic": "old", "partition": 0, "offset": 0}
    events.started("elsewhere", source=source)
    events.ended(1, "failed", "elsewhere")
    ended = command("retry", "--status", "failed", "--code", "auth")
    rejected = command("retry", "--code", "auth", "--dry-run")

    assert ended.code == 1
    assert {line.split(":")[0] for line in ended.err.splitlines()[:-1]} >= {
        "left deleted-0",
        "left deleted-1",
        "left large",
        "left elsewhere",
    }
    assert "left deleted-0: the record streamworker.jobs-0-0 is deleted" in ended.err
    assert "left elsewhere: its job topic old is not one of topics.jobs" in ended.err
    assert "left large: the broker refused a record of" in ended.err
    assert ended.err.endswith("1 of 5 selected jobs submitted again\n")
    assert "left rejected: it was rejected: see `streamworker dlq replay`" in rejected.err


def test_retry_skips_records_that_are_not_events(events: Events, command: Callable[..., Outcome]) -> None:
    """`audit` reports them. Deltas are not decoded, whatever they hold: they are most of the topic."""
    events.kafka.write("streamworker.events", b"noise", partition=0)
    events.kafka.write("streamworker.events", None, partition=0)
    failed_job(events, "a")
    [*_, ending] = [one for one in events.kafka.records("streamworker.events") if one.key == b"a"]
    events.kafka.write(
        "streamworker.events",
        ending.value.replace(b'"a"', b'"b"'),
        partition=0,
        headers=(("streamworker-type", b"delta"),),
    )

    assert command("retry", "--code", "auth").err == "1 of 1 selected jobs submitted again\n"


def test_retry_of_more_jobs_than_allowed_submits_none(
    events: Events, command: Callable[..., Outcome]
) -> None:
    """A selection that is too wide costs nothing."""
    for number in range(3):
        failed_job(events, f"j{number}")
    ended = command("retry", "--code", "auth", "--max-jobs", "2")

    assert ended.code == 1
    assert "more than 2 jobs are selected, and none was submitted" in ended.err
    assert submitted(events.kafka, 3) == []
    assert command("retry", "--code", "auth", "--max-jobs", "3").code == 0


def test_retry_without_a_selection_is_bad_usage(events: Events, command: Callable[..., Outcome]) -> None:
    """A time alone selects nothing: completed jobs would run again."""
    ended = command("retry", "--since", "2h")

    assert ended.code == 2
    assert "--status or --code is required" in ended.err


def test_retry_since_a_time_reads_the_age_of_the_end(events: Events, command: Callable[..., Outcome]) -> None:
    """The events have a time of their own, in ms."""
    failed_job(events, "old")

    assert command("retry", "--code", "auth", "--since", "1d").err == "0 of 0 selected jobs submitted again\n"
    assert command("retry", "--code", "auth", "--since", "1970-01-01T00:00:01Z").code == 0


def test_job_topic_that_does_not_exist_leaves_its_jobs(
    events: Events, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason; the jobs of the other topic are submitted."""
    monkeypatch.setenv("STREAMWORKER_TOPICS__JOBS", f"gone,{JOBS}")
    failed_job(events, "a")
    events.started("b", source={"topic": "gone", "partition": 0, "offset": 0})
    events.ended(1, "failed", "b")
    ended = command("retry", "--code", "auth", "--dry-run")

    assert ended.code == 1
    assert ended.lines == [f"would submit a: the record {JOBS}-0-0 to {JOBS} again"]
    assert "left b: topic gone does not exist" in ended.err
