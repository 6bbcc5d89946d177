"""The circuit of an upstream: when it opens and why, which calls probe, when it closes."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from streamworker.limits.circuit import MAX_OPEN_S, MIN_OPEN_S, Circuit, CircuitState, HoldReason

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


def refuse(circuit: Circuit, *jobs: str, now: float = 0, is_certain: bool = False) -> None:
    for job in jobs:
        circuit.refused(now, HoldReason.ACCOUNT_EMPTY, job, began=now, is_certain=is_certain)


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
