"""Decides whether a call to one upstream may begin now: its circuit, its limits, and the results of earlier calls."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from msgspec import UNSET

from streamworker.limits.adaptive_limit import AdaptiveLimit, CallRate, RateLimitPause
from streamworker.limits.call_budget import CallBudget
from streamworker.limits.circuit import CircuitState, HoldReason
from streamworker.limits.window import SlidingWindow
from streamworker.model import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Hashable

    from streamworker.limits.circuit import Circuit
    from streamworker.limits.estimate import TokenEstimate
    from streamworker.limits.window import Reservation
    from streamworker.model import JobError

__all__ = ["Slot", "UpstreamLimiter", "Verdict", "counts_for_circuit"]

_INITIAL_COMPLETION = 256.0
"""Tokens that a completion is expected to have before one was seen."""

_LEARNING_RATE = 0.1
_MAX_COMPLETION = 1 << 17
"""Tokens of the longest completion that the average believes."""

_CUT = 0.7
"""What remains of the bound on streams when calls are refused although they keep their distance."""

_REFUSALS = {ErrorCode.AUTH: HoldReason.KEY_REFUSED, ErrorCode.QUOTA: HoldReason.ACCOUNT_EMPTY}
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


class Verdict(Enum):
    """What a failed call means for its job."""

    OWN = "the failure concerns this job: its tries and its backoff apply"
    REPEAT = "the refusal may concern every job: the job is called once more, at no cost"
    WAIT = "the upstream is held or limited: the job waits until it is not, at no cost"


class Slot:
    """The right to make one call: one of its upstream's streams, and one of the jobs in flight in this process."""

    __slots__ = (
        "entered_at",
        "is_answered",
        "is_held",
        "is_open",
        "is_probe",
        "tokens",
        "topic",
        "upstream",
        "value",
    )

    def __init__(
        self, upstream: str, entered_at: float, tokens: Reservation | None, *, is_probe: bool
    ) -> None:
        self.upstream = upstream
        self.entered_at = entered_at
        self.tokens = tokens
        self.is_probe = is_probe
        self.is_answered = False
        self.topic = ""
        """The topic of its job."""
        self.value: Hashable = None
        """The value by which its job takes turns."""
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
        keeps_reserved_tokens: bool = False,
    ) -> None:
        """With `keeps_reserved_tokens` an answered call costs its estimate, also where it used fewer tokens."""
        self.name = name
        self.circuit = circuit
        self.streams = 0
        """Calls that have entered and not left."""
        self._pause = RateLimitPause()
        self._streams_limit = AdaptiveLimit(max_streams)
        self._rate = CallRate()
        self._budget = CallBudget()
        self._requests = None if requests_per_minute is None else SlidingWindow(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else SlidingWindow(tokens_per_minute)
        self._keeps_reserved_tokens = keeps_reserved_tokens
        self._usual_completion = _INITIAL_COMPLETION

    @property
    def counts_tokens(self) -> bool:
        """Whether `wait_s` and `enter` need a token estimate."""
        return self._tokens is not None

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open."""
        return self.circuit.state is CircuitState.OPEN

    def is_limited(self, now: float) -> bool:
        """Whether calls wait for a limit that was learned from the upstream's refusals."""
        is_slowed = self._rate.interval_s > 0 or self._pause.is_repeated
        return is_slowed or self._streams_limit.is_limited or self._budget.is_known(now)

    def pause_s(self, now: float) -> float:
        """Return the seconds until a pause after a 429 ends; 0 if there is none."""
        return self._pause.wait_s(now)

    def wait_s(self, estimate: TokenEstimate | None, now: float) -> float:
        """Return the seconds until a call may begin if nothing else happens; 0 for now."""
        waits = [
            self.circuit.wait_s(now),
            self._pause.wait_s(now),
            self._rate.wait_s(now),
            self._budget.wait_s(now),
            self._streams_limit.wait_s(self.streams, now),
        ]
        if self._requests is not None:
            waits.append(self._requests.wait_s(1, now))
        if self._tokens is not None:
            waits.append(self._tokens.wait_s(self._expected_tokens(estimate), now))
        return max(waits)

    def enter(self, estimate: TokenEstimate | None, now: float) -> Slot:
        """Begin a call."""
        self.streams += 1
        self._streams_limit.enter()
        self._rate.enter(now)
        self._budget.enter(now)
        is_probe = self.circuit.enter(now)
        if self._requests is not None:
            self._requests.take(1, now)
        tokens = None if self._tokens is None else self._tokens.take(self._expected_tokens(estimate), now)
        return Slot(self.name, now, tokens, is_probe=is_probe)

    def answered(self, slot: Slot, now: float) -> None:
        """Record that the upstream answered the call with a stream."""
        if slot.is_answered:
            return
        slot.is_answered = True
        self._pause.answered()
        self._rate.answered(now)
        self._streams_limit.answered()

    def succeeded(self, slot: Slot, now: float) -> None:
        """Record that the call had its first delta, or completed without one."""
        slot.is_probe = False
        if self.circuit.state is CircuitState.HALF_OPEN:
            self._streams_limit.restart()
        self.circuit.succeeded(now)

    def failed(
        self,
        slot: Slot,
        error: JobError,
        now: float,
        *,
        job_id: str = "",
        is_repeated: bool = False,
        has_others: bool = False,
        random: float = 0.0,
    ) -> Verdict:
        """Record that the call failed before its first delta; return what that means for its job.

        `is_repeated` says that the job was refused alike before; `has_others` that calls of other jobs are open or
        wait, so that they will show whether a refusal concerns them too. `random` in [0, 1) spreads the next calls.
        """
        slot.is_probe = False
        if error.code is ErrorCode.RATE_LIMITED and error.retriable:
            self._refused_for_rate(slot, error, now, random)
            self.circuit.succeeded(now)
            return Verdict.WAIT
        if (reason := _REFUSALS.get(error.code)) is not None:
            is_certain = reason is HoldReason.KEY_REFUSED and error.http_status in {None, 401}
            self.circuit.refused(now, reason, job_id, began=slot.entered_at, is_certain=is_certain)
            if is_certain or self.circuit.state is not CircuitState.CLOSED:
                return Verdict.WAIT
            return Verdict.REPEAT if has_others and not is_repeated else Verdict.OWN
        if counts_for_circuit(error):
            self.circuit.failed(now, began=slot.entered_at)
            return Verdict.OWN if self.circuit.state is CircuitState.CLOSED else Verdict.WAIT
        if self.circuit.reason is HoldReason.ACCOUNT_EMPTY and self.circuit.state is CircuitState.HALF_OPEN:
            self.circuit.probe_abandoned()  # a bad request shows nothing about the account
        else:
            self.circuit.succeeded(now)
        return Verdict.OWN

    def leave(self, slot: Slot, tokens: int | None, completion: int | None = None) -> None:
        """End the call; it cost `tokens`, of which `completion` were generated. None is unknown, 0 a refused call."""
        self.streams -= 1
        self._streams_limit.left(was_answered=slot.is_answered)
        if slot.is_probe:
            self.circuit.probe_abandoned()
        is_settled = tokens is not None and not (tokens and self._keeps_reserved_tokens)
        if self._tokens is not None and slot.tokens is not None and is_settled:
            self._tokens.settle(slot.tokens, tokens or 0)
        if completion is not None:
            self._usual_completion += _LEARNING_RATE * (
                min(completion, _MAX_COMPLETION) - self._usual_completion
            )

    def limit(self, now: float) -> int:
        """Return the number of streams that may be open now."""
        return self._streams_limit.limit(now)

    def _refused_for_rate(self, slot: Slot, error: JobError, now: float, random: float) -> None:
        advised_s = None if error.retry_after_ms is UNSET else error.retry_after_ms / 1000
        self._budget.refused(slot.entered_at, now, advised_s)
        if not self._pause.refused(now, began=slot.entered_at, advised_s=advised_s, random=random):
            return
        cut = 1.0
        if self._streams_limit.is_proved(self.streams):
            cut = _CUT if self._rate.interval_s else 1.0
            self._rate.refused(now)
        self._streams_limit.refused(now, cut=cut)

    def _expected_tokens(self, estimate: TokenEstimate | None) -> float:
        if estimate is None:
            raise ValueError("an upstream with a token limit needs an estimate of each call")
        return estimate.tokens(self._usual_completion)


def counts_for_circuit(error: JobError) -> bool:
    """Return whether a failure shows that the upstream is unavailable, rather than that it refuses this call."""
    return error.code in _UNAVAILABLE or (error.code is ErrorCode.UPSTREAM_ERROR and error.retriable)
