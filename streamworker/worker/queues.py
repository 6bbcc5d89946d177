"""Who may call which upstream, and when: the waiting lines before the gates.

A job passes its upstream's gate before each call and gives the permit back when the call is over. Who has to wait,
waits in that upstream's line: a limited or dead upstream holds back its own jobs and nobody else's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Self

from streamworker.errors import UpstreamError
from streamworker.limits.circuit import CircuitState
from streamworker.limits.estimate import estimate_tokens
from streamworker.limits.limiter import LimiterRules, UpstreamLimiter
from streamworker.model import ErrorCode, JobError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from streamworker.limits.estimate import TokenEstimate
    from streamworker.limits.limiter import AdmittedCall
    from streamworker.model import Job
    from streamworker.observe import Observer

__all__ = ["Slot", "UpstreamQueue", "UpstreamQueues"]

_MOMENT_S = 0.001
_SWEEP_S = 1.0


class Slot:
    """The right to one call, and a place among the jobs in flight. Leaving its block gives back both, at the latest."""

    def __init__(self, queue: UpstreamQueue, call: AdmittedCall) -> None:
        self._queue = queue
        self._call: AdmittedCall | None = call
        self._is_out = True

    @property
    def upstream(self) -> str:
        """Whom it is for."""
        return self._queue.name

    def succeeded(self) -> None:
        """The call had its first delta, or ended well without one."""
        if self._call is not None:
            self._queue.succeeded(self._call)

    def failed(self, error: JobError) -> None:
        """The call failed before its first delta."""
        if self._call is not None:
            self._queue.failed(self._call, error)

    def hang_up(self, tokens: int | None = None, completion: int | None = None) -> None:
        """The call is over, the job is not: its upstream may serve another one.

        What the call came to in tokens, and the generated part of them; None is unknown.
        """
        call, self._call = self._call, None
        if call is not None:
            self._queue.leave(call, tokens, completion)

    def release(self) -> None:
        """Give it back."""
        self.hang_up()
        if self._is_out:
            self._is_out = False
            self._queue.queues.released()

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give it back."""
        self.release()


class UpstreamQueues:
    """All upstreams' gates, and the bound on the calls of the whole process. Make it inside the running loop."""

    def __init__(
        self,
        rules: Mapping[str, LimiterRules],
        *,
        max_in_flight: int,
        observer: Observer,
        max_wait_s: Mapping[str, float] | None = None,
    ) -> None:
        """`max_wait_s` says how long a job waits for an upstream that is thought dead; for ever if it does not."""
        waits = max_wait_s or {}
        self.queues = {
            name: UpstreamQueue(self, name, UpstreamLimiter(rule), observer, waits.get(name, inf))
            for name, rule in rules.items()
        }
        self.in_flight = 0
        """Permits that are out."""
        self._resting = 0
        self.on_room: Callable[[], None] = lambda: None
        """Called when there is room for another job."""
        self._max_in_flight = max_in_flight
        self._turns = deque(self.queues.values())

    @property
    def waiting(self) -> int:
        """Jobs that wait in a line, or for their next try."""
        return self._resting + sum(queue.jobs_waiting for queue in self.queues.values())

    async def rest(self, seconds: float) -> None:
        """Wait for the next try, without holding anything."""
        self._resting += 1
        self.on_room()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._resting -= 1

    @property
    def has_room(self) -> bool:
        """Whether one more call may be open in this process."""
        return self.in_flight < self._max_in_flight

    async def enter(
        self, upstreams: Sequence[str], job: Job, *, is_retry: bool = False, is_patient: bool = True
    ) -> Slot:
        """Wait for the right to call one of these upstreams: the first that is not thought dead.

        A retry goes before those who wait for their first call. Cancelling the waiting gives it up.

        Raises:
            UpstreamError: all are thought dead, and were for as long as a job waits; at once for who is not patient.
        """
        waiter = Waiter(upstreams, job, is_retry=is_retry, is_patient=is_patient)
        queue = self.choose(upstreams)
        if queue.is_shut and not is_patient:
            raise UpstreamError(queue.refusal())
        queue.join(waiter)
        queue.pump()
        if not waiter.slot.done():
            self.on_room()  # who waits leaves room for one more
        try:
            return await waiter.slot
        except asyncio.CancelledError:
            if waiter.slot.cancelled():
                waiter.leave()
            elif waiter.slot.exception() is None:  # it came in the same moment
                waiter.slot.result().release()
            raise

    def choose(self, upstreams: Sequence[str]) -> UpstreamQueue:
        """Take the first that is not shut; if all are, the one that is probed next."""
        queues = [self.queues[name] for name in upstreams]
        for queue in queues:
            if not queue.is_shut:
                return queue
        return min(queues, key=lambda queue: queue.probed_in_s)

    def released(self) -> None:
        """A permit came back: let others go on, each line at its turn."""
        self.in_flight -= 1
        self._turns.rotate(-1)
        for queue in self._turns:
            queue.pump()
        self.on_room()

    def states(self) -> dict[str, dict[str, object]]:
        """Return what there is to say of each upstream."""
        return {name: queue.state() for name, queue in self.queues.items()}


class Waiter:
    """Somebody in a line."""

    def __init__(self, upstreams: Sequence[str], job: Job, *, is_retry: bool, is_patient: bool) -> None:
        loop = asyncio.get_running_loop()
        self.upstreams = upstreams
        self.job = job
        self.is_retry = is_retry
        self.is_patient = is_patient
        self.since = loop.time()
        self.estimate: TokenEstimate | None = None
        self.slot: asyncio.Future[Slot] = loop.create_future()
        self.queue: UpstreamQueue | None = None

    def leave(self) -> None:
        """Go away without a permit."""
        assert self.queue is not None, "whoever waits stands in a line"
        with suppress(ValueError):
            self.queue.waiters.remove(self)
        self.queue.pump()

    def refuse(self, error: JobError) -> None:
        """Let nobody wait here any more."""
        if not self.slot.done():
            self.slot.set_exception(UpstreamError(error))


