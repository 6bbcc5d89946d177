"""A small run of `python -m tests.chaos.gateway`, and its rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.chaos.gateway import SHORT, breaches_of, play
from tests.chaos.gateway_clients import Got, Job, Stream

if TYPE_CHECKING:
    from pathlib import Path

    from tests.brokers.apache import ApacheKafka

JOB = Job("j", "0.0.w")


def stream(*events: tuple[str, int, int]) -> Stream:
    """Return a stream with these events: attempt, seq and digest. The last one is the terminal event."""
    made = Stream(JOB)
    made.events = [Got(*event) for event in events]
    made.is_over = True
    return made


def topic(**attempts: int) -> dict[str, list[Got]]:
    """Return the events of a topic: the number of those of each attempt."""
    return {name: [Got(name, seq, seq) for seq in range(count)] for name, count in attempts.items()}


@pytest.mark.parametrize(
    ("events", "expected", "is_right"),
    [
        ([("a", 0, 0), ("a", 1, 1)], topic(a=2), True),
        ([("a", 0, 0), ("b", 0, 0), ("b", 1, 1)], topic(a=3, b=2), True),
        ([("b", 0, 0), ("b", 1, 1)], topic(a=3, b=2), True),
        ([("x", 0, 7), ("x", 1, 7), ("a", 0, 0)], topic(a=1), True),  # `x` was rolled back
        ([("a", 0, 0)], topic(a=2), False),
        ([("a", 0, 0), ("a", 0, 0), ("a", 1, 1)], topic(a=2), False),
        ([("a", 0, 0), ("a", 1, 9)], topic(a=2), False),
        ([("a", 1, 1)], topic(a=2), False),
        ([("b", 0, 0), ("b", 1, 1), ("a", 0, 0)], topic(a=3, b=2), False),
        ([("a", 0, 0), ("a", 2, 2), ("b", 0, 0)], topic(a=3, b=1), False),
        ([("x", 0, 7), ("x", 2, 7), ("a", 0, 0)], topic(a=1), False),
        ([], topic(a=1), False),
        ([("a", 0, 0)], {}, False),
    ],
)
def test_audit_accepts_a_stream_only_with_the_events_of_the_topic(
    events: list[tuple[str, int, int]], expected: dict[str, list[Got]], is_right: bool
) -> None:
    """Void attempts may end early; nothing is missing, repeated or different."""
    assert (breaches_of(stream(*events), expected) == []) == is_right


def test_audit_reports_an_event_behind_the_terminal_one() -> None:
    """Also another terminal event."""
    made = Stream(JOB)
    made.take("0.3.1.0000000a.end", b"{}")
    made.take("0.4.1.0000000a.end", b"{}")

    assert breaches_of(made, topic(a=1)) == ["0.4.1.0000000a.end came behind the terminal event"]


@pytest.mark.long
async def test_chaos_of_gateways_breaks_no_guarantee(apache_kafka: ApacheKafka, tmp_path: Path) -> None:
    """Each of 150 event streams and 10 websockets has the topic's events, and one terminal event."""
    report = await play(SHORT, 1, apache_kafka, tmp_path)

    assert report.breaches == []
