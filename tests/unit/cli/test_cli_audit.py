"""`audit`: every breach of the rules is printed with its place, and no sound topic has one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import KafkaConnectionError

from streamworker.wire.job import RERUN
from tests.memory_kafka import ABORTED
from tests.unit.cli.conftest import job

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.memory_kafka import MemoryKafka
    from tests.unit.cli.conftest import Events, Outcome

JOBS, RESULTS = "streamworker.jobs", "results"


def test_sound_topic_has_no_breach(events: Events, command: Callable[..., Outcome]) -> None:
    """Superseded attempts, late events of void ones, rejected and open jobs are sound."""
    events.whole("a")
    events.whole("b", "failed")
    events.started("c")
    events.delta(1, "void", "c")
    events.started("c", "second", cause="redelivered")
    events.delta(2, "late", "c")
    events.ended(1, job_id="c", attempt="second")
    events.ended(0, "rejected", "d")
    events.started("open")
    ended = command("audit")

    assert (ended.code, ended.err) == (0, "")
    assert ended.out == (
        "5 jobs (2 completed, 1 failed, 1 rejected), 13 events, 1 attempts superseded, 1 stale events ignored, "
        "0 further runs: no breach\n"
    )


def test_empty_topic_has_no_breach(events: Events, command: Callable[..., Outcome]) -> None:
    """The summary has no statuses to name."""
    assert command("audit").lines[-1].startswith("0 jobs (none ended), 0 events")


def gap(events: Events) -> None:
    events.started()
    events.delta(2, "x")


def repeated(events: Events) -> None:
    events.started()
    events.started()


def two_ends(events: Events) -> None:
    events.whole("j")
    events.ended(0, "rejected", attempt="b")


def unopened(events: Events) -> None:
    events.delta(3, "x")


def noise(events: Events) -> None:
    events.kafka.write("streamworker.events", b"noise", partition=0)


def tombstone(events: Events) -> None:
    events.kafka.write("streamworker.events", None, partition=0)


def other_key(events: Events) -> None:
    event = {"v": 1, "job_id": "j", "attempt": "a", "seq": 0, "type": "started", "ts": 1}
    events.kafka.write("streamworker.events", json.dumps(event).encode(), key=b"k", partition=0)


@pytest.mark.parametrize(
    ("breach", "line"),
    [
        (gap, "gap: job j: seq 2 where 1 was due"),
        (repeated, "repeated event: job j: "),
        (two_ends, "after the terminal event: job j: another terminal event of a job that has ended"),
        (unopened, "no started: job j: "),
        (noise, "unreadable: job ?: "),
        (tombstone, "unreadable: job ?: "),
        (other_key, "key: job j: the record's key is not the job's id"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_breach_is_printed_with_its_place_and_exits_with_1(
    events: Events, command: Callable[..., Outcome], breach: Callable[[Events], None], line: str
) -> None:
    """For a person with a console consumer: partition, offset, rule and job."""
    breach(events)
    ended = command("audit")
    [found, summary] = ended.lines

    assert ended.code == 1
    place, _, rest = found.partition(": ")
    assert place.startswith("partition ")
    assert rest.startswith(line)
    assert summary.endswith(": 1 breach")


def test_breaches_are_counted(events: Events, command: Callable[..., Outcome]) -> None:
    """In the plural."""
    for job_id in ("a", "b"):
        events.delta(3, "x", job_id)

    assert command("audit").lines[-1].endswith(": 2 breaches")


def test_second_terminal_event_of_a_job_that_was_submitted_again_is_sound(
    events: Events, command: Callable[..., Outcome]
) -> None:
    """`dlq replay` and `retry` mark their records; the rejected run after a whole one is then a run of its own."""
    two_ends(events)
    events.kafka.write(JOBS, job("j"), key=b"k")
    assert command("audit").code == 1

    events.kafka.write(JOBS, job("j"), key=b"k", headers=((RERUN, b"1"),))
    assert command("audit").code == 0


def later_end(events: Events) -> None:
    events.whole("j")
    events.ended(4)


@pytest.mark.parametrize("breach", [later_end, repeated])
def test_breach_that_is_not_a_rejection_is_reported_although_the_job_was_submitted_again(
    events: Events, command: Callable[..., Outcome], breach: Callable[[Events], None]
) -> None:
    """Only a terminal event with seq 0 may be a run of its own without `started`."""
    breach(events)
    events.kafka.write(JOBS, job("j"), key=b"k", headers=((RERUN, b"1"),))
    ended = command("audit")

    assert ended.code == 1
    assert ended.lines[-1].endswith(": 1 breach")


def test_second_terminal_events_beyond_the_bound_are_reported_at_once(
    events: Events, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bounded number of them waits for the job topics to be read."""
    monkeypatch.setattr("streamworker.cli.audit._MAX_SUSPECTS", 2)
    for job_id in ("a", "b", "c"):
        events.whole(job_id)
        events.ended(0, "rejected", job_id, attempt="b")
        events.kafka.write(JOBS, job(job_id), key=b"k", headers=((RERUN, b"1"),))
    ended = command("audit")

    assert ended.code == 1
    assert ended.lines[-1].endswith(": 1 breach")


def test_job_topics_that_cannot_be_read_are_named(events: Events, command: Callable[..., Outcome]) -> None:
    """The audit goes on: its principal may have no right to read jobs."""
    two_ends(events)
    del events.kafka.topics[JOBS]
    ended = command("audit")

    assert ended.code == 1
    assert (
        "the job topics cannot be read, so replayed jobs are not recognized: topic streamworker" in ended.err
    )
    assert ended.lines[0].endswith("another terminal event of a job that has ended")


