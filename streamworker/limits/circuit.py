"""The circuit of one upstream: closed while calls succeed, open while the upstream is held.

An upstream is held for one of three reasons: it is unavailable, it refuses the API key, or its account is empty. Its
jobs wait, and one call at a time probes whether it works again. A probe that fails doubles the time to the next one.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from math import inf

__all__ = ["Circuit", "CircuitState", "HoldReason"]

MAX_OPEN_S = 30.0
"""The longest time between two probes."""

MIN_OPEN_S = 1.0
"""The shortest time between two probes, also where one is requested."""

PROBE_GRACE_S = 5.0
"""How long a job whose wait is over still waits for the result of a probe."""

REFUSED_JOBS = 3
"""Different jobs that are refused alike, without a success between them, before the refusal concerns every job."""


class CircuitState(Enum):
    """What a circuit lets through. The value is the metric's."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class HoldReason(StrEnum):
    """Why an upstream is held."""

    UNAVAILABLE = "unavailable"
    KEY_REFUSED = "key_refused"
    ACCOUNT_EMPTY = "account_empty"


class Circuit:
    """Opens after failures, and probes. Times in seconds of a clock that never jumps."""

    def __init__(self, *, failures: int, open_s: float) -> None:
        """Open after `failures` unavailable calls in a row; make the first probe after `open_s`."""
        self.state = CircuitState.CLOSED
        self.reason = HoldReason.UNAVAILABLE
        """Why the circuit opened last."""
        self._threshold = failures
        self._failures = 0
        self._refused: dict[HoldReason, set[str]] = {}
        self._first_open_s = open_s
        self._open_s = open_s
        self._opened_at = -inf
        self._probe_at = 0.0
        self._since = -inf
        self._is_probed = False

    def wait_s(self, now: float) -> float:
        """Return the seconds until a call may begin: 0 for now, infinite while a probe is in progress."""
        match self.state:
            case CircuitState.CLOSED:
                return 0.0
            case CircuitState.HALF_OPEN:
                return inf if self._is_probed else 0.0
            case CircuitState.OPEN:
                return max(0.0, self._probe_at - now)

    def enter(self, now: float) -> bool:
        """Begin a call that `wait_s` allowed; return whether it is a probe."""
        if self.state is CircuitState.CLOSED:
            return False
        self.state, self._since = CircuitState.HALF_OPEN, now
        self._is_probed = True
        return True

    def succeeded(self, now: float) -> None:
        """Record a call that succeeded, or that failed in a way that shows the upstream to work."""
        self._failures = 0
        self._refused.clear()
        if self.state is CircuitState.HALF_OPEN:
            self.state, self._since = CircuitState.CLOSED, now
            self._open_s = self._first_open_s

    def failed(self, now: float, *, began: float) -> None:
        """Record a call to an unavailable upstream.

        The call counts if it began in the circuit's present state: calls that hung when the upstream died run into
        their timeouts long after it is back.
        """
        if began < self._since or self.state is CircuitState.OPEN:
            return
        self._failures += 1
        if self.state is CircuitState.HALF_OPEN or self._failures >= self._threshold:
            self._open(now, HoldReason.UNAVAILABLE)

    def refused(self, now: float, reason: HoldReason, job_id: str, *, began: float, is_certain: bool) -> None:
        """Record a call that the upstream refused for its key or its account.

        The circuit opens at once if the refusal `is_certain` to concern every job, otherwise after `REFUSED_JOBS`
        different jobs were refused alike.
        """
        if began < self._since or self.state is CircuitState.OPEN:
            return
        jobs = self._refused.setdefault(reason, set())
        jobs.add(job_id)
        if self.state is CircuitState.HALF_OPEN or is_certain or len(jobs) >= REFUSED_JOBS:
            self._open(now, reason)

    def probe_abandoned(self) -> None:
        """End a probe without a result, for example because its job was cancelled: the next call is a probe."""
        self._is_probed = False

    def is_probing(self, now: float) -> bool:
        """Return whether a probe is in progress that began less than `PROBE_GRACE_S` ago."""
        return self.state is CircuitState.HALF_OPEN and self._is_probed and now - self._since < PROBE_GRACE_S

    def probe_soon(self, now: float) -> None:
        """Make the next probe now, but not within `MIN_OPEN_S` of the last one."""
        self._probe_at = min(self._probe_at, max(now, self._opened_at + MIN_OPEN_S))

    def _open(self, now: float, reason: HoldReason) -> None:
        if self.state is CircuitState.HALF_OPEN:
            self._open_s = min(MAX_OPEN_S, 2 * self._open_s)
        self.state, self.reason, self._since, self._opened_at = CircuitState.OPEN, reason, now, now
        self._is_probed = False
        self._refused.clear()
        self._probe_at = now + self._open_s
