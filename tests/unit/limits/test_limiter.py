"""One upstream's limiter: circuit and limits together, and what a failure means for its job."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from streamworker.limits.circuit import Circuit, CircuitState
from streamworker.limits.estimate import TokenEstimate
from streamworker.limits.limiter import UpstreamLimiter, Verdict, counts_for_circuit
from streamworker.model import ErrorCode, JobError

BUSY = JobError(ErrorCode.RATE_LIMITED, "slow down", 429, retriable=True)
DOWN = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "down", 503, retriable=True)
BAD = JobError(ErrorCode.UPSTREAM_REJECTED, "no such parameter", 400)


def make_limiter(*, max_streams: int = 4, failures: int = 2, **limits: Any) -> UpstreamLimiter:
    circuit = Circuit(failures=failures, open_s=5)
    return UpstreamLimiter("a", circuit=circuit, max_streams=max_streams, **limits)


def test_limiter_allows_max_streams_calls() -> None:
    """The next call may begin when one has left."""
    limiter = make_limiter(max_streams=2)
    calls = [limiter.enter(None, 0), limiter.enter(None, 0)]
    assert limiter.wait_s(None, 0) == inf
    limiter.leave(calls[0], None)

    assert limiter.wait_s(None, 0) == 0
    assert limiter.streams == 1


def test_limiter_waits_for_the_longest_of_its_limits() -> None:
    """Requests and tokens are counted separately."""
    limiter = make_limiter(requests_per_minute=2, tokens_per_minute=1000)
    limiter.leave(limiter.enter(TokenEstimate(900, 50), 0), None)
    assert limiter.wait_s(TokenEstimate(10, 10), 1) == 0
    assert limiter.wait_s(TokenEstimate(90, 10), 1) == pytest.approx(60)
    limiter.leave(limiter.enter(TokenEstimate(10, 10), 20), None)

    assert limiter.wait_s(TokenEstimate(10, 10), 21) == pytest.approx(40)


def test_limiter_settles_tokens_when_a_call_has_left() -> None:
    """Tokens that were reserved and not used are free at once."""
    limiter = make_limiter(tokens_per_minute=1000)
    call = limiter.enter(TokenEstimate(100, 900), 0)
    assert limiter.wait_s(TokenEstimate(100, 100), 0) > 0
    limiter.leave(call, 120)

    assert limiter.wait_s(TokenEstimate(100, 100), 0) == 0


@pytest.mark.parametrize(("used", "wait_s"), [(120, 60), (None, 60), (5000, 60), (0, 0)])
def test_limiter_keeps_reserved_tokens_where_the_provider_counts_them(
    used: int | None, wait_s: float
) -> None:
    """Prompt and `max_tokens` count for a minute, whatever the call used; a refused call is not counted."""
    limiter = make_limiter(tokens_per_minute=1000, keeps_reserved_tokens=True)
    limiter.leave(limiter.enter(TokenEstimate(100, 900), 0), used)

    assert limiter.wait_s(TokenEstimate(100, 100), 1) == pytest.approx(wait_s)


def test_limiter_that_keeps_reserved_tokens_never_exceeds_the_limit_of_a_provider_that_counts_them() -> None:
    """Twenty calls that use a tenth of their `max_tokens`, one after another."""
    limiter = make_limiter(tokens_per_minute=2000, keeps_reserved_tokens=True)
    now = 0.0
    counted: list[tuple[float, int]] = []
    for _ in range(20):
        estimate = TokenEstimate(100, 400)
        now += limiter.wait_s(estimate, now)
        limiter.leave(limiter.enter(estimate, now), 140, 40)
        counted.append((now, 500))
        assert sum(tokens for at, tokens in counted if at > now - 60) <= 2000
        now += 1.0

    assert now < 20 * 500 / 2000 * 62


def test_limiter_learns_the_usual_length_of_completions() -> None:
    """A request that does not limit its completion is expected to be of the usual length."""
    limiter = make_limiter(tokens_per_minute=10_000)
    for _ in range(50):
        limiter.leave(limiter.enter(TokenEstimate(0), 0), 0, 4000)
    limiter.enter(TokenEstimate(0), 0)
    limiter.enter(TokenEstimate(0), 0)

    assert limiter.wait_s(TokenEstimate(0), 0) > 0


def test_limiter_refused_calls_lower_the_number_of_streams_but_open_no_circuit() -> None:
    """A 429 pauses the upstream and costs its job no try; it does not show that the upstream is unavailable."""
    limiter = make_limiter(max_streams=10)
    calls = [limiter.enter(None, 1) for _ in range(10)]
    for call in calls[:7]:
        limiter.answered(call, 1.5)
    verdicts = [limiter.failed(call, BUSY, 2) for call in calls[7:]]
    for call in calls[6:]:
        limiter.leave(call, 0)

    assert verdicts == [Verdict.WAIT] * 3
    assert (limiter.limit(2), limiter.is_limited(2)) == (7, True)
    assert limiter.pause_s(2) == limiter.wait_s(None, 2) == 0.5
    assert not limiter.is_open


def test_limiter_429_that_is_not_retriable_lowers_no_limit() -> None:
    """Such a refusal says nothing about the number of streams."""
    limiter = make_limiter(max_streams=10)
    call = limiter.enter(None, 1)
    limiter.failed(call, JobError(ErrorCode.RATE_LIMITED, "not you", 429), 2)

    assert limiter.limit(2) == 10


def test_limiter_failures_of_the_upstream_open_the_circuit_and_refusals_of_jobs_do_not() -> None:
    """A refused request shows that the upstream works."""
    limiter = make_limiter()
    for error in (DOWN, BAD, DOWN):
        call = limiter.enter(None, 0)
        limiter.failed(call, error, 0)
        limiter.leave(call, 0)
    assert not limiter.is_open
    limiter.failed(limiter.enter(None, 0), DOWN, 0)

    assert limiter.is_open
    assert limiter.wait_s(None, 1) == 4


def test_limiter_probe_that_leaves_without_a_result_is_followed_by_another() -> None:
    """The job of the probe may be cancelled."""
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
def test_failures_that_count_for_the_circuit(code: ErrorCode, retriable: bool, own: bool) -> None:
    """Other failures concern the call."""
    assert counts_for_circuit(JobError(code, "", retriable=retriable)) is own


def test_limiter_ignores_absurd_completions() -> None:
    """One absurd usage report must not delay all later calls."""
    limiter = make_limiter(tokens_per_minute=1_000_000)
    limiter.leave(limiter.enter(TokenEstimate(0), 0), 1 << 40, 1 << 40)

    assert limiter.wait_s(TokenEstimate(0), 62) == 0
    limiter.enter(TokenEstimate(0), 62)
    assert limiter.wait_s(TokenEstimate(0), 62) == 0


REFUSED = JobError(ErrorCode.AUTH, "no such key", 401)
FORBIDDEN = JobError(ErrorCode.AUTH, "not this prompt", 403)
EMPTY = JobError(ErrorCode.QUOTA, "insufficient_quota", 429)


def fail(limiter: UpstreamLimiter, error: JobError, job_id: str = "a", **options: Any) -> Verdict:
    """Make one call that fails."""
    slot = limiter.enter(None, 0)
    verdict = limiter.failed(slot, error, 0, job_id=job_id, **options)
    limiter.leave(slot, 0)
    return verdict


def test_limiter_refused_key_holds_the_upstream_at_once() -> None:
    """A 401 concerns every job, so its job waits too."""
    limiter = make_limiter()

    assert fail(limiter, REFUSED) is Verdict.WAIT
    assert limiter.is_open


@pytest.mark.parametrize("error", [FORBIDDEN, EMPTY, JobError(ErrorCode.QUOTA, "pay", 402)])
def test_limiter_ambiguous_refusal_holds_the_upstream_after_three_jobs(error: JobError) -> None:
    """Until then a refused job is called once more while other jobs show whether they are refused too."""
    limiter = make_limiter()

    assert fail(limiter, error, "a", has_others=True) is Verdict.REPEAT
    assert fail(limiter, error, "b", has_others=True) is Verdict.REPEAT
    assert fail(limiter, error, "c", has_others=True) is Verdict.WAIT
    assert limiter.is_open


def test_limiter_ambiguous_refusal_of_a_single_job_is_its_own() -> None:
    """One moderated prompt holds no upstream."""
    limiter = make_limiter()

    assert fail(limiter, FORBIDDEN) is Verdict.OWN
    assert fail(limiter, FORBIDDEN, has_others=True, is_repeated=True) is Verdict.OWN
    assert not limiter.is_open


def test_limiter_failure_that_opens_the_circuit_lets_its_job_wait() -> None:
    """The upstream is unavailable for every job; a try is spent only while that is not known."""
    limiter = make_limiter(failures=2)

    assert [fail(limiter, DOWN) for _ in range(2)] == [Verdict.OWN, Verdict.WAIT]


def test_limiter_probe_of_an_empty_account_learns_nothing_from_a_bad_request() -> None:
    """Many upstreams validate the request before they look at the account."""
    limiter = make_limiter()
    for job_id in ("a", "b", "c"):
        fail(limiter, EMPTY, job_id)
    probe = limiter.enter(None, 5)

    assert limiter.failed(probe, BAD, 5) is Verdict.OWN
    assert limiter.circuit.state is CircuitState.HALF_OPEN
    assert limiter.wait_s(None, 5) == 0
