"""Audit the demo's events as `streamworker audit` does, and count the upstream calls of each job."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from streamworker.kafka.log import open_log
from streamworker.model import TopicPartition
from streamworker.reader import Auditor
from streamworker.wire.event import read_event

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.config import Settings
    from streamworker.demo.jobs import DemoJob
    from streamworker.practice import PracticeUpstream

__all__ = ["Verdict", "audit", "calls_of"]


class Verdict(NamedTuple):
    """The result of an audit: numbers of jobs, terminal events and breaches of the rules for readers."""

    jobs: int
    endings: int
    breaches: int
    superseded: int

    def __str__(self) -> str:
        again = f", {self.superseded} attempts superseded" if self.superseded else ""
        return f"audit: {self.jobs} jobs, {self.endings} endings{again}, {self.breaches} breaches"


async def audit(settings: Settings) -> Verdict:
    """Read the events topic up to its end as a read_committed reader. Raises KafkaError."""
    auditor, breaches, topic = Auditor(), 0, settings.topics.events
    async with open_log(settings.kafka, topic, committed_only=True) as log:
        partitions = [TopicPartition(topic, number) for number in log.partitions]
        async for record in log.snapshot(partitions):
            event = read_event(record.value or b"{}")
            breaches += sum(1 for _ in auditor.read(event, record.at, record.key))
    breaches += sum(1 for _ in auditor.finish())
    return Verdict(auditor.jobs, auditor.statuses.total(), breaches, auditor.superseded)


def calls_of(practice: PracticeUpstream, jobs: Sequence[DemoJob]) -> dict[str, int]:
    """Return how often the practice upstream was called for each job, as it has counted itself."""
    calls = Counter(call.model for call in practice.calls)
    models = {job.job_id: (job.value.get("request") or {}).get("model") for job in jobs}
    return {job_id: calls[model] for job_id, model in models.items()}
