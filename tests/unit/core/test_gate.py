"""One upstream's gate: circuit and limits together."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from streamworker.core.demand import Demand
from streamworker.core.gate import Gate, GateRules, is_upstreams_own
from streamworker.model import ErrorCode, JobError

BUSY = JobError(ErrorCode.RATE_LIMITED, "slow down", 429, retriable=True)
DOWN = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "down", 503, retriable=True)
BAD = JobError(ErrorCode.UPSTREAM_REJECTED, "no such parameter", 400)


def make_gate(**rules: Any) -> Gate:
    given: dict[str, Any] = {"max_streams": 4, "circuit_failures": 2, "circuit_open_s": 5}
    return Gate(GateRules(**(given | rules)))


def test_gate_lets_as_many_streams_in_as_are_allowed() -> None:
    """The next one when one has left."""
    gate = make_gate(max_streams=2)
    calls = [gate.enter(None, 0), gate.enter(None, 0)]
    assert gate.wait_s(None, 0) == inf
    gate.leave(calls[0], None)

    assert gate.wait_s(None, 0) == 0
    assert gate.streams == 1


def test_gate_waits_for_the_longest_of_its_limits() -> None:
    """Requests and tokens are counted apart."""
    gate = make_gate(requests_per_minute=2, tokens_per_minute=1000)
    gate.leave(gate.enter(Demand(900, 50), 0), None)
    assert gate.wait_s(Demand(10, 10), 1) == 0
    assert gate.wait_s(Demand(90, 10), 1) == pytest.approx(60)
    gate.leave(gate.enter(Demand(10, 10), 20), None)

    assert gate.wait_s(Demand(10, 10), 21) == pytest.approx(40)


def test_gate_settles_tokens_when_a_call_has_left() -> None:
    """What was reserved and not used makes room at once."""
    gate = make_gate(tokens_per_minute=1000)
    call = gate.enter(Demand(100, 900), 0)
    assert gate.wait_s(Demand(100, 100), 0) > 0
    gate.leave(call, 120)

    assert gate.wait_s(Demand(100, 100), 0) == 0


def test_gate_learns_how_long_completions_usually_are() -> None:
    """A request that does not limit its completion is expected to be as the others were."""
    gate = make_gate(tokens_per_minute=10_000)
    for _ in range(50):
        gate.leave(gate.enter(Demand(0), 0), 0, 4000)
    gate.enter(Demand(0), 0)
    gate.enter(Demand(0), 0)

    assert gate.wait_s(Demand(0), 0) > 0


def test_gate_refused_calls_lower_the_number_of_streams_but_open_no_circuit() -> None:
    """An upstream that says 429 is alive."""
    gate = make_gate(max_streams=10)
    calls = [gate.enter(None, 1) for _ in range(10)]
    for call in calls:
        gate.failed(call, BUSY, 2)

    assert gate.limit(2) == 7
    assert not gate.is_open


def test_gate_empty_account_is_no_congestion() -> None:
    """A 429 that patience does not mend says nothing of how many streams fit."""
    gate = make_gate(max_streams=10)
    call = gate.enter(None, 1)
    gate.failed(call, JobError(ErrorCode.RATE_LIMITED, "insufficient_quota", 429), 2)

    assert gate.limit(2) == 10


def test_gate_failures_of_the_upstream_open_the_circuit_and_refusals_of_jobs_do_not() -> None:
    """A bad request says that somebody is there."""
    gate = make_gate()
    for error in (DOWN, BAD, DOWN):
        call = gate.enter(None, 0)
        gate.failed(call, error, 0)
        gate.leave(call, 0)
    assert not gate.is_open
    gate.failed(gate.enter(None, 0), DOWN, 0)

    assert gate.is_open
    assert gate.wait_s(None, 1) == 4


def test_gate_probe_that_leaves_without_a_verdict_lets_the_next_one_probe() -> None:
    """Its job was cancelled or lost."""
    gate = make_gate(circuit_failures=1)
    gate.failed(gate.enter(None, 0), DOWN, 0)
    probe = gate.enter(None, 5)
    assert gate.wait_s(None, 5) == inf
    gate.leave(probe, None)

    assert gate.wait_s(None, 5) == 0


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
    assert is_upstreams_own(JobError(code, "", retriable=retriable)) is own


def test_gate_believes_no_absurd_completion_to_be_usual() -> None:
    """One upstream's nonsense must not hold back all calls that come after."""
    gate = make_gate(tokens_per_minute=1_000_000)
    gate.leave(gate.enter(Demand(0), 0), 1 << 40, 1 << 40)

    assert gate.wait_s(Demand(0), 62) == 0
    gate.enter(Demand(0), 62)
    assert gate.wait_s(Demand(0), 62) == 0
