"""The gate of one upstream: its circuit, its limits, and what the calls that passed it have shown.

Everything that decides whether a call may go now is here, and nothing that waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from streamworker.limits.adaptive_limit import AdaptiveLimit
from streamworker.limits.circuit import Circuit, CircuitState
from streamworker.limits.window import SlidingWindow
from streamworker.model import ErrorCode

if TYPE_CHECKING:
    from streamworker.limits.estimate import TokenEstimate
    from streamworker.limits.window import Reservation
    from streamworker.model import JobError

__all__ = ["AdmittedCall", "LimiterRules", "UpstreamLimiter", "is_upstreams_own"]

_FIRST_GUESS = 256.0
"""Tokens of a completion before one was seen."""

_LEARNING = 0.1
_MOST = 1 << 17  # tokens of a completion that are believed to be usual
_OWN = frozenset(
    {
        ErrorCode.UPSTREAM_UNAVAILABLE,
        ErrorCode.UPSTREAM_PROTOCOL,
        ErrorCode.TIMEOUT_CONNECT,
        ErrorCode.TIMEOUT_FIRST_DELTA,
        ErrorCode.TIMEOUT_IDLE,
        ErrorCode.TRUNCATED,
    }
)


class LimiterRules(NamedTuple):
    """What one upstream allows, in this process; None is no limit."""

    max_streams: int
    circuit_failure_threshold: int
    circuit_open_s: float
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class AdmittedCall:
    """One call that went through."""

    __slots__ = ("at", "is_probe", "tokens")

    def __init__(self, at: float, tokens: Reservation | None, *, is_probe: bool) -> None:
        self.at = at
        self.tokens = tokens
        self.is_probe = is_probe


class UpstreamLimiter:
    """Ask `wait_s`; `enter` where it is 0; tell what became of the call; `leave` once. Times in seconds."""

    def __init__(self, rules: LimiterRules) -> None:
        self.circuit = Circuit(failures=rules.circuit_failure_threshold, open_s=rules.circuit_open_s)
        self.streams = 0
        """Calls that have entered and not left."""
        self._concurrency = AdaptiveLimit(rules.max_streams)
        self._requests = _throttle(rules.requests_per_minute)
        self._tokens = _throttle(rules.tokens_per_minute)
        self._usual_completion = _FIRST_GUESS

    @property
    def counts_tokens(self) -> bool:
        """Whether calls have to say their demand."""
        return self._tokens is not None

    def wait_s(self, estimate: TokenEstimate | None, now: float) -> float:
        """Return how long until a call may go if nothing else happens, 0 for now."""
        waits = [self.circuit.wait_s(now), self._concurrency.wait_s(self.streams, now)]
        if self._requests is not None:
            waits.append(self._requests.wait_s(1, now))
        if self._tokens is not None:
            waits.append(self._tokens.wait_s(self._expected(estimate), now))
        return max(waits)

    def enter(self, estimate: TokenEstimate | None, now: float) -> AdmittedCall:
        """A call begins."""
        self.streams += 1
        is_probe = self.circuit.enter(now)
        if self._requests is not None:
            self._requests.take(1, now)
        tokens = None if self._tokens is None else self._tokens.take(self._expected(estimate), now)
        return AdmittedCall(now, tokens, is_probe=is_probe)

    def succeeded(self, call: AdmittedCall, now: float) -> None:
        """The call had its first delta, or ended well without one."""
        call.is_probe = False
        self.circuit.succeeded(now)

    def failed(self, call: AdmittedCall, error: JobError, now: float) -> None:
        """The call failed before its first delta."""
        call.is_probe = False
        if error.code is ErrorCode.RATE_LIMITED and error.retriable:  # an empty account is no congestion
            self._concurrency.refused(call.at, self.streams, now)
        if is_upstreams_own(error):
            self.circuit.failed(now, began=call.at)
        else:
            self.circuit.succeeded(now)

    def leave(self, call: AdmittedCall, tokens: int | None, completion: int | None = None) -> None:
        """The call is over. `tokens` is what it came to, `completion` the part that was generated; None is unknown."""
        self.streams -= 1
        if call.is_probe:
            self.circuit.probe_abandoned()
        if self._tokens is not None and call.tokens is not None and tokens is not None:
            self._tokens.settle(call.tokens, tokens)
        if completion is not None:
            self._usual_completion += _LEARNING * (min(completion, _MOST) - self._usual_completion)

    def limit(self, now: float) -> int:
        """Return how many streams may be open now."""
        return self._concurrency.limit(now)

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open: the upstream is thought dead."""
        return self.circuit.state is CircuitState.OPEN

    def _expected(self, estimate: TokenEstimate | None) -> float:
        assert estimate is not None, "an upstream with a limit of tokens wants to know the demand"
        return estimate.tokens(self._usual_completion)


def is_upstreams_own(error: JobError) -> bool:
    """Whether a failure says that the upstream is not well, rather than that it does not want this call."""
    return error.code in _OWN or (error.code is ErrorCode.UPSTREAM_ERROR and error.retriable)


def _throttle(limit: int | None) -> SlidingWindow | None:
    return None if limit is None else SlidingWindow(limit)
