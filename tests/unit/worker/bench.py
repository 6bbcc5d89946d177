"""What the tests of this room share: records of jobs, streams of words, and events read back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from streamworker.model import TopicPartition
from streamworker.observe import UNTRACED
from streamworker.testing import MemoryClock, MemoryUpstream
from streamworker.wire.event import EventWriter
from streamworker.worker.intake import Accepted, Intake, IntakeRules
from streamworker.worker.policy import UpstreamPolicy
from streamworker.worker.queues import UpstreamQueues
from streamworker.worker.runner import AttemptRunner, Tools
from streamworker.worker.timeouts import StreamTimeouts
from tests.streams import chunk, data

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from streamworker.model import Job, ProducerRecord, UsageEvent
    from streamworker.observe import Tracer
    from streamworker.ports import Upstream
    from streamworker.testing import MemoryObserver, MemorySink
    from streamworker.worker.committer import PartitionCommitter

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


def make_policy(upstream: Upstream | None = None, **members: Any) -> UpstreamPolicy:
    """Return the settings of one upstream."""
    given: dict[str, Any] = {
        "name": "default",
        "upstream": upstream or MemoryUpstream([]),
        "scrub": lambda text: text.replace("sk-secret", "***"),
        "first_delta_timeout_s": 60,
        "idle_timeout_s": 30,
        "max_streams": 10,
        "circuit_failure_threshold": 10,
        "circuit_open_s": 5,
        "max_wait_s": 60,
    }
    return UpstreamPolicy(**(given | members))


def make_policies(*names: str, **members: Any) -> dict[str, UpstreamPolicy]:
    """Return the settings of upstreams that are alike."""
    return {name: make_policy(name=name, **members) for name in names}


def make_queues(
    observer: MemoryObserver,
    policies: Mapping[str, UpstreamPolicy] | None = None,
    *,
    max_in_flight: int = 10,
    clock: MemoryClock | None = None,
    **options: Any,
) -> UpstreamQueues:
    """Return the queues of these upstreams; of one named `default` if none is given."""
    return UpstreamQueues(
        policies or make_policies("default"),
        max_in_flight=max_in_flight,
        observer=observer,
        clock=clock or MemoryClock(),
        **options,
    )


def make_tools(
    sink: MemorySink,
    clock: MemoryClock,
    observer: MemoryObserver,
    queues: UpstreamQueues | None = None,
    **members: Any,
) -> Tools:
    given: dict[str, Any] = {"max_record_bytes": 1_000_000, "max_event_bytes": 1 << 20}
    return Tools(
        sink=sink,
        writer=EventWriter(),
        clock=clock,
        observer=observer,
        queues=queues or make_queues(observer),
        **(given | members),
    )


def make_intake(
    sink: MemorySink,
    clock: MemoryClock,
    policies: Mapping[str, UpstreamPolicy] | None = None,
    *,
    tracer: Tracer = UNTRACED,
    **members: Any,
) -> Intake:
    given: dict[str, Any] = {
        "events_topic": "events",
        "allowed_reply_to": frozenset({"replies"}),
        "dlq_topic": "dlq",
        "group": "group",
        "max_job_bytes": 1 << 20,
        "max_record_bytes": 1_000_000,
        "max_deliveries": 5,
    }
    rules = IntakeRules(**(given | members))
    policies = policies or make_policies("default")
    return Intake(rules, policies, sink=sink, writer=EventWriter(), clock=clock, tracer=tracer)


class OneAttempt:
    """One attempt of a job, and what interrupts it."""

    def __init__(
        self, tools: Tools, job: Job, committer: PartitionCommitter, *, to: TopicPartition, upstream: str
    ) -> None:
        self.timeouts = StreamTimeouts(tools.clock, job.deadline)
        accepted = Accepted(job, (upstream,), to)
        self.runner = AttemptRunner(
            tools, accepted, committer, self.timeouts, upstreams=(upstream,), cause="new"
        )

    def cancel(self, reason: str) -> None:
        """Cancel the job, as a control record does."""
        self.timeouts.cancel(reason)

    async def play(self) -> UsageEvent:
        """Run the attempt to the job's end."""
        try:
            return await self.runner.finish(await self.runner.stream())
        finally:
            self.runner.release()