class UpstreamQueue:
    """One upstream's gate and those who wait before it. In a line all are served in order."""

    def __init__(
        self,
        queues: UpstreamQueues,
        name: str,
        limiter: UpstreamLimiter,
        observer: Observer,
        max_wait_s: float,
    ) -> None:
        self.name = name
        self.limiter = limiter
        self.waiters: deque[Waiter] = deque()
        self.queues = queues
        self._observer = observer
        self._max_wait_s = max_wait_s
        self._loop = asyncio.get_running_loop()
        self._state = CircuitState.CLOSED
        self._down_since = inf
        self._last_error: JobError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def probed_in_s(self) -> float:
        """How long until the circuit lets a call through."""
        return self.limiter.circuit.wait_s(self._loop.time())

    @property
    def is_shut(self) -> bool:
        """Whether who has a choice goes elsewhere: thought dead, and not to be probed now, or by somebody else."""
        is_above_high = self.limiter.circuit.state is CircuitState.CLOSED
        return not is_above_high and (bool(self.waiters) or self.probed_in_s > 0)

    def join(self, waiter: Waiter) -> None:
        """Let somebody wait here, a retry behind the other retries. `pump` has to follow."""
        waiter.queue = self
        if self.limiter.counts_tokens and waiter.estimate is None:
            waiter.estimate = estimate_tokens(waiter.job.request)
        if waiter.is_retry:
            self.waiters.insert(sum(other.is_retry for other in self.waiters), waiter)
        else:
            self.waiters.append(waiter)
        self._watch_patience()

    def pump(self) -> None:
        """Let through who may go now, and look again when the next one may."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self.waiters and self.queues.has_room:
            now = self._loop.time()
            wait_s = self.limiter.wait_s(self.waiters[0].estimate, now)
            if wait_s > 0:
                if wait_s < inf:
                    self._timer = self._loop.call_later(max(wait_s, _MOMENT_S), self.pump)
                return
            waiter = self.waiters.popleft()
            if waiter.slot.done():  # it was cancelled in this very moment
                continue
            self.queues.in_flight += 1
            waiter.slot.set_result(Slot(self, self.limiter.enter(waiter.estimate, now)))
            self._look()

    def succeeded(self, call: AdmittedCall) -> None:
        """The call had its first delta, or ended well without one."""
        self.limiter.succeeded(call, self._loop.time())
        self._look()

    def failed(self, call: AdmittedCall, error: JobError) -> None:
        """The call failed before its first delta."""
        self.limiter.failed(call, error, self._loop.time())
        self._look(error)

    def leave(self, call: AdmittedCall, tokens: int | None, completion: int | None) -> None:
        """The call is over."""
        self.limiter.leave(call, tokens, completion)
        self.pump()

    def refusal(self) -> JobError:
        """Say why nobody is let through."""
        # Not in the upstream's words: they were about another job, and may repeat its prompt.
        last, status = self._last_error, None if self._last_error is None else self._last_error.http_status
        told = "" if last is None else f", the last one with {last.code.value}"
        message = f"no call was made: the latest calls to the upstream {self.name} all failed{told}"
        return JobError(ErrorCode.UPSTREAM_UNAVAILABLE, message, status, retriable=True)

    @property
    def circuit_state(self) -> int:
        """The circuit's state, as the metric has it."""
        return self._state.value

    @property
    def streams_open(self) -> int:
        """Calls that are open."""
        return self.limiter.streams

    @property
    def streams_limit(self) -> int:
        """Calls that may be open."""
        return self.limiter.limit(self._loop.time())

    @property
    def jobs_waiting(self) -> int:
        """Jobs in this line."""
        return len(self.waiters)

    def state(self) -> dict[str, object]:
        """Return what there is to say."""
        return {
            "circuit": self._state.name.lower(),
            "streams_open": self.streams_open,
            "streams_limit": self.streams_limit,
            "jobs_waiting": self.jobs_waiting,
        }

    def _look(self, error: JobError | None = None) -> None:
        """See whether the circuit has changed, and what follows from it."""
        state = self.limiter.circuit.state
        if state is self._state:
            return
        self._state = state
        self._observer.circuit_changed(self.name, state.name.lower())
        if state is CircuitState.CLOSED:
            self._down_since = inf
            self.pump()
        elif state is CircuitState.OPEN:
            self._down_since = min(self._down_since, self._loop.time())
            self._last_error = error
            self._send_on()

    def _send_on(self) -> None:
        """Let those go elsewhere who have a choice, and away who do not want to wait."""
        waiting, self.waiters = self.waiters, deque()
        queues = {self}
        for waiter in waiting:
            queue = self.queues.choose(waiter.upstreams)
            if queue.is_shut and not waiter.is_patient:
                waiter.refuse(self.refusal())
            else:
                queue.join(waiter)
                queues.add(queue)
        for queue in queues:
            queue.pump()

    def _watch_patience(self) -> None:
        is_wanted = self._state is not CircuitState.CLOSED and self.waiters and self._max_wait_s < inf
        if is_wanted and self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Refuse those who have waited long enough for an upstream that is thought dead."""
        self._sweeper = None
        ends = self._loop.time() - self._max_wait_s
        overdue = [waiter for waiter in self.waiters if max(waiter.since, self._down_since) <= ends]
        for waiter in overdue:
            self.waiters.remove(waiter)
            waiter.refuse(self.refusal())
        self._watch_patience()
