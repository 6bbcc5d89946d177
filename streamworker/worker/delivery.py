"""The course of one delivered job: it waits for its turn, then makes as many attempts as it takes to end it.

An attempt belongs to one upstream. What a try may do again within it, `execution` decides; what takes a new attempt is
decided here: a stream that broke, for a job that prefers a restart to half an answer, and an upstream that failed the
job where another one is configured to fall back on.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from math import inf
from typing import TYPE_CHECKING
from uuid import uuid4

from streamworker.errors import UpstreamError
from streamworker.model import Cause, JobError, Status
from streamworker.stream.retry import falls_back
from streamworker.worker.queues import Slot
from streamworker.worker.runner import AttemptRunner
from streamworker.worker.timeouts import Interrupt, StreamTimeouts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AsyncExitStack

    from streamworker.stream.attempt import Attempt
    from streamworker.worker.committer import PartitionCommitter
    from streamworker.worker.intake import Accepted
    from streamworker.worker.queues import UpstreamQueues
    from streamworker.worker.runner import Tools, UpstreamPolicy

__all__ = ["Delivery"]


class Delivery:
    """One delivery of one job."""

    def __init__(
        self,
        tools: Tools,
        accepted: Accepted,
        committer: PartitionCommitter,
        queues: UpstreamQueues,
        policies: Mapping[str, UpstreamPolicy],
        *,
        cause: Cause,
        turn: AbstractAsyncContextManager[None],
    ) -> None:
        """Prepare it. `turn` is waited for before anything else: the job's place behind those of its key."""
        self.job = accepted.job
        self.span = accepted.span
        self.is_waiting = True
        """Nothing of the job was begun: no call was made, nothing was written."""
        self._tools = tools
        self._accepted = accepted
        self._committer = committer
        self._queues = queues
        self._policies = policies
        self._cause: Cause = cause
        self._turn: AbstractAsyncContextManager[None] | None = turn
        self._tries = self._restarts = 0
        self._timeouts: StreamTimeouts | None = None
        self._runner: AttemptRunner | None = None
        self._cancel_reason: str | None = None

    async def run(self, held: AsyncExitStack) -> None:
        """Run the job to its end; its terminal event is durable then. Its turn is held until `held` is left."""
        upstreams: Sequence[str] = self._accepted.upstreams
        while upstreams:
            upstreams = await self._attempt(upstreams, held)

    def cancel(self, reason: str) -> None:
        """End the job because a control record asked for it; it gets its terminal event."""
        self._cancel_reason = reason
        if self._runner is not None:
            self._runner.cancel(reason)
        elif self._timeouts is not None:
            self._timeouts.interrupt(Interrupt.CANCEL)

    async def _attempt(self, upstreams: Sequence[str], held: AsyncExitStack) -> Sequence[str]:
        """Make one attempt; return the upstreams for the next one, none if the job has ended."""
        admission = await self._admission(upstreams, held)
        slot = admission if isinstance(admission, Slot) else None
        upstream = upstreams[0] if slot is None else slot.upstream
        # Where no permit was had, all of them said no.
        following = () if isinstance(admission, JobError) else upstreams[upstreams.index(upstream) + 1 :]
        with slot or nullcontext():
            runner = self._runner = self._begin(upstream, slot, has_fallback=bool(following))
            try:
                await runner.stream(instead=None if isinstance(admission, Slot) else admission)
                self._runner = None
                left = self._what_follows(runner.attempt, upstream, following)
                if not left:
                    # In flight until its end is durable: for what is not, a crash makes us pay again.
                    await runner.finish()
            finally:
                runner.release()
        return left

    async def _admission(self, upstreams: Sequence[str], held: AsyncExitStack) -> Slot | Interrupt | JobError:
        """Wait for the job's turn and for a permit; or return what ended the waiting."""
        if self._cancel_reason is not None:
            return Interrupt.CANCEL
        if self._left_s() <= 0:
            return Interrupt.DEADLINE
        deadline = asyncio.get_running_loop().time() + self._left_s()
        timeouts = self._timeouts = StreamTimeouts(first_delta_s=inf, idle_s=inf, deadline=deadline)
        async with timeouts:
            if self._turn is not None:
                turn, self._turn = self._turn, None
                await held.enter_async_context(turn)
            try:
                return await self._queues.enter(upstreams, self.job)
            except UpstreamError as refusal:
                return refusal.error
        assert timeouts.interrupted_by is not None, "nothing else ends the waiting"
        return timeouts.interrupted_by

    def _begin(self, upstream: str, slot: Slot | None, *, has_fallback: bool) -> AttemptRunner:
        if self.is_waiting:
            self.is_waiting = False
            self._committer.progress.count(self.job.source.offset)
        runner = AttemptRunner(
            self._tools,
            self.job,
            self._policies[upstream],
            self._committer,
            self._queues,
            to=self._accepted.to,
            cause=self._cause,
            attempt_id=uuid4().hex,
            tries=self._tries,
            slot=slot,
            has_fallback=has_fallback,
            span=self.span,
        )
        if self._cancel_reason is not None:
            runner.cancel(self._cancel_reason)
        return runner

    def _what_follows(self, attempt: Attempt, upstream: str, following: Sequence[str]) -> Sequence[str]:
        self._cause, self._tries = "restart", attempt.tries
        if attempt.error is None:
            return ()
        if attempt.status is Status.FAILED and following and falls_back(attempt.error):
            self._tools.observer.fell_back(self.job, upstream, attempt.error)
            return following
        is_broken = attempt.status is Status.INTERRUPTED and attempt.error.retriable
        if (
            is_broken
            and self.job.on_break == "restart"
            and self._restarts < self._policies[upstream].max_restarts
        ):
            self._restarts += 1
            return (upstream, *following)
        return ()

    def _left_s(self) -> float:
        return inf if self.job.deadline is None else self.job.deadline - self._tools.clock.now_ms() / 1000
