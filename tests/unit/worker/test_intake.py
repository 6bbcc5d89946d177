"""From a record to a job, or to what is owed for a record that is none."""

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
    """All events of a job are in the one partition that its id chooses."""
    decision = take(job("a"))

    assert isinstance(decision, Accepted)
    assert decision.job.job_id == "a"
    assert decision.upstreams == ("default",)
    assert decision.to == MemorySink().partition_for("events", b"a")


def test_intake_job_with_allowed_reply_to_goes_to_that_topic() -> None:
    """A pipeline may have a topic of its own."""
    decision = take(job("a", reply_to="replies"))

    assert isinstance(decision, Accepted)
    assert decision.to == MemorySink().partition_for("replies", b"a")


@pytest.mark.parametrize(
    ("value", "code", "told"),
    [
        (b"not json", ErrorCode.INVALID_JOB, "JSON"),
        (job("a", reply_to="elsewhere"), ErrorCode.INVALID_JOB, "reply_to: "),
        (job("a", upstream="nobody"), ErrorCode.UNKNOWN_UPSTREAM, "no upstream of that name"),
        (job("a", metadata={"k": "x" * 200_000}), ErrorCode.INVALID_JOB, "metadata: is too large"),
    ],
)
def test_intake_record_that_cannot_run_gets_letter_and_lone_terminal(
    value: bytes, code: ErrorCode, told: str
) -> None:
    """The dead letter is the record byte for byte; the terminal event is the job's only one: seq 0."""
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
    """Whoever waits for the job hears of it under the id they gave."""
    decision = refused(job("mine", nonsense=1))
    terminal = decision.records[1]

    assert read(terminal)["job_id"] == "mine"
    assert terminal.topic_partition == MemorySink().partition_for("events", b"mine")


def test_intake_rejected_record_without_id_is_named_by_its_coordinates() -> None:
    """So is the redelivered record."""
    assert read(refused(b"{}").records[1])["job_id"] == "jobs-0-7"


def test_intake_rejected_record_without_key_is_spread_and_keeps_no_key() -> None:
    """The letter is as the record was."""
    decision = make().take(record(b"{}", key=None), 1)
    assert isinstance(decision, Refused)

    assert decision.records[0].key is None


def test_intake_rejected_record_keeps_trace_and_headers() -> None:
    """A trace does not end where a job is refused."""
    decision = make().take(record(b"{}", headers=(TRACE, ("x", b"\xff"))), 1)
    assert isinstance(decision, Refused)
    letter, terminal = decision.records

    assert letter.headers[:2] == (TRACE, ("x", b"\xff"))
    assert TRACE in terminal.headers


def test_intake_fallback_is_the_letter_without_value_and_the_same_terminal() -> None:
    """A record larger than the dead-letter topic takes still leaves a trace of itself."""
    decision = refused(b"x" * 5000)
    letter, terminal = decision.fallback

    assert (letter.key, letter.value) == (b"k", None)
    assert headers(letter)["value_left_out"] == b"5000"
    assert headers(letter)["code"] == b"invalid_job"
    assert terminal == decision.records[1]


def test_intake_no_upstream_for_the_model_refuses() -> None:
    """Without a `default` nobody serves what no pattern names."""
    decision = refused(job("a"), intake=make(policies=make_policies("one", models=("gpt-*",))))

    assert decision.code is ErrorCode.UNKNOWN_UPSTREAM
    assert "none serves the model" in decision.rejection.faults[0]


def test_intake_record_over_the_size_limit_is_refused_unread() -> None:
    """The limit is the configuration's."""
    assert refused(job("a"), intake=make(max_job_bytes=10)).code is ErrorCode.INVALID_JOB


def test_intake_last_allowed_delivery_still_runs() -> None:
    """`max_deliveries` is how often, not how often but one."""
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
    assert terminal["metadata"] == {"tenant": "t"}
    assert decision.fallback[0].value is None
    assert list(decision.fallback[1:]) == records


def test_intake_delivered_too_often_with_reply_to_ends_there() -> None:
    """Its readers are at that topic."""
    decision = refused(job("a", reply_to="replies"), deliveries=6)

    assert [record.topic_partition.topic for record in decision.records] == ["dlq", "replies", "replies"]


def test_intake_without_the_topic_raises() -> None:
    """A topic that is gone is for a person to put right."""
    intake = make_intake(MemorySink(topics=["dlq"]), MemoryClock())

    with pytest.raises(KafkaRefused, match="events"):
        intake.take(record(job("a")), 1)


def test_intake_rejection_goes_where_the_job_asked_if_that_is_allowed() -> None:
    """Who waits on a reply topic hears of the rejection there, and nowhere else if it may not be named."""
    topics = [
        refused(job("j", reply_to=reply_to, upstreem="x")).records[-1].topic_partition.topic
        for reply_to in ("replies", "secrets")
    ]

    assert topics == ["replies", "events"]
