"""From a record to a job, or to the records that a rejection owes."""

from __future__ import annotations

from typing import Any

import pytest

from streamworker.errors import KafkaRefused
from streamworker.model import ConsumerRecord, Coordinates, ErrorCode, ProducerRecord
from streamworker.testing import MemoryClock, MemorySink
from streamworker.worker.intake import Accepted, Intake, Refused
from tests.unit.worker.bench import job, make_intake, make_policies, read

AT = Coordinates("jobs", 0, 7)
TRACE = ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


def make(**members: Any) -> Intake:
    return make_intake(MemorySink(), MemoryClock(), **members)


def record(value: bytes, *, key: bytes | None = b"k", headers: Any = ()) -> ConsumerRecord:
    return ConsumerRecord(AT, 1_700_000_000_000 - 250, key, value, headers)


def take(value: bytes, deliveries: int = 1, intake: Intake | None = None) -> Accepted | Refused:
    return (intake or make()).take(record(value), deliveries)


def refused(value: bytes, deliveries: int = 1, intake: Intake | None = None) -> Refused:
    decision = take(value, deliveries, intake)
    assert isinstance(decision, Refused)
    return decision


def headers(letter: ProducerRecord) -> dict[str, bytes | None]:
    return {name.removeprefix("__streamworker.errors."): value for name, value in letter.headers}


def test_intake_valid_job_goes_to_the_events_topic_by_its_id() -> None:
    """All events of a job go to the one partition that its id selects."""
    decision = take(job("a"))

    assert isinstance(decision, Accepted)
    assert decision.job.job_id == "a"
    assert decision.upstreams == ("default",)
    assert decision.to == MemorySink().partition_for("events", b"a")


def test_intake_job_with_allowed_reply_to_goes_to_that_topic() -> None:
    """A pipeline may have an events topic of its own."""
    decision = take(job("a", reply_to="replies"))

    assert isinstance(decision, Accepted)
    assert decision.to == MemorySink().partition_for("replies", b"a")


@pytest.mark.parametrize(
    ("value", "code", "told"),
    [
        (b"not json", ErrorCode.INVALID_JOB, "JSON"),
        (job("a", reply_to="elsewhere"), ErrorCode.INVALID_JOB, "reply_to: "),
        (job("a", upstream="unknown"), ErrorCode.UNKNOWN_UPSTREAM, "no upstream of that name"),
        (job("a", metadata={"k": "x" * 200_000}), ErrorCode.INVALID_JOB, "metadata: is too large"),
    ],
)
def test_intake_invalid_record_gets_a_dead_letter_and_a_terminal_event(
    value: bytes, code: ErrorCode, told: str
) -> None:
    """The dead letter is the record byte for byte; the terminal event has `seq` 0 and no `started` before it."""
    decision = refused(value)
    letter, terminal = decision.records
    event = read(terminal)

    assert decision.code is code
    assert (letter.topic_partition.topic, letter.key, letter.value) == ("dlq", b"k", value)
    assert headers(letter)["code"] == code.encode()
    assert headers(letter)["offset"] == b"7"
    assert (event["type"], event["status"], event["seq"], event["tries"]) == ("usage", "rejected", 0, 0)
    assert (event["error"]["code"], event["usage"], event["usage_source"]) == (code, None, "none")
    assert told in event["error"]["message"]
    assert event["timing"]["queued"] == 250


def test_intake_rejected_record_with_a_readable_id_keeps_it() -> None:
    """A client that waits for this job id gets its rejection."""
    decision = refused(job("mine", nonsense=1))
    terminal = decision.records[1]

    assert read(terminal)["job_id"] == "mine"
    assert terminal.topic_partition == MemorySink().partition_for("events", b"mine")


def test_intake_rejected_record_without_id_is_named_by_its_coordinates() -> None:
    """A redelivered record gets the same id."""
    assert read(refused(b"{}").records[1])["job_id"] == "jobs-0-7"


def test_intake_rejected_record_without_key_has_a_dead_letter_without_key() -> None:
    """The dead letter has the record's key, also where that is null."""
    decision = make().take(record(b"{}", key=None), 1)
    assert isinstance(decision, Refused)

    assert decision.records[0].key is None


