"""What the tests of this room share: records of jobs, streams of words, and events read back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from streamworker.limits.limiter import LimiterRules
from streamworker.model import TopicPartition
from streamworker.wire.event import EventWriter
from streamworker.worker.intake import Intake
from streamworker.worker.queues import UpstreamQueues
from streamworker.worker.runner import AttemptRunner, Tools, UpstreamPolicy
from tests.streams import chunk, data

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.model import ProducerRecord, UsageEvent
    from streamworker.ports import Upstream
    from streamworker.testing import MemoryClock, MemoryObserver, MemorySink

JOBS = TopicPartition("jobs", 0)
OTHER = TopicPartition("jobs", 1)
DONE = data(b"[DONE]")
FINISH = data(chunk({}, "stop"))


def word(text: str) -> bytes:
    """One delta as the upstream sends it."""
    return data(chunk({"content": text}))


def said(*words: str) -> list[bytes]:
    """A whole stream, one read per delta."""
    return [*map(word, words), FINISH + DONE]


def job(job_id: str | None = None, **members: Any) -> bytes:
    """A job record's value."""
    value: dict[str, Any] = {"request": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}}
    if job_id is not None:
        value["job_id"] = job_id
    return json.dumps(value | members).encode()


def read(record: ProducerRecord) -> dict[str, Any]:
    """An event record's value."""
    assert record.value is not None
    event: dict[str, Any] = json.loads(record.value)
    return event


def events(records: Iterable[ProducerRecord]) -> list[dict[str, Any]]:
    return [read(record) for record in records]


def summary(records: Iterable[ProducerRecord]) -> list[str]:
    """Events as `type job_id`, dead letters as `letter`."""
    return [
        "letter" if record.topic_partition.topic == "dlq" else "{type} {job_id}".format_map(read(record))
        for record in records
    ]


def make_slot(upstream: Upstream, **members: Any) -> UpstreamPolicy:
    given: dict[str, Any] = {
        "name": "default",
        "upstream": upstream,
        "first_delta_timeout_s": 60,
        "idle_timeout_s": 30,
        "include_usage": True,
        "scrub": lambda text: text.replace("sk-secret", "***"),
    }
    return UpstreamPolicy(**(given | members))


def make_tools(sink: MemorySink, clock: MemoryClock, observer: MemoryObserver, **members: Any) -> Tools:
    given: dict[str, Any] = {"max_record_bytes": 1_000_000, "max_event_bytes": 1 << 20}
    return Tools(sink=sink, writer=EventWriter(), clock=clock, observer=observer, **(given | members))


def make_intake(sink: MemorySink, clock: MemoryClock, **members: Any) -> Intake:
    given: dict[str, Any] = {
        "served": {"default": ["*"]},
        "events_topic": "events",
        "allowed_reply_to": ["replies"],
        "dlq_topic": "dlq",
        "group": "group",
        "max_job_bytes": 1 << 20,
        "max_record_bytes": 1_000_000,
    }
    return Intake(sink=sink, writer=EventWriter(), clock=clock, **(given | members))


def make_rules(**members: Any) -> LimiterRules:
    given: dict[str, Any] = {"max_streams": 10, "circuit_failure_threshold": 10, "circuit_open_s": 5}
    return LimiterRules(**(given | members))


def make_gates(
    observer: MemoryObserver,
    rules: dict[str, LimiterRules] | None = None,
    *,
    max_in_flight: int = 10,
    max_wait_s: float = 60,
) -> UpstreamQueues:
    rules = rules or {"default": make_rules(max_streams=max_in_flight)}
    waits = dict.fromkeys(rules, max_wait_s)
    return UpstreamQueues(rules, max_in_flight=max_in_flight, observer=observer, max_wait_s=waits)


async def play(runner: AttemptRunner) -> UsageEvent:
    """Run one attempt to the job's end."""
    await runner.stream()
    return await runner.finish()
