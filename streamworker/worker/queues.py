"""Jobs wait here for a slot: one queue per upstream, and one bound on the jobs in flight in the whole process.

The job topics share the slots by weight, and the jobs of a topic take turns by a value such as their tenant. An upstream
that is held or limited delays its own jobs and no others. Its jobs wait until it works again, and are
failed only by their own bounds: `max_wait_s` of the job or of the upstream, and the job's deadline.
"""

from __future__ import annotations

import asyncio
from collections import deque
from math import inf
from random import random
from typing import TYPE_CHECKING

from streamworker.errors import UpstreamError
from streamworker.limits.circuit import Circuit, CircuitState, HoldReason
from streamworker.limits.estimate import estimate_tokens
from streamworker.limits.fair_queue import FairQueue, TopicShares, ValueLimit
from streamworker.limits.limiter import UpstreamLimiter
from streamworker.model import ErrorCode, JobError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from streamworker.limits.estimate import TokenEstimate
    from streamworker.limits.limiter import Slot, Verdict
    from streamworker.model import Job
    from streamworker.observe import Observer
    from streamworker.ports import Clock
    from streamworker.worker.policy import UpstreamPolicy

__all__ = ["UpstreamQueue", "UpstreamQueues"]

_MIN_TIMER_S = 0.001
_SWEEP_S = 1.0

_RATE_LIMITED = "rate_limited"
_HELD: Mapping[str, tuple[ErrorCode, str]] = {
    HoldReason.UNAVAILABLE: (ErrorCode.UPSTREAM_UNAVAILABLE, "is unavailable"),
    HoldReason.KEY_REFUSED: (ErrorCode.AUTH, "refuses the API key"),
    HoldReason.ACCOUNT_EMPTY: (ErrorCode.QUOTA, "reports an empty account"),
    _RATE_LIMITED: (ErrorCode.RATE_LIMITED, "refuses further calls with 429"),
}


