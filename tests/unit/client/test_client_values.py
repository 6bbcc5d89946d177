"""Ids, job records, events and results: the client's values, without Kafka."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest

from streamworker.client.client import _since_ms
from streamworker.client.errors import InvalidJob, JobFailed
from streamworker.client.events import Delta, Ended, Restarted, Started, event_of
from streamworker.client.ids import new_job_id, submitted_ms
from streamworker.client.mapping import arguments_of
from streamworker.client.requests import new_job
from streamworker.client.result import ResultAssembler
from streamworker.handover import Delivery, Kind

MESSAGES = [{"role": "user", "content": "a secret question"}]


def test_new_job_id_is_a_uuid_of_version_7() -> None:
    """Its first 48 bits are the time in ms, the variant is RFC 9562's, and ids differ."""
    ids = [UUID(new_job_id(1_700_000_000_123)) for _ in range(100)]

    assert {(one.version, one.variant) for one in ids} == {(7, "specified in RFC 4122")}
    assert {one.int >> 80 for one in ids} == {1_700_000_000_123}
    assert len(set(ids)) == 100


def test_submitted_ms_reads_the_time_of_an_id_that_ends_in_a_uuid_7() -> None:
    """A prefix such as a tenant may precede it; other ids have no time."""
    job_id = new_job_id(1_700_000_000_123)

    assert submitted_ms(job_id) == submitted_ms(f"tenant.{job_id.upper()}") == 1_700_000_000_123
    assert submitted_ms(f"{job_id}x") is None
    assert submitted_ms("5d0c6f1e-3a5e-4b8e-9a0e-6f7f7c1c2b11") is None


def job(**over: Any) -> dict[str, Any]:
    """Return a job made of default arguments."""
    return new_job(**{"request": None, "members": {}, "job_id": None, "deadline": None, **over})


def test_new_job_leaves_out_options_that_are_none() -> None:
    """A worker refuses a null member."""
    made = job(
        members={"model": "m", "messages": MESSAGES, "temperature": 0}, upstream=None, metadata={"a": "b"}
    )

    assert submitted_ms(made.pop("job_id")) is not None
    assert made == {
        "request": {"model": "m", "messages": MESSAGES, "temperature": 0},
        "metadata": {"a": "b"},
    }


@pytest.mark.parametrize(
    ("deadline", "expected"),
    [
        (datetime(2030, 1, 31, 12, tzinfo=UTC), "2030-01-31T12:00:00Z"),
        (datetime(2030, 1, 31, 12, tzinfo=timezone(timedelta(hours=1))), "2030-01-31T11:00:00Z"),
        ("2030-01-31T12:00:00+01:00", "2030-01-31T12:00:00+01:00"),
    ],
)
def test_new_job_deadline_is_an_rfc_3339_time(deadline: Any, expected: str) -> None:
    """A time with any zone, or a text."""
    assert job(request={"model": "m", "messages": MESSAGES}, deadline=deadline)["deadline"] == expected


def test_new_job_deadline_of_a_duration_counts_from_now() -> None:
    """As `timedelta(minutes=2)`."""
    made = job(request={"model": "m", "messages": MESSAGES}, deadline=timedelta(minutes=2))
    left = datetime.fromisoformat(made["deadline"]) - datetime.now(UTC)

    assert timedelta(minutes=1, seconds=50) < left <= timedelta(minutes=2)


@pytest.mark.parametrize(
    ("over", "fault"),
    [
        ({"members": {"model": "m"}}, "request.messages: is required"),
        (
            {"request": {"model": "m", "messages": MESSAGES}, "job_id": "a b"},
            "job_id: holds other characters",
        ),
        (
            {"request": {"model": "m", "messages": MESSAGES}, "members": {"top_p": 1}},
            "request and top_p are given",
        ),
        (
            {"request": {"model": "m", "messages": MESSAGES}, "deadline": datetime(2030, 1, 1)},  # noqa: DTZ001
            "deadline: the time has no zone",
        ),
        ({"members": {"model": "m", "messages": [{1j}]}}, "cannot be encoded as JSON"),
        ({"request": {"model": "m", "messages": MESSAGES}, "on_break": "retry"}, "on_break: expected"),
    ],
)
def test_new_job_that_is_not_valid_is_refused_without_repeating_its_content(
    over: dict[str, Any], fault: str
) -> None:
    """The error is a ValueError too; prompts stay out of it."""
    with pytest.raises(InvalidJob, match=fault) as refused:
        job(**over)

    assert isinstance(refused.value, ValueError)
    assert "secret" not in str(refused.value)


def test_arguments_of_an_item_are_a_body_or_arguments_with_a_request() -> None:
    """The item's own arguments override the common ones."""
    body = {"model": "m", "messages": MESSAGES}

    assert arguments_of(body, {"key": "k"}) == {"key": "k", "request": body}
    assert arguments_of({"request": body, "key": "own"}, {"key": "k"}) == {"key": "own", "request": body}


def test_since_is_a_time_or_a_duration_and_by_default_an_hour() -> None:
    """For ids without a time."""
    now = datetime.now(UTC)
    for since, ago_s in ((None, 3600), (timedelta(seconds=90), 90), (now - timedelta(seconds=500), 500)):
        assert _since_ms("x", since) / 1000 == pytest.approx(now.timestamp() - ago_s, abs=10)