def test_intake_rejected_record_keeps_trace_and_headers() -> None:
    """The rejection belongs to the record's trace."""
    decision = make().take(record(b"{}", headers=(TRACE, ("x", b"\xff"))), 1)
    assert isinstance(decision, Refused)
    letter, terminal = decision.records

    assert letter.headers[:2] == (TRACE, ("x", b"\xff"))
    assert TRACE in terminal.headers


def test_intake_fallback_has_coordinates_and_reason_only_and_the_same_terminal() -> None:
    """For a record whose key, value or headers do not fit into the dead-letter topic."""
    decision = make().take(record(b"x" * 5000, headers=(TRACE, ("x", b"\xff" * 100))), 1)
    assert isinstance(decision, Refused)
    letter, terminal = decision.fallback

    assert (letter.key, letter.value) == (b"jobs-0-7", None)
    assert all(name.startswith("__streamworker.errors.") for name, _ in letter.headers)
    assert int(headers(letter)["headers_left_out"] or 0) > 100
    assert headers(letter)["value_left_out"] == b"5000"
    assert headers(letter)["code"] == b"invalid_job"
    assert terminal == decision.records[1]


def test_intake_unreadable_record_is_rejected_by_its_coordinates() -> None:
    """Its key, value and headers are unknown; Kafka wants a key or a value."""
    unreadable = ConsumerRecord(Coordinates("jobs", 3, 7), -1, None, None, unreadable="not UTF-8")
    decision = make().take(unreadable, 1)
    assert isinstance(decision, Refused)
    letter, terminal = decision.records

    assert (letter.key, letter.value) == (b"jobs-3-7", None)
    assert headers(letter)["message"] == b"not UTF-8"
    assert decision.rejection.job_id == "jobs-3-7"
    assert terminal.key == b"jobs-3-7"


def test_intake_model_without_an_upstream_is_rejected() -> None:
    """Without an upstream named `default`, a model that no pattern matches is rejected."""
    decision = refused(job("a"), intake=make(policies=make_policies("one", models=("gpt-*",))))

    assert decision.code is ErrorCode.UNKNOWN_UPSTREAM
    assert "none serves the model" in decision.rejection.faults[0]


def test_intake_record_over_the_size_limit_is_rejected() -> None:
    """The limit comes from the configuration."""
    assert refused(job("a"), intake=make(max_job_bytes=10)).code is ErrorCode.INVALID_JOB


def test_intake_delivery_at_the_limit_runs() -> None:
    """`max_deliveries` deliveries run, not one less."""
    assert isinstance(take(job("a"), deliveries=5), Accepted)


def test_intake_delivered_too_often_ends_with_started_terminal_and_letter() -> None:
    """Readers follow the latest `started`, so the end has one; both are of the same attempt."""
    decision = refused(job("a", metadata={"tenant": "t"}), deliveries=6)
    letter, *records = decision.records
    started, terminal = map(read, records)

    assert decision.code is ErrorCode.MAX_DELIVERIES
    assert (letter.value, headers(letter)["code"]) == (job("a", metadata={"tenant": "t"}), b"max_deliveries")
    assert [started["type"], started["seq"], started["cause"]] == ["started", 0, "redelivered"]
    assert [terminal["type"], terminal["seq"], terminal["status"]] == ["usage", 1, "failed"]
    assert started["attempt"] == terminal["attempt"]
    assert terminal["error"]["code"] == "max_deliveries"
    assert terminal["error"]["message"] == "the worker died or failed 5 times while this job ran"
    assert terminal["metadata"] == {"tenant": "t"}
    assert decision.fallback[0].value is None
    assert list(decision.fallback[1:]) == records


def test_intake_delivered_too_often_with_reply_to_ends_there() -> None:
    """The events go to the job's reply topic."""
    decision = refused(job("a", reply_to="replies"), deliveries=6)

    assert [record.topic_partition.topic for record in decision.records] == ["dlq", "replies", "replies"]


def test_intake_without_the_topic_raises() -> None:
    """A missing topic is an error of the configuration, not of the job."""
    intake = make_intake(MemorySink(topics=["dlq"]), MemoryClock())

    with pytest.raises(KafkaRefused, match="events"):
        intake.take(record(job("a")), 1)


def test_intake_rejection_goes_to_the_reply_topic_if_it_is_allowed() -> None:
    """A reply topic that is not allowed gets nothing."""
    topics = [
        refused(job("j", reply_to=reply_to, upstreem="x")).records[-1].topic_partition.topic
        for reply_to in ("replies", "secrets")
    ]

    assert topics == ["replies", "events"]
