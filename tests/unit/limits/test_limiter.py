"""One upstream's gate: circuit and limits together."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from streamworker.limits.circuit import Circuit
from streamworker.limits.estimate import TokenEstimate
from streamworker.limits.limiter import UpstreamLimiter, counts_for_circuit
from streamworker.model import ErrorCode, JobError

BUSY = JobError(ErrorCode.RATE_LIMITED, "slow down", 429, retriable=True)
DOWN = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "down", 503, retriable=True)
BAD = JobError(ErrorCode.UPSTREAM_REJECTED, "no such parameter", 400)


def make_limiter(*, max_streams: int = 4, failures: int = 2, **limits: Any) -> UpstreamLimiter:
    circuit = Circuit(failures=failures, open_s=5)
    return UpstreamLimiter("a", circuit=circuit, max_streams=max_streams, **limits)


def test_limiter_lets_as_many_streams_in_as_are_allowed() -> None:
    """The next one when one has left."""
    limiter = make_limiter(max_streams=2)
    calls = [limiter.enter(None, 0), limiter.enter(None, 0)]
    assert limiter.wait_s(None, 0) == inf
    limiter.leave(calls[0], None)

    assert limiter.wait_s(None, 0) == 0
    assert limiter.streams == 1


def test_limiter_waits_for_the_longest_of_its_limits() -> None:
    """Requests and tokens are counted apart."""
    limiter = make_limiter(requests_per_minute=2, tokens_per_minute=1000)
    limiter.leave(limiter.enter(TokenEstimate(900, 50), 0), None)
    assert limiter.wait_s(TokenEstimate(10, 10), 1) == 0
    assert limiter.wait_s(TokenEstimate(90, 10), 1) == pytest.approx(60)
    limiter.leave(limiter.enter(TokenEstimate(10, 10), 20), None)

    assert limiter.wait_s(TokenEstimate(10, 10), 21) == pytest.approx(40)


def test_limiter_settles_tokens_when_a_call_has_left() -> None:
    """What was reserved and not used makes room at once."""
    limiter = make_limiter(tokens_per_minute=1000)
    call = limiter.enter(TokenEstimate(100, 900), 0)
    assert limiter.wait_s(TokenEstimate(100, 100), 0) > 0
    limiter.leave(call, 120)

    assert limiter.wait_s(TokenEstimate(100, 100), 0) == 0


def test_limiter_learns_how_long_completions_usually_are() -> None:
    """A request that does not limit its completion is expected to be as the others were."""
    limiter = make_limiter(tokens_per_minute=10_000)
    for _ in range(50):
        limiter.leave(limiter.enter(TokenEstimate(0), 0), 0, 4000)
    limiter.enter(TokenEstimate(0), 0)
    limiter.enter(TokenEstimate(0), 0)

    assert limiter.wait_s(TokenEstimate(0), 0) > 0


def test_limiter_refused_calls_lower_the_number_of_streams_but_open_no_circuit() -> None:
    """An upstream that says 429 is alive."""
    limiter = make_limiter(max_streams=10)
    calls = [limiter.enter(None, 1) for _ in range(10)]
    for call in calls:
        limiter.failed(call, BUSY, 2)

    assert limiter.limit(2) == 7
    assert not limiter.is_open


def test_limiter_empty_account_is_no_congestion() -> None:
    """A 429 that patience does not mend says nothing of how many streams fit."""
    limiter = make_limiter(max_streams=10)
    call = limiter.enter(None, 1)
    limiter.failed(call, JobError(ErrorCode.RATE_LIMITED, "insufficient_quota", 429), 2)

    assert limiter.limit(2) == 10


def test_limiter_failures_of_the_upstream_open_the_circuit_and_refusals_of_jobs_do_not() -> None:
    """A bad request says that somebody is there."""
    limiter = make_limiter()
    for error in (DOWN, BAD, DOWN):
        call = limiter.enter(None, 0)
        limiter.failed(call, error, 0)
        limiter.leave(call, 0)
    assert not limiter.is_open
    limiter.failed(limiter.enter(None, 0), DOWN, 0)

    assert limiter.is_open
    assert limiter.wait_s(None, 1) == 4


def test_limiter_probe_that_leaves_without_a_verdict_lets_the_next_one_probe() -> None:
    """Its job was cancelled or lost."""
    limiter = make_limiter(failures=1)
    limiter.failed(limiter.enter(None, 0), DOWN, 0)
    probe = limiter.enter(None, 5)
    assert limiter.wait_s(None, 5) == inf
    limiter.leave(probe, None)

    assert limiter.wait_s(None, 5) == 0


@pytest.mark.parametrize(
    ("code", "retriable", "own"),
    [
        (ErrorCode.UPSTREAM_UNAVAILABLE, False, True),
        (ErrorCode.TIMEOUT_CONNECT, True, True),
        (ErrorCode.TIMEOUT_FIRST_DELTA, True, True),
        (ErrorCode.UPSTREAM_PROTOCOL, False, True),
        (ErrorCode.TRUNCATED, True, True),
        (ErrorCode.UPSTREAM_ERROR, True, True),
        (ErrorCode.UPSTREAM_ERROR, False, False),
        (ErrorCode.AUTH, False, False),
        (ErrorCode.RATE_LIMITED, True, False),
        (ErrorCode.UPSTREAM_REJECTED, True, False),
    ],
)
def test_failures_that_are_the_upstreams_own(code: ErrorCode, retriable: bool, own: bool) -> None:
    """The others are about the call."""
    assert counts_for_circuit(JobError(code, "", retriable=retriable)) is own


def test_limiter_believes_no_absurd_completion_to_be_usual() -> None:
    """One upstream's nonsense must not hold back all calls that come after."""
    limiter = make_limiter(tokens_per_minute=1_000_000)
    limiter.leave(limiter.enter(TokenEstimate(0), 0), 1 << 40, 1 << 40)

    assert limiter.wait_s(TokenEstimate(0), 62) == 0
    limiter.enter(TokenEstimate(0), 62)
    assert limiter.wait_s(TokenEstimate(0), 62) == 0
