"""The circuit of an upstream: when it opens and why, which calls probe, when it closes."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.limits.circuit import (
    MAX_OPEN_S,
    MIN_OPEN_S,
    PROBE_GRACE_S,
    Circuit,
    CircuitState,
    HoldReason,
)

CLOSED, HALF_OPEN, OPEN = CircuitState.CLOSED, CircuitState.HALF_OPEN, CircuitState.OPEN


def opened(now: float = 0) -> Circuit:
    circuit = Circuit(failures=3, open_s=5)
    for _ in range(3):
        circuit.failed(now, began=now)
    assert circuit.state is OPEN
    return circuit


def test_circuit_opens_after_consecutive_failures() -> None:
    """A success between them restarts the count."""
    circuit = Circuit(failures=3, open_s=5)
    for fails in (True, True, False, True, True):
        circuit.failed(0, began=0) if fails else circuit.succeeded(5)
    assert circuit.state is CLOSED
    assert circuit.wait_s(0) == 0
    circuit.failed(0, began=0)

    assert circuit.state is OPEN


def test_circuit_open_lets_one_probe_through() -> None:
    """Other calls wait for its result."""
    circuit = opened()
    assert circuit.wait_s(1) == 4
    assert circuit.wait_s(5) == 0
    assert circuit.enter(5)

    assert circuit.state is HALF_OPEN
    assert circuit.wait_s(5) == inf


def test_circuit_closes_when_the_probe_succeeds() -> None:
    """Afterwards it opens after as many failures, and for as short a time, as at first."""
    circuit = opened()
    circuit.enter(5)
    circuit.succeeded(5)
    assert circuit.state is CLOSED
    assert not circuit.enter(5)
    for _ in range(3):
        circuit.failed(10, began=10)

    assert circuit.wait_s(10) == 5


def test_circuit_probe_that_fails_doubles_the_time_to_the_next_up_to_a_bound() -> None:
    """An unavailable upstream is probed less and less often, but forever."""
    circuit, now, waits = opened(), 0.0, []
    for _ in range(6):
        waits.append(circuit.wait_s(now))
        now += waits[-1]
        circuit.enter(now)
        circuit.failed(now, began=now)

    assert waits == [5, 10, 20, MAX_OPEN_S, MAX_OPEN_S, MAX_OPEN_S]


def test_circuit_probe_without_a_result_is_followed_by_another() -> None:
    """The job of the probe may be cancelled."""
    circuit = opened()
    circuit.enter(5)
    circuit.probe_abandoned()

    assert circuit.wait_s(5) == 0


def test_circuit_open_ignores_results_of_earlier_calls() -> None:
    """They began before the circuit opened."""
    circuit = opened()
    circuit.succeeded(5)
    circuit.failed(4, began=4)

    assert circuit.state is OPEN
    assert circuit.wait_s(4) == 1


def test_circuit_late_failures_of_old_calls_do_not_count_against_a_probe() -> None:
    """Calls that hung when the upstream died reach their timeouts after it is back."""
    circuit = opened()
    circuit.enter(5)
    for _ in range(100):
        circuit.failed(6, began=4)
    assert circuit.state is HALF_OPEN
    circuit.succeeded(7)
    for _ in range(100):
        circuit.failed(8, began=4)

    assert circuit.state is CLOSED


def refuse(
    circuit: Circuit, *jobs: str, now: float = 0, began: float | None = None, is_certain: bool = False
) -> None:
    for job in jobs:
        at = now if began is None else began
        circuit.refused(now, HoldReason.ACCOUNT_EMPTY, job, began=at, is_certain=is_certain)


def test_circuit_opens_at_once_for_a_certain_refusal() -> None:
    """A 401 concerns every job."""
    circuit = Circuit(failures=3, open_s=5)
    circuit.refused(0, HoldReason.KEY_REFUSED, "a", began=0, is_certain=True)

    assert (circuit.state, circuit.reason) == (OPEN, HoldReason.KEY_REFUSED)


def test_circuit_opens_after_refusals_of_different_jobs() -> None:
    """One job that is refused again and again may be the only one that is refused."""
    circuit = Circuit(failures=3, open_s=5)
    refuse(circuit, "a", "a", "b", "a", "b")
    assert circuit.state is CLOSED
    refuse(circuit, "c")

    assert (circuit.state, circuit.reason) == (OPEN, HoldReason.ACCOUNT_EMPTY)


def test_circuit_success_between_refusals_restarts_their_count() -> None:
    """The key and the account work."""
    circuit = Circuit(failures=3, open_s=5)
    refuse(circuit, "a", "b")
    circuit.succeeded(0)
    refuse(circuit, "c", "d")

    assert circuit.state is CLOSED


def test_circuit_refusals_of_different_kinds_are_counted_apart() -> None:
    """A refused key says nothing about the account."""
    circuit = Circuit(failures=3, open_s=5)
    refuse(circuit, "a", "b")
    circuit.refused(0, HoldReason.KEY_REFUSED, "c", began=0, is_certain=False)

    assert circuit.state is CLOSED


def test_circuit_probe_that_is_refused_opens_it_again() -> None:
    """One refusal of a probe is enough."""
    circuit = opened()
    circuit.enter(5)
    refuse(circuit, "a", now=5)

    assert (circuit.state, circuit.reason, circuit.wait_s(5)) == (OPEN, HoldReason.ACCOUNT_EMPTY, 10)


def test_circuit_probe_soon_is_made_now_but_not_again_within_a_second() -> None:
    """A key that was replaced is tried at once; a wait that is about to end does not cause a burst of probes."""
    circuit = opened()
    circuit.probe_soon(0.5)
    assert circuit.wait_s(0.5) == MIN_OPEN_S - 0.5
    circuit.probe_soon(3)

    assert circuit.wait_s(3) == 0


def test_circuit_that_closes_after_several_probes_opens_for_as_short_a_time_as_at_first() -> None:
    """The next outage has nothing to do with the last one."""
    circuit = opened()
    circuit.enter(5)
    circuit.failed(5, began=5)
    assert circuit.wait_s(5) == 10
    circuit.enter(15)
    circuit.succeeded(15)
    for _ in range(3):
        circuit.failed(20, began=20)

    assert circuit.wait_s(20) == 5


def test_circuit_open_counts_no_failure_of_a_call_that_began_when_it_opened() -> None:
    """Calls end one after another when an upstream dies: the last of them does not put the probe off."""
    circuit = opened(now=0)
    circuit.failed(4, began=0)
    refuse(circuit, "a", now=4, began=0, is_certain=True)

    assert (circuit.wait_s(4), circuit.reason) == (1, HoldReason.UNAVAILABLE)
    assert circuit.wait_s(5) == 0


def test_circuit_that_a_refusal_opened_opens_again_for_a_probe_that_fails_otherwise() -> None:
    """One failure of a probe is enough, although the upstream was not unavailable before."""
    circuit = Circuit(failures=3, open_s=5)
    refuse(circuit, "a", is_certain=True)
    circuit.enter(5)
    circuit.failed(5, began=5)

    assert (circuit.state, circuit.reason, circuit.wait_s(5)) == (OPEN, HoldReason.UNAVAILABLE, 10)


def test_circuit_late_refusals_of_old_calls_do_not_count() -> None:
    """They are of the former key: neither against a probe with the new one, nor after its success."""
    circuit = opened()
    circuit.enter(5)
    refuse(circuit, "a", now=6, began=4, is_certain=True)
    assert circuit.state is HALF_OPEN
    circuit.succeeded(7)
    refuse(circuit, "b", "c", "d", now=8, began=6, is_certain=True)

    assert circuit.state is CLOSED


def test_circuit_late_failures_of_calls_beside_a_probe_do_not_count_after_its_success() -> None:
    """A call that began before the circuit closed says nothing about the upstream that works again."""
    circuit = opened()
    circuit.enter(5)
    circuit.succeeded(7)
    for _ in range(3):
        circuit.failed(8, began=6)
    assert circuit.state is CLOSED
    for _ in range(3):
        circuit.failed(8, began=7)

    assert circuit.state is OPEN


@pytest.mark.parametrize(
    ("now", "is_probing"), [(5, True), (5 + PROBE_GRACE_S - 0.1, True), (5 + PROBE_GRACE_S, False)]
)
def test_circuit_is_probing_for_a_while_after_a_probe_began(now: float, *, is_probing: bool) -> None:
    """A job whose wait is over waits for its result, but not for a probe that hangs."""
    circuit = opened()
    circuit.enter(5)

    assert circuit.is_probing(now) is is_probing


def test_circuit_is_not_probing_without_a_probe() -> None:
    """Neither closed nor open, nor half-open when the probe was abandoned."""
    assert not Circuit(failures=3, open_s=5).is_probing(0)
    circuit = opened()
    assert not circuit.is_probing(0)
    circuit.enter(5)
    circuit.probe_abandoned()
    assert not circuit.is_probing(5)
    circuit.enter(6)
    assert circuit.is_probing(6)
    circuit.succeeded(6)

    assert not circuit.is_probing(6)


def test_circuit_states_have_the_values_of_the_metric() -> None:
    """Alert rules and dashboards compare `streamworker_circuit_state` with them."""
    assert (CLOSED.value, HALF_OPEN.value, OPEN.value) == (0, 1, 2)


@given(st.lists(st.sampled_from(["enter", "succeeded", "failed", "abandoned", "time"]), max_size=100))
def test_circuit_of_any_history_never_locks_up(steps: list[str]) -> None:
    """A call goes through within the bound, unless a probe is in progress."""
    circuit, now, probing = Circuit(failures=2, open_s=1), 0.0, False
    for step in steps:
        match step:
            case "enter" if circuit.wait_s(now) == 0:
                probing = circuit.enter(now)
            case "succeeded":
                circuit.succeeded(now)
                probing = False
            case "failed":
                circuit.failed(now, began=now)
                probing = False
            case "abandoned" if probing:
                circuit.probe_abandoned()
                probing = False
            case "time":
                now += 1
        assert circuit.wait_s(now) <= MAX_OPEN_S or probing
