"""The circuit of an upstream: when it opens, who probes, when it closes."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from streamworker.limits.circuit import MAX_OPEN_S, Circuit, CircuitState

CLOSED, HALF_OPEN, OPEN = CircuitState.CLOSED, CircuitState.HALF_OPEN, CircuitState.OPEN


def opened(now: float = 0) -> Circuit:
    circuit = Circuit(failures=3, open_s=5)
    for _ in range(3):
        circuit.failed(now, began=now)
    assert circuit.state is OPEN
    return circuit


def test_circuit_opens_after_so_many_failures_in_a_row() -> None:
    """A success between them starts the count anew."""
    circuit = Circuit(failures=3, open_s=5)
    for fails in (True, True, False, True, True):
        circuit.failed(0, began=0) if fails else circuit.succeeded(5)
    assert circuit.state is CLOSED
    assert circuit.wait_s(0) == 0
    circuit.failed(0, began=0)

    assert circuit.state is OPEN


def test_circuit_open_lets_one_call_through_when_its_time_has_come() -> None:
    """The others wait for its verdict."""
    circuit = opened()
    assert circuit.wait_s(1) == 4
    assert circuit.wait_s(5) == 0
    assert circuit.enter(5)

    assert circuit.state is HALF_OPEN
    assert circuit.wait_s(5) == inf


def test_circuit_closes_when_the_probe_succeeds() -> None:
    """And it takes as many failures as ever to open again, for as short a time."""
    circuit = opened()
    circuit.enter(5)
    circuit.succeeded(5)
    assert circuit.state is CLOSED
    assert not circuit.enter(5)
    for _ in range(3):
        circuit.failed(10, began=10)

    assert circuit.wait_s(10) == 5


def test_circuit_probe_that_fails_doubles_the_time_to_the_next_up_to_a_bound() -> None:
    """A dead upstream is asked less and less, but for ever."""
    circuit, now, waits = opened(), 0.0, []
    for _ in range(6):
        waits.append(circuit.wait_s(now))
        now += waits[-1]
        circuit.enter(now)
        circuit.failed(now, began=now)

    assert waits == [5, 10, 20, 40, MAX_OPEN_S, MAX_OPEN_S]


def test_circuit_probe_without_a_verdict_is_followed_by_another() -> None:
    """Its job was cancelled: nothing was learnt."""
    circuit = opened()
    circuit.enter(5)
    circuit.probe_abandoned()

    assert circuit.wait_s(5) == 0


def test_circuit_verdicts_on_calls_from_before_do_not_move_an_open_one() -> None:
    """They began before the upstream was found dead."""
    circuit = opened()
    circuit.succeeded(5)
    circuit.failed(4, began=4)

    assert circuit.state is OPEN
    assert circuit.wait_s(4) == 1


def test_circuit_late_failures_of_old_calls_do_not_count_against_a_probe() -> None:
    """A hundred calls hung when the upstream died; it is back, and they run into their timeouts one by one."""
    circuit = opened()
    circuit.enter(5)
    for _ in range(100):
        circuit.failed(6, began=4)
    assert circuit.state is HALF_OPEN
    circuit.succeeded(7)
    for _ in range(100):
        circuit.failed(8, began=4)

    assert circuit.state is CLOSED


@given(st.lists(st.sampled_from(["enter", "succeeded", "failed", "abandoned", "time"]), max_size=100))
def test_circuit_of_any_history_never_locks_up(steps: list[str]) -> None:
    """Whatever happens, a call goes through within the bound, unless one is under way to find out."""
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