def test_since_default_of_a_uuid_7_is_a_minute_before_it() -> None:
    """The clocks of submitter and worker may differ."""
    assert _since_ms(new_job_id(1_700_000_060_000), None) == 1_700_000_000_000


def test_since_without_zone_is_refused() -> None:
    """It would be read in the zone of the machine."""
    with pytest.raises(ValueError, match="no zone"):
        _since_ms("x", datetime(2030, 1, 1))  # noqa: DTZ001


# Events and results


def delivery(kind: Kind, seq: int, *, is_whole: bool = True, **members: Any) -> Delivery:
    """Return a delivery of an event with these members."""
    names = {Kind.STARTED: "started", Kind.RESTARTED: "started", Kind.DELTA: "delta", Kind.ENDED: "usage"}
    event = {"v": 1, "job_id": "j", "attempt": "a", "seq": seq, "type": names[kind], "ts": 1_700_000_000_000}
    return Delivery(kind, 7 + seq, json.dumps(event | members).encode(), is_whole)


def started(kind: Kind = Kind.STARTED) -> Delivery:
    """Return a `started` event."""
    return delivery(kind, 0, model="m", upstream="u", cause="new", metadata={"a": "b"})


def text(seq: int, content: str) -> Delivery:
    """Return a delta with this content."""
    return delivery(Kind.DELTA, seq, choice=0, delta={"content": content}, finish_reason=None)


def end(seq: int, status: str = "completed", *, is_whole: bool = True, **members: Any) -> Delivery:
    """Return a terminal event."""
    ending: dict[str, Any] = {
        "status": status,
        "finish_reasons": {"0": "stop"},
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    ending |= {"usage_source": "upstream", "error": None, "metadata": {"a": "b"}}
    return delivery(Kind.ENDED, seq, is_whole=is_whole, **ending | members)


def test_event_has_the_members_of_its_record() -> None:
    """Each kind its own."""
    begin, again, part, last = map(event_of, (started(), started(Kind.RESTARTED), text(1, "Hi"), end(2)))

    assert isinstance(begin, Started)
    assert not isinstance(begin, Restarted)
    assert (begin.model, begin.upstream, begin.cause, begin.metadata) == ("m", "u", "new", {"a": "b"})
    assert isinstance(again, Restarted)
    assert isinstance(part, Delta)
    assert (part.text, part.choice, part.delta, part.finish_reason) == ("Hi", 0, {"content": "Hi"}, None)
    assert isinstance(last, Ended)
    assert (last.status, last.usage_source, last.error, last.is_whole) == (
        "completed",
        "upstream",
        None,
        True,
    )
    assert (part.job_id, part.attempt, part.seq, part.ts, part.offset) == ("j", "a", 1, 1_700_000_000_000, 8)
    assert json.loads(part.json()) == part.raw


def test_event_can_be_matched_by_class() -> None:
    """`case Delta(text)` gives the text, `case Ended(status)` the status."""
    found = []
    for event in map(event_of, (text(1, "Hi"), end(2))):
        match event:
            case Delta(said):
                found.append(said)
            case Ended(status):
                found.append(status)

    assert found == ["Hi", "completed"]


def test_event_and_result_reprs_have_no_text() -> None:
    """They end up in logs."""
    assembler = ResultAssembler()
    events = [event_of(one) for one in (started(), text(1, "a secret answer"), end(2))]
    result = [assembler.add(event) for event in events][-1]

    assert result is not None
    assert "secret" not in repr([*events, result])


def test_result_is_assembled_of_the_last_attempt() -> None:
    """The events before a restart are void."""
    assembler = ResultAssembler()
    for one in (started(), text(1, "old"), started(Kind.RESTARTED), text(1, "ne"), text(2, "w")):
        assert assembler.add(event_of(one)) is None
    result = assembler.add(event_of(end(3)))

    assert result is not None
    assert (result.text, result.tool_calls, result.omitted) == ("new", [], ())
    assert result.raise_for_status() is result
    assert json.loads(json.dumps(result.to_dict())) == {
        "job_id": "j",
        "status": "completed",
        "completion": result.completion,
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        "usage_source": "upstream",
        "error": None,
        "metadata": {"a": "b"},
        "omitted": [],
    }


def test_result_of_an_attempt_without_its_beginning_omits_the_completion() -> None:
    """A part of an answer must not be taken for the whole."""
    assembler = ResultAssembler()
    assembler.add(event_of(text(5, "rest")))
    result = assembler.add(event_of(end(6, is_whole=False)))

    assert result is not None
    assert (result.completion, result.text, result.omitted) == (None, "", ("completion",))


def test_result_that_is_not_completed_raises_with_its_error() -> None:
    """The exception has the result."""
    error = {"code": "quota", "message": "no credit"}
    result = ResultAssembler().add(event_of(end(0, "failed", error=error)))

    assert result is not None
    with pytest.raises(JobFailed, match="job j ended with status failed: quota: no credit") as raised:
        result.raise_for_status()
    assert raised.value.result is result
