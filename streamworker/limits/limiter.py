"""Decides whether a call to one upstream may begin now: its circuit, its limits, and the results of earlier calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.limits.adaptive_limit import AdaptiveLimit
from streamworker.limits.circuit import CircuitState
from streamworker.limits.window import SlidingWindow
from streamworker.model import ErrorCode

if TYPE_CHECKING:
    from streamworker.limits.circuit import Circuit
    from streamworker.limits.estimate import TokenEstimate
    from streamworker.limits.window import Reservation
    from streamworker.model import JobError

__all__ = ["Slot", "UpstreamLimiter", "counts_for_circuit"]

_INITIAL_COMPLETION = 256.0
"""Tokens that a completion is expected to have before one was seen."""

_LEARNING_RATE = 0.1
_MAX_COMPLETION = 1 << 17
"""Tokens of the longest completion that the average believes."""

_UNAVAILABLE = frozenset(
    {
        ErrorCode.UPSTREAM_UNAVAILABLE,
        ErrorCode.UPSTREAM_PROTOCOL,
        ErrorCode.TIMEOUT_CONNECT,
        ErrorCode.TIMEOUT_FIRST_DELTA,
        ErrorCode.TIMEOUT_IDLE,
        ErrorCode.TRUNCATED,
    }
)


class Slot:
    """The right to make one call: one of its upstream's streams, and one of the jobs in flight in this process."""

    __slots__ = ("entered_at", "is_held", "is_open", "is_probe", "tokens", "upstream")

    def __init__(
        self, upstream: str, entered_at: float, tokens: Reservation | None, *, is_probe: bool
    ) -> None:
        self.upstream = upstream
        self.entered_at = entered_at
        self.tokens = tokens
        self.is_probe = is_probe
        self.is_open = True
        """Whether the call counts among its upstream's streams."""
        self.is_held = True
        """Whether the job counts among those in flight."""


class UpstreamLimiter:
    """The circuit and the limits of one upstream. Times in seconds of a clock that never jumps.

    Call `enter` only where `wait_s` returns 0; report the call's result once; call `leave` once.
    """

    def __init__(
        self,
        name: str,
        *,
        circuit: Circuit,
        max_streams: int,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        self.name = name
        self.circuit = circuit
        self.streams = 0
        """Calls that have entered and not left."""
        self._concurrency = AdaptiveLimit(max_streams)
        self._requests = None if requests_per_minute is None else SlidingWindow(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else SlidingWindow(tokens_per_minute)
        self._usual_completion = _INITIAL_COMPLETION

    @property
    def counts_tokens(self) -> bool:
        """Whether `wait_s` and `enter` need a token estimate."""
        return self._tokens is not None

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open."""
        return self.circuit.state is CircuitState.OPEN

    def wait_s(self, estimate: TokenEstimate | None, now: float) -> float:
        """Return the seconds until a call may begin if nothing else happens; 0 for now."""
        waits = [self.circuit.wait_s(now), self._concurrency.wait_s(self.streams, now)]
        if self._requests is not None:
            waits.append(self._requests.wait_s(1, now))
        if self._tokens is not None:
            waits.append(self._tokens.wait_s(self._expected_tokens(estimate), now))
        return max(waits)

    def enter(self, estimate: TokenEstimate | None, now: float) -> Slot:
        """Begin a call."""
        self.streams += 1
        is_probe = self.circuit.enter(now)
        if self._requests is not None:
            self._requests.take(1, now)
        tokens = None if self._tokens is None else self._tokens.take(self._expected_tokens(estimate), now)
        return Slot(self.name, now, tokens, is_probe=is_probe)

    def succeeded(self, slot: Slot, now: float) -> None:
        """Record that the call had its first delta, or completed without one."""
        slot.is_probe = False
        self.circuit.succeeded(now)

    def failed(self, slot: Slot, error: JobError, now: float) -> None:
        """Record that the call failed before its first delta."""
        slot.is_probe = False
        if error.code is ErrorCode.RATE_LIMITED and error.retriable:
            self._concurrency.refused(slot.entered_at, self.streams, now)
        if counts_for_circuit(error):
            self.circuit.failed(now, began=slot.entered_at)
        else:
            self.circuit.succeeded(now)

    def leave(self, slot: Slot, tokens: int | None, completion: int | None = None) -> None:
        """End the call; it cost `tokens`, of which `completion` were generated. None is unknown."""
        self.streams -= 1
        if slot.is_probe:
            self.circuit.probe_abandoned()
        if self._tokens is not None and slot.tokens is not None and tokens is not None:
            self._tokens.settle(slot.tokens, tokens)
        if completion is not None:
            self._usual_completion += _LEARNING_RATE * (
                min(completion, _MAX_COMPLETION) - self._usual_completion
            )

    def limit(self, now: float) -> int:
        """Return the number of streams that may be open now."""
        return self._concurrency.limit(now)

    def _expected_tokens(self, estimate: TokenEstimate | None) -> float:
        if estimate is None:
            raise ValueError("an upstream with a token limit needs an estimate of each call")
        return estimate.tokens(self._usual_completion)


def counts_for_circuit(error: JobError) -> bool:
    """Return whether a failure shows that the upstream is unavailable, rather than that it refuses this call."""
    return error.code in _UNAVAILABLE or (error.code is ErrorCode.UPSTREAM_ERROR and error.retriable)
