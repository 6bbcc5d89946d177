"""One delivery of one job: waits for the job's turn, then makes attempts until the job has ended.

An attempt belongs to one upstream; its runner repeats tries within it. A new attempt follows in two cases: a stream
broke and the job asks for a restart, or the upstream failed the job and has a fallback.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from streamworker.model import Cause, Status
from streamworker.stream.retry import falls_back
from streamworker.stream.usage import VoidedUsage
from streamworker.worker.runner import AttemptRunner
from streamworker.worker.timeouts import StreamTimeouts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from streamworker.stream.attempt import Attempt
    from streamworker.worker.committer import PartitionCommitter
    from streamworker.worker.intake import Accepted
    from streamworker.worker.runner import Tools

__all__ = ["Delivery", "HeldTurn"]


class HeldTurn:
    """Holds a job's turn until it is left. An `AsyncExitStack` would take 700 bytes of each open stream."""

    __slots__ = ("_turn",)

    def __init__(self) -> None:
        self._turn: AbstractAsyncContextManager[None] | None = None

    async def enter(self, turn: AbstractAsyncContextManager[None]) -> None:
        """Wait for the turn of the job, and hold it. A job that is delivered again has it already."""
        await turn.__aenter__()
        self._turn = self._turn or turn

    async def __aenter__(self) -> Self:
        """Hold nothing yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the turn, if it is held."""
        if self._turn is not None:
            await self._turn.__aexit__(kind, error, traceback)


class Delivery:
    """One delivery of one job."""

    def __init__(
        self,
        tools: Tools,
        accepted: Accepted,
        committer: PartitionCommitter,
        *,
        cause: Cause,
        turn: AbstractAsyncContextManager[None],
    ) -> None:
        """`turn` is entered before anything else: it waits for the earlier jobs of the same key."""
        self.job = accepted.job
        self.span = accepted.span
        self.is_waiting = True
        """Whether nothing of the job has begun: no call was made, no event was written."""
        self.is_finished = False
        """Whether the job's terminal event is durable."""
        self._runner: AttemptRunner | None = None
        self._tools = tools
        self._accepted = accepted
        self._committer = committer
        self._cause: Cause = cause
        self._turn = turn
        self._tries = self._restarts = 0
        self._voided = VoidedUsage()
        self._waits_since = asyncio.get_running_loop().time()
        self._timeouts = StreamTimeouts(tools.clock, accepted.job.deadline)

    @property
    def is_between_tries(self) -> bool:
        """Whether a try has failed and the job waits for the next one: no call is open."""
        return self._runner is not None and self._runner.is_between_tries

    async def run(self, held: HeldTurn) -> None:
        """Run the job until its terminal event is durable. The job's turn is held until `held` is closed."""
        if self._timeouts.pending is None:
            async with self._timeouts.watch():
                await held.enter(self._turn)
        upstreams: Sequence[str] = self._accepted.upstreams
        while upstreams:
            upstreams = await self._make_attempt(upstreams)

    def cancel(self, reason: str) -> None:
        """End the job with its terminal event, because a control record cancelled it."""
        self._timeouts.cancel(reason)

    async def _make_attempt(self, upstreams: Sequence[str]) -> Sequence[str]:
        """Make one attempt; return the upstreams for the next attempt, none if the job has ended."""
        self._runner = runner = AttemptRunner(
            self._tools,
            self._accepted,
            self._committer,
            self._timeouts,
            upstreams=upstreams,
            cause=self._cause,
            tries=self._tries,
            voided=self._voided,
            waits_since=self._waits_since,
            on_opened=self._begin,
        )
        try:
            attempt = await runner.stream()
            self._cause, self._tries = "restart", attempt.tries
            if attempt.first_delta_ms is not None:
                self._waits_since = asyncio.get_running_loop().time()
            following = self._following(attempt, runner)
            if following:
                self._voided.add(attempt.ledger.report_of_call)
            else:
                # The job stays in flight until its end is durable: a crash before that repeats a paid call.
                await runner.finish(attempt)
        finally:
            self._runner, self.is_finished = None, runner.is_finished
            runner.release()
        return following

    def _begin(self) -> None:
        if self.is_waiting:
            self.is_waiting = False
            self._committer.progress.count(self.job.source.offset)

    def _following(self, attempt: Attempt, runner: AttemptRunner) -> Sequence[str]:
        if attempt.error is None:
            return ()
        upstream, fallbacks = runner.policy.name, runner.fallbacks
        if attempt.status is Status.FAILED and fallbacks and falls_back(attempt.error):
            self._tools.observer.fell_back(self.job, upstream, attempt.error)
            return fallbacks
        is_broken = attempt.status is Status.INTERRUPTED and attempt.error.retriable
        if is_broken and self.job.on_break == "restart" and self._restarts < runner.policy.max_restarts:
            self._restarts += 1
            return (upstream, *fallbacks)
        return ()
