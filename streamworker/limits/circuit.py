"""The circuit of one upstream: closed while calls go well, open while it is not worth trying.

A dead upstream is not tried by every job: after so many failures in a row the circuit opens, and one call at a time
finds out whether the upstream is back. Each probe that fails doubles the time to the next one.
"""

from __future__ import annotations

from enum import Enum
from math import inf

__all__ = ["Circuit", "CircuitState"]

MAX_OPEN_S = 60.0
"""The longest time between two probes."""


class CircuitState(Enum):
    """What a circuit lets through. The value is the metric's."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Circuit:
    """Counts failures in a row. Times in seconds of any clock that never jumps."""

    def __init__(self, *, failures: int, open_s: float) -> None:
        """Open after so many `failures` in a row; probe first after `open_s`."""
        self.state = CircuitState.CLOSED
        self._allowed = failures
        self._failures = 0
        self._first_open_s = open_s
        self._open_s = open_s
        self._probe_at = 0.0
        self._since = -inf
        self._is_probed = False

    def wait_s(self, now: float) -> float:
        """Return how long until a call may go: 0 is now, infinite until the probe under way has ended."""
        match self.state:
            case CircuitState.CLOSED:
                return 0.0
            case CircuitState.HALF_OPEN:
                return inf if self._is_probed else 0.0
            case CircuitState.OPEN:
                return max(0.0, self._probe_at - now)

    def enter(self, now: float) -> bool:
        """A call begins that `wait_s` let go; return whether it is a probe."""
        if self.state is CircuitState.CLOSED:
            return False
        self.state, self._since = CircuitState.HALF_OPEN, now
        self._is_probed = True
        return True

    def succeeded(self, now: float) -> None:
        """The upstream is alive."""
        self._failures = 0
        if self.state is CircuitState.HALF_OPEN:
            self.state, self._since = CircuitState.CLOSED, now
            self._open_s = self._first_open_s

    def failed(self, now: float, *, began: float) -> None:
        """A call failed in a way that is the upstream's own.

        It counts if it began in the state that the circuit is in: what hung when the upstream died runs into its timeout
        long after the upstream is back.
        """
        if began < self._since:
            return
        self._failures += 1
        if self.state is CircuitState.HALF_OPEN:
            self._open_s = min(MAX_OPEN_S, 2 * self._open_s)
            self._open(now)
        elif self.state is CircuitState.CLOSED and self._failures >= self._allowed:
            self._open(now)

    def probe_abandoned(self) -> None:
        """The probe ended without a verdict (its job was cancelled): the next call is one."""
        self._is_probed = False

    def _open(self, now: float) -> None:
        self.state, self._since = CircuitState.OPEN, now
        self._is_probed = False
        self._probe_at = now + self._open_s
