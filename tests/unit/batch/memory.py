"""A job topic and a topic of endings in memory, with the interface of `RunTopics`."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from streamworker.batch.output import EndedJob

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamworker.batch.identity import JobIds, JobRef
    from streamworker.config import Settings

__all__ = ["Follower", "Kafka", "Tail", "Topics"]


class Tail:
    """The reader of the topic of endings."""

    def __init__(self) -> None:
        self.positions = {0: 0}
        self.crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_stop: Callable[[], None] = lambda: None

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.on_stop()

    def pause(self, partition: int) -> None: ...
    def resume(self, partition: int) -> None: ...


class Follower:
    def __init__(self) -> None:
        self.tail = Tail()

    def positions(self) -> dict[int, int]:
        return dict(self.tail.positions)


class Kafka:
    """What several starts of a run share: jobs that were submitted, endings, and how workers end jobs.

    `answer(custom_id)` returns the status of a new job, None for a job that does not end.
    """

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.custom_ids: dict[str, str] = {}
        self.endings: list[EndedJob] = []
        self.cancelled: list[str] = []
        self.lost_jobs: set[int] = set()
        self.lost_endings: set[int] = set()
        self.answer: Callable[[str], str | None] = lambda _: "completed"
        self.follower: Follower | None = None
        self.readers: list[Callable[[EndedJob], None]] = []
        """Called with each ending: one per run that works now."""
        self.events = 0
        self.on_ending: Callable[[], None] = lambda: None
        self.opening: Callable[[], None] = lambda: None

    def end(self, job_id: str, status: str, code: str = "upstream_rejected") -> None:
        job = EndedJob(
            job_id=job_id,
            attempt="a",
            status=status,
            usage_source="none",
            metadata={"custom_id": self.custom_ids.get(job_id, "?")},
            error=None if status == "completed" else {"code": code, "message": "m"},
            completion=msgspec.Raw(b'{"choices":[]}' if status == "completed" else b"null"),
        )
        self.endings.append(job)
        for read in list(self.readers):
            read(job)
        self.on_ending()


class Topics:
    """Takes the place of `RunTopics`."""

    def __init__(self, kafka: Kafka, settings: Settings, jobs: str, transactional_id: str) -> None:
        self.kafka = kafka
        self.jobs, self.endings = jobs, settings.topics.results
        self.names = {"jobs": jobs, "results": self.endings}
        self.jobs_positions: dict[int, int] = {}
        assert transactional_id.startswith("streamworker-batch.")

    def partitions(self, _: str) -> int:
        return 1

    async def open(self) -> None:
        self.kafka.opening()

    async def close(self) -> None: ...
    async def fence(self) -> None: ...

    async def ends(self, _: str) -> dict[int, int]:
        return {0: len(self.kafka.endings)}

    async def beginnings(self, _: str) -> dict[int, int]:
        return {0: 0}

    async def lost(self, topic: str, _: Any) -> set[int]:
        return self.kafka.lost_jobs if topic == self.jobs else self.kafka.lost_endings

    async def read_jobs(self, ids: JobIds, _: Any, found: Callable[[JobRef], None]) -> None:
        if not self.kafka.lost_jobs:
            for job_id in self.kafka.jobs:
                if (ref := ids.read(job_id.encode())) is not None:
                    found(ref)

    async def submit(self, records: list[tuple[bytes, bytes]]) -> None:
        for key, value in records:
            custom_id = json.loads(value)["metadata"]["custom_id"]
            self.kafka.jobs.append(key.decode())
            self.kafka.custom_ids[key.decode()] = custom_id
            if (status := self.kafka.answer(custom_id)) is not None:
                asyncio.get_running_loop().call_later(
                    0.001, partial(self.kafka.end, key.decode(), *status.split())
                )

    def follower(
        self, ids: JobIds, start: Mapping[int, int], wants: Callable[[JobRef], bool], on_ending: Any
    ) -> Follower:
        follower = self.kafka.follower = Follower()

        def ended(job: EndedJob) -> None:
            follower.tail.positions[0] = len(self.kafka.endings)
            ref = ids.read(job.job_id.encode())
            if ref is not None and wants(ref):
                on_ending(ref, job, 0, len(self.kafka.endings))

        self.kafka.readers.append(ended)
        follower.tail.on_stop = partial(self.kafka.readers.remove, ended)
        if not self.kafka.lost_endings:
            for job in self.kafka.endings[start.get(0, 0) :]:
                asyncio.get_running_loop().call_soon(ended, job)
        follower.tail.positions[0] = len(self.kafka.endings)
        return follower

    async def events_written(self) -> int:
        return self.kafka.events
