"""What the tests of this room share: records of jobs, streams of words, and events read back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from streamworker.codec.event import EventWriter
from streamworker.core.gate import GateRules
from streamworker.model import Partition
from streamworker.worker.execution import Execution, Tools, UpstreamSlot
from streamworker.worker.gates import Gates
from streamworker.worker.intake import Intake
from tests.streams import chunk, data

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.memory import MemoryClock, MemoryObserver, MemorySink
    from streamworker.model import Outgoing, UsageEvent
    from streamworker.ports import Upstream

JOBS = Partition("jobs", 0)
OTHER = Partition("jobs", 1)
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


def read(record: Outgoing) -> dict[str, Any]:
    """An event record's value."""
    assert record.value is not None
    event: dict[str, Any] = json.loads(record.value)
    return event


def events(records: Iterable[Outgoing]) -> list[dict[str, Any]]:
    return [read(record) for record in records]


def summary(records: Iterable[Outgoing]) -> list[str]:
    """Events as `type job_id`, dead letters as `letter`."""
    return [
        "letter" if record.to.topic == "dlq" else "{type} {job_id}".format_map(read(record))
        for record in records
    ]


def make_slot(upstream: Upstream, **members: Any) -> UpstreamSlot:
    given: dict[str, Any] = {
        "name": "default",
        "upstream": upstream,
        "first_delta_timeout_s": 60,
        "idle_timeout_s": 30,
        "include_usage": True,
        "scrub": lambda text: text.replace("sk-secret", "***"),
    }
    return UpstreamSlot(**(given | members))


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


def make_rules(**members: Any) -> GateRules:
    given: dict[str, Any] = {"max_streams": 10, "circuit_failures": 10, "circuit_open_s": 5}
    return GateRules(**(given | members))


def make_gates(
    observer: MemoryObserver,
    rules: dict[str, GateRules] | None = None,
    *,
    max_in_flight: int = 10,
    circuit_wait_s: float = 60,
) -> Gates:
    rules = rules or {"default": make_rules(max_streams=max_in_flight)}
    waits = dict.fromkeys(rules, circuit_wait_s)
    return Gates(rules, max_in_flight=max_in_flight, observer=observer, circuit_wait_s=waits)


async def play(execution: Execution) -> UsageEvent:
    """Run one attempt to the job's end."""
    await execution.stream()
    return await execution.finish()
