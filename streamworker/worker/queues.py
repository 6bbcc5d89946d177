"""Who may call which upstream, and when: the waiting lines before the gates.

A job passes its upstream's gate before each call and gives the permit back when the call is over. Who has to wait,
waits in that upstream's line: a limited or dead upstream holds back its own jobs and nobody else's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING

from streamworker.errors import UpstreamError
from streamworker.limits.circuit import Circuit, CircuitState
from streamworker.limits.estimate import estimate_tokens
from streamworker.limits.limiter import UpstreamLimiter
from streamworker.model import ErrorCode, JobError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from streamworker.limits.estimate import TokenEstimate
    from streamworker.limits.limiter import Slot
    from streamworker.model import Job
    from streamworker.observe import Observer
    from streamworker.worker.policy import UpstreamPolicy

__all__ = ["UpstreamQueue", "UpstreamQueues"]

_MOMENT_S = 0.001
_SWEEP_S = 1.0


class UpstreamQueues:
    """The queues of all upstreams, and the bound on the jobs in flight. Create it inside the running loop."""

    def __init__(
        self, policies: Mapping[str, UpstreamPolicy], *, max_in_flight: int, observer: Observer
    ) -> None:
        self.policies = policies
        self.queues = {name: UpstreamQueue(self, policy, observer) for name, policy in policies.items()}
        self.in_flight = 0
        """Slots that are held."""
        self.on_room: Callable[[], None] = lambda: None
        """Called when another job may be accepted."""
        self._resting = 0
        self._max_in_flight = max_in_flight
        self._turns = deque(self.queues.values())

    @property
    def waiting(self) -> int:
        """Jobs that wait in a queue, or for their next try."""
        return self._resting + sum(queue.jobs_waiting for queue in self.queues.values())

    @property
    def has_room(self) -> bool:
        """Whether one more job may be in flight in this process."""
        return self.in_flight < self._max_in_flight

    async def rest(self, seconds: float) -> None:
        """Wait for the next try without a slot."""
        self._resting += 1
        self.on_room()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._resting -= 1

    async def enter(
        self, upstreams: Sequence[str], job: Job, *, is_retry: bool = False, is_patient: bool = True
    ) -> Slot:
        """Wait for a slot at one of these upstreams: the first whose circuit is not open.

        A retry goes before the jobs that wait for their first call. A cancellation leaves the queue.

        Raises:
            UpstreamError: every circuit stayed open for the maximum wait (immediately if `is_patient` is false).
        """
        waiter = Waiter(upstreams, job, is_retry=is_retry, is_patient=is_patient)
        queue = self.choose(upstreams)
        if queue.is_shut and not is_patient:
            raise UpstreamError(queue.refusal())
        queue.join(waiter)
        queue.pump()
        if not waiter.slot.done():
            self.on_room()  # a job that waits leaves room for another one
        try:
            return await waiter.slot
        except asyncio.CancelledError:
            if waiter.slot.cancelled():
                waiter.leave()
            elif waiter.slot.exception() is None:  # the slot was granted in the same turn of the loop
                self.release(waiter.slot.result())
            raise

    def succeeded(self, slot: Slot) -> None:
        """Record that the call had its first delta, or completed without one."""
        if slot.is_open:
            self.queues[slot.upstream].succeeded(slot)

    def failed(self, slot: Slot, error: JobError) -> None:
        """Record that the call failed before its first delta."""
        if slot.is_open:
            self.queues[slot.upstream].failed(slot, error)

    def end_call(self, slot: Slot, tokens: int | None = None, completion: int | None = None) -> None:
        """End the call: its upstream may serve another one, while its job stays in flight.

        The call cost `tokens`, of which `completion` were generated; None is unknown.
        """
        if slot.is_open:
            slot.is_open = False
            self.queues[slot.upstream].leave(slot, tokens, completion)

    def release(self, slot: Slot) -> None:
        """Release the slot: its job is not in flight any more. Nothing happens the second time."""
        self.end_call(slot)
        if not slot.is_held:
            return
        slot.is_held = False
        self.in_flight -= 1
        self._turns.rotate(-1)
        for queue in self._turns:
            queue.pump()
        self.on_room()

    def choose(self, upstreams: Sequence[str]) -> UpstreamQueue:
        """Return the first queue that is not shut; if all are shut, the one that is probed next."""
        queues = [self.queues[name] for name in upstreams]
        for queue in queues:
            if not queue.is_shut:
                return queue
        return min(queues, key=lambda queue: queue.probed_in_s)

    def states(self) -> dict[str, dict[str, object]]:
        """Return each upstream's state, for `/readyz`."""
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

    def __init__(self, queues: UpstreamQueues, policy: UpstreamPolicy, observer: Observer) -> None:
        self.name = policy.name
        self.limiter = UpstreamLimiter(
            policy.name,
            circuit=Circuit(failures=policy.circuit_failure_threshold, open_s=policy.circuit_open_s),
            max_streams=policy.max_streams,
            requests_per_minute=policy.requests_per_minute,
            tokens_per_minute=policy.tokens_per_minute,
        )
        self.waiters: deque[Waiter] = deque()
        self.queues = queues
        self._observer = observer
        self._max_wait_s = policy.max_wait_s
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
            waiter.slot.set_result(self.limiter.enter(waiter.estimate, now))
            self._look()

    def succeeded(self, slot: Slot) -> None:
        """The call had its first delta, or ended well without one."""
        self.limiter.succeeded(slot, self._loop.time())
        self._look()

    def failed(self, slot: Slot, error: JobError) -> None:
        """The call failed before its first delta."""
        self.limiter.failed(slot, error, self._loop.time())
        self._look(error)

    def leave(self, slot: Slot, tokens: int | None, completion: int | None) -> None:
        """The call is over."""
        self.limiter.leave(slot, tokens, completion)
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