def test_complete_audit_reports_open_and_lost_jobs(events: Events, command: Callable[..., Outcome]) -> None:
    """When no worker runs, each job record must have a terminal event."""
    events.kafka.write(JOBS, job("ended"), key=b"k")
    events.kafka.write(JOBS, job("open"), key=b"k")
    events.kafka.write(JOBS, job("lost"), key=b"k")
    events.kafka.write(JOBS, None, key=b"k")  # a tombstone is not a job
    events.whole("ended")
    events.started("open")
    events.started("old")  # retention has removed its job record

    noise = events.kafka.write(
        JOBS, b"noise", partition=0
    )  # it must have been rejected, under the id of its place

    assert command("audit").code == 0
    ended = command("audit", "--complete")
    assert ended.code == 1
    assert {line.split(": job ")[1].split(":")[0] for line in ended.lines[:-1]} == {
        "open",
        "old",
        "lost",
        f"streamworker.jobs-0-{noise}",
    }


def test_complete_audit_of_another_topic_judges_the_jobs_of_that_topic(
    events: Events, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job with `reply_to` has its events there; one whose `reply_to` is not allowed has them in the default topic."""
    monkeypatch.setenv("STREAMWORKER_TOPICS__ALLOWED_REPLY_TO", "replies")
    events.kafka.create("replies")
    events.kafka.write(JOBS, job("there", reply_to="replies"))
    events.kafka.write(JOBS, job("refused", reply_to="elsewhere"))

    def lost(*options: str) -> list[str]:
        lines = command("audit", "--complete", *options).lines
        return [line.split(": job ")[1].split(":")[0] for line in lines[:-1]]

    assert lost("--topic", "replies") == ["there"]
    assert lost() == ["refused"]


def test_uncommitted_audit_reads_events_of_aborted_transactions(
    events: Events, command: Callable[..., Outcome]
) -> None:
    """As a reader without isolation does: both runs of a terminal event are then there."""
    events.whole("j")
    again = {"v": 1, "job_id": "j", "attempt": "a", "seq": 2, "type": "usage", "ts": 1, "status": "completed"}
    events.kafka.write("streamworker.events", json.dumps(again).encode(), key=b"j", state=ABORTED)

    assert command("audit").code == 0
    ended = command("audit", "--uncommitted")
    assert ended.code == 1
    assert "repeated event" in ended.lines[0]


# Results


@pytest.fixture
def result(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any] | None, bytes], None]:
    """Configure a results topic; return a function that writes the result of a terminal event."""
    monkeypatch.setenv("STREAMWORKER_TOPICS__RESULTS", RESULTS)
    kafka.create(RESULTS)

    def write(event: dict[str, Any] | None, key: bytes = b"j") -> None:
        value = None if event is None else json.dumps({**event, "type": "result", "completion": {}}).encode()
        kafka.write(RESULTS, value, key=key)

    return write


def test_result_with_the_members_of_its_terminal_event_is_sound(
    events: Events, result: Any, command: Callable[..., Outcome]
) -> None:
    """A result that was erased on purpose is sound too."""
    for job_id in ("j", "erased"):
        events.started(job_id)
        event = events.ended(1, job_id=job_id)
        result(event if job_id == "j" else None, job_id.encode())
    ended = command("audit")

    assert ended.code == 0
    assert ", 1 results: no breach" in ended.out


@pytest.mark.parametrize(
    ("keys", "change", "rule"),
    [
        ([b"j"], {"usage_source": "estimated"}, "unequal result"),
        ([b"j", b"j"], {}, "repeated result"),
        ([b"other"], {}, "key"),
    ],
)
def test_result_that_is_not_the_only_equal_one_is_a_breach(
    events: Events, result: Any, command: Callable[..., Outcome], keys: Any, change: Any, rule: str
) -> None:
    """Readers of results must find the same as readers of events, once."""
    events.started()
    event = events.ended(1)
    for key in keys:
        result({**event, **change}, key)
    ended = command("audit")

    assert ended.code == 1
    assert f": {rule}: job j: " in ended.lines[0]
    assert len(ended.lines) == 2


def test_missing_and_unreadable_results_are_breaches(
    events: Events, result: Any, command: Callable[..., Outcome]
) -> None:
    """A job that ended before the first result of the topic is not judged."""
    events.ended(0, job_id="before", ts=1)
    events.started()
    result(events.ended(1, ts=5), b"j")
    events.ended(0, job_id="missing", ts=6)
    events.kafka.write(RESULTS, b"noise")
    ended = command("audit")

    assert ended.code == 1
    assert "unreadable: job ?: result: " in ended.lines[0]
    assert ended.lines[1].startswith("no result: job missing: ")
    assert ended.lines[2].endswith(": 2 breaches")


@pytest.mark.parametrize("method", ["start", "fetch_all_metadata", "end_offsets", "getmany"])
def test_broker_that_fails_ends_the_audit(
    events: Events, command: Callable[..., Outcome], method: str
) -> None:
    """A part of a topic is not audited: there is no summary that could be taken for one."""
    events.whole("j")
    events.kafka.errors[method].append(KafkaConnectionError("no route"))
    ended = command("audit")

    assert (ended.code, ended.out) == (1, "")
    assert "no route" in ended.err
