"""Snapshots: a job so far, as one event and as one object."""

from __future__ import annotations

import json
from typing import Any

from streamworker.gateway.snapshot import SnapshotBuilder
from streamworker.handover import Delivery, Kind
from tests.integration.events import delta, ended, started


def delivery(kind: Kind, value: bytes, **members: Any) -> Delivery:
    event = json.loads(value) | members
    return Delivery(kind, 0, json.dumps(event).encode(), True, event["seq"], event["attempt"])


def built(*deliveries: Delivery, limit_bytes: int = 1 << 20) -> SnapshotBuilder:
    builder = SnapshotBuilder("j", limit_bytes=limit_bytes)
    for one in deliveries:
        builder.add(one)
    return builder


HELLO = (
    delivery(Kind.STARTED, started("j")),
    delivery(Kind.DELTA, delta("j", 1, "Hel")),
    delivery(Kind.DELTA, delta("j", 2, "lo")),
)


def test_snapshot_event_has_the_message_so_far() -> None:
    """Its `seq` and `attempt` are those of the last event in it."""
    assert json.loads(built(*HELLO).event()) == {
        "type": "snapshot",
        "job_id": "j",
        "attempt": "a",
        "seq": 2,
        "choices": [
            {
                "choice": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "finish_reason": None,
            }
        ],
    }


def test_snapshot_of_a_new_attempt_forgets_the_former_one() -> None:
    """And counts it."""
    builder = built(*HELLO, delivery(Kind.RESTARTED, started("j"), attempt="b", model="other"))
    job = builder.job("c")

    assert (job.status, job.attempt, job.attempts_seen, job.model) == ("running", "b", 2, "other")
    assert job.choices == []
    assert json.loads(builder.event())["choices"] == []


def test_snapshot_of_an_ended_job_has_its_ending_byte_for_byte() -> None:
    """The status is the ending's."""
    end = delivery(Kind.ENDED, ended("j", 3), status="interrupted")
    job = built(*HELLO, end).job("7.1.3.e8b7be43.end")

    assert (job.status, job.has_ended, job.cursor) == ("interrupted", True, "7.1.3.e8b7be43.end")
    assert job.ending == json.loads(end.value)
    assert job.ending_value == end.value
    assert job.choices[0]["message"]["content"] == "Hello"


def test_snapshot_of_a_job_that_ended_and_began_again_is_running() -> None:
    """The last run counts."""
    end = delivery(Kind.ENDED, ended("j", 3), status="failed")
    builder = built(*HELLO, end, delivery(Kind.RESTARTED, started("j"), attempt="b"))

    assert builder.job("c").status == "running"
    assert not builder.has_ended


def test_snapshot_of_a_rejected_job_has_an_ending_only() -> None:
    """It had no `started`, and one attempt."""
    job = built(delivery(Kind.ENDED, ended("j", 0), status="rejected")).job("c")

    assert (job.status, job.model, job.attempts_seen, list(job.choices)) == ("rejected", None, 1, [])


def test_snapshot_before_the_first_event_is_waiting() -> None:
    """With a place as its cursor."""
    job = SnapshotBuilder("j").job("0.7.w")

    assert (job.status, job.attempt, job.attempts_seen, job.cursor) == ("waiting", None, 0, "0.7.w")
    assert not job.has_ended


def test_snapshot_of_a_message_beyond_the_limit_names_the_omitted_parts() -> None:
    """Its memory is bounded."""
    deltas = [delivery(Kind.DELTA, delta("j", seq, "x" * 100)) for seq in range(1, 50)]
    event = json.loads(built(HELLO[0], *deltas, limit_bytes=1000).event())

    assert event["choices"] == []
    assert "completion" in event["omitted"]
