"""A Kafka log in memory, with the interface of `LogScanner`, and the records and events of a run's jobs."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from streamworker.batch.identity import JobIds
from streamworker.errors import KafkaRefused
from streamworker.model import TopicPartition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

__all__ = ["IDS", "LogInMemory", "digest", "events_of", "job_id", "record", "result_of"]

IDS = JobIds("b.r.")


def digest(number: int) -> bytes:
    """Return the digest of a line."""
    return number.to_bytes(16, "big")


def job_id(number: int, round_: int = 0) -> str:
    """Return the id of a line's job."""
    return IDS.job_id(digest(number), round_)


def record(key: str | None, value: Any, offset: int = 0) -> Any:
    """Return a record as a consumer does; `value` is encoded as JSON unless it is bytes or None."""
    encoded = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
    return SimpleNamespace(key=None if key is None else key.encode(), value=encoded, offset=offset)


def result_of(id_: str, **members: Any) -> dict[str, Any]:
    """Return the members of a result that a batch reads."""
    return {"job_id": id_, "attempt": "a", "status": "completed", "usage_source": "none"} | members


def events_of(
    id_: str, texts: Iterable[str], *, attempt: str = "a", end: str | None = "completed"
) -> list[Any]:
    """Return the events of one attempt; without `end` it has not ended."""
    common = {"v": 1, "job_id": id_, "attempt": attempt, "ts": 0}
    events: list[Any] = [
        {"type": "started", "seq": 0, "model": "m", "upstream": None, "cause": "new", "metadata": {}}
    ]
    events += [
        {"type": "delta", "choice": 0, "delta": {"content": text}, "finish_reason": None} for text in texts
    ]
    if end is not None:
        events.append({"type": "usage", "status": end, "usage": None, "usage_source": "none", "metadata": {}})
    return [{**common, "seq": seq, **event} for seq, event in enumerate(events)]


class LogInMemory:
    """Partitions with records. `first` has offsets before which retention has deleted everything."""

    def __init__(self, partitions: dict[str, int]) -> None:
        self.numbers = partitions
        self.records: dict[TopicPartition, list[Any]] = {}
        self.first: dict[TopicPartition, int] = {}
        self.scans: list[tuple[TopicPartition, int, int, bool]] = []
        self.is_stopped = False

    def write(self, topic: str, partition: int, key: str | None, value: Any) -> int:
        """Append a record; return its offset."""
        records = self.records.setdefault(TopicPartition(topic, partition), [])
        records.append(record(key, value, len(records)))
        return len(records) - 1

    async def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has."""
        if topic not in self.numbers:
            raise KafkaRefused(f"topic {topic} does not exist")
        return self.numbers[topic]

    async def end(self, partition: TopicPartition, *, committed_only: bool) -> int:
        """Return the end; committed or not, it is the same here."""
        del committed_only
        await self.partitions(partition.topic)
        return len(self.records.get(partition, []))

    async def beginning(self, partition: TopicPartition) -> int:
        """Return the first offset that is kept."""
        return self.first.get(partition, 0)

    async def scan(
        self, partition: TopicPartition, start: int, stop: int, *, committed_only: bool
    ) -> AsyncIterator[list[Any]]:
        """Yield the records of a range, one per batch."""
        self.scans.append((partition, start, stop, committed_only))
        for one in self.records.get(partition, [])[start:stop]:
            yield [one]

    async def stop(self) -> None:
        """Close."""
        self.is_stopped = True
