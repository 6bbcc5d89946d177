"""The lines of a run that have not ended: their jobs can be cancelled, and they can fail without an ending."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.batch.index import State
from streamworker.batch.submission import request_at
from streamworker.kafka.sink import publish
from streamworker.wire.control import write_cancel

if TYPE_CHECKING:
    from streamworker.batch.identity import JobIds
    from streamworker.batch.ledger import Ledger
    from streamworker.batch.ports import BatchInput
    from streamworker.config import Settings

__all__ = ["ANY_OPEN", "OpenLines"]

ANY_OPEN = (State.PENDING, State.SUBMITTED, State.UNKNOWN)


class OpenLines:
    """Ends lines for the run."""

    def __init__(self, settings: Settings, ledger: Ledger, source: BatchInput, ids: JobIds, run: str) -> None:
        """`run` is the run's name, which the cancellations give as their reason."""
        self._settings = settings
        self._ledger = ledger
        self._source = source
        self._ids = ids
        self._run = run

    async def cancel(self) -> None:
        """Write a cancellation for each job in flight. Raises KafkaError."""
        index = self._ledger.index
        ids = [
            self._ids.job_id(index.digest(line), index.round(line))
            for line in index.lines_in(State.SUBMITTED)
        ]
        if ids:
            entries = ((job_id.encode(), write_cancel(job_id, f"batch {self._run}")) for job_id in ids)
            await publish(self._settings.kafka, self._settings.topics.control, entries)

    async def fail(self, code: str, message: str, *states: State) -> None:
        """Write the error line of each line in these states. Raises RunStopped if the input has changed."""
        index = self._ledger.index
        for line in index.lines_in(*states):
            state = index.state(line)
            request = await request_at(self._ledger, self._source, line)
            if index.is_in(line, state):
                self._ledger.fail(line, request.custom_id, code, message, retriable=True)