class UpstreamQueues:
    """The queues of all upstreams, and the bound on the jobs in flight. Create it inside the running loop."""

    def __init__(
        self,
        policies: Mapping[str, UpstreamPolicy],
        *,
        max_in_flight: int,
        observer: Observer,
        clock: Clock,
        weights: Mapping[str, int] | None = None,
        max_in_flight_per: int = 0,
    ) -> None:
        """Share the slots by the topics' `weights`, 1 by default; `max_in_flight_per` bounds the slots of one value."""
        self.policies = policies
        self.weights = weights or {}
        self.value_limit = ValueLimit(max_in_flight_per)
        self.now_ms = clock.now_ms
        self.queues = {name: UpstreamQueue(self, policy, observer) for name, policy in policies.items()}
        self.in_flight = 0
        """Slots that are held."""
        self.on_room: Callable[[], None] = lambda: None
        """Called when another job may be accepted."""
        self._held = TopicShares(self.weights)  # slots of all upstreams
        self._resting = 0
        self._max_in_flight = max_in_flight
        self._is_limited_per_value = max_in_flight_per > 0
        self._turns = deque(self.queues.values())

    @property
    def waiting(self) -> int:
        """Jobs that wait in a queue, or for their next try."""
        return self._resting + sum(queue.jobs_waiting for queue in self.queues.values())

    def in_flight_of(self, topic: str) -> int:
        """Return the number of slots that are held by jobs of this topic."""
        return self._held.open(topic)

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
        self,
        upstreams: Sequence[str],
        job: Job,
        *,
        is_retry: bool = False,
        is_patient: bool = True,
        since: float | None = None,
        value: Hashable = None,
    ) -> Slot:
        """Wait for a slot at one of these upstreams: the first that is neither held nor paused.

        A retry goes before the jobs that wait for their first call. `since` is when the job began to wait, on the
        loop's clock; now by default. Jobs of different `value`s take turns. A cancellation leaves the queue.

        Raises:
            UpstreamError: the upstream was held or limited for the maximum wait (at once if `is_patient` is false).
        """
        waiter = Waiter(upstreams, job, is_retry=is_retry, is_patient=is_patient, since=since, value=value)
        queue = self.choose(upstreams)
        if queue.is_shut and not is_patient:
            raise UpstreamError(queue.refusal(0))
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

    def answered(self, slot: Slot) -> None:
        """Record that the upstream answered the call with a stream."""
        if slot.is_open:
            self.queues[slot.upstream].answered(slot)

    def succeeded(self, slot: Slot) -> None:
        """Record that the call had its first delta, or completed without one."""
        if slot.is_open:
            self.queues[slot.upstream].succeeded(slot)

    def failed(self, slot: Slot, error: JobError, job_id: str, *, is_repeated: bool = False) -> Verdict:
        """Record that the call failed before its first delta; return what that means for the job.

        `is_repeated` says that this job was refused alike before. The slot's call must not have ended.
        """
        return self.queues[slot.upstream].failed(slot, error, job_id, is_repeated=is_repeated)

    def end_call(self, slot: Slot, tokens: int | None = None, completion: int | None = None) -> None:
        """End the call: its upstream may serve another one, while its job stays in flight.

        The call cost `tokens`, of which `completion` were generated; None is unknown.
        """
        if slot.is_open:
            slot.is_open = False
            queue = self.queues[slot.upstream]
            queue.leave(slot, tokens, completion)
            if self._is_limited_per_value:
                self._pump_all()

    def release(self, slot: Slot) -> None:
        """Release the slot: its job is not in flight any more. Nothing happens the second time."""
        self.end_call(slot)
        if not slot.is_held:
            return
        slot.is_held = False
        self.in_flight -= 1
        self.queues[slot.upstream].in_flight -= 1
        self._held.leave(slot.topic)
        self._pump_all()
        self.on_room()

    def granted(self, slot: Slot) -> None:
        """Count a slot that a queue has granted."""
        self.in_flight += 1
        self._held.enter(slot.topic)

    def _pump_all(self) -> None:
        """Grant free slots: first to the queue whose next job has the topic with fewest slots for its weight."""
        self._turns.rotate(-1)
        for queue in sorted(self._turns, key=self._rank) if len(self._turns) > 1 else self._turns:
            queue.pump()

    def _rank(self, queue: UpstreamQueue) -> tuple[float, int]:
        waiter = queue.waiters.head()
        return (inf, 0) if waiter is None else self._held.rank(waiter.topic)

    def choose(self, upstreams: Sequence[str]) -> UpstreamQueue:
        """Return the first queue that is not shut; if all are shut, the one that is called next."""
        queues = [self.queues[name] for name in upstreams]
        for queue in queues:
            if not queue.is_shut:
                return queue
        return min(queues, key=lambda queue: queue.opens_in_s)

    def has_open(self, upstreams: Sequence[str]) -> bool:
        """Return whether one of these upstreams may be called without a wait for a hold or a pause."""
        return any(not self.queues[name].is_shut for name in upstreams)

    def states(self) -> dict[str, dict[str, object]]:
        """Return each upstream's state, for `/readyz`."""
        return {name: queue.state() for name, queue in self.queues.items()}


