"""One job against an upstream with sockets: the real client and the real execution, everything else in memory.

The only place in this room that knows how an execution is put together.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from streamworker.config import UpstreamSettings
from streamworker.model import Coordinates, ErrorCode, Job, TopicPartition
from streamworker.testing import MemoryClock, MemoryCommitStores, MemoryObserver, MemorySink
from streamworker.upstream.client import HttpUpstream
from streamworker.worker.committer import PartitionCommitter
from tests.streams import NOW, make_job
from tests.unit.worker.bench import JOBS, OneAttempt, events, make_policy, make_queues, make_tools

if TYPE_CHECKING:
    import httpx

    from streamworker.model import JobError, UsageEvent

__all__ = ["CONNECT_S", "FIRST_DELTA_S", "IDLE_S", "MESSAGES", "Outcome", "run_job"]

CONNECT_S = 5.0
FIRST_DELTA_S = 60.0
IDLE_S = 30.0
MESSAGES = [{"role": "user", "content": "Count from 1 to 10."}]


class LoopClock(MemoryClock):
    """Everyone's time is the loop's."""

    def __init__(self) -> None:
        super().__init__(NOW)
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return NOW + round((self._loop.time() - self._began) * 1000)

    def monotonic(self) -> float:
        """Seconds of the loop's clock."""
        return self._loop.time()


class Outcome(NamedTuple):
    """How a job ended, and what the observer was notified of. `delays` are the seconds before each further try."""

    end: UsageEvent
    delays: list[float]
    seconds: float
    deltas: list[dict[str, Any]]

    @property
    def error(self) -> JobError:
        """The terminal event's error; raises AssertionError if there is none."""
        assert self.end.error is not None, f"the job ended {self.end.status} without an error"
        return self.end.error

    @property
    def code(self) -> ErrorCode | None:
        """The error's code, None without an error."""
        return None if self.end.error is None else self.end.error.code

    def text(self, member: str = "content") -> str:
        """What the deltas of choice 0 say, put together."""
        said = [event["delta"].get(member) for event in self.deltas if event["choice"] == 0]
        return "".join(part for part in said if isinstance(part, str))


async def run_job(
    base_url: str,
    *,
    model: str = "m",
    max_tries: int = 3,
    job: dict[str, Any] | None = None,
    cancel_at_s: float | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    **policy: Any,
) -> Outcome:
    """Run one job to its terminal event. `policy` are settings of the upstream."""
    settings = UpstreamSettings(base_url=base_url, connect_timeout_s=CONNECT_S)
    client = HttpUpstream(settings, transport=transport)
    given = {
        "first_delta_timeout_s": FIRST_DELTA_S,
        "idle_timeout_s": IDLE_S,
        "max_tries": max_tries,
    } | policy
    broker, sink, observer = MemoryCommitStores(), MemorySink(), MemoryObserver()
    committer = PartitionCommitter(JOBS, broker.store(JOBS), commit_id="me", lost=lambda _: None)
    await committer.open()
    committer.progress.begin(7)
    committer.progress.count(7)
    committing = asyncio.create_task(committer.run())
    runner = OneAttempt(
        make_tools(
            sink, LoopClock(), observer, make_queues(observer, {"default": make_policy(client, **given)})
        ),
        _job(model, job or {}),
        committer,
        to=TopicPartition("events", 2),
        upstream="default",
    )
    loop = asyncio.get_running_loop()
    began = loop.time()
    if cancel_at_s is not None:
        loop.call_later(cancel_at_s, runner.cancel, "the reader has gone")
    try:
        end = await runner.play()
        seconds = loop.time() - began
    finally:
        committing.cancel()
        await asyncio.gather(committing, return_exceptions=True)
        await committer.close()
        await client.close()
    delays = [told[3] for told in observer.all("try_failed")]
    assert all(isinstance(delay, float) for delay in delays)
    return Outcome(end, delays, seconds, events(sink.records))  # type: ignore[arg-type]


def _job(model: str, members: dict[str, Any]) -> Job:
    job = make_job(source=Coordinates("jobs", 0, 7), model=model, **members)
    request = {"model": model, "messages": MESSAGES}
    return msgspec.structs.replace(
        job, request={name: msgspec.Raw(json.dumps(value).encode()) for name, value in request.items()}
    )
