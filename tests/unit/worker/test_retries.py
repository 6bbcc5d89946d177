"""Tries that fail before the first delta."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.errors import UpstreamError
from streamworker.model import Advice, Coordinates, ErrorCode, JobError, TopicPartition
from streamworker.testing import (
    MemoryClock,
    MemoryCommitStores,
    MemoryObserver,
    MemorySink,
    MemoryUpstream,
    Script,
)
from streamworker.worker.committer import PartitionCommitter
from tests.streams import NOW, data, make_job
from tests.unit.worker.bench import JOBS, OneAttempt, events, make_policy, make_queues, make_tools, said, word

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.model import UsageEvent
    from streamworker.testing import Step

BUSY = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "busy", 503, retriable=True)
NO_MONEY = JobError(ErrorCode.RATE_LIMITED, "insufficient quota", 429, retriable=False)
ERROR_FRAME = data(b'{"error":{"message":"overloaded","code":503}}')


def refused(error: JobError, advice: Advice | None = None) -> Script:
    """A call that is answered with an error."""
    return Script([], before=[UpstreamError(error, advice)])


class Run:
    """One execution against an upstream in memory, call by call."""

    def __init__(self, *scripts: Script | Iterable[Step], max_tries: int = 3, **options: Any) -> None:
        self.upstream = MemoryUpstream(*scripts)
        self.broker = MemoryCommitStores()
        self.sink = MemorySink()
        self.observer = MemoryObserver()
        self.began = 0.0
        self.ended = 0.0
        self._policy = make_policy(self.upstream, max_tries=max_tries, max_restarts=1)
        self._options = options

    async def play(self) -> UsageEvent:
        """Run the job with a committer of its own."""
        committer = PartitionCommitter(JOBS, self.broker.store(JOBS), commit_id="me", lost=lambda _: None)
        await committer.open()
        committer.progress.begin(7)
        committer.progress.count(7)
        committing = asyncio.create_task(committer.run())
        queues = make_queues(self.observer, {"default": self._policy})
        runner = OneAttempt(
            make_tools(self.sink, MemoryClock(NOW), self.observer, queues),
            make_job(source=Coordinates("jobs", 0, 7), **self._options),
            committer,
            to=TopicPartition("events", 2),
            upstream="default",
        )
        self.began = asyncio.get_running_loop().time()
        event = await runner.play()
        self.ended = asyncio.get_running_loop().time()
        committing.cancel()
        await asyncio.gather(committing, return_exceptions=True)
        await committer.close()
        return event

    @property
    def text(self) -> str:
        return "".join(event["delta"].get("content", "") for event in events(self.sink.records))


async def test_try_that_fails_before_the_first_delta_is_followed_by_another() -> None:
    """One attempt makes two calls; readers see one stream without a gap."""
    run = Run(refused(BUSY), said("all ", "well"))
    event = await run.play()

    assert (event.status, event.error, event.tries) == ("completed", None, 2)
    assert run.text == "all well"
    written = [*events(run.broker.records()), *events(run.sink.records)]
    assert sorted(one["seq"] for one in written) == list(range(len(written)))
    assert [arguments[2] for arguments in run.observer.all("try_failed")] == [BUSY]


@pytest.mark.parametrize(
    "first",
    [
        pytest.param([ERROR_FRAME], id="error frame"),
        pytest.param([], id="empty stream"),
        pytest.param([b": ping\n\n", UpstreamError(BUSY)], id="break after a ping"),
        pytest.param([data(b"not json")], id="no json"),
    ],
)
async def test_stream_that_fails_without_a_delta_is_retried(first: list[Step]) -> None:
    """Nothing was published, so nothing is repeated."""
    run = Run(first, said("well"))
    event = await run.play()

    assert (event.status, event.tries, run.text) == ("completed", 2, "well")


async def test_try_that_fails_after_the_first_delta_is_the_last() -> None:
    """Published deltas are paid for; another call would repeat them."""
    run = Run([word("half"), UpstreamError(BUSY)], said("never called"))
    event = await run.play()

    assert (event.status, event.tries, len(run.upstream.calls)) == ("interrupted", 1, 1)


async def test_try_with_a_permanent_error_is_the_last() -> None:
    """An empty account is not retried, also under a status that usually is."""
    run = Run(refused(NO_MONEY), said("never called"))
    event = await run.play()

    assert (event.status, event.error, event.tries) == ("failed", NO_MONEY, 1)


async def test_tries_are_bounded_and_the_last_error_is_kept() -> None:
    """The job fails after `max_tries` calls."""
    run = Run(refused(BUSY), max_tries=3)
    event = await run.play()

    assert (event.status, event.error, event.tries, len(run.upstream.calls)) == ("failed", BUSY, 3, 3)


async def test_next_try_waits_as_long_as_the_upstream_asks() -> None:
    """`retry-after` replaces the worker's own backoff."""
    run = Run(refused(BUSY, Advice(after_s=7.5)), said("well"))
    await run.play()

    assert run.ended - run.began == pytest.approx(7.5, abs=0.01)


async def test_deadline_before_the_next_try_ends_the_job_at_once() -> None:
    """A try that the deadline leaves no time for is not waited for."""
    run = Run(refused(BUSY, Advice(after_s=30)), said("never called"), deadline=NOW / 1000 + 10)
    event = await run.play()

    assert (event.status, event.error) == ("failed", BUSY)
    assert run.ended - run.began < 0.01


async def test_first_delta_timeout_is_a_failed_try() -> None:
    """A generation that does not begin is retried, each time with the full timeout."""
    silence: list[Step] = [1000.0]
    run = Run(silence, said("well"))
    event = await run.play()

    assert (event.status, event.tries) == ("completed", 2)
    assert 60 <= run.ended - run.began <= 61


async def test_usage_of_a_failed_try_is_not_that_of_the_next() -> None:
    """A report of another call is never used for unknown usage."""
    reported = data(b'{"choices":[],"usage":{"prompt_tokens":99}}')
    run = Run([reported, ERROR_FRAME], said("well"))
    event = await run.play()

    assert (event.usage_source, event.usage) == ("estimated", {"completion_tokens": 1})