class Waiter:
    """A job in a queue."""

    def __init__(
        self,
        upstreams: Sequence[str],
        job: Job,
        *,
        is_retry: bool,
        is_patient: bool,
        since: float | None,
        value: Hashable,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.upstreams = upstreams
        self.job = job
        self.is_retry = is_retry
        self.is_patient = is_patient
        self.value = value
        self.since = loop.time() if since is None else since
        self.estimate: TokenEstimate | None = None
        self.slot: asyncio.Future[Slot] = loop.create_future()
        self.queue: UpstreamQueue | None = None

    @property
    def topic(self) -> str:
        """The topic of the job."""
        return self.job.source.topic

    def leave(self) -> None:
        """Leave the queue without a slot."""
        if self.queue is not None:
            self.queue.waiters.remove(self)
            self.queue.pump()

    def refuse(self, error: JobError) -> None:
        """End the wait with an error."""
        if not self.slot.done():
            self.slot.set_exception(UpstreamError(error))


class UpstreamQueue:
    """The jobs that wait for one upstream. Slots are granted in the order of the fair queue."""

    def __init__(self, queues: UpstreamQueues, policy: UpstreamPolicy, observer: Observer) -> None:
        self.name = policy.name
        self.limiter = UpstreamLimiter(
            policy.name,
            circuit=Circuit(failures=policy.circuit_failure_threshold, open_s=policy.circuit_open_s),
            max_streams=policy.max_streams,
            requests_per_minute=policy.requests_per_minute,
            tokens_per_minute=policy.tokens_per_minute,
            keeps_reserved_tokens=policy.keeps_reserved_tokens,
        )
        self.waiters: FairQueue[Waiter] = FairQueue(TopicShares(queues.weights), queues.value_limit)
        self.queues = queues
        self.in_flight = 0
        """Slots of this upstream that are held."""
        self._policy = policy
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._state = CircuitState.CLOSED
        self._held: str | None = None
        self._held_since = inf
        self._key: object = None
        self._last_error: ErrorCode | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def opens_in_s(self) -> float:
        """Seconds until the circuit or the pause lets a call through."""
        now = self._loop.time()
        return max(self.limiter.circuit.wait_s(now), self.limiter.pause_s(now))

    @property
    def is_shut(self) -> bool:
        """Whether a job with a fallback is called elsewhere: the upstream is paused, or held and not due for a probe."""
        if self.limiter.circuit.state is CircuitState.CLOSED:
            return self.limiter.pause_s(self._loop.time()) > 0
        return bool(self.waiters) or self.opens_in_s > 0

    @property
    def held(self) -> str | None:
        """Why jobs are held back: a `HoldReason`, or `rate_limited`; None if they are not."""
        if self.limiter.circuit.state is not CircuitState.CLOSED:
            return self.limiter.circuit.reason
        now = self._loop.time()
        is_limited = self.limiter.is_limited(now) or self.limiter.pause_s(now) > 0
        return _RATE_LIMITED if is_limited else None

    @property
    def held_s(self) -> float:
        """Seconds for which jobs have been held back; 0 if they are not."""
        return 0.0 if self._held is None else self._loop.time() - self._held_since

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
        """Jobs in this queue."""
        return len(self.waiters)

    @property
    def jobs_held(self) -> int:
        """Jobs in this queue while the upstream is held or limited, otherwise 0."""
        return len(self.waiters) if self._held is not None else 0

    def join(self, waiter: Waiter) -> None:
        """Add a job. `pump` must follow.

        A retry goes behind the other retries and before the first calls; while the upstream is held it goes to the
        end, so that the next probe uses another job.
        """
        waiter.queue = self
        if self.limiter.counts_tokens and waiter.estimate is None:
            waiter.estimate = estimate_tokens(waiter.job.request)
        is_first = waiter.is_retry and self.limiter.circuit.state is CircuitState.CLOSED
        self.waiters.add(waiter, topic=waiter.topic, value=waiter.value, is_retry=is_first)
        self._schedule_sweep()

    def pump(self) -> None:
        """Grant the slots that are free, and set a timer for the next one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self.queues.has_room and (waiter := self.waiters.head()) is not None:
            if waiter.slot.done():  # it was cancelled in this turn of the loop
                self.waiters.remove(waiter)
                continue
            now = self._loop.time()
            wait_s = self.limiter.wait_s(waiter.estimate, now)
            if wait_s > 0:
                if wait_s < inf:
                    self._timer = self._loop.call_later(max(wait_s, _MIN_TIMER_S), self.pump)
                return
            self.waiters.pop()
            slot = self.limiter.enter(waiter.estimate, now)
            slot.topic, slot.value = waiter.topic, waiter.value
            self.in_flight += 1
            self.queues.granted(slot)
            waiter.slot.set_result(slot)
            self._react()

    def answered(self, slot: Slot) -> None:
        """Record that the upstream answered the call with a stream."""
        self.limiter.answered(slot, self._loop.time())
        self.pump()

    def succeeded(self, slot: Slot) -> None:
        """Record that the call had its first delta, or completed without one."""
        self.limiter.succeeded(slot, self._loop.time())
        self._react()

    def failed(self, slot: Slot, error: JobError, job_id: str, *, is_repeated: bool) -> Verdict:
        """Record that the call failed before its first delta; return what that means for the job."""
        self._last_error = error.code
        verdict = self.limiter.failed(
            slot,
            error,
            self._loop.time(),
            job_id=job_id,
            is_repeated=is_repeated,
            has_others=self.limiter.streams > 1 or len(self.waiters) > 0,
            random=random(),  # noqa: S311 - jitter
        )
        self._react()
        return verdict

    def leave(self, slot: Slot, tokens: int | None, completion: int | None) -> None:
        """End the call."""
        self.limiter.leave(slot, tokens, completion)
        self.waiters.leave(topic=slot.topic, value=slot.value)
        self.pump()

    def refusal(self, waited_s: float) -> JobError:
        """Return the error of a job that waited for as long as it may."""
        code, what = _HELD[self.held or HoldReason.UNAVAILABLE]
        # Not in the upstream's words: they were about another job, and may repeat its prompt.
        message = f"the job waited {waited_s:.0f} s for the upstream {self.name}, which {what}"
        if code is ErrorCode.UPSTREAM_UNAVAILABLE and self._last_error is not None:
            message += f"; its last call failed with {self._last_error.value}"
        return JobError(code, message, retriable=True)

    def describe_hold(self) -> str | None:
        """Return what the queue's jobs wait for, as part of a sentence; None if they are not held back."""
        return None if (held := self.held) is None else f"the upstream {self.name}, which {_HELD[held][1]}"

    def state(self) -> dict[str, object]:
        """Return the upstream's state, for `/readyz`."""
        return {
            "circuit": self._state.name.lower(),
            "held": self.held,
            "held_s": round(self.held_s, 1),
            "streams_open": self.streams_open,
            "streams_limit": self.streams_limit,
            "jobs_waiting": self.jobs_waiting,
        }

    def _react(self) -> None:
        """Report a circuit or a hold that has changed, and move the jobs that it concerns."""
        state, circuit = self.limiter.circuit.state, self.limiter.circuit
        is_changed, self._state = state is not self._state, state
        if is_changed:
            self._observer.circuit_changed(self.name, state.name.lower(), circuit.reason)
        was_held = self._held
        self._update_hold()
        if is_changed and state is CircuitState.CLOSED:
            self.pump()
        elif (is_changed and state is CircuitState.OPEN) or (was_held is None and self._held is not None):
            self._reroute()

    def _update_hold(self) -> None:
        held = self.held
        if held == self._held:
            return
        now = self._loop.time()
        if self._held is None:
            self._held_since = now
        if held is None:
            self._observer.upstream_released(self.name, self._held or "", now - self._held_since)
            self._held_since = inf
        else:
            self._key = self._policy.key_version()
            self._observer.upstream_held(self.name, held)
        self._held = held

    def _reroute(self) -> None:
        """Move jobs that have a fallback to it; fail those that must not wait."""
        queues = {self}
        for waiter in self.waiters.clear():
            queue = self.queues.choose(waiter.upstreams)
            if queue.is_shut and not waiter.is_patient:
                waiter.refuse(self.refusal(self._loop.time() - waiter.since))
            else:
                queue.join(waiter)
                queues.add(queue)
        for queue in queues:
            queue.pump()
        self._schedule_sweep()

    def _schedule_sweep(self) -> None:
        if self._sweeper is None and (self._held is not None or self.held is not None):
            self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Fail jobs that waited too long; probe early where a key was replaced or a job's wait is about to end."""
        self._sweeper = None
        self._update_hold()
        now = self._loop.time()
        if self._held is not None:
            circuit = self.limiter.circuit
            if circuit.reason is not HoldReason.UNAVAILABLE and self._policy.key_version() != self._key:
                self._key = self._policy.key_version()
                circuit.probe_soon(now)
            if not circuit.is_probing(now):
                for waiter in [waiter for waiter in self.waiters if self._due(waiter) <= now]:
                    self.waiters.remove(waiter)
                    waiter.refuse(self.refusal(now - waiter.since))
            if any(self._ends(waiter, now) <= now + 2 * _SWEEP_S for waiter in self.waiters):
                circuit.probe_soon(now)
        self.pump()
        if self._held is not None or self.waiters:
            self._schedule_sweep()

    def _due(self, waiter: Waiter) -> float:
        """Return when the job has waited for as long as it may, on the loop's clock."""
        longest_s = self._policy.max_wait_s
        if waiter.job.max_wait_s is not None:
            longest_s = min(longest_s, waiter.job.max_wait_s)
        return max(waiter.since, self._held_since) + longest_s

    def _ends(self, waiter: Waiter, now: float) -> float:
        """Return when the job's wait ends, by `max_wait_s` or by its deadline."""
        deadline = waiter.job.deadline
        left_s = inf if deadline is None else deadline - self.queues.now_ms() / 1000
        return min(self._due(waiter), now + left_s)
