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

from streamworker.core.retry import falls_back
from streamworker.errors import UpstreamError
from streamworker.model import Cause, JobError, Status
from streamworker.worker.execution import Execution
from streamworker.worker.gates import Permit
from streamworker.worker.patience import Interruption, Patience

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AsyncExitStack

    from streamworker.core.attempt import Attempt
    from streamworker.worker.execution import Tools, UpstreamSlot
    from streamworker.worker.gates import Gates
    from streamworker.worker.intake import Accepted
    from streamworker.worker.lane import Lane

__all__ = ["Course"]


class Course:
    """One delivery of one job."""

    def __init__(
        self,
        tools: Tools,
        accepted: Accepted,
        lane: Lane,
        gates: Gates,
        slots: Mapping[str, UpstreamSlot],
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
        self._lane = lane
        self._gates = gates
        self._slots = slots
        self._cause: Cause = cause
        self._turn: AbstractAsyncContextManager[None] | None = turn
        self._tries = self._restarts = 0
        self._patience: Patience | None = None
        self._execution: Execution | None = None
        self._cancel_reason: str | None = None

    async def run(self, held: AsyncExitStack) -> None:
        """Run the job to its end; its terminal event is durable then. Its turn is held until `held` is left."""
        upstreams: Sequence[str] = self._accepted.upstreams
        while upstreams:
            upstreams = await self._attempt(upstreams, held)

    def cancel(self, reason: str) -> None:
        """End the job because a control record asked for it; it gets its terminal event."""
        self._cancel_reason = reason
        if self._execution is not None:
            self._execution.cancel(reason)
        elif self._patience is not None:
            self._patience.interrupt(Interruption.CANCEL)

    async def _attempt(self, upstreams: Sequence[str], held: AsyncExitStack) -> Sequence[str]:
        """Make one attempt; return the upstreams for the next one, none if the job has ended."""
        admission = await self._admission(upstreams, held)
        permit = admission if isinstance(admission, Permit) else None
        upstream = upstreams[0] if permit is None else permit.upstream
        # Where no permit was had, all of them said no.
        following = () if isinstance(admission, JobError) else upstreams[upstreams.index(upstream) + 1 :]
        with permit or nullcontext():
            execution = self._execution = self._begin(upstream, permit, has_fallback=bool(following))
            try:
                await execution.stream(instead=None if isinstance(admission, Permit) else admission)
                self._execution = None
                left = self._what_follows(execution.attempt, upstream, following)
                if not left:
                    # In flight until its end is durable: for what is not, a crash makes us pay again.
                    await execution.finish()
            finally:
                execution.release()
        return left

    async def _admission(
        self, upstreams: Sequence[str], held: AsyncExitStack
    ) -> Permit | Interruption | JobError:
        """Wait for the job's turn and for a permit; or return what ended the waiting."""
        if self._cancel_reason is not None:
            return Interruption.CANCEL
        if self._left_s() <= 0:
            return Interruption.DEADLINE
        deadline = asyncio.get_running_loop().time() + self._left_s()
        patience = self._patience = Patience(first_delta_s=inf, idle_s=inf, deadline=deadline)
        async with patience:
            if self._turn is not None:
                turn, self._turn = self._turn, None
                await held.enter_async_context(turn)
            try:
                return await self._gates.enter(upstreams, self.job)
            except UpstreamError as refusal:
                return refusal.error
        assert patience.interruption is not None, "nothing else ends the waiting"
        return patience.interruption

    def _begin(self, upstream: str, permit: Permit | None, *, has_fallback: bool) -> Execution:
        if self.is_waiting:
            self.is_waiting = False
            self._lane.progress.count(self.job.source.offset)
        execution = Execution(
            self._tools,
            self.job,
            self._slots[upstream],
            self._lane,
            self._gates,
            to=self._accepted.to,
            cause=self._cause,
            attempt_id=uuid4().hex,
            tries=self._tries,
            permit=permit,
            has_fallback=has_fallback,
            span=self.span,
        )
        if self._cancel_reason is not None:
            execution.cancel(self._cancel_reason)
        return execution

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
            and self._restarts < self._slots[upstream].max_restarts
        ):
            self._restarts += 1
            return (upstream, *following)
        return ()

    def _left_s(self) -> float:
        return inf if self.job.deadline is None else self.job.deadline - self._tools.clock.now_ms() / 1000
