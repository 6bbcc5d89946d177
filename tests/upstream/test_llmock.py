"""Faults of llmock, an upstream that others wrote, and its verdict on the worker as a client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from streamworker.model import ErrorCode, Status
from tests.upstream.one_job import run_job

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmock.pytest_plugin import LLMock

    from tests.upstream.one_job import Outcome

COMPLETED, FAILED, INTERRUPTED = Status.COMPLETED, Status.FAILED, Status.INTERRUPTED


@pytest.fixture
def upstream(llmock: LLMock) -> Iterator[LLMock]:
    """A server without faults; the verdict on all its requests is taken in the end.

    It takes every stream without a finish reason that is not called again for one that was accepted. The worker reports
    such a stream as interrupted instead, because a repetition would be paid twice: tests check that.
    """
    yield llmock
    verdict = llmock.verdict()
    errors = [finding for finding in verdict.errors if finding.code != "truncated_stream_accepted"]
    assert not errors, verdict.render()


async def run(upstream: LLMock, **options: Any) -> Outcome:
    return await run_job(upstream.base_url(), model="gpt-4o", **options)


async def test_llmock_without_a_fault_gives_the_whole_answer(upstream: LLMock) -> None:
    """Text, finish reason and usage."""
    upstream.reply("All of it, word by word.")
    outcome = await run(upstream)

    assert (outcome.end.status, outcome.text()) == (COMPLETED, "All of it, word by word.")
    assert outcome.end.usage_source == "upstream"


async def test_llmock_tool_call_is_passed_on(upstream: LLMock) -> None:
    """The fragments of its arguments are one call's."""
    upstream.call_tool("get_weather", {"city": "Paris"})
    outcome = await run(upstream)
    fragments = [
        call["function"].get("arguments", "")
        for event in outcome.deltas
        for call in event["delta"].get("tool_calls") or ()
    ]

    assert outcome.end.status is COMPLETED
    assert "Paris" in "".join(fragments)


async def test_llmock_rate_limit_is_waited_for(upstream: LLMock) -> None:
    """As long as it asks; then the answer is complete."""
    upstream.rate_limit(times=2, retry_after=0.3)
    outcome = await run(upstream, max_tries=3)

    assert outcome.end.status is COMPLETED
    assert outcome.seconds >= 0.6


async def test_llmock_outage_of_two_calls_is_retried(upstream: LLMock) -> None:
    """503 is retried with backoff."""
    upstream.fail(503, times=2)
    outcome = await run(upstream, max_tries=3)

    assert (outcome.end.status, outcome.end.tries) == (COMPLETED, 3)


@pytest.mark.parametrize(
    ("status", "code"), [(400, ErrorCode.UPSTREAM_REJECTED), (404, ErrorCode.UPSTREAM_REJECTED)]
)
async def test_llmock_refusal_is_called_once(upstream: LLMock, status: int, code: ErrorCode) -> None:
    """A repetition would not help."""
    upstream.fail(status, times=None, message="in its own words")
    outcome = await run(upstream)

    assert (outcome.end.status, outcome.code, outcome.end.tries) == (FAILED, code, 1)
    assert "in its own words" in outcome.error.message
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("disconnect", ErrorCode.TRUNCATED),
        ("truncate", ErrorCode.TRUNCATED),
        ("corrupt", ErrorCode.UPSTREAM_PROTOCOL),
    ],
)
async def test_llmock_broken_stream_is_interrupted_and_keeps_its_text(
    upstream: LLMock, fault: str, code: ErrorCode
) -> None:
    """A stream that ends without a finish reason is not an answer, and is not repeated."""
    upstream.reply("one two three four five six seven eight")
    getattr(upstream, fault)(after_chunks=4)
    outcome = await run(upstream)

    assert (outcome.end.status, outcome.code) == (INTERRUPTED, code)
    assert outcome.text().startswith("one")
    assert len(upstream.requests) == 1


async def test_llmock_stall_ends_with_the_idle_timeout(upstream: LLMock) -> None:
    """The worker does not sit through it."""
    upstream.stall(after_chunks=4, seconds=10)
    outcome = await run(upstream, idle_timeout_s=0.3)

    assert (outcome.end.status, outcome.code) == (INTERRUPTED, ErrorCode.TIMEOUT_IDLE)
    assert outcome.seconds < 5
